"""What several test files share: commands run as a user runs them, copies of the tree, and cells made up on disk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from lib import results
from lib.errors import UserError
from lib.launch import prepare

ROOT = Path(__file__).resolve().parent.parent
TINY = ("MODEL_TINY=y", "DATA_PYSTDLIB=y", "GPT2_MAX_ITERS=250", "DEVICE_CPU=y")
MEASURED = {
    "val_loss": 3.0, "val_perplexity": 20.0855, "best_val_loss": 2.9, "train_loss": 2.8, "iterations": 250,
    "tokens": 256_000, "train_seconds": 20.0, "tokens_per_second": 12_800.0, "budget_progress": 1.0,
    "compile_seconds": 0.0, "eval_seconds": 61.0, "calibration_seconds": 0.0, "checkpoint_seconds": 0.1,
    "other_seconds": 2.0, "resumed": 0,
    "parameters": 453_632, "sizes": {}, "kv_cache_bytes": 4096, "peak_memory_bytes": 300 * 2 ** 20, "compression": None,
    "data": {"name": "pystdlib", "tokenizer": "bytes", "train_tokens": 9_000_000, "train_hash": "fedcba9876543210",
             "eval_hash": "0123456789abcdef", "unigram_entropy": 3.25},
    "environment": {"device": "a CPU", "precision": "float32", "torch": "2.13.0", "compile": False, "threads": 1,
                    "world_size": 1, "source_hash": "0123",
                    "sources": {"lib/loop.py": "0123456789ab", "gpt2/model.py": "ba9876543210"}},
    "configuration": {"BATCH_SIZE": 8, "GPT2_GRADIENT_ACCUMULATION": 1, "GPT2_BLOCK_SIZE": 128, "GPT2_MAX_ITERS": 250},
    "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00",
}


def refusal(call, *arguments, **options) -> tuple[str, str]:
    """The two sentences with which a call refuses its input."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    return raised.value.what, raised.value.run


def run(module, *arguments, tree=ROOT, text=None, **variables):
    """python -m MODULE ARGUMENTS in `tree`, with `variables` in its environment and `text` on its standard input."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=tree, capture_output=True, text=True, timeout=120,
                          input=text, env=os.environ | {k: str(v) for k, v in variables.items()})


def copy_tree(target: Path) -> Path:
    """The part of the project that configures, plans and reports, to change something in it."""
    target.mkdir(parents=True)
    for name in ("Makefile", "Kconfig"):
        shutil.copy(ROOT / name, target)
    for name in ("lib", "gpt2", "scripts", "defconfigs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def replace(path: Path, old: str, new: str) -> None:
    """Change one place of a file."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


def set_default(path: Path, symbol: str, value: str) -> None:
    """Change the last default of a symbol in a Kconfig file."""
    text, count = re.subn(rf"(?ms)^(config {symbol}\n(?:\t[^\n]*\n)*\tdefault )[^\n]*", rf"\g<1>{value}", path.read_text())
    assert count == 1
    path.write_text(text)


def finish(out: Path, *cells, state="done", reason=None, prepared=True, **measured) -> None:
    """Bring cells to an end on disk, as their launchers (unless not `prepared`) and trainers would."""
    with mock.patch("os.fsync"):  # a thousand waits for the disk prove nothing here
        for cell in cells:
            (out / cell.name).mkdir(parents=True, exist_ok=True)
            if prepared:
                prepare(out / cell.name, cell)
            values = MEASURED | measured if state == "done" else measured
            results.write(out / cell.name, cell.provenance(), state, reason, **values)


def snapshot(folder: Path) -> dict:
    """Content and time of every file below."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with open(path := os.path.join(where, name), "rb") as file:
                found[path] = (os.fstat(file.fileno()).st_mtime_ns, file.read())
    return found


class Never:
    """Never asks the loop to stop."""

    asked, training = False, False


class StopAfter(Never):
    """Asks the loop to stop once it has been looked at `steps` times."""

    def __init__(self, steps):
        self.steps = steps

    @property
    def asked(self):
        self.steps -= 1
        return self.steps < 0
