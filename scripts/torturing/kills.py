"""Kills: tiny studies are started and killed at random instants until they are complete.

A share of the kills comes at a random moment of a cell's life; the others at the instant in which a file appears or takes
its place, where a mistake would show. Everything random is drawn from (seed, number of the study), so a study that failed is
tortured again with --seed and --study; what the machine does in between is not repeated.
"""

import math
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scripts.torturing.arena import Arena, Failed, Reference, Study, steps
from scripts.torturing.watching import Files, send

if TYPE_CHECKING:
    import subprocess

PER_STUDY = 10  # kills, after which a study may complete
JOBS = (1, 2)
STREAMS = 2  # studies at a time: one often waits
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
# What is killed, and how often it is chosen where it is there. A group or all: every process of it, as a terminal or a
# power cut would.
VICTIMS = {"make": 3, "inner make": 1, "shell": 1, "plan": 2, "report": 2, "launcher": 3, "cell": 4, "group of make": 2,
           "group of a cell": 1, "everything": 2}
# The end of the name of a file, and what happens to it.
WRITES = [("checkpoint.pt", "made"), ("checkpoint.pt", "made"), ("checkpoint.pt", "in place"), ("checkpoint.pt", "in place"),
          ("metrics.json", "made"), ("metrics.json", "made"), ("metrics.json", "in place"), ("model.pt", "made"),
          ("model.pt", "in place"), ("metrics.jsonl", "made"), ("metrics.jsonl", "written to"), (".config", "made"),
          ("provenance.json", "in place"), ("training.log", "made"), ("cells.mk", "made"), ("design.json", "made"),
          ("report.json", "made"), ("report.md", "in place")]
SHARE_AT_WRITES = 0.7
AWAITED = 3  # kinds of writes of which the first to come is the moment; some do not come for long


@dataclass
class Tally:
    """What was done: kills by (signal, victim), studies, makes, and the longest wait until nothing was left of a make."""

    kills: Counter = field(default_factory=Counter)
    moments: Counter = field(default_factory=Counter)
    studies: int = 0
    makes: int = 0
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kill(self, name: str, victim: str, moment: str) -> int:
        """Count one; which one it is."""
        with self.lock:
            self.kills[name, victim] += 1
            self.moments[moment] += 1
            return self.total

    def make(self) -> None:
        with self.lock:
            self.makes += 1

    def study(self, slowest: float) -> None:
        with self.lock:
            self.studies, self.slowest = self.studies + 1, max(self.slowest, slowest)

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def victims(self) -> list[str]:
        """Who was killed at all."""
        return [victim for victim in VICTIMS if any(name == victim for _, name in self.kills)]

    def content(self) -> dict:
        """As JSON."""
        signals = sorted({name for name, _ in self.kills})
        return {"total": self.total, "studies": self.studies, "makes": self.makes, "moments": dict(self.moments),
                "slowest_seconds": round(self.slowest, 2),
                "victims": {victim: {name: self.kills[name, victim] for name in signals} for victim in self.victims()}}


def matches(name: str, wanted: str) -> bool:
    """Whether an event's name is that file, or a temporary one on its way to become it."""
    return name == wanted or (name.startswith(f".{wanted}.") and name.endswith(".tmp"))


class Tormentor:
    """Kills one study, again and again. `cell_seconds` is about how long a cell lives; `say` shows progress."""

    def __init__(self, study: Study, reference: Reference, jobs: int, kills: int, draw: random.Random, tally: Tally,
                 say: Callable[[str], None]):
        self.study, self.reference, self.jobs, self.left, self.draw = study, reference, jobs, kills, draw
        self.tally, self.say = tally, say
        self.cell_seconds = max(1.0, reference.seconds / len(reference.records))

    def run(self) -> None:
        """Until make completes; then everything is compared."""
        for _ in range(3 * self.left + 10):
            process = self.study.start(f"-j{self.jobs}")
            self.tally.make()
            killed = self._kill_some(process)
            code = self.study.wait(process)
            if self.draw.random() < 0.75:  # otherwise the next make meets what is left of this one
                self.study.settle()
                self.reference.audit(self.study.out)
            if code == 0 and not killed:
                break
        else:
            raise Failed("the study does not complete, however often make is called")
        self.study.settle()
        self.study.check_end(self.reference)
        self.tally.study(self.study.slowest)

    def _kill_some(self, process: "subprocess.Popen") -> int:
        """Kill during one make, once or (a cell is killed, and make goes on) several times; returns how often."""
        killed = 0
        with Files(self.study.folder) as files:
            while self.left:
                moment = self._wait_for_the_moment(files, process)
                if moment is None:
                    break
                if self._kill(process, moment):
                    killed, self.left = killed + 1, self.left - 1
            while process.poll() is None and not self.left:
                self.study.processes()
                time.sleep(0.1)
        return killed

    def _wait_for_the_moment(self, files: Files, process: "subprocess.Popen") -> str | None:
        """Sleep until the next kill is due; what it was, or None if make ended before."""
        wanted = self.draw.sample(WRITES, AWAITED) if self.draw.random() < SHARE_AT_WRITES else []
        after = self.draw.uniform(0.05, 0.7 * self.cell_seconds)
        pause = self.draw.choice((0.0, 0.0, self.draw.uniform(0, 0.02)))
        begun = time.monotonic()
        end = begun + (self.cell_seconds if wanted else after)
        while (left := end - time.monotonic()) > 0:
            if process.poll() is not None:
                return None
            event = files.next(min(left, 0.2))
            for name, what in wanted:
                if event and event.what == what and matches(event.name, name):
                    time.sleep(pause)
                    return f"{name} {what}" + (f" +{1000 * pause:.0f} ms" if pause else "")
            if event is None:
                self.study.processes()
        return f"{time.monotonic() - begun:.1f} s later"

    def _kill(self, process: "subprocess.Popen", moment: str) -> bool:
        sent = self.draw.choice(SIGNALS)
        found = self.study.processes()
        there = {"make": [process.pid] if process.poll() is None else []}
        for role in ("inner make", "shell", "plan", "report", "launcher", "cell"):
            there[role] = [p.pid for p in found if p.role == role]
        there["group of make"], there["group of a cell"] = there["make"], there["cell"]
        there["everything"] = [p.pid for p in found]
        names = [name for name in VICTIMS if there[name]]
        if not names:
            return False
        victim = self.draw.choices(names, [VICTIMS[name] for name in names])[0]
        pids = there[victim] if victim == "everything" else [self.draw.choice(there[victim])]
        if not any([send(self.study.folder, pid, sent, victim.startswith("group")) for pid in pids]):
            return False  # it ended by itself just now
        name = signal.Signals(sent).name
        count = self.tally.kill(name, victim, "at any time" if moment[0].isdecimal() else "at a write")
        number = self.study.folder.name.rpartition("-")[2]
        self.say(f"kill {count}: study {number} -j{self.jobs}  {name} to {victim}  {moment}")
        return True


class Campaign:
    """Studies, each killed up to `per_study` times (default: PER_STUDY, or fewer so that there is a study for each of JOBS),
    until there were `kills` kills. `run` is called by as many threads as there are `streams`, each of which tortures one study
    at a time."""

    def __init__(self, arena: Arena, reference: Reference, kills: int, seed: int, say: Callable[[str], None],
                 only: int | None = None,
                 per_study: int | None = None):
        self.arena, self.reference, self.kills, self.seed, self.only = arena, reference, kills, seed, only
        self.per_study = per_study or max(1, min(PER_STUDY, math.ceil(kills / len(JOBS))))
        self.streams = 1 if only is not None else min(STREAMS, math.ceil(kills / self.per_study))
        self.tally, self.failures, self.number, self.promised = Tally(), [], only or 0, 0
        self.begun = time.monotonic()
        self.ended: float | None = None
        self.lock, self.running = threading.Lock(), 0
        self.said, self.keep = say, lambda: None

    def say(self, text: str) -> None:
        self.said(text)
        self.keep()

    def run(self) -> None:
        while (number := self._next()) is not None:
            try:
                self._study(number, self._share())
            finally:
                with self.lock:
                    self.running, self.ended = self.running - 1, time.monotonic()
            if self.only is not None:
                break

    def _next(self) -> int | None:
        """The number of the next study; None if there is none. What others still do to theirs counts as done, since a study
        may complete before all its kills: then one more follows."""
        while True:
            with self.lock:
                missing = self.kills - self.tally.total if self.only is None else 1
                if missing <= 0 or len(self.failures) > 5 or self.arena.closed:
                    return None
                if self.running * self.per_study < missing:
                    self.running += 1
                    self.number += 1 if self.only is None else 0
                    return self.number
            time.sleep(0.2)

    def _share(self) -> int:
        """The kills of one study."""
        with self.lock:
            others = (self.running - 1) * self.per_study
            return max(1, min(self.per_study, self.kills - self.tally.total - others))

    def _study(self, number: int, kills: int) -> None:
        jobs = JOBS[(number - 1) % len(JOBS)]
        study = self.arena.study(f"killed-{number}", ABLATION_STEPS=f'"{" ".join(steps(2))}"', SEEDS='"2"')
        draw = random.Random(f"{self.seed} {number}")
        try:
            Tormentor(study, self.reference, jobs, kills, draw, self.tally, self.say).run()
            self.say(f"study {number} is complete and equal after {self.tally.total} kills in all, "
                     f"{time.monotonic() - self.begun:.0f} s")
        except Failed as error:
            if self.arena.closed:
                return  # it was ended, and has not failed
            again = f"(again: --seed {self.seed} --kills {self.kills} --study {number})"
            self.failures.append((f"study {number}, -j{jobs}", f"{error} {again}"))
            self.say(f"study {number} FAILED: {error}")
        finally:
            study.kill_all()

    def rows(self) -> list[tuple[str, str, str, float, bool]]:
        """What it has shown so far: a row for each failure, and one for all."""
        tally, failures = self.tally, list(self.failures)
        what = f"studies that failed: {len(failures)}"
        if not failures and not tally.studies:
            what = "no study has come to its end yet"
        elif not failures:
            what = f"complete and equal to the bit; nothing outlived its make by more than {tally.slowest:.1f} s"
            what += f"; studies not at their end: {self.running}" if self.running else ""
        return [("kills", where, text, 0.0, False) for where, text in failures] + [
            ("kills", f"{tally.total} of {self.kills} kills, {tally.studies} studies, {tally.makes} makes", what,
             (time.monotonic() if self.running or not self.ended else self.ended) - self.begun, not failures)]
