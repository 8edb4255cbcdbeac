"""The report from records made up on disk: every cell is in a row, and no difference is more than it can be."""

import math
import re

import pytest

from lib.cells import expand
from lib.config import Study
from lib.plan import Options, Plan
from lib.report import failures, render
from lib.tables import count, duration, table
from tests.harness import MEASURED, TINY, finish, run

HEADER = ["step", "seeds", "final val loss", "perplexity", "to V0", "tokens", "tokens/s", "parameters", "peak memory", "state"]
SIZES = ["256.0 k", "12.8 k", "453,632", "300 MiB"]


@pytest.fixture
def study(dotconfig, tmp_path):
    """study("V0 V1", "SEEDS=...", V1=[3.1, None, "failed"]): a study whose cells ended so, seed by seed; its plan."""
    def build(steps="V0 V1", *assignments, seeds="1 2 3", **losses):
        dotconfig(*TINY, "SEED=1", f'ABLATION_STEPS="{steps}"', f'SEEDS="{seeds}"', f'OUTPUT_DIR="{tmp_path}/out"',
                  'STUDY="mine"', *assignments)
        for cell in expand(Study()):
            wanted = losses.get(cell.step) or losses.get(f"{cell.step}_{cell.optimizer}")
            end = wanted[cell.seed - 1] if wanted else None
            if isinstance(end, str):
                finish(tmp_path / "out", cell, state=end, reason=f"it {end}")
            elif end is not None:
                finish(tmp_path / "out", cell, val_loss=end, val_perplexity=math.exp(end) if end < 700 else None)
        return Plan(Options())
    return build


def rows(text):
    """The table's cells, below its header."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == HEADER or lines[0][4].startswith("to ")
    return lines[2:]


def test_a_row_a_step_with_means_over_seeds(study):
    text = render(study(V0=[3.0, 3.2, 3.1], V1=[2.8, 3.1, 2.8]))
    assert text.startswith("# mine\n\n| step ")
    assert rows(text) == [["V0", "3/3", "3.1000 ± 0.1000", "22.27", "", *SIZES, "done"],
                          ["V1", "3/3", "2.9000 ± 0.1732", "18.36", "-0.2000", *SIZES, "done"]]
    assert "parentheses are below the practical margin of 0.01 nats." in text
    assert "With fewer than 3 seeds" not in text


def test_cells_that_are_missing_are_rows(study):
    text = render(study("V0 V1 V2", V0=[3.0, None, None]))
    assert rows(text) == [["V0", "1/3", "3.0000", "20.09", "", *SIZES, "1 done, 2 planned"],
                          ["V1", "0/3", *["-"] * 7, "planned"], ["V2", "0/3", *["-"] * 7, "planned"]]
    assert "With fewer than 3 seeds no difference here can be told from noise: `make SEEDS=3` adds seeds." in text


def test_nothing_at_all_is_a_report_too(study):
    text = render(study())
    assert [row[1] for row in rows(text)] == ["0/3", "0/3"] and "- data:" not in text


def test_differences_are_paired_by_seed(study):
    """V1 lacks seed 1 and V0 seed 3: only seed 2 counts, whatever the means say."""
    found = rows(render(study(V0=[9.0, 3.0, "failed"], V1=[None, 3.5, 1.0])))
    assert [row[4] for row in found] == ["", "+0.5000"]


def test_without_a_common_seed_there_is_no_difference(study):
    assert [row[4] for row in rows(render(study(V0=[3.0, None, None], V1=[None, 2.0, 2.0])))] == ["", "-"]
    assert [row[4] for row in rows(render(study(V0=["diverged", None, None], V1=[2.0, 2.0, 2.0])))] == ["-", "-"]


@pytest.mark.parametrize("loss, assignments, shown", [
    (3.0099, [], "(+0.0099)"), (2.9901, [], "(-0.0099)"), (3.0101, [], "+0.0101"), (2.9, ['MARGIN="0.5"'], "(-0.1000)"),
    (3.0, [], "(+0.0000)"), (3.0, ['MARGIN="0"'], "+0.0000"),
])
def test_a_difference_below_the_margin_stands_in_parentheses(study, loss, assignments, shown):
    assert rows(render(study("V0 V1", *assignments, seeds="1", V0=[3.0], V1=[loss])))[1][4] == shown


def test_another_baseline(study):
    text = render(study("V0 V1", 'BASELINE="V1"', seeds="1", V0=[3.0], V1=[2.0]))
    assert [row[4] for row in rows(text)] == ["+1.0000", ""] and " to V1 " in text and "Differences to V1" in text


def test_an_override_stands_in_the_title(study, monkeypatch):
    monkeypatch.setenv("GPT2_MAX_TIME", "60")
    assert render(study(seeds="1", V0=[3.0])).startswith("# mine with GPT2_MAX_TIME=60\n\n")


def test_each_optimizer_is_compared_with_its_own_baseline(study):
    text = render(study("V0 V1", 'OPTIMIZERS="adamw sinkgd"', seeds="1", V0_adamw=[3.0], V1_adamw=[2.0], V0_sinkgd=[5.0],
                        V1_sinkgd=[5.5]))
    assert [[row[0], row[4]] for row in rows(text)] == [["V0 adamw", ""], ["V1 adamw", "-1.0000"], ["V0 sinkgd", ""],
                                                        ["V1 sinkgd", "+0.5000"]]


def test_a_step_with_an_optimizer_of_its_own_is_compared_with_the_only_baseline(study):
    plan = study("V0 V0@OPTIMIZER_ADAMW=y", seeds="1", V0=[3.0], **{"V0@OPTIMIZER_ADAMW=y": [2.0]})
    assert [row[4] for row in rows(render(plan))] == ["", "-1.0000"]


def test_what_ended_without_a_result_is_named_with_its_reason(study, tmp_path):
    plan = study("V0 V1 V2", V0=[3.0, "failed", "diverged"], V1=["failed", "failed", "failed"], V2=[3.0, 3.0, 3.0])
    text = render(plan)
    assert [row[-1] for row in rows(text)] == ["1 done, 1 failed, 1 diverged", "failed", "done"]
    for line in ("- V0 seed 2: failed: it failed", "- V0 seed 3: diverged: it diverged", "- V1 seed 3: failed: it failed"):
        assert f"{line}\n" in text
    assert failures(plan) == ["V1 seed 1 (failed)", "V0 seed 2 (failed)", "V1 seed 2 (failed)", "V1 seed 3 (failed)"]


def test_stale_and_interrupted_cells_count_as_missing(study, tmp_path):
    study("V0 V1", "BATCH_SIZE=9", seeds="1", V0=[3.0], V1=[2.0])
    (tmp_path / "out/test_V1_adamwspam_none/checkpoint.pt").touch()
    (tmp_path / "out/test_V1_adamwspam_none/metrics.json").unlink()
    interrupted = Plan(Options())
    assert failures(interrupted) == ["V1 seed 1 (interrupted)"]
    assert "- V1 seed 1: interrupted: has a checkpoint to resume from\n" in render(interrupted)
    plan = study("V0 V1", seeds="1")
    text = render(plan)
    assert [row[1:] for row in rows(text)] == [["0/1", *["-"] * 7, "stale"]] * 2 and failures(plan) == []
    assert "- V0 seed 1: stale: its result is of another configuration: BATCH_SIZE 9 -> 8\n" in text


def test_what_the_numbers_rest_on_is_said(study):
    text = render(study(seeds="1", V0=[3.0]))
    for line in ("- data: pystdlib, bytes tokens, 9.0 M for training, evaluation set 0123456789ab; unigram entropy 3.250 nats",
                 "- machine: a CPU, float32, torch 2.13.0, compile off, 1 threads",
                 "- outside the budget, mean of a cell: start and logging 2 s, compile 0 s, evaluation 1 min 01 s; "
                 "training 20 s"):
        assert f"{line}\n" in text


def test_cells_that_cannot_be_compared_are_named(study, tmp_path):
    plan = study(seeds="1", V0=[3.0], V1=[3.1])
    assert "not comparable" not in render(plan)
    record = next(s.record for c, s, _ in plan.rows() if c.step == "V1")
    record["data"] = record["data"] | {"eval_hash": "f" * 64}
    record["environment"] = record["environment"] | {"device": "another CPU"}
    assert "- V1 seed 1 is not comparable with V0: different data eval_hash, device\n" in render(plan)


def test_a_loss_without_a_finite_perplexity_is_no_crash(study):
    found = rows(render(study(V0=[3.0, 3.0, 3.0], V1=[3.0, 900.0, 3.0])))
    assert found[1][3] == "-" and found[1][4] == "+299.0000"


def test_metrics_files_hold_no_nan(study, tmp_path):
    study(V0=[3.0, "diverged", 900.0])
    text = "".join(p.read_text() for p in tmp_path.glob("out/*/metrics.json"))
    assert text and not re.search(r"NaN|Infinity", text)


# The command

@pytest.mark.parametrize("end, code, error", [
    ("diverged", 0, ""),
    ("failed", 1, "without a result: V1 seed 1 (failed); make resumes interrupted cells, make RETRY=1 runs failed "
     "ones again\n")])
def test_the_report_is_printed_written_and_fails_with_failed_cells(study, tmp_path, end, code, error):
    study(seeds="1", V0=[3.0], V1=[end])
    done = run("scripts.report")
    written = (tmp_path / "out/report.md").read_text()
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == f"\n{written}\nwritten to {tmp_path}/out/report.md\n" and written == render(Plan(Options()))


def test_a_report_that_cannot_be_written_is_two_lines(study, tmp_path):
    study(seeds="1")
    (tmp_path / "file").touch()
    done = run("scripts.report", KABLATE_OUT=tmp_path / "file/out")
    assert done.returncode == 2 and done.stderr == (f"error: {tmp_path}/file/out cannot be written: Not a directory.\n"
                                                    "  try: make report OUT=folder with a folder you may write to.\n")


# Tables

def test_a_table_is_aligned_markdown():
    assert table(["a", "number"], [["x|y", 5], ["line\nbreak", "1,234"]], "lr") == (
        "| a          | number |\n|------------|-------:|\n| x\\|y       |      5 |\n| line break |  1,234 |\n")
    assert table(["only"], []) == "| only |\n|------|\n"


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min"),
    (360000, "100 h 00 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("number, text", [
    (512, "512"), (33_100, "33.1 k"), (124.5e6, "124.5 M"), (2e9, "2.0 G"), (0, "0"), (0.25, "0.25")])
def test_counts(number, text):
    assert count(number) == text


def test_the_made_up_record_is_complete():
    """Or the report would be tested on records that no cell writes."""
    from lib import results

    set_elsewhere = {"format", "state", "reason", "study", "step", "optimizer", "seed", "identity"}
    assert MEASURED.keys() == set(results.KEYS) - set_elsewhere
