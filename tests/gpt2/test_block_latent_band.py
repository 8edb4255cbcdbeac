"""The couplings between attention and MLP: formulas written out, what they see, what they leave behind, and the laws."""

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.block import Block, Context
from gpt2.block_latent_band import LatentBandBlock
from gpt2.coupling import set_ra_mlp_coupling_scale
from gpt2.laws import Subject, broken_laws
from gpt2.mlp.latent_band import strongest
from gpt2.model import GPT, expected_parameters
from lib import optimizers
from lib.config import load
from lib.mechanisms import Mechanisms
from tests.gpt2.attention.test_latent_band import written_out

COUPLED = ("G2M1", "G2M2", "G2M3", "G2A")
STEPS = ("G2N", "G2", *COUPLED)
LAYERS, T = 3, 20


@pytest.fixture(scope="module")
def small(configuration):
    """small(step): a model of three narrow layers, whose weights and shares are so large that nothing goes unseen."""
    def build(step, dtype=torch.float64, noise=0.15, **symbols):
        cfg = configuration(step).replace(GPT2_N_LAYER=LAYERS, GPT2_N_EMBD=32, GPT2_N_HEAD=4, VOCAB_SIZE=64, **symbols)
        model = GPT(cfg).to(dtype).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator).to(dtype), alpha=noise)
        return model
    return build


def tokens(rows=2, seed=3):
    return torch.randint(64, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference(configuration):
    return Subject("V0", configuration("V0"))


@pytest.mark.parametrize("step", STEPS)
def test_the_laws(configuration, reference, step):
    assert broken_laws(Subject(step, configuration(step), None, reference)) == []


# What is computed

def mixed(weights, features):
    """Row by row: the eight largest weights, renormalised."""
    out = torch.zeros_like(features)
    for b in range(features.size(0)):
        for t in range(features.size(1)):
            chosen = sorted(range(t + 1), key=lambda j: -weights[b, t, j])[:8]
            out[b, t] = sum(weights[b, t, j] * features[b, j] for j in chosen) / sum(weights[b, t, j] for j in chosen)
    return out


@pytest.mark.parametrize("step", COUPLED)
@torch.no_grad()
def test_the_formula(small, step):
    """Block after block, with the attention's own reference in float64."""
    model, idx = small(step), tokens()
    x, hidden = model.transformer.wte(idx) + model.transformer.wpe.weight[:T], None
    for block in model.transformer.h:
        attended, latents, weights = written_out(block.attn, block.ln_1(x), hidden)
        x = x + attended
        mlp, h = block.mlp, F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        if step in ("G2M3", "G2A"):
            h = h + mlp.exchange_alpha * (latents @ mlp.from_latent.weight.T)
        if step in ("G2M2", "G2A"):
            h = h + mlp.cross_alpha * (mixed(weights, h @ mlp.mix_down.weight.T) @ mlp.mix_up.weight.T)
        x, hidden = x + mlp.c_proj(h), h
    torch.testing.assert_close(model(idx)[0], model.lm_head(model.transformer.ln_f(x)), rtol=0, atol=1e-9)


def test_the_strongest_weights():
    """Fewer than eight are kept whole; of equals at the border all are kept; gradient reaches those kept."""
    few = torch.tensor([[0.5, 0.25, 0.25]])
    assert torch.equal(strongest(few), few) and torch.equal(strongest(few, 1), torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(strongest(few, 2), few)
    padded = torch.tensor([[1.0] + [0.0] * 20])
    assert torch.equal(strongest(padded), padded)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept = strongest(logits.softmax(-1))
    assert ((kept > 0).sum(-1) == 8).all() and torch.allclose(kept.sum(-1), torch.ones(3))
    kept.square().sum().backward()
    assert torch.equal(logits.grad.abs() > 1e-6, kept > 0)


@pytest.mark.parametrize("neutral", ["alphas", "scale"])
@pytest.mark.parametrize("step", ["G2", *COUPLED])
@torch.no_grad()
def test_neutral_is_latent_attention_and_anything_else_is_not(small, step, neutral):
    plain, model, idx = small("G2N"), small(step), tokens()
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert (model(idx)[0] - plain(idx)[0]).abs().max() > 1e-2
    if neutral == "scale":
        set_ra_mlp_coupling_scale(model, 0.0)
    else:
        for module in model.modules():
            for name in getattr(module, "gate_parameters", ()):
                if getattr(module, name) is not None:
                    getattr(module, name).zero_()
    torch.testing.assert_close(model(idx)[0], plain(idx)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("step", COUPLED)
@torch.no_grad()
def test_a_coupling_adds_to_the_band(small, step):
    with_band, model, idx = small("G2"), small(step), tokens()
    model.load_state_dict(with_band.state_dict(), strict=False)
    assert (model(idx)[0] - with_band(idx)[0]).abs().max() > 1e-2


# What is seen

@pytest.mark.parametrize("training, scale", [(False, 0.5), (True, 1.0), (True, 0.0)])
@pytest.mark.parametrize("step", STEPS)
@torch.no_grad()
def test_no_output_depends_on_a_later_token_nor_on_another_row(small, step, training, scale):
    model, idx = small(step).train(training), tokens()
    set_ra_mlp_coupling_scale(model, scale)
    for at in (1, 13, T - 1):
        other = idx.clone()
        other[0, at:] = (other[0, at:] + 7) % 64
        found = []
        for one in (idx, other):
            torch.manual_seed(0)
            found.append(model(one)[0])
        same = (found[0] - found[1]).abs().amax(2)
        assert same[0, :at].max() < 1e-10 and same[1].max() < 1e-10 and same[0, at] > 1e-3


@pytest.mark.parametrize("sizes", [(1,) * T, (5, 1, 1, 13), (3, 3, 7, 7)])
@pytest.mark.parametrize("step", STEPS)
@torch.no_grad()
def test_decoding_in_chunks_equals_the_full_pass(small, step, sizes):
    model, idx = small(step), tokens()
    cache = model.new_cache(2, T)
    parts = torch.cat([model(part, cache=cache)[0] for part in idx.split(sizes, 1)], 1)
    torch.testing.assert_close(parts, model(idx)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("step", ["G2", "G2A"])
@torch.no_grad()
def test_autocast_and_a_bfloat16_cache_keep_its_precision(small, step):
    """Where two weights are equal up to rounding, another one of them may be mixed in; so the bulk is compared."""
    model, idx = small(step, torch.float32, noise=0.05), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, T, torch.bfloat16)
        parts = torch.cat([model(part, cache=cache)[0] for part in idx.split((9, 1, 10), 1)], 1)
        full = model(idx)[0]
    exact = model(idx)[0]
    for found in (parts, full):
        assert (found - exact).float().norm() < 0.05 * exact.norm()


# What is left behind

@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("step", COUPLED)
def test_what_came_before_leaves_no_trace(small, step, training):
    """Other batches, of another size too, before the same input: the same bits."""
    outputs = []
    for before in ((), (tokens(2, 5),), (tokens(3, 6), tokens(1, 7))):
        model = small(step).train(training)
        for batch in before:
            model(batch, batch)[1].backward()
        torch.manual_seed(0)
        outputs.append(model(tokens())[0])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("step", COUPLED)
def test_backward_twice_in_a_row(small, step):
    """A graph of the batch before would be gone already; here gradients of two equal passes just add up."""
    model, idx = small(step), tokens()
    grads = []
    for _ in range(2):
        model(idx, idx)[1].backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, once in grads[0].items():
        torch.testing.assert_close(grads[1][name], 2 * once, rtol=1e-9, atol=1e-12)


def test_a_block_without_a_context_receives_nothing_and_keeps_nothing(small):
    block = small("G2A").transformer.h[1]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    before = set(vars(block)), set(vars(block.attn)), set(vars(block.mlp))
    assert torch.equal(block(x), block(x))
    assert before == (set(vars(block)), set(vars(block.attn)), set(vars(block.mlp)))


# Parameters, sizes, names

@pytest.mark.parametrize("step", STEPS)
def test_every_entry_of_what_a_coupling_adds_learns_whatever_the_depth(small, step):
    """The first layer receives nothing, so it has no parameters to receive by; the last one hands nothing on."""
    model, idx = small(step), tokens()
    model(idx, idx)[1].backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
    own = [{name for name, _ in block.named_parameters()} for block in model.transformer.h]
    gates, exchange = step in ("G2M1", "G2A"), step in ("G2M3", "G2A")
    received = {"attn.head_gate.weight", "attn.gate_alpha"} if gates else set()
    received |= {"attn.from_mlp.weight", "attn.exchange_alpha"} if exchange else set()
    assert own[1] == own[2] and own[1] - own[0] == received and not own[0] - own[1]


@pytest.mark.parametrize("depth, bias", [(1, True), (3, False)])
@pytest.mark.parametrize("step", STEPS)
def test_parameters_in_closed_form_at_any_depth(configuration, step, depth, bias):
    cfg = configuration(step).replace(GPT2_N_LAYER=depth, GPT2_BIAS=bias)
    with torch.device("meta"):
        model = GPT(cfg)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(cfg)


def test_sizes_at_gpt2():
    """L = 128, a band of 64; per token and layer 256 latents, 48 of queries and 128 of features, where GPT-2 has 1536."""
    found = {}
    for step in STEPS:
        cfg = load("gpt2-ra-ablation", step, {})
        with torch.device("meta"):
            model = GPT(cfg)
        found[step] = model.new_cache(1, dtype=torch.bfloat16).nbytes() / (12 * 1024 * 2)
        assert sum(p.numel() for p in model.parameters()) == expected_parameters(cfg)
        sizes = model.sizes()
        assert sizes["latent"] == 128 and sizes.get("band_window") == (None if step == "G2N" else 64) and sizes["d_ff"] == 3072
    assert found == {"G2N": 256, "G2": 304, "G2M1": 304, "G2M2": 432, "G2M3": 304, "G2A": 432}


@torch.no_grad()
def test_what_is_known_to_be_simpler(small):
    idx = tokens()
    for step in STEPS:
        model = small(step)
        simpler = model.collapse()
        torch.testing.assert_close(simpler(idx)[0], model(idx)[0], rtol=0, atol=1e-10)
        blocks = {(type(block), type(block.attn)) for block in simpler.transformer.h}
        if step == "G2N":
            assert blocks == {(Block, CausalSelfAttention)}
        else:
            assert {block for block, _ in blocks} == {LatentBandBlock if step in COUPLED else Block}


def test_statistics(small):
    names = {"ra_alpha", "mlp_gate_alpha", "mlp_cross_alpha", "mlp_recip_alpha"}
    found = Mechanisms(small("G2A", noise=0.0)).statistics(by_layer=True)
    assert {name.removesuffix("_mean") for name in found if name.endswith("_mean")} == names
    assert [found[f"{name}_mean"] for name in sorted(names)] == pytest.approx([0.3, 0.1, 0.2, 0.5])
    assert "mlp_gate_alpha/layer1" in found and "mlp_gate_alpha/layer0" not in found


@pytest.mark.parametrize("step", ["G2N", "G2A"])
def test_a_few_steps_of_training_lower_the_loss(small, configuration, step):
    model, idx = small(step, torch.float32, noise=0.0).train(), tokens(4)
    optimizer = optimizers.build(model, configuration(step))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_block_compiles_into_one_graph_forward_and_backward(small):
    block = small("G2A", torch.float32).transformer.h[1]
    generator = torch.Generator().manual_seed(0)
    x, hidden = torch.randn(2, 16, 32, generator=generator), torch.randn(2, 16, 128, generator=generator)

    def gradients(run):
        block.zero_grad()
        context = Context(x, {"hidden": hidden})
        (run(x, None, context).square().sum() + context.handed["hidden"].sum()).backward()
        return {name: p.grad.clone() for name, p in block.named_parameters()}

    found = gradients(torch.compile(block, fullgraph=True, backend="eager", dynamic=False))
    torch.testing.assert_close(found, gradients(block), rtol=1e-3, atol=1e-3)
