"""make doctor: each finding is a line that says what to do, and a machine that lacks everything still gets an answer."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from scripts import doctor
from tests.harness import ROOT, TINY, run_here


def lines(check, *arguments):
    return [(line.level, line.what, line.advice) for line in check(*arguments)]


def config(**symbols):
    return SimpleNamespace(**{"DEVICE": "auto", "GPT2_COMPILE": True, "TRACKER": "none", "TRACKER_MODE": "offline",
                              "TOKENIZER": "gpt2", "CPU_THREADS": 1, "DATASET": "local"} | symbols)


def only(found):
    line, = found
    return line


def test_a_tiny_study_on_this_machine(dotconfig, tmp_path):
    dotconfig(*TINY, f'OUTPUT_DIR="{tmp_path}/out"', "GPT2_COMPILE=n")
    done = run_here("-m", "scripts.doctor")
    assert done.returncode == 0, done.stdout
    for said in ("ok       Python 3.", "ok       study custom: 1 cells, 1 to run", "the study runs on the CPU",
                 "no compiler is needed", "ok       data set pystdlib: ", f"{tmp_path}/out may be written", "\n0 problems, "):
        assert said in done.stdout, said
    assert not (tmp_path / "out").exists(), "it changes nothing"


def test_problems_end_with_status_1_and_what_to_do(dotconfig, tmp_path):
    dotconfig("MODEL_TINY=y", "DATA_LOCAL=y", f'DATA_LOCAL_DIR="{tmp_path}/none"', "DEVICE_CPU=y",
              f'OUTPUT_DIR="{tmp_path}/out"')
    done = run_here("-m", "scripts.doctor")
    assert done.returncode == 1 and "problem  The folder" in done.stdout and "-> set DATA_LOCAL_DIR" in done.stdout
    dotconfig("GPT2_BIAS=maybe")
    done = run_here("-m", "scripts.doctor")
    assert done.returncode == 1 and "problem  the configuration is refused: " in done.stdout
    assert "Python 3." in done.stdout, "the rest is said all the same"


def test_a_bare_python_gets_an_answer():
    """-S: without site-packages, as before make setup."""
    done = subprocess.run([sys.executable, "-S", "-m", "scripts.doctor"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "not installed: torch, numpy, kconfiglib, filelock" in done.stdout and "-> make setup" in done.stdout


@pytest.mark.parametrize("installed, level, said", [
    ((2, 13, 0), "ok", "torch 2.13.0"), ((2, 11, 1), "ok", "torch 2.11.1"), ((2, 10, 9), "problem", "older than 2.11"),
    ((3, 0, 0), "warning", "newer than")])
def test_the_version_of_torch(monkeypatch, installed, level, said):
    monkeypatch.setattr(doctor, "version", lambda package: installed)
    monkeypatch.setattr(doctor, "pinned", lambda package: (2, 13, 0))
    found = only(lines(doctor.torch_version))
    assert found[0] == level and said in found[1] and (level == "ok") == (found[2] == "")


def test_torch_is_pinned_and_an_absent_package_has_no_version():
    assert doctor.pinned("torch") >= doctor.OLDEST_TORCH and doctor.pinned("nothing") is None
    assert doctor.version("torch")[:2] >= doctor.OLDEST_TORCH and doctor.version("nothing-at-all") is None


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    assert only(lines(doctor.python)) == ("problem", "Python 3.10.4 is too old", "install Python 3.11 or newer")


CARD = ("NVIDIA A10G", "470.82")


@pytest.mark.parametrize("device, card, cuda, level, said", [
    ("cpu", CARD, "13.0", "ok", "the study runs on the CPU (there is a GPU: NVIDIA A10G)"),
    ("auto", CARD, None, "warning", "torch is built without CUDA"),
    ("cuda", CARD, None, "problem", "torch is built without CUDA"),
    ("auto", CARD, "13.0", "problem", "torch is built for CUDA 13.0, which the driver 470.82 of NVIDIA A10G does not run"),
    ("cuda", None, "13.0", "problem", "there is no NVIDIA driver"), ("auto", None, "13.0", "warning", "there is no GPU"),
])
def test_a_gpu_that_cannot_be_used(monkeypatch, device, card, cuda, level, said):
    import torch

    monkeypatch.setattr(doctor, "driver", lambda: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = only(lines(doctor.gpu, config(DEVICE=device)))
    assert found[0] == level and said in found[1] and (level == "ok" or found[2])


@pytest.mark.parametrize("printed, code, expected", [
    ("NVIDIA A10G, 550.1\nNVIDIA A10G, 550.1\n", 0, ("NVIDIA A10G, NVIDIA A10G", "550.1")),
    ("NVIDIA-SMI has failed", 9, None), ("", 0, None)])
def test_what_the_driver_says(monkeypatch, printed, code, expected):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, printed, ""))
    assert doctor.driver() == expected


def test_a_compiler_only_where_the_study_compiles(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    assert "there is no C++ compiler" in only(lines(doctor.compiler, config()))[1]
    assert only(lines(doctor.compiler, config(GPT2_COMPILE=False)))[0] == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is missing" in only(lines(doctor.compiler, config()))[1]
    (tmp_path / "Python.h").touch()
    assert only(lines(doctor.compiler, config())) == ("ok", "torch.compile has g++ and Python's headers", "")


@pytest.mark.parametrize("mode, key, level", [
    ("offline", "", "ok"), ("online", "", "warning"), ("online", "x", "ok"), ("sideways", "", "problem")])
def test_the_tracker(monkeypatch, tmp_path, mode, key, level):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    assert only(lines(doctor.tracker, config(TRACKER="wandb")))[0] == level
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert only(lines(doctor.tracker, config(TRACKER="wandb")))[0] == "warning"
    assert only(lines(doctor.tracker, config()))[0] == "ok"


def test_several_trackers_have_a_line_each(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "trackio" else object())
    found = lines(doctor.tracker, config(TRACKER="wandb trackio tensorboard aim"))
    assert [(level, text.split()[0]) for level, text, _ in found] == [
        ("ok", "tracker"), ("warning", "trackio"), ("ok", "tracker"), ("problem", "there")]
    assert {line[0] for line in lines(doctor.tracker, config(TRACKER="trackio", TRACKER_MODE="disabled"))} == {"ok"}


def test_gpt2s_vocabulary_is_known_by_its_hash(monkeypatch, tmp_path):
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    monkeypatch.setenv("TIKTOKEN_GPT2_DIR", str(tmp_path))
    assert "vocab.bpe is missing" in only(lines(doctor.vocabulary, config()))[1]
    (tmp_path / "vocab.bpe").write_text("other")
    assert "vocab.bpe is not the published one" in only(lines(doctor.vocabulary, config()))[1]
    assert only(lines(doctor.vocabulary, config(TOKENIZER="bytes")))[0] == "ok"


def test_room_for_what_is_still_to_be_written(monkeypatch, dotconfig, tmp_path):
    from lib.plan import Options, Plan

    dotconfig(*TINY, 'SEEDS="1 2"', "JOBS=1", f'OUTPUT_DIR="{tmp_path}/out"')
    plan = Plan(Options())
    one = doctor.parameters(plan.cells[0].resolved.config)
    assert 1 < one / 453_632 < 1.2, "the tiny model, and a tenth"
    needed = doctor.disk_needed(plan)
    assert needed == 2 * 4 * one + doctor.STATE_BYTES * doctor.COPIES * one + doctor.SPARE
    for free, level in ((needed - 1, "problem"), (needed, "warning"), (2 * needed, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert only(lines(doctor.results, plan))[0] == level

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuses)
    assert "cannot be written: Permission denied" in only(lines(doctor.results, plan))[1]


def test_a_check_that_fails_itself_is_a_line():
    def broken(_):
        raise RuntimeError("oh\nno")
        yield

    line = only(doctor._lines(broken, None))
    assert line.level == "warning" and "broken could not be looked at: RuntimeError: oh no" in str(line)


@pytest.mark.parametrize("flock, said", [
    (lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")), "(No locks available)"),
    (lambda *_: None, "(a second lock was given on a locked file)")])
def test_a_file_system_whose_locks_do_not_work_is_a_problem(monkeypatch, dotconfig, tmp_path, flock, said):
    from lib.plan import Options, Plan

    dotconfig(*TINY, f'OUTPUT_DIR="{tmp_path}/out"')
    plan = Plan(Options())
    assert all("do not work" not in line[1] for line in lines(doctor.results, plan))
    monkeypatch.setattr(doctor.fcntl, "flock", flock)
    level, what = lines(doctor.results, plan)[0][:2]
    assert level == "problem" and said in what and what.startswith(f"{tmp_path} is on a file system")
    assert list(tmp_path.glob(".doctor-*")) == []
