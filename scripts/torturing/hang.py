"""Cells that hang: one that the kernel has stopped dead, and one that waits for ever where it writes and is deaf to SIGTERM.

CELL_TIMEOUT finds both, and the row has failed with the reason timeout. make leaves it so, make RETRY=1 runs the cell again,
and the result equals that of an undisturbed run to the bit.
"""

import signal
from collections.abc import Callable, Iterator
from typing import Any

from lib import results
from scripts.torturing.arena import Arena, Failed, Reference, Study, last_lines
from scripts.torturing.trap import HANG, Trap
from scripts.torturing.watching import Files, send

TIMEOUT, STOP = 12, 1  # seconds without progress, in which a busy machine must have imported torch; and to stop in


def cases(arena: Arena, reference: Reference) -> Iterator[Any]:
    """(name, function) of each case; the function returns a sentence for the table."""
    yield "a cell is stopped dead while it trains", lambda: stopped(arena, reference)
    yield "a cell hangs where it writes its weights", lambda: waiting(arena, reference)


def stopped(arena: Arena, reference: Reference) -> str:
    study = _study(arena, "stopped-dead")

    def harm() -> None:
        with Files(study.folder) as files:
            process = study.start()
            while process.poll() is None:
                event = files.next(0.2)
                if event and (event.name, event.what) == ("metrics.jsonl", "written to"):
                    for one in study.processes():
                        if one.role == "cell":
                            send(study.folder, one.pid, signal.SIGSTOP)
                    break
        study.wait(process)

    return _judged(study, reference, harm)


def waiting(arena: Arena, reference: Reference) -> str:
    trap = Trap(arena.root / "hangs-trap")
    study = _study(arena, "hangs", path=trap.path)

    def harm() -> None:
        trap.arm(study.out / "test_*/model.pt", HANG)
        study.wait(study.start())
        trap.disarm()
        log, = study.out.glob("test_*/training.log")
        text = log.read_text()
        if not trap.sprung() or "where each thread is" not in text or "in replacing" not in text:
            raise Failed(f"training.log does not show where the cell was: {last_lines(text)}")

    return _judged(study, reference, harm)


def _study(arena: Arena, name: str, **options: Any) -> Study:
    return arena.study(name, CELL_TIMEOUT=str(TIMEOUT), STOP_SECONDS=str(STOP), **options)


def _judged(study: Study, reference: Reference, harm: Callable) -> str:
    try:
        harm()
        study.settle()
        if "Traceback" in study.said():
            raise Failed(f"a traceback reaches the user: {last_lines(study.said(), 3)}")
        cell, = study.cells()
        record = results.read(cell) or {"state": "without a result", "reason": study.said()}
        if record["state"] != "failed" or not record["reason"].startswith("timeout: no progress for "):
            raise Failed(f"the cell is {record['state']}: {record['reason']}")
        reference.audit(study.out)
        for goal in ("run", "plan"):
            code, said = study.make(goal)
            if (code == 0) != (goal == "plan") or "RETRY=1" not in said or results.read(cell) != record:
                raise Failed(f"make {goal} on a failed row ends with {code}: {last_lines(said)}")
        code, said = study.make("RETRY=1")
        if code:
            raise Failed(f"make RETRY=1 ends with {code}: {last_lines(said)}")
        study.check_end(reference)
    finally:
        study.kill_all()
    return f"{record['reason']}; RETRY=1: complete and equal"
