"""What a smaller cache costs: final validation loss against bytes of cache and against decoding speed, one point a step.

`points(records, decode)` takes the metrics.json of a study's finished cells and what `make bench-decode` kept; `chart` and
`markdown` show them. Losses are the cells' own, in nats, means over seeds with the smallest and the largest; bytes are of one
sequence of the study's context; speeds are those of the benchmark at that context, of an untrained model of the same sizes.

A cell that compressed a trained model (lib/report/compression.py) also gives a point for plain PCA of the same width: its loss
is measured, its bytes are the same, its speed is not known.

A point is on the frontier of bytes (or of speed) if no other has a mean loss as low and needs no more bytes (or is as fast),
and is better in one of the two. Differences of means are not verdicts: those are the report's.
"""

import math
from statistics import fmean

from lib.report import charts
from lib.tables import table

PCA = ", plain PCA"
WIDTH, HEIGHT = 400, 330  # of a panel, pixels
LETTER, LINE, GAP = 7.0, 15, 10  # a label's width a letter and its height, and its distance from the point, pixels
SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "triangle-right", "triangle-left"]


def points(records: list[dict], decode: dict, batch: int) -> list[dict]:
    """One point a step (and optimizer, where there are several), and one a plain PCA; most bytes first."""
    optimizers = {r["optimizer"] for r in records}
    groups: dict[str, list[dict]] = {}
    for r in records:
        name = r["step"] if len(optimizers) == 1 else f"{r['step']} {r['optimizer']}"
        groups.setdefault(name, []).append(r)
    found = []
    for name, cells in groups.items():
        found.append(_point(name, cells, {r["seed"]: r["val_loss"] for r in cells}) | _speed(cells[0], decode, batch))
        if compressed := {r["seed"]: r["compression"]["val_loss_pca"] for r in cells
                         if r.get("compression") and r["compression"]["val_loss"] == r["val_loss"]}:  # of the same weights
            found.append(_point(name + PCA, cells, compressed) | dict.fromkeys(("tokens_per_second", "slowest", "fastest")))
    found.sort(key=lambda p: (-p["cache_bytes"], p["name"]))
    for p in found:
        p["on_bytes"] = not any(_beats(q, p, lambda x: x["cache_bytes"]) for q in found)
        timed = [q for q in found if q["tokens_per_second"]]
        p["on_speed"] = p in timed and not any(_beats(q, p, lambda x: -x["tokens_per_second"]) for q in timed)
    return found


def _point(name: str, cells: list[dict], losses: dict[int, float]) -> dict:
    values = list(losses.values())
    return {"name": name, "n": len(values), "val_loss": fmean(values), "low": min(values), "high": max(values),
            "by_seed": {str(seed): loss for seed, loss in losses.items()}, "cache_bytes": cells[0]["kv_cache_bytes"]}


def _speed(record: dict, decode: dict, batch: int) -> dict:
    """Of the benchmark's row of this step at the study's context, if its cache has as many bytes: one of another size or
    precision is another model's."""
    wanted = {"step": record["step"], "context": record["configuration"]["GPT2_BLOCK_SIZE"], "batch": batch, "error": None,
              "cache_bytes": batch * record["kv_cache_bytes"]}
    for row in decode["rows"]:
        if wanted.items() <= row.items():
            return {"tokens_per_second": row["tokens_per_second"], "slowest": row["tokens_per_second_min"],
                    "fastest": row["tokens_per_second_max"]}
    return dict.fromkeys(("tokens_per_second", "slowest", "fastest"))


def _beats(one: dict, other: dict, cost) -> bool:
    a, b = (one["val_loss"], cost(one)), (other["val_loss"], cost(other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def unit(found: list[dict]) -> tuple[str, int]:
    """What the bytes are shown in."""
    return ("MiB", 2 ** 20) if max(p["cache_bytes"] for p in found) >= 2 ** 20 else ("KiB", 2 ** 10)


def markdown(found: list[dict], where: str) -> str:
    """frontier.md; `where` says what was measured on."""
    name, size = unit(found)
    largest = max(p["cache_bytes"] for p in found)
    rows = [[p["name"], str(p["n"]), f"{p['val_loss']:.4f}", f"{p['low']:.4f} .. {p['high']:.4f}",
             f"{p['cache_bytes'] / size:.3g}", f"{p['cache_bytes'] / largest:.3f}",
             f"{p['tokens_per_second']:,.0f}" if p["tokens_per_second"] else "-",
             f"{p['slowest']:,.0f} .. {p['fastest']:,.0f}" if p["tokens_per_second"] else "-",
             " and ".join(w for w, on in (("bytes", p["on_bytes"]), ("speed", p["on_speed"])) if on)] for p in found]
    header = ["step", "seeds", "final val loss", "min .. max", f"cache, {name}", "of the largest", "tokens/s decoded",
              "min .. max", "frontier of"]
    return f"# Loss, cache and decoding speed\n\n{where}\n\n" + table(header, rows, "lrrrrrrrl")


def chart(found: list[dict], title: str, where: str) -> dict:
    """Two panels with one axis of loss: by bytes of cache (smaller is to the left) and by tokens/s (faster is to the right)."""
    name, size = unit(found)
    low, high = (pick(end(p) for p in found) for pick, end in ((min, lambda p: p["low"]), (max, lambda p: p["high"])))
    space = 0.12 * (high - low) or 0.01
    losses = (low - space, high + space)
    marks = looks(found)
    cache = [p | {"x": p["cache_bytes"] / size, "x_low": None, "x_high": None, "on": p["on_bytes"]} for p in found]
    speed = [p | {"x": p["tokens_per_second"], "x_low": p["slowest"], "x_high": p["fastest"], "on": p["on_speed"]}
             for p in found if p["tokens_per_second"]]
    few, many = (pick(p["x"] for p in cache) for pick in (min, max))
    top = 1.12 * max(p["x_high"] for p in speed) if speed else 1
    panels = [_panel(cache, losses, (few / 1.5, many * 1.5), True, f"cache of one sequence ({name})", marks),
              *([_panel(speed, losses, (0, top), False, "tokens decoded per second", marks)] if speed else [])]
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "hconcat": panels, "spacing": 28,
            "title": {"text": title, "subtitle": [
                where, "Point: mean over seeds; bar: smallest to largest seed; dots: single seeds; hollow: plain PCA in the "
                "codec's place.",
                "Line: the frontier, where no other step is as good with a smaller cache (left) or a higher speed (right)."]},
            "description": "; ".join(f"{p['name']}: loss {p['val_loss']:.4f}, cache {p['cache_bytes']} bytes" for p in found)}


def looks(found: list[dict]) -> dict[str, tuple]:
    """Colour, shape and whether it is filled, by name: plain PCA is the hollow form of its step's."""
    steps = [p["name"] for p in found if not p["name"].endswith(PCA)]
    own = {n: (charts.PALETTE[i % len(charts.PALETTE)], SHAPES[i % len(SHAPES)], 1) for i, n in enumerate(steps)}
    return own | {n + PCA: (*look[:2], 0) for n, look in own.items()}


def _panel(at: list[dict], losses: tuple, ends: tuple, log: bool, title: str, marks: dict) -> dict:
    x = {"type": "quantitative", "scale": {"domain": list(ends), "nice": False, "zero": False} | (
        {"type": "log", "base": 2} if log else {}),
        "axis": {"title": title, "grid": False, "labelFlush": True, "tickCount": 6,
                 "labelExpr": "datum.value == 0 ? '0' : format(datum.value, '~s')",
                 "labelOverlap": True}}
    y = {"type": "quantitative", "scale": {"domain": list(losses), "nice": False, "zero": False},
         "axis": {"title": "final validation loss (nats)" if log else None, "tickCount": 7, "format": ".4~f"}}
    plain = [{k: p[k] for k in ("name", "x", "x_low", "x_high", "val_loss", "low", "high", "n")} | dict(
        zip(("colour", "shape", "filled"), marks[p["name"]], strict=True)) for p in at]
    seeds = [{"x": p["x"], "val_loss": loss, "colour": marks[p["name"]][0]} for p in at for loss in p["by_seed"].values()]
    line = sorted(({"x": p["x"], "val_loss": p["val_loss"]} for p in at if p["on"]), key=lambda p: p["x"])
    colour = {"field": "colour", "type": "nominal", "scale": None}
    tooltip = [{"field": "name", "type": "nominal"}, {"field": "val_loss", "type": "quantitative", "format": ".4f"},
               {"field": "x", "type": "quantitative", "title": title}, {"field": "n", "type": "quantitative", "title": "seeds"}]

    def here(**fields):
        both = {"x": x | {"field": "x"}, "y": y | {"field": "val_loss"}}
        return both | fields

    labels = placed(at, losses, ends, log)
    return {"width": WIDTH, "height": HEIGHT, "layer": [
        {"data": {"values": line}, "mark": {"type": "line", "interpolate": "step-after" if log else "step-before",
                                            "color": charts.NEUTRAL, "strokeWidth": 1.5, "strokeDash": [4, 3]},
         "encoding": here()},
        {"data": {"values": seeds}, "mark": {"type": "point", "filled": True, "size": 16, "opacity": 0.5},
         "encoding": here(color=colour)},
        {"data": {"values": plain}, "mark": {"type": "rule", "strokeWidth": 1.6},
         "encoding": here(y=y | {"field": "low"}, y2={"field": "high"}, color=colour)},
        {"data": {"values": plain}, "transform": [{"filter": "isValid(datum.x_low)"}],
         "mark": {"type": "rule", "strokeWidth": 1.6},
         "encoding": here(x=x | {"field": "x_low"}, x2={"field": "x_high"}, color=colour)},
        {"data": {"values": labels}, "transform": [{"filter": "datum.moved"}], "mark": {"type": "rule", "strokeWidth": 0.7},
         "encoding": here(x2={"field": "label_x"}, y2={"field": "label_y"})},
        {"data": {"values": plain}, "mark": {"type": "point", "size": 75, "opacity": 1, "strokeWidth": 2},
         "encoding": here(color=colour, fill=colour, shape={"field": "shape", "type": "nominal", "scale": None},
                          fillOpacity={"field": "filled", "type": "quantitative", "scale": None}, tooltip=tooltip)},
        *({"data": {"values": [label for label in labels if label["align"] == side]},
           "mark": {"type": "text", "align": side, "baseline": "middle", "fontSize": 12} | halo,
           "encoding": here(x=x | {"field": "label_x"}, y=y | {"field": "label_y"}, text={"field": "name"})}
          for halo in ({"stroke": charts.LIGHT[-1], "strokeWidth": 4, "strokeJoin": "round"}, {})  # lines end before it
          for side in ("left", "right"))]}


def placed(at: list[dict], losses: tuple, ends: tuple, log: bool) -> list[dict]:
    """A label beside every point, on the first free place of a few around it; `moved` where a thin line must lead to it."""
    scale = math.log if log else float
    first, last = map(scale, ends)

    def pixels(x, loss):
        return (scale(x) - first) / (last - first) * WIDTH, (losses[1] - loss) / (losses[1] - losses[0]) * HEIGHT

    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in (pixels(p["x"], p["val_loss"]) for p in at)]
    taken += [(px - 2, top, px + 2, bottom) for p in at  # the bars of seeds
              for (px, top), (_, bottom) in [(pixels(p["x"], p["high"]), pixels(p["x"], p["low"]))]]
    found = []
    for p in sorted(at, key=lambda p: p["val_loss"], reverse=True):
        px, py = pixels(p["x"], p["val_loss"])
        width = LETTER * len(p["name"])
        places = []
        for step in range(9):
            for shift in ((0,) if step == 0 else (-step * LINE, step * LINE)):
                for side in ("left", "right"):  # the side of the text that is at its anchor
                    gap = GAP + (6 if step else 0)
                    left = px + gap if side == "left" else px - gap - width
                    box = (left, py + shift - LINE / 2, left + width, py + shift + LINE / 2)
                    if box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT:
                        places.append((side, step, box))
        free = (place for place in places if not any(_meet(place[2], other) for other in taken))
        side, step, box = next(free, places[0] if places else ("left", 0, (px + GAP, py - 7, px + GAP + width, py + 8)))
        taken.append(box)
        anchor, middle = box[0] if side == "left" else box[2], (box[1] + box[3]) / 2
        across = first + anchor / WIDTH * (last - first)
        found.append({"name": p["name"], "x": p["x"], "val_loss": p["val_loss"], "align": side, "moved": step > 0,
                      "label_x": math.exp(across) if log else across,
                      "label_y": losses[1] - middle / HEIGHT * (losses[1] - losses[0])})
    return found


def _meet(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
