"""The machine under a cell: device, threads, precision, memory, and the record of all that in metrics.json.

The record also names the code: a hash of every source file that makes numbers, so that a reader can tell cells that ran
different code from cells that did not. Files that cannot move a number are left out, or mending a report would set cells
apart that are equal.
"""

import contextlib
import gc
import hashlib
import os
import platform
import re
import resource
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib.errors import UserError
from lib.paths import ROOT
from lib.ranks import LOCAL_RANK

if TYPE_CHECKING:
    from lib.config import Config

# What makes no number, files and packages. A module that is not listed counts; when in doubt, list nothing.
MAKES_NO_NUMBER = (
    # Reads results afterwards.
    "lib/anytime.py", "lib/arms.py", "lib/bundle.py", "lib/claims.py", "lib/classes.py", "lib/design.py", "lib/estimate.py",
    "lib/figures.py", "lib/formulas.py", "lib/gates.py", "lib/looks.py", "lib/report", "lib/simulation.py", "lib/stats.py",
    "lib/verdicts.py",
    # Plans and launches: what came of it is in the cell's configuration.
    "lib/archiving.py", "lib/batch_size.py", "lib/cells.py", "lib/cluster.py", "lib/cluster_job.py", "lib/launch.py",
    "lib/makefile.py", "lib/own_process.py", "lib/plan.py", "lib/tables.py", "lib/terminal.py", "lib/tuning.py",
    # Judges mechanisms without training; makes data sets, which are recorded by their own hashes.
    "gpt2/laws.py", "gpt2/function_class.py", "gpt2/fisher.py", "gpt2/routing.py",
    "lib/curvature.py", "lib/data/prepare.py", "lib/data/shards.py",
    # Writes text with a trained model, and measures it.
    "gpt2/sample.py", "gpt2/decode_costs.py", "gpt2/hf_tokenizer.py",
    # Asks a trained model what downstream tasks ask.
    "gpt2/scoring.py", "gpt2/lm_eval_model.py", "lib/lm_eval_tasks.py",
    # Starts processes that read a cell's rows; a cell imports it where a tracker is configured.
    "lib/trackers",
)
# The same for modules that a cell does import: where fragments lie, how errors and failures are worded, who shares a device,
# who starts ranks.
IMPORTED_BUT_MAKES_NO_NUMBER = ("lib/agent.py", "lib/errors.py", "lib/failures.py", "lib/slots.py", "lib/steps.py")


def setup(cfg: "Config") -> torch.device:
    """Set threads and matmul precision as configured and return the device of this cell."""
    if cfg.CPU_THREADS:
        torch.set_num_threads(cfg.CPU_THREADS)
    # TF32 for what autocast leaves in float32; full precision where the configuration says float32.
    torch.set_float32_matmul_precision("high" if cfg.GPT2_AMP_DTYPE == "bfloat16" else "highest")
    if cfg.DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError("CONFIG_DEVICE_CUDA is set, but torch sees no GPU.", "choose DEVICE_AUTO in make menuconfig.")
    device = torch.device("cuda" if cfg.DEVICE != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (rank_here := os.environ.get(LOCAL_RANK)):
        torch.cuda.set_device(int(rank_here))
    return device


def precision(cfg: "Config", device: torch.device) -> str:
    """What matmuls compute in: GPT2_AMP_DTYPE on a GPU, float32 on the CPU."""
    return cfg.GPT2_AMP_DTYPE if device.type == "cuda" else "float32"


def autocast(cfg: "Config", device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of forward passes."""
    if precision(cfg, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision(cfg, device)))


def collect_garbage() -> None:
    """Turn garbage collection on again, if a start has turned it off: it is to look through what is made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated GPU memory, or of this process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, on a GPU; a process's own cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def sources(root: Path = ROOT) -> dict[str, str]:
    """{path from the project's root: first 12 hex digits of its sha256} of the Python files that make numbers.

    What a configuration says is recorded with it, so Kconfig files and step fragments are none of them.
    """
    left_out = MAKES_NO_NUMBER + IMPORTED_BUT_MAKES_NO_NUMBER
    found = {}
    for path in sorted(p for folder in ("gpt2", "lib") for p in (root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(name == one or name.startswith(f"{one}/") for one in left_out):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def source_hash(files: dict[str, str]) -> str:
    """One hash of all that `sources` found."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in files.items()).encode()).hexdigest()[:16]


@cache
def processor() -> str:
    """The name of the CPU's model, or of its architecture where the system does not say."""
    try:
        named = re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not Linux
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def environment(cfg: "Config", device: torch.device, world_size: int = 1) -> dict:
    """What a reader needs to know to believe a comparison. Taken before training, while the files are those that run."""
    files = sources()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device_type": device.type,
        "device_id": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
        "precision": precision(cfg, device),
        "compile": cfg.GPT2_COMPILE,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "world_size": world_size,
        "source_hash": source_hash(files),
        "sources": files,
    }
