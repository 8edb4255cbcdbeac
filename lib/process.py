"""Process discipline: nothing outlives the make that started it.

A cell runs in its own process group under a launcher. The launcher watches make's process; the cell asks the kernel for
a signal when the launcher dies. Both end in SIGTERM to the cell, which saves and stops.

The cell in turn shows the launcher that it gets on, by a byte through a pipe now and then. A pipe needs no disk and no clock
that two processes agree on, and nothing is left of it.
"""

import ctypes
import os
import re
import select
import signal
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: the cell stopped on request, its checkpoint is on disk
EXIT_DISK = 74  # EX_IOERR: the disk is full or gone, so that the log may not say it
LAUNCHER_VARIABLE, MAKE_VARIABLE, LIFE_VARIABLE = "KABLATE_LAUNCHER_PID", "KABLATE_MAKE_PID", "KABLATE_LIFE_FD"
LIFE_SECONDS = 1.0  # between two signs of life, at least
_shown_at, _life = -LIFE_SECONDS, None  # in a cell: when it last showed life, and to whom


def die_with_launcher() -> None:
    """In a cell: receive SIGTERM when the launcher dies, also if it is already dead. No effect without a launcher."""
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if not launcher.isdecimal():
        return
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # not Linux: the launcher forwards signals, but cannot be killed with -9 safely
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def held_by_children(lock) -> list[int]:
    """The descriptor of a FileLock that we hold, as a list. A cell that inherits it keeps the lock when its launcher is killed:
    while it saves and stops, no other launcher may start it a second time. FileLock has no public name for it."""
    handle = getattr(getattr(lock, "_context", None), "lock_file_fd", None)
    return [] if handle is None else [handle]


class Watch:
    """Tells whether any of the processes given has ended. A pid that is reused later cannot fool it."""

    def __init__(self, *pids: int):
        self.handles = []
        for pid in pids:
            try:
                self.handles.append(os.pidfd_open(pid))
            except ProcessLookupError:
                self.handles.append(None)  # ended before we could look
            except (OSError, AttributeError):
                pass  # no pidfd here: not watched

    def ended(self) -> bool:
        if None in self.handles:
            return True
        return bool(select.select(self.handles, [], [], 0)[0]) if self.handles else False


def show_life() -> None:
    """In a cell: what it does gets on. Called at every micro-batch; writes at most once a second, and only under a launcher."""
    global _shown_at, _life
    now = time.monotonic()
    if now - _shown_at < LIFE_SECONDS:
        return
    _shown_at = now
    if handle := os.environ.pop(LIFE_VARIABLE, None):  # not for processes that the cell starts: it is not open there
        _life = int(handle)
    if _life is not None:
        try:
            os.write(_life, b".")
        except OSError:  # nobody reads, or not fast enough
            pass


class Life:
    """In the launcher: how long ago its cell last showed that it gets on. `handle` is what the cell inherits."""

    def __init__(self):
        self.reader, self.handle = os.pipe()
        for end in (self.reader, self.handle):
            os.set_blocking(end, False)
        self.seen = time.monotonic()

    def silence(self) -> float:
        """Seconds since the last sign, or since the start."""
        try:
            while os.read(self.reader, 4096):
                self.seen = time.monotonic()
        except BlockingIOError:
            pass
        return time.monotonic() - self.seen

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.handle)


def memory_kills() -> int | None:
    """How often the kernel has killed a process for want of memory since it started; None where it does not say."""
    try:
        counted = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M)
    except OSError:
        return None
    return int(counted[1]) if counted else None
