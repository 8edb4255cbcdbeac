"""GELU MLP with a context: a low-rank projection of what the attention of the same block put out is mixed into h.

    h = gelu(W_fc x + b_fc)                                [B, T, d_ff]
    h' = (1 - s) h + s W_up W_down attended                W_down: [r, n_embd], W_up: [d_ff, r], no biases
    y = W_proj h' + b_proj

s = a, learned in (0, 1) from 0.1 on (a = sigmoid(l)); a block that weighs its paths may pass `share`, and then s = a share.
Gradient flows into `attended`. Invariant: position t reads `attended` at t only, so causality is the attention's. A layer
whose attention is off has no context: h' = h.

What is not true of it: the MLP does not get to compute with what the attention found, beyond what ln_2 of the residual
stream already gives it. The context enters after the GELU, so all it adds is a linear map of `attended` of rank r,
s W_proj W_up W_down, to the residual stream, and 1 - s is a factor of W_proj.

Source: the legacy lens ablation (where the context was cut off from the gradient).
"""

import math
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.layers import INIT_STD, Linear, residual_std
from gpt2.mlp.baseline import MLP
from gpt2.rules import hidden_width, resolve_size

if TYPE_CHECKING:
    from lib.config import Config

SHARE_START = 0.1


class ContextMLP(MLP):
    """[B, T, n_embd] twice -> [B, T, n_embd]; `rank` is r."""

    def __init__(self, n_embd: int, d_ff: int, rank: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD):
        super().__init__(n_embd, d_ff, dropout, bias, proj_std)
        self.rank = rank
        self.context_down = Linear(n_embd, rank, bias=False)
        self.context_up = Linear(rank, d_ff, bias=False)
        self.context_logit = nn.Parameter(torch.full((1,), math.log(SHARE_START / (1 - SHARE_START))))
        self.gate_parameters = ("context_logit",)

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, hidden_width(cfg), resolve_size(cfg.CONTEXT_RANK, cfg.GPT2_N_EMBD), cfg.GPT2_DROPOUT,
                   cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        return resolve_size(cfg.CONTEXT_RANK, cfg.GPT2_N_EMBD) * (cfg.GPT2_N_EMBD + hidden_width(cfg)) + 1

    def sizes(self) -> dict:
        return super().sizes() | {"context_rank": self.rank}

    @property
    def context_alpha(self) -> torch.Tensor:
        """a, shape [1]."""
        return torch.sigmoid(self.context_logit)

    def forward(self, x: torch.Tensor, attended: torch.Tensor | None = None, share: Any = None) -> torch.Tensor:
        """`attended`: what the attention of the same block put out, None if it is off; `share`: a factor of a, [1]."""
        h = F.gelu(self.c_fc(x), approximate="tanh")
        if attended is not None:
            s = self.context_alpha if share is None else self.context_alpha * share
            h = (h + s * (self.context_up(self.context_down(attended)) - h)).to(h.dtype)
        return self.dropout(self.c_proj(h))

    @torch.no_grad()
    def absorb(self, scale: Any, share: Any) -> None:
        """Change the weights so that f(x, scale attended) is what f(x, attended, share) was; both are tensors [1]."""
        self.context_down.weight /= scale
        a = self.context_alpha * share
        self.context_logit.copy_(a.log() - torch.log1p(-a))

    def stats(self) -> dict:
        """Tensors for the log, by metric name."""
        return {"context_alpha": self.context_alpha}
