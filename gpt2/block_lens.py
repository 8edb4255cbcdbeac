"""A block with a route gate: attention and MLP, in sequence as ever, weighed by g and 1 - g.

    attended = attention(ln_1(x))
    x <- x + g attended
    x <- x + (1 - g) mlp(ln_2(x), attended)              g = sigmoid(l), one a block, start sigmoid(2.2) = 0.9

The MLP is handed `attended` as the attention put it out, without g. With the conductor the MLP's context is used in
proportion to the MLP's own share: its factor is 1 - g. (An earlier implementation compared g, as a Python number, with 1/2:
that has no gradient, and as g starts at 0.9 the context was never used.)

What is not true of it: the gate does not decide between attention and MLP, nor does a low g save cache or time. g is a
factor of the attention's output projection and 1 - g of the MLP's, the conductor's factor one of the context's share:
`collapse` folds all three and leaves an ordinary block. Nothing is left of it but another start and another learning rate
of those scales.

Source: the legacy lens ablation.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gpt2.block import Block
from gpt2.mlp.context import ContextMLP

if TYPE_CHECKING:
    from lib.config import Config

ROUTE_START = 2.2


class LensBlock(Block):
    """[B, T, n_embd] -> [B, T, n_embd]; its MLP is an MLP or a ContextMLP, and a conductor needs the latter."""

    gate_parameters = ("route_logit",)

    def __init__(self, cfg: "Config", layer: int):
        super().__init__(cfg, layer)
        self.route_logit = nn.Parameter(torch.full((1,), ROUTE_START))
        self.conductor = cfg.CONTEXT_CONDUCTOR

    def route(self) -> tuple[torch.Tensor, torch.Tensor]:
        """g and 1 - g, each [1], float32 whatever the autocast; the second is no difference, so that it keeps its digits where
        g is almost 1."""
        return torch.sigmoid(self.route_logit), torch.sigmoid(-self.route_logit)

    def forward(self, x: torch.Tensor, cache: Any = None, context: Any = None) -> torch.Tensor:
        to_attention, to_mlp = self.route()
        attended = None
        if self.attn.on:
            attended = self.attn(self.ln_1(x), cache, context)
            x = x + (to_attention * attended).to(x.dtype)  # one gate must not widen the residual stream
        if not self.mlp.on:
            return x
        share = (to_mlp,) if self.conductor else ()
        return x + (to_mlp * self.mlp(self.ln_2(x), attended, *share)).to(x.dtype)

    @torch.no_grad()
    def collapse(self) -> Block:
        """An ordinary block that computes the same."""
        plain = Block.__new__(Block)  # its constructor would build parts anew
        nn.Module.__init__(plain)
        plain.ln_1, plain.attn = copy.deepcopy(self.ln_1), copy.deepcopy(self.attn.collapse())
        plain.ln_2, plain.mlp = copy.deepcopy(self.ln_2), copy.deepcopy(self.mlp.collapse())
        to_attention, to_mlp = self.route()
        for part, weight in ((plain.attn, to_attention), (plain.mlp, to_mlp)):
            for p in part.c_proj.parameters():
                p *= weight
        if isinstance(plain.mlp, ContextMLP):  # it is handed g attended now
            plain.mlp.absorb(to_attention, to_mlp if self.conductor else torch.ones_like(to_mlp))
        return plain.train(self.training)

    @classmethod
    def extra_parameters(cls, cfg: "Config") -> int:
        return super().extra_parameters(cfg) + 1

    def stats(self) -> dict:
        """`route_gate`, g of this block."""
        return {"route_gate": self.route()[0]}
