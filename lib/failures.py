"""Why a cell failed, in one line that begins with the kind of failure, and what to do about it.

Kinds: "out of memory", "disk", "timeout", "signal N", "exception", "refused" (bad input, in the cell's own two sentences) and
"exit status N" for what says nothing of itself. The launcher takes the line from the cell's log and exit status; a cell that
runs out of memory writes it itself, because nobody else knows its peak.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator

from lib import process
from lib.errors import EXIT_BAD_INPUT

MEMORY, DISK = "out of memory", "disk"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
# What torch says where it raises a plain RuntimeError: its CPU allocator, CUDA itself, and CUDA's libraries.
MEMORY_TEXT = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.I)
DISK_TEXT = re.compile(rf"\[Errno ({'|'.join(str(number) for number in sorted(FULL))})\]")
CUT_SHORT = "it is full or cannot be written, and training.log ends before it says more"  # its traceback had no room either
LONGEST = 300
AGAIN = {  # kind: what make RETRY=1 does, and what to do before
    MEMORY: "make RETRY=1 runs it again as it is configured; a smaller BATCH_SIZE with as much more "
            "GPT2_GRADIENT_ACCUMULATION, BATCH_SIZE_AUTO or GPT2_RECOMPUTE need less memory",
    DISK: "free space or mend the disk, then make RETRY=1",
    "timeout": "training.log says where it hung; make RETRY=1 tries it once more; CONFIG_CELL_TIMEOUT says how long a cell may "
               "show no progress",
}


def kind(error: BaseException) -> str | None:
    """MEMORY or DISK if that is what `error` is, else None. By name, because torch is not to be imported for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MEMORY
    if isinstance(error, OSError):
        return MEMORY if error.errno == errno.ENOMEM else DISK if error.errno in FULL else None
    return MEMORY if isinstance(error, RuntimeError) and MEMORY_TEXT.search(str(error)) else None


def sentence(error: BaseException) -> str:
    """One line on an error that has a kind."""
    return _short(": ".join(filter(None, (kind(error), type(error).__name__, str(error)))))


@contextlib.contextmanager
def disk_told_by_exit_status() -> Iterator[None]:
    """A process that cannot write ends with EXIT_DISK: the log, which lies on the same disk, may say nothing."""
    try:
        yield
    except OSError as error:
        if kind(error) != DISK:
            raise
        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stdout.flush()
        os._exit(process.EXIT_DISK)  # a flush at Python's own end would fail once more, and change the status


def from_log(text: str, code: int) -> str:
    """One line on why a cell's process ended with `code` (-N for signal N) after writing `text`."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it printed nothing"
    if code < 0:
        return _short(f"signal {-code} ({signal.Signals(-code).name}): {last}")
    if code == EXIT_BAD_INPUT and (refusal := _refusal(lines[-50:])):  # a compiler also prints lines that begin so
        return refusal
    raised = _exception(lines)
    if code == process.EXIT_DISK or (raised and DISK_TEXT.search(raised)):
        return _short(f"{DISK}: {raised or CUT_SHORT}")
    if raised and MEMORY_TEXT.search(raised) or re.match(r"(\w+\.)*(MemoryError|OutOfMemoryError)\b", raised or ""):
        return _short(f"{MEMORY}: {raised}")
    return _short(f"exception: {raised}" if raised else f"exit status {code}: {last}")


def _refusal(lines: list[str]) -> str | None:
    """The last error that lib.errors has printed: what is wrong, and what to run."""
    for number in reversed(range(len(lines))):
        if lines[number].startswith("error: "):
            what, after = lines[number].removeprefix("error: "), " ".join(lines[number + 1:number + 2]).strip()
            run = _short(f" {after}".rstrip("."), LONGEST // 2) if after.startswith("try: ") else ""
            return " ".join(filter(None, (_short(f"refused: {what}", LONGEST - len(run) - 1), run)))
    return None


def _exception(lines: list[str]) -> str | None:
    """The exception that ended the last traceback, with all its lines and the place where it was raised."""
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last):")]
    if not starts:
        return None
    ends = [number for number in range(starts[-1] + 1, len(lines)) if not lines[number].startswith(" ")]
    if not ends:
        return None
    places = re.findall(r'^  File "(?:.*/)?([^"/]+)", line (\d+)', "\n".join(lines[starts[-1]:ends[0]]), re.M)
    said = _short(" ".join(line.strip() for line in lines[ends[0]:ends[0] + 5]), LONGEST - 60)
    return said + (f" ({places[-1][0]}, line {places[-1][1]})" if places else "")


def _short(text: str, longest: int = LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[:longest - 4] + " ..."


def advice(state: str, reason: str, resumable: bool) -> str:
    """What make does with a cell that has this state, as a part of a sentence for make plan; "" if that goes without saying."""
    if state == "diverged":
        return "a result, which make RETRY=1 keeps too"
    if state != "failed":
        return ""
    if reason.startswith("refused:"):  # it says itself what to do, and would be refused again as it is
        return "" if "make RETRY=1" in reason else "once that is mended, make RETRY=1 runs it again"
    found = next((text for name, text in AGAIN.items() if reason.startswith(f"{name}:")), "make RETRY=1 runs it again")
    return found + (", from its checkpoint" if resumable else "")
