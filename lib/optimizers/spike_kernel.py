"""The clipping of spikes in one pass: gradient and second moment are read once, the clipped gradient is written once.

The same by torch's foreach operations reads and writes the size of the parameters sixteen times, where all of AdamW does so
seven times. The definition, which also computes it on a CPU, is `clip_spikes` in lib/optimizers/adamw_spam.py.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # entries of a program


@triton.jit
def _clip(gradients, seconds, clipped, factor, tiny, entries, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < entries
    gradient = tl.load(gradients + at, mask=inside)
    limit = tl.sqrt_rn(tl.load(seconds + at, mask=inside)) * factor
    limit += tl.div_rn(tiny, limit)
    # What is not a number is no spike and stays.
    kept = tl.where(gradient > limit, limit, tl.where(gradient < -limit, -limit, gradient))
    tl.store(clipped + at, kept, mask=inside)


def clip(gradient: torch.Tensor, second: torch.Tensor, factor: float, tiny: float) -> torch.Tensor:
    """A new gradient g with |g| <= L = factor sqrt(second) + tiny / (factor sqrt(second)); both float32 and contiguous, of one
    shape, on a GPU."""
    clipped = torch.empty_like(gradient)
    entries = gradient.numel()
    with torch.cuda.device_of(gradient):
        _clip[(triton.cdiv(entries, BLOCK),)](gradient, second, clipped, factor, tiny, entries, BLOCK, num_warps=8)
    return clipped
