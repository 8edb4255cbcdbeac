"""Nothing outlives what started it, shown with real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lib import process
from lib.process import Watch
from tests.harness import ROOT, refusal

# A cell: says when it is ready, and on SIGTERM that it was told to stop.
CELL = """
import os, signal, sys, time
from lib.process import die_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(0)))
die_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
print("outlived", flush=True)
"""
# A launcher: starts the cell in a group of its own, as lib.launch does.
LAUNCHER = """
import os, subprocess, sys, time
variables = {**os.environ, **({"KABLATE_LAUNCHER_PID": str(os.getpid())} if sys.argv[2] == "named" else {})}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, env=variables)
time.sleep(60)
"""


def python(*arguments, **variables):
    return subprocess.Popen([sys.executable, "-c", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env=os.environ | variables)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_cell_ends_with_its_launcher(number):
    launcher = python(LAUNCHER, CELL, "named")
    cell = int(launcher.stdout.readline())
    assert alive(cell)
    launcher.send_signal(number)
    assert launcher.stdout.read() == "stopped\n"  # to its end, when both have closed it
    launcher.wait()
    deadline = time.monotonic() + 10
    while alive(cell):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cell_by_hand_has_no_launcher_to_die_with():
    launcher = python(LAUNCHER, CELL, "unnamed")
    cell = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    time.sleep(0.3)
    assert alive(cell)
    os.kill(cell, signal.SIGTERM)
    assert launcher.stdout.read() == "stopped\n"


def test_a_cell_whose_launcher_is_already_dead_stops_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cell = python(CELL, KABLATE_LAUNCHER_PID=str(gone.pid))
    assert cell.communicate(timeout=30)[0] == "stopped\n"


def test_watch_tells_when_any_of_its_processes_has_ended():
    one, two = python("import time; time.sleep(60)"), python("import time; time.sleep(60)")
    watch = Watch(one.pid, two.pid)
    assert not watch.ended() and not watch.ended()
    two.kill()
    deadline = time.monotonic() + 10
    while not watch.ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    two.wait()
    assert watch.ended(), "also once it is reaped and its number is free"
    one.kill()
    one.wait()


def test_watch_of_a_process_that_is_gone_and_of_none():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Watch(gone.pid).ended() and Watch(os.getpid(), gone.pid).ended()
    assert not Watch().ended() and not Watch(os.getpid()).ended()


def test_watch_where_the_system_cannot_watch(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert not Watch(os.getpid()).ended()


def test_a_cell_shows_life_at_most_once_a_second_and_never_waits_for_its_reader(monkeypatch):
    life, now = process.Life(), [100.0]
    monkeypatch.setattr(process, "_shown_at", 0.0)
    monkeypatch.setattr(process, "_life", None)
    monkeypatch.setenv(process.LIFE_VARIABLE, str(life.handle))
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    for later, silence in ((0.0, 0.0), (0.9, 0.9), (0.2, 0.0), (5.0, 0.0)):
        now[0] += later
        process.show_life()
        assert life.silence() == pytest.approx(silence)
    assert process.LIFE_VARIABLE not in os.environ, "what the cell starts does not have the pipe"
    for _ in range(100_000):
        now[0] += 2
        process.show_life()
    life.close()
    monkeypatch.setattr(process, "_life", life.handle)  # closed: the launcher is gone
    now[0] += 2
    process.show_life()


def test_without_a_launcher_there_is_nobody_to_show_life_to(monkeypatch):
    monkeypatch.setattr(process, "_shown_at", 0.0)
    monkeypatch.setattr(process, "_life", None)
    process.show_life()


@pytest.mark.parametrize("variable, call", [
    (process.LAUNCHER_VARIABLE, process.die_with_launcher), (process.STOP_VARIABLE, process.die_with_launcher),
    (process.LIFE_VARIABLE, process.show_life)])
def test_what_a_launcher_says_in_the_environment_is_a_number(monkeypatch, variable, call):
    monkeypatch.setattr(process, "_shown_at", 0.0)
    monkeypatch.setenv(variable, "3.5")
    assert refusal(call) == (f"{variable}=3.5 is no number.", f"unset {variable}, which make sets where it is needed.")


def test_a_lock_is_claimed_by_its_holder_and_not_by_what_it_starts(tmp_path):
    lock = tmp_path / ".lock"
    lock.touch()
    code = ("import os, subprocess, sys\nfrom lib import process\nhandle = os.open(sys.argv[1], os.O_RDWR)\n"
            "process.claim([handle])\nsubprocess.Popen(['sleep', '60'], pass_fds=[handle])\nprint('held', flush=True)\n"
            "sys.stdin.readline()\nprocess.claim([handle], held=False)\nprint('not', flush=True)\nsys.stdin.readline()\n"
            "process.claim([handle])\nprint('again', flush=True)\nsys.stdin.readline()\n")
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, start_new_session=True)
    try:
        for said, claimed in (("held", True), ("not", False), ("again", True)):
            assert holder.stdout.readline() == f"{said}\n"
            assert process.claimed_by(lock) == (holder.pid if claimed else None)
            holder.stdin.write("\n")
            holder.stdin.flush()
        holder.wait(30)
        assert process.claimed_by(lock) is None, "though its child has the file open still"
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert process.claimed_by(tmp_path / "none") == 0, "nobody can say"


def test_the_kernels_count_of_kills_for_want_of_memory(monkeypatch, tmp_path):
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 17\noom_kill_x 3\n")
    monkeypatch.setattr(process, "Path", lambda path: tmp_path / path.rpartition("/")[2])
    assert process.memory_kills() == 17
    (tmp_path / "vmstat").write_text("nr_free_pages 5\n")
    assert process.memory_kills() is None
    (tmp_path / "vmstat").unlink()
    assert process.memory_kills() is None


def test_a_stranger_with_the_number_of_a_parent_that_has_ended_is_not_watched(monkeypatch):
    """It ended, and its number went to another, before it could be opened."""
    stranger = python("import time; time.sleep(60)")
    try:
        assert not Watch(parent=os.getppid()).ended()
        assert Watch(parent=stranger.pid).ended(), "it is not our parent"
        real = os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: 1)  # what the kernel says from then on
        assert Watch(os.getpid(), parent=real).ended()
    finally:
        stranger.kill()
        stranger.wait()


# A program of make's: every one runs its work under `reported`.
PROGRAM = """
import os, sys, time
from lib.errors import reported
with reported(ends_with_make=sys.argv[1] == "ends"):
    print(os.getpid(), flush=True)
    time.sleep(60)
"""
# A shell of make's, which a recipe with more than one command has: it does not end with make.
THROUGH_A_SHELL = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_of_makes_ends_with_make_also_behind_a_shell(number):
    make = python("import time; time.sleep(60)")
    shell = python(THROUGH_A_SHELL, PROGRAM, "ends", KABLATE_MAKE_PID=str(make.pid))
    program = int(shell.stdout.readline())
    time.sleep(0.3)
    assert alive(program)
    make.send_signal(number)
    make.wait()
    assert shell.communicate(timeout=30)[0] == ""


@pytest.mark.parametrize("how, variables", [("ends", {}), ("sees to it itself", {"KABLATE_MAKE_PID": "make"}),
                                            ("ends", {"KABLATE_MAKE_PID": "make", "KABLATE_LAUNCHER_PID": "launcher"})])
def test_who_has_no_make_or_a_launcher_of_its_own_does_not(how, variables):
    make = python("import time; time.sleep(60)")
    pids = {"make": make.pid, "launcher": os.getpid()}
    program = python(PROGRAM, how, **{name: str(pids[which]) for name, which in variables.items()})
    program.stdout.readline()
    make.kill()
    make.wait()
    time.sleep(0.5)
    assert alive(program.pid)
    program.kill()
    program.communicate()


def test_the_number_of_make_is_a_number(monkeypatch):
    monkeypatch.setenv(process.MAKE_VARIABLE, "x;id")
    assert refusal(process.die_with_make)[0] == "KABLATE_MAKE_PID=x;id is no number."


def test_a_lock_in_a_folder_that_was_moved_away_is_none(tmp_path):
    from filelock import FileLock

    (tmp_path / "cell").mkdir()
    with FileLock(tmp_path / "cell/.lock") as lock:
        assert process.is_in_place(lock)
        (tmp_path / "cell").rename(tmp_path / "archived")
        assert not process.is_in_place(lock)
        (tmp_path / "cell").mkdir()
        (tmp_path / "cell/.lock").touch()
        assert not process.is_in_place(lock)
