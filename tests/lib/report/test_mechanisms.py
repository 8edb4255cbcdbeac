"""What mechanisms logged last: means over seeds and layers, in every form of a report; of older reports nothing."""

import json

import pytest

from lib.cells import expand
from lib.config import Study
from lib.plan import Options, Plan
from lib.report import markdown, mechanisms, page
from lib.report.content import content
from tests.harness import TINY, finish

ROW = {"iteration": 8, "tokens": 64, "train_seconds": 1.0, "progress": 1.0, "train_loss": 3.1, "train_perplexity": 22.0,
       "val_loss": 3.0, "val_perplexity": 20.0, "best_val_loss": 3.0}


def row(first, second, **more):
    """An evaluation of a step with a gate a layer, and a number for the whole model."""
    return ROW | {"skip_std": (first + second) / 2, "skip_std/layer0": first, "skip_std/layer1": second, "compute_ratio": 0.5,
                  "w_rec_mean": 0.3, "w_rec_min": 0.1, "w_rec_max": 0.5, "w_rec_std": 0.1, "w_rec/layer0": 0.2,
                  "w_rec/layer1": 0.4, **more}


def test_of_the_last_evaluation_all_that_is_no_column_is_a_statistic():
    found = mechanisms.last([row(0.9, 0.9), row(0.0, 0.8, inactive="no path went off")])
    assert found == {"skip_std": (0.4, {"0": 0.0, "1": 0.8}), "compute_ratio": (0.5, {}), "w_rec": (0.3, {"0": 0.2, "1": 0.4})}
    assert mechanisms.last([]) == {} == mechanisms.last([ROW])
    assert mechanisms.last([ROW | {"p_ra": None}]) == {}, "a number that was not finite"


def test_the_range_over_seeds_and_that_over_layers():
    skip, ratio, _ = mechanisms.summary([[row(0.0, 0.8)], [row(0.2, 0.8)]])
    assert skip == {"name": "skip_std", "n": 2, "mean": pytest.approx(0.45), "low": 0.4, "high": 0.5,
                    "layers": {"low": pytest.approx(0.1), "high": 0.8}}
    assert ratio["layers"] is None
    assert [one["name"] for one in mechanisms.summary([[row(0.0, 0.8)], [ROW | {"compute_ratio": 0.4}]])] == ["compute_ratio"]
    assert mechanisms.summary([]) == [] == mechanisms.summary([[ROW], [row(0.0, 0.8)]])


def test_every_form_of_the_report_has_them(dotconfig, tmp_path):
    dotconfig(*TINY, "SEED=1", 'ABLATION_STEPS="V0 V1"', 'SEEDS="1 2"', f'OUTPUT_DIR="{tmp_path}"', 'STUDY="mine"')
    Plan(Options()).write()
    for cell in expand(Study()):
        finish(tmp_path, cell)
        if cell.step == "V1":
            (tmp_path / cell.name / "metrics.jsonl").write_text(json.dumps(row(0.0, 0.4 * (cell.seed))) + "\n")
    found = content(Plan(Options()))
    v0, v1 = found["steps"]
    assert v0["statistics"] == [] and [one["name"] for one in v1["statistics"]] == ["skip_std", "compute_ratio", "w_rec"]
    text = markdown.render(found)
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in text.split("## Mechanisms\n\n")[1].split("\n\n")[1].splitlines()]
    assert lines[0] == ["statistic", "V1"] and lines[2:] == [
        ["skip_std", "0.3 (0..0.6)"], ["compute_ratio", "0.5"], ["w_rec", "0.3 (0.2..0.4)"]]
    html = page.render(found, {})
    assert "0.3 (0..0.6)" in html.split('id="mechanisms"')[1].split("</table>")[0]
    for step in found["steps"]:
        del step["statistics"]
    assert "Mechanisms" not in markdown.render(found) and 'id="mechanisms"' not in page.render(found, {})
