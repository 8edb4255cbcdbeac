"""Planting defects: the list fits the sources, each way refuses what is for it, and the sources stay as they are."""

import contextlib
import json

import pytest

from scripts import defects
from tests.harness import ROOT, refusal

LEAK = """
[[defect]]
name = "a mask that is one token too wide"
kind = "causality"
steps = ["V0"]
file = "gpt2/attention/baseline.py"
before = ".tril(past)"
after = ".tril(past + 1)"
tests = ["tests/gpt2/attention/test_output_gate.py::test_decoding_in_chunks_equals_the_full_pass"]
"""
SCORE = """
[[defect]]
name = "everything is greedy"
kind = "records"
steps = ["V0"]
file = "gpt2/scoring.py"
before = "((logits.argmax(-1) == targets) | ~there).all(1)"
after = "((logits.argmax(-1) == targets) | True).all(1)"
tests = ["tests/gpt2/test_scoring.py"]
"""


def test_every_defect_stands_once_in_the_sources_and_names_steps_and_tests_that_are_there():
    found = defects.listed()
    assert len({one.name for one in found}) == len(found) and {one.kind for one in found} == set(defects.KINDS)
    for one in found:
        assert one.before != one.after, one.name
        assert all((ROOT / f"gpt2/steps/{step}.config").exists() for step in one.steps), one.name
        assert all((ROOT / test.partition("::")[0]).exists() for test in one.tests), one.name


@pytest.mark.parametrize("old, new, what, run", [
    ('"causality"', '"bad luck"', "there is no kind bad luck", "one of causality, "),
    ('".tril(past)"', '".tril(future)"', "its text stands 0 times in gpt2/attention/baseline.py", "give the text that is in "),
    ("steps = ", "stages = ", "unexpected keyword argument 'stages'", "give it the fields of the others"),
])
def test_an_entry_that_cannot_be_planted_is_refused(tmp_path, old, new, what, run):
    path = tmp_path / "list.toml"
    path.write_text(LEAK.replace(old, new))
    said = refusal(defects.listed, path)
    assert "a mask that is one token too wide: " in said[0] and what in said[0] and run in said[1]


def test_who_refuses_what(tmp_path, monkeypatch, capsys):
    """A leak into a cached prefix is no error and no NaN; a score that no forward pass shows is seen by the tests alone."""
    path = tmp_path / "list.toml"
    path.write_text(LEAK + SCORE)
    entries = defects.listed(path)
    before = [(ROOT / one.file).read_bytes() for one in entries]
    monkeypatch.setattr(defects, "listed", lambda: entries)
    monkeypatch.setattr("sys.argv", ["defects", "--out", str(tmp_path / "found.json"), "--jobs", "1"])
    assert defects.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    leak, score = ([way for way in defects.WAYS if one["refused"][way]] for one in found["defects"])
    assert leak == ["make check", "make test"] and score == ["make test"]
    assert found["defects"][0]["why"]["make check"].startswith("BROKEN V0: ")
    assert found["totals"] == {"planted": 2, "dry run": 0, "make check": 1, "make test": 2}
    assert found["environment"]["source_hash"] and "| all " in capsys.readouterr().out
    assert before == [(ROOT / one.file).read_bytes() for one in entries]


def test_what_nothing_refuses_and_what_refuses_everything(tmp_path, monkeypatch, capsys):
    entries = [defects.Defect("one", "records", ["V0"], "gpt2/scoring.py", "", "", ["a test"])]
    monkeypatch.setattr(defects, "listed", lambda: entries)
    monkeypatch.setattr("sys.argv", ["defects"])
    monkeypatch.setattr(defects.Copies, "__init__", lambda self, count: setattr(self, "temporary", contextlib.nullcontext()))
    monkeypatch.setattr(defects.Copies, "untouched", lambda self, found: dict.fromkeys(defects.WAYS))
    monkeypatch.setattr(defects.Copies, "plant", lambda self, one: dict.fromkeys(defects.WAYS))
    assert defects.main() == 1 and "one: NOTHING" in capsys.readouterr().out
    monkeypatch.setattr(defects.Copies, "untouched", lambda self, found: {"make check": "BROKEN V0: it leaks"})
    assert refusal(defects.main) == ("the make check refuses the sources as they are: BROKEN V0: it leaks", "mend that first.")
    monkeypatch.setattr("sys.argv", ["defects", "nothing", "like", "it"])
    assert refusal(defects.main)[0] == "no defect has nothing or like or it in its name."
