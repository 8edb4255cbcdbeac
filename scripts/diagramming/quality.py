"""What studies came to, from their committed reports: validation, the router's study, downstream tasks."""

import json
import math
from collections import defaultdict
from typing import Any

from matplotlib.figure import Figure

from lib.report import curves
from lib.report.charts import DASHES, NEUTRAL, PALETTE, WORDS
from scripts.diagramming.caches import TRAINED
from scripts.diagramming.canvas import SOFT, panels, room_for, rows_of
from scripts.diagramming.sources import Sources, Waits, with_fewer_seeds

ROUTER = "gpt2-ra-baseline-vs-routing+local+brief"
MARKERS = {"triangle-down": "v", "triangle-up": "^", "diamond": "D", "square": "s", "circle": "o", "cross": "X"}


def forest(report: dict, title: str) -> Figure:
    """Perplexity by seed, and beside it the paired difference of the loss with its interval and the verdict."""
    steps, base = report["steps"], report["baseline"]
    seeds = max(step["seeds_done"] for step in steps)
    names = [with_fewer_seeds(step, seeds) for step in steps]
    figure, axes = panels(title, f"Left: {seeds} seeds and their mean. Right: difference of the loss to {base}, 95 % intervals "
                          "of paired seeds.", 1.8 + 0.4 * len(steps), columns=2, left=room_for(names),
                          right=1.45, space=(0.12, 0), top=0.15)
    for ax in axes:
        rows_of(ax, names)
    for row, step in enumerate(steps):
        colour = NEUTRAL if step["is_baseline"] else PALETTE[0]
        for cell in step["cells"]:
            if cell["state"] == "done" and curves.number(cell["val_loss"]):
                axes[0].plot(math.exp(cell["val_loss"]), row, "o", color=colour, markersize=4.5, alpha=0.5)
        if curves.number(step["mean"].get("val_perplexity")):
            axes[0].plot(step["mean"]["val_perplexity"], row, "|", color=colour, markersize=17, markeredgewidth=2.2)
        compared: dict[str, Any] = step["comparison"] or {}
        word = "baseline" if step["is_baseline"] else compared.get("word", "")
        axes[1].text(1.03, row, word, va="center", fontsize=9.5, transform=axes[1].get_yaxis_transform())
        if curves.number(compared.get("difference")):
            ink, marker = WORDS[word]
            if curves.number(compared.get("low")):
                axes[1].plot([compared["low"], compared["high"]], [row] * 2, color=ink, linewidth=2)
            axes[1].plot(compared["difference"], row, MARKERS[marker], color=ink, markersize=8)
    axes[0].set_xlabel("validation perplexity")
    axes[1].set_xlabel("difference (nats)")
    axes[1].axvline(0, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
    axes[1].set_yticklabels([])
    axes[1].margins(x=0.08)
    axes[1].locator_params(axis="x", nbins=5)  # signs make the labels wide
    return figure


def validation_quality(sources: Sources) -> Figure:
    """Smaller caches against GPT-2's."""
    return forest(sources.read(TRAINED, "report.json"), "Validation quality with a smaller cache")


def router_final_comparison(sources: Sources) -> Figure:
    """The router's study, as it ended."""
    return forest(sources.read(ROUTER, "report.json"), "The router: final validation")


def router_validation_perplexity(sources: Sources) -> Figure:
    """Validation perplexity over training, every seed faint and the mean bold."""
    found = defaultdict(list)
    for record, rows in sources.curves(ROUTER):
        found[record["step"]].append(
            curves.points([row["tokens"] for row in rows], [row.get("val_perplexity") for row in rows]))
    figure, (ax,) = panels("The router: perplexity during training", "Validation perplexity; faint: single seeds, bold: their "
                           "mean.", 4.2, left=0.85, right=0.3)
    for i, (step, seeds) in enumerate(found.items()):
        colour, dash = PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]
        style = "-" if dash[1] == 0 else (0, tuple(dash))
        for points in seeds:
            ax.plot([x / 1e6 for x, _ in points], [y for _, y in points], color=colour, linewidth=0.9, alpha=0.35)
        points = curves.mean(seeds)
        ax.plot([x / 1e6 for x, _ in points], [y for _, y in points], color=colour, linewidth=2.2, linestyle=style, label=step)
    ax.set(xlabel="million tokens", ylabel="validation perplexity", yscale="log")
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    ax.grid(axis="y", linewidth=0.6)
    ax.legend(frameon=False)
    return figure


def router_gpu_memory(sources: Sources) -> Figure:
    """Peak memory of training on a GPU, of the router's study."""
    report = sources.read(ROUTER, "report.json")
    known = {step["name"]: step["mean"]["peak_memory_bytes"] / 2 ** 20 for step in report["steps"]
             if curves.number(step["mean"].get("peak_memory_bytes"))}
    if not known or report["environment"]["device_type"] == "cpu":  # there it is the whole process, most of it not the model
        raise Waits(f"peak memory of a GPU in docs/results/{ROUTER}/report.json")
    figure, (ax,) = panels("The router: peak memory", "Of training, mean over finished seeds.", 1.75 + 0.4 * len(known),
                           left=room_for(known), right=1.2, top=0.1)
    rows_of(ax, list(known))
    for row, (step, mib) in enumerate(known.items()):
        ax.barh(row, mib, height=0.55, color=NEUTRAL if step == report["baseline"] else PALETTE[0])
        ax.text(1.02, row, f"{mib:,.0f} MiB", va="center", fontsize=9.5, transform=ax.get_yaxis_transform())
    ax.set_xlabel("MiB")
    return figure


def lmeval_benchmarks(sources: Sources) -> Figure:
    """Differences to the baseline on the same items of downstream tasks, of every committed study that was evaluated on any."""
    rows = []
    for path in sorted(sources.results.glob("*/report.json")):
        report = json.loads(path.read_text())
        rows += [(report["study"], row, row["comparison"]) for row in report.get("downstream") or [] if row["comparison"]]
    if not rows:
        raise Waits("docs/results/STUDY/report.json of a study that make lm-eval has evaluated")
    names = [f"{row['name']}: {row['task']}, {row['metric']}" for _, row, _ in rows]
    figure, (ax,) = panels("Downstream tasks", "Difference to the baseline on the same items, 95 % intervals as the reports "
                           "give them.", 1.75 + 0.36 * len(rows), left=room_for(names), right=1.3, top=0.1)
    rows_of(ax, names)
    for i, (study, _, compared) in enumerate(rows):
        if curves.number(compared["low"]):
            ax.plot([compared["low"], compared["high"]], [i] * 2, color=PALETTE[0], linewidth=2)
        ax.plot(compared["difference"], i, "o", color=PALETTE[0], markersize=7)
        ax.text(1.02, i, f"{compared['items']} x {len(compared['seeds'])}", va="center", fontsize=9,
                transform=ax.get_yaxis_transform())
        if i == 0 or rows[i - 1][0] != study:
            ax.text(-0.02, i - 0.42, study, ha="right", va="center", fontsize=8, color=SOFT, transform=ax.get_yaxis_transform())
    ax.axvline(0, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
    ax.set_xlabel("difference (right: items x seeds)")
    return figure
