"""Curvature of a loss in its parameters: extreme eigenvalues and trace of the Hessian, by Hessian-vector products.

    H = second derivative of the mean of loss_w(theta) over w     theta: all trainable parameters, a tied one once
    eigmax, eigmin      Lanczos from a fixed start, with full reorthogonalisation; `residual` says how far eigmax is from an
                        eigenvalue at most, |H v - eigmax v| / eigmax of its Ritz vector v; that none is larger it does not say
    trace               Hutchinson's mean of z H z over z of random signs; `trace_error` is its standard error
    eigmax_over_mean    eigmax / (trace / number of parameters): how far the sharpest direction stands out

H is indefinite in training, so it has no condition number; the last is what comes nearest to one and has a value.

What is not true of it: that flat is good. Numbers of one function differ with how its weights are written (Dinh et al. 2017,
arXiv 1703.04933): a gate that multiplies rows, or a product of two matrices in place of one, changes H and no output. Between
two mechanisms they compare parametrisations as much as landscapes.

Sources: Lanczos 1950; Hutchinson 1990; Ghorbani et al. 2019 (arXiv 1901.10159) for networks. scipy's eigsh would need the same
vectors on the host in float64, 1 GB each for GPT-2; here they stay on the device in float32.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lib.streams import stream_seed

METRICS = ("eigmax", "eigmin", "trace", "trace_error", "eigmax_over_mean", "residual")
STEP = 1e-3  # of the parameters' size, of the difference that the products are held against
WRONG = 0.05  # of a product's size: more than rounding in float32


class NoSecondDerivative(Exception):
    """Says why."""


class Hessian:
    """H of the mean of `losses`, each a function that computes its own graph, in `parameters`; vectors are flat, float32."""

    def __init__(self, losses: Sequence[Callable[[], torch.Tensor]], parameters: list[torch.nn.Parameter]):
        self.losses, self.parameters = losses, parameters
        self.size = sum(p.numel() for p in parameters)

    @torch.enable_grad()
    def gradient(self) -> torch.Tensor:
        total = torch.zeros(self.size, device=self.parameters[0].device)
        for loss in self.losses:
            total += self._flat(torch.autograd.grad(loss(), self.parameters, materialize_grads=True))
        return total / len(self.losses)

    @torch.enable_grad()
    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """H v. NoSecondDerivative where an operation of the loss has none."""
        total, parts = torch.zeros_like(vector), self._split(vector)
        for loss in self.losses:
            try:
                first = torch.autograd.grad(loss(), self.parameters, create_graph=True, materialize_grads=True)
                inner = torch.stack([(g * v).sum() for g, v in zip(first, parts, strict=True)]).sum()
                if inner.requires_grad:  # else the gradient is a constant
                    total += self._flat(torch.autograd.grad(inner, self.parameters, materialize_grads=True))
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                said = str(error).splitlines()[0][:160]
                once = re.search(r"backward through (\S+?)(?:\.default)? but no autograd formula", said)
                raise NoSecondDerivative(f"{once[1]} has no derivative" if once else said) from None
        return total / len(self.losses)

    @torch.no_grad()
    def checked(self, vector: torch.Tensor) -> None:
        """NoSecondDerivative if H v is not how the gradient changes along v: an operation may have a backward pass that is not
        differentiated further, and say nothing."""
        product = self.times(vector)
        size = torch.cat([p.detach().flatten() for p in self.parameters]).norm()
        step = (STEP * size / vector.norm()).item()
        kept = [p.detach().clone() for p in self.parameters]
        sides = []
        for sign in (1, -1):
            for p, old, part in zip(self.parameters, kept, self._split(vector), strict=True):
                p.copy_(old + sign * step * part)
            sides.append(self.gradient())
        for p, old in zip(self.parameters, kept, strict=True):
            p.copy_(old)
        change = (sides[0] - sides[1]) / (2 * step)
        difference = (change - product).norm() / torch.maximum(change.norm(), product.norm()).clamp_min(1e-30)
        if not difference <= WRONG:
            raise NoSecondDerivative(f"its second derivatives are not those of its gradient (off by {difference:.2g})")

    def _split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def _flat(self, parts: Any) -> torch.Tensor:
        return torch.cat([part.detach().float().flatten() for part in parts])


def random_vector(size: int, device: torch.device, *purpose: Any, signs: bool = False) -> torch.Tensor:
    """The same on every device, for it is drawn on the CPU."""
    generator = torch.Generator().manual_seed(stream_seed(0, "curvature", *purpose))
    drawn = torch.randint(2, (size,), generator=generator).mul_(2).sub_(1) if signs else torch.randn(size, generator=generator)
    return drawn.float().to(device)


@torch.no_grad()
def extremes(times: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, iterations: int) -> tuple[float, float, float]:
    """(largest eigenvalue, smallest, relative residual of the largest) of a symmetric map, after so many products."""
    basis, diagonal, beside = [start / start.norm()], [], []
    for number in range(min(iterations, start.numel())):
        w = times(basis[-1])
        diagonal.append(torch.dot(w, basis[-1]).item())
        for _ in range(2):  # once leaves what rounding puts back
            for v in basis:
                w = w - torch.dot(w, v) * v
        length = w.norm().item()
        beside.append(length)
        if length <= 1e-6 * max(map(abs, diagonal)) or number + 1 == iterations:
            break
        basis.append(w / length)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside[:len(diagonal) - 1]):
        small[i, i + 1] = small[i + 1, i] = value
    values, vectors = torch.linalg.eigh(small)
    top = values[-1].item()
    return top, values[0].item(), abs(beside[-1] * vectors[-1, -1].item()) / max(abs(top), 1e-30)


def trace(times: Callable[[torch.Tensor], torch.Tensor], size: int, device: torch.device, probes: int) -> tuple[float, float]:
    """(mean, its standard error) of so many probes; of one probe the error is not known, nan."""
    found = []
    for probe in range(probes):
        z = random_vector(size, device, "probe", probe, signs=True)
        found.append(torch.dot(z, times(z)).item())
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), (values.std() / probes ** 0.5).item() if probes > 1 else float("nan")


def measure(losses: Sequence[Callable[[], torch.Tensor]], parameters: list[torch.nn.Parameter], iterations: int,
            probes: int) -> dict[str, float | None]:
    """METRICS of the mean of `losses`. NoSecondDerivative where there is no Hessian."""
    hessian = Hessian(losses, parameters)
    device = parameters[0].device
    start = random_vector(hessian.size, device, "start")
    hessian.checked(start)
    high, low, residual = extremes(hessian.times, start, iterations)
    mean, error = trace(hessian.times, hessian.size, device, probes)
    known = mean > 2 * error if error == error else mean > 0
    return {"eigmax": high, "eigmin": low, "trace": mean, "trace_error": error if error == error else None,
            "eigmax_over_mean": high * hessian.size / mean if known else None, "residual": residual}
