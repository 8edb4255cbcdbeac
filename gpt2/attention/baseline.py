"""Causal self-attention of GPT-2: one fused projection, one SDPA call, one output projection.

    [q | k | v] = x W^T + b        q, k, v: [B, H, T, D]
    y = softmax(q k^T / sqrt(D) + causal mask) v
    out = dropout(y W_o^T + b_o)

Two parts may be put into it (gpt2/block.py does, from the configuration): `pruning`, which drops keys and values from the past
(gpt2/attention/pruning.py), and `splice`, which compresses values (gpt2/kvsplice.py).

Mechanisms that only change weights override `projection_weights` or `output_weights`, those that attend otherwise `attend`,
and those that only change what happens to the attended values `combine`. Causality and cached decoding are then inherited.
"""

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.kv_cache import LayerCache
from gpt2.layers import INIT_STD, Linear, linear, residual_std

if TYPE_CHECKING:
    from lib.config import Config


class CausalSelfAttention(nn.Module):
    """[B, T, n_embd] -> [B, T, n_embd]. Source: Radford et al. 2019.

    `proj_std` is the start's standard deviation of the output projection.
    """

    gate_parameters: tuple[str, ...] = ()
    on = True  # False: the layer has no attention (any more), and the block passes its residual

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} must be divisible by n_head {n_head}")
        self.n_embd, self.n_head, self.head_dim = n_embd, n_head, n_embd // n_head
        self.key_dim = self.head_dim  # channels of a query and a key; a value always has head_dim
        self.dropout = dropout
        self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = Linear(n_embd, n_embd, bias=bias, init_std=proj_std)
        self.resid_dropout = nn.Dropout(dropout)
        self.pruning = self.splice = None

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, cfg.GPT2_DROPOUT, cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        """Parameters of one layer beyond GPT-2's, in closed form; the law of parameter counts compares with it."""
        return 0

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int | Fraction:
        """Cache bytes one layer needs for one token, in closed form."""
        return 2 * cfg.GPT2_N_EMBD * itemsize

    def dead_elements(self) -> dict:
        """Elements that cannot receive gradient: a key bias adds the same number to all scores of a row."""
        return {} if self.c_attn.bias is None else {"c_attn.bias": slice(self.n_embd, 2 * self.n_embd)}

    def sizes(self) -> dict:
        """Resolved integers, for metrics.json."""
        return {"head_dim": self.head_dim}

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Any:
        sizes = (batch_size, self.n_head, capacity, self.key_dim, dtype, device)
        if self.pruning is not None:
            return self.pruning.new_cache(*sizes, value_dim=self.head_dim, codec=self.splice)
        return LayerCache(*sizes, value_dim=self.head_dim, codec=self.splice)

    def projection_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [2 n_head key_dim + n_embd, n_embd] of the fused projection, and its bias (or None)."""
        return self.c_attn.weight, self.c_attn.bias

    def output_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [n_embd, n_embd] and bias (or None) of the output projection."""
        return self.c_proj.weight, self.c_proj.bias

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries and keys [B, H, T, key_dim] and values [B, H, T, D] of x [B, T, n_embd]."""
        parts = linear(x, *self.projection_weights()).split([self.n_head * self.key_dim] * 2 + [self.n_embd], dim=2)
        return tuple(t.view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for t in parts)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Of the last T of S tokens: q [B, H, T, key_dim], keys [B, H, S, key_dim], values [B, H, S, D] -> [B, H, T, D]."""
        T, past = q.size(2), keys.size(2) - q.size(2)
        # With a prefix, is_causal would align the mask to the first key; the new rows belong at the end.
        mask = causal_mask(T, past, q.device) if past and T > 1 else None
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and past == 0, scale=self.head_dim ** -0.5)

    def combine(self, attended: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What leaves the heads: attended and the values of the same positions, both [B, H, T, D]; x is the layer's input."""
        return attended

    def collapse(self) -> "CausalSelfAttention":
        """The simplest attention that computes the same; itself where none is known."""
        return self

    def bake(self) -> "CausalSelfAttention":
        """This attention with what acts on its weights folded into them, for inference."""
        return self

    def divide_gates(self) -> None:
        """The other way: make its weights such that with what acts on them they are what they were without."""

    def forward(self, x: torch.Tensor, cache: Any = None, context: Any = None) -> torch.Tensor:
        B, T, E = x.shape
        q, k, v = self.project(x)
        if self.pruning is not None:
            y = self.pruning(q, k, v, cache, scale=self.head_dim ** -0.5, dropout=self.dropout if self.training else 0.0,
                             codec=self.splice)
        elif cache is not None:
            y = self.attend(q, *cache.append(k, v))
        else:
            y = self.attend(q, k, v if self.splice is None else self.splice(v))
        y = self.combine(y, v, x).transpose(1, 2).reshape(B, T, E)
        return self.resid_dropout(linear(y, *self.output_weights()))


def causal_mask(rows: int, past: int, device: torch.device) -> torch.Tensor:
    """Boolean [rows, past + rows]: row i sees the keys up to position past + i."""
    return torch.ones(rows, past + rows, dtype=torch.bool, device=device).tril(past)
