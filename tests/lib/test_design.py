"""What was fixed before the first cell: its hash, its history, and what a look in between does to it."""

import json

import pytest

from lib import design
from tests.harness import refusal

ARMS = {"V0 adamw": "a", "V1 adamw": "b", "V2 adamw": "c"}


def plan(seeds=3, test="fixed", margin=0.01, arms=ARMS):
    return design.content("V0", arms, list(range(1, seeds + 1)), margin, test)


def history(*steps):
    """(plan, seeds with results by then), one after the other."""
    found = []
    for one, seen in steps:
        found = design.following(found, one, seen)
    return found


def test_the_same_plan_is_recorded_once():
    once, twice = history((plan(), 0)), history((plan(), 0), (plan(), 3))
    assert len(once) == 1 and once[0]["hash"] == design.digest(plan()) and len(once[0]["hash"]) == 12
    assert len(twice) == 1 and twice[0]["seen"] == 0


@pytest.mark.parametrize("changed", [plan(4), plan(margin=0.02), plan(test="anytime"), plan(arms=ARMS | {"V2 adamw": "d"})])
def test_whatever_is_fixed_is_in_the_hash(changed):
    assert design.digest(changed) != design.digest(plan())


def test_contrasts_are_counted_like_comparisons():
    def contrasted(text, arms=ARMS):
        return design.content("V0", arms, [1, 2, 3], 0.01, "fixed", contrasts=text)

    assert contrasted("") == plan() and design.digest(contrasted("V2:V1")) != design.digest(plan())
    assert design.contrasts(history((plan(), 0))) == 0 and design.contrasts(history((contrasted("V2:V1"), 0))) == 1
    later = history((contrasted("V2:V1"), 0), (contrasted(""), 3))
    assert design.contrasts(later) == 1, "one that was taken out still counts"
    assert design.changes(later) == [f"the plan's list of contrasts was changed after a look, "
                                     f"{later[-1]['written'][:16].replace('T', ' ')}: V2:V1 to none"]
    again = history((contrasted("V2:V1"), 0), (contrasted("V2:V1", ARMS | {"V2 adamw": "another"}), 3))
    assert design.contrasts(again) == 2, "so does one whose arm was changed"
    two = contrasted("V2:V1", ARMS | {f"{step} sinkgd": step for step in ("V0", "V1", "V2")})
    assert design.contrasts(history((two, 0))) == 2
    assert design.sentence(two).endswith("4 comparisons with V0 and 2 contrasts, Holm at 5 % in each family, margin 0.01 nats")


def test_contrasts_added_after_a_look_count_as_chosen_from_all_pairs():
    arms = ARMS | {"V3 adamw": "d", "V4 adamw": "e"}

    def contrasted(text):
        return design.content("V0", arms, [1, 2, 3], 0.01, "fixed", contrasts=text)

    before = history((contrasted("V4:V1"), 0), (contrasted("V4:V1 V3:V1"), 0))
    assert design.contrasts(before) == 2 and design.added_contrasts(before) == []
    after = history((contrasted("V4:V1"), 0), (contrasted("V4:V1 V3:V1"), 1))
    assert design.added_contrasts(after) == ["V3:V1"] and design.contrasts(after) == 6, "pairs of V1 to V4"
    gone = history((contrasted("V4:V1"), 0), (contrasted("V4:V1 V3:V1"), 1), (contrasted("V4:V1"), 2))
    assert design.contrasts(gone) == 2 and design.added_contrasts(gone) == []
    assert design.contrasts(history((contrasted("V4:V1"), 2))) == 6, "no plan was there before the first result"


def test_a_pair_with_optimizers_of_their_own_is_one_contrast():
    arms = {"V0 adamw": "a", "S1 sinkgd": "b", "S2 adamw": "c"}
    assert design.contrasts(history((design.content("V0", arms, [1], 0.01, "fixed", contrasts="S2:S1"), 0))) == 1


@pytest.mark.parametrize("contrasts", [3, "V2", "V2:V1:V0", "V9:V1", ["V2:V1"]])
def test_contrasts_that_cannot_be_read_are_refused(tmp_path, contrasts):
    (tmp_path / "plan").mkdir()
    design.write(tmp_path, history((plan() | {"contrasts": contrasts}, 0)))
    assert "is not what was written before the first cell" in refusal(design.read, tmp_path)[0]


def test_contrasts_are_read_again(tmp_path):
    found = design.following([], design.content("V0", ARMS, [1], 0.01, "fixed", contrasts="V2:V1"), 0)
    (tmp_path / "plan").mkdir()
    design.write(tmp_path, found)
    assert design.read(tmp_path) == found


def test_a_plan_made_before_any_result_starts_anew():
    found = history((plan(), 0), (plan(5), 0))
    assert design.later_seeds(found) == [] and design.test(found) == "fixed" and design.changes(found) == []


def test_seeds_added_after_a_look_are_marked_and_change_the_test():
    found = history((plan(), 0), (plan(5), 3))
    assert design.later_seeds(found) == [4, 5] and design.test(found) == "anytime"
    found = history((plan(), 0), (plan(5), 3), (plan(), 5))
    assert found[-1]["plan"]["test"] == "anytime" and design.test(found) == "anytime", "it does not go back"


def test_a_look_that_could_not_decide_marks_them_and_keeps_the_test():
    found = history((plan(1), 0), (plan(3), 1))
    assert design.later_seeds(found) == [2, 3] and design.test(found) == "fixed"
    assert design.test(history((plan(1), 0), (plan(3), 1), (plan(4), 3))) == "anytime"


def test_the_anytime_test_of_the_plan_allows_for_looks():
    found = history((plan(16, "anytime"), 0))
    assert design.later_seeds(found) == [] and design.test(found) == "anytime"


def test_other_changes_after_a_look_are_sentences():
    found = history((plan(), 0), (plan(margin=0.05, arms={"V0 adamw": "a", "V1 adamw": "another", "V3 adamw": "d"}), 3))
    found[1]["written"] = "2026-01-02T03:04:05+00:00"
    assert design.changes(found) == ["the plan's margin was changed after a look, 2026-01-02 03:04: 0.01 to 0.05",
                                     "V3 adamw was added to the plan after a look, 2026-01-02 03:04",
                                     "V2 adamw was taken from the plan, and still counted, after a look, 2026-01-02 03:04",
                                     "V1 adamw was changed after a look, 2026-01-02 03:04"]
    assert design.comparisons(found) == 4, "V1, V2, V1 once more, V3"


def test_what_was_changed_before_any_result_counts_once():
    assert design.comparisons(history((plan(), 0), (plan(arms={"V0 adamw": "a", "V1 adamw": "other"}), 0))) == 1


def test_results_without_a_plan_are_said():
    assert design.changes(history((plan(), 2))) == ["no plan is known from before the first result: 2 seeds had one already"]


def test_it_is_written_and_read(tmp_path):
    (tmp_path / "plan").mkdir()
    assert design.read(tmp_path) == []
    found = history((plan(), 0), (plan(5), 3))
    design.write(tmp_path, found)
    assert design.read(tmp_path) == found


@pytest.mark.parametrize("edit", [
    lambda h: h[0]["plan"].update(margin=1.0), lambda h: h[0].update(hash="0" * 12), lambda h: h[0].pop("seen"),
    lambda h: h[1].update(seen=0), lambda h: h[0].update(written="2020-01-01T00:00:00+00:00"), lambda h: h.pop(0),
    lambda h: h.append(3), lambda h: h.reverse(), lambda h: h[0]["plan"].pop("seeds")])
def test_a_plan_that_was_edited_afterwards_is_refused(tmp_path, edit):
    (tmp_path / "plan").mkdir()
    found = history((plan(), 0), (plan(5), 3))
    edit(found)
    (tmp_path / "plan/design.json").write_text(json.dumps(found))
    what, todo = refusal(design.read, tmp_path)
    assert what.startswith(f"{tmp_path}/plan/design.json is not what was written before the first cell: ")
    assert todo == "restore it, or give another folder with OUT= and run the study anew."


@pytest.mark.parametrize("one, sentence", [
    (plan(), "paired t on the final validation loss (nats), 3 paired seeds, 2 comparisons with V0, Holm at 5 %, margin 0.01 "
     "nats"),
    (plan(16, "anytime"), "anytime-valid paired t on the final validation loss (nats), after each block of seeds, up to 16, "
     "2 comparisons with V0, Holm at 5 %, margin 0.01 nats")])
def test_the_plan_in_words(one, sentence):
    assert design.sentence(one) == sentence
