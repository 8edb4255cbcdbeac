"""make fim: cells on disk to a table with its spread, what is kept, and what is missing or refused."""

import json
import os
import shutil
from statistics import fmean

import pytest
import torch

from gpt2.model import GPT
from lib import checkpoint, results, stats
from lib.cells import expand
from lib.config import Study
from lib.data import EvalSet, open_corpus
from lib.launch import prepare
from scripts import describing, fim
from tests.harness import MEASURED, ROOT, TINY, finish, refusal, run_here, snapshot

SMALL = (*TINY[:2], *TINY[3:], "GPT2_MAX_ITERS=2", "GPT2_BLOCK_SIZE=24", "BATCH_SIZE=2", "GPT2_EVAL_SAMPLES=3",
         "CPU_THREADS=1", "GPT2_COMPILE=n", 'ABLATION_STEPS="V0 V1 G2"', 'SEEDS="1337 1338 1339"')


@pytest.fixture
def study(tmp_path, dotconfig, monkeypatch):
    """(results folder, its cells): a study of three steps and three seeds, of which nothing has run."""
    dotconfig(*SMALL)
    monkeypatch.setenv("KABLATE_OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    return tmp_path / "out", expand(Study())


def complete(out, *cells, **measured):
    """End cells as a trainer would, with the weights they start from, the gains of the norms apart."""
    for cell in cells:
        cfg = cell.resolved.with_seed(cell.seed).config
        corpus = open_corpus(cfg)
        windows = EvalSet(corpus.val, cfg.GPT2_EVAL_SAMPLES, cfg.BATCH_SIZE, cfg.GPT2_BLOCK_SIZE, corpus.vocab_size)
        finish(out, cell, data=MEASURED["data"] | {"eval_hash": windows.hash}, **measured)
        model = GPT(cfg)
        with torch.no_grad():
            for block in model.transformer.h:
                block.ln_1.weight.mul_(8)
        checkpoint.save(out / cell.name / "model.pt", model=model.state_dict(),
                        identity=cell.provenance()["identity"]["hash"])


def read(path):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")
    return json.loads(path.read_text(), parse_constant=refuse)


def of_cells(out):
    return {path: held for path, held in snapshot(out).items() if os.path.relpath(path, out).startswith("test_")}


def run(capsys, *arguments):
    describing.main(fim.MEASURE, "", list(arguments))
    return capsys.readouterr().out


def test_a_trained_study_from_cells_to_table(study, capsys):
    """One cell is really trained; each number of the table is traced back to the cells'."""
    (out, cells), seeds = study, (1337, 1338, 1339)
    trained = cells[0]
    prepare(out / trained.name, trained)
    done = run_here(ROOT / "gpt2/train_ra_mla.py", "--cell", out / trained.name)
    assert done.returncode == 0, done.stderr
    complete(out, *cells[1:])
    before = snapshot(out)
    said = run(capsys, "--rows", "2")
    after = snapshot(out)
    assert before.items() <= after.items(), "nothing that was there is touched"
    assert {os.path.relpath(path, out) for path in after.keys() - before.keys()} == {
        "fisher.json", "fisher.md", *(f"{cell.name}/fisher.json" for cell in cells)}
    own = {(cell.step, cell.seed): read(out / cell.name / "fisher.json") for cell in cells}
    one = own["V0", 1337]
    assert (one["windows"], one["rows"], one["positions"], len(one["metrics"])) == (2, 2 * 23, [1, 23], 2 * 2 * 3)
    assert one["identity"] == results.read(out / trained.name)["identity"]["hash"] and one["undefined"] == {}
    assert set(own["G2", 1338]["metrics"].values()) == {None} and sorted(own["G2", 1338]["undefined"]) == ["0", "1"]
    whole = read(out / "fisher.json")
    assert [step["name"] for step in whole["steps"]] == ["V0", "V1", "G2"] and whole["comparisons"] == 2 * 3
    v0, v1, g2 = whole["steps"]
    p_values = []
    for metric in ("eigmax", "trace", "energy_r16"):
        mean = {key: fmean(v for k, v in one["metrics"].items() if k.endswith(metric)) for key, one in own.items()
                if key[0] != "G2"}
        assert v1["metrics"][metric]["spread"]["min"] == min(mean["V1", seed] for seed in seeds)
        expected = stats.paired([mean["V1", seed] - mean["V0", seed] for seed in seeds])
        found = v1["metrics"][metric]["comparison"]
        assert [found[k] for k in ("difference", "low", "high", "p")] == [expected.difference, expected.low, expected.high,
                                                                          expected.p]
        p_values.append(expected.p)
        assert v0["metrics"][metric]["comparison"] is None and g2["metrics"][metric]["comparison"]["n"] == 0
    adjusted = stats.holm([*p_values, None, None, None])
    assert [v1["metrics"][m]["comparison"]["p_holm"] for m in v1["metrics"]] == adjusted[:3], "what is missing counts"
    name = "fisher/layer1/head0/trace"
    by_seed = [own["V0", seed]["metrics"][name] for seed in seeds]
    assert v0["heads"][name]["min"] == min(by_seed) < max(by_seed) == v0["heads"][name]["max"] and g2["heads"][name] is None
    assert "| G2   |            |" in said and "not defined: its weights are not those of" in said
    assert "Positions 1 to 23 of 2 evaluation windows a cell" in said and "not the curvature of the loss" in said
    assert (out / "fisher.md").read_text() in said


def test_a_second_run_computes_only_what_is_new_or_stale(study, capsys):
    out, cells = study
    cells = [cell for cell in cells if cell.step != "G2"]
    complete(out, *cells[:3])
    first = run(capsys)
    assert first.count("eigmax 0.") == 3 and first.count("kept") == 0
    before = of_cells(out)
    again = run(capsys)
    assert again.count("kept") == 3 and "eigmax 0." not in again.split("\n\n")[0]
    assert of_cells(out) == before
    assert first.split("\n\n", 1)[1] == again.split("\n\n", 1)[1], "the same table"
    shutil.rmtree(out / cells[1].name)  # run again, with the same identity
    complete(out, cells[1], finished="2026-02-02T00:00:00+00:00")
    complete(out, cells[3])
    (out / cells[0].name / "fisher.json").write_text('{"format": ')
    (out / cells[2].name / "model.pt").unlink()  # weights are not needed for what is known
    lines = run(capsys).splitlines()
    measured = {line.split(":")[0] for line in lines if line.startswith("test_") and "eigmax" in line}
    assert measured == {cells[i].name for i in (0, 1, 3)} and f"{cells[2].name}: kept" in lines
    assert f"missing: {cells[2].name}: its model is not there: SAVE_MODEL was off, or it was unpacked from an archive" in run(
        capsys, "--rows", "1"), "another number of windows makes all stale"


@pytest.mark.parametrize("change", [
    {"metrics": {}}, {"metrics": None}, {"metrics": "all"}, {"windows": None}, {"positions": [1]}, {"undefined": {"0": 1}},
    {"undefined": None}, {"metrics": 0}])
def test_a_file_of_another_form_is_measured_again(study, capsys, change):
    """Its basis is right, so only its form can tell."""
    out, cells = study
    complete(out, cells[0])
    run(capsys)
    path = out / cells[0].name / "fisher.json"
    good = read(path)
    path.write_text(json.dumps(good | change))
    assert "kept" not in run(capsys) and read(path) == good
    name = next(iter(good["metrics"]))
    path.write_text(json.dumps(good | {"metrics": good["metrics"] | {name: "0.1"}}))
    assert "kept" not in run(capsys) and read(path) == good and "kept" in run(capsys)


def test_what_is_missing_says_so_and_is_no_number(study, capsys):
    out, cells = study
    v0, v1, g2 = cells[:3]
    complete(out, v0, v1, inactive="the budget was too short")
    finish(out, g2, state="failed", reason="it broke")
    said = run(capsys)
    assert f"missing: {g2.name}: failed: it broke" in said and f"missing: {cells[3].name}: planned: never ran" in said
    assert said.count("missing: ") == 7 and "V1: its mechanism never acted: the budget was too short" in said
    found = read(out / "fisher.json")["steps"]
    one_seed = found[1]["metrics"]["trace"]["comparison"]
    assert one_seed["n"] == 1 and one_seed["low"] is one_seed["p"] is one_seed["p_holm"] is None
    assert found[2]["metrics"]["trace"]["spread"] is None and found[2]["seeds"] == []


def test_bad_input_is_one_sentence(study):
    out, cells = study
    assert refusal(describing.main, fim.MEASURE, "", ["--rows", "0"])[0] == "--rows 0 is below 1."
    what, then = refusal(describing.main, fim.MEASURE, "", [])
    assert what.endswith(f"has no finished cell with its model in {out}.")
    assert then == "run it with make first, with SAVE_MODEL=y."
    cell = cells[0]
    complete(out, cell)
    path = out / cell.name / "model.pt"
    checkpoint.save(path, model={}, identity="another")
    assert refusal(describing.main, fim.MEASURE, "", [])[0] == f"{path} is not the model of the result beside it."
    path.write_bytes(b"torn")
    assert refusal(describing.main, fim.MEASURE, "", [])[0].startswith(f"{path} cannot be read")
    finish(out, cell)  # evaluated on data with another hash
    what, _ = refusal(describing.main, fim.MEASURE, "", [])
    assert what == f"the validation set of pystdlib is not the one that {cell.name} was evaluated on."
    assert not (out / cell.name / "fisher.json").exists() and not (out / "fisher.json").exists()


def test_windows_are_spread_over_the_evaluation_set(study):
    cfg = study[1][0].resolved.config
    corpus = open_corpus(cfg)
    whole = EvalSet(corpus.val, 3, 2, 24, 256)
    inputs = [x.tolist() for batch, _ in whole for x in batch]
    windows = describing.Windows()
    assert windows.choose(cfg, whole.hash, 3, "it")[0].tolist() == [inputs[0], inputs[2], inputs[5]]
    assert windows.choose(cfg, whole.hash, 99, "it")[0].tolist() == inputs, "all where there are fewer"
    assert windows.choose(cfg, whole.hash, 1, "it")[0].tolist() == inputs[:1]


def test_differences_are_paired_on_the_same_windows_only():
    def one(value, windows):
        return {"eval_hash": windows, "metrics": {"fisher/layer0/head0/trace": value}}

    found = describing.difference({1: one(0.5, "a"), 2: one(0.9, "b"), 3: one(None, "a")},
                           {1: one(0.25, "a"), 2: one(0.1, "a"), 3: one(0.5, "a"), 4: one(0.5, "a")}, "trace", stats.paired)
    assert found["by_seed"] == {"1": 0.25} and found["difference"] == 0.25 and found["n"] == 1
