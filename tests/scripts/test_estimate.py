"""make estimate: from finished cells, from a probe, and what it says when it cannot."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from lib.cells import expand
from lib.config import Study, load
from lib.estimate import Speed
from scripts import estimate
from tests.harness import TINY, finish, refusal, run_here

SMALL = {"GPT2_BLOCK_SIZE": 16, "BATCH_SIZE": 2, "GPT2_EVAL_SAMPLES": 40, "GPT2_MAX_ITERS": 100, "GPT2_EVAL_INTERVAL": 10}


@pytest.fixture
def study(dotconfig, tmp_path):
    def configure(*assignments, steps="V0 V1 V2", seeds=3, budget="GPT2_MAX_ITERS=250"):
        dotconfig(*TINY[:2], budget, "GPT2_GRADIENT_ACCUMULATION=1", 'STUDY="demo"', f'ABLATION_STEPS="{steps}"',
                  f'SEEDS="{seeds}"', "JOBS=1", f'OUTPUT_DIR="{tmp_path}/out"', *assignments)
        return expand(Study())
    return configure


def said(*words):
    done = run_here("-m", "scripts.estimate", *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


def columns(line):
    return [word.strip() for word in line.strip("| ").split("|")]


HOUR = {"tokens_per_second": 100.0, "compile_seconds": 1000.0, "eval_seconds": 30.0, "checkpoint_seconds": 0.0,
        "calibration_seconds": 0.0, "other_seconds": 10.0}  # of a cell of 256,000 tokens


def test_a_study_from_its_finished_cells(study, tmp_path):
    cells = study()
    for number, cell in enumerate(cells[:6]):
        loss = 3 + number * number / 100
        finish(tmp_path / "out", cell, prepared=False, **HOUR, val_loss=loss, train_loss=loss)
    lines = said()
    assert lines[0] == "demo: 9 cells, 6 of them finished; speeds are those of 6 finished cells on a CPU"
    assert columns(lines[3]) == ["V0 adamwspam", "100", "17 min 20 s", "1 h 00 min", "256.0 k", "2 cells"]
    rows = [columns(line) for line in lines[8:]]
    assert rows[0] == ["1", "one after the other", "9.00", "9.00", "2.3 M", "3.00"]
    assert rows[1] == ["4", "side by side, 4 cells at once", "3.00", "9.00", "2.3 M", "1.00"]
    together = 9 * (1040 + 2560 / 3.6) / 3600
    assert rows[2] == ["4", "together, assumed at 90 % of linear speed", f"{together:.2f}", f"{4 * together:.2f}", "2.3 M",
                       f"{together / 3:.2f}"]
    assert [row[0] for row in rows[:5]] == ["1", "4", "4", "8", "8"]
    assert lines[-1].startswith("Seeds for the margin of 0.01 nats: about ") and "for V2 differs" in lines[-1]
    assert "over 2 seeds" in lines[-1] and "side by side" in lines[-1]


def test_steps_gpus_and_the_efficiency_can_be_given(study, tmp_path):
    finish(tmp_path / "out", *study(), prepared=False, **HOUR)
    lines = said("V1", "--gpus", "2", "--efficiency", "0.5")
    assert lines[0].startswith("demo: 3 cells, 3 of them finished")
    assert [columns(line)[:3] for line in lines[6:8]] == [
        ["2", "side by side, 2 cells at once", "2.00"], ["2", "together, assumed at 50 % of linear speed", "3.00"]]


def test_a_budget_of_seconds_takes_its_seconds(study, tmp_path):
    finish(tmp_path / "out", study(seeds=1, budget="GPT2_MAX_TIME=2560")[0], prepared=False, **HOUR)
    lines = said()
    assert columns(lines[8])[2:5] == ["3.00", "3.00", "768.0 k"]
    assert columns(lines[10])[2:5] == ["3.00", "12.00", "2.8 M"], "four GPUs train more in the same time"
    assert lines[-1].startswith("Seeds for the margin of 0.01 nats: not known before two seeds of the baseline")


def test_on_a_cpu_nothing_runs_on_several_together(study, tmp_path):
    finish(tmp_path / "out", *study("DEVICE_CPU=y", "CPU_THREADS=1"), prepared=False, **HOUR, shared_device=False)
    text = "\n".join(said())
    assert "together" not in text and "| machines |" in text and "GPU" not in text


def test_cells_that_share_a_device_are_counted_so(study, tmp_path):
    cells = study("CELLS_PER_GPU=3")
    finish(tmp_path / "out", *cells, prepared=False, **HOUR, shared_device=True)
    assert columns(said()[8])[1:4] == ["side by side, 3 cells at once", "3.00", "3.00"]
    finish(tmp_path / "out", *cells, prepared=False, **HOUR, shared_device=False)
    lines = said()
    assert columns(lines[8])[1:3] == ["one after the other", "9.00"]
    assert "3 cells may share a GPU here, which none of those measured did: that is not counted." in lines


# The probe

def test_without_a_finished_cell_the_baseline_is_probed_or_each(study, monkeypatch, capsys):
    study('BASELINE="V1"', steps="V0 V1 V19 C2", seeds=1)
    probes = []
    monkeypatch.setattr(estimate, "probed", lambda cell: probes.append(cell.step) or (Speed(100.0, 1040.0, False, 1), "a GPU"))
    plan = estimate.Plan(estimate.options_from_environment())
    args = SimpleNamespace(gpus=[1], efficiency=0.9, each=False)
    lines = estimate.described(plan, args).splitlines()
    assert probes == ["V1"] and "there is no finished cell yet: speeds are those of a probe of V1 on a GPU" in lines[0]
    assert columns(lines[3])[-1] == "the others" and columns(lines[6])[1] == "-", "C2 trains nothing"
    probes.clear()
    args.each = True
    assert "of a probe of every step on a GPU" in estimate.described(plan, args) and probes == ["V0", "V1", "V19"]


def test_a_probe_is_a_cell_in_small(tmp_path):
    cfg = load("gpt2-ra-ablation+tiny", "V0", SMALL | {"DATA_LOCAL_DIR": "/nowhere"})
    found = estimate.probe(cfg, tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found["steps"] == estimate.STEPS and rows[-1]["tokens"] == estimate.STEPS * 2 * 16
    assert found["tokens_per_second"] == pytest.approx(rows[-1]["tokens"] / rows[-1]["train_seconds"])
    assert found["outside"] > 0


def test_a_probe_counts_every_evaluation_of_the_cell(tmp_path, monkeypatch):
    """40 batches each, after every 10 of 100 iterations and at the end; 5 batches were measured."""
    def rehearsed(cfg, where, folder, progress, stop, begun):
        progress.iteration, progress.clocks = 20, {"train": 2.0, "compile": 3.0, "other": 4.0, "eval": 5.0}
        assert (cfg.GPT2_MAX_ITERS, cfg.GPT2_MAX_TIME, cfg.GPT2_EVAL_SAMPLES) == (20, 0, 5)
    monkeypatch.setattr("scripts.batch_size.rehearse", rehearsed)
    cfg = load("gpt2-ra-ablation+tiny", "V0", SMALL)
    found = estimate.probe(cfg, tmp_path)
    assert (found["tokens_per_second"], found["steps"], found["outside"]) == (20 * 32 / 2.0, 20, 7 + 10 * 40)
    timed = load("gpt2-ra-ablation+tiny", "V0", SMALL | {"GPT2_MAX_ITERS": 0, "GPT2_MAX_TIME": 10})
    assert estimate.probe(timed, tmp_path)["outside"] == 7 + 10 * 40, "100 iterations in 10 s"


def test_a_probe_ends_in_time(monkeypatch):
    stop, now = estimate.StopsInTime(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stop.training = True
    assert not stop.asked and not stop.asked
    now[0] = estimate.LONGEST_PROBE + 1
    assert stop.asked and stop.training


def test_a_probe_that_fails_says_why_and_what_to_do(study, monkeypatch, tmp_path):
    cell = study()[0]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=1, stdout="", stderr="Traceback\nRuntimeError: a shape is wrong\n"))
    monkeypatch.setattr("lib.slots.gpus", list)
    assert refusal(estimate.probed, cell) == (
        "the probe of V0 failed with exit status 1: RuntimeError: a shape is wrong.",
        "make check, which finds what is wrong with a step.")


# Bad input

@pytest.mark.parametrize("words, what, todo", [
    (["--efficiency", "1.5"], "--efficiency 1.5 is no share of linear speed.", "give one above 0 and up to 1."),
    (["--efficiency", "nan"], "--efficiency nan is no share of linear speed.", "give one above 0 and up to 1."),
    (["--gpus", "4", "0"], "--gpus 0 is no number of GPUs.", "give numbers from 1 up, e.g. --gpus 1 4 8."),
    (["V9"], "step V9 is not in study demo (V0 V1 V2).", "add it to ABLATION_STEPS in make menuconfig.")])
def test_bad_input_ends_in_two_sentences(study, words, what, todo):
    study()
    done = run_here("-m", "scripts.estimate", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {what}\n  try: {todo}\n")


def test_help_says_what_is_assumed():
    done = run_here("-m", "scripts.estimate", "--help")
    assert done.returncode == 0 and "--efficiency" in done.stdout and "assumed" in done.stdout
