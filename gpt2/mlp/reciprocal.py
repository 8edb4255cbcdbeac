"""Reciprocal MLP (R-MLP): the hidden width is split into standard and reciprocal features with learned weights.

    h = [gelu(U_std x) | s(x) gelu(U_low x')]           d_ff = d_std + R_ff features
    y = W_down [w_std h_std | w_rec M h_low]

with w = gate^2 on the columns of the down projection, an optional mixer M [R_ff, R_ff] (start: identity), an optional per-token
gate s(x_t) = 2 sigmoid(g . x_t + b) (start: 1), and optional injection x' = x + alpha a (alpha starts at 1), where a is what
the attention of the same block added to the residual stream; without it x' = x. U_low may be tied: to the first R_ff rows of
U_std (with a bias of its own), or to those of the attention's output projection.

Weights and mixer act on the *weight* of the down projection, and without injection both paths are one matmul, so activations
and step time are the baseline's. The per-token gate is one pass over the hidden features, which a compiler fuses into the
GELU. Injection splits the up projection into two matmuls. A path that a skip gate switched off is not computed at all.

What is not true of it: without the per-token gate and without injection it is GPT-2's MLP with another start, because w and M
fold into W_down (`collapse` does so, exactly to rounding); a tied one is a restriction of that. Nothing is "reciprocal" about
it beyond the injection, which lets the MLP see what attention added, as the residual stream does anyway.

Sources: reciprocal-architecture-kvsplice-2025-11-11 (there the "per-token" gate was announced but one scalar was built; here it
is per token), geometric-init-skip-gates (injection, skip gates, R_ff = 3/8 of d_ff).
"""

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.coupling import Coupling
from gpt2.layers import INIT_STD, Linear, full_precision, residual_std
from gpt2.mlp.baseline import MLP
from gpt2.rules import hidden_width, resolve_size
from gpt2.skip import SkipGate

if TYPE_CHECKING:
    from lib.config import Config


class GateLast(torch.autograd.Function):
    """h [B, T, d_ff] with its last `count` features multiplied by s [B, T, 1].

    One pass forward and one backward, and a gradient of s that reads those features only (autograd's own reads all d_ff).
    """

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, s: torch.Tensor, count: int) -> Any:
        ctx.count = count
        ctx.save_for_backward(h[..., -count:].clone(), s)  # a view would keep all of h
        others = torch.arange(h.size(-1), device=h.device) < h.size(-1) - count
        return h * torch.where(others, 1.0, s).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        last, s = ctx.saved_tensors
        # Said otherwise than in `forward`: a compiler that finds the same factor twice keeps it, at the size of h.
        gated = torch.arange(grad.size(-1), device=grad.device) >= grad.size(-1) - ctx.count
        return grad * torch.where(gated, s, 1.0).to(grad.dtype), (grad[..., -ctx.count:] * last).sum(-1, keepdim=True), None


class ReciprocalMLP(MLP):
    """[B, T, n_embd] -> [B, T, n_embd]; `R_ff` reciprocal features, 1 <= R_ff < d_ff.

    `gate_start` is the pair (w_std, w_rec), or None for the geometric one: the share of features each path holds. `tying` is
    "none", "up" or "proj"; `skip_start` the pair of starts of the skip logits, or None for no skip gates.
    Raises ValueError for sizes that do not fit.
    """

    def __init__(self, n_embd: int, d_ff: int, R_ff: int, dropout: float = 0.0, bias: bool = True, mixer: bool = False,
                 token_gate: bool = False, gate_start: tuple[float, float] | None = None, proj_std: float = INIT_STD,
                 injection: bool = False, tying: str = "none", skip_start: tuple[float, float] | None = None):
        super().__init__(n_embd, d_ff, dropout, bias, proj_std)
        if not 0 < R_ff < d_ff:
            raise ValueError(f"R_ff {R_ff} must be at least 1 and below d_ff {d_ff}")
        self.R_ff, self.d_std, self.tying = R_ff, d_ff - R_ff, tying
        w_std, w_rec = gate_start or (self.d_std / d_ff, R_ff / d_ff)
        self.gate_std = nn.Parameter(torch.full((1,), w_std ** 0.5))
        self.gate_rec = nn.Parameter(torch.full((1,), w_rec ** 0.5))
        self.mixer = nn.Parameter(torch.eye(R_ff)) if mixer else None
        self.token_gate = nn.Parameter(torch.zeros(n_embd)) if token_gate else None
        self.token_gate_bias = nn.Parameter(torch.zeros(1)) if token_gate else None
        self.injection_alpha = nn.Parameter(torch.ones(1)) if injection else None
        self.gate_parameters = ("gate_std", "gate_rec", "token_gate", "token_gate_bias", "injection_alpha")
        if tying != "none":
            most = self.d_std if tying == "up" else n_embd
            if R_ff > most:
                raise ValueError(f"R_ff {R_ff} must be at most {most}, the rows that it is tied to")
            self.c_fc = Linear(n_embd, d_ff, bias=bias, rows=list(range(self.d_std)))
            self.low_bias = nn.Parameter(torch.zeros(R_ff)) if bias else None
        self.tied_weight = None  # the attention's, once the two have met
        self.coupling = Coupling()
        self.skip_std = self.skip_rec = None
        if skip_start is not None:
            self.skip_std = SkipGate(2 * n_embd * self.d_std, skip_start[0])
            self.skip_rec = SkipGate(2 * n_embd * R_ff, skip_start[1])
        self.baked = False

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        d_ff = hidden_width(cfg)
        return cls(cfg.GPT2_N_EMBD, d_ff, resolve_size(cfg.RMLP_R_FF, d_ff), cfg.GPT2_DROPOUT, cfg.GPT2_BIAS,
                   cfg.RMLP_MIXER, cfg.RMLP_TOKEN_GATE, (0.9, 0.1) if cfg.RMLP_GATES_FIXED else None,
                   residual_std(cfg.GPT2_N_LAYER), cfg.RMLP_INJECTION,
                   "up" if cfg.RMLP_TIED_UP else "proj" if cfg.RMLP_TIED_PROJ else "none",
                   (cfg.SKIP_START, cfg.SKIP_START_REC) if cfg.SKIP_GATES else None)

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        R_ff = resolve_size(cfg.RMLP_R_FF, hidden_width(cfg))
        tied = bool(cfg.RMLP_TIED_UP or cfg.RMLP_TIED_PROJ)
        return (2 + cfg.RMLP_MIXER * R_ff ** 2 + cfg.RMLP_TOKEN_GATE * (cfg.GPT2_N_EMBD + 1) + cfg.RMLP_INJECTION
                - tied * R_ff * cfg.GPT2_N_EMBD + 2 * bool(cfg.SKIP_GATES))

    def sizes(self) -> dict:
        return {"d_ff": self.d_ff, "R_ff": self.R_ff}

    def meet(self, attention: Any) -> None:
        if self.tying == "proj":
            self.tied_weight = attention.c_proj.weight  # the same parameter; it is counted once, under the attention's name

    @property
    def w_std(self) -> torch.Tensor:
        return self.gate_std.square()

    @property
    def w_rec(self) -> torch.Tensor:
        return self.gate_rec.square()

    @property
    def std_on(self) -> bool:
        return self.skip_std is None or self.skip_std.on

    @property
    def rec_on(self) -> bool:
        return self.skip_rec is None or self.skip_rec.on

    @property
    def on(self) -> bool:  # type: ignore[override]  # what asks for it only reads
        return self.std_on or self.rec_on

    def up_weights(self) -> Any:
        """(U_std, its bias), (U_low, its bias): weights [d_std, n_embd] and [R_ff, n_embd]."""
        weight, bias = self.c_fc.weight, self.c_fc.bias
        if self.tying != "none":
            low = self.tied_weight if self.tying == "proj" else weight
            return (weight, bias), (low[:self.R_ff], self.low_bias)
        biases = (None, None) if bias is None else bias.split([self.d_std, self.R_ff])
        return tuple(zip(weight.split([self.d_std, self.R_ff]), biases, strict=True))

    def down_weight(self) -> torch.Tensor:
        """W_down [n_embd, d_ff] with the weights and the mixer folded in, in float32 whatever the autocast."""
        weight = self.c_proj.weight
        if self.baked:
            return weight
        with full_precision(weight):
            if self.mixer is not None:
                mixer: torch.Tensor = self.mixer
                if self.coupling.moved:
                    mixer = torch.lerp(torch.eye(self.R_ff, device=mixer.device, dtype=mixer.dtype), mixer, self.coupling.scale)
                weight = torch.cat([weight[:, :self.d_std], weight[:, self.d_std:] @ mixer], dim=1)
            w_std, w_rec = self.coupling.weight(self.w_std), self.coupling.weight(self.w_rec)
            if self.skip_std is not None:
                w_std = w_std * self.skip_std.factor() if self.std_on else w_std
                w_rec = w_rec * self.skip_rec.factor() if self.rec_on else w_rec
            return weight * torch.cat([w_std.expand(self.d_std), w_rec.expand(self.R_ff)])

    def injected(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """x', what the reciprocal features see."""
        if self.injection_alpha is None or attended is None:
            return x
        return x + (self.coupling.share(self.injection_alpha) * attended).to(x.dtype)

    def token_factor(self, x: torch.Tensor) -> torch.Tensor:
        """s(x_t), [B, T, 1]."""
        # A sum, not a matmul by one column: a compiler takes it along where it normalises x.
        s = 2 * torch.sigmoid((x * self.token_gate).sum(-1, keepdim=True) + self.token_gate_bias)
        return self.coupling.weight(s).to(x.dtype)

    def forward(self, x: torch.Tensor, attended: torch.Tensor | None = None) -> torch.Tensor:
        std, low = self.up_weights()
        down = self.down_weight()
        if self.injection_alpha is None and self.std_on and self.rec_on:
            weight: torch.Tensor = self.c_fc.weight
            bias: torch.Tensor | None = self.c_fc.bias
            if self.tying != "none":
                weight, bias = torch.cat([std[0], low[0]]), None if bias is None else torch.cat([std[1], low[1]])
            h = F.gelu(F.linear(x, weight, bias), approximate="tanh")
            if self.token_gate is not None:
                h = GateLast.apply(h, self.token_factor(x).to(h.dtype), self.R_ff)
            return self.dropout(F.linear(h, down, self.c_proj.bias))
        parts = []
        if self.std_on:
            parts.append(F.gelu(F.linear(x, *std), approximate="tanh"))
        if self.rec_on:
            h = F.gelu(F.linear(self.injected(x, attended), *low), approximate="tanh")
            if self.token_gate is not None:
                h = h * self.token_factor(x).to(h.dtype)
            parts.append(h)
        down = down[:, 0 if self.std_on else self.d_std:self.d_ff if self.rec_on else self.d_std]
        return self.dropout(F.linear(torch.cat(parts, -1), down, self.c_proj.bias))

    @torch.no_grad()
    def bake(self) -> Self:
        """Fold the weights, the mixer and the skip factors into W_down and fix them: the same function."""
        if not self.baked:
            self.c_proj.weight.copy_(self.down_weight())
            for gate in (self.gate_std, self.gate_rec):
                gate.fill_(1.0).requires_grad_(False)
            if self.mixer is not None:
                self.mixer.copy_(torch.eye(self.R_ff)).requires_grad_(False)
            for skip in (self.skip_std, self.skip_rec):
                if skip is not None:
                    skip.fold()
            self.baked = True
        return self

    @torch.no_grad()
    def divide_gates(self) -> None:
        """Of a mixer, at its start the identity, nothing is divided."""
        weight = self.c_proj.weight.clone()
        self.c_proj.weight.fill_(1.0)
        self.c_proj.weight.copy_(weight / self.down_weight())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.baked = False  # loaded weights come with gates that act and learn
        for p in (self.gate_std, self.gate_rec, self.mixer):
            if p is not None:
                p.requires_grad_(True)
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def collapse(self) -> MLP:
        """The simplest MLP that computes the same: the baseline's, or with injection or a token gate an R-MLP of weights 1."""
        weight, bias = self.c_fc.weight, self.c_fc.bias is not None
        width, dropout = self.c_fc.in_features, self.dropout.p
        if self.injection_alpha is None and self.token_gate is None:
            plain = MLP(width, self.d_ff, dropout, bias).to(weight)
        else:
            plain = ReciprocalMLP(width, self.d_ff, self.R_ff, dropout, bias, token_gate=self.token_gate is not None,
                                  gate_start=(1.0, 1.0), injection=self.injection_alpha is not None).to(weight)
            for name in ("token_gate", "token_gate_bias", "injection_alpha"):
                if getattr(self, name) is not None:
                    getattr(plain, name).copy_(getattr(self, name))
            plain.coupling.load_state_dict(self.coupling.state_dict())
        (std, std_bias), (low, low_bias) = self.up_weights()
        plain.c_fc.weight.copy_(torch.cat([std, low]))
        plain.c_proj.weight.copy_(self.down_weight())
        plain.c_proj.weight[:, :self.d_std] *= self.std_on
        plain.c_proj.weight[:, self.d_std:] *= self.rec_on
        if bias:
            plain.c_fc.bias.copy_(torch.cat([std_bias, low_bias]))
            plain.c_proj.bias.copy_(self.c_proj.bias * self.on)
        return plain.train(self.training)

    def stats(self) -> dict:
        """Tensors for the log, by metric name."""
        found = {"rmlp_w_std": self.w_std, "rmlp_w_rec": self.w_rec}
        if self.token_gate is not None:
            found["rmlp_gate_alpha"] = 2 * torch.sigmoid(self.token_gate_bias)
        if self.injection_alpha is not None:
            found["rmlp_injection_alpha"] = self.injection_alpha
        if self.skip_std is not None:
            found |= {"skip_std_mlp": self.skip_std.value(), "skip_rec_mlp": self.skip_rec.value()}
        return found
