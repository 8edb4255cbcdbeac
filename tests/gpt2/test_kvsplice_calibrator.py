"""The sample is uniform and of the uncompressed model, the fit is the documented pipeline, deterministic, and reported on rows
that took no part in it."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import kvsplice
from gpt2.kvsplice import KVSplice, PWLSpline, bypassed, codec_mode, codecs
from gpt2.kvsplice_calibrator import (
    GAP,
    LEVELS,
    KVSpliceCalibrator,
    Reservoir,
    fit_geometry,
    lines,
    measured,
    parts,
    place_knots,
)
from gpt2.model import GPT
from tests.harness import refusal

T = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latent(kind, n=4000, D=12, rank=3, seed=1):
    """Rows [2, n, D] of low rank, bent channel by channel, with noise."""
    g = generator(seed)
    x = torch.randn(2, n, rank, generator=g) @ torch.randn(2, rank, D, generator=g) / math.sqrt(rank)
    noise = 0.05 * torch.randn(2, n, D, generator=g)
    return {"exp": torch.exp(0.7 * x) + noise, "tanh": torch.tanh(2 * x) + noise,
            "gauss": x + 0.5 * torch.randn(2, n, D, generator=g)}[kind]


def fitted(rows, k, knots=7, epochs=2, lr=2e-3):
    """A codec fitted to rows [G, n, D], the rows it is reported on, and where its heads came from."""
    a, b = parts(rows.size(1))
    geometry, heads = fit_geometry(rows[:, :a], rows[:, a:b], k, knots, epochs, lr, generator())
    codec = KVSplice(rows.size(0), rows.size(2), k, knots)
    codec.set(**geometry)
    return codec, rows[:, b:], heads


@pytest.mark.parametrize("sizes", [(7,), (3, 1, 40), (100, 1, 0, 25), (1,) * 30])
@pytest.mark.parametrize("count", [1, 10, 1000])
def test_a_sample_has_the_wanted_count_and_no_row_twice(count, sizes):
    reservoir, at = Reservoir(count, 0), 0
    for label, size in enumerate(sizes):
        numbers = torch.arange(at, at + size, dtype=torch.float32)
        reservoir.offer(torch.stack([numbers, -numbers])[..., None].expand(2, size, 3), label)
        at += size
    rows, labels = reservoir.rows, reservoir.labels
    assert rows.shape == (2, min(count, sum(sizes)), 3) and len(labels) == rows.size(1)
    numbers = rows[0, :, 0].long()
    assert len(set(numbers.tolist())) == len(numbers) and torch.equal(rows[1], -rows[0])
    borders = torch.tensor(sizes).cumsum(0)
    assert torch.equal(labels, torch.searchsorted(borders, numbers, right=True)), "a row keeps the label it came with"


def test_every_row_is_as_likely_in_the_sample_and_so_is_every_pair():
    sizes, count, repeats = (5, 1, 14, 10), 6, 1200
    hits, pairs = np.zeros(30), np.zeros((30, 30))
    for seed in range(repeats):
        reservoir = Reservoir(count, seed)
        for part in torch.arange(30.0)[None, :, None].split(sizes, 1):
            reservoir.offer(part)
        chosen = reservoir.rows.flatten().long().numpy()
        hits[chosen] += 1
        pairs[np.ix_(chosen, chosen)] += 1
    assert hits.sum() == count * repeats
    # Without replacement counts vary less than chi-square assumes, by (30 - 6) / 29.
    statistic = scipy.stats.chisquare(hits).statistic * 29 / 24
    assert 0.001 < scipy.stats.chi2.sf(statistic, 29) < 0.999
    off = pairs[np.triu_indices(30, 1)]
    expected = repeats * count * (count - 1) / (30 * 29)
    assert abs(off.var() / expected - 1) < 0.3 and abs(off.mean() - expected) < 1e-9


def reference(rows, choosing, k, knots):
    """The documented pipeline without training, one head in float64, with the standardising written out: functions to and
    from codes, and the error on the rows to choose by, of plain PCA and of the bent start."""
    mean, scale = rows.mean(0), rows.std(0)
    z = (rows - mean) / scale
    levels = np.linspace(*LEVELS, knots)
    at, normal = np.quantile(z, levels, axis=0), scipy.stats.norm.ppf(levels)
    slopes = np.clip(np.diff(normal)[:, None] / np.diff(at, axis=0), 8 ** -0.95, 8 ** 0.95)
    assert (np.diff(at, axis=0) > GAP).all()
    heights = np.concatenate([np.zeros((1, z.shape[1])), np.cumsum(slopes * np.diff(at, axis=0), 0)])
    heights += at[knots // 2] - heights[knots // 2]

    def line(x, at, to):
        cut = [np.searchsorted(at[1:-1, d], x[:, d], side="right") for d in range(x.shape[1])]
        return np.stack([to[i, d] + (x[:, d] - at[i, d]) * ((to[i + 1, d] - to[i, d]) / (at[i + 1, d] - at[i, d]))
                         for d, i in enumerate(cut)], 1)

    found = {}
    for name, to in (("pca", at), ("quantile", heights)):
        def bend(v, to=to):
            return line((v - mean) / scale, at, to) * scale

        def straighten(u, to=to):
            return line(u / scale, to, at) * scale + mean

        centre = bend(rows).mean(0)
        basis = np.linalg.svd(bend(rows) - centre, full_matrices=False)[2][:k].T

        def trip(v, bend=bend, straighten=straighten, centre=centre, basis=basis):
            return straighten((bend(v) - centre) @ basis @ basis.T + centre)

        found[name] = (trip, ((trip(choosing) - choosing) ** 2).sum())
    return found


@pytest.mark.parametrize("kind, expected", [("tanh", "quantile"), ("exp", "quantile"), ("gauss", "pca")])
def test_the_fit_is_the_documented_pipeline(kind, expected):
    rows = latent(kind, seed=3)
    codec, unseen, heads = fitted(rows, 3, epochs=0)
    a, b = parts(rows.size(1))
    origins = []
    for h, one in enumerate(rows.double().numpy()):
        found = reference(one[:a], one[a:b], 3, 7)
        best = min(found, key=lambda name: found[name][1])
        origins.append(best)
        np.testing.assert_allclose(codec(unseen)[h], found[best][0](unseen[h].double().numpy()), rtol=0, atol=2e-4)
        with codec_mode(codec, "pca"):
            np.testing.assert_allclose(codec(unseen)[h], found["pca"][0](unseen[h].double().numpy()), rtol=0, atol=2e-5)
    assert heads == {name: origins.count(name) for name in ("pca", "identity", "quantile")}
    assert heads[expected] == 2


def test_no_linear_map_of_the_same_width_beats_plain_pca():
    rows, k = latent("exp"), 4
    codec, _, _ = fitted(rows, k, epochs=0)
    seen = rows[:, :parts(rows.size(1))[0]]
    with codec_mode(codec, "pca"):
        lost = (codec(seen) - seen).double().square().sum((1, 2))
    x = (seen - seen.mean(1, keepdim=True)).double()
    discarded = torch.linalg.svdvals(x)[:, k:].square().sum(1)  # Eckart and Young's bound for every map of rank k
    torch.testing.assert_close(lost, discarded, rtol=1e-4, atol=0)
    for seed in range(5):
        other = torch.linalg.qr(torch.randn(2, 12, k, generator=generator(seed), dtype=torch.float64))[0]
        assert ((x - x @ other @ other.mT).square().sum((1, 2)) > lost).all()


@pytest.mark.parametrize("kind, gain", [("tanh", 0.75), ("exp", 0.95)])
def test_splines_help_where_channels_are_bent(kind, gain):
    codec, unseen, heads = fitted(latent(kind), 3, epochs=8)
    found = measured(codec, unseen)
    assert found["error"] < gain * found["error_pca"] and heads["pca"] == 0
    untrained = measured(*fitted(latent(kind), 3, epochs=0)[:2])
    assert found["error"] < 0.99 * untrained["error"], "training adds to the better start"


def test_on_gaussian_rows_it_is_plain_pca_within_noise():
    codec, unseen, _ = fitted(latent("gauss"), 3, epochs=8)
    found = measured(codec, unseen)
    assert found["error"] == pytest.approx(found["error_pca"], rel=5e-3)


def test_on_the_rows_it_is_chosen_by_it_is_never_worse_than_pca():
    for kind in ("gauss", "exp", "tanh"):
        rows = latent(kind, n=200)
        a, b = parts(200)
        codec, _, _ = fitted(rows, 3, epochs=3, lr=0.5)
        lost = {}
        for mode in ("splice", "pca"):
            with codec_mode(codec, mode):
                lost[mode] = (codec(rows[:, a:b]) - rows[:, a:b]).square().sum((1, 2))
        assert (lost["splice"] <= lost["pca"] * (1 + 1e-5)).all()


ODD = {
    "constant": lambda x: 0 * x + 3, "nothing": lambda x: 0 * x, "nearly": lambda x: 1000 + 1e-5 * x,
    "tiny": lambda x: 1e-20 * x, "heavy": lambda x: x ** 5, "cauchy": lambda x: torch.tan(1.5 * torch.tanh(x)),
    "two": lambda x: x.sign() + 1e-4 * x, "rare": lambda x: (x > 2).float(), "huge": lambda x: 1e6 * x + 1e6,
}


@given(kinds=st.lists(st.sampled_from(sorted(ODD)), min_size=1, max_size=4), knots=st.integers(3, 10),
       seed=st.integers(0, 10 ** 6), move=st.floats(0, 0.5))
@settings(max_examples=60)
def test_the_inverse_of_a_fitted_spline_is_exact_to_a_millionth(kinds, knots, seed, move):
    """In standard deviations (of a channel that moves), at the starts and as far from them as a fit goes."""
    x = torch.randn(1, 500, len(kinds), generator=generator(seed))
    x = torch.stack([ODD[kind](x[..., d]) for d, kind in enumerate(kinds)], 2)
    mean = x.mean(1, keepdim=True)
    at, bent = place_knots(x - mean, mean, knots)
    scale = (x - mean).std(1, keepdim=True, correction=0)
    scale = torch.where(scale <= 1e-6 * mean.abs(), 1.0, scale)
    for w in (torch.zeros_like(bent), bent):
        w = w + move * torch.randn(w.shape, generator=generator(seed))
        spline = PWLSpline(1, len(kinds), knots)
        spline.set(at, lines(at.double(), w.double())[0])
        z = torch.cat([x - mean, at[:, 0].transpose(0, 1)], 1)
        lost = (spline.inverse(spline(z)) - z).abs() / scale
        assert (lost <= 1e-6 * (1 + (z / scale).abs())).all()


@pytest.mark.parametrize("epochs", [0, 2])
def test_channels_that_do_not_move_cost_nothing_and_break_nothing(epochs):
    x = torch.randn(1, 600, 4, generator=generator())
    rows = torch.stack([x[..., 0], 3 + 0 * x[..., 1], 0 * x[..., 2], 1000 + 1e-5 * x[..., 3], x[..., 0] ** 3], 2)
    codec, unseen, _ = fitted(rows, 2, epochs=epochs)
    back = codec(unseen)
    torch.testing.assert_close(back, unseen, rtol=1e-6, atol=1e-4)
    v = unseen.clone().requires_grad_()
    codec(v).square().sum().backward()
    assert torch.isfinite(v.grad).all() and all(torch.isfinite(b).all() for b in codec.buffers())
    assert (codec.spline.slopes[:, 0, 0, 1:3] > 0).all()
    still = torch.full((1, 40, 3), 2.0)
    found = measured(*fitted(still, 2, epochs=epochs)[:2])
    assert found["error"] == found["mse"] == 0 and found["explained_variance"] is None
    assert measured(*fitted(0 * still, 2, epochs=epochs)[:2])["error"] is None


def test_a_basis_has_a_sign_of_its_own():
    codec, _, _ = fitted(latent("gauss"), 3)
    other, _, _ = fitted(-latent("gauss"), 3, epochs=0)
    for basis in (codec.basis, codec.pca_basis, other.pca_basis):
        assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()
        torch.testing.assert_close(basis.mT @ basis, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-5)


@pytest.fixture
def build(configuration):
    """build(**symbols): a configuration and its model, drawn so that values vary."""
    def make(**symbols):
        cfg = configuration("V0", KVSPLICE=True, **{"KVSPLICE_EPOCHS": 1, "KVSPLICE_K": 8} | symbols)
        model = GPT(cfg)
        with torch.no_grad():
            for layer, block in enumerate(model.transformer.h):
                block.attn.c_attn.weight.mul_(5 + 5 * layer)
        return cfg, model
    return make


def windows(count=6, seed=2):
    return [torch.randint(256, (4, T), generator=generator(seed + n)).numpy() for n in range(count)]


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_the_sample_is_of_the_model_without_codecs(build, shared):
    cfg, model = build(KVSPLICE_SHARED=shared)
    found = KVSpliceCalibrator(cfg).collect(model, dict(enumerate(codecs(model))), windows())
    assert [layers for layers, _ in found] == ([[0, 1]] if shared else [[0], [1]])
    caught = {}
    hooks = [codec.register_forward_pre_hook(lambda _, v, n=n: caught.setdefault(n, []).append(v[0]))
             for n, codec in enumerate(codecs(model))]
    with bypassed(model.eval()):
        for idx in windows():
            model(torch.from_numpy(idx))
    for hook in hooks:
        hook.remove()
    values = {n: torch.cat(v).transpose(0, 1).flatten(1, 2) for n, v in caught.items()}  # [H, tokens, D]

    def ordered(rows):
        return rows[rows[:, 0].argsort()]

    if shared:
        (_, reservoir), = found
        for n, v in values.items():
            torch.testing.assert_close(ordered(reservoir.rows[0][reservoir.labels == n]), ordered(v.flatten(0, 1)))
    else:
        for n, (_, reservoir) in enumerate(found):
            for h in range(2):
                torch.testing.assert_close(ordered(reservoir.rows[h]), ordered(values[n][h]))
    assert values[0].shape == (2, 6 * 4 * T, 64)


@pytest.mark.parametrize("symbols, rows", [
    ({}, 768), ({"KVSPLICE_SAMPLES": 500}, 500), ({"KVSPLICE_MAX_BATCHES": 2}, 256), ({"KVSPLICE_SHARED": True}, 3072),
    ({"KVSPLICE_SHARED": True, "KVSPLICE_K": 1}, 2000),  # 2000 a stored channel
])
def test_how_many_rows_are_sampled(build, symbols, rows):
    cfg, model = build(KVSPLICE_EPOCHS=0, **symbols)
    assert KVSpliceCalibrator(cfg).fit(model, iter(windows()))["rows"] == rows


@pytest.mark.parametrize("shared", [False, True])
def test_a_fit_sets_all_codecs_and_reports_rows_set_aside(build, shared):
    cfg, model = build(KVSPLICE_SHARED=shared)
    model.train()
    before = torch.get_rng_state()
    found = KVSpliceCalibrator(cfg).fit(model, windows())
    assert torch.equal(before, torch.get_rng_state()) and model.training
    json.dumps(found, allow_nan=False)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    names = {"error", "mse", "explained_variance"}
    assert all(layer.keys() == {"layer", "heads"} | names | {f"{n}_pca" for n in names} for layer in found["layers"])
    held = codecs(model)
    assert all(bool(codec.fitted) and not codec._forward_pre_hooks and codec.mode == "splice" for codec in held)
    assert all(torch.equal(a, b) for a, b in zip(held[0].buffers(), held[1].buffers(), strict=True)) == shared
    assert {sum(layer["heads"].values()) for layer in found["layers"]} == {1 if shared else 2}
    new = windows(seed=50)  # about the error that is reported, on rows the fit has not seen
    for layer, (layers, reservoir) in zip(found["layers"], KVSpliceCalibrator(cfg.replace(KVSPLICE_SHARED=False)).collect(
            model, dict(enumerate(held)), new), strict=True):
        assert layers == [layer["layer"]]
        v = reservoir.rows
        with torch.no_grad():
            codec = held[layer["layer"]]
            error = ((codec(v) - v).norm() / v.norm()).item()
            with codec_mode(codec, "pca"):
                error_pca = ((codec(v) - v).norm() / v.norm()).item()
        assert layer["error"] == pytest.approx(error, rel=0.15) and layer["error_pca"] == pytest.approx(error_pca, rel=0.15)
        assert 0 < layer["explained_variance"] < 1
        assert layer["mse"] == pytest.approx(error ** 2 * v.square().mean().item(), rel=0.3)


def test_rows_that_were_fitted_are_no_part_of_the_report(build):
    """64 rows in 64 channels: those that were seen lose far less than others."""
    cfg, model = build(KVSPLICE_SAMPLES=80, KVSPLICE_K=32, KVSPLICE_EPOCHS=0)
    found = KVSpliceCalibrator(cfg).fit(model, windows())
    held = dict(enumerate(codecs(model)))
    new = KVSpliceCalibrator(cfg.replace(KVSPLICE_SAMPLES=700)).collect(model, held, windows(seed=50))
    for layer, codec, (_, reservoir) in zip(found["layers"], held.values(), new, strict=True):
        assert layer["error_pca"] == pytest.approx(measured(codec, reservoir.rows)["error_pca"], rel=0.15)


def test_a_fit_is_a_function_of_the_seed_and_the_batches(build):
    found = []
    for seed, disturbance in ((1337, 0), (1337, 1), (1338, 0)):
        torch.manual_seed(disturbance)
        cfg, model = build(KVSPLICE_SAMPLES=300)
        report = KVSpliceCalibrator(cfg.replace(SEED=seed)).fit(model, windows())
        found.append((report, {name: t for name, t in model.state_dict().items() if "splice" in name}))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(t, found[1][1][name]) for name, t in found[0][1].items())


@torch.no_grad()
def test_a_fitted_model_computes_almost_what_it_did(build):
    cfg, model = build(KVSPLICE_K=48)
    idx = torch.from_numpy(windows(1, seed=9)[0])
    with bypassed(model.eval()):
        plain = model(idx)[0]
    unfitted = (model(idx)[0] - plain).norm()
    KVSpliceCalibrator(cfg).fit(model, windows())
    assert (model(idx)[0] - plain).norm() < 0.5 * unfitted


def test_a_compiled_model_is_sampled_too(build):
    cfg, model = build(KVSPLICE_EPOCHS=0)
    plain = KVSpliceCalibrator(cfg).fit(build(KVSPLICE_EPOCHS=0)[1], windows())
    model.compile(backend="eager", dynamic=False)
    with torch.no_grad(), bypassed(model):
        model.eval()(torch.from_numpy(windows(1)[0]), last=True)  # compiled before there are hooks
    assert KVSpliceCalibrator(cfg).fit(model, windows()) == plain


def test_under_autocast_the_model_runs_in_bfloat16_and_the_fit_in_float32(build):
    cfg, model = build()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = KVSpliceCalibrator(cfg).fit(model, windows())
    high = KVSpliceCalibrator(cfg).fit(model, windows())
    assert all(b.dtype in (torch.float32, torch.bool) for b in codecs(model)[0].buffers())
    for a, b in zip(low["layers"], high["layers"], strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=0.02) and a["error"] != b["error"]


def test_a_fit_does_not_see_autocast():
    found, rows = [], latent("tanh", n=500)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(fitted(rows, 3)[0])
    assert all(torch.equal(a, b) for a, b in zip(*(codec.buffers() for codec in found), strict=True))


def test_what_cannot_be_fitted_is_said(build, tmp_path):
    cfg, model = build()
    calibrator = KVSpliceCalibrator(cfg)
    assert refusal(calibrator.fit, model, []) == (
        "there are no values to fit KVSplice to: no layer attends, or there were no batches.",
        "choose a step whose attention is on.")
    with pytest.raises(ValueError, match="2 sampled rows are too few to fit, choose and report"):
        calibrator.fit(model, [np.zeros((1, 2), np.int64)])
    assert not any(codec.fitted for codec in codecs(model))
    model.transformer.h[1].attn.on = False  # a layer that does not attend has no values
    assert [layer["layer"] for layer in calibrator.fit(model, windows())["layers"]] == [0]
    kvsplice.save(tmp_path / "fit.pt", model, step="R1", seed=1, identity="x", report={})  # so a cell with such a layer ends
    assert kvsplice.load(tmp_path / "fit.pt", model, identity="x")["layers"] == 2
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias[-1] = math.nan
    with pytest.raises(ValueError, match="the values of layer 0 are not finite"):
        calibrator.fit(model, windows())
