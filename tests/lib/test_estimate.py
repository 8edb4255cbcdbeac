"""What a study will take: speeds from finished cells, several GPUs in both ways, seeds for the margin."""

import pytest

from lib import anytime, estimate, stats
from lib.cells import expand
from lib.config import Study
from lib.estimate import Speed, Work
from lib.plan import Options, Plan
from tests.harness import MEASURED, TINY, finish


@pytest.fixture
def study(dotconfig, tmp_path):
    """study(steps, ...): the cells of such a study in tmp_path/out."""
    def configure(steps="V0 V1", *assignments, jobs=1, budget="GPT2_MAX_ITERS=250"):
        dotconfig(*TINY[:2], TINY[3], budget, "GPT2_GRADIENT_ACCUMULATION=1", f'ABLATION_STEPS="{steps}"', 'SEEDS="3"',
                  f'OUTPUT_DIR="{tmp_path}/out"', f"JOBS={jobs}", *assignments)
        return expand(Study())
    return configure


def done(tmp_path, *cells, **measured):
    finish(tmp_path / "out", *cells, prepared=False, **measured)


OUTSIDE = dict.fromkeys(("compile_seconds", "eval_seconds", "calibration_seconds", "checkpoint_seconds", "other_seconds"), 2.0)


def measured(efficiency=1.0):
    plan = Plan(Options())
    return estimate.measured(plan, plan.cells, efficiency), plan


# Speeds

def test_the_speed_of_an_arm_is_the_mean_of_its_finished_cells(study, tmp_path):
    cells = study()
    for number, cell in enumerate(cells[:5]):
        done(tmp_path, cell, tokens_per_second=100.0 * (1 + number), **OUTSIDE)
    done(tmp_path, cells[5], state="diverged")
    found, _ = measured()
    assert found == {("V0", "adamwspam"): Speed(300.0, 10.0, False, 3), ("V1", "adamwspam"): Speed(300.0, 10.0, False, 2)}


def test_cells_that_had_company_count_where_there_are_no_others(study, tmp_path):
    cells = study()
    done(tmp_path, cells[0], tokens_per_second=100.0, shared_device=True, **OUTSIDE)
    done(tmp_path, cells[2], tokens_per_second=300.0, shared_device=False, **OUTSIDE)
    done(tmp_path, cells[1], tokens_per_second=50.0, shared_device=True, **OUTSIDE)
    found, _ = measured()
    assert found == {("V0", "adamwspam"): Speed(300.0, 10.0, False, 1), ("V1", "adamwspam"): Speed(50.0, 10.0, True, 1)}
    study(jobs=2)
    found, plan = measured()
    assert found["V0", "adamwspam"].tokens_per_second == 200 and estimate.lanes(plan) == 2, "as it is meant to run"


def test_what_ran_on_four_gpus_is_brought_down_to_one(study, tmp_path):
    cells = study()
    done(tmp_path, cells[0], tokens_per_second=320.0, environment=MEASURED["environment"] | {"world_size": 4})
    assert measured(efficiency=0.8)[0]["V0", "adamwspam"].tokens_per_second == 100


def test_an_arm_of_which_nothing_is_known_is_like_the_others(study, tmp_path):
    cells = study("V0 V1 V3 V19 C2")
    done(tmp_path, cells[0], tokens_per_second=100.0, **OUTSIDE)
    done(tmp_path, cells[1], tokens_per_second=200.0, **OUTSIDE)
    found, plan = measured()
    found = estimate.completed(found, plan.cells)
    assert found["V3", "adamwspam"] == Speed(150.0, 10.0, False, 0)
    assert found["C2", "adamwspam"] == Speed(None, 10.0, False, 0), "it only evaluates what its parent has trained"
    evaluated = next(cell for cell in plan.cells if cell.step == "C2")
    assert estimate.work(evaluated, found["C2", "adamwspam"]) == Work(evaluated.name, evaluated.parent, 10.0, 0)


# Several devices

@pytest.mark.parametrize("budget, devices, seconds, tokens", [
    ("GPT2_MAX_ITERS=250", 1, 2570, 256_000), ("GPT2_MAX_ITERS=250", 4, 10 + 2560 / 2, 256_000),
    ("GPT2_MAX_TOKENS=1000", 1, 10 + 10.24, 1024), ("GPT2_MAX_TIME=60", 1, 70, 6000), ("GPT2_MAX_TIME=60", 4, 70, 12_000)])
def test_the_budget_decides_what_more_gpus_give(study, budget, devices, seconds, tokens):
    cell = study("V0", budget=budget)[0]
    found = estimate.work(cell, Speed(100.0, 10.0, False, 1), devices, efficiency=0.5)
    assert (found.seconds, found.tokens) == (pytest.approx(seconds), tokens)


def works(text):
    """'a5 b3<a': works by name, with their seconds and the one they start from."""
    found = []
    for word in text.split():
        word, _, parent = word.partition("<")
        found.append(Work(word[0], parent or None, float(word[1:]), 0))
    return found


@pytest.mark.parametrize("cells, at_once, expected", [
    ("a5 b3 c2", 1, 10), ("a5 b3 c2", 2, 5), ("a5 b3 c2", 8, 5), ("a1 b1 c9", 2, 10), ("", 4, 0),
    ("a5 b3<a", 2, 8), ("a5 b3<a c2", 2, 8), ("a5 b1 c1<a d4", 2, 6), ("b3<z", 1, 3), ("a1 b1 c5<a", 1, 7)])
def test_cells_side_by_side_end_when_the_last_one_does(cells, at_once, expected):
    assert estimate.makespan(works(cells), at_once) == expected


def test_side_by_side_costs_the_same_gpu_hours_and_together_more(study, tmp_path):
    cells = study()
    speeds = estimate.completed({("V0", "adamwspam"): Speed(100.0, 1040.0, False, 1)}, cells)
    one, four = (estimate.side_by_side(cells, speeds, n, 1) for n in (1, 4))
    assert (one.hours, one.device_hours, one.tokens) == (6.0, 6.0, 6 * 256_000), "six cells of 3600 s"
    assert (four.hours, four.device_hours, four.tokens) == (2.0, 6.0, one.tokens)
    assert estimate.side_by_side(cells, speeds, 1, 3).device_hours == 2.0, "three share each"
    all_four = estimate.together(cells, speeds, 4, 0.8)
    assert all_four.hours == pytest.approx(6 * (1040 + 2560 / 3.2) / 3600)
    assert all_four.device_hours == 4 * all_four.hours


# Seeds

DIFFERENCES = {"V1": (0.01, 0.02, 0.03), "V2": (0.01, 0.05, -0.03)}


def lose(tmp_path, cells, seeds=3):
    for cell in cells[:3 * seeds]:
        seed = cell.seed - cells[0].seed
        loss = 3 + 0.1 * seed + DIFFERENCES.get(cell.step, (0, 0, 0))[seed]
        done(tmp_path, cell, val_loss=loss, train_loss=loss)


def test_the_seeds_of_the_margin_are_those_of_the_noisiest_arm(study, tmp_path):
    lose(tmp_path, study("V0 V1 V2"))
    found = estimate.seeds_for_margin(Plan(Options()))
    assert (found.arm, found.known, found.sd) == ("V2", 3, pytest.approx(0.04))
    assert found.needed == stats.seeds_needed(0.04, 0.01, 0.05 / 2)
    study("V0 V1 V2", 'MARGIN="0.05"')
    assert estimate.seeds_for_margin(Plan(Options())).needed == stats.seeds_needed(0.04, 0.05, 0.05 / 2) < found.needed
    study("V0 V1 V2", 'MARGIN="0.0"')
    assert estimate.seeds_for_margin(Plan(Options())) is None


def test_under_looks_it_is_the_anytime_test_that_needs_them(study, tmp_path):
    lose(tmp_path, study("V0 V1 V2", 'MARGIN="0.1"'))
    found = estimate.seeds_for_margin(Plan(Options(until="decided")))
    assert found.needed == anytime.seeds_needed(found.sd, 0.1, 0.05 / 2)


def test_one_seed_tells_no_noise(study, tmp_path):
    cells = study("V0 V1 V2")
    assert estimate.seeds_for_margin(Plan(Options())) is None
    done(tmp_path, cells[1])
    assert estimate.seeds_for_margin(Plan(Options())) is None, "no baseline"
    lose(tmp_path, cells, seeds=1)
    assert estimate.seeds_for_margin(Plan(Options())) is None
