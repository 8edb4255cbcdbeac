"""AdamWSPAM: AdamW where nothing is clipped or reset, and the paper's clipping, reset and re-warm-up elsewhere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.optimizers import build
from lib.optimizers.adamw_spam import LARGE, AdamWSPAM, _by_operations, clip_spikes, rewarm_factor
from tests.gpu import DEVICES, needs_gpu
from tests.lib.optimizers.toy import config, gradient, toy, train

HUGE = 1e30


def parameters(device="cpu"):
    return [torch.nn.Parameter(gradient(shape, 99).to(device)) for shape in ((5, 7), (4,), (3, 2, 2))]


def drive(params, optimizer, steps, start=0, scale=1.0):
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, 10 * step + i, scale).to(p.device)
        optimizer.step()


def one(**settings):
    """One parameter of two entries and its optimizer."""
    p = torch.nn.Parameter(torch.zeros(2))
    settings = dict(lr=1.0, betas=(0.9, 0.9), theta=4.0, interval=0, warmup_steps=0) | settings
    return p, AdamWSPAM([p], **settings)


def step(p, optimizer, grad):
    p.grad = torch.tensor(grad)
    optimizer.step()
    return optimizer.state[p]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
def test_equals_adamw_without_spikes_and_resets(device, fused):
    mine, theirs = parameters(device), parameters(device)
    settings = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    drive(mine, AdamWSPAM(mine, theta=HUGE, interval=0, **settings), 50)
    drive(theirs, torch.optim.AdamW(theirs, fused=fused, **settings), 50)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.lists(st.floats(0, 1e6, width=32), min_size=20, max_size=20),
    st.floats(1, 1e9),
    st.integers(1, 2000),
)
def test_clip_invariant(entries, seconds, theta, updates):
    g = torch.tensor(entries)
    v = torch.tensor(seconds)[: len(g)]
    correction = 1 - 0.95**updates
    clipped = clip_spikes([g], [v], theta, correction)[0]
    limit = (theta * v.double() / correction).sqrt()
    seen, spike = v > 1e-25, g.double().abs() > limit * (1 + 1e-5)  # below, v has no digits left in float32
    assert (clipped.double().abs() <= limit * (1 + 1e-5))[seen].all()
    inside = g.double().abs() < limit * (1 - 1e-5)
    assert torch.equal(clipped[inside & seen], g[inside & seen]), "no spike, no change"
    torch.testing.assert_close(clipped[spike & seen].double(), (g.sign() * limit)[spike & seen], rtol=1e-5, atol=0)
    assert torch.equal(clipped[v == 0], g[v == 0]), "no history, no spike"


@needs_gpu
def test_the_kernel_for_large_tensors_gives_the_same_numbers():
    """Also of tensors whose size is no multiple of anything, among small ones, with spikes, without a history, and with NaN."""
    made = torch.Generator("cuda").manual_seed(0)
    sizes = (LARGE + 3, 5, 3 * LARGE, LARGE - 1, 70001)
    grads = [torch.randn(n, device="cuda", generator=made) for n in sizes]
    seconds = [torch.rand(n, device="cuda", generator=made).pow(6) for n in sizes]
    for grad, second in zip(grads, seconds, strict=True):
        second[:3] = 0
        grad[4] = math.nan
    clipped = clip_spikes(grads, seconds, 4.0, 0.3)
    plain = _by_operations(grads, seconds, 4.0, 0.3)
    for one, other, grad in zip(clipped, plain, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-7, atol=0, equal_nan=True)
        assert 0.1 < (one == grad).float().mean() < 0.9 or grad.numel() == 5


def test_spike_is_clipped_to_the_bias_corrected_scale():
    """After one gradient of 1, v_hat is 1 although v is 0.1: with theta 4 the limit is 2, and not 0.63."""
    p, optimizer = one()
    step(p, optimizer, [1.0, 1.0])
    state = step(p, optimizer, [-1000.0, 1.9])
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.9 * 0.1 - 0.1 * 2, 0.9 * 0.1 + 0.1 * 1.9]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([0.9 * 0.1 + 0.1 * 4, 0.9 * 0.1 + 0.1 * 1.9**2]))


def test_gradient_itself_is_not_changed():
    p, optimizer = one()
    step(p, optimizer, [1.0, 1.0])
    step(p, optimizer, [1000.0, 1000.0])
    assert p.grad.tolist() == [1000.0, 1000.0]


def test_first_step_and_first_step_after_a_reset_do_not_clip():
    p, optimizer = one(interval=2, warmup_steps=1)
    for _ in range(2):
        state = step(p, optimizer, [1e4, 1.0])
        torch.testing.assert_close(state["exp_avg"], torch.tensor([1e3, 0.1]))
        step(p, optimizer, [1.0, 1.0])


def test_an_entry_that_never_had_a_gradient_is_not_held_at_zero():
    """A row of the embedding whose token comes late: v = 0 there, and a limit of 0 would keep it out until a reset."""
    p, optimizer = one()
    for _ in range(5):
        step(p, optimizer, [1.0, 0.0])
    assert step(p, optimizer, [1.0, 3.0])["exp_avg"][1] == pytest.approx(0.3)


def test_false_spikes_are_rare():
    """v_hat of one gradient is a rough scale: about 1 % of normal entries are clipped once, then next to none."""
    p = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = AdamWSPAM([p], betas=(0.9, 0.95), interval=0)
    shares = []
    for number in range(4):
        g = gradient(p.shape, number)
        if number:
            clipped = clip_spikes([g], [optimizer.state[p]["exp_avg_sq"]], 5000.0, 1 - 0.95**number)[0]
            shares.append((clipped != g).float().mean().item())
        p.grad = g
        optimizer.step()
    assert shares[0] < 0.015 and shares[1] < 5e-4 and shares[2] < 1e-4


def test_nan_is_not_hidden():
    p, optimizer = one()
    step(p, optimizer, [1.0, 1.0])
    step(p, optimizer, [math.nan, 1.0])
    assert p.isnan().tolist() == [True, False]


def test_reset_every_interval_calls_and_counter_once_per_call():
    """The trap: a counter that advanced twice per step reset every 250 steps. 500 is tested as 500."""
    model = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = AdamWSPAM([{"params": model[:1]}, {"params": model[1:]}], interval=500, warmup_steps=150)
    updates = []
    for number in range(1101):
        for p in model:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert {g["step"] for g in optimizer.param_groups} == {number + 1}
        updates.append({optimizer.state[p]["step"] for p in model})
    assert updates == [{number % 500 + 1} for number in range(1101)]


def test_after_a_reset_it_is_a_fresh_optimizer():
    """Moments zero and bias correction restarted: the steps after a reset are those of a new AdamW, at factor 1."""
    mine, theirs = parameters(), parameters()
    optimizer = AdamWSPAM(mine, lr=1e-2, theta=HUGE, interval=7, warmup_steps=0)
    drive(mine, optimizer, 7)
    for a, b in zip(mine, theirs, strict=True):
        b.data.copy_(a.data)
    drive(mine, optimizer, 7, start=7)
    drive(theirs, torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0), 7, start=7)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rewarm_factor():
    factors = [rewarm_factor(s, 500, 150) for s in range(1200)]
    assert factors[:500] == [1.0] * 500, "the start has the schedule's own warm-up"
    assert factors[500] == pytest.approx(0.01) and factors[575] == pytest.approx(0.505)
    assert all(a < b for a, b in zip(factors[500:650], factors[501:651], strict=True))
    assert factors[650:1000] == [1.0] * 350, "it ends"
    assert factors[1000:1150] == factors[500:650], "it does not accumulate"
    assert {rewarm_factor(s, 0, 150) for s in range(2000)} == {1.0}
    assert {rewarm_factor(s, 500, 0) for s in range(2000)} == {1.0}


def test_rewarm_scales_the_step_and_leaves_the_groups_rate_alone():
    """With a constant gradient Adam moves by the learning rate, so the displacement shows the effective rate."""
    p, optimizer = one(lr=0.5, interval=10, warmup_steps=4, theta=HUGE)
    rates = []
    for _ in range(30):
        before = p.detach().clone()
        step(p, optimizer, [1.0, 1.0])
        rates.append((before - p.detach())[0].item())
        assert optimizer.param_groups[0]["lr"] == 0.5
    expected = [0.5 * rewarm_factor(s, 10, 4) for s in range(30)]
    assert rates == pytest.approx(expected, rel=1e-4) and rates.count(pytest.approx(0.5, rel=1e-4)) == 22


def test_a_rate_set_before_each_step_is_followed():
    p, optimizer = one(interval=3, warmup_steps=2, theta=HUGE)
    for number in range(9):
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = 0.1 * (number + 1)
        step(p, optimizer, [1.0, 1.0])
        moved = (before - p.detach())[0].item()
        assert moved == pytest.approx(0.1 * (number + 1) * rewarm_factor(number, 3, 2), rel=1e-4)


def test_a_rewarm_that_never_ends_is_refused():
    for interval, warmup in ((1000, 1000), (50, 150)):
        with pytest.raises(ValueError, match="the re-warm-up never ends"):
            build(toy(), config(SPAM_INTERVAL=interval, SPAM_WARMUP_STEPS=warmup))
    build(toy(), config(SPAM_INTERVAL=0))


@pytest.mark.parametrize("theta", [0.0, -1.0, math.inf, math.nan])
def test_theta_must_be_a_positive_number(theta):
    with pytest.raises(ValueError):
        one(theta=theta)


def test_parameters_without_gradient_are_skipped_and_keep_their_own_correction():
    a, b, alone = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    together = AdamWSPAM([a, b], lr=0.1, weight_decay=0.1, theta=HUGE)
    single = AdamWSPAM([alone], lr=0.1, weight_decay=0.1, theta=HUGE)
    for number in range(6):
        a.grad = gradient(a.shape, number)
        b.grad = alone.grad = gradient(b.shape, number) if number % 2 else None
        together.step()
        single.step()
        if number == 0:
            assert not together.state.get(b) and torch.equal(b, torch.ones(3))
    assert torch.equal(b, alone) and together.state[b]["step"] == 3 and together.state[a]["step"] == 6


def test_order_of_parameters_does_not_matter():
    runs = []
    for order in (1, -1):
        params = parameters()
        optimizer = AdamWSPAM(params[::order], lr=1e-2, theta=4.0, interval=4, warmup_steps=2)
        drive(params, optimizer, 12)
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_state_is_two_moments():
    model = toy()
    optimizer = build(model, config())
    train(model, optimizer, 2)
    for p, state in optimizer.state.items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and type(state["step"]) is int
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


def test_closure_is_called_with_gradients_enabled():
    p, optimizer = one()

    def closure():
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0 and p.abs().sum() > 0


@needs_gpu
def test_a_step_does_not_wait_for_the_device():
    params = parameters("cuda")
    optimizer = AdamWSPAM(params, interval=3, warmup_steps=2)
    drive(params, optimizer, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
