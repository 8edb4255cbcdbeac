"""The plan: what runs and what is left alone, over a thousand finished cells and over single ones."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lib import generations, results
from lib.cells import expand
from lib.config import Study
from lib.kconfig import Schema
from lib.launch import prepare
from lib.paths import ROOT
from lib.plan import Options, Plan
from scripts.plan import options_from_environment
from tests.harness import TINY, copy_tree, finish, finish_each, refusal, replace, run, run_here, set_default, snapshot

STEPS = "V0 V1 V2 V3 V4 V5 V6"
SEEDS = " ".join(map(str, range(1000, 1143)))
CELLS = 7 * 143


def targets(makefile):
    """Folders of the cells that a cells.mk runs, in their order."""
    listed = re.findall(r"^  \S*/([^/\s]+)/metrics.json", makefile.read_text(), re.M)
    rules = re.findall(r"^\S*/([^/\s]+)/metrics.json: FORCE", makefile.read_text(), re.M)
    assert listed == rules
    return listed


def commands(makefile):
    """{folder: (prerequisites, recipe)}."""
    found = re.findall(r"^\S*/([^/\s]+)/metrics.json: FORCE *(.*)\n\t(.*)", makefile.read_text(), re.M)
    return {folder: (needs.split(), recipe) for folder, needs, recipe in found}


# A thousand finished cells: nothing but a change of numbers moves them

class Finished:
    """A study of 1,001 finished cells in `out`, configured by `config`."""

    def __init__(self, folder):
        self.folder, self.out, self.config = folder, folder / "out", folder / "dot.config"
        self.configure()
        cells = expand(Study(config=self.config))
        assert len(cells) == CELLS
        finish_each(self.out, cells)
        self.proof = self.cells()

    def configure(self, *assignments, seeds=SEEDS, steps=STEPS):
        lines = [*TINY, "SEED=1000", f'SEEDS="{seeds}"', f'ABLATION_STEPS="{steps}"', f'OUTPUT_DIR="{self.out}"', *assignments]
        self.config.write_text("".join(f"CONFIG_{line}\n" for line in lines))

    def cells(self):
        return {p.name: snapshot(p) for p in self.out.glob("test_*")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("thousand"))


@pytest.fixture
def thousand(built, monkeypatch):
    """The finished study, with the proof that a test has left every cell of it alone, to the byte and the nanosecond."""
    monkeypatch.setenv("KCONFIG_CONFIG", str(built.config))
    built.configure()
    yield built
    assert len(built.proof) == CELLS and built.cells() == built.proof
    assert not (built.out / "archive").exists()


def written(options=Options()):  # noqa: B008
    plan = Plan(options)
    return plan, targets(plan.write())


def test_nothing_to_run_and_quickly(thousand, capsys):
    begun = time.process_time()
    plan, found = written()
    seconds = time.process_time() - begun
    with capsys.disabled():
        print(f"[no-op plan over {CELLS} finished cells: {seconds:.2f} s]", end="")
    assert found == [] and {s.state for _, s, _ in plan.rows()} == {"done"} and seconds < 10
    assert plan.out == thousand.out and "CELLS :=\n" in (thousand.out / "cells.mk").read_text()


def test_make_has_nothing_to_do_quickly(thousand, monkeypatch, capsys):
    """Its two programs, planning and reporting, as make runs them; pictures of what has not changed are not drawn again, and
    what Python takes to start and to import is not the study's."""
    from lib.report import files

    drawn = []
    monkeypatch.setattr(files, "_write_pictures", lambda out, content: drawn.append(content))
    run_here("-m", "scripts.report", "--help")  # imports
    begun = time.process_time()
    planned, reported = run_here("-m", "scripts.plan", "--write"), run_here("-m", "scripts.report")
    seconds = time.process_time() - begun
    with capsys.disabled():
        print(f"[no-op make over {CELLS} finished cells: {seconds:.2f} s]", end="")
    assert f"nothing to run, {CELLS} cells" in planned.stderr and reported.returncode == 0 and seconds < 10
    compared = [step["comparison"] for step in drawn[0]["steps"] if step["comparison"]]
    assert len(compared) == 6 and all(c["n"] == 143 and c["p_sign_flip"] is not None for c in compared)


def test_an_override_gets_its_own_folder_and_leaves_no_trace(thousand, monkeypatch):
    monkeypatch.setenv("GPT2_MAX_TIME", "60")
    plan, found = written()
    assert plan.out == thousand.folder / "out+GPT2_MAX_TIME-60" and len(found) == CELLS
    assert plan.cells[0].resolved.config.GPT2_MAX_TIME == 60 and plan.cells[0].resolved.config.GPT2_MAX_ITERS == 0
    monkeypatch.delenv("GPT2_MAX_TIME")
    plan, found = written()
    assert plan.out == thousand.out and found == []


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_steps_reruns_nothing(built, monkeypatch, hours):
    monkeypatch.setenv("KCONFIG_CONFIG", str(built.config))
    built.configure()
    when = time.time() + 3600 * hours
    for path in [p for folder in built.out.glob("test_*") for p in folder.iterdir()]:
        os.utime(path, (when, when))
    built.proof = built.cells()
    assert written()[1] == [] and built.cells() == built.proof


def test_what_changes_no_number_reruns_nothing(thousand, monkeypatch):
    """Margin, baseline, tracker, intervals, names, places, another spelling, and an override that says what holds."""
    thousand.configure('MARGIN="0.5"', 'BASELINE="V1"', "TRACKER_WANDB=y", 'TRACKER_PROJECT="mine"', "GPT2_LOG_INTERVAL=1",
                       "CHECKPOINT_INTERVAL=0", 'STUDY="renamed"', 'DATA_DIR="/elsewhere"', 'DATA_LOCAL_DIR="/there"',
                       'LEARNING_RATE="1.5e-3"', "GPT2_MAX_TIME=0")
    monkeypatch.setenv("GPT2_MAX_ITERS", "250")
    plan, found = written()
    assert plan.out == thousand.out and found == []


def test_more_seeds_run_only_themselves(thousand):
    thousand.configure(seeds=f"{SEEDS} 7")
    assert written()[1] == [f"test_V{i}_adamwspam_none_s7" for i in range(7)]


def test_more_steps_run_only_themselves(thousand):
    thousand.configure(steps=f"{STEPS} V1@RA_R=8", seeds="1000 1001")
    assert written()[1] == ["test_V1+RA_R-8_adamwspam_none", "test_V1+RA_R-8_adamwspam_none_s1001"]


def test_fewer_seeds_and_another_order_rerun_nothing(thousand):
    """Seeds that are not asked for any more are still those of the plan."""
    thousand.configure(seeds="1001 1000", steps="V6 V0")
    plan, found = written()
    assert found == [] and [c.step for c, _, _ in plan.rows()] == ["V6", "V0", "V6", "V0"]
    assert len(plan.cells) == 2 * 143


def test_an_override_in_a_folder_given_by_hand_is_refused(thousand, monkeypatch):
    monkeypatch.setenv("GPT2_MAX_TOKENS", "999")
    what, todo = refusal(Plan, Options(out=str(thousand.out)))
    assert what == (f"{thousand.out}/test_V0_adamwspam_none holds another result (its result is of another configuration: "
                    "GPT2_MAX_ITERS 250 -> 0; GPT2_MAX_TOKENS 0 -> 999).")
    assert todo == "another OUT=, or none: an override then gets its own folder."


# The same in a changed copy of the project

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("copy") / "tree")


def test_a_symbol_that_is_new_reruns_nothing_on_either_side_of_its_commit(thousand, tree, tmp_path):
    """At its default. Also where the finished cells know a symbol that the schema has not got any more."""
    new = copy_tree(tmp_path / "new")
    with open(new / "gpt2/Kconfig", "a") as file:
        file.write('\nconfig NEW_BOOL\n\tbool "new"\n\tdefault y\n'
                   '\nconfig NEW_RATE\n\tstring "new"\n\trange "0.0" "1.0"\n\tdefault "0.5"\n')
    done = run("scripts.plan", "--write", tree=new)
    assert done.returncode == 0 and done.stderr == f"custom: nothing to run, {CELLS} cells are in {thousand.out}\n"
    made = Path(done.stdout.removesuffix("\n"))
    assert made.parent == thousand.out / "plan" and made.suffix == ".mk" and targets(made) == []
    out = tmp_path / "out"
    script = ("import sys; from pathlib import Path; from tests.harness import finish; from lib.cells import expand; "
              "from lib.config import Study; finish(Path(sys.argv[1]), *expand(Study(), [1000]))")
    (new / "tests").mkdir()
    for name in ("__init__.py", "harness.py"):
        shutil.copy(ROOT / "tests" / name, new / "tests")
    (new / "script.py").write_text(script)
    assert run("script", str(out), tree=new).returncode == 0
    assert "NEW_RATE" in results.read(out / "test_V0_adamwspam_none")["identity"]["default"]
    done = run("scripts.plan", "--write", tree=tree, KABLATE_OUT=out, KABLATE_SEEDS=1000)
    assert done.returncode == 0 and "nothing to run, 7 cells" in done.stderr


def test_a_changed_step_file_makes_its_own_cells_stale(thousand, tmp_path):
    other = copy_tree(tmp_path / "tree")
    replace(other / "gpt2/steps/V2.config", "CONFIG_RA_R=4", "CONFIG_RA_R=8")
    replace(other / "gpt2/steps/V3.config", "CONFIG_RA_R=4", "CONFIG_RA_R=4\nCONFIG_GPT2_BIAS=y")  # a default said aloud
    done = run("scripts.plan", tree=other)
    rows = [line for line in done.stdout.splitlines() if "| run" in line]
    assert done.returncode == 0 and len(rows) == 143
    for row in rows:
        assert row.startswith("| test_V2_") and "its result is of another configuration: RA_R 4 -> 8 " in row


def test_a_changed_default_makes_the_cells_it_reaches_stale(thousand, tmp_path):
    other = copy_tree(tmp_path / "tree")
    set_default(other / "gpt2/Kconfig", "RMLP_R_FF", '"1/24"')
    for name in ("V3", "V4", "V5"):  # V6 keeps saying 1/48 itself
        replace(other / f"gpt2/steps/{name}.config", 'CONFIG_RMLP_R_FF="1/48"\n', "")
    done = run("scripts.plan", tree=other, KABLATE_SEEDS="1000 1001")
    assert [line.split()[1] for line in done.stdout.splitlines() if "| run" in line] == [
        f"test_{s}_adamwspam_none{suffix}" for suffix in ("", "_s1001") for s in ("V3", "V4", "V5")]


# Speed

@pytest.mark.parametrize("steps", [(), ("V1",)])
def test_ten_thousand_cells_are_planned_quickly(dotconfig, tmp_path, capsys, steps):
    dotconfig(*TINY, f'ABLATION_STEPS="{STEPS}"', f'SEEDS="{" ".join(map(str, range(1429)))}"', f'OUTPUT_DIR="{tmp_path}/out"')
    begun = time.process_time()
    plan = Plan(Options(steps=steps))
    rows, found = plan.rows(), targets(plan.write())
    seconds = time.process_time() - begun
    with capsys.disabled():
        print(f"[plan of {len(rows)} cells: {seconds:.2f} s]", end="")
    assert len(rows) == 10_003 and len(found) == (1429 if steps else 10_003) and seconds < 10


# One study, cell by cell

@pytest.fixture
def study(dotconfig, tmp_path):
    """study("V0 V1", ...): configures it with its results in `out`."""
    def configure(steps="V0 V1", *assignments, out=tmp_path / "out"):
        dotconfig(*TINY, f'ABLATION_STEPS="{steps}"', f'OUTPUT_DIR="{out}"', *assignments)
        return out
    return configure


def stored_plans(out):
    """The stored configurations of steps, with their times."""
    return {path: content for path, content in snapshot(out / "plan").items() if re.search(r"/[0-9a-f]{16}\.json$", path)}


def test_a_makefile_runs_the_cells_that_must_run(study):
    out = study("V0 V1@RA_R=8", 'SEEDS="2"')
    plan, found = written()
    assert found == ["test_V0_adamwspam_none", "test_V1+RA_R-8_adamwspam_none", "test_V0_adamwspam_none_s1338",
                     "test_V1+RA_R-8_adamwspam_none_s1338"]
    needs, recipe = commands(out / "cells.mk")["test_V1+RA_R-8_adamwspam_none_s1338"]
    stored = re.fullmatch(rf"\$\(Q\)\$\(PYTHON\) -m scripts\.cell {out}/test_V1\+RA_R-8_adamwspam_none_s1338 "
                          rf"--plan ({out}/plan/[0-9a-f]{{16}}\.json) --seed 1338 --of 4/4", recipe)
    assert needs == [] and stored and len(stored_plans(out)) == 2, "a stored configuration a step"
    assert ".PRECIOUS: $(CELLS)" in (out / "cells.mk").read_text()


def test_a_plan_is_only_a_look_until_it_is_written(study):
    out = study()
    assert f"2 cells in {out}, 2 to run\n" in run("scripts.plan").stdout
    assert not out.exists()


def test_a_running_plan_is_not_changed_by_a_later_one(study):
    out = study()
    written()
    before = stored_plans(out)
    study("V0 V1", "BATCH_SIZE=9")
    written()
    assert stored_plans(out).items() > before.items() and len(stored_plans(out)) == 4


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff"])
def test_a_stored_configuration_that_was_damaged_is_written_anew(study, damaged):
    out = study("V0")
    written()
    (path, (_, whole)), = stored_plans(out).items()
    Path(path).write_bytes(damaged)
    written()
    assert Path(path).read_bytes() == whole and len(stored_plans(out)) == 1


def test_stale_cells_are_archived_each_under_its_own_number(study):
    out = study()
    name = "test_V1_adamwspam_none"
    for number, batch in enumerate((2, 3, 4), 1):
        study("V0 V1@GPT2_BIAS=y V1", f"BATCH_SIZE={batch}")
        finish(out, *expand(Study())[2:], val_loss=float(batch))
        study("V1", "BATCH_SIZE=9")
        assert Plan(Options()).rows()[0][1].state == "stale" and (out / name).exists()
        assert written()[1] == [name] and not (out / name).exists()
        assert results.read(out / "archive" / f"{name}.{number}")["val_loss"] == batch
    assert results.read(out / "archive" / f"{name}.1")["val_loss"] == 2.0


@pytest.mark.parametrize("text", ['{"format": 1', '{"format": 1, "val_loss": NaN}', "[]", '{"format": 7}', ""])
def test_an_unreadable_result_is_archived_not_lost(study, text):
    out = study("V0")
    finish(out, *expand(Study()))
    (out / "test_V0_adamwspam_none/metrics.json").write_text(text)
    assert written()[1] == ["test_V0_adamwspam_none"]
    assert (out / "archive/test_V0_adamwspam_none.1/metrics.json").read_text() == text


def test_what_another_make_has_finished_since_the_plan_is_not_archived(study):
    """Two plans see one stale cell; the first one's make archives and trains it before the second one is written."""
    out = study("V0 V1", "BATCH_SIZE=2")
    cells = expand(Study())
    finish(out, *cells)
    study("V0 V1", "BATCH_SIZE=9")
    cells, second = expand(Study()), Plan(Options())
    assert [status.state for _, status, _ in second.rows()] == ["stale", "stale"]
    written()
    finish(out, cells[0], val_loss=1.5)
    before = snapshot(out / cells[0].name)
    assert targets(second.write()) == [cells[1].name] and before.items() <= snapshot(out / cells[0].name).items()
    assert sorted(os.listdir(out / "archive")) == [f"{cell.name}.1" for cell in cells]
    assert [(status.state, runs) for _, status, runs in second.rows()] == [("done", False), ("planned", True)]


def test_a_stale_cell_whose_lock_is_held_is_left_where_it_is(study):
    out = study("V0", "BATCH_SIZE=2")
    cell, = expand(Study())
    finish(out, cell)
    study("V0", "BATCH_SIZE=9")
    with FileLock(out / cell.name / ".lock"):
        assert written()[1] == [] and results.read(out / cell.name)["state"] == "done"
    assert not (out / "archive").exists()
    assert written()[1] == [cell.name] and os.listdir(out / "archive") == [f"{cell.name}.1"]


@pytest.mark.parametrize("state, kept", [("done", False), ("diverged", False), ("failed", True)])
def test_checkpoints_of_a_cell_that_was_killed_after_its_result_are_removed(study, state, kept):
    """Not by a look, not while its last process still stops, and nothing else of it."""
    out = study("V0")
    cell, = expand(Study())
    finish(out, cell, state=state, reason=None if state == "done" else "x")
    before = snapshot(out / cell.name)
    left = [out / cell.name / name for name in (*generations.NAMES, generations.DAMAGED)]
    for path in left:
        path.write_bytes(b"x")
    Plan(Options())
    with FileLock(out / cell.name / ".lock"):
        written()
    assert all(path.exists() for path in left)
    written()
    assert [path.exists() for path in left] == [kept] * len(left) and before.items() <= snapshot(out / cell.name).items()


def test_an_interrupted_cell_keeps_its_checkpoint(study):
    out = study("V0")
    prepare(out / "test_V0_adamwspam_none", expand(Study())[0])
    (out / "test_V0_adamwspam_none/checkpoint.pt").write_bytes(b"x")
    before = snapshot(out)
    assert written()[1] == ["test_V0_adamwspam_none"] and before.items() <= snapshot(out).items()


def test_a_failed_cell_is_kept_until_retry(study):
    out = study("V0 V1 V2")
    cells = expand(Study())
    finish(out, cells[0], state="failed", reason="exit status 1")
    finish(out, cells[1], state="diverged", reason="the loss is nan")
    assert written()[1] == ["test_V2_adamwspam_none"] and results.read(out / cells[0].name)["state"] == "failed"
    assert written(Options(retry=True))[1] == ["test_V0_adamwspam_none", "test_V2_adamwspam_none"]
    retried = [name for name, (_, recipe) in commands(out / "cells.mk").items() if recipe.endswith(" --retry")]
    assert retried == [cells[0].name], "what fails elsewhere in the meantime is kept too"
    assert results.read(out / cells[0].name)["state"] == "failed", "the launcher removes the record when it runs the cell"
    assert results.read(out / cells[1].name)["state"] == "diverged"
    assert (out / cells[0].name / ".config").exists()


@pytest.mark.parametrize("value, retries", [("1", True), ("yes", True), ("", False), ("0", False), ("n", False)])
def test_retry_comes_from_the_environment(monkeypatch, value, retries):
    monkeypatch.setenv("RETRY", value)
    assert options_from_environment(["V1"]) == Options(retry=retries, steps=("V1",))


# Folders

def test_the_default_folder_is_the_studys(dotconfig, monkeypatch):
    dotconfig(*TINY, 'STUDY="mine+tiny"')
    assert Plan(Options()).out == ROOT / "test_matrix_results/mine+tiny"
    assert Plan(Options(time="60")).out == ROOT / "test_matrix_results/mine+tiny+GPT2_MAX_TIME-60"
    monkeypatch.setenv("GPT2_MAX_ITERS", "5")
    assert Plan(Options()).out == ROOT / "test_matrix_results/mine+tiny+GPT2_MAX_ITERS-5"
    assert Plan(Options(time="60")).out.name == "mine+tiny+GPT2_MAX_TIME-60", "the command line wins over the environment"
    assert Plan(Options(out="elsewhere")).out == ROOT / "elsewhere"


@pytest.mark.parametrize("steps", ["V0@GPT2_MAX_ITERS=5 V1", "V1 V0@GPT2_MAX_ITERS=5"])
def test_an_override_that_changes_any_step_gets_its_own_folder(study, monkeypatch, steps):
    out = study(steps)
    monkeypatch.setenv("GPT2_MAX_ITERS", "5")
    assert Plan(Options()).out.name == f"{out.name}+GPT2_MAX_ITERS-5"


def test_a_study_without_a_budget_runs_with_the_one_it_is_given(dotconfig, monkeypatch, tmp_path):
    dotconfig("GPT2_MAX_TIME=0", 'STUDY="open"')
    assert refusal(Plan, Options())[1] == "give one of them, e.g. GPT2_MAX_TIME=7200 make."
    monkeypatch.setenv("GPT2_MAX_TIME", "7200")
    assert Plan(Options()).out.name == "open+GPT2_MAX_TIME-7200"


@pytest.mark.parametrize("out", ["a b", "a$b", "a#b", "a:b", "a%b", "ü", "a\tb", "~/x", "a;b", "a\\b", "\udcff"])
def test_a_folder_that_make_cannot_take_is_refused(study, out):
    study()
    what = f"the results folder '{ROOT}/{out}' holds a character that make cannot take."
    assert refusal(Plan, Options(out=out)) == (what, "use letters, digits and _.+-/ only, without spaces.")


def test_so_is_one_whose_way_there_has_a_space(study, tmp_path):
    tree = copy_tree(tmp_path / "my projects" / "tree")
    study(out="results")
    done = run("scripts.plan", tree=tree)
    assert done.returncode == 2 and done.stderr.splitlines()[0] == (
        f"error: the results folder '{tree}/results' holds a character that make cannot take.")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_without_a_name_is_no_crash(study, monkeypatch, out):
    study(out=out)
    assert Plan(Options()).out.resolve() == (ROOT / out).resolve()
    monkeypatch.setenv("GPT2_MAX_TIME", "60")
    assert Plan(Options()).out.name.endswith("+GPT2_MAX_TIME-60")


def test_a_folder_below_a_file_cannot_be_written(study, tmp_path):
    (tmp_path / "file").write_text("x")
    study(out=tmp_path / "file/out")
    assert refusal(Plan(Options()).write) == (f"{tmp_path}/file/out cannot be written: Not a directory.",
                                              "make OUT=folder with a folder you may write to.")


def test_removing_an_override_in_a_folder_given_by_hand_is_refused(study, monkeypatch):
    out = study("V0")
    monkeypatch.setenv("GPT2_MAX_TIME", "60")
    finish(out, *Plan(Options(out=str(out))).cells)
    before = snapshot(out)
    assert Plan(Options(out=str(out))).rows()[0][1].state == "done"
    monkeypatch.delenv("GPT2_MAX_TIME")
    what, todo = refusal(Plan, Options(out=str(out)))
    assert what == (f"{out}/test_V0_adamwspam_none holds another result (its result is of another configuration: "
                    "COMPILE_REGIONS y -> n; GPT2_MAX_ITERS 0 -> 250; GPT2_MAX_TIME 60 -> 0).")
    assert todo == "another OUT=, or none: an override then gets its own folder." and snapshot(out) == before


def test_a_study_edited_in_the_menu_is_rerun_also_in_a_folder_given_by_hand(study):
    out = study("V0")
    finish(out, *expand(Study()))
    study("V0", "BATCH_SIZE=9")
    assert written(Options(out=str(out)))[1] == ["test_V0_adamwspam_none"]


def test_a_baseline_outside_the_study_is_found_before_the_training(study):
    study("V0 V1", 'BASELINE="V9"')
    assert refusal(Plan, Options())[0] == "BASELINE=V9 is not one of the study's steps (V0 V1)."


# Some steps, and parents

@pytest.fixture
def family(dotconfig, tmp_path):
    """A copy of the project with a step C that starts from V1, and D that starts from C; its plan as a command."""
    tree = copy_tree(tmp_path / "tree")
    for name, parent in (("C", "V1"), ("D", "C")):
        (tree / f"gpt2/steps/{name}.config").write_text(f'# Help: from {parent}\nCONFIG_INIT_FROM_STEP="{parent}"\n')
    out = tmp_path / "out"

    def plan(steps, *arguments, **variables):
        dotconfig(*TINY, f'ABLATION_STEPS="{steps}"', f'OUTPUT_DIR="{out}"', 'SEEDS="1337 5"')
        return run("scripts.plan", *arguments, tree=tree, **variables), out / "cells.mk"
    return plan


def folder(step, seed=""):
    return f"test_{step}_adamwspam_none{seed}"


def test_a_child_waits_for_its_parent_of_the_same_seed(family):
    done, makefile = family("D V0 C V1", "--write")
    assert done.returncode == 0 and done.stderr.startswith("custom: 8 of 8 cells to run in ")
    needs = {name: [os.path.basename(os.path.dirname(n)) for n in pair[0]] for name, pair in commands(makefile).items()}
    assert needs == {folder(s, seed): wanted for seed in ("", "_s5") for s, wanted in {
        "V0": [], "V1": [], "C": [folder("V1", seed)], "D": [folder("C", seed)]}.items()}
    assert commands(makefile)[folder("C", "_s5")][1].endswith(f"--seed 5 --of 7/8 --parent {folder('V1', '_s5')}")


@pytest.mark.parametrize("steps, expected", [(["D"], ["D", "C", "V1"]), (["V0", "V1"], ["V0", "V1"])])
def test_steps_on_the_command_line_bring_those_they_start_from(family, steps, expected):
    done, makefile = family("D V0 C V1", "--write", *steps)
    assert done.returncode == 0
    assert sorted(targets(makefile)) == sorted(folder(s, seed) for s in expected for seed in ("", "_s5"))


def test_a_parent_that_is_done_is_no_prerequisite(family, tmp_path):
    family("V1")
    finish(tmp_path / "out", *expand(Study()))
    _, makefile = family("V1 C", "--write")
    assert {name: pair[0] for name, pair in commands(makefile).items()} == {folder("C"): [], folder("C", "_s5"): []}


@pytest.mark.parametrize("steps, arguments, what, todo", [
    ("V0 C", [], "step C starts from the model of V1, which is not in the study.", "add V1 to ABLATION_STEPS."),
    ("V0 V1", ["V6"], "step V6 is not in study custom (V0 V1).", "add it to ABLATION_STEPS in make menuconfig."),
])
def test_a_step_that_is_missing_is_an_error(family, steps, arguments, what, todo):
    done, makefile = family(steps, "--write", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {what}\n  try: {todo}\n") and not makefile.exists()


def test_reasons_are_given_when_asked_for(family):
    done, _ = family("V0", "--write", "--reasons")
    assert "| test_V0_adamwspam_none    | planned | run | never ran |" in done.stderr


# What a shell may put in

@pytest.mark.parametrize("variables, what, todo", [
    *[({"GPT2_MAX_TIME": value}, f"environment GPT2_MAX_TIME: GPT2_MAX_TIME={value} is not a whole number.",
       "give GPT2_MAX_TIME a whole number.") for value in ("abc", "; rm -rf x")],
    ({"GPT2_MAX_TIME": "-1"}, "environment GPT2_MAX_TIME: GPT2_MAX_TIME=-1 is outside its range 0..31536000.",
     "give GPT2_MAX_TIME a value within it."),
    ({"GPT2_MAX_TIME": "a\nb\rc"}, "environment GPT2_MAX_TIME: GPT2_MAX_TIME=a b c is not a whole number.",
     "give GPT2_MAX_TIME a whole number."),
    ({"GPT2_MAX_ITERS": "1000000001"},
     "environment GPT2_MAX_ITERS: GPT2_MAX_ITERS=1000000001 is outside its range 0..1000000000.",
     "give GPT2_MAX_ITERS a value within it."),
    ({"GPT2_MAX_TIME": "5", "GPT2_MAX_TOKENS": "5"}, "exactly one of seconds, iterations and tokens must be the budget, but "
     "GPT2_MAX_TIME=5, GPT2_MAX_ITERS=250, GPT2_MAX_TOKENS=5.", "give one of them, e.g. GPT2_MAX_TIME=7200 make."),
    ({"KABLATE_TIME": "1h"}, "command line TIME: GPT2_MAX_TIME=1h is not a whole number.",
     "give GPT2_MAX_TIME a whole number."),
    ({"KABLATE_SEEDS": "1 1"}, "SEEDS='1 1' names a seed twice.", "name every seed once."),
    ({"KABLATE_SEEDS": "three"}, "SEEDS='three' is neither a count nor a list of seeds.",
     "give a count like SEEDS=3 or a list like SEEDS='1337 1338 1339'."),
])
def test_bad_input_ends_in_two_lines_and_nothing_is_written(study, tmp_path, variables, what, todo):
    out = study()
    before = sorted(tmp_path.rglob("*"))
    done = run("scripts.plan", "--write", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {what}\n  try: {todo}\n")
    assert sorted(tmp_path.rglob("*")) == before and not out.exists()
    assert not (ROOT / "x").exists()


def test_a_schema_is_parsed_once_a_plan(study, monkeypatch):
    """What makes ten thousand cells cheap; a second parse would be a second truth, too."""
    study()
    parsed = []
    real = Schema.__init__
    monkeypatch.setattr(Schema, "__init__", lambda self, *a: (parsed.append(1), real(self, *a))[1])
    Plan(Options())
    assert parsed == [1]
