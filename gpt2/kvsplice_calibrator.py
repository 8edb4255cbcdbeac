"""Fits KVSplice (gpt2/kvsplice.py) to the values of a trained model.

    1. The model runs on training tokens in evaluation mode with its codecs off; of the values of each layer and head, or of
       all together, a uniform sample of min(KVSPLICE_SAMPLES, 2000 k) rows is kept, from at most KVSPLICE_MAX_BATCHES batches.
    2. Rows are parted at random: 8/10 to fit, 1/10 to choose, 1/10 to report on.
    3. Knots are quantiles of the standardised channel from .02 to .98, so that a tail is the continuation of a line and not a
       line to one outlier, and at least .001 standard deviations apart, so that they increase in channels of few values. A
       channel that does not move beyond float32 rounding keeps scale 1 and a straight spline.
    4. Slopes are exp(ln 8 tanh(w / ln 8)), so within a factor of 8 of 1. Two starts: all slopes 1, which is plain PCA; and
       heights at the normal distribution's quantiles, which helps where channels saturate or have heavy tails.
    5. From both, KVSPLICE_EPOCHS of Adam on w minimise |v - v'|^2 in the unit of the values, through the round trip, at a
       fixed projection that PCA of the bent rows (eigh of a float64 covariance) renews after each epoch.
    6. Each head keeps whichever start and epoch has the least error on the rows to choose by, plain PCA being one of them.

The report is of the last tenth, through the codec as it is used, with plain PCA beside it. What is not true of it: choosing
does not make the codec better than PCA on other rows, and rows set aside are other tokens of the same batches, not of other
text. A smaller error of V need not be a smaller loss of the model.

Everything random comes from one stream keyed by (cell_seed, "kvsplice"), drawn on the CPU. Sampled rows lie in main memory:
4 n_embd bytes a row and layer, 2.4 GB for GPT-2 124M at k = 32.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gpt2.kvsplice import KVSplice, bypassed, codec_mode, piecewise
from gpt2.layers import full_precision
from lib import process
from lib.errors import UserError
from lib.mechanisms import layer_number
from lib.streams import cell_seed, stream_seed

if TYPE_CHECKING:
    from lib.config import Config

ROWS_PER_CHANNEL = 2000
LEVELS = (0.02, 0.98)
QUANTILE_ROWS = 16384  # places a quantile to a few hundredths of a standard deviation
GAP = 1e-3
LOG_RANGE = math.log(8)
MINIBATCH = 512
ORIGINS = ("pca", "identity", "quantile")


class Reservoir:
    """A uniform sample, without replacement, of `count` of all rows that were offered; all of them while they are fewer.

    Every row draws a key and the largest keys stay, so any `count` rows are equally likely, however they arrive. `rows`
    [G, kept, D] float32, `labels` [kept]: the number each came with.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.generator = count, torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.float64)
        self._rows: torch.Tensor | None = None
        self._labels: torch.Tensor | None = None

    @property
    def rows(self) -> torch.Tensor:
        return self._rows[:, :len(self.keys)]

    @property
    def labels(self) -> torch.Tensor:
        return self._labels[:len(self.keys)]

    def offer(self, rows: torch.Tensor, label: int = 0) -> None:
        """rows [G, n, D]."""
        if self._rows is None:
            self._rows = torch.empty(rows.size(0), self.count, rows.size(2))
            self._labels = torch.empty(self.count, dtype=torch.int64)
        held = len(self.keys)
        keys = torch.cat([self.keys, torch.rand(rows.size(1), dtype=torch.float64, generator=self.generator)])
        size = min(self.count, len(keys))
        stays = torch.zeros(len(keys), dtype=torch.bool)
        stays[keys.topk(size, sorted=False).indices] = True
        taken = stays[held:].nonzero()[:, 0]
        slots = torch.cat([(~stays[:held]).nonzero()[:, 0], torch.arange(held, size)])
        self._rows[:, slots] = rows[:, taken.to(rows.device)].to("cpu", torch.float32)
        self._labels[slots] = label
        self.keys = torch.cat([self.keys, keys.new_empty(size - held)])
        self.keys[slots] = keys[held:][taken]


class KVSpliceCalibrator:
    """Fits every KVSplice of a model built from `cfg`."""

    def __init__(self, cfg: "Config"):
        self.samples, self.max_batches, self.shared = cfg.KVSPLICE_SAMPLES, cfg.KVSPLICE_MAX_BATCHES, cfg.KVSPLICE_SHARED
        self.epochs, self.lr = cfg.KVSPLICE_EPOCHS, cfg.KVSPLICE_LR
        self.seed = stream_seed(cell_seed(cfg), "kvsplice")

    def fit(self, model: nn.Module, batches: Iterable[Any]) -> dict:
        """Sample the values of `model` on `batches` (an iterable of token ids [B, T]), fit, and set its codecs.

        Runs under the caller's autocast, as the model itself would. Returns what metrics.json may hold: `rows`, the sample's
        size, and `layers`, of each layer that attends: its number, `error` = |v - v'| / |v|, `mse` and `explained_variance`
        on rows set aside, each also of plain PCA as `<name>_pca` (None where V is 0 or does not vary), and `heads`, how many
        of its geometries kept plain PCA or came from either start. ValueError if a value is not finite,
        UserError if no layer attends.
        """
        held = {layer_number(name): module for name, module in model.named_modules() if isinstance(module, KVSplice)}
        found: dict[str, Any] = {"rows": 0, "layers": []}
        for layers, reservoir in self.collect(model, held, batches):
            rows, labels = reservoir.rows, reservoir.labels
            if not rows.isfinite().all():
                raise ValueError(f"the values of layer {', '.join(map(str, layers))} are not finite")
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "fit", layers[0]))
            order = torch.randperm(len(labels), generator=generator)
            rows, labels = rows[:, order].to(held[layers[0]].mean.device), labels[order]
            a, b = parts(len(labels))
            one = held[layers[0]]
            geometry, heads = fit_geometry(rows[:, :a], rows[:, a:b], one.k, len(one.spline.knots), self.epochs, self.lr,
                                           generator)
            for codec in held.values() if self.shared else [one]:
                codec.set(**geometry)
            for layer in layers:
                mine = rows[:, b:] if not self.shared else rows[:, b:][:, (labels[b:] == layer).to(rows.device)]
                found["layers"].append({"layer": layer, **measured(held[layer], mine), "heads": heads})
            found["rows"] = len(labels)
        if not found["layers"]:
            raise UserError("there are no values to fit KVSplice to: no layer attends, or there were no batches.",
                            "choose a step whose attention is on.")
        return found

    @torch.no_grad()
    def collect(self, model: nn.Module, held: dict[int, KVSplice], batches: Iterable[Any]) -> list[tuple[list[int], Reservoir]]:
        """The sampled values: [(layers, reservoir)], one pair a layer, or one in all where the geometry is shared. A layer
        that does not attend is in none."""
        count = min(self.samples, ROWS_PER_CHANNEL * next(iter(held.values())).k)
        common = Reservoir(count, self.seed)  # the same seed for each layer: the same tokens in all
        reservoirs = {layer: common if self.shared else Reservoir(count, self.seed) for layer in held}
        seen = []

        def observe(layer: int) -> Callable[..., None]:
            def hook(_: Any, arguments: Any) -> None:
                (v,) = arguments  # [B, H, T, D]
                rows = v.flatten(0, 2)[None] if self.shared else v.transpose(0, 1).flatten(1, 2)
                reservoirs[layer].offer(rows, layer)
                if layer not in seen:
                    seen.append(layer)
            return hook

        device, training = next(model.parameters()).device, model.training
        hooks = [codec.register_forward_pre_hook(observe(layer)) for layer, codec in held.items()]
        try:
            # A program compiled before the hooks came would not call them.
            with bypassed(model), torch.compiler.set_stance("force_eager"):
                model.eval()
                for idx in itertools.islice(batches, self.max_batches):
                    model(torch.as_tensor(idx, device=device), last=True)
                    process.show_life()
        finally:
            for hook in hooks:
                hook.remove()
            model.train(training)
        layers = sorted(seen)
        return [(layers, common)] if self.shared and layers else [([layer], reservoirs[layer]) for layer in layers]


def parts(count: int) -> tuple[int, int]:
    """Where the rows to choose by and those to report on begin, a tenth of `count` each."""
    tenth = max(1, count // 10)
    if count < 3 * tenth:
        raise ValueError(f"{count} sampled rows are too few to fit, choose and report")
    return count - 2 * tenth, count - tenth


def fit_geometry(rows: torch.Tensor, choosing: torch.Tensor, k: int, knots: int, epochs: int, lr: float,
                 generator: torch.Generator) -> tuple[dict, dict]:
    """The geometry of `rows` [G, n, D] (arguments of KVSplice.set), chosen by `choosing` [G, m, D]; and how many of the G
    keep plain PCA or come from either start."""
    with full_precision(rows), torch.enable_grad():
        mean = rows.double().mean(1, keepdim=True).float()
        x, unseen = rows - mean, choosing - mean
        at, bent = place_knots(x, mean, knots)
        w = torch.stack([torch.zeros_like(bent), bent], 1).requires_grad_()  # [K - 1, 2, G, 1, D]
        at = at[:, None]
        power = x.square().sum(2).mean(1).clamp_min(torch.finfo(x.dtype).tiny)  # [G]
        optimizer, best = torch.optim.Adam([w], lr=lr), None
        for epoch in range(epochs + 1):
            with torch.no_grad():
                centre, basis = principal(piecewise(x, at, *lines(at, w)), k)
                best = better_of(best, {
                    "error": squared_error(unseen, at, w, centre, basis), "heights": lines(at.double(), w.double())[0],
                    "centre": centre, "basis": basis})
            if epoch < epochs:
                for batch in torch.randperm(x.size(1), generator=generator).split(MINIBATCH):
                    batch = x[:, batch.to(x.device)]
                    (squared_error(batch, at, w, centre, basis) / power).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    process.show_life()
    heads = {name: int((best["origin"] == number).sum()) for number, name in enumerate(ORIGINS)}
    geometry = {name: best[name] for name in ("heights", "centre", "basis")}
    return geometry | {"mean": mean, "knots": at[:, 0], "pca_basis": principal(x, k)[1]}, heads


def better_of(best: dict | None, new: dict) -> dict:
    """By geometry, the one of least error among `best` and both starts of `new`, whose axis before that of the geometries is
    the start. `origin` counts in ORIGINS: the first start of the first `new` is plain PCA."""
    for start in range(2):
        one = {name: value.select(-4 if name == "heights" else 0, start) for name, value in new.items()}
        one["origin"] = torch.full_like(one["error"], 0 if best is None else start + 1)
        if best is None:
            best = one
        better = one["error"] < best["error"]
        best = {name: torch.where(better if old.ndim == 1 else better[:, None, None], one[name], old)
                for name, old in best.items()}
    return best


def place_knots(x: torch.Tensor, mean: torch.Tensor, knots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Knots [K, G, 1, D] of centred rows x [G, n, D], in their unit, and the w [K - 1, G, 1, D] at which the heights are the
    normal distribution's quantiles."""
    scale = x.double().std(1, keepdim=True, correction=0)
    still = scale <= (1e-6 * mean.double().abs()).clamp_min(1e-30)
    scale = torch.where(still, 1.0, scale)
    levels = torch.linspace(*LEVELS, knots, dtype=torch.float64, device=x.device)
    normal = torch.special.ndtri(levels)[:, None, None, None]
    z = quantiles(x[:, :QUANTILE_ROWS].double() / scale, levels)[:, :, None]
    gaps = GAP * torch.arange(knots, device=x.device)[:, None, None, None]
    z = torch.where(still, normal, (z - gaps).cummax(0).values + gaps)
    wanted = (normal.diff(dim=0) / z.diff(dim=0)).log()
    w = LOG_RANGE * torch.atanh(wanted.clamp(-0.95 * LOG_RANGE, 0.95 * LOG_RANGE) / LOG_RANGE)
    return (z * scale).float(), w.float()


def quantiles(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Of rows x [G, n, D], interpolated, [levels, G, D]. torch.quantile refuses tensors of this size."""
    ordered, at = x.sort(1).values.transpose(0, 1), levels * (x.size(1) - 1)
    return torch.lerp(ordered[at.floor().long()], ordered[at.ceil().long()], at.frac()[:, None, None])


def lines(knots: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heights [K, ...] and slopes [K - 1, ...] of the splines with these knots and w; the middle knot stays."""
    slopes = torch.exp(LOG_RANGE * torch.tanh(w / LOG_RANGE))
    heights = torch.cat([torch.zeros_like(slopes[:1]), (slopes * knots.diff(dim=0)).cumsum(0)])
    middle = len(knots) // 2
    return heights - heights[middle] + knots[middle], slopes


def principal(u: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [..., 1, D] and first k principal directions [..., D, k] of rows u [..., n, D], each of a sign of its own: its
    largest entry is positive, on every machine."""
    centre = u.double().mean(-2, keepdim=True)
    covariance = sum((d := part.double() - centre).mT @ d for part in u.split(QUANTILE_ROWS, -2)) / u.size(-2)
    basis = torch.linalg.eigh(covariance).eigenvectors[..., -k:].flip(-1)
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return centre.float(), (basis * largest.sign()).float()


def squared_error(x: torch.Tensor, knots: torch.Tensor, w: torch.Tensor, centre: torch.Tensor,
                  basis: torch.Tensor) -> torch.Tensor:
    """|x - x'|^2 of rows x [G, n, D] through the splines and the projection, averaged over rows, [2, G]."""
    heights, slopes = lines(knots, w)
    u = (piecewise(x, knots, heights, slopes) - centre) @ basis @ basis.mT + centre
    return (piecewise(u, heights, knots, 1 / slopes) - x).square().sum(-1).mean(-1)


@torch.no_grad()
def measured(codec: KVSplice, rows: torch.Tensor) -> dict:
    """Reconstruction of rows [G, n, D] by a codec and by plain PCA."""
    found, v = {}, rows.double()
    energy, spread = v.square().sum().item(), (v - v.mean(1, keepdim=True)).square().sum().item()
    for mode, suffix in (("splice", ""), ("pca", "_pca")):
        with codec_mode(codec, mode):
            lost = (codec(rows) - v).square().sum().item()
        found |= {f"error{suffix}": math.sqrt(lost / energy) if energy else None, f"mse{suffix}": lost / max(1, v.numel()),
                  f"explained_variance{suffix}": 1 - lost / spread if spread else None}
    return found
