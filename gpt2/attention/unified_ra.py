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

Self-restart (V2): out = (1 - a) attention + a V per head, a = sigmoid(l) / 2 in (0, 0.5), start 0.05. It is computed as
(1 - a) (attention + a / (1 - a) V) with the factor in front on the columns of the output projection, so that one pass over
the attended values is all it costs, and none in the backward pass of the attention.

Sources: unified-ra-hardening, reciprocal-architecture-kvsplice-2025-11-11 (which state four terms, baked *and* learned
gates, and "Q scaled by sqrt(w) scales QK^T by w"; all three are wrong, see the module's tests).
`python -m gpt2.attention.unified_ra` runs the documents' own tests.
"""

import math
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.coupling import Coupling
from gpt2.layers import INIT_STD, init_weights, residual_std
from gpt2.skip import SkipGate
from lib.streams import stream_seed

if TYPE_CHECKING:
    from lib.config import Config

ALIGNMENT = 8  # channels that the attention kernels take at a time
TINY = 1e-12
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
                 init_seed: int | None = 0, skip_start: float | None = None):
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
        self.coupling = Coupling()
        self.skip_std = self.skip_low = None
        if skip_start is not None:
            per_channel = 2 * n_head * n_embd  # a query and a key row of every head
            self.skip_std = SkipGate(per_channel * (self.head_dim - R), skip_start)
            self.skip_low = SkipGate(per_channel * R, skip_start)
        self.baked, self.used = False, False
        self._set_sizes(R)
        if init_seed is not None:
            init_weights(self, init_seed)

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, cfg.RA_R, cfg.GPT2_DROPOUT, cfg.RA_SELF_RESTART,
                   cfg.RA_PER_HEAD_GATES, bias=cfg.GPT2_BIAS, gate_start=(0.9, 0.1) if cfg.RA_GATES_FIXED else None,
                   proj_std=residual_std(cfg.GPT2_N_LAYER), init_seed=None,
                   skip_start=cfg.SKIP_START if cfg.SKIP_GATES else None)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        gates = cfg.GPT2_N_HEAD if cfg.RA_PER_HEAD_GATES else 1
        return 2 * gates + cfg.RA_SELF_RESTART * cfg.GPT2_N_HEAD + 2 * bool(cfg.SKIP_GATES)

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
    def w_std(self) -> torch.Tensor:
        """Weight of the standard term, [n_head] or [1]."""
        return self.gate_std.square()

    @property
    def w_rec(self) -> torch.Tensor:
        """Weight of the reciprocal term, [n_head] or [1]."""
        return self.gate_rec.square()

    @property
    def rwr_alpha(self) -> torch.Tensor | None:
        """Share of the self-restart path per head, [n_head], in (0, 0.5); None without self-restart."""
        return None if self.restart_logit is None else RESTART_MAX * torch.sigmoid(self.restart_logit)

    @property
    def living(self) -> slice:
        """Channels of a head that are computed: all but those of a path that a skip gate switched off."""
        std, low = (skip is None or skip.on for skip in (self.skip_std, self.skip_low))
        return slice(0 if std else self.D_std, self.head_dim if low else self.D_std)

    @property
    def on(self) -> bool:  # type: ignore[override]  # what asks for it only reads
        return self.living.start < self.living.stop

    @property
    def key_dim(self) -> int:
        """Channels of a query and a key: the living ones, filled up to a multiple of 8 (what the kernels take) by zeros."""
        count = self.living.stop - self.living.start
        return min(-(-count // ALIGNMENT) * ALIGNMENT, self.head_dim)

    @key_dim.setter
    def key_dim(self, value: int) -> None:
        """The base class sets it; here it follows from what is on."""

    def row_scale(self) -> torch.Tensor:
        """What multiplies the rows of the fused projection, [3 n_embd]: the root of its weight in Qf and Kf, one in V."""
        scales = []
        for gate, skip in ((self.gate_std, self.skip_std), (self.gate_rec, self.skip_low)):
            # g itself is a root of w = g^2, with a gradient everywhere; a scale between 0 and 1 leaves only w.
            root = self.coupling.weight(gate.square()).clamp_min(TINY).sqrt() if self.coupling.moved else gate
            scales.append(root * skip.factor().sqrt() if skip is not None and skip.on else root)
        std, low = scales
        per_head = torch.cat([std[:, None].expand(-1, self.D_std), low[:, None].expand(-1, self.R)], 1)
        rows = per_head.expand(self.n_head, self.head_dim).reshape(-1)
        return torch.cat([rows, rows, torch.ones_like(rows)])

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The fused projection [Qf; Kf; V] without gates: weight [3 n_embd, n_embd] and bias [3 n_embd] (or None)."""
        return self.c_attn.weight, self.c_attn.bias

    def gated_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same with the gates on it."""
        weight, bias = self.rows()
        if self.baked:
            return weight, bias
        scale = self.row_scale()
        return weight * scale[:, None], None if bias is None else bias * scale

    def projection_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.used = True
        weight, bias = self.gated_rows()
        if self.living == slice(0, self.head_dim):
            return weight, bias
        return self._of_living(weight), None if bias is None else self._of_living(bias)

    def _of_living(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [3 n_embd, ...] with only the living channels of each query and key, filled up to key_dim by zeros."""
        kept = rows[:2 * self.n_embd].view(2, self.n_head, self.head_dim, -1)[:, :, self.living]
        kept = F.pad(kept, (0, 0, 0, self.key_dim - kept.size(2))).flatten(0, 2)
        return torch.cat([kept.view(-1, *rows.shape[1:]), rows[2 * self.n_embd:]])

    def combine(self, attended: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.restart_logit is None:
            return attended
        a = self.coupling.share(self.rwr_alpha)
        # A matmul, for a compiler keeps its result, and would compute anything else anew for each channel that it multiplies;
        # and channels in a row, as the projection left them. Both halve what self-restart costs on a GPU.
        heads = torch.eye(self.n_head, device=a.device, dtype=a.dtype).repeat_interleave(self.head_dim, 0)
        share = F.linear((a / (1 - a))[None], heads)[0].to(attended.dtype)
        y = attended.transpose(1, 2).flatten(2) + share * values.transpose(1, 2).flatten(2)
        return y.unflatten(2, (self.n_head, self.head_dim)).transpose(1, 2)

    def output_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = super().output_weights()
        if self.restart_logit is None:
            return weight, bias
        kept = 1 - self.coupling.share(self.rwr_alpha)
        return weight * kept.repeat_interleave(self.head_dim), bias

    def forward(self, x: torch.Tensor, cache: Any = None, context: Any = None) -> torch.Tensor:
        if self.debug and not x.is_cuda:
            raise ValueError("debug mode wants its input on a CUDA device")
        return super().forward(x, cache, context)

    @torch.no_grad()
    def from_pretrained_qkv(self, W_q: torch.Tensor, W_k: torch.Tensor, W_v: torch.Tensor,
                            projection_P: torch.Tensor | None = None, b_q: torch.Tensor | None = None,
                            b_k: torch.Tensor | None = None, b_v: torch.Tensor | None = None, exact: bool = False) -> Self:
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
    def bake(self) -> CausalSelfAttention:
        """Fold the gates into the weights and fix them at 1: the same function, nothing left to multiply."""
        if not self.baked:
            weight, bias = self._whole()
            self.c_attn.weight.copy_(weight)
            if bias is not None:
                self.c_attn.bias.copy_(bias)
            for gate in (self.gate_std, self.gate_rec):
                gate.fill_(1.0)
                gate.requires_grad_(False)
            for skip in (self.skip_std, self.skip_low):
                if skip is not None:
                    skip.fold()
            self.baked = True
        return self

    @torch.no_grad()
    def divide_gates(self) -> None:
        scale = self.row_scale()
        self.c_attn.weight.div_(scale[:, None])
        if self.c_attn.bias is not None:
            self.c_attn.bias.div_(scale)

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The fused projection at full width with its gates, and zeros for the channels that are off."""
        weight, bias = self.gated_rows()
        off = torch.ones(self.head_dim, dtype=torch.bool, device=weight.device)
        off[self.living] = False
        rows = torch.cat([off.repeat(2 * self.n_head), off.new_zeros(self.n_embd)])
        return weight.masked_fill(rows[:, None], 0), None if bias is None else bias.masked_fill(rows, 0)

    def rebake_gates(self) -> CausalSelfAttention:
        """Fold gates that were set after `bake()`; does nothing if none was."""
        self.baked = False
        return self.bake()

    def _unbake(self) -> None:
        """Loaded weights come with gates that act and learn."""
        self.baked, self.used = False, True
        self.gate_std.requires_grad_(True)
        self.gate_rec.requires_grad_(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unbake()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention:
        """The baseline attention that computes the same function; with self-restart, one that only adds the restart."""
        weight, bias = self._whole()
        has_bias = bias is not None
        if self.restart_logit is None:
            plain = CausalSelfAttention(self.n_embd, self.n_head, self.dropout, has_bias).to(weight)
        else:
            plain = UnifiedRAttention(self.n_embd, self.n_head, 1, self.dropout, True, False, bias=has_bias,
                                      gate_start=(1.0, 1.0), init_seed=None).to(weight)
            plain.restart_logit.copy_(self.restart_logit)
            if self.coupling.moved:
                plain.coupling.moved = True
                plain.coupling.scale.copy_(self.coupling.scale)
        plain.c_attn.weight.copy_(weight)
        if has_bias:
            plain.c_attn.bias.copy_(bias)
        plain.c_proj.load_state_dict(self.c_proj.state_dict())
        if not self.on:  # the whole layer is gone, its output bias too
            for p in plain.c_proj.parameters():
                p.zero_()
        return plain.train(self.training)

    def stats(self) -> dict:
        """Tensors for the log, by metric name."""
        found = {"unified_ra_w_std": self.w_std, "unified_ra_w_rec": self.w_rec}
        if self.restart_logit is not None:
            found["unified_ra_rwr_alpha"] = self.rwr_alpha
        if self.skip_std is not None:
            found |= {"skip_std_attn": self.skip_std.value(), "skip_lowrank_attn": self.skip_low.value()}
        return found

    @torch.no_grad()
    def get_gate_stats(self) -> dict[str, float]:
        """w_std_mean, _min, _max, _std, the same of w_rec, and of rwr_alpha with self-restart, as floats."""
        return {f"{name.removeprefix('unified_ra_')}_{kind}": getattr(value, kind)(**options).item()
                for name, value in self.stats().items() if value.ndim
                for kind, options in (("mean", {}), ("min", {}), ("max", {}), ("std", {"unbiased": False}))}


ReciprocalAttention = UnifiedRAttention  # the name of the later source documents


def repack_baseline_qkv_into_unified_ra(W_q: torch.Tensor, W_k: torch.Tensor, W_v: torch.Tensor, P: torch.Tensor | None = None,
                                        seed: int = 0, *, n_head: int, R: int) -> torch.Tensor:
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
