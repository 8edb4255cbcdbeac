"""Multi-head latent attention (MLA): keys and values of all heads from one latent a token, and the latent is the cache.

    q = W_q x + b_q                               [B, H, T, D]
    c = W_c x                                     [B, T, L], what the cache holds
    [k | v] = W_u c + b_u                         [B, H, T, D] each
    y = W_o softmax(q k^T / sqrt(D) + causal mask) v

With a learned KVSplice (gpt2/attention/learned_kvsplice.py) the cache holds its c' [B, T, L'], and c_hat stands in for c in
all that follows. Nothing that was restored is ever compressed again.

Two forms of one function, equal to rounding:

    expanded   as above, one causal SDPA over keys and values: training, the full forward pass, a prompt on an empty cache
    absorbed   score_h = (q_h W_uk,h) . c,  y_h = (sum p c) W_uv,h + b_v,h: whatever follows a prefix in a cache

W_uk,h and W_uv,h [D, L] are the rows of W_u of head h. The absorbed form never makes keys or values of the prefix: the
latent, one "head" of L channels, is key and value for every head, and the heads are rows of one query matrix, so SDPA reads
it once for all of them. A key bias adds the same to all scores of a row and is left out; weights sum to 1, so b_v is added
once. A splice is absorbed likewise: the query goes through its expansion, score_h = (q_h W_uk,h U) . c' + a constant of the
row for U the weight of `decompress`, and `decompress` is applied once, to sum p c'. The absorbed form does L / D times the
work of ordinary attention on L / (2 H D) of its bytes. For a chunk of more than L D / (L - D) tokens (85 at 124M) expanding
the prefix would be less work, but takes the memory of an ordinary cache.

Invariants: row i depends on tokens up to i only; weights of the same name and shape start as the baseline's, the query rows
as the baseline's query rows; W_u starts at 1/sqrt(L), so that W_u W_c has the size of the rows of GPT-2 that it stands for.
There is no bias of c, it would be one of k and v. Absorption needs positions that are no part of k: GPT-2 learns them and
adds them to x (rotary ones would come between c and k).

Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1, without its rotary part) and ra-mla-kvsplice-router-fim. What is not true
of the latter: a smaller cache is not faster by itself. All of GPT-2's cache is 13 % of the bytes that one sequence moves for
a token at T = 1024, so at batch 1 nothing done to it can pay more than 1.15x, and a version that expands all latents at
every step, as there, is slower than GPT-2. Its tokens/s were those of forward passes without a cache. MLA is no new function
either: it is GPT-2 with W_k and W_v of a joint rank of at most L (`collapse` gives that GPT-2), so it can compress, and
lose, but not add.
"""

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.attention.baseline import CausalSelfAttention, causal_mask
from gpt2.attention.learned_kvsplice import LearnedKVSplice
from gpt2.kv_cache import TokenCache
from gpt2.layers import INIT_STD, Linear, residual_std
from gpt2.rules import latent_width, splice_width
from lib.streams import cell_seed, stream_seed

if TYPE_CHECKING:
    from lib.config import Config

# A few wide rows and a long cache: flash splits the cache over the processors of a GPU, cuDNN, which is chosen otherwise, does
# not, and takes 1.2 to 4 times as long.
FAST_FOR_LATENTS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class MultiHeadLatentAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; `c_attn` holds W_q alone, `c_up` the rows [k; v]. `latent` is L, `kvsplice` what
    compresses it further, or None."""

    def __init__(self, n_embd: int, n_head: int, latent: int, dropout: float = 0.0, bias: bool = True,
                 proj_std: float = INIT_STD, kvsplice: LearnedKVSplice | None = None):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.latent, self.kvsplice = latent, kvsplice
        self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias, rows=list(range(n_embd)))
        self.c_latent = Linear(n_embd, latent, bias=False)
        self.c_up = self.expansion(2)

    def expansion(self, blocks: int) -> Linear:
        """Rows of `blocks` of queries, keys and values, from the latent."""
        return Linear(self.latent, blocks * self.n_embd, bias=self.c_proj.bias is not None, init_std=self.latent ** -0.5)

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0, **options: Any) -> Self:
        kvsplice = None
        if cfg.MLA_KVSPLICE:
            seed = stream_seed(cell_seed(cfg), "init", "kvsplice", layer)
            kvsplice = LearnedKVSplice(latent_width(cfg), splice_width(cfg), cfg.GPT2_BIAS, seed)
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, latent_width(cfg), cfg.GPT2_DROPOUT, cfg.GPT2_BIAS,
                   residual_std(cfg.GPT2_N_LAYER), kvsplice, **options)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        E, L = cfg.GPT2_N_EMBD, latent_width(cfg)
        return 3 * E * L - 2 * E * E + splice_parameters(cfg)

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int:
        return itemsize * (splice_width(cfg) if cfg.MLA_KVSPLICE else latent_width(cfg))

    def dead_elements(self) -> dict:
        """The key bias, which adds the same number to all scores of a row."""
        return {} if self.c_up.bias is None else {"c_up.bias": slice(0, self.n_embd)}

    def sizes(self) -> dict:
        return super().sizes() | {"latent": self.latent} | ({"kvsplice": self.kvsplice.width} if self.kvsplice else {})

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
        return TokenCache(batch_size, capacity, self.kvsplice.width if self.kvsplice else self.latent, dtype, device)

    def forward(self, x: torch.Tensor, cache: TokenCache | None = None, context: Any = None) -> torch.Tensor:
        latents = self.c_latent(x)
        if self.kvsplice is not None:
            latents = self.kvsplice.compress(latents)
        follows = cache is not None and cache.length > 0
        if cache is not None:
            latents = cache.append(latents)
        y = self.absorbed(x, latents) if follows else self.expanded(x, latents)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))

    def restored(self, latents: torch.Tensor) -> torch.Tensor:
        """c, or c_hat, [..., L] of what a cache holds."""
        return latents if self.kvsplice is None else self.kvsplice.decompress(latents)

    def blocks(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values [B, H, T, D] (and what else c_up has rows for) of what a cache holds, [B, T, L or L']."""
        parts = self.c_up(self.restored(latents)).split(self.n_embd, 2)
        return tuple(self.heads(part).transpose(1, 2) for part in parts)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, n_embd] as [B, T, H, D]."""
        return x.unflatten(2, (self.n_head, self.head_dim))

    def expanded(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[B, H, T, D] of T tokens with nothing before them."""
        return self.attend(self.heads(self.c_attn(x)).transpose(1, 2), *self.blocks(latents))

    def absorbed(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[B, H, T, D] of the last T of S tokens; latents [B, S, L or L'] of all of them."""
        return self.attend_latents(self.heads(self.c_attn(x)), latents, 0, 1)

    def attend_latents(self, q: torch.Tensor, latents: torch.Tensor, key: int, value: int) -> torch.Tensor:
        """Attention of q [B, T, H, D] over latents [B, S, L or L'] -> [B, H, T, D]. `key` and `value` are the numbers of their
        blocks in c_up. Without dropout: this is decoding."""
        B, T = q.shape[:2]
        weight = self.c_up.weight.unflatten(0, (-1, self.n_head, self.head_dim))  # [blocks, H, D, L]
        q = torch.einsum("bthd,hdl->bhtl", q, weight[key])
        if self.kvsplice is not None:
            q = q @ self.kvsplice.up_weights()[0].to(q.dtype)
        q, latents = q.reshape(B, 1, self.n_head * T, -1), latents[:, None]
        # A single row sees everything; several are at the end of all tokens, in the same order for each head.
        mask = causal_mask(T, latents.size(2) - T, q.device).repeat(self.n_head, 1) if T > 1 else None
        with sdpa_kernel(FAST_FOR_LATENTS, set_priority=True):
            y = F.scaled_dot_product_attention(q, latents, latents, attn_mask=mask, scale=self.head_dim ** -0.5)
        y = torch.einsum("bhtl,hdl->bhtd", self.restored(y.view(B, self.n_head, T, -1)), weight[value])
        if self.c_up.bias is not None:
            y = y + self.c_up.bias.unflatten(0, (-1, self.n_head, 1, self.head_dim))[value].to(y.dtype)
        return y

    def folded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Weight of c_latent, weight of c_up and its bias (or None) with the splice in them: [L', n_embd], [.., L'], [..]."""
        down, up = self.c_latent.weight, self.c_up.weight
        bias: torch.Tensor | None = self.c_up.bias
        if self.kvsplice is None:
            return down, up, bias
        (compress, _), (decompress, _) = self.kvsplice.down_weights(), self.kvsplice.up_weights()
        if bias is not None:
            bias = bias + up @ self.restored(self.kvsplice.compress(torch.zeros_like(up[0])))  # what it makes of c = 0
        return compress @ down, up @ decompress, bias

    @torch.no_grad()
    def bake(self) -> Self:
        """Fold the splice into the weights around it: MLA with a latent of L', the same function and cache."""
        if self.kvsplice is None:
            return self
        blocks, (down, up, bias) = self.c_up.out_features // self.n_embd, self.folded()
        self.latent, self.kvsplice = self.kvsplice.width, None
        self.c_latent = Linear(self.n_embd, self.latent, bias=False).to(down)
        self.c_up = self.expansion(blocks).to(up)
        self.c_latent.weight.copy_(down)
        self.c_up.weight.copy_(up)
        if bias is not None:
            self.c_up.bias.copy_(bias)
        return self

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [3 n_embd, n_embd] and bias (or None) of the fused projection that computes the same."""
        down, up, bias = self.folded()
        bias = None if bias is None else torch.cat([self.c_attn.bias, bias])
        return torch.cat([self.c_attn.weight, up @ down]), bias

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention:
        """GPT-2's attention with products as weights."""
        weight, bias = self.rows()
        plain = CausalSelfAttention(self.n_embd, self.n_head, self.dropout, bias is not None).to(weight)
        plain.c_attn.weight.copy_(weight)
        if bias is not None:
            plain.c_attn.bias.copy_(bias)
        plain.c_proj.load_state_dict(self.c_proj.state_dict())
        return plain.train(self.training)


def splice_parameters(cfg: "Config") -> int:
    """Of one layer, in closed form: C, E, s and b."""
    L = latent_width(cfg)
    return L * (2 * splice_width(cfg) + 1 + cfg.GPT2_BIAS) if cfg.MLA_KVSPLICE else 0
