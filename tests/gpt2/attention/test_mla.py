"""Multi-head latent attention, token latent and learned KVSplice: formulas, absorbed against expanded, what a cache holds."""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.learned_kvsplice import LearnedKVSplice
from gpt2.attention.mla import MultiHeadLatentAttention
from gpt2.attention.token_latent import TokenLatentAttention
from gpt2.function_class import key
from gpt2.kv_cache import TokenCache
from gpt2.laws import Subject, broken_laws
from gpt2.layers import init_weights
from gpt2.model import GPT
from lib import optimizers
from lib.config import load
from lib.mechanisms import Mechanisms, Moment

E, H, D, L, K = 64, 4, 16, 24, 12
STEPS = ("MLA0", "MLAKV0", "RAMLA0", "RAMLAKV0")
# How a module can stand: (its class, the direction it is given, the logit, whether it is decided)
KINDS = {"mla": (MultiHeadLatentAttention, None, None, False), "standard": (TokenLatentAttention, False, None, False),
         "reciprocal": (TokenLatentAttention, True, None, False), "undecided": (TokenLatentAttention, None, -0.4, False),
         "undecided reciprocal": (TokenLatentAttention, None, 0.4, False),
         "decided reciprocal": (TokenLatentAttention, None, 0.4, True)}


def build(kind="mla", splice=False, bias=True, dropout=0.0, dtype=torch.float32):
    """A module with random weights, biases, scales and shifts, large enough that what is left out is seen."""
    cls, reciprocal, logit, decided = KINDS[kind]
    options = {} if cls is MultiHeadLatentAttention else {"reciprocal": reciprocal}
    module = cls(E, H, L, dropout, bias, kvsplice=LearnedKVSplice(L, K, bias, seed=3) if splice else None, **options)
    torch.manual_seed(0)
    init_weights(module, 0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias") or name.startswith("kvsplice.s"):
                p.normal_()
        for layer in (module.c_latent, *([module.c_attn] if kind == "mla" else [])):
            layer.weight.mul_(5)  # or attention would be nearly uniform
        if logit is not None:
            module.direction.logit.fill_(logit)
    if decided:
        module.direction.decide()
    return module.to(dtype).eval()


def inputs(batch=2, tokens=9, dtype=torch.float32):
    return torch.randn(batch, tokens, E, generator=torch.Generator().manual_seed(1)).to(dtype)


def decoded(module, x, sizes, dtype=None):
    """The outputs for x in chunks, through a cache, and the cache."""
    cache = module.new_cache(x.size(0), x.size(1), dtype or x.dtype, "cpu")
    return torch.cat([module(part, cache) for part in x.split(sizes, 1)], 1), cache


kinds = pytest.mark.parametrize("kind", KINDS)
splices = pytest.mark.parametrize("splice", [False, True])


# The formula

@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@splices
@kinds
def test_the_formula(kind, splice, bias):
    """Written out token by token in float64."""
    m, x = build(kind, splice, bias, dtype=torch.float64), inputs(dtype=torch.float64)
    B, T = x.shape[:2]
    c = x @ m.c_latent.weight.T
    if splice:
        s = m.kvsplice
        scale, shift = torch.log1p(torch.exp(s.scale)), s.shift if bias else 0.0
        c = ((scale * c + shift) @ s.down.T @ s.up.T - shift) / scale
    rows = c @ m.c_up.weight.T + (m.c_up.bias if bias else 0.0)
    if kind == "mla":
        rows = torch.cat([x @ m.c_attn.weight.T + (m.c_attn.bias if bias else 0.0), rows], 2)
    q, k, v = rows.split(E, 2)
    asks, asked = (k, q) if "reciprocal" in kind else (q, k)
    y = torch.zeros_like(x)
    for b, h, i in product(range(B), range(H), range(T)):
        at = slice(h * D, (h + 1) * D)
        weights = [torch.exp(asks[b, i, at] @ asked[b, j, at] / math.sqrt(D)) for j in range(i + 1)]
        y[b, i, at] = sum(w / sum(weights) * v[b, j, at] for j, w in enumerate(weights))
    expected = F.linear(y, m.c_proj.weight, m.c_proj.bias)
    torch.testing.assert_close(m(x), expected, rtol=0, atol=1e-11)
    assert (m(x) - expected.mean(1, keepdim=True)).abs().max() > 1e-2


@torch.no_grad()
@kinds
def test_no_row_depends_on_a_later_token_nor_on_another_row(kind):
    for training in (False, True):
        module, x = build(kind, splice=True, dropout=0.2).train(training), inputs()
        other, found = x.clone(), []
        other[0, 5:] = 9.0
        for one in (x, other):
            torch.manual_seed(0)
            found.append(module(one))
        torch.testing.assert_close(found[0][0, :5], found[1][0, :5], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)
        assert (found[0][0, 5] - found[1][0, 5]).abs().max() > 1e-2


# Decoding

@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3, 17])
@splices
@kinds
def test_absorbed_decoding_equals_the_expanded_pass_after_every_prefix(kind, splice, chunk, batch):
    module, T = build(kind, splice), 20
    x = inputs(batch, T + chunk)
    full = module(x)
    assert full.abs().max() > 0.05
    for prefix in range(1, T + 1):
        found, _ = decoded(module, x[:, :prefix + chunk], [prefix, chunk])
        torch.testing.assert_close(found, full[:, :prefix + chunk], rtol=0, atol=1e-5)


@torch.no_grad()
@splices
@kinds
def test_decoding_in_any_chunks_equals_the_full_pass(kind, splice):
    module, x = build(kind, splice, bias=False), inputs(4, 30)
    for sizes in ([1] * 30, [9, 1, 1, 17, 2], [30], [1, 29]):
        torch.testing.assert_close(decoded(module, x, sizes)[0], module(x), rtol=0, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
@splices
@kinds
def test_decoding_never_expands_the_prefix(kind, splice, chunk):
    """Nothing as large as the keys, or as the restored latents, of the prefix comes up in a step."""
    module, S = build(kind, splice), 1000
    x, width = inputs(1, S + chunk), K if splice else L
    cache = module.new_cache(1, S + chunk, x.dtype, "cpu")
    module(x[:, :S], cache)
    with Sizes() as seen:
        module(x[:, S:], cache)
    assert (S + chunk) * width <= seen.largest < (S + 2 * chunk) * max(width, H * chunk) < S * E
    with Sizes() as seen:
        module(x)
    assert seen.largest >= S * E, "and it would have been seen"


@torch.no_grad()
@kinds
def test_the_cache_holds_the_latents_and_nothing_is_compressed_twice(kind):
    module, x = build(kind, splice=True), inputs(2, 20)
    _, cache = decoded(module, x, [7, 1, 1, 11])
    c = x @ module.c_latent.weight.T
    s = module.kvsplice
    expected = (F.softplus(s.scale) * c + s.shift) @ s.down.T
    torch.testing.assert_close(cache.vectors, expected, rtol=0, atol=1e-5)
    plain = build(kind)
    torch.testing.assert_close(decoded(plain, x, [7, 13])[1].vectors, x @ plain.c_latent.weight.T, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_does_not_depend_on_the_direction():
    x = inputs(2, 12)
    caches = [decoded(build(kind), x, [5, 7])[1] for kind in KINDS if kind != "mla"]
    assert len(caches) == 5 and all(torch.equal(cache.vectors, caches[0].vectors) for cache in caches)
    assert {cache.vectors.shape for cache in caches} == {(2, 12, L)}


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@splices
@kinds
def test_a_bfloat16_cache_decodes_to_its_precision(kind, splice, autocast):
    module, x = build(kind, splice), inputs(2, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts, full = decoded(module, x, [4, 1, 11], torch.bfloat16)[0], module(x)
    assert (parts - full).float().norm() < 0.03 * full.float().norm()


@torch.no_grad()
@kinds
def test_a_model_in_bfloat16_runs_in_both_forms(kind):
    module, x = build(kind, splice=True), inputs(2, 16)
    expected = module(x)
    found = decoded(module.bfloat16(), x.bfloat16(), [4, 1, 11])[0]
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.05 * expected.norm()


def test_the_cache_of_tokens_says_when_it_is_full():
    cache = TokenCache(2, 5, 3, torch.float32, "cpu")
    stored = torch.randn(2, 4, 3)
    assert torch.equal(cache.append(stored), stored) and cache.append(stored[:, :1]).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="the cache holds 5 positions, 6 were asked for"):
        cache.append(stored[:, :1])
    assert cache.length == 5 and cache.append(stored[:, :0].double()).dtype == torch.float64


# Biases

@torch.no_grad()
@kinds
def test_a_key_bias_is_invisible_in_both_forms_and_every_other_is_not(kind):
    module, x = build(kind), inputs(2, 9)
    before = module(x), decoded(module, x, [4, 5])[0]
    dead = module.dead_elements()["c_up.bias"]
    assert dead == (slice(E, 2 * E) if kind in ("standard", "undecided") else slice(0, E))
    for block in range(module.c_up.out_features // E):
        other = copy.deepcopy(module)
        other.c_up.bias[block * E:(block + 1) * E].add_(1.0)
        after = other(x), decoded(other, x, [4, 5])[0]
        for one, two in zip(before, after, strict=True):
            moved = (one - two).abs().max()
            assert moved < 1e-5 if block * E == dead.start else moved > 1e-3
    assert build(kind, bias=False).dead_elements() == {}


@splices
@kinds
def test_every_entry_learns_from_the_start_on(kind, splice):
    cls, reciprocal, _, _ = KINDS[kind]
    options = {} if cls is MultiHeadLatentAttention else {"reciprocal": reciprocal}
    module = cls(E, H, L, kvsplice=LearnedKVSplice(L, K) if splice else None, **options)
    init_weights(module, 0)
    module(inputs(2, 16)).square().sum().backward()
    dead = module.dead_elements()
    for name, p in module.named_parameters():
        grad = p.grad.clone()
        if name in dead:
            assert grad[dead[name]].abs().max() < 1e-5 * grad.abs().max()
            grad[dead[name]] = 1.0
        assert (grad != 0).all(), name


# Direction

@torch.no_grad()
@splices
def test_a_direction_is_a_renaming_of_rows(splice):
    standard, reciprocal, x = build("standard", splice), build("reciprocal", splice), inputs()
    assert (standard(x) - reciprocal(x)).abs().max() > 1e-2
    for p in (standard.c_up.weight, standard.c_up.bias):
        p.copy_(torch.cat([p[E:2 * E], p[:E], p[2 * E:]]))
    assert torch.equal(standard(x), reciprocal(x))


@pytest.mark.parametrize("training", [False, True])
def test_an_undecided_layer_is_its_likelier_direction_and_its_logit_learns(training):
    """dL/dl = p (1 - p) <dL/dout, R - S>."""
    x, toward = inputs(dtype=torch.float64), torch.randn(2, 9, E, dtype=torch.float64)
    S, R = (build(kind, dtype=torch.float64)(x).detach() for kind in ("standard", "reciprocal"))
    for kind, value in (("undecided", S), ("undecided reciprocal", R)):
        module = build(kind, dtype=torch.float64).train(training)
        out = module(x)
        torch.testing.assert_close(out.detach(), value, rtol=0, atol=1e-12)
        (out * toward).sum().backward()
        p = torch.sigmoid(module.direction.logit.detach())
        torch.testing.assert_close(module.direction.logit.grad, p * (1 - p) * (toward * (R - S)).sum(), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_decided_layer_attends_once_in_both_forms(monkeypatch):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or sdpa(*args, **kwargs))
    for kind, expected in (("undecided", 4), ("decided reciprocal", 2), ("standard", 2), ("mla", 2)):
        calls.clear()
        decoded(build(kind), inputs(), [4, 5])
        assert len(calls) == expected, kind


def test_the_loop_decides_the_directions_of_the_model(configuration):
    model = GPT(configuration("RAMLAKV0", DIRECTION_MIN_STEPS=3))
    directions, loop = [block.attn.direction for block in model.transformer.h], Mechanisms(model)
    with torch.no_grad():
        directions[1].logit.fill_(0.3)
    assert not loop.advance(Moment(2, 0.5)) and loop.inactive() and loop.penalty().item() > 0
    assert loop.advance(Moment(3, 0.5)) and [d.reciprocal for d in directions] == [False, True]
    assert loop.penalty() == 0 and loop.inactive() is None and loop.statistics()["p_recip"] == 0.5
    groups = {g["name"]: g for g in optimizers.build(model, configuration("RAMLAKV0")).param_groups}
    assert groups["structure"]["names"] == [f"transformer.h.{n}.attn.direction.logit" for n in (0, 1)]


@pytest.mark.parametrize("symbol, expected", [("EARLY", [True, False, False]), ("LATE", [False, True, True]),
                                              ("ALL", [True, True, True]), ("LEARNED", [None] * 3)])
def test_the_direction_of_each_layer(configuration, symbol, expected):
    cfg = configuration("RAMLA0", MODEL_CUSTOM=True, GPT2_N_LAYER=3, **{f"DIRECTION_{symbol}": True})
    model = GPT(cfg)
    assert [block.attn.reciprocal for block in model.transformer.h] == expected
    assert ("direction" in model.controllers) == (symbol == "LEARNED")


# Learned KVSplice

@torch.no_grad()
def test_the_pair_starts_orthonormal_and_loses_what_a_projection_loses():
    splice, c = LearnedKVSplice(256, 128, seed=5), torch.randn(4000, 256)
    torch.testing.assert_close(splice.down @ splice.down.T, torch.eye(128), rtol=0, atol=1e-6)
    assert torch.equal(splice.up, splice.down.T)
    back = splice.decompress(splice.compress(c))
    assert ((back - c).norm() / c.norm()).item() == pytest.approx(math.sqrt(1 - 128 / 256), abs=0.01)
    torch.testing.assert_close(splice.decompress(splice.compress(back)), back, rtol=0, atol=1e-5)  # a projection
    assert not torch.equal(LearnedKVSplice(256, 128, seed=6).down, splice.down)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_decompress_undoes_scale_and_shift(bias):
    """With E = C^T, compress(decompress(c')) is c' whatever s and b are; and weights that sum to 1 go through."""
    splice = LearnedKVSplice(L, K, bias, seed=1).double()
    splice.scale.normal_()
    if bias:
        splice.shift.normal_()
    compressed, p = torch.randn(50, K, dtype=torch.float64), torch.rand(7, 50, dtype=torch.float64).softmax(-1)
    again = splice.compress(splice.decompress(compressed))
    torch.testing.assert_close(again, compressed, rtol=0, atol=1e-6)  # the pair is drawn in float32
    torch.testing.assert_close(splice.decompress(p @ compressed), p @ splice.decompress(compressed), rtol=0, atol=1e-12)
    c = torch.randn(50, L, dtype=torch.float64)
    shift = splice.shift if bias else 0.0
    expected = (F.softplus(splice.scale) * c + shift) @ splice.down.T
    torch.testing.assert_close(splice.compress(c), expected, rtol=0, atol=1e-12)
    assert len(list(splice.parameters())) == 3 + bias


@pytest.mark.parametrize("d_compressed", [0, 8, 9])
def test_a_splice_that_does_not_compress_is_refused(d_compressed):
    with pytest.raises(ValueError, match=f"d_compressed {d_compressed} must be at least 1 and below d_in 8"):
        LearnedKVSplice(8, d_compressed)


@torch.no_grad()
@pytest.mark.parametrize("step", ["MLAKV0", "RAMLAKV0"])
def test_the_pair_survives_the_construction_of_a_model(configuration, step):
    """Measured in the model: what is lost is what the pair alone loses, not 99.99 % of it."""
    symbols = {"MODEL_CUSTOM": True, "GPT2_N_LAYER": 2, "GPT2_N_HEAD": 12, "GPT2_N_EMBD": 768}
    model, again = (GPT(configuration(step, **symbols)) for _ in range(2))
    splices = [block.attn.kvsplice for block in model.transformer.h]
    c, expected = torch.randn(2000, 256), math.sqrt(1 - 128 / 256)
    for layer, splice in enumerate(splices):
        assert (splice.d_in, splice.width) == (256, 128) and torch.equal(splice.up, splice.down.T)
        lost = ((splice.decompress(splice.compress(c)) - c).norm() / c.norm()).item()
        assert lost == pytest.approx(expected, abs=0.01)
        assert torch.equal(splice.down, again.transformer.h[layer].attn.kvsplice.down)
    assert not torch.equal(splices[0].down, splices[1].down)
    for other in ({"SEED": 7}, {"STREAMS": 1}):
        elsewhere = GPT(configuration(step, **symbols, **other)).transformer.h[0].attn.kvsplice
        assert not torch.equal(splices[0].down, elsewhere.down)


# Simpler models

@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@kinds
def test_a_spliced_latent_bakes_to_a_smaller_latent(kind, bias):
    module, x = build(kind, splice=True, bias=bias, dtype=torch.float64), inputs(dtype=torch.float64)
    expected = module(x)
    baked = copy.deepcopy(module).bake()
    assert type(baked) is type(module) and baked.kvsplice is None and baked.latent == K and not baked.training
    torch.testing.assert_close(baked(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(decoded(baked, x, [4, 5])[0], expected, rtol=0, atol=1e-12)
    assert baked.new_cache(1, 8, x.dtype, "cpu").vectors.shape == module.new_cache(1, 8, x.dtype, "cpu").vectors.shape
    fresh = type(module)(E, H, K, bias=bias)
    shapes = [{name: p.shape for name, p in m.named_parameters() if "direction" not in name} for m in (baked, fresh)]
    assert shapes[0] == shapes[1], "MLA with a latent of its width, and nothing else"
    plain = build(kind)
    state = copy.deepcopy(plain.state_dict())
    assert plain.bake() is plain and all(torch.equal(p, state[name]) for name, p in plain.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@splices
@kinds
def test_it_collapses_to_the_baseline_with_products_as_weights(kind, splice, bias):
    module, x = build(kind, splice, bias, dtype=torch.float64), inputs(dtype=torch.float64)
    state = copy.deepcopy(module.state_dict())
    plain = module.collapse()
    assert type(plain) is CausalSelfAttention and not plain.training
    torch.testing.assert_close(plain(x), module(x), rtol=0, atol=1e-11)
    rows = plain.c_attn.weight[E:] if kind == "mla" else plain.c_attn.weight
    assert torch.linalg.matrix_rank(rows) == (K if splice else L), "inside the baseline's class, not all of it"
    assert all(torch.equal(p, state[name]) for name, p in module.state_dict().items()), "a copy"


@pytest.mark.parametrize("step", STEPS)
def test_the_steps_obey_the_laws_and_are_inside_gpt2(configuration, step):
    reference = Subject("V0", configuration("V0"))
    assert broken_laws(Subject(step, configuration(step), reference=reference)) == []
    (simple, relation), (plain, _) = key(configuration(step)), key(configuration("V0"))
    assert simple == plain and relation == "inside"
    assert broken_laws(Subject(step, configuration(step, GPT2_BIAS=False))) == []


# Sizes and start

@pytest.mark.parametrize("step, mebibytes, sizes", [
    ("V0", 36, {"head_dim": 64}), ("MLA0", 6, {"head_dim": 64, "latent": 256}), ("RAMLA0", 6, {"head_dim": 64, "latent": 256}),
    ("MLAKV0", 3, {"head_dim": 64, "latent": 256, "kvsplice": 128}),
    ("RAMLAKV0", 3, {"head_dim": 64, "latent": 256, "kvsplice": 128}),
    ("MLA0@MLA_D_LATENT=1/6", 3, {"head_dim": 64, "latent": 128})])
def test_caches_at_gpt2(step, mebibytes, sizes):
    """Counted from the tensors: 12 layers, 1024 tokens, 2 bytes."""
    with torch.device("meta"):
        model = GPT(load("gpt2-ra-ablation", step))
        assert model.new_cache(1, dtype=torch.bfloat16).nbytes() == mebibytes * 2 ** 20
        assert model.new_cache(64, dtype=torch.bfloat16).nbytes() == 64 * mebibytes * 2 ** 20
    assert model.sizes().items() >= sizes.items() and ("kvsplice" in sizes) == ("kvsplice" in model.sizes())


@torch.no_grad()
def test_queries_start_as_the_baselines_and_keys_and_values_of_their_size(configuration):
    symbols = {"MODEL_CUSTOM": True, "GPT2_N_LAYER": 1, "GPT2_N_HEAD": 12, "GPT2_N_EMBD": 768}
    plain, mla, ramla = (GPT(configuration(step, **symbols)).transformer.h[0].attn for step in ("V0", "MLA0", "RAMLA0"))
    assert torch.equal(mla.c_attn.weight, plain.c_attn.weight[:768]) and torch.equal(mla.c_proj.weight, plain.c_proj.weight)
    assert torch.equal(ramla.c_latent.weight, mla.c_latent.weight) and not hasattr(ramla, "c_attn")
    for module in (mla, ramla):
        assert (module.c_up.weight @ module.c_latent.weight).std().item() == pytest.approx(0.02, rel=0.05)
