"""Model FLOPs utilisation of training: the share of a GPU's peak that the model's own arithmetic takes.

Convention (PaLM's): 6 N + 12 L d T FLOPs a token, N the parameters in matrices, those of a tied head too, without embeddings
that are only looked up; attention counted whole, not causal; nothing that is computed again. Peaks are dense bfloat16, from the
vendors' data sheets. Where the peak is not known there is no utilisation, and none for float32.
"""

import re

from torch import nn

# The first pattern found in the device's name counts.
PEAKS = ((r"H100 PCIe", 756e12), (r"H100 NVL", 835e12), (r"H100|H200", 989e12), (r"A100", 312e12), (r"L40S", 362e12),
         (r"\bL4\b", 121e12), (r"RTX 4090$", 165.2e12))


def matmul_parameters(model: nn.Module) -> int:
    """Parameters that every token meets: tensors of two dimensions and more, but for embeddings that are no head."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables - heads)


def flops_per_token(model: nn.Module, layers: int, width: int, context: int) -> int:
    """Of a training step, forward and backward."""
    return 6 * matmul_parameters(model) + 12 * layers * width * context


def peak_flops(device: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of a device by its name; None where it is not known."""
    if precision != "bfloat16":
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device)), None)
