"""train_ra_mla.py by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.cells import Cell, expand
from lib.config import Study, load
from lib.kconfig import Assignment
from lib.launch import prepare
from tests.harness import TINY, finish, replace, run_here

ROOT = Path(__file__).resolve().parents[2]
FAST = [f"--set={s}" for s in ("GPT2_MAX_ITERS=2", "GPT2_BLOCK_SIZE=32", "BATCH_SIZE=2", "GPT2_EVAL_SAMPLES=2")]


def by_hand(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPT2_", "KABLATE_"))}
    return subprocess.run([sys.executable, str(ROOT / "gpt2/train_ra_mla.py"), "--defconfig", "gpt2-ra-ablation+tiny",
                           *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def here(*arguments):
    """The same without another process."""
    return run_here(ROOT / "gpt2/train_ra_mla.py", "--defconfig", "gpt2-ra-ablation+tiny", *arguments)


def test_a_cell_by_hand_from_any_folder(tmp_path):
    done = by_hand("--ra-mla-ablation-step", "V1@RA_R=8", "--seed", "7", "--out", "cell", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cell/metrics.json").read_text())
    assert (record["state"], record["step"], record["seed"], record["sizes"]["R"]) == ("done", "V1@RA_R=8", 7, 8)
    assert record["parameters"] > 0 and record["kv_cache_bytes"] == 2 * 2 * 32 * 128 * 4
    assert record["kv_cache_parts"] == {"keys": 2 * 32 * 128 * 4, "values": 2 * 32 * 128 * 4}
    assert record["data"]["unigram_entropy"] > 2 and record["environment"]["precision"] == "float32"
    assert record["inactive"] is None and (tmp_path / "cell/model.pt").exists() and 0 <= record["future_leak"] < 1e-6
    again = by_hand("--ra-mla-ablation-step", "V1@RA_R=8", "--seed", "7", "--out", "cell", *FAST, cwd=tmp_path)
    assert again.returncode == 2 and "already holds this result" in again.stderr
    other = by_hand("--ra-mla-ablation-step", "V1@RA_R=4", "--seed", "7", "--out", "cell", *FAST, cwd=tmp_path)
    assert other.returncode == 2 and "already holds another cell: RA_R 8 -> 4" in other.stderr


def test_a_cell_that_starts_from_weights_of_transformers(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    from gpt2 import hf
    from gpt2.model import GPT

    cfg = load("gpt2-ra-ablation+tiny", "V0", {"GPT2_BLOCK_SIZE": 32})
    folder = tmp_path / "hf"
    folder.mkdir()
    model = GPT(cfg)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()  # every token as likely as any other
        model.transformer.ln_f.bias.zero_()
    save_file(hf.tensors(model), folder / hf.WEIGHTS)
    (folder / hf.CONFIGURATION).write_text(json.dumps(hf.configuration(cfg, 0)))
    done = here("--ra-mla-ablation-step", "V1", "--out", tmp_path / "cell", "--init-from", f"gpt2-hf={folder}",
                "--set=LEARNING_RATE=0.0", "--set=GPT2_MIN_LR=0.0", *FAST)
    kept = "4 tensors keep their own start: transformer.h.0.attn.gate_std transformer.h.0.attn.gate_rec transformer.h.1."
    assert done.returncode == 0 and f"starts from {folder}; {kept}" in done.stdout, done.stderr
    record = json.loads((tmp_path / "cell/metrics.json").read_text())
    assert record["val_loss"] == pytest.approx(math.log(256), abs=1e-4)
    assert record["environment"]["start_hash"] == hf.digest(folder)
    assert record["configuration"]["INIT_FROM_HF"] == str(folder)
    assert json.loads((tmp_path / "cell/start.json").read_text()) == {"sha256": hf.digest(folder)}
    for text in ("gpt2-hf", "gpt2", "gpt2-hf="):
        refused = here("--ra-mla-ablation-step", "V1", "--out", tmp_path / "other", "--init-from", text)
        assert refused.returncode == 2 and f"--init-from {text} names no start." in refused.stderr


def test_a_cell_that_is_not_to_keep_its_model_has_none(tmp_path):
    """Nor the one that an earlier try of the same cell left."""
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell/model.pt").write_text("of an earlier try")
    done = here("--ra-mla-ablation-step", "V0", "--out", tmp_path / "cell", "--set=SAVE_MODEL=n", *FAST)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cell/metrics.json").read_text())["state"] == "done"
    assert sorted(p.name for p in (tmp_path / "cell").iterdir()) == [".config", "metrics.json", "metrics.jsonl",
                                                                     "provenance.json"]


def prepared(folder, step, **symbols):
    """A cell that starts from the trained V0 beside it."""
    one = Study("gpt2-ra-ablation+tiny", overrides=[Assignment(n, v, "test") for n, v in symbols.items()]).resolve(step)
    prepare(folder, Cell(step, "adamwspam", 1337, folder.name, one, "test_V0_adamwspam_none"))
    return folder


@pytest.mark.parametrize("state, what, run", [
    ("done", "parent V0 is done, but its model is not in {}: SAVE_MODEL was off, or it was unpacked from an archive.",
     "set SAVE_MODEL=y, move that folder away, then make RETRY=1."),
    ("failed", "parent V0 has left no trained model in {}.", "make RETRY=1 once it has one."),
])
def test_a_parent_without_a_model_is_refused_with_what_to_do(tmp_path, dotconfig, state, what, run):
    dotconfig(*TINY)
    parent = expand(Study())[0]
    finish(tmp_path, parent, state=state, reason=None if state == "done" else "it broke")
    child = prepared(tmp_path / "test_V1_adamwspam_none", "V1", INIT_FROM_STEP="V0")
    done = run_here(ROOT / "gpt2/train_ra_mla.py", "--cell", child)
    assert (done.returncode, done.stderr) == (2, f"error: {what.format(tmp_path / parent.name)}\n  try: {run}\n")


def test_a_cell_whose_configuration_is_not_what_was_planned_is_refused(tmp_path):
    """Its result would stand for another cell's. What it has of its parent is not in its own .config."""
    folder = prepared(tmp_path / "test_V1_adamwspam_none", "V1", INIT_FROM_STEP="V0")
    replace(folder / ".config", "CONFIG_BATCH_SIZE=8\n", "CONFIG_BATCH_SIZE=9\n")
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["identity"]["set"]["PARENT.RA_R"] = "4"
    (folder / "provenance.json").write_text(json.dumps(provenance))
    done = run_here(ROOT / "gpt2/train_ra_mla.py", "--cell", folder)
    assert done.returncode == 2
    assert done.stderr == (f"error: {folder}/.config is not what the cell was planned with: BATCH_SIZE 8 -> 9.\n"
                           "  try: make RETRY=1, which writes it anew.\n")
    replace(folder / ".config", "CONFIG_BATCH_SIZE=9\n", "CONFIG_BATCH_SIZE=8\n")
    assert "parent V0" in run_here(ROOT / "gpt2/train_ra_mla.py", "--cell", folder).stderr


def test_dry_run():
    done = here("--ra-mla-ablation-step", "V1", "--dry-run")
    assert done.returncode == 0 and "2 of 2 steps obey the laws" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments, message", [
    ([], "error: no step was given."),
    (["--ra-mla-ablation-step", "V99"], "error: there is no step 'V99'."),
    (["--ra-mla-ablation-step", "V1"], "error: no folder to train in was given."),
    (["--ra-mla-ablation-step", "V1", "--set", "RA_R=64", "--out", "x"], "error: RA_R=64 is not below the head width 64."),
    (["--ra-mla-ablation-step", "V1", "--set", "RA_R", "--out", "x"], "error: --set RA_R gives no value."),
    (["--ra-mla-ablation-step", "V1", "--out", "/proc/nowhere"], "error: /proc/nowhere cannot be written"),
    (["--cell", "/nowhere"], "provenance.json cannot be read"),
])
def test_errors_are_one_sentence(arguments, message):
    done = by_hand(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
