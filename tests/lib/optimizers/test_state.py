"""A run that was saved and continued is the run that was never interrupted, bit for bit, for every optimizer."""

import copy
import io

import pytest
import torch

from lib.optimizers import build
from tests.lib.optimizers.toy import config, toy, train

ARMS = {
    "adamw": config("adamw"),
    "adamwspam": config("adamwspam", SPAM_THETA=2.0, SPAM_INTERVAL=6, SPAM_WARMUP_STEPS=4),
    "sinkgd": config("sinkgd"),
    "sinkgd-l1": config("sinkgd", SINKGD_L1=True),
}


def bits(model, optimizer):
    moments = [v for state in optimizer.state.values() for k, v in sorted(state.items()) if k != "step"]
    return torch.cat([t.detach().flatten() for t in (*model.parameters(), *moments)])


@pytest.mark.parametrize("cut", [0, 1, 5, 6, 7, 9, 12])
@pytest.mark.parametrize("arm", ARMS)
def test_round_trip_at_any_step(arm, cut):
    """Resets of adamwspam are before steps 6 and 12: cuts lie before, at, inside and after a re-warm-up."""
    whole = toy()
    optimizer = build(whole, ARMS[arm])
    train(whole, optimizer, 15)
    expected = bits(whole, optimizer)

    first = toy()
    optimizer = build(first, ARMS[arm])
    train(first, optimizer, cut)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)

    second = toy(seed=1)
    optimizer = build(second, ARMS[arm])
    second.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    train(second, optimizer, 15 - cut, start=cut)
    assert torch.equal(bits(second, optimizer), expected)


@pytest.mark.parametrize("arm", ARMS)
def test_loading_the_state_of_the_start_undoes_warm_up_steps(arm):
    """The loop takes a few steps to compile and allocate, then puts model and optimizer back."""
    expected, model = toy(), toy()
    reference, optimizer = build(expected, ARMS[arm]), build(model, ARMS[arm])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, start=50)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(expected, reference, 8)
    train(model, optimizer, 8)
    assert torch.equal(bits(model, optimizer), bits(expected, reference))


def test_the_states_names_say_what_they_belong_to():
    groups = build(toy(), ARMS["sinkgd"]).state_dict()["param_groups"]
    assert {g["name"] for g in groups} == {"matrix", "decay", "no_decay", "gate"}
    assert all(len(g["names"]) == len(g["params"]) for g in groups)
