"""How much smaller caches are: of which part, over seeds, in every form of a report, and what is not known stays out."""

import csv
import json

import pytest

from lib.cells import expand
from lib.config import Study
from lib.plan import Options, Plan
from lib.report import caches, files, markdown
from lib.report.content import content
from tests.harness import TINY, finish

FULL = {"keys": 1000, "values": 1000}


def record(**parts):
    return {"kv_cache_bytes": sum(parts.values()), "kv_cache_parts": parts}


def old(size):
    """As a cell left it before its parts were recorded."""
    return {"kv_cache_bytes": size, "kv_cache_parts": None}


@pytest.mark.parametrize("parts, expected", [
    ({"keys": 1000, "values": 400, "index": 100}, (0.6, 0.5, 0.25)),
    ({"keys": 1000, "values": 500}, (0.5, 0.5, 0.25)),
    ({"keys": 1000}, (None, None, 0.5)), ({"latents": 200}, (None, None, 0.9)), ({}, (None, None, 1.0)),
    ({"keys": 2000, "values": 1000}, (0.0, 0.0, -0.5)),
])
def test_shares_by_part(parts, expected):
    assert tuple(caches.savings(parts, FULL).values()) == pytest.approx(expected)
    assert tuple(caches.savings(parts, FULL)) == caches.SHARES


def test_means_over_seeds_because_a_learned_share_keeps_another_number_each_time():
    seeds = [record(keys=400, values=400, index=20), record(keys=600, values=600, index=40)]
    found = caches.compared(seeds, [record(**FULL)] * 2)
    assert found["bytes"] == 1030 and found["parts"] == {"keys": 500, "values": 500, "index": 30}
    assert found["smaller"] == pytest.approx({"values": 0.5, "values_and_index": 0.47, "kv_cache": 0.485})


@pytest.mark.parametrize("own, base", [
    ([record(**FULL)], [record(**FULL)]), ([old(2000)], [record(**FULL)]), ([], [record(**FULL)]), ([record(values=1)], []),
    ([old(None)], [old(None)])])
def test_the_same_cache_or_an_unknown_one_is_no_row(own, base):
    assert caches.compared(own, base)["smaller"] is None


@pytest.mark.parametrize("own, base", [
    (old(500), record(**FULL)), (record(keys=1000, values=500), old(2000)), (old(500), old(2000))])
def test_of_older_records_only_the_whole_is_known(own, base):
    smaller = caches.compared([own], [base])["smaller"]
    assert smaller == {"values": None, "values_and_index": None, "kv_cache": 1 - own["kv_cache_bytes"] / base["kv_cache_bytes"]}


def test_as_many_bytes_of_other_parts_is_another_cache():
    assert caches.compared([record(latents=2000)], [record(**FULL)])["smaller"]["kv_cache"] == 0


def test_a_larger_cache_is_called_larger():
    step = {"name": "L1", "kv_cache": caches.compared([record(keys=2000, values=1000)], [record(**FULL)])}
    assert caches.cells(step) == ["L1", "3 KiB", "2 KiB", "0.0 %", "0.0 %", "50.0 % larger"]


def test_a_report_of_before_has_no_section():
    assert caches.rows([{"name": "V0"}, {"name": "V1", "kv_cache": None}]) == []
    assert caches.section({"steps": [{"name": "V0"}]}) is None


@pytest.fixture
def report(dotconfig, tmp_path):
    """The content of a study of these finished steps: {step: what its cells recorded of their cache}."""
    def build(**ends):
        dotconfig(*TINY, "SEED=1", f'ABLATION_STEPS="{" ".join(ends)}"', 'SEEDS="1 2"', f'OUTPUT_DIR="{tmp_path}/out"',
                  'STUDY="mine"')
        Plan(Options()).write()
        for cell in expand(Study()):
            finish(tmp_path / "out", cell, **ends[cell.step])
        return content(Plan(Options()))
    return build


def test_every_form_of_the_report_says_it(report):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    from lib.report import page

    found = report(V0=record(**FULL), V19=record(keys=1000, values=400, index=100), MLA0=record(latents=200), V1=record(**FULL))
    text = markdown.render(found)
    section = text.split("## KV cache\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == caches.HEADER and lines[2:] == [
        ["V19", "1 KiB", "2 KiB", "60.0 %", "50.0 %", "25.0 %"], ["MLA0", "0 KiB", "2 KiB", "-", "-", "90.0 %"]]
    rows = {row["name"]: row for row in csv.DictReader(files.spreadsheet(found).splitlines())}
    assert [float(rows["V19"][f"smaller_{share}"]) for share in caches.SHARES] == [0.6, 0.5, 0.25]
    assert rows["V0"]["smaller_kv_cache"] == rows["V1"]["smaller_kv_cache"] == rows["MLA0"]["smaller_values"] == ""
    assert json.loads(json.dumps(found))["steps"][1]["kv_cache"]["parts"] == {"keys": 1000, "values": 400, "index": 100}
    html = page.render(found, {})
    assert html.count('id="kv-cache"') == 1 and "50.0 %" in html.split('id="kv-cache"')[1]


def test_a_study_of_one_kind_of_cache_has_no_section(report):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    from lib.report import page

    found = report(V0=record(**FULL), V1=record(**FULL))
    assert "## KV cache" not in markdown.render(found) and 'id="kv-cache"' not in page.render(found, {})
