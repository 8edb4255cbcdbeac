"""The MLP of GPT-2: y = dropout(W_down gelu(W_up x + b_up) + b_down), with the tanh form of GELU."""

from typing import TYPE_CHECKING, Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.layers import INIT_STD, Linear, residual_std
from gpt2.rules import hidden_width

if TYPE_CHECKING:
    from lib.config import Config


class MLP(nn.Module):
    """[B, T, n_embd] -> [B, T, n_embd] through d_ff = expansion * n_embd hidden features. Source: Radford et al. 2019."""

    gate_parameters: tuple[str, ...] = ()
    on = True  # False: the layer has no MLP (any more)

    def __init__(self, n_embd: int, d_ff: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD):
        super().__init__()
        self.d_ff = d_ff
        self.c_fc = Linear(n_embd, d_ff, bias=bias)
        self.c_proj = Linear(d_ff, n_embd, bias=bias, init_std=proj_std)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, hidden_width(cfg), cfg.GPT2_DROPOUT, cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        """Parameters of one layer beyond GPT-2's, in closed form; the law of parameter counts compares with it."""
        return 0

    def meet(self, attention: Any) -> None:
        """Told of the attention of the same block, once, when both are built: an MLP may share weights with it."""

    def sizes(self) -> dict:
        """Resolved integers, for metrics.json."""
        return {"d_ff": self.d_ff}

    def collapse(self) -> "MLP":
        """The simplest MLP that computes the same; itself where none is known."""
        return self

    def bake(self) -> Self:
        """This MLP with what acts on its weights folded into them, for inference."""
        return self

    def divide_gates(self) -> None:
        """The other way: make its weights such that with what acts on them they are what they were without."""

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """`attended` is what the attention of the same block added to the residual stream, or None if it is off."""
        h = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(h))
