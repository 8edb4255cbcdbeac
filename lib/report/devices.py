"""What GPUs of one model and box have for all arms alike, taken out of speeds so that arms on different ones can be compared.

Two GPUs of a model differ by a per cent or two, which is more than many mechanisms cost. Arms take turns on them, so a
mean over seeds is fair, but each pair of cells holds the whole difference, and so does the interval. `factors` finds it
by least squares over all finished cells, log tokens/s = arm + device, and `levelled` gives a cell as a GPU of the mean
speed would have run it. Losses at the end, and so verdicts, are not touched.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lib.cells import Cell


def device(record: dict) -> str | None:
    return (record["environment"] or {}).get("device_id")


def factors(cells: list[tuple[str, dict]]) -> dict[str, float]:
    """{device: its speed relative to the mean of the devices}, of (arm, record) of finished cells.

    Cells that trained nothing take no part. Empty where there is nothing to tell apart, or no way to: one device, a cell whose
    device is not known, arms that no chain of shared devices connects, or no cell more than there are arms and devices to be
    told apart.
    """
    known = [(arm, device(record), record["tokens_per_second"]) for arm, record in cells if record["tokens_per_second"]]
    arms, devices = (sorted({row[i] for row in known}, key=str) for i in (0, 1))
    if len(devices) < 2 or None in devices:
        return {}
    x = np.array([[a == arm for a in arms] + [d == name for d in devices] for arm, name, _ in known], float)
    solution, _, rank, _ = np.linalg.lstsq(x, np.log([speed for *_, speed in known]), rcond=None)
    if rank < len(arms) + len(devices) - 1 or len(known) <= rank:
        return {}
    effects = solution[len(arms):] - solution[len(arms):].mean()
    return {str(name): math.exp(effect) for name, effect in zip(devices, effects, strict=True)}


def levelled(rows: list[dict], record: dict, found: dict[str, float]) -> tuple[list[dict], dict[str, Any]]:
    """Evaluations and record of a cell, their seconds and speed as on a device of the mean speed."""
    factor = found.get(device(record) or "", 1.0)
    speed = record["tokens_per_second"]
    return ([row | {"train_seconds": row["train_seconds"] * factor} for row in rows],
            record | {"train_seconds": record["train_seconds"] * factor, "tokens_per_second": speed and speed / factor})


def apart(cells: list[tuple["Cell", dict]], reference: str) -> list[str]:
    """A note on arms whose speed, beside the reference's, may be that of their GPU, and nothing can tell."""
    ran_on: dict[str, set] = {}
    for cell, record in cells:
        ran_on.setdefault(cell.step, set()).add(device(record))
    theirs = ran_on.pop(reference, {None})
    alone = [step for step, ours in ran_on.items() if None not in ours | theirs and not ours & theirs]
    return [f"{' '.join(alone)} never ran on a GPU that {reference} ran on: a difference of speed, or at equal seconds, may be "
            "that of the GPUs (more seeds take turns)"] if alone else []


def note(found: dict[str, float]) -> list[str]:
    """What a reader must know of it."""
    if not found:
        return []
    gap = 100 * (max(found.values()) / min(found.values()) - 1)
    return [f"of the {len(found)} GPUs the fastest trains {gap:.1f} % more tokens/s than the slowest with the same arm; ratios "
            "of tokens/s and losses at equal seconds are of cells as a GPU of the mean speed would have run them"]
