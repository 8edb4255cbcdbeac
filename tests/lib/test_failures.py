"""Reasons of failed cells: the kind first, then the end of what the cell said."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from lib import failures, process
from tests.harness import ROOT


@pytest.mark.parametrize("error, kind", [
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "disk"), (OSError(errno.EDQUOT, "Quota"), "disk"),
    (OSError(errno.EROFS, "Read-only"), "disk"), (PermissionError(errno.EACCES, "no"), None),
    (ValueError("out of memory"), None), (RuntimeError("a shape is wrong"), None),
])
def test_what_kind_of_failure_an_error_is(error, kind):
    assert failures.kind(error) == kind
    assert kind is None or failures.sentence(error) == f"{kind}: {type(error).__name__}: {error}".removesuffix(": ")


TRACE = 'Traceback (most recent call last):\n  File "/x/gpt2/block.py", line 7, in f\n    g()\n  File "/x/a.py", line 9, in g\n'


@pytest.mark.parametrize("text, code, reason", [
    (TRACE + "RuntimeError: boom\n", 1, "exception: RuntimeError: boom (a.py, line 9)"),
    (TRACE + "KeyError: 1\n\nDuring handling\n\n" + TRACE + "lib.X: two\nlines\n", 1,
     "exception: lib.X: two lines (a.py, line 9)"),
    (TRACE + "torch.OutOfMemoryError: CUDA out of memory.\n", 1,
     "out of memory: torch.OutOfMemoryError: CUDA out of memory. (a.py, line 9)"),
    (TRACE + "MemoryError\n", 1, "out of memory: MemoryError (a.py, line 9)"),
    (TRACE + "OSError: [Errno 28] No space left on device: 'x'\n", 1,
     "disk: OSError: [Errno 28] No space left on device: 'x' (a.py, line 9)"),
    *((text, 74, f"disk: {failures.CUT_SHORT}")  # the traceback found no room, or not all of it did
      for text in ("", "iteration 5\n", "iteration 5\nTraceb", TRACE[:11], TRACE[:40], TRACE)),
    ("iteration 5\n", -11, "signal 11 (SIGSEGV): iteration 5"),
    ("error: no data.\n  try: make data.\n", 2, "refused: no data. try: make data"),
    ("error: no data.", 2, "refused: no data."),
    ("x.cpp:1:\nerror: no type\n" + TRACE + "InductorError: CppCompileError\n", 1,
     "exception: InductorError: CppCompileError (a.py, line 9)"), ("error: no type\n", 3, "exit status 3: error: no type"),
    ("", 3, "exit status 3: it printed nothing"),
    (TRACE, 1, "exit status 1: File \"/x/a.py\", line 9, in g"),
])
def test_what_a_log_and_an_exit_status_say(text, code, reason):
    assert failures.from_log(text, code) == reason


def test_a_reason_is_one_line_of_bounded_length():
    reason = failures.from_log(TRACE + "RuntimeError: " + "x" * 10_000 + "\n" + "y\n" * 100, 1)
    assert len(reason) <= failures.LONGEST and "\n" not in reason and reason.endswith("(a.py, line 9)")


def test_what_to_do_is_kept_of_a_refusal_that_is_long():
    reason = failures.from_log(f"error: {'x ' * 500}\n  try: {'y' * 80}\n", 2)
    assert len(reason) <= failures.LONGEST and reason.endswith(f" ... try: {'y' * 80}")


@pytest.mark.parametrize("reason, says", [
    ("refused: the data set is not there. try: make data", "once that is mended, make RETRY=1 runs it again"),
    ("refused: checkpoint.pt is of another run: train_hash 0 -> 1. try: restore the data and make RETRY=1, which goes on", ""),
    ("refused: no checkpoint can be read. try: remove both: make RETRY=1 then starts the cell anew", "")])
def test_a_refused_cell_is_not_said_to_go_on_from_its_checkpoint(reason, says):
    """It would be refused again; its own sentence says what to do first."""
    assert failures.advice("failed", reason, True) == says


@pytest.mark.parametrize("state, reason, resumable, says", [
    ("failed", "out of memory: x", False, "BATCH_SIZE_AUTO"), ("failed", "disk: x", True, "make RETRY=1, from its checkpoint"),
    ("failed", "timeout: x", False, "CELL_TIMEOUT"), ("failed", "exception: x", True, "runs it again, from its checkpoint"),
    ("diverged", "x", False, "a result, which make RETRY=1 keeps too"),
])
def test_what_can_be_done(state, reason, resumable, says):
    assert says in failures.advice(state, reason, resumable)


def test_what_goes_without_saying():
    assert failures.advice("done", "its result is on disk", False) == failures.advice("planned", "never ran", False) == ""


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, process.EXIT_DISK), (errno.EACCES, 1)])
def test_a_full_disk_is_told_by_the_exit_status_even_if_nothing_can_be_printed(number, code):
    program = f"from lib import failures\nwith failures.disk_told_by_exit_status():\n    raise OSError({number}, 'x')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=full, env=os.environ)
    assert done.returncode == code
