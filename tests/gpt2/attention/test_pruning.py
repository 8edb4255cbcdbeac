"""KV pruning: the rule written out token by token, gradients, past only, decoding, slots and bytes, the learned share."""

import copy
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.attention import pruning_op
from gpt2.attention.pruning import KVPruning
from gpt2.attention.pruning_op import pruned_attention, ranks
from gpt2.block import Block
from gpt2.function_class import key
from gpt2.kv_cache import KVCache, LayerCache, PrunedCache
from gpt2.model import GPT
from lib import optimizers
from lib.config import load
from lib.mechanisms import Mechanisms
from lib.report.caches import savings
from tests.gpu import needs_gpu

B, H, D, T, KEEP, BLOCK = 2, 3, 5, 40, 15, 3  # the last block is shorter
SCALE = D ** -0.5
MODES = pytest.mark.parametrize("values_only", [False, True], ids=["kv", "v"])


def build(values_only=False, context=T, keep=KEEP, block=BLOCK, **options):
    return KVPruning(context, keep, block, values_only, **options).eval()


def inputs(dtype=torch.float64, rows=B, tokens=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn(rows, H, tokens, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def written_out(q, k, v, values_only, keep=KEEP, block=BLOCK):
    """One sequence and head, token by token: the output [T, D], and the token before which each is dropped (T: never)."""
    T = q.size(0)
    living, death, out, seen = set(), [T] * T, torch.zeros_like(v), {}
    for t in range(T):
        if t % block == 0 and t + block > keep:
            importance = {j: sum(p[j] * (i + 1) for i, p in seen.items() if j in p) / (t - j) for j in living}
            recent = [j for j in living if j >= t - block]
            others = sorted((j for j in living if j < t - block), key=lambda j: -importance[j])
            kept = set(recent + others[:keep - block - len(recent)])
            for j in living - kept:
                death[j] = t
            living = kept
        living.add(t)
        among = sorted(range(t + 1) if values_only else living)
        scores = [(q[t] * k[j]).sum().item() * SCALE for j in among]
        largest = max(scores)
        total = sum(math.exp(s - largest) for s in scores)
        seen[t] = {j: math.exp(s - largest) / total for j, s in zip(among, scores, strict=True)}
        for j in living:
            out[t] += seen[t][j] * v[j]
    return out, death


def of_all(q, k, v, values_only, **sizes):
    found = [[written_out(*(x[n, h] for x in (q, k, v)), values_only, **sizes) for h in range(H)] for n in range(len(q))]
    return (torch.stack([torch.stack([out for out, _ in heads]) for heads in found]),
            torch.tensor([[death for _, death in heads] for heads in found]))


def deaths(log_weight, first, block=BLOCK, tokens=T):
    """The first row of the first block that sees a token dropped, from the operator's log w."""
    gone = log_weight == -math.inf
    where = first + block * gone.int().argmax(2)
    return torch.where(gone.any(2), where, tokens)


@MODES
@torch.no_grad()
def test_the_rule_written_out(values_only):
    q, k, v = inputs()
    expected, death = of_all(q, k, v, values_only)
    module = build(values_only)
    for training in (False, True):
        torch.testing.assert_close(module.train(training)(q, k, v, scale=SCALE), expected, rtol=0, atol=1e-12)
    limit, seed = torch.tensor(KEEP - 2 * BLOCK, dtype=q.dtype), torch.tensor(0)
    _, log_weight, _ = pruned_attention(q, k, v, limit, seed, 15, BLOCK, SCALE, 0.0, values_only, False)
    assert torch.equal(deaths(log_weight, 15), death)
    assert len({tuple(row) for row in death.flatten(0, 1).tolist()}) == B * H, "by sequence and head"
    assert ((death == T).sum(2) == KEEP - BLOCK + 1).all(), "12 live on at the last border, 39, and one token comes after it"


@MODES
@pytest.mark.parametrize("keep, block", [(6, 3), (7, 3), (8, 2), (39, 13), (39, 1), (25, 4)])
@torch.no_grad()
def test_the_rule_at_other_sizes(values_only, keep, block):
    q, k, v = inputs(rows=1)
    for tokens in (1, block, keep, T):
        part = [x[:, :, :tokens] for x in (q, k, v)]
        found = build(values_only, keep=keep, block=block)(*part, scale=SCALE)
        torch.testing.assert_close(found, of_all(*part, values_only, keep=keep, block=block)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_before_the_first_drop_it_is_attention_and_after_it_is_not():
    q, k, v = inputs()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    for values_only in (False, True):
        moved = (build(values_only)(q, k, v, scale=SCALE) - plain).abs().amax((0, 1, 3))
        assert moved[:15].max() < 1e-12 and moved[15:].max() > 0.1  # at 12 the 3 tokens to come still fit


@pytest.mark.parametrize("soft, dropout", [(False, 0.0), (False, 0.3), (True, 0.3)])
@MODES
def test_gradients_are_those_of_finite_differences(values_only, dropout, soft):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 11, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    limit = torch.tensor(2.3, dtype=torch.float64, requires_grad=soft)

    def attended(*args):
        return pruned_attention(*args, torch.tensor(5), 4, 2, SCALE, dropout, values_only, soft)[0]
    with torch.no_grad():
        assert not torch.equal(attended(q, k, v, limit), attended(q, k, v, limit + 2)), "something is dropped"
    assert torch.autograd.gradcheck(attended, (q, k, v, limit), atol=1e-7)


@needs_gpu
@MODES
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("tokens, keep, block, width", [(1024, 391, 64, 64), (200, 90, 13, 24), (96, 40, 7, 128),
                                                        (600, 391, 128, 64), (300, 120, 32, 128)])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_kernels_say_what_operations_do(values_only, soft, tokens, keep, block, width, half, monkeypatch):
    """Of numbers of two bytes, held to operations on the same numbers in float32: no further from them than operations in
    two bytes are, or little, and the same bits each time."""
    def passed(dtype, kernels):
        generator = torch.Generator("cuda").manual_seed(0)
        q, k, v, g = ((1.5 * torch.randn(2, tokens, 3, width, generator=generator, device="cuda")).to(half).to(dtype)
                      .transpose(1, 2) for _ in range(4))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        limit = torch.tensor(keep - 2.0 * block, device="cuda", requires_grad=soft)
        first = 2 * block if soft else ((keep - block) // block + 1) * block
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(pruning_op, "in_kernels", lambda *_: False)
            y, log_weight, level = pruned_attention(q, k, v, limit, torch.tensor(0), first, block, width ** -0.5, 0.0,
                                                    values_only, soft)
            y.backward(g[:, :, first:])
        assert (level.numel() > 0) == kernels
        return [x.float() for x in (y, q.grad, k.grad, v.grad, *([limit.grad] if soft else []))], log_weight
    (exact, decided), (plain, _), (found, ours), (again, _) = (
        passed(dtype, kernels) for dtype, kernels in ((torch.float32, False), (half, False), (half, True), (half, True)))
    if not soft:
        assert ((decided == 0) == (ours == 0)).float().mean() > 0.99, "two that are about equal may change places"
    for a, b, c, d in zip(exact, plain, found, again, strict=True):
        assert torch.equal(c, d) and (c - a).norm() <= 1.5 * (b - a).norm() + 1e-3 * a.norm()


@needs_gpu
@MODES
@pytest.mark.parametrize("soft", [False, True])
@torch.no_grad()
def test_the_kernels_see_no_later_token_and_say_in_float32_what_operations_do(values_only, soft, monkeypatch):
    tokens, keep, block = 300, 120, 16
    q, k, v = (x.cuda() for x in inputs(torch.float32, tokens=tokens))
    limit, first = torch.tensor(keep - 2.0 * block, device="cuda"), 2 * block
    arguments = limit, torch.tensor(0), first, block, SCALE, 0.0, values_only, soft
    y, log_weight, level = pruned_attention(q, k, v, *arguments)
    assert level.numel() and (soft or (log_weight < 0).any())
    for border in (70, 161, 299):
        later = [torch.cat([x[:, :, :border], -2 * x[:, :, border:]], 2) for x in (q, k, v)]
        assert torch.equal(pruned_attention(*later, *arguments)[0][:, :, :border - first], y[:, :, :border - first])
    monkeypatch.setattr(pruning_op, "in_kernels", lambda *_: False)
    plain, decided, _ = pruned_attention(q, k, v, *arguments)
    torch.testing.assert_close(y, plain, rtol=0, atol=2e-5)
    torch.testing.assert_close(log_weight, decided, rtol=0, atol=1e-3)


@MODES
@pytest.mark.parametrize("soft", [False, True])
def test_the_operator_is_what_the_compiler_is_told(values_only, soft):
    q, k, v = (x.requires_grad_() for x in inputs(torch.float32))
    limit = torch.tensor(8.7, requires_grad=soft)
    torch.library.opcheck(pruned_attention, (q, k, v, limit, torch.tensor(1), 15, BLOCK, SCALE, 0.1, values_only, soft),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    y, log_weight, level = pruned_attention(q, k, v, limit, torch.tensor(1), 15, BLOCK, SCALE, 0.0, values_only, soft)
    assert y.requires_grad and not log_weight.requires_grad and not level.requires_grad


@MODES
@pytest.mark.parametrize("learned", [None, 0.4])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_token_never_changes_what_was_decided_before_it(values_only, learned, training):
    module = build(values_only, learned=learned).train(training)
    q, k, v = inputs()
    for t in (1, 14, 15, 22, 33):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[0, :, t:] = 3 * torch.randn_like(x[0, :, t:])
        found = []
        for part in ((q, k, v), others):
            torch.manual_seed(0)
            found.append(module(*part, scale=SCALE, dropout=0.2))
        assert torch.equal(found[0][0, :, :t], found[1][0, :, :t]) and torch.equal(found[0][1:], found[1][1:])
        assert not torch.equal(found[0][0, :, t:], found[1][0, :, t:])


def chunks(size):
    return [size] * (T // size) + [T % size] * (T % size > 0)


@MODES
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_decoding_equals_the_full_pass(values_only, rows, dtype, tolerance):
    """Every prefix length, then the rest; and chunks of 1, 3 and 17."""
    q, k, v = inputs(dtype, rows)
    module = build(values_only)
    full = module(q, k, v, scale=SCALE)
    for sizes in ([[prefix, T - prefix] for prefix in range(1, T)] + [chunks(n) for n in (1, 3, 17)]):
        cache = module.new_cache(rows, H, T, D, dtype, "cpu")
        parts = [module(*part, cache, scale=SCALE) for part in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)]
        torch.testing.assert_close(torch.cat(parts, 2), full, rtol=0, atol=tolerance)
        assert all(part.dtype == dtype for part in parts) and cache.importance.dtype == dtype


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(1, T - 1), max_size=8, unique=True), values_only=st.booleans(), keep=st.integers(6, T - 1),
       capacity=st.integers(1, T))
@torch.no_grad()
def test_never_more_than_k_slots_are_taken_and_they_are_of_the_living(cuts, values_only, keep, capacity):
    q, k, v = inputs(rows=1)
    module, deaths = build(values_only, keep=keep), of_all(q, k, v, values_only, keep=keep)[1] if len(cuts) == 1 else None
    cache = module.new_cache(1, H, capacity, D, q.dtype, "cpu")
    assert {t.size(2) for t in cache.tensors()[values_only:]} == {min(keep, capacity)}
    borders = [0, *sorted(cut for cut in cuts if cut < capacity), capacity]
    for a, b in zip(borders, borders[1:], strict=False):
        module(*(x[:, :, a:b] for x in (q, k, v)), cache, scale=SCALE)
        assert cache.filled <= min(keep, capacity) and cache.length == b
        held = cache.position[:, :, :cache.filled].long()
        assert (held.diff(dim=2) > 0).all() and (held[..., -1] == b - 1).all() and held.shape[:2] == (1, H)
        assert torch.equal(cache.values[:, :, :cache.filled], v.gather(2, held[..., None].expand(-1, -1, -1, D)))
        if deaths is not None:
            assert held.tolist() == [[[j for j in range(b) if deaths[0, h, j] >= b] for h in range(H)]]
    with pytest.raises(ValueError, match=f"the cache holds {capacity} positions, {capacity + 1} were asked for"):
        module(*(x[:, :, :1] for x in (q, k, v)), cache, scale=SCALE)


@MODES
@torch.no_grad()
def test_values_are_stored_in_the_channels_of_a_codec(values_only):
    """A codec that loses something: what is attended over is what comes back, cached or not."""
    basis = torch.linalg.qr(torch.randn(D, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]

    class Codec:
        width = 2

        def compress(self, v):
            return v @ basis

        def decompress(self, c):
            return c @ basis.T

        def __call__(self, v):
            return self.decompress(self.compress(v))
    q, k, v = inputs()
    module, codec = build(values_only), Codec()
    full = module(q, k, v, scale=SCALE, codec=codec)
    torch.testing.assert_close(full, of_all(q, k, codec(v), values_only)[0], rtol=0, atol=1e-12)
    cache = module.new_cache(B, H, T, D, q.dtype, "cpu", value_dim=D, codec=codec)
    assert cache.values.shape == (B, H, KEEP, 2)
    parts = [module(*part, cache, scale=SCALE, codec=codec) for part in zip(*(x.split(7, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 2), full, rtol=0, atol=1e-12)


def test_of_equals_the_earlier_one_lives_and_the_dead_come_last():
    sums = torch.tensor([[[4.0, 3.0, 2.0, 9.0, 1.0, 0.0]]])  # over t - j = 8 7 6 5 4 3
    assert ranks(sums[..., [0, 0, 0]] * torch.tensor([8.0, 7, 6]), torch.arange(3), 8).tolist() == [[[0, 1, 2]]]
    assert ranks(sums, torch.arange(6), 8).tolist() == [[[1, 2, 3, 0, 4, 5]]]
    living = torch.tensor([[[True, True, True, False, True, True]]])
    assert ranks(sums, torch.arange(6), 8, living).tolist() == [[[0, 1, 2, 5, 3, 4]]]
    assert ranks(sums, torch.arange(6, dtype=torch.int16).expand(1, 1, 6), 8, living).tolist() == [[[0, 1, 2, 5, 3, 4]]]


@MODES
def test_what_is_kept_for_the_backward_pass_grows_with_the_context_and_not_with_its_square(values_only):
    def kept(tokens, learned):
        module = build(values_only, tokens, tokens * 3 // 8, tokens // 16, learned=learned).train()
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(*(x.requires_grad_() for x in inputs(torch.float32, 1, tokens)), scale=SCALE)
        out.sum().backward()
        return sum(found.values())
    for learned in (None, 0.375):
        small, large = kept(256, learned), kept(512, learned)
        assert large < 2.1 * small and large < 0.2 * (H * 512 * 512 * 4), "the weights alone would be 4 times as many bytes"


@MODES
def test_dropout_is_of_the_weights_and_anew_each_time(values_only):
    q, k, v = inputs(torch.float32, 1)
    module = build(values_only).train()
    torch.manual_seed(0)
    once = module(q, k, v, scale=SCALE, dropout=0.5)
    assert not torch.equal(once, module(q, k, v, scale=SCALE, dropout=0.5))
    torch.manual_seed(0)
    assert torch.equal(once, module(q, k, v, scale=SCALE, dropout=0.5))
    many = module(*(x.expand(2000, -1, -1, -1) for x in (q, k, v)), scale=SCALE, dropout=0.5).mean(0)
    assert (many - module(q, k, v, scale=SCALE)[0]).abs().max() < 0.3 and (many - once[0]).abs().max() > 1


# Learned share

def test_the_share_learns_towards_its_start_and_through_the_threshold(configuration):
    cfg = configuration("V15")
    model = GPT(cfg)
    parts = [block.attn.pruning for block in model.transformer.h]
    assert [p.share().item() for p in parts] == [pytest.approx(0.382, abs=1e-6)] * 2
    assert Mechanisms(model).statistics()["kv_keep_ratio"] == pytest.approx(0.382, abs=1e-6)
    x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    model.train()(x, x)[1].backward()
    assert all(p.share_logit.grad.abs() > 1e-8 for p in parts)
    groups = {g["name"]: g for g in optimizers.build(model, cfg).param_groups}
    assert set(groups["structure"]["names"]) == {f"transformer.h.{n}.attn.pruning.share_logit" for n in range(2)}
    assert Mechanisms(model).penalty().item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        parts[0].share_logit.add_(1.0)
    share = parts[0].share().item()
    assert share > 0.6 and Mechanisms(model).penalty().item() == pytest.approx((share - 0.382) ** 2 / 2)
    assert GPT(configuration("V14")).transformer.h[0].attn.pruning.stats() == {} and parts[0].sizes()["kv_keep"] == 12


@MODES
@torch.no_grad()
def test_the_soft_rule_is_the_hard_one_in_the_limit(values_only, monkeypatch):
    q, k, v = inputs()
    module = build(values_only, learned=KEEP / T)
    hard = build(values_only)(q, k, v, scale=SCALE)
    torch.testing.assert_close(module(q, k, v, scale=SCALE), hard, rtol=0, atol=1e-12)  # in evaluation it is that
    off = []
    for softness in (1.0, 1 / 8, 1e-4):
        monkeypatch.setattr(pruning_op, "SOFTNESS", softness)
        off.append((module.train()(q, k, v, scale=SCALE) - hard).abs().max().item())
    assert off[0] > off[1] > 1e-2 and off[2] < 1e-10


@MODES
@torch.no_grad()
def test_evaluation_and_decoding_follow_the_share_as_it_is(values_only):
    q, k, v = inputs()
    module = build(values_only, learned=KEEP / T)
    for share, keep in ((0.5, 20), (0.03, 2 * BLOCK), (0.95, 38), (0.999, T)):
        module.share_logit.fill_(math.log(share / (1 - share)))
        full = module(q, k, v, scale=SCALE)
        torch.testing.assert_close(full, of_all(q, k, v, values_only, keep=keep)[0], rtol=0, atol=1e-12)
        cache = module.new_cache(B, H, T, D, q.dtype, "cpu")
        assert cache.keep == cache.values.size(2) == keep
        parts = [module(*part, cache, scale=SCALE) for part in zip(*(x.split(7, 2) for x in (q, k, v)), strict=True)]
        torch.testing.assert_close(torch.cat(parts, 2), full, rtol=0, atol=1e-12)


# In the model

@pytest.mark.parametrize("symbol", ["KV_PRUNING_KV", "KV_PRUNING_V"])
@torch.no_grad()
def test_with_a_slot_for_every_token_it_is_the_baseline(configuration, symbol):
    plain, x = GPT(configuration("V0")).eval(), torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    model = GPT(configuration("V0", **{symbol: True}, KV_KEEP_RATIO=32)).eval()
    assert torch.equal(model(x)[0], plain(x)[0]) and type(model.new_cache(1).layers[0]) is LayerCache
    assert model.new_cache(1).nbytes() == plain.new_cache(1).nbytes()
    nearly = GPT(configuration("V0", **{symbol: True}, KV_KEEP_RATIO=31)).eval()
    moved = (nearly(x)[0] - plain(x)[0]).abs().amax((0, 2))
    assert moved[:30].max() <= 1e-5 < moved[30:].max()


@torch.no_grad()
def test_what_simplifies_an_attention_leaves_it_its_pruning(configuration):
    x = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(1))
    for step in ("V14", "M3"):
        model = GPT(configuration(step)).eval()
        simple, before = model.collapse(), model(x)[0]
        for mine, its in zip(model.transformer.h, simple.transformer.h, strict=True):
            assert type(its.attn.pruning) is KVPruning and its.attn.pruning is not mine.attn.pruning
        torch.testing.assert_close(simple(x)[0], before, rtol=0, atol=2e-5)
        baked = copy.deepcopy(model).bake()
        assert baked.transformer.h[0].attn.pruning is not None
        torch.testing.assert_close(baked(x)[0], before, rtol=0, atol=2e-5)


def test_function_classes(configuration):
    keys = {step: key(configuration(step)) for step in ("V0", "V14", "V15", "V17", "V18", "V19", "M2", "M3")}
    assert keys["V14"] == keys["V17"] and keys["V15"] == keys["V18"]
    assert len({keys[step] for step in ("V0", "V14", "V15", "V19", "M2", "M3")}) == 6
    assert all(relation == "equal" for _, relation in keys.values())


def test_the_model_compiles_without_a_break(configuration):
    model = GPT(configuration("V15", GPT2_N_LAYER=1, MODEL_CUSTOM=True, GPT2_N_EMBD=32, GPT2_N_HEAD=2)).train()
    x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for program in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(0)
        loss = program(x, x)[1]
        loss.backward()
        losses.append((loss.item(), model.transformer.h[0].attn.pruning.share_logit.grad.item()))
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[1][1] != 0  # each draws its own dropout


@MODES
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_bfloat16_cache_decodes_to_its_precision(values_only, autocast):
    """Before the first drop: after it, one of two tokens that are about equal may be another."""
    q, k, v = (x[:, :, :15] for x in inputs(torch.float32))
    module = build(values_only)
    cache = module.new_cache(B, H, T, D, torch.bfloat16, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = [module(*part, cache, scale=SCALE) for part in zip(*(x.split(6, 2) for x in (q, k, v)), strict=True)]
    parts, full = torch.cat(parts, 2), module(q, k, v, scale=SCALE)
    assert (parts - full).float().norm() < 0.02 * full.norm() and cache.importance.dtype == torch.float32


def test_flops_are_counted():
    """M3's skip gates compare them: those of the operator are of the size of the attention that they replace."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for module in (build(), None):
        q, k, v = (x.requires_grad_() for x in inputs(torch.float32))
        with FlopCounterMode(display=False) as counter:
            y = module(q, k, v, scale=SCALE) if module else ((q @ k.mT).tril().softmax(-1) @ v)
            y.sum().backward()
        counts[module is None] = counter.get_total_flops()
    assert 0.5 < counts[False] / counts[True] < 1.2


# Sizes

SAVED = {None: ("61.8", "60.0", "30"), 32: ("80.9", "79.1", "40"), 16: ("90.5", "88.7", "44"), 8: ("95.2", "93.4", "47")}


@pytest.mark.parametrize("k", SAVED)
def test_shares_saved_at_full_size(k):
    codec, sizes = k and SimpleNamespace(width=k), (1, 12, 1024, 64, torch.bfloat16, "meta")
    pruning = KVPruning(1024, 391, 64, values_only=True)
    small, full = KVCache([pruning.new_cache(*sizes, codec=codec)] * 12), KVCache([LayerCache(*sizes)] * 12)
    found = savings(small.parts(), full.parts())
    assert tuple(f"{100 * share:.{places}f}" for share, places in zip(found.values(), (1, 1, 0), strict=True)) == SAVED[k]
    symbols = {} if k is None else {"KVSPLICE": True, "KVSPLICE_K": k}
    cfg = load("gpt2-ra-ablation", "V19", symbols)
    assert small.nbytes() == 12 * 1024 * Block.cache_bytes_per_token(cfg, 2) and full.nbytes() == 36 * 2 ** 20


@pytest.mark.parametrize("step, symbols, expected", [
    ("V14", {}, Fraction(12 * 391 * (2 * 128 + 6), 1024)), ("M3", {}, Fraction(12 * 391 * (2 * 128 + 6), 1024)),
    ("V14", {"KVSPLICE": True, "KVSPLICE_K": 16}, Fraction(12 * 391 * (2 * 80 + 6), 1024)),
    ("V14", {"KV_KEEP_RATIO": 1024}, 4 * 768),
    ("V19", {"KV_KEEP_RATIO": 2000, "KVSPLICE": True, "KVSPLICE_K": 16}, 2 * 12 * 80),
    ("V0", {"KVSPLICE": True, "KVSPLICE_K": 16}, 2 * 12 * 80), ("V0", {}, 4 * 768),
])
def test_cache_bytes_in_closed_form(step, symbols, expected):
    assert Block.cache_bytes_per_token(load("gpt2-ra-ablation", step, symbols), 2) == expected


def test_positions_need_two_bytes_up_to_32768_tokens():
    def position(capacity):
        return PrunedCache(1, 1, capacity, 1, torch.float32, "meta", keep=2).position.dtype
    assert (position(2 ** 15), position(2 ** 15 + 1)) == (torch.int16, torch.int32)


def test_ratios_are_resolved_once():
    module = KVPruning.from_config(load("gpt2-ra-ablation", "V19"))
    assert (module.start_keep, module.block, module.context, module.values_only) == (391, 64, 1024, True)
    assert module.sizes() == {"kv_keep": 391, "kv_block": 64} and module.share_logit is None
    absolute = KVPruning.from_config(load("gpt2-ra-ablation", "V18", {"KV_KEEP_RATIO": 512, "KV_KEEP_PENALTY": 6.0}))
    assert absolute.share().item() == pytest.approx(0.5) and (absolute.strength, absolute.values_only) == (0.5, False)


@pytest.mark.parametrize("keep, block", [(5, 3), (T, 3), (T + 1, 3)])
def test_sizes_that_do_not_fit_are_refused(keep, block):
    with pytest.raises(ValueError, match=f"keep {keep} must be at least twice the block 3 and below the context 40"):
        KVPruning(T, keep, block)
