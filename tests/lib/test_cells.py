"""A study as cells: names, order, parents, and what the disk says of each."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib import results
from lib.cells import (
    baseline,
    contrasts,
    counterbalanced,
    expand,
    folder_name,
    inspect,
    parse_seeds,
    unheard_settings,
)
from lib.config import Study, defconfig_names, identity_changes
from lib.errors import UserError
from lib.kconfig import Assignment, Schema
from lib.launch import prepare
from tests.harness import ROOT, TINY, copy_tree, finish, refusal, replace, run, set_default, snapshot

SCHEMA = Schema()


@pytest.fixture
def study(dotconfig):
    """study("V0 V1", "SEED=5", ...): a tiny study of these steps."""
    def build(steps, *assignments):
        dotconfig(*TINY, f'ABLATION_STEPS="{steps}"', *assignments)
        return Study(schema=SCHEMA)
    return build


@pytest.fixture
def cell(study):
    """The only cell of a study of one step."""
    return lambda step="V1", *assignments: expand(study(step, *assignments))[0]


# Order

@pytest.mark.parametrize("jobs, arms, seeds, most, fewest", [
    *[(2, arms, 8, 4, 4) for arms in range(2, 11)], (4, 8, 8, 2, 2), (8, 7, 8, 1, 1), (8, 8, 8, 1, 1), (3, 4, 9, 3, 3),
    (4, 2, 4, 2, 0)])
def test_gpus_that_are_taken_in_turn_meet_every_arm_alike(study, jobs, arms, seeds, most, fewest):
    cells = counterbalanced(expand(study(" ".join(f"V{i}" for i in range(arms)), f'SEEDS="{seeds}"')), jobs)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells), "seed by seed"
    met = Counter((cell.step, number % jobs) for number, cell in enumerate(cells))
    shares = [met[f"V{arm}", gpu] for arm in range(arms) for gpu in range(jobs)]
    assert (max(shares), min(shares)) == (most, fewest)


@pytest.mark.parametrize("arms", [2, 3, 4, 7])
def test_seeds_that_are_added_one_by_one_do_not_give_an_arm_the_same_gpu_again(study, arms):
    """Each begins with the first GPU, as a plan of that seed alone does."""
    cells = expand(study(" ".join(f"V{i}" for i in range(arms)), 'SEEDS="8"'))
    met = {cell.step: set() for cell in cells}
    for seed in sorted({cell.seed for cell in cells}):
        own = [cell for cell in counterbalanced(cells, 2, one_seed=True) if cell.seed == seed]
        for number, cell in enumerate(own):
            met[cell.step].add(number % 2)
    assert all(gpus == {0, 1} for gpus in met.values())


def test_cells_that_run_one_after_the_other_keep_the_order_of_the_study(study):
    cells = expand(study("V0 V1 V2", 'SEEDS="3"'))
    assert counterbalanced(cells, 1) == counterbalanced(cells, 0) == cells


# Seeds

@pytest.mark.parametrize("text, base, seeds", [
    ("1337", 1337, [1337]), ("3", 1337, [1337, 1338, 1339]), ("1", 5, [5]), ("100", 0, list(range(100))), ("101", 0, [101]),
    ("0", 5, [0]), ("1 2 3", 9, [1, 2, 3]), ("3,1, 2", 9, [3, 1, 2]), ("2147483647", 0, [2147483647]),
    ("1", 2147483647, [2147483647]),
])
def test_seeds_are_a_list_or_a_count(text, base, seeds):
    assert parse_seeds(text, base) == seeds


NEITHER = "give a count like SEEDS=3 or a list like SEEDS='1337 1338 1339'."


@pytest.mark.parametrize("text, what, run", [
    *[(text, f"SEEDS='{text}' is neither a count nor a list of seeds.", NEITHER)
      for text in ("", " ", ",", "-1", "1.5", "abc", "1 -2", "1..3", "٣", "²", "2147483648", "9" * 5000, "0x10", "1_0")],
    ("1 2 1", "SEEDS='1 2 1' names a seed twice.", "name every seed once."),
    ("7 07", "SEEDS='7 07' names a seed twice.", "name every seed once."),
])
def test_what_is_neither(text, what, run):
    assert refusal(parse_seeds, text, 1337) == (what, run)


def test_a_count_that_runs_past_the_last_seed():
    assert refusal(parse_seeds, "2", 2147483647) == ("SEEDS='2' counted from 2147483647 goes beyond 2147483647.",
                                                     "choose a smaller SEED.")


@given(st.one_of(st.text(st.characters(), max_size=30), st.text("0123456789 ,-", max_size=30)), st.integers(0, 2 ** 31 - 1))
@example("9" * 5000, 0)
@settings(max_examples=200)
def test_any_seeds_are_distinct_and_in_range_or_refused(text, base):
    try:
        seeds = parse_seeds(text, base)
    except UserError as error:
        assert "SEEDS=" in error.what and error.run
        return
    assert seeds and len(set(seeds)) == len(seeds) and all(0 <= s < 2 ** 31 for s in seeds)


# Folder names

@pytest.mark.parametrize("step, seed, name", [
    ("V0", 1337, "test_V0_adamwspam_none"), ("V0", 1338, "test_V0_adamwspam_none_s1338"),
    ("V1@RA_R=8", 1337, "test_V1+RA_R-8_adamwspam_none"), ("V1@RA_R=8", 7, "test_V1+RA_R-8_adamwspam_none_s7"),
    ("V1@RA_R=8,GPT2_BIAS=n", 1337, "test_V1+RA_R-8+GPT2_BIAS-n_adamwspam_none"),
    ("V3@RMLP_R_FF=3/8", 1337, "test_V3+RMLP_R_FF-3-8_adamwspam_none"),
    ("V0@LEARNING_RATE=6e-4", 1337, "test_V0+LEARNING_RATE-6e-4_adamwspam_none"),
    ("V0@STUDY=$(x);ü'\"\\", 1337, "test_V0+STUDY---x------_adamwspam_none"),
])
def test_folder_names_are_safe_everywhere(step, seed, name):
    assert folder_name(step, "adamwspam", "none", seed, 1337) == name


# Expansion

def test_cells_come_seed_by_seed(study):
    cells = expand(study("V1 V0", 'SEEDS="1337 5"'))
    assert [(c.step, c.seed, c.optimizer, c.name) for c in cells] == [
        ("V1", 1337, "adamwspam", "test_V1_adamwspam_none"), ("V0", 1337, "adamwspam", "test_V0_adamwspam_none"),
        ("V1", 5, "adamwspam", "test_V1_adamwspam_none_s5"), ("V0", 5, "adamwspam", "test_V0_adamwspam_none_s5")]
    assert [c.provenance()["identity"]["set"]["SEED"] for c in cells] == ["1337", "1337", "5", "5"]
    assert len({c.name for c in expand(study("V1 V0"), [1, 2, 3])}) == 6, "seeds given win over the study's"


def test_a_counted_seed_starts_at_the_base_seed(study):
    names = [c.name for c in expand(study("V0", "SEED=7", 'SEEDS="2"'))]
    assert names == ["test_V0_adamwspam_none", "test_V0_adamwspam_none_s8"]


def test_the_optimizer_may_be_a_dimension(study):
    cells = expand(study("V0 V1@RA_R=8", 'OPTIMIZERS="adamw sinkgd"'))
    assert [c.name for c in cells] == ["test_V0_adamw_none", "test_V1+RA_R-8_adamw_none", "test_V0_sinkgd_none",
                                       "test_V1+RA_R-8_sinkgd_none"]
    assert [c.resolved.config.OPTIMIZER for c in cells] == ["adamw", "adamw", "sinkgd", "sinkgd"]
    assert all(c.resolved.config.SPAM_THETA is None for c in cells)


@pytest.mark.parametrize("steps, lines, what, run", [
    ("", [], "the study has no steps.", "set ABLATION_STEPS in make menuconfig (make list-steps lists them)."),
    ("V0 V1 V0", [], "ABLATION_STEPS='V0 V1 V0' names a step twice.", "name every step once."),
    ("V0 Q99", [], "there is no step 'Q99'.", "make list-steps."),
    ("V0@STUDY", [], "'STUDY' in step 'V0@STUDY' is no override.", "write an override as V1@RA_R=8."),
    ("V0", ['OPTIMIZERS="adam"'], "OPTIMIZERS: unknown symbol OPTIMIZER_ADAM.", "did you mean OPTIMIZER_ADAMW?"),
    ("V0", ['OPTIMIZERS="adamw adamw"'], "two cells would share the folder test_V0_adamw_none.",
     "give their steps different overrides."),
    ("V3@RMLP_R_FF=1/8 V3@RMLP_R_FF=1-8", [], "step V3@RMLP_R_FF=1-8: RMLP_R_FF=1-8 is not a ratio like 1/48 or a whole number "
     ">= 1.", "give RMLP_R_FF a ratio like 1/48 or a whole number >= 1."),
    ("V0@DATA_DIR=a/b V0@DATA_DIR=a-b", [], "two cells would share the folder test_V0+DATA_DIR-a-b_adamwspam_none.",
     "give their steps different overrides."),
    ("V0@DATA_DIR=" + "x" * 250, [], "the folder name test_V0+DATA_DIR-xxxxxxxxxxxxxxxxxxxxxxx... has 282 characters, more "
     "than 240.", "put the overrides of that step into a step file of their own."),
    ("V1@INIT_FROM_STEP=V0", [], "step V1@INIT_FROM_STEP=V0 starts from the model of V0, which is not in the study.",
     "add V0 to ABLATION_STEPS."),
    ("V0", ['INIT_FROM_STEP="V0"'], "steps V0 -> V0 start from each other.", "break the circle in INIT_FROM_STEP."),
])
def test_a_study_that_makes_no_cells_is_refused(study, steps, lines, what, run):
    assert refusal(expand, study(steps, *lines)) == (what, run)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
@settings(max_examples=100)
def test_any_steps_make_distinct_safe_folders_or_are_refused(tmp_path_factory, steps):
    path = tmp_path_factory.getbasetemp() / "steps.config"
    escaped = steps.replace("\\", "\\\\").replace('"', '\\"')
    path.write_text(f'CONFIG_ABLATION_STEPS="V0 V1@DATA_DIR={escaped}"\n', encoding="utf-8")
    try:
        cells = expand(Study(config=path, schema=SCHEMA))
    except UserError as error:
        assert error.what and error.run
        return
    assert len({c.name for c in cells}) == len(cells) and all(c.name.isascii() and "/" not in c.name for c in cells)


@pytest.mark.parametrize("lines, name", [([], "V1"), (['BASELINE="V0"'], "V0"), (['BASELINE=""'], "V1")])
def test_the_baseline_is_the_first_step_unless_said(study, lines, name):
    assert baseline(study("V1 V0", *lines)) == name


def test_a_baseline_outside_the_study_is_refused(study):
    assert refusal(baseline, study("V0 V1", 'BASELINE="V2"')) == ("BASELINE=V2 is not one of the study's steps (V0 V1).",
                                                                  "set BASELINE to one of them, or to nothing for the first.")


@pytest.mark.parametrize("text, there, absent", [
    ("", [], []), ("V3:V1", [("V3", "V1")], []), ("V2:V1 V3:V1", [("V3", "V1")], [("V2", "V1")]),
    ("V1@RA_R=8:V1", [("V1@RA_R=8", "V1")], []), ("V3:V0 V0:V1 V3:V1", [("V3", "V1")], [("V3", "V0"), ("V0", "V1")]),
])
def test_contrasts_are_pairs_of_the_studys_steps(study, text, there, absent):
    assert contrasts(study("V0 V1 V3 V1@RA_R=8", f'CONTRASTS="{text}"')) == (there, absent)


@pytest.mark.parametrize("text, what, run", [
    ("V3", "CONTRASTS holds 'V3', which is no pair of steps.", "write V3:V1 for V3 against V1."),
    ("V3:", "CONTRASTS holds 'V3:', which is no pair of steps.", "write V3:V1 for V3 against V1."),
    ("V3:V1:V0", "CONTRASTS holds 'V3:V1:V0', which is no pair of steps.", "write V3:V1 for V3 against V1."),
    ("V2@RA_RR=3:V1", "step V2@RA_RR=3: unknown symbol RA_RR.", "did you mean RA_R?"),
    ("V3:V3", "CONTRASTS holds 'V3:V3', a step against itself or a pair for the second time.", "take V3:V3 out of CONTRASTS."),
    ("V3:V1 V1:V3", "CONTRASTS holds 'V1:V3', a step against itself or a pair for the second time.",
     "take V1:V3 out of CONTRASTS."),
    ("V3:X1", "there is no step 'X1'.", "make list-steps."),
])
def test_contrasts_that_are_none_are_refused(study, text, what, run):
    assert refusal(contrasts, study("V0 V1 V3", f'CONTRASTS="{text}"')) == (what, run)


# Parents

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project with steps that start from others."""
    tree = copy_tree(tmp_path_factory.mktemp("parents") / "tree")
    for name, text in {"Child": 'CONFIG_INIT_FROM_STEP="V1"\n', "Grandchild": 'CONFIG_INIT_FROM_STEP="Child"\n',
                       "Loop1": 'CONFIG_INIT_FROM_STEP="Loop2"\n', "Loop2": 'CONFIG_INIT_FROM_STEP="Loop1"\n',
                       "Other": "CONFIG_OPTIMIZER_ADAMW=y\n", "OfOther": 'CONFIG_INIT_FROM_STEP="Other"\n'}.items():
        (tree / f"gpt2/steps/{name}.config").write_text(f"# Help: {name}\n{text}")
    return tree


SHOW = """import json, sys
from lib.cells import expand
from lib.config import Study
print(json.dumps({c.name: [c.parent, c.provenance()["identity"]] for c in expand(Study())}))"""


def cells_of(tree, config, steps, *assignments):
    """{folder: (parent's folder, identity)} of a study of `steps` in `tree`."""
    config(*TINY, f'ABLATION_STEPS="{steps}"', *assignments)
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: tuple(pair) for name, pair in json.loads(done.stdout).items()}


def test_a_child_is_another_cell_when_its_parent_is(tree, dotconfig, tmp_path):
    before = cells_of(tree, dotconfig, "V1 Child Grandchild")
    child, grandchild = "test_Child_adamwspam_none", "test_Grandchild_adamwspam_none"
    assert before[child][0] == "test_V1_adamwspam_none" and before[grandchild][0] == child
    other = copy_tree(tmp_path / "tree")
    for name in ("Child", "Grandchild"):
        (other / f"gpt2/steps/{name}.config").write_text((tree / f"gpt2/steps/{name}.config").read_text())
    replace(other / "gpt2/steps/V1.config", "CONFIG_RA_R=4", "CONFIG_RA_R=8")
    after = cells_of(other, dotconfig, "V1 Child Grandchild")
    assert identity_changes(before[child][1], after[child][1]) == ["PARENT.RA_R 4 -> 8"]
    assert identity_changes(before[grandchild][1], after[grandchild][1]) == ["PARENT.PARENT.RA_R 4 -> 8"]
    replace(other / "gpt2/steps/V1.config", "CONFIG_RA_R=8\n", "")
    assert cells_of(other, dotconfig, "V1 Child Grandchild") == before
    # A default that only the parent sees
    set_default(other / "gpt2/Kconfig", "RA_R", "6")
    after = cells_of(other, dotconfig, "V1 Child")
    assert identity_changes(before[child][1], after[child][1]) == ["PARENT.RA_R 4 -> 6"]
    # And a new symbol at its default
    set_default(other / "gpt2/Kconfig", "RA_R", "4")
    with open(other / "gpt2/Kconfig", "a") as file:
        file.write('\nconfig RA_NEW\n\tbool "new"\n\tdefault y\n')
    after = cells_of(other, dotconfig, "V1 Child Grandchild")
    assert "PARENT.RA_NEW" in after[child][1]["default"]
    assert all(identity_changes(before[name][1], after[name][1]) == [] == identity_changes(after[name][1], before[name][1])
               for name in before)


def test_the_base_seed_of_a_study_is_no_part_of_a_parent(tree, dotconfig):
    one = cells_of(tree, dotconfig, "V1 Child")["test_Child_adamwspam_none"]
    other = cells_of(tree, dotconfig, "V1 Child", "SEED=7", 'SEEDS="1337"')["test_Child_adamwspam_none_s1337"]
    assert identity_changes(one[1], other[1]) == [] and other[0] == "test_V1_adamwspam_none_s1337"


def test_the_dimension_wins_over_the_optimizer_of_a_step(tree, dotconfig):
    found = cells_of(tree, dotconfig, "V0 Other", 'OPTIMIZERS="sinkgd"')
    assert list(found) == ["test_V0_sinkgd_none", "test_Other_sinkgd_none"]


def test_a_parent_has_its_own_optimizer_in_its_folders_name(tree, dotconfig):
    assert cells_of(tree, dotconfig, "Other OfOther")["test_OfOther_adamwspam_none"][0] == "test_Other_adamw_none"


def test_a_circle_of_parents_is_refused(tree, dotconfig):
    dotconfig(*TINY, 'ABLATION_STEPS="Loop1 V0 Loop2"')
    done = run("scripts.plan", tree=tree)
    assert done.returncode == 2 and done.stderr == ("error: steps Loop1 -> Loop2 -> Loop1 start from each other.\n"
                                                    "  try: break the circle in INIT_FROM_STEP.\n")


# States

def started(out, cell, checkpoint=True):
    prepare(out / cell.name, cell)
    if checkpoint:
        (out / cell.name / "checkpoint.pt").write_bytes(b"tensors")


def state(out, cell):
    before = snapshot(out)
    status = inspect(out, cell)
    after = snapshot(out)
    assert after.keys() == before.keys(), "inspecting writes nothing"
    assert all(after[path] == before[path] for path in before if not path.endswith(".lock"))
    return status.state, status.why


def test_a_cell_that_never_ran_is_planned_and_one_that_left_nothing_interrupted(tmp_path, cell):
    one = cell()
    assert state(tmp_path, one) == ("planned", "never ran")
    assert state(tmp_path / "nowhere", one) == ("planned", "never ran")
    started(tmp_path, one, checkpoint=False)
    assert state(tmp_path, one) == ("interrupted", "its process ended before its first checkpoint, so it starts anew")


def test_a_path_too_long_for_the_system_holds_no_cell(tmp_path, cell):
    assert inspect(tmp_path / ("x" * 300), cell()).state == "planned"


def test_a_cell_with_a_checkpoint_is_interrupted(tmp_path, cell):
    started(tmp_path, cell())
    assert state(tmp_path, cell()) == ("interrupted", "has a checkpoint to resume from")
    (tmp_path / cell().name / ".lock").touch()
    assert state(tmp_path, cell())[0] == "interrupted", "a lock that nobody holds says nothing"


def test_a_checkpoint_of_another_configuration_is_stale(tmp_path, cell):
    started(tmp_path, cell())
    assert state(tmp_path, cell("V1", "BATCH_SIZE=9", "MARGIN=\"1\"")) == (
        "stale", "its checkpoint is of another configuration: BATCH_SIZE 8 -> 9")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": []}', '{"identity": {}}',
                                  '{"identity": {"set": [], "default": 1}}'])
def test_a_checkpoint_without_readable_provenance_is_stale(tmp_path, cell, text):
    started(tmp_path, cell())
    (tmp_path / cell().name / "provenance.json").write_text(text)
    found, why = state(tmp_path, cell())
    assert found == "stale" and why.startswith("provenance.json cannot be read: ")


def test_a_cell_whose_lock_is_held_is_running_and_one_that_nobody_claims_only_stops(tmp_path, cell):
    started(tmp_path, cell())
    code = ("import sys, filelock\nfrom lib import process\nwith filelock.FileLock(sys.argv[1]) as lock:\n"
            "    handles = process.held_by_children(lock)\n    process.claim(handles)\n    print('held', flush=True)\n"
            "    sys.stdin.readline()\n    process.claim(handles, held=False)\n    print('stops', flush=True)\n"
            "    sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / cell().name / ".lock")], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    assert state(tmp_path, cell()) == ("running", f"another make runs it (process {holder.pid})")
    assert state(tmp_path, cell("V1", "BATCH_SIZE=9"))[0] == "running", "whatever it runs"
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "stops\n"
    assert state(tmp_path, cell()) == ("interrupted", "its last process still stops")
    found, why = state(tmp_path, cell("V1", "BATCH_SIZE=9"))
    assert found == "running" and "still stops; its checkpoint is of another configuration" in why, "not to be archived yet"
    holder.kill()  # the kernel gives the lock back
    holder.communicate()
    assert state(tmp_path, cell())[0] == "interrupted"


def test_a_lock_on_a_disk_that_is_only_read_is_nobodys(tmp_path, cell, monkeypatch):
    def refuses(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    started(tmp_path, cell())
    (tmp_path / cell().name / ".lock").touch()
    monkeypatch.setattr("filelock.FileLock.acquire", refuses)
    assert state(tmp_path, cell())[0] == "interrupted"


@pytest.mark.parametrize("end, reason, why", [
    ("done", None, "its result is on disk"), ("diverged", "the loss is nan at iteration 3", "the loss is nan at iteration 3"),
    ("failed", "exit status 1", "exit status 1")])
def test_a_cell_with_a_record_is_what_the_record_says(tmp_path, cell, end, reason, why):
    started(tmp_path, cell())
    finish(tmp_path, cell(), state=end, reason=reason)
    assert state(tmp_path, cell()) == (end, why)
    assert inspect(tmp_path, cell()).record["identity"] == cell().provenance()["identity"]
    assert state(tmp_path, cell("V1", "BATCH_SIZE=9", 'LEARNING_RATE="0.5"')) == (
        "stale", "its result is of another configuration: BATCH_SIZE 8 -> 9; LEARNING_RATE 0.0015 -> 0.5")


def test_another_seed_in_the_same_folder_is_stale(tmp_path, cell):
    finish(tmp_path, cell())
    assert state(tmp_path, cell("V1", "SEED=5", 'SEEDS="1"')) == (
        "stale", "its result is of another configuration: SEED 1337 -> 5")


@pytest.mark.parametrize("text, why", [
    ('{"format": 1, "state": "done"', "Expecting ',' delimiter: line 1 column 30 (char 29)"), ("[]", "it is not of format 1"),
    ('{"format": 1, "val_loss": NaN}', "NaN is no number of JSON"), ('{"format": 0}', "it is not of format 1"),
    ('{"format": 1, "state": "done", "identity": {}}', "it is not of format 1"),
])
def test_an_unreadable_record_is_stale(tmp_path, cell, text, why):
    finish(tmp_path, cell())
    (tmp_path / cell().name / results.NAME).write_text(text)
    assert state(tmp_path, cell()) == ("stale", f"metrics.json cannot be read: {why}")


def test_a_result_that_says_symbols_of_its_own_is_compared_by_value(tmp_path, cell):
    """A study that says a default aloud, or a number in another spelling, keeps its results."""
    finish(tmp_path, cell("V3"))
    same = cell("V3", 'LEARNING_RATE="1.5e-3"', 'GPT2_DROPOUT="0.10"', "BATCH_SIZE=8")
    assert state(tmp_path, same)[0] == "done"


def test_overrides_of_the_environment_are_part_of_the_cell(dotconfig):
    dotconfig(*TINY)
    one = expand(Study(schema=SCHEMA, overrides=[Assignment("GPT2_MAX_TIME", "60", "environment GPT2_MAX_TIME")]))[0]
    assert one.provenance()["symbols"]["GPT2_MAX_TIME"] == ["60", "environment GPT2_MAX_TIME"]
    assert one.provenance()["identity"]["set"]["GPT2_MAX_TIME"] == "60"
    assert os.environ.get("GPT2_MAX_TIME") is None


@pytest.mark.parametrize("steps, said", [
    ("V1 V3", ["RA_R=8 of the study acts in no cell, for steps say what it is: write it behind one, as V1@RA_R=8"]),
    ("V1 V3 V3@RA_R=8", []),
])
def test_a_setting_that_every_step_says_otherwise_is_named(study, steps, said):
    one = study(steps, "ATTENTION_UNIFIED_RA=y", "RA_R=8")
    assert unheard_settings(one, expand(one)) == said


def test_no_study_that_comes_with_the_project_sets_what_no_step_hears():
    for name in defconfig_names():
        one = Study(name, schema=SCHEMA)
        assert unheard_settings(one, expand(one)) == [], name
