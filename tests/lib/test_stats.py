"""The statistics against scipy.stats, against closed forms, and at their edges."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lib import stats

DIFFERENCES = st.lists(st.floats(-0.1, 0.1).map(lambda x: round(x, 6)), min_size=2, max_size=9)


def drawn(n, seed=0, mean=0.003):
    return np.random.default_rng(seed).normal(mean, 0.004, n)


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_paired_is_the_t_test_of_scipy(n):
    d = drawn(n)
    found, expected = stats.paired(d), scipy.stats.ttest_1samp(d, 0)
    low, high = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))
    assert (found.n, found.n_reference, found.df, found.method) == (n, n, n - 1, "paired")


def test_welch_is_the_unequal_variance_test_of_scipy():
    a, b = drawn(4, 1), drawn(7, 2, 0.01) * 3
    found, expected = stats.welch(a, b), scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert (found.p, found.df, found.low, found.high) == pytest.approx((expected.pvalue, expected.df, low, high))
    assert (found.n, found.n_reference) == (4, 7)


@pytest.mark.parametrize("call", [lambda: stats.paired([0.1]), lambda: stats.welch([0.1], [0.0, 0.1])])
def test_one_seed_has_a_difference_and_nothing_more(call):
    found = call()
    assert found.difference is not None and (found.low, found.high, found.p, found.se) == (None,) * 4


def test_differences_without_any_spread():
    assert stats.paired([0.0, 0.0, 0.0]).p == 1.0 and stats.paired([0.5, 0.5, 0.5]).p == 0.0
    assert stats.equivalence_p(stats.paired([0.0, 0.0]), 0.01) == 0.0
    assert stats.equivalence_p(stats.paired([0.5, 0.5]), 0.01) == 1.0
    assert stats.correlation([1, 1, 1], [1, 2, 3]) is None


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    d = drawn(6, mean=0.002)
    sides = [scipy.stats.ttest_1samp(d, 0.01, alternative="less").pvalue,
             scipy.stats.ttest_1samp(d, -0.01, alternative="greater").pvalue]
    assert stats.equivalence_p(stats.paired(d), 0.01) == pytest.approx(max(sides))


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_sign_flip_is_the_exact_permutation_test(n):
    d = drawn(n, seed=n)
    p, floor = stats.sign_flip(d)
    if n > 1:
        exact = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=10 ** 6)
        assert p == pytest.approx(exact.pvalue)
    assert floor == 2 ** (1 - n) <= p


def test_sign_flip_reaches_its_floor_where_all_signs_agree():
    assert stats.sign_flip([0.1, 0.2, 0.3, 0.4]) == (0.125, 0.125)


@pytest.mark.parametrize("n, floor", [(stats.EXACT_SIGN_FLIPS, 2.0 ** -19), (stats.EXACT_SIGN_FLIPS + 1, 1 / 100_001)])
def test_many_seeds_are_sampled_with_a_floor_that_says_so(n, floor):
    p, found = stats.sign_flip(np.full(n, 0.1) + drawn(n) / 100)
    assert found == pytest.approx(floor) and p == pytest.approx(floor)


@given(DIFFERENCES)
def test_p_values_do_not_depend_on_order_or_sign(d):
    for test in (lambda x: stats.paired(x).p, lambda x: stats.sign_flip(x)[0]):
        assert test(d) == pytest.approx(test(d[::-1]), abs=1e-9) == pytest.approx(test([-x for x in d]), abs=1e-9)


def test_holm_of_a_known_table():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == [] and stats.holm([0.2]) == [0.2]


def test_holm_counts_what_is_missing():
    assert stats.holm([0.01, None, None]) == [pytest.approx(0.03), None, None]
    assert stats.holm([0.01], comparisons=6) == [pytest.approx(0.06)]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p):
    adjusted = stats.holm(p)
    for before, after in zip(p, adjusted, strict=True):
        assert (before is None) == (after is None)
        assert before is None or before <= after <= min(1.0, len(p) * before) + 1e-15
    known = sorted((b, a) for b, a in zip(p, adjusted, strict=True) if b is not None)
    assert [a for _, a in known] == sorted(a for _, a in known)


def test_power_against_a_simulation():
    sd, n, effect, alpha = 0.004, 5, 0.006, 0.05
    d = np.random.default_rng(0).normal(effect, sd, (20_000, n))
    hit = scipy.stats.ttest_1samp(d, 0, axis=1).pvalue <= alpha
    assert stats.power_of(effect, sd, n, alpha) == pytest.approx(hit.mean(), abs=0.01)


def test_what_five_seeds_can_see():
    """The example of the manual: an interval of +-0.0040 over 5 seeds."""
    sd = 0.0040 / scipy.stats.t.ppf(0.975, 4) * math.sqrt(5)
    assert stats.detectable(sd, 5) == pytest.approx(0.0054, abs=5e-5)
    assert stats.seeds_needed(sd, 0.002) == 23


@given(st.floats(1e-5, 0.1), st.integers(2, 60), st.sampled_from([0.05, 0.05 / 6]))
def test_detectable_and_seeds_needed_are_inverse(sd, n, alpha):
    found = stats.detectable(sd, n, alpha)
    assert stats.power_of(found, sd, n, alpha) == pytest.approx(0.8, abs=1e-6)
    assert stats.seeds_needed(sd, found * (1 + 1e-9), alpha) == n


def test_plans_at_their_edges():
    assert stats.detectable(0.01, 1) is None and stats.detectable(0.0, 5) == 0.0
    assert stats.seeds_needed(0.01, 0.0) is None and stats.seeds_needed(0.0, 0.1) == 2
    assert stats.seeds_needed(0.01, 1e-6) is None
    assert stats.seeds_needed(0.001, 10.0) == 2, "an effect of ten thousand deviations underflows nothing"


def test_correlation_and_ratio():
    a = [1.0, 2.0, 4.0]
    assert stats.correlation(a, [2.0, 4.0, 8.0]) == pytest.approx(1) and stats.correlation(a[:2], a[1:]) is None
    ratio, low, high = stats.ratio([2.0, 4.2, 8.0], a)
    assert low < ratio < high and ratio == pytest.approx((2 * 2.1 * 2) ** (1 / 3))
    assert stats.ratio([2.0], [1.0]) == (pytest.approx(2.0), None, None)


def test_two_single_runs_of_one_model():
    assert stats.single_run_difference(0.01, 1000) == pytest.approx(1.96 * math.sqrt(2) * 0.01, rel=0.01)
