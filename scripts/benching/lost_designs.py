"""Reciprocal attention as it might be built otherwise: the designs that folding it into the projection was chosen over.

Each is UnifiedRAttention with the gates taken off the weights, so all have the same fused projection, parameters and start, and
what differs is only where the two terms meet and where the gates act:

    TwoProducts          scores = w_std q_std k_std^T + w_rec q_low k_low^T, kept in memory, then softmax
    Concatenation        [g_std q_std | g_rec q_low] and [g_std k_std | g_rec k_low] put together at run time, then SDPA
    GatesOnActivations   g multiplies q and k, then SDPA
    TwoCalls             w_std SDPA(q, k, v) + w_rec SDPA(k, q, v)
    Sinkhorn             softmax over keys and over queries in turn, ITERATIONS times, instead of one softmax (arXiv 2110.11773)

With g^2 = w the first three compute what the folded form computes, to rounding. TwoCalls is another function: the mean of two
attentions, one with queries and keys exchanged. Sinkhorn, the other way to have reciprocity, uses no gates; a column of its
weights runs over later queries, so no causal model could use it: it is here for what it costs. They are references for make
bench-attention; they attend over whole sequences only and know no dropout, cache, coupling, skip gate or self-restart. Gates
are cast to the type of what they multiply, as a good implementation would.
"""

from typing import Any

import torch

from gpt2.attention.unified_ra import UnifiedRAttention


class Ungated(UnifiedRAttention):
    """The projection without gates; `gates(like)` gives g_std and g_rec, [H or 1, 1, 1] each."""

    def projection_weights(self) -> Any:
        return self.rows()

    def gates(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gate.to(like.dtype)[:, None, None] for gate in (self.gate_std, self.gate_rec))

    def halves(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Standard and reciprocal channels of queries or keys."""
        return t.split([self.D_std, self.R], dim=-1)


class TwoProducts(Ungated):
    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        (q_std, q_low), (k_std, k_low) = self.halves(q), self.halves(keys)
        std, low = self.gates(q)
        scores = std.square() * (q_std @ k_std.transpose(-2, -1)) + low.square() * (q_low @ k_low.transpose(-2, -1))
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = (scores * self.head_dim ** -0.5).masked_fill(future, float("-inf")).softmax(-1)
        return weights.to(values.dtype) @ values


class Concatenation(Ungated):
    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        gates = self.gates(q)
        q, keys = (torch.cat([gate * part for gate, part in zip(gates, self.halves(t), strict=True)], -1) for t in (q, keys))
        return super().attend(q, keys, values)


class GatesOnActivations(Ungated):
    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scale = self.row_scale()[:self.n_embd].view(self.n_head, 1, self.head_dim).to(q.dtype)
        return super().attend(q * scale, keys * scale, values)


class TwoCalls(Ungated):
    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        std, low = self.gates(q)
        return std.square() * super().attend(q, keys, values) + low.square() * super().attend(keys, q, values)


class Sinkhorn(Ungated):
    ITERATIONS = 3  # few, as such methods go

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = (q @ keys.transpose(-2, -1)).float() * self.head_dim ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        for _ in range(self.ITERATIONS):
            scores = scores.log_softmax(-2).log_softmax(-1)
        return scores.exp().to(values.dtype) @ values


DESIGNS = {"two products": TwoProducts, "concatenation": Concatenation, "gates on q, k": GatesOnActivations,
           "two SDPA calls": TwoCalls, "Sinkhorn": Sinkhorn}
