"""Numbers that are not finite: kept from the parameters on the device, read by the host only where it waits anyway.

Contract: `Guard.look` is given every step's loss and gradient norm before the optimizer's step. From the first step on at
which one of them is NaN or infinite, the guard's flag is 1, and every optimizer of lib/optimizers leaves parameters and
moments as they are; counters that it keeps on the host, and what a reset zeroes, go on, so optimizer state is not saved any
more. Nothing in `look` waits for the device. `Guard.verdict` does, and says at which step it was; the loop asks it when it
logs, evaluates, saves and ends.

The flag is the `found_inf` that torch's fused kernels know from torch.amp.GradScaler, so that it costs no pass over memory.
"""

import math

import torch


class Guard:
    """Watches the steps of one run that follow number `done`; `loss` and `norm` are that one's, None if there was none."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, done: int, loss: float | None,
                 norm: float | None):
        self.flag = torch.zeros((), device=device)  # float32, as the kernels want it
        values = [float(done), *(math.nan if value is None else value for value in (loss, norm))]
        self.latest = torch.tensor(values, dtype=torch.float64, device=device)  # up to the step that was not finite, with it
        self.finite = self.latest.clone()  # up to the step before
        optimizer.grad_scale, optimizer.found_inf = None, self.flag  # type: ignore[attr-defined]  # as GradScaler sets them

    def look(self, iteration: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Step number `iteration` (from 1): its loss (float64) and the norm of its gradient, tensors of shape ()."""
        step = torch.stack((torch.full_like(loss, iteration), loss, norm.double()))
        torch.where(self.flag > 0, self.latest, step, out=self.latest)
        torch.maximum(self.flag, (~torch.isfinite(step).all()).float(), out=self.flag)
        torch.where(self.flag > 0, self.finite, step, out=self.finite)

    def verdict(self) -> str | None:
        """Which step was not finite, and the last values that were; None if all were. Waits for the device."""
        if not self.flag.item():
            return None
        (iteration, loss, norm), (done, *last) = self.latest.tolist(), self.finite.tolist()
        what = f"the training loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        return f"{what} at iteration {iteration:.0f} ({self._before(done, *last)})"

    def last(self) -> tuple[int, float | None, float | None]:
        """The last finite step: its number, loss and gradient norm. Waits for the device."""
        done, *values = self.finite.tolist()
        return int(done), *(value if math.isfinite(value) else None for value in values)

    @staticmethod
    def _before(done: float, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "no step before it was finite"
        known = f"loss {loss:.4f}" + (f" and gradient norm {norm:.4g}" if math.isfinite(norm) else "")
        return f"the last finite step, {done:.0f}, had {known}"


@torch.no_grad()
def not_finite(tensors: dict) -> str | None:
    """The name of the first of these that holds a NaN or an infinity. One wait for the device, one read of the memory.

    A sum over NaN or infinity is never finite, so only tensors whose sum is not are looked at closely.
    """
    tensors = {name: t.detach() for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    if not tensors:
        return None
    sums = torch.stack([t.sum().to(torch.float64) for t in tensors.values()])
    suspects = (name for name, sane in zip(tensors, torch.isfinite(sums).tolist(), strict=True) if not sane)
    return next((name for name in suspects if not torch.isfinite(tensors[name]).all()), None)


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """All tensors that a checkpoint holds, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {f"{kind} of {names.get(id(p), 'a parameter')}": value for p, state in optimizer.state.items()
               for kind, value in state.items()}
    return dict(model.state_dict()) | moments
