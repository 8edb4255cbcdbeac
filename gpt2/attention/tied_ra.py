"""Tied reciprocal attention (V1T): unified RA whose reciprocal channels are copies of its standard ones, so that the score
holds a true transposed term. Of each head's D channels D_std = D - R are projected:

    score_ij = (w_std <q_i, k_j> + w_rec <q_j[:R], k_i[:R]>) / sqrt(D)        q, k: [T, D_std]

K_low and Q_low are the first R channels of K_std and Q_std, gathered on the weight side: the fused projection that is computed
is as large as the baseline's, one matmul and one SDPA call, while 2 R n_head rows of it are no parameters of their own.

What is not true of it: it is not unified RA with fewer weights in a richer class. Plain attention computes whatever it computes
(`collapse` gives that attention), and not the other way round: it is a restriction of plain attention. It has no setting at
which it is GPT-2, since it has fewer query and key channels; so no coupling warm-up applies. And what is transposed is seen
under the causal mask only: nothing flows from later tokens.

Its start is the baseline's in the rows that it keeps. Sources: reciprocal-architecture-2025-11-09 and unified-ra-hardening,
which speak of a transposed term, while their projections are free.
"""

from typing import TYPE_CHECKING, Any

import torch

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.attention.unified_ra import UnifiedRAttention
from gpt2.layers import Linear, init_weights

if TYPE_CHECKING:
    from lib.config import Config


class TiedRAttention(UnifiedRAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; R reciprocal channels a head, 1 <= R <= head_dim / 2."""

    def __init__(self, n_embd: int, n_head: int, R: int = 4, dropout: float = 0.0, use_self_restart: bool = False,
                 per_head_gates: bool = True, debug: bool = False, bias: bool = True, init_seed: int | None = 0,
                 **options: Any):
        super().__init__(n_embd, n_head, R, dropout, use_self_restart, per_head_gates, debug, bias, init_seed=None, **options)
        if self.D_std < R:
            raise ValueError(f"R {R} must not be more than the {self.D_std} standard channels that it is taken from")
        D, E = self.head_dim, n_embd
        kept = [block * E + row for block in range(2) for row in range(E) if row % D < self.D_std]
        self.c_attn = Linear(n_embd, 3 * E, bias=bias, rows=[*kept, *range(2 * E, 3 * E)])
        if init_seed is not None:
            init_weights(self, init_seed)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        rows = 2 * cfg.GPT2_N_HEAD * cfg.RA_R
        return UnifiedRAttention.extra_parameters(cfg) - rows * (cfg.GPT2_N_EMBD + cfg.GPT2_BIAS)

    def dead_elements(self) -> dict:
        """A key bias has no effect, but the first R of a head are part of the query too."""
        if self.c_attn.bias is None:
            return {}
        first = self.n_head * self.D_std
        return {"c_attn.bias": [first + row for row in range(first) if row % self.D_std >= self.R]}

    def set_R(self, R: int) -> None:
        """R decides the number of parameters: RuntimeError."""
        raise RuntimeError("R is fixed in tied attention; build a new module with the R you want")

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.c_attn.weight, self.c_attn.bias
        return self._gathered(weight), None if bias is None else self._gathered(bias)

    def _gathered(self, kept: Any) -> torch.Tensor:
        """[Qf; Kf; V] from the rows there are, [(2 n_head D_std + n_embd), ...]."""
        count = self.n_head * self.D_std
        q, k = (part.view(self.n_head, self.D_std, *kept.shape[1:]) for part in kept[:2 * count].split(count))
        folded = [torch.cat([one, other[:, :self.R]], 1).flatten(0, 1) for one, other in ((q, k), (k, q))]
        return torch.cat([*folded, kept[2 * count:]])

    def from_pretrained_qkv(self, *args: Any, **kwargs: Any) -> None:
        """Baseline weights have no tied form: RuntimeError."""
        raise RuntimeError("baseline projections do not fit tied attention; load them into UnifiedRAttention")

    def bake(self) -> CausalSelfAttention:
        """A tied row carries two gates and cannot hold them: returns the attention with rows of its own instead."""
        return self.collapse().bake()
