"""Budgets and the learning rate: progress runs from 0 to 1 in every kind of budget, and the rate follows it."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.schedule import Budget, learning_rate, tokens_per_iteration


def config(**values):
    return SimpleNamespace(**{"GPT2_MAX_TIME": 0, "GPT2_MAX_ITERS": 0, "GPT2_MAX_TOKENS": 0, "BATCH_SIZE": 8,
                              "GPT2_GRADIENT_ACCUMULATION": 8, "GPT2_BLOCK_SIZE": 1024, "LEARNING_RATE": 6e-4,
                              "GPT2_MIN_LR": 6e-5, "LEARNING_RATE_MULT": 1.0, "GPT2_WARMUP_STEPS": 200,
                              "EVALUATE_ONLY": False} | values)


@pytest.mark.parametrize("values, budget", [
    ({"GPT2_MAX_TIME": 7200}, Budget(7200.0, None)),
    ({"GPT2_MAX_ITERS": 250}, Budget(None, 250)),
    ({"GPT2_MAX_TOKENS": 65536}, Budget(None, 1)),
    ({"GPT2_MAX_TOKENS": 65537}, Budget(None, 2)),  # rounded up
    ({"GPT2_MAX_TOKENS": 1}, Budget(None, 1)), ({"GPT2_MAX_TIME": 7200, "EVALUATE_ONLY": True}, Budget(None, 0)),
    ({"GPT2_MAX_TOKENS": 10 ** 15}, Budget(None, -(-10 ** 15 // 65536))),
])
def test_the_budget_of_a_configuration(values, budget):
    assert Budget.from_config(config(**values)) == budget
    assert tokens_per_iteration(config()) == 65536


@pytest.mark.parametrize("budget, iterations, seconds, progress", [
    (Budget(100.0, None), 0, 0.0, 0.0), (Budget(100.0, None), 9999, 25.0, 0.25), (Budget(100.0, None), 1, 100.0, 1.0),
    (Budget(100.0, None), 1, 250.0, 1.0), (Budget(None, 10), 0, 99.0, 0.0), (Budget(None, 10), 5, 1e9, 0.5),
    (Budget(None, 10), 10, 0.0, 1.0), (Budget(None, 10), 11, 0.0, 1.0), (Budget(None, 0), 0, 0.0, 1.0),
    (Budget(None, 0), 250, 20.0, 1.0),
])
def test_progress_counts_what_the_budget_is_made_of(budget, iterations, seconds, progress):
    assert budget.progress(iterations, seconds) == progress


@pytest.mark.parametrize("warmup, iteration, progress, rate", [
    (0, 0, 0.0, 6e-4),  # no warm-up: the peak at once
    (200, 0, 0.0, 6e-4 / 200),  # never 0, or the first step would be lost
    (200, 99, 0.0, 3e-4), (200, 199, 0.0, 6e-4), (200, 5000, 0.0, 6e-4),
    (0, 9, 0.5, 3.3e-4), (200, 200, 0.5, 3.3e-4), (200, 10 ** 6, 1.0, 6e-5),
    (200, 0, 1.0, 6e-5),  # a budget of one step ends its warm-up, too
    (1, 0, 0.0, 6e-4),
])
def test_the_rate_at_the_edges(warmup, iteration, progress, rate):
    assert learning_rate(config(GPT2_WARMUP_STEPS=warmup), iteration, progress) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("multiple", [0.1, 0.5, 2.0, 0.0])
def test_the_multiplier_scales_the_whole_schedule_and_1_moves_no_bit(multiple):
    """Peak, floor and warm-up alike. At 1 the rate is the one before there was a multiplier, to the last bit."""
    for iteration, progress in [(0, 0.0), (50, 0.05), (199, 0.1), (300, 0.37), (999, 1.0)]:
        plain, scaled = (learning_rate(config(LEARNING_RATE_MULT=m), iteration, progress) for m in (1.0, multiple))
        assert scaled == pytest.approx(multiple * plain, rel=1e-12)
        warmup = min(1.0, max((iteration + 1) / 200, progress / 0.1))
        assert plain == warmup * (6e-5 + (6e-4 - 6e-5) * (0.5 * (1 + math.cos(math.pi * progress))))


def test_warm_up_ends_after_its_steps_or_a_tenth_of_the_budget():
    long, short = config(GPT2_WARMUP_STEPS=200), config(GPT2_WARMUP_STEPS=10 ** 6)
    plain = config(GPT2_WARMUP_STEPS=0)
    assert learning_rate(long, 199, 0.01) == learning_rate(plain, 199, 0.01), "200 steps are done at 1 %"
    assert learning_rate(short, 50, 0.1) == pytest.approx(learning_rate(plain, 50, 0.1)), "10 % are done at 50 steps"
    assert learning_rate(short, 50, 0.05) == pytest.approx(learning_rate(plain, 50, 0.05) / 2, rel=1e-3)
    assert learning_rate(short, 50, 0.0999) < learning_rate(plain, 50, 0.0999)


def test_every_budget_ends_at_the_final_rate():
    for values in ({"GPT2_MAX_TIME": 60}, {"GPT2_MAX_ITERS": 7}, {"GPT2_MAX_TOKENS": 10 ** 6}):
        cfg = config(**values)
        budget = Budget.from_config(cfg)
        progress = budget.progress(budget.iterations or 0, budget.seconds or 0.0)
        assert learning_rate(cfg, 5, progress) == pytest.approx(cfg.GPT2_MIN_LR)


@given(peak=st.floats(0, 100), share=st.floats(0, 1), warmup=st.integers(0, 10 ** 6), iteration=st.integers(0, 10 ** 9),
       progress=st.floats(0, 1))
def test_the_rate_stays_between_zero_and_the_peak(peak, share, warmup, iteration, progress):
    cfg = config(LEARNING_RATE=peak, GPT2_MIN_LR=peak * share, GPT2_WARMUP_STEPS=warmup)
    rate = learning_rate(cfg, iteration, progress)
    assert 0 <= rate <= peak * (1 + 1e-12) and math.isfinite(rate)


@given(st.integers(1, 10 ** 9), st.lists(st.integers(0, 2 * 10 ** 9), min_size=2), st.booleans())
def test_progress_never_falls_and_ends_at_one(whole, used, by_time):
    budget = Budget(float(whole), None) if by_time else Budget(None, whole)
    steps = [budget.progress(n, float(n)) for n in sorted(used)]
    assert steps == sorted(steps) and steps[0] >= 0 and steps[-1] <= 1
    assert budget.progress(whole, float(whole)) == 1


@given(st.integers(0, 500), st.integers(1, 1000))
def test_after_the_warm_up_the_rate_only_falls(warmup, iterations):
    cfg = config(GPT2_WARMUP_STEPS=warmup, GPT2_MAX_ITERS=iterations)
    budget = Budget.from_config(cfg)
    rates = [learning_rate(cfg, i, budget.progress(i, 0.0)) for i in range(iterations)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= max(warmup, 0.1 * iterations + 1)
