"""What random input does: the fuzz tests, and random configurations that are built, checked and trained.

Both are tools of their own (tests/test_fuzz.py, scripts/randconfig.py). Here they run at full size, each in a process of its
own whose output is kept beside the tortured studies, and each must say that it has done as much as was asked for.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.paths import ROOT
from scripts.torturing.arena import Failed, last_lines

FUZZ_CASES, CONFIGURATIONS = 10_000, 200


class Drawn:
    """The two parts, with their logs in `folder`; `seed` draws the configurations, while fuzz cases are others each time."""

    def __init__(self, folder: Path, seed: int, fuzz_cases: int = FUZZ_CASES, configurations: int = CONFIGURATIONS):
        self.folder, self.seed, self.fuzz_cases, self.configurations = folder, seed, fuzz_cases, configurations
        self.processes: list[subprocess.Popen] = []
        self.lock, self.closed = threading.Lock(), False

    def fuzz(self) -> Iterator[Any]:
        yield f"{self.fuzz_cases} cases of what is read from outside", self._fuzz

    def random(self) -> Iterator[Any]:
        yield f"{self.configurations} random configurations", self._random

    def close(self) -> None:
        """End what still runs."""
        with self.lock:
            self.closed = True
            for process in self.processes:
                process.kill()

    def _fuzz(self) -> str:
        said = self._run("fuzz", "-m", "pytest", "-o", "addopts=", "-q", "-s", "-p", "no:cacheprovider", "tests/test_fuzz.py",
                         KABLATE_FUZZ=str(self.fuzz_cases))
        return self._enough(said, r"^(\d+) cases: ", self.fuzz_cases)

    def _random(self) -> str:
        said = self._run("random", "-m", "scripts.randconfig", "--prove", str(self.configurations), KCONFIG_SEED=str(self.seed))
        return self._enough(said, r" (\d+) checked and trained ", self.configurations)

    def _run(self, name: str, *words: str, **variables: str) -> str:
        """What a process prints that must succeed."""
        clean = {key: value for key, value in os.environ.items()
                 if not key.startswith(("GPT2_", "KABLATE_", "MAKE", "MFLAGS", "KCONFIG_", "PYTEST_"))}
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file, self.lock:
            if self.closed:
                raise Failed("it was stopped before it began")
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=clean | variables, stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=subprocess.STDOUT)
            self.processes.append(process)
        code = process.wait()
        said = log.read_text(errors="replace")
        if code:
            raise Failed(f"it ends with {code}, see {log}: {last_lines(said)}")
        return said

    @staticmethod
    def _enough(said: str, pattern: str, wanted: int) -> str:
        """The line that counts, if it counts enough."""
        line = next((line for line in reversed(said.splitlines()) if re.search(pattern, line)), "")
        if not line or int(re.search(pattern, line).group(1)) < wanted:
            raise Failed(f"{wanted} were asked for, and not done: {line or last_lines(said)}")
        return line
