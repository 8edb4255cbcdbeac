"""The gradient of a micro-batch: forward pass, penalties, backward pass; the same as a CUDA graph; and its norm's limit.

A small model's kernels end before Python has launched the next ones. A graph is launched at once: a step of the tiny model on
an H100 takes a quarter of its time (docs/performance.md). What is replayed are the very kernels that were captured, so numbers
stay the same; dropout follows torch.manual_seed as it does without a graph. What a graph cannot follow is a decision on the
host, and none is made here: that is what Mechanisms.advance is for, and after it says so the loop captures anew.
"""

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lib import ranks, runtime
from lib.errors import UserError

if TYPE_CHECKING:
    from lib.config import Config
    from lib.mechanisms import Mechanisms

NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class Timer:
    """Milliseconds between `start` and `stop`: on a GPU of its own work, to be read when that is known to be over."""

    def __init__(self, device: torch.device, captured: bool = False):
        if device.type == "cuda":
            # an event of a graph's own would only order its kernels
            outside = {"external": True} if captured else {}
            self.events = [torch.cuda.Event(enable_timing=True, **outside) for _ in range(2)]
        else:
            self.events = None

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self.events:
            self.events[which].record()
        elif which:
            self.seconds += time.perf_counter()  # type: ignore[has-type]  # set by start
        else:
            self.seconds = -time.perf_counter()

    def milliseconds(self) -> float:
        return self.events[0].elapsed_time(self.events[1]) if self.events else 1e3 * self.seconds


class Objective(nn.Module):
    """The loss of a micro-batch, and what is differentiated: the same with penalties. One module of both, so that whoever
    reduces gradients over ranks sees every use of a parameter."""

    def __init__(self, cfg: "Config", model: nn.Module, mechanisms: "Mechanisms"):
        super().__init__()
        self.cfg, self.model, self.mechanisms = cfg, model, mechanisms

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with runtime.autocast(self.cfg, x.device):
            _, loss = self.model(x, y)
        return loss.detach(), loss + self.mechanisms.penalty()


class Gradient:
    """Adds the gradient of a micro-batch, one of `parts` of a step, to the parameters; `forward_timer` is of the last forward
    pass. With the last of them the gradients become the mean over `group`, the ranks of the step.

    The loss that is returned has shape (), is detached, on the device, this rank's, and without penalties; the next call may
    overwrite it.
    """

    def __init__(self, cfg: "Config", model: nn.Module, mechanisms: "Mechanisms", device: torch.device, parts: int = 1,
                 group: ranks.Alone = ranks.ALONE):
        self.model, self.parts, self.group = model, parts, group
        self.objective = group.parallel(Objective(cfg, model, mechanisms), mechanisms.changing())
        self.forward_timer = Timer(device)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, micro: int = 0) -> torch.Tensor:
        """x, y: int64 [B, T] on the device; `micro` counts the micro-batches of a step from 0."""
        with contextlib.nullcontext() if micro == self.parts - 1 else self.group.unreduced(self.objective):
            self.forward_timer.start()
            loss, objective = self.objective(x, y)
            self.forward_timer.stop()
            (objective / self.parts).backward()
        return loss


class Replayed:
    """A `Gradient`, captured for batches of one shape. The model must have computed one before, so that it is compiled and its
    kernels are chosen; gradients that are there are forgotten. `peak_bytes`: the most that was allocated while it was captured.

    The first micro-batch of a step writes the gradients, further ones add to them, so these are two graphs. They write to the
    same tensors in every step, and `grad` of the parameters is set to them before the first.
    """

    def __init__(self, gradient: Gradient, shape: tuple[int, int], device: torch.device):
        self.x, self.y = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(2))
        self.parameters = [p for p in gradient.model.parameters() if p.requires_grad]
        for p in self.parameters:
            p.grad = None
        gradient.forward_timer = self.forward_timer = Timer(device, captured=True)
        torch.cuda.reset_peak_memory_stats(device)
        self.graphs = []
        try:
            for _ in range(min(gradient.parts, 2)):
                self.graphs.append(self._captured(gradient))
        except RuntimeError as error:
            raise UserError(f"a training step cannot be captured as a CUDA graph ({str(error).splitlines()[0]}).",
                            "set CUDA_GRAPHS=n in make menuconfig.") from error
        self.peak_bytes = torch.cuda.max_memory_allocated(device)
        self.grads = [p.grad for p in self.parameters]

    def _captured(self, gradient: Gradient) -> tuple[Any, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graphs[0][0].pool() if self.graphs else None):
            loss = gradient(self.x, self.y)
        return graph, loss

    def __call__(self, x: torch.Tensor, y: torch.Tensor, micro: int = 0) -> torch.Tensor:
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        if not micro:
            for p, grad in zip(self.parameters, self.grads, strict=True):
                p.grad = grad
        graph, loss = self.graphs[min(micro, 1)]
        graph.replay()
        return loss


def of(cfg: "Config", model: nn.Module, mechanisms: "Mechanisms", device: torch.device,
       group: ranks.Alone = ranks.ALONE) -> Gradient | Replayed:
    """As CUDA_GRAPHS says, and where there is no GPU, or more than one rank, without a graph; for a model that has been warmed
    up, and is put into training mode."""
    model.train()
    gradient = Gradient(cfg, model, mechanisms, device, ranks.split(cfg, group.size)[1], group)
    if not (cfg.CUDA_GRAPHS and device.type == "cuda" and group.size == 1):
        return gradient
    return Replayed(gradient, (cfg.BATCH_SIZE, cfg.GPT2_BLOCK_SIZE), device)


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    """Norm of the model's gradient, shape (); in the optimizer's next step it counts as no longer than `limit` (0: as it is).

    On a GPU torch's fused AdamW divides by a factor on its way through memory, which it knows as torch.amp.GradScaler's. For
    others the gradients are scaled in place, which is a pass of its own.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if limit and not (isinstance(optimizer, torch.optim.AdamW) and parameters and parameters[0].is_cuda):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if limit:
        optimizer.grad_scale = ((norm + NORM_EPS) / limit).clamp(min=1)  # type: ignore[attr-defined]  # as GradScaler sets it
    return norm
