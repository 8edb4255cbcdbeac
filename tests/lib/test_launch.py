"""The launcher with stand-ins for the training process: exit codes, reasons, states, display."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import results
from lib.launch import Display, failure_reason
from tests.harness import ROOT

IDENTITY = {"hash": "0", "set": {}, "default": {}}


def plan(tmp_path: Path, program: str) -> list[str]:
    """A plan whose trainer is `program`; returns the command line of the launcher."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(f"import os, signal, sys, time\nfolder = sys.argv[2]\n{program}\n")
    content = {"step": "V1", "optimizer": "adamw", "study": "s", "trainer": str(trainer), "config": "CONFIG_SEED=1\n",
               "identity": IDENTITY, "symbols": {}}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    return [sys.executable, "-m", "scripts.cell", str(tmp_path / "cell"), "--plan", str(tmp_path / "plan.json"), "--seed", "7"]


def launch(tmp_path, program):
    return subprocess.run(plan(tmp_path, program), cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("program, reason", [
    ("raise RuntimeError('boom')", "exit status 1: RuntimeError: boom"),
    ("print('error: no data.'); print('  try: make data'); sys.exit(2)", "no data."),
    ("sys.exit(3)", "exit status 3: it printed nothing"),
    ("print('hm', flush=True); os.abort()", "killed by signal 6: hm"),
])
def test_a_cell_that_breaks_is_recorded_with_its_reason(tmp_path, program, reason):
    done = launch(tmp_path, program)
    record = results.read(tmp_path / "cell")
    assert (done.returncode, record["state"], record["reason"], record["seed"]) == (0, "failed", reason, 7)
    assert f"V1 seed 7: failed: {reason}" in done.stdout


@pytest.mark.parametrize("program, says", [
    ("os.kill(os.getpid(), signal.SIGKILL)", "interrupted by signal 9 after"),
    ("sys.exit(75)", "interrupted after"),
])
def test_a_cell_that_was_stopped_has_no_record(tmp_path, program, says):
    done = launch(tmp_path, program)
    assert done.returncode == 0 and says in done.stdout and results.read(tmp_path / "cell") is None


def test_the_reason_is_not_that_of_an_earlier_attempt(tmp_path):
    launch(tmp_path, "print('error: no data.'); sys.exit(2)")
    launch(tmp_path, "raise MemoryError('full')")
    assert results.read(tmp_path / "cell")["reason"] == "exit status 1: MemoryError: full"
    (tmp_path / "training.log").write_text("error: old\nnew\n")
    assert failure_reason(tmp_path, 1, len("error: old\n")) == "exit status 1: new"


def test_a_finished_cell_is_left_alone(tmp_path):
    launch(tmp_path, "print('x')")
    provenance = {"study": "s", "step": "V1", "optimizer": "adamw", "seed": 7, "identity": IDENTITY}
    results.write(tmp_path / "cell", provenance, "done", val_loss=1.0)
    before = (tmp_path / "cell/metrics.json").read_bytes()
    done = launch(tmp_path, "raise RuntimeError")
    assert done.returncode == 0 and "another make has finished it meanwhile" in done.stdout
    assert (tmp_path / "cell/metrics.json").read_bytes() == before


def test_two_launchers_never_run_one_cell_twice(tmp_path):
    command = plan(tmp_path, "open(folder + '/ran', 'a').write('x'); time.sleep(4); sys.exit(3)")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cell/ran").exists():
        time.sleep(0.05)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    first.wait()
    assert "another make is running it" in second.stdout and (tmp_path / "cell/ran").read_text() == "x"


@pytest.mark.parametrize("pause, ended_by", [(0.1, "grace"), (2.5, "kill")])
def test_one_stop_that_arrives_twice_is_one_and_a_later_one_kills(tmp_path, pause, ended_by):
    """A cell that takes 4 s to save after SIGTERM; helpers of its group are not signalled before it is done."""
    program = ("import subprocess\nhelper = subprocess.Popen(['sleep', '60'])\nasked = []\n"
               "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\nopen(folder + '/up', 'w')\n"
               "while not asked: time.sleep(0.05)\ntime.sleep(4)\n"
               "open(folder + '/saved', 'w').write(str(helper.poll()))\nsys.exit(75)")
    process = subprocess.Popen(plan(tmp_path, program), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "cell/up").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    saved = tmp_path / "cell/saved"
    assert saved.exists() == (ended_by == "grace")
    assert not saved.exists() or saved.read_text() == "None"
    assert not subprocess.run(["pgrep", "-f", "^sleep 60$"], capture_output=True, text=True).stdout


def test_the_display_reads_whole_rows_and_tells_the_time_left(tmp_path, capsys):
    display = Display(tmp_path, "1/3  V1 seed 7", "1/3")
    assert display._text().startswith("1/3  V1 seed 7: starting (0 s)")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"progress": 0.25, "train_loss_step": 3.0, "tokens_per_second": 12000.0}\n{"progress": 0.')
    display._read()
    assert display._text() == "1/3  V1 seed 7:  25 %  loss 3.000  12.0 k tokens/s"
    path.write_text(path.read_text() + '5, "val_loss": 2.5, "train_loss_step": null}\n')
    display._read()
    display.first = (display.first[0] - 10, 0.25)
    assert display._text().startswith("1/3  V1 seed 7:  50 %  loss 3.000  val 2.500  12.0 k tokens/s  20 s left  study ")
    path.write_text("")  # a resumed cell has cut its rows
    display._read()
    assert display.offset == 0


def test_cells_side_by_side_draw_no_live_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(os.environ, "MAKEFLAGS", " -j2 --jobserver-auth=3,4")
    assert not Display(tmp_path, "t", "1/2").live
