"""The machine under a cell: device, threads, precision, memory, and the record of all that in metrics.json."""

import contextlib
import hashlib
import platform
import resource
from functools import cache

import torch

from lib.errors import UserError
from lib.paths import ROOT


def setup(cfg) -> torch.device:
    """Set threads and matmul precision as configured and return the device of this cell."""
    if cfg.CPU_THREADS:
        torch.set_num_threads(cfg.CPU_THREADS)
    # TF32 for what autocast leaves in float32; full precision where the configuration says float32.
    torch.set_float32_matmul_precision("high" if cfg.GPT2_AMP_DTYPE == "bfloat16" else "highest")
    if cfg.DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError("CONFIG_DEVICE_CUDA is set, but torch sees no GPU.", "choose DEVICE_AUTO in make menuconfig.")
    return torch.device("cuda" if cfg.DEVICE != "cpu" and torch.cuda.is_available() else "cpu")


def precision(cfg, device: torch.device) -> str:
    """What matmuls compute in: GPT2_AMP_DTYPE on a GPU, float32 on the CPU."""
    return cfg.GPT2_AMP_DTYPE if device.type == "cuda" else "float32"


def autocast(cfg, device: torch.device):
    """The autocast context of forward passes."""
    if precision(cfg, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision(cfg, device)))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated GPU memory, or of this process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def source_hash() -> str:
    """Hash of the code that makes numbers: Python and Kconfig files of gpt2/ and lib/."""
    digest = hashlib.sha256()
    for path in sorted(p for d in ("gpt2", "lib") for p in (ROOT / d).rglob("*") if p.suffix == ".py" or p.name == "Kconfig"):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(cfg, device: torch.device) -> dict:
    """What a reader needs to know to believe a comparison."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "device_type": device.type,
        "precision": precision(cfg, device),
        "compile": cfg.GPT2_COMPILE,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "source_hash": source_hash(),
    }
