"""The error rates that a report states, by simulation with the functions that make its verdicts."""

import numpy as np
import pytest

from lib import simulation


def rng():
    return np.random.default_rng(20261122)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_what_they_say(seeds):
    assert 0.94 <= simulation.coverage(seeds, 8000, rng()) <= 0.96


def test_six_equal_steps_win_falsely_in_one_study_of_twenty_and_naively_in_six_of_seven():
    wrong, naive = simulation.false_wins(6, 3, 5000, rng())
    assert wrong <= 0.05 + 2 * (0.05 * 0.95 / 5000) ** 0.5
    assert naive == pytest.approx(6 / 7, abs=0.015)


def test_unlimited_looks_keep_the_error_rate_of_the_family():
    assert simulation.unlimited_looks(6, 150, 1500, rng()) <= 0.05


def test_looking_at_a_t_test_after_every_seed_would_not():
    """What the anytime test is for: the same looks at an ordinary t test claim far too much."""
    from lib import stats

    drawn = simulation.losses(rng(), 300, 16, [0.0])
    looked = [any(stats.paired(one[:n]).p <= 0.05 for n in range(3, 17)) for one in drawn[:, 1] - drawn[:, 0]]
    assert np.mean(looked) > 0.12


@pytest.mark.parametrize("effects, margin, seeds, decided", [
    ([0.05] * 6, 0.01, 7, 0.99), ([0.0] * 6, 0.05, 10, 0.95), ([0.0] * 3 + [0.05] * 3, 0.05, 16, 0.5)])
def test_until_decided_saves_seeds_and_claims_nothing_false(effects, margin, seeds, decided):
    found = simulation.until_decided(effects, 150, rng(), margin)
    assert found["false"] <= 0.05 and found["seeds"] <= seeds and found["decided"] >= decided


def test_effects_that_are_there_are_found_with_a_fixed_number():
    assert simulation.fixed_power([0.05] * 6, 8, 100, rng()) > 0.95 and simulation.fixed_power([0.0] * 6, 8, 300, rng()) < 0.03
