"""Router attention: the formula, what the router sees, its two phases, its penalty and its gradient."""

import copy
import io
import math
import pickle
from itertools import product

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.router import Router, RouterAttention, features
from gpt2.block import Context
from gpt2.laws import Subject, broken_laws
from gpt2.layers import init_weights
from gpt2.model import GPT, expected_parameters
from gpt2.rules import warnings
from lib import optimizers
from lib.config import load
from lib.mechanisms import Mechanisms, Moment
from tests.harness import refusal

E, H, D, RA = 64, 4, 16, 1
SIZES = [(1,) * 12, (5, 1, 1, 5), (12,), (1, 11), (3, 4, 5)]
ROUTER = {"router.c_fc.weight", "router.c_fc.bias", "router.c_out.weight", "router.c_out.bias"}


def build(bias=True, dropout=0.0, routing=True, **options):
    """A module with random weights and biases, whose router has opinions."""
    torch.manual_seed(0)
    module = RouterAttention(E, H, RA, dropout, bias, **options).eval()
    init_weights(module, 0)
    with torch.no_grad():
        module.c_attn.weight.mul_(10)  # or attention would be nearly uniform
        for name, p in module.named_parameters():
            if name in ROUTER or name.endswith("bias"):
                p.normal_()
    module.routing.fill_(float(routing))
    return module


def baseline(module):
    plain = CausalSelfAttention(E, H, module.dropout, module.c_attn.bias is not None).to(module.c_attn.weight).eval()
    plain.load_state_dict({name: p for name, p in module.state_dict().items() if name.startswith("c_")})
    return plain


def inputs(B=2, T=9, dtype=torch.float32):
    """A layer's input and the context of its pass."""
    generator = torch.Generator().manual_seed(1)
    x, embedding = (torch.randn(B, T, E, dtype=dtype, generator=generator) for _ in range(2))
    return x, Context(0.03 * embedding)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias):
    """Token by token in float64, with two output projections from two groups of heads."""
    module = build(bias).double()
    x, context = inputs(2, 6, torch.float64)
    B, T, _ = x.shape
    q, k, v = F.linear(x, module.c_attn.weight, module.c_attn.bias).split(E, 2)
    fc, out = module.router.c_fc, module.router.c_out
    W_full, W_ra = module.c_proj.weight.split([E - RA * D, RA * D], 1)
    expected = torch.zeros(B, T, E, dtype=torch.float64)
    for b, i in product(range(B), range(T)):
        heads = []
        for h in range(H):
            at = slice(h * D, (h + 1) * D)
            weights = [torch.exp(q[b, i, at] @ k[b, j, at] / math.sqrt(D)) for j in range(i + 1)]
            heads.append(sum(w / sum(weights) * v[b, j, at] for j, w in enumerate(weights)))
        token, emb = x[b, i], context.embedding[b, i]
        e = (emb - emb.mean()) / torch.sqrt(emb.var(unbiased=False) + 1e-5)
        f = torch.stack([(token - e).norm() / 8, token.norm() / 8, emb.norm() / 8, token @ e / 64])
        hidden = F.gelu(F.linear(f, fc.weight, fc.bias), approximate="tanh")
        p_ra, p_full = torch.softmax(F.linear(hidden, out.weight, out.bias), 0)
        expected[b, i] = 2 * p_full * (W_full @ torch.cat(heads[:-RA])) + 2 * p_ra * (W_ra @ torch.cat(heads[-RA:]))
    if bias:
        expected += module.c_proj.bias
    torch.testing.assert_close(module(x, context=context), expected, rtol=0, atol=1e-5)  # features are float32
    assert module.p_full == 0.5, "evaluation leaves the statistics alone"


@pytest.mark.parametrize("training", [False, True])
def test_the_fixed_mix_is_gpt2_bit_for_bit(training):
    module = build(routing=False).train(training)
    x, context = inputs()
    plain = baseline(module).train(training)
    assert torch.equal(module(x, context=context), plain(x))
    module.routing.fill_(1.0)
    assert (module(x, context=context) - plain(x)).abs().max() > 1e-2


def test_a_router_without_opinion_is_the_fixed_mix():
    module = build()
    with torch.no_grad():
        module.router.c_out.weight.zero_()
        module.router.c_out.bias.fill_(3.0)
    x, context = inputs()
    assert torch.equal(module(x, context=context), baseline(module)(x))


def test_the_start_is_almost_gpt2(configuration):
    """The router starts small, so routing begins near the mix that training was used to."""
    routed, plain = (GPT(configuration(step)).eval() for step in ("RT1", "V0"))
    x = torch.arange(32).view(1, 32)
    worst = (routed(x)[0] - plain(x)[0]).abs().max()
    assert 0 < worst < 5e-3


# Features

def test_the_features_do_not_grow_with_the_width_and_name_their_parts():
    for width in (64, 1024):
        torch.manual_seed(0)
        x, embedding = torch.randn(3, 50, width), 0.028 * torch.randn(3, 50, width)
        shift, size, token, product_ = features(x, embedding).mean((0, 1)).tolist()
        assert shift == pytest.approx(2 ** 0.5, abs=0.05) and size == pytest.approx(1, abs=0.05)
        assert token == pytest.approx(0.028, abs=0.002) and product_ == pytest.approx(0, abs=0.02)


def test_the_shift_is_zero_where_context_has_added_nothing():
    torch.manual_seed(0)
    embedding = 0.028 * torch.randn(2, 5, E)
    found = features(F.layer_norm(embedding, (E,)), embedding)
    assert found[..., 0].abs().max() < 1e-5 and found[..., 3].sub(1).abs().max() < 0.05


def test_features_of_a_token_that_is_its_embedding_have_a_finite_gradient():
    x = F.layer_norm(torch.randn(1, 3, E), (E,)).requires_grad_()
    features(x, x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_without_a_stream_the_input_stands_for_its_embedding():
    module = build()
    x, _ = inputs()
    assert torch.equal(module(x), module(x, context=Context(x)))


def test_the_model_hands_the_embedding_to_every_layer(configuration):
    one = GPT(configuration("RT1", GPT2_DROPOUT="0.0")).eval()
    seen = []
    for block in one.transformer.h:
        block.attn.router.register_forward_hook(lambda module, given, out: seen.append(given[1]))
    idx = torch.arange(12).view(1, 12)
    one(idx)
    expected = one.transformer.wte(idx) + one.transformer.wpe.weight[:12]
    assert len(seen) == 2 and all(torch.equal(embedding, expected) for embedding in seen)


# What a decision may depend on

@pytest.mark.parametrize("training", [False, True])
def test_no_decision_looks_at_later_tokens_or_other_samples(training):
    """An earlier implementation took a majority over the whole batch."""
    module = build().train(training)
    x, context = inputs(3, 20)
    base = module(x, context=context)
    other, embedding = x.clone(), context.embedding.clone()
    other[0, 9:] += 3 * torch.randn(11, E)
    embedding[0, 9:] *= 5
    moved = module(other, context=Context(embedding))
    assert torch.equal(moved[0, :9], base[0, :9]) and torch.equal(moved[1:], base[1:])
    assert not torch.equal(moved[0, 9], base[0, 9])
    torch.testing.assert_close(module(x[1:2], context=Context(context.embedding[1:2])), base[1:2], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("sizes", SIZES)
def test_decoding_in_chunks_equals_the_full_pass(sizes, dtype, tolerance):
    module = build().to(dtype)
    x, context = inputs(3, 12, dtype)
    cache = module.new_cache(3, 12, dtype, "cpu")
    parts = [module(part, cache, Context(embedding))
             for part, embedding in zip(x.split(sizes, 1), context.embedding.split(sizes, 1), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x, context=context), rtol=0, atol=tolerance)


# Gradient, groups, penalty

def test_gradient_reaches_every_row_of_the_router_through_the_loss_alone():
    """An earlier router had none, because its decisions were hard."""
    module = build().train()
    x, context = inputs()
    module(x, context=context).square().sum().backward()
    for name, p in module.named_parameters():
        rows = p.grad.flatten(1).norm(dim=1) if p.ndim > 1 else p.grad.abs()
        rows = rows[torch.cat([torch.ones(E), torch.zeros(E), torch.ones(E)]) > 0] if name == "c_attn.bias" else rows
        assert rows.min() > 1e-7 * rows.max() > 0, name


def test_the_routers_parameters_learn_as_structure(configuration):
    cfg = configuration("RT1")
    one = GPT(cfg)
    groups = {g["name"]: g for g in optimizers.build(one, cfg).param_groups}
    assert set(groups["structure"]["names"]) == {f"transformer.h.{n}.attn.{name}" for n in range(2) for name in ROUTER}
    assert groups["structure"]["weight_decay"] == 0
    without = optimizers.build(GPT(configuration("RT1", GPT2_BIAS=False)), cfg)
    assert sum(name.count("router") for g in without.param_groups for name in g["names"]) == 4


def test_the_penalty_is_the_mean_share_of_the_full_path(configuration):
    """Over tokens and, in a model, layers; with its gradient, once a forward pass."""
    module = build(penalty=0.5).train()
    x, context = inputs()
    module(x, context=context)
    p_full = module.router(x, context.embedding)
    penalty = module.penalty()
    torch.testing.assert_close(penalty, 0.5 * p_full.mean())
    expected = torch.autograd.grad(0.5 * p_full.mean(), list(module.router.parameters()))
    penalty.backward()
    for p, grad in zip(module.router.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
        assert grad.abs().sum() > 0
    assert module.penalty() == 0 and module.penalty().shape == (), "it was taken"

    one = GPT(configuration("RT1", ROUTER_PENALTY="0.02")).train()
    one(torch.arange(32).view(1, 32))
    mechanisms = Mechanisms(one)
    mean = mechanisms.statistics()["p_full"]
    assert mechanisms.penalty().item() == pytest.approx(0.02 * mean, rel=1e-5) and mean == pytest.approx(0.5, abs=0.01)


def test_the_penalty_lowers_the_share_of_the_full_path():
    module = build(penalty=1.0).train()
    optimizer = torch.optim.Adam(module.router.parameters(), lr=0.05)
    x, context = inputs()
    shares = []
    for _ in range(10):
        module(x, context=context)
        shares.append(module.p_full.item())
        optimizer.zero_grad()
        module.penalty().backward()
        optimizer.step()
    assert shares[-1] < shares[0] - 0.1


def test_a_penalty_is_set_in_training_only_and_its_graph_is_not_kept():
    module = build(penalty=0.5)
    x, context = inputs()
    module(x, context=context)
    assert module.pending is None and module.penalty() == 0
    module.train()
    with torch.no_grad():
        module(x, context=context)
    assert module.pending is None and module.penalty() == 0
    module(x, context=context)
    assert module.pending.requires_grad
    module.eval()(x, context=context)
    assert module.pending is None, "the next pass forgets it"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_model_can_be_copied_between_forward_and_penalty(duplicate):
    module = build(penalty=0.5).train()
    x, context = inputs()
    module(x, context=context)
    other = duplicate(module)
    assert other.pending is None and module.pending is not None and other.penalty() == 0 and module.penalty() > 0
    assert torch.equal(other(x, context=context), module(x, context=context))


# Phases

def test_the_loop_begins_with_the_fixed_mix_and_routes_once_the_loss_has_fallen(configuration):
    one = GPT(configuration("RT1")).train()
    mechanisms = Mechanisms(one)
    attentions = [block.attn for block in one.transformer.h]

    def routing():
        found = {a.routing.item() for a in attentions}
        assert len(found) == 1
        return found.pop()

    assert routing() == 1, "built outside the loop"
    for moment, expected in [
        (Moment(0, 0.0), 0), (Moment(1, 0.01), 0),
        (Moment(50, 0.2, None, 4.0, 4.0), 0), (Moment(100, 0.4, None, 4.0, 3.41), 0), (Moment(150, 0.6, None, 4.0, 3.4), 1),
        (Moment(200, 0.8, None, 4.0, 3.9), 1),  # for good
    ]:
        assert mechanisms.advance(moment) is False, "no program changes"
        assert routing() == expected
        assert (mechanisms.inactive() is None) is (expected == 1)
    one(torch.arange(32).view(1, 32))
    assert mechanisms.penalty() > 0
    mechanisms.advance(Moment(0, 0.0))
    assert mechanisms.inactive() == ("transformer.h.0.attn: routing never began: no evaluation was 15% below "
                                      "the loss of the untrained model")


def test_before_the_fall_the_router_gets_neither_penalty_nor_gradient(configuration):
    cfg = configuration("RT1", ROUTER_PENALTY="1.0")
    one = GPT(cfg).train()
    optimizer, mechanisms = optimizers.build(one, cfg), Mechanisms(one)
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    tokens = torch.randint(256, (4, 2, 33), generator=torch.Generator().manual_seed(0))
    moved = {}
    for step in range(4):
        fallen = {} if step < 2 else {"first_loss": 4.0, "val_loss": 3.0}
        mechanisms.advance(Moment(step, step / 10, **fallen))
        loss = one(tokens[step, :, :-1], tokens[step, :, 1:])[1]
        penalty = mechanisms.penalty()
        assert (penalty > 0) == (step >= 2)
        (loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved[step] = {name for name, p in one.named_parameters() if not torch.equal(p, before[name])}
        assert (mechanisms.statistics()["p_full"] == 0.5) == (step < 2)
    assert not any("router" in name for name in moved[1]) and any("c_attn" in name for name in moved[1])
    assert sum("router" in name for name in moved[3]) == 2 * len(ROUTER)


def test_the_phase_is_in_the_state_and_the_statistics_are_not(configuration):
    one = GPT(configuration("RT1")).train()
    names = one.state_dict().keys()
    assert "transformer.h.0.attn.routing" in names and not any("p_full" in name for name in names)
    mechanisms = Mechanisms(one)
    mechanisms.advance(Moment(0, 0.0))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    resumed = GPT(configuration("RT1"))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    Mechanisms(resumed).advance(Moment(60, 0.3, None, 4.0, 3.9))
    assert resumed.transformer.h[0].attn.routing == 0
    mechanisms.advance(Moment(100, 0.4, None, 4.0, 3.0))
    resumed.load_state_dict(one.state_dict())
    Mechanisms(resumed).advance(Moment(150, 0.6, None, 4.0, 3.9))
    assert resumed.transformer.h[0].attn.routing == 1


def test_the_statistics_are_those_of_the_last_pass_in_training():
    module = build().train()
    x, context = inputs()
    module(x, context=context)
    p_full = module.router(x, context.embedding).mean()
    module.eval()(x[:, :1], context=Context(context.embedding[:, :1]))
    stats = module.stats()
    torch.testing.assert_close(stats["p_full"], p_full.detach())
    torch.testing.assert_close(stats["p_ra"], 1 - p_full.detach())
    assert all(value.shape == () and not value.requires_grad for value in stats.values())


# Types, compilation, sizes, rules

def test_under_autocast_the_router_stays_in_float32():
    module = build().train()
    x, context = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, context=context)
        assert module.router(x.bfloat16(), context.embedding).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    (out.float().square().sum() + module.penalty()).backward()
    assert all(p.grad.abs().sum() > 0 for p in module.router.parameters())


def test_it_compiles_into_one_graph_and_neither_penalty_nor_phase_compiles_it_anew():
    module = build(penalty=0.5).train()
    x, context = inputs()

    def step(run):
        (run(x, context=context).square().sum() + module.penalty()).backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        module.zero_grad()
        return grads

    module.routing.fill_(1.0)
    expected = step(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    module.routing.fill_(0.0)
    step(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(compiled)
        module.routing.fill_(1.0)
        found = step(compiled)
        compiled(x, context=context)  # its penalty is not asked for
        step(compiled)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.p_full, module.router(x, context.embedding).mean().detach())


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_sizes(configuration, bias):
    cfg = configuration("RT1", GPT2_BIAS=bias)
    assert sum(p.numel() for p in GPT(cfg).parameters()) == expected_parameters(cfg)
    assert sum(p.numel() for p in Router(bias).parameters()) == RouterAttention.extra_parameters(cfg) == 96 + 18 * bias
    full = RouterAttention.from_config(load("gpt2-ra-baseline-vs-routing", "RT1"))
    assert full.sizes() == {"head_dim": 64, "router_ra_heads": 3} and full.strength == pytest.approx(0.01 / 12)
    assert full.collapse() is full


def test_both_paths_have_heads():
    for count in (0, H):
        with pytest.raises(ValueError, match=f"n_ra {count} must be at least 1 and below n_head 4"):
            RouterAttention(E, H, count)
    assert refusal(load, "gpt2-ra-baseline-vs-routing", "RT1", {"ROUTER_RA_HEADS": 12}) == (
        "ROUTER_RA_HEADS=12 (12 heads) leaves none of 12 to the full path.", "set ROUTER_RA_HEADS to at most 11.")
    assert refusal(load, "gpt2-ra-baseline-vs-routing", "RT1", {"MODEL_CUSTOM": True, "GPT2_N_HEAD": 1}) == (
        "ROUTER_RA_HEADS=1/4 (1 heads) leaves none of 1 to the full path.", "choose a model of two heads and more.")
    assert load("gpt2-ra-baseline-vs-routing", "RT1", {"ROUTER_RA_HEADS": 11}).ROUTER_RA_HEADS == 11


@pytest.mark.parametrize("iterations, said", [(51, False), (100, False), (250, False), (50, True)])
def test_a_budget_without_an_evaluation_before_its_end_is_said_beforehand(configuration, iterations, said):
    cfg = configuration("RT1", GPT2_MAX_ITERS=iterations, GPT2_EVAL_INTERVAL=50)
    assert any(sentence.startswith("routing waits for an evaluation") for sentence in warnings(cfg)) is said
    assert not any("routing" in sentence for sentence in warnings(configuration("V0", GPT2_MAX_ITERS=iterations)))


def test_the_step_obeys_the_laws(configuration):
    reference = Subject("V0", configuration("V0", GPT2_BLOCK_SIZE=32))
    assert broken_laws(Subject("RT1", configuration("RT1", GPT2_BLOCK_SIZE=32), None, reference)) == []
