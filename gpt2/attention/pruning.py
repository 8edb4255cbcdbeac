"""KV pruning: tokens of the past are dropped for good, by sequence and head, as the context fills.

Of a context of T tokens at most k = `keep` have a slot, the block of b = `block` that is being filled included. At a border
t = m b with t + b > k, before token t is read, the importance of a living token j is

    I_j = 1 / (t - j)  sum over queries i < t of p_ij (i + 1)          p: softmax weights, detached, before dropout

its mean attention relative to uniform, so that an old token is not favoured. The latest b tokens and the k - 2b most important
of the others live on (of equals the earlier one); what is dropped stays dropped. So a token has one integer, its death, and

    keys and values:  out_i = sum over living j of softmax over living (s_i)_j v_j        a dropped token is out of the softmax
    values only:      out_i = sum over living j of softmax over all (s_i)_j v_j           it is in it, and adds nothing

Shapes: q, k [B, H, T, key_dim], v [B, H, T, D] -> [B, H, T, D].

Invariants: a decision at border t reads queries and keys of tokens before t only, of its own sequence and head. Training,
evaluation and decoding follow one rule, through one ranking (`ranks`). Sums of importance are float32 (float64 of float64).
Training works by blocks of b rows, [B, H, b, <=T] at a time, and computes them anew in the backward pass (one operator,
gpt2/attention/pruning_op.py; on a GPU kernels), so what is kept for it is a few times q, k and v and a number for every token
and block, not T x T. Rows before the first drop are one SDPA call (which on the CPU, with dropout, keeps its weights, as the
baseline's does). FlexAttention does not do it: it gives no column sums, which the importance is, and on the CPU it has no
backward pass. b need not divide T; the last block is then shorter.

Learned share (`learned`): the layer has a parameter, k = round(share T) in evaluation and decoding, share = sigmoid(logit). In
training the drop is soft, so that the share gets a gradient: with r_j the rank of a candidate by importance, from 0, a border
multiplies its weight w_j by

    sigmoid((share T - 2b - r_j - 1/2) / tau)         tau = b / 8

In the limit tau -> 0 that is the hard rule. w multiplies p_ij (values only), or log w is added to the scores. `penalty` pulls
the share towards its start.

Source: reciprocal-architecture-kvsplice-2025-11-11. What is not true of it: its runs summed the importance over all queries,
so tokens were chosen with knowledge of the future, and the gains told of these steps came with that leak. "62 % less memory"
was said of values alone; with keys kept, the cache shrinks by 30 %. Training is not faster: it computes all weights, in more
passes than one SDPA call (at 128 channels and T = 1024 a step takes 1.4 to 1.7 times as long on a CPU); decoding saves bytes,
not launches, which pays for many sequences only. What a learned share trains is not quite what is evaluated, where the drop is
hard. Decoding equals the full pass to rounding only as long as no two importances at the threshold are nearer to each other
than rounding: in bfloat16 a chunk of another length may keep another of two tokens that are about equal. On a GPU that
rounding is of two kinds in half precision: scores are float32 in the kernels of a full pass, and of two bytes in decoding.
"""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.attention.pruning_op import pruned_attention, ranks, relative, softmax_weights, wide
from gpt2.kv_cache import PrunedCache, position_type
from gpt2.rules import kv_block, kv_keep, kvsplice_width

if TYPE_CHECKING:
    from lib.config import Config


class KVPruning(nn.Module):
    """The pruning of one layer; `values_only` keeps the keys. `strength`: of the penalty, for one layer.

    `learned`: the share the layer starts at, in (0, 1); None fixes `keep`. Raises ValueError unless 2 block <= keep < context.
    """

    def __init__(self, context: int, keep: int, block: int, values_only: bool = False, learned: float | None = None,
                 strength: float = 0.0):
        super().__init__()
        if not 2 * block <= keep < context:
            raise ValueError(f"keep {keep} must be at least twice the block {block} and below the context {context}")
        self.context, self.start_keep, self.block, self.values_only = context, keep, block, values_only
        self.target, self.strength = learned, strength
        self.share_logit = None if learned is None else nn.Parameter(torch.full((1,), math.log(learned / (1 - learned))))
        self.structure_parameters = ("share_logit",)

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> "KVPruning | None":
        """None if all tokens of the context have a slot: then the attention is the baseline's, cache and all."""
        context, keep = cfg.GPT2_BLOCK_SIZE, kv_keep(cfg)
        if keep >= context:
            return None
        share = None
        if cfg.KV_KEEP_LEARNED:
            share = float(cfg.KV_KEEP_RATIO) if cfg.KV_KEEP_RATIO < 1 else keep / context
        return cls(context, keep, kv_block(cfg), bool(cfg.KV_PRUNING_V), share, (cfg.KV_KEEP_PENALTY or 0.0) / cfg.GPT2_N_LAYER)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        """Parameters of one layer, in closed form."""
        return int(bool(cfg.KV_KEEP_LEARNED))

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int | Fraction:
        """Cache bytes one layer needs for one token, spread over the context; of a learned share, at its start."""
        context, keep, width = cfg.GPT2_BLOCK_SIZE, min(kv_keep(cfg), cfg.GPT2_BLOCK_SIZE), cfg.GPT2_N_EMBD // cfg.GPT2_N_HEAD
        stored = kvsplice_width(cfg)
        if keep == context:
            return cfg.GPT2_N_HEAD * (width + stored) * itemsize
        slot = stored * itemsize + position_type(context).itemsize + torch.float32.itemsize
        keys = context if cfg.KV_PRUNING_V else keep
        return Fraction(cfg.GPT2_N_HEAD * (keep * slot + keys * width * itemsize), context)

    def sizes(self) -> dict:
        """Resolved integers, for metrics.json."""
        return {"kv_keep": self.start_keep, "kv_block": self.block}

    def share(self) -> torch.Tensor:
        """The learned share of the context that is kept, shape ()."""
        return torch.sigmoid(self.share_logit[0])

    @torch.no_grad()
    def slots(self) -> Any:
        """k of the hard rule: an integer, or of a learned share a tensor of shape ()."""
        if self.share_logit is None:
            return self.start_keep
        return (self.share() * self.context).round().clamp(2 * self.block, self.context).long()

    def penalty(self) -> torch.Tensor | float:
        """KV_KEEP_PENALTY / layers times (share - its start)^2; 0 of a fixed one."""
        return 0.0 if self.share_logit is None else self.strength * (self.share() - self.target) ** 2

    def stats(self) -> dict:
        """`kv_keep_ratio`, of a learned share."""
        return {} if self.share_logit is None else {"kv_keep_ratio": self.share()}

    def new_cache(self, batch_size: int, n_head: int, capacity: int, key_dim: int, dtype: torch.dtype, device: torch.device,
                  value_dim: int | None = None,
                  codec: Any = None) -> PrunedCache:
        """An empty cache; a learned share is read once, here, and waits for the device."""
        learned = self.share_logit is not None and not self.share_logit.is_meta
        keep = int(self.slots()) if learned else self.start_keep
        return PrunedCache(batch_size, n_head, capacity, key_dim, dtype, device, value_dim, codec, keep=keep,
                           values_only=self.values_only)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PrunedCache | None = None, *, scale: float,
                dropout: float = 0.0, codec: Any = None) -> torch.Tensor:
        """Attended values [B, H, T, D] of q, k [B, H, T, key_dim] and v [B, H, T, D]; with a cache, of the T tokens after
        what it holds. ValueError beyond the cache's capacity."""
        if cache is not None:
            return self._decode(q, k, v, cache, scale, dropout)
        return self._attend_all(q, k, v if codec is None else codec(v), scale, dropout)

    def _attend_all(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float) -> torch.Tensor:
        """The pass over whole sequences, from their first token on."""
        T, b = q.size(2), self.block
        # The first border at which a token may be dropped: of a learned share, the first that has candidates.
        first = 2 * b if self.share_logit is not None else ((self.start_keep - b) // b + 1) * b
        first, v = min(first, T), v.to(q.dtype)
        y = F.scaled_dot_product_attention(q[:, :, :first], k[:, :, :first], v[:, :, :first], dropout_p=dropout,
                                           is_causal=True, scale=scale)
        if first == T:
            return y
        soft = self.training and self.share_logit is not None
        slots = self.share() * self.context if soft else self.slots()
        limit = (torch.full((), slots, device=q.device) if isinstance(slots, int) else slots) - 2 * b
        seed = torch.randint(2 ** 31 - 1, ()) if dropout else torch.zeros((), dtype=torch.int64)
        later, *_ = pruned_attention(q, k, v, limit.to(wide(q.dtype)), seed, first, b, scale, dropout, self.values_only, soft)
        return torch.cat([y, later], 2)

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PrunedCache, scale: float,
                dropout: float) -> torch.Tensor:
        """The tokens after what the cache holds, in pieces that end at borders at which tokens are dropped."""
        T, b, at, outputs = q.size(2), self.block, 0, []
        cache.expect(T)
        while at < T:
            if cache.length % b == 0 and cache.filled + b > cache.keep:
                self._make_room(cache)
            rest = b - cache.length % b  # to the next border; beyond it blocks fit until a drop is due
            now = slice(at, min(T, at + rest + (cache.keep - cache.filled - rest) // b * b))
            keys, values = cache.append(k[:, :, now], v[:, :, now])
            p = softmax_weights(q[:, :, now], keys, scale)
            if self.values_only:
                where = cache.position[:, :, None, :cache.filled].long().expand(-1, -1, p.size(2), -1)
                p = p.gather(3, where)
            cache.importance[:, :, :cache.filled] += relative(p.detach(), cache.length - p.size(2))
            outputs.append(F.dropout(p, dropout).to(q.dtype) @ values.to(q.dtype))
            at = now.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def _make_room(self, cache: PrunedCache) -> None:
        """Drop what the border at the cache's length drops; slots stay in the order of positions."""
        candidates = cache.filled - self.block
        rank = ranks(cache.importance[:, :, :candidates], cache.position[:, :, :candidates], cache.length)
        count = cache.keep - 2 * self.block
        kept = (rank >= count).to(torch.int8).argsort(dim=2, stable=True)[:, :, :count]
        recent = torch.arange(candidates, cache.filled, device=kept.device).expand(*kept.shape[:2], -1)
        cache.retain(torch.cat([kept, recent], 2))
