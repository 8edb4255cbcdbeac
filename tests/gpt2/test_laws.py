"""The laws catch what they are for: each planted defect breaks its law, and the steps break none."""

import pytest

from gpt2.laws import Subject, broken_laws
from tests.gpt2.conftest import STEPS


@pytest.fixture(scope="module")
def reference(configuration):
    return Subject("V0", configuration("V0", GPT2_BLOCK_SIZE=32))


@pytest.mark.parametrize("step", STEPS)
def test_steps_obey(configuration, reference, step):
    subject = Subject(step, configuration(step, GPT2_BLOCK_SIZE=32), None, None if step == "V0" else reference)
    assert broken_laws(subject) == []


@pytest.mark.parametrize("step", ["A0", "P0"])
def test_a_control_that_is_v0_otherwise_trained_is_v0_to_the_laws(configuration, reference, step):
    """Other streams and another learning rate are no other architecture."""
    assert broken_laws(Subject(step, configuration(step, GPT2_BLOCK_SIZE=32), "V0", reference)) == []


@pytest.mark.parametrize("kind, name, law", [
    ("ATTENTION", "Leaky", "causality: outputs up to position"),
    ("ATTENTION", "FirstKeyOnly", "decoding: cached decoding differs from the full forward pass by"),
    ("MLP", "Dead", "gradients: transformer.h.0.mlp.unused receives no gradient"),
    ("MLP", "Detached", "gradients: 1 of 1 rows of transformer.h.0.mlp.scale receive no gradient"),
    ("MLP", "Uncounted", "parameter_count: the full model has"),
    ("MLP", "OwnStart", "same_start: transformer.h.0.mlp.c_fc.weight does not start where the baseline's starts"),
    ("MLP", "Forgetful", "save_and_load: a saved and loaded model computes something else"),
])
def test_a_planted_defect_breaks_its_law(configuration, reference, kind, name, law):
    cfg = configuration("V0", GPT2_BLOCK_SIZE=32).replace(**{f"{kind}_CLASS": f"tests.gpt2.broken:{name}"})
    broken = broken_laws(Subject("X", cfg, None, reference))
    assert any(sentence.startswith(law) for sentence in broken), broken


def test_a_disguised_baseline_is_refused_unless_declared(configuration, reference):
    cfg = configuration("V0", GPT2_BLOCK_SIZE=32)
    assert broken_laws(Subject("X", cfg, None, reference)) == [
        "differs: it is V0 in disguise: the same parameters and the same function"]
    assert broken_laws(Subject("X", cfg, "V0", reference)) == []
    ra = configuration("V1", GPT2_BLOCK_SIZE=32)
    assert broken_laws(Subject("X", ra, "V0", reference)) == ["differs: it declares to equal V0, but differs from it"]


