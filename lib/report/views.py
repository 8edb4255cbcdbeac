"""What else two arms are compared by: loss at equal tokens and at equal seconds, speed, and loss by position.

These views describe, and no verdict rests on them.
"""

from statistics import fmean
from typing import Any

import numpy as np

from lib import anytime, stats
from lib.report import positions


def views(arm: dict, base: dict, test: str) -> dict:
    """Loss at equal tokens and at equal training seconds, the ratio of tokens/s, loss by position: over the seeds both have.

    Their 95 % intervals are each on its own, and as valid under looks as `test`.

    Both are {seed: (evaluations, record)}. The arm that went further is read off its evaluations, in a straight line
    between them; its schedule was not at its end there, which favours the other one.
    """
    estimator = anytime.estimate if test == "anytime" else stats.paired
    seeds = sorted(arm.keys() & base.keys())
    at: dict[str, list] = {"tokens": [], "train_seconds": []}
    for seed in seeds:
        for key, pairs in at.items():
            where = min(arm[seed][1][key], base[seed][1][key])
            losses = [_loss_at(rows, key, where, record) for rows, record in (arm[seed], base[seed])]
            if None not in losses:
                pairs.append((losses[0] - losses[1], where))
    found: dict[str, Any] = {}
    for key, view in (("tokens", "equal_tokens"), ("train_seconds", "equal_seconds")):
        estimate = estimator([d for d, _ in at[key]]) if at[key] else None
        found[view] = estimate and {"difference": estimate.difference, "low": estimate.low, "high": estimate.high,
                                    "n": estimate.n, "at": fmean(where for _, where in at[key])}
    ours, theirs = ([one[seed][1] for seed in seeds] for one in (arm, base))
    speeds = [(a["tokens_per_second"], b["tokens_per_second"]) for a, b in zip(ours, theirs, strict=True)]
    if speeds and all(a and b for a, b in speeds):
        ratio, low, high = stats.ratio(*zip(*speeds, strict=True), estimator)  # type: ignore[call-arg]  # two arms
        found["speed"] = {"ratio": ratio, "low": low, "high": high, "n": len(speeds)}
    found["by_position"] = positions.compared(ours, theirs, estimator)
    return found


def _loss_at(rows: list[dict], key: str, where: float, record: dict) -> float | None:
    """Validation loss when `key` (tokens or training seconds) was at `where`."""
    if where >= record[key]:
        return record["val_loss"]
    x = [row[key] for row in rows]
    if not x or not x[0] <= where <= x[-1]:
        return None
    return float(np.interp(where, x, [row["val_loss"] for row in rows]))
