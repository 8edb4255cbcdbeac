"""The launcher: runs one cell as a subprocess and brings its state to disk, whatever happens to it.

Contract: returns 0 once the cell's state is on disk (done, diverged, failed, or a checkpoint after its process was
killed), so that make goes on with the other cells; returns 128 + signal when the launcher itself was asked to stop. Only
one launcher runs a cell at a time. The cell gets SIGTERM first; a second signal kills it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from lib import atomic, process, results
from lib.cells import Cell
from lib.config import Config, Resolved
from lib.kconfig import ROOT, shown
from lib.tables import count, duration

POLL_SECONDS = 0.2
PLAIN_LINE_SECONDS = 60.0  # how often a cell reports where there is no terminal to draw on


def read_plan(plan: Path, seed: int, folder: Path, parent: str | None) -> Cell:
    """The cell that a plan file describes, under `seed`."""
    content = json.loads(plan.read_text())
    values = {"STUDY": content["study"], "TRAINER": content["trainer"]}
    resolved = Resolved(Config(values), content["config"], content["identity"], content["symbols"])
    return Cell(content["step"], content["optimizer"], seed, folder.name, resolved, parent)


def prepare(folder: Path, cell: Cell) -> None:
    """Write the cell's .config and provenance.json."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / ".config", cell.resolved.with_seed(cell.seed).text)
    atomic.write_json(folder / "provenance.json", cell.provenance())


def run(folder: Path, plan: Path, seed: int, position: str, parent: str | None) -> int:
    """Run the cell in `folder`; `position` is "3/7" for the display."""
    cell = read_plan(plan, seed, folder, parent)
    title = f"{position:>7}  {cell.step} seed {seed}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if (folder / results.NAME).exists():
                print(f"{title}: another make has finished it meanwhile")
                return 0
            for orphan in folder.glob(".*.tmp"):  # left by a process that died while writing
                orphan.unlink()
            prepare(folder, cell)
            return _run_locked(folder, cell, title, position)
    except Timeout:
        print(f"{title}: another make is running it")
        return 0


def _run_locked(folder: Path, cell: Cell, title: str, position: str) -> int:
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    makes = [os.getppid()] + ([int(os.environ[process.MAKE_VARIABLE])] if os.environ.get(process.MAKE_VARIABLE) else [])
    watch = process.Watch(*makes)
    display = Display(folder, title, position)
    begun = time.monotonic()
    with open(folder / "training.log", "a") as log:
        child = subprocess.Popen([sys.executable, str(ROOT / cell.resolved.config.TRAINER), "--cell", str(folder)], stdout=log,
                                 stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                 env={**os.environ, process.LAUNCHER_VARIABLE: str(os.getpid())})
        forwarded = 0
        while child.poll() is None:
            if watch.ended() and not asked:
                asked.append(signal.SIGTERM)
            if forwarded < len(asked):
                _signal_group(child, signal.SIGKILL if forwarded else signal.SIGTERM)
                forwarded = len(asked)
            display.update()
            time.sleep(POLL_SECONDS)
    _signal_group(child, signal.SIGKILL)  # helpers of the cell, if it left any
    return _conclude(folder, cell, title, display, child.returncode, asked, time.monotonic() - begun)


def _signal_group(child: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def _conclude(folder: Path, cell: Cell, title: str, display, code: int, asked: list[int], seconds: float) -> int:
    record = results.read(folder)
    if record is None and not asked and code not in (0, process.EXIT_INTERRUPTED) and code >= 0:
        record = results.write(folder, cell.provenance(), "failed", failure_reason(folder, code))
    if record is None:
        display.finish(f"{title}: interrupted after {duration(seconds)}; make resumes it")
        if asked:
            return 128 + asked[0]
        return 0 if code < 0 else 128 + signal.SIGTERM
    if record["state"] == "done":
        display.finish(f"{title}: val loss {record['val_loss']:.4f}  {count(record['tokens'])} tokens  "
                       f"{count(record['tokens_per_second'])} tokens/s  {duration(record['train_seconds'])} of training, "
                       f"{duration(seconds)} in all")
    else:
        display.finish(f"{title}: {record['state']}: {record['reason']} (see {shown(folder / 'training.log')})")
    return 128 + asked[0] if asked else 0


def failure_reason(folder: Path, code: int) -> str:
    """One line on why a cell's process ended with `code`: its own error sentence, or the end of its traceback."""
    lines = [line for line in (folder / "training.log").read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines[-50:]):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    last = lines[-1].strip() if lines else "it printed nothing"
    return f"exit status {code}: {last[:300]}"


class Display:
    """One live line a cell on a terminal; a plain line now and then elsewhere, or when cells run side by side."""

    def __init__(self, folder: Path, title: str, position: str):
        parallel = re.search(r"(^| )(-j|--jobserver)", os.environ.get("MAKEFLAGS", ""))
        self.live = sys.stdout.isatty() and not parallel
        self.path, self.title, self.shown_at = folder / "metrics.jsonl", title, time.monotonic()
        number, _, total = position.partition("/")
        self.cells_after = int(total) - int(number)
        self.begun, self.offset, self.row = time.monotonic(), 0, {}
        self.first = None  # (time, progress) of the first row seen, for the time left; a resumed cell does not start at 0

    def update(self) -> None:
        now = time.monotonic()
        if now - self.shown_at < (POLL_SECONDS if self.live else PLAIN_LINE_SECONDS):
            return
        self.shown_at = now
        self._read()
        text = self._text()
        if self.live:
            width = shutil.get_terminal_size().columns
            print("\r\x1b[K" + text[:width - 1], end="", flush=True)
        else:
            print(text, flush=True)

    def finish(self, text: str) -> None:
        print(("\r\x1b[K" if self.live else "") + text, flush=True)

    def _read(self) -> None:
        """Take in the rows written since the last look; a row that is not whole yet is left for the next."""
        try:
            with open(self.path) as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0  # a resumed cell has cut its rows
                file.seek(self.offset)
                for line in file:
                    if not line.endswith("\n"):
                        break
                    self.offset += len(line.encode())
                    self.row |= {k: v for k, v in json.loads(line).items() if v is not None}
        except (OSError, ValueError):
            return

    def _text(self) -> str:
        if "progress" not in self.row:
            return f"{self.title}: starting ({duration(time.monotonic() - self.begun)})"
        now, share = time.monotonic(), self.row["progress"]
        self.first = self.first or (now, share)
        parts = [f"{self.title}: {100 * share:3.0f} %"]
        parts += [f"loss {self.row['train_loss_step']:.3f}"] if "train_loss_step" in self.row else []
        parts += [f"val {self.row['val_loss']:.3f}"] if "val_loss" in self.row else []
        parts += [f"{count(self.row['tokens_per_second'])} tokens/s"] if "tokens_per_second" in self.row else []
        if share > self.first[1]:
            whole = (now - self.first[0]) / (share - self.first[1])
            rest = whole * (1 - share)
            parts.append(f"{duration(rest)} left")
            if self.cells_after:
                start = self.first[0] - self.begun
                parts.append(f"study {duration(rest + (start + whole) * self.cells_after)}")
        return "  ".join(parts)
