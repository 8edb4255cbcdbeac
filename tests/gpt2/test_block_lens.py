"""The block with a route gate, and the lens steps as wholes: their laws, and which of them are one function class."""

import pytest
import torch

from gpt2.block import Block
from gpt2.function_class import key
from gpt2.laws import Subject, broken_laws
from gpt2.model import GPT
from lib.config import load
from lib.mechanisms import Mechanisms
from lib.steps import step_header, step_path

STEPS = ("L0", "L1", "L2", "L3", "L4", "L5", "L6", "L7")


def moved(cfg, size=0.05):
    """A model whose every parameter is away from its start."""
    model = GPT(cfg).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(generator=generator) * size)
    return model.double()


def tokens(cfg, T=20):
    return torch.randint(cfg.VOCAB_SIZE, (2, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", ["y", "n"])
@pytest.mark.parametrize("step", STEPS)
def test_steps_obey(configuration, step, bias):
    reference = Subject("V0", configuration("V0", GPT2_BIAS=bias))
    cfg = configuration(step, GPT2_BIAS=bias)
    assert broken_laws(Subject(step, cfg, step_header(step_path(step), "Equals"), reference)) == []


def test_the_study_loads_each_step_with_what_its_name_says():
    cfgs = {step: load("gpt2-lens-ablation+tiny", step) for step in STEPS}
    symbols = ("ATTENTION_LENS", "LENS_TRANSPOSE", "LENS_COLUMN_BIAS", "LENS_ROUTE_GATE", "LENS_LATENT_KV", "CONTEXT_CONDUCTOR")
    found = {step: "".join("01"[getattr(cfg, s)] for s in symbols) for step, cfg in cfgs.items()}
    assert found == {"L0": "000000", "L1": "110000", "L2": "101000", "L3": "111000", "L4": "111000", "L5": "111100",
                     "L6": "111110", "L7": "111111"}
    full = load("gpt2-lens-ablation", "L7")
    with torch.device("meta"):
        sizes = GPT(full).sizes()
    assert sizes["latent"] == sizes["context_rank"] == 128


def test_the_baseline_is_the_baseline(configuration):
    """An earlier implementation scaled its scores by .755 and computed attention by hand."""
    one, other = GPT(configuration("L0")).eval(), GPT(configuration("V0")).eval()
    x = tokens(configuration("L0"))
    assert torch.equal(one(x)[0], other(x)[0])


def test_without_mlp_there_is_none(configuration):
    """An earlier implementation ignored the switch."""
    with_mlp, without = GPT(configuration("L3")), GPT(configuration("L4"))
    assert not any("mlp" in name or "ln_2" in name for name, _ in without.named_parameters())
    with torch.no_grad():
        for block in with_mlp.transformer.h:
            for p in block.mlp.c_proj.parameters():
                p.zero_()
    x = tokens(configuration("L4"))
    assert torch.equal(with_mlp.eval()(x)[0], without.eval()(x)[0])


def test_the_formula_of_the_block(configuration):
    for step in ("L5", "L6", "L7"):
        block = moved(configuration(step)).transformer.h[1]
        x = torch.randn(2, 9, 128, dtype=torch.float64)
        g = 1 / (1 + torch.exp(-block.route_logit))
        attended = block.attn(block.ln_1(x))
        mid = x + g * attended
        mlp = block.mlp(block.ln_2(mid), attended, 1 - g) if step == "L7" else block.mlp(block.ln_2(mid), attended)
        torch.testing.assert_close(block(x), mid + (1 - g) * mlp, rtol=0, atol=1e-12)


def test_the_route_gate_starts_at_nine_tenths_and_is_logged(configuration):
    """An earlier log showed 0.000."""
    model = GPT(configuration("L5"))
    found = Mechanisms(model).statistics(by_layer=True)
    assert {name for name in found if name.startswith("route_gate")} == {
        *(f"route_gate_{kind}" for kind in ("mean", "min", "max", "std")), "route_gate/layer0", "route_gate/layer1"}
    assert found["route_gate_mean"] == pytest.approx(0.9002495)
    with torch.no_grad():
        model.transformer.h[0].route_logit.fill_(0.0)
    assert Mechanisms(model).statistics()["route_gate_min"] == 0.5


def test_the_conductor_acts_at_its_start_and_has_gradient(configuration):
    """A threshold of the gate at 1/2 has no gradient, and from a start of 0.9 the context would never have been used."""
    block = moved(configuration("L7")).transformer.h[0]
    with torch.no_grad():
        block.route_logit.fill_(2.2)
    x, attended = torch.randn(2, 1, 4, 128, dtype=torch.float64)
    share = block.route()[1]
    with_context = block.mlp(x, attended, share)
    assert (with_context - block.mlp(x)).abs().max() > 1e-3
    with_context.square().sum().backward()
    assert block.route_logit.grad.abs().item() > 1e-6, "through the conductor alone"


@pytest.mark.parametrize("step", STEPS)
def test_collapse_is_exact_and_leaves_the_model_alone(configuration, step):
    cfg = configuration(step)
    model = moved(cfg)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = tokens(cfg)
    simple = model.collapse()
    torch.testing.assert_close(simple(x)[0], model(x)[0], rtol=0, atol=1e-10)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(type(block) is Block for block in simple.transformer.h)


def test_which_steps_are_one_function_class(configuration):
    """The collapsed models have the same modules and tensors: a difference between such steps is optimisation only."""
    def shape(step):
        simple = GPT(configuration(step)).collapse()
        return {name: (type(module).__name__, *((n, p.shape) for n, p in module.named_parameters(recurse=False)))
                for name, module in simple.named_modules()}

    shapes = {step: shape(step) for step in (*STEPS, "V0")}
    same = lambda *steps: all(shapes[step] == shapes[steps[0]] for step in steps)  # noqa: E731
    assert same("V0", "L0", "L2") and same("L1", "L3", "L5") and same("L6", "L7")
    assert key(configuration("L5")) == key(configuration("L1")) and key(configuration("L7")) == key(configuration("L6"))
    assert len({str(shapes[step]) for step in ("L0", "L1", "L4", "L6")}) == 4


def test_the_collapse_of_a_gate_that_is_all_but_shut(configuration):
    """Its fold divides by g."""
    cfg = configuration("L7")
    model = moved(cfg)
    with torch.no_grad():
        model.transformer.h[0].route_logit.fill_(-20.0)
        model.transformer.h[1].route_logit.fill_(20.0)
    x = tokens(cfg)
    torch.testing.assert_close(model.collapse()(x)[0], model(x)[0], rtol=0, atol=1e-8)


def test_parts_that_are_off_take_no_part(configuration):
    block = moved(configuration("L7")).transformer.h[0]
    x = torch.randn(1, 5, 128, dtype=torch.float64)
    block.attn.on = False
    torch.testing.assert_close(block(x), x + block.route()[1] * block.mlp(block.ln_2(x)), rtol=0, atol=1e-12)
    block.mlp.on = False
    assert torch.equal(block(x), x)


def test_it_runs_under_autocast(configuration):
    block, x = GPT(configuration("L7")).transformer.h[0], torch.randn(2, 8, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    y.square().sum().backward()
    assert y.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in block.parameters())


def test_it_compiles_into_one_graph_forward_and_backward(configuration):
    block, x = GPT(configuration("L7", GPT2_DROPOUT="0.0")).transformer.h[0], torch.randn(2, 8, 128)
    block(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)(x).square().sum().backward()
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)
