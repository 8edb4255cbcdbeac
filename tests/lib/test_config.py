"""Studies and steps resolved: what holds in the end, where it came from, and what a cell's identity is made of."""

import copy
import json
import pickle
import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.config import (
    OF_MAKE,
    Config,
    Study,
    announce,
    defconfig_layers,
    environment_overrides,
    identity_changes,
    load,
    parse_step,
)
from lib.errors import UserError
from lib.kconfig import Assignment, Schema, read_layer
from lib.steps import step_files, step_header, step_path
from tests.harness import ROOT, TINY, refusal

SCHEMA = Schema()
BUDGETS = ("GPT2_MAX_TIME", "GPT2_MAX_ITERS", "GPT2_MAX_TOKENS")


def study(name="gpt2-ra-ablation", overrides=(), **options):
    return Study(name, overrides=[Assignment(*o.split("="), "environment") for o in overrides], schema=SCHEMA, **options)


def budget(cfg):
    return {name: getattr(cfg, name) for name in BUDGETS if getattr(cfg, name)}


def identity(step, *overrides, name="gpt2-ra-ablation+tiny"):
    return study(name).resolve(step, overrides=[Assignment(*o.split("="), "test") for o in overrides]).identity


# The configuration object

def test_a_configuration_is_frozen_and_complete():
    cfg = load("gpt2-ra-ablation", "V3")
    with pytest.raises(AttributeError, match="a configuration is frozen"):
        cfg.BATCH_SIZE = 1
    with pytest.raises(AttributeError, match="no configuration symbol BATCHSIZE"):
        cfg.BATCHSIZE  # noqa: B018
    with pytest.raises(AttributeError, match="no configuration symbol .'BATCHSIZE'."):
        cfg.replace(BATCHSIZE=1)
    assert Fraction(1, 48) == cfg.RMLP_R_FF and cfg.as_json()["RMLP_R_FF"] == "1/48"
    assert cfg.replace(BATCH_SIZE=1).BATCH_SIZE == 1 and cfg.BATCH_SIZE == 8
    assert json.loads(json.dumps(cfg.as_json(), allow_nan=False)) == cfg.as_json()


def test_a_configuration_survives_copying_and_pickling():
    cfg = Config({"A": 1})
    assert copy.deepcopy(cfg).A == pickle.loads(pickle.dumps(cfg)).A == 1


# Layers

def test_overrides_of_load_are_typed_values():
    cfg = load("gpt2-ra-ablation", "V1", {"RA_R": 8, "GPT2_BIAS": False, "LEARNING_RATE": 1e-3, "GPT2_COMPILE": True})
    assert (cfg.RA_R, cfg.GPT2_BIAS, cfg.LEARNING_RATE, cfg.GPT2_COMPILE) == (8, False, 0.001, True)
    assert refusal(load, "gpt2-ra-ablation", "V0", {"RA_R": 8})[0].startswith("overrides: RA_R=8 did not take")


def test_layers_win_in_their_order(dotconfig):
    path = dotconfig(*TINY, "BATCH_SIZE=2", "GPT2_WARMUP_STEPS=5", 'LEARNING_RATE="0.5"')
    one = Study(config=path, overrides=[Assignment("BATCH_SIZE", "4", "environment")]).resolve("V1@BATCH_SIZE=3,RA_R=8")
    assert (one.config.BATCH_SIZE, one.config.RA_R, one.config.GPT2_WARMUP_STEPS) == (4, 8, 5)
    assert one.provenance["BATCH_SIZE"] == ["4", "environment"]
    assert one.provenance["RA_R"] == ["8", "step V1@BATCH_SIZE=3,RA_R=8"]
    assert one.provenance["GPT2_WARMUP_STEPS"] == ["5", f"{path}:6"]
    assert one.provenance["ATTENTION_UNIFIED_RA"] == ["y", "gpt2/steps/V1.config:2"]
    assert "BIAS" not in str(one.provenance), "defaults come from nowhere"


def test_provenance_names_the_files_of_a_study_also_through_dotconfig(dotconfig):
    path = dotconfig()
    path.write_text(study("gpt2-ra-ablation+tiny").text())
    found = Study().resolve("V0").provenance
    assert found["MODEL_TINY"] == ["y", "defconfigs/fragments/tiny:2"]
    assert found["ABLATION_STEPS"][1] == "defconfigs/gpt2-ra-ablation:5"


def test_a_study_is_reduced_so_that_conditional_defaults_stay_alive(dotconfig):
    path = dotconfig()
    path.write_text(study("gpt2-ra-ablation+tiny").text())
    cfg = Study().resolve("V0@MODEL_GPT2_XL=y").config
    assert (cfg.GPT2_N_LAYER, cfg.GPT2_N_EMBD, cfg.GPT2_BLOCK_SIZE) == (48, 1600, 1024)


def test_without_a_configuration_the_default_study_is_used(dotconfig):
    found = Study()
    assert found.is_fallback and found.name == "gpt2-ra-ablation+tiny"
    assert not study().is_fallback
    path = dotconfig("SEED=5")
    assert not Study().is_fallback and Study().config.SEED == 5
    path.unlink()
    assert refusal(Study, config=path) == (f"there is no configuration {path}.",
                                           "make defconfig-NAME (see make list-defconfigs).")


@pytest.mark.parametrize("lines, what, run", [
    (["RA_RR=8"], "{path}:1: unknown symbol RA_RR.", "did you mean RA_R?"),
    (["GONE_WITH_THE_WIND=n"], "{path}:1: unknown symbol GONE_WITH_THE_WIND.",
     "make olddefconfig, which drops symbols of a .config that are no more."),
    (["BATCH_SIZE=1_0"], "{path}:1: BATCH_SIZE=1_0 is not a whole number.", "give BATCH_SIZE a whole number."),
    (["RA_R=8"], "{path}:1: RA_R=8 did not take, because it depends on ATTENTION_UNIFIED_RA.",
     "set ATTENTION_UNIFIED_RA as well, or leave RA_R out."),
    (["GPT2_BIAS=y", 'OPTIMIZER="adamw"'],
     "{path}:2: OPTIMIZER=adamw cannot be set, it follows from other symbols and stands at adamwspam.",
     "make olddefconfig, which writes it anew."),
    (["GPT2_MAX_TIME=60", "GPT2_MAX_ITERS=10"], "exactly one of seconds, iterations and tokens must be the budget, but "
     "GPT2_MAX_TIME=60, GPT2_MAX_ITERS=10, GPT2_MAX_TOKENS=0.", "give one of them, e.g. GPT2_MAX_TIME=7200 make."),
    (["GPT2_MAX_TIME=0"], "exactly one of seconds, iterations and tokens must be the budget, but "
     "GPT2_MAX_TIME=0, GPT2_MAX_ITERS=0, GPT2_MAX_TOKENS=0.", "give one of them, e.g. GPT2_MAX_TIME=7200 make."),
    (["MODEL_CUSTOM=y", "GPT2_N_EMBD=100"], "GPT2_N_EMBD=100 is not divisible by GPT2_N_HEAD=12.",
     "choose a width that is a multiple of 12."),
])
def test_a_dotconfig_is_held_to_what_it_says(dotconfig, lines, what, run):
    path = dotconfig(*lines)
    assert refusal(Study, schema=SCHEMA) == (what.format(path=path), run)


def test_a_full_dotconfig_agrees_with_itself(dotconfig):
    dotconfig().write_text(study("gpt2-ra-ablation+tiny").text())
    assert Study().base == [a for a in Study().base if a.name in SCHEMA.prompted] != []


@pytest.mark.parametrize("name, what, run", [
    ("gpt2-ra-ablatoin", "there is no defconfig 'gpt2-ra-ablatoin'.", "did you mean gpt2-ra-ablation?"),
    ("gpt2-ra-ablation+tinny", "there is no fragment 'tinny'.", "did you mean tiny?"),
    ("gpt2-ra-ablation+tyni", "there is no fragment 'tyni'.", "did you mean tiny?"),
    ("gpt2-ra-ablation+", "there is no fragment ''.", "make list-defconfigs."),
    ("zzz", "there is no defconfig 'zzz'.", "make list-defconfigs."),
    ("../gpt2/Kconfig", "there is no defconfig '../gpt2/Kconfig'.", "make list-defconfigs."),
    ("fragments", "there is no defconfig 'fragments'.", "make list-defconfigs."),
    ("tiny", "there is no defconfig 'tiny'.", "make list-defconfigs."),
])
def test_an_unknown_study_or_fragment_comes_with_a_near_miss(name, what, run):
    assert refusal(defconfig_layers, name) == (what, run)


# Steps

@pytest.mark.parametrize("spec, name, layer", [
    ("V1", "V1", []),
    ("V1@RA_R=8", "V1", [("RA_R", "8")]),
    ("V1@RA_R=8,CONFIG_GPT2_BIAS=n", "V1", [("RA_R", "8"), ("GPT2_BIAS", "n")]),
    ("V1@STUDY=a=b", "V1", [("STUDY", "a=b")]),
    ("V1@STUDY=", "V1", [("STUDY", "")]),
])
def test_a_step_may_carry_overrides(spec, name, layer):
    assert parse_step(spec) == (name, [Assignment(n, v, f"step {spec}") for n, v in layer])


@pytest.mark.parametrize("spec, what, run", [
    ("V1@RA_R", "'RA_R' in step 'V1@RA_R' is no override.", "write an override as V1@RA_R=8."),
    ("V1@RA_R=8,", "'' in step 'V1@RA_R=8,' is no override.", "write an override as V1@RA_R=8."),
    ("V1@", "'V1@' is no step.", "write a step as V1 or as V1@RA_R=8."),
    ("1V", "'1V' is no step.", "write a step as V1 or as V1@RA_R=8."),
    ("../V1", "'../V1' is no step.", "write a step as V1 or as V1@RA_R=8."),
    ("V22", "there is no step 'V22'.", "did you mean V2?"),
    ("XYZZY", "there is no step 'XYZZY'.", "make list-steps."),
    ("V1@RA_RR=8", "step V1@RA_RR=8: unknown symbol RA_RR.", "did you mean RA_R?"),
    ("V1@RA_R=+8", "step V1@RA_R=+8: RA_R=+8 is not a whole number.", "give RA_R a whole number."),
    ("V1@GPT2_BIAS=Y", "step V1@GPT2_BIAS=Y: GPT2_BIAS=Y is not y or n.", "give GPT2_BIAS y or n."),
    ("V3@RMLP_R_FF=0", "step V3@RMLP_R_FF=0: RMLP_R_FF=0 is not a ratio like 1/48 or a whole number >= 1.",
     "give RMLP_R_FF a ratio like 1/48 or a whole number >= 1."),
    ("V0@RA_R=8", "step V0@RA_R=8: RA_R=8 did not take, because it depends on ATTENTION_UNIFIED_RA.",
     "set ATTENTION_UNIFIED_RA as well, or leave RA_R out."),
    ("V1@RA_R=64", "RA_R=64 is not below the head width 64.", "set RA_R to at most 63."),
    ("V0@GPT2_MAX_TIME=5,GPT2_MAX_ITERS=5", "exactly one of seconds, iterations and tokens must be the budget, but "
     "GPT2_MAX_TIME=5, GPT2_MAX_ITERS=5, GPT2_MAX_TOKENS=0.", "give one of them, e.g. GPT2_MAX_TIME=7200 make."),
    ("V1@SEED=7", "step V1@SEED=7: SEED belongs to the study, a step cannot set it.",
     "set it in make menuconfig (SEEDS for seeds)."),
    ("V1@OUTPUT_DIR=x", "step V1@OUTPUT_DIR=x: OUTPUT_DIR belongs to the study, a step cannot set it.",
     "set it in make menuconfig (SEEDS for seeds)."),
])
def test_a_step_that_cannot_be_is_refused(spec, what, run):
    assert refusal(study().resolve, spec) == (what, run)


def test_no_step_at_all_is_no_step():
    assert refusal(parse_step, "") == ("'' is no step.", "write a step as V1 or as V1@RA_R=8.")


def test_a_step_file_is_held_to_the_same_rules(tmp_path, monkeypatch):
    steps = tmp_path / "steps"
    steps.mkdir()
    monkeypatch.setattr("lib.steps.ROOT", tmp_path)
    for name, text in [("V10", ""), ("V2", "# Help:  two \n# Equals: V0\nCONFIG_GPT2_BIAS=y\n"),
                       ("A", "CONFIG_X=y\n# Help: late\n")]:
        (steps / f"{name}.config").write_text(text)
    (steps / "notes.txt").write_text("no step")
    assert list(step_files("steps")) == ["A", "V2", "V10"]
    assert step_header(step_path("V2", "steps"), "Help") == "two" and step_header(step_path("V2", "steps"), "Equals") == "V0"
    assert step_header(step_path("A", "steps"), "Help") is None
    assert refusal(step_path, "V22", "steps") == ("there is no step 'V22'.", "did you mean V2?")


# Budget

@pytest.mark.parametrize("lines, step, overrides, expected", [
    ([], "V0", [], {"GPT2_MAX_TIME": 7200}),
    (["GPT2_MAX_ITERS=250"], "V0", [], {"GPT2_MAX_ITERS": 250}),
    (["GPT2_MAX_ITERS=250"], "V0", ["GPT2_MAX_TIME=60"], {"GPT2_MAX_TIME": 60}),
    (["GPT2_MAX_TIME=99"], "V0", ["GPT2_MAX_ITERS=5"], {"GPT2_MAX_ITERS": 5}),
    (["GPT2_MAX_ITERS=250"], "V0", ["GPT2_MAX_TOKENS=99"], {"GPT2_MAX_TOKENS": 99}),
    (["GPT2_MAX_TOKENS=250"], "V0@GPT2_MAX_TIME=60", [], {"GPT2_MAX_TIME": 60}),
    (["GPT2_MAX_TIME=99"], "V0@GPT2_MAX_TOKENS=9", ["GPT2_MAX_ITERS=5"], {"GPT2_MAX_ITERS": 5}),
    (["GPT2_MAX_ITERS=250"], "V0@GPT2_BIAS=n", ["GPT2_MAX_TIME=0"], {"GPT2_MAX_ITERS": 250}),
    (["GPT2_MAX_TIME=0"], "V0", ["GPT2_MAX_TIME=60"], {"GPT2_MAX_TIME": 60}),  # what the error of no budget says to run
    (["GPT2_MAX_TIME=60", "GPT2_MAX_ITERS=5"], "V0", ["GPT2_MAX_TOKENS=9"], {"GPT2_MAX_TOKENS": 9}),
])
def test_an_override_of_one_budget_clears_the_others(dotconfig, lines, step, overrides, expected):
    dotconfig(*lines)
    resolved = study(None, overrides).resolve(step)
    assert budget(resolved.config) == expected
    dotconfig().write_text(resolved.text)
    assert budget(Study(schema=SCHEMA).config) == expected, "also through the cell's own .config"


def test_two_budgets_in_the_environment_are_refused(dotconfig, monkeypatch):
    dotconfig("GPT2_MAX_ITERS=5")
    monkeypatch.setenv("GPT2_MAX_TIME", "60")
    monkeypatch.setenv("GPT2_MAX_TOKENS", "9")
    found = Study(overrides=environment_overrides(), schema=SCHEMA)
    assert refusal(found.resolve, "V0")[0] == ("exactly one of seconds, iterations and tokens must be the budget, but "
                                               "GPT2_MAX_TIME=60, GPT2_MAX_ITERS=5, GPT2_MAX_TOKENS=9.")


def test_the_environment_gives_budgets_and_nothing_else(monkeypatch):
    for name, value in [("GPT2_MAX_TIME", " 60 "), ("GPT2_MAX_ITERS", ""), ("BATCH_SIZE", "3"), ("GPT2_DROPOUT", "0.5")]:
        monkeypatch.setenv(name, value)
    assert environment_overrides() == [Assignment("GPT2_MAX_TIME", "60", "environment GPT2_MAX_TIME")]


# Identity

@pytest.mark.parametrize("override", [
    "MARGIN=0.5", "SEEDS=1 2 3", "TRACKER_WANDB=y", "OUTPUT_DIR=elsewhere", "GPT2_LOG_INTERVAL=1", "CHECKPOINT_INTERVAL=0",
    "DATA_DIR=/mnt/data", "DATA_LOCAL_DIR=/mnt", "DATA_SOURCE=x", "DATA_PREPARE_TOKENS=5", "BASELINE=V0", "STUDY=other",
    "ABLATION_STEPS=V1", "OPTIMIZERS=adamw"])
def test_bookkeeping_does_not_enter_the_identity(override):
    assert identity("V1", override) == identity("V1")


@pytest.mark.parametrize("override", [
    "RA_R=8", "GPT2_BIAS=n", "BATCH_SIZE=9", "LEARNING_RATE=0.0031", "CPU_THREADS=2", "GPT2_MAX_ITERS=251", "GPT2_MAX_TIME=60",
    "SEED=1", "GPT2_EVAL_INTERVAL=51", "GPT2_EVAL_SAMPLES=21", "DEVICE_AUTO=y", "AMP_FLOAT32=y", "DATA_TINYSTORIES=y",
    "OPTIMIZER_ADAMW=y", "GPT2_COMPILE=y", "INIT_FROM_STEP=V0", "MODEL_GPT2=y", "RA_GATES_FIXED=y"])
def test_what_changes_numbers_does(override):
    changes = identity_changes(identity("V1"), identity("V1", override))
    assert any(change.startswith(override.split("=")[0]) for change in changes)
    assert identity("V1", override)["hash"] != identity("V1")["hash"]


@pytest.mark.parametrize("override", ["LEARNING_RATE=1.5e-3", "LEARNING_RATE=0.00150", "GPT2_DROPOUT=.0", "RMLP_R_FF=2/96"])
def test_another_spelling_of_a_number_does_not(override):
    assert identity_changes(identity("V3"), identity("V3", override)) == []


def test_equal_numbers_by_another_way_are_equal():
    one = study("gpt2-ra-ablation+tiny+cpu").resolve("V1").identity
    assert one == study("gpt2-ra-ablation+cpu+tiny").resolve("V1").identity
    assert one == study("gpt2-ra-rmlp-ablation+tiny").resolve("V1").identity, "the name of the study is no number"
    assert identity_changes(one, identity("V1@RA_R=4")) == [], "a default said aloud"
    assert identity_changes(one, identity("V0@ATTENTION_UNIFIED_RA=y")) == []


@pytest.mark.parametrize("step", ["V0", "V1@RA_R=8,GPT2_BIAS=n", "V6", "V3@RMLP_R_FF=3/8"])
@pytest.mark.parametrize("name", ["gpt2-ra-ablation", "gpt2-ra-ablation+tiny"])
def test_a_cells_own_dotconfig_gives_its_identity_again(dotconfig, step, name):
    resolved = study(name).resolve(step).with_seed(7)
    dotconfig().write_text(resolved.text)
    again = Study(schema=SCHEMA)
    assert identity_changes(resolved.identity, again.resolve().identity) == []
    assert again.config.as_json() == resolved.config.as_json()


def test_a_seed_is_put_in_without_a_second_resolve():
    resolved = study().resolve("V1")
    other = resolved.with_seed(7)
    assert other.config.SEED == 7 and "\nCONFIG_SEED=7\n" in other.text and other.identity["set"]["SEED"] == "7"
    assert "SEED" not in other.identity["default"] and other.provenance["SEED"] == ["7", "the seed of the cell"]
    assert identity_changes(resolved.identity, other.identity) == ["SEED 1337 -> 7"]
    assert resolved.config.SEED == 1337 and "\nCONFIG_SEED=1337\n" in resolved.text and resolved.identity["default"]["SEED"]
    assert resolved.with_seed(1337).identity["hash"] != other.identity["hash"]


@pytest.mark.parametrize("old, new, changes", [
    (({"A": "1"}, {"B": "2"}), ({"A": "1"}, {"B": "2"}), []),
    (({"A": "1"}, {}), ({"A": "1"}, {"NEW": "0"}), []),  # a symbol added at its default
    (({"A": "1"}, {"OLD": "0"}), ({"A": "1"}, {}), []),  # and taken away again
    (({"A": "1"}, {"B": "2"}), ({}, {"A": "1", "B": "2"}), []),  # the default moved to where the value was
    (({}, {"B": "2"}), ({}, {"B": "3"}), ["B 2 -> 3"]),  # a changed default
    (({"A": "1"}, {"B": "2"}), ({"A": "1", "B": "3"}, {}), ["B 2 -> 3"]),
    (({"A": "1"}, {}), ({}, {}), ["A 1 -> unset"]),
    (({}, {}), ({"A": "1", "Z": "2"}, {}), ["A unset -> 1", "Z unset -> 2"]),
])
def test_identities_are_compared_by_value(old, new, changes):
    old, new = ({"set": pair[0], "default": pair[1], "hash": "any"} for pair in (old, new))
    assert identity_changes(old, new) == changes


# Any text

TEXT = st.text(st.characters(), max_size=60)
SPECS = st.one_of(TEXT, TEXT.map("V1@".__add__), st.builds("V1@{}={}".format, st.sampled_from(sorted(SCHEMA.prompted)), TEXT),
                  st.builds("V3@{}={},{}".format, st.sampled_from(["RA_R", "BATCH_SIZE", "STUDY"]), st.integers(), TEXT))
STUDY = study("gpt2-ra-ablation+tiny")


@given(SPECS)
@example("V1@GPT2_DROPOUT=1e-99999999")
@example("V1@BATCH_SIZE=" + "9" * 5000)
@settings(max_examples=150)
def test_any_step_resolves_to_what_it_says_or_is_refused(spec):
    try:
        resolved, layer = STUDY.resolve(spec), parse_step(spec)[1]
    except UserError as error:
        assert error.what and error.run
        return
    for a in layer:
        assert SCHEMA.symbols[a.name].str_value == a.value
        assert resolved.provenance.get(a.name, [a.value])[0] == a.value


LINES = st.one_of(st.builds("CONFIG_{}={}".format, st.sampled_from(sorted(SCHEMA.symbols)), st.sampled_from("ynm0178")),
                  st.builds('CONFIG_{}="{}"'.format, st.sampled_from(sorted(SCHEMA.symbols)), st.text(max_size=9)),
                  st.builds("# CONFIG_{} is not set".format, st.sampled_from(sorted(SCHEMA.symbols))),
                  st.sampled_from([f"CONFIG_{line}" for line in TINY]), TEXT)


@given(st.lists(LINES, max_size=4).map("\n".join))
@settings(max_examples=150)
def test_any_dotconfig_holds_what_it_says_or_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "dot.config"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = Study(config=path, schema=SCHEMA)
    except UserError as error:
        assert error.what and error.run
        return
    SCHEMA.reset()
    SCHEMA.apply(found.base, verify=False)
    for a in read_layer(path):
        assert SCHEMA.symbols[a.name].str_value == a.value


@pytest.mark.parametrize("typed, meant", [
    ("SEEDZ=3", "did you mean SEED= or SEEDS= (make help)?"), ("MAX_ITERS=10", "did you mean GPT2_MAX_ITERS= (make help)?"),
    ("GPT2_MAXTIME=5", "did you mean GPT2_MAX_TIME= or GPT2_MAX_ITERS= (make help)?"),
    ("OUTT=x", "did you mean OUT= (make help)?"),
    ("STEPS=V0\\ V1", "name steps as goals (make plan V0 V1), or set ABLATION_STEPS."),
    ("CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=2 HF_HOME=/x CC=gcc", None)])
def test_a_variable_that_nobody_asks_for_is_refused_if_it_looks_like_another(monkeypatch, dotconfig, typed, meant):
    dotconfig()
    monkeypatch.setenv("MAKEFLAGS", f" -j2 -- OUT=/x {typed}")
    if meant is None:
        announce(Study())
        return
    assert refusal(announce, Study()) == (f"{typed.partition('=')[0]}= is no variable of make here.", meant)


def test_the_variables_of_make_are_those_that_the_makefile_reads():
    text = (ROOT / "Makefile").read_text()
    listed = re.search(r"foreach v,([A-Z0-9_,]+(?:[A-Z0-9_ ]+)),", text)[1].split()
    asked = re.findall(r"call on_command_line,([A-Z_]+)\)", text)
    assert {*listed, *asked, "V", "PYTHON", "PYTHON3"} == set(OF_MAKE) and len(set(OF_MAKE)) == len(OF_MAKE)


@pytest.mark.parametrize("flags, idle", [
    (" -- ABLATION_STEPS=V0\\ V1@RA_R=8 OUT=/x", "ABLATION_STEPS"), ("-- BATCH_SIZE=4", "BATCH_SIZE"),
    (" -j2 --jobserver-auth=3,4 -- PROMPT=a\\ BATCH_SIZE=1 SEEDS=3 JOBS=2 GPT2_MAX_ITERS=5 STUDY=x", None), ("n", None),
    ("", None)])
def test_a_symbol_on_makes_command_line_is_refused_and_not_ignored(monkeypatch, dotconfig, flags, idle):
    dotconfig()
    monkeypatch.setenv("MAKEFLAGS", flags)
    if idle is None:
        announce(Study())
        return
    assert refusal(announce, Study()) == (
        f"{idle}= does nothing on make's command line: it is a symbol of the configuration.",
        "set it in make menuconfig; for one step, ABLATION_STEPS takes STEP@SYMBOL=VALUE.")
