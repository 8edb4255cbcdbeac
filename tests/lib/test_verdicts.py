"""Each word of the verdict from losses that earn it, and the sentence that goes with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import stats
from lib.verdicts import DECIDED, Arm, family, shown_p, signed
from tests.lib.test_gates import record

BASE = [3.01013, 3.00231, 2.99579, 3.02094, 3.00788]


def arm(name, losses, missing=()):
    """An arm whose seed 1, 2, ... ended with these losses (None: no result)."""
    records = {seed: record(loss) for seed, loss in enumerate(losses, 1) if loss is not None}
    return Arm(name, records, dict.fromkeys(missing, "planned"))


def compare(*arms, base=BASE, margin=0.01, test="fixed", missing=()):
    reference = arm("V0", base, missing)
    order = range(1, 1 + max(len(base), *(max(a.records, default=1) for a in arms)))
    return family([(a, reference) for a in arms], list(order), margin, test)


def shifted(*differences, base=BASE):
    return [b + d for b, d in zip(base, differences, strict=False)]


BETTER = shifted(-0.050, -0.052, -0.049, -0.051, -0.050)
SAME = shifted(0.0004, -0.0003, 0.0001, -0.0004, 0.0003)
SLIGHT = shifted(0.0020, 0.0021, 0.0019, 0.0020, 0.0021)
NOISY = shifted(0.010, -0.020, 0.015, -0.012, 0.002)


@pytest.mark.parametrize("losses, word, sentence", [
    (BETTER, "BETTER", "V1 vs V0: -0.0504 nats (95 % CI -0.0518..-0.0490, 5 paired seeds, Holm p <.0001): BETTER."),
    (shifted(0.05, 0.052, 0.049, 0.051, 0.05), "WORSE",
     "V1 vs V0: +0.0504 nats (95 % CI +0.0490..+0.0518, 5 paired seeds, Holm p <.0001): WORSE."),
    (shifted(-0.011, -0.009, -0.013, -0.010, -0.012), "BETTER",
     "V1 vs V0: -0.0110 nats (95 % CI -0.0130..-0.0090, 5 paired seeds, Holm p <.0001): BETTER; perhaps by less than the "
     "margin of 0.01."),
    (SLIGHT, "NEGLIGIBLE", "V1 vs V0: +0.0020 nats (95 % CI +0.0019..+0.0021, 5 paired seeds, Holm p <.0001): NEGLIGIBLE; "
     "real, but smaller than the margin of 0.01 (equivalence Holm p <.0001)."),
    (SAME, "EQUIVALENT", "V1 vs V0: 0.0000 nats (95 % CI -0.0004..+0.0005, 5 paired seeds, Holm p .91): EQUIVALENT; within the "
     "margin of 0.01 (equivalence Holm p <.0001)."),
    (NOISY, "INCONCLUSIVE", "V1 vs V0: -0.0010 nats (95 % CI -0.0193..+0.0173, 5 paired seeds, Holm p .89): INCONCLUSIVE; "
     "5 seeds can see 0.0248; more than 1000 needed for 0.001."),
    (BETTER[:2], "UNDERPOWERED", "V1 vs V0: -0.0510 nats (95 % CI -0.0637..-0.0383, 2 paired seeds): UNDERPOWERED; fewer "
     "than 3 seeds: make SEEDS=3."),
    (BETTER[:1], "UNDERPOWERED", "V1 vs V0: -0.0500 nats (1 paired seed): UNDERPOWERED; fewer than 3 seeds: make SEEDS=3."),
])
def test_words_and_sentences(losses, word, sentence):
    found, = compare(arm("V1", losses), base=BASE[:len(losses)])
    assert (found.word, found.sentence) == (word, sentence)
    assert found.decided == (word in DECIDED)


def test_the_example_of_the_manual():
    """-0.0021 (-0.0061..+0.0019) over 5 seeds: they can see 0.0054, and about 21 are needed for 0.0021."""
    pattern = [-1.2, -0.6, 0.0, 0.6, 1.2]
    sd = stats.paired(pattern).se * 5 ** 0.5
    scale = 0.0040 / (2.7764 / 5 ** 0.5) / sd
    found, = compare(arm("V3", shifted(*(-0.0021 + scale * x for x in pattern))), margin=0.002)
    assert found.sentence == ("V3 vs V0: -0.0021 nats (95 % CI -0.0061..+0.0019, 5 paired seeds, Holm p .22): INCONCLUSIVE; "
                              "5 seeds can see 0.0054; about 21 needed for 0.0021.")


def test_holm_runs_over_the_family():
    alone, = compare(arm("V1", shifted(-0.02, 0.0, -0.03, -0.04, -0.01)))
    many = compare(*(arm(f"V{i}", shifted(-0.02, 0.0, -0.03, -0.04, -0.01)) for i in range(1, 7)))
    assert alone.word == "BETTER" and {c.word for c in many} == {"INCONCLUSIVE"}
    assert many[0].p_holm == pytest.approx(6 * alone.p_holm)


def test_a_comparison_that_is_missing_still_counts():
    found = compare(arm("V1", BETTER), arm("V2", [], missing=(1, 2, 3, 4, 5)))
    assert [c.word for c in found] == ["BETTER", "INCOMPLETE"]
    assert found[0].p_holm == pytest.approx(2 * found[0].estimate.p) and found[1].p_holm is None
    assert found[1].sentence == "V2 vs V0: INCOMPLETE: V2 seed 1 planned, V2 seed 2 planned, V2 seed 3 planned and 2 more."


def test_a_deleted_seed_falls_back_to_welch_and_says_so():
    losses = [*BETTER[:3], None, BETTER[4]]
    found, = compare(arm("V1", losses))
    assert found.word == "BETTER" and found.estimate.method == "welch"
    assert "Welch, because the seeds differ: 4 and 5" in found.sentence
    planned, = compare(arm("V1", losses, missing=(4,)))
    assert planned.word == "INCOMPLETE" and planned.sentence.endswith(": INCOMPLETE; missing: V1 seed 4 planned.")
    assert planned.p_holm is None


def test_without_a_common_seed_there_are_no_pairs():
    found, = compare(Arm("V1", {9: record(2.9), 10: record(2.91), 11: record(2.92)}))
    assert found.estimate.method == "welch" and found.by_seed == {}


def test_a_failed_gate_leaves_no_number():
    bad = arm("V1", BETTER)
    bad.records[3]["data"]["eval_hash"] = "edited"
    found, = compare(bad)
    assert (found.word, found.estimate, found.by_seed, found.p_holm) == ("INVALID", None, {}, None)
    assert found.sentence == "V1 vs V0: INVALID: evaluation data differs: V1 seed 3 has 'edited', V1 seed 1 '0123456789abcdef'."


def test_a_diverged_seed_is_invalid_and_of_the_baseline_too():
    bad = arm("V1", BETTER)
    bad.records[2] |= {"state": "diverged", "reason": "nan", "val_loss": None}
    found, = compare(bad)
    assert found.sentence == "V1 vs V0: INVALID: non-finite loss: V1 seed 2 diverged (nan)."


def test_the_order_of_records_changes_nothing():
    one = arm("V1", NOISY)
    other = Arm("V1", dict(reversed(one.records.items())))
    assert compare(one) == compare(other) and compare(one, test="anytime") == compare(other, test="anytime")


def test_anytime_verdicts_need_more_and_say_what_they_are():
    found, = compare(arm("V1", BETTER), test="anytime")
    assert found.sentence == ("V1 vs V0: -0.0504 nats (95 % confidence sequence -0.0532..-0.0476, 5 paired seeds, "
                              "anytime-valid, Holm p .0004): BETTER.")
    few, = compare(arm("V1", NOISY[:3]), base=BASE[:3], test="anytime")
    assert few.word == "INCONCLUSIVE" and "3 seeds can see" in few.sentence
    uneven, = compare(arm("V1", NOISY[:4]), test="anytime")
    assert uneven.estimate.n == 4 and uneven.estimate.method == "anytime", "pairs at every look, also half-way through a block"


@given(st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=6), st.floats(0, 0.1))
def test_a_win_and_a_loss_mirror_each_other(differences, margin):
    base = [3.0 + i / 97 for i in range(len(differences))]
    plus, = compare(arm("V1", [b + d for b, d in zip(base, differences, strict=True)]), base=base, margin=margin)
    minus, = compare(arm("V1", [b - d for b, d in zip(base, differences, strict=True)]), base=base, margin=margin)
    mirror = {"BETTER": "WORSE", "WORSE": "BETTER"}
    if plus.p_holm is None or min(abs(plus.p_holm - 0.05), abs(plus.p_equivalence - 0.05)) > 1e-6:  # not on a border
        assert minus.word == mirror.get(plus.word, plus.word)


@pytest.mark.parametrize("p, text", [
    (0.62, ".62"), (0.0031, ".0031"), (1e-9, "<.0001"), (1.0, "1"), (0.999, "1"), (0.05, ".05")])
def test_how_a_p_is_written(p, text):
    assert shown_p(p) == text


@pytest.mark.parametrize("value, text", [(0.00191, "+0.0019"), (-0.2, "-0.2000"), (-0.00001, "0.0000"), (0.0, "0.0000")])
def test_how_a_difference_is_written(value, text):
    assert signed(value) == text
