"""metrics.json: strict JSON with every key, and a reader that believes nothing it has not checked."""

import json
import math

import pytest

from lib import results
from tests.harness import MEASURED, refusal

PROVENANCE = {"study": "s", "step": "V1", "optimizer": "adamw", "seed": 7, "parent": None,
              "identity": {"hash": "0", "set": {"SEED": "7"}, "default": {}}, "symbols": {}}


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads(text, parse_constant=refuse)


def written(folder, *arguments, **measured):
    results.write(folder, PROVENANCE, *arguments, **measured)
    return strict((folder / "metrics.json").read_text())


def test_a_record_has_every_key_and_null_for_what_is_missing(tmp_path):
    record = written(tmp_path, "failed", "it broke")
    assert tuple(record) == results.KEYS
    given = {"format": 1, "state": "failed", "reason": "it broke", "study": "s", "step": "V1", "optimizer": "adamw", "seed": 7,
             "identity": PROVENANCE["identity"]}
    assert record == dict.fromkeys(results.KEYS) | given | {"checksum": results.checksum(given)}
    assert results.read(tmp_path) == record


def test_a_finished_record_reads_back(tmp_path):
    record = written(tmp_path, "done", **MEASURED)
    assert results.read(tmp_path) == record and record["val_loss"] == 3.0 and record["reason"] is None


def test_a_number_that_no_reader_would_take_is_missing(tmp_path):
    """exp(300) is a float, and no reader calculates with it: a whole cell must not be unreadable for it."""
    record = written(tmp_path, "done", **MEASURED | {"val_loss": 300.0, "val_perplexity": math.exp(300)})
    assert results.read(tmp_path) == record and record["val_loss"] == 300.0 and record["val_perplexity"] is None


def test_why_a_mechanism_never_acted_is_part_of_a_finished_record(tmp_path):
    record = written(tmp_path, "done", inactive="h.0.attn: the coupling stayed at 0", **MEASURED)
    assert record["inactive"] == results.read(tmp_path)["inactive"] == "h.0.attn: the coupling stayed at 0"


@pytest.mark.parametrize("old, new", [('"val_loss": 3.0', '"val_loss": 2.0'), ('"seed": 7', '"seed": 6'),
                                      ('"done"', '"diverged"')])
def test_a_number_that_changed_on_disk_is_no_result(tmp_path, old, new):
    written(tmp_path, "done", **MEASURED)
    path = tmp_path / "metrics.json"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    assert (results.read(tmp_path)["state"], results.read(tmp_path)["reason"]) == (
        "unreadable", "it does not hold what was written (its checksum differs)")


def test_a_checksum_is_of_what_is_said_and_not_of_how(tmp_path):
    record = written(tmp_path, "done", **MEASURED | {"sizes": {2: 5, 10: 6}})
    (tmp_path / "metrics.json").write_text(json.dumps(dict(reversed(record.items()))))
    assert results.read(tmp_path) == record and record["sizes"] == {"2": 5, "10": 6}
    (tmp_path / "metrics.json").write_text(json.dumps(record | {"checksum": None}))
    assert results.read(tmp_path)["state"] == "done", "of before there was one"


def test_a_record_of_before_a_key_reads_back_with_null(tmp_path):
    record = written(tmp_path, "done", **MEASURED)
    del record["inactive"]
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert results.read(tmp_path)["state"] == "done" and results.read(tmp_path)["inactive"] is None


def test_nan_and_infinity_become_null_also_deep_inside(tmp_path):
    record = written(tmp_path, "diverged", "loss nan", val_loss=math.nan, best_val_loss=math.inf, train_loss=-math.inf,
                     tokens=5, data={"name": "x", "unigram_entropy": math.nan}, sizes={"a": [1, math.inf], "b": (2.5, None)})
    assert [record[k] for k in ("val_loss", "best_val_loss", "train_loss", "tokens")] == [None, None, None, 5]
    assert record["data"] == {"name": "x", "unigram_entropy": None} and record["sizes"] == {"a": [1, None], "b": [2.5, None]}


@pytest.mark.parametrize("state, measured, message", [
    ("done", {"val_los": 1.0}, r"metrics.json has no key \['val_los'\]"),
    ("finished", {}, "metrics.json has no state finished"),
])
def test_a_wrong_key_or_state_is_a_defect_of_the_program(tmp_path, state, measured, message):
    with pytest.raises(ValueError, match=message):
        results.write(tmp_path, PROVENANCE, state, **measured)
    assert not list(tmp_path.iterdir())


def test_no_file_is_no_record(tmp_path):
    assert results.read(tmp_path) is None and results.read(tmp_path / "nowhere") is None


GOOD = json.dumps(dict.fromkeys(results.KEYS) | {"format": 1, "state": "done", "val_loss": 3.5, "tokens": 9,
                                                 "train_seconds": 1.5, "identity": {"set": {}, "default": {}, "hash": "0"}})


@pytest.mark.parametrize("text, reason", [
    ("", "Expecting value"), (GOOD[:-9], ""), (GOOD.replace("3.5", "NaN"), "NaN is no number of JSON"),
    (GOOD.replace("3.5", "-Infinity"), "-Infinity is no number of JSON"),
    (GOOD.replace("3.5", "1e999"), "1e999 is no number of JSON"), ("[" * 100_000, ""), ("\udcff", ""),
    *[(text, "it is not of format 1") for text in (
        "[]", "null", "3", "{}", '"done"', GOOD.replace('"format": 1', '"format": 2'), GOOD.replace('"done"', '"running"'),
        GOOD.replace('"done"', "null"), GOOD.replace("3.5", "null"), GOOD.replace("3.5", '"3.5"'),
        GOOD.replace('"identity": {', '"identity": [], "x": {'), GOOD.replace('"set": {}, ', ""),
        GOOD.replace('"default": {}', '"default": []'))],
])
def test_anything_else_is_unreadable_with_a_reason(tmp_path, text, reason):
    (tmp_path / "metrics.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    record = results.read(tmp_path)
    assert record["state"] == "unreadable" and reason in record["reason"] and record["reason"]
    assert record.keys() == set(results.KEYS)


@pytest.mark.parametrize("key, value, kind", [
    ("step", 3, "text"), ("reason", ["x"], "text"), ("seed", 1.5, "count"), ("seed", True, "count"), ("tokens", -1, "count"),
    ("parameters", 10 ** 400, "count"), ("train_seconds", -0.5, "amount"), ("val_perplexity", "3", "number"),
    ("environment", [], "table"), ("data", {"train_hash": []}, "table"), ("environment", {"sources": {"a": 1}}, "table"),
    ("kv_cache_parts", {"keys": "8"}, "table of amounts"), ("val_loss_by_position", [3.0, None], "list of numbers"),
    ("val_loss_by_position", {"0": 3.0}, "list of numbers"), ("compression", {"val_loss": 3.0}, "comparison of codecs"),
    ("compression", {"val_loss": 1, "val_loss_pca": 1, "val_loss_before": 1, "layers": [{"error": 1}]}, "comparison of codecs"),
])
def test_a_value_of_another_kind_is_unreadable_and_named(tmp_path, key, value, kind):
    (tmp_path / "metrics.json").write_text(json.dumps(json.loads(GOOD) | {key: value}))
    assert results.read(tmp_path)["reason"] == f"its {key} is no {kind}"


def test_the_good_one_is_good(tmp_path):
    """Or the cases above would prove nothing."""
    (tmp_path / "metrics.json").write_text(GOOD)
    assert results.read(tmp_path)["state"] == "done"


def test_a_file_system_that_fails_says_nothing_about_the_record(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    what, _ = refusal(results.read, tmp_path)
    assert what == f"{tmp_path}/metrics.json cannot be read: Is a directory."
