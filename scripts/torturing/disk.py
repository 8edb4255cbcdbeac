"""Full and read-only disks: results on a file system of a few MiB, which is filled up before each kind of file is written.

The file system is a tmpfs in a mount namespace of this process's own: nobody else sees it, and the kernel takes it away with
the last process that uses it, whatever happens here. On it the disk is full for all processes at once. To fill it between two
writes, the study is stopped at the sight of the file before, and then goes on. Where mounts are not allowed these cases are
left out; those of `sites`, which need none, remain.
"""

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import results
from scripts.torturing import sites
from scripts.torturing.arena import QUIET_SECONDS, Arena, Failed, Reference, Study, interrupt, last_lines, snapshot
from scripts.torturing.watching import Files, send

NEW_NAMESPACE, NEW_USER = 0x20000, 0x10000000
DISK_SIZE = "64m"
ATTEMPTS = 5
SAID = ("No space left on device", "disk", "File too large", "Read-only file system")


@dataclass(frozen=True)
class Site:
    """A kind of file that finds no room. The disk is filled, but for `leave` bytes, once the file `after` is in place or
    written to; `stop` asks the cell to stop then, so that it writes a checkpoint; `resumed` has it begin from an older one."""

    name: str
    after: str = ""
    what: str = "in place"
    leave: int = 0
    stop: bool = False
    resumed: bool = False


SMALL = 200_000  # bytes: room for records and logs, not for weights
SITES = (
    Site("plan/design.json"),
    Site("plan/HASH.json", "design.json"),
    Site(".config", "cells.mk"),
    Site("provenance.json", ".config"),
    Site("training.log", "provenance.json"),
    Site("metrics.jsonl", "metrics.jsonl"),
    Site("checkpoint.pt", "metrics.jsonl", "written to", SMALL, stop=True),
    Site("a second checkpoint.pt", "metrics.jsonl", "written to", SMALL, stop=True, resumed=True),
    Site("model.pt", "metrics.jsonl", "written to", SMALL),
    Site("metrics.json", "model.pt"),
)


def own_mounts() -> str | None:
    """Give this process mounts of its own; None if it has them now, else why not. To be called before there are threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMESPACE) == 0:
        return _apart()
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_NAMESPACE | NEW_USER) != 0:
        return f"mounts are not allowed here ({os.strerror(ctypes.get_errno())})"
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        return f"mounts are not allowed here ({error})"
    return _apart()


def _apart() -> str | None:
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"mounts are not allowed here ({done.stderr.strip()})"


class Disk:
    """A small file system at `path`; `fill` takes its room away, `free` gives it back."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs")

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self.path)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"mount: {done.stderr.strip()}")

    def fill(self, leave: int = 0) -> None:
        for attempt in range(ATTEMPTS):
            room = os.statvfs(self.path)
            size = room.f_bavail * room.f_bsize - leave
            if size <= 0:
                return
            try:
                with open(self.path / "ballast", "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:  # a process that was not stopped yet has taken some of it
                if error.errno != errno.ENOSPC or attempt == ATTEMPTS - 1:
                    raise

    def free(self) -> None:
        (self.path / "ballast").unlink(missing_ok=True)

    def writable(self, allowed: bool) -> None:
        self._mount("-o", f"remount,{'rw' if allowed else 'ro'}")

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], capture_output=True)


def cases(arena: Arena, reference: Reference, mounts: str | None) -> Iterator[Any]:
    """(name, function) of each case; `mounts` says why there are none. The function returns a sentence for the table."""
    yield from sites.cases(arena, reference.first())
    if mounts:
        return
    yield "full for all at once, at every write", lambda: full(arena, reference.first())
    yield "full while the report is written", lambda: full_report(arena, reference.first())
    yield "read-only from the start", lambda: read_only(arena, reference.first())
    yield "read-only between two cells", lambda: read_only_between(arena, reference)


def said_plainly(code: int, said: str, cells: list[Path], where: str) -> str:
    """A write that failed is one sentence of make's, or a row that has failed because of the disk; never a traceback. Returns
    which of them it was."""
    if "Traceback" in said:
        raise Failed(f"{where}: a traceback reaches the user: {last_lines(said, 3)}")
    for cell in cells:
        record = results.read(cell)
        if record and record["state"] == "failed":
            if not record["reason"].startswith("disk"):
                raise Failed(f"{where}: the row has failed for another reason: {record['reason']}")
            return "row"
    if code == 0:
        raise Failed(f"{where}: make says nothing and goes on: {last_lines(said)}")
    if not any(words in said for words in SAID):
        raise Failed(f"{where}: make does not say that the disk is full: {last_lines(said)}")
    return "sentence"


def full(arena: Arena, reference: Reference) -> str:
    """One study, whose disk is full at one site after the other; then it completes."""
    disk = Disk(arena.root / "full")
    study = arena.study("full-disk", out=disk.path / "out", CHECKPOINT_INTERVAL="0")
    rows = 0
    try:
        for site in SITES:
            if site.resumed:
                interrupt(study)
            older = {path: path.read_bytes() for path in study.out.glob("test_*/checkpoint*.pt")}
            code = _make_until_full(study, disk, site, older)
            told = said_plainly(code, study.said(), study.cells(), site.name)
            place = study.out if site.name.startswith("plan/") else study.out / "test_"  # a row is the cell's in any case
            if told == "sentence" and f"error: {place}" not in study.said():
                raise Failed(f"{site.name}: the sentence names another place: {last_lines(study.said())}")
            rows += told == "row"
            reference.audit(study.out)
            for path, content in older.items():
                if not any(other.read_bytes() == content for other in path.parent.glob("checkpoint*.pt")):
                    raise Failed(f"{site.name}: the older {path.name} is gone")
            disk.free()
        study.finish(reference, attempts=2)
    finally:
        study.kill_all()
        disk.close()
    return f"{len(SITES)} sites: {rows} failed rows, {len(SITES) - rows} refusals, then complete and equal"


def _make_until_full(study: Study, disk: Disk, site: Site, older: dict[Path, bytes]) -> int:
    """make's exit status. A study that came to its end because it was stopped too late begins anew, without the `older`
    checkpoints."""
    for _ in range(ATTEMPTS):
        if not site.after:
            disk.fill()
            code, hit = study.wait(study.start("cells", "RETRY=1")), True
        else:
            code, hit = _fill_after(study, disk, site)
        study.settle()
        if hit and not any((results.read(cell) or {"state": ""})["state"] == "done" for cell in study.cells()):
            return code
        disk.free()
        for cell in study.cells():
            shutil.rmtree(cell)
        older.clear()
    raise Failed(f"{site.name}: the disk could not be filled in time: {last_lines(study.said())}")


def _fill_after(study: Study, disk: Disk, site: Site) -> tuple[int, bool]:
    hit, known, looked = False, [], 0.0
    with Files(disk.path) as files:
        process = study.start("cells", "RETRY=1")
        while process.poll() is None:
            event = files.next(0.05)
            if hit:
                continue
            if event is None or (event.name, event.what) != (site.after, site.what):
                if time.monotonic() - looked > 0.05:  # known before the moment comes: looking for them takes too long then
                    known, looked = study.processes(), time.monotonic()
                continue
            _signal(study, known, signal.SIGSTOP)
            disk.fill(site.leave)
            hit = True
            if site.stop:
                _signal(study, [one for one in known if one.role == "cell"], signal.SIGTERM)
            _signal(study, known, signal.SIGCONT)
    return study.wait(process), hit


def _signal(study: Study, found: list, number: int) -> None:
    for one in found:
        send(study.folder, one.pid, number)


def full_report(arena: Arena, reference: Reference) -> str:
    """The older report stays as it was; with room again there is a new one."""
    disk = Disk(arena.root / "full-report")
    study = arena.study("full-disk-report", out=disk.path / "out")
    try:
        shutil.copytree(reference.study.out, study.out)
        for report in study.out.glob("report.*"):
            report.write_text("an older report\n")
        disk.fill()
        before = snapshot([study.out])
        code, said = study.make("report")
        if "Traceback" in said or code == 0 or "No space left on device" not in said:
            raise Failed(f"make report does not say that the disk is full: {last_lines(said)}")
        if snapshot([study.out]) != before:
            raise Failed("the older report is not what it was")
        disk.free()
        code, said = study.make("report")
        if code:
            raise Failed(f"with room again there is no report: {last_lines(said)}")
    finally:
        study.kill_all()
        disk.close()
    return "refused, the older report stays; with room again it is written"


def read_only(arena: Arena, reference: Reference) -> str:
    """make refuses and changes nothing, make plan and make report say what is there; writable again, all completes."""
    disk = Disk(arena.root / "read-only")
    study = arena.study("read-only-disk", out=disk.path / "out")
    try:
        interrupt(study)
        disk.writable(False)
        before = snapshot([study.out])
        for goal in ("run", "plan", "report"):
            code, said = study.make(goal)
            if "Traceback" in said or (code == 0) != (goal == "plan"):
                raise Failed(f"make {goal} on a read-only folder ends with {code}: {last_lines(said)}")
            if goal == "plan" and "interrupted" not in said:
                raise Failed(f"make plan does not see the interrupted cell: {last_lines(said)}")
            if goal != "plan" and "Read-only file system" not in said:
                raise Failed(f"make {goal} does not say that it may not write: {last_lines(said)}")
        if snapshot([study.out]) != before:
            raise Failed("a read-only folder has changed")
        disk.writable(True)
        study.finish(reference)
    finally:
        study.kill_all()
        disk.close()
    return "refused in one sentence, nothing changed; writable again: complete and equal"


def read_only_between(arena: Arena, reference: Reference) -> str:
    """The first of two cells is finished, and before the second begins the disk is only read any more."""
    disk = Disk(arena.root / "read-only-between")
    study = arena.study("read-only-between-cells", out=disk.path / "out", SEEDS='"2"')
    try:
        with Files(disk.path) as files:
            process = study.start("-j1")
            while process.poll() is None:
                event = files.next(0.2)
                if event and (event.name, event.what) == (results.NAME, "in place"):
                    break
            makes = [one for one in study.processes() if one.role in ("make", "inner make", "shell")]
            _signal(study, makes, signal.SIGSTOP)  # the launcher ends, and nobody starts the next one
            end = time.monotonic() + QUIET_SECONDS
            while any(one.role in ("launcher", "cell") for one in study.processes()) and time.monotonic() < end:
                time.sleep(0.02)
            finished, *begun = study.cells()
            if begun:
                raise Failed("the second cell had begun before the disk could be made read-only")
            before, whole = snapshot([study.out]), snapshot([finished])
            disk.writable(False)
            _signal(study, makes, signal.SIGCONT)
        code, said = study.wait(process), study.said()
        study.settle()
        second = [name for name in reference.records if name != finished.name and f"error: {study.out / name} " in said]
        if code == 0 or "Traceback" in said or not second:
            raise Failed(f"make ends with {code} and does not name the second cell: {last_lines(said)}")
        if "Read-only file system" not in said or snapshot([study.out]) != before:
            raise Failed(f"the folder has changed, or make does not say that it may not write: {last_lines(said)}")
        disk.writable(True)
        code, said = study.make()
        if code:
            raise Failed(f"writable again, make ends with {code}: {last_lines(said)}")
        reference.check(study.out, [cell.name for cell in study.cells()])
        if len(study.cells()) != 2 or snapshot([finished]) != whole:
            raise Failed("the second cell is missing, or the one that was finished before was touched")
        study.check_nothing_to_do()
    finally:
        study.kill_all()
        disk.close()
    return "a sentence that names the second cell, the first as it was; writable again: complete and equal"
