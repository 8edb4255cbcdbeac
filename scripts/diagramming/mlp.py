"""The reciprocal MLP: how its features are folded into the two matmuls of a plain one, and the steps that build on it."""

from typing import Any

from matplotlib.figure import Figure

from scripts.diagramming.canvas import NEUTRAL, ON_PAPER, PALETTE, REC, SOFT, STD, VALUE, Sheet, panels, rows_of
from scripts.diagramming.sources import Sources

STUDY = "gpt2-ra-rmlp-ablation"
SWITCHES = {  # what a column shows of a step: a symbol, and how its value is said
    "ATTENTION_UNIFIED_RA": "reciprocal\nattention", "RA_SELF_RESTART": "self-\nrestart", "MLP_RECIPROCAL": "reciprocal\nMLP",
    "RMLP_MIXER": "mixer", "RMLP_TOKEN_GATE": "per-token\ngate"}


def rmlp_folding(sources: Sources) -> Figure:
    """Where the reciprocal features lie in the up and the down projection, and where the gates act."""
    step = sources.first(STUDY, "MLP_RECIPROCAL", without=("RMLP_MIXER", "RMLP_TOKEN_GATE"))
    mlp: Any = sources.block(STUDY, step).mlp
    (std, _), (low, _) = mlp.up_weights()
    down = mlp.down_weight()
    scale = (down / mlp.c_proj.weight).detach()[0]  # what multiplies the columns
    w_std, w_rec = float(scale[0]), float(scale[-1])
    d_std, r_ff, width = std.shape[0], low.shape[0], std.shape[1]
    sheet = Sheet("Reciprocal MLP, folded", f"{step}: {d_std + r_ff:,} features, {r_ff} of them reciprocal (not to scale). "
                  "Two matmuls, as in GPT-2.", 4.6)
    sheet.box(0.3, 1.75, 1.05, 0.8, f"x\nB x T x {width}", NEUTRAL)
    for y, h, colour, name, n, w in ((1.95, 1.45, STD, "std", d_std, w_std), (0.75, 0.95, REC, "low", r_ff, w_rec)):
        mid = y + h / 2
        sheet.bar(1.95, y, 1.45, h, colour, f"U_{name}\n{n:,} x {width}")
        sheet.arrow((1.35, 2.15), (1.95, mid), colour)
        sheet.bar(3.95, y, 1.3, h, colour, f"gelu\n{n:,} features", share=0.12)
        sheet.arrow((3.4, mid), (3.95, mid), colour)
        sheet.bar(5.8, y, 1.45, h, colour, f"W_{name}\n{down.shape[0]} x {n:,}")
        sheet.arrow((5.25, mid), (5.8, mid), colour)
        sheet.arrow((7.25, mid), (7.55, 2.15), colour)
        sheet.text(6.52, y + h + 0.17 if name == "std" else y - 0.2, f"x w_{'std' if name == 'std' else 'rec'} = {w:.4g}",
                   fontsize=9.5)
    sheet.box(7.55, 1.75, 0.6, 0.8, "y", NEUTRAL)
    sheet.text(2.67, 3.57, "one weight, by rows", fontsize=9.5, color=SOFT)
    sheet.text(4.6, 3.57, "one activation", fontsize=9.5, color=SOFT)
    sheet.text(0.3, 0.27, f"{mlp.gate_std.numel() + mlp.gate_rec.numel()} gates a layer multiply columns of W_down as it is "
               "cast; they fold into it when the model is baked.", ha="left", fontsize=9.5, color=SOFT)
    return sheet.figure


def rmlp_ablation_steps(sources: Sources) -> Figure:
    """A row a step of the study: what is switched on, the sizes, the parameters."""
    steps = sources.steps(STUDY)
    models = {step: sources.model(STUDY, step) for step in steps}
    counts = {step: sum(p.numel() for p in model.parameters()) for step, model in models.items()}
    base = counts[sources.baseline(STUDY)]
    figure, (ax,) = panels("Steps of the R-MLP ablation", f"{STUDY}: what each step switches on, and what it adds to the "
                           f"{base:,} parameters of {sources.baseline(STUDY)}.", 1.55 + 0.38 * len(steps), left=0.7, right=0.1,
                           bottom=0.15, top=0.35)
    rows_of(ax, steps)
    ax.set_xlim(-0.5, len(SWITCHES) + 1.9)
    ax.set_xticks([*range(len(SWITCHES)), len(SWITCHES) + 0.1, len(SWITCHES) + 1.25],
                  [*SWITCHES.values(), "sizes", "parameters"])
    ax.xaxis.tick_top()
    ax.tick_params(axis="x", length=0)
    for side in ("top", "bottom"):
        ax.spines[side].set_visible(False)
    colours = (STD, VALUE, REC, *PALETTE[3:])
    for row, step in enumerate(steps):
        cfg = sources.configuration(STUDY, step)
        for column, symbol in enumerate(SWITCHES):
            on = bool(getattr(cfg, symbol))
            ax.plot(column, row, "o", markersize=11 if on else 4, color=colours[column] if on else NEUTRAL,
                    alpha=1 if on else 0.35)
        sizes = models[step].sizes()
        said = "\n".join(f"{name} = {sizes[name]}" for name in ("R", "R_ff") if name in sizes)
        ax.text(len(SWITCHES) + 0.1, row, said or "-", ha="center", va="center", fontsize=8.5, linespacing=1.1,
                bbox=ON_PAPER)
        ax.text(len(SWITCHES) + 1.6, row, f"+{counts[step] - base:,}", ha="right", va="center", fontsize=9.5,
                bbox=ON_PAPER)
    return figure
