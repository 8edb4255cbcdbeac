"""Slots: who gets which GPU, who waits, what outlives a launcher, and who is told that it had company."""

import os
import signal
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from lib import generations, results, slots
from tests.harness import ROOT, refusal, wait_for
from tests.lib.test_launch import plan
from tests.lib.test_process import alive

LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-2)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-bbcc-3)
"""
SPLIT = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa-1)
  MIG 3g.20gb     Device  0: (UUID: MIG-11)
  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-aaaa-1/2/0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb-2)
"""
ALIKE = ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-bbcc-3"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(listing): a machine with these GPUs, whose temporary folder is the test's own; none without a listing."""
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(slots, "CARDS", tmp_path / "cards")
    monkeypatch.setattr(slots, "POLL_SECONDS", 0.01)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def with_gpus(listing):
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n[ $1 = -L ] && printf %s '{listing}'\n")
        (programs / "nvidia-smi").chmod(0o755)
    return with_gpus


class Cells:
    """Cells of a study that take slots and give them back."""

    def __init__(self, folder: Path):
        self.folder, self.stacks = folder, {}

    def start(self, name, config="", ended=lambda: True):
        """What the cell was given; None if it would have to wait. It asks twice: `ended` is looked at before each try."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        asked = iter([False])
        stack = self.stacks[name] = ExitStack()
        return stack.enter_context(slots.held(config, folder, name, lambda: next(asked, None) is None and ended()))

    def end(self, name, state="done"):
        if state == "done":
            (self.folder / name / results.NAME).write_text("{}")
        self.stacks.pop(name).close()

    def met(self, name):
        return (self.folder / name / slots.MARK).exists()


@pytest.fixture
def cells(tmp_path):
    found = Cells(tmp_path)
    yield found
    for name in list(found.stacks):
        found.end(name)


# How many

@pytest.mark.parametrize("jobs, gpus, per_step, per_gpu, expected", [
    (1, 8, 0, 1, 8), (1, 1, 0, 1, 1), (1, 0, 0, 1, 0),  # one after the other: all of the box
    (2, 8, 0, 1, 1), (0, 8, 0, 1, 1), (1, 8, 0, 2, 1),  # side by side: one each
    (1, 8, 2, 1, 2), (4, 8, 2, 1, 2), (4, 8, 8, 1, 8), (1, 8, 2, 3, 2), (1, 0, 4, 1, 0)])
def test_the_gpus_of_a_cell(jobs, gpus, per_step, per_gpu, expected):
    assert slots.devices_of_cell(jobs, gpus, per_step, per_gpu) == expected


def test_more_gpus_than_there_are_is_refused():
    assert refusal(slots.devices_of_cell, 1, 2, 4, 1) == (
        "GPUS_PER_STEP=4, but this machine has 2 to use.",
        "set a smaller GPUS_PER_STEP in make menuconfig, or CUDA_VISIBLE_DEVICES to more GPUs.")


@pytest.mark.parametrize("gpus, per_step, per_gpu, expected", [
    (8, 0, 1, 1), (8, 1, 1, 8), (8, 4, 1, 2), (8, 3, 1, 2), (2, 0, 3, 6), (0, 1, 1, 1), (0, 0, 4, 1)])
def test_cells_with_room_side_by_side(gpus, per_step, per_gpu, expected):
    assert slots.cells_at_once(lambda: ["GPU"] * gpus, per_step, per_gpu) == expected


@pytest.mark.parametrize("flags, expected", [
    ("", 1), ("n", 1), (" -j8 --jobserver-auth=3,4", 8), ("w -j3 --jobserver-auth=3,4", 3), (" -j", 0),
    ("-j2", 2), (" -- OUT=a -j4", 1), ("--no-print-directory", 1)])
def test_the_jobs_of_make(monkeypatch, flags, expected):
    monkeypatch.setenv("MAKEFLAGS", flags)
    assert slots.jobs_of_make() == expected


# Which there are

@pytest.mark.parametrize("wanted, expected", [
    (None, ALIKE), ("", []), ("-1", []), ("NoDevFiles", []), ("1", ["GPU-bbbb-2"]), ("2,0", ["GPU-bbcc-3", "GPU-aaaa-1"]),
    ("0,7,1", ["GPU-aaaa-1"]), ("0,0", ["GPU-aaaa-1"]), ("GPU-a", ["GPU-aaaa-1"]), ("GPU-bb,0", []),
    ("GPU-bbcc-3, 1", ["GPU-bbcc-3", "GPU-bbbb-2"])])
def test_gpus_that_make_may_use(machine, monkeypatch, wanted, expected):
    machine(LISTING)
    if wanted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert slots.gpus() == expected


def test_numbers_stay_numbers_where_cuda_may_count_otherwise(machine, monkeypatch):
    """It puts the fastest first, unless it is told to go by the bus."""
    machine(LISTING.replace("H100", "A10", 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert slots.gpus() == ["1", "0"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert slots.gpus() == ["GPU-bbbb-2", "GPU-aaaa-1"]


def test_a_gpu_that_is_split_is_its_parts(machine, cells):
    machine(SPLIT)
    assert slots.gpus() == ["MIG-11", "MIG-GPU-aaaa-1/2/0", "GPU-bbbb-2"]
    assert cells.start("a", "CONFIG_GPUS_PER_STEP=3").devices == tuple(slots.gpus()), "also where its name has slashes"


def test_without_the_program_the_driver_is_asked_and_without_both_there_are_none(machine, tmp_path):
    assert slots.gpus() == []
    for number, uuid in enumerate(("GPU-1", "GPU-2")):
        (tmp_path / f"cards/0000:0{number}:00.0").mkdir(parents=True)
        (tmp_path / f"cards/0000:0{number}:00.0/information").write_text(
            f"Model: \t\t NVIDIA L4\nIRQ:   \t\t 16\nGPU UUID: \t {uuid}\nVideo BIOS: \t 95\n")
    assert slots.gpus() == ["GPU-1", "GPU-2"]


def test_a_program_that_fails_is_as_if_it_were_not_there(machine, tmp_path):
    machine(LISTING)
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nprintf %s 'Failed to initialize NVML'; exit 9\n")
    assert slots.gpus() == []


# Who gets which

def test_each_cell_of_make_j_gets_its_own_and_the_next_one_waits(machine, cells, monkeypatch, capsys):
    machine(LISTING)
    monkeypatch.setenv("MAKEFLAGS", " -j8")
    given = [cells.start(name) for name in "abc"]
    assert [slot.devices for slot in given] == [(uuid,) for uuid in ALIKE]
    assert given[1].environment["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-2"
    assert cells.start("d") is None
    assert capsys.readouterr().out == "d: waits until other cells leave it 1 of 3 GPUs\n"
    cells.end("b")
    assert cells.start("e").devices == ("GPU-bbbb-2",)
    assert not any(map(cells.met, "abcde"))


@pytest.mark.parametrize("config", ["CONFIG_EVALUATE_ONLY=y", 'CONFIG_KVSPLICE=y\nCONFIG_INIT_FROM_STEP="V0"'])
def test_a_cell_of_one_process_takes_one_of_the_box(machine, cells, config):
    machine(LISTING)
    assert cells.start("a", f"{config}\nCONFIG_GPUS_PER_STEP=2").devices == ("GPU-aaaa-1",)


def test_a_cell_that_waits_says_so_once_and_starts_when_one_is_free(machine, cells, capsys):
    machine(LISTING)
    cells.start("a")
    threading.Timer(0.2, cells.end, ["a"]).start()
    assert cells.start("b", ended=lambda: False).devices == tuple(ALIKE), "make without -j: all of the box"
    assert capsys.readouterr().out.count("waits") == 1


def test_a_cell_of_several_gpus_gets_all_or_none(machine, cells):
    machine(LISTING)
    two = "CONFIG_GPUS_PER_STEP=2\n"
    assert cells.start("a", two).environment["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa-1,GPU-bbbb-2"
    assert cells.start("b", two) is None
    assert cells.start("c", "CONFIG_GPUS_PER_STEP=1").devices == ("GPU-bbcc-3",), "b has left it"


def test_cells_that_share_are_spread_first_and_told_that_they_met(machine, cells):
    machine(LISTING)
    shared = "CONFIG_CELLS_PER_GPU=2"
    assert [cells.start(name, shared).devices[0] for name in "abcd"] == [*ALIKE, ALIKE[0]]
    assert {name: cells.met(name) for name in "abcd"} == {"a": True, "b": False, "c": False, "d": True}
    assert cells.start("alone", "CONFIG_GPUS_PER_STEP=1") is None, "of another study: every GPU has a cell"
    assert [cells.start(name, shared).devices[0] for name in "ef"] == ALIKE[1:] and cells.start("g", shared) is None
    for name in "cf":
        cells.end(name)
    assert cells.start("alone", "CONFIG_GPUS_PER_STEP=1").devices == ("GPU-bbcc-3",)
    assert cells.start("h", shared) is None and not cells.met("alone"), "what one has alone is not shared by another"


# On a CPU

@pytest.mark.parametrize("config", ["", 'CONFIG_DEVICE="cpu"'])
def test_on_a_cpu_nobody_waits_and_nothing_is_set_but_who_met_is_told(machine, cells, monkeypatch, config):
    if config:
        machine(LISTING)
    for name in "abc":
        slot = cells.start(name, config)
        assert slot.devices == () and slot.environment == {slots.SLOT_VARIABLE: "cpu"}
        if name == "a":
            cells.end("a")
            assert not cells.met("a")
    assert not cells.met("a") and cells.met("b") and cells.met("c")
    monkeypatch.setenv(slots.SLOT_VARIABLE, "cpu")
    assert slots.shared(cells.folder / "b") is True and slots.shared(cells.folder / "a") is False
    cells.end("b")
    assert not cells.met("b"), "its record says it now"


def test_what_nobody_has_looked_at_is_unknown(tmp_path):
    assert slots.shared(tmp_path) is None


def test_company_is_not_forgotten_when_a_cell_is_interrupted(machine, cells):
    cells.start("a")
    cells.start("b")
    (cells.folder / "a" / generations.NEWEST).touch()
    for name in "ab":
        cells.end(name, "interrupted")
    cells.start("a")
    assert cells.met("a"), "the first part of what it resumes had a neighbour"
    cells.end("a", "interrupted")
    cells.start("b")
    assert not cells.met("b"), "it starts anew"


# The folder

def unsafe_link(path):
    path.symlink_to("/")


def unsafe_mode(path):
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize("make", [unsafe_link, unsafe_mode])
def test_a_folder_that_is_not_ours_alone_is_not_used(machine, cells, make):
    make(slots._home_path())
    assert cells.start("a").environment == {slots.SLOT_VARIABLE: ""}, "on a CPU nobody is stopped for it"
    machine(LISTING)
    what, todo = refusal(cells.start, "b")
    assert what.endswith("is not a folder of yours alone, so GPU slots in it could be anybody's.")
    assert todo == "remove it, or set TMPDIR to a folder of this machine."


def test_the_folder_is_private_and_holds_one_user_s_slots_of_one_machine(machine, cells):
    cells.start("a")
    assert slots._home_path().stat().st_mode & 0o777 == 0o700
    assert slots._home_path().name.startswith(f"kablate-slots-{os.getuid()}-")


# With launchers

SAYS = "open(folder + '/given', 'w').write(os.environ.get('CUDA_VISIBLE_DEVICES', '') + '\\n')"


def start(folder, program, **limits):
    folder.mkdir()
    return subprocess.Popen(plan(folder, program, **limits), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"MAKEFLAGS": " -j4"})


def given(folder):
    path = folder / "cell/given"
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text().strip()


def test_launchers_hand_out_gpus_and_one_that_waits_can_be_stopped(machine, tmp_path):
    machine("GPU 0: A (UUID: GPU-1)\n")
    one = start(tmp_path / "one", f"{SAYS}\ntime.sleep(60)")
    assert given(tmp_path / "one") == "GPU-1"
    two = start(tmp_path / "two", SAYS)
    assert two.stdout.readline() == "    1/1  V1 seed 7: waits until other cells leave it 1 of 1 GPUs\n"
    two.send_signal(signal.SIGTERM)
    assert two.wait(30) == 128 + signal.SIGTERM and "interrupted while it waited" in two.stdout.read()
    assert not (tmp_path / "two/cell/given").exists() and results.read(tmp_path / "two/cell") is None
    three = start(tmp_path / "three", SAYS)
    one.send_signal(signal.SIGTERM)
    assert given(tmp_path / "three") == "GPU-1"
    assert one.wait(30) == 128 + signal.SIGTERM and three.wait(30) == 0


def test_a_slot_outlives_its_launcher_while_the_cell_still_saves(machine, tmp_path, cells):
    machine("GPU 0: A (UUID: GPU-1)\n")
    one = start(tmp_path / "one", f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SAYS}\n"
                "open(folder + '/pid', 'w').write(str(os.getpid()) + '\\n')\ntime.sleep(60)")
    wait_for(lambda: (tmp_path / "one/cell/pid").exists() and (tmp_path / "one/cell/pid").read_text().endswith("\n"))
    cell = int((tmp_path / "one/cell/pid").read_text())
    one.kill()
    one.wait()
    assert alive(cell) and cells.start("b") is None
    os.kill(cell, signal.SIGKILL)
    wait_for(lambda: not alive(cell))
    assert cells.start("c").devices == ("GPU-1",)


def test_the_threads_of_a_cell_do_not_follow_from_j(machine, tmp_path):
    """Sums depend on their number."""
    found = []
    for flags in ("", " -j4"):
        folder = tmp_path / f"threads{len(found)}"
        folder.mkdir()
        command = plan(folder, "open(folder + '/given', 'w').write(repr(sorted((n, v) for n, v in os.environ.items() "
                               "if 'THREADS' in n)))")
        subprocess.run(command, cwd=ROOT, check=True, timeout=60, env=os.environ | {"MAKEFLAGS": flags}, capture_output=True)
        found.append((folder / "cell/given").read_text())
    assert found[0] == found[1]
