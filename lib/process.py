"""Process discipline: nothing outlives the make that started it.

A cell runs in its own process group under a launcher. The launcher watches make's process; the cell asks the kernel for
a signal when the launcher dies. Both end in SIGTERM to the cell, which saves and stops.
"""

import ctypes
import os
import select
import signal

PR_SET_PDEATHSIG = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: the cell stopped on request, its checkpoint is on disk
LAUNCHER_VARIABLE, MAKE_VARIABLE = "KABLATE_LAUNCHER_PID", "KABLATE_MAKE_PID"


def die_with_launcher() -> None:
    """In a cell: receive SIGTERM when the launcher dies, also if it is already dead. No effect without a launcher."""
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if not launcher:
        return
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # not Linux: the launcher forwards signals, but cannot be killed with -9 safely
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


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
