"""A study on a Slurm cluster: which of its cells wait or run there, and new ones submitted, through submitit.

Invariants: what is submitted is on record in OUT/slurm/ before Slurm has it, under a token that stands in the job's comment,
so that a cell is found in the queue whatever happens in between, and by another user of the folder; a cell is submitted only
if the queue does not hold it; a job's environment has nothing of the make that submitted it (lib/cluster_job.py). Slurm itself
schedules, and is asked once a call; nothing polls. Who runs a cell is decided by the cell's own lock, as on one machine.
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import atomic, process, results
from lib.cells import Cell
from lib.cluster_job import Job, without_make
from lib.errors import UserError
from lib.kconfig import BUDGET
from lib.paths import ROOT, shown

if TYPE_CHECKING:
    from lib.config import Config

LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "COMPLETING", "REQUEUED",
        "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "RESIZING")
LARGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 unless a site has set it
MOST_RESTARTS = 100  # at a time limit; each goes on from a checkpoint
COARSE_SECONDS = 60  # Slurm looks at time limits about once a minute
REPORT_MINUTES = 60
REPORT = "report"
FIELDS = "%F|%K|%T|%N|%r|%k"  # of squeue: number of the job or of its array, index there, state, node, reason, comment
OURS = ("array", "chdir", "comment", "dependency", "error", "job-name", "output", "requeue", "no-requeue", "signal", "wrap")
NO_SLURM = ("there is no Slurm on this machine.", "make slurm on a login node of the cluster, or make, which runs it here.")
# What make's command line said, and a report goes by.
OF_THE_REPORT = ("KABLATE_OUT", "KABLATE_SEEDS", "KABLATE_TIME", "KABLATE_UNTIL", "KABLATE_MAX_SEEDS", *BUDGET)


@dataclass(frozen=True)
class Queued:
    """What Slurm says of one job: whose it is (a cell's name, or REPORT), the identity of the cell as it was submitted, the
    job's number as Slurm's tools take it, its state in Slurm's words, its node, and why it waits or has ended."""

    cell: str
    identity: str
    job: str
    state: str
    node: str
    reason: str

    @property
    def live(self) -> bool:
        """Whether it is still to run, runs, or stops."""
        return self.state in LIVE


class Cluster:
    """The jobs of the study whose results folder is `out`."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out / "slurm"
        self.name = f"kablate-{out.name}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody else submits cells of this folder."""
        from filelock import Timeout

        lock = process.lock(self.folder / ".lock", timeout=60)
        with self._writing():
            atomic.make_folder(self.folder)
            try:
                lock.acquire()
            except Timeout:
                raise UserError(f"another make slurm is submitting cells of {shown(self.out)}.",
                                "make slurm again, later.") from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written here is a sentence. A record stays: Slurm may have the job already, and none is ever submitted
        twice."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{shown(self.folder)} cannot be written: {error.strerror or error}.",
                            "make room, or mend the folder; then make slurm again, which submits what is missing.") from error

    def queue(self) -> dict[str, Queued]:
        """The last job of each cell that Slurm still knows, by the cell's name; the report's under REPORT. A live job comes
        before one that has ended."""
        text = _slurm("squeue", "--noheader", "--array", "--states=all", f"--name={self.name}", f"--format={FIELDS}")
        records, found = {}, {}
        for line in text.splitlines():
            number, index, state, node, reason, token = (line.strip().split("|", 5) + [""] * 5)[:6]
            if token not in records:
                records[token] = self._record(token)
            position = int(index) if index.isdecimal() else 0
            if records[token] is None or position >= len(records[token]):
                continue  # of another folder of this name, or a record that somebody has removed
            cell, identity = records[token][position]
            job = f"{number}_{index}" if index.isdecimal() else number
            one = Queued(cell, identity, job, state, "" if node == "(null)" else node, "" if reason == "None" else reason)
            before = found.get(cell)
            if before is None or (one.live, int(number)) > (before.live, _number(before.job)):
                found[cell] = one
        return found

    def _record(self, token: str) -> list[tuple[str, str]] | None:
        """The cells of a submission, each with its identity, in the order of its array."""
        if not token.isalnum():
            return None
        try:
            record = json.loads((self.folder / f"{token}.json").read_text())
            return [(str(cell), str(identity)) for cell, identity in record["cells"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def submit(self, cells: list[Cell], words: dict[str, list[str]], queued: dict[str, Queued],
               side_by_side: int) -> Iterator[tuple[str, list[Cell]]]:
        """Submit these cells; `words` are the arguments of scripts.cell for each, `queued` what the queue holds already.
        Yields what is submitted as it is: a job's number and its cells."""
        jobs = {name: one.job for name, one in queued.items() if one.live}
        for request, parent, group in arrays(cells, set(jobs)):
            depends = {"dependency": f"afterok:{jobs[parent]}", "kill_on_invalid_dep": "yes"} if parent else {}
            programs = [Job(["scripts.cell", *words[cell.name]], proof=str(self.out / cell.name / results.NAME))
                        for cell in group]
            named = [(cell.name, cell.resolved.with_seed(cell.seed).identity["hash"]) for cell in group]
            numbers = self._send(programs, named, request, depends, side_by_side or len(group))
            jobs |= {cell.name: number for cell, number in zip(group, numbers, strict=True)}
            yield numbers[0].partition("_")[0], group

    def submit_report(self, cfg: "Config", study: str, steps: list[str], after: list[str]) -> str:
        """Submit the report, which begins when the jobs `after` have ended, however they did; its job's number. It reads the
        study as it is now: `study` is its .config."""
        digest = hashlib.sha256(study.encode()).hexdigest()[:16]
        with self._writing():
            atomic.write_text(self.folder / f"{digest}.config", study)
        variables = {name: os.environ[name] for name in OF_THE_REPORT if os.environ.get(name)}
        variables["KCONFIG_CONFIG"] = str(self.folder / f"{digest}.config")
        masters = sorted({int(job.partition("_")[0]) for job in after})
        depends = {"dependency": "afterany:" + ":".join(map(str, masters))} if masters else {}
        request = where(cfg) | {"timeout_min": REPORT_MINUTES}
        return self._send([Job(["scripts.report", *steps], variables)], [(REPORT, "")], request, depends, 1)[0]

    def _send(self, programs: list[Job], cells: list[tuple[str, str]], request: dict, depends: dict,
              side_by_side: int) -> list[str]:
        """Put jobs that ask for the same into the queue, as an array if there are several; their numbers."""
        executor = _executor(self.folder)
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        token = uuid.uuid4().hex
        record = self.folder / f"{token}.json"
        content = {"cells": cells, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": None}
        with self._writing():
            atomic.write_json(record, content)
        more = {"requeue": True, "chdir": str(ROOT), **depends, **request.get("slurm_additional_parameters", {})}
        try:
            with self._writing(), _environment(without_make(os.environ)):
                executor.update_parameters(**request | {"name": self.name, "slurm_comment": token,
                                                        "slurm_array_parallelism": side_by_side,
                                                        "slurm_additional_parameters": more})
                with executor.batch():
                    jobs = [executor.submit(program) for program in programs]
        except (FailedJobError, FailedSubmissionError) as error:  # the record stays: a controller may have it and not answer
            raise UserError(f"Slurm refuses the job: {_last_line(error)}.",
                            "make menuconfig, Cluster, for what is asked of it, then make slurm again.") from None
        numbers = [job.job_id for job in jobs]
        with self._writing():
            atomic.write_json(record, content | {"job": numbers[0].partition("_")[0]})
        return numbers

    def cancel(self, jobs: list[str]) -> None:
        """Take these jobs out of the queue; those that run are stopped, and their cells save."""
        for start in range(0, len(jobs), LARGEST_ARRAY):
            _slurm("scancel", "--quiet", *jobs[start:start + LARGEST_ARRAY])


def arrays(cells: list[Cell], queued: set[str]) -> list[tuple[dict, str | None, list[Cell]]]:
    """The cells in groups that can each be an array: what they ask of Slurm, and the one cell they all wait for, which is in
    an earlier group or in the queue. Within a group they keep their order."""
    by_name = {cell.name: cell for cell in cells}

    def depth(cell: Cell) -> int:
        return 1 + depth(by_name[cell.parent]) if cell.parent in by_name else 0

    groups: dict[str, tuple[dict, str | None, list[Cell]]] = {}
    for level, cell in sorted(((depth(cell), cell) for cell in cells), key=lambda pair: pair[0]):
        asked = request(cell.resolved.config)
        parent = cell.parent if cell.parent in by_name or cell.parent in queued else None
        key = json.dumps([level, asked, parent], sort_keys=True)
        groups.setdefault(key, (asked, parent, []))[2].append(cell)
    return [(asked, parent, group[start:start + LARGEST_ARRAY]) for asked, parent, group in groups.values()
            for start in range(0, len(group), LARGEST_ARRAY)]


def where(cfg: "Config") -> dict:
    """The part of a request that says whose job it is and where it may run, as submitit's parameters."""
    named = {"slurm_partition": cfg.CLUSTER_PARTITION, "slurm_account": cfg.CLUSTER_ACCOUNT, "slurm_qos": cfg.CLUSTER_QOS}
    return {name: value for name, value in named.items() if value}


def request(cfg: "Config") -> dict:
    """What a cell of this configuration asks of Slurm, as submitit's parameters. Time is what the cell may train, the time to
    stop, and CLUSTER_MINUTES for all else."""
    notice = cfg.STOP_SECONDS + COARSE_SECONDS
    asked = where(cfg) | {"timeout_min": math.ceil((cfg.GPT2_MAX_TIME + notice) / 60) + cfg.CLUSTER_MINUTES,
                          "slurm_signal_delay_s": notice}
    more = options(cfg.CLUSTER_OPTIONS)
    whole = cfg.DEVICE != "cpu" and not cfg.CLUSTER_GRES and not cfg.GPUS_PER_STEP  # all GPUs of the box, and its processors
    if cfg.CPU_THREADS and not whole:  # of all processes of the cell, which are in one task of Slurm's
        asked["cpus_per_task"] = cfg.CPU_THREADS * max(1, cfg.GPUS_PER_STEP)
    if cpus := more.get("cpus_per_task", asked.get("cpus_per_task")):
        asked["slurm_srun_args"] = [f"--cpus-per-task={cpus}"]  # srun does not inherit it
    if cfg.CLUSTER_GRES:
        asked["slurm_gres"] = cfg.CLUSTER_GRES
    elif whole:
        asked |= {"slurm_exclusive": True}
    elif cfg.DEVICE != "cpu":
        asked |= {"gpus_per_node": cfg.GPUS_PER_STEP}
    return asked | {"slurm_additional_parameters": more}


def options(text: str) -> dict:
    """'--mem=64G --nice' as options of sbatch."""
    try:
        words = shlex.split(text)
        wrong = [word for word in words if not word.startswith("--") or len(word.partition("=")[0]) < 3]
    except ValueError:  # a quote that is not closed
        wrong = [text]
    if wrong:
        raise UserError(f"CLUSTER_OPTIONS: '{wrong[0]}' is no long option of sbatch.",
                        "write options as --mem=64G --constraint=a100.")
    pairs = [word[2:].partition("=") for word in words]
    if taken := [name for name, _, _ in pairs if name in OURS]:
        raise UserError(f"CLUSTER_OPTIONS sets --{taken[0]}, by which make slurm finds and orders its jobs.",
                        f"leave out {', '.join(f'--{name}' for name in OURS)}.")
    return {name.replace("-", "_"): value if equals else True for name, equals, value in pairs}


def _executor(folder: Path) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("make slurm needs submitit, which is not installed.",
                        f"{sys.executable} -m pip install submitit.") from None
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise UserError(*NO_SLURM)
    return submitit.AutoExecutor(folder / "jobs", cluster="slurm", slurm_max_num_timeout=MOST_RESTARTS)


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """sbatch hands on what it has."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(wanted)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _slurm(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(*NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} does not answer.", "make slurm again when Slurm's controller does.") from None
    if done.returncode:
        raise UserError(f"{words[0]}: {_last_line(done.stderr)}.", "try again when Slurm's controller answers (sinfo tells).")
    return done.stdout


def _last_line(text: object) -> str:
    lines = str(text).strip().splitlines()
    return lines[-1].removesuffix(".") if lines else "it says nothing"


def _number(job: str) -> int:
    return int(job.partition("_")[0])
