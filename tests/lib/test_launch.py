"""The launcher with stand-ins for the training process: exit codes, reasons, states, display."""

import errno
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import atomic, failures, process, results
from lib.cells import expand
from lib.config import Study
from lib.launch import Display, bytecode_is_kept, conclude, run
from tests.harness import ROOT, finish, refusal, wait_for
from tests.lib.test_process import alive

IDENTITY = {"hash": "0", "set": {}, "default": {}}


def plan(tmp_path: Path, program: str, timeout=0, stop=60) -> list[str]:
    """A plan whose trainer is `program`; returns the command line of the launcher. CELL_TIMEOUT and STOP_SECONDS as given."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(f"import os, signal, sys, time\nfolder = sys.argv[2]\n{program}\n")
    content = {"step": "V1", "optimizer": "adamw", "study": "s", "trainer": str(trainer), "config": "CONFIG_SEED=1\n",
               "identity": IDENTITY, "symbols": {}, "limits": {"CELL_TIMEOUT": timeout, "STOP_SECONDS": stop}}
    return [sys.executable, "-m", "scripts.cell", str(tmp_path / "cell"), "--plan", str(stored(tmp_path, json.dumps(content))),
            "--seed", "7"]


def stored(folder: Path, text: str) -> Path:
    """A plan file under the hash of its content, as a plan writes it."""
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    path.write_text(text)
    return path


def run_planned(tmp_path: Path, program: str) -> int:
    """The launcher in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    command = plan(tmp_path, program)
    try:
        return run(tmp_path / "cell", Path(command[command.index("--plan") + 1]), 7, "1/1", None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def launch(tmp_path, program, variables=(), arguments=(), **limits):
    command = [*plan(tmp_path, program, **limits), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | dict(variables))


def begun(tmp_path, program, **limits) -> tuple[subprocess.Popen, int]:
    """A launcher, and its cell once that has signed its number into `started`."""
    program = f"{IN_TREE}\n{program}"
    started = tmp_path / "cell/started"
    launcher = subprocess.Popen(plan(tmp_path, program, **limits), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: started.exists() and started.read_text().endswith("\n"))
    return launcher, int(started.read_text())


def waiting(tmp_path, program, variables=()) -> tuple[subprocess.Popen, str]:
    """A second launcher that waits for the cell, and what it says of that."""
    second = subprocess.Popen(plan(tmp_path, program), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env=os.environ | dict(variables))
    return second, second.stdout.readline()


IN_TREE = "sys.path.insert(0, os.getcwd())\nfrom lib import process"
SIGNED = "open(folder + '/started', 'a').write(f'{os.getpid()}\\n')"  # the last line of what a cell prepares
UNTIL_RELEASED = "[time.sleep(0.02) for _ in range(1500) if not os.path.exists(folder + '/release')]"  # by the test


@pytest.mark.parametrize("program, reason", [
    ("raise RuntimeError('boom')", "exception: RuntimeError: boom (trainer.py, line 3)"),
    ("print('error: no data.'); print('  try: make data'); sys.exit(2)", "refused: no data. try: make data"),
    ("sys.exit(3)", "exit status 3: it printed nothing"),
    ("print('hm', flush=True); os.abort()", "signal 6 (SIGABRT): hm"),
    ("os._exit(74)", f"disk: {failures.CUT_SHORT}"),
])
def test_a_cell_that_breaks_is_recorded_with_its_reason(tmp_path, program, reason):
    done = launch(tmp_path, program)
    record = results.read(tmp_path / "cell")
    assert (done.returncode, record["state"], record["reason"], record["seed"]) == (0, "failed", reason, 7)
    assert f"V1 seed 7: failed: {reason}" in done.stdout


@pytest.mark.parametrize("program, says", [
    ("os.kill(os.getpid(), signal.SIGKILL)", "interrupted by signal 9 after"),
    ("sys.exit(75)", "interrupted after"),
])
def test_a_cell_that_was_stopped_has_no_record(tmp_path, program, says):
    done = launch(tmp_path, program)
    assert done.returncode == 0 and says in done.stdout and results.read(tmp_path / "cell") is None


def test_the_reason_is_not_that_of_an_earlier_attempt(tmp_path):
    launch(tmp_path, "print('error: no data.'); sys.exit(2)")
    launch(tmp_path, "raise MemoryError('full')", arguments=["--retry"])
    assert results.read(tmp_path / "cell")["reason"] == "out of memory: MemoryError: full (trainer.py, line 3)"


def test_a_finished_cell_is_left_alone(tmp_path):
    launch(tmp_path, "print('x')")
    provenance = {"study": "s", "step": "V1", "optimizer": "adamw", "seed": 7, "identity": IDENTITY}
    results.write(tmp_path / "cell", provenance, "done", val_loss=1.0)
    before = (tmp_path / "cell/metrics.json").read_bytes()
    done = launch(tmp_path, "raise RuntimeError")
    assert done.returncode == 0 and "another make has finished it meanwhile" in done.stdout
    assert (tmp_path / "cell/metrics.json").read_bytes() == before


@pytest.mark.parametrize("arguments, runs", [([], False), (["--retry"], True)])
def test_a_failed_cell_is_run_again_only_where_it_was_planned_so(tmp_path, arguments, runs):
    """Another make may have run it since the plan was made, and it has failed there: that is no reason to run it again."""
    launch(tmp_path, "sys.exit(3)")
    done = launch(tmp_path, "sys.exit(4)", arguments=arguments)
    assert results.read(tmp_path / "cell")["reason"] == f"exit status {4 if runs else 3}: it printed nothing"
    assert ("another make has finished it meanwhile (failed)" in done.stdout) != runs


def test_two_launchers_never_run_one_cell_twice(tmp_path):
    command = plan(tmp_path, f"open(folder + '/ran', 'a').write('x'); {UNTIL_RELEASED}; sys.exit(3)")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "cell/ran").exists())
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.poll() is None
    (tmp_path / "cell/release").touch()
    first.wait()
    assert "another make is running it" in second.stdout and (tmp_path / "cell/ran").read_text() == "x"


@pytest.mark.parametrize("number, pause, ended_by", [
    (signal.SIGTERM, 0.1, "grace"), (signal.SIGTERM, 2.5, "kill"), (signal.SIGINT, 0.1, "grace"), (signal.SIGINT, 0.8, "kill")])
def test_one_stop_that_arrives_twice_is_one_and_a_later_one_kills(tmp_path, number, pause, ended_by):
    """A cell that takes 1 s, or longer than the test, to save after SIGTERM; helpers of its group are not signalled before it
    is done."""
    seconds = 1 if ended_by == "grace" else 30
    program = ("import subprocess\nhelper = subprocess.Popen(['sleep', '60'])\nasked = []\n"
               "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\nopen(folder + '/up', 'w')\n"
               f"while not asked: time.sleep(0.05)\ntime.sleep({seconds})\n"
               "open(folder + '/saved', 'w').write(str(helper.poll()))\nsys.exit(75)")
    launcher = subprocess.Popen(plan(tmp_path, program), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "cell/up").exists())
    launcher.send_signal(number)
    time.sleep(pause)
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + number
    saved = tmp_path / "cell/saved"
    assert saved.exists() == (ended_by == "grace")
    assert not saved.exists() or saved.read_text() == "None"
    assert not subprocess.run(["pgrep", "-f", "^sleep 60$"], capture_output=True, text=True).stdout


def test_a_cell_that_ends_although_it_was_asked_to_stop_is_no_error_of_make(tmp_path):
    """Asked in its last second, it ends as if nobody had asked, with its result."""
    program = ("signal.signal(signal.SIGTERM, lambda *_: open(folder + '/told', 'w'))\nopen(folder + '/up', 'w')\n"
               "while not os.path.exists(folder + '/told'): time.sleep(0.05)\nsys.exit(3)")
    launcher = subprocess.Popen(plan(tmp_path, program), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "cell/up").exists())
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and results.read(tmp_path / "cell")["reason"].startswith("exit status 3")


HANGS = """import subprocess
from lib import process
helper = subprocess.Popen(["sleep", "60"])
open(folder + "/helper", "w").write(str(helper.pid))
signal.signal(signal.SIGTERM, lambda *_: open(folder + "/told", "w"))
open(folder + "/metrics.jsonl", "w").write('{"iteration": 12}\\n')
end = time.monotonic() + 2.5
while time.monotonic() < end:
    process.show_life()
    time.sleep(0.1)
time.sleep(60)"""


def test_a_cell_that_shows_no_progress_is_told_killed_with_its_helpers_and_has_failed(tmp_path):
    begun = time.monotonic()
    launch(tmp_path, "sys.path.insert(0, os.getcwd())\n" + HANGS, timeout=2, stop=1)
    assert 4.5 < time.monotonic() - begun < 30, "not while it showed that it gets on"
    record = results.read(tmp_path / "cell")
    assert record["state"] == "failed" and record["reason"] == "timeout: no progress for 2 s, after iteration 12"
    assert (tmp_path / "cell/told").exists(), "it was asked first"
    assert not alive(int((tmp_path / "cell/helper").read_text()))


STUCK = """import threading
def waits_for_ever():
    threading.Lock().acquire() and threading.Event().wait()
def holds_python_itself():
    import ctypes
    ctypes.PyDLL(None).sleep(60)
process.die_with_launcher()
threading.Thread(target=waits_for_ever, daemon=True).start()
time.sleep(0.5)
holds_python_itself()"""


def test_the_log_of_a_hanging_cell_says_where_each_of_its_threads_was(tmp_path):
    """Also of one that is stuck in a call that lets no other thread of Python run."""
    done = launch(tmp_path, f"{IN_TREE}\n{STUCK}", timeout=2, stop=1)
    log = (tmp_path / "cell/training.log").read_text()
    assert log.startswith("no progress for 2 s: where each thread is\n")
    assert "in waits_for_ever\n" in log and "in holds_python_itself\n" in log and 'trainer.py", line' in log
    assert results.read(tmp_path / "cell")["reason"] == "timeout: no progress for 2 s" and "training.log" in done.stdout
    assert "training.log says where it hung" in failures.advice("failed", "timeout: no progress for 2 s", False)


def test_a_hanging_cell_that_stops_when_told_is_not_killed(tmp_path):
    launch(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\ntime.sleep(60)", timeout=1)
    assert results.read(tmp_path / "cell")["reason"] == "timeout: no progress for 1 s"


def test_without_a_timeout_nothing_is_too_slow_and_one_that_finishes_is_done(tmp_path):
    done = launch(tmp_path, "time.sleep(1.5); sys.exit(75)")
    assert "interrupted after" in done.stdout and results.read(tmp_path / "cell") is None


def test_a_cell_that_does_not_stop_in_time_is_killed_and_interrupted(tmp_path):
    """Nobody may be there for a second Ctrl-C: make itself may have been killed."""
    command = plan(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(folder + '/up', 'w')\ntime.sleep(60)", stop=1)
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "cell/up").exists():
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert "interrupted by signal 9" in launcher.communicate(timeout=20)[0] and results.read(tmp_path / "cell") is None


@pytest.mark.parametrize("counts, state", [(iter([3, 4]), "failed"), (iter([3, 3]), None), (iter([None]), None)])
def test_a_kill_is_for_want_of_memory_only_where_the_kernel_says_so(tmp_path, monkeypatch, counts, state):
    monkeypatch.setattr(process, "memory_kills", lambda: next(counts))
    run_planned(tmp_path, "large = b'x' * (200 << 20)\nos.kill(os.getpid(), signal.SIGKILL)")
    record = results.read(tmp_path / "cell")
    assert (record and record["state"]) == state
    if record:
        peak = record["peak_memory_bytes"]
        assert peak > 200 << 20 and record["reason"].startswith("out of memory: killed by signal 9 ")
        assert record["reason"].endswith(f" (peak {peak / 2 ** 30:.1f} GiB)")


def test_a_results_folder_without_room_is_one_sentence_and_the_cell_is_interrupted(tmp_path, monkeypatch):
    """Room for the log, but none for the record of the failure."""
    real = atomic.write_json
    monkeypatch.setattr(atomic, "write_json", lambda path, value: real(path, value) if path.name != "metrics.json" else full())

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")
    what, again = refusal(run_planned, tmp_path, "sys.exit(3)")
    assert what == f"{tmp_path}/cell cannot be written: No space left on device." and "make again" in again
    assert results.read(tmp_path / "cell") is None


def test_the_display_reads_whole_rows_and_tells_the_time_left(tmp_path, capsys):
    display = Display(tmp_path, "1/3  V1 seed 7", "1/3")
    assert display._text().startswith("1/3  V1 seed 7: starting (0 s)")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"progress": 0.25, "train_loss_step": 3.0, "tokens_per_second": 12000.0}\n{"progress": 0.')
    display._read()
    assert display._text() == "1/3  V1 seed 7:  25 %  loss 3.000  12.0 k tokens/s"
    path.write_text(path.read_text() + '5, "val_loss": 2.5, "train_loss_step": null}\n')
    display._read()
    display.first = (display.first[0] - 10, 0.25)
    assert display._text().startswith("1/3  V1 seed 7:  50 %  loss 3.000  val 2.500  12.0 k tokens/s  20 s left  study ")
    path.write_text("")  # a resumed cell has cut its rows
    display._read()
    assert display.offset == 0


@pytest.mark.parametrize("damage", [
    b"[" * 100_000, b"\xff\xfe{", b"[1]", b"7", b'{"progress": "half", "iteration": null}', b"{"])
def test_the_display_passes_over_rows_that_are_damaged(tmp_path, damage):
    display = Display(tmp_path, "1/1  V1 seed 7", "1/1")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"progress": 0.25}\n' + damage + b'\n{"val_loss": 2.5, "iteration": 9}\n')
    display._read()
    assert display._text() == "1/1  V1 seed 7:  25 %  val 2.500" and display.where() == ", after iteration 9"


GOOD_PLAN = {"step": "V1", "optimizer": "adamw", "study": "s", "trainer": "t.py", "config": "", "identity": {}, "symbols": {},
             "limits": {"CELL_TIMEOUT": 0, "STOP_SECONDS": 1}}


@pytest.mark.parametrize("text", [
    "[" * 100_000, "", "null", "[]", "9" * 5000, *(json.dumps(GOOD_PLAN | part) for part in (
        {"step": 1}, {"config": None}, {"symbols": []}, {"limits": {}}, {"limits": {"CELL_TIMEOUT": "0", "STOP_SECONDS": 1}}))])
def test_a_plan_that_is_damaged_is_refused_before_anything_is_touched(tmp_path, text):
    path = stored(tmp_path, text)
    what, again = refusal(run, tmp_path / "cell", path, 7, "1/1", None)
    assert what.startswith(f"{path} is not what a plan has written (") and again.startswith("make again")
    assert not (tmp_path / "cell").exists()


def test_a_plan_with_a_value_that_was_changed_is_refused(tmp_path):
    """It would run under the identity of what was planned."""
    path = stored(tmp_path, json.dumps(GOOD_PLAN | {"config": "CONFIG_BATCH_SIZE=8\n"}))
    path.write_text(path.read_text().replace("BATCH_SIZE=8", "BATCH_SIZE=9"))
    what, again = refusal(run, tmp_path / "cell", path, 7, "1/1", None)
    assert "(ValueError: its content does not have the hash in its name)" in what and again.startswith("make again")
    assert not (tmp_path / "cell").exists()


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "9" * 5000, "1;id", "\u0661"])
def test_the_number_of_make_in_the_environment_is_a_number(tmp_path, text):
    done = launch(tmp_path, "sys.exit(3)", variables={process.MAKE_VARIABLE: text})
    assert done.returncode == 2 and done.stderr.count("\n") == 2 and "Traceback" not in done.stderr
    assert "KABLATE_MAKE_PID=" in done.stderr and not (tmp_path / "cell").exists()


def test_cells_side_by_side_draw_no_live_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(os.environ, "MAKEFLAGS", " -j2 --jobserver-auth=3,4")
    assert not Display(tmp_path, "t", "1/2").live


def test_a_cell_that_outlives_its_launcher_is_not_started_a_second_time(tmp_path):
    """kill -9 of the launcher of a cell that does not stop: it keeps the cell's lock."""
    program = f"{SIGNED}\ntime.sleep(60)"
    launcher, cell = begun(tmp_path, program, stop=1)
    launcher.kill()
    launcher.wait()
    try:
        done = launch(tmp_path, program, stop=1)
        assert done.returncode == 0 and "its last process has not stopped" in done.stdout
        assert (tmp_path / "cell/started").read_text() == f"{cell}\n" and alive(cell)
    finally:
        os.kill(cell, signal.SIGKILL)
    wait_for(lambda: not alive(cell))
    done = launch(tmp_path, "sys.exit(75)")
    assert "interrupted after" in done.stdout, "its lock ended with it"


SAVES = f"""def saves(*_):
    {UNTIL_RELEASED}
    open(folder + '/saved', 'w')
    sys.exit(75)
signal.signal(signal.SIGTERM, saves)
process.die_with_launcher()
{SIGNED}
time.sleep(60)"""


def test_a_cell_that_still_saves_is_waited_for_and_then_goes_on(tmp_path):
    """kill -9 of the launcher, and another make at once, which would be back before the cell has saved."""
    launcher, _ = begun(tmp_path, SAVES)
    launcher.kill()
    launcher.wait()
    second, said = waiting(tmp_path, "assert os.path.exists(folder + '/saved')\nsys.exit(75)")
    (tmp_path / "cell/release").touch()
    assert "its last process still stops, which may take 1 min" in said
    assert "interrupted after" in second.communicate(timeout=30)[0]


def test_who_waits_for_a_cell_does_not_run_one_that_has_failed_meanwhile(tmp_path):
    """Its launcher was asked to stop and lives still, to write down how the cell ends."""
    launcher, cell = begun(tmp_path, SAVES.replace("sys.exit(75)", "sys.exit(3)"))
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    second, said = waiting(tmp_path, f"{SIGNED}\nsys.exit(75)")
    (tmp_path / "cell/release").touch()
    assert "still stops" in said and "another make has finished it meanwhile" in second.communicate(timeout=30)[0]
    launcher.communicate(timeout=30)
    assert results.read(tmp_path / "cell")["state"] == "failed" and (tmp_path / "cell/started").read_text() == f"{cell}\n"


def test_who_waits_for_a_cell_ends_with_its_make(tmp_path):
    launcher, cell = begun(tmp_path, f"{SIGNED}\ntime.sleep(60)")
    launcher.kill()
    launcher.wait()
    make = subprocess.Popen(["sleep", "60"])
    try:
        second, _ = waiting(tmp_path, "sys.exit(75)", {process.MAKE_VARIABLE: str(make.pid)})
        make.kill()
        make.wait()
        assert "has not stopped" in second.communicate(timeout=20)[0]
    finally:
        make.kill()
        os.kill(cell, signal.SIGKILL)


def test_a_cell_that_hangs_is_killed_with_its_group_also_where_its_launcher_was_killed(tmp_path):
    program = ("import subprocess\nhelper = subprocess.Popen(['sleep', '60'])\n"
               "open(folder + '/helper', 'w').write(str(helper.pid))\n"
               f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprocess.die_with_launcher()\n{SIGNED}\ntime.sleep(60)")
    launcher, cell = begun(tmp_path, program, stop=2)
    launcher.kill()
    launcher.wait()
    time.sleep(1)
    assert alive(cell), "it has STOP_SECONDS"
    wait_for(lambda: not alive(cell) and not alive(int((tmp_path / "cell/helper").read_text())), 10)


def test_a_launcher_that_breaks_takes_its_cell_with_it(tmp_path, monkeypatch):
    def update(display):
        if (tmp_path / "cell/started").exists():
            raise BrokenPipeError
    monkeypatch.setattr(Display, "update", update)
    with pytest.raises(BrokenPipeError):
        run_planned(tmp_path, f"{IN_TREE}\n{SAVES}".replace(UNTIL_RELEASED, "time.sleep(1)"))
    assert (tmp_path / "cell/saved").exists() and not alive(int((tmp_path / "cell/started").read_text()))


def test_a_lock_of_a_folder_that_was_archived_meanwhile_is_not_the_cells(tmp_path, monkeypatch):
    """Opened before a plan moved the folder away, and given after: another launcher could run the cell in the new folder."""
    from filelock import FileLock

    real, moved = FileLock.acquire, []

    def acquire(lock, *arguments, **options):
        held = real(lock, *arguments, **options)
        if not moved:
            moved.append(os.rename(tmp_path / "cell", tmp_path / "archived"))
        return held

    monkeypatch.setattr(FileLock, "acquire", acquire)
    program = ("import fcntl\nfile = open(folder + '/.lock')\n"
               "try:\n    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
               "except OSError:\n    open(folder + '/locked', 'w')\nsys.exit(75)")
    assert run_planned(tmp_path, program) == 0
    assert moved and (tmp_path / "cell/locked").exists() and (tmp_path / "cell/.config").exists()
    assert os.listdir(tmp_path / "archived") == [".lock"]


# What a cell imports

@pytest.mark.parametrize("bytecode, writable, forbidden, kept", [
    (True, False, True, True), (False, True, False, True), (False, True, True, False), (False, False, False, False)])
def test_bytecode_is_kept_in_the_users_cache_where_it_would_be_lost(bytecode, writable, forbidden, kept, tmp_path, monkeypatch):
    torch = tmp_path / "torch"
    torch.mkdir()
    if bytecode:
        (torch / "__pycache__").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(torch)]))
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "cache" / "kablate" / "bytecode")}
    assert bytecode_is_kept() == ({} if kept else own)
    monkeypatch.setattr(sys, "pycache_prefix", "/elsewhere")
    assert bytecode_is_kept() == {}, "somebody has said where"


def test_without_torch_there_is_no_bytecode_to_keep(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bytecode_is_kept() == {}


@pytest.mark.parametrize("resumed, said", [
    (0, "20 s of training, 21 s in all"), (2, "20 s of training, 21 s since it went on")])
def test_the_seconds_of_a_finished_cell_are_those_of_this_process(tmp_path, capsys, dotconfig, resumed, said):
    dotconfig()
    cell = expand(Study(), [1], ["V0"])[0]
    finish(tmp_path, cell, resumed=resumed)
    conclude(tmp_path / cell.name, cell, "1/1", Display(tmp_path / cell.name, "1/1", "1/1"), 0, 0, 21.0, None)
    assert said in capsys.readouterr().out
