"""What makes way for a cell: stale folders go to OUT/archive/, a finished cell's checkpoints away.

Invariants: nothing is overwritten, and only checkpoints of a finished cell are deleted; a folder is moved or cleaned only
under its lock, after a second look at it, because another make may work in it since the first.
"""

import contextlib
import os
import re
from pathlib import Path

from lib import atomic, generations, process, results
from lib.cells import FINISHED, Cell, Status, inspect

OTHER_DATA = re.compile(r"\b(train_hash|eval_hash) ([0-9a-f]{12}) -> ")  # in the reason of a cell that lib.loop has refused
LOCK_SECONDS = 1.0  # another plan that looks whether a cell runs holds its lock for an instant


def archive(out: Path, name: str) -> None:
    """Move a cell's folder to OUT/archive/, under the first free number."""
    atomic.make_folder(out / "archive")
    number = 1
    while (target := out / "archive" / f"{name}.{number}").exists():
        number += 1
    atomic.rename(out / name, target)


def archive_stale(out: Path, cell: Cell) -> Status | None:
    """Archive a cell that was found stale, or one to be retried that failed because its checkpoint is of other data; its state
    of now, if neither holds or another make is at work in its folder."""
    from filelock import Timeout

    if not (out / cell.name).is_dir():  # archived by another make, which has not begun it yet; a lock would make it anew
        return inspect(out, cell)
    try:
        with process.lock(out / cell.name / ".lock", timeout=LOCK_SECONDS):
            status = inspect(out, cell, held=True)
            if status.state == "stale" or has_other_data(cell, status):
                archive(out, cell.name)
                return None
            return status
    except Timeout:
        return Status("running", "another make is at work in its folder")


def has_other_data(cell: Cell, status: Status) -> bool:
    """Whether a cell failed because the data were not those of its checkpoint, and they still are not. What the data are is no
    part of an identity: to know it takes reading them."""
    before = dict(OTHER_DATA.findall(status.why)) if status.state == "failed" else {}
    if not before:
        return False
    from lib.data import evaluation_set, open_corpus

    cfg = cell.resolved.config
    corpus = open_corpus(cfg)
    windows = evaluation_set(cfg, corpus)
    now = {"train_hash": corpus.train.fingerprint(), "eval_hash": windows.hash}
    return any(not now[name].startswith(digest) for name, digest in before.items())


def remove_checkpoints(folder: Path) -> None:
    """Remove those of a finished cell, if there are any: it was killed between its result and the end of its process."""
    if not any(os.path.exists(folder / name) for name in (*generations.NAMES, generations.DAMAGED)):
        return
    from filelock import Timeout

    with contextlib.suppress(Timeout, OSError), process.lock(folder / ".lock", timeout=0):  # the next plan tries again
        if (record := results.read(folder)) and record["state"] in FINISHED:
            generations.remove(folder)
