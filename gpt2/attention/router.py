"""Router attention (legacy): for each token, a small network weighs the heads called full against those called reciprocal.

    y = SDPA(q, k, v) [B, H, T, D], as in GPT-2; the last n_ra heads are y_ra, the others y_full
    p_ra, p_full = softmax(W_2 gelu(W_1 f + b_1) + b_2)           per token, f [B, T, 4], 16 hidden features
    out = dropout(2 p_full W_full y_full + 2 p_ra W_ra y_ra + b)  W_full, W_ra: the columns of c_proj that see those heads

One fused projection, one SDPA call over all heads, and, because p is a number a token, one output projection: 2 p multiplies
the heads before it. With the 2 the fixed mix p = 1/2 is GPT-2 bit for bit (the documents give no scale).

Features: f = (|x - e|, |x|, |E|, <x, e>), lengths over sqrt(n_embd) and the product over n_embd, so that they do not grow with
the width. x is the layer's input after its norm, E the residual stream before the first block, and e is E after a norm without
parameters: only so does |x - e| say how far context has moved the token, because E itself is some fifty times shorter than x.
In a stand-alone module, where there is no stream, E is x. All of it belongs to the token's own position and sequence.

Phases: the loop starts with the fixed mix, in which the router decides nothing and gets no gradient and no penalty (which
would push it into a corner). Once the validation loss is ROUTER_DROP below the loss of the untrained model it routes for good.
The phase is a tensor, so nothing is compiled anew. A model built outside the loop routes. While it routes, ROUTER_PENALTY
times the mean of p_full over tokens and layers is added to the loss.

What is not true of it: the reciprocal heads are ordinary heads, and the path is not cheap: all heads are computed for every
token, so the "compute penalty" saves nothing. Neither path sees all heads, so "full" is not GPT-2's attention. Routing after
the fact is a gate per token on two groups of heads; it contains GPT-2 (p = 1/2), and no smaller model of it is known. The
losses reported for it were those of two runs of different length inside the warm-up, with a router without gradient.

Source: ra-mla-kvsplice-router-fim, "Router-Based RA (Deprecated)".
"""

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.kv_cache import LayerCache
from gpt2.layers import INIT_STD, Linear, full_precision, residual_std
from gpt2.rules import resolve_size

if TYPE_CHECKING:
    from lib.config import Config
    from lib.mechanisms import Moment

FEATURES, HIDDEN, PATHS = 4, 16, 2


class RouterLinear(Linear):
    """A layer of the router."""

    structure_parameters = ("weight", "bias")


class Router(nn.Module):
    """x and embedding [B, T, n_embd] -> p_full [B, T, 1], in float32 whatever the autocast; p_ra is the rest."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.c_fc = RouterLinear(FEATURES, HIDDEN, bias=bias)
        self.c_out = RouterLinear(HIDDEN, PATHS, bias=bias)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        with full_precision(x):
            f = features(x.float(), embedding.float()).to(self.c_fc.weight.dtype)
            return self.c_out(F.gelu(self.c_fc(f), approximate="tanh")).softmax(-1)[..., 1:]


def features(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """(|x - e|, |x|, |E|, <x, e>) of each token, [B, T, 4]; see the module's docstring."""
    width = x.size(-1)
    e = F.layer_norm(embedding, (width,))
    lengths = [torch.linalg.vector_norm(t, dim=-1) / width ** 0.5 for t in (x - e, x, embedding)]
    return torch.stack([*lengths, (x * e).sum(-1) / width], dim=-1)


class RouterAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; the last `n_ra` heads are the reciprocal path, 1 <= n_ra < n_head.

    `penalty` and `drop`: see the module's docstring; ValueError for an n_ra that leaves a path without heads.
    """

    routing: torch.Tensor
    p_full: torch.Tensor

    def __init__(self, n_embd: int, n_head: int, n_ra: int, dropout: float = 0.0, bias: bool = True,
                 proj_std: float = INIT_STD, penalty: float = 0.01, drop: float = 0.15):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        if not 0 < n_ra < n_head:
            raise ValueError(f"n_ra {n_ra} must be at least 1 and below n_head {n_head}")
        self.n_ra, self.strength, self.drop = n_ra, penalty, drop
        self.router = Router(bias)
        self.register_buffer("routing", torch.ones(()))  # 0: the fixed mix
        self.register_buffer("p_full", torch.full((), 0.5), persistent=False)  # mean of the last forward pass in training
        self.pending: torch.Tensor | None = None  # the same with its graph, until `penalty` takes it

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, resolve_size(cfg.ROUTER_RA_HEADS, cfg.GPT2_N_HEAD), cfg.GPT2_DROPOUT,
                   cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER), cfg.ROUTER_PENALTY / cfg.GPT2_N_LAYER, cfg.ROUTER_DROP)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        return HIDDEN * (FEATURES + PATHS) + cfg.GPT2_BIAS * (HIDDEN + PATHS)

    def sizes(self) -> dict:
        return super().sizes() | {"router_ra_heads": self.n_ra}

    def forward(self, x: torch.Tensor, cache: LayerCache | None = None, context: Any = None) -> torch.Tensor:
        B, T, E = x.shape
        q, k, v = self.project(x)
        keys, values = (k, v) if cache is None else cache.append(k, v)
        attended = self.attend(q, keys, values)
        weights = self.head_weights(x, x if context is None else context.embedding).to(attended.dtype)
        y = (attended * weights).transpose(1, 2).reshape(B, T, E)
        return self.resid_dropout(self.c_proj(y))

    def head_weights(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """2 p of each head's path, [B, H, T, 1]; 1 in the fixed mix."""
        p_full = torch.where(self.routing > 0, self.router(x, embedding), 0.5)
        # Kept only where there is something to differentiate, and no longer than to the next pass.
        self.pending = p_full.mean() if self.training and torch.is_grad_enabled() else None
        if self.training:
            self.p_full.copy_(p_full.detach().mean())
        full = torch.arange(self.n_head, device=x.device) < self.n_head - self.n_ra
        return 2 * torch.where(full, p_full, 1 - p_full).transpose(1, 2).unsqueeze(3)

    @torch.no_grad()
    def advance(self, moment: "Moment") -> bool:
        """Begin with the fixed mix; route from the fall of the validation loss on, for good."""
        if moment.iteration == 0:
            self.routing.zero_()
        if moment.val_loss is not None and moment.val_loss <= (1 - self.drop) * moment.first_loss:
            self.routing.fill_(1.0)
        return False

    def penalty(self) -> torch.Tensor:
        """Times the mean of p_full in the last forward pass in training, which is thereby forgotten; 0 in the fixed mix."""
        p_full, self.pending = self.pending, None
        return self.routing.new_zeros(()) if p_full is None else self.strength * self.routing * p_full

    def stats(self) -> dict:
        """`p_ra` and `p_full`, the mix that was used."""
        return {"p_ra": 1 - self.p_full, "p_full": self.p_full}

    def inactive(self) -> str | None:
        if self.routing > 0:
            return None
        return f"routing never began: no evaluation was {self.drop:.0%} below the loss of the untrained model"

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a tensor with a graph can be neither."""
        return self.__dict__ | {"pending": None}
