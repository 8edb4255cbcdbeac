"""Files are whole or absent, whatever happens while they are written."""

import errno
import fcntl
import json
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

from lib import atomic
from tests.harness import ROOT


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("write, content, expected", [
    (atomic.write_text, "ü\n", "ü\n".encode()), (atomic.write_bytes, b"\x00\xff", b"\x00\xff"), (atomic.write_text, "", b""),
    (atomic.write_json, {"b": None, "a": [1.5]}, b'{\n "b": null,\n "a": [\n  1.5\n ]\n}\n'),
])
def test_the_new_content_replaces_the_old(tmp_path, write, content, expected):
    path = tmp_path / "file"
    path.write_bytes(b"something longer than what follows")
    write(path, content)
    assert path.read_bytes() == expected and names(tmp_path) == ["file"]


def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic.replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old" and temporary.parent == tmp_path
            raise error
        assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_name_is_taken_only_when_the_content_is_on_disk(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle)), real(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (synced.append("renamed"), os.rename(old, new)))
    atomic.write_text(tmp_path / "file", "x")
    content, renamed, folder = synced
    assert stat.S_ISREG(content.st_mode) and content.st_size == 1 and renamed == "renamed" and stat.S_ISDIR(folder.st_mode)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        atomic.write_text(tmp_path / "file", "x")
        assert os.umask(umask) == umask, "the umask is left as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {"deep": [1, math.nan]}])
def test_json_is_strict(tmp_path, value):
    path = tmp_path / "file"
    path.write_text("{}")
    with pytest.raises(ValueError):
        atomic.write_json(path, value)
    assert path.read_text() == "{}" and names(tmp_path) == ["file"]


def test_a_missing_folder_is_an_error_and_stays_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.write_text(tmp_path / "none" / "file", "x")
    assert names(tmp_path) == []


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    atomic.write_json(path, {"old": 1})
    code = ("import sys\nfrom lib import atomic\n"
            "with atomic.replacing(sys.argv[1]) as temporary:\n"
            "    temporary.write_text('half')\n    print('writing', flush=True)\n    sys.stdin.read()\n")
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert json.loads(path.read_text()) == {"old": 1}
    left = [n for n in names(tmp_path) if n != "file"]
    assert len(left) == 1 and left[0].startswith(".file.") and left[0].endswith(".tmp"), "what a launcher cleans up"


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path):
    (tmp_path / ".report.md.x1.tmp").write_text("half")
    (tmp_path / "mine.tmp").write_text("not of this kind")
    with atomic.replacing(tmp_path / "file") as temporary:
        atomic.remove_orphans(tmp_path)
        assert names(tmp_path) == sorted([temporary.name, "mine.tmp"])
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole" and names(tmp_path) == ["file", "mine.tmp"]
    atomic.remove_orphans(tmp_path / "nowhere")


def test_the_old_file_is_kept_only_once_the_new_one_is_whole(tmp_path):
    path, before = tmp_path / "file", tmp_path / "before"
    path.write_text("1")
    before.write_text("0")
    with pytest.raises(RuntimeError), atomic.replacing(path, before):
        raise RuntimeError
    assert (path.read_text(), before.read_text()) == ("1", "0")
    with atomic.replacing(path, before) as temporary:
        temporary.write_text("2")
    assert (path.read_text(), before.read_text()) == ("2", "1") and names(tmp_path) == ["before", "file"]
    path.unlink()
    with atomic.replacing(path, before) as temporary:
        temporary.write_text("3")
    assert (path.read_text(), before.read_text()) == ("3", "1")


def test_what_is_removed_before_its_writer_has_locked_it_is_made_again(tmp_path, monkeypatch):
    real, taken = fcntl.flock, []

    def flock(handle, operation):
        if operation == fcntl.LOCK_EX and not taken:  # the writer's: somebody cleans up in the instant before it
            taken.extend(names(tmp_path))
            atomic.remove_orphans(tmp_path)
        return real(handle, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with atomic.replacing(tmp_path / "file") as temporary:
        assert taken and names(tmp_path) == [temporary.name] != taken
        temporary.write_text("whole")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "whole"


def test_a_writer_waits_for_who_looks_at_its_file_and_is_no_orphan_then(tmp_path, monkeypatch):
    """Where the other one has the lock when the writer asks for it."""
    real, held = tempfile.mkstemp, []

    def mkstemp(**options):
        handle, name = real(**options)
        other = os.open(name, os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX)
        held.append(threading.Timer(0.3, lambda: (held.append("let go"), os.close(other))))
        held[0].start()
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with atomic.replacing(tmp_path / "file") as temporary:
        assert held[1:] == ["let go"]
        atomic.remove_orphans(tmp_path)
        assert temporary.exists()
        temporary.write_text("whole")
    assert names(tmp_path) == ["file"]


def test_a_file_system_without_locks_can_be_written_and_keeps_its_orphans(tmp_path, monkeypatch):
    def none(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", none)
    (tmp_path / ".x.tmp").touch()
    atomic.write_text(tmp_path / "file", "x")
    atomic.remove_orphans(tmp_path)
    assert names(tmp_path) == [".x.tmp", "file"]


@pytest.fixture
def synced(monkeypatch):
    """The folders that were brought to disk, and the renames between them, in their order."""
    seen, real = [], os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            seen.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append("renamed"), os.rename(old, new)))
    return seen


def test_what_is_renamed_is_on_disk_in_both_folders(tmp_path, synced):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/file").write_text("x")
    atomic.rename(tmp_path / "a/file", tmp_path / "a/other")
    assert synced == ["renamed", str(tmp_path / "a")]
    atomic.rename(tmp_path / "a/other", tmp_path / "b/file")
    assert synced[2:] == ["renamed", str(tmp_path / "b"), str(tmp_path / "a")] and (tmp_path / "b/file").read_text() == "x"


def test_folders_that_are_made_are_on_disk_and_those_that_are_there_cost_nothing(tmp_path, synced):
    atomic.make_folder(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")]
    atomic.make_folder(tmp_path / "a/b/c")
    assert len(synced) == 3
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        atomic.make_folder(tmp_path / "file/below")


def test_a_copy_is_whole_or_the_old_file_stays(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(3_000_000))
    target.write_text("old")

    def half(_, temporary):
        temporary.write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(atomic.shutil, "copyfile", half)
        atomic.copy(source, target)
    assert target.read_text() == "old" and names(tmp_path) == ["source", "target"]
    atomic.copy(source, target)
    assert target.read_bytes() == source.read_bytes() and names(tmp_path) == ["source", "target"]
