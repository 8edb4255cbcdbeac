"""The plan: which cells must run, why, and the makefile that runs them.

Invariants: a done cell's result is never touched; a stale cell is archived, never overwritten (lib/archiving.py); nothing is
written unless `write` is called, and one plan of a folder is written at a time, after what another make has put on record
since. Nor is a plan that is running, or about to, changed by a later one (lib/makefile.py).
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lib import atomic, batch_size, design, looks, makefile, ranks, slots, tuning
from lib.archiving import archive_stale, remove_checkpoints
from lib.cells import (
    FINISHED,
    LONGEST_NAME,
    Cell,
    Status,
    baseline,
    contrasts,
    counterbalanced,
    expand,
    inspect,
    other_seeds,
    seeds_of,
    steps_of,
    whole,
)
from lib.config import Study, environment_overrides, identity_changes
from lib.errors import UserError
from lib.kconfig import BUDGET, Assignment
from lib.paths import ROOT, shown

LONGEST_PATH = 3000  # systems end at 4096, and cells lie below it
RUNS = ("planned", "interrupted", "stale")
SAFE_PATH = re.compile(r"[A-Za-z0-9_.+/-]+")


@dataclass(frozen=True)
class Options:
    """What make's command line adds to the study. `until` is "decided" or nothing, `look` the number of seeds of the look
    that such a run has just come from, `tune` asks for the learning-rate sweep instead of the study."""

    out: str = ""
    seeds: str = ""
    time: str = ""
    retry: bool = False
    steps: tuple[str, ...] = ()
    until: str = ""
    max_seeds: str = ""
    look: str = ""
    jobs: str = ""
    tune: bool = False


class Plan:
    """The cells of a study with their states. `out` is the results folder.

    `seeds` are those that verdicts wait for, in their order, `asked` those that make may run now; `cells` are those of
    `seeds` and, once a learning-rate sweep is finished, of the tuned arms; `more` are finished cells of other seeds, which a
    report must not leave out; `sweep` is the learning-rate sweep, if one was asked for or begun; `micro_batch` is what
    BATCH_SIZE_AUTO comes to, if it is on.
    """

    def __init__(self, options: Options, study: str | None = None):
        overrides = environment_overrides()
        if options.time:
            overrides = [a for a in overrides if a.name not in BUDGET]
            overrides.append(Assignment("GPT2_MAX_TIME", options.time, "command line TIME"))
        self.options = options
        self.study = Study(study, overrides=overrides)
        contrasts(self.study)  # a wrong BASELINE or CONTRASTS must not be found by the report, after the training
        expand(self.study, [])  # nor a wrong value by its name in a folder's
        self.out = self._folder()
        self.micro_batch = batch_size.settle(self.study, self.out)  # from here on the study resolves to what its cells run with
        self._look()

    def _look(self) -> None:
        """What is on disk, and what follows from it."""
        for name in ("history", "jobs", "_wanted"):  # of an earlier look
            vars(self).pop(name, None)
        self.status: dict[str, Status] = {}
        self.recorded = design.read(self.out)
        options = self.options
        self.sweep = tuning.sweep(self.study, self.out) if options.tune or tuning.started(self.study, self.out) else None
        self.undecided: list[str] = []  # arms that the last look left without a verdict
        self._choose_seeds()
        cells = list({cell.name: cell for cell in [*self.common, *self.tuned_cells]}.values())
        planned = set(self.seeds)
        self.cells = [cell for cell in cells if cell.seed in planned]
        self.more = [cell for cell in cells if cell.seed not in planned and self.status[cell.name].state in FINISHED]
        if self.sweep:
            self.status |= self.sweep.status
        if options.out:
            self._refuse_conflicts()

    def _choose_seeds(self) -> None:
        """From what is asked for, what was promised and what is on disk: `asked`, `seeds`, `announced`, and their cells."""
        self.asked, configured = looks.seeds_asked(self.study, self.options), seeds_of(self.study)
        tuning.refuse_seed(self.study, self.asked)
        promised = self.recorded[-1]["plan"]["seeds"] if self.recorded else []
        every = list(dict.fromkeys([*promised, *self.asked, *configured]))
        every += other_seeds(self.study, self.out, [*every, tuning.seed_of(self.study)])
        self.common = self._inspected(expand(self.study, every))
        tuned, self.tuned = tuning.tuned_cells(self.study, self.sweep, every) if self.sweep else ([], {})
        self.tuned_cells = self._inspected(tuned)
        finished = {cell.seed for cell in self.common if self.status[cell.name].state in FINISHED}
        begun = [seed for seed in every if seed in finished]
        promised = promised if begun else []  # a plan of which nothing is left, e.g. because the study was edited
        anytime = design.test(self.recorded) == "anytime"
        self.seeds = looks.seeds_planned(self.asked, configured, promised, anytime, finished)
        # What the design on record holds: nothing that was promised is taken back, and stray results are owned up to.
        self.announced = list(dict.fromkeys([*promised, *self.seeds, *begun]))
        if self.options.until:
            self.asked = looks.next_block(self)
            self.seeds = list(dict.fromkeys([*(seed for seed in self.seeds if seed in finished), *self.asked]))

    def _inspected(self, cells: list[Cell]) -> list[Cell]:
        self.status |= {cell.name: inspect(self.out, cell) for cell in cells if cell.name not in self.status}
        return cells

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
        longest = max(map(len, path.parts))
        if longest > LONGEST_NAME or len(str(path)) > LONGEST_PATH:
            raise UserError(f"the results folder '{str(path)[:40]}...' has a name of {max(longest, len(str(path)))} "
                            "characters, which is too long.", "choose a shorter OUT=, OUTPUT_DIR or name of the study.")
        return path

    def _override_suffix(self) -> str:
        """Overrides that change what the study says get a folder of their own."""
        if not self.study.overrides:
            return ""
        resolve = self.study.resolve
        try:
            changed = any(identity_changes(resolve(step, overrides=[]).identity, resolve(step).identity)
                          for step in steps_of(self.study))
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
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                overridden = False
            if overridden or self.study.overrides:
                raise UserError(f"{shown(self.out / cell.name)} holds another result ({status.why}).",
                                "another OUT=, or none: an override then gets its own folder.")

    def runs(self, cell: Cell) -> bool:
        """Whether make would run this cell."""
        if not self.wants(cell):
            return False
        if (whole(self.options.look) or 0) >= len(self.asked):
            return False  # the look that has just ended is not complete: the same cells would only end so again
        state = self.status[cell.name].state
        return state in RUNS or (state == "failed" and self.options.retry)

    def wants(self, cell: Cell) -> bool:
        """Whether one of `rows` was asked for: all are, unless steps were named."""
        return self.options.tune or not self.options.steps or cell.name in self._wanted

    @cached_property
    def _wanted(self) -> set[str]:
        """Cells of the steps that were asked for, and the cells they start from."""
        steps = steps_of(self.study)
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
        """Archive stale cells, put the design on record, and write a makefile with what must run; returns its path. A stale
        cell that another make has taken up since the plan was made is left to it, and has its state of now from then on.

        UserError, before anything is written, where the GPUs of a step cannot share it evenly."""
        for cfg in {id(cell.resolved): cell.resolved.config for cell, _, runs in self.rows() if runs}.values():
            if cfg.GPUS_PER_STEP and not ranks.one_process(cfg):
                ranks.split(cfg, cfg.GPUS_PER_STEP)
        try:
            atomic.make_folder(self.out / "plan")
            with makefile.alone(self.out):
                if design.read(self.out) != self.recorded:  # by another make, since we looked
                    self._look()
                return self._write()
        except OSError as error:
            raise UserError(f"{shown(self.out)} cannot be written: {error.strerror or error}.",
                            "make OUT=folder with a folder you may write to.") from None

    def _write(self) -> Path:
        history = self.history
        for folder in (self.out, self.out / "plan"):
            atomic.remove_orphans(folder)
        design.write(self.out, history)
        for cell, status, runs in self.rows():
            if runs and status.state in ("stale", "failed"):
                self.status[cell.name] = archive_stale(self.out, cell) or Status("stale", status.why)
        for name, status in self.status.items():
            if status.state in FINISHED:
                remove_checkpoints(self.out / name)
        must_run = {cell.name: cell for cell, _, runs in self.rows() if runs}
        order = counterbalanced([cell for cell, _, _ in self.rows()], self.side_by_side,
                                len({cell.seed for cell in must_run.values()}) == 1)
        return makefile.write(self, [cell for cell in order if cell.name in must_run])

    def rows(self) -> list[tuple[Cell, Status, bool]]:
        """The cells that make may run now: the study's of the seeds asked for, or with `tune` those of the sweep."""
        asked = set(self.asked)
        cells = self.sweep.cells if self.options.tune else [cell for cell in self.cells if cell.seed in asked]
        return [(cell, self.status[cell.name], self.runs(cell)) for cell in cells]

    def found(self, cells: list[Cell]) -> list[tuple[Cell, Status]]:
        """Of these cells, those that a report shows: the planned ones, and finished ones of other seeds."""
        planned = set(self.seeds)
        return [(cell, self.status[cell.name]) for cell in cells
                if cell.seed in planned or self.status[cell.name].state in FINISHED]

    @cached_property
    def history(self) -> list[dict]:
        """The designs on record, with what is configured and found now as the last, if that differs."""
        arms = {f"{cell.step} {cell.optimizer}": cell.resolved.identity["hash"] for cell in self.common}
        finished: dict = {}
        for cell in self.common:
            if self.status[cell.name].state in FINISHED:
                finished.setdefault((cell.step, cell.optimizer), set()).add(cell.seed)
        plan = design.content(baseline(self.study), arms, self.announced, self.study.config.MARGIN,
                              "anytime" if self.options.until else "fixed", self.study.config.TUNE_LR if self.sweep else None,
                              " ".join(map(":".join, contrasts(self.study)[0])))
        return design.following(self.recorded, plan, max(map(len, finished.values()), default=0))

    def comparisons(self) -> int:
        """The size of the family of verdicts."""
        return design.comparisons(self.history)

    @property
    def side_by_side(self) -> int:
        """Cells side by side: N of make -jN, or else `jobs`."""
        return slots.jobs_of_make() if slots.is_parallel() else self.jobs

    @cached_property
    def jobs(self) -> int:
        """Cells side by side where make was given no -j: JOBS, or as many as there are cores for where cells are bound to
        threads of the CPU, or as many as its GPUs have slots for where cells take less than all of them."""
        given = self.options.jobs or str(self.study.config.JOBS)
        if (number := whole(given)) is None:
            raise UserError(f"JOBS={given} is no number of cells.", "give a whole number, or make -jN.")
        if number:
            return number
        configs = [cell.resolved.config for cell in self.cells]
        if not any(c.DEVICE == "cpu" for c in configs):
            per_step = max((getattr(c, "GPUS_PER_STEP", 0) for c in configs), default=0)
            return slots.cells_at_once(slots.gpus, per_step, self.study.config.CELLS_PER_GPU)
        if not all(c.DEVICE == "cpu" and c.CPU_THREADS and not c.GPT2_MAX_TIME for c in configs):
            return 1  # a neighbour would take training from a cell whose budget is seconds
        return max(1, len(os.sched_getaffinity(0)) // max(c.CPU_THREADS for c in configs))
