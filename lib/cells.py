"""Cells: a study expanded into step x optimizer x seed, and what the disk says of each.

A cell is one folder, one resolved configuration, one command. Its identity decides whether what is on disk is this cell;
time stamps never do. States: planned, running, done, diverged, failed, interrupted, stale (there is a result or a
checkpoint, of another identity).
"""

import copy
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lib import generations, process, results
from lib.config import BATCH_SPLIT, Resolved, Study, identity_changes, sealed
from lib.errors import UserError
from lib.kconfig import BUDGET
from lib.steps import file_name

if TYPE_CHECKING:
    from lib.config import Config

FINISHED = ("done", "diverged")  # states in which a cell has a result
MAX_COUNTED_SEEDS = 100
SEED_LIMIT = 2 ** 31  # SEED in Kconfig ends below it
FORESEEN = 16  # seeds, when the order of cells is chosen
LONGEST_NAME = 240  # file systems end at 255, and the archive adds a number


@dataclass(frozen=True)
class Cell:
    """One cell of a study. `parent` is the folder name of the cell whose trained model it starts from."""

    step: str
    optimizer: str
    seed: int
    name: str
    resolved: Resolved
    parent: str | None = None

    def provenance(self) -> dict:
        """What provenance.json holds: which cell this is, its identity, and where each non-default value came from."""
        resolved = self.resolved.with_seed(self.seed)
        return {"study": resolved.config.STUDY, "step": self.step, "optimizer": self.optimizer, "seed": self.seed,
                "parent": self.parent, "identity": resolved.identity, "symbols": resolved.provenance}


@dataclass(frozen=True)
class Status:
    """State of a cell on disk, why it is in it, and its record if it has one."""

    state: str
    why: str
    record: dict | None = None


def whole(text: str) -> int | None:
    """The whole number that a word is; None if it is none, or one that nobody means."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else None


def parse_seeds(text: str, base: int) -> list[int]:
    """'1337 1338' is a list; one number up to 100 is a count from `base`. Duplicates are refused."""
    words = text.replace(",", " ").split()
    if not words or not all((number := whole(w)) is not None and number < SEED_LIMIT for w in words):
        raise UserError(f"SEEDS='{text}' is neither a count nor a list of seeds.",
                        "give a count like SEEDS=3 or a list like SEEDS='1337 1338 1339'.")
    seeds = [int(w) for w in words]
    if len(seeds) == 1 and 0 < seeds[0] <= MAX_COUNTED_SEEDS:
        if base + seeds[0] > SEED_LIMIT:
            raise UserError(f"SEEDS='{text}' counted from {base} goes beyond {SEED_LIMIT - 1}.", "choose a smaller SEED.")
        return [base + i for i in range(seeds[0])]
    if len(set(seeds)) != len(seeds):
        raise UserError(f"SEEDS='{text}' names a seed twice.", "name every seed once.")
    return seeds


def folder_name(step: str, optimizer: str, pruning: str, seed: int, base: int) -> str:
    """'V1@RA_R=8' with AdamWSPAM is test_V1+RA_R-8_adamwspam_none; seeds other than the base seed get a suffix."""
    return file_name(f"test_{step}_{optimizer}_{pruning}" + ("" if seed == base else f"_s{seed}"))


def steps_of(study: Study) -> list[str]:
    """The steps of a study: ABLATION_STEPS, and those of CONTROL_STEPS that are not among them."""
    steps = study.config.ABLATION_STEPS.split()
    if not steps:
        raise UserError("the study has no steps.", "set ABLATION_STEPS in make menuconfig (make list-steps lists them).")
    if len(set(steps)) != len(steps):
        raise UserError(f"ABLATION_STEPS='{' '.join(steps)}' names a step twice.", "name every step once.")
    return list(dict.fromkeys(steps + study.config.CONTROL_STEPS.split()))


def seeds_of(study: Study) -> list[int]:
    """The seeds that the study's configuration plans, in order."""
    return parse_seeds(study.config.SEEDS, study.config.SEED)


def expand(study: Study, seeds: Sequence[int] | None = None, steps: list[str] | None = None) -> list[Cell]:
    """All cells of a study (or of these seeds and steps), seed by seed: an interrupted study is balanced."""
    steps = steps_of(study) if steps is None else steps
    base = study.config.SEED
    columns = []
    for optimizer in study.config.OPTIMIZERS.split() or [None]:
        resolved = {step: study.resolve(step, optimizer) for step in steps}
        for step in steps:
            parent = resolved[step].config.INIT_FROM_STEP
            if parent and parent not in resolved:
                raise UserError(f"step {step} starts from the model of {parent}, which is not in the study.",
                                f"add {parent} to ABLATION_STEPS.")
        for step in steps:
            columns.append((step, _with_parents(step, resolved), resolved.get(resolved[step].config.INIT_FROM_STEP)))
    cells = []
    for seed in seeds_of(study) if seeds is None else seeds:
        for step, one, parent in columns:
            def name(of: str, config: "Config", seed: int = seed) -> str:
                return folder_name(of, config.OPTIMIZER, config.PRUNING, seed, base)
            cells.append(Cell(step, one.config.OPTIMIZER, seed, name(step, one.config), one,
                              name(one.config.INIT_FROM_STEP, parent.config) if parent else None))
    _refuse_names([cell.name for cell in cells])
    return cells


def counterbalanced(cells: list[Cell], jobs: int, one_seed: bool = False) -> list[Cell]:
    """These cells in the order in which they are started: seed by seed, and where `jobs` run side by side, each seed's arms
    begin some places later than those of the seed before.

    The GPUs of a box are taken in turn, and two of one model differ by some per cent in speed. In the order of the study an
    arm could have the same one at every seed, and a difference between GPUs would be read as one between steps. With
    `one_seed` only one seed of these runs now, and begins with the first GPU again.
    """
    arms, seeds = (list(dict.fromkeys(map(of, cells))) for of in (lambda c: (c.step, c.optimizer), lambda c: c.seed))
    shift = min(range(max(1, min(jobs, len(arms)))), key=lambda shift: _unevenness(len(arms), len(seeds), max(1, jobs), shift))
    shift = 1 if one_seed and jobs > 1 else shift
    place, turn = ({one: number for number, one in enumerate(ones)} for ones in (arms, seeds))
    return sorted(cells, key=lambda c: (turn[c.seed], (place[c.step, c.optimizer] - turn[c.seed] * shift) % len(arms)))


def _unevenness(arms: int, seeds: int, jobs: int, shift: int) -> int:
    """How unlike the arms' shares of each of `jobs` GPUs become, should cells end as they began: least where all are equal."""
    met = Counter((arm, (seed * arms + (arm - seed * shift) % arms) % jobs)
                  for seed in range(min(seeds, FORESEEN)) for arm in range(arms))
    return sum(count ** 2 for count in met.values())


def _refuse_names(names: list[str]) -> None:
    """Folder names must differ and fit the file system."""
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"two cells would share the folder {twice}.", "give their steps different overrides.")
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise UserError(f"the folder name {longest[:40]}... has {len(longest)} characters, more than {LONGEST_NAME}.",
                        "put the overrides of that step into a step file of their own.")


def _with_parents(step: str, resolved: dict[str, Resolved], seen: tuple = ()) -> Resolved:
    """The step's configuration with its parent's identity in its own: a child of another parent is another cell.

    Both maps are taken over, so that a changed default counts and a new symbol at its default does not. The seed is the
    cell's own in both.
    """
    one = resolved[step]
    parent = one.config.INIT_FROM_STEP
    if not parent:
        return one
    if step in seen:
        raise UserError(f"steps {' -> '.join((*seen, step))} start from each other.", "break the circle in INIT_FROM_STEP.")
    identity = copy.deepcopy(one.identity)
    inherited = _with_parents(parent, resolved, (*seen, step)).identity
    for part in ("set", "default"):
        identity[part] |= {f"PARENT.{name}": value for name, value in inherited[part].items() if name != "SEED"}
    return Resolved(one.config, one.text, sealed(identity), one.provenance)


def baseline(study: Study) -> str:
    """The step that report and laws compare with."""
    steps = steps_of(study)
    name = study.config.BASELINE or steps[0]
    if name not in steps:
        raise UserError(f"BASELINE={name} is not one of the study's steps ({' '.join(steps)}).",
                        "set BASELINE to one of them, or to nothing for the first.")
    return name


def contrasts(study: Study) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The pairs (step, reference) of CONTRASTS that the study can compare, and those that it leaves out: one of their steps is
    not in it, or is its baseline, with which every step is compared anyway."""
    steps, first = steps_of(study), baseline(study)
    found: list[tuple[str, str]] = []
    for text in study.config.CONTRASTS.split():
        step, colon, other = text.partition(":")
        if not (step and other) or ":" in other:
            raise UserError(f"CONTRASTS holds '{text}', which is no pair of steps.", "write V3:V1 for V3 against V1.")
        for one in (step, other):
            if one not in steps:
                study.resolve(one)  # refuses what is no step at all
        if step == other or (step, other) in found or (other, step) in found:
            raise UserError(f"CONTRASTS holds '{text}', a step against itself or a pair for the second time.",
                            f"take {text} out of CONTRASTS.")
        found.append((step, other))
    there = [pair for pair in found if set(pair) <= set(steps) - {first}]
    return there, [pair for pair in found if pair not in there]


def left_out_contrasts(study: Study) -> list[str]:
    """A sentence about the contrasts that the study cannot compare, if there are any."""
    pairs = " ".join(map(":".join, contrasts(study)[1]))
    return [f"no contrast {pairs}: one of the steps is not in the study, or is its baseline"] if pairs else []


def unheard_settings(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Sentences about what the study sets and each of these cells has otherwise, by its step: it acts nowhere."""
    said, elsewhere = [], {a.name for a in (*study.overrides, *study.found)} | set(BUDGET) | set(BATCH_SPLIT)
    for a in study.base:
        if a.name in study.schema.identity - elsewhere and cells and all(
                getattr(cell.resolved.config, a.name) != getattr(study.config, a.name) for cell in cells):
            said.append(f"{a.name}={a.value} of the study acts in no cell, for steps say what it is: write it behind one, as "
                        f"{cells[0].step}@{a.name}={a.value}")
    return said


def other_seeds(study: Study, out: Path, seeds: list[int]) -> list[int]:
    """Seeds that have left cells in `out` and are not among `seeds`."""
    if not out.is_dir():
        return []
    endings = {re.search(r"(_s(\d{1,10}))?$", entry.name)[2] for entry in os.scandir(out) if entry.name.startswith("test_")}
    found = {int(ending) if ending else study.config.SEED for ending in endings}
    return sorted(seed for seed in found - set(seeds) if seed < SEED_LIMIT)


def plan_name(content: bytes) -> str:
    """The name, without its ending, of the file of plan/ that holds this: a hash, so that a changed file is told."""
    return hashlib.sha256(content).hexdigest()[:16]


def inspect(out: Path, cell: Cell, held: bool = False) -> Status:
    """What the disk says of this cell. Reads only. `held`: we ourselves hold its lock."""
    folder = out / cell.name
    if not os.path.isdir(folder):  # also False for a path that is too long, which Path.is_dir raises for
        return Status("planned", "never ran")
    record = results.read(folder)
    if record is None:
        if not held and is_locked(folder):
            return _held(folder, cell)
        if not generations.there(folder):
            return Status("interrupted", "its process ended before its first checkpoint, so it starts anew")
        flaw = _checkpoint_flaw(folder, cell)
        return Status("stale", flaw) if flaw else Status("interrupted", "has a checkpoint to resume from")
    if record["state"] == "unreadable":
        return Status("stale", f"metrics.json cannot be read: {record['reason']}", record)
    changes = identity_changes(record["identity"], cell.resolved.with_seed(cell.seed).identity)
    if changes:
        return Status("stale", f"its result is of another configuration: {'; '.join(changes)}", record)
    return Status(record["state"], record["reason"] or "its result is on disk", record)


def _held(folder: Path, cell: Cell) -> Status:
    """Of a cell that a live process holds. One whose make was killed only stops, and a launcher waits for that. Its folder is
    not to be moved away meanwhile, so it is not stale before it has stopped."""
    launcher = process.claimed_by(folder / ".lock")
    if launcher is not None:
        return Status("running", "another make runs it" + (f" (process {launcher})" if launcher else ""))
    flaw = _checkpoint_flaw(folder, cell)
    return Status("running", f"its last process still stops; {flaw}") if flaw else Status(
        "interrupted", "its last process still stops")


def _checkpoint_flaw(folder: Path, cell: Cell) -> str | None:
    """Why the cell cannot go on from what is there."""
    try:
        found = json.loads((folder / "provenance.json").read_text())["identity"]
        changes = identity_changes(found, cell.resolved.with_seed(cell.seed).identity)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"provenance.json cannot be read: {error}"
    return f"its checkpoint is of another configuration: {'; '.join(changes)}" if changes else None


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the cell. The lock is released by the kernel when its owner dies.

    Taking it for an instant does no harm: a launcher waits longer than that for it.
    """
    if not (folder / ".lock").exists():
        return False
    from filelock import Timeout

    try:
        with process.lock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # another user's cell, or a folder or disk that is only read: who may not write there cannot run it either
        return False
