"""The plan: which cells must run, why, and the makefile that runs them.

Invariants: a done cell's folder is never touched; a stale one is archived, never overwritten; nothing is written unless
`write` is called. The resolved configuration of each step is stored in OUT/plan/ under its own hash, so a plan that is
running is not changed by a later one.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lib import atomic
from lib.cells import Cell, Status, baseline, expand, inspect
from lib.config import Study, environment_overrides, identity_changes
from lib.errors import UserError
from lib.kconfig import BUDGET, Assignment
from lib.paths import ROOT, shown

RUNS = ("planned", "interrupted", "stale")
SAFE_PATH = re.compile(r"[A-Za-z0-9_.+/-]+")


@dataclass(frozen=True)
class Options:
    """What make's command line adds to the study."""

    out: str = ""
    seeds: str = ""
    time: str = ""
    retry: bool = False
    steps: tuple[str, ...] = ()


class Plan:
    """The cells of a study with their states. `out` is the results folder."""

    def __init__(self, options: Options, study: str | None = None):
        overrides = environment_overrides()
        if options.time:
            overrides = [a for a in overrides if a.name not in BUDGET]
            overrides.append(Assignment("GPT2_MAX_TIME", options.time, "command line TIME"))
        self.options = options
        self.study = Study(study, overrides=overrides)
        self.cells = expand(self.study, options.seeds)
        baseline(self.study)  # a wrong BASELINE must not be found by the report, after the training
        self.out = self._folder()
        self.status = {cell.name: inspect(self.out, cell) for cell in self.cells}
        if options.out:
            self._refuse_conflicts()

    def _folder(self) -> Path:
        study, options = self.study, self.options
        if options.out:
            path = Path(options.out)
        else:
            path = Path(study.config.OUTPUT_DIR or f"test_matrix_results/{study.name}")
            path = Path(str(path) + self._override_suffix())
        path = ROOT / path
        if not SAFE_PATH.fullmatch(str(path)):  # the whole path stands in the makefile, so the project's own counts too
            raise UserError(f"the results folder '{path}' holds a character that make cannot take.",
                            "use letters, digits and _.+-/ only, without spaces.")
        return path

    def _override_suffix(self) -> str:
        """Overrides that change what the study says get a folder of their own."""
        if not self.study.overrides:
            return ""
        resolve = self.study.resolve
        try:
            changed = any(identity_changes(resolve(step, overrides=[]).identity, resolve(step).identity)
                          for step in self.study.config.ABLATION_STEPS.split())
        except UserError:  # a study without a budget of its own
            changed = True
        return "".join(f"+{a.name}-{a.value}" for a in self.study.overrides) if changed else ""

    def _refuse_conflicts(self) -> None:
        """A folder given by hand is not archived because of an override, or because one was taken away."""
        for cell in self.cells:
            status = self.status[cell.name]
            if status.state != "stale":
                continue
            try:
                found = json.loads((self.out / cell.name / "provenance.json").read_text())["symbols"].values()
                overridden = any(where.startswith(("environment", "command line")) for _, where in found)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                overridden = False
            if overridden or self.study.overrides:
                raise UserError(f"{shown(self.out / cell.name)} holds another result ({status.why}).",
                                "another OUT=, or none: an override then gets its own folder.")

    def runs(self, cell: Cell) -> bool:
        """Whether make would run this cell."""
        if not self.wants(cell):
            return False
        state = self.status[cell.name].state
        return state in RUNS or (state == "failed" and self.options.retry)

    def wants(self, cell: Cell) -> bool:
        """Whether the cell was asked for: all are, unless steps were named."""
        return not self.options.steps or cell.name in self._wanted

    @cached_property
    def _wanted(self) -> set[str]:
        """Cells of the steps that were asked for, and the cells they start from."""
        steps = self.study.config.ABLATION_STEPS.split()
        for step in self.options.steps:
            if step not in steps:
                raise UserError(f"step {step} is not in study {self.study.name} ({' '.join(steps)}).",
                                "add it to ABLATION_STEPS in make menuconfig.")
        by_name = {cell.name: cell for cell in self.cells}
        wanted, todo = set(), [c for c in self.cells if c.step in self.options.steps]
        while todo:
            cell = todo.pop()
            wanted.add(cell.name)
            if cell.parent:
                todo.append(by_name[cell.parent])
        return wanted

    def write(self) -> Path:
        """Archive stale cells and write OUT/cells.mk with what must run; returns its path."""
        must_run = [cell for cell in self.cells if self.runs(cell)]
        try:
            (self.out / "plan").mkdir(parents=True, exist_ok=True)
            for cell in must_run:
                if self.status[cell.name].state == "stale":
                    archive(self.out, cell.name)
            makefile = self.out / "cells.mk"
            atomic.write_text(makefile, self._makefile(must_run))
        except OSError as error:
            raise UserError(f"{shown(self.out)} cannot be written: {error.strerror or error}.",
                            "make OUT=folder with a folder you may write to.") from None
        return makefile

    def _makefile(self, must_run: list[Cell]) -> str:
        out = self.out
        targets = {cell.name: f"{out}/{cell.name}/metrics.json" for cell in must_run}
        lines = ["# Written by the plan: the cells that must run. Make it anew with make; do not edit.",
                 "CELLS :=" + "".join(f" \\\n  {t}" for t in targets.values()),
                 "all: $(CELLS)\n\t@:", ".PHONY: all FORCE", ".PRECIOUS: $(CELLS)"]
        stored: dict[int, Path] = {}
        for number, cell in enumerate(must_run, 1):
            if id(cell.resolved) not in stored:
                stored[id(cell.resolved)] = self._store(cell)
            parent = f" {targets[cell.parent]}" if cell.parent in targets else ""
            lines.append(f"{targets[cell.name]}: FORCE{parent}\n\t$(Q)$(PYTHON) -m scripts.cell {out}/{cell.name} "
                         f"--plan {stored[id(cell.resolved)]} --seed {cell.seed} --of {number}/{len(must_run)}"
                         + (f" --parent {cell.parent}" if cell.parent else ""))
        return "\n".join(lines) + "\n"

    def _store(self, cell: Cell) -> Path:
        """The seed-free configuration of a step, under its hash."""
        resolved = cell.resolved
        content = json.dumps({"step": cell.step, "optimizer": cell.optimizer, "study": self.study.name,
                              "trainer": resolved.config.TRAINER,
                              "config": resolved.text, "identity": resolved.identity, "symbols": resolved.provenance},
                             indent=1)
        path = self.out / "plan" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            atomic.write_text(path, content)
        return path

    def rows(self) -> list[tuple[Cell, Status, bool]]:
        return [(cell, self.status[cell.name], self.runs(cell)) for cell in self.cells]


def archive(out: Path, name: str) -> None:
    """Move a cell's folder to OUT/archive/, under the first free number."""
    (out / "archive").mkdir(exist_ok=True)
    number = 1
    while (target := out / "archive" / f"{name}.{number}").exists():
        number += 1
    (out / name).rename(target)
