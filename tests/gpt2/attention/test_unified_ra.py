"""Unified reciprocal attention: the documents' own tests (shapes, parity, operations, debug), and what they left out."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.unified_ra import ReciprocalAttention, UnifiedRAttention, repack_baseline_qkv_into_unified_ra
from gpt2.layers import init_weights

E, H, D, R = 64, 4, 16, 4


def pair(exact=True, bias=True, **options):
    """A baseline with random weights and biases, and RA loaded from it."""
    torch.manual_seed(0)
    plain = CausalSelfAttention(E, H, bias=bias).eval()
    init_weights(plain, 0)
    if bias:
        torch.nn.init.normal_(plain.c_attn.bias)
    ra = UnifiedRAttention(E, H, R=R, bias=bias, **options).eval()
    ra.from_pretrained_qkv(*plain.c_attn.weight.split(E), None, *(plain.c_attn.bias.split(E) if bias else ()), exact=exact)
    ra.c_proj.load_state_dict(plain.c_proj.state_dict())
    return plain, ra


@pytest.mark.parametrize("B, T", [(8, 1024), (1, 128), (16, 512), (4, 2048)])
def test_shapes_of_the_documents(B, T):
    module = UnifiedRAttention(n_embd=768, n_head=12, R=4, dropout=0.0)
    with torch.no_grad():
        assert module(torch.randn(B, T, 768)).shape == (B, T, 768)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_all_channels_kept_at_w_1_is_the_baseline(bias, per_head):
    plain, ra = pair(bias=bias, per_head_gates=per_head)
    x = torch.randn(2, 33, E)
    assert (plain(x) - ra(x)).abs().max() < 1e-6


def test_the_documents_repack_is_not_the_baseline():
    """At w_rec = 0 the last R channels of every head are gone; the documents call the error (.078) parity."""
    plain, ra = pair(exact=False)
    with torch.no_grad():
        ra.gate_std.fill_(1.0)
        ra.gate_rec.fill_(0.0)
    x = torch.randn(2, 33, E)
    error = (plain(x) - ra(x)).norm() / plain(x).norm()
    assert 1e-3 < error < 1


def test_score_has_two_terms_and_no_cross_terms():
    """score = w_std <q_std, k_std> + w_rec <k_low, q_low>, over sqrt(D), with both gates on both sides."""
    plain, ra = pair(exact=False)
    with torch.no_grad():
        ra.gate_std.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        ra.gate_rec.copy_(torch.tensor([0.3, 0.6, 0.9, -1.2]))
    x = torch.randn(1, 9, E)
    weight, bias = ra.projection_weights()
    q, k, _ = (t.view(9, H, D).transpose(0, 1) for t in torch.nn.functional.linear(x[0], weight, bias).split(E, 1))
    q0, k0, _ = (t.view(9, H, D).transpose(0, 1)
                 for t in torch.nn.functional.linear(x[0], plain.c_attn.weight, plain.c_attn.bias).split(E, 1))
    std, low = slice(0, D - R), slice(D - R, D)
    standard, reciprocal = q0[..., std] @ k0[..., std].mT, k0[..., low] @ q0[..., low].mT
    expected = ra.w_std[:, None, None] * standard + ra.w_rec[:, None, None] * reciprocal
    torch.testing.assert_close(q @ k.mT, expected, rtol=1e-4, atol=1e-4)


def test_sqrt_of_the_weight_on_one_side_only_would_not_give_the_weight():
    q, k, w = torch.randn(5, 8), torch.randn(5, 8), 0.25
    one_side, both_sides = (w ** 0.5 * q) @ k.T, (w ** 0.5 * q) @ (w ** 0.5 * k).T
    torch.testing.assert_close(both_sides, w * (q @ k.T))
    torch.testing.assert_close(one_side, w ** 0.5 * (q @ k.T))


class Operations(TorchDispatchMode):
    """Counts operations whose result is at least as large as the activations."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.seen = at_least, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor) and first.numel() >= self.at_least:
            self.seen[func.overloadpacket.__name__] += 1
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_no_operation_on_activations_that_the_baseline_lacks(grad):
    """One projection and one SDPA call; no concatenation, copy or multiplication of activations, forward or backward."""
    plain, ra = pair(exact=False)
    x = torch.randn(8, 64, E)  # activations are larger than the weights, so that weight-side work is not counted
    seen = []
    for module in (plain, ra):
        with Operations(at_least=x.numel()) as mode, torch.set_grad_enabled(grad):
            y = module(x)
            if grad:
                y.sum().backward()
        seen.append(mode.seen)
    assert seen[0] == seen[1]
    if not grad:
        assert not any(word in name for name in seen[1] for word in ("cat", "clone", "copy", "mul"))
    assert sum(n for name, n in seen[1].items() if "scaled_dot_product" in name and "backward" not in name) == 1


def test_gates_receive_gradient_and_move():
    _, ra = pair(exact=False, use_self_restart=True)
    before = {name: getattr(ra, name).detach().clone() for name in ra.gate_parameters}
    optimizer = torch.optim.SGD(ra.parameters(), lr=1.0)
    ra(torch.randn(2, 16, E)).square().sum().backward()
    optimizer.step()
    for name in ra.gate_parameters:
        assert (getattr(ra, name).grad != 0).all() and not torch.equal(getattr(ra, name), before[name])


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bake_changes_nothing(restart, bias):
    _, ra = pair(exact=False, bias=bias, use_self_restart=restart)
    x = torch.randn(2, 17, E)
    before = ra(x)
    ra.bake()
    torch.testing.assert_close(ra(x), before, rtol=0, atol=1e-6)
    ra.bake()
    torch.testing.assert_close(ra(x), before, rtol=0, atol=1e-6)
    assert (ra.w_std == 1).all() and not ra.gate_std.requires_grad


def test_rebake_folds_gates_that_were_set_after_baking():
    _, ra = pair(exact=False)
    ra.bake()
    x = torch.randn(2, 17, E)
    weights = ra.c_attn.weight.clone()
    with torch.no_grad():
        ra.gate_rec.fill_(0.5)
    ra.rebake_gates()
    low = ra.c_attn.weight.view(3, H, D, E)[:2, :, D - R:]
    torch.testing.assert_close(low, 0.5 * weights.view(3, H, D, E)[:2, :, D - R:])
    assert torch.isfinite(ra(x)).all()


def test_a_gate_acts_once_after_loading():
    """An earlier implementation baked sqrt(w) into loaded weights and multiplied again: w^2."""
    plain, ra = pair(exact=False)
    with torch.no_grad():
        ra.gate_std.fill_(0.5 ** 0.5)
    q = ra.projection_weights()[0][:D - R]
    torch.testing.assert_close(q, 0.5 ** 0.5 * plain.c_attn.weight[:D - R])


def test_a_checkpoint_survives_and_a_baked_module_can_load_one():
    _, ra = pair(exact=False)
    x, state = torch.randn(2, 17, E), {k: v.clone() for k, v in ra.state_dict().items()}
    expected = ra(x)
    fresh = UnifiedRAttention(E, H, R=R).eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), expected) and torch.equal(fresh(x), expected)  # the second forward too
    fresh.bake().load_state_dict(state)
    assert torch.equal(fresh(x), expected) and fresh.gate_std.requires_grad and fresh.gate_rec.requires_grad


def test_folded_layout_of_the_documents():
    W_q, W_k, W_v = torch.randn(3, E, E).unbind()
    q, k, v = repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, n_head=H, R=R).split(E)
    heads = [w.view(H, D, E) for w in (W_q, W_k, q, k)]
    assert torch.equal(heads[2][:, :D - R], heads[0][:, :D - R]) and torch.equal(heads[2][:, D - R:], heads[1][:, -R:])
    assert torch.equal(heads[3][:, :D - R], heads[1][:, :D - R]) and torch.equal(heads[3][:, D - R:], heads[0][:, -R:])
    assert torch.equal(v, W_v)


def test_projection_P_of_the_repack():
    W_q, W_k, W_v = torch.randn(3, E, E).unbind()
    last = torch.eye(D)[:, -R:]
    assert torch.equal(repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, last, n_head=H, R=R),
                       repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, n_head=H, R=R))
    random = [repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, "random", seed, n_head=H, R=R) for seed in (1, 1, 2)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    with pytest.raises(ValueError, match=r"P must have shape \[16, 4\], not \[4, 16\]"):
        repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, last.T, n_head=H, R=R)


def test_biases_given_to_a_module_without_them_are_refused():
    ra = UnifiedRAttention(E, H, R=R, bias=False)
    weights = torch.randn(3, E, E).unbind()
    with pytest.raises(ValueError, match="the biases given would be lost"):
        ra.from_pretrained_qkv(*weights, b_q=torch.ones(E))


def test_self_restart_mixes_attention_and_the_values_of_the_same_position():
    _, ra = pair(exact=False, use_self_restart=True)
    torch.testing.assert_close(ra.rwr_alpha, torch.full((H,), 0.05))
    x = torch.randn(2, 5, E)
    plain = CausalSelfAttention(E, H)
    plain.load_state_dict({"c_attn.weight": ra.gated_rows()[0], "c_attn.bias": ra.gated_rows()[1],
                           **{f"c_proj.{name}": p for name, p in ra.c_proj.state_dict().items()}})
    values = torch.nn.functional.linear(x, plain.c_attn.weight[2 * E:], plain.c_attn.bias[2 * E:])
    alone = ra.c_proj(values)
    for logit, share in ((ra.restart_logit.detach().clone(), 0.05), (float("-inf"), 0.0), (100.0, 0.5)):
        with torch.no_grad():
            ra.restart_logit.fill_(logit) if isinstance(logit, float) else ra.restart_logit.copy_(logit)
        torch.testing.assert_close(ra(x), (1 - share) * plain(x) + share * alone, rtol=1e-5, atol=1e-5)
    assert (ra.rwr_alpha <= 0.5).all()


@pytest.mark.parametrize("bias", [True, False])
def test_it_collapses_to_ordinary_attention(bias):
    _, ra = pair(exact=False, bias=bias)
    x = torch.randn(2, 17, E)
    torch.testing.assert_close(ra.collapse().eval()(x), ra(x), rtol=0, atol=1e-6)
    ra.double()
    torch.testing.assert_close(ra.collapse()(x.double()), ra(x.double()), rtol=0, atol=1e-12)


def test_set_R_is_legal_until_weights_are_used():
    ra = UnifiedRAttention(E, H, R=4)
    ra.set_R(8)
    torch.testing.assert_close(ra.w_rec, torch.full((H,), 0.5))
    ra(torch.randn(1, 3, E))
    with pytest.raises(RuntimeError, match="R is fixed once weights were loaded or used"):
        ra.set_R(4)
    loaded = pair()[1]
    with pytest.raises(RuntimeError):
        loaded.set_R(8)


def test_gate_stats():
    stats = UnifiedRAttention(E, H, R=R, use_self_restart=True).get_gate_stats()
    assert set(stats) == {f"{n}_{k}" for n in ("w_std", "w_rec", "rwr_alpha") for k in ("mean", "min", "max", "std")}
    assert stats["w_std_mean"] == pytest.approx((D - R) / D) and stats["w_rec_max"] == pytest.approx(R / D)
    assert stats["rwr_alpha_std"] == pytest.approx(0)
    assert UnifiedRAttention(E, H, R=R, gate_start=(0.9, 0.1)).get_gate_stats()["w_rec_mean"] == pytest.approx(0.1)


def test_debug_wants_tensor_cores_and_cuda():
    with pytest.raises(ValueError, match="head_dim 12 must be a multiple of 8"):
        UnifiedRAttention(48, 4, R=4, debug=True)
    with pytest.raises(ValueError, match="debug mode wants its input on a CUDA device"):
        UnifiedRAttention(E, H, R=R, debug=True)(torch.randn(1, 3, E))


@pytest.mark.parametrize("sizes, message", [((65, 4, 4), "n_embd 65 must be divisible by n_head 4"),
                                            ((64, 4, 16), "R 16 must be at least 1 and below head_dim 16"),
                                            ((64, 4, 0), "R 0 must be at least 1 and below head_dim 16")])
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        UnifiedRAttention(*sizes)


def test_the_name_of_the_later_documents():
    assert ReciprocalAttention is UnifiedRAttention
