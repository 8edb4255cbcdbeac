"""A clock that jumps back an hour while cells train, as seen by every process of the study.

A sitecustomize.py, which Python imports at its start, shifts time.time, time.time_ns and datetime.now once a flag file is
there. Monotonic clocks stay as they are, as they do where the system's clock is set; time stamps of files come to lie in the
future.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import results
from scripts.torturing.arena import Arena, Failed, Reference, Study, last_lines, record_of, snapshot
from scripts.torturing.watching import Files, send

if TYPE_CHECKING:
    import subprocess

JUMP_SECONDS = 3600
BUDGET_SECONDS = 2
SHIFTED = """import datetime, os, time

_shift = lambda: -{seconds} if os.path.exists({flag!r}) else 0
_time, _time_ns, _datetime = time.time, time.time_ns, datetime.datetime
time.time = lambda: _time() + _shift()
time.time_ns = lambda: _time_ns() + _shift() * 10 ** 9


class datetime_(_datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)


datetime_.__name__ = datetime_.__qualname__ = "datetime"
datetime.datetime = datetime_
"""


def cases(arena: Arena, reference: Reference) -> Iterator[Any]:
    """(name, function) of each case; the function returns a sentence for the table."""
    yield "back an hour between and within cells", lambda: jump(arena, reference)
    yield "back an hour within a budget of seconds", lambda: budget(arena)


class Clock:
    """The clock of a study. `path` is to be on its PYTHONPATH."""

    def __init__(self, folder: Path):
        self.path, self.flag = folder, folder / "jumped"
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(SHIFTED.format(seconds=JUMP_SECONDS, flag=str(self.flag)))

    def jump(self, out: Path) -> None:
        """From now on it is an hour earlier, and what was written so far comes from the future."""
        self.flag.touch()
        for path in [*out.rglob("*")]:
            try:
                times = path.stat()
                os.utime(path, (times.st_atime + JUMP_SECONDS, times.st_mtime + JUMP_SECONDS))
            except FileNotFoundError:  # a temporary file
                pass


def jump(arena: Arena, reference: Reference) -> str:
    """The first cell is finished and the second trains; the clock jumps, the second is killed, and make goes on."""
    clock = Clock(arena.root / "clock")
    study = arena.study("clock-jumps", path=clock.path, SEEDS='"2"')
    try:
        process = study.start("-j1")
        finished = _wait_for_rows(study, process, cells=2)
        before = snapshot([finished])
        clock.jump(study.out)
        for one in study.processes():
            if one.role == "cell":
                send(study.folder, one.pid, signal.SIGTERM)
        study.wait(process)
        study.settle()
        reference.audit(study.out)
        code, said = study.make()
        if code:
            raise Failed(f"make ends with {code} after the jump: {last_lines(said)}")
        moved = {path: (time_ns + JUMP_SECONDS * 10 ** 9, size) for path, (time_ns, size) in before.items()}
        after = snapshot([finished])
        if {p: size for p, (_, size) in moved.items()} != {p: size for p, (_, size) in after.items()} or any(
                abs(after[path][0] - moved[path][0]) > 10 ** 9 for path in moved):
            raise Failed("the cell that was finished before the jump was touched after it")
        reference.check(study.out, [cell.name for cell in study.cells()])
        study.check_nothing_to_do()
    finally:
        study.kill_all()
    return "the finished cell stays, the other resumes and is equal, then nothing to do"


def budget(arena: Arena) -> str:
    """Training takes the seconds it was given."""
    clock = Clock(arena.root / "clock-in-budget")
    study = arena.study("clock-jumps-in-budget", path=clock.path, GPT2_MAX_ITERS=None, GPT2_MAX_TIME=str(BUDGET_SECONDS))
    try:
        process = study.start("cells")
        _wait_for_rows(study, process, cells=1)
        clock.jump(study.out)
        code = study.wait(process)
        study.settle()
        if code:
            raise Failed(f"make ends with {code}: {last_lines(study.said())}")
        cell, = study.cells()
        record = record_of(cell)
        seconds = (results.read(cell) or {}).get("train_seconds") or 0.0
        if record["state"] != "done" or record["budget_progress"] != 1 or not BUDGET_SECONDS <= seconds < BUDGET_SECONDS + 2:
            raise Failed(f"{BUDGET_SECONDS} s of training took {seconds:.1f} s, state {record['state']}, "
                         f"progress {record['budget_progress']}")
        study.check_nothing_to_do()
    finally:
        study.kill_all()
    return f"{BUDGET_SECONDS} s of training took {seconds:.2f} s"


def _wait_for_rows(study: Study, process: "subprocess.Popen", cells: int) -> Path:
    """Sleep until the last of `cells` cells writes rows of its training; returns the folder of the first."""
    seen: list[Path] = []
    with Files(study.folder) as files:
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            event = files.next(0.2)
            if event and (event.name, event.what) == ("metrics.jsonl", "written to"):
                seen += [] if event.folder in seen else [event.folder]
                if len(seen) == cells:
                    return seen[0]
    raise Failed(f"the study came to its end before the clock could jump: {last_lines(study.said())}")
