"""Losses by position: means and paired differences part by part, in every form of a report, and what is not known stays out."""

import json

import pytest

from lib import stats
from lib.cells import expand
from lib.config import Study
from lib.plan import Options, Plan
from lib.report import files, markdown, page, positions
from lib.report.content import content
from tests.harness import TINY, finish


def record(*losses):
    return {"val_loss_by_position": list(losses) or None}


def test_means_part_by_part():
    assert positions.mean([record(4.0, 3.0), record(5.0, 3.5)]) == [4.5, 3.25]
    assert positions.mean([record(4.0, 3.0), record()]) is None, "an older cell"
    assert positions.mean([record(4.0, 3.0), record(4.0, 3.0, 2.0)]) is None
    assert positions.mean([]) is None


def test_differences_are_paired():
    arm, base = [record(4.1, 3.0), record(5.2, 3.0)], [record(4.0, 2.0), record(5.0, 3.0)]
    found = positions.compared(arm, base, stats.paired)
    assert [part["difference"] for part in found] == pytest.approx([0.15, 0.5])
    assert found[0]["low"] == pytest.approx(stats.paired([0.1, 0.2]).low) and found[1]["high"] > 1
    assert positions.compared(arm, [base[0], record()], stats.paired) is None
    assert positions.compared([], [], stats.paired) is None
    alone = positions.compared(arm[:1], base[:1], stats.paired)
    assert alone[1] == {"difference": 1.0, "low": None, "high": None}


@pytest.fixture
def study(dotconfig, tmp_path):
    """study(V1=[...]): a study of V0, V1, V2 over three seeds, whose losses by position are these, seed by seed."""
    def build(**losses):
        dotconfig(*TINY, "SEED=1", 'ABLATION_STEPS="V0 V1 V2"', 'SEEDS="1 2 3"', f'OUTPUT_DIR="{tmp_path}/out"', 'STUDY="mine"')
        Plan(Options()).write()
        for cell in expand(Study()):
            own = losses.get(cell.step)
            finish(tmp_path / "out", cell, val_loss=3 + cell.seed / 9, val_loss_by_position=own and own[cell.seed - 1])
        return content(Plan(Options()))
    return build


BASE, LATER = [[4, 3, 2, 1], [4, 3, 2, 1.5], [4, 3, 2, 2]], [[4, 3, 2, 1.1], [4, 3, 2, 1.6], [4, 3, 2, 2.1]]


def test_every_form_of_the_report_has_them(study, tmp_path):
    found = study(V0=BASE, V1=LATER)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    v0, v1, v2 = found["steps"]
    assert v0["mean"]["val_loss_by_position"] == [4, 3, 2, 1.5]
    assert v1["comparison"]["by_position"][3]["difference"] == pytest.approx(0.1) and v2["comparison"]["by_position"] is None
    part = markdown.render(found).split("## By position\n\n")[1].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part]
    assert cells[0] == ["step", "0 to 25 %", "25 to 50 %", "50 to 75 %", "75 to 100 %"]
    assert cells[2] == ["V0", "4.0000", "3.0000", "2.0000", "1.5000"]
    assert cells[3] == ["V1", "0.0000 ± 0.0000", "0.0000 ± 0.0000", "0.0000 ± 0.0000", "+0.1000 ± 0.0000"] and len(cells) == 4
    shown = page.render(found, {})
    assert "By position" in shown and ">75 to 100 %</th>" in shown and shown.count(">+0.1000 ± 0.0000</td>") == 1
    files.write(tmp_path, found)
    assert json.loads((tmp_path / "report.json").read_text())["steps"][1]["comparison"]["by_position"]


def test_a_report_without_any_has_no_section(study):
    for found in (study(), study(V0=BASE), study(V1=LATER)):
        assert "By position" not in markdown.render(found) and "By position" not in page.render(found, {})


def test_an_invalid_comparison_shows_no_numbers(study):
    found = study(V0=BASE, V1=LATER)
    found["steps"][1]["comparison"]["word"] = "INVALID"
    assert "By position" not in markdown.render(found)
