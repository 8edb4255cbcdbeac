"""A trap on a write: at the instant in which a program of the study opens, makes or renames a certain file, harm is done.

A sitecustomize.py, which Python imports at its start, asks to be told of every open, mkdir, rename and remove (an audit hook of
Python's own) and lets those pass that are none of the trap's. Needs no mounts, and no luck in meeting the instant. Whatever is
sprung is written down first, so that a case can say which process was stopped at which file. The program itself knows nothing
of this.

Harms: FULL, from that instant on no file of this process and its children grows beyond `ROOM` bytes, by a limit of the kernel,
and nothing can be made or renamed there; so half a file is written first, as on a disk that fills up. READ_ONLY, nothing that
matches can be written, made, renamed or removed. HANG, the process does not get on, and is deaf to SIGTERM.
"""

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FULL, READ_ONLY, HANG = "full", "read-only", "hang"
ROOM = 16
CODE = """import sys

_FOLDER, _ROOM = {folder!r}, {room}
_WRITES = {{"open", "os.mkdir", "os.rename", "os.remove"}}
_busy = _full = False


def _sprung(event, arguments):
    global _full
    import errno, json, os, resource, time
    from fnmatch import fnmatchcase

    armed = os.path.join(_FOLDER, "armed")
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.exists(armed):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    path = os.path.abspath(os.fsdecode(path))
    place, name = os.path.split(path)
    if name.startswith(".") and name.endswith(".tmp"):  # on its way to become that file (lib/atomic.py)
        path = os.path.join(place, name[1:].rsplit(".", 2)[0])
    with open(armed) as file:
        trap = json.load(file)
    if not fnmatchcase(path, trap["path"]) or trap["event"] not in (event, "any"):
        return
    with open(os.path.join(_FOLDER, "sprung"), "a") as file:
        file.write(json.dumps([event, path, sys.orig_argv[1:]]) + "\\n")
    if trap["harm"] == "hang":
        while True:
            time.sleep(1)
    if trap["harm"] == "full" and event == "open":
        _full = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        number = errno.ENOSPC if trap["harm"] == "full" else errno.EROFS
        raise OSError(number, os.strerror(number), path)


def _hook(event, arguments):
    global _busy
    if event not in _WRITES or _busy or _full:
        return
    _busy = True
    try:
        _sprung(event, arguments)
    finally:
        _busy = False


sys.addaudithook(_hook)
"""


@dataclass(frozen=True)
class Sprung:
    """A program that met the trap: what it was about to do (open, os.mkdir, ...), to which file, and its command line."""

    event: str
    path: Path
    words: list[str]


class Trap:
    """The trap of a study, which lies in `folder`; `path` is to be on the study's PYTHONPATH. Nothing is armed at first."""

    def __init__(self, folder: Path):
        self.path, self.armed, self.log = folder, folder / "armed", folder / "sprung"
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(CODE.format(folder=str(folder), room=ROOM))

    def arm(self, path: Path | str, harm: str, event: str = "open") -> None:
        """Wait for what matches `path` (a pattern of whole paths). A temporary file counts as the one that it is to become.
        `event`: open (to write), os.mkdir, os.rename (to that path), os.remove, or any of them."""
        self.log.unlink(missing_ok=True)
        temporary = self.armed.with_suffix(".new")
        temporary.write_text(json.dumps({"path": str(path), "harm": harm, "event": event}))
        os.replace(temporary, self.armed)

    def disarm(self) -> None:
        self.armed.unlink(missing_ok=True)

    def sprung(self) -> list[Sprung]:
        """Who met it, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [Sprung(event, Path(path), words) for event, path, words in map(json.loads, lines)]

    def met(self, pattern: Path | str) -> bool:
        return any(fnmatchcase(str(one.path), str(pattern)) for one in self.sprung())
