"""Curvature of the validation loss in the weights of a study's finished cells: largest and smallest eigenvalue of the Hessian,
its trace, and how far the sharpest direction stands out.

What the numbers are, and what they are not, says lib/curvature.py; what is written where, scripts/describing.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import curvature
from scripts import describing
from scripts.describing import Option

if TYPE_CHECKING:
    from gpt2.model import GPT
    from lib.config import Config

SHOWN = ("eigmax", "eigmin", "trace", "eigmax_over_mean")


def names(cfg: "Config") -> set[str]:
    return {f"curvature/{metric}" for metric in curvature.METRICS}


def loss(model: "GPT", x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found = model(x[None], y[None])[1]
    assert found is not None  # there are targets
    return found


def of(model: "GPT", inputs: torch.Tensor, targets: torch.Tensor, iterations: int, probes: int) -> tuple[dict, dict]:
    """A window is a loss of its own, so that one graph at a time is held. Fused attention has no second derivative, and the
    loss that makes its gradient in the forward pass has a wrong one."""
    model.loss_chunks = 1
    losses = [functools.partial(loss, model, x, y) for x, y in zip(inputs, targets, strict=True)]
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            found = curvature.measure(losses, [p for p in model.parameters() if p.requires_grad], iterations, probes)
    except curvature.NoSecondDerivative as error:
        return {f"curvature/{metric}": None for metric in curvature.METRICS}, {"model": str(error)}
    return {f"curvature/{metric}": value for metric, value in found.items()}, {}


def about(found: dict) -> list[str]:
    residuals = [one["heads"].get("curvature/residual") for one in found["steps"]]
    worst = max((one["max"] for one in residuals if one), default=None)
    return [*describing.windows_said(found), "Weights that compute the same may have other curvature (gates, products of "
            "matrices), so this compares parametrisations as well as landscapes.",
            *([] if worst is None else [f"Each eigmax is within {100 * worst:.2g} % of an eigenvalue; that it is the largest "
                                        "one is what Lanczos makes likely, and does not prove."])]


MEASURE = describing.Measure(
    "curvature", "curvature", "Curvature of the validation loss", SHOWN, of, names, about, windows=2,
    options={"iterations": Option(20, "of Lanczos"), "probes": Option(8, "vectors of random signs for the trace")})

if __name__ == "__main__":
    describing.run(MEASURE, __doc__)
