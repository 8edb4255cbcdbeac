"""Learned KVSplice: a trained affine map of a latent into fewer channels, and its inverse after them.

    c'    = C (softplus(s) c + b)                 [..., d_in] -> [..., d_compressed], what a cache holds
    c_hat = (E c' - b) / softplus(s)              [..., d_compressed] -> [..., d_in]

s and b [d_in] are a scale and a shift of each channel, C [d_compressed, d_in] and E [d_in, d_compressed]. Start: softplus(s)
= 1, b = 0, C with orthonormal rows and E = C^T, so c_hat is the orthogonal projection of c onto d_compressed random
dimensions and loses sqrt(1 - d_compressed / d_in) of the size of an isotropic c (0.71 at 128 of 256), nothing more.

Both maps are affine, and scale and shift stand on the weight side, so that each costs one matmul:

    c' = (C diag(softplus(s))) c + C b,           c_hat = (diag(1 / softplus(s)) E) c' - b / softplus(s)

Weights p that sum to 1 go through the inverse, sum p c_hat = decompress(sum p c'); decoding uses that
(gpt2/attention/mla.py).

Invariant: C and E start as a pair. They are drawn here, together, from `seed`, and gpt2/layers.py draws only what has an
`init_std`, so a model that is built around them leaves them as they are. (In the implementation that the source describes
the model's init drew both again, independently: 99.99 % of c was lost at the start.)

What is not true of it: it adds no function and regularises by nothing of its own. C diag(softplus(s)) W_c is a matrix of
d_compressed rows, so a latent of d_in with it is a latent of d_compressed without it, from another start and with more
weights (`MultiHeadLatentAttention.bake` folds them); b is a part of the bias after it. It has nothing in common with the
spline of gpt2/kvsplice.py, which is fitted to a trained model and not affine.

Source: ra-mla-kvsplice-router-fim.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SCALE_START = math.log(math.e - 1)  # softplus of it is 1


class LearnedKVSplice(nn.Module):
    """`compress` [..., d_in] -> [..., d_compressed], `decompress` back. `bias`: whether there is a shift b.

    Raises ValueError unless 1 <= d_compressed < d_in.
    """

    def __init__(self, d_in: int, d_compressed: int, bias: bool = True, seed: int = 0):
        super().__init__()
        if not 1 <= d_compressed < d_in:
            raise ValueError(f"d_compressed {d_compressed} must be at least 1 and below d_in {d_in}")
        self.d_in, self.width = d_in, d_compressed
        self.down = nn.Parameter(torch.empty(d_compressed, d_in))
        self.up = nn.Parameter(torch.empty(d_in, d_compressed))
        self.scale = nn.Parameter(torch.full((d_in,), SCALE_START))
        self.shift = nn.Parameter(torch.zeros(d_in)) if bias else None
        if self.down.device.type != "meta":
            self.draw(seed)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """C with orthonormal rows, uniformly distributed, and E = C^T, from the stream `seed`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.d_in, self.width, dtype=torch.float64, device="cpu").normal_(generator=generator)
        basis, triangle = torch.linalg.qr(drawn)
        basis = basis * triangle.diagonal().sign()  # qr leaves the signs open, and so to the library that computes it
        self.up.copy_(basis)
        self.down.copy_(basis.T)

    def down_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [d_compressed, d_in] and bias (or None) of `compress` as one affine map."""
        return self.down * F.softplus(self.scale), None if self.shift is None else self.down @ self.shift

    def up_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [d_in, d_compressed] and bias (or None) of `decompress` as one affine map."""
        scale = F.softplus(self.scale)
        return self.up / scale[:, None], None if self.shift is None else -self.shift / scale

    def compress(self, c: torch.Tensor) -> torch.Tensor:
        return F.linear(c, *self.down_weights())

    def decompress(self, compressed: torch.Tensor) -> torch.Tensor:
        return F.linear(compressed, *self.up_weights())
