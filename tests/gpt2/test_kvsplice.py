"""The spline is a bijection, the codec a lossy projection, the cache holds what the full pass computes, and a file is the fit
of one model or refused."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import kvsplice
from gpt2.kvsplice import KVSplice, PWLSpline, bypassed, codec_mode, codecs, cosines
from gpt2.laws import Subject, broken_laws
from gpt2.model import GPT
from tests.harness import refusal

H, D, K = 2, 6, 4


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def points(knots, seed=0, shape=(H, 1, D)):
    """Increasing knots and heights [knots, *shape]."""
    found = []
    for n in range(2):
        steps = 0.1 + torch.rand(knots, *shape, generator=torch.Generator().manual_seed(10 * seed + n))
        found.append(steps.cumsum(0) - steps.sum(0) / 2)
    return found


def fill(codec, seed=0):
    """Give a codec some geometry, as a fit might."""
    heads, D, k = codec.heads, codec.head_dim, codec.k
    bases = [torch.linalg.qr(random(heads, D, D, seed=seed + n, dtype=torch.float64))[0][..., :k] for n in (1, 2)]
    knots, heights = points(len(codec.spline.knots), seed, (heads, 1, D))
    codec.set(0.5 * random(heads, 1, D, seed=seed + 3), knots, heights, 0.3 * random(heads, 1, D, seed=seed + 4), *bases)
    return codec


def build(k=K, heads=H, knots=7, seed=0):
    return fill(KVSplice(heads, D, k, knots), seed)


def reference_spline(x, knots, heights):
    """float64, one channel: np.interp inside, the end pieces outside."""
    x, knots, heights = (np.asarray(t, np.float64) for t in (x, knots, heights))
    slopes = np.diff(heights) / np.diff(knots)
    y = np.interp(x, knots, heights)
    y = np.where(x < knots[0], heights[0] + slopes[0] * (x - knots[0]), y)
    return np.where(x > knots[-1], heights[-1] + slopes[-1] * (x - knots[-1]), y)


@pytest.mark.parametrize("knots", [3, 4, 7, 8, 20])
def test_a_spline_and_its_inverse_are_the_lines_through_the_points(knots):
    spline = PWLSpline(H, D, knots)
    spline.set(*points(knots))
    x = 4 * random(3, H, 50, D)
    x[0, :, :knots] = spline.knots.transpose(0, 2)[0]  # on the knots too
    y, back = spline(x), spline.inverse(x)
    for h in range(H):
        for d in range(D):
            at, to = spline.knots[:, h, 0, d], spline.heights[:, h, 0, d]
            np.testing.assert_allclose(y[:, h, :, d], reference_spline(x[:, h, :, d], at, to), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(back[:, h, :, d], reference_spline(x[:, h, :, d], to, at), rtol=1e-5, atol=1e-5)


@given(knots=st.integers(3, 12), seed=st.integers(0, 10 ** 6))
@settings(max_examples=40)
def test_splines_increase_and_the_inverse_inverts(knots, seed):
    spline = PWLSpline(H, D, knots)
    spline.set(*points(knots, seed))
    x = (5 * random(1, H, 200, D, seed=seed)).sort(2).values
    y = spline(x)
    assert (y.diff(dim=2)[x.diff(dim=2) > 1e-5] > 0).all()
    steepest = (1 / spline.slopes).amax(0)  # what rounding of y becomes in x
    assert ((spline.inverse(y) - x).abs() <= 2e-7 * (4 * x.abs() + 2 * y.abs() * steepest + 4)).all()


def test_a_knot_belongs_to_the_piece_on_its_right():
    spline = PWLSpline(H, D, 6)
    spline.set(*points(6))
    x = spline.knots[:, :, 0].transpose(0, 1)[None].clone().requires_grad_()  # [1, H, 6, D]
    spline(x).sum().backward()
    slopes = torch.cat([spline.slopes, spline.slopes[-1:]])[:, :, 0].transpose(0, 1)
    torch.testing.assert_close(x.grad[0], slopes)


def test_points_that_do_not_increase_are_refused():
    spline, (knots, heights) = PWLSpline(H, D, 5), points(5)
    with pytest.raises(ValueError, match="the knots of a spline do not increase"):
        spline.set(knots.flip(0), heights)
    heights[2, 1, 0, 3] = heights[1, 1, 0, 3]
    with pytest.raises(ValueError, match="the heights of a spline do not increase"):
        spline.set(knots, heights)
    with pytest.raises(ValueError, match="a spline needs at least 3 knots, not 2"):
        PWLSpline(H, D, 2)
    x = random(1, H, 3, D)
    assert torch.equal(spline(x), PWLSpline(H, D, 5)(x)), "nothing was changed"


@pytest.mark.parametrize("heads", [H, 1])
@torch.no_grad()
def test_the_codec_is_what_its_formula_says(heads):
    codec, v = build(heads=heads), random(3, H, 5, D, dtype=torch.float64)
    code, back = codec.compress(v), codec(v)
    assert code.shape == (3, H, 5, K) and code.dtype == back.dtype == torch.float64
    for h in range(H):
        one = h if heads == H else 0
        mean, centre, basis, plain = (t[one].double().numpy() for t in (codec.mean, codec.centre, codec.basis, codec.pca_basis))
        knots, heights = codec.spline.knots[:, one, 0].numpy(), codec.spline.heights[:, one, 0].numpy()
        x = v[:, h].numpy() - mean
        bent = np.stack([reference_spline(x[..., d], knots[:, d], heights[:, d]) for d in range(D)], -1)
        np.testing.assert_allclose(code[:, h], (bent - centre) @ basis, rtol=0, atol=2e-6)
        bent = (bent - centre) @ basis @ basis.T + centre
        expected = np.stack([reference_spline(bent[..., d], heights[:, d], knots[:, d]) for d in range(D)], -1) + mean
        np.testing.assert_allclose(back[:, h], expected, rtol=0, atol=1e-5)
        with codec_mode(codec, "pca"):
            np.testing.assert_allclose(codec(v)[:, h], x @ plain @ plain.T + mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", kvsplice.MODES)
@pytest.mark.parametrize("fitted", [False, True])
@torch.no_grad()
def test_all_channels_are_lossless_to_rounding_and_fewer_are_not(fitted, mode):
    for k, lossless in ((D, True), (D - 1, mode == "off")):
        codec = build(k) if fitted else KVSplice(H, D, k)
        codec.mode, v = mode, random(2, H, 40, D)
        assert ((codec(v) - v).abs().max() < 2e-5) == lossless


@pytest.mark.parametrize("channels, k", [(6, 6), (64, 32), (64, 1), (1, 1)])
def test_before_a_fit_the_basis_is_orthonormal_and_reads_every_channel(channels, k):
    basis = cosines(channels, k)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(k), rtol=0, atol=1e-6)
    assert basis.dtype == torch.float32 and (basis.norm(dim=1) > 1e-3).all()


@torch.no_grad()
def test_codes_keep_the_type_of_values_and_bfloat16_costs_its_rounding():
    codec, v = build(), random(2, H, 50, D)
    exact = codec(v)
    for dtype, eps in ((torch.bfloat16, 2 ** -8), (torch.float16, 2 ** -11)):
        low = v.to(dtype)
        code, back = codec.compress(low), codec(low)
        assert code.dtype == back.dtype == dtype
        # v, c and v' are rounded once each; the codec stretches an error of v or c by at most its steepest slopes
        stretch = float(1 + codec.spline.slopes.max() / codec.spline.slopes.min() + 1 / codec.spline.slopes.min())
        assert (back.float() - exact).norm() < eps * stretch * v.norm()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(codec(low), back) and torch.equal(codec(v), exact), "autocast reaches nothing inside"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_keeps_its_geometry_in_float32(dtype):
    codec = build()
    cast = copy.deepcopy(codec).to(dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(codec.buffers(), cast.buffers(), strict=True))
    assert next(cast.spline.buffers()).dtype == torch.float32 and cast.fitted.dtype == torch.bool


def test_gradient_passes_to_the_values():
    codec = build()
    v = random(1, H, 4, D, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(codec, (v,), atol=1e-4)
    code = random(1, H, 4, K, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(codec.decompress, (code,), atol=1e-4)
    far = (1e6 * random(1, H, 4, D)).requires_grad_()
    codec(far).sum().backward()
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("mode", kvsplice.MODES)
def test_it_compiles_as_one_graph(mode):
    codec, v = build(), random(2, H, 5, D)
    codec.mode = mode
    found = []
    for call in (codec, torch.compile(codec, fullgraph=True, backend="aot_eager", dynamic=False)):
        x = v.clone().requires_grad_()
        y = call(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


def test_modes_are_restored_also_after_an_error():
    model = torch.nn.ModuleList([build(), build(seed=1)])
    model[1].mode = "pca"
    with pytest.raises(RuntimeError, match="boom"), bypassed(model):
        assert [codec.mode for codec in model] == ["off", "off"] and model[0].width == D
        raise RuntimeError("boom")
    assert [codec.mode for codec in model] == ["splice", "pca"] and model[0].width == K
    with pytest.raises(ValueError, match="a codec has no mode 'on', only splice, pca, off"), codec_mode(model, "on"):
        pass


SETTINGS = ({}, {"KVSPLICE_SHARED": True, "KVSPLICE_K": 5}, {"KVSPLICE_K": 8, "KV_PRUNING_V": True}, {"KV_PRUNING_KV": True})


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def model(request, configuration):
    model = GPT(configuration("V0", KVSPLICE=True, **request.param)).eval()
    for layer, codec in enumerate(codecs(model)):
        fill(codec, seed=layer)
    return model


@pytest.mark.parametrize("mode", kvsplice.MODES)
@torch.no_grad()
def test_decoding_equals_the_full_pass_and_the_cache_holds_codes(model, mode):
    x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    outputs = {}
    with codec_mode(model, mode):
        for sizes in ((32,), (1,) * 32, (3, 17, 1, 11)):
            cache = model.new_cache(2)
            parts = torch.cat([model(part, cache=cache)[0] for part in x.split(sizes, 1)], 1)
            torch.testing.assert_close(parts, model(x)[0], rtol=0, atol=2e-5)
            assert {layer.values.size(-1) for layer in cache.layers} == {codecs(model)[0].width}
        outputs[mode] = model(x)[0]
    with bypassed(model):
        plain = model(x)[0]
    assert (outputs[mode] - plain).abs().max() > 1e-3 if mode != "off" else torch.equal(outputs[mode], plain)


def test_without_a_codec_the_model_is_the_plain_one(configuration):
    plain, spliced = GPT(configuration("V0")).eval(), GPT(configuration("V0", KVSPLICE=True)).eval()
    assert not spliced.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), bypassed(spliced):
        assert torch.equal(plain(x)[0], spliced(x)[0])
    assert spliced.sizes()["kvsplice_k"] == 32 and codecs(spliced)[0].heads == 2
    assert [p.shape for p in plain.parameters()] == [p.shape for p in spliced.parameters()]


@pytest.mark.parametrize("symbols", [{}, {"KVSPLICE_SHARED": True, "KVSPLICE_K": 1}])
def test_it_obeys_the_laws(configuration, symbols):
    reference = Subject("V0", configuration("V0"))
    subject = Subject("V0K", configuration("V0", KVSPLICE=True, **symbols), reference=reference)
    assert broken_laws(subject) == []


REPORT = {"rows": 10, "layers": [{"layer": 0, "error": 0.25}]}


@pytest.fixture
def saved(tmp_path):
    """A model, its file, and how it was saved."""
    model, path = torch.nn.ModuleList([build(), build(seed=5)]), tmp_path / "kvsplice_C1.pt"
    kvsplice.save(path, model, step="C1", seed=1337, identity="abc", report=REPORT)
    return model, path


def test_a_file_gives_the_codecs_back(saved):
    model, path = saved
    other = torch.nn.ModuleList([KVSplice(H, D, K), KVSplice(H, D, K)])
    header = kvsplice.load(path, other, identity="abc")
    assert header == {"kind": "kvsplice", "layers": 2, "head_dim": D, "k": K, "knots": 7, "geometries": H, "step": "C1",
                      "seed": 1337, "identity": "abc", "report": REPORT}
    v = random(2, H, 9, D)
    for mode in kvsplice.MODES:
        with codec_mode(model, mode), codec_mode(other, mode):
            assert all(torch.equal(a(v), b(v)) for a, b in zip(model, other, strict=True))
    kvsplice.save(path, other, step="C1", seed=1337, identity="abc", report=REPORT)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_was_not_fitted_is_not_saved(tmp_path):
    for model in (torch.nn.ModuleList([KVSplice(H, D, K), KVSplice(H, D, K)]), torch.nn.ModuleList()):
        with pytest.raises(ValueError, match="a KVSplice that was not fitted cannot be saved"):
            kvsplice.save(tmp_path / "x.pt", model, step="C1", seed=1, identity="", report={})
    assert not list(tmp_path.iterdir())


AGAIN = "move the folder of the cell away and run make again."


@pytest.mark.parametrize("model, identity, what, run", [
    ([KVSplice(H, D, 3)] * 2, "abc", "is of another shape: k = 4 in the file, 3 in the model.", AGAIN),
    ([KVSplice(H, 8, K)] * 2, "abc", "is of another shape: head width 6 in the file, 8 in the model.", AGAIN),
    ([KVSplice(H, D, K)] * 1, "abc", "is of another shape: layers 2 in the file, 1 in the model.", AGAIN),
    ([KVSplice(H, D, K, 9)] * 2, "abc", "is of another shape: knots 7 in the file, 9 in the model.", AGAIN),
    ([KVSplice(1, D, K)] * 2, "abc", "is of another shape: geometries a layer 2 in the file, 1 in the model.", AGAIN),
    ([KVSplice(H, D, K)] * 2, "abd", "was fitted to the values of another model (C1, seed 1337).", AGAIN),
    ([], "abc", "cannot be used: the model has no KVSplice.", "set KVSPLICE=y."),
])
def test_a_file_of_something_else_is_refused(saved, model, identity, what, run):
    model = torch.nn.ModuleList([copy.deepcopy(codec) for codec in model])
    before = copy.deepcopy(model.state_dict())
    assert refusal(kvsplice.load, saved[1], model, identity=identity) == (f"{saved[1]} {what}", run)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_damaged_file_is_refused(saved, tmp_path):
    model, path = saved
    content = torch.load(path, weights_only=True)
    damaged = (f"{path} is damaged: its content is not what was saved.", AGAIN)
    for tamper in (lambda c: c["tensors"]["1.basis"][0, 0].mul_(-1), lambda c: c["header"].update(k=3),
                   lambda c: c["tensors"].pop("0.mean"), lambda c: c.pop("sha256"), lambda c: c.pop("tensors"),
                   lambda c: c["header"]["report"].update(rows=11)):
        other = copy.deepcopy(content)
        tamper(other)
        torch.save(other, path)
        assert refusal(kvsplice.load, path, model, identity="abc") == damaged
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    what, run = refusal(kvsplice.load, path, model, identity="abc")
    assert what.startswith(f"{path} cannot be read: ") and run == "move it away and run make again."
    torch.save({"format": 1, "model": {}}, path)
    assert refusal(kvsplice.load, path, model, identity="abc") == (
        f"{path} is no KVSplice file.", AGAIN)
    assert refusal(kvsplice.load, tmp_path / "none.pt", model, identity="abc")[0] == f"there is no {tmp_path}/none.pt."
