"""The training loop: one cell from its start (or checkpoint) to the end of its budget.

Contract: the budget counts seconds of training steps only; compile, evaluation, saving and the rest (start, logging,
trackers) have clocks of their own, and every second of the process is on one of them. Data
and dropout come from streams keyed by (cell_seed, purpose, iteration), so the position in every stream is the iteration
number, and a resumed run continues bit for bit.

The loop knows no mechanism; what a module of the model may ask of it, and it of the module, is in lib/mechanisms.py. Nor does
it know whether others train the same model: it is one of `group`, whose ranks run this loop alike (lib/ranks.py).
"""

import copy
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lib import finite, generations, gradients, process, ranks, runtime
from lib.config import identity_changes
from lib.data import IGNORED, EvalSet, draw_size, evaluation_set, train_batch, unigram_entropy
from lib.errors import UserError, one_line
from lib.mechanisms import Mechanisms, Moment
from lib.schedule import Budget, learning_rate, tokens_per_iteration
from lib.streams import cell_seed, stream_seed

if TYPE_CHECKING:
    from lib.config import Config
    from lib.data.sources import Corpus

COMPILE_WARMUP_STEPS = 3
POSITIONS = 4  # parts of the context


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is on disk."""


class Diverged(Exception):
    """A loss, a gradient or a weight is no longer finite; the model is as before the step at which that was."""


@dataclass
class Progress:
    """What a run has done so far; all of it is in the checkpoint. Clocks are in seconds."""

    iteration: int = 0
    resumed: int = 0
    rows: int = 0
    best_val_loss: float | None = None
    first_loss: float | None = None  # of the model before its first step, on the first batch
    train_loss: float | None = None
    val_loss: float | None = None
    val_loss_by_position: list[float] | None = None  # of the last evaluation
    inactive: str | None = None
    last_loss: float | None = None  # of the last finite step, as last_norm, that of its gradient
    last_norm: float | None = None
    start_seconds: float | None = None  # from the begin of the last process to its first step
    peak_memory_bytes: int = 0  # of programs and processes before this one
    loss_sum: float = 0.0
    loss_count: int = 0
    eval_hash: str | None = None
    unigram_entropy: float | None = None
    clocks: dict = field(default_factory=lambda: dict.fromkeys(
        ("train", "compile", "eval", "calibration", "checkpoint", "other"), 0.0))


class Clock:
    """Measures one kind of work at a time into `progress.clocks`, waiting for the device at every switch.

    It starts with "other", from `begun` (a time.perf_counter()) on.
    """

    def __init__(self, progress: Progress, device: torch.device, begun: float):
        self.clocks, self.device, self.kind, self.begun, self.since = progress.clocks, device, "other", begun, begun

    def switch(self, kind: str) -> None:
        runtime.synchronize(self.device)
        now = time.perf_counter()
        self.clocks[self.kind] += now - self.since
        self.kind, self.since = kind, now

    def read(self, kind: str) -> float:
        """Seconds of `kind` so far. Between switches the host's clock may run ahead of the device by a few steps."""
        return self.clocks[kind] + (time.perf_counter() - self.since if self.kind == kind else 0.0)


class StopRequest:
    """SIGINT and SIGTERM ask the loop to stop after the current step; before it has begun they end the process.

    Until the first step nothing is lost by leaving at once, and a compiler that is waiting for its helpers would not
    come back soon.
    """

    def __init__(self) -> None:
        self.asked, self.training = False, False
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        if not self.training:
            os._exit(process.EXIT_INTERRUPTED)
        self.asked = True


def train(cfg: "Config", model: torch.nn.Module, optimizer: torch.optim.Optimizer, corpus: "Corpus", folder: Path,
          identity: dict, open_log: Callable[[int], Any], clock: Clock, progress: Progress,
          stop: Any, save_at_end: bool = False, group: ranks.Alone = ranks.ALONE) -> None:
    """Train `model` in place and account for it in `progress`, which is kept in the checkpoints of `folder` and resumed
    from them.

    `identity` is the cell's (a checkpoint of another one, or of other data, is refused with UserError). `open_log(keep)`
    gives a MetricsLog with its first `keep` rows; `stop.asked` ends the run after the current step. `save_at_end`
    writes a checkpoint at the end of the budget too, for a caller that has more to do, and leaves the loss by position to it.
    Raises Interrupted (after saving) and Diverged, on every rank of `group` alike; only its first one saves.
    """
    device, seed = clock.device, cell_seed(cfg)
    micro_batch, parts = ranks.split(cfg, group.size)
    budget, per_iteration = Budget.from_config(cfg), tokens_per_iteration(cfg)
    eval_set = evaluation_set(cfg, corpus)
    data = {"train_hash": corpus.train.fingerprint(), "eval_hash": eval_set.hash}
    training = budget.iterations != 0  # a cell that is only evaluated compiles nothing
    compiling = training and (cfg.GPT2_COMPILE or device.type == "cuda")
    resume(folder, identity, data, model, optimizer, progress, device, group)
    if training and cfg.GPT2_COMPILE:
        compile_model(cfg, model)
    if compiling:
        clock.switch("compile")
        warm_up(cfg, model, optimizer, eval_set, device, group)
        runtime.reset_peak_memory(device)
    mechanisms = Mechanisms(model, group)
    gradient = gradients.of(cfg, model, mechanisms, device, group) if training else None
    evaluation_compiled = not compiling
    clock.switch("other")
    progress.eval_hash, progress.unigram_entropy = eval_set.hash, unigram_entropy(corpus.train, eval_set)
    log = open_log(progress.rows)
    guard = finite.Guard(optimizer, device, progress.iteration, progress.last_loss, progress.last_norm)

    def require_finite(weights: bool = False) -> None:
        found = guard.verdict()
        if weights and not found and (name := finite.not_finite(finite.state_of(model, optimizer))):
            found = f"{name} is not finite after iteration {progress.iteration}"
        if found:
            progress.iteration, *_ = guard.last()
            log.close()
            raise Diverged(found)

    def peak_memory() -> int:
        return group.largest(max(progress.peak_memory_bytes, runtime.peak_memory_bytes(device)))

    def save_checkpoint() -> None:
        clock.switch("checkpoint")
        require_finite(weights=True)
        progress.rows = log.count
        progress.loss_sum, progress.loss_count = loss_sum.item(), loss_count
        _, progress.last_loss, progress.last_norm = guard.last()
        progress.peak_memory_bytes = peak_memory()
        if group.first:
            generations.save(folder, identity=identity, data=data, progress=vars(progress), model=model.state_dict(),
                             optimizer=optimizer.state_dict())
        group.wait()  # who ends now ends with a checkpoint on disk

    def evaluate_and_log(last: bool = False) -> None:
        nonlocal loss_sum, loss_count, evaluation_compiled  # type: ignore[misc]  # set below
        if not evaluation_compiled:  # not before it is needed: a first step need not wait for it
            clock.switch("compile")
            evaluate(cfg, model, itertools.islice(eval_set, 1), device, ranks.ALONE)
            evaluation_compiled = True
            tell_graph_breaks(cfg)
        clock.switch("eval")
        require_finite(weights=last)
        progress.val_loss = evaluate(cfg, model, eval_set, device, group)
        if last and not save_at_end:  # else the caller measures what it makes of the model
            progress.val_loss_by_position = evaluate_by_position(cfg, model, eval_set, device, group)
        if loss_count:
            progress.train_loss = loss_sum.item() / loss_count
        loss_sum, loss_count = torch.zeros((), dtype=torch.float64, device=device), 0
        clock.switch("other")
        best = progress.best_val_loss
        if math.isfinite(progress.val_loss):
            progress.best_val_loss = progress.val_loss if best is None else min(best, progress.val_loss)
        progress.inactive = mechanisms.inactive() if last else None
        log.row(iteration=progress.iteration, tokens=progress.iteration * per_iteration, train_seconds=clock.read("train"),
                progress=budget.progress(progress.iteration, clock.read("train")),
                train_loss=progress.train_loss, train_perplexity=perplexity(progress.train_loss),
                val_loss=progress.val_loss, val_perplexity=perplexity(progress.val_loss),
                best_val_loss=progress.best_val_loss, **mechanisms.statistics(by_layer=True),
                **({"inactive": progress.inactive} if progress.inactive else {}))
        if not math.isfinite(progress.val_loss):
            log.close()
            raise Diverged(f"the validation loss is {progress.val_loss} at iteration {progress.iteration}")

    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
    loss_count = progress.loss_count
    last_loss = None if progress.last_loss is None else loss_sum.new_tensor(progress.last_loss)
    row_iteration, row_seconds = progress.iteration, clock.read("train")
    last_saved = time.monotonic()
    model.train()
    stop.training = True
    runtime.collect_garbage()
    if training:
        clock.switch("train")
        progress.start_seconds = clock.since - clock.begun

    def used() -> float:
        return budget.progress(progress.iteration, clock.read("train"))

    def stale() -> bool:
        return 0 < cfg.CHECKPOINT_INTERVAL < time.monotonic() - last_saved

    while True:
        share, stopping, saving = group.agree(used(), stop.asked, stale())
        if share >= 1:
            break
        if stopping:
            save_checkpoint()
            log.close()
            raise Interrupted
        if saving:
            save_checkpoint()
            last_saved = time.monotonic()
            clock.switch("train")
        moment = Moment(progress.iteration, share, last_loss, progress.first_loss, progress.val_loss)
        if mechanisms.advance(moment) and (compiling or group.size > 1):
            clock.switch("compile")
            gradient = None  # its memory
            group.release()
            if compiling:
                progress.peak_memory_bytes = peak_memory()
                torch.compiler.reset()  # one program at a time, so that no number of changes meets the compiler's limit
                warm_up(cfg, model, optimizer, eval_set, device, group)
                runtime.reset_peak_memory(device)
                evaluation_compiled = False
            gradient = gradients.of(cfg, model, mechanisms, device, group)
            clock.switch("train")
        rate = learning_rate(cfg, progress.iteration, share)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate * parameters["lr_mult"]
        torch.manual_seed(stream_seed(seed, "dropout", progress.iteration, *group.stream))
        logging = (progress.iteration + 1) % cfg.GPT2_LOG_INTERVAL == 0
        step_loss = torch.zeros((), dtype=torch.float64, device=device)
        for micro in range(parts):
            batch = train_batch(corpus.train, seed, progress.iteration, group.rank * parts + micro, micro_batch,
                                cfg.GPT2_BLOCK_SIZE, draw_size(cfg))
            x, y = to_device(batch, device)
            step_loss += gradient(x, y, micro).double() / parts
            process.show_life()
        group.mean(step_loss)
        norm = gradients.clip(model, optimizer, cfg.GRAD_CLIP)
        guard.look(progress.iteration + 1, step_loss, norm)
        optimizer.step()  # changes nothing from the first step on that is not finite
        optimizer.zero_grad(set_to_none=True)
        last_loss = step_loss
        if progress.first_loss is None:
            progress.first_loss = step_loss.item()
        loss_sum += step_loss
        loss_count += 1
        progress.iteration += 1

        if logging:
            clock.switch("other")  # waits for the device, so that the row's seconds are real
            seconds = clock.read("train") - row_seconds
            iterations = progress.iteration - row_iteration
            row_iteration, row_seconds = progress.iteration, clock.read("train")
            log.row(iteration=progress.iteration, tokens=progress.iteration * per_iteration, train_seconds=row_seconds,
                    progress=budget.progress(progress.iteration, row_seconds), train_loss_step=step_loss.item(),
                    learning_rate=rate, grad_norm=norm.item(), forward_time_ms=gradient.forward_timer.milliseconds(),
                    tokens_per_second=iterations * per_iteration / seconds, steps_per_second=iterations / seconds,
                    peak_memory_bytes=group.largest(runtime.peak_memory_bytes(device)), **mechanisms.statistics())
            require_finite()
            clock.switch("train")
        if progress.iteration % cfg.GPT2_EVAL_INTERVAL == 0 and group.agree(used())[0] < 1:
            evaluate_and_log()
            model.train()
            clock.switch("train")

    if save_at_end and training:
        save_checkpoint()
    evaluate_and_log(last=True)
    progress.peak_memory_bytes = peak_memory()
    log.close()


def resume(folder: Path, identity: dict, data: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
           progress: Progress, device: torch.device,
           group: ranks.Alone = ranks.ALONE) -> None:
    """Continue from a checkpoint, if there is one, on every rank from the same. Clocks add up: what this process spent before
    (compiling) stays counted."""
    content = generations.load(folder, device) if group.first else None  # which moves aside what is damaged
    group.wait()
    if not group.first:
        content = generations.load(folder, device)
    found = content["progress"]["iteration"] if content else 0
    if found != (newest := group.largest(found)):
        raise UserError(f"rank {group.rank} finds a checkpoint of iteration {found} in {folder}, another one of {newest}.",
                        "see to it that all hosts have the same folder there, then make.")
    if content is None:
        return
    changes = identity_changes(content["identity"], identity)
    other_data = [f"{name} {content['data'][name][:12]} -> {new[:12]}" for name, new in data.items()
                  if content["data"][name] != new]
    if changes or other_data:
        # lib.archiving finds the changed hashes in the reason of the failed cell, so they stand where nothing is cut off.
        raise UserError(f"checkpoint.pt is of another run: {'; '.join(other_data + changes)}.",
                        f"restore what changed, or move {folder} away, and make." if changes else
                        "restore the data and make RETRY=1, which goes on, or make RETRY=1 as it is, which starts anew.")
    for name, value in content["progress"].items():
        if name != "clocks":
            setattr(progress, name, value)
    for kind, seconds in content["progress"]["clocks"].items():
        progress.clocks[kind] += seconds
    progress.resumed += 1
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])


def compile_model(cfg: "Config", model: torch.nn.Module) -> None:
    """Have torch.compile make programs of the model, or of its regions, at their first use."""
    if cfg.COMPILE_REGIONS:
        lift_compile_limits()  # layers that differ in a Python constant have a program each
        model.compile_regions()  # type: ignore[operator]  # GPT's
    else:
        model.compile(dynamic=False)


def lift_compile_limits() -> None:
    """Any number of programs: what is beyond the compiler's limit would run uncompiled without a word."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10 ** 6


def warm_up(cfg: "Config", model: torch.nn.Module, optimizer: torch.optim.Optimizer, eval_set: Iterable, device: torch.device,
            group: ranks.Alone = ranks.ALONE) -> None:
    """Compile, allocate and choose kernels in a few steps whose effect is undone, off the budget."""
    before, optimizer_before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    batch = next(iter(eval_set))
    gradient = gradients.Gradient(cfg, model, Mechanisms(model), device, group=group)
    micro_batch, _ = ranks.split(cfg, group.size)
    model.train()
    for _ in range(COMPILE_WARMUP_STEPS):
        # evaluation may be in another shape than training
        x, y = to_device([np.resize(part, (micro_batch, part.shape[1])) for part in batch], device)
        gradient(x, y)
        process.show_life()
        gradients.clip(model, optimizer, cfg.GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tell_graph_breaks(cfg)
    model.load_state_dict(before)
    optimizer.load_state_dict(optimizer_before)
    del gradient
    group.release()


def tell_graph_breaks(cfg: "Config") -> None:
    """A line in the log for every reason why Python goes on outside the programs that were made since this was last called: a
    pass is slower for each, and may compile without end."""
    if not cfg.GPT2_COMPILE:  # then the compiler is not even imported
        return
    found = torch._dynamo.utils.counters["graph_break"]
    for reason, times in found.items():
        print(f"graph break, {times} times: {one_line(reason)}", file=sys.stderr)
    found.clear()


@torch.no_grad()
def evaluate(cfg: "Config", model: Any, eval_set: Iterable, device: torch.device,
             group: ranks.Alone = ranks.ALONE) -> float:
    """Mean cross-entropy in nats over the whole evaluation set, whose batches are dealt to the ranks in turn."""
    model.eval()
    total, batches = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in itertools.islice(eval_set, group.rank, None, group.size):
        x, y = to_device(batch, device)
        with runtime.autocast(cfg, device):
            total += model(x, y)[1].double()
        batches += 1
        process.show_life()
    return (group.total(total) / group.total(torch.full_like(total, batches))).item()


@torch.no_grad()
def evaluate_by_position(cfg: "Config", model: Any, eval_set: EvalSet, device: torch.device,
                         group: ranks.Alone = ranks.ALONE) -> list[float] | None:
    """Mean cross-entropy in nats in each of POSITIONS equal parts of the context, from its begin to its end, over the whole
    evaluation set: a pass for each, since a program gives one loss a batch. None for a context of fewer positions."""
    if eval_set.block < POSITIONS:
        return None
    model.eval()
    totals, batches = torch.zeros(POSITIONS, dtype=torch.float64, device=device), 0
    edges = np.linspace(0, eval_set.block, POSITIONS + 1).round().astype(int)
    for x, y in itertools.islice(eval_set, group.rank, None, group.size):
        for part, (begin, end) in enumerate(itertools.pairwise(edges)):
            kept = np.full_like(y, IGNORED)
            kept[:, begin:end] = y[:, begin:end]
            inputs, targets = to_device((x, kept), device)
            with runtime.autocast(cfg, device):
                totals[part] += model(inputs, targets)[1].double()
        batches += 1
        process.show_life()
    return (group.total(totals) / group.total(torch.full_like(totals, batches))).tolist()


def to_device(batch: Any, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A pair of numpy arrays on the device; through pinned memory, so that the copy does not block."""
    tensors = (torch.from_numpy(part) for part in batch)
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(tensors)


def perplexity(loss: float | None) -> float | None:
    """exp(loss); null where the loss is missing or too large for a float."""
    return None if loss is None or not loss < 700 else math.exp(loss)
