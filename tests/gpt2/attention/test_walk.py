"""Full random walk: its formula by explicit loops, detailed balance, causality across blocks, and where gradient reaches."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.walk import MIN_NEIGHBOURS, WalkAttention
from gpt2.laws import Subject, broken_laws
from gpt2.layers import init_weights
from gpt2.model import GPT
from lib.config import load
from tests.harness import refusal

E, H, D = 16, 2, 8
T, WINDOW = 14, 4  # three whole blocks and a part of one
BETAS = [None, 0.5, 0.7, 1.0]


def built(beta=None, bias=True, window=WINDOW, neighbours=3, **options):
    torch.manual_seed(0)
    module = WalkAttention(E, H, window, neighbours, beta=beta, bias=bias, **options).eval()
    for p in (module.c_attn, module.c_proj):
        torch.nn.init.normal_(p.weight, std=0.4)
        if bias:
            torch.nn.init.normal_(p.bias, std=0.5)
    return module


def inputs(batch=2, length=T, dtype=torch.float64):
    return torch.randn(batch, length, E, dtype=dtype, generator=torch.Generator().manual_seed(3))


def heads(module, x):
    """q, k, v [B, H, T, D]"""
    return (t.view(*x.shape[:2], H, D).transpose(1, 2) for t in module.c_attn(x).split(E, 2))


# The reference: one head of one sequence, in lists and loops

def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def nearest(i, among, keys, n):
    return sorted(among, key=lambda j: -cosine(keys[i], keys[j]))[:n]


def entry_row(i, among, keys, n, size):
    """{token: probability} as a list of `size`"""
    chosen = nearest(i, among, keys, n)
    weights = {j: math.exp(math.sqrt(D) * cosine(keys[i], keys[j])) for j in chosen}
    total = sum(weights.values())
    return [weights.get(j, 0.0) / total for j in range(size)]


def graph(prefix, keys, n, beta):
    """Rows of P on the tokens before `prefix`; beta None: directed, on all of them."""
    if beta is None:
        return [[1.0 if j == 0 else 0.0 for j in range(prefix)] if i == 0 else entry_row(i, range(i), keys, n, prefix)
                for i in range(prefix)]
    near = [nearest(a, [b for b in range(prefix) if b != a], keys, n) for a in range(prefix)]
    rows = []
    for a in range(prefix):
        row = [0.0] * prefix
        for b in range(prefix):
            ways = (b in near[a]) + (a in near[b])
            share = {0: 0.0, 1: 1 - beta, 2: 1.0}[ways]
            row[b] = share * math.exp(math.sqrt(D) * (cosine(keys[a], keys[b]) - 1))
        if sum(row) == 0:
            row[a] = 1.0
        rows.append([w / sum(row) for w in row])
    return rows


def reference_weights(module, q, k):
    """[T, T] weights on the values of one head."""
    length, n = len(k), module.neighbours
    result = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        first = max(0, i - module.window + 1)
        local = torch.tensor([float(q[i] @ k[j]) / math.sqrt(D) for j in range(first, i + 1)], dtype=torch.float64).softmax(0)
        result[i, first:i + 1] = local
        size = i + 1 if module.beta is None else i // module.window * module.window
        if size == 0:
            continue
        P = graph(size, k, n, module.beta)
        start = P[i] if module.beta is None else entry_row(i, range(size), k, n, size)
        p = list(start)
        for _ in range(module.steps):
            moved = [sum(p[a] * P[a][b] for a in range(size)) for b in range(size)]
            p = [(1 - module.restart) * one + module.restart * other for one, other in zip(moved, start, strict=True)]
        result[i, :size] += module.gamma * torch.tensor(p, dtype=torch.float64)
        result[i] /= 1 + module.gamma
    return result


def weights(module, q, k):
    """The module's own: what it does to the values of one-hot tokens."""
    length = k.size(2)
    return module.attend(q, k, torch.eye(length, dtype=q.dtype).expand(*k.shape[:2], length, length))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, {"steps": 1, "restart": 0.5, "gamma": 2.0}, {"neighbours": 100},
                                     {"window": 5, "bias": False}])
def test_the_formula(beta, options):
    module, x = built(beta, **options).double(), inputs(batch=1, length=11)
    with torch.no_grad():
        q, k, v = heads(module, x)
        expected = torch.stack([reference_weights(module, q[0, h], k[0, h]) for h in range(H)])[None]
        torch.testing.assert_close(weights(module, q, k), expected, rtol=0, atol=1e-12)
        out = F.linear((expected @ v).transpose(1, 2).reshape(1, 11, E), module.c_proj.weight, module.c_proj.bias)
        torch.testing.assert_close(module(x), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_weights_of_a_row_sum_to_1_and_none_is_negative_or_later(beta):
    module = built(beta).double()
    q, k, _ = heads(module, inputs())
    found = weights(module, q, k)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, H, T, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found >= 0).all() and (found.triu(1) == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_reversible_walk_is_stochastic_and_in_detailed_balance(beta, size):
    module = built(beta).double()
    P, pi = module.reversible(F.normalize(torch.randn(2, H, size, D, dtype=torch.float64), dim=-1))
    one = torch.ones(2, H, dtype=torch.float64)
    torch.testing.assert_close(P.sum(-1), one[..., None].expand(-1, -1, size), rtol=0, atol=1e-10)
    torch.testing.assert_close(pi.sum(-1), one, rtol=0, atol=1e-10)
    flow = pi[..., None] * P
    torch.testing.assert_close(flow, flow.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close((pi[..., None, :] @ P).squeeze(-2), pi, rtol=0, atol=1e-10)
    assert (P >= 0).all() and (pi > 0).all()
    if size == 12 and beta != 1.0:
        assert (P.diagonal(dim1=-2, dim2=-1) == 0).all() and ((P > 0).sum(-1) >= 3).all()


def test_beta_weighs_edges_that_are_not_mutual():
    unit = F.normalize(torch.randn(1, 1, 12, D, dtype=torch.float64), dim=-1)
    kinds = [built(beta).double().reversible(unit)[0] for beta in (0.5, 0.7, 1.0)]
    mutual = kinds[2] * (1 - torch.eye(12)) > 0
    one_sided = (kinds[0] > 0) & ~mutual
    assert mutual.any() and one_sided.any() and not torch.equal(kinds[0], kinds[1])
    ratio = (kinds[1] / kinds[0]).squeeze()
    rows = (mutual & one_sided.any(-1, keepdim=True)).squeeze()
    lone = (one_sided & mutual.any(-1, keepdim=True)).squeeze()
    assert rows.any() and (ratio[rows] > 1).all() and (ratio[lone] < 1).all(), "a larger beta moves weight to mutual neighbours"


def test_the_directed_walk_is_stochastic_and_goes_back_in_time():
    module = built().double()
    P = module.directed(F.normalize(torch.randn(2, H, T, D, dtype=torch.float64), dim=-1))
    torch.testing.assert_close(P.sum(-1), torch.ones(2, H, T, dtype=torch.float64), rtol=0, atol=1e-12)
    count = (P > 0).sum(-1)[0, 0].tolist()
    assert count == [1, 1, 2] + [3] * (T - 3)
    assert (P.triu() * (1 - F.one_hot(torch.tensor(0), T * T).view(T, T)) == 0).all() and (P[..., 0, 0] == 1).all()


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("border", [3, 4, 9, 12])
def test_no_output_depends_on_a_later_input(beta, training, border):
    """Also not through the graph: perturbed tokens would be anybody's neighbours."""
    module = built(beta, dropout=0.2).double().train(training)
    x = inputs()
    other = x.clone()
    other[:, border:] = 3 * other[:, border - 1:border] + 0.1 * other[:, border:]
    outputs = []
    for t in (x, other):
        torch.manual_seed(1)
        outputs.append(module(t))
    torch.testing.assert_close(outputs[0][:, :border], outputs[1][:, :border], rtol=0, atol=1e-12)
    assert (outputs[0][:, border] - outputs[1][:, border]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other():
    module, x = built(0.5).double(), inputs()
    torch.testing.assert_close(module(x)[:1], module(x[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sizes", [(1,) * T, (5, 1, 1, 7), (T,), (1, 13), (4, 4, 4, 2), (3, 2, 8, 1), (9, 5)])
def test_decoding_in_chunks_equals_the_full_pass(beta, sizes):
    """Chunks end before, at and after the borders of blocks, and cross several."""
    module, x = built(beta).double(), inputs()
    with torch.no_grad():
        cache = module.new_cache(2, T, torch.float64, "cpu")
        parts = [module(part, cache) for part in x.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_autocast_and_a_cache_in_low_precision(beta):
    module, x = built(beta, bias=False, neighbours=100).float(), inputs(dtype=torch.float32)  # no selection, so no ties
    expected = module(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(x) - expected).abs().max() < 0.1 * expected.abs().max()
        cache = module.new_cache(2, T, torch.bfloat16, "cpu")
        parts = [module(part, cache) for part in x.split((6, 1, 7), 1)]
        assert cache.keys.dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=0.03)
    low = built(beta, bias=False).bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_gamma_0_with_the_whole_context_as_window_is_the_baseline():
    module, x = built(window=T, gamma=0.0).float(), inputs(dtype=torch.float32)
    plain = CausalSelfAttention(E, H).eval()
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-5)
    assert module.dead_elements() == plain.dead_elements() != built().dead_elements()
    module.gamma = 0.3
    assert (module(x) - plain(x)).abs().max() > 1e-2


@pytest.mark.parametrize("beta", [None, 0.5])
def test_gradient_reaches_the_keys_through_the_graph(beta):
    """Queries of 0 make the band uniform: all that is left of the keys is the graph."""
    module = built(beta).double()
    q, k, _ = (t.detach() for t in heads(module, inputs()))
    k.requires_grad_()
    local = torch.zeros_like(q)
    (weights(module, local, k) * torch.randn(T, T, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(k.grad).all()
    assert (k.grad.abs().amax(-1) > 1e-6).all(), "every token of every head"


@pytest.mark.parametrize("beta", [None, 0.5])
def test_the_gradient_through_the_graph_is_the_numerical_one(beta):
    module = built(beta).double()
    q, k, _ = (t.detach()[:1, :1, :7] for t in heads(module, inputs()))
    assert torch.autograd.gradcheck(lambda t: weights(module, torch.zeros_like(q), t), k.clone().requires_grad_(), eps=1e-6)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_the_walk_alone_changes_the_output_and_learns(beta):
    """Restart, steps and c_attn's key bias act through the walk only."""
    x = inputs()
    module, other = built(beta).double(), built(beta, restart=0.9).double()
    assert (module(x) - other(x)).abs().max() > 1e-3
    module(x).square().sum().backward()
    for p in module.parameters():
        assert torch.isfinite(p.grad).all() and (p.grad.abs().flatten(1).sum(1) if p.ndim > 1 else p.grad.abs()).min() > 0
    assert module.c_attn.bias.grad[E:2 * E].abs().min() > 1e-6


@pytest.mark.parametrize("beta", [None, 0.7])
def test_it_compiles_into_one_graph_forward_and_backward(beta):
    module, x = built(beta, steps=2), inputs(batch=1, length=7, dtype=torch.float32)
    module(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)(x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_a_token_alone():
    for beta in BETAS:
        module, x = built(beta).double(), inputs(length=1)
        _, _, v = heads(module, x)
        torch.testing.assert_close(module(x), module.c_proj(v.transpose(1, 2).reshape(2, 1, E)))


def test_its_sizes_follow_the_context():
    def sizes(defconfig, step="W1", **symbols):
        cfg = load(defconfig, step, symbols)
        with torch.device("meta"):
            found = GPT(cfg).sizes()
        return found["walk_window"], found["walk_neighbours"]
    assert sizes("gpt2-rwr-ablation") == sizes("gpt2-rwr-ablation", "W3") == (128, 32)
    assert sizes("gpt2-rwr-ablation+tiny") == (16, 4)
    assert sizes("gpt2-rwr-ablation+tiny", GPT2_BLOCK_SIZE=16) == (2, MIN_NEIGHBOURS)
    assert sizes("gpt2-rwr-ablation+tiny", WALK_NEIGHBOURS="2", WALK_WINDOW="7") == (7, 2)


def test_the_steps_say_what_they_are(configuration):
    w1, w2, w3 = (configuration(step) for step in ("W1", "W2", "W3"))
    attn = [WalkAttention.from_config(cfg) for cfg in (w1, w2, w3)]
    assert [module.beta for module in attn] == [None, 0.5, 0.7]
    assert {(module.steps, module.restart, module.gamma) for module in attn} == {(4, 0.2, 0.3)}
    assert attn[0].collapse() is attn[0], "no simpler class is known"


def test_settings_that_would_do_nothing_are_refused():
    assert refusal(load, "gpt2-rwr-ablation", "W1", {"WALK_NEIGHBOURS": 1})[0].startswith("WALK_NEIGHBOURS=1 leaves one")
    assert refusal(load, "gpt2-rwr-ablation", "W2", {"WALK_WINDOW": 1024})[0].startswith("WALK_WINDOW=1024 is the whole")
    load("gpt2-rwr-ablation", "W1", {"WALK_WINDOW": 1024})


def test_the_same_start_as_the_baseline():
    one, other = WalkAttention(E, H, WINDOW, 3), CausalSelfAttention(E, H)
    init_weights(one, 0)
    init_weights(other, 0)
    assert all(torch.equal(p, dict(other.named_parameters())[name]) for name, p in one.named_parameters())


def test_the_laws():
    def subject(step, equals=None, reference=None):
        return Subject(step, load("gpt2-rwr-ablation+tiny", step, {"GPT2_DROPOUT": "0.1"}), equals, reference)
    w0 = subject("W0", "V0")
    for step in ("W1", "W2", "W3"):
        assert broken_laws(subject(step, None, w0)) == [], step
