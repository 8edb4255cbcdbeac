"""The MLP of a block that is coupled with attention: its hidden features meet latent keys and other tokens, and are handed on.

    h = gelu(W_up x)                                        [B, T, d_ff]
    exchange:     h_t += alpha_e W_e c_k(t)                 c_k: latent keys of the same block and token, [B, T, L]
    cross-token:  h_t += alpha_c W_b sum_j a_tj W_a h_j     a: attention weights of the same block, j <= t
    y = W_down h

a_t is the mean over heads, its TOP_WEIGHTS largest entries (and those equal to the smallest of these) renormalised to sum 1.
The features are mixed in a space of the latent's width, z = W_a h [B, T, L], so a cache holds L numbers a token for it, not
d_ff. h, as W_down sees it, is what the next block's attention may use. alpha_e starts at 0.2, alpha_c at 0.3; both go through
the coupling scale, and at 0 this is GPT-2's MLP.

Source: reciprocal-architecture-2025-11-09 (there the mixing projection was d_ff x d_ff, larger than the whole block at GPT-2's
size, and the weights were detached; here gradient reaches the attention that chose them). What is not true of it: it is no
"bidirectional" flow, h_t sees tokens up to t only, as attention does. The exchange adds to y a linear map of rank L of the
attention's input, so alpha_e W_e and alpha_c W_b matter as products only. Choosing the largest weights is a step function:
where two are equal up to rounding, two orders of summation may choose differently.
"""

from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.attention.latent_band import EXCHANGE_START, LatentCache, latent_width
from gpt2.coupling import Coupling
from gpt2.layers import INIT_STD, Linear, residual_std
from gpt2.mlp.baseline import MLP
from gpt2.rules import hidden_width

if TYPE_CHECKING:
    from lib.config import Config

CROSS_START, TOP_WEIGHTS = 0.3, 8


class LatentBandMLP(MLP):
    """[B, T, n_embd] -> [B, T, n_embd]; `latent` is the width of the latent keys, and of the features that are mixed."""

    def __init__(self, n_embd: int, d_ff: int, latent: int, dropout: float = 0.0, bias: bool = True,
                 proj_std: float = INIT_STD, cross_token: bool = False, exchange: bool = False):
        super().__init__(n_embd, d_ff, dropout, bias, proj_std)
        self.latent = latent
        self.coupling = Coupling()
        self.mix_down = Linear(d_ff, latent, bias=False) if cross_token else None
        self.mix_up = Linear(latent, d_ff, bias=False) if cross_token else None
        self.cross_alpha = nn.Parameter(torch.full((1,), CROSS_START)) if cross_token else None
        self.from_latent = Linear(latent, d_ff, bias=False) if exchange else None
        self.exchange_alpha = nn.Parameter(torch.full((1,), EXCHANGE_START)) if exchange else None
        self.gate_parameters = ("cross_alpha", "exchange_alpha")

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, hidden_width(cfg), latent_width(cfg), cfg.GPT2_DROPOUT, cfg.GPT2_BIAS,
                   residual_std(cfg.GPT2_N_LAYER), bool(cfg.BAND_CROSS_TOKEN), bool(cfg.BAND_EXCHANGE))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        matrix = hidden_width(cfg) * latent_width(cfg)
        return (2 * matrix + 1 if cfg.BAND_CROSS_TOKEN else 0) + (matrix + 1 if cfg.BAND_EXCHANGE else 0)

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int:
        return latent_width(cfg) * itemsize if cfg.BAND_CROSS_TOKEN else 0

    def add_cache(self, cache: LatentCache) -> LatentCache:
        """The attention's cache with room for what this MLP needs of earlier tokens."""
        cache.features = None if self.mix_down is None else torch.empty_like(cache.latent_keys)
        return cache

    def forward(self, x: torch.Tensor, attended: torch.Tensor | None = None) -> None:
        raise RuntimeError("a coupled MLP needs its block's latents and weights: call `couple`")

    def couple(self, x: torch.Tensor, latent_keys: torch.Tensor, weights: torch.Tensor | None = None,
               cache: LatentCache | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the MLP adds, [B, T, n_embd], and its hidden features, [B, T, d_ff]. `latent_keys` [B, T, L] and `weights`
        [B, T, past + T] are those `LatentBandAttention.couple` returned for the same positions."""
        h = F.gelu(self.c_fc(x), approximate="tanh")
        if self.from_latent is not None:
            h = (h + self.coupling.share(self.exchange_alpha) * self.from_latent(latent_keys)).to(h.dtype)
        if self.mix_down is not None:
            features = self.mix_down(h)
            if cache is not None:
                features = cache.append_features(features)
            mixed = self.mix_up(strongest(weights) @ features)
            h = (h + self.coupling.share(self.cross_alpha) * mixed).to(h.dtype)
        return self.dropout(self.c_proj(h)), h

    def stats(self) -> dict:
        """Shares for the log, those there are: `mlp_cross_alpha` and `mlp_recip_alpha`, [1] each."""
        found = {"mlp_cross_alpha": self.cross_alpha, "mlp_recip_alpha": self.exchange_alpha}
        return {name: alpha for name, alpha in found.items() if alpha is not None}


def strongest(weights: torch.Tensor, count: int = TOP_WEIGHTS) -> torch.Tensor:
    """Rows of `weights` [..., n] with all but their `count` largest entries set to 0, and summing to 1.

    Entries equal to the smallest that is kept are kept too, so the choice does not depend on an order of equals.
    """
    least = weights.topk(min(count, weights.size(-1)), -1).values[..., -1:]
    kept = weights.masked_fill(weights < least, 0.0)
    return kept / kept.sum(-1, keepdim=True)
