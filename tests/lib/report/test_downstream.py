"""Downstream tasks in the report: paired by item and seed, an interval that covers what it says, nothing that is not alike."""

import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lib.report import downstream


def test_one_seed_is_a_t_interval_over_items():
    d = np.random.default_rng(0).choice([-1, 0, 0, 1, 1], 50)
    found = downstream.paired([d])
    low, high = scipy_stats.t.interval(0.95, 49, d.mean(), scipy_stats.sem(d))
    assert (found["low"], found["difference"], found["high"]) == pytest.approx((low, d.mean(), high))
    assert found["covers"] == "items"
    assert downstream.paired([[1.0], [0.0]])["low"] is None


def test_with_one_seed_it_agrees_with_a_bootstrap_of_the_items():
    random = np.random.default_rng(1)
    d = random.choice([-1, 0, 0, 0, 1], 400)
    means = random.choice(d, (4000, 400)).mean(1)
    found = downstream.paired([d])
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.008)


@pytest.mark.parametrize("item_sd, seed_sd", [(1.0, 0.0), (0.0, 0.15), (1.0, 0.15)])
def test_with_several_seeds_it_holds_the_truth_in_95_of_100_worlds(item_sd, seed_sd):
    """Whichever of items and seeds makes the noise; an interval over either alone would fail one of them."""
    random, seeds, items, hits = np.random.default_rng(2), 4, 60, 0
    for _ in range(600):
        d = (0.3 + random.normal(0, item_sd, items) + random.normal(0, seed_sd, (seeds, 1))
             + random.normal(0, 0.7, (seeds, items)))
        found = downstream.paired(d)
        hits += found["low"] <= 0.3 <= found["high"]
    assert found["covers"] == "items and seeds"
    assert hits >= 0.93 * 600, hits


def test_the_formula():
    """By hand: items (0 1 2), seeds (0 1), no more."""
    found = downstream.paired([[0, 1, 2], [1, 2, 3]])
    item, seed = 2 * 1.0, 3 * 0.5
    half = scipy_stats.t.ppf(0.975, (item + seed) ** 2 / (item ** 2 / 2 + seed ** 2 / 1)) * ((item + seed) / 6) ** 0.5
    assert (found["difference"], found["high"] - found["low"]) == pytest.approx((1.5, 2 * half))


def test_where_nothing_differs_no_interval_of_no_width_is_given():
    same = downstream.paired(np.zeros((3, 5)))
    assert same == {"difference": 0.0, "low": None, "high": None, "covers": None}
    found = downstream.rows([arm("V0", one([0, 1])), arm("V1", one([0, 1]))])
    assert downstream.cells(found[1])[5:7] == ["0.0000", "none: all differences are the same"]


def one(accs, digest="h", **more):
    """What is kept of a task of one cell."""
    return {"task": {"hash": digest, "metrics": ["acc"], "items": {
        (i, f"d{i}"): {"acc": acc, "log_likelihoods": [-1.0, -2.0, -3.0, -4.0]} for i, acc in enumerate(accs)} | more}}


def arm(name, *kept, invalid=False):
    return {"name": name, "baseline": "V0", "invalid": invalid, "seeds": dict(enumerate(kept))}


def test_arms_are_compared_on_the_seeds_and_items_that_both_have():
    base = arm("V0", one([0, 1, 0, 1]), one([1, 1, 0, 1]), {})
    found = downstream.rows([base, arm("V1", one([1, 1, 0, 1]), {}, one([0, 0, 0, 0]))])
    assert [(row["name"], row["seeds"], row["items"], row["value"], row["chance"]) for row in found] == [
        ("V0", 2, 4, 0.625, 0.25), ("V1", 2, 4, 0.375, 0.25)]
    assert found[0]["comparison"] is None
    c = found[1]["comparison"]
    assert (c["seeds"], c["items"], c["difference"], c["covers"]) == ([0], 4, 0.25, "items")
    assert c["low"] == pytest.approx(downstream.paired([[1, 0, 0, 0]])["low"])


def test_other_items_are_left_out_and_that_is_said():
    base = arm("V0", one([0, 1]), one([1, 1]))
    found = downstream.rows([base, arm("V1", one([1, 1]), one([1, 1, 0], "more items"))])
    assert [(row["name"], row["seeds"], row["left_out"]) for row in found] == [("V0", 2, 1), ("V1", 1, 1)]
    assert found[1]["comparison"]["seeds"] == [0]
    assert "left out: 1" in downstream.section({"downstream": found}).markdown()


def test_what_must_not_be_compared_gets_no_number_and_no_section_comes_of_nothing():
    found = downstream.rows([arm("V0", one([0, 1])), arm("V1", one([1, 1]), invalid=True)])
    assert found[1]["comparison"] is None and downstream.cells(found[1])[5] == "-"
    assert downstream.rows([arm("V0", {}), arm("V1")]) == [] and downstream.section({}) is None


def test_the_section():
    found = downstream.rows([arm("V0", one([0, 1]), one([1, 0])), arm("V1", one([1, 1]), one([1, 1]))])
    text = downstream.section({"downstream": found}).markdown()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]]
    assert lines[0] == downstream.HEADER
    assert lines[2] == ["task", "acc", "V0", "0.5000", "0.2500", "baseline", "", "2", "2"]
    assert lines[3][:3] == ["task", "acc", "V1"] and lines[3][5].startswith("+0.5000 (") and lines[3][6] == "items and seeds"


def test_what_is_damaged_or_of_another_result_is_not_read(tmp_path):
    record = {"identity": {"hash": "i"}, "finished": "now"}
    items = [{"doc_id": i, "doc_hash": "d", "acc": 1.0} for i in range(2)]
    task = {"hash": "h", "precision": "float32", "metrics": {"acc": {}}, "items": 2}

    def written(lines, **said):
        (tmp_path / downstream.samples_name("a/b")).write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / downstream.NAME).write_text(json.dumps(downstream.basis(record) | {"tasks": {"a/b": task}} | said))
        return downstream.kept(tmp_path, record)

    assert written(items)["a/b"]["hash"] == "h float32"
    assert written(items[:1]) == {} and written([*items[:1], [1]]) == {} and written(items, finished="before") == {}
    assert written(items, tasks=[]) == {} and written(items, tasks={"a/b": {"hash": "h"}}) == {}
    (tmp_path / downstream.NAME).write_text("[[")
    assert downstream.kept(tmp_path, record) == {}
