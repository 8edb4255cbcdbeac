"""References to numbers of committed artifacts, and what a claim says of them."""

import json
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.figures import RESULTS, WORDS, Figure, figure_at, saying, value_at
from tests.harness import refusal

FILE = f"{RESULTS}bench-x/h100.json"
CONTENT = {
    "environment": {"device": "NVIDIA H100"}, "half": 0.5, "zero": 0, "steps": [{"name": "V0", "loss": 3.0}, {"loss": 4.0}],
    "rows": [{"arm": "V1", "batch": 1, "pass": "forward", "time": 1.5, "time_max": 2.0, "as": None},
             {"arm": "V1", "batch": 64, "pass": "forward", "time": 1.25, "time_max": 1.75, "as": None},
             {"arm": "V3@A=y,B=1/6", "batch": 64, "pass": "forward+backward", "time": 3.0, "as": "V1"},
             {"arm": "gates on q, k", "batch": 64, "pass": "forward", "time": 4.0,
              "deep": [{"n": 1, "x": 7}, {"n": 2, "x": 8}]}]}


@pytest.fixture
def root(tmp_path):
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(json.dumps(CONTENT))
    return tmp_path


@pytest.mark.parametrize("path, values", [
    ("half", (0.5,)), ("steps.V0.loss", (3.0,)), ("steps.1.loss", (4.0,)),
    ("rows[arm=V1,batch=64].time", (1.25,)), ("rows[batch=1].time", (1.5,)), ("rows[batch=64,arm=V1,as=null].time", (1.25,)),
    ("rows[arm=V3@A=y,B=1/6].time", (3.0,)), ("rows[arm=gates on q, k,pass=forward].time", (4.0,)),
    ("rows[pass=forward+backward].time * 100", (300.0,)), ("rows[arm=gates on q, k].deep[n=2].x", (8.0,)),
    ("1 / half", (2.0,)), ("half - 2 * 3 + 1", (-3.5,)), ("rows[batch=1].time / half", (3.0,)),
    ("rows[batch=1].time_max .. rows[batch=1].time", (1.5, 2.0)), ("half * 2 .. 1 / half", (1.0, 2.0)),
])
def test_what_a_reference_gives(root, path, values):
    assert figure_at(f"{FILE}: {path}", "here", root) == Figure(values, FILE, "NVIDIA H100")


NAMES_ONE = "name the path of one of its numbers."
KEYS = "name more of its keys, until one is left."
WRITE = f"write {RESULTS}STUDY/report.json: PATH.OF.KEYS."


@pytest.mark.parametrize("reference, what, todo", [
    (f"{FILE}: rows[arm=V1].time", f"{FILE} has 2 items at '[arm=V1]'.", KEYS),
    (f"{FILE}: rows[pass=forward].time * 2", f"{FILE} has 3 items at '[pass=forward]'.", KEYS),
    (f"{FILE}: rows[arm=V2].time", f"{FILE} has no number to use at 'rows[arm=V2].time'.", NAMES_ONE),
    (f"{FILE}: rows[batch=1.0].time", f"{FILE} has no number to use at 'rows[batch=1.0].time'.", NAMES_ONE),
    (f"{FILE}: rows[batch=1]time", f"{FILE} has no number to use at 'rows[batch=1]time'.", NAMES_ONE),
    (f"{FILE}: rows[batch=1].arm", f"{FILE} has no number to use at 'rows[batch=1].arm'.", NAMES_ONE),
    (f"{FILE}: rows[batch=1]", f"{FILE} has no number to use at 'rows[batch=1]'.", NAMES_ONE),
    (f"{FILE}: half / zero", f"{FILE} has no number to use at 'zero'.", NAMES_ONE),
    (f"{FILE}: half / ", f"{FILE} has no number to use at 'half /'.", NAMES_ONE),
    (f"{FILE}: half .. half .. half", f"'{FILE}: half .. half .. half' is no reference.", WRITE),
    (f"{RESULTS}../x.json: half", f"'{RESULTS}../x.json: half' is no reference.", WRITE),
    (f"{RESULTS}bench-x: half", f"'{RESULTS}bench-x: half' is no reference.", WRITE),
    (f"{RESULTS}bench-x/a100.json: half", f"the artifact {RESULTS}bench-x/a100.json is missing.",
     "commit the study's report, or stop naming it."),
])
def test_a_reference_that_names_no_number_is_refused(root, reference, what, todo):
    assert refusal(figure_at, reference, "here", root) == (f"here: {what}", todo)


KEY = st.sampled_from(["arm", "mode", "n", "a.b", "x=y", "c]", "d,e"])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="]"), max_size=6)
VALUES = st.one_of(TEXT, st.integers(-99, 99), st.booleans(), st.none(), st.floats(-9, 9))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(KEY, VALUES), min_size=1, max_size=4))
def test_an_item_is_found_by_all_of_its_keys_whatever_they_hold(items):
    """An index added to each makes all different: every item is found, and without the index only one that has no equal."""
    def brackets(item):
        return ",".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in item.items())

    rows = [{**item, "index": i, "value": 100 + i} for i, item in enumerate(items)]
    for i, item in enumerate(items):
        inside = brackets({**item, "index": i})
        assert value_at({"rows": rows}, f"rows[{inside}].value") == 100 + i
        if brackets(item):
            try:
                assert value_at({"rows": rows}, f"rows[{brackets(item)}].value") == 100 + i
            except LookupError as several:
                assert int(str(several).split()[0]) >= 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 99)), max_size=5), st.integers(1, 99))
def test_it_calculates_from_left_to_right(tmp_path_factory, terms, first):
    root = tmp_path_factory.getbasetemp() / "calculates"
    (root / FILE).parent.mkdir(parents=True, exist_ok=True)
    (root / FILE).write_text(json.dumps({"a": first}))
    expected = first
    for sign, number in terms:
        expected = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign](expected, number)
    written = "a" + "".join(f" {sign} {number}" for sign, number in terms)
    assert figure_at(f"{FILE}: {written}", "here", root).values == pytest.approx((expected,))


@pytest.mark.parametrize("says, inside, outside", [
    ("<= 0.98", [0.98, -1], [0.981]), ("< 1", [0.99], [1, 1.01]), (">= 2", [2, 3], [1.99]), ("> -1", [0], [-1, -2]),
    ("1.9 .. 2.1", [1.9, 2, 2.1], [1.89, 2.11]), ("-1..1", [-1, 0, 1], [-1.1, 1.1]), (" 2 .. 2 ", [2], [1, 3]),
])
def test_what_a_claim_says_of_a_figure(says, inside, outside):
    said = saying(says, "here")
    assert said.text == says.strip()
    assert all(said.fits(Figure((value,), FILE)) is True for value in inside)
    assert all(said.fits(Figure((value,), FILE)) is False for value in outside)


@pytest.mark.parametrize("says, ranges, word", [
    ("<= 1", [(0.5, 0.9)], "HOLDS"), ("<= 1", [(0.5, 0.9), (1.0,)], "HOLDS"), ("<= 1", [(0.9, 1.1)], "UNDECIDED"),
    ("<= 1", [(1.1, 1.2), (1.3,)], "DOES NOT HOLD"), ("<= 1", [(0.9,), (1.1,)], "UNDECIDED"),
    ("2 .. 3", [(1.0, 1.5), (4.0, 5.0)], "DOES NOT HOLD"), ("2 .. 3", [(1.0, 5.0)], "UNDECIDED"),
    ("2 .. 3", [(2.0, 3.0), (2.5, 3.5)], "UNDECIDED"), ("2 .. 3", [(1.0, 1.5), (1.0, 5.0)], "UNDECIDED"),
])
def test_the_word(says, ranges, word):
    """A range that reaches over all of what is claimed does not speak against it."""
    assert word in WORDS and saying(says, "here").word([Figure(values, FILE) for values in ranges]) == word


@pytest.mark.parametrize("says, what, todo", [
    ("about 2", "'about 2' says nothing of a figure.", "write '<= x', '>= x', '< x', '> x' or 'x .. y'."),
    ("= 2", "'= 2' says nothing of a figure.", "write '<= x', '>= x', '< x', '> x' or 'x .. y'."),
    ("<= two", "'<= two' says nothing of a figure.", "write '<= x', '>= x', '< x', '> x' or 'x .. y'."),
    ("2 .. 1", "nothing lies in '2 .. 1'.", "write the smaller end first."),
])
def test_a_saying_that_says_nothing_is_refused(says, what, todo):
    assert refusal(saying, says, "here") == (f"here: {what}", todo)


def test_how_a_figure_reads():
    assert [str(Figure(values, FILE)) for values in ((1.5,), (0.92354, 1.0), (17_029.4,))] == ["1.5", "0.9235 .. 1", "17,029"]
