"""lib/report/ladder.py: what reports of several sizes say together, on synthetic reports whose answer is known."""

import copy
from statistics import fmean

import pytest

from lib import stats
from lib.report import charts, ladder
from tests.harness import refusal

SMALL = {"1": 0.01, "2": 0.03, "3": 0.02, "4": 0.00}
LARGE = {"1": -0.05, "2": -0.07, "3": -0.06, "4": -0.05, "5": -0.04}


def step(name, parameters, by_seed=None, word="BETTER", method="paired"):
    compared = None
    if by_seed is not None:
        found = stats.paired(list(by_seed.values()))
        compared = {"word": word, "difference": found.difference, "low": found.low, "high": found.high, "n": found.n,
                    "method": method, "by_seed": by_seed}
    return {"name": name, "is_baseline": name == "V0", "seeds_done": len(by_seed or SMALL), "comparison": compared,
            "mean": {"parameters": parameters, "tokens": 1000.0, "val_loss": 3.0, "val_loss_sd": 0.1},
            "configuration": {"LEARNING_RATE": 6e-4, "GPT2_N_EMBD": parameters, "STUDY": str(parameters)}}


def report(parameters, *steps):
    return {"study": f"s{parameters}", "baseline": "V0", "margin": 0.01, "steps": [step("V0", parameters), *steps],
            "plan": {"metric": "final validation loss (nats)", "sentence": "a plan"},
            "environment": {"device": "a GPU", "torch": "2", "source_hash": "aa"},
            "data": {"train_hash": "t" * 64, "eval_hash": "e" * 64}}


def reports():
    return [("large", report(90_000_000, step("A", 91_000_000, LARGE), step("B", 9, SMALL))),
            ("small", report(10_000_000, step("A", 11_000_000, SMALL, "WORSE"), step("B", 9, SMALL)))]


def test_sizes_stand_in_order_and_differences_are_those_of_the_reports():
    found = ladder.ladder(reports())
    assert [s["folder"] for s in found["sizes"]] == ["small", "large"] and found["notes"] == []
    (a, b) = found["arms"]
    assert [(r["word"], r["parameters"], r["n"]) for r in a["at"]] == [("WORSE", 11_000_000, 4), ("BETTER", 91_000_000, 5)]
    assert [r["difference"] for r in a["at"]] == pytest.approx([0.015, -0.054]) and b["change"]["difference"] == 0


def test_the_change_is_welchs_of_the_seeds_and_holm_counts_the_arms():
    a, b = ladder.ladder(reports())["arms"]
    expected = stats.welch(list(LARGE.values()), list(SMALL.values()))
    change = a["change"]
    assert change["difference"] == pytest.approx(-0.069) and change["n"] == [4, 5]
    assert (change["low"], change["high"], change["p"]) == (expected.low, expected.high, expected.p)
    assert change["p_holm"] == pytest.approx(2 * expected.p) and b["change"]["p_holm"] == 1


@pytest.mark.parametrize("word", ["INVALID", "INCOMPLETE"])
def test_an_arm_without_a_valid_comparison_has_no_number_and_still_counts(word):
    given = reports()
    given[0][1]["steps"][2]["comparison"]["word"] = word
    found = ladder.ladder(given)
    b = found["arms"][1]
    assert b["at"][1]["word"] == word and b["at"][1]["difference"] is None and b["at"][1]["by_seed"] == {}
    assert b["change"] is None and found["arms"][0]["change"]["p_holm"] == 2 * found["arms"][0]["change"]["p"]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in ladder.markdown(found).splitlines()]
    assert ["B", "9", "1,000", "4", "-", "-", word] in lines and ["B", "-", "-", "-", "-", "-", "-"] in lines


def test_the_change_is_between_the_extreme_sizes_with_a_number_in_between_none_counts():
    middle = ("middle", report(30_000_000, step("A", 1, {"1": 5.0, "2": 5.1, "3": 5.05})))
    found = ladder.ladder([*reports(), middle])
    assert (found["arms"][0]["change"]["from"], found["arms"][0]["change"]["to"]) == (0, 2)
    assert found["arms"][0]["change"]["difference"] == pytest.approx(-0.069)
    assert found["notes"] == ["B is not in middle."]
    given = [*reports(), middle]
    given[0][1]["steps"][1]["comparison"]["word"] = "INVALID"
    change = ladder.ladder(given)["arms"][0]["change"]
    assert (change["from"], change["to"]) == (0, 1) and change["difference"] == pytest.approx(5.05 - 0.015)


def test_an_arm_of_one_report_is_noted_and_no_comparison():
    given = reports()
    del given[1][1]["steps"][2]
    found = ladder.ladder(given)
    assert found["notes"] == ["B is not in small."] and found["arms"][1]["at"][0] is None
    assert found["arms"][0]["change"]["p_holm"] == found["arms"][0]["change"]["p"], "the only comparison"
    assert "Holm's p counts all 1 arm." in ladder.markdown(found)


@pytest.mark.parametrize("by_seed", [{"1": 0.5}, {"1": 0.5, "2": 0.6}])
def test_too_few_seeds_for_a_verdict_are_too_few_for_a_change(by_seed):
    given = reports()
    given[0][1]["steps"][1] = step("A", 9, by_seed, "UNDERPOWERED")
    a, b = ladder.ladder(given)["arms"]
    assert a["change"] is None and a["at"][1]["difference"] == pytest.approx(fmean(by_seed.values()))
    assert b["change"]["p_holm"] == min(1, 2 * b["change"]["p"]), "an arm without a change counts as well"


@pytest.mark.parametrize("where, value, note", [
    (("environment", "device"), "another", "Sizes also differ in device: a GPU, another."),
    (("environment", "torch"), "3", "Sizes also differ in torch: 2, 3."),
    (("environment", "source_hash"), "bb", "Sizes also differ in source (hash): aa, bb."),
    (("data", "train_hash"), "u" * 64, f"Sizes also differ in training data (hash): {'t' * 12}, {'u' * 12}."),
    (("data", "eval_hash"), "f" * 64, f"Sizes also differ in evaluated data (hash): {'e' * 12}, {'f' * 12}."),
    (("margin",), 0.02, "Sizes also differ in margin: 0.01, 0.02."),
    (("steps", 0, "mean", "tokens"), 5000.0, "Sizes also differ in tokens a cell: 1,000, 5,000."),
    (("steps", 0, "configuration", "LEARNING_RATE"), 3e-4, "Sizes also differ in settings: LEARNING_RATE 0.0006, 0.0003."),
    (("steps", 1, "comparison", "method"), "anytime",
     "A had seeds added until decided: its change knows nothing of when that stopped.")])
def test_what_else_differs_is_a_note(where, value, note):
    given = reports()
    inside = given[0][1]
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    found = ladder.ladder(given)
    assert found["notes"] == [note] and ladder.markdown(found).endswith(f"\n## Notes\n\n- {note}\n")


def test_refusals():
    one, other = reports()
    assert refusal(ladder.ladder, [one])[0] == "a ladder needs the reports of two or more sizes."
    assert refusal(ladder.ladder, [one, ("again", copy.deepcopy(one[1]))])[0] == (
        "large and again are of one size, 90,000,000 parameters.")
    other[1]["baseline"] = "B0"
    assert refusal(ladder.ladder, [one, other])[0] == "large and small have another baseline: V0 and B0."
    other[1].update(baseline="V0", plan={"metric": "accuracy", "sentence": ""})
    assert refusal(ladder.ladder, [one, other])[0].endswith("another metric: final validation loss (nats) and accuracy.")
    other = reports()[1]
    other[1]["steps"][0]["mean"] = None
    assert refusal(ladder.ladder, [one, other]) == ("small has no finished cell of its baseline.",
                                                    "make, then make report, for that study.")


def test_the_picture_has_a_panel_an_arm_and_no_word_from_vega(capfd):
    given = reports()
    given[0][1]["steps"][2]["comparison"]["word"] = "INVALID"
    spec = ladder.chart(ladder.ladder(given))
    assert [p["title"]["text"] for p in spec["concat"]] == ["A", "B"]
    assert charts.png(spec).startswith(b"\x89PNG")
    svg = charts.svg(spec)
    assert ">INVALID<" in svg and ">WORSE<" in svg and "10.0 M to 90.0 M: change \u22120.0690" in svg
    assert "no change known" in svg
    said = capfd.readouterr()
    assert "WARN" not in said.out + said.err and "rror" not in said.err
