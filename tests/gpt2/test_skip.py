"""Skip gates: neutral at the start, learned, and real when a path is off: function, FLOPs, memory, program, state."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from gpt2.model import GPT
from gpt2.skip import gates, training_flops
from lib.mechanisms import Moment

B, T = 2, 32
PATHS = ("attn.skip_std", "attn.skip_low", "mlp.skip_std", "mlp.skip_rec")


@pytest.fixture
def build(configuration):
    def model(step="M2", **symbols):
        return GPT(configuration(step, GPT2_DROPOUT="0.0", **symbols)).eval()
    return model


def tokens(seed=0):
    return torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(seed))


def logits(model, x=None):
    with torch.no_grad():
        return model(tokens()[:, :-1] if x is None else x)[0]


def switch_off(model, *paths, layer=0):
    for path in paths:
        model.transformer.h.get_submodule(f"{layer}.{path}").switch_off()
    return model


def bytes_for_backward(model):
    """Of what autograd keeps, each storage once, less the parameters."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = tokens()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(x[:, :-1], x[:, 1:])
    return sum(kept.values())


def moment(progress, iteration=1):
    return Moment(iteration, progress)


@pytest.mark.parametrize("step, plain", [("R1", "V1"), ("M1", "M1"), ("M2", "M2")])
def test_gates_start_neutral(build, step, plain):
    torch.testing.assert_close(logits(build(step)), logits(build(plain, SKIP_GATES="n")), rtol=0, atol=1e-5)


def test_a_gate_weighs_its_path(build):
    model = build("M2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.skip_low.logit.fill_(-20.0)
            block.mlp.skip_rec.logit.fill_(-20.0)
    nearly = logits(model)
    for layer in (0, 1):
        switch_off(model, "attn.skip_low", "mlp.skip_rec", layer=layer)
    torch.testing.assert_close(nearly, logits(model), rtol=0, atol=1e-4)
    assert (nearly - logits(build("M2"))).abs().max() > 1e-3


def test_gates_get_gradient_and_the_penalty_pushes_them_down(build):
    model = build("M2", SKIP_PENALTY="0.5")
    x = tokens()
    model.train()(x[:, :-1], x[:, 1:])[1].backward()
    found = gates(model.transformer.h)
    assert len(found) == 8 and all(gate.logit.grad.abs() > 0 for gate in found.values())
    model.zero_grad()
    penalty = model.controllers["skip"].penalty()
    torch.testing.assert_close(penalty.item(), 0.5 * torch.sigmoid(torch.tensor(2.0)).item())
    penalty.backward()
    assert all(gate.logit.grad > 0 for gate in found.values())
    costs = {name: gate.cost for name, gate in found.items()}
    assert costs["0.attn.skip_std"] / costs["0.attn.skip_low"] == 60 / 4 and costs["0.mlp.skip_rec"] == 2 * 128 * 192
    assert build("M2").controllers["skip"].penalty() == 0.0


@pytest.mark.parametrize("off", [("attn.skip_std",), ("attn.skip_low",), ("attn.skip_std", "attn.skip_low"), ("mlp.skip_std",),
                                 ("mlp.skip_rec",), ("mlp.skip_std", "mlp.skip_rec"), PATHS])
def test_a_path_that_is_off_costs_nothing_and_is_what_it_collapses_to(build, off):
    """FLOPs and memory fall, no gradient reaches it, and the function is the one with its rows and columns at zero."""
    model = build("M2", RA_R=8)
    whole, before = bytes_for_backward(model), training_flops(model.controllers["skip"].cfg)
    switch_off(model, *off)
    assert training_flops(model.controllers["skip"].cfg, {f"0.{path}" for path in off}) < before
    if off != ("attn.skip_low",):  # on a CPU 56 channels for keys and 64 for values leave the flash kernel
        assert bytes_for_backward(model) < whole
    model.zero_grad()
    x = tokens()
    model.train()(x[:, :-1], x[:, 1:])[1].backward()
    assert all(model.transformer.h.get_submodule(f"0.{path}").logit.grad is None for path in off)
    block = model.transformer.h[0]
    if off == PATHS:
        assert all(p.grad is None for p in block.parameters()) and not block.attn.on and not block.mlp.on
    torch.testing.assert_close(logits(model.eval()), logits(model.collapse().eval()), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(copy.deepcopy(model).bake().eval()), logits(model), rtol=0, atol=1e-5)


def test_what_a_path_saves_is_its_matmuls(build):
    """Two projections of R_ff features, forward and twice backward, 2 FLOPs a multiplication."""
    cfg = build("M2").controllers["skip"].cfg
    E, R_ff = 128, 192
    assert training_flops(cfg) - training_flops(cfg, {"0.mlp.skip_rec"}) == 2 * 3 * 2 * cfg.GPT2_BLOCK_SIZE * E * R_ff


def test_channels_are_computed_in_eights(build):
    """4 of 64 channels save nothing that a kernel could skip: 60 are computed as 64, of which 4 are zero."""
    model = switch_off(build("R1"), "attn.skip_low")
    attention = model.transformer.h[0].attn
    assert attention.key_dim == 64 and attention.projection_weights()[0].shape == (384, 128)
    assert switch_off(build("R1", RA_R=8), "attn.skip_low").transformer.h[0].attn.key_dim == 56
    low = switch_off(build("R1"), "attn.skip_std").transformer.h[0].attn
    assert low.key_dim == 8 and low.projection_weights()[0].shape == (2 * 2 * 8 + 128, 128)


@pytest.mark.parametrize("off", [("attn.skip_std",), ("attn.skip_std", "attn.skip_low"), PATHS])
def test_decoding_with_paths_off(build, off):
    model = switch_off(build("M2"), *off)
    x, cache, parts = tokens()[:, :-1], model.new_cache(B), []
    whole = build("M2").new_cache(B).nbytes()
    with torch.no_grad():
        for size in (9, 1, 1, 7, 14):
            at = cache.length
            parts.append(model(x[:, at:at + size], cache=cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), logits(model), rtol=0, atol=2e-5)
    assert cache.length == T and cache.nbytes() < whole
    assert model.generate(x[:, :4], 5, temperature=0).shape == (B, 9)


# The controller

def test_three_looks_in_a_row_after_a_fifth_of_the_budget_switch_off_for_good(build):
    model = build("M2")
    control, gate = model.controllers["skip"], model.transformer.h[0].mlp.skip_rec
    with torch.no_grad():
        gate.logit.fill_(-1.0)
    for step in range(20):
        assert not control.advance(moment(step / 100))
    assert gate.low == 0 and not control.advance(moment(0.2)) and not control.advance(moment(0.205)) and gate.low == 1
    with torch.no_grad():
        gate.logit.fill_(0.1)
    assert not control.advance(moment(0.21)) and gate.low == 0
    with torch.no_grad():
        gate.logit.fill_(-0.1)
    assert [control.advance(moment(0.22 + n / 100)) for n in range(5)] == [False, False, True, False, False]
    assert not gate.on and gate.off and gate.value() == 0
    with torch.no_grad():
        gate.logit.fill_(5.0)
    control.advance(moment(0.9))
    assert not gate.on
    cfg = control.cfg
    assert control.stats()["compute_ratio"].item() == pytest.approx(
        training_flops(cfg, {"0.mlp.skip_rec"}) / training_flops(cfg)) and control.compute_ratio() < 1


def test_gates_that_switched_nothing_off_were_inactive(build):
    """A gated model that skips nothing says nothing of skipping, and must not be compared as if it did."""
    model = build("M2")
    control, gate = model.controllers["skip"], model.transformer.h[1].attn.skip_low
    with torch.no_grad():
        gate.logit.fill_(0.4)
    assert control.inactive() == "no path went off: the lowest gate ended at 0.60, and a path goes off below 0.5"
    gate.switch_off()
    assert control.inactive() is None


def test_what_is_off_stays_off_in_a_state(build):
    model = switch_off(build("M2"), *PATHS[:3])
    with torch.no_grad():
        model.transformer.h[1].attn.skip_std.logit.fill_(-1.0)
    for n in range(2):
        model.controllers["skip"].advance(moment(0.5 + n / 100))
    fresh = build("M2")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert not fresh.controllers["skip"].advance(moment(0.51)), "the look at 51 % has been taken"
    assert fresh.controllers["skip"].advance(moment(0.52)) and not fresh.transformer.h[1].attn.skip_std.on


def test_a_model_that_starts_from_another_looks_anew_at_what_is_not_off(build):
    """A parent ends its budget with all looks taken; its child begins its own."""
    parent = switch_off(build("M2"), "mlp.skip_std")
    for gate in gates(parent.transformer.h).values():
        with torch.no_grad():
            gate.logit.fill_(-1.0)
    parent.controllers["skip"].advance(moment(0.98, 98))
    parent.controllers["skip"].advance(moment(0.99, 99))
    child = build("M2")
    child.load_state_dict(parent.state_dict())
    control, gate = child.controllers["skip"], child.transformer.h[1].mlp.skip_rec
    assert not control.advance(moment(0.0, 0)) and gate.low == 0 and not child.transformer.h[0].mlp.skip_std.on
    again = build("M2")
    again.load_state_dict(child.state_dict())
    assert again.controllers["skip"].next_look == 0, "also after a stop before its first look"
    assert [control.advance(moment(0.2 + n / 100, 20 + n)) for n in range(3)] == [False, False, True] and not gate.on


def test_it_is_compiled_once_a_change(build):
    model, counter, x = build("R1"), CompileCounter(), tokens()[:, :-1]
    torch.compiler.reset()
    model.compile(backend=counter, dynamic=False)
    for changes in range(3):
        for _ in range(2):
            with torch.no_grad():
                model(x)
        assert counter.frame_count == changes + 1
        if changes < 2:
            switch_off(model, PATHS[changes])
    torch.compiler.reset()


def test_statistics_have_the_documented_names(build):
    model = build("M2")
    found = model.transformer.h[0].attn.stats() | model.transformer.h[0].mlp.stats()
    for name in ("skip_std_attn", "skip_lowrank_attn", "skip_std_mlp", "skip_rec_mlp"):
        assert found[name].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item()) and found[name].ndim == 0
    assert "skip_std_attn" not in model.transformer.h[0].attn.get_gate_stats()
    assert build("M5").transformer.h[0].mlp.skip_rec.logit.item() == -1.5
