"""The report's content from records made up on disk: every cell is there, and no number is more than it can be."""

import json
import math
import os
import shutil

import pytest

from lib import results, tuning
from lib.cells import expand
from lib.config import Study
from lib.plan import Options, Plan
from lib.report.content import content, failures
from tests.harness import MEASURED, TINY, finish, refusal, snapshot


@pytest.fixture
def study(dotconfig, tmp_path):
    """study("V0 V1", "BASELINE=...", V1=[3.1, None, "failed"]): a study whose cells ended so, seed by seed; its plan."""
    def build(steps="V0 V1", *assignments, seeds="1 2 3", write=True, **losses):
        dotconfig(*TINY, "SEED=1", f'ABLATION_STEPS="{steps}"', f'SEEDS="{seeds}"', f'OUTPUT_DIR="{tmp_path}/out"',
                  'STUDY="mine"', *assignments)
        if write:
            Plan(Options()).write()
        for cell in expand(Study(), range(1, 1 + max(map(len, losses.values()), default=0))):
            wanted = losses.get(cell.step) or losses.get(f"{cell.step}_{cell.optimizer}")
            end = wanted[cell.seed - 1] if wanted and len(wanted) >= cell.seed else None
            if isinstance(end, str):
                finish(tmp_path / "out", cell, state=end, reason=f"it {end}")
            elif end is not None:
                finish(tmp_path / "out", cell, val_loss=end, val_perplexity=math.exp(end) if end < 700 else None)
        return Plan(Options())
    return build


def steps(found):
    return {step["name"]: step for step in found["steps"]}


def words(found):
    return {name: step["comparison"]["word"] for name, step in steps(found).items() if step["comparison"]}


V0, BELOW = [3.00, 3.02, 3.05], [2.90, 2.921, 2.949]
CURVE = [{"iteration": i, "tokens": 1000 * i, "train_seconds": 2.0 * i, "val_loss": 4 - i / 100,
          "unified_ra_w_rec/layer0": i / 8, "unified_ra_w_rec/layer1": i / 4} for i in (50, 100)]


def rows(out, name, *lines):
    (out / name / "metrics.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))


def test_cells_that_went_on_from_a_checkpoint_are_counted(study):
    plan = study(V0=V0, V1=BELOW)
    assert content(plan)["notes"] == []
    for cell in plan.cells[:2]:
        finish(plan.out, cell, val_loss=3.0, resumed=2)
    assert content(Plan(Options()))["notes"] == ["2 of 6 finished cells went on from a checkpoint"]


def test_a_study_in_full(study):
    found = content(study(V0=V0, V1=BELOW))
    assert found["complete"] and found["title"] == "mine" and found["baseline"] == "V0" and found["plan"]["test"] == "fixed"
    assert words(found) == {"V1": "BETTER"} and found["plan"]["comparisons"] == 1 and found["plan"]["seeds"] == [1, 2, 3]
    c = steps(found)["V1"]["comparison"]
    assert c["difference"] == pytest.approx(-0.1) and c["low"] < c["difference"] < c["high"] and c["method"] == "paired"
    assert c["by_seed"] == pytest.approx({"1": -0.1, "2": -0.099, "3": -0.101})
    assert steps(found)["V0"]["comparison"] is None and steps(found)["V0"]["is_baseline"]
    assert steps(found)["V1"]["mean"]["val_loss"] == pytest.approx(2.92333, abs=1e-5)
    assert steps(found)["V1"]["differs"]["RA_R"] == [None, 4] and "SEED" not in steps(found)["V1"]["differs"]
    assert found["noise"]["sd"] == pytest.approx(0.02517, abs=1e-5) and found["data"]["name"] == "pystdlib"


def test_it_is_strict_json(study):
    found = content(study("V0 V1 V2", V0=[3.0, "diverged", 900.0], V1=["failed", None, 3.2]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_half_a_study(study):
    found = content(study("V0 V1 V2", V0=V0, V1=[2.9, None, None]))
    assert words(found) == {"V1": "INCOMPLETE", "V2": "INCOMPLETE"} and not found["complete"]
    assert steps(found)["V1"]["states"] == {"done": 1, "planned": 2} and steps(found)["V1"]["seeds_done"] == 1
    assert steps(found)["V2"]["mean"]["val_loss"] is None


def test_nothing_at_all(study):
    found = content(study(write=False))
    assert words(found) == {"V1": "INCOMPLETE"} and found["data"] is None and found["noise"] is None
    assert found["plan"]["hash"], "the plan that the first cell would start under"


def test_another_baseline(study):
    found = content(study("V0 V1", 'BASELINE="V1"', V0=V0, V1=BELOW))
    assert found["baseline"] == "V1" and words(found) == {"V0": "WORSE"}


def test_each_optimizer_is_compared_with_its_own_baseline(study):
    found = content(study("V0 V1", 'OPTIMIZERS="adamw sinkgd"', V0_adamw=V0, V1_adamw=BELOW, V0_sinkgd=[5.0, 5.1, 5.3],
                          V1_sinkgd=[5.5, 5.61, 5.79]))
    assert words(found) == {"V1 adamw": "BETTER", "V1 sinkgd": "WORSE"} and found["plan"]["comparisons"] == 2


def test_a_step_with_an_optimizer_of_its_own_is_compared_with_the_only_baseline(study):
    found = content(study("V0 V0@OPTIMIZER_ADAMW=y", V0=V0, **{"V0@OPTIMIZER_ADAMW=y": BELOW}))
    assert words(found) == {"V0@OPTIMIZER_ADAMW=y": "BETTER"}


def test_contrasts_are_a_family_of_their_own(study):
    found = content(study("V0 V1 V2 V3", 'CONTRASTS="V2:V1 V3:V1"', V0=V0, V1=BELOW, V2=[2.95, 2.97, 3.0],
                          V3=[2.9, 2.93, None]))
    assert words(found) == {"V1": "BETTER", "V2": "BETTER", "V3": "INCOMPLETE"} and found["plan"]["comparisons"] == 3
    two, three = found["contrasts"]
    assert (two["name"], two["step"], two["reference"]) == ("V2 vs V1", "V2", "V1")
    assert two["comparison"]["word"] == "WORSE" and two["comparison"]["difference"] == pytest.approx(0.05)
    assert two["comparison"]["by_seed"] == pytest.approx({"1": 0.05, "2": 0.049, "3": 0.051})
    assert two["comparison"]["p_holm"] == pytest.approx(2 * two["comparison"]["p"]), "one of two in the plan"
    assert three["comparison"]["word"] == "INCOMPLETE"
    assert "2 contrasts" in found["plan"]["sentence"]


def test_contrasts_that_were_taken_out_still_count(study):
    study("V0 V1 V2 V3", 'CONTRASTS="V2:V1 V3:V1"', V0=V0, V1=BELOW, V2=V0, V3=V0)
    found = content(study("V0 V1 V2 V3", 'CONTRASTS="V3:V1"'))
    (one,) = found["contrasts"]
    assert found["plan"]["contrasts"] == 2 and one["comparison"]["p_holm"] == pytest.approx(2 * one["comparison"]["p"])


def test_a_contrast_that_is_added_after_a_look_counts_as_chosen_from_all_pairs(study):
    study("V0 V1 V2 V3", V0=V0, V1=BELOW, V2=V0, V3=V0)
    found = content(study("V0 V1 V2 V3", 'CONTRASTS="V3:V1"', write=False))
    (one,) = found["contrasts"]
    assert found["plan"]["contrasts"] == 3 and one["comparison"]["p_holm"] == pytest.approx(3 * one["comparison"]["p"])
    assert ("contrasts that no plan had on record before the first result (V3:V1) may have been chosen by it, so contrasts are "
            "corrected for all 3 that there could be") in found["notes"]


def test_a_contrast_of_steps_with_optimizers_of_their_own(study):
    own = "V2@OPTIMIZER_ADAMW=y"
    found = content(study(f"V0 V1 {own}", f'CONTRASTS="{own}:V1"', V0=V0, V1=BELOW, **{own: V0}))
    assert [(c["name"], c["comparison"]["word"]) for c in found["contrasts"]] == [(f"{own} vs V1", "WORSE")]
    assert found["plan"]["contrasts"] == 1


def test_a_contrast_with_the_baseline_is_left_out_with_a_note(study):
    found = content(study("V0 V1 V2", 'BASELINE="V1"', 'CONTRASTS="V2:V1 V3:V2"', V0=V0, V1=BELOW, V2=V0))
    assert found["contrasts"] == [] and found["plan"]["contrasts"] == 0
    assert "no contrast V2:V1 V3:V2: one of the steps is not in the study, or is its baseline" in found["notes"]


def test_contrasts_stay_under_each_optimizer(study):
    found = content(study("V0 V1 V2", 'OPTIMIZERS="adamw sinkgd"', 'CONTRASTS="V2:V1"', V1_adamw=V0, V2_adamw=BELOW,
                          V1_sinkgd=BELOW, V2_sinkgd=V0))
    assert {c["name"]: c["comparison"]["word"] for c in found["contrasts"]} == {
        "V2 adamw vs V1 adamw": "BETTER", "V2 sinkgd vs V1 sinkgd": "WORSE"}


def test_a_study_without_contrasts_has_none(study):
    assert content(study(V0=V0, V1=BELOW))["contrasts"] == []


def test_every_machine_is_named(study, tmp_path):
    study(V0=V0, V1=BELOW)
    for cell in expand(Study(), [3]):
        finish(tmp_path / "out", cell, val_loss=3.05 - 0.101 * (cell.step == "V1"), train_loss=1.0 * (cell.step == "V1"),
               environment=dict(MEASURED["environment"], device="another CPU"))
    found = content(Plan(Options()))
    assert found["environment"]["device"] == "a CPU and another CPU" and words(found) == {"V1": "BETTER"}


def test_an_override_stands_in_the_title(study, monkeypatch):
    monkeypatch.setenv("GPT2_MAX_TIME", "60")
    assert content(study(seeds="1", write=False))["title"] == "mine with GPT2_MAX_TIME=60"


# What was done to the results

def test_the_order_of_folders_changes_nothing(study, monkeypatch):
    plan = study("V0 V1", V0=V0, V1=BELOW)
    expected = content(plan)
    scandir = os.scandir

    class Backwards(list):
        def __init__(self, path="."):
            super().__init__(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert content(Plan(Options())) == expected


def test_a_deleted_seed_falls_back_to_welch_and_is_missing(study, tmp_path):
    study(V0=V0, V1=BELOW)
    shutil.rmtree(tmp_path / "out/test_V1_adamwspam_none_s2")
    c = steps(content(Plan(Options())))["V1"]["comparison"]
    assert (c["word"], c["method"], c["n"], c["n_baseline"]) == ("INCOMPLETE", "welch", 2, 3)
    assert c["sentence"].endswith("Welch, because the seeds differ: 2 and 3): INCOMPLETE; missing: V1 seed 2 planned.")


@pytest.mark.parametrize("name", ["test_V1_adamwspam_none_copy", "test_V1_adamwspam_none_s9"])
def test_a_duplicated_seed_is_refused(study, tmp_path, name):
    study(V0=V0, V1=BELOW)
    shutil.copytree(tmp_path / "out/test_V1_adamwspam_none_s2", tmp_path / "out" / name)
    assert refusal(lambda: content(Plan(Options()))) == (
        f"{tmp_path}/out/{name} holds V1 seed 2 a second time (first in test_V1_adamwspam_none_s2).",
        "move one of the two folders away.")


def test_another_data_hash_is_invalid(study, tmp_path):
    study("V0 V1 V2", V0=V0, V1=BELOW, V2=[3.3, 3.4, 3.6])
    path = tmp_path / "out/test_V1_adamwspam_none_s2/metrics.json"
    record = json.loads(path.read_text().replace("0123456789abcdef", "0123456789abcdee"))
    path.write_text(json.dumps(record | {"checksum": results.checksum(record)}))
    found = content(Plan(Options()))
    c = steps(found)["V1"]["comparison"]
    assert words(found)["V1"] == "INVALID" and words(found)["V2"] != "INVALID"
    assert c["difference"] is None and c["by_seed"] == {}
    assert (c["equal_tokens"], c["equal_seconds"], c["speed"]) == (None, None, None)
    assert c["gates"] == ["evaluation data differs: V1 seed 2 has '0123456789abcdee', V1 seed 1 '0123456789abcdef'"]


def test_a_step_whose_mechanism_never_acted_is_invalid(study, tmp_path):
    study(V0=V0, V1=BELOW)
    cell = expand(Study(), [3])[1]
    finish(tmp_path / "out", cell, val_loss=2.949, inactive="h.0.attn: the coupling stayed at 0")
    found = content(Plan(Options()))
    assert words(found) == {"V1": "INVALID"}
    assert "mechanism never active: V1 seed 3: h.0.attn: the coupling" in steps(found)["V1"]["comparison"]["sentence"]


@pytest.mark.parametrize("budget, beside, said", [
    ("GPT2_MAX_TIME=60", (True, True, None), 2), ("GPT2_MAX_TIME=60", (False, False, None), 0),
    ("GPT2_MAX_ITERS=60", (True, True, True), 0)])
def test_company_under_a_budget_of_seconds_is_said(study, tmp_path, monkeypatch, budget, beside, said):
    monkeypatch.setenv(*budget.split("="))
    plan = study("V0", write=False)
    for cell, shared in zip(expand(plan.study), beside, strict=True):
        finish(plan.out, cell, val_loss=3 + cell.seed / 100, shared_device=shared)
    notes = [note for note in content(Plan(Options()))["notes"] if "beside another one" in note]
    assert [note.split(" ran")[0] for note in notes] == ([f"{said} of 3 cells"] if said else [])


@pytest.mark.parametrize("gpus, told", [("abb", True), ("aab", False), ("aaa", False), ("a?b", False)])
def test_an_arm_that_never_had_a_gpu_of_the_baseline_is_told(study, gpus, told):
    """gpus: that of V0, of V1, and of V1 at the second seed; '?' for a cell that nobody has asked for it."""
    plan = study(V0=V0[:2], V1=BELOW[:2], seeds="1 2")
    for cell in plan.common:
        of = gpus[0] if cell.step == "V0" else gpus[1:][cell.seed - 1]
        environment = MEASURED["environment"] | ({} if of == "?" else {"device_id": of})
        (plan.out / cell.name / "metrics.json").unlink()
        finish(plan.out, cell, environment=environment)
    notes = [note for note in content(Plan(Options()))["notes"] if "never ran on a GPU" in note]
    assert notes == (["V1 never ran on a GPU that V0 ran on: a difference of speed, or at equal seconds, may be that of the "
                      "GPUs (more seeds take turns)"] if told else [])


def test_a_report_changes_nothing(study, tmp_path):
    plan = study(V0=V0, V1=BELOW)
    before = snapshot(tmp_path / "out")
    content(plan)
    assert snapshot(tmp_path / "out") == before


# Seeds after a look

def test_seeds_added_after_a_look_are_marked_and_judged_by_the_anytime_test(study, tmp_path):
    study(V0=V0, V1=BELOW)
    Plan(Options(seeds="5")).write()
    for cell in expand(Study(), [4, 5]):
        finish(tmp_path / "out", cell, val_loss=(3.0 if cell.step == "V0" else 2.9) + cell.seed / 57, train_loss=cell.seed / 3)
    found = content(Plan(Options()))
    assert found["plan"]["test"] == "anytime" and found["plan"]["later_seeds"] == [4, 5] and words(found) == {"V1": "BETTER"}
    assert [c["seed"] for c in steps(found)["V1"]["cells"] if c["later"]] == [4, 5]
    assert steps(found)["V1"]["comparison"]["n"] == 5, "a report leaves no finished seed out, whatever SEEDS says now"
    assert found["notes"][0] == ("seeds 4 5 were added after a look at the results, so all verdicts are by the anytime-valid "
                                 "test; what the first look claimed has spent an error rate of its own")


def test_a_look_at_one_seed_marks_the_others_and_keeps_the_test(study, tmp_path):
    study(seeds="1", V0=V0[:1], V1=BELOW[:1])
    Plan(Options(seeds="3")).write()
    found = content(study(seeds="1", write=False, V0=V0, V1=BELOW))
    assert found["plan"]["test"] == "fixed" and found["plan"]["later_seeds"] == [2, 3] and words(found) == {"V1": "BETTER"}
    assert found["notes"][0].endswith("of fewer than 3 seeds, from which no verdict could come")


def finish_seeds(out, *seeds, steps=("V0", "V1"), below=0.1):
    for cell in expand(Study(), list(seeds)):
        if cell.step in steps:
            finish(out, cell, val_loss=3 + cell.seed / 57 - below * (1 + cell.seed / 100) * (cell.step != "V0"),
                   train_loss=cell.seed / 3)


def test_a_plan_is_not_shortened(study, tmp_path):
    """Eight seeds planned, five finished, and a report with SEEDS=3 in .config: no verdict before the eight are there."""
    study(write=False)
    Plan(Options(seeds="8")).write()
    finish_seeds(tmp_path / "out", 1, 2, 3, 4, 5)
    found = content(Plan(Options()))
    assert words(found) == {"V1": "INCOMPLETE"} and not found["complete"] and steps(found)["V1"]["seeds_planned"] == 8
    assert [c.seed for c, _, runs in Plan(Options()).rows() if runs] == [], "but nothing runs that was not asked for"
    Plan(Options()).write()
    assert words(content(Plan(Options()))) == {"V1": "INCOMPLETE"}


def test_cells_that_appear_after_a_look_are_seeds_added_after_a_look(study, tmp_path):
    study(V0=V0, V1=BELOW)
    finish_seeds(tmp_path / "out", 4, 5, 6, 7)
    found = content(Plan(Options()))
    assert found["plan"]["test"] == "anytime" and found["plan"]["later_seeds"] == [4, 5, 6, 7]
    assert not found["plan"]["on_record"]


def test_a_failed_cell_of_a_planned_seed_stays_a_row(study, tmp_path):
    study(write=False)
    Plan(Options(seeds="5")).write()
    finish_seeds(tmp_path / "out", 1, 2, 3, 4)
    finish_seeds(tmp_path / "out", 5, steps=("V0",))
    finish(tmp_path / "out", expand(Study(), [5])[1], state="failed", reason="out of memory")
    found = content(Plan(Options()))
    assert words(found) == {"V1": "INCOMPLETE"} and steps(found)["V1"]["states"] == {"done": 4, "failed": 1}
    assert failures(Plan(Options())) == ["V1 seed 5 (failed)"]


def test_what_is_changed_after_a_look_is_said_and_still_counted(study):
    study("V0 V1 V2 V3", V0=V0, V1=BELOW, V2=[3.1, 3.13, 3.14], V3=[3.3, 3.31, 3.36])
    before = steps(content(Plan(Options())))["V1"]["comparison"]["p_holm"]
    found = content(study("V0 V1", 'MARGIN="0.5"', write=False))
    assert steps(found)["V1"]["comparison"]["p_holm"] == before and found["plan"]["comparisons"] == 3
    assert any(note.startswith("the plan's margin was changed after a look") for note in found["notes"])
    assert any(note.startswith("V2 adamwspam, V3 adamwspam were taken from the plan, and still counted,")
               for note in found["notes"])


def test_a_step_that_is_tried_again_is_one_comparison_more(study):
    study("V0 V1", V0=V0, V1=[3.3, 3.31, 3.36])
    study("V0 V1@RA_R=8", V0=V0, **{"V1@RA_R=8": BELOW})
    assert content(Plan(Options()))["plan"]["comparisons"] == 2


def test_a_report_between_two_looks_keeps_the_last_one(study, tmp_path):
    """Half of the next block is there; and a hole is not passed over."""
    study(write=False)
    Plan(Options(until="decided", max_seeds="8")).write()
    finish_seeds(tmp_path / "out", 1, 2, 3, 4)
    finish_seeds(tmp_path / "out", 5, steps=("V0",))
    for options in (Options(), Options(until="decided", max_seeds="8")):
        found = content(Plan(options))
        assert words(found) == {"V1": "BETTER"} and steps(found)["V1"]["comparison"]["n"] == 4
        assert found["plan"]["on_record"] and found["plan"]["max_seeds"] == 8
    shutil.rmtree(tmp_path / "out/test_V1_adamwspam_none_s2")
    assert words(content(Plan(Options()))) == {"V1": "INCOMPLETE"}


def test_half_of_a_study_on_two_machines_is_incomplete_not_invalid(study, tmp_path):
    study("V0 V1", V0=V0[:2], V1=BELOW[:2])
    elsewhere = dict(MEASURED["environment"], device="another CPU")
    finish(tmp_path / "out", expand(Study(), [3])[0], val_loss=3.05, environment=elsewhere)
    found = content(Plan(Options()))
    assert words(found) == {"V1": "INCOMPLETE"} and steps(found)["V1"]["comparison"]["n"] == 2


def test_a_sweep_that_is_not_finished_is_said(study, tmp_path):
    study(V0=V0, V1=BELOW)
    for cell in tuning.sweep(Study(), tmp_path / "out").cells:
        if cell.step != "V1":
            finish(tmp_path / "out", cell, val_loss=3.0)
        else:
            finish(tmp_path / "out", cell, state="failed", reason="out of memory")
    found = content(Plan(Options()))
    assert "the learning-rate sweep is not finished, so no step is compared at its best rate" in found["notes"]
    assert "V1 in the learning-rate sweep: failed: out of memory" in found["notes"]
    assert failures(Plan(Options())) == ["V1 seed 10001 (failed)"]


def test_a_file_among_the_cells_is_no_cell(study, tmp_path):
    study(V0=V0, V1=BELOW)
    (tmp_path / "out/test_notes.txt").write_text("mine")
    assert words(content(Plan(Options()))) == {"V1": "BETTER"}


# Both views

def test_equal_tokens_equal_seconds_and_speed(study, tmp_path):
    """V1 is half as fast under an iteration budget: at V0's seconds it was in the middle of its last interval."""
    study(seeds="1", V0=[3.0], V1=[2.9])
    out = tmp_path / "out"
    v0, v1 = expand(Study(), [1])
    finish(out, v0, val_loss=3.0, tokens=100_000, train_seconds=100.0, tokens_per_second=1000.0)
    finish(out, v1, val_loss=2.9, tokens=100_000, train_seconds=200.0, tokens_per_second=500.0)
    rows(out, v0.name, {"tokens": 100_000, "train_seconds": 100.0, "val_loss": 3.0})
    rows(out, v1.name, {"tokens": 25_000, "train_seconds": 50.0, "val_loss": 3.7}, {"tokens": 75_000, "train_seconds": 150.0,
         "val_loss": 3.3}, {"tokens": 100_000, "train_seconds": 200.0, "val_loss": 2.9})
    c = steps(content(Plan(Options())))["V1"]["comparison"]
    assert c["equal_tokens"] == {"difference": pytest.approx(-0.1), "low": None, "high": None, "n": 1, "at": 100_000}
    assert c["equal_seconds"] == {"difference": pytest.approx(0.5), "low": None, "high": None, "n": 1, "at": 100.0}
    assert c["speed"] == {"ratio": pytest.approx(0.5), "low": None, "high": None, "n": 1}


def test_a_view_that_the_curve_does_not_reach_is_missing(study, tmp_path):
    study(seeds="1", V0=[3.0], V1=[2.9])
    finish(tmp_path / "out", expand(Study(), [1])[1], val_loss=2.9, train_seconds=200.0)
    rows(tmp_path / "out", "test_V1_adamwspam_none", {"tokens": 100_000, "train_seconds": 199.0, "val_loss": 3.0})
    assert steps(content(Plan(Options())))["V1"]["comparison"]["equal_seconds"] is None


def test_curves_and_gates_are_read_and_damaged_lines_left_out(study, tmp_path):
    study(seeds="1", V0=[3.0], V1=[2.9])
    damaged = ('{"val_loss": 3, "tok', '{"val_loss": null}', '["val_loss"]')
    rows(tmp_path / "out", "test_V1_adamwspam_none", CURVE[0], *damaged, CURVE[1])
    found = steps(content(Plan(Options())))["V1"]
    assert found["curves"] == [{"seed": 1, "tokens": [50_000, 100_000], "seconds": [100.0, 200.0], "val_loss": [3.5, 3.0]}]
    assert found["gates_by_layer"] == [
        {"seed": 1, "name": "unified_ra_w_rec", "layer": layer, "tokens": [50_000, 100_000], "value": [50 / over, 100 / over]}
        for layer, over in ((0, 8), (1, 4))]


# Controls, failures, the sweep

@pytest.mark.parametrize("step, losses, failure", [
    ("A0", [2.90, 2.921, 2.949], "control A0 should show no difference from V0, but: A0 vs V0: -0.1000 nats"),
    ("A0", [3.01, 3.0, 3.06], None),
    ("P0", [3.10, 3.121, 3.149], None),
    ("P0", [3.0001, 3.0202, 3.0499], "control P0 should show a loss against V0, but: P0 vs V0: +0.0001 nats"),
    ("OG0", [3.10, 3.121, 3.149], "control OG0 should show a gain over V0, but: OG0 vs V0: +0.1000 nats"),
    ("OG0", [2.90, 2.921, 2.949], None)])
def test_controls_say_whether_the_instrument_works(study, step, losses, failure):
    found = content(study("V0", f'CONTROL_STEPS="{step}"', V0=V0, **{step: losses}))
    assert steps(found)[step]["control"] in ("null", "harm", "gain")
    assert [f.startswith(failure) for f in found["control_failures"]] == [True] if failure else not found["control_failures"]


def test_what_ended_without_a_result_is_named_with_its_reason(study):
    plan = study("V0 V1", V0=[3.0, "failed", "diverged"], V1=["failed", "failed", 3.0])
    found = content(plan)
    for line in ("V0 seed 2: failed: it failed", "V0 seed 3: diverged: it diverged", "V1 seed 1: failed: it failed"):
        assert line in found["notes"]
    assert failures(plan) == ["V1 seed 1 (failed)", "V0 seed 2 (failed)", "V1 seed 2 (failed)"]
    assert words(found) == {"V1": "INVALID"}, "a baseline that diverged is compared with nothing"


def test_a_stale_cell_is_missing(study):
    study("V0 V1", "BATCH_SIZE=9", V0=V0, V1=BELOW)
    found = content(study("V0 V1", write=False))
    assert words(found) == {"V1": "INCOMPLETE"} and failures(Plan(Options())) == []
    assert "V0 seed 1: stale: its result is of another configuration: BATCH_SIZE 9 -> 8" in found["notes"]


def test_contrasts_are_of_the_common_rates(study, tmp_path):
    study("V0 V1 V2", 'CONTRASTS="V2:V1"', V0=V0, V1=V0, V2=BELOW)
    out = tmp_path / "out"
    for cell in tuning.sweep(Study(), out).cells:
        finish(out, cell, val_loss=3.0 - 0.1 * ("MULT=2" in cell.step))
    for cell in Plan(Options()).tuned_cells:
        finish(out, cell, val_loss=2.8 + cell.seed / 37 + 0.5 * cell.step.startswith("V2"), train_loss=cell.seed / 3)
    found = content(Plan(Options()))
    assert len(found["steps"]) == 6 and [c["name"] for c in found["contrasts"]] == ["V2 vs V1"]
    assert found["contrasts"][0]["comparison"]["word"] == "BETTER", "and worse at the best ones"


def test_the_sweep_and_the_tuned_family(study, tmp_path):
    study(V0=V0, V1=BELOW)
    out = tmp_path / "out"
    for cell in tuning.sweep(Study(), out).cells:
        finish(out, cell, val_loss=3.0 - 0.1 * (cell.step in ("V0@LEARNING_RATE_MULT=2", "V1")))
    for cell in Plan(Options()).tuned_cells:
        if cell.step.startswith("V0@"):
            finish(out, cell, val_loss=2.8 + cell.seed / 37, train_loss=cell.seed / 3)
    found = content(Plan(Options()))
    assert words(found) == {"V1": "BETTER", "V1 (tuned lr x1)": "WORSE"}
    assert [s["tuned"] for s in found["steps"]] == [None, None, 1.0, 2.0] and found["plan"]["comparisons"] == 1
    assert found["sweep"][0] == {"step": "V0", "optimizer": "adamwspam", "best": 2.0, "at_end": True,
                                 "losses": {"0.5": 3.0, "1": 3.0, "2": 2.9}, "diverged": []}
    assert "V0: the best learning rate, x2, is at the end of the sweep: widen TUNE_LR" in found["notes"]


def test_the_made_up_record_is_complete():
    """Or the report would be tested on records that no cell writes."""
    set_elsewhere = {"format", "state", "reason", "inactive", "study", "step", "optimizer", "seed", "identity", "checksum"}
    assert MEASURED.keys() == set(results.KEYS) - set_elsewhere


def test_every_step_says_its_function_class(study):
    steps = {step["name"]: step["function_class"] for step in content(study("V0 V1 V1T V2", V0=V0))["steps"]}
    assert {name: one["shown"] for name, one in steps.items()} == {"V0": "V0", "V1": "V0", "V1T": "inside V0", "V2": "V2"}
    assert steps["V1"]["sentence"] == "V1 is V0 in function class: a difference is optimisation only"
    assert steps["V0"]["relation"] == steps["V2"]["relation"] == "own"
