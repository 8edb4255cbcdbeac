"""The model: names, start, forward pass, generation, and what the steps share."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.block import Block
from gpt2.mlp.baseline import MLP
from gpt2.model import GPT, expected_parameters
from lib.config import load
from tests.gpt2.conftest import STEPS, V_STEPS


@pytest.fixture(scope="module")
def models(configuration):
    return {step: GPT(configuration(step, GPT2_DROPOUT="0.0")).eval() for step in STEPS}


def tokens(B, T, seed=0):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(seed))


def test_names_are_nanogpts(models):
    names = {n for n, _ in models["V0"].named_parameters() if ".h." not in n or ".h.0." in n}
    block = {f"transformer.h.0.{n}" for n in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")}
    assert names == block | {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight",
                             "transformer.ln_f.bias"}


@pytest.mark.parametrize("step", STEPS)
def test_steps_share_every_tensor_of_the_same_name_and_shape(models, step):
    """Equal starting points, whatever a step adds; and the same seed gives the same model twice."""
    base = dict(models["V0"].named_parameters())
    shared = 0
    for name, p in models[step].named_parameters():
        if name in base and base[name].shape == p.shape:
            assert torch.equal(p, base[name]), name
            shared += 1
    if step in V_STEPS:
        assert shared == len(base)
    assert shared >= len(base) - 6 * 2, "what is not shared is another shape, in the mechanism"


def test_the_start_depends_on_seed_and_name_only(configuration):
    cfg = configuration("V0")
    one, again, other = GPT(cfg), GPT(cfg), GPT(cfg.replace(SEED=1338))
    deeper = GPT(cfg.replace(GPT2_N_LAYER=3))
    state = one.state_dict()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    assert not torch.equal(state["transformer.wte.weight"], other.state_dict()["transformer.wte.weight"])
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(state[name], deeper.state_dict()[name])


def test_other_streams_are_another_start_and_set_0_is_the_seed_itself(configuration):
    cfg = configuration("V0")
    plain, other, third = (GPT(cfg.replace(STREAMS=n)).state_dict() for n in (0, 1, 2))
    assert all(torch.equal(v, plain[k]) for k, v in GPT(cfg).state_dict().items())
    drawn = [k for k, v in plain.items() if v.ndim == 2]
    assert drawn and not any(torch.equal(a[k], b[k]) for k in drawn for a, b in ((plain, other), (other, third)))
    again = GPT(configuration("A0")).state_dict()
    assert all(torch.equal(v, other[k]) for k, v in again.items())


def test_start_is_gpt2s(configuration):
    model = GPT(configuration("V0"))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05), name
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(p, torch.ones_like(p) if "ln" in name and name.endswith("weight") else torch.zeros_like(p))


def test_forward_against_a_plain_reference(models):
    """V0 written out once more, with explicit softmax and mask."""
    model, x = models["V0"], tokens(2, 20)
    p, t = dict(model.named_parameters()), model.transformer
    h = t.wte(x) + p["transformer.wpe.weight"][:20]
    for n in range(2):
        def get(name, n=n):
            return p[f"transformer.h.{n}.{name}"]
        a = F.layer_norm(h, (128,), get("ln_1.weight"), get("ln_1.bias"))
        q, k, v = F.linear(a, get("attn.c_attn.weight"), get("attn.c_attn.bias")).view(2, 20, 3, 2, 64).permute(2, 0, 3, 1, 4)
        score = (q @ k.mT / 8).masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
        y = (score.softmax(-1) @ v).transpose(1, 2).reshape(2, 20, 128)
        h = h + F.linear(y, get("attn.c_proj.weight"), get("attn.c_proj.bias"))
        m = F.layer_norm(h, (128,), get("ln_2.weight"), get("ln_2.bias"))
        m = F.gelu(F.linear(m, get("mlp.c_fc.weight"), get("mlp.c_fc.bias")), approximate="tanh")
        h = h + F.linear(m, get("mlp.c_proj.weight"), get("mlp.c_proj.bias"))
    logits = F.layer_norm(h, (128,), p["transformer.ln_f.weight"], p["transformer.ln_f.bias"]) @ p["transformer.wte.weight"].T
    found, loss = model(x, x)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(40, -1), x.view(-1)))


def test_the_head_is_tied_and_counted_once(models):
    model = models["V0"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("step, parameters", [("V0", 124_475_904), ("V1", 124_476_192), ("V2", 124_476_336),
                                              ("V3", 124_476_216), ("V4", 124_525_368), ("V5", 124_485_444),
                                              ("V6", 124_534_596), ("OG0", 131_553_792)])
def test_parameters_at_full_size(step, parameters):
    """GPT-2's 124.4 M with the vocabulary padded to 50304, plus gates, mixer, per-token gate or output gate."""
    cfg = load("gpt2-ra-ablation", step)
    with torch.device("meta"):
        model = GPT(cfg)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(cfg) == parameters
    assert model.sizes().items() >= ({"R": 4, "R_ff": 64} if "V3" <= step <= "V6" else {"d_ff": 3072}).items()


@pytest.mark.parametrize("step", STEPS)
def test_generation_with_a_cache_equals_generation_without(models, step):
    model, prompt = models[step], tokens(3, 5)
    expected = prompt
    for _ in range(20):
        expected = torch.cat([expected, model(expected)[0][:, -1:, :256].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)


def test_generation_goes_on_beyond_the_context(models):
    model, prompt = models["V0"], tokens(1, 30)
    out = model.generate(prompt, 8, temperature=0)
    assert out.shape == (1, 38)
    window = out[:, -33:-1]
    assert torch.equal(model(window)[0][:, -1, :256].argmax(-1), out[:, -1])


def test_sampling_is_reproducible_and_never_leaves_the_vocabulary(configuration):
    model = GPT(configuration("V0").replace(VOCAB_SIZE=250)).eval()
    with torch.no_grad():
        model.transformer.wte.weight[250:] = 10.0  # the padding would win every draw
    draws = [model.generate(tokens(1, 4), 40, top_k=k, generator=torch.Generator().manual_seed(s))
             for k, s in ((None, 1), (None, 1), (None, 2), (1, 1))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert max(d[:, 4:].max() for d in draws) < 250
    assert torch.equal(draws[3], model.generate(tokens(1, 4), 40, temperature=0))


def test_generation_leaves_the_mode_alone(models):
    model = models["V1"]
    model.train()
    model.generate(tokens(1, 4), 2)
    assert model.training
    model.eval()


def test_too_many_tokens_are_refused(models):
    with pytest.raises(ValueError, match="33 tokens do not fit into a context of 32"):
        models["V0"](tokens(1, 33))


@pytest.mark.parametrize("step", STEPS)
def test_function_class(models, step):
    """V1, V3 and V4 collapse to GPT-2, exactly to rounding; self-restart, per-token gates and output gates do not. Whatever it
    collapses to is a copy: changing it changes nothing here."""
    model, x = models[step], tokens(2, 20)
    collapsed, before = model.collapse(), model(x)[0]
    torch.testing.assert_close(collapsed(x)[0], before, rtol=0, atol=1e-5)
    kinds = [[type(block), type(block.attn), type(block.mlp)] for block in collapsed.transformer.h]
    plain = ("V0", "V1", "V3", "V4", "V1T", "V12", "V16", "KT1", "RALEARN0", "V14", "V18", "V19", "C2", "MLAKV0", "RAMLA0")
    assert (kinds == [[Block, CausalSelfAttention, MLP]] * 2) == (step in plain)
    with torch.no_grad():
        for p in collapsed.parameters():
            p.zero_()
    assert torch.equal(model(x)[0], before)




@pytest.mark.parametrize("step", ["V0", "V5"])
def test_a_pass_asks_nothing_that_a_compiler_cannot_follow(step, monkeypatch):
    """Before torch 2.13 it breaks its program at the question whether a device knows autocast."""
    def asked(kind):
        assert "gpt2" not in sys._getframe(1).f_code.co_filename, "asked within a pass"
        return available(kind)

    available = torch.amp.is_autocast_available
    cfg = load("gpt2-ra-ablation+tiny", step, {"LOSS_CHUNKS": 4})
    model, idx = GPT(cfg), torch.randint(256, (1, 8))
    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    model(idx, idx)[1].backward()
    with torch.no_grad():
        model(idx, idx)


@pytest.mark.parametrize("step", STEPS)
def test_every_block_keeps_the_type_of_the_residual_stream(step, configuration):
    """Under autocast the stream is bfloat16: one gate in float32 would widen it in all blocks that follow."""
    model, types = GPT(configuration(step, GPT2_DROPOUT="0.0")), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, inputs, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(tokens(1, 16), tokens(1, 16, 1))
    assert set(types) == {torch.bfloat16}
