"""What a decoding step cannot avoid, and what it takes: bytes that must move, the bandwidth they move with, memory held.

The floor of a step is `moved_bytes` over `bandwidth_of` its device; `floor_share` is the floor over a measured time. On a GPU
peak memory is the allocator's; on a CPU, which has no such count, it is counted from the tensors that live at once.
"""

import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2.model import GPT
from lib import runtime


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still live, `now`, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                where = storage._cdata
                if where not in self.known and where not in given:  # no view, and nothing written into
                    self.known[where] = storage.nbytes()
                    self.now += self.known[where]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, where)
        return found

    def forget(self, where: int) -> None:
        self.now -= self.known.pop(where)


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Most bytes that `call` held at once beyond what was allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with Live() as live:
        call()
    return live.peak


def held_bytes(tensors: Any) -> int:
    """Bytes of what tensors lie in, each storage once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def moved_bytes(model: GPT, batch: int, cache_bytes: int) -> int:
    """Bytes that a decoding step cannot avoid to move, at the last position of a cache of `cache_bytes` (of all sequences)."""
    token, position = model.transformer.wte.weight, model.transformer.wpe.weight
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) - position.numel() * position.element_size()
    rows = batch * token.size(1) * token.element_size() + position.size(1) * position.element_size()
    return parameters + rows + cache_bytes


def floor_share(moved: float, bandwidth: float, seconds: float) -> float:
    """The least time for so many bytes, over the measured one."""
    return moved / bandwidth / seconds


def bandwidth_of(device: torch.device, megabytes: int, rounds: int = 9) -> float:
    """Bytes a second that a large copy on the device reads and writes, the median of `rounds`; on a CPU those that a large sum
    reads, if they are more."""
    source = torch.ones(megabytes * 2 ** 18, device=device)
    target = torch.empty_like(source)

    def rate(number: int, call: Callable[[], Any]) -> float:
        call()
        found = []
        for _ in range(rounds):
            runtime.synchronize(device)
            begun = time.perf_counter()
            call()
            runtime.synchronize(device)
            found.append(number / (time.perf_counter() - begun))
        return median(found)

    size = megabytes * 2 ** 20
    copied = rate(2 * size, lambda: target.copy_(source))
    return copied if device.type == "cuda" else max(copied, rate(size, source.sum))
