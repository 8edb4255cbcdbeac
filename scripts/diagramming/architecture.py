"""One block with reciprocal attention and a reciprocal MLP: its tensors, beside how many parameters the baseline's have."""

import math
from typing import Any

from matplotlib.figure import Figure

from scripts.diagramming.canvas import INK, NEUTRAL, REC, SOFT, STD, VALUE, Sheet
from scripts.diagramming.sources import Sources

STUDY = "gpt2-ra-ablation"
LINE, GAP = 0.25, 0.12  # inches


def tensors(block: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """{part: {name: shape}} of a block's parameters, by the first word of their names."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in block.named_parameters():
        part, _, rest = name.partition(".")
        found.setdefault(part, {})[rest] = tuple(parameter.shape)
    return found


def fused_architecture(sources: Sources) -> Figure:
    """The parts of a block in their order, with the shapes of their tensors and what they add to the baseline's."""
    step, base = sources.first(STUDY, "ATTENTION_UNIFIED_RA", "MLP_RECIPROCAL"), sources.baseline(STUDY)
    cfg = sources.configuration(STUDY, step)
    block, plain = (sources.model(STUDY, one).transformer.h[0] for one in (step, base))
    mine, other = tensors(block), tensors(plain)
    heights = {part: 0.42 if len(names) <= 2 else 0.4 + LINE * len(names) for part, names in mine.items()}
    height = sum(heights.values()) + GAP * len(heights) + 1.65
    sheet = Sheet("A block with both mechanisms", f"{step}, {cfg.GPT2_N_LAYER} such blocks: reciprocal parts lie in the "
                  f"tensors of {base}, only gates are new.", height)
    colours = {"attn": STD, "mlp": VALUE}
    x, w, y = 0.75, 4.55, height - 1.2
    sheet.text(6.85, height - 0.95, f"parameters  (and beyond {base})", fontsize=9.5, color=SOFT)
    sheet.arrow((0.4, height - 1.1), (0.4, 0.35), NEUTRAL, linewidth=1.8)
    sheet.text(0.4, height - 0.97, "x", fontsize=11)
    sheet.text(0.55, 0.3, "to the next block", fontsize=9, color=SOFT, ha="left")
    for part, names in mine.items():
        h = heights[part]
        y -= h
        lines = [f"{name}  {' x '.join(map(str, shape))}" for name, shape in names.items()]
        colour = colours.get(part, NEUTRAL)
        title = {"attn": "attention", "mlp": "MLP"}.get(part, "layer norm")
        if part in colours:
            sheet.box(x, y, w, h, "", colour, 0.1)
            sheet.text(x + 0.15, y + h - 0.2, title, ha="left", fontweight="bold")
            for i, (line, name) in enumerate(zip(lines, names, strict=True)):
                new = name not in other[part]
                sheet.text(x + 0.3, y + h - 0.47 - LINE * i, line, ha="left", fontsize=9.5, color=REC if new else INK,
                           fontweight="bold" if new else "normal")
            sheet.text(x + 2.35, y + h - 0.2, _split(getattr(block, part)), ha="left", fontsize=9.5, color=REC)
        else:
            sheet.box(x, y, w, h, f"{title}  {' + '.join(' x '.join(map(str, s)) for s in names.values())}", colour, 0.1)
        count = sum(map(math.prod, names.values()))
        more = count - sum(map(math.prod, other[part].values()))
        sheet.text(6.95, y + h / 2, f"{count:,}", ha="right", fontsize=10)
        sheet.text(7.15, y + h / 2, f"(+{more:,})" if more else "(equal)", ha="left", fontsize=10, color=REC if more else SOFT)
        if part in colours:
            sheet.arrow((x, y + 0.12), (0.4, y + 0.12), NEUTRAL)
        else:
            sheet.arrow((0.4, y + h / 2), (x, y + h / 2), NEUTRAL)
        y -= GAP
    return sheet.figure


def _split(part: Any) -> str:
    """How a part divides its width."""
    sizes = part.sizes()
    for whole, low in (("head_dim", "R"), ("d_ff", "R_ff")):
        if low in sizes:
            return f"{whole} {sizes[whole]:,} = {sizes[whole] - sizes[low]:,} + {low} {sizes[low]}"
    return ""
