"""What is asked of Slurm for which cells, what its queue says of them, and how a job stops and goes on. No Slurm here."""

import errno
import os
import signal
import sys
import threading
import time

import pytest

from lib import cluster, cluster_job, process
from lib.cells import expand
from lib.cluster import Cluster, arrays, options, request
from lib.cluster_job import Job, without_make
from lib.config import Study
from tests.harness import TINY, refusal

BASE = (*TINY, "CPU_THREADS=1")


@pytest.fixture
def cells(dotconfig):
    """cells("SEEDS=...", ...): the cells of a study."""
    def expanded(*assignments):
        dotconfig(*BASE, *assignments)
        return expand(Study())
    return expanded


def tool(folder, name, text):
    """A program of this name that prints `text`, first in PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho \"$0 $@\" >> {folder}/calls\ncat <<'END'\n{text}\nEND\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """squeue(text): what Slurm's tool prints."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return lambda text: tool(tmp_path / "bin", "squeue", text)


# Arrays

def test_cells_that_start_from_a_model_wait_for_its_cell_alone(cells):
    study = cells('ABLATION_STEPS="C1 V0 V19 C2"', 'SEEDS="2"')
    found = [(parent, [(c.step, c.seed) for c in group]) for _, parent, group in arrays(study, set())]
    parents = {c.seed: c.name for c in study if c.step == "V19"}
    assert found[0] == (None, [("V0", 1337), ("V19", 1337), ("V0", 1338), ("V19", 1338)])
    assert found[1:] == [(parents[1337], [("C1", 1337), ("C2", 1337)]), (parents[1338], [("C1", 1338), ("C2", 1338)])]


def test_a_parent_that_is_in_the_queue_is_waited_for_and_one_that_is_done_is_not(cells):
    study = [c for c in cells('ABLATION_STEPS="V19 C1"') if c.step == "C1"]
    assert [parent for _, parent, _ in arrays(study, {study[0].parent})] == [study[0].parent]
    assert [parent for _, parent, _ in arrays(study, set())] == [None]


def test_an_array_holds_cells_that_ask_for_the_same_and_no_more_than_slurm_takes(cells, monkeypatch):
    study = cells('ABLATION_STEPS="V0 V1@CPU_THREADS=2"', 'SEEDS="5"')
    monkeypatch.setattr(cluster, "LARGEST_ARRAY", 3)
    found = [(asked["cpus_per_task"], [c.seed for c in group]) for asked, _, group in arrays(study, set())]
    assert found == [(n, seeds) for n in (1, 2) for seeds in ([1337, 1338, 1339], [1340, 1341])]


# What a cell asks for

def asked(dotconfig, *assignments):
    dotconfig(*assignments)
    return request(Study().resolve("V0").config)


def test_the_time_limit_is_the_budget_the_time_to_stop_and_the_rest(dotconfig):
    of_time = asked(dotconfig, "GPT2_MAX_TIME=7200", "STOP_SECONDS=240", "CLUSTER_MINUTES=30")
    assert of_time["timeout_min"] == 120 + 5 + 30 and of_time["slurm_signal_delay_s"] == 300
    assert asked(dotconfig, *BASE, "STOP_SECONDS=240", "CLUSTER_MINUTES=30")["timeout_min"] == 35


def test_threads_and_gpus_are_asked_for_as_configured(dotconfig):
    cpu = asked(dotconfig, *BASE)
    assert cpu["cpus_per_task"] == 1 and not cpu.keys() & {"slurm_exclusive", "gpus_per_node", "slurm_gres"}
    several = asked(dotconfig, *BASE[:-1], "CPU_THREADS=3", "GPUS_PER_STEP=2")
    assert several["cpus_per_task"] == 6 and several["slurm_srun_args"] == ["--cpus-per-task=6"]
    given = asked(dotconfig, "DEVICE_CUDA=y", 'CLUSTER_OPTIONS="--cpus-per-task=8"')
    assert given["slurm_srun_args"] == ["--cpus-per-task=8"]
    some = asked(dotconfig, "DEVICE_CUDA=y", "GPUS_PER_STEP=2")
    assert some["gpus_per_node"] == 2 and "slurm_exclusive" not in some
    threads = asked(dotconfig, "DEVICE_CUDA=y", "CPU_THREADS=8")  # of each process; how many there will be, the node says
    assert threads["slurm_exclusive"] is True and not threads.keys() & {"cpus_per_task", "slurm_srun_args"}
    whole = asked(dotconfig, "DEVICE_CUDA=y")
    assert whole["slurm_exclusive"] is True and "gpus_per_node" not in whole and "cpus_per_task" not in whole
    named = asked(dotconfig, "DEVICE_CUDA=y", 'CLUSTER_GRES="gpu:h100:1"')
    assert named["slurm_gres"] == "gpu:h100:1" and "slurm_exclusive" not in named


def test_where_jobs_go_is_no_part_of_a_cell(cells):
    plain = cells()[0]
    placed = cells('CLUSTER_PARTITION="gpu"', 'CLUSTER_ACCOUNT="us"', 'CLUSTER_QOS="low"', 'CLUSTER_OPTIONS="--mem=1G"')[0]
    assert placed.resolved.identity == plain.resolved.identity
    found = request(placed.resolved.config)
    assert (found["slurm_partition"], found["slurm_account"], found["slurm_qos"]) == ("gpu", "us", "low")
    assert found["slurm_additional_parameters"] == {"mem": "1G"}


def test_options_are_long_ones_of_sbatch():
    assert options("--mem=64G --nice --constraint='a100|h100'") == {"mem": "64G", "nice": True, "constraint": "a100|h100"}
    for wrong in ("mem=64G", "-p x", "--", "--mem='1", "--mem=1G --comment=mine", "--dependency=singleton", "--requeue"):
        assert "CLUSTER_OPTIONS" in refusal(options, wrong)[0]


# The queue

def test_the_queue_names_cells_and_a_live_job_comes_first(tmp_path, squeue):
    one = Cluster(tmp_path / "out")
    one.folder.mkdir(parents=True)
    (one.folder / "aa.json").write_text('{"cells": [["c0", "i0"], ["c1", "i1"]]}')
    (one.folder / "bb.json").write_text('{"cells": [["c1", "i2"]]}')
    squeue("10|0|RUNNING|n1|None|aa\n10|1|PENDING|(null)|Dependency|aa\n9|N/A|FAILED|n2|NonZeroExitCode|bb\n"
           "13|N/A|COMPLETED|n2|None|bb\n14|7|RUNNING|n2|None|aa\n15|N/A|RUNNING|n2|None|cc\n"
           "16|N/A|RUNNING|n2|None|../x")
    found = one.queue()
    assert found.keys() == {"c0", "c1"}
    assert (found["c0"].job, found["c0"].state, found["c0"].node, found["c0"].reason) == ("10_0", "RUNNING", "n1", "")
    assert (found["c1"].job, found["c1"].identity, found["c1"].node) == ("10_1", "i1", "") and found["c1"].live
    squeue("9|N/A|FAILED|n2|NonZeroExitCode|bb\n13|N/A|CANCELLED|n2|None|bb")
    assert one.queue()["c1"].job == "13" and not one.queue()["c1"].live


def test_the_queue_is_asked_by_a_name_of_the_folder(tmp_path, squeue):
    squeue("")
    for folder in ("a", "b", "a"):
        assert Cluster(tmp_path / folder).queue() == {}
    calls = (tmp_path / "bin/calls").read_text().splitlines()
    assert len(calls) == 3 and len(set(calls)) == 2


def test_no_slurm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no Slurm" in refusal(Cluster(tmp_path).queue)[0]


def test_what_is_missing_to_submit_is_said_before_anything_is_left_behind(cells, tmp_path, monkeypatch):
    study = cells()
    for name in ("submitit", "submitit.core.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    one = Cluster(tmp_path / "out")
    said = refusal(lambda: list(one.submit(study, {study[0].name: []}, {}, 0)))
    assert "submitit" in said[0] and "pip install" in said[1] and not one.folder.exists()


@pytest.mark.parametrize("full", [0, 1])
def test_a_record_without_room_is_a_sentence_and_nothing_is_submitted_without_one(cells, tmp_path, monkeypatch, full):
    """Of the two times that it is written the first is before Slurm has the job."""
    pytest.importorskip("submitit")
    study, one, real, written = cells()[:1], Cluster(tmp_path / "out"), cluster.atomic.write_json, []
    for name in ("sbatch", "srun"):
        tool(tmp_path / "bin", name, "Submitted batch job 7")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def write(path, content):
        written.append(path)
        if len(written) > full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(cluster.atomic, "write_json", write)
    with one.alone():
        said = refusal(lambda: list(one.submit(study, {study[0].name: []}, {}, 0)))
    assert said[0] == f"{tmp_path}/out/slurm cannot be written: No space left on device." and "make slurm again" in said[1]
    assert (tmp_path / "bin/calls").exists() == (full == 1) == written[0].exists()


def test_who_submits_is_alone(tmp_path, monkeypatch):
    one, real = Cluster(tmp_path / "out"), process.lock
    monkeypatch.setattr(process, "lock", lambda path, timeout: real(path, timeout=0))
    with one.alone():
        assert "another make slurm" in refusal(Cluster(tmp_path / "out").alone().__enter__)[0]
    with one.alone():
        pass


# Jobs

def test_nothing_of_make_reaches_a_job():
    of_make = {"KABLATE_MAKE_PID": "1", "KABLATE_LAUNCHER_PID": "2", "MAKEFLAGS": "-j", "MAKELEVEL": "1", "RETRY": "1",
               "GPT2_MAX_TIME": "5", "KCONFIG_CONFIG": "x", "KABLATE_OUT": "y"}
    assert without_make(of_make | {"PATH": "p", "WANDB_MODE": "offline"}) == {"PATH": "p", "WANDB_MODE": "offline"}


PROGRAM = """
import os, pathlib, signal, sys, time
assert "KABLATE_MAKE_PID" not in os.environ
here = pathlib.Path(sys.argv[1])
if len(sys.argv) == 2:
    (here / "proof").write_text(os.environ.get("GIVEN", ""))
    sys.exit()
def stop(*_):
    (here / "saved").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(here / "ready").write_text("")
time.sleep(30)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(PROGRAM)
    monkeypatch.setattr(cluster_job, "ROOT", tmp_path)
    monkeypatch.setenv("KABLATE_MAKE_PID", "1")
    return lambda *words, **options: Job(["worker", str(tmp_path), *words], **options)


def test_a_job_has_failed_where_it_leaves_no_proof(program, tmp_path):
    program(variables={"GIVEN": "this"}, proof=str(tmp_path / "proof"))()
    assert (tmp_path / "proof").read_text() == "this"
    with pytest.raises(RuntimeError, match="left no"):
        program(proof=str(tmp_path / "other"))()


def once(path, action):
    """In a thread: `action` when the file is there."""
    def run():
        while not path.exists():
            time.sleep(0.01)
        action()
    threading.Thread(target=run, daemon=True).start()


def test_a_job_that_is_warned_stops_its_program_which_does_not_hear_the_warning(program, tmp_path, squeue):
    pytest.importorskip("submitit")
    squeue("COMPLETING")
    job, again = program("stays"), []

    def warned():
        os.kill(job.pid, signal.SIGUSR2)
        time.sleep(0.1)
        again.append(job.checkpoint())
    once(tmp_path / "ready", warned)
    with pytest.raises(RuntimeError, match="143"):
        job()
    assert (tmp_path / "saved").exists() and again[0].function.words == job.words


@pytest.mark.parametrize("state, queued_again", [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_that_is_asked_to_stop_is_queued_again_unless_slurm_ends_it(program, tmp_path, squeue, monkeypatch, state,
                                                                           queued_again):
    squeue(state)
    for name, value in (("JOB_ID", "10"), ("ARRAY_JOB_ID", "10"), ("ARRAY_TASK_ID", "5")):  # as of an array's last task
        monkeypatch.setenv(f"SLURM_{name}", value)
    heard, before = [], signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
    try:
        job = program("stays")
        once(tmp_path / "ready", lambda: os.kill(job.pid, signal.SIGTERM))
        with pytest.raises(RuntimeError, match="143"):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert bool(heard) == queued_again and "--jobs=10_5" in (tmp_path / "bin/calls").read_text()
