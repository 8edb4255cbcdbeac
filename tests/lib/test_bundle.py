"""make pack and make unpack: what travels, what counts as done where it arrives, and what is refused without a trace."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from lib import bundle, design, results
from lib.bundle import pack, unpack
from lib.cells import Cell, expand
from lib.launch import prepare
from lib.plan import Options, Plan
from tests.harness import ROOT, TINY, finish, refusal, run, snapshot

DAMAGED = "check the path, or copy the archive anew; nothing was unpacked."
V0, V1 = "test_V0_adamwspam_none", "test_V1_adamwspam_none"
FILES = (*bundle.CELL_FILES, "fisher.json")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits for the disk prove nothing here."""
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def machine(dotconfig, tmp_path):
    """machine("a", ...): the study as configured on machine a, with results in a/; returns its Plan."""
    def configure(name, *assignments, steps="V0 V1", seeds="1337", study="a study"):
        dotconfig(*TINY, f'ABLATION_STEPS="{steps}"', f'SEEDS="{seeds}"', f'OUTPUT_DIR="{tmp_path / name}"', f'STUDY="{study}"',
                  *assignments)
        return Plan(Options())
    return configure


def logs(out, *cells):
    """The files that a cell's process and what came after it leave besides its record, and some that must not travel."""
    for cell in cells:
        (out / cell.name / "metrics.jsonl").write_text(f'{{"iteration": {cell.seed}}}\n')
        (out / cell.name / "training.log").write_text(f"{cell.name} trained\n")
        (out / cell.name / "fisher.json").write_text(f"of {cell.name}")
        for name in ("model.pt", "checkpoint.pt", ".lock", "kvsplice_V1.pt", "notes.txt"):
            (out / cell.name / name).write_text("stays here")


def finished(plan, *cells, **measured):
    finish(plan.out, *(cells or plan.cells), **measured)
    logs(plan.out, *(cells or plan.cells))


def states(plan):
    return {cell.name: (status.state, status.why) for cell, status, _ in Plan(plan.options).rows()}


DONE = ("done", "its result is on disk")


def contents(out):
    """{relative path: bytes} of everything below, empty if there is nothing."""
    return {os.path.relpath(path, out): content for path, (_, content) in snapshot(out).items()}


# What travels

def test_a_round_trip_brings_the_same_bytes_and_the_cells_count_as_done(machine, tmp_path):
    there = machine("a", seeds="1337 7")
    finished(there)
    made = pack(there.out, tmp_path / "x.tar.xz")
    assert sorted(made.cells) == sorted([V0, V1, f"{V0}_s7", f"{V1}_s7"]) and made.left_out == {}
    assert made.size == (tmp_path / "x.tar.xz").stat().st_size

    here = machine("b/deep/er", seeds="1337 7")
    report = unpack(here, tmp_path / "x.tar.xz")
    assert (report.added, report.replaced, report.same) == (sorted(made.cells), [], [])
    expected = {k: v for k, v in contents(there.out).items() if os.path.basename(k) in FILES}
    assert contents(here.out) == expected and len(expected) == 4 * 6
    assert set(states(here).values()) == {DONE} and not any(runs for _, _, runs in Plan(Options()).rows())
    assert not [p for p in tmp_path.rglob(".unpack-*")]

    before = snapshot(tmp_path)
    report = unpack(here, tmp_path / "x.tar.xz")
    assert (report.added, report.replaced, report.same) == ([], [], sorted(made.cells)) and snapshot(tmp_path) == before


def test_what_was_measured_afterwards_travels_and_is_no_part_of_the_result(machine, tmp_path):
    there, archive = machine("a"), tmp_path / "x.tar.xz"
    finished(there)
    for name in (V0, V1):
        (there.out / name / "fisher.json").unlink()
    pack(there.out, archive)
    here = machine("b")
    unpack(here, archive)
    for name in (V0, V1):
        (there.out / name / "fisher.json").write_text(f"of {name}")
    (here.out / V0 / "fisher.json").write_text("its own")
    pack(there.out, archive)
    before = snapshot(here.out)
    report = unpack(here, archive)
    assert (report.added, report.replaced, report.same) == ([], [], [V0, V1])
    after = snapshot(here.out)
    new = after.keys() - before.keys()
    assert [os.path.relpath(p, here.out) for p in new] == [f"{V1}/fisher.json"], "added to a cell that has none"
    assert {p: after[p] for p in before} == before, "and what is here stays"
    assert (here.out / V1 / "fisher.json").read_text() == f"of {V1}"
    fresh = machine("c")
    assert unpack(fresh, archive).added == [V0, V1] and (fresh.out / V0 / "fisher.json").read_text() == f"of {V0}"


def test_scores_travel_with_their_items(machine, tmp_path):
    there, archive = machine("a"), tmp_path / "x.tar.xz"
    finished(there)
    for cell in (V0, V1):
        for name in ("lm_eval.json", "lm_eval_arc_easy.jsonl", "lm_eval_my-task.jsonl"):
            (there.out / cell / name).write_text(f"{name} of {cell}")
    for name in ("lm_eval_.jsonl", "lm_eval_a b.jsonl", "lm_eval_a.json", "lm_evalx.jsonl"):
        (there.out / V0 / name).write_text("of somebody else")
    pack(there.out, archive)
    fresh = machine("b")
    assert unpack(fresh, archive).added == [V0, V1]
    assert sorted(p.name for p in (fresh.out / V0).glob("lm*")) == ["lm_eval.json", "lm_eval_arc_easy.jsonl",
                                                                    "lm_eval_my-task.jsonl"]
    here = machine("c")
    unpack(here, archive)
    for path in here.out.glob("test_*/lm_eval*"):
        path.unlink()
    (here.out / V0 / "lm_eval.json").write_text("its own, and of no task")
    before = snapshot(here.out)
    report = unpack(here, archive)
    assert (report.same, report.measured, report.not_taken) == ([V0, V1], [f"{V1}/lm_eval.json"], [f"{V0}/lm_eval.json"])
    after = snapshot(here.out)
    assert sorted(os.path.relpath(p, here.out) for p in after.keys() - before.keys()) == [
        f"{V1}/{name}" for name in ("lm_eval.json", "lm_eval_arc_easy.jsonl", "lm_eval_my-task.jsonl")]
    assert {p: after[p] for p in before} == before, "items of other scores are not mixed with those that are here"


def test_plans_travel_and_those_that_are_there_stay(machine, tmp_path):
    there = machine("a")
    there.write()
    finished(there)
    design.write(there.out, design.following([], design.content("V0", {"V0": "x", "V1": "y"}, [1337], 0.01, "fixed"), 0))
    plans = {p.name: p.read_bytes() for p in (there.out / "plan").glob("*.json")}
    assert len(plans) == 3
    made = pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b")
    (here.out / "plan").mkdir(parents=True)
    (here.out / "plan/design.json").write_text("[]")
    unpack(here, tmp_path / "x.tar.xz")
    assert {p.name: p.read_bytes() for p in (here.out / "plan").glob("*.json")} == plans | {"design.json": b"[]"}
    assert made.left_out == {}


@pytest.mark.parametrize("seeds, warned", [("1337 1338", False), ("1338", True)])
def test_cells_that_ran_by_another_plan_are_said(machine, tmp_path, seeds, warned):
    """A machine with a list of seeds of its own has a plan of its own."""
    here = machine("a", seeds="1337 1338")
    here.write()
    there = machine("b", seeds=seeds)
    there.write()
    finished(there, *(cell for cell in there.cells if cell.seed == 1338))
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("a", seeds="1337 1338")
    found = unpack(here, tmp_path / "x.tar.xz")
    assert found.other_plan == (there.history[-1]["hash"] if warned else None) and len(found.added) == 2


def test_the_archive_holds_records_and_logs_and_nothing_else(machine, tmp_path):
    there = machine("a")
    finished(there)
    (there.out / "plan").mkdir()
    (there.out / "archive" / f"{V0}.1").mkdir(parents=True)
    (there.out / "archive" / f"{V0}.1" / "metrics.json").write_text("{}")
    (there.out / "report.md").write_text("a report")
    (there.out / "plan/secret.txt").write_text("no plan")
    pack(there.out, tmp_path / "x.tar.xz")
    with tarfile.open(tmp_path / "x.tar.xz") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(f"{cell}/{name}" for cell in (V0, V1) for name in FILES)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.parametrize("ending", ["xz", "gz", "GZ", "tgz"])
def test_equal_cells_give_equal_bytes_whatever_the_clock_the_name_and_the_order(machine, tmp_path, ending):
    there = machine("a", seeds="1337 1338")
    finished(there)
    pack(there.out, tmp_path / f"x.tar.{ending}")
    for path in there.out.rglob("*"):
        os.utime(path, (5, 5))
        if path.is_file():
            os.chmod(path, 0o600)
    pack(there.out, tmp_path / f"another name.tar.{ending}")
    again = machine("b", seeds="1338 1337")
    for cell in reversed(there.cells):
        prepare(again.out / cell.name, cell)  # the same cells; their .config still names the folder a
        finished(again, cell)
    for cell in there.cells:
        (again.out / cell.name / ".config").write_bytes((there.out / cell.name / ".config").read_bytes())
    pack(again.out, tmp_path / f"y.tar.{ending}")
    assert (tmp_path / f"x.tar.{ending}").read_bytes() == (tmp_path / f"another name.tar.{ending}").read_bytes() == \
        (tmp_path / f"y.tar.{ending}").read_bytes()
    assert (tmp_path / f"x.tar.{ending}").read_bytes().startswith(b"\xfd7zXZ" if ending == "xz" else b"\x1f\x8b")
    assert unpack(machine("c", seeds="1337 1338"), tmp_path / f"x.tar.{ending}").added == sorted(c.name for c in there.cells)


def test_what_is_left_out_is_said_with_the_reason(machine, tmp_path, monkeypatch):
    there = machine("a", steps="V0 V1 V2 V3 V4 V5 V6", seeds="1337")
    v0, v1, v2, v3, v4, v5, v6 = there.cells
    finished(there, v0)
    finish(there.out, v1, state="diverged", reason="the training loss is nan at iteration 5")
    finish(there.out, v2, state="failed", reason="CUDA out of memory")
    (there.out / v3.name).mkdir()
    finished(there, v4)
    (there.out / v4.name / "metrics.json").write_text("{")
    finished(there, v5)
    (there.out / v5.name / "provenance.json").unlink()
    finished(there, v6)
    record = json.loads((there.out / v6.name / "metrics.json").read_text())
    (there.out / v6.name / "metrics.json").write_text(json.dumps(record | {"seed": 8, "checksum": None}))
    finish(there.out, Cell("V0", "adamwspam", 5, "test_by hand", v0.resolved))
    monkeypatch.setattr(bundle, "FILE_LIMIT", 100_000)
    (there.out / v0.name / "training.log").write_text("x" * 100_001)
    (there.out / "plan").mkdir()
    for name in ("0123456789abcdef.json", "design.json", "other.json"):
        (there.out / "plan" / name).write_text("{}")
    made = pack(there.out, tmp_path / "x.tar.xz")
    assert made.cells == [v0.name, v1.name]
    reasons = dict(made.left_out)
    assert reasons.pop(v4.name).startswith("its metrics.json cannot be read: Expecting property name")
    assert reasons == {
        v2.name: "it failed: CUDA out of memory", v3.name: "it has no result", v5.name: "it has no provenance.json",
        v6.name: "its provenance.json and metrics.json differ in seed", "test_by hand": "its name is none of a cell's",
        f"{v0.name}/training.log": "it is larger than 0 MiB",
        "plan/0123456789abcdef.json": "its content does not have the hash in its name",
        "plan/design.json": "it is not what was written before the first cell",
        "plan/other.json": "its name is none of a plan's"}


def test_there_must_be_something_to_pack_and_a_place_to_write(machine, tmp_path):
    there = machine("a")
    nothing = (f"{there.out} holds no finished cell.", "make, then make pack.")
    assert refusal(pack, there.out, tmp_path / "x.tar.xz") == nothing
    finish(there.out, *there.cells, state="failed", reason="it broke")
    assert refusal(pack, there.out, tmp_path / "x.tar.xz") == nothing and not (tmp_path / "x.tar.xz").exists()
    there = machine("b")
    finished(there)
    assert refusal(pack, there.out, tmp_path / "nowhere/x.tar.xz") == (
        f"{tmp_path}/nowhere/x.tar.xz cannot be written: No such file or directory.",
        "make pack FILE=name.tar.xz where you may write.")


def test_more_than_an_archive_may_hold_is_refused_where_it_is_packed(machine, tmp_path, monkeypatch):
    there = machine("a")
    finished(there)
    monkeypatch.setattr(bundle, "TOTAL_LIMIT", 10_000)
    assert refusal(pack, there.out, tmp_path / "x.tar.xz") == (
        f"the cells of {there.out} are more than an archive may hold (0 MiB).",
        "move some of them to a results folder of their own and pack it with OUT=.")


def test_a_failed_pack_leaves_the_old_archive(machine, tmp_path, monkeypatch):
    there = machine("a")
    finished(there)
    (tmp_path / "x.tar.xz").write_text("the old one")
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    path = tmp_path / "x.tar.xz"
    assert refusal(pack, there.out, path)[0] == f"{path} cannot be written: No space left on device."
    assert [p.name for p in tmp_path.glob("*x.tar.xz*")] == ["x.tar.xz"] and path.read_text() == "the old one"


# One study from several machines

def test_cells_of_two_machines_make_one_study(machine, tmp_path):
    for name, seeds in (("a", "1337"), ("b", "1338 7"), ("c", "1339")):
        plan = machine(name, seeds=seeds)
        finished(plan, val_loss=3.0 + len(seeds))
        pack(plan.out, tmp_path / f"{name}.tar.xz")
    here = machine("home", seeds="1337 1338 1339")
    for name in "abc":
        unpack(here, tmp_path / f"{name}.tar.xz")
    assert len(states(here)) == 6 and set(states(here).values()) == {DONE}
    assert (here.out / f"{V0}_s7/metrics.json").exists(), "a seed that this study has not asked for is welcome"
    grown = machine("home", seeds="1337 7")
    assert states(grown)[f"{V0}_s7"] == DONE, "and counts once it is asked for"


def test_a_cell_of_a_study_of_another_name_is_taken_if_it_is_the_same_cell(machine, tmp_path):
    there = machine("a", 'MARGIN="0.5"', study="elsewhere")
    finished(there)
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b", steps="V1 V0 V2")
    unpack(here, tmp_path / "x.tar.xz")
    assert states(here) == {V0: DONE, V1: DONE, "test_V2_adamwspam_none": ("planned", "never ran")}


def test_control_steps_and_a_learning_rate_sweep_travel_too(machine, tmp_path):
    there = machine("a", 'CONTROL_STEPS="A0"', 'TUNE_LR="0.5 1"', steps="V0 V1")
    sweep = Plan(Options(tune=True)).sweep
    finished(there)
    for number, cell in enumerate(sweep.cells):
        finished(there, cell, val_loss=3.0 + number)
    tuned = expand(there.study, [7], [*sweep.steps.values()])
    finished(there, *tuned)
    made = pack(there.out, tmp_path / "x.tar.xz")
    assert len(made.cells) == 3 + 4 + 4 and made.left_out == {}
    here = machine("b", 'CONTROL_STEPS="A0"', 'TUNE_LR="0.5 1"', steps="V0 V1")
    assert len(unpack(here, tmp_path / "x.tar.xz").added) == 11
    without = machine("c", 'TUNE_LR=""', steps="V0 V1")
    what, _ = refusal(unpack, without, tmp_path / "x.tar.xz")
    assert what.endswith("which is no cell of study a study: it has no such step, optimizer or base seed.")


@pytest.mark.parametrize("left", ["planned", "interrupted", "failed", "unreadable"])
def test_an_unfinished_cell_is_replaced_and_archived(machine, tmp_path, left):
    there = machine("a")
    finished(there)
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b")
    (here.out / V1).mkdir(parents=True)
    (here.out / V1 / "training.log").write_text("half\n")
    if left == "interrupted":
        prepare(here.out / V1, here.cells[1])
        (here.out / V1 / "checkpoint.pt").write_text("tensors")
    if left == "failed":
        finish(here.out, here.cells[1], state="failed", reason="it broke")
    if left == "unreadable":
        (here.out / V1 / "metrics.json").write_text("{")
    old = contents(here.out / V1)
    report = unpack(here, tmp_path / "x.tar.xz")
    assert (report.added, report.replaced) == ([V0], [V1]) and set(states(here).values()) == {DONE}
    archived = contents(here.out / "archive" / f"{V1}.1")
    archived.pop(".lock")
    assert archived == old and sorted(os.listdir(here.out / V1)) == sorted(FILES)


def test_a_cell_that_is_running_is_not_replaced(machine, tmp_path):
    there = machine("a")
    finished(there)
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b")
    (here.out / V1).mkdir(parents=True)
    code = f"from filelock import FileLock\nwith FileLock({str(here.out / V1 / '.lock')!r}): print('held', flush=True), input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = snapshot(tmp_path)
        assert refusal(unpack, here, tmp_path / "x.tar.xz") == (
            f"{here.out / V1} is being run.", "wait for it or stop it, then make unpack again; nothing was unpacked.")
        assert snapshot(tmp_path) == before
    finally:
        holder.communicate("\n", timeout=30)
    assert unpack(here, tmp_path / "x.tar.xz").replaced == [V1], "the lock is gone with its holder"


def test_a_cell_that_finishes_meanwhile_is_not_replaced(machine, tmp_path, monkeypatch):
    there = machine("a")
    finished(there)
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b")
    (here.out / V1).mkdir(parents=True)
    monkeypatch.setattr(os, "sync", lambda: finish(here.out, here.cells[1], val_loss=2.5))
    assert refusal(unpack, here, tmp_path / "x.tar.xz")[0] == f"{here.out / V1} already holds another result."
    assert results.read(here.out / V1)["val_loss"] == 2.5 and not (here.out / V0).exists()


@pytest.mark.parametrize("state, reason", [("done", None), ("diverged", "loss nan")])
def test_another_finished_result_is_refused_and_nothing_is_written(machine, tmp_path, state, reason):
    there = machine("a")
    finished(there)
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b")
    finish(here.out, here.cells[1], state=state, reason=reason, **({"val_loss": 2.99} if state == "done" else {}))
    before = snapshot(tmp_path)
    assert refusal(unpack, here, tmp_path / "x.tar.xz") == (
        f"{here.out / V1} already holds another result.",
        "move that folder away if the archive's is to take its place; nothing was unpacked.")
    assert snapshot(tmp_path) == before and not (here.out / V0).exists()


# Cells that are not of the study

@pytest.mark.parametrize("configured, why", [
    ({"steps": "V1"}, f"{V0}, which is no cell of study a study: it has no such step, optimizer or base seed."),
    ({"seeds": "7", "SEED": 7}, f"{V0}, which is no cell of study a study: it has no such step, optimizer or base seed."),
    ({"OPTIMIZER_ADAMW": "y"}, f"{V0}, which is no cell of study a study: it has no such step, optimizer or base seed."),
    ({"LEARNING_RATE": '"0.001"'}, f"{V0}, which is no cell of study a study: its result is of another configuration: "
                                   "LEARNING_RATE 0.0015 -> 0.001."),
    ({"GPT2_MAX_ITERS": 10}, f"{V0}, which is no cell of study a study: its result is of another configuration: "
                             "GPT2_MAX_ITERS 250 -> 10."),
])
def test_a_cell_that_is_not_of_the_study_is_refused_by_name(machine, tmp_path, dotconfig, configured, why):
    there = machine("a")
    finished(there)
    pack(there.out, tmp_path / "x.tar.xz")
    options = {k: configured.pop(k) for k in ("steps", "seeds") if k in configured}
    lines = dict(line.split("=", 1) for line in TINY) | {k: str(v) for k, v in configured.items()}
    dotconfig(*(f"{k}={v}" for k, v in lines.items()), f'ABLATION_STEPS="{options.get("steps", "V0 V1")}"',
              f'SEEDS="{options.get("seeds", "1337")}"', f'OUTPUT_DIR="{tmp_path / "b"}"', 'STUDY="a study"')
    here = Plan(Options())
    before = snapshot(tmp_path)
    assert refusal(unpack, here, tmp_path / "x.tar.xz") == (
        f"{tmp_path}/x.tar.xz holds {why}",
        "configure the study it was packed from, then make unpack again; nothing was unpacked.")
    assert snapshot(tmp_path) == before and not here.out.exists()


def test_a_seed_up_to_a_hundred_is_a_seed_and_no_count(machine, tmp_path):
    there = machine("a", seeds="3 5000")
    finished(there, *[c for c in there.cells if c.seed == 3])
    pack(there.out, tmp_path / "x.tar.xz")
    here = machine("b")
    assert unpack(here, tmp_path / "x.tar.xz").added == [f"{V0}_s3", f"{V1}_s3"]


def test_a_folder_whose_name_stands_for_another_cell_is_refused(machine, tmp_path):
    there = machine("a")
    v0, v1 = there.cells
    finished(there, Cell("V0", "adamwspam", 1337, V1, v0.resolved))
    pack(there.out, tmp_path / "x.tar.xz")
    assert refusal(unpack, machine("b"), tmp_path / "x.tar.xz")[0] == (
        f"{tmp_path}/x.tar.xz holds {V1}, which is no cell of study a study: it is V0 adamwspam seed 1337, and the folder's "
        "name stands for V1 adamwspam seed 1337.")


# The command

def test_the_command_packs_and_unpacks(machine, tmp_path):
    there = machine("a", steps="V0 V1 V2")
    finished(there, *there.cells[:2])
    (there.out / there.cells[2].name).mkdir()
    done = run("scripts.archive", "pack", FILE=tmp_path / "x.tar.xz")
    size = (tmp_path / "x.tar.xz").stat().st_size / 1000
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (f"left out test_V2_adamwspam_none: it has no result\n2 cells of {there.out} in {tmp_path}/x.tar.xz, "
                           f"without weights: {size:.1f} kB\n")
    here = machine("b")
    (here.out / V1).mkdir(parents=True)
    done = run("scripts.archive", "unpack", tmp_path / "x.tar.xz")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (f"replaced {V1}: it was unfinished, and is in archive/ now\n"
                           f"2 cells of {tmp_path}/x.tar.xz added to {here.out}, 0 kept\n")
    done = run("scripts.archive", "unpack", FILE=tmp_path / "x.tar.xz")
    assert done.stdout == (f"kept {V0}: it is here already, with the same result\n"
                           f"kept {V1}: it is here already, with the same result\n"
                           f"0 cells of {tmp_path}/x.tar.xz added to {here.out}, 2 kept\n")
    planned = run("scripts.plan").stdout
    assert planned.count("its result is on disk") == 2 and "0 to run" in planned


def test_the_command_names_its_archive_after_the_results_folder(machine, monkeypatch, tmp_path, capsys):
    from scripts import archive

    there = machine("my-study")
    finished(there)
    monkeypatch.setattr(archive, "ROOT", tmp_path)
    archive.main(["pack"])
    assert (tmp_path / "my-study.tar.xz").exists() and "2 cells of" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, what, todo", [
    (["unpack"], "no archive was given.", "make unpack FILE=name.tar.xz"),
    (["unpack", "/nowhere/x.tar.xz"], "/nowhere/x.tar.xz cannot be read: No such file or directory.", DAMAGED),
    (["unpack", "/"], "/ cannot be read: Is a directory.", DAMAGED),
])
def test_bad_input_is_two_sentences(machine, arguments, what, todo):
    machine("a")
    done = run("scripts.archive", *arguments)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {what}\n  try: {todo}\n", "")


def test_it_needs_no_torch():
    code = "import sys, scripts.archive; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
