"""Cells that break, end to end: what their folder holds afterwards."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from gpt2.model import GPT
from gpt2.train_ra_mla import run_cell
from lib import checkpoint, generations, loop, process, results
from lib.cells import Cell
from lib.config import Study
from lib.errors import UserError
from lib.kconfig import Assignment
from lib.launch import prepare
from tests.harness import ROOT, wait_for
from tests.lib.test_launch import stored

SHORT = {"GPT2_MAX_ITERS": "8", "GPT2_BLOCK_SIZE": "32", "BATCH_SIZE": "2", "GPT2_EVAL_SAMPLES": "2", "GPT2_LOG_INTERVAL": "4"}
INJECTED = """import runpy, sys, time
sys.path.insert(0, {root!r})
import torch
from gpt2.model import GPT
forward, calls = GPT.forward, []

def at_its_third_call(self, *args, **kwargs):
    calls.append(None)
    if len(calls) == 3:
        {fault}
    return forward(self, *args, **kwargs)

GPT.forward = at_its_third_call
sys.argv = [{trainer!r}, *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def trainer(tmp_path, fault: str) -> str:
    """The path of the trainer with a fault injected."""
    text = INJECTED.format(root=str(ROOT), trainer=str(ROOT / "gpt2/train_ra_mla.py"), fault=fault)
    (tmp_path / "trainer.py").write_text(text)
    return str(tmp_path / "trainer.py")


def resolved(**symbols):
    overrides = [Assignment(name, value, "test") for name, value in (SHORT | symbols).items()]
    return Study("gpt2-ra-ablation+tiny", overrides=overrides).resolve("V0")


def test_a_cell_that_runs_out_of_memory_says_so_with_its_peak_and_batch(tmp_path):
    """Under the launcher, as make runs it; the batch is what was configured, before and after."""
    one = resolved()
    full = 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")'
    plan = stored(tmp_path, json.dumps({
        "step": "V0", "optimizer": "adamwspam", "study": "s", "trainer": trainer(tmp_path, full), "config": one.text,
        "identity": one.identity, "symbols": {}, "limits": {"CELL_TIMEOUT": 300, "STOP_SECONDS": 60}}))
    done = subprocess.run([sys.executable, "-m", "scripts.cell", str(tmp_path / "cell"), "--plan", str(plan),
                           "--seed", "7"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    record = results.read(tmp_path / "cell")
    assert done.returncode == 0 and "V0 seed 7: failed: out of memory: " in done.stdout, done.stdout + done.stderr
    assert record["state"] == "failed" and record["reason"].startswith(
        "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. (peak ")
    assert record["reason"].endswith(f" GiB at 2 sequences at once, {one.config.GPT2_GRADIENT_ACCUMULATION} times a step)")
    assert record["peak_memory_bytes"] > 2 ** 25
    assert (record["configuration"]["BATCH_SIZE"], one.config.BATCH_SIZE) == (2, 2)
    assert "CONFIG_BATCH_SIZE=2\n" in (tmp_path / "cell/.config").read_text()
    assert "Traceback" in (tmp_path / "cell/training.log").read_text()


def test_a_cell_that_hangs_says_where_when_its_launcher_asks(tmp_path):
    """And goes on: the signal alone ends nothing."""
    log, hangs = tmp_path / "training.log", f"open({str(tmp_path / 'hangs')!r}, 'w'); time.sleep(60)"
    prepare(tmp_path / "cell", Cell("V0", "adamwspam", 7, "cell", resolved(GPT2_COMPILE="n")))
    with open(log, "w") as file:
        child = subprocess.Popen([sys.executable, trainer(tmp_path, hangs), "--cell", str(tmp_path / "cell")], stdout=file,
                                 stderr=file, env=os.environ | {process.LAUNCHER_VARIABLE: str(os.getpid())})
    try:
        wait_for(lambda: (tmp_path / "hangs").exists(), 100)
        child.send_signal(process.STACKS_SIGNAL)
        wait_for(lambda: " in <module>\n" in log.read_text())
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    said = log.read_text()
    assert "in at_its_third_call\n" in said and 'loop.py", line' in said and "in run_cell\n" in said


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """cell(step): trains V0 in this process with a weight, or with `loss` the loss, that turns to NaN in training step `step`;
    returns its folder and its record."""
    monkeypatch.setattr(loop.signal, "signal", lambda *_: None)

    def train(step, what="weight", **symbols):
        forward, calls = GPT.forward, []

        def poisoned(self, *args, **kwargs):
            calls.extend([None] * self.training)
            if len(calls) == step and what == "weight":
                with torch.no_grad():
                    self.transformer.ln_f.weight[1] = math.nan
            logits, loss = forward(self, *args, **kwargs)
            return logits, loss * math.nan if len(calls) == step and what == "loss" else loss

        monkeypatch.setattr(GPT, "forward", poisoned)
        one = resolved(GPT2_GRADIENT_ACCUMULATION="1", GPT2_COMPILE="n", **symbols)
        folder = tmp_path / "cell"
        prepare(folder, Cell("V0", "adamwspam", 7, "cell", one))
        assert run_cell(folder) == 0
        return folder, results.read(folder)
    return train


def test_a_diverged_cell_keeps_the_weights_of_its_last_finite_step(cell):
    folder, record = cell(3, "loss")
    assert record["state"] == "diverged" and record["iterations"] == 2 and record["val_loss"] is None
    assert record["reason"].startswith("the training loss is nan at iteration 3 (the last finite step, 2, had loss ")
    assert all(torch.isfinite(t).all() for t in checkpoint.load(folder / "model.pt")["model"].values())


def test_a_broken_weight_is_not_kept_and_without_a_checkpoint_there_is_no_model(cell):
    folder, record = cell(3)
    assert record["state"] == "diverged" and record["reason"].endswith(
        "; transformer.ln_f.weight is not finite, and no checkpoint is there, so there is no model.pt")
    assert not (folder / "model.pt").exists()


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "memory does not hold the checkpoint"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory does not hold the checkpoint"),
    (UserError("the disk.", "mend it."), "no checkpoint can be read")])
def test_that_it_diverged_stays_the_result_where_its_checkpoint_cannot_be_brought_back(cell, monkeypatch, error, said):
    """A retry would train to the same divergence again."""
    real, loads = generations.load, []

    def load(*arguments):
        loads.append(arguments)
        if len(loads) > 1:  # the first asks whether to resume
            raise error
        return real(*arguments)

    monkeypatch.setattr(generations, "load", load)
    folder, record = cell(3)
    assert record["state"] == "diverged" and record["reason"].endswith(f" is not finite, and {said}, so there is no model.pt")
    assert not (folder / "model.pt").exists()


def test_a_broken_weight_is_not_kept_and_the_last_checkpoint_stands_in_for_it(cell, monkeypatch):
    later = iter(range(0, 10 ** 6, 10))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(later))  # a checkpoint after every step
    folder, record = cell(7, CHECKPOINT_INTERVAL="1", GPT2_LOG_INTERVAL="1")
    assert record["reason"].endswith("; transformer.ln_f.weight is not finite, so model.pt is the checkpoint of iteration 6")
    assert all(torch.isfinite(t).all() for t in checkpoint.load(folder / "model.pt")["model"].values())
    assert not list(folder.glob("checkpoint*"))
