"""The cross-entropy of logits and its gradient in one kernel: a row is read from memory once and written once.

What Inductor makes of the same operations are two kernels, which read the logits twice and write them once, at more than twice
the time (docs/performance.md). Here a program takes a row, of V logits. It finds log sum exp in one sweep, and overwrites the
row with its gradient in a second one, which finds it still in the cache: the rows that are under way at a time fit into that.

The definition, which also computes it on a CPU, is in gpt2/head.py. Softmax is computed in float32.
"""

import torch
import triton
import triton.language as tl

BLOCK = 16384  # logits at a time
WARPS = 16  # with so many few rows are under way, and measured best of 8, 16 and 32, as BLOCK of 4096 to 65536


@triton.jit
def _softmax_gradient(logits, targets, share, losses, stride, vocabulary, ignored: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target != ignored
    top, total = -float("inf"), 0.0
    for start in range(0, vocabulary, block):
        at = start + tl.arange(0, block)
        x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    level = top + tl.log(total)
    own = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, level - own, 0.0))
    scale = tl.where(counts, tl.load(share), 0.0)
    tl.debug_barrier()  # the target's logit is read before any thread overwrites it
    for start in range(0, vocabulary, block):
        at = start + tl.arange(0, block)
        x = tl.load(logits + at, mask=at < vocabulary, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - level) - tl.where(at == target, 1.0, 0.0)) * scale
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < vocabulary)


def softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, share: torch.Tensor, ignored: int) -> torch.Tensor:
    """Losses [N], float32, of logits [N, V], whose rows are contiguous, and targets [N]; `share` is float32 of shape (). The
    logits become `share` times the gradient of the losses' sum."""
    losses = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _softmax_gradient[(logits.size(0),)](logits, targets, share, losses, logits.stride(0), logits.size(1), ignored, BLOCK,
                                             num_warps=WARPS)
    return losses
