"""metrics.json: the one record of a finished cell, and the marker that it is finished.

Every record has all KEYS; what was not measured is null. `state` is done, diverged or failed, with a `reason` for the
latter two. `inactive` says of a cell whose mechanism never acted within its budget why; it must not be compared. The file
is strict JSON and the last file a cell writes.
"""

import json
import math
from pathlib import Path

from lib import atomic
from lib.errors import UserError
from lib.paths import shown
from lib.tracking import finite

FORMAT = 1
NAME = "metrics.json"
STATES = ("done", "diverged", "failed")
KEYS = (
    "format", "state", "reason", "inactive", "study", "step", "optimizer", "seed", "identity",
    "val_loss", "val_perplexity", "best_val_loss", "train_loss",
    "iterations", "tokens", "train_seconds", "tokens_per_second", "budget_progress",
    "compile_seconds", "eval_seconds", "calibration_seconds", "checkpoint_seconds", "other_seconds", "resumed",
    "parameters", "sizes", "kv_cache_bytes", "kv_cache_parts", "peak_memory_bytes", "compression",
    "data", "environment", "configuration", "started", "finished",
)


MEASURED = ("val_loss", "tokens", "train_seconds")  # what every finished cell knows


def write(folder: Path, provenance: dict, state: str, reason: str | None = None, **measured) -> dict:
    """Write the record of a cell; `provenance` (from provenance.json) says which cell it is."""
    if state not in STATES:
        raise ValueError(f"metrics.json has no state {state}")
    unknown = measured.keys() - set(KEYS)
    if unknown:
        raise ValueError(f"metrics.json has no key {sorted(unknown)}")
    record = dict.fromkeys(KEYS) | {"format": FORMAT, "state": state, "reason": reason}
    record |= {key: provenance[key] for key in ("study", "step", "optimizer", "seed", "identity")}
    record |= {key: finite(value) for key, value in measured.items()}
    atomic.write_json(Path(folder) / NAME, record)
    return record


def read(folder: Path) -> dict | None:
    """The record in `folder`, or None if there is none; a damaged one has state 'unreadable'. UserError if the disk fails."""
    try:
        record = json.loads((Path(folder) / NAME).read_bytes(), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        return None
    except OSError as error:  # a file system that hiccups says nothing about the record
        raise UserError(f"{shown(Path(folder) / NAME)} cannot be read: {error.strerror or error}.",
                        "mend the disk or the permissions, then make again.") from None
    except (ValueError, RecursionError) as error:
        return dict.fromkeys(KEYS) | {"state": "unreadable", "reason": str(error)}
    if not _well_formed(record):
        return dict.fromkeys(KEYS) | {"state": "unreadable", "reason": f"it is not of format {FORMAT}"}
    return dict.fromkeys(KEYS) | record


def _finite(text: str) -> float:
    """A number of strict JSON; Python would also take NaN, Infinity and 1e999."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return value


def _well_formed(record) -> bool:
    """Whether a reader may rely on the record: its state, its identity, and its loss and cost where it is done."""
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("state") not in STATES:
        return False
    identity = record.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(identity.get(part), dict) for part in ("set", "default")):
        return False
    return record["state"] != "done" or all(isinstance(record.get(key), int | float) for key in MEASURED)
