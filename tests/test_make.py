"""The harness as a person uses it: make in a shell, real cells, signals, and what is left on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.harness import ROOT, copy_tree, copy_tree_that_trains_nothing, replace, wait_for
from tests.lib.test_process import alive

STUDY = """CONFIG_MODEL_TINY=y
CONFIG_DATA_PYSTDLIB=y
CONFIG_GPT2_BLOCK_SIZE=32
CONFIG_BATCH_SIZE=2
CONFIG_GPT2_GRADIENT_ACCUMULATION=1
CONFIG_GPT2_EVAL_SAMPLES=2
CONFIG_GPT2_LOG_INTERVAL=2
CONFIG_DEVICE_CPU=y
CONFIG_CPU_THREADS=1
# CONFIG_GPT2_COMPILE is not set
CONFIG_STUDY="micro"
CONFIG_JOBS=1
"""


class Study:
    """A study in a folder of its own, and make on it. Reports are not drawn, unless a test wants to see that too: the
    pictures would take longer than the cells."""

    def __init__(self, folder: Path, tree: Path = ROOT, draws: bool = False, **symbols):
        self.folder, self.tree, self.out = folder, tree, folder / "out"
        self.path = str(folder / "without")
        if not draws:
            self.draw_no_more()
        symbols = {"ABLATION_STEPS": '"V0 V1"', "GPT2_MAX_ITERS": 4, "OUTPUT_DIR": f'"{self.out}"'} | symbols
        self.config = folder / ".config"
        self.config.write_text(STUDY + "".join(f"CONFIG_{k}={v}\n" for k, v in symbols.items()))

    def draw_no_more(self):
        (self.folder / "without").mkdir()
        (self.folder / "without/vl_convert.py").write_text("raise ModuleNotFoundError(name='vl_convert')\n")

    def environment(self, **extra):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPT2_", "KABLATE_", "MAKE", "MFLAGS"))}
        return clean | {"KCONFIG_CONFIG": str(self.config), "PYTHONUNBUFFERED": "1", "PYTHONPATH": self.path} | extra

    def start(self, *arguments, **extra):
        return subprocess.Popen(["make", f"PYTHON={sys.executable}", *arguments], cwd=self.tree, text=True,
                                env=self.environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                start_new_session=True)

    def make(self, *arguments, **extra):
        process = self.start(*arguments, **extra)
        output = process.communicate(timeout=240)[0]
        return process.returncode, output

    def metrics(self, step, out=None):
        return json.loads(((out or self.out) / f"test_{step}_adamwspam_none/metrics.json").read_text())

    def weights(self, step, out=None):
        path = (out or self.out) / f"test_{step}_adamwspam_none/model.pt"
        return torch.load(path, weights_only=True)["model"]

    def cell_pids(self):
        """Processes that train a cell of this study."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--cell" in words and any(str(self.folder).encode() in w for w in words):
                found.append(int(entry.parent.name))
        return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A tree whose cells end at once: what make does around many cells does not need them trained."""
    return copy_tree_that_trains_nothing(tmp_path_factory.mktemp("quick") / "tree")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two cells, run and drawn once."""
    study = Study(tmp_path_factory.mktemp("finished"), draws=True)
    study.code, study.output = study.make()
    study.draw_no_more()
    return study


def test_make_runs_the_study_to_a_report(finished):
    assert finished.code == 0, finished.output
    for step in ("V0", "V1"):
        folder = finished.out / f"test_{step}_adamwspam_none"
        assert {p.name for p in folder.iterdir()} == {".config", ".lock", "provenance.json", "metrics.json", "metrics.jsonl",
                                                      "model.pt", "training.log"}
        assert finished.metrics(step)["state"] == "done" and finished.metrics(step)["iterations"] == 4
        assert f"{step} seed 1337: val loss" in finished.output
    report = (finished.out / "report.md").read_text()
    assert report in finished.output and "| V1   | UNDERPOWERED |" in report
    assert {p.suffix for p in finished.out.glob("report.*")} == {".md", ".csv", ".json", ".html"}


def test_the_plan_is_on_record_and_shown_before_the_first_cell(finished):
    entry, = json.loads((finished.out / "plan/design.json").read_text())
    shown = finished.output.index(f"plan {entry['hash']}: paired t on the final validation loss (nats), 1 paired seed, ")
    assert shown < finished.output.index("V0 seed 1337: val loss") and entry["seen"] == 0
    assert entry["hash"] in (finished.out / "report.md").read_text()
    first = json.loads((finished.out / "test_V0_adamwspam_none/metrics.json").read_text())
    assert entry["written"] <= first["started"]


def test_a_second_make_does_nothing(finished):
    cells = [finished.out / f"test_{s}_adamwspam_none" for s in ("V0", "V1")]
    before = [snapshot(c) for c in cells]
    begun = time.monotonic()
    code, output = finished.make()
    assert code == 0 and "nothing to run, 2 cells are in" in output
    assert [snapshot(c) for c in cells] == before
    assert time.monotonic() - begun < 20  # under 3 s on a quiet machine; nothing that imports torch


def test_side_by_side_gives_the_same_numbers(finished, tmp_path):
    study = Study(tmp_path)
    code, output = study.make("cells", "JOBS=2")
    assert code == 0 and "2 cells to run in" in output and ", 2 side by side" in output, output
    for step in ("V0", "V1"):
        assert equal(study.weights(step), finished.weights(step))
        assert study.metrics(step)["val_loss"] == finished.metrics(step)["val_loss"]


def test_one_step_and_an_override_in_their_own_places(finished, tmp_path):
    """make V1 runs V1 alone; a time budget from the environment gets its own folder, is legal at 2 s, and finishes."""
    study = Study(tmp_path)
    code, output = study.make("V1", GPT2_MAX_TIME="2")
    assert code == 0, output
    out = tmp_path / "out+GPT2_MAX_TIME-2"
    assert not study.out.exists() and not (out / "test_V0_adamwspam_none").exists()
    record = study.metrics("V1", out)
    assert 2 <= record["train_seconds"] < 4 and record["budget_progress"] == 1
    provenance = json.loads((out / "test_V1_adamwspam_none/provenance.json").read_text())
    assert provenance["symbols"]["GPT2_MAX_TIME"] == ["2", "environment GPT2_MAX_TIME"]
    assert "| V0   | baseline   |" in (out / "report.md").read_text() and "V0 seed 1337 planned" in output


def test_more_seeds_run_only_what_is_missing_and_are_marked(tmp_path, quick):
    study = Study(tmp_path, tree=quick)
    assert study.make("cells")[0] == 0
    before = snapshot(study.out / "test_V0_adamwspam_none")
    code, output = study.make("SEEDS=2")
    assert code == 0 and "2 of 4 cells to run" in output, output
    assert snapshot(study.out / "test_V0_adamwspam_none") == before
    assert "seeds 1338 were added after a look at the results" in (study.out / "report.md").read_text()
    plans = json.loads((study.out / "plan/design.json").read_text())
    assert [p["plan"]["seeds"] for p in plans] == [[1337], [1337, 1338]] and [p["seen"] for p in plans] == [0, 1]


def test_until_decided_adds_blocks_and_ends(tmp_path, quick):
    """Two looks, one plan, and a report at the end. Without a margin nothing can be equivalent."""
    study = Study(tmp_path, tree=quick, SEEDS='"2"', MARGIN='"0.0"')
    code, output = study.make("UNTIL=decided", "MAX_SEEDS=4", "JOBS=2")
    assert code == 0, output
    assert "micro: 6 of 6 cells to run" in output and "undecided so far: V1\n" in output and "2 of 8 cells to run" in output
    assert "undecided so far: V1, and 4 seeds are the most (MAX_SEEDS=) or a cell has failed" in output
    found = json.loads((study.out / "report.json").read_text())
    assert found["plan"]["test"] == "anytime" and found["plan"]["seeds"] == [1337, 1338, 1339, 1340]
    assert len(json.loads((study.out / "plan/design.json").read_text())) == 1
    assert "anytime-valid paired t" in output and "written to" in output
    code, output = study.make("UNTIL=decided", "MAX_SEEDS=4")
    assert code == 0 and "nothing to run, 8 cells" in output, output


def test_a_failed_cell_ends_until_decided_with_a_report(tmp_path):
    tree = copy_tree_that_trains_nothing(tmp_path / "tree")
    start = "loss = 3 "
    replace(tree / "gpt2/train_ra_mla.py", start, f"if provenance['step'] == 'V1':\n    raise MemoryError\n{start}")
    study = Study(tmp_path, tree=tree)
    code, output = study.make("UNTIL=decided")
    assert code == 2 and output.count("failed: out of memory: MemoryError (train_ra_mla.py, line ") == 6, output
    assert "without a result: V1 seed 1337 (failed), V1 seed 1338 (failed), V1 seed 1339 (failed)" in output


def test_the_learning_rate_sweep(tmp_path, quick):
    study = Study(tmp_path, tree=quick, ABLATION_STEPS='"V0 V1"', TUNE_LR='"0.25 1"', LEARNING_RATE='"0.05"')
    code, output = study.make("tune-lr", "JOBS=2")
    assert code == 0, output
    found = json.loads((study.out / "report.json").read_text())
    assert {(e["step"], e["best"]) for e in found["sweep"]} == {("V0", 0.25), ("V1", 0.25)}, "five times too high a rate"
    assert [s["name"] for s in found["steps"]] == ["V0", "V1", "V0 (tuned lr x0.25)", "V1 (tuned lr x0.25)"]
    assert found["complete"] and "## At each step's best learning rate" in output


def test_cells_of_two_machines_make_one_study(tmp_path, quick):
    """Each has half of the seeds of one plan; the archive of one, without weights, goes into the other's folder."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (Study(tmp_path / name, tree=quick, SEEDS='"2"') for name in "ab")
    archive = tmp_path / "other.tar.xz"
    assert one.make("SEEDS=1337")[0] == 0 and other.make("SEEDS=1338", "JOBS=2")[0] == 0
    assert "INCOMPLETE" in (one.out / "report.md").read_text() and len(list(tmp_path.rglob("model.pt"))) == 4
    assert other.make("pack", f"FILE={archive}")[0] == 0 and archive.stat().st_size < 100_000
    code, output = one.make("unpack", f"FILE={archive}")
    assert code == 0, output
    code, output = one.make()
    assert code == 0 and "nothing to run, 4 cells" in output and len(list(one.out.rglob("model.pt"))) == 2
    found = json.loads((one.out / "report.json").read_text())
    assert found["complete"] and [s["seeds_done"] for s in found["steps"]] == [2, 2] and found["plan"]["later_seeds"] == []


def test_killed_cells_resume_bit_for_bit(tmp_path):
    """kill -9 of the training process: the study goes on, says so, and the next make resumes from the checkpoint."""
    symbols = {"ABLATION_STEPS": '"V3"', "GPT2_MAX_ITERS": 600, "CHECKPOINT_INTERVAL": 1}  # several seconds
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, killed = Study(tmp_path / "a", **symbols), Study(tmp_path / "b", **symbols)
    assert straight.make("cells")[0] == 0
    folder = killed.out / "test_V3_adamwspam_none"
    process = killed.start("cells")
    wait_for(lambda: (folder / "checkpoint.pt").exists(), seconds=60)
    os.kill(killed.cell_pids()[0], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "interrupted by signal 9 after" in output
    assert not (folder / "metrics.json").exists()
    assert "| interrupted | run" in killed.make("plan")[1]
    code, output = killed.make("cells")
    assert code == 0, output
    assert killed.metrics("V3")["resumed"] == 1
    assert equal(killed.weights("V3"), straight.weights("V3"))
    assert killed.metrics("V3")["val_loss"] == straight.metrics("V3")["val_loss"]


def test_a_cell_whose_data_have_changed_goes_on_with_the_old_or_is_archived_for_the_new(tmp_path):
    """What its row and make plan say to do, both done from the same interrupted cell."""
    data, tokens = tmp_path / "data", [bytes([n + 1, 0]) * 3000 for n in range(9)]
    data.mkdir()
    (data / "val.bin").write_bytes(tokens[0])
    (data / "train.bin").write_bytes(b"".join(tokens))
    study = Study(tmp_path, ABLATION_STEPS='"V0"', GPT2_MAX_ITERS=16, DATA_LOCAL_DIR=f'"{data}"')
    replace(study.config, "CONFIG_DATA_PYSTDLIB=y\n", "CONFIG_DATA_LOCAL=y\n")
    folder = study.out / "test_V0_adamwspam_none"
    process = study.start("cells")
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, seconds=60)
    os.killpg(process.pid, signal.SIGINT)
    assert "interrupted after" in process.communicate(timeout=60)[0]
    (data / "train.bin").write_bytes(b"".join(reversed(tokens)))
    assert "failed: refused: " in study.make("cells")[1]
    advice = "restore the data and make RETRY=1, which goes on, or make RETRY=1 as it is, which starts anew"
    assert advice in study.make("plan")[1]
    shutil.copytree(study.out, tmp_path / "interrupted")
    for restored in (False, True):
        if restored:
            shutil.rmtree(study.out)
            shutil.copytree(tmp_path / "interrupted", study.out)
            (data / "train.bin").write_bytes(b"".join(tokens))
        code, output = study.make("cells", "RETRY=1")
        assert code == 0 and study.metrics("V0")["state"] == "done", output
        assert study.metrics("V0")["resumed"] == (1 if restored else 0)
        archived = [path.name for path in (study.out / "archive").glob("*/checkpoint.pt")]
        assert archived == ([] if restored else ["checkpoint.pt"])


def test_a_long_program_does_not_outlive_a_make_that_is_killed(tmp_path):
    study = Study(tmp_path)
    process = study.start("check", "ALL=1")

    def children():
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in found if b"scripts.check" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    child, = wait_for(children)
    time.sleep(1)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(child), seconds=15)
    process.stdout.close()


def test_a_cell_killed_before_its_first_checkpoint_is_not_forgotten(tmp_path):
    study = Study(tmp_path, ABLATION_STEPS='"V0"')
    process = study.start()
    os.kill(wait_for(study.cell_pids)[0], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "make starts it anew" in output and "without a result: V0 seed 1337" in output
    assert study.make("cells")[0] == 0 and study.metrics("V0")["resumed"] == 0


def test_stopping_before_the_first_step_ends_at_once(tmp_path):
    """A process that is still starting (or compiling) has nothing to save and does not wait for a step."""
    study = Study(tmp_path, ABLATION_STEPS='"V0"', GPT2_MAX_ITERS=1000000)
    process = study.start()
    wait_for(study.cell_pids)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    wait_for(lambda: not study.cell_pids(), seconds=10)
    assert not (study.out / "test_V0_adamwspam_none/metrics.json").exists()
    assert "| interrupted | run" in study.make("plan")[1]


def test_nohup_survives_a_hang_up(tmp_path):
    study = Study(tmp_path, ABLATION_STEPS='"V0"', GPT2_MAX_ITERS=60)
    process = subprocess.Popen(["nohup", "make", f"PYTHON={sys.executable}", "cells"], cwd=ROOT, env=study.environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: (study.out / "test_V0_adamwspam_none/metrics.jsonl").exists(), seconds=60)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and study.metrics("V0")["state"] == "done"


@pytest.mark.parametrize("how", ["ctrl-c", "terminate make", "kill -9 make"])
def test_stopping_make_stops_the_cell_and_loses_nothing(tmp_path, how):
    study = Study(tmp_path, ABLATION_STEPS='"V0 V1"', GPT2_MAX_ITERS=1000000)
    folder = study.out / "test_V0_adamwspam_none"
    process = study.start()
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, seconds=60)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does; the cell is in a group of its own
    else:
        os.kill(process.pid, signal.SIGTERM if how == "terminate make" else signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not study.cell_pids(), seconds=60)
    assert (folder / "checkpoint.pt").exists() and not (folder / "metrics.json").exists()
    assert not (study.out / "test_V1_adamwspam_none/metrics.jsonl").exists(), "no further cell starts"
    assert list(folder.glob(".*.tmp")) == []


def test_stopping_never_deletes_a_result(finished):
    """make deletes half-made targets on interrupt; metrics.json is precious."""
    study, folder = finished, finished.out / "test_V0_adamwspam_none"
    before = (folder / "metrics.json").read_bytes()
    process = study.start()
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert (folder / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("arguments, extra, message", [
    (["defconfig-gpt2-ra-ablatoin"], {},
     "error: there is no defconfig 'gpt2-ra-ablatoin'.\n  try: did you mean gpt2-ra-ablation?"),
    (["OUT=a b"], {}, "holds a character that make cannot take"),
    (["OUT=/proc/nowhere"], {}, "cannot be written"),
    ([], {"GPT2_MAX_TIME": "abc"}, "error: environment GPT2_MAX_TIME: GPT2_MAX_TIME=abc is not a whole number."),
    ([], {"GPT2_MAX_TIME": "-1"}, "GPT2_MAX_TIME=-1 is outside its range"),
    ([], {"GPT2_MAX_TIME": "; rm -rf x"}, "GPT2_MAX_TIME=; rm -rf x is not a whole number."),
    (["SEEDS=1 1"], {}, "names a seed twice"),
    (["V6"], {}, "step V6 is not in study micro (V0 V1)."),
    (["STUDY=gpt2-controls"], {}, "try: make defconfig-gpt2-controls, then this again without STUDY=."),
])
def test_bad_input_is_one_sentence_and_nothing_is_lost(finished, arguments, extra, message):
    before = snapshot(finished.out)
    code, output = finished.make(*arguments, **extra)
    assert code != 0 and message in output and "Traceback" not in output
    assert snapshot(finished.out) == before


OVERRIDDEN = "a step with overrides is no goal; try: put it into ABLATION_STEPS in make menuconfig, as STEP@SYMBOL=VALUE."


@pytest.mark.parametrize("words, sentence", [
    ("plan V99", 'there is no step V99; try: make list-steps.'),
    ("sample V1 Vx", 'there is no step Vx; try: make list-steps.'),
    ("plan V1@RA_R=8", OVERRIDDEN),
    ("V1@RA_R=8", OVERRIDDEN),
])
def test_a_word_that_is_no_goal_ends_make_before_it_does_anything(words, sentence):
    done = subprocess.run(["make", f"PYTHON={sys.executable}", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and sentence.rstrip(".") in done.stderr


def test_missing_data_is_one_error_before_any_cell(tmp_path):
    study = Study(tmp_path, DATA_SHAKESPEARE="y", DATA_DIR=f'"{tmp_path}/none"')
    text = study.config.read_text().replace("CONFIG_DATA_PYSTDLIB=y\n", "")
    study.config.write_text(text)
    code, output = study.make()
    assert code != 0 and "The data set shakespeare is not there" in output and "try: make data" in output
    assert not list(study.out.glob("test_*"))


def test_token_ids_beyond_the_vocabulary(tmp_path):
    import numpy as np

    for name in ("train", "val"):
        np.full(4000, 60000, np.uint16).tofile(tmp_path / f"{name}.bin")
    study = Study(tmp_path, DATA_LOCAL="y", DATA_LOCAL_DIR=f'"{tmp_path}"')
    study.config.write_text(study.config.read_text().replace("CONFIG_DATA_PYSTDLIB=y\n", ""))
    code, output = study.make()
    assert code != 0 and "60000" in output and "50256" in output and "Traceback" not in output


def test_a_failed_cell_is_a_row_and_retry_runs_it_again(tmp_path):
    """A cell whose process raises: named with its last line, kept by a plain make, run again by RETRY=1."""
    tree = copy_tree_that_trains_nothing(tmp_path / "tree")
    (tmp_path / "s").mkdir()
    study = Study(tmp_path / "s", tree=tree)
    trainer, start = tree / "gpt2/train_ra_mla.py", "loss = 3 "
    original = trainer.read_text()
    replace(trainer, start, f"if provenance['step'] == 'V1':\n    raise RuntimeError('planted')\n{start}")
    code, output = study.make()
    assert code == 2 and "V1 seed 1337: failed: exception: RuntimeError: planted (train_ra_mla.py, line " in output
    assert study.metrics("V0")["state"] == "done" and study.metrics("V1")["state"] == "failed"
    trainer.write_text(original)
    code, output = study.make()
    assert code == 2 and "nothing to run" in output
    assert "; make RETRY=1 runs it again |" in study.make("plan")[1]
    code, output = study.make("cells", "RETRY=1")
    assert code == 0 and "1 of 2 cells to run" in output and study.metrics("V1")["state"] == "done"


def test_a_dependent_cell_starts_from_its_parents_model(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "gpt2/steps/Z1.config").write_text(
        '# Help: V0 continued for one step at rate 0\nCONFIG_INIT_FROM_STEP="V0"\nCONFIG_GPT2_MAX_ITERS=1\n'
        'CONFIG_LEARNING_RATE="0.0"\nCONFIG_GPT2_MIN_LR="0.0"\n')
    (tmp_path / "s").mkdir()
    study = Study(tmp_path / "s", tree=tree, ABLATION_STEPS='"V0 Z1"')
    code, output = study.make("cells", "Z1", "-j2")
    assert code == 0, output
    assert equal(study.weights("Z1"), study.weights("V0"))
    assert study.metrics("Z1")["identity"]["set"]["PARENT.MODEL_TINY"] == "y"


def test_the_default_without_a_configuration(tmp_path):
    study = Study(tmp_path)
    study.config.unlink()
    code, output = study.make("plan")
    assert code == 0 and output.startswith("no .config: using the study gpt2-ra-ablation+tiny")
    assert all(f"test_V{i}_adamwspam_none" in output for i in range(7))


def test_a_fragment_alone_is_a_step_everywhere(tmp_path):
    """In list-steps, the plan, check and the report, with its function class, and without another edit."""
    tree = copy_tree_that_trains_nothing(tmp_path / "tree")  # check trains it
    (tree / "gpt2/steps/MINE.config").write_text("# Help: R-MLP of a quarter, with a mixer\nCONFIG_ATTENTION_SDPA=y\n"
                                                 'CONFIG_MLP_RECIPROCAL=y\nCONFIG_RMLP_R_FF="1/4"\nCONFIG_RMLP_MIXER=y\n')
    study = Study(tmp_path, tree=tree, ABLATION_STEPS='"V0 MINE"')
    outputs = {goal: study.make(goal) for goal in ("list-steps", "plan", "check", "run")}
    assert [code for code, _ in outputs.values()] == [0, 0, 0, 0], outputs
    assert "  MINE       V0         R-MLP of a quarter, with a mixer\n" in outputs["list-steps"][1]
    assert "test_MINE_adamwspam_none" in outputs["plan"][1]
    row = next(line for line in outputs["check"][1].splitlines() if line.startswith("| MINE"))
    assert row.split("|")[2].strip() == "V0" and " ok " in row
    report = json.loads((study.out / "report.json").read_text())
    mine = next(step for step in report["steps"] if step["name"] == "MINE")
    assert mine["help"] == "R-MLP of a quarter, with a mixer" and mine["seeds_done"] == 1
    assert mine["function_class"]["sentence"] == "MINE is V0 in function class: a difference is optimisation only"
    assert mine["function_class"]["sentence"] in (study.out / "report.md").read_text()
