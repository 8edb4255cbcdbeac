"""How far outputs move with tokens after them: not at all in a causal model, and that is what is recorded of a trained one."""

import pytest
import torch

from gpt2 import causality
from gpt2.model import GPT
from lib import gates


@pytest.fixture
def build(configuration):
    def model(name=None, **symbols):
        cfg = configuration("V0", GPT2_BLOCK_SIZE=128, **symbols)
        return GPT(cfg.replace(ATTENTION_CLASS=f"tests.gpt2.broken:{name}") if name else cfg).eval()
    return model


TOKENS = torch.randint(256, (128,), generator=torch.Generator().manual_seed(1))


def test_a_causal_model_moves_by_nothing_that_counts(build):
    assert causality.moved(build(), TOKENS)[0] <= 1e-6
    assert causality.of_trained(build(), TOKENS) <= gates.LEAK / 100


@pytest.mark.parametrize("name", ["Leaky", "LongLeak"])
def test_a_leak_is_measured_at_its_border(build, name):
    model = build(name)
    logits = model(TOKENS[None])[0]
    later = torch.cat([TOKENS[:82], (TOKENS[82:] + 1) % 256])
    expected = (model(later[None])[0] - logits)[:, :82].abs().max()
    movement, border = causality.moved(model, TOKENS, [81])
    assert border == 81 and movement == pytest.approx((expected / logits.abs().max()).item(), rel=0.05)
    assert causality.of_trained(model, TOKENS) == causality.moved(model, TOKENS)[0] > 2e-5


def test_a_leak_that_pays_is_far_above_what_the_gate_lets_pass(build):
    model = build("ShyLeak")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.gate.fill_(0.1)
    assert causality.of_trained(model, TOKENS) > 10 * gates.LEAK


def test_a_sequence_of_two_tokens_has_one_border(build):
    assert causality.moved(build(), TOKENS[:2])[1] == 0


def test_what_is_not_finite_is_no_proof(build):
    model = build()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    assert causality.moved(model, TOKENS)[0] == float("inf") and causality.of_trained(model, TOKENS) == causality.WITHOUT_END


def test_memory_that_does_not_hold_it_leaves_it_unknown(build, monkeypatch):
    def fails(*args):
        raise RuntimeError(sentence)
    monkeypatch.setattr(causality, "moved", fails)
    sentence = "CUDA out of memory. Tried to allocate 2 GiB"
    assert causality.of_trained(build(), TOKENS) is None
    sentence = "shapes do not fit"
    with pytest.raises(RuntimeError, match="shapes"):
        causality.of_trained(build(), TOKENS)
