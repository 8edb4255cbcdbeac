"""make compile-matrix: breaks and programs made anew are counted and fail a step, phases are gone through, twins are named."""

import json
import re

import pytest
import torch

import gpt2.mlp.baseline
from gpt2.attention.direction import DirectionController
from gpt2.mlp.baseline import MLP
from lib.config import Study
from lib.steps import step_files
from scripts import compile_matrix
from tests.harness import ROOT, refusal

torch.set_num_threads(1)
TINY = "gpt2-ra-ablation+tiny"


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def trace(step="V0", form="whole", precision="float32", layers=2, **symbols):
    cfg = Study(TINY).resolve(step).config.replace(GPT2_BLOCK_SIZE=8, **symbols)
    return compile_matrix.trace(cfg, form, precision, "eager", layers)


def row(*runs):
    return {"step": "X", "as": None, "error": None, "runs": list(runs)}


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def planted(monkeypatch, forward):
    """What `trace` takes for a model of one layer whose MLP's forward is `forward`."""
    monkeypatch.setattr(gpt2.mlp.baseline, "Planted", type("Planted", (MLP,), {"forward": forward}), raising=False)
    return {"MLP_CLASS": "gpt2.mlp.baseline:Planted", "GPT2_N_LAYER": 1, "layers": 1}


# What is counted

def test_rows_of_a_step_its_twin_and_one_that_does_not_fit(capsys, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(compile_matrix, "PRECISIONS", ("bfloat16",))
    status = compile_matrix.main(["V0", "P0", "V1@RA_R=64", "--set", "GPT2_BLOCK_SIZE=8", "--layers", "3", "--backend", "eager",
                                  "--out", str(out)])
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    rows = {row["step"]: row for row in record["rows"]}
    assert status == 1 and rows["V1@RA_R=64"]["error"] == "RA_R=64 is not below the head width 64."
    assert (rows["P0"]["as"], rows["P0"]["runs"], rows["V0"]["as"]) == ("V0", [], None)
    assert [(run["form"], run["precision"]) for run in rows["V0"]["runs"]] == [
        ("whole", "bfloat16"), ("blocks", "bfloat16")]
    for run in rows["V0"]["runs"]:
        (phase,), whole = run["phases"], run["form"] == "whole"
        assert run["error"] is None and (phase["breaks"], phase["anew"], phase["differ"], phase["reasons"]) == (0, 0, [], [])
        assert phase["programs"] == phase["evaluation"] == (1 if whole else 2)
        assert phase["called"] == ([0] if whole else [0, 0, 0, 1]), "three blocks, and what follows them"
    table = cells(said)
    assert table[0] == compile_matrix.HEADER
    assert table[2][:7] == ["V0", "1", "0", "0", "1 + 1", "2 + 2", "AAA"] and table[3] == ["P0", *[""] * 7, "as V0"]
    assert "3 steps, 1 programs. V1@RA_R=64 do not compile into whole programs. In 1 of them" in said
    assert compile_matrix.main(["--show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### rows\n\n") and f"eager; {TINY}, GPT2_BLOCK_SIZE=8, regions of 3 layers." in shown
    assert cells(shown)[2:] == table[2:]


def test_a_graph_break_fails_a_step(monkeypatch):
    def breaks(self, x, attended=None):
        torch._dynamo.graph_break()
        return MLP.forward(self, x, attended)

    run = trace(form="blocks", precision="bfloat16", **planted(monkeypatch, breaks))
    (phase,) = run["phases"]
    assert phase["breaks"] > 0 and "graph_break" in phase["reasons"][0] and run["error"] is None
    assert compile_matrix.broken(row(run)) == f"blocks, bfloat16: {phase['reasons'][0]}"


def test_a_function_that_is_left_uncompiled_is_a_break(monkeypatch):
    """The compiler leaves it out without an error, and all that is around it is still a program."""
    left = torch.compiler.disable(lambda self, x, attended=None: MLP.forward(self, x, attended))
    (phase,) = trace(**planted(monkeypatch, left))["phases"]
    assert phase["breaks"] > 0 and len(phase["called"]) > 1


def test_a_program_that_is_made_anew_at_every_pass_fails_a_step(monkeypatch):
    def counts(self, x, attended=None):
        self.passes = getattr(self, "passes", 0) + 1  # a Python number is part of a program
        return MLP.forward(self, x, attended) * self.passes

    run = trace(form="blocks", **planted(monkeypatch, counts))
    assert run["phases"][0]["anew"] > 0 and compile_matrix.broken(row(run)) == "blocks, float32: compiled anew"


def test_a_step_that_does_not_run_is_a_row(monkeypatch):
    def fails(self, x, attended=None):
        raise RuntimeError("two\nlines")

    run = trace(**planted(monkeypatch, fails))
    assert run["phases"] == [] and run["error"] and compile_matrix.broken(row(run)).startswith("whole, float32: ")
    assert compile_matrix.line(row(run))[-1] == compile_matrix.broken(row(run))


# Layers and phases

def test_layers_that_differ_in_a_python_constant_are_told_apart():
    run = trace("RAEARLY0", "blocks", layers=3)
    (phase,) = run["phases"]
    assert phase["called"] == [0, 1, 1, 2] and phase["programs"] == 3
    assert compile_matrix.pattern(phase) == "ABB" and phase["differ"] == ["self.attn.fixed == True"]
    assert compile_matrix.broken(row(run)) is None, "no break, only more to compile"


def test_skip_gates_close_in_half_of_the_layers_and_then_in_all():
    """A layer that computes nothing any more does not keep the others from being compiled, which share its code."""
    phases = trace("M2", "blocks")["phases"]
    assert [phase["called"] for phase in phases] == [[0, 0, 1], [0, 1, 2], [0, 0, 1]]
    assert phases[0]["progress"] == 0 < phases[1]["progress"] < phases[2]["progress"] < 1
    assert not any(phase["anew"] or phase["breaks"] for phase in phases)


def test_a_change_of_the_program_that_is_not_announced_fails_a_step(monkeypatch):
    """The loop would compile it on the budget."""
    advance = DirectionController.advance
    monkeypatch.setattr(DirectionController, "advance", lambda self, moment: advance(self, moment) and False)
    monkeypatch.setattr(compile_matrix, "MOMENTS", 4)
    run = trace("RALEARN0")
    assert len(run["phases"]) == 1 and run["phases"][0]["anew"] > 0 and compile_matrix.broken(row(run))


# Which steps, and what is refused

def test_steps_that_differ_only_in_training_are_one_program():
    study = Study(TINY)
    v0, *others = (compile_matrix.program(study.resolve(step).config) for step in ("V0", "P0", "S1", "B1", "V1"))
    assert [other == v0 for other in others] == [True, True, True, False]


def test_without_steps_all_there_are_and_the_overrides_of_studies_are_traced():
    found = compile_matrix.all_steps("V0")
    assert found[0] == "V0" and set(step_files()) | {"V1@RA_GATES_FIXED=y"} <= set(found) and len(set(found)) == len(found)


def test_bad_input_is_refused_before_anything_is_built(tmp_path):
    assert refusal(compile_matrix.main, ["V11X"])[0] == "there is no step 'V11X'."
    assert refusal(compile_matrix.main, ["--layers", "0"])[0] == "--layers 0 is below 1."
    nowhere = tmp_path / "none"
    assert refusal(compile_matrix.main, ["V0", "--out", str(nowhere / "a.json")])[0] == f"there is no folder {nowhere}."


# The committed result

def test_the_committed_tables_are_what_the_files_beside_them_hold_and_every_step_passes(capsys):
    folder = ROOT / "docs/results/compile-matrix"
    page = (folder / "README.md").read_text()
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    assert [path.stem for path in files] == sorted(re.findall(r"^### (\S+)$", page, re.M))
    traced = set()
    for path in files:
        compile_matrix.main(["--show", str(path)])
        assert capsys.readouterr().out in page
        rows = json.loads(path.read_text())["rows"]
        assert not any(map(compile_matrix.broken, rows))
        traced |= {row["step"] for row in rows}
    assert set(step_files()) <= traced, "run make compile-matrix for a new step"
