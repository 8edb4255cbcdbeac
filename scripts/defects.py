"""Plant known defects one by one, in a copy of the project, and say what refuses each: a dry run, make check, make test.

scripts/defects.toml lists them: what implementations of these ideas have had wrong (shared notes and histories of earlier
code), as changes to the sources of this one. A dry run is what goes by that name elsewhere: the step is built, small, and
takes one training step on random tokens; only an error or a loss that is not finite refuses it. make check is asked for the
steps of the defect, and pytest for the tests that are for it. The sources as they are come first: where one of the three
refuses those, it proves nothing, and that is an error.

The table says for each defect who refused it, the summary how many; --out FILE keeps both. The exit status is 1 if a defect
went through all three. The list is chosen, so shares are of this list and of nothing else.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import ROOT
from lib.tables import table

LIST = Path(__file__).with_suffix(".toml")
COPIED = ("Kconfig", "Makefile", "README.md", "pyproject.toml", "defconfigs", "docs", "gpt2", "lib", "scripts", "tests")
STUDY = "gpt2-ra-ablation"
KINDS = ("causality", "decoding", "mechanism", "fairness", "configuration", "records")
PATIENCE = 600  # seconds for what takes some twenty
WAYS = ("dry run", "make check", "make test")
DRY_RUN = """
import sys, torch
from gpt2.laws import SMALL
from gpt2.model import GPT
from lib import optimizers
from lib.config import Study
for step in sys.argv[2:]:
    cfg = Study(sys.argv[1]).resolve(step).config.replace(**SMALL)
    model = GPT(cfg).train()
    tokens = torch.randint(cfg.VOCAB_SIZE, (2, cfg.GPT2_BLOCK_SIZE + 1))
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    optimizers.build(model, cfg).step()
    if not loss.isfinite():
        sys.exit(f"the loss of {step} is not finite")
"""


@dataclass(frozen=True)
class Defect:
    """One entry of the list: `before` becomes `after` in `file`; `steps` of `study` and `tests` are asked."""

    name: str
    kind: str
    steps: list[str]
    file: str
    before: str
    after: str
    tests: list[str]
    study: str = STUDY


def listed(path: Path = LIST) -> list[Defect]:
    """The defects of the list. UserError for one that does not say what it must, or whose text does not stand once."""
    found = []
    for entry in tomllib.loads(path.read_text())["defect"]:
        try:
            defect = Defect(**entry)
        except TypeError as error:
            raise UserError(f"{path.name}: {entry.get('name')}: {error}.", "give it the fields of the others.") from None
        if defect.kind not in KINDS:
            raise UserError(f"{path.name}: {defect.name}: there is no kind {defect.kind}.", f"one of {', '.join(KINDS)}.")
        count = (ROOT / defect.file).read_text().count(defect.before)
        if count != 1:
            raise UserError(f"{path.name}: {defect.name}: its text stands {count} times in {defect.file}.",
                            "give the text that is in the file now, and enough of it to be there once.")
        found.append(defect)
    return found


def refused(command: list[str], folder: Path, seconds: float, **environment: str) -> str | None:
    """What a program said that failed, in a line; None if it succeeded. Not to end in so many seconds is a failure too."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds,
                              env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
                                   "OMP_NUM_THREADS": "1", **environment})
    except subprocess.TimeoutExpired:
        return f"it did not end in {seconds:g} s"
    if not done.returncode:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("BROKEN", "error:", "FAILED", "E  "))), lines[-1] if lines else "")


def tried(folder: Path, steps: list[str], study: str, tests: list[str], seconds: float = PATIENCE) -> dict[str, str | None]:
    """What each of WAYS says of the sources in `folder`: None, or why it refuses them."""
    python = sys.executable
    return dict(zip(WAYS, (refused([python, "-c", DRY_RUN, study, *steps], folder, seconds),
                           refused([python, "-m", "scripts.check", *steps], folder, seconds, STUDY=study),
                           refused([python, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *tests],
                                   folder, seconds)), strict=True))


class Copies:
    """Copies of the project in which one defect at a time is planted."""

    def __init__(self, count: int):
        self.temporary = tempfile.TemporaryDirectory(prefix="kablate-defects-")
        self.free: Queue[Path] = Queue()
        for number in range(count):
            folder = Path(self.temporary.name) / str(number)
            folder.mkdir()
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
                elif source.exists():
                    shutil.copy(source, folder / name)
            self.free.put(folder)

    def plant(self, defect: Defect) -> dict[str, str | None]:
        folder = self.free.get()
        path = folder / defect.file
        whole = path.read_text()
        try:
            path.write_text(whole.replace(defect.before, defect.after))
            return tried(folder, defect.steps, defect.study, defect.tests)
        finally:
            path.write_text(whole)
            self.free.put(folder)

    def untouched(self, defects: list[Defect]) -> dict[str, str | None]:
        """What the ways say of the sources as they are, of everything that the defects ask."""
        folder = self.free.get()
        try:
            said = [tried(folder, list(dict.fromkeys(step for one in defects if one.study == study for step in one.steps)),
                          study, sorted({test for one in defects if one.study == study for test in one.tests}), 10 * PATIENCE)
                    for study in dict.fromkeys(one.study for one in defects)]
        finally:
            self.free.put(folder)
        return {way: next((one[way] for one in said if one[way]), None) for way in WAYS}


def results(defects: list[Defect], jobs: int) -> Iterator[tuple[Defect, dict[str, str | None]]]:
    """Each defect and who refused it why, in the order of the list."""
    copies = Copies(jobs)
    with copies.temporary, ThreadPoolExecutor(jobs) as pool:
        for way, why in copies.untouched(defects).items():
            if why:
                raise UserError(f"the {way} refuses the sources as they are: {why}", "mend that first.")
        yield from zip(defects, pool.map(copies.plant, defects), strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.defects", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORD", help="only defects whose name has one of these words in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="defects at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=os.environ.get("FILE") or None, metavar="FILE.json",
                        help="write what was found to this file (make defects FILE=...)")
    args = parser.parse_args()
    defects = [one for one in listed() if not args.names or any(word in one.name for word in args.names)]
    if not defects:
        raise UserError(f"no defect has {' or '.join(args.names)} in its name.", "leave the words out to see all.")
    rows: list[dict[str, Any]] = []
    for defect, said in results(defects, max(1, args.jobs)):
        rows.append({"name": defect.name, "kind": defect.kind, "file": defect.file, "steps": defect.steps,
                     "refused": {way: why is not None for way, why in said.items()}, "why": said})
        print(f"{defect.name}: {', '.join(way for way in WAYS if said[way]) or 'NOTHING'}", flush=True)
    counts = {kind: {way: sum(row["refused"][way] for row in rows if row["kind"] == kind) for way in WAYS}
              | {"planted": sum(row["kind"] == kind for row in rows)} for kind in KINDS}
    totals = {key: sum(one[key] for one in counts.values()) for key in ("planted", *WAYS)}
    shown = [[kind, one["planted"], *(one[way] for way in WAYS)] for kind, one in counts.items() if one["planted"]]
    print("\n" + table(["kind", "planted", *(f"{way} refuses" for way in WAYS)],
                       [*shown, ["all", *totals.values()]], "lrrrr"), end="")
    if args.out:
        write(args.out, rows, counts, totals)
    return int(any(not any(row["refused"].values()) for row in rows))


def write(path: Path, rows: list[dict], counts: dict, totals: dict) -> None:
    import torch

    from lib import runtime
    from lib.cells import baseline
    from lib.config import Study

    study = Study(STUDY)
    environment = runtime.environment(study.resolve(baseline(study)).config, torch.device("cpu"))
    atomic.write_json(path, {
        "format": 1, "totals": totals, "kinds": counts, "defects": rows,
        "environment": {key: environment[key] for key in ("device", "device_type", "torch", "python", "source_hash")}})


if __name__ == "__main__":
    with reported():
        sys.exit(main())
