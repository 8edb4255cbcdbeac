"""Prove make slurm on the Slurm of scripts/slurm_box.py: a study is disturbed there in every way, and equals one that was run
by plain make on this machine, in its records, curves and weights, to the bit.

One job is killed, three are queued again (preempted, warned of the time limit, asked to stop), and a node is drained.
The study has steps that start from the model of another one, so jobs depend on each other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib import generations, results
from lib.cluster import REPORT, Cluster, Queued
from lib.config import load
from lib.errors import UserError, reported
from lib.tables import duration
from scripts.torturing.arena import Arena, Failed, Reference

STUDY, SEEDS, ITERATIONS = "gpt2-kv-compression-ablation", 3, 300
WAIT_SECONDS, POLL_SECONDS = 600.0, 0.3
MAKE_VARIABLES = ("KABLATE_", "GPT2_MAX_", "MAKE", "MFLAGS")


class Trial:
    """The study in `folder`, and Slurm's tools in `environ`."""

    def __init__(self, folder: Path, environ: dict[str, str], iterations: int = ITERATIONS, seeds: int = SEEDS):
        self.arena = Arena(folder, iterations=iterations)
        steps = load(STUDY).ABLATION_STEPS
        options = {"ABLATION_STEPS": f'"{steps}"', "SEEDS": f'"{seeds}"', "STOP_SECONDS": "60", "CHECKPOINT_INTERVAL": "0",
                   "CLUSTER_PARTITION": '"batch"'}  # also in the local one: a record holds the whole configuration
        self.local = self.arena.study("local", **options)
        self.study = self.arena.study("slurm", **options)
        self.cluster, self.environ, self.begun = Cluster(self.study.out), environ, time.monotonic()
        self.killed, self.queued_again = "", []

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:6.1f} s  {text}", flush=True)

    def run(self) -> None:
        reference = Reference(self.local, "-j2")
        self.say(f"plain make has run {len(reference.records)} cells in {duration(reference.seconds)}")
        parents = [json.loads((cell / "provenance.json").read_text())["parent"] for cell in self.local.cells()]
        self.make("slurm")
        self.make("slurm-cancel")
        self.until(lambda queue: not live(queue), "the queue is empty after make slurm-cancel")
        self.make("slurm")
        if "0 of" not in (again := self.make("slurm")).splitlines()[0]:
            raise Failed(f"make slurm submits cells twice: {again.splitlines()[0]}")
        self.preempt(self.training())
        self.kill(self.training(among=parents))  # so that other jobs wait for what will not come
        self.signal(self.training(), "USR2", "warned of its time limit")  # as Slurm does it
        self.signal(self.training(), "TERM", "asked to stop")  # also what a partition with a GraceTime does
        drained = self.training().node
        self.slurm("scontrol", "update", f"nodename={drained}", "state=drain", "reason=trial")
        self.say(f"node {drained} is drained")
        self.until(lambda queue: not live(queue), "nothing is left in the queue")
        states = {cell.name: state_of(cell) for cell in self.study.cells()}
        done = sum(state == "done" for state in states.values())
        lost = 1 + parents.count(self.killed)
        if states.get(self.killed) == "done" or done != len(reference.records) - lost:
            raise Failed(f"{self.killed} was killed, which should cost {lost} cells, but {done} are done")
        self.say(f"{done} of {len(reference.records)} cells are done; {self.killed} was killed, and the others waited for it")
        print(self.make("slurm-status"), end="")
        if f"{lost} of " not in (again := self.make("slurm")):
            raise Failed(f"make slurm does not submit the {lost} cells that are missing: {again}")
        self.until(lambda queue: not live(queue), "nothing is left in the queue")
        reference.check(self.study.out)
        self.check_resumed()
        if not (self.study.out / "report.md").exists():
            raise Failed("the report's job has written none")
        if "nothing to run" not in (said := self.make("cells")):
            raise Failed(f"make finds something to do after make slurm: {said}")
        self.slurm("scontrol", "update", f"nodename={drained}", "state=resume")
        self.say(f"all {len(reference.records)} cells equal those of plain make, to the bit; the report is written")

    def preempt(self, one: Queued) -> None:
        self.slurm("sbatch", "--partition=urgent", f"--nodelist={one.node}", "--exclusive", "--output=/dev/null",
                   "--wrap=sleep 3")
        self.await_requeue(one, "preempted")

    def signal(self, one: Queued, signal: str, what: str) -> None:
        self.slurm("scancel", f"--signal={signal}", one.job)
        self.await_requeue(one, what)

    def kill(self, one: Queued) -> None:
        self.slurm("scancel", "--signal=KILL", one.job)
        self.until(lambda queue: one.cell not in live(queue), f"job {one.job} ({one.cell}) is killed")
        self.killed = one.cell

    def await_requeue(self, one: Queued, what: str) -> None:
        def waits(queue: Any) -> Any:  # once it has stopped, which takes as long as saving
            again = re.search(r"Restarts=[1-9]", self.slurm("scontrol", "show", "job", one.job))
            return again and queue[one.cell].state != "COMPLETING"

        self.until(waits, f"job {one.job} ({one.cell}) is {what} and queued again")
        if not generations.there(self.study.out / one.cell):
            raise Failed(f"{one.cell} was {what} and has left no checkpoint")
        self.queued_again.append(one.cell)

    def check_resumed(self) -> None:
        for name in self.queued_again:
            if not results.read(self.study.out / name)["resumed"]:
                raise Failed(f"{name} was queued again and has not gone on from its checkpoint")

    def training(self, among: list[str] | None = None) -> Queued:
        """A job that is in the middle of training, and was not disturbed yet; of one of these cells."""
        found = []

        def look(queue: Any) -> Any:
            for one in live(queue).values():
                rows = self.study.out / one.cell / "metrics.jsonl"
                fresh = one.cell in (among or queue) and one.cell not in (REPORT, self.killed, *self.queued_again)
                if fresh and one.state == "RUNNING" and state_of(rows.parent) != "done":
                    trained = rows.read_text().count("\n") if rows.exists() else 0
                    if 0 < trained < self.arena.iterations // 8:  # a row every other iteration
                        found.append(one)
            return found

        self.until(look, None)
        return found[0]

    def until(self, holds: Any, what: str | None) -> None:
        begun = time.monotonic()
        while not holds(self.cluster.queue()):
            if time.monotonic() - begun > WAIT_SECONDS:
                raise Failed(f"not within {WAIT_SECONDS:.0f} s: {what or 'a job that trains'}")
            time.sleep(POLL_SECONDS)
        if what:
            self.say(what)

    def make(self, goal: str) -> str:
        environ = {k: v for k, v in (self.environ | self.study.environment()).items() if not k.startswith(MAKE_VARIABLES)}
        words = ["make", "--no-print-directory", f"PYTHON={sys.executable}", goal]
        done = subprocess.run(words, cwd=self.arena.tree, env=environ | tools(self.environ), capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"make {goal} ends with {done.returncode}: {done.stderr.strip()}")
        for line in done.stdout.splitlines() if goal != "slurm-status" else ():
            self.say(f"make {goal}: {line}")
        return done.stdout + done.stderr

    def slurm(self, *words: str) -> str:
        return subprocess.run(words, env=self.environ, capture_output=True, text=True, check=True, timeout=60).stdout


def tools(environ: dict[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in ("SLURM_CONF", "PATH")}


def live(queue: dict[str, Queued]) -> dict[str, Queued]:
    return {name: one for name, one in queue.items() if one.live}


def state_of(cell: Path) -> str | None:
    record = results.read(cell)
    return record["state"] if record else None


def run(folder: Path, environ: dict[str, str]) -> int:
    os.environ.update(tools(environ))  # lib.cluster asks Slurm from this process
    trial = Trial(folder, environ)
    try:
        trial.run()
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        print(trial.cluster.queue(), file=sys.stderr)
        return 1
    finally:
        trial.arena.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.slurm_trial", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder")
    args = parser.parse_args()
    if "SLURM_CONF" not in os.environ:
        raise UserError("the trial drains nodes, so it takes a Slurm of its own.", "python -m scripts.slurm_box trial FOLDER.")
    return run(args.folder.absolute(), dict(os.environ))


if __name__ == "__main__":
    with reported():
        sys.exit(main())
