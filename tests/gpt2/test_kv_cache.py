"""Cached decoding equals the full forward pass for any way of cutting a sequence, and bytes are the tensors' own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.model import GPT
from lib.config import load
from tests.gpt2.conftest import STEPS

T = 32


@pytest.fixture(scope="module", params=STEPS)
def model(request, configuration):
    return GPT(configuration(request.param)).eval()


@settings(max_examples=12, deadline=None)
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
    if type(model.transformer.h[0].attn).__name__ in ("CausalSelfAttention", "UnifiedRAttention", "WalkAttention"):
        assert cache.nbytes() == 2 * 2 * 3 * 8 * 128 * 2


def test_36_mib_at_full_size():
    with torch.device("meta"):
        cache = GPT(load("gpt2-ra-ablation", "V1")).new_cache(1, dtype=torch.bfloat16)
    assert cache.nbytes() == 36 * 2 ** 20


