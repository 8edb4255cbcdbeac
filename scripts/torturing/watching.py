"""What a study does at this moment: its processes, from /proc, and the files it makes, from the kernel's inotify.

Both are Linux's. A process belongs to a study if the study's mark is in its environment, which children inherit whatever
group or session they move to, or if the study's folder stands in its command line.
"""

import ctypes
import os
import select
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

MARK = "KABLATE_TORTURE"
CREATED, MOVED_HERE, MODIFIED, IS_FOLDER = 0x100, 0x80, 0x2, 0x40000000
MEANING = ((CREATED, "made"), (MOVED_HERE, "in place"), (MODIFIED, "written to"))
HEADER = struct.Struct("iIII")


@dataclass(frozen=True)
class Process:
    """A running process of a study. `role` says what it is there for; `cell` is the folder that a trainer trains."""

    pid: int
    parent: int
    role: str
    cell: str = ""


def processes(folder: Path) -> list[Process]:
    """Those of the study in `folder` that have not ended; zombies are none."""
    return [found for entry in os.listdir("/proc") if entry.isdecimal() and (found := _process(folder, int(entry)))]


def _process(folder: Path, pid: int) -> Process | None:
    """The process `pid`, if it is one of the study."""
    if pid == os.getpid():
        return None
    mark, place = f"{MARK}={folder}\0".encode(), f"{folder}/".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read() + b"\0"
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().rstrip(b"\0").split(b"\0")
        if mark not in environment and not any(place in word for word in words):
            return None
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rsplit(")", 1)[1].split()[:2]
    except OSError:  # it has ended meanwhile, or is another user's
        return None
    role, cell = _role([word.decode(errors="replace") for word in words])
    return None if state in "ZX" else Process(pid, int(parent), role, cell)


def send(folder: Path, pid: int, number: int, group: bool = False) -> bool:
    """Send a signal to a process of the study, or to the group that it leads; False if it has ended meanwhile. Its number may
    be another's by then, who must not be hit."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not _process(folder, pid):
            return False
        if group:
            os.killpg(pid, number)
        else:
            signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def _role(words: list[str]) -> tuple[str, str]:
    if "--cell" in words[:-1]:
        return "cell", words[words.index("--cell") + 1]
    for module, role in (("scripts.plan", "plan"), ("scripts.cell", "launcher"), ("scripts.report", "report")):
        if module in words[:4]:
            return role, ""
    name = words[0].rpartition("/")[2]
    return {"make": "inner make" if "-f" in words else "make", "sh": "shell"}.get(name, "other"), ""


def trained_twice(found: list[Process]) -> str | None:
    """A cell that two processes train at once. A trainer's own children look like it and are none."""
    pids = {process.pid for process in found if process.role == "cell"}
    cells = [process.cell for process in found if process.role == "cell" and process.parent not in pids]
    return next((cell for cell in cells if cells.count(cell) > 1), None)


@dataclass(frozen=True)
class Event:
    """`what` happened to `name` in `folder`: made, in place (renamed to that name) or written to."""

    folder: Path
    name: str
    what: str


class Files:
    """What happens to files below a folder from now on, folders that appear later included."""

    def __init__(self, root: Path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.handle = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.handle < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot be used")
        self.folders: dict[int, Path] = {}
        self.waiting: list[Event] = []
        self._watch(root)
        self.waiting.clear()  # what is there already did not happen now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.handle)

    def _watch(self, folder: Path) -> None:
        number = self.libc.inotify_add_watch(self.handle, os.fsencode(folder), CREATED | MOVED_HERE | MODIFIED)
        if number < 0:
            return  # gone again
        self.folders[number] = folder
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return
        for entry in entries:  # made before the watch was there
            self.waiting.append(Event(folder, entry.name, "in place"))
            if entry.is_dir(follow_symlinks=False):
                self._watch(Path(entry.path))

    def next(self, seconds: float) -> Event | None:
        """The next event, or None if there is none for so long."""
        end = time.monotonic() + seconds
        while not self.waiting:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.handle], [], [], left)[0]:
                return None
            data, at = os.read(self.handle, 65536), 0
            while at < len(data):
                number, mask, _, length = HEADER.unpack_from(data, at)
                name = os.fsdecode(data[at + HEADER.size:at + HEADER.size + length].rstrip(b"\0"))
                at += HEADER.size + length
                folder = self.folders.get(number)
                if folder is None or not name:
                    continue
                self.waiting += [Event(folder, name, what) for bit, what in MEANING if mask & bit]
                if mask & IS_FOLDER:
                    self._watch(folder / name)
        return self.waiting.pop(0)
