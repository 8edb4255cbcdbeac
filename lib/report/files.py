"""Writes a report in all its forms: report.md, .csv, .json, .html and a PNG of each chart, each whole or not at all.

The HTML page and the pictures need jinja2 and vl-convert; without them the other forms are written, and `write` says what
was left out. They are made anew only if the content has changed.
"""

import csv
import io
import json
from pathlib import Path

from lib import atomic
from lib.report import caches, markdown

NEEDED = ("jinja2", "vl_convert")  # for the page and the pictures
CSV_COLUMNS = ("name", "step", "optimizer", "control", "tuned", "seeds_done", "seeds_planned")
CSV_MEANS = ("val_loss", "val_loss_sd", "val_perplexity", "best_val_loss", "train_loss", "tokens", "train_seconds",
             "tokens_per_second", "parameters", "peak_memory_bytes", "kv_cache_bytes")
CSV_COMPARISON = ("word", "method", "n", "n_baseline", "difference", "low", "high", "p", "p_holm", "p_sign_flip",
                  "sign_flip_floor", "p_equivalence", "detectable", "seeds_needed", "correlation")
CSV_VIEWS = {"equal_tokens": ("difference", "low", "high"), "equal_seconds": ("difference", "low", "high"),
             "speed": ("ratio", "low", "high")}


def write(out: Path, content: dict) -> tuple[str, str | None]:
    """Write every form into `out`; returns the Markdown and, if something was left out, why."""
    out.mkdir(parents=True, exist_ok=True)
    atomic.remove_orphans(out)
    text = markdown.render(content)
    atomic.write_text(out / "report.md", text)
    atomic.write_text(out / "report.csv", spreadsheet(content))
    atomic.write_text(out / "report.json", json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n")
    try:
        _write_pictures(out, content)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        return text, f"{error.name} is not installed, so report.html and the pictures were left out"
    return text, None


def spreadsheet(content: dict) -> str:
    """One row a step, then one a contrast, "V3 vs V1", of which only the comparison is there; an empty field where there is no
    value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *CSV_MEANS, *CSV_COMPARISON, *(f"{v}_{k}" for v, keys in CSV_VIEWS.items() for k in keys),
                     *(f"smaller_{share}" for share in caches.SHARES)])
    for row in [*content["steps"], *content.get("contrasts", [])]:
        comparison, mean = row["comparison"] or {}, row.get("mean", {})
        views = [(comparison.get(view) or {}).get(key) for view, keys in CSV_VIEWS.items() for key in keys]
        smaller = row.get("kv_cache", {}).get("smaller") or {}
        writer.writerow([*map(row.get, CSV_COLUMNS), *map(mean.get, CSV_MEANS), *map(comparison.get, CSV_COMPARISON), *views,
                         *map(smaller.get, caches.SHARES)])
    return file.getvalue()


def _write_pictures(out: Path, content: dict) -> None:
    import jinja2  # noqa: F401  both, before either has written anything
    import vl_convert  # noqa: F401

    from lib.report import charts, page

    specs = charts.charts(content)
    html = out / "report.html"
    if page.is_current(html, content) and all((out / f"{name}.png").exists() for name in specs):
        return
    for name, spec in specs.items():
        atomic.write_bytes(out / f"{name}.png", charts.png(spec))
    for old in out.glob("*.png"):  # a chart that has no data any more
        if old.stem not in specs and old.stem in charts.NAMES:
            old.unlink()
    atomic.write_text(html, page.render(content, specs))  # last: it is what says that the pictures are current
