"""Trackers: whoever shows a study's metrics elsewhere, each in a process of its own that a cell never waits for.

Contract: metrics.jsonl is the truth and the queue. Beside a cell runs one process for each configured tracker
(lib/trackers/mirror.py), which reads that file; for a row the cell writes one byte into a pipe, and where the pipe is full it
goes on without. So importing a tracker, a slow disk, a network or a hang takes nothing from the run but what a process at a
low priority takes from its machine. Whatever a tracker does, the cell says it in one warning and goes on; its last words are in
tracker-NAME.log beside the rows. At the end the cell waits CLOSE_SECONDS, then kills what has not finished.

A run is the cell: tracker.json in its folder says under which names, and holds the id. A cell that goes on from a checkpoint
keeps its id, and its rows are written anew from the first on, because those after the checkpoint are computed again. A cell
that starts anew is another run.
"""

import hashlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import atomic
from lib.paths import ROOT, shown

if TYPE_CHECKING:
    from lib.config import Config

ADAPTERS = {name: f"lib.trackers.{name}_run" for name in ("wandb", "trackio", "tensorboard")}
MODES = ("online", "offline", "disabled")
# An offline run ends in one or two seconds, on a busy machine in a few; one that takes longer waits for a network.
CLOSE_SECONDS = 10.0
REPORT_SECONDS = 60.0  # pictures go on the network too, and nothing that is measured waits for it
NAME = "tracker.json"
ROW, END = b"\n", b"."


def mode(cfg: "Config", tracker: str) -> str:
    """What TRACKER_MODE says, or, of wandb, the environment's WANDB_MODE."""
    return os.environ.get("WANDB_MODE") or cfg.TRACKER_MODE if tracker == "wandb" else cfg.TRACKER_MODE


def configured(cfg: "Config") -> list[str]:
    """The trackers that are to run: those of TRACKER, once each, without those that are disabled."""
    names = [] if cfg.TRACKER == "none" else list(dict.fromkeys(cfg.TRACKER.replace(",", " ").split()))
    return [name for name in names if mode(cfg, name) != "disabled"]


def follow(cfg: "Config", folder: Path, provenance: dict) -> "Followers | None":
    """Start the configured trackers of the cell in `folder`; None where there are none. A cell that has a checkpoint goes on
    with the run that it had. OSError if the folder cannot be written."""
    from lib import generations

    if not (names := configured(cfg)):
        return None
    environment = _environment(cfg)
    tags = [f"seed {cfg.SEED}", environment["device"], f"source {environment['source_hash']}"]
    _describe(folder, provenance["identity"]["hash"], generations.there(folder),
              project=cfg.TRACKER_PROJECT or provenance["study"],
              out=str(folder.resolve().parent), job_type=provenance["step"], name=folder.resolve().name, tags=tags,
              config=cfg.as_json(), modes={name: mode(cfg, name) for name in names})
    return Followers(names, folder, min(CLOSE_SECONDS, cfg.STOP_SECONDS / 2))


def attach_report(cfg: "Config", out: Path) -> str | None:
    """Show what `make report` has written in `out` in the configured trackers, as a run of job type "report"; the same one each
    time, and only if something has changed. Gives the sentence to print, None where there is nothing to say."""
    names = configured(cfg)
    files = sorted(p for p in out.glob("*") if p.suffix == ".png" or p.name in ("report.html", "report.csv"))
    if not names or not files:
        return None
    digest = hashlib.sha256(json.dumps([{name: mode(cfg, name) for name in names}, cfg.TRACKER_PROJECT]).encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    if _read(out).get("attached") == digest.hexdigest():
        return None
    description = _describe(
        out, "report", True, project=cfg.TRACKER_PROJECT or cfg.STUDY, out=str(out.resolve()), job_type="report",
        name=f"report of {out.resolve().name}", tags=[], config={"STUDY": cfg.STUDY},
        modes={name: mode(cfg, name) for name in names}, files=[str(file.resolve()) for file in files])
    if Followers(names, out, REPORT_SECONDS).close():
        atomic.write_json(out / NAME, description | {"attached": digest.hexdigest()})
        return f"attached to {' and '.join(names)}"
    return None


def _environment(cfg: "Config") -> dict[str, Any]:
    import torch

    from lib import runtime

    return runtime.environment(cfg, torch.device("cuda" if cfg.DEVICE != "cpu" and torch.cuda.is_available() else "cpu"))


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("id"), str) else {}


def _describe(folder: Path, stem: str, again: bool, **content: Any) -> dict[str, Any]:
    """Write what the processes of trackers go by. The id is the one that is there if this is the same run `again`, else new."""
    known = _read(folder).get("id") if again else None
    content = {"id": known or f"{stem}-{secrets.token_hex(4)}", **content}
    atomic.write_json(folder / NAME, content)
    return content


class Followers:
    """The processes of a run's trackers: told of rows by `log`, waited for by `close`. Neither ever raises or blocks for longer
    than `seconds`, and each tracker that fails is a warning, once."""

    def __init__(self, names: list[str], folder: Path, seconds: float):
        self.seconds, self.there, self.asked = seconds, [], len(names)
        for name in names:
            try:
                if name not in ADAPTERS:
                    raise ValueError(f"there is none of this name; there are {', '.join(ADAPTERS)}")
                if importlib.util.find_spec(name) is None:
                    raise ValueError(f"{name} is not installed; pip install {name}")
                self.there.append(Follower(name, folder))
            except (OSError, ValueError) as error:
                _warn(name, str(error))

    def log(self, _: dict | None = None) -> None:
        """There is another row in metrics.jsonl."""
        for one in list(self.there):
            if (failure := one.failure()) is not None:
                self.there.remove(one)
                _warn(one.name, failure)
            else:
                one.tell(ROW)

    def close(self) -> bool:
        """No more rows come: whether every tracker has taken all there are."""
        deadline, good = time.monotonic() + self.seconds, len(self.there) == self.asked
        for one in self.there:
            one.tell(END)
        for one in self.there:
            if (failure := one.end(deadline)) is not None:
                good = False
                _warn(one.name, failure)
        self.there = []
        return good


class Follower:
    """One tracker's process."""

    def __init__(self, name: str, folder: Path):
        self.name, self.path, self.begun = name, folder / f"tracker-{name}.log", time.monotonic()
        with open(self.path, "wb") as log:
            # Of the cell's process group, so that nothing of it outlives the launcher; keys and signals it ignores by itself.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lib.trackers.mirror", name, str(folder.resolve())], cwd=ROOT,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, bufsize=0)
        self.pipe = self.process.stdin
        os.set_blocking(self.pipe.fileno(), False)

    def tell(self, what: bytes) -> None:
        """One byte into the pipe. A full one wakes its reader as well; a broken one is seen by `failure`."""
        try:
            self.pipe.write(what)
        except OSError:
            pass

    def failure(self) -> str | None:
        """Why the process has ended; None while it lives."""
        return None if self.process.poll() is None else self._reason()

    def end(self, deadline: float) -> str | None:
        """Wait for the process until time.monotonic() is `deadline`, then kill it: why it has failed, None if it has not."""
        try:
            self.pipe.close()
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "it had not taken all rows when the time for that was over"
        if self.process.returncode:
            return self._reason()
        try:
            self.path.unlink()  # it has said nothing that anybody would look for
        except OSError:
            pass
        return None

    def _reason(self) -> str:
        if self.process.returncode < 0:
            return f"killed by signal {-self.process.returncode}"
        try:
            said = [line for line in self.path.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            said = []
        return f"{said[-1].strip() if said else 'it ended'} ({shown(self.path)})"


def _warn(name: str, failure: str) -> None:
    print(f"warning: the tracker {name} is switched off: {failure}", file=sys.stderr, flush=True)
