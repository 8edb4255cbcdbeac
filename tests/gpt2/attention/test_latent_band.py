"""Latent attention with a reciprocal band: the formula written out, the band's edges, what a row sees, caches, sizes."""

import math
from types import SimpleNamespace

import pytest
import torch

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.latent_band import LatentBandAttention
from gpt2.coupling import set_ra_mlp_coupling_scale
from gpt2.layers import init_weights
from gpt2.model import GPT
from lib import optimizers

E, H, D, L, W, FF, T = 32, 4, 8, 6, 3, 20, 11
RECEIVING = {"gated_from": FF, "latent_from": FF}


def build(window=W, dtype=torch.float64, bias=True, **options):
    """With weights and shares large enough that what is left out is seen."""
    module = LatentBandAttention(E, H, L, window, bias=bias, **options).to(dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, 0.4)
    return module


def written_out(m, x, hidden=None):
    """Token by token and head by head: the output, the latent keys, and the weights averaged over heads."""
    L, H, D = m.latent, m.n_head, m.head_dim
    out, latents = torch.zeros_like(x), x.new_zeros(*x.shape[:2], L)
    mean_weights = x.new_zeros(x.size(0), x.size(1), x.size(1))
    zero = x.new_zeros(x.size(2))
    b_q, b_v, b_o = (zero if p is None else p for p in (m.c_attn.bias, m.v_up.bias, m.c_proj.bias))
    for b in range(x.size(0)):
        q, k, v = [], [], []
        for t in range(x.size(1)):
            c_k, c_v = m.c_latent.weight[:L] @ x[b, t], m.c_latent.weight[L:] @ x[b, t]
            if hidden is not None and m.from_mlp is not None:
                c_k = c_k + m.exchange_alpha * (m.from_mlp.weight @ hidden[b, t])
            latents[b, t] = c_k
            q.append(m.c_attn.weight @ x[b, t] + b_q)
            k.append(m.k_up.weight @ c_k)
            v.append(m.v_up.weight @ c_v + b_v)
        for i in range(x.size(1)):
            heads = []
            for h in range(H):
                of = slice(h * D, (h + 1) * D)
                scores = []
                for j in range(i + 1):
                    score = (q[i][of] * k[j][of]).sum()
                    if m.window and i - j <= m.window:
                        score = score + m.band_alpha[h] * (q[j][of] * k[i][of]).sum()
                    scores.append(score / math.sqrt(D))
                p = torch.stack(scores).softmax(0)
                y = sum(p[j] * v[j][of] for j in range(i + 1))
                mean_weights[b, i, :i + 1] += p / H
                if hidden is not None and m.head_gate is not None:
                    y = y * (1 + m.gate_alpha * (2 * torch.sigmoid(m.head_gate.weight[h] @ hidden[b, i]) - 1))
                heads.append(y)
            out[b, i] = m.c_proj.weight @ torch.cat(heads) + b_o
    return out, latents, mean_weights


def inputs(dtype=torch.float64, rows=2, tokens=T):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, tokens, n, generator=generator).to(dtype) for n in (E, FF))


@pytest.mark.parametrize("window, bias", [(None, True), (1, True), (W, False), (T + 5, True)])
@torch.no_grad()
def test_the_formula(window, bias):
    module, (x, _) = build(window, bias=bias), inputs()
    torch.testing.assert_close(module(x), written_out(module, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, W])
@torch.no_grad()
def test_the_formula_with_what_an_mlp_hands_on(window):
    module, (x, hidden) = build(window, mixing=True, **RECEIVING), inputs()
    for found, expected in zip(module.couple(x, hidden=hidden), written_out(module, x, hidden), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    module.mixing = False
    assert module.couple(x, hidden=hidden)[2] is None


@torch.no_grad()
def test_the_band_ends_at_its_window_and_holds_the_transposed_score():
    """log of the weights with the band over those without is, up to a number a row, alpha <q_j, k_i> / sqrt(D) inside."""
    module, (x, _) = build(), inputs()
    q = module._heads(module.c_attn(x))
    k = module._heads(module.k_up(module.c_latent(x)[..., :L]))
    with_band = module._weights(q, k, 0, None).log()
    alpha = module.band_alpha.clone()
    module.band_alpha.zero_()
    moved = with_band - module._weights(q, k, 0, None).log()
    transposed = (q @ k.mT / math.sqrt(D)).mT
    for i in range(T):
        base = moved[:, :, i, 0] if i > W else moved[:, :, i, i] - alpha * transposed[:, :, i, i]
        for j in range(i + 1):
            expected = alpha * transposed[:, :, i, j] if i - j <= W else torch.zeros(2, H, dtype=x.dtype)
            torch.testing.assert_close(moved[:, :, i, j] - base, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_no_row_depends_on_a_later_token_nor_on_another_row(training, scale):
    module, (x, hidden) = build(mixing=True, dropout=0.2, **RECEIVING).train(training), inputs()
    set_ra_mlp_coupling_scale(module, scale)
    one, other = x.clone(), hidden.clone()
    one[0, 6:], other[0, 6:] = 9.0, -9.0
    found = []
    for a, b in ((x, hidden), (one, other)):
        torch.manual_seed(0)
        found.append(module.couple(a, hidden=b))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[0, :6], b[0, :6], rtol=0, atol=1e-12)
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-12)
    assert (found[0][0][0, 6] - found[1][0][0, 6]).abs().max() > 1e-3


@torch.no_grad()
def test_a_gate_is_that_of_its_own_token():
    """Not a mean over tokens: what is handed on at one position moves the output there and nowhere else."""
    module, (x, hidden) = build(gated_from=FF), inputs()
    other = hidden.clone()
    other[:, 4] += 3.0
    moved = (module.couple(x, hidden=hidden)[0] - module.couple(x, hidden=other)[0]).abs().amax((0, 2))
    assert moved[4] > 1e-3 and moved[:4].max() == 0 and moved[5:].max() == 0


@torch.no_grad()
def test_alphas_of_0_and_a_scale_of_0_leave_latent_attention():
    x, hidden = inputs()
    plain = build(None)
    for neutral in ("alphas", "scale"):
        module = build(mixing=True, **RECEIVING)
        assert not module.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
        assert (module.couple(x, hidden=hidden)[0] - plain(x)).abs().max() > 1e-2
        if neutral == "scale":
            set_ra_mlp_coupling_scale(module, 0.0)
        else:
            for name in module.gate_parameters:
                getattr(module, name).zero_()
        torch.testing.assert_close(module.couple(x, hidden=hidden)[0], plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1,) * T, (5, 1, 1, 4), (2, 7, 2), (T,)])
@pytest.mark.parametrize("window", [None, 1, W, T + 5])
@torch.no_grad()
def test_decoding_in_chunks_equals_the_full_pass(window, sizes):
    module, (x, hidden) = build(window, mixing=True, **RECEIVING), inputs()
    cache = module.new_cache(2, T, x.dtype, "cpu")
    full, at = module.couple(x, hidden=hidden), 0
    for n in sizes:
        now = slice(at, at + n)
        part = module.couple(x[:, now], cache, hidden[:, now])
        at += n
        for a, b in zip(part, (full[0][:, now], full[1][:, now], full[2][:, now, :at]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=f"holds {T} positions, {T + 1} were asked for"):
        module(x[:, :1], cache)


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_bfloat16_cache_decodes_to_its_precision(autocast):
    module, (x, _) = build(dtype=torch.float32), inputs(torch.float32)
    cache = module.new_cache(2, T, torch.bfloat16, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = torch.cat([module(part, cache) for part in x.split((4, 1, 6), 1)], 1)
        full = module(x)
    assert (parts - full).float().norm() < 0.02 * full.float().norm()


@torch.no_grad()
def test_latent_attention_alone_collapses_to_the_baseline_with_products_as_weights():
    x, _ = inputs()
    for bias in (True, False):
        module = build(None, bias=bias)
        plain = module.collapse()
        assert type(plain) is CausalSelfAttention and not plain.training
        torch.testing.assert_close(plain(x), module(x), rtol=0, atol=1e-12)
    rank = torch.linalg.matrix_rank(plain.c_attn.weight[E:2 * E])
    assert rank == L, "inside the baseline's class, not all of it"


@pytest.mark.parametrize("options", [{"window": W}, {"window": None, **RECEIVING}, {"window": None, "mixing": True}])
def test_with_anything_besides_no_simpler_one_is_known(options):
    module = build(**options)
    assert module.collapse() is module


def config(**symbols):
    return SimpleNamespace(**({"GPT2_N_EMBD": E, "GPT2_N_HEAD": H, "GPT2_MLP_EXPANSION": 4, "GPT2_BIAS": True,
                               "GPT2_BLOCK_SIZE": T, "GPT2_N_LAYER": 2, "GPT2_DROPOUT": 0.0, "BAND_LATENT": L,
                               "BAND_RECIPROCAL": True, "BAND_WINDOW": W, "BAND_HEAD_GATES": True, "BAND_CROSS_TOKEN": False,
                               "BAND_EXCHANGE": True} | symbols))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("window", [W, T + 5, None])
def test_parameters_and_cache_bytes_are_those_it_declares(window, layer, bias):
    cfg = config(BAND_RECIPROCAL=window is not None, BAND_WINDOW=window, GPT2_BIAS=bias)
    module = LatentBandAttention.from_config(cfg, layer)
    count = [sum(p.numel() for p in m.parameters()) for m in (module, CausalSelfAttention(E, H, bias=bias))]
    received = LatentBandAttention.received_parameters(cfg) if layer else 0
    assert count[0] - count[1] == LatentBandAttention.extra_parameters(cfg) + received
    held = sum(t.numel() * t.element_size() for t in module.new_cache(3, T, torch.bfloat16, "cpu").tensors())
    assert held == 3 * T * LatentBandAttention.cache_bytes_per_token(cfg, 2)
    assert held == 3 * 2 * (2 * L * T + min(window or 0, T) * E)
    expected = {"head_dim": D, "latent": L} | ({"band_window": window} if window else {})
    assert module.sizes() == expected


def test_the_queries_start_as_the_baselines_and_the_alphas_where_they_say(configuration):
    plain, module = GPT(configuration("V0")).transformer.h[1].attn, GPT(configuration("G2A")).transformer.h[1].attn
    E = plain.n_embd
    assert torch.equal(module.c_attn.weight, plain.c_attn.weight[:E]) and torch.equal(module.c_proj.weight, plain.c_proj.weight)
    assert module.stats().keys() == {"ra_alpha", "mlp_gate_alpha", "mlp_recip_alpha"}
    assert [module.stats()[name].tolist() for name in ("ra_alpha", "mlp_gate_alpha", "mlp_recip_alpha")] == [
        [0.5] * module.n_head, pytest.approx([0.1]), pytest.approx([0.2])]


def test_the_alphas_are_gates_to_the_optimizer(configuration):
    cfg = configuration("G2A")
    groups = {g["name"]: g for g in optimizers.build(GPT(cfg), cfg).param_groups}
    block = "transformer.h.1."
    assert {name for name in groups["gate"]["names"] if name.startswith(block)} == {block + name for name in (
        "attn.band_alpha", "attn.gate_alpha", "attn.exchange_alpha", "mlp.cross_alpha", "mlp.exchange_alpha")}
    assert groups["gate"]["weight_decay"] == 0


def test_every_entry_learns_from_the_start_on():
    module = LatentBandAttention(E, H, L, W, mixing=True, **RECEIVING)
    init_weights(module, 0)
    x, hidden = inputs(torch.float32)
    module.couple(x, hidden=hidden)[0].square().sum().backward()
    assert all((p.grad != 0).all() for p in module.parameters()) and module.dead_elements() == {}
