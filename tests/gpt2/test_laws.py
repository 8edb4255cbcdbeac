"""The laws catch what they are for: each planted defect breaks its law, and the steps break none."""

import pytest

from gpt2.laws import SMALL, Subject, broken_laws, gradients, without_gradient
from lib.config import load
from lib.steps import step_files, step_header

FILES = step_files()


@pytest.fixture(scope="module")
def reference(configuration):
    return Subject("V0", configuration("V0", GPT2_BLOCK_SIZE=32))


@pytest.mark.parametrize("step", FILES)
def test_steps_obey(configuration, reference, step):
    """All there are, also those that equal V0 but for their streams, rates or optimizer."""
    equals = step_header(FILES[step], "Equals")
    subject = Subject(step, configuration(step, GPT2_BLOCK_SIZE=32), equals, None if step == "V0" else reference)
    assert broken_laws(subject) == []


def test_a_twin_of_the_baseline_may_itself_be_the_baseline(configuration, reference):
    """In a study whose baseline is B0, a step that declares to equal V0 equals the baseline."""
    baseline = Subject("B0", configuration("B0", GPT2_BLOCK_SIZE=32), "V0")
    assert broken_laws(Subject("A0", configuration("A0", GPT2_BLOCK_SIZE=32), "V0", baseline)) == []


@pytest.mark.parametrize("kind, name, law", [
    ("ATTENTION", "Leaky", "causality: outputs up to position"),
    ("ATTENTION", "ShyLeak", "away_from_the_start: with weights away from their start, outputs up to position"),
    ("ATTENTION", "FirstKeyOnly", "decoding: cached decoding differs from the full forward pass by"),
    ("MLP", "Undropped", "dropout: mlp of layer 0 drops nothing of what it puts out, not 0.1"),
    ("MLP", "Dead", "gradients: transformer.h.0.mlp.unused receives no gradient"),
    ("MLP", "Detached", "gradients: 1 of 1 rows of transformer.h.0.mlp.scale receive no gradient"),
    ("MLP", "Uncounted", "parameter_count: the full model has"),
    ("MLP", "OwnStart", "same_start: transformer.h.0.mlp.c_fc.weight does not start where the baseline's starts"),
    ("MLP", "Forgetful", "save_and_load: a saved and loaded model computes something else"),
    ("MLP", "Collapsing", "function_class: the model that it collapses to differs from it by"),
    ("MLP", "Shrinking", "function_class: it collapses to another model than gpt2/function_class.py states: transformer.h.0."),
])
def test_a_planted_defect_breaks_its_law(configuration, reference, kind, name, law):
    cfg = configuration("V0", GPT2_BLOCK_SIZE=32).replace(**{f"{kind}_CLASS": f"tests.gpt2.broken:{name}"})
    broken = broken_laws(Subject("X", cfg, None, reference))
    assert any(sentence.startswith(law) for sentence in broken), broken


def test_causality_is_asked_at_the_studys_own_context(configuration):
    cfg = configuration("V0", GPT2_BLOCK_SIZE=128).replace(ATTENTION_CLASS="tests.gpt2.broken:LongLeak")
    broken = broken_laws(Subject("X", cfg))
    assert len(broken) == 1 and broken[0].startswith("whole_context: at the context of 128, outputs up to position 81 move by ")
    assert broken_laws(Subject("V0", configuration("V0", GPT2_BLOCK_SIZE=128))) == []


def test_features_that_one_sequence_leaves_off_are_not_dead():
    """At full width some features behind a ReLU see no token of a sequence on their positive side."""
    cfg = load("gpt2-ra-ablation", "V0").replace(MLP_CLASS="tests.gpt2.broken:ReluMLP", GPT2_N_LAYER=1)
    subject = Subject("X", cfg, depth=SMALL | {"GPT2_N_LAYER": 1})
    subject.model.train()(subject.x, subject.y)[1].backward()
    assert "rows of transformer.h.0.mlp.c_fc.weight receive no gradient" in without_gradient(subject.model)
    subject.model.zero_grad()
    assert gradients(subject) is None


def test_a_disguised_baseline_is_refused_unless_declared(configuration, reference):
    cfg = configuration("V0", GPT2_BLOCK_SIZE=32)
    assert broken_laws(Subject("X", cfg, None, reference)) == [
        "differs: it is V0 in disguise: the same parameters and the same function"]
    assert broken_laws(Subject("X", cfg, "V0", reference)) == []
    ra = configuration("V1", GPT2_BLOCK_SIZE=32)
    assert broken_laws(Subject("X", ra, "V0", reference)) == ["differs: it declares to equal V0, but differs from it"]


