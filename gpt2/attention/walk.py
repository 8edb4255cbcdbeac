"""Full random walk with restart (W1-W3): softmax attention in a local band, plus a walk on a graph of similar tokens.

Per head, with q, k, v [T, D], u_i = k_i / |k_i| and the cosines c_ij = <u_i, u_j>:

    local      a_ij = softmax_j(<q_i, k_j> / sqrt(D))                    0 <= i - j < window
    neighbours N_S(i): the n tokens of a set S that are most similar to i; all of S where it has no more
    entry      e_ij = softmax over j in N_S(i) of sqrt(D) c_ij           0 for other j
    walk       p_0 = e_i,  p_(m+1) = (1 - r) p_m P + r p_0               M steps, restart probability r
    output     out_i = (a_i V + gamma p_M V) / (1 + gamma)

so the weights of a row sum to 1. sqrt(D) makes the cosines of random keys differ by about 1, whatever the head's width. The
choice of neighbours is piecewise constant; the weights of the chosen ones carry gradient into the keys.

*Directed (W1).* S holds the tokens before i, and P = e: each step of the walk goes back in time. The first token has nothing
before it and stays where it is. P is triangular, so its rows never change when tokens are added.

*Reversible (W2, W3).* Detailed balance, pi_a P_ab = pi_b P_ba, asks for both directions of an edge, which one triangular
graph cannot have. So there is one symmetric graph for each prefix: queries of block m (blocks are as long as the window) see
the graph of the m window tokens before their block, enter it by e_i with S = that prefix, and walk on

    W_ab = exp(sqrt(D) (c_ab - 1)) * (1 if both are neighbours of each other, 1 - beta if one is of the other, else 0)
    P_ab = W_ab / d_a,  d_a = sum_b W_ab;   pi_a = d_a / sum d

with neighbours in the prefix and a, b different; a token without an edge (beta = 1, or a prefix of one token) stays where it
is. W is symmetric, so detailed balance is exact. beta = 1/2 is the mean of the directed weights and their transpose, and a
larger one trusts mutual neighbours more. Queries of block 0 have no graph: out_i = a_i V. What a query does not reach by its
graph, the tokens of its own block, lies inside its band.

The walk is linear in the values, so no power of P is formed: z_0 = V, z_(m+1) = (1 - r) P z_m + r V, and p_M V = e z_M.
Dropout acts on the weights of the local attention and on those of the entry. Similarities are float32 whatever the autocast,
since they select.

Invariants: nothing at or before i depends on a token after i; rows of every matrix sum to 1; the cache is the baseline's.

What is not true of it: it is not sparse and not O(n k). Cosines of all pairs and a product by a [T, T] matrix a step make it
several times as slow as one SDPA call, with a [T, T] matrix a head in memory; the reversible one needs a graph for each of
the T / window prefixes (recomputed in the backward pass), and cached decoding computes the graph anew for each token,
O(T^2 D). Nothing is reciprocal in the sense of later tokens reaching earlier ones: edges point both ways only inside a prefix
that all its queries already follow. Beside weights and window there is nothing learned: a fixed gamma, and keys that serve
twice. Where two tokens are equally similar the output jumps as their order changes; so in low precision cached decoding equals
the full pass except for such ties. It does not contain GPT-2's attention: with gamma > 0 a share of the weight is the walk's,
and with gamma = 0 a query sees no further than its band, unless that is the whole context.

Sources: reciprocal-architecture-2025-11-09 (full RWR); Tong, Faloutsos and Pan 2006 (random walk with restart). The earlier
implementation walked on queries and keys of all tokens, later ones too, over constants, with rows that did not sum to 1.
"""

import math
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gpt2.attention.baseline import CausalSelfAttention, causal_mask
from gpt2.layers import INIT_STD, full_precision, residual_std
from gpt2.rules import resolve_size

if TYPE_CHECKING:
    from lib.config import Config

MIN_NEIGHBOURS = 4  # of a ratio: with one neighbour a softmax over neighbours is constant, and the graph learns nothing


class WalkAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; `beta` None walks on the directed graph, a number in [0, 1] on the reversible one.

    `window` and `neighbours` are counts, `restart` a probability, `gamma` the weight of the walk.
    """

    def __init__(self, n_embd: int, n_head: int, window: int, neighbours: int, steps: int = 4, restart: float = 0.2,
                 gamma: float = 0.3, beta: float | None = None, dropout: float = 0.0, bias: bool = True,
                 proj_std: float = INIT_STD):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.window, self.neighbours, self.steps = window, neighbours, steps
        self.restart, self.gamma, self.beta = restart, gamma, beta

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        neighbours = resolve_size(cfg.WALK_NEIGHBOURS, cfg.GPT2_BLOCK_SIZE)
        if cfg.WALK_NEIGHBOURS < 1:
            neighbours = max(MIN_NEIGHBOURS, neighbours)
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, resolve_size(cfg.WALK_WINDOW, cfg.GPT2_BLOCK_SIZE), neighbours,
                   cfg.WALK_STEPS, cfg.WALK_RESTART, cfg.WALK_GAMMA, cfg.WALK_BETA if cfg.WALK_REVERSIBLE else None,
                   cfg.GPT2_DROPOUT, cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER))

    def dead_elements(self) -> dict:
        """None while there is a walk: a key bias turns the keys, and cosines see that."""
        return {} if self.gamma else super().dead_elements()

    def sizes(self) -> dict:
        return super().sizes() | {"walk_window": self.window, "walk_neighbours": self.neighbours}

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Of the last T of S tokens: q [B, H, T, D], keys [B, H, S, D], values [B, H, S, n] -> [B, H, T, n]."""
        past = keys.size(2) - q.size(2)
        band = causal_mask(q.size(2), past, q.device).triu(past - self.window + 1)
        local = F.scaled_dot_product_attention(q, keys, values, attn_mask=band, scale=self.head_dim ** -0.5,
                                               dropout_p=self.dropout if self.training else 0.0)
        if not self.gamma:
            return local
        unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        if self.beta is None:
            P = self.directed(unit)
            walked, gamma = self._enter(P[:, :, past:], self._walk(P, values)), self.gamma
        else:
            walked = self._through_prefixes(unit, values, past)
            in_a_graph = torch.arange(past, keys.size(2), device=q.device) >= self.window
            gamma = self.gamma * in_a_graph[:, None].to(unit.dtype)  # type: ignore[assignment]  # a share each
        return ((local + gamma * walked) / (1 + gamma)).to(local.dtype)

    def similarity(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Cosines [..., R, S] of unit vectors [..., R, D] and [..., S, D]."""
        with full_precision(rows):
            return rows @ columns.mT

    def entry(self, rows: torch.Tensor, columns: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """e [..., R, S] of unit vectors [..., R, D] into [..., S, D]; `allowed` [R, S] says which pairs may be neighbours."""
        cosines = self.similarity(rows, columns)
        if allowed is not None:
            cosines = cosines.masked_fill(~allowed, -math.inf)
        nearest = cosines.topk(min(self.neighbours, columns.size(-2)), dim=-1)
        weights = (nearest.values * math.sqrt(self.head_dim)).softmax(-1)
        return torch.zeros_like(cosines).scatter(-1, nearest.indices, weights)

    def directed(self, unit: torch.Tensor) -> torch.Tensor:
        """P [..., S, S] of the directed graph of S tokens, unit vectors [..., S, D]: row i leads to tokens before i."""
        earlier = causal_mask(unit.size(-2), 0, unit.device).tril(-1)
        earlier[0, 0].fill_(True)  # on the device; an assignment would copy the value to it
        return self.entry(unit, unit, earlier)

    def reversible(self, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P [..., S, S] of the symmetric graph of S tokens, unit vectors [..., S, D], and its stationary pi [..., S]."""
        S = unit.size(-2)
        cosines = self.similarity(unit, unit)
        same = torch.eye(S, dtype=torch.bool, device=unit.device)
        nearest = cosines.detach().masked_fill(same, -math.inf).topk(min(self.neighbours, max(1, S - 1)), dim=-1)
        near = torch.zeros_like(cosines, dtype=torch.bool).scatter(-1, nearest.indices, True) & ~same
        near, back = near.to(cosines.dtype), near.mT.to(cosines.dtype)
        kind = (1 - self.beta) * (near + back) + (2 * self.beta - 1) * near * back  # 1, 1 - beta or 0
        edges = torch.exp(math.sqrt(self.head_dim) * (cosines - 1)) * kind
        edges = edges + torch.diag_embed((edges.sum(-1) == 0).to(edges.dtype))
        degree = edges.sum(-1)
        return edges / degree[..., None], degree / degree.sum(-1, keepdim=True)

    def _walk(self, P: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """z_M [B, H, S, n], what the walk collects from each token it is entered at."""
        P, z = P.to(values.dtype), values
        for _ in range(self.steps):
            z = (1 - self.restart) * (P @ z) + self.restart * values
        return z

    def _enter(self, entry: torch.Tensor, collected: torch.Tensor) -> torch.Tensor:
        return F.dropout(entry.to(collected.dtype), self.dropout, self.training) @ collected

    def _through_prefixes(self, unit: torch.Tensor, values: torch.Tensor, past: int) -> torch.Tensor:
        """p_M V [B, H, T, n] of the tokens from `past` on, each on the graph of the prefix of its block; 0 without one.

        A prefix at a time, because prefixes differ in length: all at once would hold three times as much, [T / window, T, T].
        """
        parts, start, S = [], past, unit.size(2)
        while start < S:
            prefix = start // self.window * self.window
            stop = min(prefix + self.window, S)
            if prefix:
                nodes, held = unit[:, :, :prefix], values[:, :, :prefix]
                collected = (checkpoint(self._walk_reversible, nodes, held, use_reentrant=False, preserve_rng_state=False)
                             if torch.is_grad_enabled() else self._walk_reversible(nodes, held))
                parts.append(self._enter(self.entry(unit[:, :, start:stop], nodes), collected))
            else:
                parts.append(torch.zeros_like(values[:, :, start:stop]))
            start = stop
        return torch.cat(parts, 2)

    def _walk_reversible(self, unit: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self._walk(self.reversible(unit)[0], values)
