"""Explicitly transposed attention: its formula, its neutral settings, its cache, its gradients and its function class."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.lens import LensAttention
from gpt2.attention.transpose import TransposeAttention
from gpt2.coupling import set_ra_mlp_coupling_scale
from gpt2.function_class import key
from gpt2.kv_cache import LayerCache
from gpt2.laws import Subject, broken_laws
from gpt2.layers import init_weights
from gpt2.model import GPT
from lib import optimizers
from lib.config import load

E, H, D = 32, 4, 8


def built(w=(), bias=True, **options):
    """A module with large random weights and biases; `w` = (w_std, w_rec), or different ones for each head."""
    torch.manual_seed(0)
    module = TransposeAttention(E, H, bias=bias, **options).eval()
    for p in (module.c_attn, module.c_proj):
        torch.nn.init.normal_(p.weight, std=0.3)
        if bias:
            torch.nn.init.normal_(p.bias)
    with torch.no_grad():
        for gate, value in zip((module.gate_std, module.gate_rec), w or tuple(torch.rand(2, H) + 0.2), strict=True):
            gate.copy_(value ** 0.5)
    return module


def plain(module):
    other = CausalSelfAttention(E, H, bias=module.c_attn.bias is not None).to(module.c_attn.weight).eval()
    other.load_state_dict(module.state_dict(), strict=False)
    return other


def reference(module, x, w_std, w_rec):
    """The score written pair by pair, in float64."""
    B, T, _ = x.shape
    q, k, v = (t.view(B, T, H, D) for t in F.linear(x, module.c_attn.weight, module.c_attn.bias).split(E, 2))
    out = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                scores = [w_std[h] * (q[b, i, h] @ k[b, j, h]) + w_rec[h] * (q[b, j, h] @ k[b, i, h]) for j in range(i + 1)]
                p = (torch.stack(scores) / math.sqrt(D)).softmax(0)
                out[b, i, h] = torch.einsum("j,jd->d", p, v[b, :i + 1, h])
    return F.linear(out.reshape(B, T, E), module.c_proj.weight, module.c_proj.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_formula(bias, scale):
    module = built(bias=bias).double()
    w_std, w_rec = module.w_std, module.w_rec
    if scale is not None:
        set_ra_mlp_coupling_scale(module, scale)
        w_std, w_rec = 1 + scale * (w_std - 1), scale * w_rec
    x = torch.randn(2, 7, E, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference(module, x, w_std, w_rec), rtol=0, atol=1e-12)


def test_it_starts_at_nine_tenths_and_one():
    module = TransposeAttention(E, H)
    stats = module.stats()
    torch.testing.assert_close(stats["unified_ra_w_std"], torch.full((H,), 0.9))
    torch.testing.assert_close(stats["unified_ra_w_rec"], torch.full((H,), 0.1))


def test_neutral_weights_and_coupling_0_are_the_baseline():
    x = torch.randn(2, 17, E)
    neutral, coupled = built(w=(torch.ones(H), torch.zeros(H))), built()
    assert (coupled(x) - plain(coupled)(x)).abs().max() > 1e-2
    set_ra_mlp_coupling_scale(coupled, 0.0)
    for module in (neutral, coupled):
        torch.testing.assert_close(module(x), plain(module)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.0, 0.5, 1.0])
def test_gradients_are_finite_at_every_coupling_and_at_weights_of_0(scale):
    module = built(w=(torch.zeros(H), torch.zeros(H)))
    with torch.no_grad():
        module.gate_std[1:], module.gate_rec[2:] = 0.9, 0.3
    if scale is not None:
        set_ra_mlp_coupling_scale(module, scale)
    module(torch.randn(2, 9, E)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    if scale != 0.0:
        assert (module.gate_std.grad[1:] != 0).all() and (module.gate_rec.grad[2:] != 0).all()
        assert (module.c_attn.bias.grad[E + 2 * D:2 * E] != 0).all(), "a key bias weighs columns of the transpose"


@pytest.mark.parametrize("scale", [None, 0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_a_later_input(training, scale):
    module = built(dropout=0.2).double().train(training)
    if scale is not None:
        set_ra_mlp_coupling_scale(module, scale)
    x = torch.randn(1, 15, E, dtype=torch.float64)
    other = x.clone()
    other[:, 9:] += 1
    outputs = []
    for t in (x, other):
        torch.manual_seed(1)
        outputs.append(module(t))
    torch.testing.assert_close(outputs[0][:, :9], outputs[1][:, :9], rtol=0, atol=1e-12)
    assert not torch.equal(outputs[0][:, 9], outputs[1][:, 9])


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 1, 1, 5), (12,), (1, 11)])
def test_decoding_in_chunks_equals_the_full_pass(sizes):
    module, x = built(), torch.randn(3, 12, E)
    with torch.no_grad():
        cache = module.new_cache(3, 12, torch.float32, "cpu")
        parts = [module(part, cache) for part in x.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache = module.new_cache(3, 12, torch.bfloat16, "cpu")
            parts = [module(part, cache) for part in x.split(sizes, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=0.05)


def test_the_cache_holds_queries_beside_keys_and_no_weights():
    module, x = built(), torch.randn(1, 5, E)
    cache = module.new_cache(1, 5, torch.float32, "cpu")
    module(x, cache)
    q, k, _ = module.c_attn(x).view(1, 5, 3, H, D).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(cache.keys, torch.cat([k, q], -1))
    assert isinstance(cache, LayerCache)
    held = sum(t.numel() * t.element_size() for t in cache.tensors())
    assert held == 5 * TransposeAttention.cache_bytes_per_token(SimpleNamespace(GPT2_N_EMBD=E), 4) == 5 * 3 * E * 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [None, 0.0, 0.5])
def test_it_collapses_to_the_lens_with_a_transpose(bias, scale):
    module, x = built(bias=bias).double(), torch.randn(2, 11, E, dtype=torch.float64)
    if scale is not None:
        set_ra_mlp_coupling_scale(module, scale)
    before = {name: p.clone() for name, p in module.named_parameters()}
    lens = module.collapse()
    assert type(lens) is LensAttention
    torch.testing.assert_close(lens.eval()(x), module(x), rtol=0, atol=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_it_is_the_lens_class_and_not_the_baselines():
    g1, l1, v0 = (key(load("gpt2-ra-ablation+tiny", step)) for step in ("G1", "L1", "V0"))
    assert g1 == l1 != v0 and g1[1] == "equal"


def test_its_weights_are_gates(configuration):
    cfg = configuration("G1")
    model = GPT(cfg)
    groups = {g["name"]: g["names"] for g in optimizers.build(model, cfg).param_groups}
    assert "transformer.h.1.attn.gate_rec" in groups["gate"] and "transformer.h.0.attn.gate_std" in groups["gate"]


def test_it_compiles_into_one_graph_and_runs_under_autocast():
    module, x = TransposeAttention(E, H), torch.randn(2, 8, E)
    init_weights(module, 0)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_the_laws():
    def loaded(step):
        return load("gpt2-ra-ablation+tiny", step, {"GPT2_DROPOUT": "0.1"})
    v0 = Subject("V0", loaded("V0"))
    assert broken_laws(Subject("G1", loaded("G1"), None, v0)) == []
