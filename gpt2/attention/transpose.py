"""Explicitly transposed attention (G1): the scores plus their transpose, causally masked, under one softmax.

    score_ij = (w_std <q_i, k_j> + w_rec <q_j, k_i>) / sqrt(D)        j <= i;  w_std, w_rec >= 0, learned per head

Both terms are one inner product of concatenated channels, so there is one SDPA call and no score tensor of our own:

    query'_i = [w_std q_i | w_rec k_i],   key'_j = [k_j | q_j]        2 D channels a head, scale 1 / sqrt(D)

The concatenation happens on the weight side, as rows of the fused projection [3 n_embd, n_embd] that are used twice. The
weights stand on the query's side alone: the product is that of roots on both sides, and a root has no gradient at 0. The
module trains g with w = g^2, start w = (0.9, 0.1).

Invariants: causal, because row i reads the queries and keys of tokens up to i and nothing later. Those queries are cached
beside the keys, without the weights: 3/2 of GPT-2's bytes. At w = (1, 0), and at coupling 0, it is GPT-2's attention.

What is not true of it: the transpose is neither free nor "bidirectional". It doubles the channels of a score (two fifths of
the projection's rows are computed a second time), needs the cache above, and PyTorch's flash kernel, which wants values as
wide as queries, does not take it. Nothing flows from later tokens; row i only weighs the symmetric part of each head's form
x_i^T W_q^T W_k x_j by w_std + w_rec and its antisymmetric part by w_std - w_rec. Of the two weights only the ratio is
function: their sum is a scale of W_q, so the class is that of the lens with a transpose and no column bias (`collapse` gives
that module). It is not unified RA, whose reciprocal channels have rows of their own.

Source: reciprocal-architecture-kvsplice-2025-11-11, the first generation (there two score matrices were formed and mixed).
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.lens import LensAttention
from gpt2.coupling import Coupling
from gpt2.layers import INIT_STD

if TYPE_CHECKING:
    from lib.config import Config

W_STD_START, W_REC_START = 0.9, 0.1
TINY = 1e-30  # the logarithm of a weight that is 0


class TransposeAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]."""

    gate_parameters = ("gate_std", "gate_rec")

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.key_dim = 2 * self.head_dim
        self.gate_std = nn.Parameter(torch.full((n_head,), W_STD_START ** 0.5))
        self.gate_rec = nn.Parameter(torch.full((n_head,), W_REC_START ** 0.5))
        self.coupling = Coupling()

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        return 2 * cfg.GPT2_N_HEAD

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int:
        return 3 * cfg.GPT2_N_EMBD * itemsize

    def dead_elements(self) -> dict:
        """None: a key bias is constant along a row of S, but in S^T it is the query's and weighs columns."""
        return {}

    @property
    def w_std(self) -> torch.Tensor:
        """Weight of S, [n_head]."""
        return self.gate_std.square()

    @property
    def w_rec(self) -> torch.Tensor:
        """Weight of S^T, [n_head]."""
        return self.gate_rec.square()

    def effective_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(w_std, w_rec), each [n_head], as far as the coupling lets them act."""
        return self.coupling.weight(self.w_std), self.coupling.share(self.w_rec)

    def projection_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.c_attn.weight, self.c_attn.bias
        return self._rows(weight), None if bias is None else self._rows(bias[:, None])[:, 0]

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [3 n_embd, n] of q, k and v as rows [2 n_head key_dim + n_embd, n] of query', key' and v."""
        w_std, w_rec = (w[:, None, None] for w in self.effective_weights())
        q, k, v = rows.view(3, self.n_head, self.head_dim, -1)
        return torch.cat([part.flatten(0, 1) for part in (torch.cat([w_std * q, w_rec * k], 1), torch.cat([k, q], 1), v)])

    @torch.no_grad()
    def collapse(self) -> LensAttention:
        """The lens with the same transpose and without a column bias: q' = (w_std + w_rec) q, and weights that sum to 1."""
        simple = LensAttention(self.n_embd, self.n_head, self.dropout, self.c_attn.bias is not None, column_bias=False)
        simple = simple.to(self.c_attn.weight)
        simple.c_attn.load_state_dict(self.c_attn.state_dict())
        simple.c_proj.load_state_dict(self.c_proj.state_dict())
        w = torch.stack(self.effective_weights(), -1)
        simple.lens_logits.copy_(w.clamp_min(TINY).log())
        scale = w.sum(-1).repeat_interleave(self.head_dim)
        simple.c_attn.weight[:self.n_embd] *= scale[:, None]
        if self.c_attn.bias is not None:
            simple.c_attn.bias[:self.n_embd] *= scale
        return simple.train(self.training)

    def stats(self) -> dict:
        """Tensors for the log, by metric name."""
        return {"unified_ra_w_std": self.w_std, "unified_ra_w_rec": self.w_rec}
