"""Curves as lists of (x, y): reading, thinning, averaging and cutting them for the charts of a report."""

from bisect import bisect_left
from math import isfinite
from statistics import fmean, median
from typing import Any

EARLY = 0.3  # the share of a training whose losses may lie above the axis


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def points(xs: Any, ys: Any) -> list[tuple]:
    """Pairs of known numbers, in the order of x."""
    return sorted((x, y) for x, y in zip(xs or [], ys or [], strict=False) if number(x) and number(y))


def thinned(points: list, most: int) -> list:
    """At most about `most` of the points, evenly; the first and the last stay."""
    stride = -(-len(points) // most)
    return points if stride < 2 else points[:-1:stride] + points[-1:]


def value_at(points: list[tuple], x: float) -> float:
    """The curve's value at x, linear between its points, constant beyond its ends."""
    i = bisect_left(points, x, key=lambda p: p[0])
    if i == 0 or i == len(points):
        return points[min(i, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def mean(curves: list[list[tuple]]) -> list[tuple]:
    """Mean over curves where all of them are known, at the first one's x and at the end of the shortest; [] if nowhere."""
    if not curves:
        return []
    first, last = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    grid = sorted({x for x, _ in curves[0] if first <= x <= last} | ({last} if last >= first else set()))
    return [(x, fmean(value_at(c, x) for c in curves)) for x in grid]


def cut(points: list[tuple], high: float) -> list[tuple]:
    """(part, x, y) of what lies below `high`, with the crossings. A clip of the drawing costs the PNG seconds."""
    found, part = [], 0
    for i, (x, y) in enumerate(points):
        if i and (points[i - 1][1] <= high) != (y <= high):
            x0, y0 = points[i - 1]
            part += y <= high
            found.append((part, x0 + (x - x0) * (high - y0) / (y - y0), high))
        if y <= high:
            found.append((part, x, y))
    return found


def loss_window(curves: list[list[tuple]], means: list[list[tuple]]) -> tuple[float, float]:
    """Ends of the loss axis: from just below the best value up to where the means are after EARLY of their way.

    The first evaluations would leave all that matters in the lowest tenth of the chart. A curve that is far above the
    others (diverged) runs out of it. Of two or three evaluations all are shown.
    """
    low = min(y for c in curves for _, y in c)
    early = [value_at(c, c[0][0] + EARLY * (c[-1][0] - c[0][0])) if len(c) > 3 else max(y for _, y in c)
             for c in means or curves]
    usual = median(early)
    high = max([y for y in early if y - low <= 2.5 * (usual - low)] or [usual])
    space = 0.05 * (high - low) or 0.05
    return low - space, high + space
