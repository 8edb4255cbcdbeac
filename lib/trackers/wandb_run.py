"""Weights & Biases. A row of metrics.jsonl is a row of the run's history, with `iteration` as the axis of all others.

Offline, a run that goes on is written anew and the earlier files of the same run are removed, unless they have been synced.
Online, the service keeps what it has, and rows that it knows are not sent again.
"""

import csv
import shutil
from pathlib import Path
from typing import Any

from lib.trackers.mirror import Run


class Tracker:
    def __init__(self, run: Run):
        import wandb

        for old in (run.folder / "wandb").glob(f"offline-run-*-{run.id}"):
            if not any(old.glob("*.synced")):
                shutil.rmtree(old, ignore_errors=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        self.wandb = wandb
        self.run = wandb.init(project=run.project, group=run.group, job_type=run.job_type, name=run.name, dir=str(run.folder),
                              tags=[tag[:64] for tag in run.tags], config=run.config, id=run.id, resume="allow",
                              mode=run.mode, settings=settings)  # type: ignore[arg-type]  # whatever the user says
        self.known = self.run.step  # rows that the service has
        self.run.define_metric("*", step_metric="iteration")

    def log(self, number: int, row: dict[str, Any]) -> None:
        if number >= self.known:
            self.run.log(row, step=number)

    def attach(self, files: list[Path]) -> None:
        shown: dict[str, Any] = {}
        for file in files:
            if file.suffix == ".png":
                shown[file.stem] = self.wandb.Image(str(file))
            elif file.suffix == ".html":
                shown["page"] = self.wandb.Html(file.read_text(), inject=False)
            elif file.suffix == ".csv":
                columns, *lines = csv.reader(file.read_text().splitlines())
                shown["table"] = self.wandb.Table(columns=list(columns), data=lines)
        self.run.log(shown)

    def close(self) -> None:
        self.run.finish()
