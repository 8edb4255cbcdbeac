"""The Markdown of a report: what the terminal shows. Its content is made up in made_up.py's form."""

import copy

import pytest

from lib.report import markdown
from tests.lib.report.test_content import BELOW, V0, study  # noqa: F401  (the fixture)

COMPARISON = {"word": "INCONCLUSIVE", "sentence": "V1 vs V0: the sentence.", "difference": -0.0021, "low": -0.0061,
              "high": 0.0019, "p_sign_flip": 0.25, "sign_flip_floor": 0.0625, "correlation": 0.834,
              "equal_tokens": {"difference": -0.002, "low": -0.006, "high": 0.002, "n": 5, "at": 1e5},
              "equal_seconds": {"difference": 0.01, "low": None, "high": None, "n": 1, "at": 9.0},
              "speed": {"ratio": 0.98, "low": 0.97, "high": 0.99, "n": 5}}
MEAN = {"val_loss": 2.44, "val_loss_sd": 0.004, "val_perplexity": 11.5, "tokens": 256_000.0, "train_seconds": 75.0,
        "tokens_per_second": 12_800.0, "parameters": 453_632, "kv_cache_bytes": 65536, "peak_memory_bytes": 300 * 2 ** 20}
CLASS = {"of": "V0", "relation": "equal", "shown": "V0", "sentence": "V1 is V0 in function class"}
STEP = {"name": "V1", "mean": MEAN, "function_class": CLASS, "comparison": COMPARISON, "seeds_done": 5, "seeds_planned": 5,
        "states": {"done": 5}}


def cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def verdict_row(**changes):
    step = copy.deepcopy(STEP)
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            step[part][inner] = value
        else:
            step[part] = value
    return cells(markdown.verdict_table([step, STEP], "V0").splitlines()[2])  # beside one of which every view is told


def test_a_row_of_the_verdict_table():
    assert verdict_row() == ["V1", "INCONCLUSIVE", "V0", "-0.0021 (-0.0061..+0.0019)", "5/5", "2.4400 ± 0.0040",
                             "-0.0020 ± 0.0040", "+0.0100", "x0.980 ± 0.010"]


def view(difference):
    return {"difference": difference, "low": None, "high": None, "n": 1, "at": 1e5}


@pytest.mark.parametrize("changes, headers", [
    ({}, ["at equal tokens", "at equal seconds"]),
    ({"equal_tokens": view(-0.00211)}, ["at equal seconds"]),
    ({"equal_tokens": view(-0.00211), "equal_seconds": view(-0.0021)}, []),
    ({"equal_tokens": None, "equal_seconds": None}, []),
    ({"difference": None}, []),
    ({"word": "INVALID"}, []),
    ({"word": "INCOMPLETE"}, []),
])
def test_a_view_that_says_what_the_difference_says_has_no_column(changes, headers):
    one = STEP | {"comparison": COMPARISON | changes}
    assert cells(markdown.verdict_table([one], "V0").splitlines()[0])[6:] == [*headers, "tokens/s"]
    assert cells(markdown.contrast_table([one], 1).splitlines()[4])[3:] == [*headers, "tokens/s"]


def test_what_waits_for_a_step_that_was_not_begun_is_one_line():
    steps = [STEP, STEP | {"name": "V2"}, STEP | {"name": "V3 vs V2"}, STEP | {"name": "V2", "comparison": None}]
    assert markdown.sentences(steps, {"V2"}).splitlines()[1:] == ["- INCOMPLETE, because no cell was begun: V2, V3 vs V2."]


def test_an_invalid_step_has_no_number_at_all():
    none = dict.fromkeys(("difference", "low", "high", "equal_tokens", "equal_seconds", "speed"))
    assert verdict_row(comparison=COMPARISON | none | {"word": "INVALID"})[3:] == ["-", "5/5", "-", "-", "-", "-"]


def test_what_is_missing_is_a_dash_and_the_baselines_fields_are_empty():
    assert verdict_row(comparison=COMPARISON | {"difference": None, "equal_tokens": None, "equal_seconds": None, "speed": None},
                       mean__val_loss=None, mean__val_loss_sd=None, seeds_done=0) == [
        "V1", "INCONCLUSIVE", "V0", "-", "0/5", "-", "-", "-", "-"]
    assert verdict_row(comparison=None)[1:4] + verdict_row(comparison=None)[6:] == ["baseline", "V0", "", "", "", ""]
    assert verdict_row(comparison__low=None, comparison__high=None)[3] == "-0.0021"
    assert verdict_row(function_class=None)[2] == "", "a report of before there were classes in it"


@pytest.mark.parametrize("word, said", [("INCONCLUSIVE", True), ("BETTER", True), ("EQUIVALENT", False), ("INVALID", False)])
def test_the_sign_flip_test_stands_beside_a_difference(word, said):
    step = copy.deepcopy(STEP)
    step["comparison"]["word"] = word
    text = markdown.sentences([step])
    assert text.startswith("- V1 vs V0: the sentence.")
    assert text.endswith(" Sign-flip p 0.25 (floor 0.0625), pairing correlation 0.83. V1 is V0 in function class.\n") == said
    step["function_class"] = CLASS | {"relation": "own", "sentence": None}
    assert "function class" not in markdown.sentences([step])


def test_the_states_of_cells():
    text = markdown.step_table([STEP | {"states": {"done": 2, "failed": 1}}, STEP | {"mean": dict.fromkeys(MEAN)}])
    assert cells(text.splitlines()[2]) == ["V1", "11.50", "256.0 k", "1 min 15 s", "12.8 k", "453,632", "64 KiB",
                                           "300 MiB", "2 done, 1 failed"]
    assert cells(text.splitlines()[3]) == ["V1", *["-"] * 7, "done"]


def test_the_sweep():
    losses = {"0.5": 3.0, "10": None, "2": 2.9}
    text = markdown.sweep_table([{"step": "V0", "optimizer": "adamw", "best": 2.0, "losses": losses,
                                  "diverged": ["10"]}])
    assert [cells(line) for line in text.splitlines()[2:5:2]] == [["step", "x0.5", "x2", "x10", "best"],
                                                                 ["V0 adamw", "3.0000", "2.9000", "diverged", "x2"]]


def test_a_whole_report(study):  # noqa: F811
    from lib.report.content import content

    text = markdown.render(content(study("V0 V1", 'CONTROL_STEPS="P0"', V0=V0, V1=BELOW, P0=[3.0001, 3.0202, 3.0499])))
    lines = text.splitlines()
    assert lines[0] == "# mine" and lines[2].startswith("**CONTROL FAILED: control P0 should show a loss against V0, but: ")
    assert cells(lines[4])[:4] == ["step", "verdict", "class", "to V0, nats (95 %)"]
    assert [cells(line)[:3] for line in lines[6:9]] == [["V0", "baseline", "V0"], ["V1", "BETTER", "V0"],
                                                        ["P0", "EQUIVALENT", "V0"]]
    for fact in ("- plan ",
                 "- error rate: at most 5 % for any false BETTER, WORSE or NEGLIGIBLE in a family, at the planned number of",
                 "- V0 over 3 seeds has a standard deviation of 0.0252 nats: two single runs of one and the same model differ",
                 "- data: pystdlib, bytes tokens, 9.0 M for training, evaluation set 0123456789ab; unigram entropy 3.250 nats",
                 "- machine: a CPU, float32, torch 2.13.0, compile off, 1 thread",
                 "- a cell's training 20 s; outside the budget: start and logging 2 s, compile 0 s, evaluation 1 min 01 s"):
        assert any(line.startswith(fact) for line in lines), fact


def test_contrasts(study):  # noqa: F811
    from lib.report.content import content

    text = markdown.render(content(study("V0 V1 V2", 'CONTRASTS="V2:V1"', V0=V0, V1=BELOW, V2=V0)))
    part = text.split("## Contrasts\n\n")[1].split("## Cells")[0].splitlines()
    assert part[0] == "Steps against other steps, at their common rates; a family of 1 verdict of its own."
    assert cells(part[2])[:3] == ["contrast", "verdict", "difference, nats (95 %)"]
    assert cells(part[4])[:2] == ["V2 vs V1", "WORSE"] and cells(part[4])[2].startswith("+0.1000 (")
    assert part[6].startswith("- V2 vs V1: +0.1000 nats (95 % CI ") and "WORSE" in part[6]
    assert "difference is optimisation only" not in part[6], "V2 mixes in the token's own value, V1 does not"
    same = markdown.render(content(study("V0 V1 V3", 'CONTRASTS="V3:V1"', V0=V0, V1=BELOW, V3=V0)))
    assert "V3 is V1 in function class: a difference is optimisation only." in same
    assert "## Contrasts" not in markdown.render(content(study(V0=V0, V1=BELOW)))


def test_a_report_of_nothing(study):  # noqa: F811
    from lib.report.content import content

    text = markdown.render(content(study(write=False)))
    assert "| V1   | INCOMPLETE | " in text and "machine" not in text
    assert "- INCOMPLETE, because no cell was begun: V1.\n" in text
