"""KVSplice: values are stored in k of D channels, by a geometry that is fitted to the values of a trained model.

    compress      c = (s(v - mean) - centre) B               [..., H, T, D] -> [..., H, T, k]
    decompress    v' = s^-1(c B^T + centre) + mean           [..., H, T, k] -> [..., H, T, D]

s is a monotone piecewise-linear spline a channel, the columns of B [D, k] are orthonormal: the first k principal directions of
the bent values. One geometry a layer and head, or one for all of them (KVSPLICE_SHARED; each layer then holds an equal copy,
so a state_dict and a copy of the model need to know nothing of it). Every buffer is float32 and stays so when the model is
cast; both directions compute in float32 at least, also under autocast, and return the type they were given. What a cache
stores is c in its own type.

Standardising is folded into the knots: the spline of a standardised channel z = (v - mean) / scale, back in the channel's own
unit, is scale s(z), a spline of the same slopes with its knots at scale times those of z. The scale comes back before the
projection because an error counts in the unit of the values: principal directions of standardised channels would spend a
column on a channel that hardly moves. So with straight splines the codec is plain PCA of v, the best linear one of this k.

A spline is summed piece by piece, outward from its middle knot: how much of each piece lies between that knot and x, times its
slope. Every term has the same sign, so nothing cancels (a sum of ramps that change the slope would, and so would the inverse),
x gets the gradient of one piece also on a knot, all of it fuses into one pass, and on a CPU it takes a seventh of the time of
selecting a piece by torch.where. Slopes lie within a factor of 8 of 1, and nothing is divided by the distance of two knots, so
gradients are finite and the inverse is exact to rounding: 1e-6 of a standard deviation for slopes that a fit comes to.

Invariants: a token's code depends on that token alone, so cached decoding stores and reads what the full pass computes. k = D
is the identity to rounding. Before a fit the geometry is a valid one that loses much: mean 0, straight splines, cosines for B.

Source: reciprocal-architecture-kvsplice-2025-11-11. What is not true of it: "invertible, perfect reconstruction" holds for
the spline; the projection to k < D channels loses what is orthogonal to it. "Never worse than PCA" rests on differences of
one part in a million on one data set: the fit keeps PCA where splines do not help on rows set aside, and on new rows either
can win. There the compressed steps never compressed anything. Only the stored V is smaller; K is stored in full, all values
are decompressed at every step, and decoding is not faster by it.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.layers import full_precision
from gpt2.rules import kvsplice_width
from lib import checkpoint
from lib.errors import UserError

if TYPE_CHECKING:
    from lib.config import Config

MODES = ("splice", "pca", "off")
KIND = "kvsplice"
AGAIN = "move the folder of the cell away and run make again."
TINY = 2e-38  # a normal number, so that no device flushes it to 0


class Geometry(nn.Module):
    """A module whose buffers keep their type, also in a model that is cast to bfloat16 or float64."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class PWLSpline(Geometry):
    """A strictly increasing piecewise-linear function a head and channel, [..., H, T, D] -> the same; beyond the end knots it
    goes on as a line.

    `knots` and `heights` [K, H, 1, D], K >= 3; `slopes` [K - 1, H, 1, D] follow from them. It starts as the identity.
    """

    knots: torch.Tensor
    heights: torch.Tensor
    slopes: torch.Tensor

    def __init__(self, heads: int, channels: int, knots: int):
        super().__init__()
        if knots < 3:
            raise ValueError(f"a spline needs at least 3 knots, not {knots}")
        at = torch.linspace(-2, 2, knots)[:, None, None, None].repeat(1, heads, 1, channels)
        self.register_buffer("knots", at)
        self.register_buffer("heights", at.clone())
        self.register_buffer("slopes", torch.ones_like(at[1:]))

    @torch.no_grad()
    def set(self, knots: torch.Tensor, heights: torch.Tensor) -> None:
        """Go through these points. ValueError unless both increase strictly, in float32 too."""
        for name, points in (("knots", knots), ("heights", heights)):
            if not (points.float().diff(dim=0) > 0).all():
                raise ValueError(f"the {name} of a spline do not increase")
        slopes = heights.double().diff(dim=0) / knots.double().diff(dim=0)
        for buffer, value in ((self.knots, knots), (self.heights, heights), (self.slopes, slopes)):
            buffer.copy_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return piecewise(x, self.knots, self.heights, self.slopes)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return piecewise(y, self.heights, self.knots, 1 / self.slopes)


def piecewise(x: torch.Tensor, knots: torch.Tensor, heights: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The line through (knots, heights) at x; K - 1 `slopes`, of which the end ones go on for ever.

    `threshold` is `relu` with the gradient 1 at 0: a knot belongs to the piece on its right.
    """
    middle, last, widths = len(knots) // 2, len(slopes) - 1, knots.diff(dim=0)
    y = heights[middle]
    for i, slope in enumerate(slopes):
        if i == 0:
            inside = -F.relu(knots[1] - x)
        elif i == last:
            inside = F.threshold(x - knots[last], -TINY, 0.0)
        elif i < middle:
            inside = -F.relu(widths[i] - F.threshold(x - knots[i], -TINY, 0.0))
        else:
            inside = F.threshold(widths[i] - F.relu(knots[i + 1] - x), -TINY, 0.0)
        y = torch.addcmul(y, slope, inside)
    return y


class KVSplice(Geometry):
    """The codec of one layer's values. `heads`: geometries it holds, those of the layer's heads or 1 for all.

    `mode`: "splice"; "pca", plain PCA of v at the same k, its matched control; "off", which passes values on unchanged.
    The full forward pass calls the module itself, so a forward pre-hook sees every value.
    """

    mean: torch.Tensor
    centre: torch.Tensor
    basis: torch.Tensor
    pca_basis: torch.Tensor
    fitted: torch.Tensor

    def __init__(self, heads: int, head_dim: int, k: int, knots: int = 7):
        super().__init__()
        self.heads, self.head_dim, self.k, self.mode = heads, head_dim, k, MODES[0]
        self.spline = PWLSpline(heads, head_dim, knots)
        for name in ("mean", "centre"):
            self.register_buffer(name, torch.zeros(heads, 1, head_dim))
        for name in ("basis", "pca_basis"):
            self.register_buffer(name, cosines(head_dim, k).repeat(heads, 1, 1))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(1 if cfg.KVSPLICE_SHARED else cfg.GPT2_N_HEAD, cfg.GPT2_N_EMBD // cfg.GPT2_N_HEAD, kvsplice_width(cfg),
                   cfg.KVSPLICE_KNOTS)

    @property
    def width(self) -> int:
        """Channels of a stored value."""
        return self.head_dim if self.mode == "off" else self.k

    def sizes(self) -> dict:
        """Resolved integers, for metrics.json."""
        return {"kvsplice_k": self.k}

    def compress(self, v: torch.Tensor) -> torch.Tensor:
        """[..., H, T, D] -> [..., H, T, width], of the same type."""
        if self.mode == "off":
            return v
        with full_precision(v):
            x = v.to(torch.promote_types(v.dtype, torch.float32)) - self.mean
            if self.mode == "pca":
                code = x @ self.pca_basis.to(x.dtype)
            else:
                code = (self.spline(x) - self.centre) @ self.basis.to(x.dtype)
        return code.to(v.dtype)

    def decompress(self, code: torch.Tensor) -> torch.Tensor:
        """[..., H, T, width] -> [..., H, T, D], of the same type."""
        if self.mode == "off":
            return code
        with full_precision(code):
            c = code.to(torch.promote_types(code.dtype, torch.float32))
            if self.mode == "pca":
                x = c @ self.pca_basis.mT.to(c.dtype)
            else:
                x = self.spline.inverse(c @ self.basis.mT.to(c.dtype) + self.centre)
            v = x + self.mean
        return v.to(code.dtype)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """What a cache would give back for v [..., H, T, D]."""
        return self.decompress(self.compress(v))

    @torch.no_grad()
    def set(self, mean: torch.Tensor, knots: torch.Tensor, heights: torch.Tensor, centre: torch.Tensor, basis: torch.Tensor,
            pca_basis: torch.Tensor) -> None:
        """Take a fitted geometry over; shapes as in the buffers."""
        self.spline.set(knots, heights)
        for buffer, value in ((self.mean, mean), (self.centre, centre), (self.basis, basis), (self.pca_basis, pca_basis)):
            buffer.copy_(value)
        self.fitted.fill_(True)


def cosines(channels: int, k: int) -> torch.Tensor:
    """The first k of the orthonormal cosines over `channels` points, [channels, k]. Every entry of a value is in their sum,
    where unit vectors would leave channels without gradient."""
    point = (torch.arange(channels, dtype=torch.float64) + 0.5) / channels
    waves = math.sqrt(2 / channels) * torch.cos(math.pi * point[:, None] * torch.arange(k, dtype=torch.float64))
    return torch.where(torch.arange(k) == 0, math.sqrt(1 / channels), waves).float()


def codecs(model: nn.Module) -> list[KVSplice]:
    """Every KVSplice of `model`, by layer."""
    return [module for module in model.modules() if isinstance(module, KVSplice)]


@contextlib.contextmanager
def codec_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """All codecs of `model` in one of MODES, and afterwards as before. A cache belongs to the mode it was made in."""
    if mode not in MODES:
        raise ValueError(f"a codec has no mode '{mode}', only {', '.join(MODES)}")
    before = [(codec, codec.mode) for codec in codecs(model)]
    try:
        for codec, _ in before:
            codec.mode = mode
        yield
    finally:
        for codec, was in before:
            codec.mode = was


def bypassed(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which `model` computes as if it had no codec."""
    return codec_mode(model, "off")


def save(path: Path, model: nn.Module, *, step: str, seed: int, identity: str, report: dict | None = None) -> None:
    """Write the fitted geometry of every layer to `path`, whole or not at all.

    `identity` says whose values it was fitted to (`fingerprint`); `step` and `seed` say it to a reader, `report` is what the
    fit said of itself. ValueError if no layer was fitted (one that does not attend cannot be).
    """
    held = codecs(model)
    if not any(bool(codec.fitted) for codec in held):
        raise ValueError("a KVSplice that was not fitted cannot be saved")
    tensors = {f"{layer}.{name}": tensor.cpu() for layer, codec in enumerate(held)
               for name, tensor in codec.state_dict().items()}
    header = {"kind": KIND, **sizes(held), "step": step, "seed": seed, "identity": identity, "report": report}
    checkpoint.save(path, header=header, tensors=tensors, sha256=digest(header, tensors))


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) of the model's parameters, which its values follow from."""
    return digest({}, {name: p.detach().cpu() for name, p in model.named_parameters()})


def load(path: Path, model: nn.Module, *, identity: str) -> dict:
    """Put what `save` wrote into the codecs of `model` and return the file's header: kind, layers, head_dim, k, knots,
    geometries, step, seed, identity, report.

    UserError, and a model left as it was, if the file is missing, damaged, no such file, of other sizes or of another model.
    """
    header, tensors = _read(path, codecs(model))
    if header["identity"] != identity:
        raise UserError(f"{path} was fitted to the values of another model ({header['step']}, seed {header['seed']}).", AGAIN)
    for codec, fit in zip(codecs(model), tensors, strict=True):
        codec.load_state_dict(fit)
    return header


def verify(path: Path, model: nn.Module) -> None:
    """UserError if what `path` holds is not what the codecs of `model` hold, to the last bit, or cannot be read."""
    header, tensors = _read(path, codecs(model))
    for codec, fit in zip(codecs(model), tensors, strict=True):
        if any(not torch.equal(tensor.cpu(), fit[name]) for name, tensor in codec.state_dict().items()):
            raise UserError(f"{path} is not the fit of the model beside it, but of {header['step']}, seed {header['seed']}.",
                            AGAIN)


def _read(path: Path, held: list[KVSplice]) -> tuple[dict, list[dict]]:
    """Header and, by layer, the codec's tensors of a file that `save` wrote for codecs like these."""
    content = checkpoint.load(path)
    header = content.get("header")
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise UserError(f"{path} is no KVSplice file.", AGAIN)
    if content.get("sha256") != digest(header, content.get("tensors", {})):
        raise UserError(f"{path} is damaged: its content is not what was saved.", AGAIN)
    if not held:
        raise UserError(f"{path} cannot be used: the model has no KVSplice.", "set KVSPLICE=y.")
    for name, value in sizes(held).items():
        if header[name] != value:
            raise UserError(f"{path} is of another shape: {NAMES[name]} {header[name]} in the file, {value} in the model.",
                            AGAIN)
    return header, [{name: content["tensors"][f"{layer}.{name}"] for name in codec.state_dict()}
                    for layer, codec in enumerate(held)]


NAMES = {"layers": "layers", "head_dim": "head width", "k": "k =", "knots": "knots", "geometries": "geometries a layer"}


def sizes(held: list[KVSplice]) -> dict:
    """What two models must have in common to share a file."""
    one = held[0]
    return {"layers": len(held), "head_dim": one.head_dim, "k": one.k, "knots": len(one.spline.knots), "geometries": one.heads}


def digest(header: dict, tensors: dict) -> str:
    """sha256 (hex) of a header and of the names, shapes and bytes of tensors."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        sha.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
