"""Fisher metrics against numpy and closed forms; every kind of attention; what has no such matrix says why."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gpt2 import fisher
from gpt2.attention.baseline import CausalSelfAttention
from gpt2.model import GPT
from gpt2.skip import SkipGate

T, LAYERS, HEADS = 32, 2, 2
# What is one scaled_dot_product_attention a layer, in as many ways as there are.
DEFINED = ("V0", "V1", "V2", "V1T", "KT1", "RAALL0", "OG0", "R1", "M2", "RT1", "G1", "MLA0", "MLAKV0", "G2N", "L1", "L5", "L7")


class IdentityValues(TorchFunctionMode):
    """The kernel's own weights: what it returns for values that are the identity."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            eye = torch.eye(key.size(2)).expand(*key.shape[:2], -1, -1)
            self.weights.append(function(query, key, eye, *rest, **kwargs)[0])
        return function(*args, **(kwargs or {}))


def built(cfg, seed=0):
    """A model whose weights are large enough for attention to be far from uniform."""
    model = GPT(cfg)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0.0, 0.15)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.05)
    return model.eval()


def windows(n=3, length=T):
    return torch.randint(256, (n, length), generator=torch.Generator().manual_seed(1))


def written_out(rows):
    """Row by row in float64: rows [n, T] of one head -> eigmax, trace, energy_r16."""
    rows = np.asarray(rows, np.float64)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for p in rows:
        total += np.diag(p) - np.outer(p, p)
    values = np.sort(np.linalg.eigvalsh(total / len(rows)))[::-1]
    return values[0], values.sum(), values[:16].sum() / values.sum()


def of(p):
    """Metrics of rows p [rows, T] of one head."""
    p = torch.as_tensor(p, dtype=torch.float64)[None]
    return {name: values.item() for name, values in fisher.spectrum(fisher.covariances(p) / p.size(1)).items()}


# One matrix

def random_rows(n=40, length=24):
    generator = torch.Generator().manual_seed(2)
    return (4 * torch.randn(n, length, generator=generator, dtype=torch.float64)).softmax(-1)


def test_random_rows_against_numpy():
    p = random_rows()
    assert list(of(p).values()) == pytest.approx(written_out(p), abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 17, 40])
def test_uniform_attention_has_one_eigenvalue(n):
    """1/n, n - 1 times; and 0. Two equal keys reach the upper bound, one half."""
    p = torch.full((3, n), 1 / n, dtype=torch.float64)
    values = torch.linalg.eigvalsh(fisher.covariances(p[None])[0] / 3)
    assert values.tolist() == pytest.approx([0] + [1 / n] * (n - 1), abs=1e-14)
    found = of(p)
    assert found["eigmax"] == pytest.approx(1 / n, abs=1e-14) and found["trace"] == pytest.approx(1 - 1 / n, abs=1e-14)
    assert found["energy_r16"] == pytest.approx(min(16, n - 1) / (n - 1), abs=1e-12)


def test_eigenvalues_lie_between_zero_and_one_half_and_the_matrix_is_singular():
    for p in random_rows(200, 9):
        matrix = fisher.covariances(p[None, None])
        values = torch.linalg.eigvalsh(matrix[0])
        assert -1e-15 < values[0] < 1e-15 and values[-1] <= 0.5 and matrix.sum(2).abs().max() < 1e-15
        assert of(p[None])["trace"] <= 1 - 1 / 9


def test_a_delta_adds_nothing_and_alone_has_no_energy():
    p, delta = random_rows(), torch.eye(24, dtype=torch.float64)[3:4]
    assert torch.equal(fisher.covariances(delta[None]), torch.zeros(1, 24, 24, dtype=torch.float64))
    with_it = fisher.covariances(torch.cat([p, delta])[None])
    assert torch.allclose(with_it, fisher.covariances(p[None]), rtol=0, atol=1e-14)
    assert of(delta)["trace"] == of(delta)["eigmax"] == 0 and np.isnan(of(delta)["energy_r16"])


def test_only_the_trace_of_the_mean_is_the_mean_of_the_rows_own():
    """Sharp rows that point elsewhere each look flat: what the docstring says of the averaged matrix."""
    pairs = torch.zeros(6, 12)
    for row in range(6):
        pairs[row, 2 * row:2 * row + 2] = 0.5
    own = [of(p[None]) for p in pairs]
    assert all(one["eigmax"] == pytest.approx(0.5) for one in own) and of(pairs)["eigmax"] == pytest.approx(0.5 / 6)
    assert of(pairs)["trace"] == pytest.approx(np.mean([one["trace"] for one in own]))


@pytest.mark.parametrize("options", [
    {"is_causal": True}, {"is_causal": True, "scale": 0.7}, {}, {"attn_mask": torch.ones(5, 5).tril().bool()},
    {"attn_mask": torch.where(torch.ones(5, 5).tril(1) > 0, torch.randn(5, 5), -torch.inf), "scale": 2.0}])
def test_rows_are_those_of_the_kernel(options):
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, **{n: o.double() if n == "attn_mask" and o.dtype != torch.bool else o
                                                          for n, o in options.items()})
    p = fisher.softmax_rows(q, k, **options)
    assert p.dtype == torch.float64 and torch.allclose(p @ v, expected, atol=1e-12)


# Models

@pytest.mark.parametrize("step", DEFINED)
def test_a_model_against_numpy_over_the_kernels_own_weights(configuration, step):
    model, idx = built(configuration(step)), windows(2)
    found, reasons = fisher.measure(model, idx)
    assert reasons == {} and len(found) == LAYERS * HEADS * 3
    with IdentityValues() as kernel, torch.no_grad():
        for window in idx:
            model(window[None])
    assert len(kernel.weights) == 2 * LAYERS
    for layer in range(LAYERS):
        for head in range(HEADS):
            rows = torch.cat([w[head, 1:] for w in kernel.weights[layer::LAYERS]])  # position 0 is left out
            said = [found[f"fisher/layer{layer}/head{head}/{name}"] for name in ("eigmax", "trace", "energy_r16")]
            assert said == pytest.approx(written_out(rows), abs=2e-6), (layer, head)  # the kernel is float32
            assert 0 < said[0] <= 0.5 and said[1] < 0.96 and 0 < said[2] <= 1


@pytest.mark.parametrize("step", ["V1", "V4", "KT1", "RAALL0", "RAEARLY0"])
def test_a_model_and_the_one_it_collapses_to_attend_alike(configuration, step):
    """Gates, tied rows, and a direction in which queries and keys are exchanged."""
    model = built(configuration(step))
    one, other = fisher.measure(model, windows())[0], fisher.measure(model.collapse(), windows())[0]
    assert one == pytest.approx(other, abs=1e-5)


def test_the_reciprocal_direction_is_measured_as_it_is_computed(configuration):
    """From the same weights, layer 0 differs from the baseline's: there the query plays the key."""
    plain, swapped = (fisher.measure(built(configuration(step)), windows())[0] for step in ("V0", "RAALL0"))
    assert abs(plain["fisher/layer0/head0/eigmax"] - swapped["fisher/layer0/head0/eigmax"]) > 1e-3


OTHERWISE = "its weights are not those of a scaled_dot_product_attention"
BESIDE = "tokens reach each other beside the softmax"
PRUNED = "KV pruning takes its softmax block by block, over what is left"


@pytest.mark.parametrize("step, why", [
    ("G2", OTHERWISE), ("G2A", OTHERWISE), ("RALEARN0", "it has 2 softmaxes over positions"),
    ("W1", BESIDE), ("W2", BESIDE), ("V14", PRUNED), ("V19", PRUNED)])
def test_what_is_not_one_softmax_over_positions_is_null_with_its_reason(configuration, step, why):
    found, reasons = fisher.measure(built(configuration(step)), windows(1))
    assert reasons == dict.fromkeys(range(LAYERS), why)
    assert set(found.values()) == {None} and len(found) == LAYERS * HEADS * 3


def test_a_direction_that_was_fixed_is_one_softmax(configuration):
    model = built(configuration("RALEARN0"))
    for block in model.transformer.h:
        block.attn.direction.decide()
    found, reasons = fisher.measure(model, windows(1))
    assert reasons == {} and None not in found.values()


def test_a_layer_whose_attention_is_off_is_null_and_the_others_are_not(configuration):
    model = built(configuration("R1"))
    for gate in model.transformer.h[0].attn.modules():
        if isinstance(gate, SkipGate):
            gate.switch_off()
    found, reasons = fisher.measure(model, windows(1))
    assert reasons == {0: "attention is switched off"}
    assert all((value is None) == ("/layer0/" in name) for name, value in found.items())


@pytest.mark.parametrize("where", ["tests.gpt2.broken:Leaky", "tests.gpt2.test_fisher:SecondLook"])
def test_another_way_between_tokens_is_found_without_being_declared(configuration, where):
    cfg = configuration("V0").replace(ATTENTION_CLASS=where)
    assert fisher.measure(built(cfg), windows(1))[1] == dict.fromkeys(range(LAYERS), BESIDE)


class SecondLook(CausalSelfAttention):
    """Adds the value of the token before."""

    def combine(self, attended, values, x):
        return attended + F.pad(values, (0, 0, 1, 0))[:, :, :-1]


class Fails(CausalSelfAttention):
    """Breaks beyond the shape of the trial, inside a scaled_dot_product_attention."""

    def attend(self, q, keys, values):
        return super().attend(q if q.size(0) == 2 else q[..., :-1], keys, values)


def test_an_error_is_not_swallowed_and_leaves_no_hook(configuration):
    model = built(configuration("V0").replace(ATTENTION_CLASS="tests.gpt2.test_fisher:Fails"))
    with pytest.raises(RuntimeError, match="size"):
        fisher.measure(model, windows(1))
    assert not any(block._forward_pre_hooks for block in model.transformer.h)


def test_memory_is_bounded_without_changing_a_number(configuration, monkeypatch):
    model, passes = built(configuration("V1")), []
    model.transformer.h[0].register_forward_hook(lambda *_: passes.append(1))
    found = fisher.measure(model, windows())
    once = len(passes)
    monkeypatch.setattr(fisher, "SUMS_BYTES", 8 * HEADS * T ** 2)  # one layer
    assert fisher.measure(model, windows()) == found and (once, len(passes) - once) == (1 + 3, 1 + 2 * 3)


def test_nothing_is_drawn_and_nothing_is_left_behind(configuration):
    model, before = built(configuration("V2")), torch.get_rng_state()
    logits = model(windows(1))[0]
    fisher.measure(model.train(), windows())
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(model(windows(1))[0], logits) and not model.training


def test_names_and_bad_input(configuration):
    model = built(configuration("V0"))
    assert set(fisher.measure(model, windows(1))[0]) == {
        f"fisher/layer{layer}/head{head}/{name}" for layer in (0, 1) for head in (0, 1)
        for name in ("eigmax", "trace", "energy_r16")}, "no condition number of a singular matrix"
    with pytest.raises(ValueError, match="no row but a delta"):
        fisher.measure(model, windows(1, 1))
