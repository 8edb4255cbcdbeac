"""The learning-rate sweep of `make tune-lr`: every step at the same multiples of its own rate, at equal cost.

The sweep runs under seeds of its own, so that choosing the best rate takes nothing from the seeds the verdicts rest on.
Once every step's sweep is finished, each step has a tuned arm: itself at its best multiple, under the study's seeds.
Controls are not swept: what they are is fixed. State lives on disk alone, in the cells of the sweep.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from lib.cells import Cell, Status, expand, inspect, steps_of
from lib.config import Study, parse_step
from lib.errors import UserError
from lib.kconfig import Assignment
from lib.steps import step_header, step_path

SYMBOL = "LEARNING_RATE_MULT"
SEED_OFFSET = 10_000  # counted seeds end at 100, so the sweep's own seed is none of a study's


def multiples(study: Study) -> list[float]:
    """TUNE_LR as numbers, ascending. The common rate, 1, is always part of the sweep."""
    words = study.config.TUNE_LR.replace(",", " ").split()
    for word in words:
        study.schema.check_value(Assignment(SYMBOL, word, "TUNE_LR"))
    found = {float(word) for word in words} | {1.0}
    if len(found) < 2 or min(found) <= 0:
        raise UserError(f"TUNE_LR='{study.config.TUNE_LR}' is no sweep.", "give two or more positive numbers, like '0.5 1 2'.")
    return sorted(found)


def swept_steps(study: Study) -> list[str]:
    """The study's steps without its controls, and without those that are not trained."""
    folder = study.config.STEPS_DIR
    return [step for step in steps_of(study) if not step_header(step_path(parse_step(step)[0], folder), "Control")
            and not study.resolve(step).config.EVALUATE_ONLY]


def at(study: Study, step: str, multiple: float) -> str:
    """The step at a multiple of its own rate: V1@LEARNING_RATE_MULT=2, or the step itself for 1."""
    if multiple == 1:
        return step
    own = study.resolve(step).config.LEARNING_RATE_MULT
    name, _, inline = step.partition("@")
    others = [part for part in inline.split(",") if part and not part.startswith(f"{SYMBOL}=")]
    return f"{name}@{','.join([*others, f'{SYMBOL}={own * multiple:g}'])}"


@dataclass
class Sweep:
    """The cells of a study's sweep: {(step, multiple): step at that multiple}, the cells, and their states."""

    steps: dict[tuple[str, float], str]
    cells: list[Cell]
    status: dict[str, Status]

    def losses(self) -> dict[tuple[str, str], dict[float, float | None]]:
        """Final validation loss by (step, optimizer) and multiple; None where it is missing, infinite where it diverged."""
        found: dict = {}
        for (step, multiple), spec in self.steps.items():
            for cell in self.cells:
                if cell.step == spec:
                    status = self.status[cell.name]
                    loss = {"done": lambda s: s.record["val_loss"], "diverged": lambda s: math.inf}.get(status.state)
                    found.setdefault((step, cell.optimizer), {})[multiple] = loss(status) if loss else None
        return found

    def best(self) -> dict[tuple[str, str], float] | None:
        """The best multiple by (step, optimizer); None while any is missing: half a sweep would be unequal."""
        losses = self.losses()
        if any(loss is None for by in losses.values() for loss in by.values()):
            return None
        return {arm: min(by, key=by.get) if min(by.values()) < math.inf else 1.0 for arm, by in losses.items()}


def seed_of(study: Study) -> int:
    """The seed that the sweep runs under."""
    return study.config.SEED + SEED_OFFSET


def refuse_seed(study: Study, seeds: list[int]) -> None:
    """The sweep's seed is none of a study's: what was chosen by it would be judged by it."""
    if seed_of(study) in seeds:
        raise UserError(f"seed {seed_of(study)} is the learning-rate sweep's own.", "leave it out of SEEDS.")


def started(study: Study, out: Path) -> bool:
    """Whether a sweep has left cells in `out`."""
    suffix = f"_s{seed_of(study)}"
    return out.is_dir() and any(entry.name.endswith(suffix) for entry in os.scandir(out))


def sweep(study: Study, out: Path) -> Sweep:
    """The study's sweep and what the disk says of it."""
    steps = {(step, multiple): at(study, step, multiple) for step in swept_steps(study) for multiple in multiples(study)}
    cells = expand(study, [seed_of(study)], list(dict.fromkeys(steps.values())))
    return Sweep(steps, cells, {cell.name: inspect(out, cell) for cell in cells})


def tuned_cells(study: Study, found: Sweep, seeds: list[int]) -> tuple[list[Cell], dict]:
    """The cells of the tuned arms under the study's seeds, and {(step with its rate, optimizer): (step, multiple)}.

    A step whose best multiple is 1 is its own tuned arm, with the same cells; where that holds for all of them there is
    nothing to compare anew.
    """
    best = found.best() or {}
    # two steps that meet at one rate are one arm; the first keeps it
    chosen: dict = {}
    for (step, optimizer), multiple in best.items():
        chosen.setdefault((found.steps[step, multiple], optimizer), (step, multiple))
    if all(multiple == 1 for _, multiple in chosen.values()):
        return [], {}
    specs = list(dict.fromkeys([*swept_steps(study), *(spec for spec, _ in chosen)]))  # parents of dependent steps too
    return [c for c in expand(study, seeds, specs) if (c.step, c.optimizer) in chosen], chosen
