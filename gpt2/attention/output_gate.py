"""Softmax attention with a sigmoid gate on its output: GPT-2's attention and one more projection of the layer's input.

    out = W_o (SDPA(q, k, v) * sigmoid(x W_g^T))      elementwise, every channel of every head its own gate

x is the layer's input after its norm, [B, T, n_embd]; W_g is [n_embd, n_embd] without bias; the gate [B, T, n_embd] meets
the attended values head by head, [B, H, T, D]. It depends on the query's own position only, so causality, cached decoding
and the cache are the baseline's. W_g starts as any other weight does, which puts the gates around 1/2 (0.37 to 0.63 is one
standard deviation at width 768).

Source: Qiu et al. 2025, Gated Attention for Large Language Models (arXiv 2505.06708), their elementwise, head-specific gate
after SDPA, the best of some thirty variants in their models of 1.7B and 15B parameters.

What is not true of it: it is not free. n_embd^2 parameters a layer are a quarter more than attention has, and one more
matmul a layer makes a step slower; where it wins, some of that may be size. And it is a *known* gain at the paper's scale
only (a billion parameters and more, hundreds of billions of tokens, RMSNorm and rotary positions); as a positive control
it says what the instrument can see, not that the gate must win in a short run of a small model. It is no member of GPT-2's
function class, which it contains (W_g = 0 and W_o doubled); no smaller model is known.
"""

from typing import TYPE_CHECKING

import torch

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.layers import INIT_STD, Linear

if TYPE_CHECKING:
    from lib.config import Config


class OutputGateAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]. `c_gate` holds W_g; it is decayed like any other matrix."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.c_gate = Linear(n_embd, n_embd, bias=False)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        return cfg.GPT2_N_EMBD ** 2

    def combine(self, attended: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.c_gate(x))
        return attended * gate.view(*x.shape[:2], self.n_head, self.head_dim).transpose(1, 2)
