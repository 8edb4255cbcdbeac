"""Process discipline: nothing outlives the make that started it.

A cell runs in its own process group under a launcher. The launcher watches make's process; the cell asks the kernel for
a signal when the launcher dies. Both end in SIGTERM to the cell, which saves and stops within STOP_SECONDS: whoever is left,
the launcher or the cell itself, kills the cell's group after that. Other programs of make's watch make themselves.

The cell in turn shows the launcher that it gets on, by a byte through a pipe now and then. A pipe needs no disk and no clock
that two processes agree on, and nothing is left of it. Asked with STACKS_SIGNAL, it says where it is.

A cell's lock is two locks on one file. The cell inherits the first (flock) and keeps it until it has ended. The second (a
record lock) is the launcher's own, for as long as it means to go on; so a cell that is locked and not claimed is stopping.
"""

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import os
import re
import select
import signal
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

PR_SET_PDEATHSIG = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: the cell stopped on request, its checkpoint is on disk
EXIT_DISK = 74  # EX_IOERR: the disk is full or gone, so that the log may not say it
LAUNCHER_VARIABLE, MAKE_VARIABLE, LIFE_VARIABLE = "KABLATE_LAUNCHER_PID", "KABLATE_MAKE_PID", "KABLATE_LIFE_FD"
STOP_VARIABLE = "KABLATE_STOP_SECONDS"
LIMITS = ("CELL_TIMEOUT", "STOP_SECONDS")  # the symbols of a cell that its launcher itself goes by
STACKS_SIGNAL = signal.SIGURG  # a process that has not asked for it ignores it: a cell may hang before it has
RECORD_LOCK = struct.Struct("hhqqi4x")  # Linux's struct flock: kind, whence, start, length, process
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
LIFE_SECONDS = 1.0  # between two signs of life, at least
_shown_at, _life = -LIFE_SECONDS, None  # in a cell: when it last showed life, and to whom


def number_in(variable: str) -> int | None:
    """The process, descriptor or time that we have put into the environment; None if it is not there. UserError if it is
    nothing of ours."""
    text = os.environ.get(variable, "")
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{variable}={text} is no number.", f"unset {variable}, which make sets where it is needed.")
    return int(text) if text else None


def die_with_launcher() -> None:
    """In a cell: receive SIGTERM when the launcher dies, also if it is already dead, and SIGKILL when STOP_SECONDS have passed
    since; without the former if these are 0. The launcher may ask for stacks from now on. No effect without a launcher."""
    launcher, grace = number_in(LAUNCHER_VARIABLE), number_in(STOP_VARIABLE)
    if launcher is None:
        return
    faulthandler.register(STACKS_SIGNAL)  # to standard error, of every thread, also while Python itself is stuck
    end = signal.SIGKILL if grace == 0 else signal.SIGTERM
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, end)
    except (OSError, AttributeError):
        return  # not Linux: the launcher forwards signals, but cannot be killed with -9 safely
    if grace:
        threading.Thread(target=_killed_after, args=(Watch(parent=launcher), grace), daemon=True).start()
    if os.getppid() != launcher:
        os.kill(os.getpid(), end)


def adopt() -> None:
    """In a process between the launcher and the cell's own: what it starts from now on dies with it at once, and shows life
    to the launcher, whose pipe only it has inherited."""
    os.environ |= {LAUNCHER_VARIABLE: str(os.getpid()), STOP_VARIABLE: "0"}
    if (life := number_in(LIFE_VARIABLE)) is not None:
        os.environ[LIFE_VARIABLE] = f"/proc/{os.getpid()}/fd/{life}"


def die_with_make() -> None:
    """In a program that make has started, itself or through a shell: receive SIGTERM when make has ended, however it did. No
    effect without make, and in what has a launcher, which sees to it."""
    make = number_in(MAKE_VARIABLE)
    if make is None or os.environ.get(LAUNCHER_VARIABLE):
        return

    def ended(watch: Any) -> None:
        watch.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ended, args=(Watch(make),), daemon=True).start()


def _killed_after(launcher: "Watch", seconds: int) -> None:
    """Kill this process, with its group if it leads one, `seconds` after the launcher has ended."""
    launcher.wait()
    time.sleep(seconds)
    (os.killpg if os.getpgrp() == os.getpid() else os.kill)(os.getpid(), signal.SIGKILL)


def lock(path: Path | str, timeout: float = -1) -> "FileLock":
    """A FileLock (flock) that never becomes a mere file, which would stay when its process is killed: where a file system has
    no locks, to acquire it is an OSError of NO_LOCKS."""
    from filelock import FileLock

    try:
        return FileLock(path, timeout=timeout, fallback_to_soft=False)
    except TypeError:  # an older one, which never does
        return FileLock(path, timeout=timeout)


def held_by_children(lock: "FileLock") -> list[int]:
    """The descriptor of a FileLock that we hold, as a list. A cell that inherits it keeps the lock when its launcher is killed:
    while it saves and stops, no other launcher may start it a second time. FileLock has no public name for it."""
    handle = getattr(getattr(lock, "_context", None), "lock_file_fd", None)
    return [] if handle is None else [handle]


def is_in_place(lock: "FileLock") -> bool:
    """Whether a FileLock that we hold is still the one that its path names: its folder may have been moved away after it was
    opened, and before it was ours."""
    handles = held_by_children(lock)
    try:
        return not handles or os.path.samestat(os.fstat(handles[0]), os.stat(lock.lock_file))
    except FileNotFoundError:
        return False


def claim(handles: list[int], held: bool = True) -> None:
    """In a launcher: say (or no longer say) that it goes on with the cell whose lock is open as `handles`. Children do not
    inherit it, and it ends with this process."""
    for handle in handles:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if held else fcntl.LOCK_UN)
        except OSError:
            pass  # on some network file systems the two locks are one, which then says the same


def claimed_by(lock: Path) -> int | None:
    """The launcher that goes on with a cell whose lock is held; None if its cell is only stopping. 0 where the system does not
    say who it is."""
    try:
        with open(lock, "rb") as file:
            asked = RECORD_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, launcher = RECORD_LOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except (OSError, struct.error):
        return 0
    return None if kind == fcntl.F_UNLCK else max(launcher, 0)


class Watch:
    """Tells whether any of the processes given has ended. A pid that is reused later cannot fool it; that of `parent`, from
    which this process has come, not even one that has been reused before."""

    def __init__(self, *pids: int, parent: int | None = None):
        self.handles = []
        for pid in pids if parent is None else (*pids, parent):
            try:
                self.handles.append(os.pidfd_open(pid))
            except ProcessLookupError:
                self.handles.append(None)  # ended before we could look
            except (OSError, AttributeError):
                pass  # no pidfd here: not watched
        if parent not in (None, os.getppid()):  # looked at last: while it is our parent, its number is nobody else's
            self.handles.append(None)

    def ended(self) -> bool:
        if None in self.handles:
            return True
        return bool(select.select(self.handles, [], [], 0)[0]) if self.handles else False

    def wait(self) -> None:
        """Until one of them has ended; for ever if none can be watched."""
        if None not in self.handles:
            select.select(self.handles, [], [])


def show_life() -> None:
    """In a cell: what it does gets on. Called at every micro-batch; writes at most once a second, and only under a launcher."""
    global _shown_at, _life
    now = time.monotonic()
    if now - _shown_at < LIFE_SECONDS:
        return
    _shown_at = now
    if where := os.environ.get(LIFE_VARIABLE):
        with contextlib.suppress(OSError):  # no /proc: then it shows none
            _life = os.open(where, os.O_WRONLY | os.O_NONBLOCK) if where.startswith("/proc/") else number_in(LIFE_VARIABLE)
        del os.environ[LIFE_VARIABLE]  # not for processes that the cell starts: it is not open there
    if _life is not None:
        try:
            os.write(_life, b".")
        except OSError:  # nobody reads, or not fast enough
            pass


class Life:
    """In the launcher: how long ago its cell last showed that it gets on. `handle` is what the cell inherits."""

    def __init__(self) -> None:
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
