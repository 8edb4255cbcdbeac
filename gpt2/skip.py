"""Skip gates: a learned gate a path and layer, and what switches a path off for good.

    factor = sigmoid(logit) / sigmoid(2)        1 at the usual start, so that a gated model starts as the ungated one

While a path is on, its owner multiplies it by `factor`, on the weight side, so the logit gets gradient and no activation is
touched. From SKIP_AFTER of the budget on, `SkipController` looks at all logits every SKIP_CHECK of the budget; a path whose
sigmoid is below one half at three looks in a row goes off and stays off. Its owner then leaves it out of the program: no
matmul, no activation, nothing in the backward graph. The program changes at most once a look and is compiled anew off the
budget. What is off is in the state_dict, so checkpoints, exports and parents keep it.

`compute_ratio` is the training FLOPs of the model as it is over those with every path on, both counted by torch's flop counter
on a model without memory; no formula. A head's channels are computed in eights, what the attention kernels take at a time: a
path of 4 of 64 channels that goes off frees nothing, and compute_ratio then says 1.

Source: geometric-init-skip-gates. What is not true of it: there the threshold had no gradient, so no gate ever moved, and a
later soft form skipped nothing; that layers learn to be skipped, and that 20-30 % of the time is saved, was never measured. A
logit that starts at 2 must lose 2 before anything is saved, which the loss alone does not ask for: see SKIP_PENALTY.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lib.config import Config
    from lib.mechanisms import Moment

NEUTRAL = 2.0
LOOKS = 3


class SkipGate(nn.Module):
    """The gate of one path; `cost` is what its projections multiply per token, for the compute penalty.

    `on` is what the program of the owner depends on; it follows the buffer `off`, also when a state is loaded.
    """

    structure_parameters = ("logit",)

    off: torch.Tensor
    low: torch.Tensor

    def __init__(self, cost: int, start: float = NEUTRAL):
        super().__init__()
        self.cost, self.on = cost, True
        self.logit = nn.Parameter(torch.full((1,), start))
        self.register_buffer("off", torch.zeros((), dtype=torch.bool))
        self.register_buffer("low", torch.zeros((), dtype=torch.int64))  # looks in a row at which it was below one half

    def factor(self) -> torch.Tensor:
        """What the path is multiplied by, [1]."""
        return torch.sigmoid(self.logit) / torch.sigmoid(torch.full_like(self.logit, NEUTRAL))

    def value(self) -> torch.Tensor:
        """sigmoid(logit), of shape (); 0 once the path is off."""
        return torch.sigmoid(self.logit[0]) * ~self.off

    def switch_off(self) -> None:
        self.off.fill_(True)
        self.on = False

    @torch.no_grad()
    def fold(self) -> None:
        """The owner has folded the factor into its weights."""
        self.logit.fill_(NEUTRAL)
        self.logit.requires_grad_(False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.logit.requires_grad_(True)
        self.on = self.off.is_meta or not self.off.item()


def gates(blocks: nn.Module) -> dict[str, SkipGate]:
    """Every skip gate in `blocks`, by dotted name."""
    return {name: module for name, module in blocks.named_modules() if isinstance(module, SkipGate)}


class SkipController(nn.Module):
    """Switches paths of `blocks` off over the budget, asks for the compute penalty, and counts what is left."""

    looked: torch.Tensor

    def __init__(self, cfg: "Config", blocks: nn.ModuleList):
        super().__init__()
        self.cfg, self.gates = cfg, gates(blocks)
        self.after, self.every = cfg.SKIP_AFTER, cfg.SKIP_CHECK
        self.strength = cfg.SKIP_PENALTY / sum(gate.cost for gate in self.gates.values())
        self.register_buffer("looked", torch.tensor(-1))
        self.next_look: float = 0
        self.counted: dict[frozenset, int] = {}  # training FLOPs by what is off

    @torch.no_grad()
    def advance(self, moment: "Moment") -> bool:
        """Look at the gates if it is time to; True if a path went off."""
        if moment.iteration == 0:  # a model that starts from another's keeps what is off, not how often it was looked at
            self.looked.fill_(-1)
            self.next_look = 0
            for gate in self.gates.values():
                gate.low.zero_()
        look = int(moment.progress / self.every + 1e-9)
        if moment.progress < self.after or look < self.next_look:
            return False
        self.next_look = look + 1
        self.looked.fill_(look)
        living = [gate for gate in self.gates.values() if gate.on]
        if not living:
            return False
        logits, looks = torch.cat([gate.logit for gate in living]).tolist(), torch.stack([g.low for g in living]).tolist()
        gone = False
        for gate, logit, low in zip(living, logits, looks, strict=True):
            low = low + 1 if logit < 0 else 0
            gate.low.fill_(low)
            if low >= LOOKS:
                gate.switch_off()
                gone = True
        return gone

    def compute_ratio(self) -> float:
        """Training FLOPs of the model as it is over those with every path on; counting takes a moment, once a change."""
        off = frozenset(name for name, gate in self.gates.items() if not gate.on)
        for state in (off, frozenset()):
            if off and state not in self.counted:
                self.counted[state] = training_flops(self.cfg, state)
        return self.counted[off] / self.counted[frozenset()] if off else 1.0

    def penalty(self) -> torch.Tensor | float:
        """SKIP_PENALTY times the share of the gated multiplications that the gates let through."""
        if not self.strength:
            return 0.0
        return self.strength * sum(gate.cost * torch.sigmoid(gate.logit[0]) for gate in self.gates.values() if gate.on)

    def inactive(self) -> str | None:
        """Until a path is off nothing is skipped: gates that only weigh are one more factor on weights."""
        if not all(gate.on for gate in self.gates.values()):
            return None
        lowest = min(torch.sigmoid(gate.logit).item() for gate in self.gates.values())
        return f"no path went off: the lowest gate ended at {lowest:.2f}, and a path goes off below 0.5"

    def stats(self) -> dict:
        return {"compute_ratio": self.looked.new_tensor(self.compute_ratio(), dtype=torch.float32)}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.next_look = 0 if self.looked.is_meta else self.looked.item() + 1


def training_flops(cfg: "Config", off: frozenset[str] | set[str] = frozenset()) -> int:
    """FLOPs of one forward and backward pass over one sequence, counted, with the gates named in `off` switched off."""
    from torch.utils.flop_counter import FlopCounterMode

    from gpt2.model import GPT

    with torch.device("meta"):
        model = GPT(cfg)
        idx = torch.zeros(1, cfg.GPT2_BLOCK_SIZE, dtype=torch.int64)
    for name, gate in gates(model.transformer.h).items():
        gate.on = name not in off
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(idx, idx)[1].backward()
    return counter.get_total_flops()
