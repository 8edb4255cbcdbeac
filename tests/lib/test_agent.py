"""How ranks end, and what the agent makes of it: with ranks that do nothing else."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lib import agent, failures, process
from tests.harness import ROOT, refusal
from tests.lib.test_process import alive

# Each way to end, in one process that is the agent of one after the other, because to import torch takes seconds.
AGENT = """
import sys
from lib import agent
for ending in sys.argv[1:]:
    rank = [sys.executable, "-c", "import os, sys, time; rank = int(os.environ['RANK'])\\n" + ending]
    print("==", ending, agent.run(rank, 2), file=sys.stderr)
"""
ENDINGS = {  # what each rank does: the status that the agent must give
    "sys.exit(0)": 0,
    "sys.exit(75)": 75,
    "sys.exit(2 * rank or time.sleep(60))": 2,
    "rank and os._exit(74); time.sleep(60)": 74,
    """
try:
    if not rank: time.sleep(60)
    raise ValueError('of the second rank')
except ValueError as error:
    from lib import agent; agent.record(error); raise""": 1,
    """
import signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
from lib import agent
try:
    if not rank: time.sleep(60)
    raise KeyError('before the other has begun')
except KeyError as error:
    agent.record(error); raise""": 1,
}
SLEEPS = """
import os, sys, time
from lib import process
process.die_with_launcher()
process.show_life()
os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: ranks share the pipe
time.sleep(60)
"""


@pytest.fixture(scope="module")
def ended():
    """{ending: (status, what was said)}."""
    said = subprocess.run([sys.executable, "-c", AGENT, *ENDINGS], cwd=ROOT, capture_output=True, text=True, timeout=120).stderr
    found = {}
    for ending in ENDINGS:
        before, status, said = *said.partition(f"== {ending} ")[::2], ""
        status, _, said = status.partition("\n")
        found[ending] = int(status), before
    return found


@pytest.mark.parametrize("ending, status", ENDINGS.items())
def test_the_exit_status_of_ranks_is_the_agents(ended, ending, status):
    assert ended[ending][0] == status


def test_the_traceback_of_the_first_rank_stands_last_in_the_log(ended):
    status, said = ended[list(ENDINGS)[-2]]
    assert "rank 1 of 2 ended first, with exit status 1; the others cannot go on without it\nTraceback " in said
    assert failures.from_log(said, status) == "exception: ValueError: of the second rank (<string>, line 5)"


def test_a_rank_that_leaves_because_it_is_asked_to_has_not_ended_first(ended):
    """It had not begun to train, where a stop ends it at once with the status of an interruption."""
    status, said = ended[list(ENDINGS)[-1]]
    assert "rank 1 of 2 ended first" in said and "KeyError" in failures.from_log(said, status)


def begun(folder, **variables):
    """An agent with two ranks that sleep, and their processes; what it leaves behind when it is killed is left in `folder`."""
    code = f"import sys; from lib import agent; sys.exit(agent.run([sys.executable, '-c', {SLEEPS!r}], 2))"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               env=os.environ | variables | {"TMPDIR": str(folder)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[int(v) for v in variables.values()])
    return started, [int(started.stdout.readline()) for _ in range(2)]


def test_ranks_show_life_through_the_agents_pipe_and_die_with_it_at_once(tmp_path):
    life = process.Life()
    os.set_blocking(life.reader, True)
    started, processes = begun(tmp_path, **{process.LIFE_VARIABLE: str(life.handle)})
    assert os.read(life.reader, 100), "shown by processes that have not inherited the pipe"
    started.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.communicate()
    life.close()


def test_a_stop_that_ranks_have_no_answer_to_is_an_interruption(tmp_path):
    started, processes = begun(tmp_path)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == process.EXIT_INTERRUPTED and not any(map(alive, processes))
    started.communicate()


def failure(code, recorded=None, said=""):
    content = {"message": {"extraInfo": {"py_callstack": said}}} if said else {}
    return SimpleNamespace(exitcode=code, error_file=str(recorded or "nowhere"), error_file_data=content)


@pytest.mark.parametrize("codes, expected", [
    ((1, -9), 1), ((-15, -9), 1), ((-15, 1), 1), ((1, 2), 1), ((-11, 2), 1), ((75, 1), 1), ((74, -9), 0), ((1, 1), 0),
    ((75, -15), 0)])
def test_which_of_several_counts(codes, expected):
    assert agent.first(dict(enumerate(map(failure, codes))))[0] == expected


LOSS = "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer"


@pytest.mark.parametrize("failures, expected", [
    ([failure(1, said=LOSS), failure(-9)], 1),  # the other was out of memory
    ([failure(-9), failure(1, said="ValueError: its own")], 1),  # the other hung until it was killed
    ([failure(-6), failure(1, said="ValueError: its own")], 1),  # NCCL's watchdog
    ([failure(1, said=LOSS), failure(1, said="ValueError: its own")], 1),
    ([failure(1, said=LOSS), failure(1)], 1),
])
def test_who_has_lost_another_or_was_killed_late_is_not_the_first(failures, expected):
    assert agent.first(dict(enumerate(failures)))[0] == expected


def test_of_two_that_raised_the_one_that_recorded_it_first_counts(tmp_path):
    for number, name in enumerate(("later", "sooner")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(0, 10 - number))
    assert agent.first({0: failure(1, tmp_path / "later"), 1: failure(1, tmp_path / "sooner"), 2: failure(1)})[0] == 1


# How many

def cell(**symbols):
    return SimpleNamespace(**{"DEVICE": "cpu", "GPUS_PER_STEP": 0, "BATCH_SIZE": 8, "GPT2_GRADIENT_ACCUMULATION": 1,
                              "EVALUATE_ONLY": False, "KVSPLICE": False, "INIT_FROM_STEP": ""} | symbols)


def test_all_gpus_of_the_box_are_the_default_and_a_cpu_has_one_process(monkeypatch):
    import torch

    assert agent.wanted(cell()) == 1 and agent.wanted(cell(GPUS_PER_STEP=4)) == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert agent.wanted(cell()) == 1 and agent.wanted(cell(DEVICE="auto")) == 4
    assert agent.wanted(cell(DEVICE="cuda", GPUS_PER_STEP=2)) == 2
    assert agent.wanted(cell(DEVICE="auto", EVALUATE_ONLY=True)) == 1
    assert refusal(agent.wanted, cell(DEVICE="auto", GPUS_PER_STEP=8)) == (
        "CONFIG_GPUS_PER_STEP is 8, but this cell sees 4 of the GPUs.",
        "set CONFIG_GPUS_PER_STEP=4 in make menuconfig, or 0 for all that it sees.")
    assert "which 4 processes cannot share" in refusal(agent.wanted, cell(DEVICE="auto", BATCH_SIZE=6))[0]
    monkeypatch.setenv("RANK", "0")
    assert agent.wanted(cell(DEVICE="auto")) == 1, "a rank starts no ranks"


def test_hosts_are_torchruns(monkeypatch):
    assert agent.hosts() == 1
    monkeypatch.setenv("PET_NNODES", "2")
    assert "PET_RDZV_ENDPOINT does not say where they meet" in refusal(agent.hosts)[0]
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "one:29500")
    assert agent.hosts() == 2
    assert "which 6 processes cannot share" in refusal(agent.wanted, cell(GPUS_PER_STEP=3))[0], "of both hosts"
    monkeypatch.setenv("PET_NNODES", "1:4")
    assert refusal(agent.hosts)[0] == "PET_NNODES=1:4 is no number of hosts."
