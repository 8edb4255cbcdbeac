"""Nothing outlives what started it, shown with real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lib.process import Watch
from tests.harness import ROOT

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
