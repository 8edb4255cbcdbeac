"""The report in a real browser: charts are drawn, nothing complains, nothing overflows, at a phone's and a desk's width.

Each browser run shows one report in two frames of these widths (a headless window cannot be as narrow as a phone); a script
that only the test appends says what it measured. Without a Chromium these tests are skipped and say so.
"""

import html
import json
import os
import re
import shutil
import subprocess
import warnings

import pytest

from lib.report import charts, index, page
from tests.lib.report import made_up

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LEFT_OUT = "no chromium, chromium-browser or google-chrome on PATH: the report was not tried in a browser"
pytestmark = pytest.mark.skipif(BROWSER is None, reason=LEFT_OUT)
if BROWSER is None:
    warnings.warn(LEFT_OUT, stacklevel=1)  # a quiet run prints warnings, but not why something was skipped
pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
PHONE, DESK = 375, 1280
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}
MEASURE = """<script>
(async function () {
  const root = document.documentElement, pause = () => new Promise(done => setTimeout(done, 50));
  while (document.querySelector("[data-chart]") && !root.dataset.drawn) await pause();
  const before = Array.from(document.querySelectorAll(".chart svg.marks"), svg => svg.textContent);
  const button = document.querySelector("[data-show=loss_by_seconds]");
  if (button) {
    button.click();
    for (let i = 0; i < 100 && !document.querySelector("#loss svg").textContent.includes("training time"); i++) await pause();
  }
  const charts = Array.from(document.querySelectorAll(".chart"), chart => {
    const svg = chart.querySelector("svg.marks"), edge = svg.getBoundingClientRect(), outer = chart.getBoundingClientRect();
    const seen = Array.from(svg.querySelectorAll("text")).filter(t => t.textContent && getComputedStyle(t).opacity !== "0");
    const boxes = seen.map(t => [t.textContent, t.getBoundingClientRect()]).filter(([_, b]) => b.width);
    const overlaps = boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([_, q]) =>
      Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3
      ).map(([b]) => a + " / " + b));
    return {name: chart.dataset.chart, overlaps, width: edge.width, room: outer.width,
            clipped: boxes.filter(([_, b]) => b.left < edge.left - 1 || b.right > edge.right + 1).map(([t]) => t),
            small: boxes.filter(([_, b]) => Math.min(b.width, b.height) < 7).map(([t]) => t)};
  });
  const rgb = getComputedStyle(document.body).backgroundColor;
  parent.postMessage({width: root.clientWidth, scroll: root.scrollWidth, charts, before, paper: rgb,
    chartPaper: document.querySelector(".chart svg") && getComputedStyle(document.querySelector(".chart svg")).backgroundColor,
    pressed: button && button.getAttribute("aria-pressed"), owned: typeof window.owned}, "*");
})();
</script>"""
WRAPPER = """<!doctype html><body><pre id="found"></pre><script>
const found = [];
addEventListener("message", event => {
  found.push(event.data);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>""" + "".join(f'<iframe src="page.html" style="border:0;width:{w}px;height:900px"></iframe>' for w in (PHONE, DESK))


def shown(folder, text, scheme="light") -> tuple[dict, dict, list[str]]:
    """What was measured at a phone's and at a desk's width, and what the browser's console said."""
    before, _, after = text.rpartition("</body>")  # the last one: Vega's own code holds the word too
    (folder / "page.html").write_text(before + MEASURE + "</body>" + after)
    (folder / "wrapper.html").write_text(WRAPPER)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
               f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
               "--enable-logging=stderr", "--window-size=1400,1000", "--virtual-time-budget=60000", "--dump-dom",
               (folder / "wrapper.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"HOME": str(folder)})
    inside = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert inside and inside[1], done.stderr[-2000:]
    phone, desk = sorted(json.loads(html.unescape(inside[1])), key=lambda one: one["width"])
    return phone, desk, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("size, scheme", [("small", "light"), ("normal", "dark"), ("large", "light"), ("large", "dark"),
                                          ("tuned", "light")])
def test_the_report_is_drawn_whole(tmp_path, size, scheme):
    content = getattr(made_up, size)()
    specs = charts.charts(content)
    phone, desk, said = shown(tmp_path, page.render(content, specs), scheme)
    assert said == []
    for width, found in ((PHONE, phone), (DESK, desk)):
        assert (found["width"], found["scroll"]) == (width, width), "the page itself does not scroll sideways"
        assert found["paper"] == PAPER[scheme] == found["chartPaper"]
        assert len(found["before"]) == len(specs) - 1, "each chart is drawn, loss by one of its two axes"
        assert [c["name"] for c in found["charts"]] == [n for n in specs if n != "loss_by_tokens"]
        assert found["pressed"] == "true"
        for chart in found["charts"]:
            assert not (chart["overlaps"] or chart["clipped"] or chart["small"]), (width, chart)
            assert chart["width"] <= chart["room"] + 1, (width, chart)
        for step in (s for s in content["steps"] if s["comparison"]):
            assert step["comparison"]["word"] in found["before"][0] and step["name"] in found["before"][0]


def test_a_study_without_results_and_a_hostile_one(tmp_path):
    content = made_up.normal()
    evil = "</script><script>owned=1</script><img src=x onerror=owned=1>"
    for step in content["steps"][1:]:
        step["name"] = step["help"] = step["name"] + evil
        step["comparison"]["sentence"] = evil
    phone, desk, said = shown(tmp_path, page.render(content, charts.charts(content)))
    assert said == [] and phone["owned"] == desk["owned"] == "undefined" and len(desk["before"]) == 5
    assert phone["scroll"] == PHONE and desk["scroll"] == DESK
    empty = made_up.empty()
    phone, desk, said = shown(tmp_path, page.render(empty, charts.charts(empty)))
    assert said == [] and phone["scroll"] == PHONE and desk["charts"] == []


def test_the_index_fits(tmp_path):
    for name, content in (("normal", made_up.normal()), ("a-long-name" * 8, made_up.large())):
        (tmp_path / "studies" / name).mkdir(parents=True)
        (tmp_path / "studies" / name / "report.json").write_text(json.dumps(content))
    # Its policy forbids every script; the measuring one is let in.
    text = index.render(index.collect(tmp_path / "studies"))
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    phone, desk, said = shown(tmp_path, text, "dark")
    assert said == [] and phone["paper"] == desk["paper"] == PAPER["dark"]
    assert (phone["scroll"], desk["scroll"]) == (PHONE, DESK)
