"""A study's finished cells as one small archive, so that cells which ran on several machines make one study.

Contract: `pack` puts the record and the logs of every finished cell into a tar.xz, and the plans they ran by; never
weights, checkpoints or locks. Equal cells give equal bytes. A name that ends in .gz asks for gzip, of more than twice the
size. `unpack` takes an archive for what a stranger has sent: names of an exact pattern, regular files, bounded sizes, and
all of it is judged before anything of the study is touched. A cell then appears whole, by a rename, and counts as done
because its identity is that of the configured study's cell. What is finished here is never replaced; what is replaced goes
to archive/.

What was measured of a cell's model afterwards (fisher.json and its like; lm_eval.json with the items of its tasks) travels
with it and is no part of its result: it does not make two results differ, and is added to a finished cell that has none.
"""

import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lib import atomic, design, process, results, tuning
from lib.archiving import archive
from lib.cells import FINISHED, LONGEST_NAME, SEED_LIMIT, expand, inspect, is_locked, plan_name
from lib.errors import UserError
from lib.paths import shown
from lib.plan import Plan

CELL_FILES = (".config", "provenance.json", "metrics.json", "metrics.jsonl", "training.log")
NEEDED = CELL_FILES[:3]
# What needs the weights, of scripts/describing and scripts/lm_eval.py: {the file that says what was measured: others of it}.
AFTERWARDS = {"fisher.json": None, "curvature.json": None, "routing.json": None,
              "lm_eval.json": re.compile(r"lm_eval_[A-Za-z0-9_-]{1,200}\.jsonl")}
CELL = re.compile(r"test_[A-Za-z0-9_.+-]+")
NAMES = [*map(re.escape, (*CELL_FILES, *AFTERWARDS)), *(others.pattern for others in AFTERWARDS.values() if others)]
MEMBER = re.compile(rf"({CELL.pattern})/(?:{'|'.join(NAMES)})|plan/(?:[0-9a-f]{{16}}|design)\.json")

MIB = 1 << 20
FILE_LIMIT = 64 * MIB
TOTAL_LIMIT = 4096 * MIB  # of the archive, decompressed
MEMBER_LIMIT = 200_000
READ_LIMIT = MIB  # of one read: data comes in small pieces, and no honest header is as large
XZ_MEMORY = 128 * MIB  # presets need 65 MiB at most, and a header may ask for 4 GiB
XZ = b"\xfd7zXZ\0"
GZIP = (".gz", ".tgz")
FOREIGN = "get an archive that make pack has written; nothing was unpacked."


@dataclass
class Packed:
    """What an archive holds: names of cells, its bytes, and {what was left out: why}."""

    cells: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    size: int = 0


@dataclass
class Unpacked:
    """Names of cells that were added, that replaced an unfinished one, and that were there already with the same result;
    of what was measured afterwards of the latter, what was added and what was not, because another one is here;
    `other_plan` is the hash of the plan they ran by, if that is none of this study's."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    not_taken: list[str] = field(default_factory=list)
    other_plan: str | None = None


def cell_of(name: str) -> str | None:
    """The cell's folder a member belongs to, "" for a plan; None for a name that no archive of `pack` has."""
    match = MEMBER.fullmatch(name)
    return (match[1] or "") if match and len(match[1] or "") <= LONGEST_NAME else None


def flaw(folder: Path) -> str | None:
    """Why a folder is no finished cell that could travel; None if it is one."""
    record = results.read(folder)
    if record is None:
        return "it has no result"
    if record["state"] == "unreadable":
        return f"its metrics.json cannot be read: {record['reason']}"
    if record["state"] not in FINISHED:
        return f"it {record['state']}: {record['reason']}"
    for name in NEEDED:
        if not (folder / name).is_file():
            return f"it has no {name}"
    try:
        provenance = json.loads((folder / "provenance.json").read_bytes())
        for key in ("step", "optimizer", "seed", "identity"):
            if provenance[key] != record[key]:
                return f"its provenance.json and metrics.json differ in {key}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "its provenance.json cannot be read"
    if type(record["seed"]) is not int or not 0 <= record["seed"] < SEED_LIMIT:
        return f"its seed {record['seed']} is none"
    return None


def plan_flaw(path: Path) -> str | None:
    """Why a file of plan/ is not what a plan has written: a stored configuration is named by its hash."""
    if path.name == "design.json":
        try:
            return None if design.read(path.parent.parent) else "it holds no plan"
        except UserError:
            return "it is not what was written before the first cell"
    return None if plan_name(path.read_bytes()) == path.stem else "its content does not have the hash in its name"


# Pack

def pack(out: Path, path: Path) -> Packed:
    """Write the finished cells of the results folder `out` to `path`. UserError if there is none, or the disk refuses."""
    made, members = Packed(), []
    for folder in sorted(p for p in out.glob("test_*") if p.is_dir()):
        found = [p for p in sorted(folder.iterdir()) if cell_of(f"{folder.name}/{p.name}") is not None and p.is_file()]
        large = [p for p in found if p.stat().st_size > FILE_LIMIT]
        reason = "its name is none of a cell's" if cell_of(f"{folder.name}/.config") is None else flaw(folder)
        reason = reason or next((f"{p.name} is larger than {FILE_LIMIT // MIB} MiB" for p in large if p.name in NEEDED), None)
        if reason:
            made.left_out[folder.name] = reason
            continue
        made.left_out |= {f"{folder.name}/{p.name}": f"it is larger than {FILE_LIMIT // MIB} MiB" for p in large}
        made.cells.append(folder.name)
        members += [p for p in found if p not in large]
    if not made.cells:
        raise UserError(f"{shown(out)} holds no finished cell.", "make, then make pack.")
    for plan in sorted(p for p in (out / "plan").glob("*.json") if p.is_file()):
        reason = "its name is none of a plan's" if cell_of(f"plan/{plan.name}") is None else plan_flaw(plan)
        if reason:
            made.left_out[f"plan/{plan.name}"] = reason
        else:
            members.append(plan)
    if len(members) > MEMBER_LIMIT or sum(p.stat().st_size + 4096 for p in members) > TOTAL_LIMIT:  # with their headers
        raise UserError(f"the cells of {shown(out)} are more than an archive may hold ({TOTAL_LIMIT // MIB} MiB).",
                        "move some of them to a results folder of their own and pack it with OUT=.")
    try:
        with atomic.replacing(path) as temporary:
            _write(temporary, {p.relative_to(out).as_posix(): p for p in members}, path.name.lower().endswith(GZIP))
            made.size = temporary.stat().st_size
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {error.strerror or error}.",
                        "make pack FILE=name.tar.xz where you may write.") from None
    return made


def _write(path: Path, members: dict[str, Path], as_gzip: bool) -> None:
    """The archive, the same bytes for the same content: sorted, without times, owners or the name of the file itself."""
    with (open(path, "wb") as raw,
          gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if as_gzip else lzma.LZMAFile(raw, "wb") as packed,
          tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar):
        for name, source in sorted(members.items()):
            content = source.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))


# Unpack

def unpack(plan: Plan, path: Path) -> Unpacked:
    """Add the cells of the archive `path` to the results folder of the configured study.

    UserError, and a study that is as it was, if the archive is damaged or not of make pack, holds a cell that is not of
    this study (of any seed), or a result other than a finished one here, or if a cell it would replace is running.
    """
    for _ in _members(path):
        pass
    base = plan.out
    while not base.is_dir():
        base = base.parent
    with _writing(plan.out):
        holder = Path(tempfile.mkdtemp(prefix=".unpack-", dir=base))  # on the same file system, for the renames
    try:
        with _writing(plan.out):
            for tar, member in _members(path):
                tar.extract(member, holder, set_attrs=False, filter="data")
        cells = sorted(p.name for p in holder.iterdir() if p.name != "plan")
        _refuse_foreign(plan, path, holder, cells)
        report = _compare(plan.out, holder, cells)
        theirs, ours = design.read(holder), design.read(plan.out)
        if theirs and ours and theirs[-1]["hash"] not in {entry["hash"] for entry in ours}:
            report.other_plan = theirs[-1]["hash"]
        with _writing(plan.out):
            _merge(plan.out, holder, report)
        return report
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def _writing(out: Path) -> Iterator[Any]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{shown(out)} cannot be written: {error.strerror or error}.",
                        "make room, or give another folder with OUT=; then make unpack again.") from None


class _Unxz:
    """The content of a .xz file, in bounded memory (LZMAFile takes what a header asks for): one checked stream."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.stream = raw, lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size and not self.stream.eof:
            taken = self.raw.read(READ_LIMIT) if self.stream.needs_input else b""
            if self.stream.needs_input and not taken:
                raise ValueError("it ends too early")
            found += self.stream.decompress(taken, size - len(found))
            if self.stream.check == lzma.CHECK_NONE:
                raise ValueError("it has no checksum")
        if self.stream.eof and (self.stream.unused_data or self.raw.read(1)):
            raise ValueError("something follows its end")
        return bytes(found)


@contextmanager
def _content(path: Path) -> Iterator[Any]:
    """What is compressed in a file, by how it begins, whatever its name."""
    with open(path, "rb") as raw:
        begin = raw.read(len(XZ))
        raw.seek(0)
        if begin == XZ:
            yield _Unxz(raw)
        else:
            with gzip.GzipFile(fileobj=raw) as packed:
                yield packed


class _Forward:
    """What tarfile reads from: forward only, in small pieces, and not without end."""

    def __init__(self, stream: Any):
        self.stream, self.at, self.last = stream, 0, b""

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= READ_LIMIT:
            raise ValueError(f"a header of {size} bytes")
        self.last = self.stream.read(size)
        self.at += len(self.last)
        if self.at > TOTAL_LIMIT:
            raise ValueError(f"it holds more than {TOTAL_LIMIT // MIB} MiB")
        return self.last

    def seek(self, position: int) -> None:
        while self.at < position:
            if not self.read(min(READ_LIMIT, position - self.at)):
                raise ValueError("it ends too early")
        if self.at > position:
            raise ValueError("it points backwards")

    def finish(self) -> None:
        """Read to the end, so that the checksum is verified. tarfile takes whatever is no header for the end."""
        if self.last != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it has no end")
        while rest := self.read(READ_LIMIT):
            if rest.strip(b"\0"):
                raise ValueError("something follows its end")


def _members(path: Path) -> Iterator[Any]:
    """Yield (tar, member) for every member of the archive, each one refused that pack would not have written."""
    seen: set[str] = set()
    try:
        with _content(path) as packed:
            stream = _Forward(packed)
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as tar:  # type: ignore[call-overload]  # read() only
                for member in tar:
                    if wrong := _wrong(member, seen):
                        raise UserError(f"{shown(path)} holds {ascii(member.name)[:120]}, {wrong}.", FOREIGN)
                    seen.add(member.name)
                    if len(seen) > MEMBER_LIMIT:
                        raise ValueError(f"it holds more than {MEMBER_LIMIT} files")
                    yield tar, member
            stream.finish()
    except UserError:
        raise
    except Exception as error:  # gzip, zlib, lzma and tarfile raise a dozen types for damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{shown(path)} cannot be read: {reason}.",
                        "check the path, or copy the archive anew; nothing was unpacked.") from None
    if not any(cell_of(name) for name in seen):
        raise UserError(f"{shown(path)} holds no cell.", FOREIGN)


def _wrong(member: tarfile.TarInfo, seen: set[str]) -> str | None:
    if cell_of(member.name) is None:
        return "which is no file of a cell"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "which is no regular file"
    if not 0 <= member.size <= FILE_LIMIT:
        return f"which has {member.size} bytes, more than {FILE_LIMIT // MIB} MiB"
    return "twice" if member.name in seen else None


def _refuse_foreign(plan: Plan, path: Path, holder: Path, cells: list[str]) -> None:
    """Refuse what is no finished cell of the configured study, under whatever seed."""
    for stored in sorted((holder / "plan").glob("*.json")):
        if reason := plan_flaw(stored):
            raise UserError(f"{shown(path)} holds plan/{stored.name}, but {reason}.", FOREIGN)
    for name in cells:
        if reason := flaw(holder / name):
            raise UserError(f"{shown(path)} holds {name}, but {reason}.", FOREIGN)
    records = {name: results.read(holder / name) for name in cells}
    known = _cells_of_the_study(plan, records)
    for name, record in records.items():
        cell = known.get(name)
        if cell is None:
            why = "it has no such step, optimizer or base seed"
        elif (cell.step, cell.optimizer, cell.seed) != (record["step"], record["optimizer"], record["seed"]):
            why = (f"it is {record['step']} {record['optimizer']} seed {record['seed']}, and the folder's name stands for "
                   f"{cell.step} {cell.optimizer} seed {cell.seed}")
        elif (status := inspect(holder, cell)).state not in FINISHED:
            why = status.why
        else:
            continue
        raise UserError(f"{shown(path)} holds {name}, which is no cell of study {plan.study.name}: {why}.",
                        "configure the study it was packed from, then make unpack again; nothing was unpacked.")


def _cells_of_the_study(plan: Plan, records: dict[str, dict]) -> dict:
    """Every cell that the study could have under the seeds of these records, by folder: also those of `make tune-lr`."""
    seeds = sorted({record["seed"] for record in records.values()})
    known = {cell.name: cell for cell in expand(plan.study, seeds)}
    if not known.keys() >= records.keys():
        try:
            steps = list(dict.fromkeys(tuning.sweep(plan.study, plan.out).steps.values()))
        except UserError:  # a study whose TUNE_LR is no sweep has none
            return known
        known = {cell.name: cell for cell in expand(plan.study, seeds, steps)} | known
    return known


def _compare(out: Path, holder: Path, cells: list[str]) -> Unpacked:
    """What is to be done with each cell; UserError if one that is here must stay as it is."""
    report = Unpacked()
    for name in cells:
        here = out / name
        if not os.path.lexists(here):
            report.added.append(name)
        elif _finished(here):
            if any(not _equal(here / new.name, new) for new in (holder / name).iterdir() if new.name in CELL_FILES):
                raise _other_result(here)
            report.same.append(name)
        elif is_locked(here):
            raise _running(here)
        else:
            report.replaced.append(name)
    return report


def _equal(old: Path, new: Path) -> bool:
    return old.is_file() and old.read_bytes() == new.read_bytes()


def _finished(folder: Path) -> bool:
    record = results.read(folder)
    return record is not None and record["state"] in FINISHED


def _other_result(folder: Path) -> UserError:
    return UserError(f"{shown(folder)} already holds another result.",
                     "move that folder away if the archive's is to take its place; nothing was unpacked.")


def _running(folder: Path) -> UserError:
    return UserError(f"{shown(folder)} is being run.", "wait for it or stop it, then make unpack again; nothing was unpacked.")


def _merge(out: Path, holder: Path, report: Unpacked) -> None:
    """Rename the cells into place. Whoever wants to run one that is replaced waits for its lock meanwhile."""
    from filelock import Timeout

    os.sync()  # a cell that is seen after a power cut must be whole
    atomic.make_folder(out)
    with ExitStack() as locks:
        for name in report.replaced:
            if (out / name).is_dir():
                try:
                    locks.enter_context(process.lock(out / name / ".lock", timeout=0))
                except Timeout:
                    raise _running(out / name) from None
                if _finished(out / name):  # in the meantime
                    raise _other_result(out / name)
        for name in [*report.added, *report.replaced]:
            if name in report.replaced:
                archive(out, name)
            atomic.rename(holder / name, out / name)
        for name in report.same:
            for told, others in AFTERWARDS.items():
                new, here = holder / name / told, out / name / told
                if new.exists() and os.path.lexists(here):
                    report.not_taken += [] if _equal(here, new) else [f"{name}/{told}"]
                elif new.exists():
                    for other in new.parent.iterdir():
                        if others and others.fullmatch(other.name):
                            atomic.rename(other, out / name / other.name)
                    atomic.rename(new, here)  # last: what it speaks of is there
                    report.measured.append(f"{name}/{told}")
    for stored in sorted((holder / "plan").glob("*.json")):
        if not (out / "plan" / stored.name).exists():
            atomic.make_folder(out / "plan")
            atomic.rename(stored, out / "plan" / stored.name)
