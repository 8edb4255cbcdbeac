"""Real trackers without a network, read back by other means than they write; and trackers that fail, hang or are killed."""

import base64
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import design, trackers
from lib.config import load
from lib.tracking import MetricsLog, open_tracker
from tests.harness import ROOT, run_here

PROVENANCE = {"study": "gpt2-ra-ablation+tiny", "step": "V0", "identity": {"hash": "0123456789ab"}}
ALL = ("wandb", "trackio", "tensorboard")
# Of a cell's record, what no clock decides.
EQUAL = ("state", "reason", "val_loss", "best_val_loss", "train_loss", "iterations", "tokens", "parameters", "sizes", "data",
         "inactive", "kv_cache_bytes", "identity")
PICTURE = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No mode of the developer's shell; and time enough for a machine that runs other tests as well."""
    for name in ("WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 100.0)


@pytest.fixture
def cell(tmp_path):
    folder = tmp_path / "study" / "test_V0_adamwspam_none"
    folder.mkdir(parents=True)
    return folder


def configured(*names, **symbols):
    return load("gpt2-ra-ablation+tiny", "V0", {"TRACKER_SEVERAL": True, "TRACKERS": " ".join(names)} | symbols)


def started(folder, keep=0, names=ALL, **symbols):
    return MetricsLog(folder, keep, open_tracker(configured(*names, **symbols), folder, PROVENANCE))


def truth(folder):
    """The rows of metrics.jsonl without what is null."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def wandb_records(path):
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB of checksum, length and kind before each part."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), 7, b""  # 7 bytes of its own before all
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
        record += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def wandb_run(folder):
    """The one offline run there: (its record, [row])."""
    path, = folder.glob("wandb/offline-run-*/*.wandb")
    run, rows = None, []
    for record in wandb_records(path):
        if record.HasField("run"):
            run = run or record.run
        if record.HasField("history"):
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return run, rows


def trackio_runs(study):
    """[(its configuration, [row])] of the one database there."""
    path, = study.glob("trackio/*.db")
    with sqlite3.connect(path) as base:
        configs = base.execute("select run_id, config from configs order by id").fetchall()
        return [(json.loads(config), [json.loads(row) for row, in base.execute(
            "select metrics from metrics where run_id = ? order by id", (run,))]) for run, config in configs]


def tensorboard_points(folder):
    """{name: [(iteration, value)]} of all event files there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def expected_points(rows):
    found = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "iteration":
                found.setdefault(name, []).append((row["iteration"], pytest.approx(value, rel=1e-6)))  # float32
    return found


def test_every_tracker_holds_what_metrics_jsonl_holds_also_of_a_cell_that_went_on(cell, capfd):
    for name in ALL:
        pytest.importorskip(name)
    (cell.parent / "plan").mkdir()
    design.write(cell.parent, design.following([], design.content("V0", {"V0": "1", "V1": "2"}, [1337], 0.01, "fixed"), 0))
    matrix = f"study-{design.read(cell.parent)[0]['hash']}"
    log = started(cell)
    log.row(iteration=10, train_loss_step=1 / 3, train_loss=None, learning_rate=1e-300)
    log.row(iteration=10, train_loss=2.75, val_loss=2.5, tokens=20_480, **{"p_recip/layer0": 0.25})  # an evaluation beside it
    log.row(iteration=20, train_loss_step=0.1, inactive="nothing moved")
    log.row(iteration=30, train_loss_step=7.0)
    log.close()
    first = json.loads((cell / "tracker.json").read_text())["id"]
    (cell / "checkpoint.pt").touch()
    log = started(cell, keep=2)  # from the checkpoint of iteration 10 on; other numbers, as a clock's would be
    log.row(iteration=20, train_loss_step=0.2)
    log.row(iteration=30, train_loss_step=float("nan"), val_loss=2.25)
    log.close()
    assert "warning" not in capfd.readouterr().err and not list(cell.glob("tracker-*.log"))
    rows = truth(cell)
    assert len(rows) == 4 and rows[3] == {"iteration": 30, "val_loss": 2.25}

    run, found = wandb_run(cell)
    assert found == rows
    assert (run.run_id, run.project, run.run_group, run.job_type, run.display_name) == (
        first, "gpt2-ra-ablation+tiny", matrix, "V0", "test_V0_adamwspam_none")
    assert "seed 1337" in run.tags and any(tag.startswith("source ") for tag in run.tags) and len(run.tags) >= 3

    (config, found), = trackio_runs(cell.parent)
    assert found == rows and config["id"] == first and config["_Group"] == matrix and config["job_type"] == "V0"
    assert config["LEARNING_RATE"] == configured().LEARNING_RATE

    assert tensorboard_points(cell) == expected_points(rows)


def test_a_cell_that_is_run_anew_is_another_run(cell):
    for _ in range(2):
        trackers._describe(cell, "x", False, tags=[])
    new = json.loads((cell / "tracker.json").read_text())["id"]
    assert trackers._describe(cell, "x", True, tags=[])["id"] == new
    assert trackers._describe(cell, "x", False, tags=[])["id"] != new
    (cell / "tracker.json").write_text("damaged")
    assert trackers._describe(cell, "x", True, tags=[])["id"] != new


def test_modes_and_names(cell, monkeypatch, capsys):
    assert open_tracker(configured("wandb", "trackio", TRACKER_DISABLED=True), cell, PROVENANCE) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers.configured(configured(*ALL)) == ["trackio", "tensorboard"]
    assert open_tracker(configured("wandb"), cell, PROVENANCE) is None and not list(cell.iterdir())
    monkeypatch.setenv("WANDB_MODE", "online")
    assert [trackers.mode(configured("wandb"), name) for name in ("wandb", "trackio")] == ["online", "offline"]
    monkeypatch.delenv("WANDB_MODE")
    assert trackers.mode(configured("wandb"), "wandb") == "offline"
    assert trackers.mode(configured("wandb", TRACKER_ONLINE=True), "wandb") == "online"
    log = started(cell, names=("aim",), TRACKER_PROJECT="mine")
    log.row(iteration=1)
    log.close()
    assert json.loads((cell / "tracker.json").read_text())["project"] == "mine"
    assert capsys.readouterr().err == ("warning: the tracker aim is switched off: there is none of this name; there are wandb, "
                                       "trackio, tensorboard\n")


def stand_in(tmp_path, monkeypatch, text):
    """A package wandb that does this."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())


def test_a_tracker_that_fails_is_one_warning(cell, tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "raise OSError('no space anywhere')")
    log = started(cell, names=("wandb",))
    log.tracker.there[0].process.wait(20)
    for i in range(3):
        log.row(iteration=i)
    log.close()
    assert capsys.readouterr().err == (f"warning: the tracker wandb is switched off: OSError: no space anywhere "
                                       f"({cell / 'tracker-wandb.log'})\n")
    assert len(truth(cell)) == 3


def test_a_tracker_that_hangs_slows_nothing(cell, tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "import time\ntime.sleep(1000)")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.3)
    log = started(cell, names=("wandb",))
    process = log.tracker.there[0].process
    begun = time.perf_counter()
    for _ in range(100_000):  # more than any pipe holds
        log.tracker.log()
    assert time.perf_counter() - begun < 5, "50 microseconds a row, on a machine that has more to do"
    begun = time.monotonic()
    log.close()
    assert time.monotonic() - begun < 2 and process.poll() == -signal.SIGKILL
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "wandb is switched off: it had not taken all rows" in said


def test_a_call_that_is_never_answered_ends_the_trackers_process(cell):
    text = ("import time, sys; from pathlib import Path; from lib.trackers import mirror; mirror.CALL_SECONDS = 0.2; "
            "mirror.serve(lambda run: time.sleep(100), None)")
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("it has not answered for")


def test_keys_and_signals_are_the_cells(cell):
    """A Ctrl-C goes to every process of the terminal; the cell then saves, and its last rows count."""
    pytest.importorskip("tensorboard")
    log = started(cell, names=("tensorboard",))
    log.row(iteration=1, val_loss=3.0)
    limit = time.monotonic() + 20
    while not list(cell.glob("tensorboard/events*")):
        assert time.monotonic() < limit
        time.sleep(0.02)
    for number in (signal.SIGINT, signal.SIGTERM):
        log.tracker.there[0].process.send_signal(number)
    log.row(iteration=2, val_loss=2.0)
    log.close()
    assert tensorboard_points(cell) == {"val_loss": [(1, 3.0), (2, 2.0)]}


def test_wandb_killed_in_the_middle_changes_nothing_in_metrics_json(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    killed, row = [], MetricsLog.row

    def row_and_kill(self, **values):
        row(self, **values)
        if self.tracker and self.count == 2:
            parent, limit = self.tracker.there[0].process.pid, time.monotonic() + 30
            while not (found := service(parent)):
                assert time.monotonic() < limit
                time.sleep(0.02)
            os.kill(found, signal.SIGKILL)
            killed.append(found)

    monkeypatch.setattr(MetricsLog, "row", row_and_kill)
    records = []
    for name, settings in (("without", []), ("with", ["--set=TRACKER_WANDB=y"])):
        done = run_here(ROOT / "gpt2/train_ra_mla.py", "--defconfig", "gpt2-ra-ablation+tiny", "--ra-mla-ablation-step", "V0",
                        "--out", tmp_path / name, *(f"--set={s}" for s in (
                            "GPT2_MAX_ITERS=6", "GPT2_BLOCK_SIZE=32", "BATCH_SIZE=2", "GPT2_EVAL_SAMPLES=2",
                            "GPT2_EVAL_INTERVAL=2", "GPT2_LOG_INTERVAL=1", "SAVE_MODEL=n")), *settings)
        assert done.returncode == 0, done.stderr
        records.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert killed and done.stderr.count("warning: the tracker wandb is switched off: ") == 1
    assert {k: records[1][k] for k in EQUAL} == {k: records[0][k] for k in EQUAL} and records[1]["state"] == "done"
    losses = [[row.get("train_loss_step") for row in truth(tmp_path / name)] for name in ("without", "with")]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    assert (tmp_path / "with/tracker-wandb.log").stat().st_size and list((tmp_path / "with/wandb").glob("offline-run-*"))


def service(parent: int) -> int | None:
    """wandb's own process, a child of the tracker's."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{parent}\n" in (path / "status").read_text() and b"wandb-core" in (path / "cmdline").read_bytes():
                return int(path.name)
        except OSError:
            continue
    return None


def test_a_report_is_attached_once_and_again_when_it_has_changed(tmp_path, capfd):
    for name in ALL:
        pytest.importorskip(name)
    (tmp_path / "losses.png").write_bytes(PICTURE)
    (tmp_path / "report.html").write_text("<p>the page</p>")
    (tmp_path / "report.csv").write_text("name,verdict\nV1,BETTER\n")
    assert trackers.attach_report(configured(*ALL), tmp_path) == "attached to wandb and trackio and tensorboard"
    run, rows = wandb_run(tmp_path)
    assert run.job_type == "report" and run.run_group == tmp_path.name and run.project == "gpt2-ra-ablation+tiny"
    assert {"losses", "page", "table"} <= {name.split(".")[0] for name in rows[0]}
    media = {path.suffix: path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()}
    assert media[".png"] == PICTURE and b"the page" in media[".html"]
    assert json.loads(media[".json"]) == {"columns": ["name", "verdict"], "data": [["V1", "BETTER"]]} | {
        k: v for k, v in json.loads(media[".json"]).items() if k not in ("columns", "data")}
    (config, rows), = trackio_runs(tmp_path)
    assert config["job_type"] == "report" and "| V1 | BETTER |" in json.dumps(rows)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Images("losses")[0].encoded_image_string == PICTURE
    assert b"V1" in events.Tensors("table")[0].tensor_proto.string_val[0]

    before = json.loads((tmp_path / "tracker.json").read_text())
    assert trackers.attach_report(configured(*ALL), tmp_path) is None, "nothing has changed"
    (tmp_path / "report.csv").write_text("name,verdict\nV1,WORSE\n")
    assert trackers.attach_report(configured("tensorboard"), tmp_path) == "attached to tensorboard"
    after = json.loads((tmp_path / "tracker.json").read_text())
    assert after["id"] == before["id"] and after["attached"] != before["attached"]
    assert "warning" not in capfd.readouterr().err
