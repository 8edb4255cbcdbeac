"""Key-value tying: the formula, its place inside GPT-2, one tensor in the cache, and the start."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.tied_kv import TiedKVAttention
from gpt2.function_class import key
from gpt2.laws import Subject, broken_laws
from gpt2.layers import init_weights
from gpt2.model import GPT, expected_parameters

E, H, D = 64, 4, 16
SIZES = [(1,) * 12, (5, 1, 1, 5), (12,), (1, 11), (3, 4, 5)]


def build(bias=True, dropout=0.0):
    """A module with random weights and biases."""
    torch.manual_seed(0)
    module = TiedKVAttention(E, H, dropout, bias).eval()
    init_weights(module, 0)
    with torch.no_grad():
        module.c_attn.weight.mul_(10)  # or attention would be nearly uniform
        if bias:
            module.c_attn.bias.normal_()
            module.c_proj.bias.normal_()
    return module


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias):
    """Token by token in float64: what answers the query is what is summed."""
    module = build(bias).double()
    B, T = 2, 7
    x = torch.randn(B, T, E, dtype=torch.float64)
    q, k = F.linear(x, module.c_attn.weight, module.c_attn.bias).split(E, 2)
    y = torch.zeros(B, T, E, dtype=torch.float64)
    for b, h, i in product(range(B), range(H), range(T)):
        at = slice(h * D, (h + 1) * D)
        weights = [torch.exp(q[b, i, at] @ k[b, j, at] / math.sqrt(D)) for j in range(i + 1)]
        y[b, i, at] = sum(w / sum(weights) * k[b, j, at] for j, w in enumerate(weights))
    expected = F.linear(y, module.c_proj.weight, module.c_proj.bias)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_gpt2_with_equal_key_and_value_rows(bias):
    module, x = build(bias), torch.randn(2, 17, E)
    plain = module.collapse()
    assert type(plain) is CausalSelfAttention and torch.equal(plain.c_attn.weight[E:2 * E], plain.c_attn.weight[2 * E:])
    torch.testing.assert_close(plain(x), module(x), rtol=0, atol=1e-5)
    with torch.no_grad():
        plain.c_attn.weight[2 * E:] *= 1.1
    assert (plain(x) - module(x)).abs().max() > 1e-3, "which GPT-2 need not have"


def test_it_starts_from_gpt2s_query_and_key_rows(configuration):
    states = {step: GPT(configuration(step)).state_dict() for step in ("V0", "KT1")}
    E = configuration("KT1").GPT2_N_EMBD
    for name, tensor in states["KT1"].items():
        rows = slice(0, 2 * E) if "c_attn" in name else slice(None)
        assert torch.equal(tensor, states["V0"][name][rows]), name
        assert "c_attn" not in name or len(tensor) == 2 * E


@pytest.mark.parametrize("bias", [True, False])
def test_it_has_a_quarter_of_attentions_weights_less(configuration, bias):
    tied, plain = (configuration(step, GPT2_BIAS=bias) for step in ("KT1", "V0"))
    E, L = tied.GPT2_N_EMBD, tied.GPT2_N_LAYER
    assert expected_parameters(plain) - expected_parameters(tied) == L * (E * E + E * bias)
    assert sum(p.numel() for p in GPT(tied).parameters()) == expected_parameters(tied)


def test_the_cache_holds_one_tensor_of_half_the_bytes(configuration):
    caches = {step: GPT(configuration(step)).new_cache(2, dtype=torch.bfloat16) for step in ("KT1", "V0")}
    cfg = configuration("KT1")
    assert 2 * caches["KT1"].nbytes() == caches["V0"].nbytes()
    assert TiedKVAttention.cache_bytes_per_token(cfg, 2) == 2 * cfg.GPT2_N_EMBD
    assert [t.numel() for t in caches["KT1"].layers[0].tensors()] == [2 * cfg.GPT2_BLOCK_SIZE * cfg.GPT2_N_EMBD, 0]


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("sizes", SIZES)
def test_decoding_in_chunks_equals_the_full_pass(sizes, dtype, tolerance):
    module = build().to(dtype)
    x = torch.randn(3, 12, E, dtype=dtype)
    cache = module.new_cache(3, 12, dtype, "cpu")
    parts = [module(part, cache) for part in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="the cache holds 12 positions, 13 were asked for"):
        module(x[:, :1], cache)


@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_a_later_input(training):
    module = build().train(training)
    x = torch.randn(1, 20, E)
    other = x.clone()
    other[:, 9:] += torch.randn(1, 11, E)
    assert torch.equal(module(x)[:, :9], module(other)[:, :9]) and not torch.equal(module(x)[:, 9], module(other)[:, 9])


def test_every_row_has_a_gradient_also_the_key_biases():
    """As a value a key bias counts, so nothing is declared dead."""
    module = build().double().train()
    module(torch.randn(2, 9, E, dtype=torch.float64)).square().sum().backward()
    for name, p in module.named_parameters():
        rows = p.grad.flatten(1).norm(dim=1) if p.ndim > 1 else p.grad.abs()
        assert rows.min() > 1e-6 * rows.max(), name
    assert module.dead_elements() == {}


def test_autocast_and_dropout_run():
    module = build(dropout=0.1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.randn(2, 9, E))
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all() and module.collapse().training


def test_it_compiles_into_one_graph():
    module, x = build(), torch.randn(2, 16, E)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)


def test_the_step_obeys_the_laws_and_lies_inside_gpt2(configuration):
    reference = Subject("V0", configuration("V0", GPT2_BLOCK_SIZE=32))
    assert broken_laws(Subject("KT1", configuration("KT1", GPT2_BLOCK_SIZE=32), None, reference)) == []
    (tied, inside), (plain, equal) = (key(configuration(step)) for step in ("KT1", "V0"))
    assert tied == plain and (inside, equal) == ("inside", "equal")
