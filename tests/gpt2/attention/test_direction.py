"""Layer direction: the formula, that it is a renaming, what the logit learns from, and when and how it is decided."""

import copy
import io
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.direction import DirectionAttention
from gpt2.function_class import key
from gpt2.laws import Subject, broken_laws
from gpt2.layers import init_weights
from gpt2.model import GPT
from gpt2.rules import warnings
from lib import optimizers
from lib.config import load
from lib.mechanisms import Mechanisms, Moment
from tests.harness import refusal

E, H, D = 64, 4, 16
STEPS = ("RALEARN0", "RAEARLY0", "RALATE0", "RAALL0")
# How a layer can stand: (what the constructor gets, the logit, whether it is decided)
STATES = {"standard": (False, None, False), "reciprocal": (True, None, False), "undecided": (None, -0.4, False),
          "undecided reciprocal": (None, 0.4, False), "decided": (None, -0.4, True), "decided reciprocal": (None, 0.4, True)}
SIZES = [(1,) * 12, (5, 1, 1, 5), (12,), (1, 11), (3, 4, 5)]


def build(state="undecided", bias=True, dropout=0.0):
    """A module with random weights and biases."""
    reciprocal, logit, decided = STATES[state]
    torch.manual_seed(0)
    module = DirectionAttention(E, H, dropout, bias, reciprocal=reciprocal).eval()
    init_weights(module, 0)
    with torch.no_grad():
        module.c_attn.weight.mul_(10)  # or attention would be nearly uniform
        if bias:
            module.c_attn.bias.normal_()
            module.c_proj.bias.normal_()
        if logit is not None:
            module.direction.logit.fill_(logit)
    if decided:
        module.direction.decide()
    return module


def baseline(module, exchange):
    """GPT-2's attention with the same weights, the query and the key rows exchanged or not."""
    plain = CausalSelfAttention(E, H, module.dropout, module.c_attn.bias is not None).to(module.c_attn.weight).eval()
    state = {name: p for name, p in module.state_dict().items() if not name.startswith("direction")}
    if exchange:
        state |= {name: torch.cat([p[E:2 * E], p[:E], p[2 * E:]]) for name, p in state.items() if name.startswith("c_attn")}
    plain.load_state_dict(state)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_the_formula(state, bias):
    """Written out token by token in float64: the query row i asks the keys j <= i, or the key row does."""
    module = build(state, bias).double()
    B, T = 2, 7
    x = torch.randn(B, T, E, dtype=torch.float64)
    q, k, v = F.linear(x, module.c_attn.weight, module.c_attn.bias).split(E, 2)
    asks, asked = (k, q) if "reciprocal" in state else (q, k)
    y = torch.zeros(B, T, E, dtype=torch.float64)
    for b, h, i in product(range(B), range(H), range(T)):
        at = slice(h * D, (h + 1) * D)
        weights = [torch.exp(asks[b, i, at] @ asked[b, j, at] / math.sqrt(D)) for j in range(i + 1)]
        y[b, i, at] = sum(w / sum(weights) * v[b, j, at] for j, w in enumerate(weights))
    expected = F.linear(y, module.c_proj.weight, module.c_proj.bias)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_a_direction_is_a_name_bit_for_bit(state, bias):
    """The reciprocal layer is that with W_q and W_k exchanged, the standard one is GPT-2's; so is what they collapse to."""
    module = build(state, bias)
    plain, x = baseline(module, "reciprocal" in state), torch.randn(2, 17, E)
    assert torch.equal(module(x), plain(x))
    collapsed = module.collapse()
    assert type(collapsed) is CausalSelfAttention and torch.equal(collapsed(x), plain(x)) and not collapsed.training
    assert {n: p.shape for n, p in collapsed.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}
    assert module.bake() is module, "nothing acts on its weights, and a state of exchanged rows would load without a word"


@pytest.mark.parametrize("state", STATES)
def test_it_also_learns_as_the_exchanged_layer_does(state):
    """An undecided layer, too: what its value is not made of gets no gradient."""
    module = build(state)
    plain, x = baseline(module, "reciprocal" in state), torch.randn(2, 17, E)
    for one in (module, plain):
        one(x).square().sum().backward()
    grad = module.c_attn.weight.grad
    if "reciprocal" in state:
        grad = torch.cat([grad[E:2 * E], grad[:E], grad[2 * E:]])
    torch.testing.assert_close(grad, plain.c_attn.weight.grad, rtol=1e-5, atol=1e-5)


def test_the_two_directions_differ():
    x = torch.randn(2, 17, E)
    assert (build("standard")(x) - build("reciprocal")(x)).abs().max() > 1e-2


# Learning

@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("state", ["undecided", "undecided reciprocal"])
def test_the_logit_learns_from_the_difference_between_the_directions(state, training):
    """dL/dl = p (1 - p) <dL/dout, R - S>: straight through, whichever direction the value is."""
    module = build(state).double().train(training)
    x, toward = torch.randn(2, 9, E, dtype=torch.float64), torch.randn(2, 9, E, dtype=torch.float64)
    (module(x) * toward).sum().backward()
    with torch.no_grad():
        difference = baseline(module, True)(x) - baseline(module, False)(x)
        p = torch.sigmoid(module.direction.logit)
        expected = p * (1 - p) * (toward * difference).sum()
    torch.testing.assert_close(module.direction.logit.grad, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs() > 1e-6


@pytest.mark.parametrize("better", [False, True])
def test_the_better_direction_wins(better):
    """A task that one direction solves by itself: the logit alone finds out which, and the controller keeps it."""
    module = build("undecided").train()
    target = baseline(module, better)
    optimizer = torch.optim.Adam([module.direction.logit], lr=0.05)
    for _ in range(30):
        x = torch.randn(2, 9, E)
        optimizer.zero_grad()
        F.mse_loss(module(x), target(x).detach()).backward()
        optimizer.step()
    module.direction.decide()
    assert module.reciprocal is better and module.direction.probability() == float(better)


def test_a_decided_logit_takes_part_in_nothing():
    for state in ("decided", "decided reciprocal"):
        module = build(state).train()
        x = torch.randn(2, 9, E)
        before = module(x)
        with torch.no_grad():
            module.direction.logit.neg_()
        assert torch.equal(module(x), before)
        module(x).square().sum().backward()
        assert module.direction.logit.grad is None and module.c_attn.weight.grad is not None


def test_a_logit_of_almost_nothing_decides_as_it_computes():
    """sigmoid(1e-9) is 1/2 in float32; value and decision must still agree."""
    module = build("undecided reciprocal")
    with torch.no_grad():
        module.direction.logit.fill_(1e-9)
    assert module.direction.choice() == 1 and module.likelier() is True
    with torch.no_grad():
        module.direction.logit.fill_(0.0)
    assert module.direction.choice() == 0 and module.likelier() is False


class Operations(TorchDispatchMode):
    """Counts what a pass computes; the flop counter knows no attention on a CPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_one_direction_is_computed_once_it_is_decided():
    """GPT-2's two projections and one attention; an undecided layer has a second attention."""
    for state in STATES:
        with Operations() as counted, torch.no_grad():
            build(state)(torch.randn(2, 16, E))
        attentions, matmuls = (sum(part in name for name in counted.names) for part in ("scaled_dot_product", "mm"))
        assert (attentions, matmuls) == (2 if "undecided" in state else 1, 2)


@pytest.mark.parametrize("state", STATES)
def test_the_bias_without_a_gradient_is_that_of_what_plays_the_key(state):
    module = build(state).double().train()
    module(torch.randn(2, 9, E, dtype=torch.float64)).square().sum().backward()
    dead = module.c_attn.bias.grad.abs() < 1e-10 * module.c_attn.bias.grad.abs().max()
    declared = torch.zeros(3 * E, dtype=torch.bool)
    declared[module.dead_elements()["c_attn.bias"]] = True
    assert torch.equal(dead, declared)
    assert build(state, bias=False).dead_elements() == {}


# Causality, decoding, types

@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_no_output_depends_on_a_later_input(state, training):
    module = build(state).train(training)
    x = torch.randn(1, 20, E)
    other = x.clone()
    other[:, 9:] += torch.randn(1, 11, E)
    assert torch.equal(module(x)[:, :9], module(other)[:, :9]) and not torch.equal(module(x)[:, 9], module(other)[:, 9])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_decoding_in_chunks_equals_the_full_pass(state, dtype, tolerance):
    """What plays the key is what is cached; of an undecided layer both may."""
    module = build(state).to(dtype)
    x = torch.randn(3, 12, E, dtype=dtype)
    for sizes in SIZES:
        cache = module.new_cache(3, 12, dtype, "cpu")
        parts = [module(part, cache) for part in x.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=tolerance, msg=str(sizes))


@pytest.mark.parametrize("step, tensors", [("RALEARN0", 3), ("RAALL0", 2), ("RAEARLY0", 2)])
def test_the_cache_of_a_layer_as_built_is_the_declared_one(configuration, step, tensors):
    cfg = configuration(step)
    cache = GPT(cfg).new_cache(2, dtype=torch.bfloat16)
    layer = DirectionAttention.cache_bytes_per_token(cfg, 2)
    assert layer == 2 * tensors * cfg.GPT2_N_EMBD
    assert cache.nbytes() == 2 * cfg.GPT2_N_LAYER * cfg.GPT2_BLOCK_SIZE * layer


def test_a_decided_layer_caches_what_gpt2_does():
    def held(module):
        return sum(t.numel() for t in module.new_cache(1, 8, torch.float32, "cpu").tensors())

    assert {held(build(state)) for state in STATES if "undecided" not in state} == {2 * 8 * E}
    assert held(build("undecided")) == 3 * 8 * E


@pytest.mark.parametrize("state", STATES)
def test_autocast_gives_the_type_of_the_matmul_and_reaches_the_logit(state):
    module = build(state).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.randn(2, 9, E))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    if "undecided" in state:
        assert module.direction.logit.grad.abs() > 0 and module.direction.logit.grad.dtype == torch.float32


@pytest.mark.parametrize("state", ["undecided", "decided reciprocal"])
def test_it_compiles_into_one_graph_forward_and_backward(state):
    module, x = build(state), torch.randn(2, 16, E)
    module(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)(x).square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(module.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-4)


# The controller and the state

def model(configuration, logits=(0.3, -0.2), **symbols):
    """An undecided model whose logits say: reciprocal, standard."""
    found = GPT(configuration("RALEARN0", **symbols)).eval()
    with torch.no_grad():
        for block, logit in zip(found.transformer.h, logits, strict=True):
            block.attn.direction.logit.fill_(logit)
    return found


def directions(model):
    return [block.attn.reciprocal for block in model.transformer.h]


@pytest.mark.parametrize("share, min_steps, last, first", [
    (0.1, 20, (20, 0.099), (20, 0.1)),  # the share comes later
    (0.1, 20, (19, 0.5), (20, 0.5)),  # the steps come later
    (0.0, 1, (0, 0.0), (1, 0.001)),
])
def test_when_the_directions_are_decided(configuration, share, min_steps, last, first):
    one = model(configuration, DIRECTION_SHARE=share, DIRECTION_MIN_STEPS=min_steps)
    mechanisms = Mechanisms(one)
    assert mechanisms.advance(Moment(0, 0.0)) is False and mechanisms.advance(Moment(*last)) is False
    assert directions(one) == [None, None]
    assert mechanisms.advance(Moment(*first)) is True and directions(one) == [True, False]
    assert mechanisms.advance(Moment(first[0] + 1, 0.9)) is False, "the program changes once"


def test_deciding_changes_no_value(configuration):
    one, x = model(configuration), torch.arange(20).view(1, 20)
    before = one(x)[0]
    assert Mechanisms(one).advance(Moment(30, 0.2)) and torch.equal(one(x)[0], before)


@pytest.mark.parametrize("logits", [(0.3, -0.2), (1.0, 2.0), (0.0, 0.0)])
def test_the_balance_loss(configuration, logits):
    """DIRECTION_BALANCE (sum p - L/2)^2 and its gradient, until the decision."""
    one = model(configuration, logits, DIRECTION_BALANCE=0.5)
    mechanisms = Mechanisms(one)
    p = [1 / (1 + math.exp(-logit)) for logit in logits]
    assert mechanisms.penalty().item() == pytest.approx(0.5 * (sum(p) - 1) ** 2, abs=1e-7)
    mechanisms.penalty().backward()
    for block, q in zip(one.transformer.h, p, strict=True):
        assert block.attn.direction.logit.grad.item() == pytest.approx(0.5 * 2 * (sum(p) - 1) * q * (1 - q), abs=1e-7)
    statistics = mechanisms.statistics(by_layer=True)
    assert statistics["balance_loss"] == pytest.approx((sum(p) - 1) ** 2, abs=1e-6)
    assert statistics["p_recip"] == pytest.approx(sum(p) / 2) and statistics["p_recip/layer1"] == pytest.approx(p[1])
    mechanisms.advance(Moment(30, 0.2))
    hard = [logit > 0 for logit in logits]
    assert mechanisms.penalty() == 0 and mechanisms.statistics()["p_recip"] == sum(hard) / 2
    assert mechanisms.statistics()["balance_loss"] == (sum(hard) - 1) ** 2


def test_a_budget_that_ends_before_the_decision_is_said(configuration):
    one = model(configuration)
    mechanisms = Mechanisms(one)
    assert mechanisms.inactive() == ("controllers.direction: the directions were never fixed: the budget ended before 20 steps "
                                     "and 0.1 of it were done")
    mechanisms.advance(Moment(30, 0.2))
    assert mechanisms.inactive() is None and Mechanisms(GPT(configuration("RAALL0"))).inactive() is None


def test_the_loops_optimizer_moves_the_logits_until_the_decision_and_not_after(configuration):
    """They once had no gradient, so that the learned step was the baseline."""
    cfg = configuration("RALEARN0", GPT2_DROPOUT="0.0", DIRECTION_MIN_STEPS=3, DIRECTION_SHARE="0.3")
    one = GPT(cfg).train()
    optimizer, mechanisms = optimizers.build(one, cfg), Mechanisms(one)
    group, = (g for g in optimizer.param_groups if g["name"] == "structure")
    assert group["names"] == [f"transformer.h.{n}.attn.direction.logit" for n in range(2)] and group["weight_decay"] == 0
    tokens = torch.randint(256, (10, 2, 33), generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(7):
        mechanisms.advance(Moment(step, step / 10))
        loss = one(tokens[step, :, :-1], tokens[step, :, 1:])[1] + mechanisms.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append([block.attn.direction.logit.item() for block in one.transformer.h])
    assert all(seen[0][n] != 0 and seen[1][n] != seen[0][n] for n in range(2))
    assert seen[2] != seen[1] and seen[2:] == [seen[2]] * 5
    assert directions(one) == [logit > 0 for logit in seen[2]]


def test_a_loaded_state_is_decided_as_it_was_saved(configuration):
    one, x = model(configuration), torch.arange(20).view(1, 20)
    undecided = copy.deepcopy(one.state_dict())
    Mechanisms(one).advance(Moment(30, 0.2))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = GPT(configuration("RALEARN0")).eval()
    fresh.load_state_dict(saved)
    assert directions(fresh) == [True, False] and torch.equal(fresh(x)[0], one(x)[0])
    assert Mechanisms(fresh).advance(Moment(31, 0.21)) is False, "a resumed run does not decide again"
    fresh.load_state_dict(undecided)  # what the loop does after its warm-up steps
    assert directions(fresh) == [None, None] and Mechanisms(fresh).advance(Moment(31, 0.21)) is True

    with torch.device("meta"):
        empty = GPT(configuration("RALEARN0"))
    empty.load_state_dict(saved, assign=True)
    assert directions(empty) == [True, False] and torch.equal(empty.eval()(x)[0], one(x)[0])


def test_a_parents_state_without_directions_leaves_them_undecided(configuration):
    one = GPT(configuration("RALEARN0"))
    found = one.load_state_dict(GPT(configuration("V0")).state_dict(), strict=False)
    assert not found.unexpected_keys and directions(one) == [None, None]


def test_a_copy_is_decided_by_its_own_controller(configuration):
    one = model(configuration)
    other = copy.deepcopy(one)
    Mechanisms(other).advance(Moment(30, 0.2))
    assert directions(other) == [True, False] and directions(one) == [None, None]


# Steps, rules

def test_which_layers_of_a_step_are_reciprocal(configuration):
    def layers(step, depth):
        cfg = configuration(step).replace(GPT2_N_LAYER=depth)
        return [DirectionAttention.from_config(cfg, layer).reciprocal for layer in range(depth)]

    assert layers("RAEARLY0", 12) == [True] * 6 + [False] * 6 and layers("RALATE0", 12) == [False] * 6 + [True] * 6
    assert layers("RAEARLY0", 3) == [True, False, False] and layers("RALATE0", 3) == [False, True, True]
    assert layers("RAALL0", 3) == [True] * 3 and layers("RALEARN0", 3) == [None] * 3


@pytest.mark.parametrize("step", STEPS)
def test_the_steps_obey_the_laws_and_are_gpt2_in_function_class(configuration, step):
    reference = Subject("V0", configuration("V0", GPT2_BLOCK_SIZE=32))
    assert broken_laws(Subject(step, configuration(step, GPT2_BLOCK_SIZE=32), None, reference)) == []
    assert key(configuration(step)) == key(configuration("V0"))


@pytest.mark.parametrize("step", ["B", "RALEARN", "RAEARLY", "RALATE", "RAALL"])
def test_suffix_1_is_the_same_step_at_twice_the_rate(step):
    one, other = (load("gpt2-ra-direction-ablation", f"{step}{n}").as_json() for n in (0, 1))
    assert {name: value for name, value in other.items() if value != one[name]} == {"LEARNING_RATE_MULT": 2.0}
    assert one["LEARNING_RATE"] * other["LEARNING_RATE_MULT"] == pytest.approx(1.2e-3) and one["LEARNING_RATE_MULT"] == 1.0


def test_one_layer_has_no_first_half():
    small = {"MODEL_CUSTOM": True, "GPT2_N_LAYER": 1}
    assert refusal(load, "gpt2-ra-direction-ablation", "RAEARLY0", small) == (
        "DIRECTION_EARLY is set, but one layer has no first half.", "choose DIRECTION_ALL, or a model of two layers and more.")
    assert load("gpt2-ra-direction-ablation", "RALATE0", small)


@pytest.mark.parametrize("iterations, share, said", [(20, 0.1, True), (21, 0.1, False), (21, 0.96, True), (25, 0.96, False),
                                                     (250, 0.1, False)])
def test_a_budget_too_short_to_decide_is_said_beforehand(configuration, iterations, share, said):
    """And what is said is what happens."""
    cfg = configuration("RALEARN0", GPT2_MAX_ITERS=iterations, DIRECTION_SHARE=str(share))
    sentence = f"the directions are fixed after 20 steps and {share:g} of the budget, and so never in {iterations} iterations"
    assert (sentence in warnings(cfg)) is said
    one = GPT(cfg.replace(GPT2_N_EMBD=16))
    for iteration in range(iterations):
        one.controllers["direction"].advance(Moment(iteration, iteration / iterations))
    assert (one.controllers["direction"].inactive() is not None) is said
