"""AdamWSPAM: AdamW with spike-aware clipping and momentum reset (arXiv 2501.06842, Huang et al., SPAM).

At every step each parameter entry takes exactly the AdamW step (arXiv 1711.05101) at learning rate
`group["lr"] * rewarm_factor(...)` for the gradient `clip_spikes(...)`; with a huge theta and interval 0 that is
torch.optim.AdamW. Invariants:
- `group["step"]` counts calls of step(), a Python int that advances once per call. Resets and the re-warm-up are
  functions of it alone, so nothing accumulates and `group["lr"]` is only ever read.
- Both moments restart at zero, and with them the bias correction, before the calls number interval, 2 interval, ...
  (counted from 0). `state[p]["step"]` is the number of updates in p's moments; a parameter without a gradient keeps it.
- No step waits for the device: counters are Python ints, and the kernels get what they need as arguments.
- State is two moments of each parameter's size; the clipped gradient and its limits exist for one batch of tensors
  at a time. `p.grad` is not changed.

Where the authors' code differs: it clips against the uncorrected v and only from the 20th step after a reset on, does
not restart the bias correction, and leaves weight decay out of the re-warm-up. Here v is bias-corrected, which makes it
a scale from the second update on (a rough one at first: see the tests), and a factor on the learning rate means all of
it, as in the schedule's warm-up.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

REWARM_START = 0.01  # of the learning rate; the authors' code starts its re-warm-up at the same 1 %
CPU_BATCH = 1 << 18  # entries: the arrays of a batch stay in the cache, measured best on two threads and on one
GPU_BATCH = 1 << 25  # entries: few launches, and under 0.5 GB for the temporaries of a batch
LARGE = 1 << 16  # entries: what smaller tensors take together is a launch or two
TINY = 1e-36  # see clip_spikes


def rewarm_factor(step: int, interval: int, warmup_steps: int) -> float:
    """Factor on the learning rate of call number `step` (from 0): 1, but for the warmup_steps calls from a reset on.

    There it rises from REWARM_START to 1 by half a cosine. The first `interval` calls have no factor: the start of
    training has the schedule's own warm-up.
    """
    if not interval or step < interval or step % interval >= warmup_steps:
        return 1.0
    return 1.0 - (1.0 - REWARM_START) * 0.5 * (1.0 + math.cos(math.pi * (step % interval) / warmup_steps))


def clip_spikes(grads: list, seconds: list, theta: float, correction: float) -> Sequence[torch.Tensor]:
    """New gradients with |g| <= sqrt(theta v / correction); entries within the limit, and those with v = 0, are equal.

    `seconds` holds the second moments v of the steps before, `correction` is 1 - beta2^n of their n updates (n >= 1).
    An entry with v = 0 never had a gradient, so there is nothing its first one could be a spike against, and clipping
    it to 0 would keep it at 0 until the next reset.
    """
    large = [_is_large(grad, second) for grad, second in zip(grads, seconds, strict=True)]
    if not any(large):
        return _by_operations(grads, seconds, theta, correction)
    from lib.optimizers import spike_kernel  # Triton comes with the builds of torch that know a GPU

    small = [pair for pair, is_large in zip(zip(grads, seconds, strict=True), large, strict=True) if not is_large]
    rest = iter(_by_operations([g for g, _ in small], [s for _, s in small], theta, correction) if small else ())
    factor = math.sqrt(theta / correction)
    return [spike_kernel.clip(grad, second, factor, TINY) if is_large else next(rest)
            for grad, second, is_large in zip(grads, seconds, large, strict=True)]


def _is_large(grad: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a kernel of its own is worth its launch."""
    return (grad.is_cuda and grad.numel() >= LARGE and grad.dtype == second.dtype == torch.float32
            and grad.is_contiguous() and second.is_contiguous())


def _by_operations(grads: list, seconds: list, theta: float, correction: float) -> Sequence[torch.Tensor]:
    limits = torch._foreach_sqrt(seconds)
    torch._foreach_mul_(limits, math.sqrt(theta / correction))
    # Adds infinity where the limit is 0 and less than a rounding error where it is above 1e-14: no mask, no branch.
    torch._foreach_add_(limits, torch._foreach_reciprocal(limits), alpha=TINY)
    clipped = torch._foreach_minimum(grads, limits)
    torch._foreach_neg_(limits)
    torch._foreach_maximum_(clipped, limits)
    return clipped


def adamw_update(params: list[torch.Tensor], grads: list[torch.Tensor], firsts: list[torch.Tensor], seconds: list[torch.Tensor],
                 updates: int, group: dict, lr: float, found_inf: torch.Tensor | None = None) -> None:
    """One AdamW step in place, by torch's fused kernel; `updates` counts this one. Reads betas, eps, weight_decay.

    Where `found_inf` (float32, shape (), on the device) is 1, nothing is changed.
    """
    # Made by a fill on the device: a copied Python number would make the host wait.
    steps = [torch.full((), float(updates), dtype=torch.float32, device=params[0].device)] * len(params)
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(params, grads, firsts, seconds, [], steps, lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"],
                        weight_decay=group["weight_decay"], amsgrad=False, maximize=False, found_inf=found_inf)


def moment_batches(optimizer: torch.optim.Optimizer, group: dict) -> Iterator[tuple]:
    """Yield (params, grads, firsts, seconds, updates before this step), a batch at a time, and count this update.

    Only parameters with a gradient. Those of a batch share device, dtype and number of updates, so that the fused
    kernel takes them together. Makes the state of a parameter at its first gradient.
    """
    alike = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        state = optimizer.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        row = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
        alike.setdefault((p.device, p.dtype, state["step"]), []).append(row)
        state["step"] += 1
    for (device, _, updates), rows in alike.items():
        for batch in batched(rows, CPU_BATCH if device.type == "cpu" else GPU_BATCH):
            yield *map(list, zip(*batch, strict=True)), updates


def batched(rows: list, limit: int) -> Iterator[list]:
    """Cut rows, each led by a tensor, into lists of at most `limit` entries; a larger tensor is a list of its own."""
    batch, size = [], 0
    for row in rows:
        if batch and size + row[0].numel() > limit:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row[0].numel()
    if batch:
        yield batch


class AdamWSPAM(torch.optim.Optimizer):
    """AdamW with spike-aware clipping and momentum reset; see the module's docstring.

    theta: an entry of the gradient is a spike when g^2 > theta v_hat; finite and positive (paper: 5000).
    interval: calls of step() between resets, 0 for none (paper: 500). warmup_steps: calls from a reset on with a
    reduced learning rate (paper: 150). ValueError when warmup_steps >= interval > 0: the re-warm-up would never end.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, theta: float = 5000.0, interval: int = 500,
                 warmup_steps: int = 150):
        self.found_inf = None
        if not (math.isfinite(theta) and theta > 0 and interval >= 0 and warmup_steps >= 0):
            raise ValueError(f"theta={theta}, interval={interval} or warmup_steps={warmup_steps} is out of range")
        if 0 < interval <= warmup_steps:
            raise ValueError(f"warmup_steps={warmup_steps} is not below interval={interval}: the re-warm-up never ends")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, theta=theta,
                                      interval=interval, warmup_steps=warmup_steps, step=0))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step, interval = group["step"], group["interval"]
            group["step"] = step + 1
            if interval and step and step % interval == 0:
                self._reset(group)
            lr = group["lr"] * rewarm_factor(step, interval, group["warmup_steps"])
            for params, grads, firsts, seconds, updates in moment_batches(self, group):
                if updates:  # else v is empty
                    grads = clip_spikes(grads, seconds, group["theta"], 1.0 - group["betas"][1] ** updates)
                adamw_update(params, grads, firsts, seconds, updates + 1, group, lr, self.found_inf)
        return loss

    def _reset(self, group: dict) -> None:
        states = [self.state[p] for p in group["params"] if self.state.get(p)]
        if states:
            torch._foreach_zero_([state[moment] for state in states for moment in ("exp_avg", "exp_avg_sq")])
        for state in states:
            state["step"] = 0
