"""make torture can fail: what a trainer does wrong is found, what it does right is let through. No real training here."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lib import checkpoint
from scripts import torture
from scripts.torturing import arena, clock, damage, disk, kills
from scripts.torturing.arena import Arena, Failed, Reference
from scripts.torturing.drawn import Drawn
from scripts.torturing.watching import MARK, Files, Process, processes, send, trained_twice
from tests.harness import MEASURED, copy_tree, refusal

SLOW = """'Trains nothing, slowly: rows, checkpoints and weights like a real one, from its checkpoint if it has one.'
import json, os, shutil, subprocess, sys, time
from pathlib import Path
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from lib import atomic, process, results
process.die_with_launcher()
here, folder = Path(__file__).resolve().parent, Path(sys.argv[2])
provenance = json.loads((folder / "provenance.json").read_text())
measured = json.loads((here / "measured.json").read_text())
done = folder / "checkpoint.pt"
{before}
for i in range(5):
    time.sleep(0.05)
    with atomic.replacing(done) as temporary:
        shutil.copyfile(here / "weights.pt", temporary)
atomic.write_text(folder / "metrics.jsonl", json.dumps(dict(iteration=5, val_loss=3.0)) + "\\n")
with atomic.replacing(folder / "model.pt") as temporary:
    shutil.copyfile(here / "weights.pt", temporary)
{after}
results.write(folder, provenance, "done", **measured)
done.unlink()
"""


def made(folder, before="pass", after="pass") -> Arena:
    """An arena whose trainer is SLOW, with a line of its own."""
    tree = copy_tree(folder / "tree")
    (tree / "gpt2/train_ra_mla.py").write_text(SLOW.format(before=before, after=after))
    (tree / "gpt2/measured.json").write_text(json.dumps(MEASURED))
    checkpoint.save(tree / "gpt2/weights.pt", model={"w": torch.arange(4.0)})
    return Arena(folder / "arena", tree)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An arena whose trainer makes no mistake, and its undisturbed results."""
    place = made(tmp_path_factory.mktemp("good"))
    yield place, Reference(place.study("reference"), "cells")
    place.close()


def ended(study, *arguments):
    code, said = study.make("cells", *arguments)
    assert code == 0, said


def test_a_study_that_makes_no_mistake_survives_its_kills(tmp_path):
    place = made(tmp_path)
    two = {"ABLATION_STEPS": f'"{" ".join(arena.steps(2))}"', "SEEDS": '"2"'}
    reference = Reference(place.study("reference", **two))
    said = []
    tally, failures = kills.campaign(place, reference, 2, 1, said.append, per_study=2)
    assert failures == [] and tally.total == sum(tally.moments.values()) == 2 and tally.studies >= 1
    assert [line.split(":")[0] for line in said if line.startswith("kill ")] == ["kill 1", "kill 2"]
    assert not any(processes(study.folder) for study in place.studies)


def test_few_kills_still_meet_every_number_of_jobs(good, monkeypatch):
    met = []

    class Stub:
        def __init__(self, study, reference, jobs, number, draw, tally, say):
            met.append((jobs, number))
            tally.kills["SIGKILL", "cell"] += number

        def run(self):
            pass

    monkeypatch.setattr(kills, "Tormentor", Stub)
    monkeypatch.setattr(good[0], "study", lambda name, **_: type("", (), {"kill_all": lambda self: None})())
    for wanted in (3, 25):
        kills.campaign(good[0], None, wanted, 1, lambda _: None)
    assert met == [(1, 2), (2, 1), (1, 10), (2, 10), (1, 5)]


def test_cells_have_the_iterations_that_their_size_of_torture_asks_for(tmp_path):
    place = Arena(tmp_path / "short", made(tmp_path).tree, iterations=7)
    assert place.study("a").symbols["GPT2_MAX_ITERS"] == "7" and place.study("b", GPT2_MAX_ITERS="9").config.read_text().count(
        "CONFIG_GPT2_MAX_ITERS=9") == 1


def test_a_process_that_outlives_its_make_is_found_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(arena.Study.settle, "__defaults__", (1.0,))
    place = made(tmp_path, before="subprocess.Popen(['sleep', '300'], start_new_session=True)")
    study = place.study("orphans")
    with pytest.raises(Failed, match=r"there still runs: other \d+"):
        study.make("cells")
    assert processes(study.folder) == []


def test_a_half_file_under_its_own_name_is_found(good):
    place, reference = good
    study = place.study("half")
    ended(study)
    reference.audit(study.out)
    study.check_end(reference)
    cell, = study.cells()
    for name in ("model.pt", "provenance.json", ".config", "metrics.json"):
        whole = (cell / name).read_bytes()
        (cell / name).write_bytes(whole[:len(whole) // 2])
        with pytest.raises(Failed):
            reference.audit(study.out)
        (cell / name).write_bytes(whole)
    reference.audit(study.out)
    (cell / ".model.pt.abc.tmp").touch()
    with pytest.raises(Failed, match="temporary files are left: test_.*abc.tmp"):
        study.check_end(reference)
    (cell / ".model.pt.abc.tmp").rename(cell / "checkpoint.before.pt")
    with pytest.raises(Failed, match="checkpoints of finished cells are left: test_.*/checkpoint.before.pt"):
        study.check_end(reference)


def test_results_that_depend_on_a_kill_are_found(tmp_path):
    """A trainer that counts its starts in its loss."""
    place = made(tmp_path, after="measured['val_loss'] += len(list(folder.glob('*.log'))) * os.path.exists(here / 'killed')")
    reference = Reference(place.study("reference"), "cells")
    (place.tree / "gpt2/killed").touch()
    study = place.study("killed")
    ended(study)
    with pytest.raises(Failed, match="val_loss differ from an undisturbed run"):
        reference.check(study.out)


def test_other_weights_and_missing_rows_are_found(good):
    place, reference = good
    study = place.study("other")
    ended(study)
    cell, = study.cells()
    weights, rows = (cell / "model.pt").read_bytes(), (cell / "metrics.jsonl").read_text()
    checkpoint.save(cell / "model.pt", model={"w": torch.tensor([0.0, 1.0, 2.0, 3.0000002])})
    with pytest.raises(Failed, match="the weights differ"):
        reference.check(study.out)
    (cell / "model.pt").write_bytes(weights)
    (cell / "metrics.jsonl").write_text("")
    with pytest.raises(Failed, match="other rows"):
        reference.check(study.out)
    reference.check(study.out, rows=False)
    (cell / "metrics.jsonl").write_text(rows)
    reference.check(study.out)
    (cell / "metrics.json").unlink()
    with pytest.raises(Failed, match="has no result"):
        reference.check(study.out)


def test_two_trainers_of_one_cell_are_found_and_a_trainers_children_are_none():
    cell = Process(2, 1, "cell", "out/a")
    assert trained_twice([cell, Process(3, 2, "cell", "out/a"), Process(4, 1, "cell", "out/b")]) is None
    assert trained_twice([cell, Process(3, 1, "cell", "out/a")]) == "out/a"


def test_a_signal_reaches_the_processes_of_a_study_and_no_others(tmp_path):
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    own = subprocess.Popen(["sleep", "60"], start_new_session=True, env=os.environ | {MARK: str(tmp_path)})
    try:
        assert not send(tmp_path, stranger.pid, signal.SIGKILL) and not send(tmp_path, stranger.pid, signal.SIGKILL, group=True)
        assert [found.pid for found in processes(tmp_path)] == [own.pid]
        assert send(tmp_path, own.pid, signal.SIGTERM, group=True) and own.wait() == -signal.SIGTERM
        assert not send(tmp_path, own.pid, signal.SIGKILL) and stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_files_that_appear_are_seen_also_in_folders_that_appear(tmp_path):
    (tmp_path / "old").touch()
    with Files(tmp_path) as files:
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "a/b/.x.1.tmp").write_text("1")
        os.replace(tmp_path / "a/b/.x.1.tmp", tmp_path / "a/b/x")
        seen = []
        while event := files.next(0.2):
            seen.append((event.name, event.what))
    assert ("x", "in place") in seen and ("old", "in place") not in seen
    assert kills.matches(".x.1.tmp", "x") and kills.matches("x", "x") and not kills.matches(".xy.1.tmp", "x")


@pytest.mark.parametrize("how, data, bits", [
    (damage.flip, bytes(100), 1), (damage.flip_token, bytes(100), 1), (damage.beyond, bytes(100), 3),
    (damage.flip_name, b"CONFIG_A=y\nCONFIG_BCD=1\nCONFIG_EFG=n\n", 1),
])
def test_a_damage_changes_the_bits_it_says(how, data, bits):
    for seed in range(20):
        changed = how(data, random.Random(seed))
        assert len(changed) == len(data)
        assert sum((a ^ b).bit_count() for a, b in zip(data, changed, strict=True)) == bits


def test_cases_damage_files_that_are_cut_in_a_name_or_lose_a_byte():
    assert damage.cut_name(b"CONFIG_A=y\nCONFIG_BCD=1\nCONFIG_EFG=n\n", None) == b"CONFIG_A=y\nCONFIG_BCD=1\nCONFIG_EFG"
    assert damage.cut_line(b"CONFIG_A=y\nCONFIG_BCD=1\nCONFIG_EFG=n\n", None) == b"CONFIG_A=y\nCONFIG_BCD=1\n"
    assert damage.odd(b"1234", None) == b"123" and damage.cut(b"1234", None) == b"12" and damage.empty(b"1", None) == b""
    assert len({case.name for case in damage.CASES}) == len(damage.CASES)


def test_a_damage_that_nobody_notices_is_a_failure(good):
    """The stand-in does not look at its checkpoint, so nothing names a damaged one; the plan's own file is refused."""
    place, reference = good
    damages = damage.Damages(place, reference, 1)
    study = place.study("begun")
    ended(study)
    cell, = study.cells()
    (cell / "metrics.json").unlink()
    (cell / "checkpoint.pt").write_bytes((cell / "model.pt").read_bytes())
    damages.states["interrupted"] = study, reference
    unseen = damage.Case(damage.CHECKPOINT, damage.cut, "interrupted", damage.EITHER)
    with pytest.raises(Failed, match="checkpoint.pt is damaged, and nothing says so"):
        damages.run(1, unseen)
    refused = damage.Case("out/plan/design.json", damage.cut, "interrupted", damage.REFUSED)
    assert damages.run(2, refused).startswith("refused: ")


def test_a_configuration_that_is_cut_at_a_line_is_refused(good):
    place, reference = good
    damages = damage.Damages(place, reference, 1)
    for number, how in enumerate((damage.cut_line, damage.empty), 100):
        said = damages.run(number, damage.Case("dot.config", how, "configured", damage.REFUSED))
        assert said == f"refused: dot.config is {'empty' if how is damage.empty else 'cut short'}: its end is missing."


def drawn(folder, code, monkeypatch) -> Drawn:
    """The parts fuzz and random, of ten each, by a stand-in for both programs."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport os, sys, time\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return Drawn(folder, 7, 10, 10)


def test_fuzz_and_random_configurations_are_parts(tmp_path, monkeypatch):
    parts = drawn(tmp_path, """
if "pytest" in sys.argv:
    print("tests\\n" + os.environ["KABLATE_FUZZ"] + " cases: shards 10")
else:
    print(f"12 random configurations: 2 refused (17 %), {sys.argv[-1]} checked and trained (30 cells), 0 broken, "
          f"seed {os.environ['KCONFIG_SEED']}")""", monkeypatch)
    (_, fuzz), = parts.fuzz()
    (_, configurations), = parts.random()
    assert fuzz() == "10 cases: shards 10"
    assert configurations().endswith("10 checked and trained (30 cells), 0 broken, seed 7")


@pytest.mark.parametrize("code, message", [
    ("print('9 cases: shards 9')", "10 were asked for, and not done: 9 cases: shards 9"),
    ("print('nothing')", "10 were asked for, and not done: nothing"),
    ("print('10 cases: shards 10\\n1 failed')\nsys.exit(1)", "it ends with 1, see .*fuzz.log: .*1 failed"),
])
def test_fewer_cases_than_were_asked_for_do_not_hold(tmp_path, monkeypatch, code, message):
    (_, fuzz), = drawn(tmp_path, code, monkeypatch).fuzz()
    with pytest.raises(Failed, match=message):
        fuzz()


def test_what_is_drawn_ends_with_the_torture(tmp_path, monkeypatch):
    parts = drawn(tmp_path, "time.sleep(300)", monkeypatch)
    (_, fuzz), = parts.fuzz()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fuzz)
        while not parts.processes:
            time.sleep(0.01)
        parts.close()
        with pytest.raises(Failed, match="it ends with -9"):
            waiting.result(30)
    with pytest.raises(Failed, match="it was stopped before it began"):
        fuzz()


@pytest.mark.parametrize("kills_asked, what, parts", [
    (8, "", ["kills", "disk", "clock", "damage"]), (99, "", ["kills", "disk", "clock", "damage"]),
    (100, "", ["kills", "disk", "clock", "damage", "fuzz", "random"]), (200, "kills", ["kills"]), (8, "fuzz", ["fuzz"]),
])
def test_the_full_size_has_all_parts(monkeypatch, tmp_path, kills_asked, what, parts):
    asked = []
    monkeypatch.setattr(torture.Torture, "run", lambda self, parts, *_: asked.append(parts))
    monkeypatch.setattr(torture, "Arena", lambda root, **_: SimpleNamespace(root=root, close=lambda: None))
    monkeypatch.setattr(torture.tempfile, "mkdtemp", lambda **_: str(tmp_path / "root"))
    monkeypatch.setattr(sys, "argv", ["torture", "--kills", str(kills_asked)])
    monkeypatch.setenv("WHAT", what)
    assert torture.main() == 0 and asked == [parts]
    monkeypatch.setattr(sys, "argv", ["torture", "--kills", "200", "--study", "3"])
    monkeypatch.setenv("WHAT", "")
    assert torture.main() == 0 and asked[1:] == [["kills"]], "to repeat one study"


def test_what_is_drawn_needs_no_study(monkeypatch, good, capsys):
    done = torture.Torture(good[0], 1, 0, None)
    monkeypatch.setattr(done.drawn, "_run", lambda name, *_, **__: "10000 cases: all")
    monkeypatch.setattr(torture, "Reference", None)
    done.run(["fuzz"], 1)
    assert done.report() and "10000 cases: all" in capsys.readouterr().out


def test_the_clock_jumps_for_the_time_of_day_alone(tmp_path):
    shifted = clock.Clock(tmp_path / "clock")
    code = ("import time, datetime, sys\nprint(time.time(), time.time_ns() / 1e9, datetime.datetime.now().timestamp(), "
            "datetime.datetime.now(datetime.timezone.utc).timestamp(), time.monotonic())")

    def told():
        out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(shifted.path)}, text=True,
                             capture_output=True, check=True).stdout
        return [float(word) for word in out.split()]

    *times, monotonic = told()
    assert all(abs(at - time.time()) < 60 for at in times)
    (tmp_path / "out").mkdir()
    shifted.jump(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mtime < time.time() + 10 < time.time() + clock.JUMP_SECONDS
    *times, later = told()
    assert all(abs(at + clock.JUMP_SECONDS - time.time()) < 60 for at in times) and 0 < later - monotonic < 60


def test_a_full_disk_has_the_room_that_it_was_left(tmp_path):
    """In a process of its own, whose mounts nobody else sees."""
    code = f"""import os, sys
from pathlib import Path
from scripts.torturing.disk import Disk, own_mounts
if why := own_mounts():
    sys.exit(f"left out: {{why}}")
disk = Disk(Path({str(tmp_path)!r}) / "disk")
disk.fill(100_000)
try:
    (disk.path / "large").write_bytes(bytes(200_000))
    print("large")
except OSError as error:
    print(error.errno)
(disk.path / "large").unlink()
(disk.path / "small").write_bytes(bytes(50_000))
disk.free()
(disk.path / "large").write_bytes(bytes(200_000))
disk.writable(False)
try:
    (disk.path / "more").touch()
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=arena.ROOT)
    if done.stderr.startswith("left out: "):
        pytest.skip(done.stderr)
    assert done.stdout.split() == ["28", "30"], done.stderr
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("code, said, outcome", [
    (2, "error: out cannot be written: No space left on device.", "sentence"), (0, "nothing of note", "goes on"),
    (2, "error: something else", "does not say"), (2, "Traceback (most recent call last):\nOSError: disk", "traceback"),
])
def test_a_full_disk_must_be_said_plainly(code, said, outcome):
    if outcome == "sentence":
        assert disk.said_plainly(code, said, [], "here") == outcome
    else:
        with pytest.raises(Failed, match=f"^here: .*{outcome}"):
            disk.said_plainly(code, said, [], "here")


def test_the_table_says_what_did_not_hold(good, capsys):
    def fails():
        raise Failed("half a file")

    done = torture.Torture(good[0], 1, 0, None)
    done._case("disk", "full", lambda: "complete and equal")
    assert done.report()
    done._case("clock", "back", fails)
    assert not done.report()
    out = capsys.readouterr().out
    assert "FAILED: half a file" in out and "1 of 2 did not hold" in out
    assert [line.split("|")[3].strip() for line in out.splitlines() if line.startswith(("| disk", "| clock"))] == [
        "yes", "yes", "NO"]


@pytest.mark.parametrize("words, what", [
    (["fire"], "there is no torture 'fire'."), (["kills", "--kills", "many"], "KILLS=many or SEED=1 is no whole number."),
    (["kills", "--seed", "-1"], "KILLS=8 or SEED=-1 is no whole number."),
    (["kills", "--seed", "1" * 11], f"KILLS=8 or SEED={'1' * 11} is no whole number."),
])
def test_bad_options_are_refused(words, what, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torture", *words])
    assert refusal(torture.main)[0] == what
