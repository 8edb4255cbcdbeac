"""Fisher metrics of the attention of a study's finished cells, on windows of the validation set their loss was scored on.

What the metrics are, and what they are not, says gpt2/fisher.py; what is written where, scripts/describing.
"""

from typing import TYPE_CHECKING

import torch

from gpt2 import fisher
from scripts import describing

if TYPE_CHECKING:
    from gpt2.model import GPT
    from lib.config import Config


def names(cfg: "Config") -> set[str]:
    return {f"fisher/layer{layer}/head{head}/{metric}" for layer in range(cfg.GPT2_N_LAYER) for head in range(cfg.GPT2_N_HEAD)
            for metric in fisher.METRICS}


def of(model: "GPT", inputs: torch.Tensor, targets: torch.Tensor) -> tuple[dict, dict]:
    return fisher.measure(model, inputs)


def about(found: dict) -> list[str]:
    return [*describing.windows_said(found), "Means over layers and heads; position 0 sees one key and is no row. This is the "
            "spread of attention weights, not the curvature of the loss."]


MEASURE = describing.Measure("fim", "fisher", "Fisher metrics of attention", fisher.METRICS, of, names, about, first=1)

if __name__ == "__main__":
    describing.run(MEASURE, __doc__)
