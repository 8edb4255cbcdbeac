"""What routes are worth: slopes against differences of losses, one token and layer at a time, and what a correlation says."""

import pytest
import torch

from gpt2 import routing
from gpt2.model import GPT


@pytest.fixture
def model(configuration):
    made = GPT(configuration("RT1", GPT2_BLOCK_SIZE=16)).double().eval()
    with torch.no_grad():  # away from the start, at which nothing is moved and all is routed alike
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype), alpha=0.2)
    return made


def windows(n=2):
    drawn = torch.randint(256, (n, 17), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1], drawn[:, 1:]


@pytest.mark.parametrize("layer, token", [(0, 1), (0, 9), (1, 15)])
def test_the_benefit_is_how_the_losses_fall_with_the_route_of_one_token(model, layer, token):
    x, y = windows(1)
    found = routing.benefits(model, x, y)[layer]
    choice = found["p_full"].clone()

    def loss(more):
        routes = choice.clone()
        routes[0, token] += more
        handle = model.transformer.h[layer].attn.router.register_forward_hook(lambda *_: routes.double()[..., None])
        try:
            # The routes of later layers stay as they were chosen: the slope is in this route alone.
            handles = [model.transformer.h[n].attn.router.register_forward_hook(lambda *_, held=held: held.double()[..., None])
                       for n, held in kept.items() if n != layer]
            with torch.no_grad():
                value = model(x, y)[1].item() * x.numel()
            for one in handles:
                one.remove()
            return value
        finally:
            handle.remove()

    kept = {n: one["p_full"] for n, one in routing.benefits(model, x, y).items()}
    assert found["benefit"][0, token].item() == pytest.approx(-(loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-3, abs=1e-7)


def test_shift_and_choice_are_the_routers(model):
    x, y = windows()
    found = routing.benefits(model, x, y)
    assert set(found) == {0, 1} and found[1]["p_full"].shape == found[1]["shift"].shape == (2, 16)
    held = []
    handle = model.transformer.h[1].attn.router.register_forward_hook(lambda module, inputs, out: held.append((inputs, out)))
    with torch.no_grad():
        model(x[:1])
    handle.remove()
    (inputs, out), = held
    torch.testing.assert_close(found[1]["p_full"][:1], out[..., 0])
    expected = routing.features(*(one.float() for one in inputs))[..., 0]
    torch.testing.assert_close(found[1]["shift"][:1], expected)
    assert not model.transformer.h[1].attn.router._forward_hooks, "nothing stays behind"


def test_a_correlation_that_is_there_is_found_and_one_that_is_not_is_not(model, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    shift, other = torch.rand(4, 500, generator=generator), torch.rand(4, 500, generator=generator)
    monkeypatch.setattr(routing, "benefits", lambda *_: {
        0: {"benefit": shift ** 3, "shift": shift, "p_full": 1 - shift},
        1: {"benefit": other, "shift": shift, "p_full": shift}})
    found, undefined = routing.measure(model, *windows())
    assert undefined == {} and found["routing/layer0/rho_shift"] == pytest.approx(1.0)
    assert found["routing/layer0/rho_p_full"] == pytest.approx(-1.0) and abs(found["routing/layer1/rho_shift"]) < 0.1
    assert found["routing/layer1/p_full"] == pytest.approx(shift[:, 1:].mean().item())


def test_a_router_that_never_routed_and_one_without_opinion_have_no_number(model, configuration):
    model.transformer.h[0].attn.routing.zero_()
    with torch.no_grad():
        for p in model.transformer.h[1].attn.router.parameters():
            p.zero_()
    found, undefined = routing.measure(model, *windows())
    assert undefined == {0: "routing never began", 1: "all tokens are routed alike"} and set(found.values()) == {None}
    assert routing.measure(GPT(configuration("V0")), *windows()) == ({}, {})
