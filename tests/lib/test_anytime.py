"""The anytime-valid t test: its martingale, its inverse, and that a p value never rises."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import nct, t

from lib import anytime

DIFFERENCES = st.lists(st.floats(-0.1, 0.1).map(lambda x: round(x, 6)), min_size=2, max_size=12)


def test_an_e_value_is_the_mixture_likelihood_ratio_of_the_t_statistic():
    """Against numerical integration of noncentral t densities over the normal prior of the standardised mean."""
    d = np.random.default_rng(0).normal(0.5, 1, 6)
    statistic = d.mean() / d.std(ddof=1) * math.sqrt(6)

    def weighted(delta):
        prior = math.exp(-delta ** 2 / (2 * anytime.SCALE)) / math.sqrt(2 * math.pi * anytime.SCALE)
        return nct.pdf(statistic, 5, delta * math.sqrt(6)) * prior

    expected = quad(weighted, -12, 12, limit=400)[0] / t.pdf(statistic, 5)
    assert anytime.e_values(d)[-1] == pytest.approx(expected, rel=1e-4)


def test_e_values_average_to_one_under_the_null():
    """Nothing is bet with one difference; at three the mean over many studies is 1."""
    d = np.random.default_rng(1).normal(0, 1, (40_000, 3))
    found = np.array([anytime.e_values(x) for x in d])
    assert np.all(found[:, 0] == 1) and found[:, 2].mean() == pytest.approx(1, abs=0.05)


@given(DIFFERENCES, st.floats(0.001, 1000), st.floats(-1, 1))
def test_units_and_the_place_of_zero_do_not_matter(d, unit, shift):
    found = anytime.e_values(d)
    if np.std(d) > 1e-4:
        assert anytime.e_values(np.multiply(d, unit)) == pytest.approx(found, rel=1e-6)
        assert anytime.e_values(np.add(d, shift), shift) == pytest.approx(found, rel=1e-4)


@given(DIFFERENCES)
def test_a_p_value_does_not_rise_while_the_mean_stays_on_its_side(d):
    found = [anytime.p_value(d[:look]) for look in range(1, len(d) + 1)]
    assert found[0] == 1.0 and all(0 < p <= 1 for p in found)
    for look in range(1, len(d)):
        if sum(d[:look]) * sum(d[:look + 1]) > 1e-12:
            before = min(p for n, p in enumerate(found[:look], 1) if sum(d[:n]) * sum(d[:look]) > 0)
            assert found[look] <= before * (1 + 1e-9)


def test_evidence_for_a_gain_is_none_for_a_loss():
    """Six clear gains, then a seed that went wrong: the mean is on the other side, and nothing is claimed there."""
    gains = [-0.1, -0.101, -0.099, -0.1005, -0.0995, -0.1]
    assert anytime.p_value(gains) < 0.001 and anytime.p_value([*gains, 5.0]) > 0.5


def test_the_confidence_sequence_is_where_the_e_value_reaches_its_bound():
    d = np.random.default_rng(2).normal(0.3, 1, 8)
    found = anytime.estimate(d)
    for bound in (found.low, found.high):
        assert anytime.e_values(d, bound)[-1] == pytest.approx(20, rel=1e-6)
    assert found.method == "anytime" and found.low < found.difference < found.high


def test_two_differences_have_no_bounded_sequence_and_one_has_nothing():
    assert anytime.estimate([0.1, 0.2]).low is None and anytime.estimate([0.1, 0.2]).p is not None
    assert anytime.estimate([0.1]).p is None and math.isinf(anytime.half_width(1.0, 1))
    assert math.isinf(anytime.half_width(1.0, 3, 0.05 / 6)) and math.isfinite(anytime.half_width(1.0, 3))


def test_differences_without_spread():
    assert anytime.p_value([0.1] * 5) < 0.001 and anytime.p_value([0.0] * 5) == 1.0
    assert anytime.equivalence_p([0.0] * 6, 0.01) < 0.001


def test_equivalence_needs_both_margins_ruled_out_from_inside():
    d = np.random.default_rng(3).normal(0, 0.001, 8)
    assert anytime.equivalence_p(d, 0.01) < 0.01
    assert anytime.equivalence_p(d + 0.5, 0.01) == 1.0, "far outside is not inside"


@pytest.mark.parametrize("true", [0.01, -0.01, 0.013])
def test_equivalence_is_rarely_claimed_where_it_does_not_hold(true):
    d = np.random.default_rng(5).normal(true, 0.004, (3000, 30))
    assert np.mean([anytime.equivalence_p(x, 0.01) <= 0.05 for x in d]) <= 0.05


def test_what_a_look_can_see():
    assert anytime.detectable(0.01, 3, 0.05 / 6) is None
    seen = anytime.detectable(0.01, 8, 0.05)
    assert anytime.seeds_needed(0.01, seen, 0.05) == 8 and anytime.seeds_needed(0.01, 1e-6, 0.05) is None
    d = np.random.default_rng(4).normal(seen, 0.01, (4000, 8))
    assert np.mean([anytime.p_value(x) <= 0.05 for x in d]) == pytest.approx(0.8, abs=0.06)
