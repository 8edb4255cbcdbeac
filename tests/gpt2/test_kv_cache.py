"""Cached decoding equals the full forward pass for any way of cutting a sequence, and bytes are the tensors' own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.kv_cache import KVCache, LayerCache, NoCache, PrunedCache
from gpt2.model import GPT
from lib.config import load
from tests.gpt2.conftest import STEPS

T = 32
PARTS = {"keys", "values", "latents", "queries", "features", "index"}


@pytest.fixture(scope="module", params=STEPS)
def model(request, configuration):
    return GPT(configuration(request.param)).eval()


@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(1, T - 1), max_size=6, unique=True), batch=st.sampled_from([1, 4]))
def test_decoding_in_any_chunks_equals_the_full_forward(model, cuts, batch):
    x = torch.randint(256, (batch, T), generator=torch.Generator().manual_seed(1))
    borders = [0, *sorted(cuts), T]
    cache = model.new_cache(batch)
    with torch.no_grad():
        parts = [model(x[:, a:b], cache=cache)[0] for a, b in zip(borders, borders[1:], strict=False)]
        torch.testing.assert_close(torch.cat(parts, 1), model(x)[0], rtol=0, atol=1e-5)
    assert cache.length == T


def test_a_full_cache_refuses_more(model):
    cache = model.new_cache(1, capacity=4)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="the cache holds 4 positions, 5 were asked for"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_bytes_are_counted_from_the_tensors(model):
    cache = model.new_cache(3, capacity=8, dtype=torch.bfloat16)
    held = [t for layer in cache.layers for t in layer.__dict__.values() if isinstance(t, torch.Tensor)]
    assert cache.nbytes() == sum(t.untyped_storage().nbytes() for t in held)
    parts = cache.parts()
    assert sum(parts.values()) == cache.nbytes() and all(parts.values()) and parts.keys() <= PARTS
    attention = model.transformer.h[0].attn
    if type(attention).__name__ in ("CausalSelfAttention", "UnifiedRAttention", "WalkAttention") and not attention.pruning:
        assert cache.nbytes() == 2 * 2 * 3 * 8 * 128 * 2


def test_36_mib_at_full_size():
    with torch.device("meta"):
        cache = GPT(load("gpt2-ra-ablation", "V1")).new_cache(1, dtype=torch.bfloat16)
    assert cache.nbytes() == 36 * 2 ** 20


@pytest.mark.parametrize("step, parts", [
    ("V0", {"keys": 18, "values": 18}), ("KT1", {"keys": 18}), ("MLA0", {"latents": 6}), ("L6", {"latents": 3, "queries": 18}),
    ("G2M2", {"latents": 6, "queries": 18 / 16, "features": 3})])
def test_mib_by_what_they_hold_at_full_size(step, parts):
    with torch.device("meta"):
        cache = GPT(load("gpt2-ra-ablation", step)).new_cache(1, dtype=torch.bfloat16)
    assert {name: size / 2 ** 20 for name, size in cache.parts().items()} == parts


@pytest.mark.parametrize("values_only", [False, True])
def test_a_pruned_cache_holds_what_was_retained_in_order(values_only):
    """By sequence and head; values_only leaves the keys where they are."""
    cache = PrunedCache(2, 2, 9, 3, torch.float32, "cpu", value_dim=4, keep=5, values_only=values_only)
    keys, values = torch.randn(2, 2, 9, 3), torch.randn(2, 2, 9, 4)
    cache.append(keys[:, :, :5], values[:, :, :5])
    cache.importance += torch.arange(5)
    slots = torch.tensor([[[0, 2, 4], [1, 2, 3]], [[2, 3, 4], [0, 1, 2]]])
    cache.retain(slots)
    cache.append(keys[:, :, 5:7], values[:, :, 5:7])
    where = torch.cat([slots, torch.tensor([5, 6]).expand(2, 2, 2)], 2)
    assert cache.position.tolist() == where.tolist() and (cache.length, cache.filled) == (7, 5)
    assert torch.equal(cache.values, values.gather(2, where[..., None].expand(-1, -1, -1, 4)))
    assert torch.equal(cache.importance[:, :, :3], slots.float()) and not cache.importance[:, :, 3:].any()
    if values_only:
        assert torch.equal(cache.keys[:, :, :7], keys[:, :, :7])
    else:
        assert torch.equal(cache.keys, keys.gather(2, where[..., None].expand(-1, -1, -1, 3)))


def test_bytes_of_a_pruned_cache_by_what_they_are_for():
    cache = PrunedCache(2, 2, 9, 3, torch.bfloat16, "cpu", value_dim=4, keep=5)
    assert cache.parts() == {"keys": 4 * 5 * 3 * 2, "values": 4 * 5 * 4 * 2, "index": 4 * 5 * (2 + 4)}
    full = LayerCache(2, 2, 9, 3, torch.bfloat16, "cpu", value_dim=4)
    assert full.parts() == {"keys": 4 * 9 * 3 * 2, "values": 4 * 9 * 4 * 2} and NoCache().parts() == {}
    whole = KVCache([cache, NoCache(), full])
    assert whole.parts() == {"keys": 120 + 216, "values": 160 + 288, "index": 120}
