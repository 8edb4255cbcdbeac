"""Downstream tasks: what `make lm-eval` kept in the cells' folders, beside the baseline, item by item.

Two arms are compared on the same items (one task hash: the same task, limit and items, at one precision), and seed by seed:
with a_si an item's score in the arm of seed s and b_si in the baseline's, d_si = a_si - b_si, and the difference is the mean of
all d. That takes out what makes an item easy for every model, most of the noise of an accuracy.

What the interval covers. With one seed it is Student's t over items, of the d_i: the chance in which items the task happens to
have, for these two trained models and no others. With several seeds items and seeds are both drawn, crossed, and each d has a
part of its item, of its seed and of both; with mean squares I of items, S of seeds and R of the rest,

    se^2 = (I + S - R) / (items x seeds)        at least the I and the S term alone, so that chance cannot make it small
    df   = (I + S - R)^2 / (I^2/(items-1) + S^2/(seeds-1) + R^2/((items-1)(seeds-1)))      (Satterthwaite)

which is the quasi-F of Clark (1973): it covers other items of the kind and other seeds of the same training. 95 %, each
interval on its own, not corrected for their number, and rough where only a few items differ; where all differences are the same
(no item is answered otherwise), there is no spread to take one from, and none is given. They are secondary: no verdict word is
given and none rests on them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from lib.design import ERROR_RATE
from lib.tables import Section
from lib.verdicts import signed

FORMAT = 1
LARGEST = 1e100  # of a score: a file may hold any number
NAME = "lm_eval.json"


def samples_name(task: str) -> str:
    """The file of a task's items in a cell's folder."""
    return f"lm_eval_{re.sub('[^A-Za-z0-9_-]', '-', task)}.jsonl"


def basis(record: dict) -> dict:
    """What says that an lm_eval.json is of this finished cell."""
    return {"format": FORMAT, "identity": record["identity"]["hash"], "finished": record["finished"]}


def read(folder: Path, record: dict) -> dict:
    """lm_eval.json of a finished cell; without tasks, if there is none, or it is damaged or of another result."""
    try:
        found = json.loads((folder / NAME).read_bytes())
        if found.items() >= basis(record).items() and all(isinstance(task["hash"], str) for task in found["tasks"].values()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # it is an extra, which make lm-eval writes anew
    return basis(record) | {"tasks": {}}


def items(folder: Path, task: str) -> dict[tuple, dict] | None:
    """{(id, hash): item} of what was kept of a task; None if it is damaged."""
    found = {}
    try:
        for line in (folder / samples_name(task)).read_text().splitlines():
            item = json.loads(line)
            found[item["doc_id"], item["doc_hash"]] = item
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found or None


def kept(folder: Path, record: dict) -> dict[str, dict]:
    """{task: {"hash", "version", "metrics" in their order, "items"}} of a finished cell."""
    found = {}
    for name, task in read(folder, record)["tasks"].items():
        try:
            entry = {"hash": f"{task['hash']} {task['precision']}", "metrics": list(task["metrics"]),
                     "items": items(folder, name)}
        except (KeyError, TypeError):
            continue
        if entry["items"] is not None and len(entry["items"]) == task.get("items"):
            found[name] = entry
    return found


def paired(differences: Sequence) -> dict:
    """The mean of differences [seeds, items] with its interval, as above: {"difference", "low", "high", "covers"}; the interval
    is null for fewer than two items, or if all differences are the same."""
    from scipy.special import stdtrit

    d = np.asarray(differences, float)
    seeds, count = d.shape
    mean = float(d.mean())
    if count < 2 or np.ptp(d) == 0:
        return {"difference": mean, "low": None, "high": None, "covers": None}
    of_item, of_seed = d.mean(0), d.mean(1)
    item = seeds * float(np.var(of_item, ddof=1))
    if seeds == 1:
        square, df, covers = item, count - 1, "items"
    else:
        seed = count * float(np.var(of_seed, ddof=1))
        rest = float(((d - of_item - of_seed[:, None] + mean) ** 2).sum()) / ((count - 1) * (seeds - 1))
        square, covers = max(item + seed - rest, item, seed), "items and seeds"
        spread = item ** 2 / (count - 1) + seed ** 2 / (seeds - 1) + rest ** 2 / ((count - 1) * (seeds - 1))
        df = min(max(square ** 2 / spread, seeds - 1), (count - 1) * seeds)
    half = float(stdtrit(df, 1 - ERROR_RATE / 2)) * math.sqrt(square / (seeds * count))
    return {"difference": mean, "low": mean - half, "high": mean + half, "covers": covers}


def rows(arms: list[dict]) -> list[dict]:
    """One row for each task, metric and arm that has it. An arm is {"name", "baseline": name of its reference, itself for the
    baseline, "invalid": whether it must not be compared, "seeds": {seed: what `kept` gives}}.

    Of a task only the version that most cells were evaluated on counts, of several the larger one; `left_out` counts the
    others. `value` is the mean over items and seeds, `chance` that of guessing among an item's choices.
    """
    found = []
    tasks = dict.fromkeys(name for arm in arms for one in arm["seeds"].values() for name in one)
    for task in tasks:
        all_kept = [one[task] for arm in arms for one in arm["seeds"].values() if task in one]
        votes = Counter(one["hash"] for one in all_kept)
        size = {one["hash"]: len(one["items"]) for one in all_kept}
        chosen = max(votes, key=lambda key: (votes[key], size[key], key))
        guess = chance(next(one["items"] for one in all_kept if one["hash"] == chosen))
        metrics = dict.fromkeys(metric for one in all_kept if one["hash"] == chosen for metric in one["metrics"])
        for metric in metrics:
            values = {arm["name"]: {seed: known for seed, one in sorted(arm["seeds"].items())
                                    if task in one and one[task]["hash"] == chosen
                                    and (known := _values(one[task]["items"], metric))} for arm in arms}
            for arm in arms:
                if mine := values[arm["name"]]:
                    row = {"name": arm["name"], "task": task, "metric": metric, "hash": chosen, "seeds": len(mine),
                           "items": size[chosen], "value": fmean(fmean(one.values()) for one in mine.values()),
                           "chance": guess if metric.startswith("acc") else None,
                           "left_out": len(all_kept) - votes[chosen], "baseline": arm["baseline"], "comparison": None}
                    if arm["name"] != arm["baseline"] and not arm["invalid"]:
                        row["comparison"] = _compared(mine, values.get(arm["baseline"]) or {})
                    found.append(row)
    return found


def _compared(arm: dict[int, dict], base: dict[int, dict]) -> dict | None:
    """Over the seeds that both have, and the items that all of these have."""
    seeds = sorted(arm.keys() & base.keys())
    if not seeds:
        return None
    common = [item for item in arm[seeds[0]] if all(item in one[seed] for one in (arm, base) for seed in seeds)]
    if not common:
        return None
    found = paired([[arm[seed][item] - base[seed][item] for item in common] for seed in seeds])
    return found | {"seeds": seeds, "items": len(common)}


def _values(of: dict[tuple, dict], metric: str) -> dict[tuple, float] | None:
    """An item's own value of the metric, of all items; None where it is not one number for each of them."""
    values = {key: item.get(metric) for key, item in of.items()}
    if all(isinstance(value, int | float) and -LARGEST < value < LARGEST for value in values.values()):
        return values
    return None


def chance(of: dict[tuple, dict]) -> float | None:
    """The accuracy of guessing: the mean of 1 / choices; None where items are no choice among several."""
    counts = [len(scores) if isinstance(scores := item.get("log_likelihoods"), list) else 0 for item in of.values()]
    return fmean(1 / n for n in counts) if counts and min(counts) > 1 else None


HEADER = ["task", "metric", "step", "score", "chance", "difference (95 %)", "interval covers", "items", "seeds"]
CAPTION = ("Scores are means over items and seeds; differences to the baseline are paired by item and seed. Secondary: each "
           "interval stands on its own, not corrected for their number, and no verdict rests on them. A score near chance says "
           "nothing of what a model has learned.")
COVERS = {"items": "items only: sampling error of the task, not of training", "items and seeds": "items and seeds",
          None: "none: all differences are the same"}


def cells(row: dict) -> list[str]:
    """A row as text, in the order of HEADER."""
    c, is_baseline = row["comparison"], row["name"] == row["baseline"]
    apart = "baseline" if is_baseline else "-"
    if c:
        apart = signed(c["difference"]) + ("" if c["low"] is None else f" ({signed(c['low'])}..{signed(c['high'])})")
    return [row["task"], row["metric"], row["name"], f"{row['value']:.4f}",
            "-" if row["chance"] is None else f"{row['chance']:.4f}", apart, COVERS[c["covers"]] if c else "",
            str(c["items"] if c else row["items"]), str(len(c["seeds"]) if c else row["seeds"])]


def notes(found: list[dict]) -> list[str]:
    """What a reader must be told of cells that stand in no row."""
    left = {row["task"]: row["left_out"] for row in found if row["left_out"]}
    return [f"{task}: cells that were evaluated on other items, or at another precision, are left out: {count}; make lm-eval "
            "RETRY=1 with one LIMIT, on one kind of device" for task, count in left.items()]


def section(content: dict) -> Section | None:
    """What a report shows of it; None without rows."""
    found = content.get("downstream") or []
    if not found:
        return None
    return Section("Downstream tasks", CAPTION, HEADER, "lllrrrlrr", [cells(row) for row in found], tuple(notes(found)))
