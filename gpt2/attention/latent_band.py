"""Attention over latent keys and values, with a reciprocal term inside a local band, and what it receives from an MLP.

    q = W_q x                            [B, H, T, D]
    c_k, c_v = W_c x                     [B, T, L] each, what the cache holds
    k = W_uk c_k,  v = W_uv c_v + b_v    [B, H, T, D]
    score_ij = (<q_i, k_j> + alpha_h [i - j <= W] <q_j, k_i>) / sqrt(D)        j <= i
    y = W_o softmax(score) v

The second term is the transposed score itself: the query of the *earlier* token j meets the key of the later token i. Row i
needs the queries of the W positions before it, so decoding keeps those of the last W positions beside the latents. Without a
band (`window` None) it is plain latent attention, one SDPA call.

Received from the MLP of the layer before, its hidden features h_t [B, T, d_ff] of the same token:

    heads:   the output of head h at token t is multiplied by 1 + alpha_g (2 sigmoid(W_g h_t) - 1)
    latent:  c_k(t) = W_ck x_t + alpha_r W_r h_t

Both are neutral at alpha 0 and absent in the first layer, which has nothing before it. alpha_h (start 0.5, per head), alpha_g
(0.1) and alpha_r (0.2) are learned and go through the coupling scale: at scale 0 all of this is latent attention.

Invariants: row i uses queries, keys and features of positions up to i only; nothing outlives a forward pass but the cache.
There is no key bias: without a band a softmax does not see it, and in a band it would be a bias of the column, not a
reciprocal term.

Source: reciprocal-architecture-2025-11-09. What is not true of it: "reciprocal" is no second direction of information, row i
still reads from tokens before it only and merely weighs them by another product of the two tokens. Latent attention alone is
inside GPT-2's function class (W_k and W_v of rank L, see `collapse`), so it can compress but not add; the band is not in it.
The cache is smaller, the work is not: decoding expands all latents at every step, and the band's scores are dense [T, T]
tensors, slower than the baseline's SDPA and larger in memory. Of alpha_r W_r only the product matters.
"""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention, causal_mask
from gpt2.coupling import Coupling
from gpt2.kv_cache import end_after, nbytes
from gpt2.layers import INIT_STD, Linear, residual_std
from gpt2.rules import hidden_width, resolve_size

if TYPE_CHECKING:
    from lib.config import Config

BAND_START, GATE_START, EXCHANGE_START = 0.5, 0.1, 0.2


class LatentCache:
    """Of one layer: latents c_k and c_v [batch, capacity, L]; with a band the queries of the last `window` positions
    [batch, heads, window, D]; with a cross-token MLP its features [batch, capacity, F] (gpt2/mlp/latent_band.py)."""

    def __init__(self, batch_size: int, capacity: int, latent: int, dtype: torch.dtype, device: torch.device):
        self.latent_keys = torch.empty(batch_size, capacity, latent, dtype=dtype, device=device)
        self.latent_values = torch.empty_like(self.latent_keys)
        self.queries: torch.Tensor | None = None
        self.features: torch.Tensor | None = None
        self.length = self.kept = 0

    def append(self, latent_keys: torch.Tensor, latent_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store n more positions, [batch, n, L] each; returns those of all positions so far, in the type given."""
        end = end_after(self.length, latent_keys.size(1), self.latent_keys.size(1))
        self.latent_keys[:, self.length:end] = latent_keys
        self.latent_values[:, self.length:end] = latent_values
        self.length = end
        return self.latent_keys[:, :end].to(latent_keys.dtype), self.latent_values[:, :end].to(latent_values.dtype)

    def slide(self, queries: torch.Tensor) -> torch.Tensor:
        """The kept queries followed by `queries` [batch, heads, n, D]; the last `window` of them are kept."""
        recent = torch.cat([self.queries[:, :, :self.kept].to(queries.dtype), queries], 2)
        self.kept = min(self.queries.size(2), recent.size(2))
        self.queries[:, :, :self.kept] = recent[:, :, -self.kept:]
        return recent

    def append_features(self, features: torch.Tensor) -> torch.Tensor:
        """Store the features [batch, n, F] of the positions appended last; returns those of all positions so far."""
        self.features[:, self.length - features.size(1):self.length] = features
        return self.features[:, :self.length].to(features.dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in (self.latent_keys, self.latent_values, self.queries, self.features) if t is not None)

    def parts(self) -> dict[str, int]:
        kept = {"queries": self.queries, "features": self.features}
        return {"latents": nbytes(self.latent_keys) + nbytes(self.latent_values),
                **{name: nbytes(t) for name, t in kept.items() if t is not None}}


class LatentBandAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; c_attn holds W_q alone, drawn as the baseline's query rows.

    `window`: the largest distance i - j of the reciprocal term, None for no band. `gated_from`, `latent_from`: hidden width
    of the MLP that gates the heads, or adds to the latent keys; 0: nothing received. `mixing`: `couple` returns the weights.
    """

    def __init__(self, n_embd: int, n_head: int, latent: int, window: int | None = None, dropout: float = 0.0,
                 bias: bool = True, proj_std: float = INIT_STD, gated_from: int = 0, latent_from: int = 0,
                 mixing: bool = False):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.latent, self.window, self.mixing = latent, window, mixing
        self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias, rows=list(range(n_embd)))
        self.c_latent = Linear(n_embd, 2 * latent, bias=False)
        self.k_up = Linear(latent, n_embd, bias=False)
        self.v_up = Linear(latent, n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.coupling = Coupling()
        self.band_alpha = nn.Parameter(torch.full((n_head,), BAND_START)) if window else None
        self.head_gate = Linear(gated_from, n_head, bias=False) if gated_from else None
        self.gate_alpha = nn.Parameter(torch.full((1,), GATE_START)) if gated_from else None
        self.from_mlp = Linear(latent_from, latent, bias=False) if latent_from else None
        self.exchange_alpha = nn.Parameter(torch.full((1,), EXCHANGE_START)) if latent_from else None
        self.gate_parameters = ("band_alpha", "gate_alpha", "exchange_alpha")

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        received = hidden_width(cfg) if layer else 0
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, latent_width(cfg), band_window(cfg), cfg.GPT2_DROPOUT, cfg.GPT2_BIAS,
                   residual_std(cfg.GPT2_N_LAYER), received if cfg.BAND_HEAD_GATES else 0,
                   received if cfg.BAND_EXCHANGE else 0, bool(cfg.BAND_CROSS_TOKEN))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        """Of every layer; what layers after the first have besides says `received_parameters`."""
        E, L = cfg.GPT2_N_EMBD, latent_width(cfg)
        return 4 * L * E - 2 * E * E - E * cfg.GPT2_BIAS + (cfg.GPT2_N_HEAD if cfg.BAND_RECIPROCAL else 0)

    @staticmethod
    def received_parameters(cfg: "Config") -> int:
        """Parameters by which a layer receives from the MLP of the layer before, in closed form."""
        hidden = hidden_width(cfg)
        return ((hidden * cfg.GPT2_N_HEAD + 1 if cfg.BAND_HEAD_GATES else 0)
                + (hidden * latent_width(cfg) + 1 if cfg.BAND_EXCHANGE else 0))

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int | Fraction:
        """Two latents a token, and the queries of one window, spread over the context."""
        window = min(band_window(cfg) or 0, cfg.GPT2_BLOCK_SIZE)
        return itemsize * (2 * latent_width(cfg) + Fraction(window * cfg.GPT2_N_EMBD, cfg.GPT2_BLOCK_SIZE))

    def dead_elements(self) -> dict:
        return {}  # there is no key bias

    def sizes(self) -> dict:
        return super().sizes() | {"latent": self.latent} | ({"band_window": self.window} if self.window else {})

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LatentCache:
        cache = LatentCache(batch_size, capacity, self.latent, dtype, device)
        if self.window:
            shape = (batch_size, self.n_head, min(self.window, capacity), self.head_dim)
            cache.queries = torch.empty(shape, dtype=dtype, device=device)
        return cache

    def forward(self, x: torch.Tensor, cache: LatentCache | None = None, context: Any = None) -> torch.Tensor:
        return self.couple(x, cache)[0]

    def couple(self, x: torch.Tensor, cache: LatentCache | None = None,
               hidden: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the layer adds, [B, T, n_embd]; its latent keys, [B, T, L]; with `mixing` the weights, averaged over heads
        and before dropout, [B, T, past + T], else None. `hidden`: features [B, T, d_ff] of the MLP before, if there is one.
        """
        q = self._heads(self.c_attn(x))
        latent_keys, latent_values = self.c_latent(x).split(self.latent, 2)
        if self.from_mlp is not None and hidden is not None:
            added = self.coupling.share(self.exchange_alpha) * self.from_mlp(hidden)
            latent_keys = (latent_keys + added).to(latent_keys.dtype)  # under autocast the share is wider than the latents
        all_keys, all_values = latent_keys, latent_values
        if cache is not None:
            all_keys, all_values = cache.append(latent_keys, latent_values)
        k, v = self._heads(self.k_up(all_keys)), self._heads(self.v_up(all_values))
        past = k.size(2) - x.size(1)
        if self.window or self.mixing:
            weights = self._weights(q, k, past, cache)
            y = self.attn_dropout(weights) @ v
        else:
            weights, y = None, self.attend(q, k, v)
        if self.head_gate is not None and hidden is not None:
            gate = 2 * torch.sigmoid(self.head_gate(hidden)) - 1  # [B, T, H]
            y = y * (1 + self.coupling.share(self.gate_alpha) * gate).transpose(1, 2)[..., None]
        out = self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))
        return out, latent_keys, weights.mean(1) if self.mixing else None

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.n_head, self.head_dim)).transpose(1, 2)

    def _weights(self, q: torch.Tensor, k: torch.Tensor, past: int, cache: LatentCache | None) -> torch.Tensor:
        """Softmax over the scores, [B, H, T, past + T]."""
        T, total = q.size(2), k.size(2)
        q = q / math.sqrt(self.head_dim)
        scores, seen = q @ k.mT, causal_mask(T, past, q.device)
        if self.window:
            recent = q if cache is None else cache.slide(q)
            transposed = F.pad(k[:, :, past:] @ recent.mT, (total - recent.size(2), 0))  # [i, j] holds <q_j, k_i>
            band = seen.triu(past - self.window)  # i - j <= window
            alpha = self.coupling.share(self.band_alpha)[:, None, None]
            scores = scores + (alpha * transposed).masked_fill(~band, 0.0)
        return scores.masked_fill(~seen, -math.inf).softmax(-1)

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention:
        """Latent attention alone is the baseline with W_k = W_uk W_ck and W_v = W_uv W_cv; itself with anything besides."""
        if self.window or self.mixing or self.head_gate is not None or self.from_mlp is not None:
            return self
        plain = CausalSelfAttention(self.n_embd, self.n_head, self.dropout, self.c_attn.bias is not None)
        plain.to(self.c_attn.weight)
        down_k, down_v = self.c_latent.weight.split(self.latent)
        plain.c_attn.weight.copy_(torch.cat([self.c_attn.weight, self.k_up.weight @ down_k, self.v_up.weight @ down_v]))
        if self.c_attn.bias is not None:
            b_q, b_v = self.c_attn.bias, self.v_up.bias
            plain.c_attn.bias.copy_(torch.cat([b_q, torch.zeros_like(b_q), b_v]))
        plain.c_proj.load_state_dict(self.c_proj.state_dict())
        return plain.train(self.training)

    def stats(self) -> dict:
        """Shares for the log, those the layer has: `ra_alpha` [n_head], `mlp_gate_alpha` and `mlp_recip_alpha` [1]."""
        found = {"ra_alpha": self.band_alpha, "mlp_gate_alpha": self.gate_alpha, "mlp_recip_alpha": self.exchange_alpha}
        return {name: alpha for name, alpha in found.items() if alpha is not None}


def latent_width(cfg: "Config") -> int:
    """L, of the latent keys and of the latent values each."""
    return resolve_size(cfg.BAND_LATENT, cfg.GPT2_N_EMBD)


def band_window(cfg: "Config") -> int | None:
    """The largest distance of the reciprocal term; None without one."""
    return resolve_size(cfg.BAND_WINDOW, cfg.GPT2_BLOCK_SIZE) if cfg.BAND_RECIPROCAL else None
