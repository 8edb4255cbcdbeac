"""Key-value tying: attention whose keys are its values, W_k = W_v and b_k = b_v.

    [q | k] = x W^T + b                                          q, k: [B, H, T, D]
    out = softmax(q k^T / sqrt(D) + causal mask) k W_o^T + b_o

The fused projection has the query and key rows only, so a layer has n_embd^2 + n_embd parameters fewer, and a cache holds
one tensor instead of two. It starts from GPT-2's numbers in the rows that are left. As a key the bias b_k moves no
probability, as a value it does act, so it has a gradient and nothing of this module is dead.

What is not true of it: nothing is transposed. The transpose of V has no shape that a key could have; what was run under the
name "K = V^T" was K = V. And it is no reparametrisation of GPT-2 but a part of its function class, that with equal key and
value rows (`collapse` gives that GPT-2): it can lose by what it cannot express. What it saves is a quarter of the weights of
attention and half of the cache; the scores and the weighted sum cost what they did.

Source: key-value tying as the earlier implementation of the project had it; no source document measures it. The neighbouring
idea, queries that are the keys, is in Kitaev et al. 2020 (Reformer).
"""

from typing import TYPE_CHECKING, Any

import torch

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.kv_cache import LayerCache
from gpt2.layers import INIT_STD, Linear

if TYPE_CHECKING:
    from lib.config import Config


class TiedKVAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; `c_attn` holds the rows [q; k]."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias, rows=list(range(2 * n_embd)))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        return -cfg.GPT2_N_EMBD * (cfg.GPT2_N_EMBD + cfg.GPT2_BIAS)

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int:
        return cfg.GPT2_N_EMBD * itemsize

    def dead_elements(self) -> dict:
        return {}

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        return LayerCache(batch_size, self.n_head, capacity, self.head_dim, dtype, device, value_dim=0)

    def forward(self, x: torch.Tensor, cache: LayerCache | None = None, context: Any = None) -> torch.Tensor:
        B, T, E = x.shape
        q, k = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(E, dim=2))
        keys = k if cache is None else cache.append(k, k[..., :0])[0]
        attended = self.attend(q, keys, keys)
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).reshape(B, T, E)))

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention:
        """GPT-2's attention with the key rows as its value rows, too."""
        plain = CausalSelfAttention(self.n_embd, self.n_head, self.dropout, self.c_attn.bias is not None).to(self.c_attn.weight)
        plain.c_attn.load_state_dict({name: torch.cat([p, p[self.n_embd:]])
                                      for name, p in self.c_attn.state_dict().items()})
        plain.c_proj.load_state_dict(self.c_proj.state_dict())
        return plain.train(self.training)
