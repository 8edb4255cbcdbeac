"""Say, line by line, whether this machine can run the configured study: ok, warning or problem, and what to do about it.

Looks at Python and its packages, torch and the GPU, the compiler, the configuration, the data set and its checksums, the
results folder and its disk, GPT-2's vocabulary and the tracker. Needs nothing but Python itself: what is missing is a line. It
changes nothing. Exit status 1 if there is a problem.
"""

import argparse
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError, one_line, reported
from lib.paths import ROOT, shown

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
TO_TRAIN = ("torch", "numpy", "kconfiglib", "filelock")
# Module: (its package, who needs it).
TO_REPORT = {"scipy": ("scipy", "the report"), "jinja2": ("jinja2", "the report's page"),
             "vl_convert": ("vl-convert-python", "drawing")}
SPARE = 200 * 2 ** 20  # bytes for logs and reports
STATE_BYTES, COPIES = 16, 3  # of a checkpoint per parameter: weights, moments, room; two are kept and one is made


@dataclass(frozen=True)
class Line:
    """One finding. `level` is ok, warning or problem; `advice` what to do, if anything."""

    level: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:8} {one_line(self.what)}" + (f"\n         -> {one_line(self.advice)}" if self.advice else "")


def version(package: str) -> tuple[int, ...] | None:
    """The installed version's numbers; None if it is not installed."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", found.partition("+")[0])[:3])


def pinned(package: str) -> tuple[int, ...] | None:
    """The version that constraints.txt pins."""
    match = re.search(rf"(?m)^{package}==([0-9.]+)", (ROOT / "constraints.txt").read_text())
    return tuple(map(int, match[1].strip(".").split("."))) if match else None


def dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


# Python and packages

def python() -> Iterator[Line]:
    now = sys.version_info[:3]
    if now[:2] < OLDEST_PYTHON:
        yield Line("problem", f"Python {dotted(now)} is too old", f"install Python {dotted(OLDEST_PYTHON)} or newer")
    else:
        yield Line("ok", f"Python {dotted(now)} ({sys.executable})")


def packages() -> Iterator[Line]:
    missing = [name for name in TO_TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        yield Line("problem", f"not installed: {', '.join(missing)}, which training needs",
                   f"make setup, or pip install {' '.join(missing)}")
    unable = [known for module, known in TO_REPORT.items() if importlib.util.find_spec(module) is None]
    for package, what in unable:
        yield Line("warning", f"{package} is not installed, which {what} needs", f"make setup, or pip install {package}")
    if not missing and not unable:
        yield Line("ok", "every package to train and to report is installed")


def torch_version() -> Iterator[Line]:
    now, pin = version("torch"), pinned("torch")
    if now is None:
        return  # said above
    newest = pin or now
    if now[:2] < OLDEST_TORCH:
        yield Line("problem", f"torch {dotted(now)} is older than {dotted(OLDEST_TORCH)}",
                   f"pip install torch=={dotted(newest)}")
    elif now[:2] > newest[:2]:
        yield Line("warning", f"torch {dotted(now)} is newer than {dotted(newest)}, with which the project is tested",
                   f"pip install torch=={dotted(newest)}, if something fails")
    else:
        yield Line("ok", f"torch {dotted(now)} (tested: {dotted(OLDEST_TORCH)} to {dotted(newest[:2])})")


# The configured study

def configuration() -> tuple[Any, Any]:
    """(study, why there is none): the configured one, or the default one where there is no .config."""
    try:
        from lib.config import Study

        return Study(), None
    except UserError as error:
        return None, Line("problem", f"the configuration is refused: {error.what}", error.run)
    except ImportError as error:
        return None, Line("warning", f"the configuration was not read, because {error.name} is not installed", "make setup")


def cells_of(study: Any) -> tuple[Any, Any]:
    """(plan, finding): the study's plan under make's variables, as make plan sees it."""
    from lib.plan import Plan
    from scripts.plan import options_from_environment

    try:
        plan = Plan(options_from_environment())
    except UserError as error:
        return None, Line("problem", f"the study cannot be planned: {error.what}", error.run)
    waiting = sum(runs for _, _, runs in plan.rows())
    where = " (there is no .config, so this is the default study)" if study.is_fallback else ""
    return plan, Line("ok", f"study {study.name}: {len(plan.rows())} cells, {waiting} to run{where}")


def data(config: Any) -> Iterator[Line]:
    from lib.data import open_corpus
    from lib.data.files import repo_path
    from lib.data.shards import verify_prepared
    from lib.data.sources import PREPARED

    try:
        corpus = open_corpus(config)
        if config.DATASET in PREPARED:
            verify_prepared(repo_path(config.DATA_DIR) / config.DATASET)
    except UserError as error:
        yield Line("problem", error.what, error.run)
        return
    checked = ", all checksums right" if config.DATASET in PREPARED else ""
    yield Line("ok", f"data set {corpus.name}: {len(corpus.train):,} + {len(corpus.val):,} tokens, training data "
                     f"{corpus.train.fingerprint()[:12]}{checked}")


def vocabulary(config: Any) -> Iterator[Line]:
    """GPT-2's, for make data and make sample."""
    if config.TOKENIZER != "gpt2":
        yield Line("ok", "GPT-2's vocabulary is not needed: tokens are bytes")
        return
    if importlib.util.find_spec("tiktoken") is None:
        yield Line("warning", "tiktoken is not installed, which make data and make sample need",
                   "make setup, or pip install tiktoken")
        return
    import hashlib

    from lib.data.prepare import GPT2_FILES

    folder = os.environ.get("TIKTOKEN_GPT2_DIR")
    if not folder:
        kept = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        there = os.path.isdir(kept or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
        yield Line("ok", "GPT-2's vocabulary: tiktoken's own cache" if there else
                   "GPT-2's vocabulary will be downloaded by make data (without a network: TIKTOKEN_GPT2_DIR)")
        return
    for name, digest in GPT2_FILES.items():
        try:
            found = hashlib.sha256(Path(folder).expanduser().joinpath(name).read_bytes()).hexdigest()
        except OSError:
            found = None
        if found != digest:
            state = "missing" if found is None else "not the published one"
            yield Line("problem", f"TIKTOKEN_GPT2_DIR={folder}: {name} is {state}",
                       "put OpenAI's published vocab.bpe and encoder.json there")
            return
    yield Line("ok", f"GPT-2's vocabulary is in {folder}")


def results(plan: Any) -> Iterator[Line]:
    """The results folder: may be written, can be locked, and has room for what the study still writes."""
    folder = plan.out
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as probe:
            flaw = lock_flaw(probe.name)
    except OSError as error:
        yield Line("problem", f"{shown(folder)} cannot be written: {error.strerror}",
                   "make OUT=folder with one you may write to")
        return
    if flaw:
        yield Line("problem", f"{shown(folder)} is on a file system whose locks do not work ({flaw}): two makes could run one "
                   "cell, or one make none", "make OUT=folder with one on another file system, or mount it with locks")
    needed, free = disk_needed(plan), shutil.disk_usage(folder).free
    text = f"{shown(plan.out)} may be written; the study still needs about {gibibytes(needed)}, {gibibytes(free)} are free"
    if free < needed:
        yield Line("problem", text, "make room, give another folder with OUT=, or set SAVE_MODEL=n")
    else:
        yield Line("warning" if free < 1.5 * needed else "ok", text)


def lock_flaw(path: Path | str) -> str | None:
    """Why a lock on this file keeps nobody out; None if it does. Cells and plans are locked so."""
    with open(path, "rb+") as one, open(path, "rb+") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
    return "a second lock was given on a locked file"


def disk_needed(plan: Any) -> int:
    """Bytes that the cells still to run will write: a model each, and the checkpoints of those that run side by side."""
    waiting = [cell.resolved.config for cell, _, runs in plan.rows() if runs]
    sizes = sorted(map(parameters, waiting), reverse=True)
    return (sum(4 * parameters(config) for config in waiting if config.SAVE_MODEL)
            + sum(STATE_BYTES * COPIES * size for size in sizes[:plan.jobs]) + (SPARE if waiting else 0))


def parameters(config: Any) -> int:
    """About how many a model has, without building it: GPT-2's own count, and a tenth for mechanisms."""
    width = config.GPT2_N_EMBD
    block = (4 + 2 * config.GPT2_MLP_EXPANSION) * width * width
    return int(1.1 * (config.GPT2_N_LAYER * block + (config.VOCAB_SIZE + config.GPT2_BLOCK_SIZE) * width))


def gibibytes(number: int) -> str:
    return f"{number / 2 ** 30:.1f} GiB"


# GPU, compiler, tracker

def driver() -> tuple[str, str] | None:
    """(names of the GPUs, the driver's version) as nvidia-smi tells them; None without one."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    try:
        done = subprocess.run([program, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.rpartition(", ") for line in done.stdout.splitlines() if ", " in line]
    return (", ".join(row[0] for row in rows), rows[0][2]) if not done.returncode and rows else None


def gpu(config: Any) -> Iterator[Line]:
    wanted, card = config.DEVICE if config else "auto", driver()
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if wanted == "cpu":
        yield Line("ok", f"the study runs on the CPU{f' (there is a GPU: {card[0]})' if card else ''}")
        return
    if torch.cuda.is_available():
        try:
            torch.ones(8, device="cuda").sum().item()
        except RuntimeError as error:
            yield Line("problem", f"the GPU computes nothing: {str(error).splitlines()[0]}",
                       "install a torch built for this GPU, see pytorch.org")
            return
        free, whole = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Line("ok", f"GPU {name}, CUDA {torch.version.cuda}, {gibibytes(free)} of {gibibytes(whole)} free")
        if free < whole / 2:
            yield Line("warning", "more than half of the GPU's memory is in use", "nvidia-smi names the processes")
    elif card and torch.version.cuda is None:
        yield Line("problem" if wanted == "cuda" else "warning",
                   f"there is a GPU ({card[0]}), but torch is built without CUDA",
                   "install a torch with CUDA, see pytorch.org")
    elif card:
        yield Line("problem", f"torch is built for CUDA {torch.version.cuda}, which the driver {card[1]} of {card[0]} does "
                   "not run",
                   "update the driver, or install a torch built for an older CUDA")
    elif wanted == "cuda":
        yield Line("problem", "the study wants CUDA, but there is no NVIDIA driver",
                   "install the driver, or choose DEVICE_AUTO in make menuconfig")
    else:
        yield Line("warning", "there is no GPU, so the study will run on the CPU", "make defconfig-STUDY+tiny fits a CPU")


def compiler(config: Any) -> Iterator[Line]:
    """What torch.compile calls."""
    if not config.GPT2_COMPILE:
        yield Line("ok", "no compiler is needed: GPT2_COMPILE is off")
        return
    advice = "install it (Debian: apt install g++ python3-dev), or set GPT2_COMPILE=n"
    program = next((p for p in (os.environ.get("CXX"), "g++", "clang++") if p and shutil.which(p)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if program is None:
        yield Line("problem", "GPT2_COMPILE is on, but there is no C++ compiler", advice)
    elif not header.is_file():
        yield Line("problem", f"GPT2_COMPILE is on, but Python's header {header} is missing", advice)
    else:
        yield Line("ok", f"torch.compile has {program} and Python's headers")


def tracker(config: Any) -> Iterator[Line]:
    from lib import trackers

    if config.TRACKER == "none":
        yield Line("ok", "no tracker is configured")
    for name in [] if config.TRACKER == "none" else dict.fromkeys(config.TRACKER.replace(",", " ").split()):
        mode = trackers.mode(config, name)
        known = os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
        if name not in trackers.ADAPTERS:
            yield Line("problem", f"there is no tracker {name}", f"set TRACKERS to some of {', '.join(trackers.ADAPTERS)}")
        elif mode != "disabled" and importlib.util.find_spec(name) is None:
            yield Line("warning", f"{name} is not installed, so the run goes on without its tracker",
                       f"pip install {name}, or choose no tracker in make menuconfig")
        elif mode not in trackers.MODES:
            yield Line("problem", f"WANDB_MODE={mode} is no mode", "WANDB_MODE=offline, online or disabled")
        elif name == "wandb" and mode == "online" and not known:
            yield Line("warning", "wandb is to be online, but nobody is logged in",
                       "wandb login, or TRACKER_OFFLINE in make menuconfig (WANDB_MODE comes first)")
        else:
            yield Line("ok", f"tracker {name}, {mode if name == 'wandb' or mode == 'disabled' else 'on this machine'}")


def cores(config: Any) -> Iterator[Line]:
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if there < config.CPU_THREADS:
        yield Line("warning", f"CPU_THREADS={config.CPU_THREADS}, but there are {there} cores", "lower it in make menuconfig")
    else:
        yield Line("ok", f"{there} cores; neither a terminal nor a locale is needed")


def findings() -> Iterator[Line]:
    """Every line, in order. A check that fails itself is a line too: the others are still wanted."""
    study, refused = configuration()
    plan = None
    check: Callable[..., Iterator[Line]]
    for check in (python, packages, torch_version):
        yield from _lines(check)
    if refused:
        yield refused
    else:
        plan, line = cells_of(study)
        yield line
    config = study.config if study else None
    yield from _lines(gpu, config)
    if config:
        for check in (compiler, cores, data, vocabulary, tracker):
            yield from _lines(check, config)
    if plan:
        yield from _lines(results, plan)


def _lines(check: Callable[..., Any], *arguments: Any) -> Iterator[Line]:
    try:
        yield from check(*arguments)
    except Exception as error:
        yield Line("warning", f"{check.__name__} could not be looked at: {type(error).__name__}: {error}",
                   "make setup, if a package is missing or broken")


def main() -> int:
    argparse.ArgumentParser(prog="python -m scripts.doctor", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    levels = []
    for line in findings():
        print(line, flush=True)
        levels.append(line.level)
    problems, warned = levels.count("problem"), levels.count("warning")
    print(f"{problems} problem{'s' * (problems != 1)}, {warned} warning{'s' * (warned != 1)}")
    return 1 if problems else 0


if __name__ == "__main__":
    with reported():
        sys.exit(main())
