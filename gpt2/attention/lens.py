"""Lens attention: a learned mix of the scores, their transpose and a bias of each column, under one softmax.

    S_ij = <q_i, k_j> / sqrt(D),   S^T_ij = <q_j, k_i> / sqrt(D),   d_j = <k_j, u_h> / sqrt(D)
    logits_ij = w_std S_ij + w_rec S^T_ij + w_col d_j          j <= i
    (w_std, w_rec, w_col) = softmax(g_h), one g per head, start (2.2, 0.6, 0.1); over the terms that there are

All terms are one inner product of concatenated channels, so there is one SDPA call and no score tensor of our own:

    query'_i = [w_std q_i + w_col u | w_rec k_i],   key'_j = [k_j | q_j]

The column bias needs no channel: it is a bias of the query. Without a latent the concatenation happens on the weight side,
as rows of the fused projection that are used twice, and everything else is the baseline's. With a latent,

    c = W_c x  [B, T, r],   [k | v] = W_u c,   q = W_q x

and W_u starts at 1/sqrt(r), so that W_u W_c has the size of the rows of GPT-2 that it stands for.

Invariants: S^T is causal, because row i reads the queries of tokens up to i and nothing later; those queries are therefore
cached beside the keys, 3/2 of GPT-2's bytes (with a latent: r + n_embd numbers a token instead of 2 n_embd).

What is not true of it: the transpose is neither free nor "bidirectional". It doubles the channels of a score, needs the
cache above, and only weighs the symmetric part of each head's bilinear form x_i^T W_q^T W_k x_j by w_std + w_rec and its
antisymmetric part by w_std - w_rec. The column bias is no mechanism: with biases in the projection it is a bias of the
query, exactly, beside S^T too, since what it adds there is constant along a row and a softmax does not see that. (For the
same reason nothing is subtracted from d_j here.) `collapse` takes it out. Keys and values from a latent do not make the
cache as small as the latent, because S^T needs the queries.

Source: the legacy lens ablation.
"""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.kv_cache import LayerCache, nbytes
from gpt2.layers import INIT_STD, Linear, residual_std
from gpt2.rules import resolve_size

if TYPE_CHECKING:
    from lib.config import Config

START = {"std": 2.2, "rec": 0.6, "col": 0.1}  # logits of the gates


class ColumnVector(nn.Module):
    """u: `weight` [n_head, head_dim], drawn from its own stream. Not zero, or its gate would start without gradient."""

    init_std = INIT_STD

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_head, head_dim))


class LatentLensCache(LayerCache):
    """Of lens attention with a latent: latents in the keys' place, queries (or nothing) in the values'."""

    def parts(self) -> dict[str, int]:
        return {"latents": nbytes(self.keys), "queries": nbytes(self.values)}


class LensAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; `latent` is the width r of the latent, None for full keys and values.

    Raises ValueError without a second term, for then the gates would have nothing to weigh.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD,
                 transpose: bool = True, column_bias: bool = True, latent: int | None = None):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        if not (transpose or column_bias):
            raise ValueError("lens attention without transpose and column bias has nothing to weigh")
        self.transpose, self.latent = transpose, latent
        self.terms = ("std", *["rec"] * transpose, *["col"] * column_bias)
        self.lens_logits = nn.Parameter(torch.tensor([START[term] for term in self.terms]).repeat(n_head, 1))
        self.gate_parameters = ("lens_logits",)
        self.column = ColumnVector(n_head, self.head_dim) if column_bias else None
        if transpose:
            self.key_dim = 2 * self.head_dim
        if latent is not None:
            self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias, rows=list(range(n_embd)))  # the queries' rows are left
            self.c_latent = Linear(n_embd, latent, bias=False)  # a bias here would be one of c_up
            self.c_up = Linear(latent, 2 * n_embd, bias=bias, init_std=latent ** -0.5)

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, cfg.GPT2_DROPOUT, cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER),
                   cfg.LENS_TRANSPOSE, cfg.LENS_COLUMN_BIAS, latent_width(cfg))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        width, latent = cfg.GPT2_N_EMBD, latent_width(cfg)
        gates = cfg.GPT2_N_HEAD * (1 + cfg.LENS_TRANSPOSE + cfg.LENS_COLUMN_BIAS)
        kv = 0 if latent is None else 3 * width * latent - 2 * width * width
        return gates + cfg.LENS_COLUMN_BIAS * width + kv

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int:
        latent = latent_width(cfg)
        return ((2 * cfg.GPT2_N_EMBD if latent is None else latent) + cfg.LENS_TRANSPOSE * cfg.GPT2_N_EMBD) * itemsize

    def dead_elements(self) -> dict:
        """A key bias is dead as long as keys only meet queries; transposed, it is a query's and weighs columns."""
        if self.transpose:
            return {}
        if self.latent is None:
            return super().dead_elements()
        return {} if self.c_up.bias is None else {"c_up.bias": slice(0, self.n_embd)}

    def sizes(self) -> dict:
        return super().sizes() | ({} if self.latent is None else {"latent": self.latent})

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        if self.latent is None:
            return super().new_cache(batch_size, capacity, dtype, device)
        queries = self.n_embd if self.transpose else 0
        return LatentLensCache(batch_size, 1, capacity, self.latent, dtype, device, value_dim=queries)

    def weights(self) -> dict:
        """{"std": w_std, ...} for the terms that there are, each [n_head]."""
        return dict(zip(self.terms, self.lens_logits.softmax(-1).unbind(-1), strict=True))

    def column_shift(self, w: dict) -> torch.Tensor:
        """What the column bias adds to the weighted query of each head, [n_head, head_dim]."""
        return w["col"][:, None] * self.column.weight

    def projection_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of query', key' and value, head by head; of a module without a latent."""
        w, weight, bias = self.weights(), self.c_attn.weight, self.c_attn.bias
        if self.column is not None:
            bias = weight.new_zeros(3 * self.n_embd) if bias is None else bias  # type: ignore[assignment]  # in its place
        shift = 0 if self.column is None else self.column_shift(w)[:, :, None]
        return self._rows(weight, w), None if bias is None else self._rows(bias[:, None], w, shift)[:, 0]

    def _rows(self, rows: torch.Tensor, w: dict[str, torch.Tensor], shift: torch.Tensor | int = 0) -> torch.Tensor:
        """Rows [3 n_embd, n] of q, k and v as rows [2 n_head key_dim + n_embd, n] of query', key' and value."""
        q, k, v = rows.view(3, self.n_head, self.head_dim, -1)
        query, key = w["std"][:, None, None] * q + shift, k
        if self.transpose:
            query, key = torch.cat([query, w["rec"][:, None, None] * k], 1), torch.cat([k, q], 1)
        return torch.cat([part.flatten(0, 1) for part in (query, key, v)])

    def forward(self, x: torch.Tensor, cache: LayerCache | None = None, context: Any = None) -> torch.Tensor:
        if self.latent is None:
            return super().forward(x, cache, context)
        B, T, E = x.shape
        q, c = self.c_attn(x), self.c_latent(x)
        queries, latents = q, c  # of all positions so far
        if cache is not None:
            stored = q if self.transpose else q[..., :0]
            latents, queries = (t[:, 0].to(c.dtype) for t in cache.append(c[:, None], stored[:, None]))
        keys, values = (self._heads(t) for t in self.c_up(latents).split(E, dim=2))
        past, w = keys.size(2) - T, self.weights()
        query = self._heads(q) * w["std"][:, None, None]
        if self.column is not None:
            query = query + self.column_shift(w)[:, None]
        if self.transpose:
            query = torch.cat([query, keys[:, :, past:] * w["rec"][:, None, None]], -1)
            keys = torch.cat([keys, self._heads(queries)], -1)
        attended = self.attend(query.to(keys.dtype), keys, values)
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).reshape(B, T, E)))

    def _heads(self, t: torch.Tensor) -> torch.Tensor:
        return t.view(*t.shape[:2], self.n_head, self.head_dim).transpose(1, 2)

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention:
        """The attention without the column bias that computes the same; itself without biases to take it.

        Transposed, with q' = s (q + (w_col / w_std) u) and s = w_std + w_rec: the shift adds w_col <u, k_j> to S and
        something constant along a row to S^T, and the weights (w_std, w_rec) / s are those of a softmax again. Without
        transpose and latent it is the baseline's attention. Without transpose but with a latent no class is there for it.
        """
        has_bias = self.c_attn.bias is not None
        if not has_bias or self.column is None or not (self.transpose or self.latent is None):
            return self
        w = self.weights()
        if self.transpose:
            simple: Any = LensAttention(self.n_embd, self.n_head, self.dropout, column_bias=False, latent=self.latent)
            scale = w["std"] + w["rec"]
            shift = w["col"] / w["std"]
        else:
            simple = CausalSelfAttention(self.n_embd, self.n_head, self.dropout)
            scale, shift = w["std"], w["col"] / w["std"]
        simple = simple.to(self.c_attn.weight)
        mine = self.state_dict()
        simple.load_state_dict({name: mine[name] for name in simple.state_dict() if name != "lens_logits"}, strict=False)
        if self.transpose:
            simple.lens_logits.copy_(torch.log_softmax(self.lens_logits, -1)[:, :2])
        E = self.n_embd
        per_row = scale.repeat_interleave(self.head_dim)
        simple.c_attn.weight[:E] *= per_row[:, None]
        simple.c_attn.bias[:E] += (shift[:, None] * self.column.weight).flatten()
        simple.c_attn.bias[:E] *= per_row
        return simple.train(self.training)

    def stats(self) -> dict:
        """Tensors for the log, by metric name: lens_w_std, lens_w_rec, lens_w_col."""
        return {f"lens_w_{term}": w for term, w in self.weights().items()}


def latent_width(cfg: "Config") -> int | None:
    """Width of the latent of keys and values; None where they are projected from the input."""
    return resolve_size(cfg.LENS_LATENT, cfg.GPT2_N_EMBD) if cfg.LENS_LATENT_KV else None
