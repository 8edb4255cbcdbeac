"""Two makes on one folder: each runs what it has planned itself, and neither undoes what the other has put on record."""

import errno
import fcntl
import os
import re
import time
from threading import Timer

import pytest
from filelock import FileLock

from lib import design, makefile
from lib.plan import Options, Plan
from tests.harness import TINY, refusal


@pytest.fixture
def out(dotconfig, tmp_path):
    dotconfig(*TINY, 'ABLATION_STEPS="V0 V1"', f'OUTPUT_DIR="{tmp_path}/out"')
    return tmp_path / "out"


def cells(path) -> list[str]:
    return re.findall(r"^\S*/test_(\w+?)_adamwspam_none(\w*)/metrics.json: FORCE", path.read_text(), re.M)


def test_what_a_make_is_about_to_read_is_not_what_another_has_planned_since(out):
    one = Plan(Options(steps=("V0",))).write()
    other = Plan(Options(seeds="2")).write()
    assert cells(one) == [("V0", "")] and cells(other) == [("V0", ""), ("V1", ""), ("V0", "_s1338"), ("V1", "_s1338")]
    assert (out / "cells.mk").read_text() == other.read_text()
    assert Plan(Options(steps=("V0",))).write() == one


def test_a_plan_is_added_to_what_another_make_has_put_on_record_since_it_was_made(out):
    one, other = Plan(Options()), Plan(Options(seeds="2"))
    one.write()
    other.write()
    history = design.read(out)
    assert [entry["plan"]["seeds"] for entry in history] == [[1337], [1337, 1338]] and history == other.history


def test_one_plan_is_written_at_a_time(out, monkeypatch, capsys):
    monkeypatch.setattr(makefile, "LOCK_SECONDS", 0.1)
    Plan(Options()).write()
    lock = FileLock(out / "plan/.lock", thread_local=False)
    lock.acquire()
    Timer(0.5, lock.release).start()
    Plan(Options(seeds="2")).write()
    assert not lock.is_locked, "it has waited"
    assert capsys.readouterr().err == f"another make is writing its plan of {out}; waiting for it\n"
    monkeypatch.setattr(makefile, "LONGEST_WAIT", 0.1)
    before = (out / "plan/design.json").read_bytes()
    with lock:
        what, _ = refusal(Plan(Options(seeds="3")).write)
    assert what.startswith(f"another make has been writing its plan of {out}")
    assert (out / "plan/design.json").read_bytes() == before


def test_a_file_system_without_locks_is_one_sentence(out, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    what, run = refusal(Plan(Options()).write)
    assert what == f"the file system of {out} has no locks, so that two makes could run one cell." and "OUT=" in run


def test_makefiles_of_other_days_are_removed_and_one_that_is_used_again_is_not(out):
    first = Plan(Options()).write()
    second = Plan(Options(seeds="2")).write()
    day = time.time() - 2 * makefile.KEPT_SECONDS
    for path in (first, second):
        os.utime(path, (day, day))
    third = Plan(Options(seeds="3")).write()
    assert list((out / "plan").glob("*.mk")) == [third]
    assert Plan(Options(seeds="3")).write() == third and time.time() - third.stat().st_mtime < 60
