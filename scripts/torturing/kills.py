"""Kills: tiny studies are started and killed at random instants until they are complete.

A share of the kills comes at a random moment of a cell's life; the others at the instant in which a file appears or takes
its place, where a mistake would show. Everything random is drawn from (seed, number of the study), so a study that failed is
tortured again with --seed and --study; what the machine does in between is not repeated.
"""

import math
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from scripts.torturing.arena import Arena, Failed, Reference, Study, steps
from scripts.torturing.watching import Files, send

PER_STUDY = 10  # kills, after which a study may complete
JOBS = (1, 2)
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

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def matches(name: str, wanted: str) -> bool:
    """Whether an event's name is that file, or a temporary one on its way to become it."""
    return name == wanted or (name.startswith(f".{wanted}.") and name.endswith(".tmp"))


class Tormentor:
    """Kills one study, again and again. `cell_seconds` is about how long a cell lives; `say` shows progress."""

    def __init__(self, study: Study, reference: Reference, jobs: int, kills: int, draw: random.Random, tally: Tally, say):
        self.study, self.reference, self.jobs, self.left, self.draw = study, reference, jobs, kills, draw
        self.tally, self.say = tally, say
        self.cell_seconds = max(1.0, reference.seconds / len(reference.records))

    def run(self) -> None:
        """Until make completes; then everything is compared."""
        for _ in range(3 * self.left + 10):
            self.tally.makes += 1
            process = self.study.start(f"-j{self.jobs}")
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
        self.tally.studies += 1
        self.tally.slowest = max(self.tally.slowest, self.study.slowest)

    def _kill_some(self, process) -> int:
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

    def _wait_for_the_moment(self, files: Files, process) -> str | None:
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

    def _kill(self, process, moment: str) -> bool:
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
        self.tally.kills[name, victim] += 1
        self.tally.moments["at a write" if not moment[0].isdecimal() else "at any time"] += 1
        number = self.study.folder.name.rpartition("-")[2]
        self.say(f"kill {self.tally.total}: study {number} -j{self.jobs}  {name} to {victim}  {moment}")
        return True


def campaign(arena: Arena, reference: Reference, kills: int, seed: int, say, only: int | None = None,
             per_study: int | None = None) -> tuple[Tally, list[tuple[str, str]]]:
    """Studies, each killed up to `per_study` times (default: PER_STUDY, or fewer so that there is a study for each of JOBS),
    until there were `kills` kills; failures as (study, what)."""
    tally, failures, number = Tally(), [], only or 0
    per_study = per_study or min(PER_STUDY, math.ceil(kills / len(JOBS)))
    begun = time.monotonic()
    while tally.total < kills or only is not None:
        number += 1 if only is None else 0
        jobs = JOBS[(number - 1) % len(JOBS)]
        study = arena.study(f"killed-{number}", ABLATION_STEPS=f'"{" ".join(steps(2))}"', SEEDS='"2"')
        draw = random.Random(f"{seed} {number}")
        try:
            Tormentor(study, reference, jobs, min(per_study, kills - tally.total), draw, tally, say).run()
            say(f"study {number} is complete and equal after {tally.total} kills in all, "
                f"{time.monotonic() - begun:.0f} s")
        except Failed as error:
            failures.append((f"study {number}, -j{jobs}", f"{error} (again: --seed {seed} --kills {kills} --study {number})"))
            say(f"study {number} FAILED: {error}")
        finally:
            study.kill_all()
        if only is not None or len(failures) > 5:
            break
    return tally, failures
