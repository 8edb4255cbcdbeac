"""The report as one HTML file that needs nothing else: no network, no second file.

`render(content, specs)` puts the report's content and its charts (lib.report.charts) into page.html.j2, with the JavaScript
that draws them. Everything a study may say (help, reasons, folder names) is escaped; the charts travel as JSON that cannot
close its script element. The page names the content it was made of and the code that made it, so that `is_current` can say
whether making it again would change anything.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lib import atomic
from lib.paths import user_cache
from lib.report import charts, curves, sections
from lib.report.curves import number
from lib.tables import count, duration

TEMPLATE = Path(__file__).with_name("page.html.j2")
NOTHING = "\u2013"
# Ink on paper of each badge: (light), (dark). Contrast is at least 4.5 in both, a test says.
COLOURS = {
    "page": (("#1c1c1a", "#ffffff"), ("#e8e6e1", "#16181c")), "soft": (("#5c5b57", "#ffffff"), ("#b4b2ac", "#16181c")),
    "link": (("#0b5394", "#ffffff"), ("#8ab8e6", "#16181c")), "panel": (("#1c1c1a", "#f5f4f0"), ("#e8e6e1", "#20232a")),
    "good": (("#0b5d3b", "#dff1e7"), ("#8fdcb4", "#12311f")), "bad": (("#8a2c00", "#fbe6dc"), ("#ffb391", "#43200f")),
    "same": (("#0b4a7d", "#e0ecf7"), ("#9ccbf2", "#14293c")), "open": (("#55534c", "#eceae4"), ("#d0cdc4", "#32343a")),
    "odd": (("#6b2460", "#f6e4f2"), ("#eeb0e0", "#3a1a35")), "changed": (("#4f4100", "#faf0c8"), ("#f0dc8c", "#3a3210"))}
KINDS = {"BETTER": "good", "WORSE": "bad", "NEGLIGIBLE": "same", "EQUIVALENT": "same", "INCONCLUSIVE": "open",
         "UNDERPOWERED": "open", "INVALID": "odd", "INCOMPLETE": "odd",
         "done": "good", "failed": "bad", "diverged": "bad", "interrupted": "odd", "stale": "odd"}
CHARTS = [  # heading, anchor, the charts it shows and what the choice between several is called, the sentence below
    ("Differences", "differences", {"differences": ""},
     "Each point is the mean difference in final validation loss, its bar the 95 % interval, its dots the pairs of seeds; "
     "the band is the practical margin. Lower is better."),
    ("Loss curves", "loss", {"loss_by_tokens": "by tokens", "loss_by_seconds": "by training time"},
     "Bold: mean over finished seeds; faint: single seeds. The first part of training, above the axis, is left out. "
     "A click on a name in the legend brings that step out."),
    ("Gates", "gates", {"gates": ""},
     "Each line is a layer, the mean over seeds; panels of the same statistic share their axis."),
    ("Throughput", "throughput", {"throughput": ""},
     "Tokens per second in training, mean over finished seeds, with the ratio to the baseline and its 95 % interval."),
    ("Memory", "memory", {"memory": ""}, "Peak memory in training, mean over finished seeds; the line is the baseline's.")]


def render(content: dict, specs: dict[str, dict]) -> str:
    """The page. `specs` are the charts by name, as lib.report.charts.charts gives them; those without data are left out."""
    named = {name for _, _, names, _ in CHARTS for name in names}
    sections = [(heading, anchor, {n: label for n, label in names.items() if n in specs}, sentence)
                for heading, anchor, names, sentence in [*CHARTS, *((n, n, {n: ""}, "") for n in specs if n not in named)]]
    template = environment().get_template(TEMPLATE.name)
    return template.render(
        c=content, families=families(content), sections=[s for s in sections if s[2]], specs=specs, state=state(content),
        bundle=script(bundle()) if specs else "",
        data=data({"specs": specs, "light": charts.config(), "dark": charts.config(dark=True)}),
        digest=digest(content), code=code())


def environment() -> Any:
    """Jinja2 with escaping for every template and the filters of the pages; what is missing prints as nothing."""
    import jinja2

    made = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    made.filters.update(signed=signed, difference=difference, ratio=ratio, fixed=fixed, whole=whole, count=_or_nothing(count),
                        duration=_or_nothing(duration), mib=mib, moment=moment, value=value, kind=kind)
    made.globals.update(COLOURS=COLOURS, sweep_multiples=sweep_multiples, described=sections.sections)
    return made


def bundle() -> str:
    """The JavaScript of Vega, Vega-Lite and vega-embed. Making it takes seconds, so it is kept in the user's cache."""
    import vl_convert

    path = user_cache() / f"vega-{vl_convert.__version__}-{charts.VEGA_LITE}.js"  # type: ignore[attr-defined]  # it has one
    try:
        text = path.read_text(encoding="utf-8")
        if "window.vegaEmbed=" in text:
            return text
    except (OSError, ValueError):
        pass  # not there yet, or not readable: made below
    text = vl_convert.javascript_bundle(vl_version=charts.VEGA_LITE)  # type: ignore[call-arg]  # optional
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text)
    except OSError:
        pass  # a cache that cannot be written costs only time
    return text


def script(text: str) -> str:
    """JavaScript for a script element: strings keep their meaning, and nothing in it ends the element."""
    return re.sub(r"<(?=/script|!--)", r"\\u003c", text, flags=re.IGNORECASE)


def data(value: Any) -> str:
    """JSON for a script element. All its '<' stand in strings, so they can all be written otherwise."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def digest(content: dict) -> str:
    """sha256 of the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def code() -> str:
    """sha256 of what makes a page of a content."""
    sources = [__file__, *(str(module.__file__) for module in (charts, curves, sections, *sections.MODULES))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*map(Path, sources), TEMPLATE])).hexdigest()


def is_current(path: Path, content: dict) -> bool:
    """True when the page at `path` was made of this content by this code."""
    try:
        with open(path, encoding="utf-8") as file:
            head = file.read(4096)
    except (OSError, ValueError):
        return False
    found = dict(re.findall(r'<meta name="kablate-(content|code)" content="([0-9a-f]{64})">', head))
    return found == {"content": digest(content), "code": code()}


def families(content: dict) -> list[tuple[str, str, list[dict]]]:
    """(heading, name of the baseline, steps): the steps at their common rates, and the tuned ones if there are any."""
    found = []
    for heading, tuned in (("", False), ("At each step's best learning rate", True)):
        steps = [s for s in content.get("steps") or [] if (s.get("tuned") is not None) == tuned]
        baselines = [s["name"] for s in steps if s.get("is_baseline")]
        if steps:
            found.append((heading, baselines[0] if len(baselines) == 1 else "the baseline", steps))
    return found


def sweep_multiples(sweep: list[dict]) -> list[str]:
    return sorted({multiple for entry in sweep for multiple in entry["losses"]}, key=float)


def state(content: dict) -> dict:
    """How many of the planned cells are done, and what became of the others."""
    cells = [cell.get("state") for step in content.get("steps") or [] for cell in step.get("cells") or []]
    others = {s: cells.count(s) for s in dict.fromkeys(cells) if s != "done"}
    return {"planned": len(cells), "done": cells.count("done"), "others": others}


def _or_nothing(form: Any) -> Any:
    return lambda x, *rest: form(x, *rest) if number(x) else NOTHING


def fixed(x: Any, digits: int = 4) -> str:
    return f"{x:.{digits}f}" if number(x) else NOTHING


def signed(x: Any, digits: int = 4) -> str:
    return f"{round(x, digits) + 0.0:+.{digits}f}".replace("-", "\u2212") if number(x) else NOTHING  # +0.0: no minus zero


def difference(d: Any) -> str:
    """'−0.0021 [−0.0061, +0.0019]', without the bracket where there is no interval."""
    return _with_interval(d, "difference", signed)


def ratio(d: Any) -> str:
    """'0.980× [0.970, 0.990]'."""
    return _with_interval(d, "ratio", lambda x: fixed(x, 3), "\u00d7")


def _with_interval(d: Any, key: str, form: Any, unit: str = "") -> str:
    if not d or not number(d.get(key)):
        return NOTHING
    text = form(d[key]) + unit
    return f"{text} [{form(d['low'])}, {form(d['high'])}]" if number(d.get("low")) and number(d.get("high")) else text


def whole(x: Any) -> str:
    return f"{x:,.0f}" if number(x) else NOTHING


def mib(x: Any) -> str:
    return f"{x / 2 ** 20:,.0f} MiB" if number(x) else NOTHING


def moment(text: Any) -> str:
    """'2026-01-01 00:01 UTC' of '2026-01-01T00:01:00+00:00'; other texts as they are."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(\+00:00|Z)?", str(text or ""))
    return f"{found[1]} {found[2]}{' UTC' if found[3] else ''}" if found else str(text or NOTHING)


def value(x: Any) -> str:
    """A symbol's value as .config writes it."""
    return NOTHING if x is None else "y" if x is True else "n" if x is False else str(x)


def kind(word: str) -> str:
    """The badge of a verdict word or of a cell's state."""
    return KINDS.get(word, "open")
