"""Simulated studies: does the statistics of a report keep the error rates that it states?

Losses are drawn, nothing is trained: each seed gives every arm the same block effect plus noise of its own, so that the
differences of a family are correlated through their common baseline, as in a study. The functions under test are those
that make the report's verdicts. `make bench-stats` prints the table; the tests run it at a smaller size.
"""

from typing import Any

import numpy as np

from lib import anytime, stats
from lib.design import ERROR_RATE

NOISE, BLOCK = 0.01, 0.05  # nats: standard deviation of an arm within a block, and of the blocks


def losses(rng: np.random.Generator, studies: int, seeds: int, effects: Any) -> np.ndarray:
    """[studies, 1 + len(effects), seeds] final losses; arm 0 is the baseline, the others lie `effects` nats above it."""
    block = rng.normal(0, BLOCK, (studies, 1, seeds))
    arms = rng.normal(0, NOISE, (studies, 1 + len(effects), seeds)) + np.concatenate([[0.0], effects])[None, :, None]
    return 3 + block + arms


def coverage(seeds: int, studies: int, rng: np.random.Generator) -> float:
    """Share of studies whose 95 % interval of one paired difference holds the true one."""
    drawn = losses(rng, studies, seeds, [0.003])
    found = [stats.paired(d) for d in drawn[:, 1] - drawn[:, 0]]
    return float(np.mean([e.low <= 0.003 <= e.high for e in found]))


def false_wins(steps: int, seeds: int, studies: int, rng: np.random.Generator) -> tuple[float, float]:
    """Of studies whose steps all equal the baseline: the share with a false verdict, and the share in which the best of
    single runs lies below the single baseline run, as an ablation without seeds would report it."""
    drawn = losses(rng, studies, seeds, [0.0] * steps)
    naive = np.mean(drawn[:, 1:, 0].min(1) < drawn[:, 0, 0])
    wrong = 0
    for one in drawn:
        adjusted = stats.holm([stats.paired(arm - one[0]).p for arm in one[1:]])
        wrong += min(adjusted) <= ERROR_RATE
    return wrong / studies, float(naive)


def until_decided(effects: Any, studies: int, rng: np.random.Generator, margin: float, first: int = 3, most: int = 16) -> dict:
    """UNTIL=decided on studies whose steps lie `effects` nats above the baseline.

    Returns the mean seeds used, the share of studies with any false claim (a difference where there is none, the wrong
    side, or an equivalence that is not true), and the share of the steps decided.
    """
    truth = np.asarray(effects, float)
    drawn = losses(rng, studies, most, effects)
    used, false_claims, decided = [], 0, 0.0
    for one in drawn:
        differences = one[1:] - one[0]
        for look in range(first, most + 1):
            different, within = claims(differences[:, :look], margin)
            if look == most or np.all(different | within):
                break
        mean = differences[:, :look].mean(1)
        wrong = (different & ((truth == 0) | (np.sign(mean) != np.sign(truth)))) | (within & (np.abs(truth) >= margin))
        used.append(look)
        false_claims += bool(wrong.any())
        decided += float(np.mean(different | within))
    return {"seeds": float(np.mean(used)), "false": false_claims / studies, "decided": decided / studies}


def claims(differences: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of these arms [arms, seeds] the anytime test calls different, and which within the margin."""
    different = stats.holm([anytime.p_value(d) for d in differences])
    within = stats.holm([anytime.equivalence_p(d, margin) for d in differences])
    return np.array(different) <= ERROR_RATE, np.array(within) <= ERROR_RATE


def unlimited_looks(steps: int, seeds: int, studies: int, rng: np.random.Generator) -> float:
    """Of studies whose steps all equal the baseline and that are looked at after every seed up to `seeds`: the share that
    ever claims a difference."""
    drawn = losses(rng, studies, seeds, [0.0] * steps)
    # the p values only fall, so what is claimed at any look is claimed at the last
    return float(np.mean([min(stats.holm([anytime.p_value(arm - one[0]) for arm in one[1:]])) <= ERROR_RATE for one in drawn]))


def fixed_power(effects: Any, seeds: int, studies: int, rng: np.random.Generator) -> float:
    """Share of the steps that Holm's paired t tests find at a fixed number of seeds."""
    drawn, found = losses(rng, studies, seeds, effects), 0.0
    for one in drawn:
        p_values = stats.holm([stats.paired(arm - one[0]).p for arm in one[1:]])
        found += float(np.mean(np.array(p_values) <= ERROR_RATE))
    return found / studies
