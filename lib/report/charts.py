"""Charts of a report: Vega-Lite specifications with their data inside, and their PNG.

`charts(content)` gives name -> specification, in the order of NAMES, in which a report shows them. A chart without data is
left out. One definition serves the page and the PNG; light and dark differ only in the `config` that is laid over it, so
every colour named here has to be legible on both. Colour never stands alone: words, shapes or dashes say the same.

What the page may set before it draws: the parameter `narrow` (short labels for a phone), and for a concat its `columns` and
the widths of its panels; `usermeta.row` is how many panels belong side by side.
"""

import json
from statistics import median
from typing import Any

from lib.report import curves

NAMES = ("differences", "loss_by_tokens", "loss_by_seconds", "gates", "throughput", "memory")
VEGA_LITE = "6.4"
PNG_WIDTH = 760
# Okabe and Ito's palette, its light colours darkened and its black left out, to be seen on white and on near black.
NEUTRAL, PALETTE = "#808080", ["#0072B2", "#D55E00", "#009E73", "#C06AA0", "#C48A00", "#3A9BD9"]
DASHES = [[1, 0], [7, 2], [2, 2], [8, 2, 2, 2], [4, 4]]  # with six colours all pairs differ up to thirty steps
WORDS = {"BETTER": ("#009E73", "triangle-down"), "WORSE": ("#D55E00", "triangle-up"), "NEGLIGIBLE": ("#3A9BD9", "diamond"),
         "EQUIVALENT": ("#0072B2", "square"), "INCONCLUSIVE": (NEUTRAL, "circle"), "UNDERPOWERED": (NEUTRAL, "circle"),
         "INVALID": ("#C06AA0", "cross"), "INCOMPLETE": (NEUTRAL, "circle")}
LAYERS = ["#3B6FD4", "#1E9AA8", "#3F9F4A", "#C48A00", "#D55E00"]  # first to last layer, blended in between
LIGHT, DARK = ("#1c1c1a", "#5c5b57", "#e4e2dc", "#ffffff"), ("#e8e6e1", "#b4b2ac", "#33363c", "#16181c")  # ink to paper
MOST_POINTS = 20_000  # of one chart: a page stays light with any number of seeds


def charts(content: dict) -> dict[str, dict]:
    """Name -> Vega-Lite specification, for the charts that have data."""
    found = (differences(content), loss(content, "tokens"), loss(content, "seconds"), gates(content), throughput(content),
             memory(content))
    return {name: spec for name, spec in zip(NAMES, found, strict=True) if spec}


def png(spec: dict, dark: bool = False) -> bytes:
    """The chart as PNG at twice its size. No network is used: all data are in the specification."""
    import vl_convert

    fixed = spec | {"width": PNG_WIDTH} if spec.get("width") == "container" else spec
    if fixed is not spec:  # without a container the width is that of the plot alone, and labels come on top
        fixed = fixed | {"autosize": {"type": "pad"}, "width": PNG_WIDTH - 220}
    return vl_convert.vegalite_to_png(fixed, vl_version=VEGA_LITE, scale=2, config=config(dark), allowed_base_urls=[])


def svg(spec: dict) -> str:
    """A chart of a fixed width as SVG, in the light look."""
    import vl_convert

    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, config=config(), allowed_base_urls=[])


def config(dark: bool = False) -> dict:
    """Vega's configuration: all that differs between light and dark, and the type."""
    ink, soft, grid, paper = DARK if dark else LIGHT
    font = "Liberation Sans, Helvetica Neue, Helvetica, Arial, sans-serif"
    return {"background": paper, "font": font, "padding": 4, "view": {"stroke": None},
            "axis": {"labelColor": ink, "titleColor": soft, "gridColor": grid, "domainColor": soft, "tickColor": soft,
                     "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8},
            "legend": {"labelColor": ink, "titleColor": soft, "labelFontSize": 12, "titleFontSize": 12,
                       "titleFontWeight": "normal", "symbolSize": 90},
            "title": {"color": ink, "subtitleColor": soft, "fontSize": 14, "subtitleFontSize": 12, "subtitlePadding": 5,
                      "anchor": "start", "frame": "group", "offset": 12},
            "text": {"color": ink}, "rule": {"color": soft}}


def _chart(title: str, lines: list[str], description: str, **rest: Any) -> dict:
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "title": {"text": title, "subtitle": lines},
            "description": description, "width": "container", "autosize": {"type": "fit-x", "contains": "padding"},
            "params": [{"name": "narrow", "value": False}], **rest}


def _rows(names: list[str], side: str, wide: dict | None = None, narrow: dict | None = None) -> dict:
    """A y encoding with one row a name. `wide` and `narrow` replace the names by other texts, on the right side say."""
    axis = {"orient": side, "title": None, "ticks": False, "domain": False, "labelPadding": 8, "grid": side == "left",
            "labelLimit": {"expr": "narrow ? 110 : 280"}, "labelOverlap": False}
    if wide:
        axis["labelExpr"] = f"(narrow ? {json.dumps(narrow)} : {json.dumps(wide)})[datum.value]"
    return {"field": "step", "type": "nominal", "sort": None, "scale": {"domain": names}, "axis": axis}


def _signed(value: Any) -> str:
    return f"{round(value, 4) + 0.0:+.4f}".replace("-", "\u2212")  # adding zero turns -0.0 into 0.0



def _baseline_name(content: dict) -> str:
    several = sum(bool(step.get("is_baseline")) for step in content["steps"]) > 1  # by optimizer, or of the tuned arms
    return "the baseline" if several else content.get("baseline") or "the baseline"


def differences(content: dict) -> dict | None:
    """Forest plot: a row a step, its paired difference with the interval, the seeds' own as faint dots behind it."""
    compared = [(s, s["comparison"]) for s in content["steps"] if s.get("comparison")]
    if not any(curves.number(c.get("difference")) for _, c in compared):
        return None
    margin = content.get("margin") or 0
    low_end, high_end = _window([(c.get("difference"), c.get("low"), c.get("high")) for _, c in compared], margin)
    points, dots, wide, narrow = [], [], {}, {}
    for step, c in compared:
        name, word = step["name"], c.get("word") or "INCOMPLETE"
        known = curves.number(c.get("difference"))
        interval = known and curves.number(c.get("low")) and curves.number(c.get("high"))
        text = _signed(c["difference"]) if known else ""
        text += f" [{_signed(c['low'])}, {_signed(c['high'])}]" if interval else ""
        wide[name], narrow[name] = f"{word}\u2003{text}".strip(), word
        if not known:
            continue
        inside = low_end <= c["difference"] <= high_end
        points.append({"step": name, "word": word, "difference": c["difference"], "seeds": c.get("n"), "text": text,
                       "low": max(c["low"], low_end) if interval else None,
                       "high": min(c["high"], high_end) if interval else None,
                       "at": min(max(c["difference"], low_end), high_end),
                       "outside": "" if inside else "left" if c["difference"] < low_end else "right"})
        dots += [{"step": name, "seed": seed, "difference": d} for seed, d in (c.get("by_seed") or {}).items()
                 if curves.number(d) and low_end <= d <= high_end]
    names = [s["name"] for s, _ in compared]
    x = {"type": "quantitative", "scale": {"domain": [low_end, high_end], "nice": False, "zero": False},
         "axis": {"tickCount": {"expr": "narrow ? 3 : 7"}, "labelFlush": True, "labelOverlap": "greedy",
                  "labelExpr": "datum.value == 0 ? '0' : format(datum.value, '+~g')",
                  "title": f"difference to {_baseline_name(content)} (nats), lower is better"}}
    y, tooltip = _rows(names, "left"), [{"field": f, "type": "nominal"} for f in ("step", "word", "text", "seeds")]
    tooltip[2]["title"] = "difference"
    by_word = {"field": "word", "type": "nominal", "legend": None}
    colour = by_word | {"scale": {"domain": list(WORDS), "range": [c for c, _ in WORDS.values()]}}
    shape = by_word | {"scale": {"domain": list(WORDS), "range": [s for _, s in WORDS.values()]}}
    return _chart(
        f"Difference in final validation loss to {_baseline_name(content)}",
        ["Point: mean over paired seeds; bar: 95 % interval; dots: single seeds; "
         f"band: practical margin \u00b1{margin:g} nats."],
        "Forest plot of the difference in final validation loss of each step to the baseline: "
        + "; ".join(f"{n}: {t}" for n, t in wide.items()),
        height=30 * len(names), resolve={"axis": {"y": "independent"}},
        layer=[
            {"data": {"values": [{"from": max(-margin, low_end), "to": min(margin, high_end)}]},
             "mark": {"type": "rect", "color": NEUTRAL, "opacity": 0.16},
             "encoding": {"x": x | {"field": "from"}, "x2": {"field": "to"}}},
            {"data": {"values": [{"zero": 0}]}, "mark": {"type": "rule", "strokeWidth": 1},
             "encoding": {"x": x | {"field": "zero"}}},
            {"data": {"values": dots}, "mark": {"type": "point", "size": 22, "opacity": 0.55, "color": NEUTRAL, "yOffset": 8},
             "encoding": {"x": x | {"field": "difference"}, "y": y, "tooltip": [
                 {"field": "step", "type": "nominal"}, {"field": "seed", "type": "nominal"},
                 {"field": "difference", "type": "quantitative", "format": "+.4f"}]}},
            {"data": {"values": points}, "transform": [{"filter": "isValid(datum.low) && datum.low < datum.high"}],
             "mark": {"type": "rule", "strokeWidth": 2.5},
             "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y | {"axis": None}, "color": colour,
                          "tooltip": tooltip}},
            {"data": {"values": points}, "transform": [{"filter": "datum.outside == ''"}],
             "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1, "strokeWidth": 2.5},
             "encoding": {"x": x | {"field": "at"}, "y": _rows(names, "right", wide, narrow), "color": colour, "shape": shape,
                          "tooltip": tooltip}},
            {"data": {"values": points}, "transform": [{"filter": "datum.outside != ''"}],
             "mark": {"type": "text", "fontSize": 15, "fontWeight": "bold",
                      "align": {"expr": "datum.outside == 'left' ? 'left' : 'right'"}},
             "encoding": {"x": x | {"field": "at"}, "y": y | {"axis": None}, "color": colour, "tooltip": tooltip,
                          "text": {"condition": {"test": "datum.outside == 'left'", "value": "\u25c0"}, "value": "\u25b6"}}}])


def _window(intervals: list[tuple], margin: float) -> tuple[float, float]:
    """Ends of the axis of differences: margin and nearly all intervals within, so that one ruined step hides no other."""
    reach = sorted(max(abs(v) for v in triple if curves.number(v)) for triple in intervals if curves.number(triple[0]))
    limit = max(4 * margin, 6 * median(reach))
    values = [v for triple in intervals if curves.number(triple[0]) for v in triple if curves.number(v) and abs(v) <= limit]
    low, high = min(*values, -margin, 0), max(*values, margin, 0)
    space = 0.06 * (high - low) or 0.001
    return low - space, high + space


def loss(content: dict, by: str) -> dict | None:
    """Curves of the validation loss by 'tokens' or 'seconds': every seed faint, the mean of the finished ones bold."""
    steps = [s for s in content["steps"] if s.get("curves")]
    number = sum(len(s["curves"]) for s in steps)
    most = max(30, min(400, MOST_POINTS // max(number, 1)))
    single, middle = [], []  # (step, seed, curve) and (step, number of seeds, curve)
    for step in steps:
        states = {cell["seed"]: cell["state"] for cell in step.get("cells") or []}
        known = [(one["seed"], points) for one in step["curves"]
                 if (points := curves.points(one.get(by), one.get("val_loss")))]
        single += [(step["name"], seed, points) for seed, points in known]
        finished = [points for seed, points in known if states.get(seed, "done") == "done"]
        if mean := curves.mean(finished):
            middle.append((step["name"], len(finished), mean))
    if not single:
        return None
    low, high = curves.loss_window([points for _, _, points in single], [points for _, _, points in middle])
    seeds = [{"step": step, "seed": seed, "part": part, "x": x, "loss": y} for step, seed, points in single
             for part, x, y in curves.cut(curves.thinned(points, most), high)]
    means = [{"step": step, "seeds": n, "part": part, "x": x, "loss": y} for step, n, points in middle
             for part, x, y in curves.cut(curves.thinned(points, most), high)]
    ends = [{"step": step, "x": points[-1][0], "loss": points[-1][1]} for step, _, points in middle if points[-1][1] <= high]
    drawn = {step for step, _, _ in single}
    names = [s["name"] for s in steps if s["name"] in drawn]
    look = _looks([s for s in steps if s["name"] in drawn])
    above = [n for n in names if n not in {row["step"] for row in seeds}]
    unit = "tokens" if by == "tokens" else "training time (s)"
    x = {"field": "x", "type": "quantitative", "scale": {"nice": False, "zero": False},
         "axis": {"title": unit, "format": "~s" if by == "tokens" else ",.6~r", "grid": False, "labelFlush": True,
                  "tickCount": {"expr": "narrow ? 4 : 8"}}}
    y = {"field": "loss", "type": "quantitative", "scale": {"domain": [low, high], "nice": False, "zero": False},
         "axis": {"title": "validation loss (nats)", "tickCount": 7}}
    entry = 45 + min(150, 7 * max(len(n) for n in names))  # pixels that one step takes in the legend
    legend = {"title": None, "orient": "top", "labelLimit": 150, "columnPadding": 14, "symbolType": "stroke",
              "symbolStrokeWidth": 2.5, "symbolSize": 400, "symbolOpacity": 1,
              "columns": {"expr": f"narrow ? {max(1, 300 // entry)} : {max(1, 640 // entry)}"}}

    field = {"field": "step", "type": "nominal", "sort": None, "legend": legend}
    colour = field | {"scale": {"domain": names, "range": [look[n][0] for n in names]}}
    dash = field | {"scale": {"domain": names, "range": [look[n][1] for n in names]}}

    def shown(value: Any) -> Any:
        return {"condition": {"param": "highlight", "value": value}, "value": value / 6}
    part = {"field": "part", "type": "nominal"}
    tooltip = [{"field": "step", "type": "nominal"}, {"field": "x", "type": "quantitative", "title": unit, "format": ",.6~g"},
               {"field": "loss", "type": "quantitative", "format": ".4f"}]
    return _chart(
        f"Validation loss by {'tokens' if by == 'tokens' else 'training time'}",
        ["Bold: mean over finished seeds; faint: single seeds. The first part of training, above the axis, is left out."]
        + [f"Wholly above the axis: {', '.join(above)}."] * bool(above),
        f"Validation loss over {unit} of {', '.join(names)}.", height=360,
        layer=[
            {"data": {"values": seeds}, "mark": {"type": "line", "strokeWidth": 1},
             "encoding": {"x": x, "y": y, "color": colour, "detail": [{"field": "seed", "type": "nominal"}, part],
                          "strokeOpacity": shown(0.3)}},
            {"data": {"values": means}, "params": [{"name": "highlight", "select": {"type": "point", "fields": ["step"]},
                                                    "bind": "legend"}],
             "mark": {"type": "line", "strokeWidth": 2.2},
             "encoding": {"x": x, "y": y, "color": colour, "detail": part, "strokeDash": dash, "strokeOpacity": shown(1)}},
            {"data": {"values": means}, "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, "fillOpacity": 0},
             "encoding": {"x": x, "y": y, "tooltip": [*tooltip, {"field": "seeds", "type": "quantitative"}]}},
            {"data": {"values": ends}, "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
             "encoding": {"x": x, "y": y, "color": colour, "fillOpacity": shown(1), "tooltip": tooltip}}])


def _looks(steps: list[dict]) -> dict[str, tuple]:
    """Colour and dash of each step: baselines grey, the first one solid, no two alike."""
    found, i = {}, 0
    for step in steps:
        if step.get("is_baseline"):
            found[step["name"]] = (NEUTRAL, DASHES[(len(found) - i) % len(DASHES)])
        else:
            found[step["name"]] = (PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)])
            i += 1
    return found


def gates(content: dict) -> dict | None:
    """Small multiples: a panel a step and statistic, a line a layer, each the mean over seeds."""
    number = sum(len(s.get("gates_by_layer") or []) for s in content["steps"])
    by_statistic: dict[str, list] = {}
    for step in content["steps"]:
        series: dict[tuple, list] = {}
        for one in step.get("gates_by_layer") or []:
            points = curves.points(one.get("tokens"), one.get("value"))
            if points:
                series.setdefault((one["name"], one["layer"]), []).append(points)
        most = max(20, min(120, MOST_POINTS // max(number, 1)))
        for name in dict.fromkeys(name for name, _ in series):
            rows = [{"layer": layer, "tokens": x, "value": y} for (of, layer), seeds in sorted(series.items()) if of == name
                    for x, y in curves.thinned(curves.mean(seeds), most)]
            if rows:
                by_statistic.setdefault(name, []).append((step["name"], rows))
    if not by_statistic:
        return None
    layers = sorted({row["layer"] for panels in by_statistic.values() for _, rows in panels for row in rows})
    colours = [_blend(LAYERS, i / max(len(layers) - 1, 1)) for i in range(len(layers))]
    scale = {"field": "layer", "type": "ordinal", "legend": {
        "orient": "top", "title": "layer", "columns": 6, "symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolOpacity": 1}}
    colour = scale | {"scale": {"domain": layers, "range": colours}}
    dash = scale | {"scale": {"domain": layers, "range": [DASHES[i % 3] for i in range(len(layers))]}}

    def single(rows: Any) -> Any:  # points serve the tooltips and are seen only where there is no line
        return 0 if len({row["tokens"] for row in rows}) > 1 else 1

    def panel(name: str, step: str, rows: Any) -> Any:
        values = [row["value"] for _, others in by_statistic[name] for row in others]
        low, high = min(values), max(values)
        space = 0.06 * (high - low) or max(abs(high) * 0.05, 0.01)
        point = {"filled": True, "size": 30, "fillOpacity": single(rows)}
        return {"title": {"text": f"{step}: {name}", "fontSize": 12, "limit": 270, "offset": 6}, "width": 220, "height": 130,
                "data": {"values": rows}, "mark": {"type": "line", "strokeWidth": 1.8, "point": point},
                "encoding": {
                    "x": {"field": "tokens", "type": "quantitative", "scale": {"nice": False, "zero": False},
                          "axis": {"format": "~s", "tickCount": 4, "grid": False, "labelFlush": True, "title": "tokens"}},
                    "y": {"field": "value", "type": "quantitative", "axis": {"title": None, "tickCount": 5, "minExtent": 40},
                          "scale": {"domain": [low - space, high + space], "nice": False, "zero": False}},
                    "color": colour, "strokeDash": dash,
                    "tooltip": [{"field": "layer", "type": "ordinal"},
                                {"field": "tokens", "type": "quantitative", "format": "~s"},
                                {"field": "value", "type": "quantitative", "format": ".5f"}]}}
    panels = [panel(name, step, rows) for name, found in by_statistic.items() for step, rows in found]
    chart = _chart("Gates by layer", ["Mean over seeds; panels of the same statistic share their axis."],
                   f"Evolution of gate statistics per layer: {', '.join(p['title']['text'] for p in panels)}.",
                   concat=panels, columns=min(3, len(panels)), spacing={"row": 18, "column": 16})
    del chart["width"], chart["autosize"]
    return chart | {"usermeta": {"row": max(len(found) for found in by_statistic.values())}}


def _blend(anchors: list[str], share: float) -> str:
    """The colour at `share` (0 to 1) of the way through the anchors."""
    at = share * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    pairs = [(int(anchors[i][k:k + 2], 16), int(anchors[i + 1][k:k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02X}" for a, b in pairs)


def throughput(content: dict) -> dict | None:
    """Bars of tokens per second from zero; the ratio to the baseline with its interval in words, and as a whisker."""
    rows, wide, narrow = [], {}, {}
    reference = next((s["mean"]["tokens_per_second"] for s in content["steps"]
                      if s.get("is_baseline") and curves.number((s.get("mean") or {}).get("tokens_per_second"))), None)
    for step in content["steps"]:
        value = (step.get("mean") or {}).get("tokens_per_second")
        if not curves.number(value):
            continue
        speed = (step.get("comparison") or {}).get("speed") or {}
        ratio, low, high = (speed.get(k) if curves.number(speed.get(k)) else None for k in ("ratio", "low", "high"))
        known = low is not None and high is not None
        text = "baseline" if step.get("is_baseline") else "" if ratio is None else f"{ratio:.3f}\u00d7"
        narrow[step["name"]] = text
        text += f" [{low:.3f}, {high:.3f}]" if ratio is not None and known else ""
        wide[step["name"]] = f"{_rate(value)}\u2003{text}".strip()
        rows.append(_bar(step, value, wide[step["name"]]) | {
            "low": value * low / ratio if known and ratio else None, "high": value * high / ratio if known and ratio else None})
    return _bars(rows, wide, narrow, "Throughput", "tokens per second in training", "~s", reference,
                 "Bar: mean over finished seeds; whisker: 95 % interval of the ratio to the baseline.")


def memory(content: dict) -> dict | None:
    """Bars of peak memory in MiB from zero."""
    rows, wide, narrow, reference = [], {}, {}, None
    known = [(s, s["mean"]["peak_memory_bytes"] / 2 ** 20) for s in content["steps"]
             if curves.number((s.get("mean") or {}).get("peak_memory_bytes"))]
    reference = next((value for step, value in known if step.get("is_baseline")), None)
    for step, value in known:
        text = "baseline" if step.get("is_baseline") else f"{value / reference:.2f}\u00d7" if reference else ""
        narrow[step["name"]], wide[step["name"]] = f"{value:,.0f} MiB", f"{value:,.0f} MiB\u2003{text}".strip()
        rows.append(_bar(step, value, wide[step["name"]]))
    return _bars(rows, wide, narrow, "Peak memory", "peak memory in training (MiB)", ",.4~r", reference,
                 "Mean over finished seeds; the line is the baseline's.")


def _rate(value: float) -> str:
    return f"{value / 1e6:.2f} M/s" if value >= 1e6 else f"{value / 1e3:.1f} k/s" if value >= 1e3 else f"{value:.0f}/s"


def _bar(step: dict, value: float, text: str) -> dict:
    return {"step": step["name"], "value": value, "kind": "baseline" if step.get("is_baseline") else "step", "text": text}


def _bars(rows: Any, wide: Any, narrow: Any, title: Any, unit: str, form: Any, reference: Any, line: Any) -> dict | None:
    """Horizontal bars, a row a step, the text at the right; a line where the baseline is."""
    if not rows:
        return None
    names = [row["step"] for row in rows]
    top = 1.04 * max(v for row in rows for v in (row["value"], row.get("high")) if v is not None) or 1
    x = {"type": "quantitative", "scale": {"domain": [0, top], "nice": False},
         "axis": {"title": unit, "format": form, "tickCount": {"expr": "narrow ? 3 : 7"}, "labelFlush": True}}
    y = _rows(names, "left")
    y["axis"]["grid"] = False
    right = _rows(names, "right", wide, narrow)
    tooltip = [{"field": f, "type": "nominal"} for f in ("step", "text")]
    colour = {"field": "kind", "type": "nominal", "legend": None,
              "scale": {"domain": ["baseline", "step"], "range": [NEUTRAL, PALETTE[-1]]}}
    layers = [{"data": {"values": rows}, "mark": {"type": "bar", "height": {"band": 0.55}},
               "encoding": {"x": x | {"field": "value"}, "y": y, "color": colour, "tooltip": tooltip}},
              {"data": {"values": rows}, "transform": [{"filter": "isValid(datum.low)"}],
               "mark": {"type": "rule", "strokeWidth": 2},
               "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": right, "tooltip": tooltip}}]
    if reference:
        layers.append({"data": {"values": [{"reference": reference}]}, "mark": {"type": "rule", "strokeDash": [4, 3]},
                       "encoding": {"x": x | {"field": "reference"}}})
    return _chart(title, [line], f"{title}: " + "; ".join(f"{n}: {t}" for n, t in wide.items()), height=26 * len(names),
                  resolve={"axis": {"y": "independent"}}, layer=layers)
