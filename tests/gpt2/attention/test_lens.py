"""Lens attention: its formula, what it sees and caches, and what it is equal to."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.lens import LensAttention
from gpt2.layers import init_weights
from gpt2.model import GPT
from gpt2.rules import check
from lib import optimizers
from lib.errors import UserError

E, H, D, RANK = 32, 4, 8, 12
TERMS = [(True, False), (False, True), (True, True)]
KINDS = [(*terms, latent) for terms in TERMS for latent in (None, RANK)]


def build(transpose=True, column_bias=True, latent=None, bias=True, dropout=0.0):
    """A module with gates, biases and u of a size that shows."""
    module = LensAttention(E, H, dropout, bias, transpose=transpose, column_bias=column_bias, latent=latent)
    init_weights(module, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1 or "logits" in name or "column" in name:
                p.add_(torch.empty(p.shape).normal_(generator=generator) * 0.5)
        module.c_attn.weight.mul_(10)  # scores of size 1
    return module.eval()


def parts(module, x):
    """q, k, v [B, T, E] as the definitions give them."""
    if module.latent is None:
        return F.linear(x, module.c_attn.weight, module.c_attn.bias).split(E, 2)
    c = x @ module.c_latent.weight.T
    return F.linear(x, module.c_attn.weight, module.c_attn.bias), *F.linear(c, module.c_up.weight, module.c_up.bias).split(E, 2)


def naive(module, x):
    """The definition, number by number."""
    B, T, _ = x.shape
    q, k, v = parts(module, x)
    y = torch.zeros(B, T, E, dtype=x.dtype)
    for h in range(H):
        at = slice(h * D, (h + 1) * D)
        exponentials = [torch.exp(g) for g in module.lens_logits[h]]
        w = dict(zip(module.terms, [e / sum(exponentials) for e in exponentials], strict=True))
        for b in range(B):
            for i in range(T):
                logits = []
                for j in range(i + 1):
                    logit = w["std"] * (q[b, i, at] @ k[b, j, at])
                    if module.transpose:
                        logit = logit + w["rec"] * (q[b, j, at] @ k[b, i, at])
                    if module.column is not None:
                        logit = logit + w["col"] * (k[b, j, at] @ module.column.weight[h])
                    logits.append(logit / math.sqrt(D))
                p = torch.stack(logits).softmax(0)
                y[b, i, at] = sum(p[j] * v[b, j, at] for j in range(i + 1))
    return F.linear(y, module.c_proj.weight, module.c_proj.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_the_formula_and_its_gradient(transpose, column_bias, latent, bias):
    module = build(transpose, column_bias, latent, bias).double()
    x = torch.randn(2, 5, E, dtype=torch.float64)
    found, expected = module(x), naive(module, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, p in module.named_parameters():
        one, two = (torch.autograd.grad(y.square().sum(), p, retain_graph=True)[0] for y in (found, expected))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("transpose, column_bias", TERMS)
def test_all_weight_on_the_scores_is_the_baseline(transpose, column_bias):
    module = build(transpose, column_bias)
    plain = CausalSelfAttention(E, H).eval()
    plain.load_state_dict({name: p for name, p in module.state_dict().items() if name.startswith(("c_attn", "c_proj"))})
    x = torch.randn(2, 17, E)
    assert (module(x) - plain(x)).abs().max() > 1e-3
    with torch.no_grad():
        module.lens_logits.fill_(-30.0)[:, 0] = 30.0
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-5)


def test_the_gates_start_at_the_documented_softmax_over_the_terms_that_are_there():
    for terms in TERMS:
        logits = torch.tensor([2.2, *[0.6] * terms[0], *[0.1] * terms[1]])
        module = LensAttention(E, H, transpose=terms[0], column_bias=terms[1])
        found = torch.stack(list(module.weights().values()), -1)
        torch.testing.assert_close(found, logits.softmax(0).expand(H, -1))
    assert set(module.stats()) == {"lens_w_std", "lens_w_rec", "lens_w_col"} and module.stats()["lens_w_col"].shape == (H,)


def test_without_a_second_term_there_is_nothing_to_weigh(configuration):
    with pytest.raises(ValueError, match="nothing to weigh"):
        LensAttention(E, H, transpose=False, column_bias=False)
    check(configuration("L1"))
    with pytest.raises(UserError, match="nothing to weigh"):
        check(configuration("L1", LENS_TRANSPOSE="n"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_no_output_depends_on_a_later_input(transpose, column_bias, latent, training):
    """Of S^T only what lies on and below the diagonal is used, and rows of a batch do not meet."""
    module = build(transpose, column_bias, latent).train(training)
    x = torch.randn(2, 20, E)
    other = x.clone()
    other[1, 9:] += torch.randn(11, E)
    one, two = module(x), module(other)
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(one[1, :9], two[1, :9], rtol=0, atol=1e-6)
    assert (one[1, 9:] - two[1, 9:]).abs().amax(1).min() > 1e-3


def test_equal_weights_leave_only_the_symmetric_part():
    """w_std = w_rec: tokens i and j score each other alike, so exchanged queries and keys change nothing."""
    module = build(column_bias=False).double()
    other = build(column_bias=False).double()
    with torch.no_grad():
        for m in (module, other):
            m.lens_logits.fill_(0.0)
        for p in (other.c_attn.weight, other.c_attn.bias):
            p[:2 * E] = p[:2 * E].roll(E, 0)
    x = torch.randn(2, 9, E, dtype=torch.float64)
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        module.lens_logits[:, 0] = other.lens_logits[:, 0] = 1.0
    assert (module(x) - other(x)).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [(1,) * 13, (5, 1, 1, 6), (13,), (1, 9, 3)])
@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_decoding_in_chunks_equals_the_full_pass(transpose, column_bias, latent, sizes):
    module = build(transpose, column_bias, latent)
    x = torch.randn(3, 13, E)
    cache = module.new_cache(3, 13, torch.float32, "cpu")
    with torch.no_grad():
        chunks = [module(part, cache) for part in x.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(chunks, 1), module(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_decoding_under_autocast_with_a_bfloat16_cache(transpose, column_bias, latent):
    module = build(transpose, column_bias, latent)
    x = torch.randn(2, 9, E)
    cache = module.new_cache(2, 9, torch.bfloat16, "cpu")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        chunks = torch.cat([module(part, cache) for part in x.split((4, 1, 4), 1)], 1)
    assert chunks.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(chunks.float(), module(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_its_cache_and_its_parameters_are_those_it_declares(transpose, column_bias, latent):
    """S^T costs n_embd numbers a token: the queries. The latent is in the place of keys and values, not of those."""
    cfg = SimpleNamespace(GPT2_N_EMBD=E, GPT2_N_HEAD=H, LENS_TRANSPOSE=transpose, LENS_COLUMN_BIAS=column_bias,
                          LENS_LATENT_KV=latent is not None, LENS_LATENT=latent)
    module = build(transpose, column_bias, latent)
    count = [sum(p.numel() for p in m.parameters()) for m in (CausalSelfAttention(E, H), module)]
    assert count[1] - count[0] == LensAttention.extra_parameters(cfg)
    held = sum(t.numel() * t.element_size() for t in module.new_cache(1, 1, torch.bfloat16, "cpu").tensors())
    assert held == LensAttention.cache_bytes_per_token(cfg, 2) == 2 * ((latent or 2 * E) + E * transpose)


@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_gradient_reaches_everything_at_the_start(transpose, column_bias, latent):
    """u and its gate too, because u does not start at zero; a key's bias only where S^T makes it a query's."""
    module = LensAttention(E, H, transpose=transpose, column_bias=column_bias, latent=latent)
    init_weights(module, 0)
    torch.manual_seed(0)
    (module(torch.randn(2, 16, E)) * torch.randn(2, 16, E)).sum().backward()
    dead = module.dead_elements()
    assert (dead == {}) == transpose
    for name, p in module.named_parameters():
        size = p.grad.abs()
        if name in dead:
            assert size[dead[name]].max() < 1e-5 * size.max()
            size[dead[name]] = size.max()
        assert (size > 1e-7 * size.max()).all(), name


@pytest.mark.parametrize("transpose, latent, same", [
    (False, None, CausalSelfAttention), (True, None, LensAttention), (True, RANK, LensAttention)])
def test_the_column_bias_is_a_bias_of_the_query(transpose, latent, same):
    """Beside S^T as well: what it does there is constant along a row."""
    module = build(transpose, True, latent).double()
    simple = module.collapse()
    assert type(simple) is same and not simple.training and getattr(simple, "column", None) is None
    fewer = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in simple.parameters())
    assert fewer == E + H * (1 if transpose else 2)
    x = torch.randn(2, 11, E, dtype=torch.float64)
    torch.testing.assert_close(simple(x), module(x), rtol=0, atol=1e-12)
    before = {name: p.clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in simple.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), "a copy"


@pytest.mark.parametrize("options", [dict(column_bias=False), dict(bias=False), dict(transpose=False, latent=RANK)])
def test_where_no_simpler_class_is_known_it_is_itself(options):
    module = build(**options)
    assert module.collapse() is module


@pytest.mark.parametrize("transpose, column_bias, latent", KINDS)
def test_there_is_one_attention_call_and_no_score_tensor(transpose, column_bias, latent, monkeypatch):
    module, T, calls = build(transpose, column_bias, latent), 19, []

    def attend(query, key, value, **options):
        calls.append((query.shape, key.shape, value.shape))
        return value

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    module(torch.randn(2, T, E))
    channels = 2 * D if transpose else D
    assert calls == [((2, H, T, channels), (2, H, T, channels), (2, H, T, D))]


def test_a_latent_starts_at_the_size_of_the_rows_it_stands_for():
    module = LensAttention(256, 4, latent=43)
    init_weights(module, 0)
    product = module.c_up.weight @ module.c_latent.weight
    assert product.std().item() == pytest.approx(0.02, rel=0.05)


def test_what_is_the_baselines_starts_as_the_baselines(configuration):
    plain, lens, latent = (dict(GPT(configuration(step)).named_parameters()) for step in ("L0", "L3", "L6"))
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(plain[name], lens[name]) and torch.equal(plain[name][:len(latent[name])], latent[name])
    assert lens["transformer.h.1.attn.column.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def test_the_gates_have_their_own_optimizer_group(configuration):
    cfg = configuration("L3")
    groups = {group["name"]: group["names"] for group in optimizers.build(GPT(cfg), cfg).param_groups}
    assert groups["gate"] == ["transformer.h.0.attn.lens_logits", "transformer.h.1.attn.lens_logits"]


def test_it_compiles_into_one_graph_forward_and_backward():
    module = build()
    x = torch.randn(2, 16, E)
    module(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)(x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)
