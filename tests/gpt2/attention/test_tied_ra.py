"""V1T: its score holds a true transposed term, from rows that it does not own twice."""

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.tied_ra import TiedRAttention
from gpt2.attention.unified_ra import UnifiedRAttention
from gpt2.model import GPT

E, H, D, R = 64, 4, 16, 4


def build(**options):
    torch.manual_seed(0)
    module = TiedRAttention(E, H, R=R, **options).eval()
    with torch.no_grad():
        if module.c_attn.bias is not None:
            module.c_attn.bias.normal_()
        module.gate_std.copy_(torch.tensor([0.5, 1.0, 1.5, 0.7]))
        module.gate_rec.copy_(torch.tensor([0.9, 0.6, 0.3, 1.2]))
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_the_score_holds_the_transposed_term(bias):
    """w_std <q_i, k_j> + w_rec <q_j, k_i> over the first R channels: the second term is the transpose of one of q and k."""
    module, x = build(bias=bias), torch.randn(9, E)
    weight, bias = module.projection_weights()
    qf, kf, v = (t.view(9, H, D).transpose(0, 1) for t in F.linear(x, weight, bias).split(E, 1))
    kept = F.linear(x, module.c_attn.weight, module.c_attn.bias)
    q, k = (t.view(9, H, D - R).transpose(0, 1) for t in kept[:, :2 * H * (D - R)].chunk(2, 1))
    transposed = (q[..., :R] @ k[..., :R].mT).mT
    expected = module.w_std[:, None, None] * (q @ k.mT) + module.w_rec[:, None, None] * transposed
    torch.testing.assert_close(qf @ kf.mT, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v.transpose(0, 1).flatten(1), kept[:, -E:])


def test_it_has_fewer_parameters_and_computes_as_much():
    tied, free = build(), UnifiedRAttention(E, H, R=R)
    assert tied.c_attn.weight.shape == (3 * E - 2 * R * H, E) and tied.projection_weights()[0].shape == (3 * E, E)
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 2 * R * H * (E + 1)


def test_it_starts_from_the_rows_of_the_baseline_that_it_keeps(configuration):
    tied, plain = (GPT(configuration(step)).transformer.h[1].attn.c_attn.weight for step in ("V1T", "V0"))
    q, k, v = (part.view(2, 64, 128) for part in plain.split(128))
    assert torch.equal(tied, torch.cat([q[:, :60].flatten(0, 1), k[:, :60].flatten(0, 1), v.flatten(0, 1)]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_it_collapses_and_bakes_to_attention_with_rows_of_its_own(bias, restart):
    module, x = build(bias=bias, use_self_restart=restart), torch.randn(2, 17, E)
    plain, baked = module.collapse(), module.bake()
    assert type(plain) is (UnifiedRAttention if restart else CausalSelfAttention)
    for other in (plain, baked):
        torch.testing.assert_close(other.eval()(x), module(x), rtol=0, atol=1e-6)


def test_every_parameter_but_the_key_biases_that_only_keys_have_gets_gradient():
    module = build().double()
    module(torch.randn(2, 9, E).double()).square().sum().backward()
    bias = module.c_attn.bias.grad.abs()
    dead = module.dead_elements()["c_attn.bias"]
    alive = [row for row in range(len(bias)) if row not in set(dead)]
    assert len(dead) == H * (D - 2 * R) and bias[dead].max() < 1e-9 * bias[alive].min()
    assert all((p.grad != 0).all() for name, p in module.named_parameters() if "c_attn.bias" not in name)


def test_what_does_not_fit_a_tied_module_is_refused():
    with pytest.raises(ValueError, match="R 9 must not be more than the 7 standard channels"):
        TiedRAttention(E, H, R=9)
    with pytest.raises(RuntimeError, match="R is fixed in tied attention"):
        build().set_R(2)
    with pytest.raises(RuntimeError, match="do not fit tied attention"):
        build().from_pretrained_qkv(*torch.randn(3, E, E))
