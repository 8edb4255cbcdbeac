"""A cell's folder that makes way for another is moved whole, by one make, and nothing that was there is lost."""

import os
import stat
from threading import Timer

import pytest
from filelock import FileLock

from lib.archiving import archive, archive_stale
from lib.cells import expand
from lib.config import Study
from tests.harness import TINY, finish


@pytest.fixture
def out(dotconfig, tmp_path):
    """Where the results of a study of one cell lie; `stale(out)` makes it another's."""
    dotconfig(*TINY, 'ABLATION_STEPS="V0"', "BATCH_SIZE=2", f'OUTPUT_DIR="{tmp_path}/out"')
    finish(tmp_path / "out", *expand(Study()))
    dotconfig(*TINY, 'ABLATION_STEPS="V0"', "BATCH_SIZE=9", f'OUTPUT_DIR="{tmp_path}/out"')
    return tmp_path / "out"


def stale(out):
    cell, = expand(Study())
    assert (out / cell.name / "metrics.json").exists()
    return cell


def test_another_look_at_a_stale_cell_does_not_keep_it_from_running(out):
    """It holds the lock for an instant."""
    cell = stale(out)
    lock = FileLock(out / cell.name / ".lock", thread_local=False)
    lock.acquire()
    Timer(0.2, lock.release).start()
    assert archive_stale(out, expand(Study())[0]) is None and os.listdir(out / "archive") == [f"{cell.name}.1"]


def test_an_archive_keeps_what_it_has(tmp_path):
    for content in "ab":
        (tmp_path / "cell").mkdir()
        (tmp_path / "cell/x").write_text(content)
        archive(tmp_path, "cell")
    assert {p.name: (p / "x").read_text() for p in (tmp_path / "archive").iterdir()} == {"cell.1": "a", "cell.2": "b"}


def test_what_is_archived_is_on_disk_under_its_new_name(tmp_path, monkeypatch):
    """After a power cut a cell may lie in two places, but in one at least."""
    (tmp_path / "cell").mkdir()
    seen, real, rename = [], os.fsync, os.replace

    def fsync(handle):
        assert stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("renamed"), rename(*names)))
    archive(tmp_path, "cell")
    assert seen == [str(tmp_path), "renamed", str(tmp_path / "archive"), str(tmp_path)]
