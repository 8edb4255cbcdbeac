"""What a plan hands to make: a makefile with one target a cell, and the resolved configuration of each step.

Invariants: both lie in OUT/plan/ under the hash of their content, so no later plan changes what one make is running, or is
about to read; OUT/cells.mk is a copy of the last makefile, for a person. One plan of a folder is written at a time.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lib import atomic, process, slots
from lib.cells import Cell, plan_name
from lib.errors import UserError
from lib.paths import shown

if TYPE_CHECKING:
    from lib.plan import Plan

LOCK_SECONDS = 2.0  # until a person is told that another make is writing its plan
LONGEST_WAIT = 300.0  # for it: to move a stale cell away takes some milliseconds
KEPT_SECONDS = 24 * 3600.0  # make has read its makefile an instant after it was written


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """While no other make writes a plan of this folder: each adds to one design, and archives what it finds stale."""
    from filelock import Timeout

    lock = process.lock(out / "plan" / ".lock")
    try:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            print(f"another make is writing its plan of {shown(out)}; waiting for it", file=sys.stderr, flush=True)
            lock.acquire(timeout=LONGEST_WAIT)
    except Timeout:
        raise UserError(f"another make has been writing its plan of {shown(out)} for {LONGEST_WAIT:.0f} s, or the file system "
                        "there has no locks.", "make doctor, which looks at the locks, or make again.") from None
    except (NotImplementedError, OSError) as error:  # the former from an older FileLock
        if isinstance(error, OSError) and error.errno not in process.NO_LOCKS:
            raise
        raise UserError(f"the file system of {shown(out)} has no locks, so that two makes could run one cell.",
                        "make OUT=folder with one on another file system.") from None
    try:
        yield
    finally:
        lock.release()


def write(plan: "Plan", must_run: list[Cell]) -> Path:
    """Store the makefile that runs these cells of a plan, in their order, and their configurations; its path."""
    for old in (plan.out / "plan").glob("*.mk"):
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            old.unlink()
    text = _text(plan, must_run)
    path = _stored(plan.out, text, "mk")
    os.utime(path)  # in use again, if it was there
    atomic.write_text(plan.out / "cells.mk", text)
    return path


def _text(plan: "Plan", must_run: list[Cell]) -> str:
    out = plan.out
    targets = {cell.name: f"{out}/{cell.name}/metrics.json" for cell in must_run}
    lines = ["# Written by the plan: the cells that must run. Make it anew with make; do not edit.",
             "CELLS :=" + "".join(f" \\\n  {t}" for t in targets.values()),
             f"all: $(CELLS)\n\t{_afterwards(plan, must_run)}", ".PHONY: all FORCE", ".PRECIOUS: $(CELLS)"]
    if plan.jobs > 1 and not slots.is_parallel():
        lines.insert(1, f"MAKEFLAGS += -j{plan.jobs}")
    for cell, words in zip(must_run, commands(plan, must_run).values(), strict=True):
        parent = f" {targets[cell.parent]}" if cell.parent in targets else ""
        lines.append(f"{targets[cell.name]}: FORCE{parent}\n\t$(Q)$(PYTHON) -m scripts.cell {' '.join(words)}")
    return "\n".join(lines) + "\n"


def commands(plan: "Plan", must_run: list[Cell]) -> dict[str, list[str]]:
    """The arguments of scripts.cell for each of these cells, by name, with the configurations stored that they read. Every
    launcher runs the same."""
    stored: dict[int, Path] = {}
    found = {}
    for number, cell in enumerate(must_run, 1):
        if id(cell.resolved) not in stored:
            stored[id(cell.resolved)] = _stored(plan.out, _configuration(plan, cell), "json")
        found[cell.name] = [f"{plan.out}/{cell.name}", "--plan", str(stored[id(cell.resolved)]), "--seed", str(cell.seed),
                            "--of", f"{number}/{len(must_run)}", *(["--parent", cell.parent] if cell.parent else []),
                            *(["--retry"] if plan.status[cell.name].state == "failed" else [])]
    return found


def _afterwards(plan: "Plan", must_run: list[Cell]) -> str:
    """Under UNTIL=decided the next look follows, which adds a block of seeds if something is still undecided."""
    if not plan.options.until or not must_run:
        return "@:"
    return f"$(Q)$(MAKE) --no-print-directory cells LOOK={len(plan.asked)}"


def _configuration(plan: "Plan", cell: Cell) -> str:
    """The seed-free configuration of a step, as lib.launch reads it."""
    resolved = cell.resolved
    return json.dumps({"step": cell.step, "optimizer": cell.optimizer, "study": plan.study.name,
                       "trainer": resolved.config.TRAINER,
                       "limits": {name: getattr(resolved.config, name) for name in process.LIMITS},
                       "config": resolved.text, "identity": resolved.identity, "symbols": resolved.provenance}, indent=1)


def _stored(out: Path, content: str, ending: str) -> Path:
    """The file of plan/ that holds this, under its hash."""
    path = out / "plan" / f"{plan_name(content.encode())}.{ending}"
    try:
        whole = path.read_text() == content
    except (OSError, ValueError):
        whole = False
    if not whole:  # or damaged since
        atomic.write_text(path, content)
    return path
