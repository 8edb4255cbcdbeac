"""What a study will take: hours, GPU-hours and tokens on so many GPUs, and the seeds that its margin needs.

Speeds come from finished cells of the study, arm by arm, or from a probe; an arm of which nothing is known is taken to be as
fast as the mean of the others. Budgets count training only, so what a cell spends outside its budget is added. Two ways to use
several GPUs: cells side by side, one GPU each, which is arithmetic; or every cell on all of them, whose efficiency (share of
linear speed) is an assumption that the caller states. Knows no torch and trains nothing.
"""

import heapq
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from lib.cells import FINISHED, Cell, baseline
from lib.design import ERROR_RATE, test
from lib.schedule import Budget, tokens_per_iteration

if TYPE_CHECKING:
    from lib.plan import Plan

OUTSIDE = ("compile", "eval", "calibration", "checkpoint", "other")  # the clocks beside the budget's


@dataclass(frozen=True)
class Speed:
    """Of one cell on one device: tokens a second of training (None for one that does not train), seconds outside the budget.
    `beside`: with others on the same device; `cells` it was measured on, 0 for one that was taken from other arms."""

    tokens_per_second: float | None
    outside: float
    beside: bool
    cells: int


@dataclass(frozen=True)
class Work:
    """What one cell takes on one device, or on several together: seconds in all, and tokens."""

    name: str
    parent: str | None
    seconds: float
    tokens: float


def arm(cell: Cell) -> tuple[str, str]:
    return cell.step, cell.optimizer


def trains(cell: Cell) -> bool:
    return Budget.from_config(cell.resolved.config).iterations != 0


def measured(plan: "Plan", cells: list[Cell], efficiency: float) -> dict[tuple[str, str], Speed]:
    """Speeds of the arms of which there are finished cells. Where cells are to run alone, those that did not count only in an
    arm that has nothing else. A cell that ran on several GPUs is brought down to one by `efficiency`."""
    found: dict[tuple[str, str], list[Speed]] = {}
    for cell in cells:
        record = plan.status[cell.name].record
        if plan.status[cell.name].state != "done":
            continue
        world = (record["environment"] or {}).get("world_size") or 1
        rate = record["tokens_per_second"]
        rate = rate / (world * efficiency if world > 1 else 1) if rate and trains(cell) else None
        outside = sum(record[f"{kind}_seconds"] or 0.0 for kind in OUTSIDE)
        if rate or not trains(cell):
            found.setdefault(arm(cell), []).append(Speed(rate, outside, record.get("shared_device") is True, 1))
    speeds = {}
    for name, of_cells in found.items():
        kept = of_cells if lanes(plan) > 1 else [one for one in of_cells if not one.beside] or of_cells
        speeds[name] = mean(kept)
    return speeds


def mean(speeds: list[Speed]) -> Speed:
    """One for several; side by side only if most were."""
    rates = [one.tokens_per_second for one in speeds if one.tokens_per_second]
    return Speed(fmean(rates) if rates else None, fmean(one.outside for one in speeds),
                 2 * sum(one.beside for one in speeds) > len(speeds), sum(one.cells for one in speeds))


def completed(speeds: dict[tuple[str, str], Speed], cells: list[Cell]) -> dict[tuple[str, str], Speed]:
    """The same for every arm of `cells`: one of which nothing is known is like the mean of the others that train."""
    training = [one for one in speeds.values() if one.tokens_per_second]
    found = dict(speeds)
    for cell in cells:
        if arm(cell) not in found:
            like = mean(training or list(speeds.values()))
            found[arm(cell)] = Speed(like.tokens_per_second if trains(cell) else None, like.outside, like.beside, 0)
    return found


def lanes(plan: "Plan") -> int:
    """Cells that run side by side on one device as configured: CELLS_PER_GPU on a GPU, make's jobs on the CPU."""
    return plan.jobs if on_cpu(plan) else plan.study.config.CELLS_PER_GPU


def on_cpu(plan: "Plan") -> bool:
    return any(cell.resolved.config.DEVICE == "cpu" for cell in plan.cells)


def work(cell: Cell, speed: Speed, devices: int = 1, efficiency: float = 1.0) -> Work:
    """What a cell takes on `devices` together. A budget of seconds then trains more, another one ends sooner; what is outside
    the budget stays as it is."""
    config, rate = cell.resolved.config, (speed.tokens_per_second or 0.0) * (devices * efficiency if devices > 1 else 1)
    budget = Budget.from_config(config)
    if budget.seconds is not None:
        training, tokens = budget.seconds, budget.seconds * rate
    else:
        tokens = budget.iterations * tokens_per_iteration(config)
        training = tokens / rate if tokens else 0.0
    return Work(cell.name, cell.parent, training + speed.outside, tokens)


def makespan(cells: list[Work], at_once: int) -> float:
    """Seconds until the last one ends where `at_once` run at a time, in their order, each after the cell it starts from."""
    free, ends, waiting = [0.0] * min(at_once, max(1, len(cells))), {}, list(cells)
    names = {one.name for one in cells}
    while waiting:
        # make takes the first whose prerequisite is done, and otherwise waits for it
        at = free[0]
        ready = [one for one in waiting if one.parent not in names or ends.get(one.parent, float("inf")) <= at]
        one = ready[0] if ready else min((w for w in waiting if w.parent in ends), key=lambda w: ends[w.parent])
        waiting.remove(one)
        ends[one.name] = max(at, ends.get(one.parent, 0.0)) + one.seconds
        heapq.heapreplace(free, ends[one.name])
    return max(ends.values(), default=0.0)


@dataclass(frozen=True)
class Outlook:
    """`hours` from start to end, `device_hours` in which a device is in use, and `tokens` trained."""

    hours: float
    device_hours: float
    tokens: float


def side_by_side(cells: list[Cell], speeds: dict, devices: int, at_once: int) -> Outlook:
    """Each cell on one of `devices`, `at_once` of them on each."""
    found = [work(cell, speeds[arm(cell)]) for cell in cells]
    return Outlook(makespan(found, devices * at_once) / 3600, sum(one.seconds for one in found) / at_once / 3600,
                   sum(one.tokens for one in found))


def together(cells: list[Cell], speeds: dict, devices: int, efficiency: float) -> Outlook:
    """One cell after the other, each on all `devices`."""
    found = [work(cell, speeds[arm(cell)], devices, efficiency) for cell in cells]
    hours = sum(one.seconds for one in found) / 3600
    return Outlook(hours, hours * devices, sum(one.tokens for one in found))


@dataclass(frozen=True)
class Seeds:
    """Seeds that see a difference as large as the margin (None: more than anybody runs), for the arm that needs the most: its
    name, the standard deviation of its differences in nats, and over how many seeds that is known."""

    needed: int | None
    arm: str
    sd: float
    known: int


def seeds_for_margin(plan: "Plan") -> Seeds | None:
    """By the test and at the level of the plan's verdicts; None while no arm has two seeds beside the baseline's."""
    import numpy as np

    from lib import anytime, stats
    from lib.arms import compare, group

    if not plan.study.config.MARGIN:
        return None
    finished = [(cell, status) for cell, status in plan.found(plan.common) if status.state in FINISHED]
    groups = group(plan.study, finished)
    if baseline(plan.study) not in {one.step for one in groups}:
        return None
    which, found = test(plan.history), []
    order = list(dict.fromkeys([*plan.seeds, *(cell.seed for cell in plan.more)]))
    for one in compare(plan.study, groups, order, which, comparisons=plan.comparisons()).values():
        if len(one.by_seed) > 1:
            sd = float(np.std(list(one.by_seed.values()), ddof=1))
            found.append((sd, one.name, len(one.by_seed)))
    if not found:
        return None
    sd, name, known = max(found)
    plans = anytime if which == "anytime" else stats
    return Seeds(plans.seeds_needed(sd, plan.study.config.MARGIN, ERROR_RATE / max(1, plan.comparisons())), name, sd, known)
