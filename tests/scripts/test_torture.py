"""make torture can fail: what a trainer does wrong is found, what it does right is let through. No real training here."""

import json
import os
import random
import re
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
from scripts.torturing import arena, clock, damage, disk, hang, kills, sites
from scripts.torturing.arena import Arena, Failed, Reference
from scripts.torturing.drawn import Drawn
from scripts.torturing.evidence import Evidence
from scripts.torturing.trap import FULL, HANG, READ_ONLY, Sprung, Trap
from scripts.torturing.watching import MARK, Files, Process, processes, send, trained_twice
from tests.harness import MEASURED, copy_tree, refusal, wait_for

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
    campaign = kills.Campaign(place, reference, 2, 1, said.append, per_study=2)
    campaign.run()
    tally = campaign.tally
    assert campaign.failures == [] and tally.total == sum(tally.moments.values()) == 2 and tally.studies >= 1
    assert [line.split(":")[0] for line in said if line.startswith("kill ")] == ["kill 1", "kill 2"]
    assert not any(processes(study.folder) for study in place.studies)


def test_few_kills_still_meet_every_number_of_jobs(good, monkeypatch):
    met = []

    class Stub:
        def __init__(self, study, reference, jobs, number, draw, tally, say):
            met.append((jobs, number))
            for _ in range(number):
                tally.kill("SIGKILL", "cell", "at a write")

        def run(self):
            pass

    monkeypatch.setattr(kills, "Tormentor", Stub)
    monkeypatch.setattr(good[0], "study", lambda name, **_: type("", (), {"kill_all": lambda self: None})())
    for wanted in (3, 25):
        kills.Campaign(good[0], None, wanted, 1, lambda _: None).run()
    assert met == [(1, 2), (2, 1), (1, 10), (2, 10), (1, 5)]


def test_two_studies_at_a_time_are_killed_as_often_as_was_asked_for(good, monkeypatch):
    """Also where a study completes before its share: one more follows."""
    at_once, most, numbers = [], [], []

    class Stub:
        def __init__(self, study, reference, jobs, number, draw, tally, say):
            self.number, self.tally = number, tally

        def run(self):
            at_once.append(self)
            most.append(len(at_once))
            time.sleep(0.3)
            for _ in range(self.number - (len(numbers) % 3 == 0)):
                self.tally.kill("SIGTERM", "make", "at any time")
            numbers.append(self.number)
            at_once.remove(self)

    monkeypatch.setattr(kills, "Tormentor", Stub)
    monkeypatch.setattr(good[0], "study", lambda name, **_: SimpleNamespace(kill_all=lambda: None))
    campaign = kills.Campaign(good[0], None, 32, 1, lambda _: None)
    with ThreadPoolExecutor(campaign.streams) as pool:
        for done in [pool.submit(campaign.run) for _ in range(campaign.streams)]:
            done.result()
    assert campaign.streams == 2 == max(most) and campaign.tally.total == 32 and all(number <= 10 for number in numbers)
    assert campaign.rows()[-1][1].startswith("32 of 32 kills") and campaign.rows()[-1][4]


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
        wait_for(lambda: processes(tmp_path))  # Popen returns when the program is loaded, a moment before its environment is
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
    (8, "", ["kills", "disk", "hang", "clock", "damage"]), (99, "", ["kills", "disk", "hang", "clock", "damage"]),
    (100, "", ["kills", "disk", "hang", "clock", "damage", "fuzz", "random"]), (200, "kills", ["kills"]), (8, "fuzz", ["fuzz"]),
])
def test_the_full_size_has_all_parts(monkeypatch, tmp_path, kills_asked, what, parts):
    asked = []
    monkeypatch.setattr(torture.Torture, "run", lambda self, parts, *_: asked.append(parts))
    monkeypatch.setattr(torture, "Arena", lambda root, **_: SimpleNamespace(root=root, close=lambda: None))
    monkeypatch.setattr(torture.tempfile, "mkdtemp", lambda **_: str(tmp_path / "root"))
    monkeypatch.setattr(sys, "argv", ["torture", "--kills", str(kills_asked)])
    monkeypatch.setenv("WHAT", what)
    monkeypatch.setenv("KABLATE_OUT", str(tmp_path / "kept"))
    assert torture.main() == 0 and asked == [parts]
    command = f"make torture KILLS={kills_asked} SEED=1" + (f" WHAT={what}" if what else "")
    assert json.loads((tmp_path / "kept/torture.json").read_text())["command"] == command
    monkeypatch.setattr(sys, "argv", ["torture", "--kills", "200", "--study", "3"])
    monkeypatch.setenv("WHAT", "")
    assert torture.main() == 0 and asked[1:] == [["kills"]], "to repeat one study"


TOUCHES = """import os, pathlib, sys
sys.path.insert(0, {root!r})
from lib import atomic
folder = pathlib.Path({folder!r})
for act in (lambda: (folder / "other").write_text("o" * 100), lambda: atomic.write_text(folder / "a.json", "x" * 100),
            lambda: (folder / "made").mkdir(), lambda: os.replace(folder / "other", folder / "moved"),
            lambda: (folder / "seen").read_text(), lambda: (folder / "seen").unlink()):
    try:
        act()
        print("done")
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.parametrize("name, harm, event, done", [
    ("a.json", FULL, "open", [0, 2, 3, 4, 5]), ("nothing", FULL, "open", [0, 1, 2, 3, 4, 5]),
    ("made", FULL, "os.mkdir", [0, 1, 3, 4, 5]), ("moved", FULL, "os.rename", [0, 1, 2, 4, 5]),
    ("seen", READ_ONLY, "any", [0, 1, 2, 3, 4]), ("*", READ_ONLY, "any", [4]),
])
def test_a_trap_harms_what_it_is_armed_for_and_nothing_else(tmp_path, name, harm, event, done):
    """And half a file never stands under its own name."""
    trap, folder = Trap(tmp_path / "trap"), tmp_path / "data"
    folder.mkdir()
    (folder / "seen").write_text("s" * 100)

    def touched():
        code = TOUCHES.format(root=str(arena.ROOT), folder=str(folder))
        ran = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(trap.path)}, text=True,
                             capture_output=True, check=True)
        return [number for number, line in enumerate(ran.stdout.splitlines()) if line == "done"]

    trap.arm(folder / name, harm, event)
    assert touched() == done
    assert bool(trap.sprung()) == (name != "nothing") == trap.met(folder / name if name != "*" else folder / "a.json")
    assert not (folder / "a.json").exists() or (folder / "a.json").read_text() == "x" * 100
    trap.disarm()
    for left in folder.glob("*"):
        left.rmdir() if left.is_dir() else left.unlink()
    (folder / "seen").touch()
    assert touched() == [0, 1, 2, 3, 4, 5]


def test_a_trap_leaves_half_a_file_where_one_is_written_in_place(tmp_path):
    """Which is what the disk would do, and what a case has to find."""
    trap = Trap(tmp_path / "trap")
    trap.arm(tmp_path / "x.json", FULL)
    code = f"open({str(tmp_path / 'x.json')!r}, 'w').write('x' * 100)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(trap.path)}, stderr=subprocess.DEVNULL)
    assert (tmp_path / "x.json").read_text() == "x" * 16
    assert [(one.event, one.path, one.words) for one in trap.sprung()] == [("open", tmp_path / "x.json", ["-c", code])]


def test_a_trap_can_hold_a_process_for_ever(tmp_path):
    trap = Trap(tmp_path / "trap")
    trap.arm(tmp_path / "x", HANG)
    process = subprocess.Popen([sys.executable, "-c", f"open({str(tmp_path / 'x')!r}, 'w')"],
                               env=os.environ | {"PYTHONPATH": str(trap.path)})
    try:
        while not trap.sprung():
            time.sleep(0.02)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "x").exists()


FULL_SAID = "error: {} cannot be written: No space left on device.\n  try: make room.\n"


@pytest.mark.parametrize("file, code, said, outcome", [
    ("out/a/x.pt", 2, FULL_SAID.format("{}/out/a"), "sentence"),
    ("out/a/x.pt", 2, FULL_SAID.format("{}/out/a/x.pt"), "sentence"),
    ("dot.config.old", 2, FULL_SAID.format("{}/dot.config"), "sentence"),
    ("out/a/x.pt", 2, FULL_SAID.format("{}/out/b"), "does not name out/a/x.pt"),
    ("out/a/x.pt", 2, FULL_SAID.format("{}/out/a2"), "does not name"), ("x", 2, FULL_SAID.format("{}"), "does not name"),
    ("out/a/x.pt", 2, "error: {}/out/a is bad.", "does not name"), ("out/x", 0, "all is well", "goes on"),
    ("out/x", 2, "Traceback (most recent call last):", "traceback"),
])
def test_a_refusal_must_name_the_file_that_found_no_room(tmp_path, file, code, said, outcome):
    study = SimpleNamespace(folder=tmp_path, out=tmp_path / "out")
    given = study, [Sprung("open", tmp_path / file, [])], file, code, said.format(tmp_path)
    if outcome == "sentence":
        assert sites.judged(*given) == outcome
    else:
        with pytest.raises(Failed, match=f"^{file}: .*{outcome}"):
            sites.judged(*given)
    with pytest.raises(Failed, match="nobody has tried to write it"):
        sites.judged(study, [], *given[2:])


def test_what_a_full_disk_must_leave_as_it_was_is_compared(tmp_path):
    for name in ("model.pt", "checkpoint.pt", "checkpoint.before.pt", "training.log"):
        (tmp_path / name).write_text(name)
    before = sites.contents(tmp_path)
    assert {path.name for path in before} == {"model.pt", "checkpoint.pt", "checkpoint.before.pt"}
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.before.pt")  # a newer one was written in between
    (tmp_path / "checkpoint.pt").write_text("newer")
    sites.unchanged(tmp_path, before, set())
    (tmp_path / "checkpoint.before.pt").unlink()
    with pytest.raises(Failed, match="checkpoint.pt is gone"):
        sites.unchanged(tmp_path, before, set())
    (tmp_path / "checkpoint.pt").write_text("checkpoint.pt")
    (tmp_path / "model.pt").write_text("half")
    with pytest.raises(Failed, match="model.pt is not what it was"):
        sites.unchanged(tmp_path, before, set())
    sites.unchanged(tmp_path, before, {tmp_path / "model.pt"})


@pytest.mark.parametrize("writes, message", [
    ("open(path, 'w').write('x' * 100)", "x.json: there is a x.json, which found no room"),
    ("open(path.with_name('.x.json.a.tmp'), 'w').write('x' * 100)", "what was half written is left: out/.x.json.a.tmp"),
    ("open(path.with_name('y'), 'w').write(''), open(path, 'w')", "out/y is not what it was"),
    ("None", "nobody has tried to write it"),
])
def test_a_program_that_writes_carelessly_is_found(good, writes, message, request):
    place, _ = good
    with sites.Trapped(place, f"careless-{abs(hash(request.node.name))}") as tried:
        tried.study.out.mkdir()
        (tried.study.out / "y").write_text("old")
        path = tried.study.out / "x.json"
        (place.tree / "careless.py").write_text(f"""import pathlib, sys
path = pathlib.Path({str(path)!r})
try:
    {writes}
except OSError as error:
    path.exists() and path.stat().st_size == 0 and path.unlink()
sys.exit(f"error: {{path}} cannot be written: File too large.")
""")
        with pytest.raises(Failed, match=message):
            tried.strike("out/x.json", lambda: tried.study.tool("careless"))


# Modules that write what a person would miss; each write has a case in sites.py or disk.py, or says here why it has none.
WRITERS = {
    "lib/batch_size.py", "lib/bundle.py", "lib/checkpoint.py", "lib/cluster.py", "lib/data/shards.py", "lib/design.py",
    "lib/generations.py",
    "lib/launch.py", "lib/loop.py", "lib/makefile.py", "lib/report/files.py", "lib/results.py", "lib/tracking.py",
    "gpt2/kvsplice.py", "gpt2/splicing.py", "gpt2/train_ra_mla.py", "scripts/browse.py", "scripts/kconfig.py",
    "scripts/describing/__init__.py", "scripts/report.py",
    "scripts/lm_eval.py",  # scores of finished cells, which are computed again
    "scripts/export.py",  # a finished cell once more, in a folder that appears whole or not at all
    "lib/trackers/__init__.py",  # what a tracker goes by: without it there is a warning and no tracker
    "lib/report/page.py",  # a cache, which does without
    "scripts/claims.py", "scripts/diagramming/canvas.py",  # pages and pictures of the sources themselves
    "scripts/docs.py",  # a site that is built again
    "scripts/bench.py", "scripts/bench_attention.py", "scripts/bench_decode.py", "scripts/bench_ranks.py",
    "scripts/bench_steps.py", "scripts/bench_train.py", "scripts/compile_matrix.py",
    "scripts/frontier.py", "scripts/ladder.py",  # a table that was printed as well
    "scripts/torturing/evidence.py", "scripts/defects.py",  # what a trial of the program came to
    "scripts/slurm_box.py",  # the configuration of a Slurm that is there for one trial
}


def test_whoever_writes_is_known_to_the_cases_of_a_full_disk():
    writes = re.compile(r"(atomic\.(write_|replacing|copy)|(checkpoint|generations|kvsplice)\.save\()")
    found = {path.relative_to(arena.ROOT).as_posix() for folder in ("lib", "gpt2", "scripts")
             for path in (arena.ROOT / folder).rglob("*.py") if writes.search(path.read_text())}
    assert found - {"lib/atomic.py"} <= WRITERS, "a new writer needs a case of a full disk (scripts/torturing/sites.py)"


def test_a_cell_that_does_not_hang_is_no_case_of_a_hang(good):
    place, reference = good
    study = hang._study(place, "gets-on")
    with pytest.raises(Failed, match="the cell is done"):
        hang._judged(study, reference, lambda: study.make("cells"))


def kept(folder) -> Evidence:
    return Evidence(folder, "make torture KILLS=8 SEED=1", torture.PARTS)


def test_what_is_drawn_needs_no_study(monkeypatch, good, tmp_path):
    done = torture.Torture(good[0], 1, 0, None, kept(tmp_path))
    monkeypatch.setattr(done.drawn, "_run", lambda name, *_, **__: "10000 cases: all")
    monkeypatch.setattr(torture, "Reference", None)
    done.run(["fuzz"], 1)
    assert done.evidence.held() and "10000 cases: all" in (tmp_path / "torture.md").read_text()


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


def test_the_table_says_what_did_not_hold(good, tmp_path):
    def fails():
        raise Failed("half a file")

    done = torture.Torture(good[0], 1, 0, None, kept(tmp_path))
    done._case("clock", "back", lambda: "complete and equal")
    assert done.evidence.held()
    done._case("disk", "full", fails)
    assert not done.evidence.held()
    text = (tmp_path / "torture.md").read_text()
    assert "half a file" in text and "1 of 2 did not hold" in text and text.startswith("# make torture KILLS=8 SEED=1\n")
    rows = [[word.strip() for word in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [["disk", "full", "NO"], ["clock", "back", "yes"]], "in the order of the parts"


def test_a_torture_that_is_stopped_leaves_what_it_has(monkeypatch, tmp_path, capsys):
    """Ctrl-C, or the end of the time that it was given; and at any moment before, where it is killed."""
    seen = []

    def run(self, parts, *_):
        campaign = kills.Campaign(self.arena, None, 200, 1, lambda _: None)
        self.evidence.follow(campaign)
        campaign.tally.kill("SIGKILL", "cell", "at a write")
        campaign.say("kill 1")
        self.evidence.await_case("fuzz", "10000 cases")
        self._case("clock", "back", lambda: "complete and equal")
        seen.append(json.loads((tmp_path / "torture.json").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(torture.Torture, "run", run)
    monkeypatch.setattr(torture, "Arena", lambda root, **_: SimpleNamespace(root=root, close=lambda: None, closed=False))
    monkeypatch.setattr(torture.tempfile, "mkdtemp", lambda **_: str(tmp_path / "root"))
    monkeypatch.setattr(sys, "argv", ["torture", "--kills", "200", "--out", str(tmp_path)])
    monkeypatch.delenv("WHAT", raising=False)
    with pytest.raises(KeyboardInterrupt):
        torture.main()
    last = json.loads((tmp_path / "torture.json").read_text())
    assert [content["state"] for content in (*seen, last)] == ["running", "stopped before its end"]
    for content in (*seen, last):
        assert content["kills"]["victims"] == {"cell": {"SIGKILL": 1}} and content["kills"]["total"] == 1
        assert [case["case"][:16] for case in content["cases"]] == ["1 of 200 kills, ", "back"]
        assert content["without_result"] == [{"part": "fuzz", "case": "10000 cases"}]
    assert seen[0]["cases"][0]["result"] == "no study has come to its end yet"
    said = "stopped before its end: what has come to its end held; 1 case of fuzz without a result"
    assert said in (tmp_path / "torture.md").read_text() and said in capsys.readouterr().out


def test_a_case_that_ends_with_the_torture_has_not_failed(tmp_path):
    place = made(tmp_path)
    done = torture.Torture(place, 1, 0, None, kept(tmp_path))
    done.evidence.await_case("clock", "back")
    done.close()
    done._case("clock", "back", lambda: place.study("after").make("cells"))
    assert done.evidence.rows == [] and done.evidence.awaited == [("clock", "back")]
    assert not any(place.root.glob("after/out")), "nothing is started any more"


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_done(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["torture", "--out", str(tmp_path / "file/out")])
    monkeypatch.setattr(torture.tempfile, "mkdtemp", None)
    what, do = refusal(torture.main)
    assert what == f"{tmp_path}/file/out cannot be written: Not a directory." and "OUT=" in do


@pytest.mark.parametrize("words, what", [
    (["fire"], "there is no torture 'fire'."), (["kills", "--kills", "many"], "KILLS=many or SEED=1 is no whole number."),
    (["kills", "--seed", "-1"], "KILLS=8 or SEED=-1 is no whole number."),
    (["kills", "--seed", "1" * 11], f"KILLS=8 or SEED={'1' * 11} is no whole number."),
])
def test_bad_options_are_refused(words, what, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torture", *words])
    assert refusal(torture.main)[0] == what
