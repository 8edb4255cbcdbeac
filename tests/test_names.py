"""docs/names.md: what it says is here is here: studies, steps, options, files, names of Python, metrics, goals, claims."""

import pkgutil
import re
import tomllib

import pytest

from lib.config import defconfig_names
from lib.kconfig import Schema
from lib.steps import step_files
from scripts.listing import plain_names
from tests.harness import ROOT, run_here

PAGE = (ROOT / "docs/names.md").read_text()
SECTIONS = {part.partition("\n")[0]: [[cell.strip() for cell in line.strip("|").split("|")] for line in
                                      re.findall(r"^\|.*\|$", part, re.M)[2:]] for part in PAGE.split("\n## ")[1:]}
CODE = re.compile(r"`([^`]+)`")
# What the five documents name, and its section here.
DOCUMENTS = {
    "Studies": """
        gpt2-ra-ablation gpt2-unified-ra-ablation gpt2-unified-ra-extended-ablation gpt2-ra-rmlp-ablation
        gpt2-ratio-ablation gpt2-kv-compression-ablation gpt2-r-mlp-prune gpt2-ra-ablation-cowboy""",
    "Steps": """
        V0 V1 V2 V3 V4 V5 V6 V16 V17 V19 C1 C2 C3 R0 R1 M0 M1 M2 M3 B0 RALEARN0 MLA RA+MLA RA+MLA+KVSplice
        MLA+KVSplice""",
    "Options": """
        GPT2_MAX_TIME CONFIG_GPT2_MAX_ITERS --ra-mla-ablation-step --dry-run --kvsplice-enable --kvsplice-k
        --kvsplice-knots --kvsplice-samples --kvsplice-max-batches --kvsplice-epochs --kvsplice-lr
        --kvsplice-save use_self_restart""",
    "Files": """
        unified_ra.py ra.py ra_v5_patch.py ra_patch.py train_ra_mla.py ra_lens_gpt2.py rwr_attention.py
        ra_mla_gpt2.py trainers/ra.py kvsplice.py optimizers.py kvsplice-integration-plan.md weight-tying.md
        kv-tying.md test_matrix_results_ra/ test_matrix_results_ra_rmlp/""",
    "Classes and functions": """
        UnifiedRAttention ReciprocalAttention ReciprocalMLP repack_baseline_qkv_into_unified_ra set_R
        from_pretrained_qkv get_gate_stats rebake_gates _apply_gate_scaling_to_weights PWLSpline KVSplice
        set_ra_mlp_coupling_scale RA_MLA_Attention KVSpliceCalibrator LearnedKVSplice SinkGD""",
    "Metrics": """
        train_loss val_loss train_perplexity val_perplexity best_val_loss train_loss_step learning_rate
        forward_time_ms unified_ra_w_std unified_ra_w_rec unified_ra_rwr_alpha skip_std_attn skip_lowrank_attn
        skip_std_mlp skip_rec_mlp compute_ratio eigmax trace energy_r16""",
}


def steps(name):
    return name in step_files()


def options(name):
    if name.startswith("--"):
        return name in run_here("gpt2/train_ra_mla.py", "--help").stdout.split()
    return name in Schema().prompted


def metrics(name):
    if name.startswith("make "):
        return name.removeprefix("make ") in plain_names("goals")
    sources = "".join(path.read_text() for folder in ("lib", "gpt2") for path in (ROOT / folder).rglob("*.py"))
    return re.search(rf"[\"(, ]{name}(=|\")", sources) is not None


KNOWN = {"Studies": lambda name: name in defconfig_names(), "Steps": steps, "Options": options,
         "Files": lambda name: (ROOT / name).exists(), "Classes and functions": pkgutil.resolve_name, "Metrics": metrics}


@pytest.mark.parametrize("section", KNOWN)
def test_what_is_said_to_be_here_is_here(section, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = SECTIONS[section]
    assert all(len(row) == 4 for row in rows)
    named = {name for _, _, here, _ in rows for name in CODE.findall(here)}
    assert named and [name for name in sorted(named) if not KNOWN[section](name)] == []


@pytest.mark.parametrize("section", DOCUMENTS)
def test_every_name_of_the_documents_has_a_row(section):
    named = " ".join(row[0] for row in SECTIONS[section]).replace("_*", "")
    missing = [name for name in DOCUMENTS[section].split() if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w+-])", named)]
    assert missing == []


def test_every_row_has_a_status_and_every_claim_an_entry():
    claims = {claim["id"] for claim in tomllib.loads((ROOT / "docs/claims.toml").read_text())["claim"]}
    words = ("same", "corrected", "renamed", "not here", "named here", "as RA+MLA")
    for section in KNOWN:
        for name, documents, _, status in SECTIONS[section]:
            assert status.startswith(words), name
            assert documents == "all" or set(documents.split(", ")) <= set("12345"), name
            for word in CODE.findall(status):
                is_code = "-" not in word or word.startswith(("make ", "python ", "gpt2-"))
                assert word in claims or is_code, word


def test_a_step_that_is_not_what_the_documents_say_is_called_corrected():
    """Of the steps that the ledger refutes, and those that are V0 under another name."""
    status = {name: row[3] for row in SECTIONS["Steps"] for name in CODE.findall(row[2])}
    for step in ("V1", "V4", "V5", "V19", "R1", "RALEARN0", "MLAKV0", "RAMLA0"):
        assert status[step].startswith("corrected"), step
