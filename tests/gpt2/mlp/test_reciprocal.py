"""R-MLP: its formula, its gates, and what it is equal to."""

import pytest
import torch
import torch.nn.functional as F

from gpt2.layers import init_weights
from gpt2.mlp.baseline import MLP
from gpt2.mlp.reciprocal import ReciprocalMLP

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


def test_with_a_token_gate_no_collapse_is_known():
    assert build(token_gate=True).collapse() is None


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
        "gate_std", "gate_rec", "token_gate", "token_gate_bias"}


@pytest.mark.parametrize("R_ff", [0, FF])
def test_sizes_that_do_not_fit(R_ff):
    with pytest.raises(ValueError, match=f"R_ff {R_ff} must be at least 1 and below d_ff {FF}"):
        ReciprocalMLP(E, FF, R_ff)
