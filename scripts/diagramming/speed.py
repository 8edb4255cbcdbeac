"""What training steps and attention designs cost, from committed benchmarks."""

from matplotlib.figure import Figure

from scripts.diagramming.canvas import NEUTRAL, REC, SOFT, STD, panels, rows_of
from scripts.diagramming.sources import Sources

STEPS = ("bench-steps", "h100-whole-32.json")
ATTENTION = ("bench-attention", "h100.json")


def _device(record: dict) -> str:
    return record["environment"]["device"].replace("NVIDIA ", "")


def performance_comparison(sources: Sources) -> Figure:
    """Time and memory of a training step over the baseline's, with the range over rounds."""
    record = sources.read(*STEPS)
    base, rows = record["baseline"], [row for row in record["rows"] if not row["error"]]
    figure, axes = panels("Cost of a training step", f"124M, {record['batch']} x {record['block_size']:,} tokens on one "
                          f"{_device(record)}, over {base} in the same run; {base}'s own row is a second model.",
                          1.75 + 0.33 * len(rows), columns=2, left=0.75, right=0.75, space=(0.5, 0), top=0.15)
    for ax, (key, title) in zip(axes, (("time", "time"), ("memory", "peak memory")), strict=True):
        rows_of(ax, [row["step"] for row in rows])
        for i, row in enumerate(rows):
            colour = NEUTRAL if row["step"] == base else STD
            if key == "time":
                ax.plot([row["time_min"], row["time_max"]], [i] * 2, color=colour, linewidth=2)
            ax.plot(row[key], i, "o", color=colour, markersize=7)
            ax.text(1.02, i, f"{row[key]:.3f}", va="center", fontsize=9.5, transform=ax.get_yaxis_transform())
        ax.axvline(1, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        ax.set_title(title)
        ax.set_xlabel(f"over {base}'s")
        ax.margins(x=0.12)
    return figure


def evolution_timeline(sources: Sources) -> Figure:
    """Designs of reciprocal attention, from two products of scores to the folded projection: time and memory, compiled."""
    record = sources.read(*ATTENTION)
    rows = [row for row in record["rows"] if (row["dtype"], row["mode"], row["pass"]) == (
        "bfloat16", "compiled", "forward+backward") and not row["error"]]
    base = record["baseline"]
    folded = sources.first(record["study"], "ATTENTION_UNIFIED_RA")
    steps = sources.steps(record["study"])
    designs = [row for row in rows if row["arm"] not in steps]
    shown = [*sorted(designs, key=lambda row: -row["time"]), *(row for row in rows if row["arm"] == folded),
             *(row for row in rows if row["arm"] == base)]
    names = {folded: f"folded ({folded})", base: f"{base}, no second term"}
    figure, axes = panels("Designs of reciprocal attention", f"The module alone, forward and backward, compiled, bfloat16: "
                          f"{record['batch']} x {record['context']:,} tokens on one {_device(record)}.",
                          1.75 + 0.4 * len(shown), columns=2, left=1.85, right=0.75, space=(0.5, 0), top=0.15)
    for ax, (key, title) in zip(axes, (("time", "time, with the range over rounds"), ("memory", "memory")), strict=True):
        rows_of(ax, [names.get(row["arm"], row["arm"]) for row in shown])
        for i, row in enumerate(shown):
            colour = NEUTRAL if row["arm"] == base else REC if row["arm"] == folded else STD
            marker = "D" if row["arm"] == folded else "o"
            if key == "time":
                ax.plot([row["time_min"], row["time_max"]], [i] * 2, color=colour, linewidth=2)
            ax.plot(row[key], i, marker, color=colour, markersize=7)
            ax.text(1.02, i, f"{row[key]:.2f}", va="center", fontsize=9.5, transform=ax.get_yaxis_transform())
        ax.axvline(1, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        ax.set_title(title)
        ax.set_xlabel(f"over {base}'s")
    axes[1].set_yticklabels([])
    return figure
