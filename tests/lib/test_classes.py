"""Function classes by name: steps of one class are named after the first, and restrictions of a class say so."""

import pytest

from gpt2.function_class import key, simplest
from lib.classes import function_classes
from lib.config import Study, load


@pytest.fixture(scope="module")
def known():
    study = Study("gpt2-ra-ablation+tiny")
    steps = ["V0", "V1", "V2", "V3", "V4", "V5", "V6", "V7", "V8", "V9", "V10", "V11", "V12", "V13", "V16", "V1T", "R1", "M1",
             "M2", "M4", "M5", "KT1", "OG0", "RAALL0", "P0", "V4@RMLP_TOKEN_GATE=y", "V3@RMLP_TIED_UP=y",
             "V10@GPT2_MLP_EXPANSION=4", "V4@BATCH_SIZE=4,GPT2_WARMUP_STEPS=5,GPT2_MAX_ITERS=9,GRAD_CLIP=0",
             "V1@COUPLING_WARMUP=y"]
    return function_classes({step: study.resolve(step).config for step in steps})


def test_every_step_of_the_main_study_names_its_class(known):
    assert {step: str(known[step]) for step in ("V0", "V1", "V2", "V3", "V4", "V5", "V6")} == {
        "V0": "V0", "V1": "V0", "V2": "V2", "V3": "V0", "V4": "V0", "V5": "V5", "V6": "V5"}
    assert known["V4"].sentence == "V4 is V0 in function class: a difference is optimisation only"
    assert known["V2"].relation == "own" and known["V2"].sentence is None


@pytest.mark.parametrize("step, expected", [
    ("V7", "V0"), ("V8", "V2"), ("V9", "V0"), ("V10", "V10"), ("V11", "V0"), ("V12", "V0"), ("V13", "V0"), ("V16", "V0"),
    ("R1", "V0"), ("M2", "M1"), ("M5", "M1"), ("RAALL0", "V0"), ("P0", "V0"), ("OG0", "OG0"), ("V1@COUPLING_WARMUP=y", "V0"),
    ("V4@RMLP_TOKEN_GATE=y", "V5"), ("V10@GPT2_MLP_EXPANSION=4", "V2"),
    ("V4@BATCH_SIZE=4,GPT2_WARMUP_STEPS=5,GPT2_MAX_ITERS=9,GRAD_CLIP=0", "V0"),
    ("V1T", "inside V0"), ("KT1", "inside V0"), ("V3@RMLP_TIED_UP=y", "inside V0"),
])
def test_others(known, step, expected):
    assert str(known[step]) == expected


def test_a_restriction_says_which_way_it_goes(known):
    assert known["V1T"].sentence == "V1T is a restriction of V0, which can compute whatever V1T can"


def test_a_class_is_named_after_a_step_that_is_it_whatever_the_order():
    study = Study("gpt2-ra-ablation+tiny")
    found = function_classes({step: study.resolve(step).config for step in ("V1T", "V4", "V0")})
    assert {step: str(one) for step, one in found.items()} == {"V1T": "inside V4", "V4": "V4", "V0": "V4"}
    alone = function_classes({step: study.resolve(step).config for step in ("V1T", "KT1")})
    assert {step: str(one) for step, one in alone.items()} == {"V1T": "V1T", "KT1": "KT1"}, "neither restricts the other"
    assert alone["KT1"].sentence is None


def test_the_simplest_configuration_is_its_own_simplest():
    for step in ("V0", "V2", "V6", "V8", "M2", "V1T"):
        simple, _ = simplest(load("gpt2-ra-ablation+tiny", step))
        assert key(simple) == (key(load("gpt2-ra-ablation+tiny", step))[0], "equal")
