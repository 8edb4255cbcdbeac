"""Attention over what KV pruning leaves, as one operator with its own backward pass: gpt2/attention/pruning.py says the rule.

    pruned_attention(q, k, v, limit, seed, first, block, scale, dropout, values_only, soft) -> y, log_weight, level

q, k [B, H, T, key_dim], v [B, H, T, D] of one type. Nothing is dropped before row `first`; of the M blocks of `block` rows
from there on: y [B, H, T - first, D], and log w of every token as a block sees it, log_weight [B, H, M, T], 0 alive and -inf
dropped (with `soft` between 0 and FLOOR). It is kept for the backward pass and has no gradient of its own. `limit` [] is how
many candidates live on beside the latest block: rounded it is the hard rule, and with `soft` it gets a gradient. `seed` [],
int64 on the CPU, draws the dropout of the weights, block by block; the backward pass draws it again.

Both passes work on [B, H, block, <=T] at a time and keep nothing of that size. They are operators because a compiler may join
the weights of both passes and keep them, which is T x T again, and because it would unroll M blocks in each layer, which takes
it minutes. On a GPU, in float32 or less and without dropout, they are the kernels of gpt2/attention/pruning_kernel.py, and not
even one block is in memory; elsewhere they are operations, of which nothing is fused. Kernels leave log sum exp of each row,
`level` [B, H, T - first], for the backward pass, operations nothing ([0]).

Sums and softmax are float32 (float64 of float64); matmuls and, by operations, scores are in the type of q, while SDPA and the
kernels keep scores in float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from gpt2.attention.baseline import causal_mask
from gpt2.layers import full_precision

SOFTNESS = 1 / 8  # width of the soft threshold in blocks
FLOOR = -30.0  # of log w: nothing beside 1 in float32, and far from the numbers that CPUs are slow with
WIDEST_TILE, TILE_BYTES = 128, 128 * 64 * 2  # of the kernels, padded to powers of two: small GPUs hold no larger one


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of softmax weights and of sums of importance."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_weights(q: torch.Tensor, k: torch.Tensor, scale: float, log_weight: torch.Tensor | None = None) -> torch.Tensor:
    """p [B, H, n, S] of the last n of S tokens; `log_weight` [B, H, S] is added to the scores."""
    scores = (q * scale) @ k.mT
    if log_weight is not None:
        scores = scores + log_weight[:, :, None]
    rows = scores.size(2)
    if rows > 1:
        scores[..., -rows:].masked_fill_(~causal_mask(rows, 0, q.device), -math.inf)
    return scores.softmax(-1, dtype=wide(q.dtype))


def relative(p: torch.Tensor, start: int) -> torch.Tensor:
    """What the rows p [B, H, n, S] of tokens from `start` on add to the sums of importance: sum of p_ij (i + 1), [B, H, S]."""
    seen = torch.arange(start + 1, start + 1 + p.size(2), dtype=p.dtype, device=p.device)
    return (seen @ p).view(*p.shape[:2], -1)


def ranks(sums: torch.Tensor, position: torch.Tensor, t: int, living: torch.Tensor | None = None) -> torch.Tensor:
    """Rank of each candidate by importance at border t, from 0; the dead come last. Of equals the earlier one comes first.

    sums [B, H, n], position [n] or [B, H, n] ascending, living [B, H, n] (None: all) -> int64 [B, H, n].
    """
    importance = sums / (t - position.to(sums.dtype))
    if living is not None:
        importance = importance.masked_fill(~living, -math.inf)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(order.size(-1), device=order.device).expand_as(order))


def blocks(T: int, first: int, block: int) -> list[tuple[int, int, int]]:
    """(number, first row, end) of the blocks from row `first` on."""
    return [(m, start, min(start + block, T)) for m, start in enumerate(range(first, T, block))]


def dropped(shape: tuple[int, ...], rate: float, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Factors of dropout, 0 or 1 / (1 - rate)."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - rate, generator=generator).div_(1 - rate)


def seeded(seed: torch.Tensor | int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(seed))


def in_kernels(q: torch.Tensor, v: torch.Tensor, block: int, dropout: float) -> bool:
    """Whether gpt2/attention/pruning_kernel.py computes it; a tile of it has a block's rows and a head's channels."""
    rows, channels = (1 << (size - 1).bit_length() for size in (block, max(q.size(3), v.size(3))))
    return (q.is_cuda and q.dtype != torch.float64 and not dropout
            and max(rows, channels) <= WIDEST_TILE and rows * channels * q.element_size() <= TILE_BYTES)


@torch.library.custom_op("kablate::pruned_attention", mutates_args=())
def pruned_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limit: torch.Tensor, seed: torch.Tensor, first: int,
                     block: int, scale: float, dropout: float, values_only: bool,
                     soft: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, log_weight, level = _outputs(q, v, first, block, dropout)
    if level.numel():
        from gpt2.attention import pruning_kernel  # Triton comes with the builds of torch that know a GPU
        q, k, v = _with_near_channels(q, k, v)
        pruning_kernel.forward(q, k, v, limit, first, block, scale, SOFTNESS * block, FLOOR, values_only, soft, y, log_weight,
                               level)
        return y, log_weight, level
    B, H, T, _ = q.shape
    exact = wide(q.dtype)
    sums = torch.zeros(B, H, T, dtype=exact, device=q.device)
    living = torch.ones(B, H, T, dtype=torch.bool, device=q.device)
    position = torch.arange(T, device=q.device)
    generator = seeded(seed, q.device) if dropout else None
    with full_precision(q):
        for _, start, end in blocks(first, 0, block):
            sums[:, :, :end] += relative(softmax_weights(q[:, :, start:end], k[:, :, :end], scale), start)
        for m, start, end in blocks(T, first, block):
            n, now = start - block, log_weight[:, :, m].zero_()
            rank = ranks(sums[:, :, :n], position[:n], start, living[:, :, :n])
            living[:, :, :n] &= rank < limit.round()
            if soft:
                now[:, :, :n] = F.logsigmoid((limit - rank - 0.5) / (SOFTNESS * block))
                if m:
                    now += log_weight[:, :, m - 1]
                now.clamp_(min=FLOOR)
            else:
                now.masked_fill_(~living, -math.inf)
            p = softmax_weights(q[:, :, start:end], k[:, :, :end], scale, None if values_only else now[:, :, :end])
            if end < T:
                sums[:, :, :end] += relative(p, start)
            if values_only:
                p *= now[:, :, None, :end].exp()
            if dropout:
                p *= dropped(p.shape, dropout, generator, p)
            y[:, :, start - first:end - first] = p.to(v.dtype) @ v[:, :, :end]
    return y, log_weight, level


def _outputs(q: torch.Tensor, v: torch.Tensor, first: int, block: int, dropout: float) -> tuple[torch.Tensor, ...]:
    """y, log_weight and level, of any content; that there is a level says that kernels compute it, in both passes."""
    B, H, T, _ = q.shape
    level = (B, H, T - first) if in_kernels(q, v, block, dropout) else (0,)
    return (v.new_empty(B, H, T - first, v.size(3)), q.new_empty(B, H, len(blocks(T, first, block)), T, dtype=wide(q.dtype)),
            q.new_empty(level, dtype=wide(q.dtype)))


def _with_near_channels(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


@pruned_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limit: torch.Tensor, seed: torch.Tensor, first: int, block: int,
      scale: float, dropout: float, values_only: bool,
      soft: bool) -> tuple[torch.Tensor, ...]:
    return _outputs(q, v, first, block, dropout)


@torch.library.custom_op("kablate::pruned_attention_backward", mutates_args=())
def pruned_attention_backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, log_weight: torch.Tensor,
        level: torch.Tensor, seed: torch.Tensor, first: int, block: int, scale: float, dropout: float, values_only: bool,
        soft: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and limit."""
    T, exact = q.size(2), wide(q.dtype)
    if level.numel():
        from gpt2.attention import pruning_kernel
        mean = (grad.to(exact) * y).sum(3)
        q, k, v = _with_near_channels(q, k, v)
        dq, dk, dv, gain = pruning_kernel.backward(grad.to(v.dtype), q, k, v, log_weight, level, mean, first, block, scale,
                                                   values_only, soft)
        if not soft:
            return dq, dk, dv, log_weight.new_zeros(())
        slopes = -torch.expm1(log_weight.diff(dim=2, prepend=torch.zeros_like(log_weight[:, :, :1]))) / (SOFTNESS * block)
        return dq, dk, dv, (gain * slopes.cumsum(2)).sum()
    # The sums over blocks are in the wide type, as one matmul's would be.
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
    dlimit = torch.zeros((), dtype=exact, device=q.device)
    slope = torch.zeros_like(log_weight[:, :, 0])  # of log w by limit
    generator = seeded(seed, q.device) if dropout else None
    with full_precision(q):
        grad = grad.to(v.dtype)
        mean = (grad.to(exact) * y).sum(3, keepdim=True)  # of each row's gradient of p, weighted by p
        for m, start, end in blocks(T, first, block):
            rows, own, now = slice(start, end), slice(start - first, end - first), log_weight[:, :, m, :end]
            g, queries, keys = grad[:, :, own], q[:, :, rows], k[:, :, :end]
            p = softmax_weights(queries, keys, scale, None if values_only else now)
            weights = p * now[:, :, None].exp() if values_only else p
            ds = (g @ v[:, :, :end].mT).to(exact)
            used = weights
            if dropout:
                factor = dropped(p.shape, dropout, generator, p)
                ds *= factor
                used = weights * factor
            dv[:, :, :end] += used.to(v.dtype).mT @ g
            if soft:
                step = now - log_weight[:, :, m - 1, :end] if m else now
                slope[:, :, :end] += -torch.expm1(step) / (SOFTNESS * block)
            if values_only:  # p is not what weighs the values, and weights grow with log w
                if soft:
                    dlimit += ((weights * ds).sum(2) * slope[:, :, :end]).sum()
                ds *= now[:, :, None].exp()
            ds = ds.sub_(mean[:, :, own]).mul_(p)
            if soft and not values_only:
                dlimit += (ds.sum(2) * slope[:, :, :end]).sum()
            ds = ds.to(q.dtype)
            dq[:, :, rows] = ds @ keys * scale
            dk[:, :, :end] += ds.mT @ (queries * scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlimit


@pruned_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, log_weight: torch.Tensor,
      level: torch.Tensor, seed: torch.Tensor, first: int, block: int, scale: float, dropout: float, values_only: bool,
      soft: bool) -> tuple[torch.Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), log_weight.new_empty(())


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, limit, seed, *settings = inputs
    ctx.settings, ctx.limit_type = settings, limit.dtype
    ctx.save_for_backward(q, k, v, *output, seed)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, y, log_weight, level, seed = ctx.saved_tensors
    dq, dk, dv, dlimit = pruned_attention_backward(grad.contiguous(), q, k, v, y, log_weight, level, seed, *ctx.settings)
    return dq, dk, dv, dlimit.to(ctx.limit_type), None, *(None for _ in ctx.settings)


pruned_attention.register_autograd(_backward, setup_context=_keep)


def _products(q_shape: Any, v_shape: Any, first: int, block: int) -> tuple[int, int, int]:
    """FLOPs of q k^T before row `first` and after it, and of p v after it."""
    B, H, T, key_dim = q_shape
    before, after = (2 * B * H * sum((end - start) * end for _, start, end in rows)
                     for rows in (blocks(first, 0, block), blocks(T, first, block)))
    return before * key_dim, after * key_dim, after * v_shape[3]


@register_flop_formula(torch.ops.kablate.pruned_attention)
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limit: torch.Tensor, seed: torch.Tensor, first: int, block: int,
      *settings: Any, out_shape: Any = None, **__: Any) -> int:
    return sum(_products(q, v, first, block))


@register_flop_formula(torch.ops.kablate.pruned_attention_backward)
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, log_weight: torch.Tensor,
      level: torch.Tensor, seed: torch.Tensor, first: int, block: int, *settings: Any, out_shape: Any = None, **__: Any) -> int:
    _, scores, values = _products(q, v, first, block)
    return 3 * scores + 2 * values
