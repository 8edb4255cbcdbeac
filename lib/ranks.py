"""Several processes that train one model, each on its share of every step's sequences (data parallelism).

Contract: the global batch of a step is BATCH_SIZE x GPT2_GRADIENT_ACCUMULATION sequences however many ranks there are. A rank
takes one contiguous part of it, in micro-batches that are cut from the same draws in the same order, so the union over ranks
is what one process trains on. Gradients, losses and evaluation sums are reduced over all ranks, so every rank makes the same
optimizer step, and parameters, moments and persistent buffers stay equal. What depends on a clock or on a signal is different
on each: it is agreed on before anybody acts on it. Only the first rank writes.

`ALONE` is what a process without others uses: nothing of torch.distributed is imported, and every method gives back what it
was given. Who starts ranks, and what becomes of the cell when one of them ends, is in lib/agent.py.
"""

import contextlib
import gc
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lib.errors import UserError

if TYPE_CHECKING:
    import torch

    from lib.config import Config

BUCKET_MIB = 25  # gradients that are reduced in one go, while the backward pass goes on with the next
RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"  # as torchrun sets them
LONGEST_WAIT = timedelta(days=1)  # of one rank for another: CELL_TIMEOUT tells a hang from work


def split(cfg: "Config", size: int) -> tuple[int, int]:
    """Sequences of a rank's micro-batch, and how many of these it takes a step, when there are `size` ranks.

    The micro-batch is the largest that divides the rank's share and is no larger than BATCH_SIZE. UserError if the global
    batch cannot be dealt out evenly.
    """
    total = cfg.BATCH_SIZE * cfg.GPT2_GRADIENT_ACCUMULATION
    if total % size:
        fitting = max(n for n in range(1, size) if total % n == 0)
        raise UserError(
            f"a step has {total} sequences (BATCH_SIZE {cfg.BATCH_SIZE} x GPT2_GRADIENT_ACCUMULATION "
            f"{cfg.GPT2_GRADIENT_ACCUMULATION}), which {size} processes cannot share evenly.",
            f"set CONFIG_GPUS_PER_STEP={fitting} in make menuconfig, or a multiple of {size} sequences a step.")
    share = total // size
    micro_batch = max(n for n in range(1, min(share, cfg.BATCH_SIZE) + 1) if share % n == 0)
    return micro_batch, share // micro_batch


def one_process(cfg: "Config") -> bool:
    """Whether a cell has no step to share, or something to compute before its first one that is not shared."""
    return cfg.EVALUATE_ONLY or bool(cfg.KVSPLICE and cfg.INIT_FROM_STEP)


def number() -> int:
    """This process's rank; 0 where it is alone."""
    return int(os.environ.get(RANK) or 0)


class Alone:
    """The only process. Every other form of ranks has these methods, and says what they mean for several."""

    rank, size, first = 0, 1, True
    stream: tuple = ()  # what the purpose of a rank's own random stream ends with

    def agree(self, progress: float, *flags: bool) -> tuple:
        """The first rank's progress, and of each flag whether any rank raises it."""
        return progress, *flags

    def mean(self, value: "torch.Tensor") -> "torch.Tensor":
        """Mean of a tensor over the ranks, in place."""
        return value

    def total(self, value: "torch.Tensor") -> "torch.Tensor":
        """Sum of a tensor over the ranks, in place."""
        return value

    def largest(self, value: int) -> int:
        """The largest over the ranks, of a number of the host."""
        return value

    def wait(self) -> None:
        """Until every rank has come here."""

    def parallel(self, module: Any, changing: bool) -> "torch.nn.Module":
        """`module` with parameters whose gradients are the mean over the ranks. `changing`: some of them may get none."""
        return module

    def unreduced(self, module: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which gradients of what `parallel` gave are only added up."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Free what `parallel` gave, after the last use of it."""

    def leave(self) -> None:
        """The last thing that is done together."""


ALONE = Alone()


class Group(Alone):
    """This process among others, as torchrun's environment says. All of them must call the same methods in the same order.

    Tensors on a GPU travel by NCCL, those of the host by gloo.
    """

    def __init__(self, device: "torch.device"):
        import torch.distributed

        # Otherwise a program is cut wherever a bucket is full: more and smaller ones than one process has.
        torch._dynamo.config.optimize_ddp = False
        self.distributed = torch.distributed
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        self.distributed.init_process_group(backend, timeout=LONGEST_WAIT)
        self.rank, self.size = self.distributed.get_rank(), self.distributed.get_world_size()
        self.first = self.rank == 0
        self.stream = () if self.first else (self.rank,)

    def agree(self, progress: float, *flags: Any) -> tuple:
        import torch

        message = torch.tensor([progress if self.first else 0.0, *map(float, flags)], dtype=torch.float64)
        self.distributed.all_reduce(message, self.distributed.ReduceOp.MAX)
        progress, *raised = message.tolist()
        return progress, *(value > 0 for value in raised)

    def mean(self, value: "torch.Tensor") -> "torch.Tensor":
        return self.total(value).div_(self.size)

    def total(self, value: "torch.Tensor") -> "torch.Tensor":
        self.distributed.all_reduce(value)
        return value

    def largest(self, value: Any) -> Any:
        import torch

        message = torch.tensor(value, dtype=torch.int64)
        self.distributed.all_reduce(message, self.distributed.ReduceOp.MAX)
        return message.item()

    def parallel(self, module: Any, changing: bool) -> "torch.nn.Module":
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # its successor is too new
            return DistributedDataParallel(module, find_unused_parameters=changing, **self.options())

    def options(self) -> dict:
        """How gradients are reduced, in torch's words. Buffers are decisions that every rank makes alike, so none are sent.
        The graph is not declared static: torch then refuses a first step that is made of several micro-batches."""
        return {"broadcast_buffers": False, "gradient_as_bucket_view": True, "bucket_cap_mb": BUCKET_MIB}

    def unreduced(self, module: Any) -> contextlib.AbstractContextManager[Any]:
        return module.no_sync()

    def wait(self) -> None:
        self.largest(0)

    def release(self) -> None:
        gc.collect()  # it refers to itself, and holds as many bytes as the gradients

    def leave(self) -> None:
        self.wait()
        self.distributed.destroy_process_group()


def join(cfg: "Config", device: "torch.device") -> Alone:
    """The ranks of this cell, of which this process is one."""
    if int(os.environ.get(WORLD_SIZE) or 1) == 1 or one_process(cfg):
        return ALONE
    return Group(device)
