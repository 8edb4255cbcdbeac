"""Attention with an output gate: the formula, where gradient reaches, what it sees, and that it compiles."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.output_gate import OutputGateAttention
from gpt2.attention.unified_ra import UnifiedRAttention
from gpt2.layers import init_weights
from gpt2.model import GPT
from lib import optimizers

E, H, D = 64, 4, 16


def pair(bias=True):
    """A baseline with random weights and biases, and a gated module that shares all of them."""
    torch.manual_seed(0)
    plain, gated = CausalSelfAttention(E, H, bias=bias).eval(), OutputGateAttention(E, H, bias=bias).eval()
    init_weights(gated, 0)
    if bias:
        torch.nn.init.normal_(gated.c_attn.bias)
        torch.nn.init.normal_(gated.c_proj.bias)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("c_gate")})
    with torch.no_grad():
        gated.c_gate.weight.normal_(0.0, 0.5)  # or all gates would be about 1/2
    return plain, gated


@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias):
    """Written out with an explicit softmax and mask, head by head, in float64."""
    _, gated = pair(bias)
    gated.double()
    B, T = 2, 11
    x = torch.randn(B, T, E, dtype=torch.float64)
    q, k, v = F.linear(x, gated.c_attn.weight, gated.c_attn.bias).split(E, 2)
    gate = 1 / (1 + torch.exp(-(x @ gated.c_gate.weight.T)))
    heads = []
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part] * gate[..., part])
    expected = F.linear(torch.cat(heads, -1), gated.c_proj.weight, gated.c_proj.bias)
    torch.testing.assert_close(gated(x), expected, rtol=0, atol=1e-12)


def test_it_contains_the_baseline():
    """W_g = 0 is a gate of 1/2 everywhere, which a doubled output projection takes back."""
    plain, gated = pair()
    with torch.no_grad():
        gated.c_gate.weight.zero_()
        gated.c_proj.weight.mul_(2.0)
    x = torch.randn(2, 17, E)
    torch.testing.assert_close(gated(x), plain(x), rtol=0, atol=1e-6)


def test_it_is_not_the_baseline_and_knows_no_smaller_model():
    plain, gated = pair()
    x = torch.randn(2, 17, E)
    assert (gated(x) - plain(x)).abs().max() > 1e-3 and gated.collapse() is gated


def test_every_gate_receives_gradient_and_moves():
    _, gated = pair()
    before = gated.c_gate.weight.detach().clone()
    optimizer = torch.optim.SGD(gated.parameters(), lr=1.0)
    gated(torch.randn(2, 16, E)).square().sum().backward()
    assert (gated.c_gate.weight.grad != 0).all(), "every entry of W_g"
    optimizer.step()
    assert (gated.c_gate.weight != before).all()


@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_a_later_input(training):
    _, gated = pair()
    gated.train(training)
    x = torch.randn(1, 20, E)
    other = x.clone()
    other[:, 9:] += torch.randn(1, 11, E)
    assert torch.equal(gated(x)[:, :9], gated(other)[:, :9]) and not torch.equal(gated(x)[:, 9], gated(other)[:, 9])


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 1, 1, 5), (12,), (1, 11)])
def test_decoding_in_chunks_equals_the_full_pass(sizes):
    """The gate of a chunk is that of its own positions."""
    _, gated = pair()
    x = torch.randn(3, 12, E)
    cache = gated.new_cache(3, 12, torch.float32, "cpu")
    with torch.no_grad():
        parts = [gated(part, cache) for part in x.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), gated(x), rtol=0, atol=1e-6)


def test_its_cache_and_its_parameters_are_those_it_declares():
    plain, gated = pair()
    cfg = SimpleNamespace(GPT2_N_EMBD=E)
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, gated)]
    assert count[1] - count[0] == OutputGateAttention.extra_parameters(cfg) == E * E
    assert OutputGateAttention.cache_bytes_per_token(cfg, 2) == CausalSelfAttention.cache_bytes_per_token(cfg, 2)
    assert gated.sizes() == {"head_dim": D} and gated.c_gate.bias is None


def test_the_gate_starts_around_a_half_from_its_own_stream():
    one, other = OutputGateAttention(E, H), OutputGateAttention(E, H)
    init_weights(one, 0)
    init_weights(other, 1)
    assert one.c_gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(one.c_gate.weight, other.c_gate.weight)
    assert not torch.equal(one.c_gate.weight, one.c_proj.weight)
    torch.manual_seed(0)
    logits = one.c_gate(F.layer_norm(torch.randn(64, 8, E), (E,)))
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.5, abs=0.01)
    assert logits.std().item() == pytest.approx(0.02 * math.sqrt(E), rel=0.05), "sigmoid(+-.55) at width 768: .37 to .63"


def test_the_gate_trains_like_any_other_matrix(configuration):
    groups = {g["name"]: g["names"] for g in optimizers.build(GPT(configuration("OG0")), configuration("OG0")).param_groups}
    assert "transformer.h.1.attn.c_gate.weight" in groups["decay"] and "gate" not in groups


def test_autocast_leaves_the_gate_in_the_type_of_the_values():
    _, gated = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = torch.randn(2, H, 5, D, dtype=torch.bfloat16)
        assert gated.combine(attended, None, torch.randn(2, 5, E)).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [lambda: OutputGateAttention(E, H), lambda: UnifiedRAttention(E, H, use_self_restart=True)])
def test_it_compiles_into_one_graph_forward_and_backward(build):
    """What gets the layer's input in `combine` must not break the graph; the back end plays no part in that."""
    module = build()
    init_weights(module, 0)
    x = torch.randn(2, 16, E)
    module(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)(x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
