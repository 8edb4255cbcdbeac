"""The tied head and the loss in one: mean cross-entropy of x W^T, without the logits of a whole batch in memory.

At GPT-2's width the logits are the largest tensor of a training step by far (32 x 1024 x 50304 of two bytes are 3.3 GB, with
the float32 copies of a plain softmax and the gradient four times that). Here the rows go through in `chunks` parts, and the
gradient of a part is made while its logits are there, in the forward pass, so none of them outlives its part:

    loss = 1 / n sum_i (log sum_v exp(x_i . w_v) - x_i . w_{target_i})            n targets that are not IGNORED
    d loss / d x_i = 1 / n (p_i - e_{target_i}) W,    d loss / d W = 1 / n sum_i (p_i - e_{target_i}) x_i^T

Products are taken in the type of x and W (bfloat16 under autocast), softmax and sums over chunks in float32 at least. The
backward pass only scales what is there. Nothing is approximated: one chunk, and many, give the plain loss to rounding.
"""

import torch
import torch.nn.functional as F

IGNORED = -1  # a target that does not count


def linear_cross_entropy(x, weight, targets, chunks: int):
    """Mean cross-entropy in nats, shape (), of the rows x [N, width] over the vocabulary of weight [V, width]; targets [N].

    Autocast applies as to a linear layer. Rows are dealt to `chunks` parts of nearly equal size.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets, chunks)
    with torch.autocast(device, enabled=False):
        total = sum(_losses(x_part @ weight.T, target).sum() for x_part, target in _parts(x, targets, chunks))
        return total / (targets != IGNORED).sum()


def _parts(x, targets, chunks: int):
    return zip(x.chunk(chunks), targets.chunk(chunks), strict=True)


def _losses(logits, targets):
    """-log p of every target, in float32 at least; 0 where it is ignored."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORED,
                           reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` whose forward pass makes the gradients of x and weight too."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks: int):
        exact = torch.promote_types(x.dtype, torch.float32)
        vocabulary = torch.arange(weight.size(0), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            share = 1 / (targets != IGNORED).sum().to(exact)
            total, grad_weight, grads = torch.zeros((), dtype=exact, device=x.device), None, []
            for part, target in _parts(x, targets, chunks):
                logits = (part @ weight.T).to(exact)
                counts = target != IGNORED
                level = logits.logsumexp(-1)
                at = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0]
                total = total + torch.where(counts, level - at, 0).sum()
                p = (logits - level[:, None]).exp() - (vocabulary == target[:, None]).to(exact)
                p = (p * (share * counts)[:, None]).to(x.dtype)
                grads.append(p @ weight)
                product = p.T @ part
                grad_weight = product.to(exact) if grad_weight is None else grad_weight + product
            ctx.save_for_backward(torch.cat(grads), grad_weight.to(weight.dtype))
            return total * share

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return (grad_x * grad).to(grad_x.dtype), (grad_weight * grad).to(grad_weight.dtype), None, None
