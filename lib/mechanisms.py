"""The one interface between the training loop and what a model is made of. The loop knows no mechanism by name; it knows
`Mechanisms`, which asks every module of the model that offers one of these, and nothing else:

- `advance(moment) -> bool`: called before every training step, also before the first, with where the run stands. Here a
  mechanism follows the budget and decides what is to be decided on the host. True if the program of the model changed (a
  path is gone, a branch is fixed), so that it has to be compiled anew; the loop does that off the budget.
- `penalty() -> tensor of shape ()`: called once after each forward pass in training; added to the loss that is
  differentiated, not to the loss that is reported.
- `stats() -> {metric name: tensor}`: logged. A tensor of shape () under its own name, as the mean over layers; any other as
  <name>_mean, _min, _max and _std over layers and heads. A number in the module's dotted name is its layer.
- `inactive() -> str | None`: asked once, after the last step; why the mechanism never acted within the budget.

A model that is built outside the loop, and never told of a moment, computes with every mechanism fully on. What a decision
goes by is in the module's state_dict, so a resumed run decides as an uninterrupted one. Decisions may depend on the budget,
on the iteration and on losses (so on when evaluations are, which is part of a cell's identity), not on what is logged. What
counts the budget begins anew at iteration 0: the model may have started from another's state.

Optimizer groups are declared beside: `gate_parameters` and `structure_parameters` (lib/optimizers).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib import ranks


@dataclass(frozen=True)
class Moment:
    """Where a run stands before a step: steps done, share of the budget used, loss of the step before (on the device,
    detached), loss of the untrained model on the first batch, latest validation loss; None where there is none yet."""

    iteration: int
    progress: float
    train_loss: Tensor | None = None
    first_loss: float | None = None
    val_loss: float | None = None


class Mechanisms:
    """All modules of `model` that offer something to the loop, by what they offer. `group`: the ranks that train it, who all
    ask for statistics together."""

    def __init__(self, model: nn.Module, group: ranks.Alone = ranks.ALONE):
        self.group = group

        def offering(what: str) -> list[tuple[str, Any]]:
            return [(name, module) for name, module in model.named_modules() if hasattr(module, what)]

        self._advancing, self._penalised = offering("advance"), offering("penalty")
        self._measured, self._acting = offering("stats"), offering("inactive")

    def advance(self, moment: Moment) -> bool:
        """Tell every module of the moment; whether one of them changed the program of the model."""
        return any([module.advance(moment) for _, module in self._advancing])  # a list: every one is told

    def changing(self) -> bool:
        """Whether the program of the model may change, so that parameters are left without a use."""
        return bool(self._advancing)

    def penalty(self) -> Tensor | float:
        """Sum of all penalties of the last forward pass."""
        return sum(module.penalty() for _, module in self._penalised)

    def inactive(self) -> str | None:
        """Why a mechanism of the model never acted, in the words of the first module that says so, after its name."""
        for name, module in self._acting:
            if sentence := module.inactive():
                return f"{name}: {sentence}" if name else sentence
        return None

    @torch.no_grad()
    def statistics(self, by_layer: bool = False) -> dict[str, float]:
        """All statistics, in one transfer, as the mean over ranks, each of which has seen its own sequences. `by_layer` adds
        the mean over each layer as "<statistic>/layer<number>", for modules that are in one."""
        values: dict[str, list] = {}
        layers: dict[str, list] = {}
        single = set()
        for where, module in self._measured:
            layer = layer_number(where)
            for name, value in module.stats().items():
                if value.ndim == 0:
                    single.add(name)
                values.setdefault(name, []).append(value.detach().float().flatten())
                if by_layer and layer is not None:
                    layers.setdefault(f"{name}/layer{layer}", []).append(values[name][-1])
        found = {}
        for name, parts in values.items():
            joined = torch.cat(parts)
            if name in single:
                found[name] = joined.mean()
            else:
                found |= {f"{name}_mean": joined.mean(), f"{name}_min": joined.min(), f"{name}_max": joined.max(),
                          f"{name}_std": joined.std(unbiased=False)}
        found |= {name: torch.cat(parts).mean() for name, parts in layers.items()}
        return dict(zip(found, self.group.mean(torch.stack(list(found.values()))).tolist(), strict=True)) if found else {}


def layer_number(name: str) -> int | None:
    """The layer a module is in: the first whole number in its dotted name, "transformer.h.3.attn" is in 3."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)
