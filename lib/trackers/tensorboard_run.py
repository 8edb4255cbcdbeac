"""TensorBoard: event files in the folder tensorboard of the cell. It keeps numbers as float32, at the row's iteration; of what
is no number it shows nothing. A run that goes on is written anew. Needs neither torch nor TensorFlow.
"""

import csv
import html
import json
import time
from pathlib import Path
from typing import Any

from lib.trackers.mirror import Run

FLUSH_SECONDS = 10


class Tracker:
    def __init__(self, run: Run):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = Event, Summary
        folder = run.folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        about = {"project": run.project, "group": run.group, "job_type": run.job_type, "name": run.name, "tags": run.tags,
                 "id": run.id, "config": run.config}
        self._text("run", f"<pre>{html.escape(json.dumps(about, indent=1))}</pre>")

    def log(self, number: int, row: dict[str, Any]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in row.items()
                  if isinstance(value, int | float) and name != "iteration"]
        self._add(self.summary(value=values), row.get("iteration", number))

    def attach(self, files: list[Path]) -> None:
        for file in files:
            if file.suffix == ".png":
                data = file.read_bytes()
                width, height = (int.from_bytes(data[place:place + 4], "big") for place in (16, 20))  # of its header
                image = self.summary.Image(height=height, width=width, colorspace=4, encoded_image_string=data)
                self._add(self.summary(value=[self.summary.Value(tag=file.stem, image=image)]), 0)
            elif file.suffix == ".csv":
                columns, *lines = csv.reader(file.read_text().splitlines())
                table = [columns, ["---"] * len(columns), *lines]
                self._text("table", "\n".join(f"| {' | '.join(line)} |" for line in table))

    def close(self) -> None:
        self.writer.close()

    def _text(self, name: str, text: str) -> None:
        """Markdown on the page Text."""
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text import metadata

        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()],
                             tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]))
        kind = metadata.create_summary_metadata(display_name=name, description="")
        self._add(self.summary(value=[self.summary.Value(tag=name, metadata=kind, tensor=tensor)]), 0)

    def _add(self, summary: Any, step: int) -> None:
        self.writer.add_event(self.event(wall_time=time.time(), step=step, summary=summary))
