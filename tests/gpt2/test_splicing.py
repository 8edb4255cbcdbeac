"""KVSplice in a cell: what it is fitted to, what its record says, and that its file is used, not only written."""

import errno
import json
from statistics import fmean

import pytest
import torch

from gpt2 import kvsplice, train_ra_mla, trained
from lib import atomic
from lib.cells import Cell
from lib.config import Study
from lib.kconfig import Assignment
from lib.launch import prepare
from tests.harness import ROOT, refusal, run_here

TRAINER = ROOT / "gpt2/train_ra_mla.py"
SMALL = {"GPT2_MAX_ITERS": "3", "GPT2_BLOCK_SIZE": "32", "BATCH_SIZE": "2", "GPT2_EVAL_SAMPLES": "2"}
FIT = {"KVSPLICE_SAMPLES": "400", "KVSPLICE_EPOCHS": "1", "KVSPLICE_MAX_BATCHES": "4"}


def run(*arguments):
    return run_here(TRAINER, *arguments)


def cell(out, step, parent=None, **symbols):
    """Prepare and run one cell; its folder and record."""
    name = f"test_{step}"
    study = Study("gpt2-kv-compression-ablation+tiny", overrides=[Assignment(n, v, "test") for n, v in symbols.items()])
    prepare(out / name, Cell(step, "adamwspam", 1337, name, study.resolve(step), parent and f"test_{parent}"))
    done = run("--cell", out / name)
    assert done.returncode == 0, done.stderr
    return out / name, json.loads((out / name / "metrics.json").read_text())


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def v19_and_c2(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return cell(out, "V19", **SMALL), cell(out, "C2", "V19", **SMALL, **FIT)


def test_a_cell_that_is_only_evaluated_is_its_parent_compressed(v19_and_c2):
    (parent, before), (child, after) = v19_and_c2
    assert all(torch.equal(tensor, weights(child)[name]) for name, tensor in weights(parent).items())
    assert [after[key] for key in ("iterations", "tokens", "train_seconds", "train_loss", "budget_progress")] == [
        before[key] for key in ("iterations", "tokens", "train_seconds", "train_loss", "budget_progress")]
    found = after["compression"]
    assert found["val_loss_before"] == before["val_loss"] and found["val_loss"] == after["val_loss"] != before["val_loss"]
    assert found["val_loss_pca"] not in (before["val_loss"], after["val_loss"])
    for record in (before, after):
        assert fmean(record["val_loss_by_position"]) == pytest.approx(record["val_loss"], rel=1e-6)
    assert after["calibration_seconds"] > 0 and before["calibration_seconds"] == 0 and before["compression"] is None
    assert [layer["layer"] for layer in found["layers"]] == [0, 1] and found["rows"] == 256
    assert all(0 < layer["error"] < 1 and 0 < layer["error_pca"] < 1 for layer in found["layers"])
    assert after["kv_cache_bytes"] < before["kv_cache_bytes"] and after["sizes"]["kvsplice_k"] == 16


def test_an_interrupted_cell_takes_the_fit_that_it_has(v19_and_c2):
    _, (child, after) = v19_and_c2
    file = child / "kvsplice_C2.pt"
    written = file.stat().st_mtime_ns
    (child / "metrics.json").unlink()
    assert run("--cell", child).returncode == 0
    again = json.loads((child / "metrics.json").read_text())
    assert (again["val_loss"], again["compression"]) == (after["val_loss"], after["compression"])
    assert file.stat().st_mtime_ns == written


def test_a_damaged_fit_is_made_again(v19_and_c2):
    _, (child, after) = v19_and_c2
    file = child / "kvsplice_C2.pt"
    content, held = file.read_bytes(), torch.load(file, weights_only=True)
    file.write_bytes(content[:len(content) // 2])
    (child / "metrics.json").unlink()
    assert run("--cell", child).returncode == 0
    assert torch.load(file, weights_only=True)["sha256"] == held["sha256"]
    assert json.loads((child / "metrics.json").read_text())["compression"] == after["compression"]


def test_who_loads_the_model_of_a_cell_verifies_its_fit(v19_and_c2):
    (parent, _), (child, _) = v19_and_c2
    file, cfg = child / "kvsplice_C2.pt", Study(config=child / ".config").config
    whole = file.read_bytes()
    trained.load(child, cfg)
    again = "move the folder of the cell away and run make again."
    try:
        content = torch.load(file, weights_only=True)
        content["tensors"]["1.mean"][0, 0] += 1
        content["sha256"] = kvsplice.digest(content["header"], content["tensors"])
        torch.save(content, file)
        assert refusal(trained.load, child, cfg) == (
            f"{file} is not the fit of the model beside it, but of C2, seed 1337.", again)
        file.write_bytes(b"x")
        assert refusal(trained.load, child, cfg)[0].startswith(f"{file} cannot be read: ")
    finally:
        file.write_bytes(whole)


def test_finetuning_trains_through_the_codec(tmp_path_factory, v19_and_c2):
    (parent, _), _ = v19_and_c2
    folder, record = cell(parent.parent, "C1", "V19", **SMALL, **FIT, EVALUATE_ONLY="n")
    assert record["iterations"] == 3 and record["compression"]["val_loss"] != record["val_loss"]
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(weights(folder)[name], weights(parent)[name])
    trained.load(folder, Study(config=folder / ".config").config)  # its fit is that of its start, and still its codec's


def test_a_parents_own_codec_of_another_width_is_left_to_the_parent(tmp_path):
    """Each cell fits its own; a study that compresses every step (KVSPLICE=y) may hold C2 too."""
    _, before = cell(tmp_path, "V19", **SMALL, KVSPLICE="y", KVSPLICE_K="1/2", **FIT)
    _, after = cell(tmp_path, "C2", "V19", **SMALL, **FIT)
    assert [record["sizes"]["kvsplice_k"] for record in (before, after)] == [32, 16]
    assert after["compression"]["val_loss_before"] == before["compression"]["val_loss_before"]


def test_by_hand_a_cell_trains_and_is_fitted_at_its_end(tmp_path):
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    done = run("--defconfig", "gpt2-ra-ablation+tiny", "--ra-mla-ablation-step", "V0", "--out", tmp_path / "cell", *settings,
               "--kvsplice-enable", "--kvsplice-k", "8", "--kvsplice-samples", "400", "--kvsplice-epochs", "1",
               "--kvsplice-max-batches", "4", "--kvsplice-knots", "5", "--kvsplice-lr", "0.01", "--kvsplice-save",
               tmp_path / "fit.pt")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cell/metrics.json").read_text())
    assert record["val_loss"] == record["compression"]["val_loss"] != record["compression"]["val_loss_before"]
    rows = [json.loads(line) for line in (tmp_path / "cell/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] == record["compression"]["val_loss_before"]  # it trained without
    assert fmean(record["val_loss_by_position"]) == pytest.approx(record["val_loss"], rel=1e-6), "of compressed values too"
    assert record["val_loss"] != pytest.approx(record["compression"]["val_loss_before"], rel=1e-5), "or it would prove nothing"
    assert (tmp_path / "fit.pt").read_bytes() == (tmp_path / "cell/kvsplice_V0.pt").read_bytes()
    assert [record["configuration"][f"KVSPLICE_{name}"] for name in ("KNOTS", "LR", "EPOCHS")] == [5, 0.01, 1]


def test_a_fit_that_is_copied_onto_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(_, temporary):
        temporary.write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "cell.pt").write_bytes(b"new")
    (tmp_path / "fit.pt").write_bytes(b"old")
    monkeypatch.setattr(atomic.shutil, "copyfile", full)
    what, _ = refusal(train_ra_mla.save_fit, tmp_path / "cell.pt", tmp_path / "fit.pt")
    assert what == f"{tmp_path}/fit.pt cannot be written: No space left on device."
    assert (tmp_path / "fit.pt").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_a_flag_of_kvsplice_without_kvsplice_is_refused():
    done = run("--ra-mla-ablation-step", "V0", "--kvsplice-k", "8", "--out", "nowhere")
    assert (done.returncode, done.stderr) == (2, "error: --kvsplice-k is given without --kvsplice-enable.\n"
                                                 "  try: add --kvsplice-enable, or leave it out.\n")
