"""A copy of the project, tiny studies in it, and what must hold of a study's folder at any moment and at the end.

Invariants that are checked: a file that stands under its own name is whole; a finished cell has the numbers and weights of
a run that nobody disturbed, to the bit; no process outlives its make for long; no two processes train one cell; at the end
nothing is left of what was disturbed, and another make has nothing to do.
"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lib import results
from lib.config import load
from lib.errors import UserError
from lib.paths import ROOT
from scripts.torturing.watching import MARK, Files, processes, send, trained_twice

COPIED = ("Makefile", "Kconfig", "lib", "gpt2", "scripts", "defconfigs")
STUDY = {"MODEL_TINY": "y", "DATA_PYSTDLIB": "y", "GPT2_BLOCK_SIZE": "32", "BATCH_SIZE": "2",
         "GPT2_GRADIENT_ACCUMULATION": "1", "GPT2_EVAL_SAMPLES": "2", "GPT2_EVAL_INTERVAL": "20", "GPT2_LOG_INTERVAL": "2",
         "DEVICE_CPU": "y", "CPU_THREADS": "1", "GPT2_COMPILE": "n", "CHECKPOINT_INTERVAL": "1",
         "JOBS": "1", "STUDY": '"torture"'}
# What studies here differ in.
OF_THE_SETTING = ("OUTPUT_DIR", "DATA_LOCAL_DIR", "CHECKPOINT_INTERVAL", "ABLATION_STEPS", "SEEDS", "JOBS", "CELL_TIMEOUT",
                  "STOP_SECONDS")
OF_THE_MOMENT = ("resumed", "shared_device", "peak_memory_bytes", "tokens_per_second", "started", "finished",
                 "checksum")  # and all *_seconds
OF_THE_MOMENT_IN_ROWS = ("forward_time_ms", "steps_per_second", *OF_THE_MOMENT)
QUIET_SECONDS = 60.0  # within which everything has ended once make has; a cell finishes its step and saves
MAKE_SECONDS = 600.0
TRIES = 3  # at stopping a cell while it trains
NO_PICTURES = "raise ModuleNotFoundError(name='vl_convert')\n"  # they take longer than the cells


class Failed(Exception):
    """The program did not do what it promises; the message says what it did."""


def steps(number: int) -> list[str]:
    """The first steps of the default study."""
    return load("gpt2-ra-ablation").ABLATION_STEPS.split()[:number]


class Arena:
    """A copy of the project below `root`, for cells of so many iterations. `source` is copied; a test gives one with a trainer
    of its own."""

    def __init__(self, root: Path, source: Path = ROOT, iterations: int = 100):
        self.root, self.tree, self.iterations = Path(root), Path(root) / "tree", iterations
        self.tree.mkdir(parents=True)
        for name in COPIED:
            if (source / name).is_dir():
                shutil.copytree(source / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source / name, self.tree / name)
        self.studies: list[Study] = []
        self.lock, self.closed = threading.Lock(), False
        (self.root / "without").mkdir()
        (self.root / "without/vl_convert.py").write_text(NO_PICTURES)

    def study(self, name: str, **options: Any) -> "Study":
        self.studies.append(Study(self, self.root / name, **options))
        return self.studies[-1]

    def close(self) -> None:
        """End what still runs of any study, for good."""
        with self.lock:
            self.closed = True
        for study in self.studies:
            study.kill_all()


class Study:
    """A configured study in `folder`, and make on it. `out` is where its results go (default: in that folder), `path` what
    Python looks into first, `variables` come into the environment."""

    def __init__(self, arena: Arena, folder: Path, out: Path | None = None, path: Path | None = None,
                 variables: dict | None = None, **symbols: Any):
        self.arena, self.folder, self.out, self.variables = arena, folder, out or folder / "out", variables or {}
        self.path = os.pathsep.join(str(p) for p in (path, arena.root / "without") if p)
        folder.mkdir(parents=True)
        own = {"GPT2_MAX_ITERS": str(arena.iterations), "ABLATION_STEPS": f'"{" ".join(steps(1))}"',
               "OUTPUT_DIR": f'"{self.out}"'}
        self.symbols = STUDY | own | symbols
        self.config, self.log = folder / "dot.config", folder / "make.log"
        self.config.write_text("".join(f"CONFIG_{name}={value}\n" for name, value in self.symbols.items() if value))
        self.reader: Any = None
        self.piped = False  # whether a limit on files is not to be one on what is printed
        self.slowest = 0.0  # seconds until the last process of an ended make was gone

    def environment(self) -> dict:
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("GPT2_", "KABLATE_", "MAKE", "MFLAGS", "KCONFIG_"))}
        return clean | {"KCONFIG_CONFIG": str(self.config), "PYTHONPATH": self.path, MARK: str(self.folder)} | self.variables

    def start(self, *arguments: str) -> subprocess.Popen:
        """make in a session of its own. What it prints goes to a file, which nothing that outlives it can keep open to us."""
        return self._start(["make", "--no-print-directory", f"PYTHON={sys.executable}", *arguments])

    def _start(self, words: list[str]) -> subprocess.Popen:
        with self.arena.lock, open(self.log, "wb") as log:
            if self.arena.closed:
                raise Failed("the torture was ended")
            options: dict[str, Any] = {"cwd": self.arena.tree, "stderr": subprocess.STDOUT, "start_new_session": True}
            if not self.piped:
                return subprocess.Popen(words, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, **options)
            self.reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, **options)
            with self.reader.stdin as pipe:
                return subprocess.Popen(words, env=self.environment(), stdin=subprocess.DEVNULL, stdout=pipe, **options)

    def make(self, *arguments: str) -> tuple[int, str]:
        """(exit status, what was printed) of a make that runs to its end, and of which nothing is left then."""
        return self._to_the_end(self.start(*arguments))

    def tool(self, *words: str) -> tuple[int, str]:
        """The same of a tool that is no goal of make's."""
        return self._to_the_end(self._start([sys.executable, "-m", *words]))

    def _to_the_end(self, process: subprocess.Popen) -> tuple[int, str]:
        code = self.wait(process)
        self.settle()
        return code, self.said()

    def said(self) -> str:
        if self.reader:
            self.reader.wait(QUIET_SECONDS)
        return self.log.read_text(errors="replace")

    def wait(self, process: subprocess.Popen, seconds: float = MAKE_SECONDS) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise Failed(f"make did not end within {seconds:g} s") from None

    def processes(self) -> list:
        found = processes(self.folder)
        if twice := trained_twice(found):
            raise Failed(f"two processes train {Path(twice).name} at once")
        return found

    def settle(self, seconds: float = QUIET_SECONDS) -> None:
        """Wait until no process is left; those that stay are orphans."""
        begun = time.monotonic()
        while left := self.processes():
            if time.monotonic() - begun > seconds:
                self.kill_all()
                raise Failed(f"{seconds:g} s after its make ended there still runs: "
                             + ", ".join(f"{process.role} {process.pid}" for process in left))
            time.sleep(0.1)
        self.slowest = max(self.slowest, time.monotonic() - begun)

    def kill_all(self) -> None:
        """End whatever runs of this study, so that nothing outlives the torture itself."""
        for _ in range(100):
            found = processes(self.folder)
            for process in found:
                send(self.folder, process.pid, signal.SIGKILL)
            if not found:
                return
            time.sleep(0.05)

    def cells(self) -> list[Path]:
        return sorted(self.out.glob("test_*"))

    def finish(self, reference: "Reference", attempts: int = 1) -> None:
        """Plain make, again and again, until it succeeds; then everything must be there and equal."""
        for attempt in range(attempts):
            code, said = self.make(*(["RETRY=1"] if attempt else []))
            if code == 0:
                break
        else:
            raise Failed(f"make ends with {code} where nothing disturbs it: {last_lines(said)}")
        self.check_end(reference)

    def check_end(self, reference: "Reference") -> None:
        """Of a study whose make has succeeded."""
        reference.check(self.out)
        if (self.out / "archive").exists():
            raise Failed("a cell was archived, though nothing changed what it is")
        if left := temporaries(self.out):
            raise Failed(f"temporary files are left: {', '.join(left)}")
        if left := sorted(str(path.relative_to(self.out)) for path in self.out.glob("test_*/checkpoint*")):
            raise Failed(f"checkpoints of finished cells are left: {', '.join(left)}")
        self.check_nothing_to_do()

    def check_nothing_to_do(self) -> None:
        before = snapshot(self.cells())
        code, said = self.make("cells")
        if code or "nothing to run" not in said or snapshot(self.cells()) != before:
            raise Failed(f"another make finds something to do: {last_lines(said)}")


class Reference:
    """The results of a run that nothing disturbed, which every other run of the same cells must equal."""

    def __init__(self, study: Study, *arguments: str):
        begun = time.monotonic()
        code, said = study.make(*arguments)
        if code:
            raise Failed(f"the study does not run even where nothing disturbs it: {last_lines(said)}")
        self.study, self.seconds = study, time.monotonic() - begun
        self.records = {cell.name: record_of(cell) for cell in study.cells()}
        self.weights = {cell.name: whole(cell / "model.pt")["model"] for cell in study.cells()}
        self.rows = {cell.name: rows_of(cell) for cell in study.cells()}
        self.configurations = {cell.name: lasting_lines(cell) for cell in study.cells()}

    def first(self) -> "Reference":
        """Of the first step under the first seed alone."""
        part = copy.copy(self)
        named, = steps(1)
        part.records = dict([min(((name, record) for name, record in self.records.items() if record["step"] == named),
                                 key=lambda item: item[1]["seed"])])
        return part

    def check(self, out: Path, names: Any = None, rows: bool = True) -> None:
        """Every cell is there, done, and equal; `names` are the cells expected, if not all. Without `rows`, some may be missing
        from metrics.jsonl."""
        for name in names or self.records:
            if not (out / name / results.NAME).exists():
                raise Failed(f"{name} has no result")
            self.check_cell(out / name)
            found = rows_of(out / name)
            if found != self.rows[name] and (rows or any(row not in self.rows[name] for row in found)):
                raise Failed(f"metrics.jsonl of {name} has other rows than that of an undisturbed run")

    def check_cell(self, cell: Path) -> None:
        """A finished cell: the record and the weights, to the bit."""
        import torch

        found, expected = record_of(cell), self.records[cell.name]
        differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        if differing:
            key = differing[0]
            raise Failed(f"{cell.name}: {', '.join(differing)} differ from an undisturbed run "
                         f"({key}: {found.get(key)!r:.80} for {expected.get(key)!r:.80})")
        found, expected = whole(cell / "model.pt")["model"], self.weights[cell.name]
        if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
            raise Failed(f"{cell.name}: the weights differ from those of an undisturbed run")

    def audit(self, out: Path) -> None:
        """At any moment at which nothing runs: no file under its own name is half, and no result is another's."""
        for path in sorted(p for p in out.rglob("*") if p.is_file() and not p.name.endswith(".tmp")):
            if path.suffix == ".json":
                try:
                    json.loads(path.read_bytes())
                except ValueError as error:
                    raise Failed(f"{path.relative_to(out)} is half a file: {error}") from None
            elif path.suffix == ".pt":
                whole(path)
            elif path.name == ".config" and lasting_lines(path.parent) != self.configurations[path.parent.name]:
                raise Failed(f"{path.relative_to(out)} is not the configuration that was planned")
            elif path.suffix == ".mk" and not path.read_bytes().endswith(b"\n"):
                raise Failed(f"{path.relative_to(out)} is half a file")
        for cell in sorted(out.glob("test_*")):
            record = results.read(cell)
            if record and record["state"] != "failed":
                self.check_cell(cell)


def record_of(cell: Path) -> dict:
    """What of a record must not depend on how often it was disturbed."""
    record = results.read(cell) or {}
    kept = {key: value for key, value in record.items() if key not in OF_THE_MOMENT and not key.endswith("_seconds")}
    if isinstance(kept.get("configuration"), dict):
        kept["configuration"] = {k: v for k, v in kept["configuration"].items() if k not in OF_THE_SETTING}
    return kept


def rows_of(cell: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise Failed(f"{cell.name}/metrics.jsonl cannot be read: {error}") from None
    return [{key: value for key, value in row.items() if key not in OF_THE_MOMENT_IN_ROWS and not key.endswith("_seconds")}
            for row in rows]


def lasting_lines(cell: Path) -> list[str]:
    text = (cell / ".config").read_text(errors="replace")
    return [line for line in text.splitlines() if not re.search(rf"CONFIG_({'|'.join(OF_THE_SETTING)})\b", line)]


def whole(path: Path) -> dict:
    """What a file of tensors holds."""
    from lib import checkpoint

    try:
        return checkpoint.load(path)
    except UserError as error:
        raise Failed(f"half a file: {error.what}") from None


def temporaries(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*.tmp"))


def snapshot(folders: list[Path]) -> dict:
    """Time and size of every file below."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size)
            for folder in folders for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def last_lines(said: str, number: int = 4) -> str:
    return " / ".join(line.strip() for line in said.splitlines()[-number:] if line.strip())


def interrupt(study: Study) -> None:
    """Begin (or resume) the study and stop it once its cell trains: there is a checkpoint then. A cell that was done before it
    could be stopped, on a machine that was busy with something else, is begun anew."""
    for attempt in range(TRIES):
        for cell in study.cells() if attempt else ():
            shutil.rmtree(cell)
        with Files(study.out.parent) as files:
            process = study.start("cells", "RETRY=1")
            while process.poll() is None:
                event = files.next(0.2)
                if event and (event.name, event.what) == ("metrics.jsonl", "written to"):
                    send(study.folder, process.pid, signal.SIGTERM, group=True)
                    break
            study.wait(process)
        study.settle()
        if any(list(cell.glob("checkpoint*.pt")) for cell in study.cells()):
            return
    raise Failed(f"a cell was stopped {TRIES} times and has left no checkpoint: {last_lines(study.said())}")
