"""What a smaller cache costs: final validation loss against bytes of cache and against decoding speed, one point a step.

`points(records, decode)` takes the metrics.json of a study's finished cells and what `make bench-decode` kept; `chart` and
`markdown` show them. Losses are the cells' own, in nats, means over seeds with the smallest and the largest; bytes are of one
sequence of the study's context; speeds are those of the benchmark at that context, of an untrained model of the same sizes,
as ratios to the baseline that was timed beside it: tokens/s of two steps are minutes apart, on a machine that may have changed.

A cell that compressed a trained model (lib/report/compression.py) also gives a point for plain PCA of the same width: its loss
is measured, its bytes are the same, its speed is not known.

A point is on the frontier of bytes (or of speed) if no other has a mean loss as low and needs no more bytes (or is as fast),
and is better in one of the two. Differences of means are not verdicts: those are the report's.
"""

import math
from collections import Counter
from statistics import fmean
from typing import Any

from lib.report import charts, labels
from lib.tables import table

PCA = ", plain PCA"
WIDTH, HEIGHT = 400, 330  # of a panel, pixels
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
            found.append(_point(name + PCA, cells, compressed) | _untimed(None))
    found.sort(key=lambda p: (-p["cache_bytes"], p["name"]))
    for p in found:
        p["on_bytes"] = not any(_beats(q, p, lambda x: x["cache_bytes"]) for q in found)
        timed = [q for q in found if q["speed"]]
        p["on_speed"] = p in timed and not any(_beats(q, p, lambda x: -x["speed"]) for q in timed)
    return found


def _point(name: str, cells: list[dict], losses: dict[int, float]) -> dict:
    values = list(losses.values())
    return {"name": name, "n": len(values), "val_loss": fmean(values), "low": min(values), "high": max(values),
            "by_seed": {str(seed): loss for seed, loss in losses.items()}, "cache_bytes": cells[0]["kv_cache_bytes"]}


def _speed(record: dict, decode: dict, batch: int) -> dict:
    """Of the benchmark's row of this step at the study's context, if its cache has as many bytes: one of another size or
    precision is another model's. Without one `untimed` says why."""
    rows = [row for row in decode["rows"] if row["step"] == record["step"]]
    if not rows:
        return _untimed("it is not in the file")
    context = record["configuration"]["GPT2_BLOCK_SIZE"]
    rows = [row for row in rows if (row["context"], row["batch"] or batch) == (context, batch)]  # no batch: nothing fitted
    if not rows:
        return _untimed(f"the file has it at other contexts or batches than {context} and {batch}")
    timed = [row for row in rows if not row["error"]]
    if not timed:
        return _untimed(rows[0]["error"])
    for row in timed:
        if row["cache_bytes"] == batch * record["kv_cache_bytes"]:
            return {"tokens_per_second": row["tokens_per_second"], "speed": row["speed"], "slowest": row["speed_min"],
                    "fastest": row["speed_max"], "untimed": None}
    return _untimed(f"a sequence's cache has {_kib(timed[0]['cache_bytes'] / batch)} KiB in the file and "
                    f"{_kib(record['kv_cache_bytes'])} here: another precision, or other sizes")


def _untimed(why: str | None) -> dict:
    return {"tokens_per_second": None, "speed": None, "slowest": None, "fastest": None, "untimed": why}


def _kib(count: float) -> str:
    return f"{count / 2 ** 10:,.4g}" if count < 2 ** 20 else f"{count / 2 ** 10:,.0f}"


def _beats(one: dict, other: dict, cost: Any) -> bool:
    a, b = (one["val_loss"], cost(one)), (other["val_loss"], cost(other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def unit(found: list[dict]) -> tuple[str, int]:
    """What the bytes are shown in."""
    return ("MiB", 2 ** 20) if max(p["cache_bytes"] for p in found) >= 2 ** 20 else ("KiB", 2 ** 10)


def markdown(found: list[dict], study: str, where: str) -> str:
    """frontier.md; `where` says what was measured on, in lines."""
    name, size = unit(found)
    largest = max(p["cache_bytes"] for p in found)
    rows = [[p["name"], str(p["n"]), f"{p['val_loss']:.4f}", f"{p['low']:.4f} .. {p['high']:.4f}",
             f"{p['cache_bytes'] / size:.3g}", f"{p['cache_bytes'] / largest:.3f}",
             *((f"{p['tokens_per_second']:,.0f}", f"{p['speed']:.3f}", f"{p['slowest']:.3f} .. {p['fastest']:.3f}")
               if p["speed"] else "---"),
             " and ".join(w for w, on in (("bytes", p["on_bytes"]), ("speed", p["on_speed"])) if on)] for p in found]
    header = ["step", "seeds", "final val loss", "min .. max", f"cache, {name}", "of the largest", "tokens/s decoded",
              "speed", "min .. max", "frontier of"]
    text = f"# Loss, cache and decoding speed, {study}\n\n{where}\n\n" + table(header, rows, "lrrrrrrrrl")
    sets = Counter(tuple(p["by_seed"]) for p in found)
    most = max(sets, key=lambda seeds: (len(seeds), sets[seeds]))
    other = [p["name"] for p in found if tuple(p["by_seed"]) != most]
    text += f"\nOf fewer seeds or of others, so not quite comparable: {', '.join(other)}.\n" if other else ""
    untimed = [f"- {p['name']}: {p['untimed']}\n" for p in found if p["untimed"]]
    return text + ("\nNot timed:\n\n" + "".join(untimed) if untimed else "")


def chart(found: list[dict], title: str, where: str, baseline: str) -> dict:
    """Two panels with one axis of loss: by bytes of cache (smaller is to the left) and by speed (faster is to the right)."""
    name, size = unit(found)
    low, high = (pick(end(p) for p in found) for pick, end in ((min, lambda p: p["low"]), (max, lambda p: p["high"])))
    space = 0.12 * (high - low) or 0.01
    losses = (low - space, high + space)
    marks = looks(found)
    cache = [p | {"x": p["cache_bytes"] / size, "x_low": None, "x_high": None, "on": p["on_bytes"]} for p in found]
    speed = [p | {"x": p["speed"], "x_low": p["slowest"], "x_high": p["fastest"], "on": p["on_speed"]}
             for p in found if p["speed"]]
    few, many = (pick(p["x"] for p in cache) for pick in (min, max))
    top = 1.12 * max(p["x_high"] for p in speed) if speed else 1
    panels = [_panel(cache, losses, (few / 1.5, many * 1.5), True, f"cache of one sequence ({name})", marks),
              *([_panel(speed, losses, (0, top), False, f"decoding speed, relative to {baseline}", marks)] if speed else [])]
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "hconcat": panels, "spacing": 28,
            "title": {"text": title, "subtitle": [
                *where.splitlines(),
                "Point: mean over seeds; bar: smallest to largest seed; dots: single seeds; hollow, unnamed: plain PCA in the "
                "place of its codec.",
                "Line: the frontier, where no other step is as good with a smaller cache (left) or a higher speed (right). It "
                "joins means; verdicts are the report's."]},
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
                 "labelExpr": "format(datum.value, '~g')",
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

    def here(**fields: Any) -> Any:
        both = {"x": x | {"field": "x"}, "y": y | {"field": "val_loss"}}
        return both | fields

    names = placed(at, losses, ends, log)
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
        {"data": {"values": names}, "transform": [{"filter": "datum.moved"}], "mark": {"type": "rule", "strokeWidth": 0.7},
         "encoding": here(x2={"field": "label_x"}, y2={"field": "label_y"})},
        {"data": {"values": plain}, "mark": {"type": "point", "size": 75, "opacity": 1, "strokeWidth": 2},
         "encoding": here(color=colour, fill=colour, shape={"field": "shape", "type": "nominal", "scale": None},
                          fillOpacity={"field": "filled", "type": "quantitative", "scale": None}, tooltip=tooltip)},
        *({"data": {"values": [name for name in names if name["align"] == side]},
           "mark": {"type": "text", "align": side, "baseline": "middle", "fontSize": 12} | halo,
           "encoding": here(x=x | {"field": "label_x"}, y=y | {"field": "label_y"}, text={"field": "name"})}
          for halo in ({"stroke": charts.LIGHT[-1], "strokeWidth": 4, "strokeJoin": "round"}, {})  # lines end before it
          for side in ("left", "right"))]}


def placed(at: list[dict], losses: tuple, ends: tuple, log: bool) -> list[dict]:
    """A label of every point but plain PCA's, which has its codec's look; `moved` where a thin line must lead to it."""
    scale = math.log if log else float
    first, last = map(scale, ends)

    def pixels(x: Any, loss: Any) -> Any:
        return (scale(x) - first) / (last - first) * WIDTH, (losses[1] - loss) / (losses[1] - losses[0]) * HEIGHT

    marks: dict[str, list] = {}
    for p in sorted(at, key=lambda p: (p["name"].endswith(PCA), -p["val_loss"])):
        marks.setdefault(p["name"].removesuffix(PCA), []).append(pixels(p["x"], p["val_loss"]))
    bars = []
    for p in at:  # of seeds, and of rounds
        (px, top), (_, bottom) = pixels(p["x"], p["high"]), pixels(p["x"], p["low"])
        bars.append((px - 2, top, px + 2, bottom))
        if p.get("x_low"):
            (left, py), (right, _) = (pixels(p[end], p["val_loss"]) for end in ("x_low", "x_high"))
            bars.append((left, py - 2, right, py + 2))
    found, names = [], labels.place(marks, bars, (WIDTH, HEIGHT))
    for p in at:
        if p["name"] in names:
            side, px, py, moved = names[p["name"]]
            across = first + px / WIDTH * (last - first)
            found.append({"name": p["name"], "x": p["x"], "val_loss": p["val_loss"], "align": side, "moved": moved,
                          "label_x": math.exp(across) if log else across,
                          "label_y": losses[1] - py / HEIGHT * (losses[1] - losses[0])})
    return found
