"""Attention with a direction per layer: what GPT-2 calls the query may play the key, and the key the query.

    standard     S = softmax(q k^T / sqrt(D) + causal mask) v
    reciprocal   R = softmax(k q^T / sqrt(D) + causal mask) v        q, k, v: [B, H, T, D]

Fixed (the first half of the layers, the second, all): one of them is computed. Learned: a logit l a layer, p = sigmoid(l) is
the probability of R. While the layers are undecided both are computed and

    out = h R + (1 - h) S,    h = [l > 0] + (p - stop_gradient(p))

so the value is that of the likelier direction alone (S at the start, where p = 1/2), in training and in evaluation, and the
logit gets the gradient of the difference. `DirectionController` adds the balance loss (sum p - L/2)^2 until it fixes every
layer at its likelier direction, after DIRECTION_SHARE of the budget and not before DIRECTION_MIN_STEPS steps. From then on
one direction is computed and the logit takes part in nothing.

What is not true of it: nothing flows in another direction. The mask stays, so a token attends to the tokens before it either
way, and SDPA(k, q, v) of a layer is SDPA(q, k, v) of a layer with W_q and W_k (and their biases) exchanged, bit for bit;
both are drawn alike, so a fixed direction is GPT-2 from another start (`collapse` gives that GPT-2). It is neither faster
nor smaller, and as long as it is undecided it is slower, and a cache holds both queries and keys. "No dual computation" and
"learned" exclude each other: a direction that is not computed has no gradient. The balance loss asks for half of the layers
to be relabelled, which cannot matter.

Source: ra-mla-kvsplice-router-fim (there no logit had a gradient, and no layer of the learned step was ever reciprocal).
"""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from gpt2.attention.baseline import CausalSelfAttention
from gpt2.kv_cache import LayerCache
from gpt2.layers import INIT_STD, residual_std

if TYPE_CHECKING:
    from lib.config import Config
    from lib.mechanisms import Moment

UNDECIDED, STANDARD, RECIPROCAL = -1, 0, 1


class Direction(nn.Module):
    """The learned direction of one layer.

    `reciprocal` is what the program of the owner depends on: None as long as the direction is undecided. It follows the
    buffer `decided`, also when a state is loaded.
    """

    structure_parameters = ("logit",)

    decided: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1))
        self.register_buffer("decided", torch.tensor(UNDECIDED, dtype=torch.int8))
        self.reciprocal: bool | None = None

    def probability(self) -> torch.Tensor:
        """Of the reciprocal direction, shape (); once it is decided, 0 or 1."""
        return torch.sigmoid(self.logit[0]) if self.reciprocal is None else self.decided.to(self.logit.dtype)

    def choice(self) -> torch.Tensor:
        """h, shape (): exactly 0 or 1, with the gradient of p."""
        p = self.probability()
        return (self.logit[0] > 0).to(p.dtype) + (p - p.detach())

    def likelier(self) -> bool:
        """Whether the likelier direction is the reciprocal one; waits for the device as long as it is undecided."""
        return self.logit.item() > 0 if self.reciprocal is None else self.reciprocal

    def decide(self) -> None:
        """Keep the likelier direction for good."""
        self.reciprocal = self.likelier()
        self.decided.fill_(RECIPROCAL if self.reciprocal else STANDARD)

    def stats(self) -> dict:
        """`p_recip`."""
        return {"p_recip": self.probability()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        decided = UNDECIDED if self.decided.is_meta else self.decided.item()
        self.reciprocal = None if decided == UNDECIDED else decided == RECIPROCAL


class Directed:
    """An attention with a direction: `fixed`, or where that is None a learned one, `direction`."""

    fixed: bool | None
    direction: Direction | None

    @property
    def reciprocal(self) -> bool | None:
        """The direction that is computed; None computes both."""
        return self.fixed if self.direction is None else self.direction.reciprocal

    def likelier(self) -> bool:
        """Whether the value is that of the reciprocal direction."""
        return self.fixed if self.direction is None else self.direction.likelier()


def configured_direction(cfg: "Config", layer: int) -> bool | None:
    """Whether the layer is reciprocal by configuration; None if it learns that."""
    late = layer >= cfg.GPT2_N_LAYER // 2  # the middle one of an odd number is in the second half
    return None if cfg.DIRECTION_LEARNED else cfg.DIRECTION_ALL or late == cfg.DIRECTION_LATE


class DirectionAttention(Directed, CausalSelfAttention):
    """[B, T, n_embd] -> [B, T, n_embd]. `reciprocal` fixes the direction; None learns it, with one more parameter."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0, bias: bool = True, proj_std: float = INIT_STD,
                 reciprocal: bool | None = None):
        super().__init__(n_embd, n_head, dropout, bias, proj_std)
        self.fixed, self.direction = reciprocal, Direction() if reciprocal is None else None

    def divide_gates(self) -> None:
        """A reciprocal layer takes query and key rows under each other's names."""
        if self.likelier():
            for tensor in (self.c_attn.weight, self.c_attn.bias):
                if tensor is not None:
                    q, k, v = tensor.clone().chunk(3)
                    tensor.copy_(torch.cat([k, q, v]))

    @classmethod
    def from_config(cls, cfg: "Config", layer: int = 0) -> Self:
        return cls(cfg.GPT2_N_EMBD, cfg.GPT2_N_HEAD, cfg.GPT2_DROPOUT, cfg.GPT2_BIAS, residual_std(cfg.GPT2_N_LAYER),
                   configured_direction(cfg, layer))

    @staticmethod
    def extra_parameters(cfg: "Config") -> int:
        return int(cfg.DIRECTION_LEARNED)

    @staticmethod
    def cache_bytes_per_token(cfg: "Config", itemsize: int) -> int:
        """Of a layer as it is built; a learned direction that is decided needs no more than a fixed one."""
        return (3 if cfg.DIRECTION_LEARNED else 2) * cfg.GPT2_N_EMBD * itemsize

    def dead_elements(self) -> dict:
        """The bias of what plays the key, which in the reciprocal direction is the query block."""
        found = super().dead_elements()
        if found and self.likelier():
            found["c_attn.bias"] = slice(0, self.n_embd)
        return found

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Holds what plays the key; of an undecided layer [k | q], because either may."""
        key_dim = self.head_dim if self.reciprocal is not None else 2 * self.head_dim
        return LayerCache(batch_size, self.n_head, capacity, key_dim, dtype, device, value_dim=self.head_dim)

    def attend_both(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache | None) -> torch.Tensor:
        """h R + (1 - h) S."""
        ks, qs, values = k, q, v
        if cache is not None:
            both, values = cache.append(torch.cat([k, q], dim=3), v)
            ks, qs = both.split(self.head_dim, dim=3)
        standard, reciprocal = self.attend(q, ks, values), self.attend(k, qs, values)
        h = self.direction.choice()
        return (h * reciprocal + (1 - h) * standard).to(standard.dtype)

    def forward(self, x: torch.Tensor, cache: LayerCache | None = None, context: Any = None) -> torch.Tensor:
        B, T, E = x.shape
        q, k, v = self.project(x)
        if self.reciprocal is None:
            attended = self.attend_both(q, k, v, cache)
        else:
            if self.reciprocal:
                q, k = k, q
            attended = self.attend(q, *((k, v) if cache is None else cache.append(k, v)))
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).reshape(B, T, E)))

    @torch.no_grad()
    def collapse(self) -> CausalSelfAttention:
        """GPT-2's attention with the rows of W_q and W_k exchanged where the direction is reciprocal."""
        plain = CausalSelfAttention(self.n_embd, self.n_head, self.dropout, self.c_attn.bias is not None).to(self.c_attn.weight)
        q, k, v = torch.arange(3 * self.n_embd, device=self.c_attn.weight.device).split(self.n_embd)
        rows = torch.cat([k, q, v] if self.likelier() else [q, k, v])
        plain.c_attn.load_state_dict({name: p[rows] for name, p in self.c_attn.state_dict().items()})
        plain.c_proj.load_state_dict(self.c_proj.state_dict())
        return plain.train(self.training)


class DirectionController(nn.Module):
    """Decides the learned directions in `blocks`, all at once, and asks for the balance loss until then.

    It has no state of its own: whether they are decided is in their own.
    """

    def __init__(self, cfg: "Config", blocks: nn.ModuleList):
        super().__init__()
        self.directions = tuple(module for module in blocks.modules() if isinstance(module, Direction))
        self.share, self.min_steps, self.strength = cfg.DIRECTION_SHARE, cfg.DIRECTION_MIN_STEPS, cfg.DIRECTION_BALANCE

    @property
    def undecided(self) -> bool:
        return any(direction.reciprocal is None for direction in self.directions)

    def advance(self, moment: "Moment") -> bool:
        """Decide if it is time to; True if so."""
        if not self.undecided or moment.iteration < self.min_steps or moment.progress < self.share:
            return False
        for direction in self.directions:
            direction.decide()
        return True

    def balance(self) -> torch.Tensor | float:
        """(sum p - L/2)^2, shape ()."""
        return (sum(direction.probability() for direction in self.directions) - len(self.directions) / 2) ** 2

    def penalty(self) -> torch.Tensor | float:
        """DIRECTION_BALANCE times the balance loss; 0 once the directions are decided."""
        return self.strength * self.balance() if self.undecided else 0.0

    def stats(self) -> dict:
        """`balance_loss`, without its coefficient; once the directions are decided, that of the decision."""
        return {"balance_loss": self.balance()}

    def inactive(self) -> str | None:
        """Asked at the end of the budget: layers that are undecided have computed both directions throughout."""
        if not self.undecided:
            return None
        return (f"the directions were never fixed: the budget ended before {self.min_steps} steps and {self.share:g} of it "
                "were done")
