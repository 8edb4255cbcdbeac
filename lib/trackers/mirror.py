"""A tracker's own process: python -m lib.trackers.mirror NAME FOLDER, started by the cell in FOLDER or by its report.

It reads FOLDER/tracker.json, starts that run in the tracker, and takes the rows of FOLDER/metrics.jsonl as they come, or the
files of a report. Standard input says when: any byte for a row, "." or the end for the last one. Ends with status 1 and a last
line that says why, also where the tracker has not answered within CALL_SECONDS.

An adapter is a class `Tracker` with this interface, and knows nothing of cells:
    Tracker(run: Run)                      starts, or goes on with, the run of `run.id`
    log(number: int, row: dict)            row `number` (from 0); rows of a run that goes on come anew from the first
    attach(files: list[Path])              pictures (.png), a page (.html), a table (.csv)
    close()                                returns when all is on disk, or sent
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

CALL_SECONDS = 60.0  # for one call of a tracker: an upload may be slow, but one that is slower holds only itself up
NICE = 10  # training comes first where both want the same core


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run: `folder` is where it may write, `mode` online or offline."""

    folder: Path
    id: str
    project: str
    group: str
    job_type: str
    name: str
    tags: list[str]
    config: dict[str, Any]
    mode: str
    files: list[Path] = field(default_factory=list)


class Tracker(Protocol):
    """See the module."""

    def log(self, number: int, row: dict[str, Any]) -> None: ...

    def attach(self, files: list[Path]) -> None: ...

    def close(self) -> None: ...


class Watchdog:
    """Ends this process when one call takes longer than CALL_SECONDS."""

    def __init__(self) -> None:
        self.begun: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.begun = time.monotonic()
        try:
            return call(*arguments)
        finally:
            self.begun = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, CALL_SECONDS / 4))
            begun = self.begun
            if begun is not None and time.monotonic() - begun > CALL_SECONDS:
                os.write(2, f"\nit has not answered for {CALL_SECONDS:.0f} s\n".encode())
                os._exit(1)


def description(folder: Path, tracker: str) -> Run:
    """What tracker.json in `folder` says of the run, with the revision of the sources among a cell's
    tags."""
    content = json.loads((folder / "tracker.json").read_bytes())
    tags = content["tags"] + ([f"revision {found}"] if content["tags"] and (found := revision()) else [])
    return Run(folder, content["id"], content["project"], group(Path(content["out"])), content["job_type"], content["name"],
               tags, content["config"], content["modes"][tracker], [Path(name) for name in content.get("files", ())])


def group(out: Path) -> str:
    """The id of the matrix whose results are in `out`: its folder, and the hash of the plan that was first on record."""
    from lib import design
    from lib.errors import UserError

    try:
        history = design.read(out)
    except UserError:
        history = []
    return out.name + (f"-{history[0]['hash']}" if history else "")


def revision() -> str | None:
    """The commit of the sources, with -dirty where they differ from it; None where they are no clone, or git is not there."""
    import subprocess

    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True,
                               timeout=5, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def rows(path: Path, handle: int) -> Any:
    """(number, row) of each whole row of `path`, as the bytes that arrive on `handle` say that there may be more."""
    number = offset = 0
    ended = False
    while not ended:
        said = os.read(handle, 65536)
        ended = not said or b"." in said
        if not path.exists():
            continue
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                yield number, json.loads(line)
                number += 1


def serve(make: Callable[[Run], Tracker], run: Run, handle: int = 0) -> None:
    """Start the tracker and give it all there is, until `handle` says that this was all."""
    call = Watchdog()
    tracker = call(make, run)
    if run.files:
        call(tracker.attach, run.files)
    else:
        for number, row in rows(run.folder / "metrics.jsonl", handle):
            call(tracker.log, number, {name: value for name, value in row.items() if value is not None})
    call(tracker.close)


def main() -> int:
    # The cell's keys and signals: it closes the pipe when it ends, and says before that whether there is more.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    name, folder = sys.argv[1], Path(sys.argv[2])
    try:
        from lib.trackers import ADAPTERS

        serve(importlib.import_module(ADAPTERS[name]).Tracker, description(folder, name))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is closed; what a tracker has left to do at exit may hang
