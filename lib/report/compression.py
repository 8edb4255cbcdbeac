"""What it costs to compress a trained model's values: cells that record "compression" hold the loss of one model three times,
uncompressed, through their codec, and through plain PCA of the same width. The second is the cell's result, unless the cell has
trained on through the codec.

All three are of the same weights and the same evaluation set, so differences are paired by seed with nothing else between
them. Which of the two codecs loses less is a family of its own, one comparison a step, under Holm's correction.
"""

from statistics import fmean
from typing import Any

from lib import anytime, stats
from lib.design import ERROR_RATE
from lib.tables import Section
from lib.verdicts import signed

FEWEST_SEEDS = 3  # as for a verdict


def rows(records_by_step: dict[str, list[dict]], test: str) -> list[dict]:
    """One row a step that has such records: mean loss before, three paired differences with their 95 % intervals (after PCA
    and after the codec, each to before; codec to PCA), which of the two wins, the mean relative error of the values, and the
    smallest and the largest ratio of the codec's to PCA's, over layers and seeds."""
    estimator = anytime.estimate if test == "anytime" else stats.paired
    found: list[dict] = []
    for name, records in records_by_step.items():
        known = [record["compression"] for record in records if record["compression"]]
        if known:
            before, pca, after = ([one[key] for one in known] for key in ("val_loss_before", "val_loss_pca", "val_loss"))
            found.append({
                "name": name, "n": len(known), "before": fmean(before), "pca": _difference(estimator, pca, before),
                "codec": _difference(estimator, after, before), "gain": _difference(estimator, after, pca),
                **{key: _mean(layer[key] for one in known for layer in one["layers"]) for key in ("error", "error_pca")},
                "error_ratio": _ratios([layer for one in known for layer in one["layers"]])})
    corrected = stats.holm([row["gain"]["p"] if row["n"] >= FEWEST_SEEDS else None for row in found])
    for row, p in zip(found, corrected, strict=True):
        ahead = "codec" if row["gain"]["difference"] < 0 else "PCA"
        row |= {"p_holm": p, "wins": None if p is None else ahead if p < ERROR_RATE else "neither"}
    return found


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _ratios(layers: list[dict]) -> dict | None:
    found = [one["error"] / one["error_pca"] for one in layers if one["error"] is not None and one["error_pca"]]
    return {"low": min(found), "high": max(found)} if found else None


def _difference(estimator: Any, arm: list[float], reference: list[float]) -> dict:
    e = estimator([a - b for a, b in zip(arm, reference, strict=True)])
    return {"difference": e.difference, "low": e.low, "high": e.high, "p": e.p}


CAPTION = "The same trained model before and after; differences in nats, paired by seed (95 %)."
HEADER = ["step", "seeds", "loss before", "through plain PCA", "through the codec", "codec to PCA", "loses less",
          "error of values, PCA", "codec"]


def cells(row: dict) -> list[str]:
    """A row as text, in the order of HEADER."""
    return [row["name"], str(row["n"]), f"{row['before']:.4f}", _shown(row["pca"]), _shown(row["codec"]), _shown(row["gain"]),
            row["wins"] or f"fewer than {FEWEST_SEEDS} seeds",
            *("-" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("error_pca", "error"))]


def _shown(e: dict) -> str:
    return signed(e["difference"]) + (f" ({signed(e['low'])}..{signed(e['high'])})" if e["low"] is not None else "")


def section(content: dict) -> Section | None:
    """What a report shows of it; None without rows."""
    found = content.get("compression") or []
    return Section("Compressed values", CAPTION, HEADER, "lrrrrrlrr", [cells(row) for row in found]) if found else None
