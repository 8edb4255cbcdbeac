"""Starts the ranks of a step on this host, by torchrun's elastic agent, and ends as they do.

Contract: the process that is to train a cell becomes the agent where a step has several ranks (CONFIG_GPUS_PER_STEP); the
ranks run the same command. To the launcher it is the cell: SIGTERM and SIGINT reach every rank, which save and stop together,
and its exit status is theirs. Of several ranks that ended badly the first one counts; what it raised stands last in the log,
because the others only say that they have lost it. A rank that was killed by a signal kills the agent by the same, so that a
cell ends as one of a single process would. Ranks die at once when the agent does.

More hosts: torchrun's own variables PET_NNODES and PET_RDZV_ENDPOINT say how many and where they meet, and the same command
is started on every host. A rank that torchrun has started itself is a rank too. No process is ever started anew: the cell is
resumed from its checkpoint by the next make.
"""

import contextlib
import faulthandler
import math
import os
import re
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import process, ranks
from lib.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from lib.config import Config

# What a rank raises that has lost another.
LOST = re.compile(r"gloo|NCCL|DistBackendError|DistNetworkError|Connection (?:closed|reset)|Broken pipe")
SAID_BY_STATUS = (EXIT_BAD_INPUT, process.EXIT_DISK, process.EXIT_INTERRUPTED)


def wanted(cfg: "Config") -> int:
    """Processes that this host gives to a step of the cell: CONFIG_GPUS_PER_STEP, or all GPUs that torch sees; 1 in a process
    that is a rank already. UserError if so many cannot be had, or cannot share a step."""
    if os.environ.get(ranks.RANK) or ranks.one_process(cfg):
        return 1
    there = 0
    if cfg.DEVICE != "cpu":
        from torch import cuda

        there = cuda.device_count()
    if 0 < there < cfg.GPUS_PER_STEP:
        raise UserError(f"CONFIG_GPUS_PER_STEP is {cfg.GPUS_PER_STEP}, but this cell sees {there} of the GPUs.",
                        f"set CONFIG_GPUS_PER_STEP={there} in make menuconfig, or 0 for all that it sees.")
    size = cfg.GPUS_PER_STEP or there or 1
    ranks.split(cfg, size * hosts())
    return size


def elsewhere(cfg: "Config") -> bool:
    """Whether ranks of other hosts are to meet those of this one, which are not started yet."""
    return not os.environ.get(ranks.RANK) and not ranks.one_process(cfg) and hosts() > 1


def hosts() -> int:
    """PET_NNODES, torchrun's variable; UserError for a range: the world does not change while a cell runs."""
    text = os.environ.get("PET_NNODES", "1")
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise UserError(f"PET_NNODES={text} is no number of hosts.", "set it to how many hosts a step has, or unset it.")
    if int(text) > 1 and not os.environ.get("PET_RDZV_ENDPOINT"):
        raise UserError(f"PET_NNODES is {text}, but PET_RDZV_ENDPOINT does not say where they meet.",
                        "set it to HOST:PORT of one of them, the same everywhere.")
    return int(text)


def run(command: list[str], size: int) -> int:
    """Run `command` as `size` ranks on this host and return their exit status."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    here = hosts() == 1
    meeting = RendezvousParameters(
        backend="c10d", endpoint="localhost:0" if here else os.environ["PET_RDZV_ENDPOINT"],
        min_nodes=hosts(), max_nodes=hosts(),
        run_id=str(uuid.uuid4()) if here else os.environ.get("PET_RDZV_ID", "none"), local_addr="localhost" if here else None)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    process.adopt()
    with tempfile.TemporaryDirectory(prefix="kablate-ranks-") as folder:
        spec = WorkerSpec(role="rank", local_world_size=size, entrypoint=command[0], args=tuple(command[1:]), max_restarts=0,
                          rdzv_handler=registry.get_rendezvous_handler(meeting), monitor_interval=0.1,
                          local_addr=meeting.local_addr)
        agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))
        stop = Forward(agent)
        result = agent.run()
        spec.rdzv_handler.shutdown()
        if not result.is_failed():
            return 0
        rank, failure = first(result.failures)
        status = failure.exitcode
        if stop.asked and (status < 0 or status not in SAID_BY_STATUS):
            return process.EXIT_INTERRUPTED  # a rank that had no handler yet, or that lost one that had left
        if status not in SAID_BY_STATUS:
            print(f"rank {rank} of {size * hosts()} ended first, {ending(status)}; the others cannot go on without it",
                  file=sys.stderr, flush=True)
            print(raised(failure), end="", file=sys.stderr, flush=True)
    if status < 0:
        if -status != signal.SIGKILL:  # for which there is nothing to set back
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


class Forward:
    """Passes on to the ranks what the agent is asked for: to stop (`asked`), or where they are."""

    def __init__(self, agent: Any):
        self.agent, self.asked = agent, False
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)
        faulthandler.unregister(process.STACKS_SIGNAL)
        signal.signal(process.STACKS_SIGNAL, lambda number, _: self._send(number))

    def _stop(self, *_: Any) -> None:
        self.asked = True
        if not self._send(signal.SIGTERM):
            sys.exit(process.EXIT_INTERRUPTED)  # nothing has begun

    def _send(self, number: int) -> list[int]:
        """To every rank itself, not to its group, which holds helpers that it needs to stop."""
        workers = [worker.id for worker in self.agent.get_worker_group().workers if worker.id is not None]
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return workers


def record(error: BaseException) -> None:
    """In a rank: leave `error` for the agent, which says what the first of several has raised. No effect elsewhere."""
    if os.environ.get(ranks.RANK):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def first(failures: dict) -> tuple:
    """(rank, failure) of the one that ended before the others lost it. Who says why has a reason of its own: by its status, or
    by an error that is not the loss of another rank; of several the one that was the first to record it. Then who was killed
    by a signal (the agent itself kills who is left half a minute after the first, so an error comes before), who just ended,
    who has lost another, and who was only asked to stop, which is what the agent does when one has ended."""
    def order(found: Any) -> Any:
        rank, failure = found
        recorded = Path(failure.error_file)
        status, said = failure.exitcode, raised(failure)
        if status in (-signal.SIGTERM, process.EXIT_INTERRUPTED):
            kind = 4
        elif status in SAID_BY_STATUS:
            kind = 0
        elif status < 0:
            kind = 1
        else:
            kind = 2 if not said else 3 if LOST.search(said) else 0
        return kind, recorded.stat().st_mtime_ns if recorded.is_file() else math.inf, rank

    return min(failures.items(), key=order)


def ending(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with exit status {status}"


def raised(failure: Any) -> str:
    """The traceback that a rank has recorded; empty if it has not."""
    said = failure.error_file_data.get("message", "")
    return said.get("extraInfo", {}).get("py_callstack", "") if isinstance(said, dict) else ""
