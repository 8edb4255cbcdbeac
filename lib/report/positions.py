"""Where in the context the loss of a step differs from the baseline's: by equal parts of it, from its begin to its end.

A mechanism that drops, compresses or reaches back to distant tokens shows in the last part first. The numbers describe: each
interval is of 95 % on its own, and no verdict rests on them. The parts are of the same windows as the loss itself, whose mean
they have; they are null for records of before there were any.
"""

from collections.abc import Callable
from statistics import fmean

from lib.tables import Section
from lib.verdicts import NO_NUMBER, signed

KEY = "val_loss_by_position"
CAPTION = ("Validation loss in equal parts of the context, from its begin to its end: the baseline's mean over seeds, and of "
           "the other steps the difference to it with half its 95 % interval. No verdict rests on it.")


def mean(records: list[dict]) -> list[float] | None:
    """The mean over records, part by part; None unless all have the same parts."""
    found = [record.get(KEY) for record in records]
    if not found or not all(found) or len({len(one) for one in found}) > 1:
        return None
    return [fmean(part) for part in zip(*found, strict=True)]


def compared(arm: list[dict], base: list[dict], estimator: Callable) -> list[dict] | None:
    """Difference and interval in each part, of records that are paired in their order; None if one has no such losses."""
    if mean([*arm, *base]) is None:
        return None
    estimates = [estimator([one[KEY][part] - other[KEY][part] for one, other in zip(arm, base, strict=True)])
                 for part in range(len(arm[0][KEY]))]
    return [{"difference": e.difference, "low": e.low, "high": e.high} for e in estimates]


def rows(steps: list[dict]) -> list[dict]:
    """The steps of a report whose losses by position are known: the baseline, and those compared with it."""
    return [step for step in steps if (step["mean"].get(KEY) if step.get("is_baseline") else _differences(step))]


def _differences(step: dict) -> list[dict] | None:
    comparison = step.get("comparison") or {}
    return None if comparison.get("word") in NO_NUMBER else comparison.get("by_position")


def header(found: list[dict]) -> list[str]:
    """Names of the columns: the parts in per cent of the context."""
    parts = max(len(cells(step)) - 1 for step in found)
    edges = [f"{100 * edge / parts:.0f}" for edge in range(parts + 1)]
    return ["step", *(f"{low} to {high} %" for low, high in zip(edges, edges[1:], strict=False))]


def cells(step: dict) -> list[str]:
    """A row as text."""
    if step.get("is_baseline"):
        return [step["name"], *(f"{loss:.4f}" for loss in step["mean"][KEY])]
    return [step["name"], *(signed(part["difference"]) + (f" ± {part['high'] - part['difference']:.4f}"
                                                          if part["high"] is not None else "")
                            for part in _differences(step) or [])]


def section(content: dict) -> Section | None:
    """What a report shows of it, of the steps at their common rates; None if no step was compared by position."""
    found = rows([step for step in content.get("steps") or [] if step.get("tuned") is None])
    if not any(not step.get("is_baseline") for step in found):
        return None
    names = header(found)
    return Section("By position", CAPTION, names, "l" + "r" * (len(names) - 1), [cells(step) for step in found])
