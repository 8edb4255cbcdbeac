"""The page of a report: one file that loads nothing, escapes everything, and knows what it was made of."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from lib.report import charts, page
from tests.lib.report import made_up

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
ORDER = ["verdicts", "differences", "loss", "gates", "throughput", "memory", "configuration", "cells", "plan", "noise", "data",
         "environment", "notes"]


class Outline(HTMLParser):
    """Elements, attributes and visible text; fails on elements that are closed wrongly."""

    VOID = {"meta", "link", "img", "br", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        place = self.open[-1] if self.open else ""
        self.text[place] = self.text.get(place, "") + data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def rendered(content):
    text = page.render(content, charts.charts(content))
    return text, Outline(text)


def own(text):
    """The page without the libraries and the charts' data."""
    return re.sub(r"<script>.*?</script>|<script type=.*?</script>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("size", ["small", "normal", "large", "tuned", "empty"])
def test_sections_stand_in_order_and_nothing_is_loaded(size):
    content = getattr(made_up, size)()
    text, outline = rendered(content)
    ids = [a["id"] for a in outline.all("section")]
    assert ids == [i for i in ORDER if size != "empty" or i not in ("differences", "loss", "gates", "throughput", "memory")]
    assert {a["href"] for a in outline.all("a")} <= {f"#{i}" for i in ids}, "every link stays in the page"
    assert not [a for _, a in outline.elements if "src" in a or "srcset" in a or "data" in a]
    assert not {t for t, _ in outline.elements} & {"link", "iframe", "object", "embed", "base", "img", "form"}
    assert not re.search(r"https?://|url\(|@import", own(text))
    policy = next(a["content"] for a in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy and "connect-src" not in policy
    assert "undefined" not in own(text) and "None" not in outline.text.get("td", "")


def test_the_libraries_name_only_namespaces_and_inert_addresses():
    found = set(re.findall(r"https?://([^/\"'`\s)]+)", page.bundle()))
    assert found <= {"www.w3.org", "github.com", "vega.github.io"}


def test_what_a_study_says_is_escaped_everywhere():
    content = made_up.normal()
    evil = json.loads(json.dumps(content), object_hook=lambda d: {k: EVIL if isinstance(v, str) and k not in (
        "name", "word", "state", "baseline", "finished") else v for k, v in d.items()})
    evil["steps"][1]["name"] = evil["notes"][0] = EVIL
    evil["steps"][1]["configuration"][EVIL] = EVIL
    evil["steps"][2]["comparison"].update(word=EVIL, gates=[EVIL])
    evil["steps"][2]["cells"][0].update(state=EVIL, name=EVIL)
    evil["control_failures"] = [EVIL]
    text, outline = rendered(evil)
    assert len(outline.all("script")) == 3 and not outline.all("img")
    assert not [a for _, a in outline.elements if any(name.startswith("on") for name in a)]
    assert text.count("alert(1)") > 20 and "<script>alert" not in text
    assert own(text).count("&lt;script&gt;alert(1)") > 20


def test_the_charts_arrive_unchanged():
    content = made_up.small()
    content["steps"][1]["name"] = "</script><!-- V1"
    specs = charts.charts(content)
    text = page.render(content, specs)
    inside = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, flags=re.DOTALL)[1]
    assert "<" not in inside
    assert json.loads(inside) == {"specs": json.loads(json.dumps(specs)), "light": charts.config(), "dark": charts.config(True)}
    assert page.script("'</SCRIPT>' '<!--' a<b '</svg>'") == "'\\u003c/SCRIPT>' '\\u003c!--' a<b '</svg>'"


def test_the_table_of_verdicts_says_it_in_words():
    content = made_up.normal()
    text, outline = rendered(content)
    table = re.search(r'<table class="verdicts">.*?</table>', text, flags=re.DOTALL)[0]
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", table))
    for step in content["steps"][1:]:
        c = step["comparison"]
        assert f">{c['word']}<" in table
        assert f"{page.signed(c['difference'])} [{page.signed(c['low'])}, {page.signed(c['high'])}]" in plain
        assert c["sentence"] in text.replace("&#39;", "'")
    assert "INVALID" in plain and "device differs: AMD EPYC 7B13 and NVIDIA H100" in text
    assert "453,632" in plain and "3/3" in plain and "0.980\u00d7 [0.970, 0.990]" in plain
    assert all(a.get("scope") in ("row", "col") for a in outline.all("th")) and len(outline.all("caption")) >= 2
    assert all(a["aria-label"] for a in outline.all("div") if "data-chart" in a)


def test_a_function_class_stands_beside_the_step_and_in_words():
    """Where the step is no class of its own, and in a report that knows of classes at all."""
    content = made_up.normal()
    assert "function class" not in rendered(content)[0]
    said = {"of": "V0", "relation": "inside", "shown": "inside V0", "sentence": "V1 is a restriction of V0 <b>"}
    content["steps"][1]["function_class"] = said
    content["steps"][2]["function_class"] = {"of": "V2", "relation": "own", "shown": "V2", "sentence": None}
    text = rendered(content)[0]
    assert text.count(">function class: inside V0<") == 1 and text.count("function class:") == 1
    assert f"{content['steps'][1]['comparison']['sentence']} V1 is a restriction of V0 &lt;b&gt;." in text.replace("&#39;", "'")


def test_cells_say_their_state_and_reason_and_which_seed_came_later():
    text = own(rendered(made_up.large())[0])
    for _, why in made_up.STATES:
        assert why in text
    assert "98 of 128" in text and "3 diverged" in text and "12 failed" in text and "distrust every verdict" in text
    assert "control: must be worse" in text
    assert own(rendered(made_up.normal())[0]).count("seed added later") == 7


def test_tuned_steps_are_a_family_of_their_own_and_the_sweep_is_shown():
    content = made_up.tuned()
    text, outline = rendered(content)
    tables = re.findall(r'<table class="verdicts">.*?</table>', text, flags=re.DOTALL)
    assert len(tables) == 2 and "(tuned" not in tables[0] and tables[1].count("(tuned lr x2)</th>") == 3
    assert "Differences to V0 in" in tables[0] and "Differences to V0 (tuned lr x2) in" in tables[1]
    assert "learning rate \u00d72" in tables[1] and "\u00d72, at the end" in text
    sweep = text[text.index("Learning-rate sweep"):]
    assert sweep.index(">\u00d70.5<") < sweep.index(">\u00d72<") < sweep.index(">\u00d710<")
    assert "difference to the baseline" in json.dumps(charts.differences(content))
    assert len({str(look) for look in charts._looks(content["steps"]).values()}) == 6


def test_a_diverged_cell_is_a_result_but_not_passed_over():
    content = made_up.small()
    content["steps"][1]["cells"][0]["state"] = "diverged"
    assert re.search(r"Complete: 1 of 2 <a href=.#cells.>cells</a> are done, 1 diverged\.", page.render(content, {}))
    assert "Complete: all 2 cells are done." in page.render(made_up.small(), {})


def test_differences_of_the_configuration_come_first():
    text = own(rendered(made_up.small())[0])
    v1 = text[text.index("What differs from V0"):]
    assert v1.index("RA_R") < v1.index('<li>SYMBOL_00=0</li>') and '<li class="changed">RA_R=5</li>' in v1
    assert '<td class="changed"><code>n</code></td>' in v1, "a switch is written as in .config"


def test_missing_parts_leave_a_page():
    for key in ("environment", "data", "noise", "plan", "notes", "control_failures"):
        rendered(made_up.small() | {key: None})
    content = made_up.small()
    for key in ("noise", "plan", "notes", "control_failures", "data", "environment", "margin"):
        del content[key]
    for step in content["steps"]:
        step.update(comparison=None, help=None, differs=None)
    rendered(content)


def test_a_page_without_charts_needs_no_library(monkeypatch):
    monkeypatch.setattr(page, "bundle", lambda: pytest.fail("not needed"))
    assert len(page.render(made_up.empty(), {})) < 40_000


def test_a_page_knows_what_it_was_made_of(tmp_path, monkeypatch):
    content, path = made_up.small(), tmp_path / "report.html"
    assert not page.is_current(path, content)
    path.write_text(page.render(content, {}))
    assert page.is_current(path, content) and page.is_current(path, json.loads(json.dumps(content)))
    assert f'<meta name="kablate-content" content="{page.digest(content)}">' in path.read_text()
    assert not page.is_current(path, content | {"margin": 0.02})
    monkeypatch.setattr(page, "code", lambda: "0" * 64)
    assert not page.is_current(path, content), "another program makes another page"
    path.write_bytes(b"\xff\xfe")
    assert not page.is_current(path, content) and not page.is_current(tmp_path, content)


def test_the_library_is_kept_whole_in_the_cache(tmp_path, monkeypatch):
    import vl_convert

    made = []
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda **_: made.append(1) or "window.vegaEmbed=1;")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert page.bundle() == page.bundle() == "window.vegaEmbed=1;" and len(made) == 1
    (kept,) = (tmp_path / "kablate").iterdir()
    assert kept.name == f"vega-{vl_convert.__version__}-{charts.VEGA_LITE}.js"
    kept.write_text("cut off")
    assert page.bundle() == "window.vegaEmbed=1;" and kept.read_text() == "window.vegaEmbed=1;", "a damaged one is made again"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert page.bundle() == "window.vegaEmbed=1;", "a cache that cannot be written costs only time"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    page.bundle()
    assert (tmp_path / "home/.cache/kablate").is_dir() and not os.path.exists("relative")


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast(scheme):
    def luminance(colour):
        parts = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4)
                   for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    for name, schemes in page.COLOURS.items():
        a, b = sorted(luminance(colour) for colour in schemes[scheme])
        assert (b + 0.05) / (a + 0.05) >= 4.5, name
    ink, soft, _, paper = (charts.LIGHT, charts.DARK)[scheme]
    for colour in (ink, soft):
        a, b = sorted((luminance(colour), luminance(paper)))
        assert (b + 0.05) / (a + 0.05) >= 4.5


@pytest.mark.parametrize("form, given, expected", [
    (page.signed, -0.00001, "+0.0000"), (page.signed, -0.0021, "\u22120.0021"), (page.signed, None, "\u2013"),
    (page.difference, {"difference": 0.1, "low": None, "high": None}, "+0.1000"), (page.difference, None, "\u2013"),
    (page.ratio, {"ratio": 0.98, "low": 0.97, "high": 0.99}, "0.980\u00d7 [0.970, 0.990]"), (page.mib, 3 * 2 ** 20, "3 MiB"),
    (page.moment, "2026-01-01T00:01:00+00:00", "2026-01-01 00:01 UTC"),
    (page.moment, "2026-01-01T00:01:00.5Z", "2026-01-01 00:01 UTC"),
    (page.moment, "2026-01-01T00:01", "2026-01-01 00:01"),
    (page.moment, "yesterday", "yesterday"), (page.moment, None, "\u2013"), (page.value, True, "y"),
    (page.value, None, "\u2013"), (page.whole, 453632, "453,632"),
    (page.kind, "BETTER", "good"), (page.kind, "no such word", "open"),
])
def test_how_values_are_written(form, given, expected):
    assert form(given) == expected
