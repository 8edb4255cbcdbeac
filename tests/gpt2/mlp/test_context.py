"""The MLP with a context: its formula, where gradient goes, and that the context is a linear map after all."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt2.layers import init_weights
from gpt2.mlp.baseline import MLP
from gpt2.mlp.context import ContextMLP

E, FF, RANK = 16, 64, 5


def build(bias=True):
    mlp = ContextMLP(E, FF, RANK, bias=bias).eval()
    init_weights(mlp, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in mlp.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return mlp.double()


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias, share):
    mlp, B, T = build(bias), 2, 3
    x, attended = torch.randn(2, B, T, E, dtype=torch.float64)
    expected = torch.zeros(B, T, E, dtype=torch.float64)
    a = 1 / (1 + torch.exp(-mlp.context_logit[0])) * (1 if share is None else share)
    for b in range(B):
        for t in range(T):
            h = F.gelu(F.linear(x[b, t], mlp.c_fc.weight, mlp.c_fc.bias), approximate="tanh")
            seen = mlp.context_up.weight @ (mlp.context_down.weight @ attended[b, t])
            expected[b, t] = F.linear((1 - a) * h + a * seen, mlp.c_proj.weight, mlp.c_proj.bias)
    found = mlp(x, attended) if share is None else mlp(x, attended, torch.tensor([share], dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_context_is_the_baseline():
    """Either because the attention is off, or because a is 0."""
    mlp = build()
    plain = MLP(E, FF).double()
    plain.load_state_dict({name: p for name, p in mlp.state_dict().items() if not name.startswith("context")})
    x, attended = torch.randn(2, 2, 3, E, dtype=torch.float64)
    assert torch.equal(mlp(x), plain(x)) and (mlp(x, attended) - plain(x)).abs().max() > 1e-3
    with torch.no_grad():
        mlp.context_logit.fill_(-30.0)
    torch.testing.assert_close(mlp(x, attended), plain(x), rtol=0, atol=1e-5)


def test_gradient_reaches_every_parameter_and_the_attention():
    mlp = ContextMLP(E, FF, RANK)
    init_weights(mlp, 0)
    assert mlp.context_alpha.item() == pytest.approx(0.1)
    x, attended = torch.randn(2, 2, 8, E)
    attended.requires_grad_()
    mlp(x, attended).square().sum().backward()
    for name, p in [*mlp.named_parameters(), ("attended", attended)]:
        assert (p.grad != 0).all(), name


def test_the_context_is_a_linear_map_of_the_attention():
    """What the module's docstring says against it: of rank r, and the same whatever x is."""
    mlp = build()
    x, attended = torch.randn(2, 1, 40, E, dtype=torch.float64)
    added = (mlp(x, attended) - mlp(x, torch.zeros_like(attended)))[0]
    M = mlp.context_alpha * mlp.c_proj.weight @ mlp.context_up.weight @ mlp.context_down.weight
    torch.testing.assert_close(added, attended[0] @ M.T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(added) == RANK


def test_a_scale_and_a_share_can_be_absorbed():
    mlp = build()
    x, attended = torch.randn(2, 2, 3, E, dtype=torch.float64)
    scale, share = torch.tensor([[0.7], [0.2]], dtype=torch.float64)
    before = mlp(x, attended, share)
    mlp.absorb(scale, share)
    torch.testing.assert_close(mlp(x, scale * attended), before, rtol=0, atol=1e-12)


def test_counts_and_sizes_are_those_it_declares():
    cfg = SimpleNamespace(GPT2_N_EMBD=E, GPT2_MLP_EXPANSION=4, CONTEXT_RANK=RANK)
    count = [sum(p.numel() for p in m.parameters()) for m in (MLP(E, FF), ContextMLP(E, FF, RANK))]
    assert count[1] - count[0] == ContextMLP.extra_parameters(cfg)
    assert build().sizes() == {"d_ff": FF, "context_rank": RANK} and build().stats()["context_alpha"].shape == (1,)


def test_autocast_keeps_the_hidden_features_small():
    mlp = build().float()
    x, attended = torch.randn(2, 2, 3, E)
    seen = []
    mlp.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mlp(x, attended)
    assert seen == [torch.bfloat16]
