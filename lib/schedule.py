"""The budget of a cell and the learning rate as a function of its progress.

A budget is seconds of training, iterations, or tokens (rounded up to iterations). Progress runs from 0 to 1 whatever the
kind, and the schedule depends on progress, so that every arm finishes its schedule, also one that is slower per step.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.config import Config

WARMUP_SHARE = 0.1  # a warm-up of N steps ends after N steps or this share of the budget, whichever is first


@dataclass(frozen=True)
class Budget:
    """`seconds` or `iterations` of training; exactly one is not None. 0 iterations: nothing is trained."""

    seconds: float | None
    iterations: int | None

    @classmethod
    def from_config(cls, cfg: "Config") -> "Budget":
        if cfg.EVALUATE_ONLY:
            return cls(None, 0)
        if cfg.GPT2_MAX_TIME:
            return cls(float(cfg.GPT2_MAX_TIME), None)
        return cls(None, cfg.GPT2_MAX_ITERS or -(-cfg.GPT2_MAX_TOKENS // tokens_per_iteration(cfg)))

    def progress(self, iterations: int, seconds: float) -> float:
        """Share of the budget used, in [0, 1], after so many iterations and seconds of training."""
        if self.iterations == 0:
            return 1.0
        used = iterations / self.iterations if self.seconds is None else seconds / self.seconds
        return min(used, 1.0)


def tokens_per_iteration(cfg: "Config") -> int:
    """Tokens of one optimizer step."""
    return cfg.BATCH_SIZE * cfg.GPT2_GRADIENT_ACCUMULATION * cfg.GPT2_BLOCK_SIZE


def learning_rate(cfg: "Config", iteration: int, progress: float) -> float:
    """Rate of step `iteration` (from 0): linear warm-up times a cosine of progress from LEARNING_RATE to GPT2_MIN_LR.

    LEARNING_RATE_MULT scales the whole of it.
    """
    warmup = 1.0
    if cfg.GPT2_WARMUP_STEPS:
        warmup = min(1.0, max((iteration + 1) / cfg.GPT2_WARMUP_STEPS, progress / WARMUP_SHARE))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.LEARNING_RATE_MULT * (warmup * (cfg.GPT2_MIN_LR + (cfg.LEARNING_RATE - cfg.GPT2_MIN_LR) * cosine))
