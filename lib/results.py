"""metrics.json: the one record of a finished cell, and the marker that it is finished.

Every record has all KEYS; what was not measured is null. `state` is done, diverged or failed, with a `reason` for the
latter two. `inactive` says of a cell whose mechanism never acted within its budget why; it must not be compared.
`val_loss_by_position` is the loss in each of several equal parts of the context, from its begin to its end. `future_leak` is
how far outputs of the trained model moved with tokens after them, of its largest logit. `shared_device` says whether another
cell ran on its device meanwhile. The file is strict JSON and the last file a cell writes.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from lib import atomic
from lib.errors import UserError
from lib.paths import shown
from lib.tracking import finite

FORMAT = 1
NAME = "metrics.json"
STATES = ("done", "diverged", "failed")
KEYS = (
    "format", "state", "reason", "inactive", "study", "step", "optimizer", "seed", "identity",
    "val_loss", "val_perplexity", "val_loss_by_position", "best_val_loss", "train_loss",
    "future_leak", "iterations", "tokens", "train_seconds", "tokens_per_second", "budget_progress",
    "start_seconds", "compile_seconds", "eval_seconds", "calibration_seconds", "checkpoint_seconds", "other_seconds", "resumed",
    "shared_device", "parameters", "sizes", "kv_cache_bytes", "kv_cache_parts", "peak_memory_bytes", "compression",
    "data", "environment", "configuration", "started", "finished", "checksum",
)


MEASURED = ("val_loss", "tokens", "train_seconds")  # what every finished cell knows
# What a key holds where it is not null. A record may come from anywhere: readers count on this much of it, and no more.
KINDS = {
    **dict.fromkeys(("reason", "inactive", "study", "step", "optimizer", "started", "finished", "checksum"), "text"),
    **dict.fromkeys(("seed", "iterations", "tokens", "resumed", "parameters", "kv_cache_bytes", "peak_memory_bytes"), "count"),
    **dict.fromkeys(("train_seconds", "tokens_per_second", "budget_progress", "start_seconds", "compile_seconds",
                     "eval_seconds", "calibration_seconds", "checkpoint_seconds", "other_seconds", "future_leak"), "amount"),
    **dict.fromkeys(("val_loss", "val_perplexity", "best_val_loss", "train_loss"), "number"),
    **dict.fromkeys(("sizes", "data", "environment", "configuration"), "table"),
    "val_loss_by_position": "list of numbers", "shared_device": "flag",
    "kv_cache_parts": "table of amounts", "compression": "comparison of codecs",
}
LARGEST = 1e100  # of a number: its square is one too


def write(folder: Path, provenance: dict, state: str, reason: str | None = None, **measured: Any) -> dict:
    """Write the record of a cell; `provenance` (from provenance.json) says which cell it is."""
    if state not in STATES:
        raise ValueError(f"metrics.json has no state {state}")
    unknown = measured.keys() - set(KEYS)
    if unknown:
        raise ValueError(f"metrics.json has no key {sorted(unknown)}")
    record = dict.fromkeys(KEYS) | {"format": FORMAT, "state": state, "reason": reason}
    record |= {key: provenance[key] for key in ("study", "step", "optimizer", "seed", "identity")}
    record |= {key: finite(value) for key, value in measured.items()}
    record |= {key: None for key, value in record.items() if isinstance(value, float) and abs(value) > LARGEST}
    record = json.loads(json.dumps(record))  # as a reader will find it
    record["checksum"] = checksum(record)
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
    if flaw := _flaw(record):
        return dict.fromkeys(KEYS) | {"state": "unreadable", "reason": flaw}
    return dict.fromkeys(KEYS) | record


def checksum(record: dict) -> str:
    """Of all that a record says, however it is laid out; what is null says nothing."""
    said = {key: value for key, value in record.items() if key != "checksum" and value is not None}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _finite(text: str) -> float:
    """A number of strict JSON; Python would also take NaN, Infinity and 1e999."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return value


def _flaw(record: Any) -> str | None:
    """Why no reader may rely on the record, None if it may: its state, its identity, the kind of every value, and its loss
    and cost where it is done."""
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("state") not in STATES:
        return f"it is not of format {FORMAT}"
    identity = record.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(identity.get(part), dict) for part in ("set", "default")):
        return f"it is not of format {FORMAT}"
    if record["state"] == "done" and not all(is_number(record.get(key)) for key in MEASURED):
        return f"it is not of format {FORMAT}"
    if record.get("checksum") not in (None, checksum(record)):  # none: a record of before there was one
        return "it does not hold what was written (its checksum differs)"
    wrong = (key for key, kind in KINDS.items() if record.get(key) is not None and not _is(kind, record[key]))
    return next((f"its {key} is no {KINDS[key]}" for key in wrong), None)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number to calculate with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is(kind: str, value: Any) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "table":  # of plain values, or of tables of texts (the source files)
        return isinstance(value, dict) and all(
            v is None or isinstance(v, bool | str) or is_number(v)
            or isinstance(v, dict) and all(isinstance(text, str) for text in v.values()) for v in value.values())
    if kind == "list of numbers":
        return isinstance(value, list) and all(map(is_number, value))
    if kind == "table of amounts":
        return isinstance(value, dict) and all(_is("amount", v) for v in value.values())
    if kind == "comparison of codecs":
        layers = value.get("layers") if isinstance(value, dict) else None
        return (isinstance(layers, list)
                and all(is_number(value.get(key)) for key in ("val_loss_before", "val_loss_pca", "val_loss"))
                and all(isinstance(layer, dict) and all(key in layer and (layer[key] is None or is_number(layer[key]))
                                                        for key in ("error", "error_pca")) for layer in layers))
    return is_number(value) and (kind == "number" or value >= 0) and (kind != "count" or isinstance(value, int))
