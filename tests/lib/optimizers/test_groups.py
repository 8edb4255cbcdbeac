"""Which parameter lands where, and that what the configuration says reaches the optimizer."""

import pytest
import torch
from torch import nn

from lib.kconfig import Assignment, Schema
from lib.optimizers import build, param_groups
from lib.optimizers.adamw_spam import AdamWSPAM
from lib.optimizers.sinkgd import SinkGD
from tests.lib.optimizers.toy import Routed, Toy, config, toy, train

KINDS = ("adamw", "adamwspam", "sinkgd")


def names(groups):
    return {group["name"]: set(group["names"]) for group in groups}


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_is_covered_exactly_once(kind):
    model = toy()
    covered = [id(p) for group in build(model, config(kind)).param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert sum(i == id(model.wte.weight) for i in covered) == 1, "the tied embedding"


def test_tied_embedding_takes_one_step():
    """Stepped twice, it would move about twice the learning rate."""
    model = toy()
    before = model.wte.weight.detach().clone()
    train(model, build(model, config("adamw", WEIGHT_DECAY=0.0)), 1)
    assert (model.head.weight - before).abs().max() <= 1.001e-2


def test_groups_follow_shape_and_declaration():
    found = names(param_groups(toy(), config("adamw")))
    assert found["gate"] == {f"layers.{i}.{n}" for i in (0, 1) for n in ("gate", "gate_matrix")}
    assert found["no_decay"] == {"norm.weight", "norm.bias", "layers.0.proj.bias", "layers.1.proj.bias"}
    weights = {f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("proj", "back")}
    assert found["decay"] == weights | {"wte.weight", "wpe.table", "kernel"}
    assert names(param_groups(toy(), config("sinkgd"))) == {
        **found, "matrix": weights, "decay": {"wte.weight", "wpe.table", "kernel"}}


@pytest.mark.parametrize("kind", KINDS)
def test_decay_and_rates(kind):
    groups = {g["name"]: g for g in build(toy(), config(kind, WEIGHT_DECAY=0.3, GATE_LR_MULT=7.0)).param_groups}
    expected = {"decay": (0.3, 1), "no_decay": (0, 1), "gate": (0, 7), "matrix": (0.3, 0.05)}
    assert groups.keys() == expected.keys() - (set() if kind == "sinkgd" else {"matrix"})
    for name, group in groups.items():
        decay, multiple = expected[name]
        assert (group["weight_decay"], group["lr_mult"], group["lr"]) == (decay, multiple, 1e-2 * multiple)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_biases_are_not_decayed_and_weights_are(kind):
    """With a zero gradient only weight decay can move a parameter."""
    model = toy()
    optimizer = build(model, config(kind, WEIGHT_DECAY=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    groups = names(optimizer.param_groups)
    assert moved == groups["decay"] | groups.get("matrix", set())


def routed(seed=0) -> Toy:
    model = toy(seed)
    model.layers.append(Routed(8))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_structure_is_a_group_of_its_own_whatever_its_shape_and_stands_over_gates(kind):
    found = names(build(routed(), config(kind)).param_groups)
    assert found["structure"] == {"layers.2.skip", "layers.2.router"}
    assert not any(found["structure"] & found[name] for name in found if name != "structure")
    assert "structure" not in names(build(toy(), config(kind)).param_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_structure_learns_at_its_own_peak_rate_under_the_schedule_of_the_rest_without_decay(kind):
    optimizer = build(routed(), config(kind, WEIGHT_DECAY=0.3, GATE_LR_MULT=7.0, STRUCT_LR=0.03, LEARNING_RATE=2e-3))
    group, = (g for g in optimizer.param_groups if g["name"] == "structure")
    assert (group["weight_decay"], group["lr"], group["lr_mult"]) == (0.0, pytest.approx(0.03), pytest.approx(15.0))
    assert build(routed(), config(kind, LEARNING_RATE=0.0)).param_groups[-1]["lr"] == 0.0, "a rate of 0 stops everything"
    twice = build(routed(), config(kind, LEARNING_RATE_MULT=2.0, STRUCT_LR=0.03, LEARNING_RATE=2e-3)).param_groups[-1]
    assert twice["lr_mult"] == pytest.approx(7.5), "an arm at twice the rate decides its paths at the rate of the others"


@pytest.mark.parametrize("kind", KINDS)
def test_structure_moves_by_its_rate_and_is_not_decayed(kind):
    """The first step of Adam is the learning rate, whatever the gradient; a gradient of zero leaves only decay."""
    model = routed()
    optimizer = build(model, config(kind, WEIGHT_DECAY=0.5, STRUCT_LR=0.03))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    logit, router = model.layers[2].skip, model.layers[2].router
    before = logit.item(), router.detach().clone()
    optimizer.step()
    assert before[0] - logit.item() == pytest.approx(0.03, rel=1e-3)
    torch.testing.assert_close(before[1] - router, torch.full_like(router, 0.03), rtol=1e-3, atol=1e-6)
    model, after = routed(), routed()
    optimizer = build(after, config(kind, WEIGHT_DECAY=0.5))
    for p in after.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(after.layers[2].router, model.layers[2].router) and after.layers[2].skip.item() == 2.0


def test_empty_groups_are_left_out_and_a_frozen_model_is_none():
    linear = nn.Linear(3, 3, bias=False)
    assert [g["name"] for g in param_groups(linear, config())] == ["decay"]
    assert param_groups(linear.requires_grad_(False), config()) == []


def test_a_wrong_declaration_is_an_error():
    class Wrong(Toy):
        gate_parameters = ("norm",)

    with pytest.raises(TypeError, match="gate_parameters of Wrong names 'norm'"):
        param_groups(Wrong(), config())
    Wrong.gate_parameters = ("no_such",)
    with pytest.raises(AttributeError, match="no_such"):
        param_groups(Wrong(), config())
    Wrong.gate_parameters, Wrong.structure_parameters = (), ("norm",)
    with pytest.raises(TypeError, match="structure_parameters of Wrong names 'norm'"):
        param_groups(Wrong(), config())


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="lion"):
        build(toy(), config("lion"))


def defaults(kind):
    schema = Schema()
    schema.apply([Assignment(f"OPTIMIZER_{kind.upper()}", "y", "test")])
    return schema.values()


class Values:
    """Kconfig's values as attributes; a symbol whose dependency is unmet is None there."""

    def __init__(self, values):
        self.__dict__ = values


def test_defaults_of_kconfig_are_the_papers_and_reach_the_optimizer():
    spam = build(toy(), Values(defaults("adamwspam")))
    assert isinstance(spam, AdamWSPAM)
    for group in spam.param_groups:
        assert (group["theta"], group["interval"], group["warmup_steps"]) == (5000.0, 500, 150)
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 6e-4)
    sink = build(toy(), Values(defaults("sinkgd")))
    assert isinstance(sink, SinkGD)
    for group in sink.param_groups:
        assert (group["iters"], group["l1"], group["tau"]) == (5, False, None)
    assert isinstance(build(toy(), Values(defaults("adamw"))), torch.optim.AdamW)


def test_other_values_reach_the_optimizer():
    changes = dict(SPAM_THETA=7.0, SPAM_INTERVAL=9, SPAM_WARMUP_STEPS=3, ADAM_BETA1=0.8, ADAM_BETA2=0.7)
    for group in build(toy(), config(**changes)).param_groups:
        assert (group["theta"], group["interval"], group["warmup_steps"], group["betas"]) == (7.0, 9, 3, (0.8, 0.7))
    for group in build(toy(), config("sinkgd", SINKGD_ITERS=2, SINKGD_L1=True, SINKGD_TAU=0.4)).param_groups:
        assert (group["iters"], group["l1"], group["tau"]) == (2, True, 0.4)
