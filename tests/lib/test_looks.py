"""Which seeds run: slices of a plan, other plans, and the blocks of UNTIL=decided."""

import pytest

from lib import design
from lib.cells import expand
from lib.config import Study
from lib.plan import Options, Plan
from tests.harness import TINY, finish, refusal

UNTIL = Options(until="decided", max_seeds="6")


@pytest.fixture
def study(dotconfig, tmp_path):
    """study("3"): configures V0, V1 with these seeds, results in `out`."""
    def configure(seeds="3", *assignments, device=TINY[3], steps="V0 V1"):
        dotconfig(*TINY[:3], device, "SEED=1", f'ABLATION_STEPS="{steps}"', f'SEEDS="{seeds}"',
                  f'OUTPUT_DIR="{tmp_path}/out"', *assignments)
        return tmp_path / "out"
    return configure


def results(out, seeds, difference, spread=0.1):
    """Finish V0 and V1 for these seeds; V1 lies `difference` above, give or take a share of it."""
    for seed in seeds:
        v0, v1 = expand(Study(), [seed])
        finish(out, v0, val_loss=3 + seed / 37, train_loss=3.0)
        finish(out, v1, val_loss=3 + seed / 37 + difference * (1 + spread * (-1) ** seed), train_loss=3.1)


def running(plan):
    return sorted({cell.seed for cell, _, runs in plan.rows() if runs})


@pytest.mark.parametrize("asked, plan, now", [
    ("", [1, 2, 3], [1, 2, 3]), ("2", [1, 2, 3], [1, 2]), ("3 1", [1, 2, 3], [3, 1]), ("5", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ("7 8", [7, 8], [7, 8])])
def test_seeds_on_the_command_line_are_a_part_of_the_plan_or_another_one(study, asked, plan, now):
    study()
    found = Plan(Options(seeds=asked))
    assert (found.seeds, found.asked, running(found)) == (plan, now, sorted(now))


def test_two_machines_share_one_plan(study):
    out = study("1 2 3 4")
    one, other = Plan(Options(seeds="1 2")), Plan(Options(seeds="3 4"))
    assert one.history[-1]["hash"] == other.history[-1]["hash"] == Plan(Options()).history[-1]["hash"]
    results(out, [1, 2], 0.1)
    assert running(Plan(Options(seeds="1 2"))) == [] and running(Plan(Options())) == [3, 4]


def test_finished_cells_of_other_seeds_are_known(study):
    out = study("2")
    results(out, [1, 2, 9], 0.1)
    found = Plan(Options())
    assert found.seeds == [1, 2] and sorted({c.seed for c in found.more}) == [9]
    assert [c.seed for c, _ in found.found(found.common)] == [1, 1, 2, 2, 9, 9]


def test_the_first_look_is_at_three_seeds_or_those_configured(study):
    study("1")
    assert running(Plan(UNTIL)) == [1, 2, 3] and Plan(UNTIL).announced == [1, 2, 3, 4, 5, 6]
    study("4")
    assert running(Plan(UNTIL)) == [1, 2, 3, 4]
    study("9 8")
    assert Plan(UNTIL).announced == [9, 8, 1, 2, 3, 4], "further seeds are counted from the base seed"


def test_blocks_are_added_until_all_is_decided(study):
    out = study()
    seen = []
    for _ in range(10):
        plan = Plan(UNTIL)
        if not (now := running(plan)):
            break
        seen.append(now)
        results(out, now, 0.04, spread=0.3)
    assert seen == [[1, 2, 3], [4], [5]] and Plan(UNTIL).undecided == []
    assert len(Plan(UNTIL).history) == 1, "one plan from the first cell to the last"


def test_it_ends_at_the_most_seeds(study):
    out = study()
    results(out, range(1, 7), 0.04, spread=5)
    undecided = Plan(UNTIL)
    assert running(undecided) == [] and undecided.undecided == ["V1"] and undecided.seeds == [1, 2, 3, 4, 5, 6]


def test_an_a_a_control_is_not_waited_for(study, dotconfig):
    out = study("3", 'CONTROL_STEPS="A0"')
    for seed in (1, 2, 3):
        for cell in expand(Study(), [seed]):
            extra = {"V0": 0, "V1": 0.5 * (1 + seed / 100), "A0": 0.05 * (-1) ** seed}[cell.step]
            finish(out, cell, val_loss=3 + seed / 37 + extra, train_loss=extra + seed)
    plan = Plan(Options(until="decided"))
    assert running(plan) == [] or plan.undecided == ["V1"]
    assert "A0" not in plan.undecided


def test_contrasts_are_not_waited_for(study):
    out = study("6", 'CONTRASTS="V2:V1"', steps="V0 V1 V2")
    for seed in range(1, 7):
        for cell in expand(Study(), [seed]):  # V2 and V1 are clearly worse than V0; which of them is better, is open
            extra = {"V0": 0, "V1": 0.5 * (1 + seed / 1e4), "V2": 0.5 * (1 + (-1) ** seed / 20)}[cell.step]
            finish(out, cell, val_loss=3 + seed / 37 + extra, train_loss=extra + seed)
    plan = Plan(UNTIL)
    assert plan.undecided == [] and running(plan) == [] and design.contrasts(plan.history) == 1


def test_a_failed_cell_ends_the_looks_instead_of_running_for_ever(study):
    out = study()
    results(out, [1, 2], 0.04)
    v0, v1 = expand(Study(), [3])
    finish(out, v0)
    finish(out, v1, state="failed", reason="exit status 1")
    assert running(Plan(UNTIL)) == []
    (out / v1.name / "metrics.json").unlink()  # killed: it would be run again, and end so again
    assert running(Plan(UNTIL)) == [3]
    assert running(Plan(Options(until="decided", max_seeds="6", look="3"))) == []


def test_the_makefile_of_a_look_goes_on_to_the_next(study):
    out = study()
    Plan(UNTIL).write()
    assert "\t$(Q)$(MAKE) --no-print-directory cells LOOK=3\n" in (out / "cells.mk").read_text()
    Plan(Options()).write()
    assert "all: $(CELLS)\n\t@:\n" in (out / "cells.mk").read_text()


def test_the_result_of_until_decided_is_still_read_by_the_anytime_test(study):
    from lib import design

    out = study()
    Plan(UNTIL).write()
    results(out, [1, 2, 3, 4], 0.04)
    history = Plan(Options()).history
    assert design.test(history) == "anytime" and history[-1]["plan"]["test"] == "anytime"


@pytest.mark.parametrize("options, what, todo", [
    (Options(until="done"), "UNTIL=done is no rule for stopping.", "make UNTIL=decided."),
    (Options(until="decided", max_seeds="2"), "MAX_SEEDS=2 is no number of seeds from 3 to 1000.",
     "give one, e.g. make UNTIL=decided MAX_SEEDS=16."),
    (Options(until="decided", max_seeds="x"), "MAX_SEEDS=x is no number of seeds from 3 to 1000.",
     "give one, e.g. make UNTIL=decided MAX_SEEDS=16."),
    (Options(until="decided", steps=("V1",)), "UNTIL=decided decides about whole studies.",
     "make UNTIL=decided without a step."),
])
def test_what_cannot_be_is_refused(study, options, what, todo):
    study()
    assert refusal(Plan, options) == (what, todo)


# Cells side by side

@pytest.mark.parametrize("threads, jobs, given, expected", [
    (1, 0, "", 4), (2, 0, "", 2), (8, 0, "", 1), (0, 0, "", 1), (1, 3, "", 3), (1, 3, "1", 1)])
def test_cells_side_by_side(study, monkeypatch, threads, jobs, given, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    out = study("3", f"CPU_THREADS={threads}", f"JOBS={jobs}")
    plan = Plan(Options(jobs=given))
    plan.write()
    assert plan.jobs == expected
    assert (f"MAKEFLAGS += -j{expected}\n" in (out / "cells.mk").read_text()) == (expected > 1)
    monkeypatch.setenv("MAKEFLAGS", " -j8 --jobserver-auth=3,4")
    plan.write()
    assert "MAKEFLAGS" not in (out / "cells.mk").read_text(), "make -j8 has the last word"


def test_cells_whose_budget_is_seconds_run_one_at_a_time(study, monkeypatch):
    """A neighbour would take training from them, and the last one of an odd number would get more."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    study("3", "CPU_THREADS=1")
    assert Plan(Options()).jobs == 4 and Plan(Options(time="60")).jobs == 1 and Plan(Options(time="60", jobs="2")).jobs == 2


@pytest.mark.parametrize("configured, expected", [
    ((), 1), (("CELLS_PER_GPU=3",), 12), (("GPUS_PER_STEP=2",), 2), (("GPUS_PER_STEP=1", "JOBS=3"), 3)])
def test_cells_side_by_side_on_gpus(study, monkeypatch, configured, expected):
    monkeypatch.setattr("lib.slots.gpus", lambda: list("abcd"))
    study("3", *configured, device="DEVICE_AUTO=y")
    assert Plan(Options()).jobs == expected


def test_jobs_that_are_no_number_are_refused(study):
    study()
    assert refusal(Plan(Options(jobs="two")).write)[0] == "JOBS=two is no number of cells."
