"""What make bench-train trains: steps of a study and a peer, each from a start, on batches that are the same for all.

Invariants: batch i of a seed is a function of the data (or of the vocabulary), the seed and i. An arm of ours starts as a cell
of that seed does, and a peer whose parameters have the names and shapes of the baseline's starts from the baseline's numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gpt2.model import GPT
from lib import optimizers
from lib.config import Study
from lib.data import train_batch
from lib.kconfig import Assignment
from lib.loop import evaluate, to_device
from lib.mechanisms import Moment
from lib.schedule import learning_rate
from lib.streams import stream_seed
from scripts import benching
from scripts.benching.peer import Peer, take_start

if TYPE_CHECKING:
    from lib.config import Config

LAST_SHARE = 10  # the last tenth of the steps is what a training loss is the mean of


@dataclass(frozen=True)
class Arm:
    """What is trained: `make(device, seed)` gives its configuration, model, optimizer, and a remark for its row (or "")."""

    name: str
    make: Callable


class Trained(benching.Training):
    """An arm in training; `batches(number)` gives the arrays (x, y) of a step, counted from 0."""

    def __init__(self, arm: Arm, device: torch.device, seed: int, batches: Callable, compiled: bool):
        cfg, model, optimizer, self.remark = arm.make(device, seed)
        self.own = isinstance(model, GPT)
        regions = cfg.COMPILE_REGIONS and self.own
        super().__init__(cfg, device, model, optimizer, ("blocks" if regions else "whole") if compiled else "no",
                         graphs=cfg.CUDA_GRAPHS and self.own)
        self.arm, self.batches, self.number = arm, batches, 0

    def restart(self, seed: int, batches: Callable) -> None:
        """Begin anew from the start under `seed`, with what is compiled."""
        self.cfg, model, optimizer, _ = self.arm.make(self.device, seed)
        self.model.load_state_dict(model.state_dict())
        self.optimizer.load_state_dict(optimizer.state_dict())
        self.batches, self.number = batches, 0
        self.uncapture()  # the start may be another program than the end

    def batch(self) -> Any:
        self.number += 1
        return to_device(self.batches(self.number - 1), self.device)

    def clip(self) -> None:
        """A peer's way is its own: a pass over the gradients, as in nanoGPT's train.py."""
        if self.own:
            super().clip()
        elif self.cfg.GRAD_CLIP:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.GRAD_CLIP)


class Eager:
    """A model as `evaluate` wants it that runs as written: evaluation is not what is timed, and needs no program."""

    def __init__(self, model: nn.Module):
        self.forward, self.eval = model.forward, model.eval

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.forward(x, y)


def arms_of(study: Study, steps: list[str], peer: Peer | None) -> list[Arm]:
    def configured(step: str, seed: int) -> "Config":
        return study.resolve(step, overrides=[*study.overrides, Assignment("SEED", str(seed), "--seeds")]).config

    def ours(step: str) -> Arm:
        def make(device: torch.device, seed: Any) -> Any:
            cfg = configured(step, seed)
            model = GPT(cfg).to(device).train()
            return cfg, model, optimizers.build(model, cfg), ""
        return Arm(step, make)

    def theirs() -> Arm:
        def make(device: torch.device, seed: Any) -> Any:
            cfg = configured(steps[0], seed)
            model, optimizer = peer.build(cfg, device, seed)
            return cfg, model, optimizer, "" if take_start(model, GPT(cfg)) else "a start of its own"
        return Arm(peer.name, make)

    return [*map(ours, steps), *([theirs()] if peer else [])]


def batches_of(corpus: Any, vocab_size: int, seed: int, batch: int, block: int) -> Callable:
    """Batches by number, int64 [batch, block] each: windows of the corpus, or without one random tokens."""
    def windows(number: int) -> Any:
        return train_batch(corpus.train, seed, number, 0, batch, block)

    def random(number: int) -> Any:
        key = stream_seed(seed, "bench", number)
        tokens = np.random.default_rng(key).integers(vocab_size, size=(batch, block + 1))
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    return windows if corpus else random


def losses_of(arm: Arm, device: torch.device, seeds: list[int], batches: Callable, steps: int, compiled: bool,
              eval_set: Any) -> list[dict]:
    """What an arm has learned after so many steps from its start under each of `seeds`; batches(seed) are those of a seed."""
    training, found = None, []
    for seed in seeds:
        if training is None:
            training = Trained(arm, device, seed, batches(seed), compiled)
        else:
            training.restart(seed, batches(seed))
        curve = trained(training, steps)
        found.append({"seed": seed, "train_loss": mean(curve[-max(1, steps // LAST_SHARE):]),
                      "val_loss": evaluate(training.cfg, Eager(training.model), eval_set, device),
                      "curve": [round(loss, 5) for loss in curve]})
        training.model.train()
    return found


def trained(training: Trained, steps: int) -> list[float]:
    """The losses of so many steps under the study's schedule."""
    found, first = [], None
    for number in range(steps):
        share = number / steps
        if training.mechanisms.advance(Moment(number, share, found[-1].double() if found else None, first)):
            training.uncapture()
        rate = learning_rate(training.cfg, number, share)
        for group in training.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
        found.append(training.step())
        training.capture()  # once a step has compiled it
        first = found[0].item() if first is None else first
    return torch.stack(found).double().tolist()
