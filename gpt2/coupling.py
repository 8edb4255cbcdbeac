"""How far a mechanism is switched on: the coupling scale s, from 0 (the model computes plain GPT-2) to 1 (the mechanism as
its own module defines it), and the schedules that move it over the budget.

    w_eff = 1 + s (w - 1)          a weight, neutral at 1
    alpha_eff = s alpha            a share, neutral at 0

A mechanism holds one `Coupling` and sends its weights and shares through it. A model built outside the loop has s = 1, and
until a schedule or `set_ra_mlp_coupling_scale` moves it the scale takes part in no computation.

`CouplingController` moves all of them alike, by COUPLING_*:
- warm-up: s rises linearly to 1 over COUPLING_SHARE of the budget, whatever the budget's kind;
- delay: s = 0 for COUPLING_DELAY_STEPS steps or COUPLING_SHARE of the budget, whichever comes first, then 1;
- variance-guided: s = 0 until the loss has settled, then up to 1 over COUPLING_RAMP_STEPS steps, of which the next one is
  the first, or COUPLING_SHARE of the budget, whichever is shorter. Settled: over the last COUPLING_WINDOW training steps,
  std / mean of the loss is below COUPLING_SPREAD, and the least-squares line through it changes by less than COUPLING_TREND
  of the mean from end to end. Both are computed on the device, so no step waits for it.

Sources: reciprocal-architecture-kvsplice-2025-11-11 (warm-up; there the buffer was read by nothing), geometric-init-skip-gates
(variance-guided activation; there its trigger never fired or was not read). What is not shown by any of them: that a mechanism
needs it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lib.config import Config
    from lib.mechanisms import Moment


class Coupling(nn.Module):
    """The scale s of one mechanism, a buffer of shape (). `moved` is False as long as s has always been 1."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.moved = False

    def set(self, scale: Any) -> None:
        """Move it to a number in [0, 1], or to a tensor of shape ()."""
        self.moved = True
        if isinstance(scale, torch.Tensor):
            self.scale.copy_(scale)
        else:
            self.scale.fill_(scale)

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """w_eff of weights that are neutral at 1."""
        return 1 + self.scale * (w - 1) if self.moved else w

    def share(self, alpha: torch.Tensor) -> torch.Tensor:
        """alpha_eff of shares that are neutral at 0."""
        return self.scale * alpha if self.moved else alpha

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.moved = self.moved or not self.scale.is_meta and self.scale.item() != 1


@torch.no_grad()
def set_ra_mlp_coupling_scale(model: nn.Module, scale: Any) -> None:
    """Set the scale of every mechanism of `model` that has one; `scale` is a number in [0, 1] or a tensor of shape ()."""
    for module in model.modules():
        if isinstance(module, Coupling):
            module.set(scale)


class CouplingController(nn.Module):
    """Moves the scale of all mechanisms in `blocks` over the budget, as COUPLING_* say.

    State, all in the state_dict: the scale last set; of the variance-guided one the window of losses and the step and
    progress at which it fired (-1: not yet).
    """

    scale: torch.Tensor
    losses: torch.Tensor
    fired: torch.Tensor

    def __init__(self, cfg: "Config", blocks: nn.ModuleList):
        super().__init__()
        self.couplings = tuple(module for module in blocks.modules() if isinstance(module, Coupling))
        for coupling in self.couplings:
            coupling.moved = True
        self.warm_up, self.delay_steps = bool(cfg.COUPLING_WARMUP), cfg.COUPLING_DELAY_STEPS
        self.share = cfg.COUPLING_SHARE
        self.window, self.ramp_steps = cfg.COUPLING_WINDOW, cfg.COUPLING_RAMP_STEPS
        self.spread, self.trend = cfg.COUPLING_SPREAD, cfg.COUPLING_TREND
        self.register_buffer("scale", torch.ones(()))
        self.full = False
        if self.window:
            self.register_buffer("losses", torch.zeros(self.window))
            self.register_buffer("fired", torch.full((2,), -1.0))

    @torch.no_grad()
    def advance(self, moment: "Moment") -> bool:
        """Set the scale for the step that comes next; the loop calls it before every step."""
        if moment.iteration == 0:
            self._begin()
        if self.full:
            return False
        if self.window:
            self._observe(moment)
            steps, progress = moment.iteration + 1 - self.fired[0], moment.progress - self.fired[1]
            ramp = torch.maximum(steps / self.ramp_steps, progress / self.share).clamp(0, 1)
            scale: Any = ramp.masked_fill(self.fired[0] < 0, 0.0)
        elif self.warm_up:
            scale = min(1.0, moment.progress / self.share)
        else:
            scale = float(moment.iteration >= self.delay_steps or moment.progress >= self.share)
        self._set(scale)
        self.full = not self.window and scale == 1  # known on the host, and it stays so
        return False

    def _begin(self) -> None:
        """Forget what a parent's state says of its own budget."""
        self.full = False
        if self.window:
            self.losses.zero_()
            self.fired.fill_(-1.0)

    def _observe(self, moment: "Moment") -> None:
        """Take in the loss of the step before, and fire if the window is full and has settled."""
        if moment.train_loss is None:
            return
        self.losses.copy_(torch.roll(self.losses, -1))
        self.losses[-1] = moment.train_loss
        if moment.iteration < self.window:
            return
        mean = self.losses.mean()
        x = torch.arange(self.window, dtype=torch.float32, device=self.losses.device) - (self.window - 1) / 2
        change = (self.losses * x).sum() / x.square().sum() * (self.window - 1)
        settled = (self.losses.std(unbiased=False) / mean < self.spread) & (change.abs() / mean < self.trend)
        now = settled & (self.fired[0] < 0)
        for place, value in enumerate((moment.iteration, moment.progress)):
            self.fired[place].masked_fill_(now, value)  # a number made a tensor would be copied to the device, and waited for

    def _set(self, scale: Any) -> None:
        if isinstance(scale, torch.Tensor):
            self.scale.copy_(scale)
        else:
            self.scale.fill_(scale)
        for coupling in self.couplings:
            coupling.set(self.scale)

    def stats(self) -> dict:
        """`coupling_scale`."""
        return {"coupling_scale": self.scale}

    def inactive(self) -> str | None:
        """Asked at the end of the budget: a scale that is still 0 means that the mechanism never acted."""
        if self.scale > 0:
            return None
        if self.window:
            return f"the coupling stayed at 0: no {self.window} steps had a loss that was settled"
        return "the coupling stayed at 0 to the end of the budget"
