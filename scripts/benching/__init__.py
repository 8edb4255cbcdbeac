"""What the benches of training and attention share: a model in training, blocks in turns, memory, rows that fail.

Invariants: a block of steps begins and ends with the device idle, so its seconds are those of the work and not of the queue.
What is compared is measured in turns (A B C A B C ... A), so that a clock that drifts moves all of it alike: a ratio is that
of a block to the mean of the two blocks of the first beside it. Memory is one model's, whatever else is allocated.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from lib import gradients, runtime
from lib.errors import UserError
from lib.kconfig import Assignment
from lib.loop import COMPILE_WARMUP_STEPS
from lib.mechanisms import Mechanisms

if TYPE_CHECKING:
    from lib.config import Config

# Symbols that change neither the program of a step nor its sizes.
SAME_PROGRAM = ("LEARNING_RATE", "LEARNING_RATE_MULT", "GPT2_MIN_LR", "STREAMS")


class Training:
    """A model in training; a subclass says in `batch` on what. `compiled`: "whole", "blocks" (of our own model) or "no".
    `graphs`: replay forward and backward pass as a CUDA graph, from `capture` on."""

    def __init__(self, cfg: "Config", device: torch.device, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                 compiled: str, graphs: bool = False):
        self.cfg, self.device, self.model, self.optimizer = cfg, device, model, optimizer
        self.mechanisms, self.graphs = Mechanisms(model), graphs and device.type == "cuda"
        self.uncapture()
        self.own_bytes = self.peak = 0
        if compiled == "whole":
            model.compile(dynamic=False)
        elif compiled == "blocks":
            model.compile_regions()  # type: ignore[operator]  # GPT's

    def batch(self) -> tuple:
        """The next inputs and targets, on the device."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """One step of lib/loop.py on the next batch; the loss before it, detached and on the device."""
        x, y = self.batch()
        self.shape = tuple(x.shape)
        loss = self.gradient(x, y)
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.clone()

    def clip(self) -> None:
        gradients.clip(self.model, self.optimizer, self.cfg.GRAD_CLIP)

    def uncapture(self) -> None:
        """Go on without a graph."""
        self.gradient: Any = gradients.Gradient(self.cfg, self.model, self.mechanisms, self.device)

    def capture(self) -> None:
        """After a step, go on with a graph, if there is to be one and is none. What capturing needs at most counts as a step's
        memory."""
        if self.graphs and isinstance(self.gradient, gradients.Gradient):
            before = allocated(self.device)
            self.gradient = gradients.Replayed(self.gradient, self.shape, self.device)
            self.peak = self.own_bytes + self.gradient.peak_bytes - before
            self.own_bytes += allocated(self.device) - before

    def block(self, steps: int) -> float:
        """Train for so many steps; seconds of one."""
        runtime.synchronize(self.device)
        begun = time.perf_counter()
        for _ in range(steps):
            self.step()
        runtime.synchronize(self.device)
        return (time.perf_counter() - begun) / steps

    def watched(self, steps: int) -> float:
        """A block, whose peak of allocated memory on a GPU counts."""
        if self.device.type != "cuda":
            return self.block(steps)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = allocated(self.device)
        seconds = self.block(steps)
        self.peak = max(self.peak, self.own_bytes + torch.cuda.max_memory_allocated(self.device) - before)
        return seconds

    def memory_bytes(self) -> int:
        """Most bytes at once of this model alone: on a GPU of the blocks watched so far, elsewhere counted."""
        return self.peak if self.device.type == "cuda" else self.counted_bytes()

    def counted_bytes(self) -> int:
        """Bytes a training step needs at once at most, from the tensors it holds, after a first block."""
        own = storages([*self.model.parameters(), *self.model.buffers()])
        kept = {}

        def keep(tensor: torch.Tensor) -> Any:
            kept.update(storages([tensor]))
            return tensor

        x, y = self.batch()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast(self.cfg, self.device):
            loss = self.model.forward(x, y)[1] + self.mechanisms.penalty()
        kept = {where: size for where, size in kept.items() if where not in own}
        loss.backward()  # what it frees may be used for the gradients, so these have a sum of their own
        gradients = storages([p.grad for p in self.model.parameters() if p.grad is not None])
        state = storages([t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)])
        self.optimizer.zero_grad(set_to_none=True)
        return sum(sum(found.values()) for found in (own, kept, gradients, state))


def started(build: Any, device: torch.device) -> tuple[Training, float]:
    """What `build` makes, warm, and the seconds from its first step until it was (most of them are the compiler's)."""
    before = allocated(device)
    training = build()
    seconds = training.block(COMPILE_WARMUP_STEPS) * COMPILE_WARMUP_STEPS
    training.own_bytes = allocated(device) - before
    training.capture()
    return training, seconds


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def storages(tensors: Any) -> dict[int, int]:
    """{address: bytes} of what tensors that live at the same time lie in."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def in_turns(calls: list, rounds: int) -> list[list[float]]:
    """What each call returned, round by round; the first is called once more, at the end."""
    found = [[] for _ in calls]
    for _ in range(rounds):
        for values, call in zip(found, calls, strict=True):
            values.append(call())
    found[0].append(calls[0]())
    return found


def ratios(own: list[float], beside: list[float]) -> list[float]:
    """Each of `own` over the mean of the two of `beside` between which it was measured."""
    return [value / mean(pair) for value, pair in zip(own, zip(beside, beside[1:], strict=False), strict=True)]


def spread(name: str, values: list[float]) -> dict:
    """{name: median, name_min, name_max}."""
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def failure(error: Exception, batch: int | None = None) -> str:
    """Why a row has no numbers, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory" + (f" at a batch of {batch}" if batch else "")
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150] if lines else 'without a word'}"


def release(device: torch.device) -> None:
    """Give back what models that are gone have held."""
    gc.collect()  # a compiled model refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()


def environment(cfg: "Config", device: torch.device, compiled: bool) -> dict:
    """Where it was measured, without the list of sources."""
    found = runtime.environment(cfg, device)
    return {k: v for k, v in found.items() if k != "sources"} | {"compile": compiled}


def narrator() -> Callable[[str], None]:
    """say(what): a line on standard error with the seconds since now."""
    begun = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {what}", file=sys.stderr, flush=True)

    return say


def shown(show: Any, paths: list[Path]) -> str:
    """What `show` makes of each file, with a line between; UserError for the first that it can make nothing of."""
    found = []
    for path in paths:
        try:
            found.append(show(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.", "give a file that --out wrote.") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is not what this bench writes.", "give a file that --out wrote.") from None
    return "\n".join(found)


def check_options(args: Any, names: tuple[str, ...], out: Path | None) -> None:
    """Refuse counts below 1 among the options `names`, and an `out` whose folder is not there."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is below 1.", "leave it out for the default.")
    if out and not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}.", "create it first.")


def assignments(texts: list[str], option: str) -> list[Assignment]:
    """["GPT2_N_LAYER=6"] as given by `option`."""
    for text in texts:
        if "=" not in text:
            raise UserError(f"'{text}' in {option} is no assignment.", f"write {option} GPT2_N_LAYER=6.")
    pairs = [text.partition("=") for text in texts]
    return [Assignment(name.removeprefix("CONFIG_"), value, option) for name, _, value in pairs]
