"""Rules between symbols, and ratios as counts."""

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.rules import check, resolve_size, warnings
from lib.config import load
from tests.harness import ROOT, refusal


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
    ("MLA0", {"MLA_D_LATENT": 768}, "MLA_D_LATENT=768 (768 channels) is not below the width 768, so a layer's input would be "
     "as small a latent.", "set MLA_D_LATENT to at most 767, or to a ratio below 1."),
    ("RAMLA0", {"MLA_D_LATENT": "9999/10000"}, "MLA_D_LATENT=9999/10000 (768 channels) is not below the width 768, so a "
     "layer's input would be as small a latent.", "set MLA_D_LATENT to at most 767, or to a ratio below 1."),
    ("MLAKV0", {"MLA_KVSPLICE_D": 256}, "MLA_KVSPLICE_D=256 (256 channels) is not below the latent's 256, so nothing would "
     "be compressed.", "set MLA_KVSPLICE_D to at most 255."),
    ("RAMLAKV0", {"MLA_D_LATENT": "1/6"}, "MLA_KVSPLICE_D=1/6 (128 channels) is not below the latent's 128, so nothing would "
     "be compressed.", "set MLA_KVSPLICE_D to at most 127."),
    ("MLAKV0", {"MLA_D_LATENT": 1}, "MLA_KVSPLICE_D=1/6 (128 channels) is not below the latent's 1, so nothing would be "
     "compressed.", "set MLA_D_LATENT to 2 or more."),
    ("V0", {"KVSPLICE": True, "KVSPLICE_K": 65}, "KVSPLICE_K=65 is more than the head width 64.",
     "set KVSPLICE_K to at most 64, or to a ratio below 1."),
    ("V0", {"KVSPLICE": True, "KVSPLICE_K": 0}, "overrides: KVSPLICE_K=0 is not a ratio like 1/48 or a whole number >= 1.",
     "give KVSPLICE_K a ratio like 1/48 or a whole number >= 1."),
    ("V14", {"KV_KEEP_RATIO": 127}, "KV_KEEP_RATIO=127 (127 tokens) is below two blocks of KV_BLOCK=1/16 (64 tokens): the "
     "latest block and the one that is being filled are always kept.",
     "set KV_KEEP_RATIO to at least 128, or to a ratio of 1024 that gives as many."),
    ("V14", {"KV_BLOCK": 600}, "KV_KEEP_RATIO=191/500 (391 tokens) is below two blocks of KV_BLOCK=600 (600 tokens): the "
     "latest block and the one that is being filled are always kept.", "set KV_BLOCK to at most 195."),
    ("V19", {"KV_KEEP_RATIO": 1}, "KV_KEEP_RATIO=1 (1 token) is below two blocks of KV_BLOCK=1/16 (64 tokens): the latest "
     "block and the one that is being filled are always kept.",
     "set KV_KEEP_RATIO to at least 128, or to a ratio of 1024 that gives as many."),
    ("V15", {"KV_KEEP_RATIO": 1024}, "KV_KEEP_LEARNED has nothing to learn: KV_KEEP_RATIO=1024 keeps the whole context of 1024 "
     "tokens.", "set KV_KEEP_RATIO to at most 1023, or to a ratio below 1."),
    ("V1", {"INIT_FROM_STEP": "V0", "SAVE_MODEL": False}, "a step starts from V0's model, but SAVE_MODEL is off.",
     "set SAVE_MODEL=y in make menuconfig, or leave out the steps that start from another's model."),
])
def test_sizes_that_do_not_fit_together_are_refused(step, symbols, what, run):
    assert refusal(load, "gpt2-ra-ablation", step, symbols) == (what, run)


@pytest.mark.parametrize("step, symbols", [
    ("V1", {"RA_R": 63}), ("V3", {"RMLP_R_FF": 3071}), ("V0", {"LEARNING_RATE": 6e-5}), ("V0", {"SPAM_WARMUP_STEPS": 499}),
    ("V0", {"SPAM_INTERVAL": 0}),  # 0 never resets, so its re-warm-up never comes
    ("V0", {"OPTIMIZER_ADAMW": True}), ("V1", {"INIT_FROM_STEP": "V0"}), ("V1", {"SAVE_MODEL": False}),
    ("V1", {"MODEL_CUSTOM": True, "GPT2_N_EMBD": 100, "GPT2_N_HEAD": 10, "RA_R": 9}),
    ("V14", {"KV_KEEP_RATIO": 128}), ("V14", {"KV_KEEP_RATIO": 1024}), ("V15", {"KV_KEEP_RATIO": 1023}),
    ("V19", {"KV_KEEP_RATIO": 2, "KV_BLOCK": 1}), ("V19", {"KV_KEEP_RATIO": 391, "KV_BLOCK": 100}),  # it need not divide it
    ("V0", {"KVSPLICE": True, "KVSPLICE_K": 64}), ("V1", {"KVSPLICE": True, "KVSPLICE_K": 1}),
    ("MLA0", {"MLA_D_LATENT": 767}), ("MLAKV0", {"MLA_KVSPLICE_D": 255}), ("MLAKV0", {"MLA_D_LATENT": 129}),
])
def test_the_last_sizes_that_fit_do(step, symbols):
    cfg = load("gpt2-ra-ablation", step, symbols)
    check(cfg)
    assert all(getattr(cfg, name) == value for name, value in symbols.items())


NEVER = "the optimizer's momentum reset every {} steps is never reached in {} iterations"


@pytest.mark.parametrize("symbols, sentences", [
    ({"GPT2_MAX_ITERS": 250}, [NEVER.format(500, 250)]),
    ({"GPT2_MAX_ITERS": 500}, [NEVER.format(500, 500)]),  # it comes before the 501st step
    ({"GPT2_MAX_ITERS": 501}, []),
    ({"GPT2_MAX_TOKENS": 65536 * 499 + 1}, [NEVER.format(500, 500)]),  # iterations of 65536 tokens, rounded up
    ({"GPT2_MAX_TOKENS": 65536 * 500 + 1}, []),
    ({"GPT2_MAX_TIME": 1}, []),  # how many iterations that is, nobody knows beforehand
    ({"GPT2_MAX_ITERS": 250, "SPAM_INTERVAL": 0}, []),  # never, as it was told
    ({"GPT2_MAX_ITERS": 250, "OPTIMIZER_ADAMW": True}, []),
    ({"GPT2_MAX_ITERS": 250, "OPTIMIZER_SINKGD": True}, []),
])
def test_what_cannot_act_within_its_budget_is_said_beforehand(symbols, sentences):
    assert warnings(load("gpt2-ra-ablation", "V0", symbols)) == sentences


def test_the_first_budget_without_the_warning_is_the_first_with_a_reset(configuration):
    """The warning's border is the optimizer's own: the moments start anew in the step after SPAM_INTERVAL steps."""
    import torch

    from lib.optimizers import AdamWSPAM

    optimizer = AdamWSPAM([p := torch.nn.Parameter(torch.ones(3))], interval=4, warmup_steps=2)
    updates = []
    for _ in range(6):
        p.grad = torch.ones(3)
        optimizer.step()
        updates.append(optimizer.state[p]["step"])
    first = updates.index(1, 1) + 1  # iterations of the shortest run with a reset
    symbols = {"SPAM_INTERVAL": 4, "SPAM_WARMUP_STEPS": 2}
    assert warnings(configuration("V0", GPT2_MAX_ITERS=first - 1, **symbols)) and first == 5
    assert not warnings(configuration("V0", GPT2_MAX_ITERS=first, **symbols))


WAITS = "the coupling waits until the loss of {} steps has settled, and so stays at 0 for all {} iterations"


@pytest.mark.parametrize("symbols, sentences", [
    ({"GPT2_MAX_ITERS": 20}, [WAITS.format(50, 20)]),
    ({"GPT2_MAX_ITERS": 50}, [WAITS.format(50, 50)]),
    ({"GPT2_MAX_ITERS": 51}, []),
    ({"GPT2_MAX_ITERS": 51, "COUPLING_WINDOW": 51}, [WAITS.format(51, 51)]),
    ({"GPT2_MAX_TOKENS": 65536 * 50}, [WAITS.format(50, 50)]),
    ({"GPT2_MAX_TIME": 1}, []),
])
def test_a_coupling_that_cannot_fire_within_its_budget_is_said_beforehand(symbols, sentences):
    cfg = load("gpt2-ra-ablation", "V1", {"COUPLING_VARIANCE": True, "SPAM_INTERVAL": 0, **symbols})
    assert warnings(cfg) == sentences and warnings(cfg.replace(COUPLING_WINDOW=None)) == []


def test_the_first_budget_without_that_warning_is_the_first_whose_coupling_can_act(configuration):
    import torch

    from gpt2.coupling import Coupling, CouplingController
    from lib.mechanisms import Moment

    symbols = {"COUPLING_VARIANCE": True, "COUPLING_WINDOW": 4, "SPAM_INTERVAL": 0}
    for iterations in (4, 5):
        cfg = configuration("V1", GPT2_MAX_ITERS=iterations, **symbols)
        steers = CouplingController(cfg, torch.nn.ModuleList([Coupling()]))
        for i in range(iterations):
            steers.advance(Moment(i, i / iterations, torch.tensor(3.0) if i else None))
        assert bool(warnings(cfg)) == bool(steers.inactive()) == (iterations == 4)


def test_a_pruning_that_drops_nothing_is_said_beforehand():
    sentence = "KV_KEEP_RATIO={} keeps the whole context of 1024 tokens, so no token is ever dropped"
    for keep, expected in ((1023, []), (1024, [sentence.format(1024)]), (4096, [sentence.format(4096)])):
        assert warnings(load("gpt2-ra-ablation", "V19", {"KV_KEEP_RATIO": keep, "SPAM_INTERVAL": 0})) == expected


@pytest.mark.parametrize("k, sentences", [
    (63, []), ("1/2", []), (64, ["KVSPLICE_K=64 keeps every channel of a head, so a stored value is no smaller"]),
])
def test_a_codec_that_saves_nothing_is_said_beforehand(k, sentences):
    cfg = load("gpt2-ra-ablation", "V0", {"KVSPLICE": True, "KVSPLICE_K": k})
    assert warnings(cfg) == sentences and warnings(cfg.replace(KVSPLICE=False)) == []


def test_rules_and_warnings_need_no_torch():
    code = "import sys, gpt2.rules; assert not {'torch', 'numpy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
