"""The one event stream of a cell: rows of metrics, to metrics.jsonl and to a tracker.

metrics.jsonl is the truth: one strict-JSON object a line, in order of iteration, flushed row by row. On resume the rows
after the checkpoint are dropped, because they are computed again. A tracker is a listener, in a process of its own
(lib/trackers); if it fails it is switched off with one warning, and the run goes on.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import atomic

if TYPE_CHECKING:
    from lib.config import Config


def finite(value: Any) -> Any:
    """The value for strict JSON: NaN and infinities become null, also inside lists and objects."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_rows(path: Path, number: int) -> list[str]:
    """Those of the first `number` rows of a metrics.jsonl that are whole: no later one takes the place of a damaged one. None
    at all if there is no such file."""
    try:
        lines = path.read_bytes().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        if number <= 0:
            break
        try:
            whole = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            whole = False  # cut short, or not written by us
        found += [line] if whole else []
        number -= 1 if whole else max(1, line.count('"iteration"'))  # two, where the newline between them is damaged
    return found


class MetricsLog:
    """Appends rows to `folder`/metrics.jsonl, keeping what is whole of the first `keep` rows there."""

    def __init__(self, folder: Path, keep: int = 0, tracker: Any = None):
        path = Path(folder) / "metrics.jsonl"
        kept = first_rows(path, keep)
        if len(kept) < keep:
            print(f"warning: {path} holds only {len(kept)} whole rows of the {keep} written before; the curves have a gap, but "
                  "the result does not depend on them", flush=True)
        atomic.write_text(path, "".join(line + "\n" for line in kept))
        self.file = open(path, "a")  # noqa: SIM115 open until close()
        self.count, self.tracker = len(kept), tracker

    def row(self, **values: Any) -> None:
        self.file.write(json.dumps({k: finite(v) for k, v in values.items()}, allow_nan=False) + "\n")
        self.file.flush()
        self.count += 1
        print("  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()), flush=True)
        self._to_tracker("log", values)

    def close(self) -> None:
        self.file.close()
        self._to_tracker("close")

    def _to_tracker(self, call: str, *values: Any) -> None:
        if self.tracker is not None:
            try:
                getattr(self.tracker, call)(*values)
            except Exception as error:  # whatever a tracker does must not stop a run
                self.tracker = None
                print(f"warning: the tracker failed and is switched off: {error}", file=sys.stderr)


class NoLog:
    """Where rows go that another process writes."""

    count = 0

    def row(self, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


def open_tracker(cfg: "Config", folder: Path, provenance: dict) -> Any:
    """The configured trackers, or None; what cannot start is a warning. `provenance` says which cell it is."""
    if cfg.TRACKER == "none":
        return None
    from lib import trackers

    try:
        return trackers.follow(cfg, folder, provenance)
    except Exception as error:
        print(f"warning: the tracker cannot start and is switched off: {error}", file=sys.stderr)
        return None
