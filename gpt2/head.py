"""The tied head and the loss in one: mean cross-entropy of x W^T, without the logits of a whole batch in memory.

At GPT-2's width the logits are the largest tensor of a training step by far (32 x 1024 x 50304 of two bytes are 3.3 GB, with
the float32 copies of a plain softmax and the gradient four times that). Here the rows go through in `chunks` parts, and the
gradient of a part is made while its logits are there, in the forward pass, so none of them outlives its part:

    loss = 1 / n sum_i (log sum_v exp(x_i . w_v) - x_i . w_{target_i})            n targets that are not IGNORED
    d loss / d x_i = 1 / n (p_i - e_{target_i}) W,    d loss / d W = 1 / n sum_i (p_i - e_{target_i}) x_i^T

Products are taken in the type of x and W (bfloat16 under autocast), softmax and sums over chunks in float32 at least, and the
gradient of W leaves that sum in the type of W. The backward pass only scales what is there. Nothing is approximated: one chunk,
and many, give the plain loss to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.layers import autocast_dtype, full_precision
from lib.data import IGNORED


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunks: int) -> Tensor:
    """Mean cross-entropy in nats, shape (), of the rows x [N, width] over the vocabulary of weight [V, width]; targets [N].

    Autocast applies as to a linear layer. Rows are dealt to `chunks` parts of nearly equal size.
    """
    dtype = autocast_dtype(x.device) or weight.dtype
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets, chunks, dtype)
    with full_precision(x):
        x, weight = x.to(dtype), weight.to(dtype)
        total = sum(_losses(x_part @ weight.T, target).sum() for x_part, target in _parts(x, targets, chunks))
        return total / (targets != IGNORED).sum()


def _parts(x: Tensor, targets: Tensor, chunks: int) -> Any:
    return zip(x.chunk(chunks), targets.chunk(chunks), strict=True)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of every target, in float32 at least; 0 where it is ignored."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORED,
                           reduction="none")


@torch.library.custom_op("kablate::softmax_gradient_", mutates_args={"logits"})
def softmax_gradient_(logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """Losses [N] of logits [N, V] and targets [N], in the type of `share`, float32 at least, of shape (); 0 where the target is
    ignored. The logits are overwritten with their gradient: that of the sum of the losses, times `share`."""
    return _by_operations(logits, targets, share)


def _by_operations(logits: Tensor, targets: Tensor, share: Any) -> Tensor:
    exact = logits.to(share.dtype)
    counts, at = targets != IGNORED, targets.clamp(min=0)[:, None]
    level = exact.logsumexp(-1, keepdim=True)
    losses = torch.where(counts, (level - exact.gather(-1, at))[:, 0], 0)
    weights = (share * counts)[:, None]
    logits.copy_((exact - level).exp_().mul_(weights).scatter_add_(-1, at, -weights))
    return losses


@softmax_gradient_.register_kernel("cuda")
def _(logits: Tensor, targets: Tensor, share: Any) -> Tensor:
    if share.dtype != torch.float32:
        return _by_operations(logits, targets, share)
    from gpt2 import softmax_kernel  # Triton comes with the builds of torch that know a GPU
    return softmax_kernel.softmax_gradient_(logits, targets, share, IGNORED)


@softmax_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, share: Any) -> Tensor:
    return share.new_empty(logits.size(0))


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` whose forward pass makes the gradients of x and weight too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunks: int, dtype: torch.dtype) -> Tensor:
        """Products in `dtype`."""
        exact = torch.promote_types(dtype, torch.float32)
        ctx.types = x.dtype, weight.dtype
        with full_precision(x):
            x, weight = x.to(dtype), weight.to(dtype)
            share = 1 / (targets != IGNORED).sum().to(exact)
            total, grad_weight, grads = torch.zeros((), dtype=exact, device=x.device), None, []
            for part, target in _parts(x, targets, chunks):
                logits = part @ weight.T
                total = total + softmax_gradient_(logits, target, share).sum()  # from here on logits are their gradient
                grads.append(logits @ weight)
                product = logits.T @ part
                grad_weight = product.to(exact) if grad_weight is None else grad_weight + product
            ctx.save_for_backward(torch.cat(grads), grad_weight)
            return total * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = ((kept * grad).to(dtype) for kept, dtype in zip(ctx.saved_tensors, ctx.types, strict=True))
        return *scaled, None, None, None
