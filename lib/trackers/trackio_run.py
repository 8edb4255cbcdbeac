"""trackio: one database a project, in TRACKIO_DIR of the environment or the folder trackio of the study. Never on a network:
what would send rows to a Space or a server is taken out of this process's environment.

It knows runs by name, and has no job type and no tags: these, and the run's id, are in its configuration. A run that goes on is
written anew.
"""

import csv
import os
from pathlib import Path
from typing import Any

from lib.trackers.mirror import Run


class Tracker:
    def __init__(self, run: Run):
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL"):
            os.environ.pop(name, None)
        study = run.folder if run.files else run.folder.parent
        os.environ.setdefault("TRACKIO_DIR", str(study / "trackio"))
        os.environ["HF_HUB_OFFLINE"] = "1"
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.trackio, self.storage, self.rows = trackio, SQLiteStorage, 0
        if SQLiteStorage.get_project_db_path(run.project).exists():
            for old in trackio.Api().runs(run.project):
                if (old.config or {}).get("id") == run.id:
                    old.delete()
        config = run.config | {"id": run.id, "job_type": run.job_type, "tags": run.tags}
        self.run = trackio.init(project=run.project, name=run.name, group=run.group, config=config, resume="never", embed=False,
                                auto_log_gpu=False, auto_log_cpu=False)

    def log(self, number: int, row: dict[str, Any]) -> None:
        self.run.log(row, step=row.get("iteration", number))
        self.rows += 1

    def attach(self, files: list[Path]) -> None:
        for file in files:
            if file.suffix == ".png":
                self.run.log({file.stem: self.trackio.Image(file)}, step=0)
            elif file.suffix == ".csv":
                columns, *lines = csv.reader(file.read_text().splitlines())
                text = "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))
                self.run.log({"table": self.trackio.Markdown(text)}, step=0)
            else:
                continue
            self.rows += 1

    def close(self) -> None:
        """RuntimeError if the database does not hold every row: trackio itself would only warn."""
        self.run.finish()
        found = len(self.storage.get_logs(self.run.project, self.run.name, run_id=self.run.id))
        if found != self.rows:
            raise RuntimeError(f"its database holds {found} rows of {self.rows}")
