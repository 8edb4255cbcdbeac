"""BATCH_SIZE_AUTO: the largest micro-batch that fits, at a fixed global batch, one for all arms of a study.

The global batch is BATCH_SIZE x GPT2_GRADIENT_ACCUMULATION sequences as configured. Its divisors are tried on the device, on
every program of the study (steps and optimizers that differ in nothing that memory depends on are one), and the largest in
which all of them fit is the micro-batch of every cell. It is kept in OUT/batch_size.json and enters cells as BATCH_SIZE and
GPT2_GRADIENT_ACCUMULATION, so their identity holds what they ran with and not how it was found. BATCH_DRAWN keeps the
configured BATCH_SIZE, so that batches, their order and the evaluation set are what they would be without it.

Once a cell of the study has begun, its micro-batch is the study's, whatever was found since: arms are not to differ, and on
another machine, or with another step, a running study goes on as it is. A cell that failed has not begun.

Trying is left to a `probe` (scripts/batch_size.py has the one for GPUs), so nothing here needs torch or a GPU.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import atomic, generations, results
from lib.cells import FINISHED, expand, is_locked, other_seeds, seeds_of
from lib.config import BATCH_SPLIT, Resolved, Study, identity_changes
from lib.errors import UserError
from lib.kconfig import BUDGET, Assignment
from lib.paths import shown

NAME = "batch_size.json"
FORMAT = 1
ON_CPU = "on a CPU there is nothing to find"
MARGIN = 0.92  # share of the device's memory that a cell may take; the rest is for the driver and for fragments
# What the memory of a training step does not depend on, beside the split.
SAME_MEMORY = (*BATCH_SPLIT, *BUDGET, "SEED", "STREAMS", "LEARNING_RATE", "LEARNING_RATE_MULT", "GPT2_MIN_LR",
               "GPT2_WARMUP_STEPS", "WEIGHT_DECAY", "STRUCT_LR", "GATE_LR_MULT", "GPT2_EVAL_INTERVAL", "GPT2_EVAL_SAMPLES")


@dataclass(frozen=True)
class Choice:
    """What the study's cells run with. `settled`: by cells that have begun, or because the device is a CPU; otherwise make
    looks before the first cell whether what is kept still holds, and finds it anew if not."""

    micro_batch: int
    settled: bool
    sentence: str


@dataclass(frozen=True)
class Program:
    """Arms that need the same memory: their names, and the configuration of one of them."""

    arms: tuple[str, ...]
    resolved: Resolved
    digest: str


def global_batch(study: Study) -> int:
    """Sequences of one optimizer step, as configured."""
    return study.config.BATCH_SIZE * study.config.GPT2_GRADIENT_ACCUMULATION


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [d for d in range(number, 0, -1) if number % d == 0]


def settle(study: Study, out: Path) -> Choice | None:
    """Have `study` resolve its cells with the micro-batch that holds for the results folder `out`, as far as that is known
    without trying; None where the study has BATCH_SIZE_AUTO off. Reads only."""
    if not study.config.BATCH_SIZE_AUTO:
        return None
    micro_batch, settled, where = study.config.BATCH_SIZE, False, None
    if begun := of_cells(study, out):
        name, micro_batch = begun
        settled, because, where = True, "as in the cells that are there", f"{shown(out / name)}, a cell that had begun"
    elif study.config.DEVICE == "cpu":
        settled, because = True, ON_CPU
    elif kept := kept_record(study, out):
        micro_batch, because = kept["micro_batch"], kept["because"]
        where = f"{shown(out / NAME)}: {because}"
    else:
        because = "as configured, until make finds it before the first cell"
    study.found = assignments(study, micro_batch, where) if where else []
    times = global_batch(study) // micro_batch
    return Choice(micro_batch, settled, f"BATCH_SIZE_AUTO: {micro_batch} sequences at once, {times} times a step, {because}")


def assignments(study: Study, micro_batch: int, where: str) -> list[Assignment]:
    """The split of the global batch as a layer on top of every step."""
    drawn = study.config.BATCH_DRAWN or study.config.BATCH_SIZE
    values = (micro_batch, global_batch(study) // micro_batch, 0 if drawn == micro_batch else drawn)
    return [Assignment(name, str(value), where) for name, value in zip(BATCH_SPLIT, values, strict=True)]


def of_cells(study: Study, out: Path) -> tuple[str, int] | None:
    """The first cell that has begun and is the study's but for its micro-batch: its name, and that."""
    if not out.is_dir():
        return None
    seeds = seeds_of(study)
    for cell in expand(study, seeds + other_seeds(study, out, seeds)):
        found = _begun(out / cell.name)
        if found and _same_but_for_split(study, found, cell.resolved.with_seed(cell.seed).identity):
            return cell.name, _split_of(found)[0]
    return None


def _begun(folder: Path) -> dict | None:
    """The identity of a cell that has a result, has something to resume from, or runs now."""
    if not folder.is_dir():
        return None
    record = results.read(folder)
    if record:
        return record["identity"] if record["state"] in FINISHED else None
    if not generations.there(folder) and not is_locked(folder):
        return None
    try:
        identity = json.loads((folder / "provenance.json").read_text())["identity"]
        return identity if all(isinstance(identity[part], dict) for part in ("set", "default")) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _same_but_for_split(study: Study, found: dict, planned: dict) -> bool:
    """Whether two identities differ in nothing but how one global batch, drawn alike, is split."""
    def rest(identity: dict) -> Any:  # a child's identity holds its parent's, under PARENT.NAME
        return {part: {name: value for name, value in identity[part].items() if name.rpartition(".")[2] not in BATCH_SPLIT}
                for part in ("set", "default")}
    try:
        batch, accumulated, drawn = _split_of(found)
    except (KeyError, ValueError, TypeError, OverflowError):
        return False
    same = batch * accumulated == global_batch(study) and drawn == (study.config.BATCH_DRAWN or study.config.BATCH_SIZE)
    return same and not identity_changes(rest(found), rest(planned))


def _split_of(identity: dict) -> tuple[int, int, int]:
    """Micro-batch, accumulation, and sequences drawn at a time."""
    values = identity["default"] | identity["set"]
    batch = int(values["BATCH_SIZE"])
    return batch, int(values["GPT2_GRADIENT_ACCUMULATION"]), int(values.get("BATCH_DRAWN", 0)) or batch


def programs(study: Study) -> list[Program]:
    """What must fit: each program of the study that trains, at its first appearance."""
    found: dict[str, list] = {}
    for cell in expand(study, [study.config.SEED]):
        if cell.resolved.config.EVALUATE_ONLY:
            continue
        identity = cell.resolved.identity
        values = {name: value for name, value in (identity["default"] | identity["set"]).items()
                  if name.rpartition(".")[2] not in SAME_MEMORY and not name.startswith("PARENT.")}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        found.setdefault(digest, [cell.resolved]).append(f"{cell.step} {cell.optimizer}")
    return [Program(tuple(arms), resolved, digest) for digest, (resolved, *arms) in found.items()]


def kept_record(study: Study, out: Path) -> dict | None:
    """What OUT/batch_size.json holds, if it was found for these programs and this global batch; a damaged file is none."""
    try:
        record = json.loads((out / NAME).read_text())
        valid = (record["format"] == FORMAT and record["global_batch"] == global_batch(study)
                 and record["configured"] == study.config.BATCH_SIZE and type(record["micro_batch"]) is int
                 and record["micro_batch"] > 0 and record["micro_batch"] * record["accumulation"] == record["global_batch"]
                 and isinstance(record["because"], str) and record.keys() >= {"device", "share", "peak_bytes"}
                 and record["programs"] == [program.digest for program in programs(study)])
        return record if valid else None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
        return None


def find(study: Study, out: Path, device: dict, share: float, probe: Callable[[Program, int], int | None],
         anew: bool = False) -> tuple[dict, bool]:
    """The record that holds for `study` on `device`, written to `out` unless it is there already, and whether it was found now.

    `device`: type, name, memory_bytes (null for a CPU) and torch. A cell may take `share` of the memory. `probe(program,
    micro-batch)` tries a training step: its peak in bytes, or None if it does not fit. `anew` disregards what is kept.
    UserError if not even one sequence fits.
    """
    kept = kept_record(study, out)
    if kept and not anew and (kept["device"], kept["share"]) == (device, share):
        return kept, False
    wanted = programs(study)
    if device["type"] == "cpu" or not wanted:
        micro_batch, tried = study.config.BATCH_SIZE, {}
        because = ON_CPU if wanted else "no step of the study trains"
    else:
        micro_batch, hungriest, tried = search(study, wanted, device, probe)
        room = f"in {100 * share:.0f} % of {device['name']}"
        because = f"all that fits {room} for {hungriest}" if hungriest else f"the whole global batch fits {room}"
    record = {"format": FORMAT, "micro_batch": micro_batch, "accumulation": global_batch(study) // micro_batch,
              "global_batch": global_batch(study), "configured": study.config.BATCH_SIZE, "because": because,
              "device": device, "share": share, "peak_bytes": tried, "programs": [program.digest for program in wanted]}
    try:
        atomic.make_folder(out)
        atomic.write_json(out / NAME, record)
    except OSError as error:
        raise UserError(f"{shown(out)} cannot be written: {error.strerror or error}.",
                        "make OUT=folder with a folder you may write to.") from None
    return record, True


def search(study: Study, wanted: list[Program], device: dict, probe: Any) -> tuple[int, str | None, dict]:
    """The largest divisor of the global batch in which every program fits; the arm that a larger one was too large for (None if
    all of it fits); and the peaks that were measured, {arm: {micro-batch: bytes, or null where it did not fit}}.

    What fits at one size is taken to fit at every smaller one, so a program that fits at the best of those before it costs
    one trial; one that does not costs a bisection.
    """
    candidates, best, hungriest, tried = divisors(global_batch(study)), 0, None, {}

    def fits(program: Program, index: int) -> bool:
        peak = probe(program, candidates[index])
        tried.setdefault(program.arms[0], {})[str(candidates[index])] = peak
        return peak is not None

    for program in wanted:
        if fits(program, best):
            continue
        low, high, hungriest = best + 1, len(candidates), program.arms[0]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(program, middle) else (middle + 1, high)
        if low == len(candidates):
            raise UserError(f"not even one sequence fits: {hungriest} does not train in the memory of {device['name']} "
                            f"({device['memory_bytes'] / 2 ** 30:.1f} GiB).",
                            "set GPT2_RECOMPUTE=y or a smaller GPT2_BLOCK_SIZE in make menuconfig, then make.")
        best = low
    return candidates[best], hungriest, tried
