"""Time of GPU kernels by class, from torch's profiler.

A kernel's class follows from its name. What Inductor fuses into a Triton kernel is named after the operations in it; of several
the most specific one decides, in the order of FUSED: a pass over the logits that also casts is one of the loss. A Triton kernel
that multiplies matrices is a template, so `addmm` in the name of any other is only the bias that it adds.
"""

import re
from typing import Any

import torch

from lib.tables import table

REDUCTION = "between GPUs"  # while it runs, the same GPU may compute
CLASSES = ("matmul", "attention forward", "attention backward", "cross-entropy, softmax", "LayerNorm", "GELU", "elementwise",
           "optimizer, clipping", "copies", "other", REDUCTION)
# The first pattern that is found in a name, in lower case, decides. Attention before matmul: its kernels are built of the same
# libraries (cutlass, cuDNN).
NAMED = (
    (r"^nccl", REDUCTION),
    (r"(flash|fmha|sdpa|attention|attn).*(bwd|bprop|backward|cutlassb)|compute_dot_do_o|convert_dq", "attention backward"),
    (r"flash|fmha|sdpa|attention|attn", "attention forward"),
    (r"multi_tensor_apply|adam|foreach|lpnorm", "optimizer, clipping"),
    (r"softmax|nll_loss|cross_entropy|crossentropy", "cross-entropy, softmax"),
    (r"layer_?norm|gammabeta", "LayerNorm"),
    (r"gelu", "GELU"),
    (r"gemm|gemv|cublas|cutlass|nvjet|wgmma|xmma|splitk|matmul|dot_kernel", "matmul"),
    (r"copy|memcpy|memset|catarray|transpose", "copies"),
    (r"elementwise|reduce_kernel|fillfunctor|embedding", "elementwise"),
)
FUSED = (
    (r"softmax|nll_loss|cross_entropy|logsumexp", "cross-entropy, softmax"),
    (r"layer_norm", "LayerNorm"),
    (r"gelu", "GELU"),
    (r"adam|foreach", "optimizer, clipping"),
)
TEMPLATE = re.compile(r"triton_(tem|mm)_")
TRITON = re.compile(r"triton_(?:poi|per|red|for|split_scan|mix_order_reduction)\w*?_fused_(\w+?)_?\d*$")
# Operations that move numbers and compute none.
MOVING = re.compile(r"(_to_copy|_unsafe_view|view|clone|copy_?|cat|split_with_sizes|split|slice|select|transpose|permute|"
                    r"expand|unsqueeze|squeeze|constant_pad_nd|t|_)+")
NONE = {"ms": 0.0, "launches": 0.0}
LARGEST = 12  # kernels listed by name


def kernel_class(name: str) -> str:
    """The class of the kernel `name`, one of CLASSES."""
    low = name.lower()
    if low.startswith("triton_"):
        if TEMPLATE.match(low):
            return "matmul"
        fused = TRITON.match(low)
        words = fused[1] if fused else low
        for pattern, found in FUSED:
            if re.search(pattern, words):
                return found
        return "copies" if fused and MOVING.fullmatch(words) else "elementwise"
    return next((found for pattern, found in NAMED if re.search(pattern, low)), "other")


def tally(kernels: list[tuple[str, float]], steps: int) -> dict:
    """Of (name, microseconds) of every kernel that ran in `steps` steps: milliseconds and launches of a step, in all and by
    class, and the largest kernels by name."""
    classes = {name: dict(NONE) for name in CLASSES}
    names: dict[str, float] = {}
    for name, microseconds in kernels:
        found = classes[kernel_class(name)]
        found["ms"] += microseconds / 1e3 / steps
        found["launches"] += 1 / steps
        names[name] = names.get(name, 0.0) + microseconds / 1e3 / steps
    largest = sorted(names.items(), key=lambda item: -item[1])[:LARGEST]
    return {"ms": sum(c["ms"] for c in classes.values()), "launches": sum(c["launches"] for c in classes.values()),
            "classes": classes, "largest": [{"name": n[:120], "class": kernel_class(n), "ms": ms} for n, ms in largest]}


def profile(device: torch.device, step: Any, steps: int) -> dict:
    """`tally` of so many calls of `step` on a GPU. What the profiler costs the host is in no kernel's time. RuntimeError if it
    saw no kernel."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    seen = kernels_of(profiler.events())
    if not seen:
        raise RuntimeError("the profiler saw no kernel")
    return tally(seen, steps)


def kernels_of(events: Any) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on the GPU; a range that was only marked there is no kernel."""
    return [(e.name, e.time_range.elapsed_us()) for e in events
            if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]


def by_class(profiles: dict[str, dict]) -> str:
    """Markdown: milliseconds of kernels a step by class, a column for each named profile; only classes with a kernel."""
    classes = [name for name in CLASSES if any(found["classes"].get(name, NONE)["launches"] for found in profiles.values())]
    columns = [[f"{found['classes'].get(name, NONE)['ms']:.2f}" for name in classes]
               + [f"{found['ms']:.2f}", f"{found['launches']:.0f}"] for found in profiles.values()]
    rows = zip([*classes, "all kernels", "launches a step"], *columns, strict=True)
    return table(["kernels, ms a step", *profiles], [list(row) for row in rows], "l" + "r" * len(profiles))
