"""Two ranks train what one process trains at the same global batch: real models, gloo, a few steps each.

Run as `python -m tests.gpt2.test_data_parallel FOLDER`, this file is one of the ranks: they go through all cases in one start,
because a start takes longer than ten of them.
"""

import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2.model import GPT
from lib import loop, optimizers, process, ranks, results, runtime, tracking
from lib.cells import expand
from lib.config import Study
from lib.data import open_corpus
from lib.errors import UserError
from lib.kconfig import Assignment, Schema
from tests.harness import ROOT, Never, StopAfter, prepare
from tests.lib.test_process import alive

SMALL = {"GPT2_BLOCK_SIZE": 16, "BATCH_SIZE": 1, "GPT2_GRADIENT_ACCUMULATION": 4, "GPT2_EVAL_SAMPLES": 3, "GPT2_MAX_ITERS": 2,
         "GPT2_EVAL_INTERVAL": 1, "GPT2_LOG_INTERVAL": 1, "GPT2_DROPOUT": "0.0", "GPT2_BIAS": "n", "CPU_THREADS": 1}
STEPS = sorted(path.stem for path in (ROOT / "gpt2/steps").glob("V*.config"))
CHANGING = {  # whose program changes after some steps: paths go off, a direction is decided, a router opens
    "M2": {"GPT2_MAX_ITERS": 5, "SKIP_START": "-1.0", "SKIP_AFTER": "0.0", "SKIP_CHECK": "0.1"},
    "RALEARN0": {"GPT2_MAX_ITERS": 4, "DIRECTION_SHARE": "0.5", "DIRECTION_MIN_STEPS": 2},
    "RT1": {"GPT2_MAX_ITERS": 4, "ROUTER_DROP": "0.0001", "BATCH_SIZE": 4, "GPT2_GRADIENT_ACCUMULATION": 1},
}
CASES = {step: (step, {}) for step in STEPS} | {step: (step, symbols) for step, symbols in CHANGING.items()} | {
    "cut": ("V0", {"BATCH_SIZE": 4, "GPT2_GRADIENT_ACCUMULATION": 1}),  # a rank computes half a micro-batch at once
    "one batch": ("V0", {"GPT2_EVAL_SAMPLES": 1}),  # the second rank has nothing to evaluate
}
COMPILED = {"compiled": ("M2", CHANGING["M2"] | {  # several MiB of parameters
    "GPT2_COMPILE": "y", "MODEL_CUSTOM": "y", "GPT2_N_LAYER": 2, "GPT2_N_HEAD": 2, "GPT2_N_EMBD": 256})}


@functools.cache
def schema():
    return Schema()


def configuration(step, symbols):
    overrides = [Assignment(name, str(value), "overrides") for name, value in (SMALL | symbols).items()]
    return Study("gpt2-ra-ablation+tiny", overrides=overrides, schema=schema()).resolve(step).config


@functools.cache
def the_corpus():
    return open_corpus(configuration("V0", {}))


def train(case: str, folder: Path, group=ranks.ALONE, stop=Never):
    """Train a case in `folder`; returns (model, optimizer, progress)."""
    cfg = configuration(*(CASES | COMPILED)[case])
    folder.mkdir(exist_ok=True)
    progress, model = loop.Progress(), GPT(cfg)
    optimizer = optimizers.build(model, cfg)
    clock = loop.Clock(progress, runtime.setup(cfg), time.perf_counter())
    loop.train(cfg, model, optimizer, the_corpus(), folder, {"hash": "x", "set": {}, "default": {}},
               lambda keep: tracking.MetricsLog(folder, keep) if group.first else tracking.NoLog(), clock, progress, stop,
               group=group)
    return model, optimizer, progress


def programs(folder: Path, group=ranks.ALONE) -> int:
    """Programs of a compiled cell whose paths go off on the way, which is trained in `folder`."""
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "BUCKET_MIB", 1)
        patch.setattr(loop, "compile_model", lambda cfg, model: model.compile(backend=backend, dynamic=False))
        model, *_ = train("compiled", folder, group)
    if group.first:
        torch.save(model.state_dict(), folder / "weights.pt")
    return len(made)


def digest(model, optimizer) -> str:
    """Of every number that a checkpoint holds."""
    found = hashlib.sha256()
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in [*model.state_dict().values(), *moments]:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def rank(folder: Path) -> None:
    """What a rank does here: train all cases, and leave what came of each."""
    process.die_with_launcher()
    torch.set_num_threads(1)
    group = ranks.Group(torch.device("cpu"))
    digests = {}
    for case in CASES:
        model, optimizer, _ = train(case, folder / case, group)
        digests[case] = digest(model, optimizer)
        if group.first:
            torch.save(model.state_dict(), folder / case / "weights.pt")
    stop = StopAfter(1) if not group.first else Never  # the first rank is not asked
    try:
        train("V0", folder / "resumed", group, stop)
        digests["stopped"] = "not at all"
    except loop.Interrupted:
        digests["stopped"] = "both"
    digests["written"] = sorted(path.name for path in (folder / "resumed").iterdir())
    model, optimizer, progress = train("V0", folder / "resumed", group)
    digests |= {"resumed": digest(model, optimizer), "resumptions": progress.resumed}
    if group.first:
        (folder / "resumed/checkpoint.pt").rename(folder / "resumed/checkpoint.before.pt")
        (folder / "resumed/checkpoint.pt").write_text("damaged")
    group.wait()
    model, optimizer, progress = train("V0", folder / "resumed", group)
    digests |= {"mended": digest(model, optimizer), "files": sorted(path.name for path in (folder / "resumed").glob("*.pt"))}
    digests["programs"] = programs(folder / "compiled", group)
    (folder / f"rank{group.rank}.json").write_text(json.dumps(digests))
    group.leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two ranks have trained all cases, and what each of them found."""
    from torch.distributed import TCPStore

    folder = tmp_path_factory.mktemp("two")
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # where they meet, as they would in an agent's
    environ = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                            "TORCHELASTIC_USE_AGENT_STORE": "True", process.LAUNCHER_VARIABLE: str(os.getpid())}
    command = [sys.executable, "-m", "tests.gpt2.test_data_parallel", str(folder)]
    both = [subprocess.Popen(command, cwd=ROOT, env=environ | {"RANK": number}, stderr=subprocess.PIPE, text=True)
            for number in "01"]
    try:
        said = [one.communicate(timeout=240)[1] for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return folder, *(json.loads((folder / f"rank{number}.json").read_text()) for number in (0, 1))


def numbers(folder: Path) -> list[dict]:
    """The rows of a log, less what depends on the clock."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items()
             if not any(word in key for word in ("second", "time", "memory"))} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_trains(two, tmp_path, case):
    folder, *_ = two
    model, *_ = train(case, tmp_path / "one")
    ours, theirs = numbers(tmp_path / "one"), numbers(folder / case)
    assert len(ours) == len(theirs) >= 4
    for one, other in zip(ours, theirs, strict=True):
        said = {key: value for key, value in one.items() if isinstance(value, str)}
        assert said == {key: value for key, value in other.items() if isinstance(value, str)} and one.keys() == other.keys()
        measured = one.keys() - said.keys()
        assert {key: other[key] for key in measured} == pytest.approx({key: one[key] for key in measured}, rel=2e-5, abs=2e-5)
    weights = torch.load(folder / case / "weights.pt")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_program_has_changed_where_it_is_meant_to(two):
    folder, *_ = two
    off = [torch.load(folder / case / "weights.pt") for case in CHANGING]
    assert any(tensor.any() for name, tensor in off[0].items() if name.endswith(".off"))
    assert all(tensor >= 0 for name, tensor in off[1].items() if name.endswith(".decided"))
    assert any(tensor == 1 for name, tensor in off[2].items() if name.endswith(".routing"))


def test_ranks_hold_the_same_numbers_to_the_bit(two):
    _, first, second = two
    assert first == second and len(set(first[case] for case in STEPS)) > 1


def test_a_stop_of_one_rank_stops_both_and_they_resume_to_the_bit(two):
    _, first, _ = two
    assert first["stopped"] == "both" and first["resumptions"] == 1 and first["resumed"] == first["V0"]
    assert first["written"] == ["checkpoint.pt", "metrics.jsonl"]


def test_a_damaged_checkpoint_is_moved_aside_once_and_both_go_on_from_the_one_before(two):
    _, first, _ = two
    assert first["mended"] == first["V0"] and first["files"] == ["checkpoint.damaged.pt", "checkpoint.pt"]


def test_a_compiled_model_has_the_programs_and_the_numbers_of_one_process(two, tmp_path):
    """Also when it is compiled anew because paths went off. torch by itself cuts a program where a bucket is full."""
    folder, first, _ = two
    assert programs(tmp_path / "one") == first["programs"]
    for name, tensor in torch.load(tmp_path / "one/weights.pt").items():
        torch.testing.assert_close(torch.load(folder / "compiled/weights.pt")[name], tensor, rtol=1e-4, atol=2e-5)


def test_ranks_that_find_different_checkpoints_refuse(tmp_path):
    """As on a file system that shows one host what another does not see yet."""
    group = SimpleNamespace(first=True, rank=0, wait=lambda: None, largest=lambda number: max(number, 7))
    with pytest.raises(UserError, match="rank 0 finds a checkpoint of iteration 0 .*, another one of 7"):
        loop.resume(tmp_path, {}, {}, None, None, loop.Progress(), torch.device("cpu"), group)


# The command itself

def test_two_hosts_train_one_cell(tmp_path):
    """Two agents that meet, each with a rank, as torchrun's variables tell; here both are on this host."""
    symbols = SMALL | {"GPT2_MAX_ITERS": 3, "GPUS_PER_STEP": 1, "DEVICE_CPU": "y", "GPT2_COMPILE": "n"}
    overrides = [Assignment(name, str(value), "overrides") for name, value in symbols.items()]
    cell = expand(Study("gpt2-ra-ablation+tiny", overrides=overrides, schema=schema()), [1])[0]
    prepare(tmp_path, cell)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [subprocess.Popen([sys.executable, "gpt2/train_ra_mla.py", "--cell", str(tmp_path)], cwd=ROOT, text=True,
                             env=os.environ | {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"localhost:{port}"},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        said = [one.communicate(timeout=90)[0] for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], said
    found = results.read(tmp_path)
    assert (found["state"], found["iterations"], found["environment"]["world_size"]) == ("done", 3, 2)


QUICK = ["GPUS_PER_STEP=2", "DEVICE_CPU=y", "GPT2_MAX_ITERS=100000", "GPT2_LOG_INTERVAL=1", "GPT2_COMPILE=n",
         *(f"{name}={SMALL[name]}" for name in ("GPT2_BLOCK_SIZE", "GPT2_EVAL_SAMPLES", "CPU_THREADS"))]


def begun(folder: Path, settings=QUICK):
    """A cell that has done some steps since it was started, and its ranks' processes."""
    log, before = folder / "metrics.jsonl", len(rows_of(folder))
    cell = subprocess.Popen([sys.executable, "gpt2/train_ra_mla.py", "--ra-mla-ablation-step", "V0", "--defconfig",
                             "gpt2-ra-ablation+tiny", "--out", str(folder), *(f"--set={one}" for one in settings)],
                            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while len(rows_of(folder)) < before + 3:
        assert cell.poll() is None and time.monotonic() < deadline, cell.stderr.read() if cell.poll() is not None else log
        time.sleep(0.05)
    return cell, ranks_of(folder)


def rows_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []


def ranks_of(folder: Path) -> dict[int, int]:
    """{rank: process} of the cell in a folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                variables = dict(one.split(b"=", 1) for one in (entry / "environ").read_bytes().split(b"\0") if b"=" in one)
                found |= {int(variables[b"RANK"]): int(entry.name)} if b"RANK" in variables else {}
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_a_cell_of_two_ranks_is_stopped_and_killed_as_one_of_a_single_process(tmp_path):
    cell, processes = begun(tmp_path / "cell")
    assert sorted(processes) == [0, 1]
    cell.send_signal(signal.SIGTERM)
    _, said = cell.communicate(timeout=60)
    assert cell.returncode == process.EXIT_INTERRUPTED, said
    assert (tmp_path / "cell/checkpoint.pt").exists() and not any(map(alive, processes.values()))
    before = len(rows_of(tmp_path / "cell"))

    cell, processes = begun(tmp_path / "cell")
    assert json.loads(rows_of(tmp_path / "cell")[before])["iteration"] == before + 1, "it was resumed"
    os.kill(processes[1], signal.SIGKILL)
    _, said = cell.communicate(timeout=60)
    assert cell.returncode == -signal.SIGKILL and not any(map(alive, processes.values()))
    assert said.splitlines()[-1] == "rank 1 of 2 ended first, killed by signal 9; the others cannot go on without it"
    assert (tmp_path / "cell/checkpoint.pt").exists()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
