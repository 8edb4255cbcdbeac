"""The launcher: runs one cell as a subprocess and brings its state to disk, whatever happens to it.

Contract: returns 0 once the cell's state is on disk (done, diverged, failed, or interrupted because its process was
killed), so that make goes on with the other cells; returns 128 + signal when the launcher itself was asked to stop. Only
one launcher runs a cell at a time. A cell that is to stop gets SIGTERM first. STOP_SECONDS later, or at a second signal, its
whole group is killed. A cell that shows no progress for CELL_TIMEOUT seconds is stopped so too, and has failed; its log then
says where each of its threads was. A cell that still stops, because its make was killed, is waited for as long as it may take.
"""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from lib import atomic, failures, generations, process, results, slots
from lib.cells import Cell, plan_name
from lib.config import Config, Resolved
from lib.errors import UserError, one_line
from lib.paths import ROOT, shown, user_cache
from lib.tables import count, duration
from lib.terminal import redraws

POLL_SECONDS = 0.2
LOCK_SECONDS = 2.0  # a plan that looks whether a cell runs holds its lock for an instant
REPEAT_SECONDS = 2.0  # one stop can arrive twice (make and its group are both signalled): only a later one is a second
KEY_SECONDS = 0.5  # of Ctrl-C, which a terminal sends once
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}  # would happen again
PLAIN_LINE_SECONDS = 60.0  # how often a cell reports where there is no terminal to draw on


def read_plan(plan: Path, seed: int, folder: Path, parent: str | None) -> Cell:
    """The cell that a plan file describes, under `seed`. The file is named by the hash of its content: a value that has changed
    since must not be run, and recorded, as what was planned."""
    try:
        written = plan.read_bytes()
        if plan_name(written) != plan.stem:
            raise ValueError("its content does not have the hash in its name")
        content = json.loads(written)
        kinds = {str: ("step", "optimizer", "study", "trainer", "config"), dict: ("identity", "symbols", "limits")}
        wrong = [key for kind, keys in kinds.items() for key in keys if not isinstance(content[key], kind)]
        wrong += [key for key in process.LIMITS if type(content["limits"][key]) is not int]
        if wrong:
            raise ValueError(f"its {wrong[0]} is of another kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{shown(plan)} is not what a plan has written ({type(error).__name__}: {error}).",
                        "make again, which writes it anew.") from None
    limits = {key: content["limits"][key] for key in process.LIMITS}
    values = {"STUDY": content["study"], "TRAINER": content["trainer"], **limits}
    resolved = Resolved(Config(values), content["config"], content["identity"], content["symbols"])
    return Cell(content["step"], content["optimizer"], seed, folder.name, resolved, parent)


def prepare(folder: Path, cell: Cell) -> None:
    """Write the cell's .config and provenance.json."""
    atomic.make_folder(folder)
    atomic.write_text(folder / ".config", cell.resolved.with_seed(cell.seed).text)
    atomic.write_json(folder / "provenance.json", cell.provenance())


def run(folder: Path, plan: Path, seed: int, position: str, parent: str | None, retry: bool = False) -> int:
    """Run the cell in `folder`; `position` is "3/7" for the display. One that has failed is run only with `retry`."""
    cell = read_plan(plan, seed, folder, parent)
    title = f"{position:>7}  {cell.step} seed {seed}"
    make = process.number_in(process.MAKE_VARIABLE)
    watch = process.Watch(*([] if make is None else [make]), parent=os.getppid())
    try:
        atomic.make_folder(folder)
        known = results.read(folder)
        with _locked(folder, title, cell.resolved.config.STOP_SECONDS, watch) as lock:
            if record := results.read(folder):
                if record["state"] != "failed" or not retry or known is None:  # None: another make has retried it already
                    print(f"{title}: another make has finished it meanwhile ({record['state']})")
                    return 0
                (folder / results.NAME).unlink()
            atomic.remove_orphans(folder)
            prepare(folder, cell)
            return _run_locked(folder, cell, title, position, watch, lock)
    except Timeout:
        claimed = process.claimed_by(folder / ".lock") is not None
        print(f"{title}: {'another make is running it' if claimed else 'its last process has not stopped'}")
        return 0
    except BrokenPipeError:
        raise
    except OSError as error:  # also where the record of a failed cell finds no room: the cell then counts as interrupted
        raise UserError(f"{shown(folder)} cannot be written: {error.strerror or error}.",
                        "free space or mend the disk, then make again: it goes on from the last checkpoint.") from None


@contextlib.contextmanager
def _locked(folder: Path, title: str, stop_seconds: int, watch: process.Watch) -> Iterator[Any]:
    """Hold the cell's lock, claimed; gives its descriptors. A cell that only stops is waited for, `stop_seconds` at most and
    while make lives. Timeout if another launcher has it, or it does not stop."""
    lock, begun = process.lock(folder / ".lock"), time.monotonic()
    waiting = False
    while True:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
            if process.is_in_place(lock):
                break
            lock.release()  # a plan has archived the folder meanwhile: the next try makes a new one
            if watch.ended():
                raise Timeout(lock.lock_file)
            time.sleep(POLL_SECONDS)
            continue
        except Timeout:
            waited = time.monotonic() - begun
            if process.claimed_by(folder / ".lock") is not None or waited > stop_seconds + LOCK_SECONDS or watch.ended():
                raise
        if not waiting:
            print(f"{title}: its last process still stops, which may take {duration(stop_seconds)}", flush=True)
            waiting = True
    handles = process.held_by_children(lock)
    process.claim(handles)
    try:
        yield handles
    finally:
        lock.release()


def _run_locked(folder: Path, cell: Cell, title: str, position: str, watch: process.Watch, lock: list[int]) -> int:
    asked: list[tuple[int, float]] = []

    def ask(number: int, _: Any = None) -> None:
        process.claim(lock, held=False)
        if not asked or time.monotonic() - asked[-1][1] > (KEY_SECONDS if number == signal.SIGINT else REPEAT_SECONDS):
            asked.append((number, time.monotonic()))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, ask)
    with slots.held(cell.resolved.text, folder, title, lambda: bool(asked) or watch.ended()) as slot:
        if slot is None:
            print(f"{title}: interrupted while it waited for a GPU", flush=True)
            return 128 + (asked[0][0] if asked else signal.SIGTERM)
        return _run_child(folder, cell, title, position, watch, [*lock, *slot.handles], slot.environment, asked, ask)


def _run_child(folder: Path, cell: Cell, title: str, position: str, watch: process.Watch, inherited: list[int],
               variables: dict[str, str], asked: list, ask: Any) -> int:
    """The cell's process from its start to what is known of its end; it inherits these descriptors and variables."""
    display, life, kills = Display(folder, title, position), process.Life(), process.memory_kills()
    limits = cell.resolved.config
    begun, hung, told, killing = time.monotonic(), None, None, False
    with open(folder / "training.log", "a") as log:
        log_start = log.tell()
        child = subprocess.Popen([sys.executable, str(ROOT / cell.resolved.config.TRAINER), "--cell", str(folder)], stdout=log,
                                 stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                 pass_fds=[life.handle, *inherited], env={**os.environ, **bytecode_is_kept(), **variables,
                                                              process.LAUNCHER_VARIABLE: str(os.getpid()),
                                                              process.LIFE_VARIABLE: str(life.handle),
                                                              process.STOP_VARIABLE: str(limits.STOP_SECONDS)})
        try:
            while child.poll() is None:
                silence, now = life.silence(), time.monotonic()
                if watch.ended() and not asked:
                    ask(signal.SIGTERM)
                if limits.CELL_TIMEOUT and silence > limits.CELL_TIMEOUT and not (asked or hung):
                    hung = f"timeout: no progress for {duration(silence)}{display.where()}"
                    with contextlib.suppress(OSError):  # a full disk
                        os.write(log.fileno(), f"no progress for {duration(silence)}: where each thread is\n".encode())
                    _signal(child, process.STACKS_SIGNAL)
                elif (asked or hung) and told is None:  # a poll later, when the stacks are written
                    # To the cell alone: its group holds helpers (compile workers) that it still needs to stop.
                    _signal(child, signal.SIGTERM)
                    told = now
                elif len(asked) + bool(hung) > 1 or told is not None and now - told > limits.STOP_SECONDS:
                    _signal(child, signal.SIGKILL, group=True)
                    killing = True
                display.update()
                time.sleep(POLL_SECONDS)
        except BaseException:  # nobody reads what we print: neither of the two goes on without the other
            _signal(child, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(limits.STOP_SECONDS)
            _signal(child, signal.SIGKILL, group=True)
            child.wait()
            raise
    _signal(child, signal.SIGKILL, group=True)  # helpers of the cell, if it left any
    life.close()
    reason, measured = hung, {}
    if child.returncode == -signal.SIGKILL and not killing and kills is not None and process.memory_kills() > kills:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process of the cell
        reason = (f"{failures.MEMORY}: killed by signal 9 while the kernel, short of memory, was killing processes "
                  f"(peak {peak / 2 ** 30:.1f} GiB)")
        measured = {"peak_memory_bytes": peak}
    conclude(folder, cell, title, display, child.returncode, log_start, time.monotonic() - begun, reason, **measured)
    return 128 + asked[0][0] if asked and results.read(folder) is None else 0  # one that ended anyway is no failure of make's


def bytecode_is_kept() -> dict[str, str]:
    """The environment in which Python keeps the bytecode of what a cell imports: in the user's cache, where torch came without
    it and this process may not write it beside the sources (an image with PYTHONDONTWRITEBYTECODE, another user's
    installation). Every cell would compile some thousand files of torch anew, for 7 s (docs/performance.md)."""
    found = importlib.util.find_spec("torch")
    for folder in map(Path, found.submodule_search_locations if found else ()):
        kept = (folder / "__pycache__").is_dir() or os.access(folder, os.W_OK) and not sys.dont_write_bytecode
        if not (kept or sys.pycache_prefix):
            return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(user_cache() / "bytecode")}
    return {}


def _signal(child: subprocess.Popen, number: int, group: bool = False) -> None:
    try:
        (os.killpg if group else os.kill)(child.pid, number)
    except ProcessLookupError:
        pass


def conclude(folder: Path, cell: Cell, title: str, display: Any, code: int, log_start: int, seconds: float,
             reason: str | None, **measured: Any) -> None:
    """Say how the cell ended, and write the record of one that failed. `code` is its exit status, -N for signal N; `reason` is
    what the launcher itself knows of why, which the log (from byte `log_start` on) does not say, and `measured` what it knows
    besides."""
    record = results.read(folder)
    if record is None and (reason or code not in (0, process.EXIT_INTERRUPTED) and code >= 0 or -code in CRASHES):
        written = (folder / "training.log").read_bytes()[log_start:].decode(errors="replace")
        record = results.write(folder, cell.provenance(), "failed", reason or failures.from_log(written, code), **measured)
    log = shown(folder / "training.log")
    if record is None:
        again = "resumes it" if generations.there(folder) else "starts it anew"
        killed = f" by signal {-code}" if code < 0 else ""
        display.finish(f"{title}: interrupted{killed} after {duration(seconds)}; make {again}")
    elif record["state"] == "done":
        display.finish(f"{title}: val loss {record['val_loss']:.4f}  {count(record['tokens'])} tokens  "
                       f"{count(record['tokens_per_second'])} tokens/s  {duration(record['train_seconds'])} of training, "
                       f"{duration(seconds)} {'since it went on' if record['resumed'] else 'in all'}")
    else:
        display.finish(f"{title}: {record['state']}: {record['reason']} (see {log})")


class Display:
    """One live line a cell on a terminal; a plain line now and then elsewhere, or when cells run side by side."""

    def __init__(self, folder: Path, title: str, position: str):
        self.live = redraws(sys.stdout) and not slots.is_parallel()
        self.path, self.title, self.shown_at = folder / "metrics.jsonl", title, time.monotonic()
        number, _, total = position.partition("/")
        self.cells_after = int(total) - int(number)
        self.begun, self.offset, self.row = time.monotonic(), 0, {}
        # (time, progress) of the first row seen, for the time left; a resumed cell does not start at 0
        self.first: tuple[float, float] | None = None

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

    def where(self) -> str:
        """How far the log says that the cell is: ", after iteration 120"; empty if it does not."""
        self._read()
        return f", after iteration {self.row['iteration']}" if "iteration" in self.row else ""

    def finish(self, text: str) -> None:
        print(("\r\x1b[K" if self.live else "") + one_line(text), flush=True)  # what a cell has said may stand in it

    def _read(self) -> None:
        """Take in the numbers of the rows written since the last look; a row that is not whole yet is left for the next."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0  # a resumed cell has cut its rows
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.offset += len(line)
                    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # damaged: the next one may be whole
                        self.row |= {k: v for k, v in json.loads(line).items() if results.is_number(v)}
        except OSError:
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
