"""The block that couples latent attention and its MLP, within one block and from one to the next.

    a, c_k, p = attention(ln_1(x), features h' of the MLP before)     h' gates its heads, or adds to its latent keys
    x = x + a
    m, h = MLP(ln_2(x), c_k, p)                                       c_k adds to its features, p mixes them across tokens
    x = x + m;  h goes to the next block

Which of these there are, what they compute and what is not true of them say gpt2/attention/latent_band.py and
gpt2/mlp/latent_band.py. What is received is learned at the receiving side, so the last block has no parameters for a block
that does not follow, and the first none for one that does not precede it.

Invariants: h is handed on by the forward pass's own context, so nothing reaches another batch and a second backward finds
its own graph; h_t is that of the same token, so no coupling sees a later one.
"""

import copy
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gpt2.attention.latent_band import LatentBandAttention
from gpt2.block import Block, Context
from gpt2.mlp.latent_band import LatentBandMLP

if TYPE_CHECKING:
    import torch

    from lib.config import Config


class LatentBandBlock(Block):
    """[B, T, n_embd] -> [B, T, n_embd]; its attention is a LatentBandAttention, its MLP a LatentBandMLP."""

    def forward(self, x: Tensor, cache: Any = None, context: Context | None = None) -> Tensor:
        handed = {} if context is None else context.handed
        attended, latent_keys, weights = self.attn.couple(self.ln_1(x), cache, handed.get("hidden"))
        x = x + attended
        moved, handed["hidden"] = self.mlp.couple(self.ln_2(x), latent_keys, weights, cache)
        return x + moved

    def new_cache(self, batch_size: int, capacity: int, dtype: "torch.dtype", device: "torch.device") -> Any:
        return self.mlp.add_cache(self.attn.new_cache(batch_size, capacity, dtype, device))

    def collapse(self) -> "LatentBandBlock":
        """A copy of itself: no simpler block is known that computes the same."""
        return copy.deepcopy(self)

    @classmethod
    def total_extra_parameters(cls, cfg: "Config") -> int:
        return super().total_extra_parameters(cfg) + (cfg.GPT2_N_LAYER - 1) * LatentBandAttention.received_parameters(cfg)

    @classmethod
    def cache_bytes_per_token(cls, cfg: "Config", itemsize: int) -> int | Fraction:
        return super().cache_bytes_per_token(cfg, itemsize) + LatentBandMLP.cache_bytes_per_token(cfg, itemsize)
