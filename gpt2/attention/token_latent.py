"""Token latent (RAMLA): queries, keys and values from one latent a token, in a direction per layer.

    c = W_c x                                     [B, T, L], what the cache holds
    [q | k | v] = W_u c + b_u                     [B, H, T, D] each
    standard     y = W_o softmax(q k^T / sqrt(D) + causal mask) v
    reciprocal   y = W_o softmax(k q^T / sqrt(D) + causal mask) v

The direction of a layer is fixed or learned as in gpt2/attention/direction.py: an undecided layer computes both and its
value is that of the likelier one, a decided one computes one. A learned KVSplice stands between c and W_u, so all three are
made of c_hat.

Unlike there, the cache does not depend on the direction: k and q both come from c, which is all that it holds, decided or
not. Decoding is absorbed in both directions (gpt2/attention/mla.py): the rows of W_u that play the query are applied to the
latents of the new tokens, those that play the key to the query. Undecided layers do it twice.

What is not true of it: that it is 27 % faster than MLA. It has one matmul less (W_q) and 4 % fewer multiplications at 124M;
the direction is a renaming of rows of W_u and cannot matter to speed or function. And it is no richer: it is MLA with W_q of
rank L (W_uq W_c), a restriction (`collapse` gives the GPT-2 that it is inside).

Source: ra-mla-kvsplice-router-fim.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch

from gpt2.attention.direction import Directed, Direction, configured_direction
from gpt2.attention.learned_kvsplice import LearnedKVSplice
from gpt2.attention.mla import MultiHeadLatentAttention, splice_parameters
from gpt2.layers import INIT_STD
from gpt2.rules import latent_width

if TYPE_CHECKING:
    from lib.config import Config

QUERY, KEY, VALUE = 0, 1, 2  # blocks of rows of c_up


class TokenLatentAttention(Directed, MultiHeadLatentAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; `c_up` holds the rows [q; k; v], and there is no `c_attn`. `reciprocal` fixes the
    direction; None learns it, with one more parameter."""

    def __init__(self, n_embd: int, n_head: int, latent: int, dropout: float = 0.0, bias: bool = True,
                 proj_std: float = INIT_STD, kvsplice: LearnedKVSplice | None = None, reciprocal: bool | None = None):
        super().__init__(n_embd, n_head, latent, dropout, bias, proj_std, kvsplice)
        del self.c_attn
        self.c_up = self.expansion(3)
        self.fixed, self.direction = reciprocal, Direction() if reciprocal is None else None

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:  # type: ignore[override]  # no options
        return super().from_config(cfg, layer, reciprocal=configured_direction(cfg, layer))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        E, L = cfg.GPT2_N_EMBD, latent_width(cfg)
        return 4 * E * L - 3 * E * E + splice_parameters(cfg) + int(cfg.DIRECTION_LEARNED)

    def dead_elements(self) -> dict:
        """The bias of what plays the key."""
        if self.c_up.bias is None:
            return {}
        key = QUERY if self.likelier() else KEY
        return {"c_up.bias": slice(key * self.n_embd, (key + 1) * self.n_embd)}

    def directed(self, attend: Callable[[bool], torch.Tensor]) -> torch.Tensor:
        """attend(reciprocal) in the direction of the layer; of an undecided one h R + (1 - h) S."""
        if self.reciprocal is not None:
            return attend(self.reciprocal)
        standard, h = attend(False), self.direction.choice()
        return (h * attend(True) + (1 - h) * standard).to(standard.dtype)

    def expanded(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        q, k, v = self.blocks(latents)
        return self.directed(lambda reciprocal: self.attend(k, q, v) if reciprocal else self.attend(q, k, v))

    def absorbed(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        new = self.restored(latents[:, -x.size(1):])
        return self.directed(lambda reciprocal: self.attend_latents(
            self.asking(new, reciprocal), latents, QUERY if reciprocal else KEY, VALUE))

    def asking(self, c: torch.Tensor, reciprocal: bool) -> torch.Tensor:
        """What plays the query, [B, T, H, D], of c [B, T, L]."""
        block = slice(self.n_embd, 2 * self.n_embd) if reciprocal else slice(0, self.n_embd)
        bias = None if self.c_up.bias is None else self.c_up.bias[block]
        return self.heads(torch.nn.functional.linear(c, self.c_up.weight[block], bias))

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        down, up, bias = self.folded()
        q, k, v = torch.arange(3 * self.n_embd, device=up.device).split(self.n_embd)
        order = torch.cat([k, q, v] if self.likelier() else [q, k, v])
        return (up @ down)[order], None if bias is None else bias[order]
