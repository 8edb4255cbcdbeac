"""From cells on disk to arms that can be compared: which belong together, and which arm each is compared with.

Reads only what the plan has found; the order of folders on disk plays no part.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib import results
from lib.cells import FINISHED, Cell, Status, baseline, contrasts
from lib.config import Study, identity_changes, parse_step
from lib.design import partner
from lib.errors import UserError
from lib.paths import shown
from lib.steps import step_header, step_path
from lib.verdicts import Arm, Comparison, family

if TYPE_CHECKING:
    from lib.plan import Plan


@dataclass
class Group:
    """The cells of one of the study's steps under one optimizer. `tuned` is the multiple of the learning rate if they are
    the step at its best one, else None; `control` what the step's fragment declares: null, harm or gain."""

    name: str
    step: str
    optimizer: str
    cells: list[tuple[Cell, Status]]
    control: str | None = None
    tuned: float | None = None
    help: str = ""

    def arm(self, seeds: list[int] | None = None) -> Arm:
        """What the verdicts need of it, for all its seeds or these."""
        kept = [(cell, status) for cell, status in self.cells if seeds is None or cell.seed in seeds]
        return Arm(self.name, {c.seed: s.record for c, s in kept if s.state in FINISHED},
                   {c.seed: s.state for c, s in kept if s.state not in FINISHED})


def group(study: Study, rows: list[tuple[Cell, Status]], tuned: dict | None = None) -> list[Group]:
    """The arms of these cells in their order. With `tuned`, {(step with its rate, optimizer): (step, multiple)} as
    lib/tuning.py gives it, all are tuned arms."""
    by_arm: dict[tuple[str, str], list] = {}
    for cell, status in rows:
        by_arm.setdefault((cell.step, cell.optimizer), []).append((cell, status))
    meant = {arm: (arm[0], None) if tuned is None else tuned[arm] for arm in by_arm}
    names = [step for step, _ in meant.values()]
    several = len(set(names)) < len(names)  # the optimizer is a dimension
    found = []
    for (spec, optimizer), cells in by_arm.items():
        step, multiple = meant[spec, optimizer]
        name = f"{step} {optimizer}" if several else step
        if multiple is not None:
            name += f" (tuned lr x{multiple:g})"
        path = step_path(parse_step(step)[0], study.config.STEPS_DIR)
        found.append(Group(name, step, optimizer, cells, step_header(path, "Control"), multiple,
                           step_header(path, "Help") or ""))
    return found


def reference(study: Study, groups: list[Group], of: Group) -> Group:
    """The baseline under the same optimizer, or its only one when the optimizer is no dimension."""
    candidates = [g for g in groups if g.step == baseline(study)]
    return next((g for g in candidates if g.optimizer == of.optimizer), candidates[0])


def compare(study: Study, groups: list[Group], order: list[int], test: str, seeds: list[int] | None = None,
            comparisons: int = 0) -> dict[str, Comparison]:
    """The verdicts of one family, by arm: every one that is no baseline, over all its seeds or these. `comparisons` is the
    size of the family if the plans made it larger than what is compared now."""
    pairs = []
    for one in groups:
        other = reference(study, groups, one)
        if one.step != other.step:
            pairs.append((one.arm(seeds), other.arm(seeds)))
    return {c.name: c for c in family(pairs, order, study.config.MARGIN, test, comparisons)}


def contrasted(study: Study, groups: list[Group], order: list[int], test: str, seeds: list[int] | None = None,
               comparisons: int = 0) -> list[tuple[Group, Group, Comparison]]:
    """The verdicts of the study's contrasts, each with its two arms, under each optimizer. They are one family, of
    `comparisons` if that is more."""
    pairs = []
    for step, reference_step in contrasts(study)[0]:
        others = {group.optimizer: group for group in groups if group.step == reference_step}
        pairs += [(one, others[partner(one.optimizer, others)]) for one in groups if one.step == step]
    found = family([(one.arm(seeds), other.arm(seeds)) for one, other in pairs], order, study.config.MARGIN, test, comparisons)
    return [(one, other, comparison) for (one, other), comparison in zip(pairs, found, strict=True)]


def refuse_copies(plan: "Plan") -> None:
    """Two folders that hold the same cell would count one run twice."""
    if not plan.out.is_dir():
        return
    shown_cells = {(c.step, c.optimizer, c.seed): c for c in [*plan.cells, *plan.more] if plan.status[c.name].state in FINISHED}
    known = {cell.name for cell in shown_cells.values()}
    for entry in sorted(plan.out.glob("test_*")):
        record = results.read(entry) if entry.name not in known and entry.is_dir() else None
        if record is None or record["state"] not in FINISHED:
            continue
        cell = shown_cells.get((record["step"], record["optimizer"], record["seed"]))
        if cell and not identity_changes(record["identity"], cell.resolved.with_seed(cell.seed).identity):
            raise UserError(f"{shown(entry)} holds {cell.step} seed {cell.seed} a second time (first in {cell.name}).",
                            "move one of the two folders away.")
