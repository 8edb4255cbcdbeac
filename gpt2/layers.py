"""Layers as GPT-2 has them, whose start is drawn once, by `init_weights`, from keyed streams.

Contract of the start: a weight is drawn on the CPU from a stream keyed by (seed, its first name in named_parameters());
arms that have a tensor of the same name and shape therefore start from the same numbers, on every device, and a tensor that
is the baseline's with rows left out (`rows` of a Linear) starts from the baseline's numbers in those rows. Constructors draw
nothing. Biases start at 0, norms at 1, and a mechanism's own constants (gates, mixers) are set by its constructor.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lib.streams import stream_seed

INIT_STD = 0.02  # GPT-2's initializer_range
# Asked here, because a compiler does not follow the question into C++ before torch 2.13: it would break its program there.
AUTOCAST_DEVICES = tuple(kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind))


class Linear(nn.Linear):
    """nn.Linear drawn from N(0, init_std^2); `init_std` is smaller for layers that write to the residual stream.

    `rows`: which of the `out_features` rows there are, ascending (None: all); the others are drawn and left out.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_std: float = INIT_STD,
                 rows: list[int] | None = None):
        self.init_std, self.drawn, self.rows = init_std, out_features, rows
        super().__init__(in_features, out_features if rows is None else len(rows), bias=bias)

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, as F.linear. Of a single row, a compiler is given the bias apart: it then makes one kernel of the
    product and of what stands around it, where a library's is made for many rows."""
    if bias is not None and x.numel() == x.size(-1) and torch.compiler.is_compiling():
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type in which autocast takes products on this device; None without it."""
    known = device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if known else None


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast for what is done to x."""
    known = x.device.type in AUTOCAST_DEVICES
    return torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext()


class Embedding(nn.Embedding):
    """nn.Embedding drawn from N(0, init_std^2)."""

    init_std = INIT_STD

    def reset_parameters(self) -> None:
        pass


def residual_std(n_layer: int) -> float:
    """Standard deviation for the two layers of a block that write to the residual stream (GPT-2: 1/sqrt(2 L))."""
    return INIT_STD / (2 * n_layer) ** 0.5


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Draw every weight of `model` that has an `init_std`, in place, as the module docstring says."""
    def draw(name: str, parameter: Any, module: Any) -> None:
        generator = torch.Generator().manual_seed(stream_seed(seed, "init", name))
        rows = getattr(module, "rows", None)
        shape = parameter.shape if rows is None else (module.drawn, *parameter.shape[1:])
        drawn = torch.empty(shape).normal_(0.0, module.init_std, generator=generator)
        with torch.no_grad():  # a thread has a mode of its own
            parameter.copy_(drawn if rows is None else drawn[rows])

    owners = [(name, parameter, model.get_submodule(name.rpartition(".")[0])) for name, parameter in model.named_parameters()
              if name.rpartition(".")[2] == "weight"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # every weight has a stream of its own, so their order does not matter
        list(pool.map(lambda one: draw(*one), (one for one in owners if hasattr(one[2], "init_std"))))
