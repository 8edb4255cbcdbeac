"""R-MLP: its formula, its gates, and what it is equal to."""

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.layers import init_weights
from gpt2.mlp.baseline import MLP
from gpt2.mlp.reciprocal import GateLast, ReciprocalMLP
from gpt2.model import GPT
from lib import optimizers

E, FF, R = 32, 128, 24


def build(**options):
    torch.manual_seed(0)
    mlp = ReciprocalMLP(E, FF, R, **options).eval()
    init_weights(mlp, 0)
    with torch.no_grad():
        for name, p in mlp.named_parameters():
            if "gate" in name or "mixer" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return mlp


@pytest.mark.parametrize("mixer", [False, True])
@pytest.mark.parametrize("token_gate", [False, True])
def test_formula(mixer, token_gate):
    mlp, x = build(mixer=mixer, token_gate=token_gate), torch.randn(2, 7, E)
    h = F.gelu(mlp.c_fc(x), approximate="tanh")
    low = h[..., FF - R:]
    if mixer:
        low = low @ mlp.mixer.T
    if token_gate:
        low = low * 2 * torch.sigmoid(x @ mlp.token_gate + mlp.token_gate_bias)[..., None]
    joined = torch.cat([mlp.w_std * h[..., :FF - R], mlp.w_rec * low], -1)
    torch.testing.assert_close(mlp(x), F.linear(joined, mlp.c_proj.weight, mlp.c_proj.bias), rtol=1e-5, atol=1e-5)


def test_geometric_start_and_the_older_one():
    mlp = ReciprocalMLP(E, FF, R)
    torch.testing.assert_close(mlp.w_std, torch.tensor([(FF - R) / FF]))
    torch.testing.assert_close(mlp.w_rec, torch.tensor([R / FF]))
    torch.testing.assert_close(ReciprocalMLP(E, FF, R, gate_start=(0.9, 0.1)).w_rec, torch.tensor([0.1]))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_gradient_of_the_gated_features(count):
    torch.manual_seed(0)
    h, s = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (7, 1))
    assert torch.equal(GateLast.apply(h, s, count), torch.cat([h[..., :-count], h[..., -count:] * s], -1))
    torch.autograd.gradcheck(lambda h, s: GateLast.apply(h, s, count), (h, s))


def test_mixer_and_token_gate_start_neutral():
    """V4, V5 and V6 start as V3: an identity mixer, a gate of 1 for every token."""
    x, outputs = torch.randn(2, 7, E), []
    for mixer in (False, True):
        for token_gate in (False, True):
            mlp = ReciprocalMLP(E, FF, R, mixer=mixer, token_gate=token_gate).eval()
            init_weights(mlp, 0)
            outputs.append(mlp(x))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-6)


def test_weights_of_one_are_the_baseline():
    plain, mlp = MLP(E, FF).eval(), ReciprocalMLP(E, FF, R, mixer=True, token_gate=True, gate_start=(1.0, 1.0)).eval()
    init_weights(plain, 0)
    init_weights(mlp, 0)
    x = torch.randn(2, 7, E)
    torch.testing.assert_close(mlp(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixer", [False, True])
def test_it_collapses_to_the_baseline_mlp(mixer):
    mlp, x = build(mixer=mixer), torch.randn(2, 7, E)
    collapsed = mlp.collapse()
    assert type(collapsed) is MLP
    torch.testing.assert_close(collapsed(x), mlp(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"token_gate": True}, {"injection": True}, {"token_gate": True, "injection": True}])
def test_with_a_token_gate_or_injection_it_collapses_to_one_without_weights_and_mixer(options):
    mlp, x, attended = build(mixer=True, **options), torch.randn(2, 7, E), torch.randn(2, 7, E)
    collapsed = mlp.collapse()
    assert type(collapsed) is ReciprocalMLP and collapsed.mixer is None and collapsed.w_rec == collapsed.w_std == 1
    torch.testing.assert_close(collapsed(x, attended), mlp(x, attended), rtol=0, atol=1e-6)


def test_the_gate_is_per_token():
    """An earlier implementation announced per-token gates and trained one scalar."""
    mlp, x = build(token_gate=True), torch.randn(1, 5, E)
    s = 2 * torch.sigmoid(x @ mlp.token_gate + mlp.token_gate_bias)
    assert s.unique().numel() == 5


def test_every_parameter_gets_gradient():
    mlp = build(mixer=True, token_gate=True)
    mlp(torch.randn(2, 7, E)).square().sum().backward()
    for name, p in mlp.named_parameters():
        assert p.grad is not None and (p.grad != 0).all(), name


def test_gates_are_declared():
    assert set(ReciprocalMLP(E, FF, R, mixer=True, token_gate=True).gate_parameters) == {
        "gate_std", "gate_rec", "token_gate", "token_gate_bias", "injection_alpha"}


@pytest.mark.parametrize("R_ff", [0, FF])
def test_sizes_that_do_not_fit(R_ff):
    with pytest.raises(ValueError, match=f"R_ff {R_ff} must be at least 1 and below d_ff {FF}"):
        ReciprocalMLP(E, FF, R_ff)


# Injection and tying

def test_injection_is_seen_by_the_reciprocal_features_only():
    mlp, x, a = build(injection=True), torch.randn(2, 7, E), torch.randn(2, 7, E)
    with torch.no_grad():
        mlp.injection_alpha.fill_(0.7)
    std, low = mlp.c_fc.weight[:FF - R], mlp.c_fc.weight[FF - R:]
    b = mlp.c_fc.bias
    h = [F.gelu(F.linear(*arguments), approximate="tanh")
         for arguments in ((x, std, b[:FF - R]), (x + 0.7 * a, low, b[FF - R:]))]
    expected = F.linear(torch.cat([mlp.w_std * h[0], mlp.w_rec * h[1]], -1), mlp.c_proj.weight, mlp.c_proj.bias)
    torch.testing.assert_close(mlp(x, a), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp(x, None), mlp(x, torch.zeros_like(a)), rtol=0, atol=1e-6)
    assert ReciprocalMLP(E, FF, R, injection=True).injection_alpha == 1


@pytest.mark.parametrize("tying", ["up", "proj"])
@pytest.mark.parametrize("injection", [False, True])
def test_tied_features_use_the_rows_of_another_matrix(tying, injection):
    attention = CausalSelfAttention(E, 4)
    init_weights(attention, 1)
    mlp = build(tying=tying, injection=injection)
    mlp.meet(attention)
    x, a = torch.randn(2, 7, E), torch.randn(2, 7, E)
    source = mlp.c_fc.weight if tying == "up" else attention.c_proj.weight
    assert mlp.c_fc.weight.shape == (FF - R, E) and torch.equal(mlp.up_weights()[1][0], source[:R])
    h = F.gelu(F.linear(x + a if injection else x, source[:R], mlp.low_bias), approximate="tanh")
    low = F.linear(h, mlp.w_rec * mlp.c_proj.weight[:, FF - R:])
    std = F.linear(F.gelu(mlp.c_fc(x), approximate="tanh"), mlp.w_std * mlp.c_proj.weight[:, :FF - R])
    torch.testing.assert_close(mlp(x, a), std + low + mlp.c_proj.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp.collapse()(x, a), mlp(x, a), rtol=0, atol=1e-6)
    mlp(x, a).square().sum().backward()
    assert (source.grad[:R] != 0).all()


def test_a_tied_matrix_is_one_parameter(configuration):
    model = GPT(configuration("M4"))
    block = model.transformer.h[1]
    assert block.mlp.tied_weight is block.attn.c_proj.weight
    assert not any("tied_weight" in name for name, _ in model.named_parameters())
    groups = optimizers.param_groups(model, configuration("M4"))
    assert len([p for group in groups for p in group["params"]]) == len(list(model.parameters()))


@pytest.mark.parametrize("tying, most", [("up", 64), ("proj", 32)])
def test_more_tied_features_than_rows_are_refused(tying, most):
    """An earlier implementation sliced beyond the rows and was silently given fewer."""
    with pytest.raises(ValueError, match=f"R_ff {most + 1} must be at most"):
        ReciprocalMLP(E, FF, most + 1, tying=tying)
    ReciprocalMLP(E, FF, most, tying=tying)


@pytest.mark.parametrize("options", [{}, {"mixer": True}, {"token_gate": True}, {"injection": True, "mixer": True},
                                     {"skip_start": (1.0, -1.5)}])
def test_bake_changes_nothing(options):
    mlp, x, a = build(**options), torch.randn(2, 7, E), torch.randn(2, 7, E)
    before, state = mlp(x, a), {k: v.clone() for k, v in mlp.state_dict().items()}
    for _ in range(2):
        mlp.bake()
        torch.testing.assert_close(mlp(x, a), before, rtol=0, atol=1e-6)
    assert mlp.w_std == mlp.w_rec == 1 and not mlp.gate_std.requires_grad
    mlp.load_state_dict(state)
    assert torch.equal(mlp(x, a), before) and mlp.gate_std.requires_grad
