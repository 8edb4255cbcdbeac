"""An effect against the size of the model: what reports of one study at several sizes say together.

`ladder(reports)` takes [(name of the folder, its report.json)], which have one baseline and one metric, and gives what
ladder.json holds; `markdown` and `chart` show that. Differences, intervals and words are the reports' own, in nats, arm minus
the baseline of the same size; an arm that is INVALID or INCOMPLETE there has no number here. Sizes are parameters of the
baseline, those of an arm its own.

What is computed here is one comparison an arm: by how much its difference changes from the smallest to the largest size at
which it has the seeds that a verdict needs, by Welch's t on the differences of single seeds, with Holm's p over all arms of
more than one report. Nobody planned it before the first cell, and seeds that both sizes share count as independent. An interval
is of one comparison, not of the family.
"""

from typing import Any

from lib import stats
from lib.design import FEWEST_SEEDS
from lib.errors import UserError
from lib.report import charts
from lib.report.curves import number
from lib.tables import count, plural, table
from lib.verdicts import NO_NUMBER, shown_p, signed

PANEL, HEIGHT = 300, 260  # of an arm, pixels
SIZE_SYMBOLS = ("MODEL_", "GPT2_N_")  # what a size is set by
UNPLANNED = ("The change of an arm's difference from the smallest to the largest size with seeds enough for a verdict is "
             "one unplanned comparison an arm: no plan had it on record. Its 95 % interval is Welch's, from the differences of "
             "single seeds, and is of that comparison alone; Holm's p counts all {arms}.")


def ladder(reports: list[tuple[str, dict]]) -> dict:
    """What ladder.json holds. Raises UserError where the reports are not of one baseline, one metric and several sizes."""
    _comparable(reports)
    reports = sorted(reports, key=lambda r: _baseline(r)["mean"]["parameters"])
    sizes = [_size(name, content) for name, content in reports]
    for one, two in zip(sizes, sizes[1:], strict=False):
        if one["parameters"] == two["parameters"]:
            raise UserError(f"{one['folder']} and {two['folder']} are of one size, {one['parameters']:,} parameters.",
                            "give one folder a size, for instance of a study +10m and +30m.")
    names = list(dict.fromkeys(s["name"] for _, content in reports for s in content["steps"] if not s["is_baseline"]))
    arms = [_arm(name, reports) for name in names]
    _adjust(arms)
    return {"format": 1, "metric": reports[0][1]["plan"]["metric"], "baseline": reports[0][1]["baseline"],
            "margin": reports[0][1]["margin"], "sizes": sizes, "arms": arms, "notes": _notes(reports, arms)}


def _comparable(reports: list[tuple[str, dict]]) -> None:
    if len(reports) < 2:
        raise UserError("a ladder needs the reports of two or more sizes.",
                        'make ladder FROM="folder folder", each with a report.json of make report.')
    first = reports[0]
    for other in reports[1:]:
        for what, one, two in (("metric", first[1]["plan"]["metric"], other[1]["plan"]["metric"]),
                               ("baseline", first[1]["baseline"], other[1]["baseline"])):
            if one != two:
                raise UserError(f"{first[0]} and {other[0]} have another {what}: {one} and {two}.",
                                f"give reports of one {what}.")
    for report in reports:
        _baseline(report)


def _baseline(report: tuple[str, dict]) -> dict:
    """The step that this report compares with, which has finished cells: its size is the report's."""
    name, content = report
    for step in content["steps"]:
        if step["is_baseline"] and number((step.get("mean") or {}).get("parameters")):
            return step
    raise UserError(f"{name} has no finished cell of its baseline.", "make, then make report, for that study.")


def _size(name: str, content: dict) -> dict:
    step = _baseline((name, content))
    return {"folder": name, "study": content["study"], "parameters": step["mean"]["parameters"],
            "tokens": step["mean"]["tokens"],
            "seeds": step["seeds_done"], "val_loss": step["mean"]["val_loss"], "val_loss_sd": step["mean"].get("val_loss_sd"),
            "device": content["environment"]["device"], "plan": content["plan"]["sentence"]}


def _arm(name: str, reports: list[tuple[str, dict]]) -> dict:
    """An arm's difference at every size (None where the report does not have it), and how it changes."""
    at = [next((_rung(s) for s in content["steps"] if s["name"] == name), None) for _, content in reports]
    known = [i for i, rung in enumerate(at) if rung and len(rung["by_seed"]) >= FEWEST_SEEDS]
    return {"name": name, "at": at, "reports": sum(rung is not None for rung in at),
            "change": _change(at, known[0], known[-1]) if len(known) > 1 else None}


def _rung(step: dict) -> dict:
    compared, mean = step.get("comparison") or {}, step.get("mean") or {}
    word = compared.get("word") or "INCOMPLETE"
    shown = {} if word in NO_NUMBER else compared
    numbers = {key: shown.get(key) for key in ("difference", "low", "high", "n", "method")}
    return {"word": word, "parameters": mean.get("parameters"), "tokens": mean.get("tokens"), "seeds": step["seeds_done"],
            **numbers, "by_seed": (compared.get("by_seed") or {}) if numbers["difference"] is not None else {}}


def _change(at: list, small: int, large: int) -> dict:
    one, two = (list(at[i]["by_seed"].values()) for i in (small, large))
    found = stats.welch(two, one)
    return {"from": small, "to": large, "difference": found.difference, "low": found.low, "high": found.high, "p": found.p,
            "p_holm": None, "n": [len(one), len(two)]}


def _adjust(arms: list[dict]) -> None:
    """Holm's p over the arms of more than one report; one whose change is not known counts as well."""
    family = [arm for arm in arms if arm["reports"] > 1]
    adjusted = stats.holm([arm["change"] and arm["change"]["p"] for arm in family])
    for arm, p in zip(family, adjusted, strict=True):
        if arm["change"]:
            arm["change"]["p_holm"] = p


def _notes(reports: list[tuple[str, dict]], arms: list[dict]) -> list[str]:
    """What else differs between the sizes, and which arms are not at all of them; a sentence each."""
    def each(pick: Any) -> list[Any]:
        return [pick(content, _baseline((name, content))) for name, content in reports]

    found = []
    for what, pick in (("tokens a cell", lambda c, b: b["mean"]["tokens"]), ("device", lambda c, b: c["environment"]["device"]),
                       ("torch", lambda c, b: c["environment"]["torch"]), ("margin", lambda c, b: c["margin"]),
                       ("training data (hash)", lambda c, b: c["data"]["train_hash"][:12]),
                       ("evaluated data (hash)", lambda c, b: c["data"]["eval_hash"][:12]),
                       ("source (hash)", lambda c, b: c["environment"]["source_hash"])):
        values = each(pick)
        if len(set(values)) > 1:
            shown = ", ".join(f"{v:,.0f}" if what == "tokens a cell" else str(v) for v in values)
            found.append(f"Sizes also differ in {what}: {shown}.")
    found += _settings(each(lambda c, b: b["configuration"]))
    for arm in arms:
        if missing := [name for (name, _), rung in zip(reports, arm["at"], strict=True) if rung is None]:
            found.append(f"{arm['name']} is not in {', '.join(missing)}.")
        if any(rung and rung["method"] == "anytime" for rung in arm["at"]):
            found.append(f"{arm['name']} had seeds added until decided: its change knows nothing of when that stopped.")
    return found


def _settings(configurations: list[dict]) -> list[str]:
    """Symbols that make numbers and differ between the baselines, but for those of the size itself."""
    from lib.kconfig import Schema

    differing = [name for name in sorted(Schema().identity) if not name.startswith(SIZE_SYMBOLS)
                 and all(name in c for c in configurations) and len({str(c[name]) for c in configurations}) > 1]
    shown = "; ".join(f"{name} {', '.join(str(c[name]) for c in configurations)}" for name in differing)
    return [f"Sizes also differ in settings: {shown}."] if shown else []


def _nats(rung: dict) -> tuple[str, str]:
    interval = f"{signed(rung['low'])} .. {signed(rung['high'])}" if number(rung["low"]) and number(rung["high"]) else "-"
    return signed(rung["difference"]), interval


def _p(value: float | None) -> str:
    return "-" if value is None else shown_p(value)


def markdown(found: dict) -> str:
    """ladder.md."""
    sizes = found["sizes"]
    base = table(["size", "parameters", "tokens a cell", "seeds", "final val loss", "sd over seeds", "folder"], [
        [count(s["parameters"]), f"{s['parameters']:,}", f"{s['tokens']:,.0f}", str(s["seeds"]), f"{s['val_loss']:.4f}",
         f"{s['val_loss_sd']:.4f}" if number(s["val_loss_sd"]) else "-", s["folder"]] for s in sizes], "rrrrrrl")
    rows = []
    for arm in found["arms"]:
        for rung in (r for r in arm["at"] if r):
            numbers = _nats(rung) if rung["difference"] is not None else ("-", "-")
            rows.append([arm["name"], f"{rung['parameters']:,}" if rung["parameters"] else "-",
                         f"{rung['tokens']:,.0f}" if rung["tokens"] else "-", str(rung["seeds"]), *numbers, rung["word"]])
    effects = table(["arm", "parameters", "tokens a cell", "seeds", "difference", "95 % interval", "verdict"], rows, "lrrrrrl")
    rows = []
    for arm in (a for a in found["arms"] if a["reports"] > 1):
        change = arm["change"]
        rows.append([arm["name"], *([count(sizes[change[end]]["parameters"]) for end in ("from", "to")] if change else "--"),
                     *(_nats(change) if change else "--"),
                     *(_p(change[p]) if change else "-" for p in ("p", "p_holm"))])
    text = (f"# Effect against size\n\nDifference in {found['metric']} to {found['baseline']} of the same size; lower is "
            f"better. Differences, intervals and verdicts are those of each size's own report.\n\n{base}\n{effects}")
    if rows:
        text += "\n## Change with size\n\n" + UNPLANNED.format(arms=plural(len(rows), "arm")) + "\n\n" + table(
            ["arm", "from", "to", "change", "95 % interval", "p", "Holm p"], rows, "lrrrrrr")
    return text + ("\n## Notes\n\n" + "".join(f"- {note}\n" for note in found["notes"]) if found["notes"] else "")


def chart(found: dict) -> dict:
    """A panel an arm: its difference with the interval, by the baseline's parameters on a logarithmic axis."""
    at = [s["parameters"] for s in found["sizes"]]
    reach = (at[-1] / at[0]) ** 0.22
    x: dict[str, Any] = {"type": "quantitative", "scale": {
        "type": "log", "domain": [at[0] / reach, at[-1] * reach], "nice": False},
                         "axis": {"title": "parameters of the baseline", "values": at, "grid": False, "labelOverlap": True,
                                  "labelExpr": "format(datum.value / 1e6, '.1f') + ' M'"}}
    panels = [_panel(arm, found, at, x, reach ** 0.12) for arm in found["arms"]]
    notes = ["Lower is better; each panel has an axis of its own. Point: mean over seeds; bar: 95 % interval; dots: seeds.",
             f"Grey band: practical margin \u00b1{found['margin']:g} nats. Change: from smallest to largest size, with "
             "Welch's 95 % interval;", "one unplanned comparison an arm, Holm's p over the arms."]
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "concat": panels, "columns": 3, "spacing": 30,
            "title": {"text": f"Difference in {found['metric']} to {found['baseline']}, by size of the model",
                      "subtitle": notes, "frame": "bounds"},
            "description": "; ".join(f"{arm['name']}: " + ", ".join(
                f"{signed(r['difference'])} at {count(p)}" for r, p in zip(arm["at"], at, strict=True)
                if r and r["difference"] is not None)
                for arm in found["arms"])}


def _panel(arm: dict, found: dict, at: list, x: dict, aside: float) -> dict:
    margin = found["margin"]
    points, dots, empty = [], [], []
    for i, (parameters, rung) in enumerate(zip(at, arm["at"], strict=True)):
        row = {"x": parameters, "top": i % 2}  # words of neighbours stand in two rows, so that none hides another
        if rung and rung["difference"] is not None:
            points.append(row | {"word": rung["word"], **{k: rung[k] for k in ("difference", "low", "high", "n")}})
            dots += [{"x": parameters * aside, "difference": d} for d in rung["by_seed"].values()]
        else:
            empty.append(row | {"word": rung["word"] if rung else "not run"})
    ends = [v for p in points for v in (p["difference"], p["low"], p["high"]) if number(v)] + [d["difference"] for d in dots]
    low, high = min([*ends, -margin]), max([*ends, margin])
    space = 0.16 * (high - low) or 0.01
    y = {"type": "quantitative", "scale": {"domain": [low - space, high + space], "nice": False, "zero": False},
         "axis": {"title": "nats", "tickCount": 6, "labelExpr": "datum.value == 0 ? '0' : format(datum.value, '+~g')"}}
    words = {"field": "word", "type": "nominal", "legend": None}
    marks = {channel: words | {"scale": {"domain": list(charts.WORDS), "range": [w[i] for w in charts.WORDS.values()]}}
             for i, channel in enumerate(("color", "shape"))}
    line = {"field": "top", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "range": [12, 25]}}
    here = {"x": x | {"field": "x"}, "y": y | {"field": "difference"}}
    change = arm["change"]
    said = ["no change known", ""]
    if change:
        difference, interval = (text.replace("-", "\u2212") for text in _nats(change))
        said = [f"{count(at[change['from']])} to {count(at[change['to']])}: change {difference}",
                f"95 % interval {interval}, Holm p {_p(change['p_holm'])}"]
    layers = [
        {"data": {"values": [{"from": -margin, "to": margin}]},
         "mark": {"type": "rect", "color": charts.NEUTRAL, "opacity": 0.16},
         "encoding": {"y": y | {"field": "from"}, "y2": {"field": "to"}}},
        {"data": {"values": [{"zero": 0}]}, "mark": {"type": "rule", "strokeWidth": 1},
         "encoding": {"y": y | {"field": "zero"}}},
        {"data": {"values": points}, "encoding": here,
         "mark": {"type": "line", "color": charts.NEUTRAL, "strokeDash": [4, 3], "strokeWidth": 1.2}},
        {"data": {"values": dots}, "encoding": here,
         "mark": {"type": "point", "size": 18, "opacity": 0.55, "color": charts.NEUTRAL}},
        {"data": {"values": points}, "transform": [{"filter": "isValid(datum.low)"}],
         "mark": {"type": "rule", "strokeWidth": 2.5},
         "encoding": {"x": x | {"field": "x"}, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": marks["color"]}},
        {"data": {"values": points}, "encoding": here | marks,
         "mark": {"type": "point", "filled": True, "size": 100, "opacity": 1}}]
    named = {"x": x | {"field": "x"}, "y": line, "text": {"field": "word"}}
    text = {"type": "text", "baseline": "bottom", "fontSize": 10}
    return {"width": PANEL, "height": HEIGHT, "resolve": {"scale": {"y": "independent"}},
            "title": {"text": arm["name"], "subtitle": said, "frame": "bounds"},
            "layer": [{"layer": layers},
                      {"data": {"values": points}, "mark": text, "encoding": named | {"color": marks["color"]}},
                      {"data": {"values": empty}, "mark": text | {"color": charts.NEUTRAL}, "encoding": named}]}
