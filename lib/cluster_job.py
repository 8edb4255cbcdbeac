"""What a job of the cluster runs: one program of the project, which can be stopped and go on later, also on another node.

Contract: the program is the one that a recipe of make runs, in an environment without what belongs to the make that has
submitted it. Asked to stop (SIGTERM) it saves, and the job waits again in Slurm's queue under its own number, unless Slurm is
already ending it. Before its time limit Slurm sends SIGUSR2 to every process of the job: submitit's handler calls
`checkpoint` and queues the job again; the program itself is deaf to that signal. A job that ends without what it was to bring
about has failed, so Slurm and what depends on it know.

Instances are pickled by submitit, so they hold plain values only.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from lib.kconfig import BUDGET
from lib.paths import ROOT

WARNING = signal.SIGUSR2  # what submitit asks Slurm for
# Process numbers mean other processes on another host, and what make was told is in the plan already; so all of the project's
# own variables stay behind, and make's.
OURS = "KABLATE_"
OF_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MAKE_TERMOUT", "MAKE_TERMERR", "RETRY", "FROM",
           "KCONFIG_CONFIG", "KCONFIG_SEED", "SUBMITIT_PREEMPT_SIGNAL", *BUDGET)


def without_make(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` as a job may have it."""
    return {name: value for name, value in environ.items() if name not in OF_MAKE and not name.startswith(OURS)}


class Job:
    """python -m `words`, with `variables` in its environment; `proof` is a file that is there once it has done its work."""

    def __init__(self, words: list[str], variables: dict[str, str] | None = None, proof: str | None = None):
        self.words, self.variables, self.proof = list(words), dict(variables or {}), proof
        self.pid: int | None = None

    def __call__(self) -> None:
        child = subprocess.Popen([sys.executable, "-m", *self.words], cwd=ROOT, stdin=subprocess.DEVNULL,
                                 env=without_make(os.environ) | self.variables, preexec_fn=_deaf)
        self.pid = child.pid
        _await(child.pid)
        code = child.wait()
        self.pid = None
        if code in (128 + signal.SIGTERM, -signal.SIGTERM) and still_runs():
            os.kill(os.getpid(), WARNING)  # it has saved, and nobody else will queue this job again
        if code or self.proof and not os.path.exists(self.proof):
            flaw = f"ended with {code}" if code else f"left no {self.proof}"
            raise RuntimeError(f"{' '.join(self.words[:2])} {flaw}")

    def checkpoint(self) -> Any:
        """Stop the program, which saves; gives submitit what the job runs when it starts again."""
        from submitit.helpers import DelayedSubmission

        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGTERM)
            _await(self.pid)
        return DelayedSubmission(Job(self.words, self.variables, self.proof))


def _deaf() -> None:
    signal.signal(WARNING, signal.SIG_IGN)  # programs that it starts inherit that


def _await(pid: int) -> None:
    """Until a child has ended. It stays to be waited for: a handler may ask for it in the middle of a wait, and Popen's own
    has a lock that cannot be taken twice."""
    with contextlib.suppress(ChildProcessError):  # it was waited for already
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def still_runs() -> bool:
    """Whether Slurm takes this job for running. One that it is ending (cancelled, preempted, at its limit) is not to be queued
    again by us: that would undo a cancel."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # the number of an array's last task is that of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    asked = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return asked.returncode == 0 and asked.stdout.strip() == "RUNNING"
