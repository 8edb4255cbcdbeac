"""A model from a file of the user's own, with nanoGPT's interface, to be trained beside ours.

The file defines GPTConfig (a dataclass with block_size, vocab_size, n_layer, n_head, n_embd, dropout and bias) and GPT(config),
whose forward(idx, targets) gives (logits, loss). Where GPT has configure_optimizers(weight_decay, learning_rate, betas,
device_type), that makes its optimizer; otherwise it is AdamW, with weight decay on tensors of two dimensions and more.

Invariants: the peer gets the sizes, the padded vocabulary and the settings of our baseline, and dropout 0. What it prints goes
to standard error. A file that is no such module, or does not train, raises UserError before anything of ours is built.
"""

import contextlib
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2.model import padded_vocabulary
from lib.errors import UserError
from lib.optimizers import ADAM_EPS

if TYPE_CHECKING:
    from lib.config import Config

USAGE = "give a file with nanoGPT's interface, GPTConfig and GPT(config): make bench-train PEER=/path/model.py."
TRIAL = {"block_size": 8, "vocab_size": 64, "n_layer": 1, "n_head": 1, "n_embd": 64}


class Peer:
    """The module at `path`, tried out on a model of one layer."""

    def __init__(self, path: Path):
        self.path = path
        self.name = f"{path.resolve().parent.name}/{path.name}"
        if not path.is_file():
            raise UserError(f"there is no peer {path}.", USAGE)
        self.module = self._imported()
        missing = [name for name in ("GPT", "GPTConfig") if not hasattr(self.module, name)]
        if missing:
            raise UserError(f"{path} has no {' and no '.join(missing)}.", USAGE)
        model = self._built(TRIAL | {"dropout": 0.0, "bias": True})
        idx = torch.zeros(2, TRIAL["block_size"], dtype=torch.long)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                _, loss = model(idx, idx)
            loss.backward()
        except Exception as error:
            raise UserError(f"GPT of {path} does not give (logits, loss) of (idx, targets) ({_said(error)}).", USAGE) from None

    def _imported(self) -> Any:
        spec = importlib.util.spec_from_file_location("bench_train_peer", self.path)
        if spec is None:
            raise UserError(f"{self.path} is no Python file.", USAGE)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            with contextlib.redirect_stdout(sys.stderr):
                spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{self.path} cannot be imported ({_said(error)}).", USAGE) from None
        return module

    def _built(self, sizes: dict) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return self.module.GPT(self.module.GPTConfig(**sizes))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UserError(f"GPT of {self.path} cannot be built ({_said(error)}).", USAGE) from None

    def build(self, cfg: "Config", device: torch.device, seed: int) -> Any:
        """(model, optimizer) at the sizes and with the settings of `cfg`; what is random is drawn from `seed`."""
        torch.manual_seed(seed)
        model = self._built({
            "block_size": cfg.GPT2_BLOCK_SIZE, "vocab_size": padded_vocabulary(cfg), "n_layer": cfg.GPT2_N_LAYER,
            "n_head": cfg.GPT2_N_HEAD, "n_embd": cfg.GPT2_N_EMBD, "dropout": 0.0, "bias": bool(cfg.GPT2_BIAS)})
        model = model.to(device).train()
        return model, self._optimizer(model, cfg, device)

    def _optimizer(self, model: Any, cfg: "Config", device: torch.device) -> Any:
        betas = (cfg.ADAM_BETA1, cfg.ADAM_BETA2)
        if hasattr(model, "configure_optimizers"):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    return model.configure_optimizers(cfg.WEIGHT_DECAY, cfg.LEARNING_RATE, betas, device.type)
            except Exception as error:
                raise UserError(f"configure_optimizers of {self.path} fails ({_said(error)}).", USAGE) from None
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.WEIGHT_DECAY},
                  {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=cfg.LEARNING_RATE, betas=betas, eps=ADAM_EPS, fused=device.type == "cuda")

    def record(self) -> dict:
        """What names the file without saying where it lies."""
        return {"name": self.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()[:12],
                "own_optimizer": hasattr(self.module.GPT, "configure_optimizers")}


@torch.no_grad()
def take_start(model: torch.nn.Module, from_model: torch.nn.Module) -> bool:
    """Give `model` the weights of `from_model` if their parameters have the same names and shapes, as nanoGPT's and those of
    our baseline do; whether they have."""
    target, source = dict(model.named_parameters()), dict(from_model.named_parameters())
    if {n: p.shape for n, p in target.items()} != {n: p.shape for n, p in source.items()}:
        return False
    for name, parameter in target.items():
        parameter.copy_(source[name])
    return True


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__
