"""What users rely on: studies, fragments, steps, goals, symbols, keys. A pinned set is changed on purpose or not at all."""

import ast
import functools
import os
import re
import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest

from lib import results
from lib.cells import baseline, expand
from lib.config import Study, defconfig_layers, defconfig_names, identity_changes
from lib.kconfig import OUTSIDE, Schema, read_layer
from lib.steps import step_files, step_header
from tests.harness import ROOT, TINY, run_here

SCHEMA = Schema()
STUDIES = sorted(defconfig_names())
FRAGMENTS = sorted(p.name for p in (ROOT / "defconfigs/fragments").iterdir())
STEPS = step_files()


@functools.cache
def load(name, step=None):
    """lib.config.load, which would read the Kconfig files for each."""
    return Study(name, schema=SCHEMA).resolve(step).config


def words(text):
    return text.split()


GOALS = set(words("""
run cells plan estimate report show slurm slurm-status slurm-cancel fim curvature routing lm-eval export check data
tune-lr browse pack unpack menuconfig nconfig oldconfig olddefconfig listnewconfig savedefconfig list-defconfigs
list-steps diffconfig
setup test torture defects lint claims docs diagrams bench-check bench-overhead bench-stats bench-steps bench-train
bench-attention bench-decode bench-ranks compile-matrix frontier ladder sample doctor randconfig clean mrproper help
"""))

TOP = set(words("""
Makefile Kconfig defconfigs gpt2 lib scripts test_matrix_results tests docs pyproject.toml requirements.txt constraints.txt
README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE Dockerfile
.ci .gitignore .dockerignore .editorconfig .pre-commit-config.yaml
"""))

STATES = {"planned", "running", "interrupted", "stale", "done", "diverged", "failed"}

KEYS = words("""
format state reason inactive study step optimizer seed identity val_loss val_perplexity val_loss_by_position best_val_loss
train_loss future_leak iterations tokens train_seconds tokens_per_second budget_progress start_seconds compile_seconds
eval_seconds calibration_seconds checkpoint_seconds other_seconds resumed shared_device parameters sizes kv_cache_bytes
kv_cache_parts peak_memory_bytes compression data environment configuration started finished checksum
""")

# Symbols of a cell's identity: removing or renaming one, or changing its default, makes finished cells stale.
IDENTITY = set(words("""
ADAM_BETA1 ADAM_BETA2 AMP_BFLOAT16 AMP_FLOAT32 ATTENTION_DIRECTION ATTENTION_LATENT_BAND ATTENTION_LENS ATTENTION_MLA
ATTENTION_OUTPUT_GATE ATTENTION_ROUTER ATTENTION_SDPA ATTENTION_TIED_KV ATTENTION_TRANSPOSE ATTENTION_UNIFIED_RA
ATTENTION_WALK BAND_CROSS_TOKEN BAND_EXCHANGE BAND_HEAD_GATES BAND_LATENT BAND_RECIPROCAL BAND_WINDOW BATCH_DRAWN
BATCH_SIZE BATCH_SIZE_AUTO COMPILE_REGIONS CONTEXT_CONDUCTOR CONTEXT_RANK COUPLING_DELAY COUPLING_DELAY_STEPS
COUPLING_NONE COUPLING_RAMP_STEPS COUPLING_SHARE COUPLING_SPREAD COUPLING_TREND COUPLING_VARIANCE COUPLING_WARMUP
COUPLING_WINDOW CPU_THREADS CUDA_GRAPHS DATA_FINEWEB_EDU DATA_LOCAL DATA_PYSTDLIB DATA_SHAKESPEARE DATA_TINYSTORIES
DEVICE_AUTO DEVICE_CPU DEVICE_CUDA DIRECTION_ALL DIRECTION_BALANCE DIRECTION_EARLY DIRECTION_LATE DIRECTION_LEARNED
DIRECTION_MIN_STEPS DIRECTION_SHARE EVALUATE_ONLY GATE_LR_MULT GPT2_BIAS GPT2_BLOCK_SIZE GPT2_COMPILE GPT2_DROPOUT
GPT2_EVAL_INTERVAL GPT2_EVAL_SAMPLES GPT2_GRADIENT_ACCUMULATION GPT2_MAX_ITERS GPT2_MAX_TIME GPT2_MAX_TOKENS GPT2_MIN_LR
GPT2_MLP_EXPANSION GPT2_N_EMBD GPT2_N_HEAD GPT2_N_LAYER GPT2_RECOMPUTE GPT2_WARMUP_STEPS GRAD_CLIP INIT_FROM_HF INIT_FROM_STEP
KVSPLICE KVSPLICE_EPOCHS KVSPLICE_K KVSPLICE_KNOTS KVSPLICE_LR KVSPLICE_MAX_BATCHES KVSPLICE_SAMPLES KVSPLICE_SHARED
KV_BLOCK KV_CACHE_AUTO KV_CACHE_BFLOAT16 KV_CACHE_FLOAT16 KV_CACHE_FLOAT32 KV_KEEP_LEARNED KV_KEEP_PENALTY KV_KEEP_RATIO
KV_PRUNING_KV KV_PRUNING_NONE KV_PRUNING_V LEARNING_RATE LEARNING_RATE_MULT LENS_COLUMN_BIAS LENS_LATENT LENS_LATENT_KV
LENS_ROUTE_GATE LENS_TRANSPOSE LOSS_CHUNKS MLA_D_LATENT MLA_KVSPLICE MLA_KVSPLICE_D MLA_TOKEN_LATENT MLP_CONTEXT
MLP_GELU MLP_NONE MLP_RECIPROCAL MODEL_CUSTOM MODEL_GPT2 MODEL_GPT2_LARGE MODEL_GPT2_MEDIUM MODEL_GPT2_XL MODEL_TINY
OPTIMIZER_ADAMW OPTIMIZER_ADAMWSPAM OPTIMIZER_SINKGD RA_GATES_FIXED RA_GATES_GEOMETRIC RA_PER_HEAD_GATES RA_R
RA_SELF_RESTART RA_TIED RESIDUAL_BF16 RMLP_GATES_FIXED RMLP_GATES_GEOMETRIC RMLP_INJECTION RMLP_MIXER RMLP_R_FF
RMLP_TIED_PROJ RMLP_TIED_UP RMLP_TOKEN_GATE RMLP_UNTIED ROUTER_DROP ROUTER_PENALTY ROUTER_RA_HEADS SEED SINKGD_ITERS
SINKGD_L1 SINKGD_MATRIX_LR_MULT SINKGD_TAU SKIP_AFTER SKIP_CHECK SKIP_GATES SKIP_PENALTY SKIP_START SKIP_START_REC
SPAM_INTERVAL SPAM_THETA SPAM_WARMUP_STEPS STREAMS STRUCT_LR WALK_BETA WALK_GAMMA WALK_NEIGHBOURS WALK_RESTART
WALK_REVERSIBLE WALK_STEPS WALK_WINDOW WEIGHT_DECAY
"""))

OUTSIDE_IDENTITY = set(words("""
ABLATION_STEPS BASELINE CELLS_PER_GPU CELL_TIMEOUT CHECKPOINT_INTERVAL CLUSTER_ACCOUNT CLUSTER_GRES CLUSTER_JOBS
CLUSTER_MINUTES CLUSTER_OPTIONS CLUSTER_PARTITION CLUSTER_QOS CONTRASTS CONTROL_STEPS DATA_DIR DATA_LOCAL_DIR
DATA_PREPARE_TOKENS DATA_SOURCE GPT2_LOG_INTERVAL GPUS_PER_STEP JOBS MARGIN MAX_SEEDS OPTIMIZERS OUTPUT_DIR SAVE_MODEL SEEDS
STOP_SECONDS STUDY TRACKERS TRACKER_DISABLED TRACKER_NONE TRACKER_OFFLINE TRACKER_ONLINE TRACKER_PROJECT TRACKER_SEVERAL
TRACKER_TENSORBOARD TRACKER_TRACKIO TRACKER_WANDB TUNE_LR
"""))

DERIVED = set(words("""
ATTENTION_CLASS BLOCK_CLASS COUPLED COUPLING_CONTROLLER DATASET DEVICE DIRECTION_CONTROLLER FUNCTION_CLASS GPT2_AMP_DTYPE
KVSPLICE_CLASS KV_CACHE_DTYPE KV_PRUNING_CLASS MLP_CLASS OPTIMIZER PRUNABLE PRUNING RULES SKIP_CONTROLLER STEPS_DIR
TOKENIZER TRACKER TRACKER_MODE TRAINER VOCAB_SIZE WARNINGS
"""))


# Pinned sets

def test_the_top_level_is_the_pinned_one():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert {path.split("/")[0] for path in listed.splitlines()} == TOP


def test_the_symbols_are_the_pinned_ones():
    assert SCHEMA.identity == IDENTITY
    assert SCHEMA.prompted - SCHEMA.identity == OUTSIDE_IDENTITY
    assert SCHEMA.symbols.keys() - SCHEMA.prompted == DERIVED


def test_the_keys_of_metrics_json_are_the_pinned_ones():
    assert list(results.KEYS) == KEYS and results.FORMAT == 1


def test_the_states_are_the_pinned_ones():
    said = set(re.findall(r'Status\("(\w+)"', (ROOT / "lib/cells.py").read_text()))
    assert said | set(results.STATES) == STATES


def test_the_goals_are_the_pinned_ones_and_a_goal_a_step():
    done = make("-qp", "help")
    phony = set(re.search(r"^\.PHONY:(.*)", done.stdout, re.M)[1].split())
    assert phony == GOALS | STEPS.keys()


def test_every_goal_is_in_help_with_what_it_does():
    listed = re.findall(r"^  (\S+) +\S.*", make("help").stdout, re.M)
    assert sorted(listed) == sorted([*GOALS, "defconfig-NAME"])


def test_the_menus_outside_the_identity_have_the_names_that_the_code_knows():
    assert [f'menu "{menu}"' in (ROOT / name).read_text() for menu, name in zip(OUTSIDE, ("Kconfig", "lib/Kconfig"),
                                                                                strict=True)] == [True, True]


# Symbols

def prompted_nodes():
    return [(name, node) for name in sorted(SCHEMA.prompted) for node in SCHEMA.symbols[name].nodes if node.prompt]


def test_every_symbol_and_choice_with_a_prompt_has_a_help_text():
    missing = [name for name, node in prompted_nodes() if not (node.help or "").strip()]
    missing += [c.nodes[0].prompt[0] for c in SCHEMA.kconf.unique_choices if not (c.nodes[0].help or "").strip()]
    assert missing == []


def number(text):
    try:
        return Fraction(text)
    except ValueError:
        return None


def test_strings_that_hold_numbers_have_a_range_and_a_default_inside_it():
    for name, symbol in SCHEMA.symbols.items():
        if SCHEMA.kinds[name] not in ("str", "float", "ratio"):
            continue
        defaults = [number(d.name) for d, _ in symbol.defaults]
        if symbol.ranges:
            (low, high, _), = symbol.ranges
            assert defaults and all(d is not None and number(low.name) <= d <= number(high.name) for d in defaults), name
        elif name != "SEEDS":
            assert not any(d is not None for d in defaults), f"{name} holds a number without a range"


def test_whole_numbers_have_a_range_and_a_default_inside_it():
    for name in SCHEMA.prompted:
        symbol = SCHEMA.symbols[name]
        if SCHEMA.kinds[name] == "int":
            (low, high, _), = symbol.ranges
            assert symbol.defaults and all(int(low.name) <= int(d.name) <= int(high.name) for d, _ in symbol.defaults), name


def test_modules_that_symbols_name_are_there():
    naming = [name for name in DERIVED if name.endswith(("_CLASS", "_CONTROLLER"))] + ["RULES", "WARNINGS"]
    assert {"BLOCK_CLASS", "ATTENTION_CLASS", "MLP_CLASS", "FUNCTION_CLASS", "SKIP_CONTROLLER"} <= set(naming)
    for name in naming:
        for default, _ in SCHEMA.symbols[name].defaults:
            if not default.name:  # a part that is not there
                continue
            module, _, attribute = default.name.partition(":")
            assert re.search(rf"^(class|def) {attribute}\b", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.M)
    assert (ROOT / SCHEMA.symbols["TRAINER"].str_value).is_file() and (ROOT / SCHEMA.symbols["STEPS_DIR"].str_value).is_dir()


# Studies and fragments

@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_loadable_and_minimal(name):
    study = Study(name, schema=SCHEMA)
    said = {a.name: a.value for layer in defconfig_layers(name) for a in layer}
    assert said == {a.name: a.value for a in study.base if a.name != "STUDY"}
    assert study.name == name and not study.is_fallback and expand(study) and baseline(study)
    assert (defconfig_names()[name]).read_text().startswith("# ") and "STUDY" not in said


@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("name", STUDIES)
def test_a_fragment_merges_with_every_study(name, fragment):
    study = Study(f"{name}+{fragment}", schema=SCHEMA)
    cells = expand(study)
    for a in read_layer(ROOT / "defconfigs/fragments" / fragment):
        for cell in cells:
            assert f"CONFIG_{a.name}=" in cell.resolved.text or a.value == "n"
            assert cell.resolved.provenance.get(a.name, [a.value])[0] == a.value, "a step undoes the fragment"
    assert {c.resolved.config.STUDY for c in cells} == {f"{name}+{fragment}"}


def test_all_fragments_together_merge_in_any_pair():
    for one, two in combinations(FRAGMENTS, 2):
        Study(f"{STUDIES[0]}+{one}+{two}", schema=SCHEMA)


# Steps

def test_there_are_steps():
    assert STEPS.keys() >= {*(f"V{i}" for i in range(7)), *CONTROLS}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_a_help_line_and_one_to_eight_symbols(name):
    lines = STEPS[name].read_text().splitlines()
    assert re.fullmatch(r"# Help: \S.*", lines[0]) and lines[0].isascii()
    assert 1 <= len(read_layer(STEPS[name])) <= 8
    twin = step_header(STEPS[name], "Equals")
    assert twin is None or (lines[1] == f"# Equals: {twin}" and twin in STEPS and twin != name)
    control = step_header(STEPS[name], "Control")
    assert control in (None, "null", "harm", "gain") and (control is None or lines[1 + bool(twin)] == f"# Control: {control}")
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name), "what ABLATION_STEPS can name"
    assert name not in GOALS, "what make can tell from a goal"


@pytest.mark.parametrize("study", STUDIES)
def test_the_steps_of_a_study_differ_unless_they_say_that_they_do_not(study):
    study = Study(study, schema=SCHEMA)
    cells = expand(study, [1])
    twins = {cell.step: step_header(STEPS[cell.step], "Equals") or cell.step for cell in cells if cell.step in STEPS}
    for one, two in combinations(cells, 2):
        declared = twins.get(one.step, one.step) == twins.get(two.step, two.step)  # overrides differ
        assert declared or identity_changes(one.resolved.identity, two.resolved.identity), f"{one.step} is {two.step}"


def test_every_step_holds_in_every_study_whatever_it_lists():
    """In two all of them, in the others (whose values are set the same way) one of four."""
    for number, name in enumerate(["gpt2-ra-ablation", "gpt2-ra-ablation+tiny", *STUDIES]):
        study = Study(name, schema=SCHEMA)
        for step in list(STEPS)[number % 4::4] if number > 1 else STEPS:
            resolved = study.resolve(step)
            assert all(resolved.provenance.get(a.name, [a.value])[0] == a.value for a in read_layer(STEPS[step]))


# What the main study is

MAIN = {"GPT2_N_LAYER": 12, "GPT2_N_HEAD": 12, "GPT2_N_EMBD": 768, "GPT2_BLOCK_SIZE": 1024, "VOCAB_SIZE": 50257,
        "TOKENIZER": "gpt2", "DATASET": "finewebedu", "BATCH_SIZE": 8, "GPT2_GRADIENT_ACCUMULATION": 8, "LEARNING_RATE": 6e-4,
        "GPT2_MIN_LR": 6e-5, "GPT2_WARMUP_STEPS": 200, "WEIGHT_DECAY": 0.1, "GPT2_DROPOUT": 0.1, "GPT2_AMP_DTYPE": "bfloat16",
        "GPT2_COMPILE": True, "GPT2_BIAS": True, "OPTIMIZER": "adamwspam", "SPAM_THETA": 5000.0, "SPAM_INTERVAL": 500,
        "SPAM_WARMUP_STEPS": 150, "ADAM_BETA1": 0.9, "ADAM_BETA2": 0.95, "GRAD_CLIP": 1.0, "GPT2_MAX_TIME": 7200,
        "GPT2_MAX_ITERS": 0, "GPT2_MAX_TOKENS": 0, "GPT2_EVAL_INTERVAL": 500, "GPT2_EVAL_SAMPLES": 200, "GPT2_LOG_INTERVAL": 10,
        "SEED": 1337, "SEEDS": "1337", "ABLATION_STEPS": "V0 V1 V2 V3 V4 V5 V6", "DEVICE": "auto", "TRACKER": "none",
        "MARGIN": 0.01, "PRUNING": "none", "INIT_FROM_STEP": ""}
AS_TINY = {"GPT2_N_LAYER": 2, "GPT2_N_HEAD": 2, "GPT2_N_EMBD": 128, "GPT2_BLOCK_SIZE": 128, "VOCAB_SIZE": 256,
           "TOKENIZER": "bytes", "DATASET": "pystdlib", "GPT2_GRADIENT_ACCUMULATION": 1, "LEARNING_RATE": 1.5e-3,
           "GPT2_MIN_LR": 1.5e-4, "GPT2_WARMUP_STEPS": 20, "GPT2_COMPILE": False, "GPT2_MAX_TIME": 0, "GPT2_MAX_ITERS": 250,
           "GPT2_EVAL_INTERVAL": 50, "GPT2_EVAL_SAMPLES": 20, "DEVICE": "cpu", "CPU_THREADS": 1,
           "SEEDS": "1337 1338 1339", "GPT2_DROPOUT": 0.0}


@pytest.mark.parametrize("name, expected", [("gpt2-ra-ablation", MAIN), ("gpt2-ra-ablation+tiny", MAIN | AS_TINY)])
@pytest.mark.parametrize("step", ["V0", "V6"])
def test_the_main_study_is_the_documented_one(name, expected, step):
    cfg = load(name, step)
    assert {symbol: getattr(cfg, symbol) for symbol in expected} == expected


STUDIES_OF_THE_DOCUMENTS = {
    "gpt2-ra-ablation": "V0 V1 V2 V3 V4 V5 V6", "gpt2-unified-ra-ablation": "V0 V1",
    "gpt2-ra-rmlp-ablation": "V0 V1 V2 V3 V4 V5 V6",
    "gpt2-unified-ra-extended-ablation": "V0 V9 V1 V7 V2@RA_R=2 V2 V8", "gpt2-ra-tied-ablation": "V0 V1 V1T OG0",
    "gpt2-ra-geometric-ablation":
        "V0 V1 V1@RA_GATES_FIXED=y V3 V3@RA_GATES_FIXED=y,RMLP_GATES_FIXED=y V13 V13@RMLP_GATES_FIXED=y",
    "gpt2-ra-ablation-cowboy": "V0 V1 V1@COUPLING_WARMUP=y V3 V3@COUPLING_WARMUP=y V13@COUPLING_NONE=y V13@COUPLING_WARMUP=y",
    "gpt2-ra-activation-ablation": "V0 V11 V12 V13 V16", "gpt2-ra-skip-ablation": "R0 R1",
    "gpt2-r-mlp-skip-ablation": "M0 M1 M4 M5 M6", "gpt2-r-mlp-prune": "M0 M1 M2 M3",
    "gpt2-kv-compression-ablation": "V0 V19 C1 C2 C3", "gpt2-kv-pruning-ablation": "V0 V14 V15 V17 V18 V19",
    "gpt2-mla-architecture-ablation": "MLA0 RAMLA0 RAMLAKV0",
    "gpt2-kvsplice-ablation": "B0 MLA0 MLAKV0 MLA0@MLA_D_LATENT=1/6 RAMLA0 RAMLAKV0",
    "gpt2-kv-frontier-ablation": "V0 V1T V14 V19 C1 C2 C3 MLA0 MLAKV0 MLA0@MLA_D_LATENT=1/6 RAMLA0 RAMLAKV0",
    "gpt2-ramla-lr-ablation": "B0 B1 MLA0 MLA1 MLAKV0 MLAKV1 MLA0@MLA_D_LATENT=1/6 MLA1@MLA_D_LATENT=1/6 RAMLA0 RAMLA1 "
                              "RAMLAKV0 RAMLAKV1",
    "gpt2-ra-direction-ablation": "B0 RALEARN0 RAEARLY0 RALATE0 RAALL0",
    "gpt2-ra-baseline-vs-routing": "RT0 RT1", "gpt2-controls": "V0 A0 P0 OG0", "gpt2-ladder-ablation": "V0 V1T V3 OG0",
    "gpt2-ra-parts-ablation": "V0 V1 V1T V2 V3 V4 V5 V6",
    "gpt2-skip-gates-ablation": "R0 M0 R1 M1 M2 M2@SKIP_PENALTY=0.03 M2@SKIP_PENALTY=0.1 M3",
    "gpt2-lens-ablation": "L0 L1 L2 L3 L4 L5 L6 L7",
    "gpt2-rwr-ablation": "W0 W1 W2 W3", "gpt2-ratio-ablation": "V0 G1 G2N G2 G2M1 G2M2 G2M3 G2A",
    "gpt2-sinkgd-ablation": "S0 S1 S2 S3", "gpt2-kv-tying-ablation": "V0 KT1",
}


def test_the_studies_are_the_documented_ones():
    assert {name: load(name).ABLATION_STEPS for name in STUDIES} == STUDIES_OF_THE_DOCUMENTS


# Step: what differs from V0 in its resolved configuration, less what a class or controller symbol follows from.
VARIANTS = {
    "V7": {"RA_R": 8}, "V8": {"RA_R": 8, "RA_SELF_RESTART": True}, "V9": {"RA_R": 2},
    "V10": {"RA_R": 4, "RA_SELF_RESTART": True, "GPT2_MLP_EXPANSION": 6},
    "V11": {"RMLP_R_FF": "1/48", "COUPLING_DELAY_STEPS": 75, "COUPLING_SHARE": 0.1},
    "V12": {"RA_R": 4, "COUPLING_DELAY_STEPS": 75, "COUPLING_SHARE": 0.1},
    "V13": {"RMLP_R_FF": "3/8", "COUPLING_DELAY_STEPS": 75, "COUPLING_SHARE": 0.1},
    "V16": {"RA_R": 4, "COUPLING_WINDOW": 50, "COUPLING_RAMP_STEPS": 200, "COUPLING_SPREAD": 0.2, "COUPLING_TREND": 0.1,
            "COUPLING_SHARE": 0.1},
    "V1T": {"RA_R": 4, "RA_TIED": True}, "R1": {"RA_R": 4, "SKIP_START": 2.0, "SKIP_AFTER": 0.2},
    "M1": {"RMLP_R_FF": "3/8", "RMLP_INJECTION": True, "SKIP_START": 2.0, "SKIP_START_REC": 2.0},
    "M2": {"RA_R": 4, "RMLP_R_FF": "3/8", "RMLP_INJECTION": True, "SKIP_GATES": True},
    "M4": {"RMLP_R_FF": "1/4", "RMLP_TIED_PROJ": True, "RMLP_INJECTION": True, "SKIP_GATES": True},
    "M5": {"RMLP_R_FF": "3/8", "RMLP_INJECTION": True, "SKIP_START_REC": -1.5},
    "M6": {"RMLP_R_FF": "3/8", "RMLP_INJECTION": True, "SKIP_START_REC": -0.5},
    "S0": {"OPTIMIZER": "adamwspam"},
    "S1": {"OPTIMIZER": "sinkgd", "SINKGD_L1": True, "SINKGD_TAU": 0.1, "SINKGD_ITERS": 5, "LEARNING_RATE": 0.02},
    "S2": {"OPTIMIZER": "sinkgd", "SINKGD_L1": True, "SINKGD_TAU": 0.05, "SINKGD_ITERS": 10},
    "S3": {"OPTIMIZER": "sinkgd", "SINKGD_L1": True, "SINKGD_TAU": 0.2, "SINKGD_ITERS": 3},
    "RALEARN1": {"DIRECTION_LEARNED": True, "LEARNING_RATE_MULT": 2.0, "DIRECTION_SHARE": 0.1},
    "RAEARLY0": {"DIRECTION_EARLY": True}, "RALATE0": {"DIRECTION_LATE": True}, "RAALL1": {"DIRECTION_ALL": True},
    "B1": {"LEARNING_RATE_MULT": 2.0}, "RT1": {"ROUTER_RA_HEADS": "1/4", "ROUTER_PENALTY": 0.01, "ROUTER_DROP": 0.15},
    "W1": {"WALK_STEPS": 4, "WALK_RESTART": 0.2, "WALK_GAMMA": 0.3, "WALK_WINDOW": "1/8", "WALK_NEIGHBOURS": "1/32"},
    "W2": {"WALK_BETA": 0.5}, "W3": {"WALK_BETA": 0.7}, "G2": {"BAND_LATENT": "1/6", "BAND_WINDOW": "1/16"},
    "G2N": {"BAND_RECIPROCAL": False}, "G2M1": {"BAND_HEAD_GATES": True}, "G2M2": {"BAND_CROSS_TOKEN": True},
    "G2M3": {"BAND_EXCHANGE": True}, "L1": {"LENS_COLUMN_BIAS": False}, "L2": {"LENS_TRANSPOSE": False},
    "L4": {"MLP_CLASS": ""}, "L5": {"LENS_ROUTE_GATE": True}, "L6": {"CONTEXT_RANK": "1/6", "LENS_LATENT": "1/6"},
    "L7": {"CONTEXT_CONDUCTOR": True},
    "V14": {"PRUNING": "kv", "KV_KEEP_RATIO": "191/500", "KV_BLOCK": "1/16", "KV_KEEP_LEARNED": False, "RMLP_R_FF": "1/48",
            "COUPLING_DELAY_STEPS": 75},
    "V15": {"PRUNING": "kv", "KV_KEEP_LEARNED": True, "KV_KEEP_PENALTY": 1.0, "RMLP_R_FF": "3/8", "COUPLING_DELAY_STEPS": 75},
    "V17": {"PRUNING": "kv", "KV_KEEP_LEARNED": False, "RMLP_R_FF": "1/48", "COUPLING_WINDOW": 50},
    "V18": {"PRUNING": "kv", "KV_KEEP_LEARNED": True, "RMLP_R_FF": "3/8", "COUPLING_WINDOW": 50},
    "V19": {"PRUNING": "v", "KV_KEEP_RATIO": "191/500", "KV_KEEP_LEARNED": False},
    "M3": {"PRUNING": "kv", "KV_KEEP_LEARNED": True, "RA_R": 4, "RMLP_R_FF": "3/8", "RMLP_INJECTION": True,
           "SKIP_GATES": True},
    "C1": {"PRUNING": "v", "KVSPLICE_K": "1/2", "INIT_FROM_STEP": "V19", "EVALUATE_ONLY": True, "KVSPLICE_KNOTS": 7,
           "KVSPLICE_SAMPLES": 120_000, "KVSPLICE_MAX_BATCHES": 64, "KVSPLICE_EPOCHS": 8, "KVSPLICE_LR": 0.002,
           "KVSPLICE_SHARED": False},
    "C2": {"KVSPLICE_K": "1/4", "INIT_FROM_STEP": "V19"}, "C3": {"KVSPLICE_K": "1/8", "INIT_FROM_STEP": "V19"},
    "MLA0": {"MLA_D_LATENT": "1/3", "MLA_TOKEN_LATENT": False, "MLA_KVSPLICE": False},
    "MLAKV1": {"MLA_D_LATENT": "1/3", "MLA_KVSPLICE_D": "1/6", "LEARNING_RATE_MULT": 2.0},
    "RAMLA0": {"MLA_TOKEN_LATENT": True, "DIRECTION_LEARNED": True, "MLA_KVSPLICE": False},
    "RAMLAKV0": {"MLA_TOKEN_LATENT": True, "DIRECTION_LEARNED": True, "MLA_KVSPLICE_D": "1/6"},
    "KT1": {"ATTENTION_TIED_KV": True}, "G1": {"ATTENTION_TRANSPOSE": True},
}


@pytest.mark.parametrize("step", VARIANTS)
def test_the_other_steps_are_the_documented_ones(step):
    found = load("gpt2-ra-ablation", step).as_json()
    assert {name: found[name] for name in VARIANTS[step]} == VARIANTS[step]


V = {"V0": (None, False, None, False, False), "V1": (4, False, None, False, False), "V2": (4, True, None, False, False),
     "V3": (4, False, "1/48", False, False), "V4": (4, False, "1/48", True, False), "V5": (4, False, "1/48", False, True),
     "V6": (4, False, "1/48", True, True)}


@pytest.mark.parametrize("step", V)
def test_the_v_steps_are_the_documented_ones(step):
    cfg = load("gpt2-ra-ablation", step)
    ratio = str(cfg.RMLP_R_FF) if cfg.RMLP_R_FF else None
    assert (cfg.RA_R, cfg.RA_SELF_RESTART, ratio, cfg.RMLP_MIXER, cfg.RMLP_TOKEN_GATE) == V[step]
    assert cfg.ATTENTION_CLASS.endswith("UnifiedRAttention" if step != "V0" else "CausalSelfAttention")
    assert cfg.MLP_CLASS.endswith("ReciprocalMLP" if step in ("V3", "V4", "V5", "V6") else ":MLP")
    if step != "V0":
        assert cfg.RA_GATES_GEOMETRIC and cfg.RA_PER_HEAD_GATES


# Name: (what it controls, what it equals in architecture, what differs from V0 in its resolved configuration)
CONTROLS = {"A0": ("null", "V0", {"STREAMS": 1}), "P0": ("harm", "V0", {"LEARNING_RATE_MULT": 0.1}),
            "OG0": ("gain", None, {"ATTENTION_SDPA": False, "ATTENTION_OUTPUT_GATE": True, "PRUNABLE": False,
                                   "ATTENTION_CLASS": "gpt2.attention.output_gate:OutputGateAttention"})}


@pytest.mark.parametrize("step", CONTROLS)
def test_the_controls_differ_from_v0_in_what_they_control_only(step):
    control, twin, differing = CONTROLS[step]
    assert (step_header(STEPS[step], "Control"), step_header(STEPS[step], "Equals")) == (control, twin)
    one, other = (load("gpt2-ra-ablation", name).as_json() for name in (step, "V0"))
    assert {name: value for name, value in one.items() if value != other[name]} == differing


def test_the_fragment_controls_adds_them_to_any_study_and_a_study_of_them_alone_is_there():
    for name in STUDIES:
        steps = [cell.step for cell in expand(Study(f"{name}+controls", schema=SCHEMA), [1])]
        assert set(steps) >= set(CONTROLS) and len(set(steps)) == len(steps)
    assert load("gpt2-controls").ABLATION_STEPS.split() == ["V0", *CONTROLS]


# Goals that need no configuration, and tools that need no torch

def make(*goals, **variables):
    return subprocess.run(["make", "--no-print-directory", f"PYTHON={sys.executable}", *goals], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env=os.environ | variables)


@pytest.mark.parametrize("broken", [False, True])
def test_goals_that_need_no_configuration_do_not_read_it(tmp_path, broken):
    config = tmp_path / "dot.config"
    if broken:
        config.write_bytes(b"nonsense\n\xff\nCONFIG_GPT2_MAX_TIME=abc\n")
    done = make("help", "list-steps", "list-defconfigs", KCONFIG_CONFIG=str(config), GPT2_MAX_TIME="abc", TIME="x", OUT="a b")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(shown in done.stdout for shown in ("Run a study\n", "  V0 ", "  gpt2-ra-ablation "))


def test_time_out_seeds_and_retry_of_the_shell_do_not_count(dotconfig, tmp_path):
    dotconfig(*TINY, f'OUTPUT_DIR="{tmp_path}/out"')
    shell = {"TIME": "x", "OUT": "a b", "SEEDS": "y", "STEPS": "z", "RETRY": "1", "NAME": "host", "STUDY": "w"}
    done = make("plan", **shell)
    assert (done.returncode, done.stderr) == (0, "") and f"1 cells in {tmp_path}/out, 1 to run" in done.stdout
    done = make("plan", "SEEDS=2", "TIME=60", f"OUT={tmp_path}/other", **shell)
    assert f"2 cells in {tmp_path}/other, 2 to run" in done.stdout


HEAVY = {"torch", "wandb", "datasets", "tiktoken", "transformers", "matplotlib", "scipy"}
CODE = """import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("IMPORTED", *sorted(name for name in sys.modules if "." not in name))"""


@pytest.mark.parametrize("words", ["scripts.plan", "scripts.plan --write", "scripts.report", "scripts.listing steps",
                                   "scripts.kconfig olddefconfig", "scripts.kconfig defconfig gpt2-ra-ablation",
                                   "scripts.diffconfig", "scripts.cell --help"])
def test_tools_that_do_not_train_do_not_import_torch(dotconfig, tmp_path, words):
    dotconfig(*TINY, f'OUTPUT_DIR="{tmp_path}/out"', 'STUDY="gpt2-ra-ablation"')
    done = subprocess.run([sys.executable, "-c", CODE, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.rsplit("IMPORTED", 1)[1].split())
    heavy = HEAVY - {"scipy"} if words == "scripts.report" else HEAVY  # verdicts need its distributions
    assert "scripts" in imported and not imported & heavy


def test_every_tool_explains_itself_without_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("KCONFIG_CONFIG", str(tmp_path / "none"))
    for path in sorted(Path(ROOT / "scripts").glob("*.py")):
        if path.stem != "__init__":
            done = run_here("-m", f"scripts.{path.stem}", "--help")
            assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m scripts.{path.stem}"), path.stem


def test_step_names_stand_in_no_code():
    """A new step is one new file, so no module and no recipe may know the old ones."""
    for path in [p for d in ("lib", "gpt2", "scripts") for p in sorted((ROOT / d).rglob("*.py"))]:
        said = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not said & STEPS.keys(), path
    recipes = re.sub(r"#.*", "", (ROOT / "Makefile").read_text())
    assert not re.search(rf"\b({'|'.join(STEPS)})\b", recipes)
