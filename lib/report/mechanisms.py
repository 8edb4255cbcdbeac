"""What the mechanisms of a step came to: the statistics that its cells logged with their last evaluation (lib/mechanisms.py).

A gate that never moved, a path that no layer skipped, a router that gives half to each: what an average loss does not tell.
Each statistic has its mean over finished seeds, of means over layers (and heads); the least and the greatest seed; and the
least and the greatest layer, whose values are means over seeds. The numbers describe, and no verdict rests on them.
"""

from statistics import fmean

from lib.report.curves import number
from lib.tables import Section

COLUMNS = frozenset((  # of the row of an evaluation (lib/loop.py); all else in it are statistics
    "iteration", "tokens", "train_seconds", "progress", "train_loss", "train_perplexity", "val_loss", "val_perplexity",
    "best_val_loss", "inactive"))
SPREADS = ("_min", "_max", "_std")  # beside <name>_mean


def last(rows: list[dict]) -> dict[str, tuple[float, dict[str, float]]]:
    """{statistic: (its mean, {layer: its value there})} of the last of a cell's evaluations."""
    row = {key: value for key, value in (rows[-1] if rows else {}).items() if key not in COLUMNS and number(value)}
    spread = {key.removesuffix("_mean") + end for key in row if key.endswith("_mean") for end in SPREADS}
    found: dict[str, tuple[float, dict[str, float]]] = {}
    for key, value in row.items():
        if "/layer" not in key and key not in spread:
            name = key.removesuffix("_mean")
            found[name] = (value, {where: one for other, one in row.items()
                                   for stem, _, where in [other.partition("/layer")] if stem == name and where})
    return found


def summary(cells: list[list[dict]]) -> list[dict]:
    """One entry a statistic that every cell has, of the evaluations of the finished cells of a step."""
    found = [last(rows) for rows in cells]
    entries = []
    for name in found[0] if found else ():
        if all(name in one for one in found):
            means = [one[name][0] for one in found]
            layers = [fmean(one[name][1][layer] for one in found) for layer in found[0][name][1]
                      if all(layer in one[name][1] for one in found)]
            entries.append({"name": name, "n": len(means), "mean": fmean(means), "low": min(means), "high": max(means),
                            "layers": {"low": min(layers), "high": max(layers)} if layers else None})
    return entries


CAPTION = ("What the mechanisms logged last: means over layers and seeds, and where layers differ, the least and the greatest "
           "of them.")


def section(content: dict) -> Section | None:
    """What a report shows of it, a column for each step that logged something; None if none did, or the report is older."""
    steps = {step["name"]: {one["name"]: _shown(one) for one in found} for step in content.get("steps") or []
             if (found := step.get("statistics"))}
    names = dict.fromkeys(name for found in steps.values() for name in found)
    rows = [[name, *(found.get(name, "") for found in steps.values())] for name in names]
    return Section("Mechanisms", CAPTION, ["statistic", *steps], "l" + "r" * len(steps), rows) if rows else None


def _shown(one: dict) -> str:
    low, high = (f"{one['layers'][end]:.2g}" if one["layers"] else "" for end in ("low", "high"))
    return f"{one['mean']:.3g}" + (f" ({low}..{high})" if low != high else "")
