"""Unified reciprocal attention (RA): reciprocal channels folded into the fused projection of ordinary attention.

Each head's D channels are split into D_std = D - R standard and R reciprocal ones:

    Qf = [Q_std | K_low],  Kf = [K_std | Q_low]
    score_ij = (w_std <q_std_i, k_std_j> + w_rec <k_low_i, q_low_j>) / sqrt(D)

Two terms: an inner product of concatenations is the sum of the products of matching blocks, so there are no cross terms.
Gates live on the weight side. The module trains g with w = g^2, and g multiplies the rows (and biases) of both the query
and the key block of the projection as its weight is cast for the matmul; so w >= 0, gates receive gradient, and there is
one projection, one SDPA call, and no operation on activations that the baseline does not have. `bake()` folds the gates
into the weights for inference.

What is not true of it: with free weights it is a relabelling. K_low and Q_low are just R more query and key rows, so the
function class is ordinary attention with rescaled rows (`collapse` gives that attention, exact to rounding), and nothing
flows "in both directions". Any difference in training comes from the start and from the gates' effect on optimisation.

Self-restart (V2): out = (1 - a) attention + a V per head, a = sigmoid(l) / 2 in (0, 0.5), start 0.05.

Sources: unified-ra-hardening, reciprocal-architecture-kvsplice-2025-11-11 (which state four terms, baked *and* learned
gates, and "Q scaled by sqrt(w) scales QK^T by w"; all three are wrong, see the module's tests).
`python -m gpt2.attention.unified_ra` runs the documents' own tests.
"""

import math

import torch
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.layers import INIT_STD, init_weights, residual_std
from lib.streams import stream_seed

RESTART_START, RESTART_MAX = 0.05, 0.5


class UnifiedRAttention(CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]; R reciprocal channels a head, 1 <= R < head_dim.

    `gate_start` is the pair (w_std, w_rec), or None for the geometric one, (D - R)/D and R/D. `per_head_gates` False
    trains one pair for the layer. `debug` demands what tensor cores want: head_dim % 8 == 0 and input on CUDA.
    `init_seed` draws the start of a stand-alone module; a model, which draws its own, passes None.
    Raises ValueError for sizes that do not fit.
    """

    def __init__(self, n_embd: int, n_head: int, R: int = 4, dropout: float = 0.0, use_self_restart: bool = False,
                 per_head_gates: bool = True, debug: bool = False, bias: bool = True,
                 gate_start: tuple[float, float] | None = None, proj_std: float = INIT_STD,
                 init_seed: int | None = 0):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        if debug and self.head_dim % 8:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 8 for tensor cores")
        self.debug, self.gate_start = debug, gate_start
        gates = n_head if per_head_gates else 1
        self.gate_std = nn.Parameter(torch.empty(gates))
        self.gate_rec = nn.Parameter(torch.empty(gates))
        self.gate_parameters = ("gate_std", "gate_rec")
        self.restart_logit = None
        if use_self_restart:
            share = RESTART_START / RESTART_MAX
            self.restart_logit = nn.Parameter(torch.full((n_head,), math.log(share / (1 - share))))
            self.gate_parameters += ("restart_logit",)
        self.baked, self.used = False, False
        self._set_sizes(R)
        if init_seed is not None:
            init_weights(self, init_seed)

    @classmethod
    def from_config(cls, cfg):
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, cfg.RA_R, cfg.GPT2_DROPOUT, cfg.RA_SELF_RESTART,
                   cfg.RA_PER_HEAD_GATES, bias=cfg.GPT2_BIAS, gate_start=(0.9, 0.1) if cfg.RA_GATES_FIXED else None,
                   proj_std=residual_std(cfg.GPT2_N_LAYER), init_seed=None)

    @staticmethod
    def extra_parameters(cfg) -> int:
        gates = cfg.GPT2_N_HEAD if cfg.RA_PER_HEAD_GATES else 1
        return 2 * gates + cfg.RA_SELF_RESTART * cfg.GPT2_N_HEAD

    def sizes(self) -> dict:
        return {"head_dim": self.head_dim, "R": self.R}

    @torch.no_grad()
    def _set_sizes(self, R: int) -> None:
        if not 0 < R < self.head_dim:
            raise ValueError(f"R {R} must be at least 1 and below head_dim {self.head_dim}")
        self.R, self.D_std = R, self.head_dim - R
        w_std, w_rec = self.gate_start or (self.D_std / self.head_dim, R / self.head_dim)
        self.gate_std.fill_(w_std ** 0.5)
        self.gate_rec.fill_(w_rec ** 0.5)

    def set_R(self, R: int) -> None:
        """Another R, with its start; legal until weights are loaded or used, RuntimeError after."""
        if self.used:
            raise RuntimeError("R is fixed once weights were loaded or used; build a new module with the R you want")
        self._set_sizes(R)

    @property
    def w_std(self):
        """Weight of the standard term, [n_head] or [1]."""
        return self.gate_std.square()

    @property
    def w_rec(self):
        """Weight of the reciprocal term, [n_head] or [1]."""
        return self.gate_rec.square()

    @property
    def rwr_alpha(self):
        """Share of the self-restart path per head, [n_head], in (0, 0.5); None without self-restart."""
        return None if self.restart_logit is None else RESTART_MAX * torch.sigmoid(self.restart_logit)

    def row_scale(self):
        """What multiplies the rows of the fused projection, [3 n_embd]: the gates for Qf and Kf, one for V."""
        per_head = torch.cat([self.gate_std[:, None].expand(-1, self.D_std), self.gate_rec[:, None].expand(-1, self.R)], 1)
        rows = per_head.expand(self.n_head, self.head_dim).reshape(-1)
        return torch.cat([rows, rows, torch.ones_like(rows)])

    def projection_weights(self):
        self.used = True
        weight, bias = self.c_attn.weight, self.c_attn.bias
        if self.baked:
            return weight, bias
        scale = self.row_scale()
        return weight * scale[:, None], None if bias is None else bias * scale

    def combine(self, attended, values, x):
        if self.restart_logit is None:
            return attended
        a = self.rwr_alpha[:, None, None]
        return (attended + a * (values - attended)).to(attended.dtype)

    def forward(self, x, cache=None):
        if self.debug and not x.is_cuda:
            raise ValueError("debug mode wants its input on a CUDA device")
        return super().forward(x, cache)

    @torch.no_grad()
    def from_pretrained_qkv(self, W_q, W_k, W_v, projection_P=None, b_q=None, b_k=None, b_v=None, exact: bool = False):
        """Load baseline projections, each [n_embd, n_embd] with optional biases [n_embd].

        The weights are stored without the gates, which keep acting at run time, so no gate is ever applied twice.
        Default: the last R channels of each head become the reciprocal ones (`repack_baseline_qkv_into_unified_ra`), and
        the function changes. `exact`: all D channels keep their place and all gates are set to 1, which is the baseline.
        """
        R = 0 if exact else self.R
        folded = repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, projection_P, n_head=self.n_head, R=R)
        self.c_attn.weight.copy_(folded)
        if self.c_attn.bias is not None:
            zero = torch.zeros(self.n_embd)
            b_q, b_k, b_v = (zero if b is None else b for b in (b_q, b_k, b_v))
            folded = repack_baseline_qkv_into_unified_ra(b_q[:, None], b_k[:, None], b_v[:, None], projection_P,
                                                         n_head=self.n_head, R=R)
            self.c_attn.bias.copy_(folded[:, 0])
        elif any(b is not None and b.abs().max() > 0 for b in (b_q, b_k, b_v)):
            raise ValueError("this module was built without biases, so the biases given would be lost")
        if exact:
            self.gate_std.fill_(1.0)
            self.gate_rec.fill_(1.0)
        self._unbake()
        return self

    @torch.no_grad()
    def bake(self):
        """Fold the gates into the weights and fix them at 1: the same function, nothing left to multiply."""
        weight, bias = self.projection_weights()
        self.c_attn.weight.copy_(weight)
        if bias is not None:
            self.c_attn.bias.copy_(bias)
        for gate in (self.gate_std, self.gate_rec):
            gate.fill_(1.0)
            gate.requires_grad_(False)
        self.baked = True
        return self

    def rebake_gates(self):
        """Fold gates that were set after `bake()`; does nothing if none was."""
        self.baked = False
        return self.bake()

    def _unbake(self) -> None:
        """Loaded weights come with gates that act and learn."""
        self.baked, self.used = False, True
        self.gate_std.requires_grad_(True)
        self.gate_rec.requires_grad_(True)

    def _load_from_state_dict(self, *args, **kwargs):
        self._unbake()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention | None:
        """The baseline attention that computes the same function; None with self-restart, for which none is known."""
        if self.restart_logit is not None:
            return None
        weight, bias = self.projection_weights()
        plain = CausalSelfAttention(self.n_embd, self.n_head, self.dropout, self.c_attn.bias is not None).to(weight)
        plain.c_attn.weight.copy_(weight)
        if bias is not None:
            plain.c_attn.bias.copy_(bias)
        plain.c_proj.load_state_dict(self.c_proj.state_dict())
        return plain.train(self.training)

    def stats(self) -> dict:
        """Tensors for the log, by metric name."""
        found = {"unified_ra_w_std": self.w_std, "unified_ra_w_rec": self.w_rec}
        if self.restart_logit is not None:
            found["unified_ra_rwr_alpha"] = self.rwr_alpha
        return found

    @torch.no_grad()
    def get_gate_stats(self) -> dict[str, float]:
        """w_std_mean, _min, _max, _std, the same of w_rec, and of rwr_alpha with self-restart, as floats."""
        return {f"{name.removeprefix('unified_ra_')}_{kind}": getattr(value, kind)(**options).item()
                for name, value in self.stats().items()
                for kind, options in (("mean", {}), ("min", {}), ("max", {}), ("std", {"unbiased": False}))}


ReciprocalAttention = UnifiedRAttention  # the name of the later source documents


def repack_baseline_qkv_into_unified_ra(W_q, W_k, W_v, P=None, seed: int = 0, *, n_head: int, R: int):
    """Baseline projections in the folded layout [Qf; Kf; V], [3 n_embd, n_in], without gates.

    W_q, W_k, W_v: [n_embd, n_in], head by head. Per head, the last R rows of the query block become K_low and those of
    the key block Q_low: the last R rows of W_k and W_q, or P^T times all D of them for P [D, R] (P="random": orthonormal
    columns drawn from `seed`). R = 0 keeps all D channels in place: then nothing is reciprocal and, at w = 1, the module
    is exactly the baseline.
    """
    n_embd, n_in = W_q.shape
    D = n_embd // n_head
    q, k = W_q.reshape(n_head, D, n_in), W_k.reshape(n_head, D, n_in)
    if R:
        if isinstance(P, str):
            if P != "random":
                raise ValueError(f"P is a tensor [D, R], None or 'random', not {P!r}")
            generator = torch.Generator().manual_seed(stream_seed(seed, "repack"))
            P = torch.linalg.qr(torch.randn(D, R, generator=generator))[0].to(W_q)
        if P is not None and P.shape != (D, R):
            raise ValueError(f"P must have shape [{D}, {R}], not {list(P.shape)}")
        q_low, k_low = (w[:, -R:] if P is None else P.T @ w for w in (q, k))
        q, k = torch.cat([q[:, :D - R], k_low], 1), torch.cat([k[:, :D - R], q_low], 1)
    return torch.cat([q.reshape(n_embd, n_in), k.reshape(n_embd, n_in), W_v])


if __name__ == "__main__":
    import sys
    from pathlib import Path

    import pytest

    sys.exit(pytest.main(["-q", str(Path(__file__).parents[2] / "tests/gpt2/attention/test_unified_ra.py")]))
