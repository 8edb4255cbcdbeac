"""Nothing that is not finite reaches a parameter, whatever the optimizer, and which step it was is known afterwards."""

import math

import pytest
import torch
from torch import nn

from lib import finite, gradients, optimizers
from lib.config import load
from tests.gpu import DEVICES

torch.set_num_threads(1)
SETTINGS = {"adamw": {"OPTIMIZER_ADAMW": True}, "adamwspam": {"OPTIMIZER_ADAMWSPAM": True},
            "sinkgd": {"OPTIMIZER_SINKGD": True}, "sinkgd, l1": {"OPTIMIZER_SINKGD": True, "SINKGD_L1": True}}


def trained(name, steps, bad=None, guarded=True, device="cpu"):
    """A small model after steps with gradients of their own; those of step `bad` hold one NaN. From the second step on nothing
    may wait for a GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.LayerNorm(3)).to(device)
    optimizer = optimizers.build(model, load("gpt2-ra-ablation+tiny", "V0", SETTINGS[name]))
    guard = finite.Guard(optimizer, torch.device(device), 0, None, None) if guarded else None
    for step in range(1, steps + 1):
        noise = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=noise).to(device)
        if step == bad:
            list(model.parameters())[2].grad[1] = math.nan
        loss = torch.tensor(5.0 - step, dtype=torch.float64, device=device)
        if device == "cuda" and step > 1:  # the first makes the optimizer's state
            torch.cuda.set_sync_debug_mode("error")
        try:
            norm = gradients.clip(model, optimizer, 1.0)
            if guard:
                guard.look(step, loss, norm)
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return model, optimizer, guard


def state(model, optimizer):
    return {name: value.clone() for name, value in finite.state_of(model, optimizer).items() if torch.is_tensor(value)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_guard_changes_no_number_and_after_a_step_that_is_not_finite_nothing_moves(name, device):
    plain, free = trained(name, 3, device=device), trained(name, 3, guarded=False, device=device)
    bad = trained(name, 6, bad=4, device=device)
    expected = state(*plain[:2])
    assert len(expected) > 5 and all(torch.isfinite(value).all() for value in expected.values())
    for other in (free, bad):
        found = state(*other[:2])
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    longer, _, _ = trained(name, 4, device=device)
    assert not torch.equal(next(longer.parameters()), next(plain[0].parameters())), "or this proves nothing"


def guard_after(*steps, done=0, loss=None, norm=None):
    model = nn.Linear(1, 1)
    guard = finite.Guard(torch.optim.AdamW(model.parameters(), fused=True), torch.device("cpu"), done, loss, norm)
    for number, (a, b) in enumerate(steps, done + 1):
        guard.look(number, torch.tensor(a, dtype=torch.float64), torch.tensor(b))
    return guard


@pytest.mark.parametrize("steps, sentence, last", [
    ([(3.0, 1.0), (2.0, 0.5)], None, (2, 2.0, 0.5)),
    ([], None, (0, None, None)),
    ([(3.0, 1.0), (math.nan, 0.5), (1.0, 1.0)],
     "the training loss is nan at iteration 2 (the last finite step, 1, had loss 3.0000 and gradient norm 1)", (1, 3.0, 1.0)),
    ([(3.0, 1.0), (2.0, 0.25), (1.0, math.inf), (math.nan, 1.0)],
     "the norm of the gradient is inf at iteration 3 (the last finite step, 2, had loss 2.0000 and gradient norm 0.25)",
     (2, 2.0, 0.25)),
    ([(-math.inf, math.nan)], "the training loss is -inf at iteration 1 (no step before it was finite)", (0, None, None)),
])
def test_the_verdict_names_the_first_such_step_and_the_last_finite_values(steps, sentence, last):
    guard = guard_after(*steps)
    assert guard.verdict() == sentence and guard.last() == last


def test_a_resumed_run_knows_the_step_before():
    guard = guard_after((math.nan, 1.0), done=40, loss=2.5, norm=0.5)
    assert guard.verdict() == ("the training loss is nan at iteration 41 (the last finite step, 40, had loss 2.5000 and "
                               "gradient norm 0.5)")
    assert guard.last() == (40, 2.5, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(value):
    tensors = {"a": torch.ones(3), "whole": torch.ones(3, dtype=torch.long), "b": torch.ones(2, 2), "c": torch.ones(5), "n": 3}
    assert finite.not_finite(tensors) is None
    tensors["b"][1, 0] = tensors["c"][0] = value
    assert finite.not_finite(tensors) == "b"


def test_large_numbers_are_finite_and_infinities_that_cancel_are_not():
    """A sum that overflows says nothing yet."""
    assert finite.not_finite({"a": torch.full((9,), 3e38), "b": torch.full((9,), 60000.0, dtype=torch.float16)}) is None
    assert finite.not_finite({"a": torch.full((9,), 3e38), "b": torch.tensor([math.inf, -math.inf])}) == "b"
    assert finite.not_finite({}) is None and finite.not_finite({"a": torch.empty(0)}) is None
