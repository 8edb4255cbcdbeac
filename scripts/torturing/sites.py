"""A full disk at every kind of file that the program writes, one after the other, by a trap on that very write.

Each case says which file is to find no room. What must come of it: somebody was about to write that file; make says so in a
sentence that names the file or a folder of it, or the cell it belongs to is a row that has failed because of the disk; the file
itself is what it was before, or absent; so is everything else of value; no temporary file is left. With room again the same
goal succeeds, and ends as where nothing disturbed it.
"""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from lib import generations, results
from scripts.torturing.arena import Arena, Failed, Reference, Study, last_lines, steps, temporaries
from scripts.torturing.trap import FULL, READ_ONLY, Sprung, Trap
from scripts.torturing.watching import Files

SAID = ("File too large", "No space left on device", "Read-only file system")
# What a try may change although it fails: logs, what is made anew from the plan each time, and the traces of processes.
MADE_ANEW = ("make.log", "cells.mk", "training.log", "metrics.jsonl", ".lock", "source-times.json")
COMPRESSED = {"KVSPLICE": "y", "KVSPLICE_SAMPLES": "512", "KVSPLICE_MAX_BATCHES": "2", "KVSPLICE_EPOCHS": "1"}
HASH = "[0-9a-f]" * 16
OF_A_STUDY = ("out/plan/design.json", f"out/plan/{HASH}.json", f"out/plan/{HASH}.mk", "out/cells.mk", "out/test_*/.config",
              "out/test_*/provenance.json", "out/test_*/training.log", "out/test_*/metrics.jsonl", "out/test_*/checkpoint.pt",
              "out/test_*/kvsplice_*.pt", "out/test_*/model.pt", "out/test_*/metrics.json")
OF_A_REPORT = ("report.md", "report.csv", "report.json", "*.png", "report.html")
OF_THE_DATA = ("val_000000.bin", "progress.json", "train_000000.bin", "corpus.json")

# Stand-ins: no picture is drawn, nothing is downloaded.
PICTURES = """__version__ = "0"


def vegalite_to_png(*_, **__):
    return bytes(1000)


def javascript_bundle(**_):
    return "window.vegaEmbed="
"""
DATASETS = """class Rows(list):
    def skip(self, number):
        return Rows(self[number:])


def load_dataset(*_, **__):
    return {split: Rows({"text": f"{split} {i} " * 50} for i in range(40)) for split in ("train", "validation")}
"""
TOKENS = """class Encoding:
    def encode_ordinary_batch(self, texts, num_threads=1):
        return [list(text.encode()) for text in texts]


def get_encoding(name):
    return Encoding()
"""
# sbatch and squeue on a file of what squeue prints; scancel and srun are never needed.
SLURM = """#!{python}
import re, sys
from pathlib import Path
jobs = Path(__file__).with_name("jobs")
lines = jobs.read_text().splitlines() if jobs.exists() else []
if sys.argv[0].endswith("sbatch"):
    comment, = re.findall("#SBATCH --comment=(.*)", Path(sys.argv[1]).read_text())
    jobs.write_text("\\n".join([*lines, f"{{len(lines) + 1}}|N/A|PENDING||None|{{comment}}"]))
    print("Submitted batch job", len(lines) + 1)
elif sys.argv[0].endswith("squeue"):
    print(*lines, sep="\\n")
"""


def cases(arena: Arena, reference: Reference) -> Iterator[Any]:
    """(name, function) of each case; the function returns a sentence for the table."""
    own = {"full at each file of a study": of_a_study, "full while a stale cell is archived": archived,
           "full while a micro-batch is kept": micro_batch, "full at each file of the report": of_a_report,
           "full while cells are packed and unpacked": packed, "full while data are prepared": of_the_data,
           "full while .config is written": of_the_configuration, "full while cells are submitted": submitted,
           "read-only while a cell trains": read_only_within}
    if importlib.util.find_spec("submitit") is None:
        own.pop("full while cells are submitted")
    for name, function in own.items():
        yield name, lambda function=function: function(arena, reference)


class Trapped:
    """A study with a trap, and what it is tried with."""

    def __init__(self, arena: Arena, name: str, **options: Any):
        self.trap = Trap(arena.root / f"{name}-trap")
        self.study: Study = arena.study(name, path=self.trap.path, **options)
        self.study.piped = True
        self.met = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.study.kill_all()

    def strike(self, file: str, call: Callable, event: str = "open", reference: Reference | None = None,
               grows: str = "") -> str:
        """`call()` -> (exit status, what was said), with no room for `file` (a pattern below the study's folder); row or
        sentence. The file `grows` is written before, for good reason."""
        before = contents(self.study.folder)
        self.trap.arm(self.study.folder / file, FULL, event)
        try:
            code, said = call()
        finally:
            self.trap.disarm()
        told = judged(self.study, self.trap.sprung(), file, code, said)
        struck, but = self.trap.sprung()[0].path, {path for path in before if path.name == grows}
        record = told == "row" and struck.name == results.NAME  # the launcher has had room for that of the failure
        unchanged(self.study.folder, before, but | {struck} if record else but)
        if struck not in before and struck.exists() and struck.name not in MADE_ANEW and not record:
            raise Failed(f"{file}: there is a {struck.name}, which found no room")
        if left := [path.name for path in self.study.folder.rglob(".unpack-*")] + temporaries(self.study.folder):
            raise Failed(f"{file}: what was half written is left: {', '.join(left)}")
        if reference:
            reference.audit(self.study.out)
        self.met += 1
        return told

    def undisturbed(self, call: Callable) -> None:
        code, said = call()
        if code:
            raise Failed(f"with room again it ends with {code}: {last_lines(said)}")


def judged(study: Study, sprung: list[Sprung], file: str, code: int, said: str) -> str:
    """Whether what is said, or the cell's record, is about the file that found no room: "row" or "sentence"."""
    if not sprung:
        raise Failed(f"{file}: nobody has tried to write it: {last_lines(said)}")
    path = sprung[0].path
    if "Traceback" in said:
        raise Failed(f"{file}: a traceback reaches the user: {last_lines(said, 3)}")
    record = results.read(path.parent) if path.parent.parent == study.out else None
    if record and record["state"] == "failed":
        if not record["reason"].startswith("disk: "):
            raise Failed(f"{file}: the row has failed for another reason: {record['reason']}")
        return "row"
    if code == 0:
        raise Failed(f"{file}: make says nothing and goes on: {last_lines(said)}")
    path = path.with_suffix("") if path.suffix == ".old" else path  # the copy of what is to be written
    names = [str(place) for place in (path, *path.parents) if place.is_relative_to(study.folder) and place != study.folder]
    errors = [line for line in said.splitlines() if line.startswith("error: ") and any(why in line for why in SAID)]
    if not any(f" {name} " in f" {line.removeprefix('error: ')} " for line in errors for name in names):
        raise Failed(f"{file}: make does not name {path.relative_to(study.folder)} or its folder: {last_lines(said)}")
    return "sentence"


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of value below, but what has failed, which is tried again."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in MADE_ANEW and not path.name.endswith(".tmp")
            and not (path.name == results.NAME and (results.read(path.parent) or {"state": "failed"})["state"] == "failed")}


def unchanged(folder: Path, before: dict[Path, bytes], but: set[Path]) -> None:
    for path, content in before.items():
        if path.name in generations.NAMES:  # two are kept, of which the newest must be there still
            newest = path.name == generations.NEWEST or path.with_name(generations.NEWEST) not in before
            if newest and not any(other.read_bytes() == content for other in path.parent.glob("checkpoint*.pt")):
                raise Failed(f"{path.relative_to(folder)} is gone")
        elif path not in but and (not path.exists() or path.read_bytes() != content):
            raise Failed(f"{path.relative_to(folder)} is not what it was")


def matrix_of(reference: Reference) -> dict:
    """The symbols that say which cells are in the folder of the undisturbed study."""
    return {name: reference.study.symbols[name] for name in ("ABLATION_STEPS", "SEEDS") if name in reference.study.symbols}


def of_a_study(arena: Arena, reference: Reference) -> str:
    """Whatever a plan, a launcher and a cell that compresses values write; in the end it is as in a whole run."""
    step = {"ABLATION_STEPS": f'"{steps(1)[0]}@{",".join(f"{name}={value}" for name, value in COMPRESSED.items())}"'}
    whole = Reference(arena.study("compressed", **step), "cells")
    told = []
    with Trapped(arena, "full-at-each", **step) as tried:
        for file in OF_A_STUDY:
            told.append(tried.strike(file, lambda: tried.study.make("cells", "RETRY=1"), reference=whole))
        tried.study.finish(whole, attempts=2)
    return f"{len(told)} files: {told.count('row')} failed rows, {told.count('sentence')} refusals, then complete and equal"


def archived(arena: Arena, reference: Reference) -> str:
    """A cell of an older configuration stays where it is, whole, until it can be moved as a whole."""
    with Trapped(arena, "stale", GPT2_MAX_ITERS="2") as tried:
        study = tried.study
        tried.undisturbed(lambda: study.make("cells"))
        cell, = study.cells()
        older = contents(cell)
        study.config.write_text(study.config.read_text().replace("GPT2_MAX_ITERS=2\n", f"GPT2_MAX_ITERS={arena.iterations}\n"))
        for event, file in (("os.mkdir", "out/archive"), ("os.rename", "out/archive/*")):
            tried.strike(file, lambda: study.make("cells"), event, grows="design.json")
        tried.undisturbed(lambda: study.make("cells"))
        kept, = (study.out / "archive").iterdir()
        if {path.relative_to(cell): data for path, data in older.items()} != {
                path.relative_to(kept): data for path, data in contents(kept).items()}:
            raise Failed("what was archived is not the older cell")
        reference.check(study.out)
        study.check_nothing_to_do()
    return "refused, the older cell whole each time; with room it is archived once, and the new one equal"


def micro_batch(arena: Arena, reference: Reference) -> str:
    """batch_size.json, which is written before the first cell where the device is not known to be a CPU."""
    with Trapped(arena, "micro-batch", variables={"CUDA_VISIBLE_DEVICES": ""}, BATCH_SIZE_AUTO="y", DEVICE_CPU=None) as tried:
        tried.strike("out/batch_size.json", lambda: tried.study.make("cells"))
        if tried.study.cells():
            raise Failed("a cell has begun with a micro-batch that is not on record")
        tried.undisturbed(lambda: tried.study.make("cells"))
        json.loads((tried.study.out / "batch_size.json").read_bytes())
        cell, = tried.study.cells()
        name, = reference.records
        if (results.read(cell) or {}).get("val_loss") != reference.records[name]["val_loss"]:
            raise Failed("with the micro-batch found the loss is another than in an undisturbed run")
        tried.study.check_nothing_to_do()
    return "refused before any cell has begun; with room it is kept, and the cell equal"


def of_a_report(arena: Arena, reference: Reference) -> str:
    """Every form of the report, the index of all studies, and what measures models afterwards: the older one stays whole."""
    cache = {"XDG_CACHE_HOME": str(arena.root / "full-at-reports-cache")}
    with Trapped(arena, "full-at-reports", variables=cache, **matrix_of(reference)) as tried:
        study = tried.study
        (tried.trap.path / "vl_convert.py").write_text(PICTURES)
        shutil.copytree(reference.study.out, study.out)

        def report() -> Any:
            return study.make("report")

        def index() -> Any:
            return study.tool("scripts.browse", "--no-serve", str(study.out))

        def fisher() -> Any:
            return study.make("fim")

        tried.undisturbed(report)
        (study.out / "report.html").write_text("an older page")
        for call, files in ((report, [f"out/{name}" for name in OF_A_REPORT]), (index, ["out/index.html"]),
                             (fisher, ["out/test_*/fisher.json"])):
            for file in files:
                tried.strike(file, call)
            tried.undisturbed(call)
            if not all(path.stat().st_size for file in files for path in study.folder.glob(file)):
                raise Failed(f"{', '.join(files)}: not all are there")
        if "an older page" in (study.out / "report.html").read_text():
            raise Failed("with room again report.html is the older one")
        reference.check(study.out)
    return f"{tried.met} files refused, what was there stays; with room they are written"


def packed(arena: Arena, reference: Reference) -> str:
    """An archive, and the cells that are taken out of one."""
    matrix = matrix_of(reference)
    with Trapped(arena, "packed", **matrix) as tried, Trapped(arena, "unpacked", **matrix) as other:
        study, target, archive = tried.study, other.study, tried.study.folder / "cells.tar.xz"
        shutil.copytree(reference.study.out, study.out)
        archive.write_bytes(b"an older archive")
        tried.strike("cells.tar.xz", lambda: study.make("pack", f"FILE={archive}"))
        tried.undisturbed(lambda: study.make("pack", f"FILE={archive}"))
        target.out.mkdir()
        for event, file in (("os.mkdir", "out/.unpack-*"), ("open", "out/.unpack-*/test_*/metrics.json"),
                            ("os.rename", "out/test_*"), ("os.mkdir", "out/plan")):
            if file == "out/plan" and (target.out / "plan").exists():
                continue
            other.strike(file, lambda: target.make("unpack", f"FILE={archive}"), event)
        other.undisturbed(lambda: target.make("unpack", f"FILE={archive}"))
        for cell in study.cells():
            there = target.out / cell.name / results.NAME
            if not there.exists() or there.read_bytes() != (cell / results.NAME).read_bytes():
                raise Failed(f"{cell.name} is not in the study after it was unpacked")
    return f"{tried.met + other.met} times refused, the older archive and the study as before; with room all cells are there"


def of_the_data(arena: Arena, reference: Reference) -> str:
    """make data, whose bytes depend on no interruption."""
    made = {}
    for name in ("whole", "full"):
        symbols = {"DATA_PYSTDLIB": None, "DATA_SHAKESPEARE": "y", "DATA_DIR": f'"{arena.root / f"data-{name}" / "data"}"'}
        with Trapped(arena, f"data-{name}", **symbols) as tried:
            for module, code in (("datasets", DATASETS), ("tiktoken", TOKENS)):
                (tried.trap.path / f"{module}.py").write_text(code)
            for file in OF_THE_DATA if name == "full" else ():
                tried.strike(f"data/shakespeare/{file}", lambda: tried.study.make("data"))
            tried.undisturbed(lambda: tried.study.make("data"))
            folder = tried.study.folder / "data/shakespeare"
            made[name] = {path.name: data for path, data in contents(folder).items()}
    if made["whole"] != made["full"]:
        raise Failed("the data are not those of an undisturbed make data")
    return f"{len(OF_THE_DATA)} files refused; with room the same bytes as undisturbed"


def of_the_configuration(arena: Arena, reference: Reference) -> str:
    """.config and the copy of the one before it."""
    with Trapped(arena, "configuration") as tried:
        study = tried.study
        for goal in ("defconfig-gpt2-ra-ablation+tiny", "olddefconfig"):
            for file in ("dot.config", "dot.config.old"):
                tried.strike(file, lambda goal=goal: study.make(goal))
        tried.undisturbed(lambda: study.make("defconfig-gpt2-ra-ablation+tiny"))
        tried.undisturbed(lambda: study.make("plan"))
    return f"{tried.met} times refused, .config as before; with room it is written"


def submitted(arena: Arena, reference: Reference) -> str:
    """What make slurm has on record before Slurm has the job, with a stand-in for Slurm's tools."""
    tools = arena.root / "slurm"
    tools.mkdir()
    for name in ("sbatch", "squeue", "scancel", "srun"):
        (tools / name).write_text(SLURM.format(python=sys.executable))
        (tools / name).chmod(0o755)
    with Trapped(arena, "submitted", variables={"PATH": f"{tools}:{os.environ['PATH']}"}) as tried:
        study, slurm = tried.study, tried.study.out / "slurm"
        for event, file in (("os.mkdir", "out/slurm"), ("open", "out/slurm/.lock"), ("open", "out/slurm/*.json")):
            tried.strike(file, lambda: study.make("slurm"), event)
            if (tools / "jobs").exists():
                raise Failed(f"{file}: a job that is not on record was submitted")
        tried.undisturbed(lambda: study.make("slurm"))
        code, said = study.make("slurm")
        jobs, records = (tools / "jobs").read_text().splitlines(), list(slurm.glob("*.json"))
        if code or len(jobs) != 2 or len(records) != 2 or "0 of 1 cells to submit, 1 are in the queue" not in said:
            raise Failed(f"{len(jobs)} jobs and {len(records)} records of a cell and its report: {last_lines(said)}")
    return f"{tried.met} times refused before Slurm is asked; with room the cell and the report are submitted once"


def read_only_within(arena: Arena, reference: Reference) -> str:
    """The folder of results cannot be written from an instant in the middle of training on."""
    with Trapped(arena, "read-only-within", CHECKPOINT_INTERVAL="0") as tried:
        study = tried.study
        with Files(study.folder) as files:
            process = study.start("cells")
            while process.poll() is None:
                event = files.next(0.05)
                if event and (event.name, event.what) == ("metrics.jsonl", "written to") and not tried.trap.armed.exists():
                    tried.trap.arm(study.out / "*", READ_ONLY, "any")
        code = study.wait(process)
        study.settle()
        told = judged(study, tried.trap.sprung(), "a cell's folder", code, study.said())
        cell, = study.cells()
        if tried.trap.sprung()[0].path.parent != cell:
            raise Failed(f"it was not the cell that met it: {tried.trap.sprung()[0]}")
        before = contents(study.folder)
        tried.trap.arm(study.out / "*", READ_ONLY, "any")
        code, said = study.make("cells", "RETRY=1")
        judged(study, tried.trap.sprung(), "what make writes first", code, said)
        unchanged(study.folder, before, set())
        tried.trap.disarm()
        study.finish(reference, attempts=2)
    return f"a {told} that names the cell, nothing changed; writable again: complete and equal"
