"""SinkGD: plain gradient descent on gradients whose rows and columns are normalised in turn (arXiv 2502.06742,
Scetbon, Ma, Gong, Meeds, "Gradient Multi-Normalization for Stateless and Scalable LLM Training", algorithms 3 and 4).

One optimizer, two kinds of groups, told apart by `group["matrix"]`:
- True: matrices. p <- p (1 - lr weight_decay) - lr balance(grad). No state at all.
- False: everything else (embeddings, biases, norms, gates), AdamW with two moments, as the paper trains it.

Invariants: the matrices' step does not depend on the scale of the gradient (so a gradient clip does not change it), zero
rows and columns stay zero, and p.grad is not changed.

Learning rates. Entries of balance() have root mean square 1, about what AdamW's step has, so the step is lr an entry.
The paper gives the Adam part the global rate and the matrices SINKGD_MATRIX_LR_MULT = 0.05 of it: global 0.02, hence 1e-3 for
matrices, L = 5 rounds, no momentum. `lib.optimizers.build` keeps that relation, through the group's lr_mult; so
LEARNING_RATE is the paper's global rate, and a value tuned for AdamW (6e-4) is a small one here.
"""

from typing import Any

import torch

from lib.optimizers.adamw_spam import adamw_update, batched, moment_batches

CPU_STACK = 1 << 20  # entries of equal matrices that are worked on together
GPU_STACK = 1 << 25  # likewise; bounds the temporaries to 3 x 128 MiB


def balance(grads: torch.Tensor, iters: int, l1: bool = False, tau: float | None = None) -> torch.Tensor:
    """SR-Sinkhorn of each matrix: grads (..., m, n) -> the same shape, in float32 or better.

    `iters` rounds of: rows to L2 norm sqrt(n), then columns to L2 norm sqrt(m). After the last round the columns hold
    exactly, the rows up to convergence. The L1 form (not the paper's) normalises to L1 norms n and m, so that the mean
    |entry| is 1 where the L2 form has a mean square of 1, and then takes tanh(entry / tau): at a small tau nearly the sign.
    A tanh of the raw gradient, whose entries are far below any tau, would do nothing.

    Every iterate is diag(r) G diag(c), and a round needs only the sums over rows and columns of G^2 weighted by c^2
    and r^2: two products of a matrix with a vector, instead of two passes that rewrite the matrix.
    """
    m, n = grads.shape[-2:]
    x = grads.reshape(-1, m, n).to(torch.promote_types(grads.dtype, torch.float32), copy=True)
    return _balance_(x, iters, l1, tau).view(grads.shape)


def _balance_(x: torch.Tensor, iters: int, l1: bool, tau: float | None) -> torch.Tensor:
    """`balance` of a stack (b, m, n), in place: fresh memory costs a CPU more than the arithmetic does."""
    m, n = x.shape[1:]
    # Relative to the largest entry, squares neither overflow nor vanish. (amax and amin: the maximum norm is slow.)
    largest = torch.maximum(x.amax((1, 2), keepdim=True), -x.amin((1, 2), keepdim=True))
    x.div_(largest.clamp_min_(torch.finfo(x.dtype).tiny))
    power = x.abs() if l1 else x.square()
    # Keeps zero rows and columns finite. Bites only where a row is 1e-9 of the largest entry: r and c stay below 1e9.
    floor = x.new_full((1, 1, 1), 1e-9 if l1 else 1e-18)
    columns = x.new_ones(len(x), 1, n)
    for _ in range(iters):
        rows = torch.baddbmm(floor, power, columns.transpose(1, 2), alpha=1.0 / n).reciprocal_()  # (b, m, 1)
        columns = torch.baddbmm(floor, rows.transpose(1, 2), power, alpha=1.0 / m).reciprocal_()  # (b, 1, n)
    if not l1:
        rows, columns = rows.sqrt_(), columns.sqrt_()
    x.mul_(rows).mul_(columns)
    return x.div_(tau).tanh_() if l1 else x


class SinkGD(torch.optim.Optimizer):
    """SinkGD for groups with matrix=True (the default), AdamW for those with matrix=False; see the module's docstring.

    iters: rounds of normalisation, at least 1 (paper: 5). l1, tau: the L1 form, see `balance`. betas and eps are
    AdamW's. weight_decay is decoupled, in both kinds of groups. ValueError for a parameter of a matrix group that is
    not two-dimensional.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, iters: int = 5, l1: bool = False, tau: float | None = None,
                 matrix: bool = True):
        self.found_inf = None
        if iters < 1 or (l1 and not (tau and tau > 0)):
            raise ValueError(f"iters={iters} must be at least 1, and tau={tau} positive with l1")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, iters=iters, l1=l1,
                                      tau=tau, matrix=matrix))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shapes = [tuple(p.shape) for p in group["params"] if group["matrix"] and p.ndim != 2]
        if shapes:
            raise ValueError(f"SinkGD's matrix groups take matrices, not tensors of shape {shapes[0]}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrix"]:
                self._descend(group)
                continue
            for params, grads, firsts, seconds, updates in moment_batches(self, group):
                adamw_update(params, grads, firsts, seconds, updates + 1, group, group["lr"], self.found_inf)
        return loss

    def _descend(self, group: dict) -> None:
        alike = {}
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault((p.shape, p.dtype, p.device), []).append((p, p.grad))
        for (_, dtype, device), rows in alike.items():
            for stack in batched(rows, CPU_STACK if device.type == "cpu" else GPU_STACK):
                params, grads = map(list, zip(*stack, strict=True))
                step = torch.stack(grads).to(torch.promote_types(dtype, torch.float32))
                step = _balance_(step, group["iters"], group["l1"], group["tau"]).to(dtype)
                # p - lr (step + weight_decay p): without momentum, SGD's weight decay is the decoupled one.
                torch._fused_sgd_(params, list(step.unbind()), [], lr=group["lr"], weight_decay=group["weight_decay"],
                                  momentum=0.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
                                  found_inf=self.found_inf)
