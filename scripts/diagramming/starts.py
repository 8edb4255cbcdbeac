"""Gates: where the two starts put them, read from modules as built, and where training took them, from packed cells."""

from collections import defaultdict
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.report import curves
from lib.report.charts import DASHES, LAYERS, NEUTRAL
from scripts.diagramming.canvas import ON_PAPER, PAPER, REC, SOFT, STD, panels, rows_of
from scripts.diagramming.sources import Sources, Waits

STUDY = "gpt2-ra-geometric-ablation"
ATTENTION_ALONE = "gpt2-ra-tied-ablation"  # whose arms have gates in attention and nothing else beside them
TRAINED = "gpt2-ra-parts-ablation+local+brief"
GATES = ("w_std", "w_rec")


def gated(block: Any) -> dict[str, tuple[float, float]]:
    """{what is gated: (w_std, w_rec)} of a block's attention and MLP, by the sizes that they split."""
    found = {}
    for part, whole, low in ((block.attn, "head_dim", "R"), (block.mlp, "d_ff", "R_ff")):
        sizes = part.sizes()
        if low in sizes and hasattr(part, "w_rec"):
            w_std, w_rec = (float(getattr(part, gate).detach().mean()) for gate in GATES)
            found[f"{low} = {sizes[low]} of {sizes[whole]}"] = (w_std, w_rec)
    return found


def geometric_init(sources: Sources) -> Figure:
    """Both starts of each split of the study: the geometric one, and the fixed one of the source documents."""
    starts: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for step in sources.steps(STUDY):
        cfg = sources.configuration(STUDY, step)
        for part, start in gated(sources.block(STUDY, step)).items():
            fixed = cfg.RA_GATES_FIXED if part.startswith("R =") else cfg.RMLP_GATES_FIXED
            starts[part]["fixed" if fixed else "geometric"] = start
    figure, axes = panels("Start of the gates", "Geometric: the share of channels or features that each part holds. At w = 1 "
                          "(dashed) the model would be GPT-2.", 2.1 + 0.62 * len(starts), columns=2, left=1.55, right=0.3,
                          bottom=0.62, space=(0.12, 0), top=0.3)
    for ax, gate, colour in zip(axes, GATES, (STD, REC), strict=True):
        rows_of(ax, list(starts))
        for row, both in enumerate(starts.values()):
            for kind, shift, marker in (("geometric", -0.17, "o"), ("fixed", 0.17, "D")):
                if kind in both:
                    value = both[kind][GATES.index(gate)]
                    ax.plot([0, value], [row + shift] * 2, color=colour, linewidth=1.5, alpha=0.45)
                    ax.plot(value, row + shift, marker, color=colour if kind == "geometric" else PAPER, markeredgecolor=colour,
                            markersize=7, markeredgewidth=1.5)
                    ax.annotate(f"{value:.4g}", (value, row + shift), xytext=(-9, 0) if value > 0.75 else (9, 0), va="center",
                                textcoords="offset points", ha="right" if value > 0.75 else "left", fontsize=9,
                                bbox=ON_PAPER)
        ax.axvline(1, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        ax.set_xlim(0, 1.08)
        ax.set_xlabel(gate)
    axes[1].set_yticklabels([])
    figure.legend(handles=[Line2D([], [], color=SOFT, marker=m, linestyle="", markerfacecolor=f, label=label) for m, f, label in
                           (("o", SOFT, "geometric start"), ("D", PAPER, "fixed start"))], loc="upper left", ncols=2,
                  bbox_to_anchor=(0.012, 1 - 0.62 / figure.get_figheight()), frameon=False, fontsize=9.5, borderaxespad=0,
                  handletextpad=0.2)
    return figure


def gate_evolution(sources: Sources) -> Figure:
    """Gates by layer over training, the mean over seeds, of the steps that logged them and have no other mechanism."""
    alone = set(sources.steps(ATTENTION_ALONE))
    series: dict[str, dict[tuple[str, int], list]] = defaultdict(lambda: defaultdict(list))
    seeds = set()
    for record, rows in sources.curves(TRAINED):
        if record["step"] not in alone:
            continue
        for key in rows[-1]:
            name, _, layer = key.partition("/layer")
            if name.startswith("unified_ra_w_") and layer.isdigit():
                points = curves.points([r["tokens"] for r in rows if key in r], [r[key] for r in rows if key in r])
                series[record["step"]][name.removeprefix("unified_ra_"), int(layer)].append(points)
                seeds.add(record["seed"])
    if not series:
        raise Waits(f"gate statistics in docs/results/{TRAINED}/cells.tar.xz")
    figure, axes = panels("Gates during training", f"Per layer, mean over heads and {len(seeds)} seeds; 124M, as "
                          "committed in docs/results. Dashed: the start.", 5.4, columns=2, rows=len(series), left=0.72,
                          right=0.2, bottom=0.62, space=(0.22, 0.42), top=0.55)
    layers = sorted({layer for known in series.values() for _, layer in known})
    blended = LinearSegmentedColormap.from_list("layers", LAYERS)
    colours = {layer: blended(i / max(len(layers) - 1, 1)) for i, layer in enumerate(layers)}
    study = TRAINED.partition("+")[0]
    for row, step in enumerate(sorted(series, key=sources.steps(study).index)):
        known, attention = series[step], sources.block(study, step).attn
        for column, gate in enumerate(GATES):
            ax = axes[2 * row + column]
            start = float(getattr(attention, gate).detach().mean())
            ax.axhline(start, color=NEUTRAL, linestyle=(0, (4, 3)), linewidth=1)
            for layer in layers:
                points = [(0, start), *curves.mean(known[gate, layer])]
                dash = DASHES[layer % 3]
                ax.plot([x / 1e6 for x, _ in points], [y for _, y in points], color=colours[layer], linewidth=1.4,
                        linestyle="-" if dash[1] == 0 else (0, dash))
            ax.set_title(f"{step}: {gate}")
            ax.grid(axis="y", linewidth=0.6)
            if row == len(series) - 1:
                ax.set_xlabel("million tokens")
    handles = [Line2D([], [], color=colours[n], label=str(n), linestyle="-" if DASHES[n % 3][1] == 0 else (0, DASHES[n % 3]))
               for n in layers]
    figure.legend(handles=handles, title="layer", ncols=len(layers), loc="upper left", frameon=False, fontsize=8.5,
                  title_fontsize=8.5, bbox_to_anchor=(0.012, 1 - 0.6 / figure.get_figheight()), borderaxespad=0,
                  handlelength=1.6, columnspacing=0.9, handletextpad=0.4, alignment="left")
    return figure
