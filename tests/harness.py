"""What several test files share: commands run as a user runs them, copies of the tree, and cells made up on disk."""

import contextlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest

from lib import results
from lib.errors import UserError
from lib.launch import prepare

ROOT = Path(__file__).resolve().parent.parent
TINY = ("MODEL_TINY=y", "DATA_PYSTDLIB=y", "GPT2_MAX_ITERS=250", "DEVICE_CPU=y")
MEASURED = {
    "val_loss": 3.0, "val_perplexity": 20.0855, "val_loss_by_position": None, "best_val_loss": 2.9, "train_loss": 2.8,
    "future_leak": 0.0,
    "iterations": 250,
    "tokens": 256_000, "train_seconds": 20.0, "tokens_per_second": 12_800.0, "budget_progress": 1.0,
    "start_seconds": 1.5, "compile_seconds": 0.0, "eval_seconds": 61.0, "calibration_seconds": 0.0, "checkpoint_seconds": 0.1,
    "other_seconds": 2.0, "resumed": 0, "shared_device": False,
    "parameters": 453_632, "sizes": {}, "kv_cache_bytes": 4096, "kv_cache_parts": {"keys": 2048, "values": 2048},
    "peak_memory_bytes": 300 * 2 ** 20, "compression": None,
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


def run_here(*words) -> subprocess.CompletedProcess:
    """python WORDS (a script, or -m and a module) within this process, which does not have to import torch once more.

    The same code from the same first line; that the commands work in a process of their own is for tests of make and of
    gpt2/test_train_ra_mla.py to say. The command's signal handlers and its changes of sys.path end with it.
    """
    words, out, err = [str(word) for word in words], io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = words[1:] if words[0] == "-m" else words
    code = 0
    try:
        with (mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", list(sys.path)),
              mock.patch.object(os, "_exit", sys.exit),  # which would end the tests, as if all had passed
              contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings()):
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # from an earlier test
            if words[0] == "-m":
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def copy_tree(target: Path) -> Path:
    """The part of the project that configures, plans and reports, to change something in it."""
    target.mkdir(parents=True)
    for name in ("Makefile", "Kconfig"):
        shutil.copy(ROOT / name, target)
    for name in ("lib", "gpt2", "scripts", "defconfigs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


TRAINS_NOTHING = """'Ends its cell at once, with a loss that follows from its step, its seed and its learning rate.'
import json, math, random, sys
from pathlib import Path
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from lib import results
from lib.config import Study
folder = Path(sys.argv[2])
cfg, provenance = Study(config=folder / ".config").config, json.loads((folder / "provenance.json").read_text())
loss = 3 + random.Random(f"{provenance['step']} {cfg.SEED}").gauss(0, 0.01)
loss += math.log(cfg.LEARNING_RATE * cfg.LEARNING_RATE_MULT / 0.01) ** 2
if cfg.SAVE_MODEL:
    (folder / "model.pt").write_bytes(random.Random(cfg.SEED).randbytes(200_000))
(folder / "metrics.jsonl").write_text(json.dumps({"iteration": cfg.GPT2_MAX_ITERS, "val_loss": loss}) + "\\n")
measured = json.loads(Path(__file__).with_suffix(".json").read_text())
measured |= {"val_loss": loss, "iterations": cfg.GPT2_MAX_ITERS, "configuration": cfg.as_json()}
results.write(folder, provenance, "done", **measured)
"""


def copy_tree_that_trains_nothing(target: Path) -> Path:
    """A copy whose trainer is a stand-in without torch: for what make, the plan and the report do with many cells."""
    tree = copy_tree(target)
    (tree / "gpt2/train_ra_mla.py").write_text(TRAINS_NOTHING)
    (tree / "gpt2/train_ra_mla.json").write_text(json.dumps(MEASURED))
    return tree


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


def finish_each(out: Path, cells: list) -> None:
    """The same with losses of their own, a curve, and the configuration each has: what a report takes for a real study."""
    draw = random.Random(0)
    configured = {id(one): one.config.as_json() for one in {id(cell.resolved): cell.resolved for cell in cells}.values()}
    for cell in cells:
        loss = 3 + draw.gauss(0, 0.01)
        finish(out, cell, prepared=False, val_loss=loss, train_loss=loss - 0.1, configuration=configured[id(cell.resolved)],
               train_seconds=20 + draw.random(), tokens_per_second=12_800 + draw.random())
        (out / cell.name / "metrics.jsonl").write_text("".join(
            json.dumps({"iteration": 50 * i, "tokens": 51_200 * i, "train_seconds": 4.0 * i, "val_loss": loss + (5 - i) / 10})
            + "\n" for i in range(1, 6)))


def wait_for(condition, seconds: float = 30.0):
    """What `condition` gives as soon as it gives something; it fails the test if that takes longer."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return value


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
