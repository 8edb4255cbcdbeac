"""What all pictures share: type and colours, a sheet for boxes, panels for numbers, files that are the same each time.

Colours are those of reports (lib/report/charts.py), where what each means is fixed here: blue for the standard part, orange
for the reciprocal one, green for values, grey for the baseline. A colour never stands alone: a label or a shape says the same.
Text stays text in an SVG. The bytes of both files depend on the picture and the version of matplotlib alone.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from lib import atomic
from lib.report.charts import LIGHT, NEUTRAL, PALETTE

INK, SOFT, GRID, PAPER = LIGHT
STD, REC, VALUE, OTHER = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[3]
WIDTH, HEAD = 8.4, 0.72  # inches: of every picture, and of its title
DPI = 120
# The files of a picture by their ending, and what matplotlib must not write into them.
METADATA: dict[str, dict[str, None]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
ON_PAPER = {"boxstyle": "square,pad=0.15", "facecolor": PAPER, "edgecolor": "none"}  # behind a text that crosses a line
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": 10.5, "svg.fonttype": "none", "svg.hashsalt": "kablate",
    "text.parse_math": False, "text.color": INK, "grid.color": GRID, "figure.facecolor": PAPER, "savefig.facecolor": PAPER,
    "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelsize": 10,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5}


def tint(colour: str, share: float = 0.18) -> tuple[float, float, float]:
    """The colour thinned with paper."""
    red, green, blue = (1 - share * (1 - c) for c in mpl.colors.to_rgb(colour))
    return red, green, blue


def blank(title: str, line: str, height: float) -> Figure:
    """A figure of this height in inches with its title and the line below it, and nothing drawn yet."""
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.2 / height, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.47 / height, line, fontsize=9.5, color=SOFT, va="center")
    return figure


class Sheet:
    """A blank figure with one drawing plane in inches, the origin at the lower left, for what is not a plot."""

    def __init__(self, title: str, line: str, height: float):
        self.height = height
        self.figure = blank(title, line, height)
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, WIDTH), ylim=(0, height))
        self.ax.axis("off")

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.ax.text(x, y, text, **{"ha": "center", "va": "center", **style})

    def box(self, x: float, y: float, w: float, h: float, text: str = "", colour: str = NEUTRAL, share: float = 0.18,
            **style: Any) -> None:
        """A rounded box with its lower left corner at x, y and a text in its middle."""
        self.ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", linewidth=1.1,
                                         edgecolor=colour, facecolor=tint(colour, share)))
        if text:
            self.text(x + w / 2, y + h / 2, text, **{"fontsize": 10, "linespacing": 1.25, **style})

    def bar(self, x: float, y: float, w: float, h: float, colour: str, text: str = "", share: float = 0.3,
            **style: Any) -> None:
        """A plain rectangle, part of a tensor."""
        self.ax.add_patch(Rectangle((x, y), w, h, linewidth=1, edgecolor=colour, facecolor=tint(colour, share)))
        if text:
            self.text(x + w / 2, y + h / 2, text, **{"fontsize": 10, "linespacing": 1.25, **style})

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = SOFT, **style: Any) -> None:
        self.ax.add_patch(FancyArrowPatch(start, end, **{"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.2,
                                                         "color": colour, "shrinkA": 0, "shrinkB": 0, **style}))


def panels(title: str, line: str, height: float, columns: int = 1, rows: int = 1, left: float = 0.8, right: float = 0.25,
           bottom: float = 0.6, space: tuple[float, float] = (0.35, 0.5), top: float = 0.0,
           heights: Iterable[float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with plots in a grid, row by row; margins in inches, `top` beside the room of the title; `space` in plots."""
    figure = blank(title, line, height)
    grid = figure.add_gridspec(rows, columns, left=left / WIDTH, right=1 - right / WIDTH, bottom=bottom / height,
                               top=1 - (HEAD + 0.12 + top) / height, wspace=space[0], hspace=space[1],
                               height_ratios=list(heights) if heights else None)
    return figure, [figure.add_subplot(grid[row, column]) for row in range(rows) for column in range(columns)]


def rows_of(ax: Axes, names: list[str]) -> None:
    """Names on the left, the first on top, with a faint line each."""
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", linewidth=0.6)
    ax.set_axisbelow(True)


def pointed_out(ax: Axes, points: list[tuple[float, float, str]], looks: dict[str, tuple[str, str]]) -> None:
    """Points (x, y, name) with their names in a column at the right of the plot, in the order of y, each with a thin line to
    its point. `looks` gives the colour and the shape of each name."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    reach, rise = (max(v) - min(v) or 1 for v in (xs, ys))
    ax.set_xlim(min(xs) - 0.08 * reach, max(xs) + 0.08 * reach)
    low, high = min(ys) - 0.12 * rise, max(ys) + 0.12 * rise
    ax.set_ylim(low, high)
    inches = ax.bbox.height / ax.figure.dpi
    apart = (high - low) * min(0.2 / inches, 1 / len(points))
    ordered = sorted(points, key=lambda p: (p[1], -p[0]))
    places = [y for _, y, _ in ordered]
    for _ in range(500):  # names that are too close push each other away, and none leaves the plot
        for i in range(len(places) - 1):
            if (push := (apart - places[i + 1] + places[i]) / 2) > 0:
                places[i], places[i + 1] = places[i] - push, places[i + 1] + push
        places = [min(max(place, low), high) for place in places]
    for (x, y, name), place in zip(ordered, places, strict=True):
        colour, marker = looks[name]
        ax.plot(x, y, marker, color=colour, markersize=7.5, zorder=3, markeredgecolor=PAPER)
        ax.annotate(name, (x, y), xytext=(1.08, place), textcoords=ax.get_yaxis_transform(), va="center", fontsize=9.5,
                    annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1,
                                                       "shrinkB": 3, "alpha": 0.8, "relpos": (0, 0.5)})


def write(figure: Figure, folder: Path, name: str) -> dict[str, int]:
    """Write name.svg and name.png and give {file name: bytes}."""
    written = {}
    for kind, metadata in METADATA.items():
        held = io.BytesIO()
        figure.savefig(held, format=kind, dpi=DPI, metadata=metadata)
        data = held.getvalue()
        data = _of_few_colours(data) if kind == "png" else _without_trailing_blanks(data)
        atomic.write_bytes(folder / f"{name}.{kind}", data)
        written[f"{name}.{kind}"] = len(data)
    return written


def _without_trailing_blanks(text: bytes) -> bytes:
    return b"\n".join(line.rstrip() for line in text.splitlines()) + b"\n"


def _of_few_colours(png: bytes) -> bytes:
    """The PNG with a palette of 256 colours: flat drawings lose nothing, and two thirds of the bytes go."""
    from PIL import Image

    held = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(held, "PNG", optimize=True)
    return held.getvalue()


def room_for(names: Iterable[str]) -> float:
    """Inches at the left that names of rows take."""
    return 0.35 + 0.084 * max(map(len, names))
