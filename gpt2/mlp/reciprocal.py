"""Reciprocal MLP (R-MLP): the hidden width is split into standard and reciprocal features with learned weights.

    h = gelu(W_up x)                    d_ff = d_std + R_ff features, one matmul
    y = W_down [w_std h_std | w_rec s(x) M h_low]

with w = gate^2 on the columns of the down projection, an optional mixer M [R_ff, R_ff] (start: identity) and an optional
per-token gate s(x_t) = 2 sigmoid(g . x_t + b) (start: 1). Weights and mixer act on the *weight* of the down projection,
so without the per-token gate activations and step time are the baseline's. The gate multiplies the hidden features by a
factor that is 1 for the standard ones: one more pass over them, which a compiler fuses into the GELU.

What is not true of it: without the per-token gate it is GPT-2's MLP with another start, because w and M fold into
W_down (`collapse` does so, exactly to rounding). Source: reciprocal-architecture-kvsplice-2025-11-11 (there the
"per-token" gate was announced but one scalar was built; here it is per token).
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.layers import INIT_STD, residual_std
from gpt2.mlp.baseline import MLP
from gpt2.rules import hidden_width, resolve_size


class ReciprocalMLP(MLP):
    """[B, T, n_embd] -> [B, T, n_embd]; `R_ff` reciprocal features, 1 <= R_ff < d_ff.

    `gate_start` is the pair (w_std, w_rec), or None for the geometric one: the share of features each path holds.
    """

    def __init__(self, n_embd: int, d_ff: int, R_ff: int, dropout: float = 0.0, bias: bool = True, mixer: bool = False,
                 token_gate: bool = False, gate_start: tuple[float, float] | None = None, proj_std: float = INIT_STD):
        super().__init__(n_embd, d_ff, dropout, bias, proj_std)
        if not 0 < R_ff < d_ff:
            raise ValueError(f"R_ff {R_ff} must be at least 1 and below d_ff {d_ff}")
        self.R_ff, self.d_std = R_ff, d_ff - R_ff
        w_std, w_rec = gate_start or (self.d_std / d_ff, R_ff / d_ff)
        self.gate_std = nn.Parameter(torch.full((1,), w_std ** 0.5))
        self.gate_rec = nn.Parameter(torch.full((1,), w_rec ** 0.5))
        self.mixer = nn.Parameter(torch.eye(R_ff)) if mixer else None
        self.token_gate = nn.Parameter(torch.zeros(n_embd)) if token_gate else None
        self.token_gate_bias = nn.Parameter(torch.zeros(1)) if token_gate else None
        self.gate_parameters = ("gate_std", "gate_rec", *(("token_gate", "token_gate_bias") if token_gate else ()))

    @classmethod
    def from_config(cls, cfg):
        d_ff = hidden_width(cfg)
        return cls(cfg.GPT2_N_EMBD, d_ff, resolve_size(cfg.RMLP_R_FF, d_ff), cfg.GPT2_DROPOUT, cfg.GPT2_BIAS,
                   cfg.RMLP_MIXER, cfg.RMLP_TOKEN_GATE, (0.9, 0.1) if cfg.RMLP_GATES_FIXED else None,
                   residual_std(cfg.GPT2_N_LAYER))

    @staticmethod
    def extra_parameters(cfg) -> int:
        R_ff = resolve_size(cfg.RMLP_R_FF, hidden_width(cfg))
        return 2 + cfg.RMLP_MIXER * R_ff ** 2 + cfg.RMLP_TOKEN_GATE * (cfg.GPT2_N_EMBD + 1)

    def sizes(self) -> dict:
        return {"d_ff": self.d_ff, "R_ff": self.R_ff}

    @property
    def w_std(self):
        return self.gate_std.square()

    @property
    def w_rec(self):
        return self.gate_rec.square()

    def down_weight(self):
        """W_down [n_embd, d_ff] with the weights and the mixer folded in, in float32 whatever the autocast."""
        weight = self.c_proj.weight
        with torch.autocast(weight.device.type, enabled=False):
            if self.mixer is not None:
                weight = torch.cat([weight[:, :self.d_std], weight[:, self.d_std:] @ self.mixer], dim=1)
            column = torch.cat([self.w_std.expand(self.d_std), self.w_rec.expand(self.R_ff)])
            return weight * column

    def forward(self, x):
        h = F.gelu(self.c_fc(x), approximate="tanh")
        if self.token_gate is not None:
            s = 2 * torch.sigmoid(F.linear(x, self.token_gate[None], self.token_gate_bias))  # [B, T, 1]
            low = torch.arange(self.d_ff, device=x.device) >= self.d_std
            h = h * torch.where(low, s, torch.ones_like(s))
        return self.dropout(F.linear(h, self.down_weight(), self.c_proj.bias))

    @torch.no_grad()
    def collapse(self) -> MLP | None:
        """The baseline MLP that computes the same function; None with a per-token gate, for which none is known."""
        if self.token_gate is not None:
            return None
        plain = MLP(self.c_fc.in_features, self.d_ff, self.dropout.p, self.c_fc.bias is not None).to(self.c_fc.weight)
        plain.c_fc.load_state_dict(self.c_fc.state_dict())
        plain.c_proj.weight.copy_(self.down_weight())
        if self.c_proj.bias is not None:
            plain.c_proj.bias.copy_(self.c_proj.bias)
        return plain.train(self.training)

    def stats(self) -> dict:
        """Scalars for the log."""
        found = {"rmlp_w_std": self.w_std, "rmlp_w_rec": self.w_rec}
        if self.token_gate is not None:
            found["rmlp_gate_alpha"] = 2 * torch.sigmoid(self.token_gate_bias)
        return found
