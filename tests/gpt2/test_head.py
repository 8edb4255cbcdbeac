"""The loss in chunks: the plain loss and its gradients, whatever the chunks, and no logits kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.head import IGNORED, linear_cross_entropy
from gpt2.model import GPT
from lib.config import load

TINY = "gpt2-ra-ablation+tiny"


def example(rows, vocabulary=17, width=6, seed=0, dtype=torch.float64, ignored=()):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_() for n in (rows, vocabulary))
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[list(ignored)] = IGNORED
    return x, weight, targets


def results(loss, x, weight, scale=1.0):
    return (loss.detach(), *torch.autograd.grad(loss * scale, (x, weight)))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), chunks=st.integers(1, 64), seed=st.integers(0, 99), data=st.data())
def test_it_is_the_plain_loss_in_any_number_of_chunks(rows, chunks, seed, data):
    ignored = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    x, weight, targets = example(rows, seed=seed, ignored=ignored)
    plain = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED)
    found = linear_cross_entropy(x, weight, targets, chunks)
    for a, b in zip(results(found, x, weight, 0.25), results(plain, x, weight, 0.25), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, chunks), plain, rtol=1e-12, atol=0)


def test_large_logits_stay_finite():
    x, weight, targets = example(8, dtype=torch.float32)
    loss = linear_cross_entropy(1000 * x, weight, targets, 3)
    assert all(torch.isfinite(t).all() for t in results(loss, x, weight))


def test_under_autocast_products_are_in_bfloat16_and_gradients_in_the_type_of_what_they_are_of():
    x, weight, targets = example(64, 128, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORED)
        found = linear_cross_entropy(x, weight, targets, 4)
    assert found.dtype == torch.float32
    exact = results(F.cross_entropy(x @ weight.T, targets), x, weight)
    for own, usual, true in zip(results(found, x, weight), results(plain, x, weight), exact, strict=True):
        assert own.dtype == true.dtype
        assert (own - true).norm() <= 1.1 * (usual - true).norm() < 0.02 * true.norm(), "no further off than plain autocast"


def saved_bytes(call):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.numel() * t.element_size()) or t, lambda t: t):
        call()
    return sum(found)


def test_no_logits_wait_for_the_backward_pass():
    x, weight, targets = example(256, 512, 8)
    logits = 8 * 256 * 512
    assert saved_bytes(lambda: F.cross_entropy(x @ weight.T, targets)) > logits
    assert saved_bytes(lambda: linear_cross_entropy(x, weight, targets, 4)) < logits / 10


def test_it_is_one_graph_for_a_compiler():
    x, weight, targets = example(12)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=False)
    for a, b in zip(results(compiled(x, weight, targets, 3), x, weight), results(linear_cross_entropy(
            x, weight, targets, 3), x, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("step", ["V0", "V2"])
def test_a_model_in_chunks_trains_as_one_without(step):
    one, many = (GPT(load(TINY, step, {"LOSS_CHUNKS": n})) for n in (1, 5))
    idx = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    logits, loss = one(idx[:, :-1], idx[:, 1:])
    none, found = many(idx[:, :-1], idx[:, 1:])
    assert none is None and logits.shape == (2, 16, 256)
    torch.testing.assert_close(found, loss)
    loss.backward()
    found.backward()
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert many(idx)[0].shape == (2, 17, 256), "logits are there where they are asked for"


def test_blocks_that_are_compiled_share_one_program(monkeypatch):
    """Also of layers that differ in nothing but weights and gates; what follows them is another."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, backend="eager", **options))
    idx = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    for step in ("V0", "V1"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        plain, model = (GPT(load(TINY, step)) for _ in range(2))
        model.compile_regions()
        torch.testing.assert_close(model(idx[:, :-1], idx[:, 1:])[1], plain(idx[:, :-1], idx[:, 1:])[1])
        assert len(model.transformer.h) == 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()
