"""SinkGD: the normalisation against its definition, and one optimizer of two kinds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import load
from lib.optimizers import build
from lib.optimizers.sinkgd import SinkGD, balance
from tests.gpu import DEVICES, needs_gpu
from tests.lib.optimizers.toy import config, gradient, toy, train

SIZES = st.integers(1, 40)


def by_definition(x, iters, ord=2):
    """Algorithm 3 of the paper, word for word, in float64."""
    m, n = x.shape
    x, root = x.double(), 1 / ord
    for _ in range(iters):
        x = n**root * x / torch.linalg.vector_norm(x, ord, 1, keepdim=True)
        x = m**root * x / torch.linalg.vector_norm(x, ord, 0, keepdim=True)
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iters", [1, 2, 5, 30])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (1, 9), (9, 1)])
def test_equals_the_papers_algorithm(shape, iters, device):
    g = gradient(shape, 1)
    found = balance(g.to(device), iters).cpu().double()
    torch.testing.assert_close(found, by_definition(g, iters), rtol=1e-4, atol=1e-5)


def test_l1_form():
    g = gradient((12, 20), 2, 0.05)
    found = balance(g, 4, l1=True, tau=0.5).double()
    torch.testing.assert_close(found, torch.tanh(by_definition(g, 4, ord=1) / 0.5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(balance(g * 1e-9, 4, l1=True, tau=0.5).double(), found, rtol=1e-4, atol=1e-5)


def test_tau_goes_from_the_balanced_gradient_to_its_sign():
    g = gradient((12, 20), 3)
    torch.testing.assert_close(1e4 * balance(g, 3, True, 1e4).double(), by_definition(g, 3, ord=1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(balance(g, 3, True, 1e-6), g.sign(), rtol=1e-4, atol=0)


@settings(max_examples=60)
@given(SIZES, SIZES, st.integers(1, 10), st.integers(0, 1000), st.booleans(), st.floats(-18, 12))
def test_norms_signs_and_scale(m, n, iters, seed, l1, exponent):
    g = gradient((m, n), seed)
    x = 1e4 * balance(g, iters, l1, 1e4).double() if l1 else balance(g, iters).double()
    norms = x.abs().sum(0) / m if l1 else x.norm(dim=0) / math.sqrt(m)
    torch.testing.assert_close(norms, torch.ones(n).double(), rtol=1e-4, atol=0)
    assert torch.equal(x.sign(), g.sign().double())
    if not l1:
        torch.testing.assert_close(balance(g * 10**exponent, iters).double(), x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("l1", [False, True])
def test_rows_converge(l1):
    x = balance(gradient((30, 50), 4), 20, l1, 1e4) * (1e4 if l1 else 1)
    norms = x.abs().mean(1) if l1 else x.square().mean(1).sqrt()
    torch.testing.assert_close(norms, torch.ones(30), rtol=1e-3, atol=0)


@settings(max_examples=60)
@given(SIZES, SIZES, st.integers(1, 100), st.integers(0, 1000), st.booleans(), st.floats(0, 1))
def test_zeros_anywhere_stay_zero_and_finite(m, n, iters, seed, l1, density):
    keep = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < density
    keep[0], keep[:, 0] = False, False
    g = gradient((m, n), seed) * keep
    x = balance(g, iters, l1, 0.1)
    assert x.isfinite().all() and not x[~keep].any()
    assert x.abs().max() <= (1 if l1 else math.sqrt(m)) * 1.001


@settings(max_examples=60)
@given(SIZES, SIZES, st.integers(1, 20), st.integers(0, 1000), st.sampled_from([1e-45, 1e-30, 1e-12, 1e30, 3e38]))
def test_extreme_entries_stay_bounded(m, n, iters, seed, extreme):
    """Entries some of which are, relative to the others, far below what float32 can square."""
    g = gradient((m, n), seed).clamp(-1, 1)
    small = torch.rand(m, n, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    x = balance(torch.where(small, g * extreme, g), iters)
    assert x.isfinite().all() and x.abs().max() <= math.sqrt(m) * 1.001


def test_tiny_row_crossing_a_tiny_column():
    """Their squares are 0 in float32, so nothing but the floor keeps the entry where both scales meet bounded."""
    g = torch.ones(8, 8)
    g[0], g[:, 0] = 1e-23, 1e-23
    assert balance(g, 5).abs().max() <= math.sqrt(8)


def test_stack_is_its_matrices():
    stack = gradient((5, 12, 7), 5)
    torch.testing.assert_close(balance(stack, 5), torch.stack([balance(g, 5) for g in stack]))
    before = stack.clone()
    balance(stack, 5)
    assert torch.equal(stack, before)


def test_low_precision_gradients_are_balanced_in_float32():
    g = gradient((12, 7), 6).bfloat16()
    assert balance(g, 5).dtype == torch.float32
    torch.testing.assert_close(balance(g, 5), balance(g.float(), 5))


def test_step_is_decay_then_descent_and_has_no_state():
    p = torch.nn.Parameter(gradient((6, 4), 7))
    before, p.grad = p.detach().clone(), gradient((6, 4), 8)
    optimizer = SinkGD([p], lr=0.1, weight_decay=0.5, iters=3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.1 * 0.5) - 0.1 * balance(p.grad, 3))
    assert not optimizer.state


def test_the_rest_is_adamw():
    """Embeddings (declared or not), norms, biases, gates and three-dimensional tensors, over 20 steps."""
    model, adam = toy(), toy()
    optimizer = build(model, config("sinkgd", GATE_LR_MULT=2.0))
    rest = [g for g in optimizer.param_groups if g["name"] != "matrix"]
    theirs = dict(adam.named_parameters())
    groups = [{**{k: g[k] for k in ("lr", "weight_decay")}, "params": [theirs[n] for n in g["names"]]} for g in rest]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for number in range(20):
        for g in optimizer.param_groups:
            for name, p in zip(g["names"], g["params"], strict=True):
                p.grad = theirs[name].grad = gradient(p.shape, number)
        optimizer.step()
        reference.step()
    for group in rest:
        for name, p in zip(group["names"], group["params"], strict=True):
            torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)
            assert optimizer.state[p]["step"] == 20
    assert len(optimizer.state) == sum(len(g["params"]) for g in rest)


def test_learning_rate_relation_is_the_papers():
    cfg = load("gpt2-ra-ablation", overrides={"OPTIMIZER_SINKGD": True})
    rates = {g["name"]: g["lr"] for g in build(toy(), cfg).param_groups}
    assert rates["matrix"] == pytest.approx(1e-3) and rates["decay"] == rates["no_decay"] == 0.02


def test_parameters_without_gradient_are_skipped():
    a, b = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = SinkGD([a, b], lr=0.1, weight_decay=0.1)
    a.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(b, torch.ones(3, 3)) and not torch.equal(a, b)


def test_order_and_company_of_matrices_do_not_matter():
    def run(order):
        params = [torch.nn.Parameter(gradient(s, 1)) for s in ((8, 5), (8, 5), (5, 8), (8, 5))]
        optimizer = SinkGD([params[i] for i in order], lr=0.1)
        for number in range(5):
            for i in order:
                params[i].grad = gradient(params[i].shape, 10 * number + i)
            optimizer.step()
        return params

    for a, b, c in zip(run((0, 1, 2, 3)), run((3, 2, 1, 0)), run((0, 2, 3)), strict=True):
        torch.testing.assert_close(a, b)
        if not torch.equal(c, gradient(c.shape, 1)):
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize("wrong", [dict(iters=0), dict(l1=True), dict(l1=True, tau=0.0)])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError):
        SinkGD([torch.nn.Parameter(torch.ones(2, 2))], **wrong)


def test_matrix_groups_take_matrices_only():
    with pytest.raises(ValueError, match="shape"):
        SinkGD([torch.nn.Parameter(torch.ones(2))])
    SinkGD([torch.nn.Parameter(torch.ones(2))], matrix=False)


def test_it_learns():
    model = toy()
    optimizer = build(model, config("sinkgd", LEARNING_RATE=0.02))
    tokens = torch.arange(6).repeat(4, 1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@needs_gpu
def test_a_step_does_not_wait_for_the_device():
    model = toy().cuda()
    optimizer = build(model, config("sinkgd"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_through_build_is_deterministic():
    runs = []
    for _ in range(2):
        model = toy()
        train(model, build(model, config("sinkgd")), 5)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)
