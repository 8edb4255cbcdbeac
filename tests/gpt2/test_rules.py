"""Rules between symbols, and ratios as counts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.rules import check, resolve_size
from lib.config import load
from tests.harness import refusal


@pytest.mark.parametrize("value, whole, count", [
    ("1/48", 3072, 64), ("1/48", 512, 11), ("3/8", 3072, 1152), ("1/4", 3072, 768), ("1/3", 768, 256), ("0.382", 1024, 391),
    ("1/48", 8, 1),  # never nothing
    ("1", 3072, 1), ("64", 3072, 64), ("4096", 3072, 4096),  # absolute; whether it fits is a rule's business
    ("999/1000", 10, 10),
])
def test_a_ratio_as_a_count(value, whole, count):
    assert resolve_size(Fraction(value), whole) == count


@given(st.fractions(min_value=Fraction(1, 10 ** 6), max_value=Fraction(999, 1000)), st.integers(1, 10 ** 6))
def test_a_ratio_is_a_count_between_one_and_the_whole(ratio, whole):
    count = resolve_size(ratio, whole)
    assert type(count) is int and 1 <= count <= whole and abs(count - ratio * whole) <= max(Fraction(1, 2), 1 - ratio * whole)


@pytest.mark.parametrize("step, symbols, what, run", [
    ("V0", {"MODEL_CUSTOM": True, "GPT2_N_EMBD": 100, "GPT2_N_HEAD": 12}, "GPT2_N_EMBD=100 is not divisible by GPT2_N_HEAD=12.",
     "choose a width that is a multiple of 12."),
    ("V0", {"MODEL_CUSTOM": True, "GPT2_N_EMBD": 8, "GPT2_N_HEAD": 16}, "GPT2_N_EMBD=8 is not divisible by GPT2_N_HEAD=16.",
     "choose a width that is a multiple of 16."),
    ("V1", {"RA_R": 64}, "RA_R=64 is not below the head width 64.", "set RA_R to at most 63."),
    ("V1", {"RA_R": 4096}, "RA_R=4096 is not below the head width 64.", "set RA_R to at most 63."),
    ("V3", {"RMLP_R_FF": 3072}, "RMLP_R_FF=3072 (3072 features) is not below the hidden width 3072.",
     "set RMLP_R_FF to at most 3071, or to a ratio below 1."),
    ("V3", {"RMLP_R_FF": "99999/100000"}, "RMLP_R_FF=99999/100000 (3072 features) is not below the hidden width 3072.",
     "set RMLP_R_FF to at most 3071, or to a ratio below 1."),
    ("V0", {"LEARNING_RATE": 1e-5}, "GPT2_MIN_LR=6e-05 is above LEARNING_RATE=1e-05.",
     "set GPT2_MIN_LR to the rate the schedule ends at, usually a tenth of the peak."),
    ("V0", {"SPAM_WARMUP_STEPS": 500}, "SPAM_WARMUP_STEPS=500 is not below SPAM_INTERVAL=500, so the learning rate would never "
     "leave its re-warm-up.", "set it below SPAM_INTERVAL (the paper: 150 of 500)."),
])
def test_sizes_that_do_not_fit_together_are_refused(step, symbols, what, run):
    assert refusal(load, "gpt2-ra-ablation", step, symbols) == (what, run)


@pytest.mark.parametrize("step, symbols", [
    ("V1", {"RA_R": 63}), ("V3", {"RMLP_R_FF": 3071}), ("V0", {"LEARNING_RATE": 6e-5}), ("V0", {"SPAM_WARMUP_STEPS": 499}),
    ("V0", {"SPAM_INTERVAL": 0}),  # 0 never resets, so its re-warm-up never comes
    ("V0", {"OPTIMIZER_ADAMW": True}),
    ("V1", {"MODEL_CUSTOM": True, "GPT2_N_EMBD": 100, "GPT2_N_HEAD": 10, "RA_R": 9}),
])
def test_the_last_sizes_that_fit_do(step, symbols):
    cfg = load("gpt2-ra-ablation", step, symbols)
    check(cfg)
    assert all(getattr(cfg, name) == value for name, value in symbols.items())
