"""make show: what it prints of a step is what the step's files, its model and make check say."""

import re
import subprocess
import sys

import pytest

import scripts.show
from lib.config import Study
from lib.kconfig import Schema
from lib.steps import step_files, step_header
from tests.harness import ROOT, TINY, run_here

SCHEMA = Schema()


@pytest.fixture
def show(capsys):
    def call(step, study="gpt2-ra-ablation"):
        scripts.show.show(Study(study, schema=SCHEMA), step)  # in this process, which imports torch once
        return capsys.readouterr().out
    return call


def row(text, name):
    """The cells of a table's row."""
    return [cell.strip() for cell in re.search(rf"(?m)^\| {re.escape(name)} *\|(.*)\|$", text)[1].split("|")]


def test_a_step_is_shown_with_all_that_is_known_of_it(show):
    text = show("V3")
    help_line = step_header(step_files()["V3"], "Help")
    assert text.startswith(f"V3  {help_line}\n    in study gpt2-ra-ablation, beside its baseline V0\n")
    assert "    Qf = [Q_std | K_low],  Kf = [K_std | Q_low]\n" in text and "(gpt2/attention/unified_ra.py)" in text
    assert "    y = W_down [w_std h_std | w_rec M h_low]\n" in text
    assert re.search(r"(?m)^  RMLP_R_FF=1/48 +Reciprocal hidden features \(R_ff\) +gpt2/steps/V3.config:5$", text)
    assert "width=768, context=1024, head_dim=64, R=4, d_ff=3072, R_ff=64" in text
    assert "V0: V3 is V0 in function class: a difference is optimisation only" in text
    # 12 layers: two gates for each of 12 heads, two for the MLP
    assert row(text, "in all") == ["124,476,216", "124,475,904", "+312"]
    assert row(text, "12 x attn")[-1] == "+288" and row(text, "12 x mlp")[-1] == "+24" and row(text, "wte")[-1] == "+0"
    assert row(text, "V3") == row(text, "V0") == ["36,864", "36.0 MiB", "1.000"]  # 12 x 2 x 768 x 2 bytes
    assert "function at the start that are not V0's" in text and "\x1b" not in text
    assert "causality, decoding, gradients" in " ".join(text.split())


@pytest.mark.parametrize("step, present, absent", [
    ("V0", ["out = dropout(y W_o^T + b_o)", "The MLP of GPT-2: y = ", "it is what the other steps are compared with"],
     ["difference", "reciprocal"]),
    ("A0", ["the parameters and the function of V0 at the start, as its fragment declares"], ["not V0's"]),
    ("V2", ["Self-restart (V2): out = (1 - a) attention + a V per head", "V2: the class is named after this step"], []),
    ("V12", ["w_eff = 1 + s (w - 1)", "(gpt2/coupling.py)"], []),
    ("V1", [], ["w_eff = 1 + s (w - 1)", "factor = sigmoid", "mlp/reciprocal.py"]),
    ("M4", ["factor = sigmoid(logit) / sigmoid(2)"], ["w_eff"]),
    ("MLAKV0", ["c = W_c x", "(gpt2/attention/learned_kvsplice.py)", "inside V0: MLAKV0 is a restriction of V0"], []),
    ("C1", ["compress      c = (s(v - mean) - centre) B", "(gpt2/attention/pruning.py)", 'trained model of this step'], []),
    ("L4", ["logits_ij = w_std S_ij"], ["MLP of GPT-2"]),
])
def test_formulas_are_those_of_the_mechanisms_in_use(show, step, present, absent):
    text = show(step)
    for part in present:
        assert part in text, part
    for part in absent:
        assert part not in text, part


def test_the_cache_and_the_parameters_are_what_check_counts(show):
    from gpt2.laws import Subject

    study = Study("gpt2-ra-ablation", schema=SCHEMA)
    for step in ("MLA0", "V19"):
        subject, text = Subject(step, study.resolve(step).config), show(step)
        assert row(text, "in all")[0] == f"{subject.parameters:,}"
        a_token, _, relative = row(text, step)
        assert float(a_token.replace(",", "")) == pytest.approx(subject.cache_bytes / 1024, abs=0.05)
        assert float(relative) == pytest.approx(subject.cache_bytes / (36_864 * 1024), abs=0.0005)


def test_inline_overrides_count_and_say_so(show):
    text = show("V3@RA_R=8", study="gpt2-ra-ablation+tiny")
    assert re.search(r"(?m)^  RA_R=8 .* step V3@RA_R=8$", text) and re.search(r"\bR=8,", text) and "RA_R=4" in text
    assert row(text, "V3@RA_R=8") == ["1,024", "128 KiB", "1.000"]


@pytest.mark.parametrize("step, sentences", [
    ("V33", ["error: there is no step 'V33'.", "  try: did you mean V3?"]),
    ("V3@RA_RR=8", ["error: step V3@RA_RR=8: unknown symbol RA_RR.", "  try: did you mean RA_R?"]),
    ("V3@RA_R=64", ["error: RA_R=64 is not below the head width 64.", "  try: set RA_R to at most 63."]),
    ("", ["error: no step is named.", None]),
])
def test_what_is_no_step_is_refused(dotconfig, monkeypatch, step, sentences):
    dotconfig(*TINY)
    monkeypatch.setenv("STEP", step)
    done = run_here("-m", "scripts.show")
    what, advice = done.stderr.splitlines()
    assert (done.returncode, done.stdout, what) == (2, "", sentences[0]) and advice in (sentences[1] or advice,)


@pytest.mark.parametrize("words", [["show", "V3"], ["V3", "show"], ["show", "STEP=V3"]])
def test_make_show_starts_no_run(words, tmp_path):
    done = subprocess.run(["make", "-n", f"PYTHON={sys.executable}", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\S+ -m scripts\.show( V3)?\s*(:\n)?\s*|:\n\S+ -m scripts\.show V3 *\n",
                                                 done.stdout), done.stdout
