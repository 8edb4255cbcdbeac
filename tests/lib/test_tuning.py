"""The learning-rate sweep: equal for every step, under seeds of its own, and complete or not used."""

import pytest

from lib import tuning
from lib.arms import compare, group
from lib.config import Study
from lib.plan import Options, Plan
from tests.harness import TINY, finish, refusal

SWEEP = 10_001  # the base seed and the offset


@pytest.fixture
def study(dotconfig, tmp_path):
    def configure(steps="V0 V1", *assignments):
        dotconfig(*TINY, "SEED=1", f'ABLATION_STEPS="{steps}"', 'SEEDS="3"', f'OUTPUT_DIR="{tmp_path}/out"', *assignments)
        return tmp_path / "out"
    return configure


def sweep(out, **losses):
    """Finish the sweep: V0=(loss at x0.5, at x1, at x2); None leaves a cell out, a word is its state."""
    found = tuning.sweep(Study(), out)
    for (step, multiple), spec in found.steps.items():
        loss = losses[step.partition("@")[0]][tuning.multiples(Study()).index(multiple)]
        for cell in (c for c in found.cells if c.step == spec):
            if isinstance(loss, str):
                finish(out, cell, state=loss, reason="it did")
            elif loss is not None:
                finish(out, cell, val_loss=loss)
    return tuning.sweep(Study(), out)


def test_every_step_runs_at_the_same_multiples_and_the_same_cost(study):
    out = study("V0 V1@RA_R=8 P0")
    found = tuning.sweep(Study(), out)
    assert [cell.step for cell in found.cells] == [
        "V0@LEARNING_RATE_MULT=0.5", "V0", "V0@LEARNING_RATE_MULT=2", "V1@RA_R=8,LEARNING_RATE_MULT=0.5", "V1@RA_R=8",
        "V1@RA_R=8,LEARNING_RATE_MULT=2"], "controls are not swept"
    assert {cell.seed for cell in found.cells} == {SWEEP}
    assert {c.resolved.config.GPT2_MAX_ITERS for c in found.cells} == {250}


def test_a_multiple_is_of_the_steps_own_rate(study):
    out = study("V0 V1@LEARNING_RATE_MULT=3")
    found = tuning.sweep(Study(), out)
    assert [c.resolved.config.LEARNING_RATE_MULT for c in found.cells][3:] == [1.5, 3.0, 6.0]


def test_the_best_rate_of_each_step(study):
    found = sweep(study(), V0=(3.0, 3.1, 3.2), V1=(3.3, 3.2, "diverged"))
    assert found.best() == {("V0", "adamwspam"): 0.5, ("V1", "adamwspam"): 1.0}


@pytest.mark.parametrize("missing", [None, "failed"])
def test_half_a_sweep_is_not_used(study, missing):
    out = study()
    assert sweep(out, V0=(3.0, 3.1, 3.2), V1=(3.3, 3.2, missing)).best() is None
    assert Plan(Options()).tuned_cells == []


def test_tuned_arms_run_under_the_studys_seeds_and_are_compared_with_the_tuned_baseline(study):
    out = study()
    sweep(out, V0=(3.0, 3.1, 3.2), V1=(3.3, 3.2, 3.4))
    plan = Plan(Options())
    assert [(c.step, c.seed) for c in plan.tuned_cells] == [
        (step, seed) for seed in (1, 2, 3) for step in ("V1", "V0@LEARNING_RATE_MULT=0.5")]
    assert len(plan.cells) == 9, "V1 at its best rate is V1"
    assert SWEEP not in {c.seed for c in [*plan.cells, *plan.more]}
    for cell in plan.cells:
        finish(out, cell, val_loss=3 + cell.seed / 37 + 0.1 * (cell.step == "V0"), train_loss=float(cell.seed))
    plan = Plan(Options())
    groups = group(plan.study, plan.found(plan.tuned_cells), plan.tuned)
    found, = compare(plan.study, groups, plan.seeds, "fixed").values()
    assert found.sentence.startswith("V1 (tuned lr x1) vs V0 (tuned lr x0.5): 0.0000 nats")
    common, = compare(plan.study, group(plan.study, plan.found(plan.common)), plan.seeds, "fixed").values()
    assert common.sentence.startswith("V1 vs V0: -0.1000 nats")


def test_where_the_common_rate_is_everyones_best_there_is_nothing_new(study):
    out = study()
    sweep(out, V0=(3.2, 3.1, 3.2), V1=(3.3, 3.2, 3.4))
    assert Plan(Options()).tuned_cells == []


def test_the_plan_of_a_sweep_runs_the_sweep_alone(study):
    out = study()
    plan = Plan(Options(tune=True))
    plan.write()
    assert len(plan.rows()) == 6 and (out / "cells.mk").read_text().count(f"--seed {SWEEP}") == 6
    assert not tuning.started(Study(), out)
    sweep(out, V0=(3.0, 3.1, 3.2), V1=(None, None, None))
    assert tuning.started(Study(), out) and sum(runs for _, _, runs in Plan(Options(tune=True)).rows()) == 3


def test_a_step_that_always_diverges_keeps_its_own_rate(study):
    out = study()
    assert sweep(out, V0=(3.0, 3.1, 3.2), V1=("diverged",) * 3).best()["V1", "adamwspam"] == 1.0


def test_two_steps_that_meet_at_one_rate_are_one_cell(study):
    out = study("V0 V1 V1@LEARNING_RATE_MULT=2")
    found = tuning.sweep(Study(), out)
    assert len({c.name for c in found.cells}) == len(found.cells) == 8


def test_each_optimizer_has_a_best_rate_of_its_own(study):
    out = study("V0 V1", 'OPTIMIZERS="adamw sinkgd"')
    found = tuning.sweep(Study(), out)
    for cell in found.cells:
        low = "0.5" if cell.optimizer == "adamw" else "MULT=2"
        finish(out, cell, val_loss=3.0 - (low in cell.step))
    plan = Plan(Options())
    assert set(plan.tuned.values()) == {(s, m) for s in ("V0", "V1") for m in (0.5, 2.0)}
    assert {(c.step, c.optimizer) for c in plan.tuned_cells} == {
        (f"{s}@LEARNING_RATE_MULT={m}", o) for s in ("V0", "V1") for m, o in (("0.5", "adamw"), ("2", "sinkgd"))}


@pytest.mark.parametrize("grid, what", [
    ("0.5 x", "TUNE_LR: LEARNING_RATE_MULT=x is not a number."), ("1", "TUNE_LR='1' is no sweep."),
    ("", "TUNE_LR='' is no sweep."), ("0 1", "TUNE_LR='0 1' is no sweep."),
    ("-2 1", "TUNE_LR: LEARNING_RATE_MULT=-2 is outside its range 0.0..1000.0.")])
def test_a_grid_that_is_none_is_refused(study, grid, what):
    out = study("V0 V1", f'TUNE_LR="{grid}"')
    assert refusal(tuning.sweep, Study(), out)[0] == what


def test_the_common_rate_is_always_part_of_the_sweep(study):
    study("V0", 'TUNE_LR="0.25, 4"')
    assert tuning.multiples(Study()) == [0.25, 1.0, 4.0]


def test_the_sweeps_seed_is_not_one_of_the_studys(study):
    out = study()
    path = out.parent / "dot.config"
    path.write_text(path.read_text().replace('SEEDS="3"', f'SEEDS="1 {SWEEP}"'))
    assert refusal(Plan, Options())[0] == f"seed {SWEEP} is the learning-rate sweep's own."
    assert refusal(Plan, Options(seeds=f"1 {SWEEP}", out=str(out)))[0] == f"seed {SWEEP} is the learning-rate sweep's own."


def test_a_step_that_is_not_trained_has_no_rate_to_tune():
    assert tuning.swept_steps(Study("gpt2-kv-compression-ablation+tiny")) == ["V0", "V19"]
