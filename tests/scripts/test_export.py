"""make export: a cell's folder for transformers, whole or not at all, that says what the study found."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("safetensors")
from gpt2 import hf, hf_tokenizer, sample, trained  # noqa: E402
from gpt2.model import GPT  # noqa: E402
from lib import checkpoint, results  # noqa: E402
from lib.cells import expand  # noqa: E402
from lib.config import Study  # noqa: E402
from lib.plan import Options, Plan  # noqa: E402
from lib.report.content import content  # noqa: E402
from scripts import export  # noqa: E402
from tests.harness import ROOT, finish, refusal, snapshot  # noqa: E402
from tests.lib.data.conftest import gpt2_files  # noqa: E402, F401 a fixture

CONFIG = ("MODEL_TINY=y", "DATA_PYSTDLIB=y", "GPT2_BLOCK_SIZE=32", "GPT2_MAX_ITERS=4", "DEVICE_CPU=y", "CPU_THREADS=1",
          'STUDY="mine"', 'ABLATION_STEPS="V0 V1 V2"')


@pytest.fixture
def cells(dotconfig, tmp_path):
    """{step: folder} of a study whose cells are finished."""
    dotconfig(*CONFIG, f'OUTPUT_DIR="{tmp_path}/out"')
    folders = {}
    for cell in expand(Study()):
        folder = folders[cell.step] = tmp_path / "out" / cell.name
        finish(tmp_path / "out", cell, val_loss=3.25)
        model = GPT(cell.resolved.with_seed(cell.seed).config)
        identity = json.loads((folder / "metrics.json").read_text())["identity"]["hash"]
        checkpoint.save(folder / "model.pt", identity=identity, model=model.state_dict())
    return folders


def test_a_cell_by_its_name_with_its_card_and_tokenizer(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "by_transformers", lambda folder, idx: None)
    (tmp_path / "out/report.json").write_text(json.dumps({"title": "mine", "steps": [
        {"step": "V1", "tuned": None, "is_baseline": False, "cells": [{"name": name}], "comparison": {"sentence": sentence}}
        for name, sentence in (("test_V1_adamw_none", "V1 vs V0: +0.1 nats: WORSE."),  # of another optimizer
                               (cells["V1"].name, "V1 vs V0: -0.1 nats: BETTER."))]}))
    export.main([cells["V1"].name])
    made = cells["V1"] / "hf"
    assert {p.name for p in made.iterdir()} >= {"model.safetensors", "config.json", "README.md"}
    assert "read back here (transformers is not installed)" in capsys.readouterr().out
    card = (made / "README.md").read_text()
    assert "**Verdict.** V1 vs V0: -0.1 nats: BETTER. (study mine)" in card
    assert "# V1: unified reciprocal attention" in card and "3.2500 nats" in card
    assert "| budget | 4 iterations |" in card and "is folded into the weights" in card
    cfg = Study(config=cells["V1"] / ".config").config
    again = GPT(cfg)
    assert [name for name in hf.start(again, made, cfg) if "gate" not in name] == []
    idx = torch.arange(32)[None]
    with torch.no_grad():
        ours, theirs = (model.eval()(idx)[0][..., :256] for model in (again, trained.load(cells["V1"], cfg)))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_verdict_is_that_of_the_report_for_the_cells_own_optimizer(dotconfig, tmp_path):
    dotconfig(*CONFIG, 'OPTIMIZERS="adamw adamwspam"', 'SEEDS="1 2 3"', f'OUTPUT_DIR="{tmp_path}/out"')
    for number, cell in enumerate(expand(Study())):
        finish(tmp_path / "out", cell, val_loss=3 + number ** 2 / 100)
    report = content(Plan(Options()))
    (tmp_path / "out/report.json").write_text(json.dumps(report))
    said = {}
    for row in report["steps"]:
        for cell in row["cells"]:
            folder = tmp_path / "out" / cell["name"]
            said[folder.name] = export.verdict(folder, results.read(folder))
            assert row["is_baseline"] or row["comparison"]["sentence"] in said[folder.name]
    assert len(said) == 18 and len(set(said.values())) == 5  # one an arm, whatever the seed; both baselines have the same


def test_transformers_is_asked_where_it_is_installed(cells, tmp_path, capsys):
    pytest.importorskip("transformers")
    export.main([str(cells["V0"]), str(tmp_path / "there/v0")])
    assert "in transformers\n" in capsys.readouterr().out
    assert "No verdict: the study has no report of this step (make report)." in (tmp_path / "there/v0/README.md").read_text()


def test_what_is_refused_leaves_nothing(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "by_transformers", lambda folder, idx: None)
    before = snapshot(tmp_path)
    assert refusal(export.main, [])[0] == "no cell was given."
    assert refusal(export.main, ["test_V9"])[0] == "there is no cell test_V9."
    assert refusal(export.main, [cells["V2"].name])[0].startswith("this step is no GPT-2 in function: its attention")
    assert refusal(export.main, [cells["V0"].name, str(tmp_path / "out")])[0] == f"{tmp_path}/out is there already."
    with torch.no_grad():  # what is written is not what is read back
        monkeypatch.setattr(hf, "tensors", lambda model, original=hf.tensors: {
            name: t + 0.1 * (name == "transformer.h.0.mlp.c_fc.bias") for name, t in original(model).items()})
        what, _ = refusal(export.main, [cells["V0"].name])
    assert what.startswith("the exported model's logits, read back, differ from the cell's by ")
    (cells["V1"] / "metrics.json").unlink()
    assert refusal(export.main, [cells["V1"].name])[0] == f"{cells['V1']} is not finished."
    del before[str(cells["V1"] / "metrics.json")]
    assert snapshot(tmp_path) == before


def test_tokenizers_split_text_as_training_did(gpt2_files):  # noqa: F811
    tokenizers = pytest.importorskip("tokenizers")
    text = "for i in range(10):\n    print(f'{i} — ünïcode 東京\\t')  # <3\r\n\x00"
    for name, cls in sample.TOKENIZERS.items():
        files, missing = hf_tokenizer.files(name, 1024)
        assert not missing and json.loads(files["tokenizer_config.json"])["model_max_length"] == 1024
        made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        assert made.encode(text).ids == cls().ids(text) and made.decode(cls().ids(text)) == text


def test_without_the_package_one_sentence_says_so(cells, tmp_path, monkeypatch):
    before = snapshot(tmp_path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refusal(export.main, [cells["V0"].name])[0] == "make export needs safetensors, which is not installed."
    assert snapshot(tmp_path) == before


def test_the_goal_though_its_name_is_a_word_of_make():
    done = subprocess.run(["make", f"PYTHON={sys.executable}", "export", "CELL=test_V9"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "error: there is no cell test_V9." in done.stderr


def test_a_vocabulary_that_is_not_at_hand_is_said(monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("TIKTOKEN_GPT2_DIR", "/nowhere")
    assert hf_tokenizer.files("gpt2", 32) == ({}, "TIKTOKEN_GPT2_DIR=/nowhere does not hold GPT-2's vocab.bpe and encoder.json "
                                                  "(set TIKTOKEN_GPT2_DIR to a folder with GPT-2's vocab.bpe and encoder.json)")
