"""The pre-norm transformer block: attention, then the MLP, each after a norm and added to the residual stream.

What stands in a block is decided by ATTENTION_CLASS and MLP_CLASS. A mechanism that changes how the two are joined is a
block of its own with this interface, named by BLOCK_CLASS.
"""

import copy
import pkgutil
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gpt2.kv_cache import NoCache
from gpt2.rules import kvsplice_width

if TYPE_CHECKING:
    import torch

    from lib.config import Config


@dataclass
class Context:
    """What the blocks of one forward pass share. It lives as long as the pass, so nothing reaches another batch.

    `embedding`: the residual stream before the first block, [B, T, n_embd]. `handed`: what a block leaves for the next.
    """

    embedding: Tensor
    handed: dict = field(default_factory=dict)


PARTS = {"pruning": "KV_PRUNING_CLASS", "splice": "KVSPLICE_CLASS"}  # what an attention may be given, and who names it


class Block(nn.Module):
    """[B, T, n_embd] -> [B, T, n_embd]; `layer` counts from 0."""

    def __init__(self, cfg: "Config", layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.GPT2_N_EMBD, bias=cfg.GPT2_BIAS)
        self.attn = pkgutil.resolve_name(cfg.ATTENTION_CLASS).from_config(cfg, layer)
        for part, symbol in PARTS.items():
            if where := getattr(cfg, symbol):
                setattr(self.attn, part, pkgutil.resolve_name(where).from_config(cfg, layer))
        self.mlp = None
        if cfg.MLP_CLASS:
            self.ln_2 = nn.LayerNorm(cfg.GPT2_N_EMBD, bias=cfg.GPT2_BIAS)
            self.mlp = pkgutil.resolve_name(cfg.MLP_CLASS).from_config(cfg, layer)
            self.mlp.meet(self.attn)

    def forward(self, x: Tensor, cache: Any = None, context: Context | None = None) -> Tensor:
        attended = self.attn(self.ln_1(x), cache, context) if self.attn.on else None
        if attended is not None:
            x = x + attended
        if self.mlp is not None and self.mlp.on:
            return x + self.mlp(self.ln_2(x), attended)
        # Never x itself: a compiler passes over a function without an operation, and from then on over every block, for they
        # are one function.
        return x.view_as(x) if attended is None else x

    def new_cache(self, batch_size: int, capacity: int, dtype: "torch.dtype", device: "torch.device") -> Any:
        """The cache of this layer; see gpt2/kv_cache.py."""
        return self.attn.new_cache(batch_size, capacity, dtype, device) if self.attn.on else NoCache()

    def sizes(self) -> dict:
        """Integers that ratios resolved to, for metrics.json."""
        parts = (self.attn, self.attn.pruning, self.attn.splice, self.mlp)
        return {name: size for part in parts if part is not None for name, size in part.sizes().items()}

    def collapse(self) -> "Block":
        """A copy whose attention and MLP are the simplest that compute the same."""
        simple = {id(part): part.collapse() for part in (self.attn, self.mlp) if part is not None}
        if (attention := simple[id(self.attn)]) is not self.attn:
            self._equip(attention, {part: copy.deepcopy(getattr(self.attn, part)) for part in PARTS})
        return copy.deepcopy(self, {key: part for key, part in simple.items() if key != id(part)})

    def bake(self) -> None:
        """Fold what acts on weights into them, in place."""
        parts = {part: getattr(self.attn, part) for part in PARTS}
        self.attn = self.attn.bake()
        self._equip(self.attn, parts)
        if self.mlp is not None:
            self.mlp = self.mlp.bake()

    @staticmethod
    def _equip(attention: Any, parts: dict) -> None:
        """Give an attention these parts, by name."""
        for name, part in parts.items():
            setattr(attention, name, part)

    @classmethod
    def extra_parameters(cls, cfg: "Config") -> int:
        """Parameters of one layer beyond GPT-2's, in closed form; the law of parameter counts compares with it."""
        attention = pkgutil.resolve_name(cfg.ATTENTION_CLASS).extra_parameters(cfg)
        if cfg.KV_PRUNING_CLASS:
            attention += pkgutil.resolve_name(cfg.KV_PRUNING_CLASS).extra_parameters(cfg)
        if cfg.MLP_CLASS:
            return attention + pkgutil.resolve_name(cfg.MLP_CLASS).extra_parameters(cfg)
        width, hidden = cfg.GPT2_N_EMBD, cfg.GPT2_MLP_EXPANSION * cfg.GPT2_N_EMBD
        return attention - 2 * width * hidden - cfg.GPT2_BIAS * (hidden + width) - width * (1 + cfg.GPT2_BIAS)

    @classmethod
    def total_extra_parameters(cls, cfg: "Config") -> int:
        """Of all layers, in closed form; a block whose layers differ says how."""
        return cfg.GPT2_N_LAYER * cls.extra_parameters(cfg)

    @classmethod
    def cache_bytes_per_token(cls, cfg: "Config", itemsize: int) -> int | Fraction:
        """Cache bytes one layer needs for one token, in closed form; what is not the same for every token is spread."""
        if cfg.KV_PRUNING_CLASS:
            return pkgutil.resolve_name(cfg.KV_PRUNING_CLASS).cache_bytes_per_token(cfg, itemsize)
        saved = cfg.GPT2_N_EMBD - cfg.GPT2_N_HEAD * kvsplice_width(cfg)
        return pkgutil.resolve_name(cfg.ATTENTION_CLASS).cache_bytes_per_token(cfg, itemsize) - saved * itemsize
