"""The data of a report arrive in its charts, and every chart compiles and draws, whatever is missing."""

import json
import re
import struct

import pytest

from lib.report import charts, curves
from tests.lib.report import made_up

vl_convert = pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")


def rows(spec) -> list[list[dict]]:
    """The data of each layer or panel."""
    return [part["data"]["values"] for part in spec.get("layer") or spec["concat"]]


def one(content, name):
    return next(step for step in content["steps"] if step["name"] == name)


@pytest.mark.parametrize("size", ["small", "normal", "large"])
def test_every_chart_compiles_without_a_warning(size, capfd):
    specs = charts.charts(getattr(made_up, size)())
    assert tuple(specs) == charts.NAMES
    for spec in specs.values():
        json.dumps(spec, allow_nan=False)
        assert vl_convert.vegalite_to_vega(spec, vl_version=charts.VEGA_LITE, show_warnings=True)["marks"]
    assert capfd.readouterr().err == ""


def test_the_schema_names_the_version_that_draws():
    spec = charts.charts(made_up.small())["memory"]
    assert f"/v{charts.VEGA_LITE.split('.')[0]}.json" in spec["$schema"]
    assert charts.VEGA_LITE in vl_convert.get_vegalite_versions()


@pytest.mark.parametrize("dark, paper", [(False, (255, 255, 255)), (True, (0x16, 0x18, 0x1c))])
def test_a_png_has_twice_the_asked_width_and_its_theme(dark, paper):
    specs = charts.charts(made_up.normal())
    for name in ("loss_by_tokens", "gates"):
        data = charts.png(specs[name], dark=dark)
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert 1000 <= width <= 2 * charts.PNG_WIDTH + 200 and 500 <= height <= 2000
    svg = vl_convert.vegalite_to_svg(specs["gates"], vl_version=charts.VEGA_LITE, config=charts.config(dark))
    assert "#{:02x}{:02x}{:02x}".format(*paper) in svg


def test_differences_hold_what_the_comparison_says():
    content = made_up.normal()
    spec = charts.differences(content)
    band, zero, dots, _, points, outside = rows(spec)
    assert band == [{"from": -0.01, "to": 0.01}] and zero == [{"zero": 0}] and outside == points
    for step in content["steps"][1:]:
        c = step["comparison"]
        point = next(p for p in points if p["step"] == step["name"])
        assert all(point[key] == c[key] for key in ("difference", "low", "high", "word"))
        assert {d["seed"]: d["difference"] for d in dots if d["step"] == step["name"]} == c["by_seed"]
        assert f"{step['name']}: {c['word']}" in spec["description"]
    assert spec["height"] == 30 * 6, "the baseline has no row"


def test_a_row_without_a_difference_keeps_its_word_and_one_seed_has_no_interval():
    content = made_up.small()
    content["steps"].append(content["steps"][1] | {"name": "V2", "comparison": made_up.comparison("V2", 2, {}, {})})
    spec = charts.differences(content)
    points = rows(spec)[4]
    assert [(p["step"], p["low"]) for p in points] == [("V1", None)]
    right = spec["layer"][4]["encoding"]["y"]["axis"]["labelExpr"]
    assert '"V2": "INCOMPLETE"' in right and "UNDERPOWERED" in right


def test_one_huge_difference_leaves_the_others_legible():
    content = made_up.large()
    spec = charts.differences(content)
    low, high = spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert high - low < 0.5
    lost = [p for p in rows(spec)[4] if p["outside"]]
    assert [(p["step"], p["outside"], p["at"]) for p in lost] == [("V1@RA_R=12", "right", high)]
    assert "+1.89" in lost[0]["text"], "the number is written, where the point cannot be"


@pytest.mark.parametrize("by", ["tokens", "seconds"])
def test_loss_curves_hold_the_evaluations_and_their_mean(by):
    content = made_up.normal()
    spec = charts.loss(content, by)
    seeds, means, _, ends = rows(spec)
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    given = {(round(x, 6), y) for step in content["steps"] for c in step["curves"]
             for x, y in zip(c[by], c["val_loss"], strict=True)}
    kept = {(round(r["x"], 6), r["loss"]) for r in seeds if r["loss"] != high}
    assert kept == {p for p in given if p[1] <= high} and 100 < len(kept) < len(given)
    assert low < min(y for _, y in given) and 2 < low < high < 4, "neither zero nor the first evaluations are on the axis"
    for end in ends:
        last = [c["val_loss"][-1] for c in one(content, end["step"])["curves"]]
        assert end["loss"] == pytest.approx(sum(last) / len(last))
    assert {r["seeds"] for r in means} == {3}


def test_a_curve_that_leaves_the_axis_is_cut_where_it_crosses():
    assert curves.cut([(0, 6.0), (1, 4.0), (2, 2.0), (3, 4.0), (4, 2.5)], 3.0) == [
        (1, 1.5, 3.0), (1, 2, 2.0), (1, 2.5, 3.0), (2, pytest.approx(3 + 1 / 1.5), 3.0), (2, 4, 2.5)]
    assert curves.cut([(0, 6.0), (1, 4.0)], 3.0) == []


def test_unfinished_seeds_are_drawn_but_are_in_no_mean():
    content = made_up.normal()
    step = one(content, "V1")
    step["cells"][0]["state"] = "diverged"
    step["curves"][0]["val_loss"][10:] = [9.0] * 10
    _, means, _, ends = rows(charts.loss(content, "tokens"))
    assert {r["seeds"] for r in means if r["step"] == "V1"} == {2}
    last = [c["val_loss"][-1] for c in step["curves"][1:]]
    assert next(e["loss"] for e in ends if e["step"] == "V1") == pytest.approx(sum(last) / 2)


def test_the_mean_of_curves_at_different_points_is_interpolated():
    assert curves.mean([[(0, 1.0), (10, 3.0)], [(0, 2.0), (5, 2.0), (8, 2.0)]]) == [(0, 1.5), (8, pytest.approx(2.3))]
    assert curves.mean([[(5, 1.0)]]) == [(5, 1.0)] and curves.mean([]) == []


def test_curves_that_never_overlap_have_no_mean_and_are_still_drawn():
    """Two seeds with one evaluation each, at other seconds."""
    assert curves.mean([[(5, 1.0)], [(6, 1.0)]]) == []
    content = made_up.small()
    for step in content["steps"]:
        step["curves"] = [{"seed": s, "tokens": [100], "seconds": [s / 7], "val_loss": [3.0 + s / 9]} for s in (1, 2)]
    assert charts.loss(content, "seconds")["layer"][0]["data"]["values"]


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(i, 0.0) for i in range(1000)]
    thin = curves.thinned(points, 100)
    assert len(thin) <= 102 and thin[0] == points[0] and thin[-1] == points[-1]
    content = made_up.content(steps=16, seeds=16, evaluations=300, gates=False)
    assert len(json.dumps(charts.charts(content))) < 6_000_000


def test_a_step_above_the_axis_is_named():
    content = made_up.normal()
    for c in one(content, "V3")["curves"]:
        c["val_loss"] = [x + 9 for x in c["val_loss"]]
    assert charts.loss(content, "tokens")["title"]["subtitle"][-1] == "Wholly above the axis: V3."


def test_no_two_steps_look_alike_and_the_baseline_is_grey():
    looks = charts._looks([{"name": "V0", "is_baseline": True}] + [{"name": f"V{i}"} for i in range(1, 31)])
    assert looks["V0"] == (charts.NEUTRAL, [1, 0]) and len({str(look) for look in looks.values()}) == 31


def test_gates_have_a_panel_a_step_and_statistic_with_means_over_seeds():
    content = made_up.normal()
    spec = charts.gates(content)
    assert [p["title"]["text"] for p in spec["concat"]] == [f"{s}: {g}" for g in made_up.GATES for s in ("V1", "V2", "V4")]
    values = [g["value"][-1] for g in one(content, "V1")["gates_by_layer"] if g["name"] == made_up.GATES[0] and g["layer"] == 3]
    last = [r for r in rows(spec)[0] if r["layer"] == 3][-1]
    assert last["value"] == pytest.approx(sum(values) / 3) and last["tokens"] == 256000
    assert len({str(p["encoding"]["y"]["scale"]["domain"]) for p in spec["concat"]}) == 2, "one axis a statistic"


def test_throughput_and_memory_hold_means_ratios_and_intervals():
    content = made_up.normal()
    spec = charts.throughput(content)
    bars = rows(spec)[0]
    assert [b["value"] for b in bars] == [s["mean"]["tokens_per_second"] for s in content["steps"]]
    speed = one(content, "V1")["comparison"]["speed"]
    assert bars[1]["low"] == pytest.approx(speed["low"] * 12800) and "0.980\u00d7 [0.970, 0.990]" in bars[1]["text"]
    assert bars[0]["low"] is None and spec["layer"][0]["encoding"]["x"]["scale"]["domain"][0] == 0
    assert rows(charts.memory(content))[0][0]["value"] == pytest.approx(3e8 / 2 ** 20)


def test_a_chart_without_data_is_left_out():
    assert charts.charts(made_up.empty()) == {}
    content = made_up.normal()
    for step in content["steps"]:
        step.update(gates_by_layer=[], curves=[{"seed": 1, "tokens": None, "seconds": [], "val_loss": [None]}])
        step["mean"]["peak_memory_bytes"] = None
    assert list(charts.charts(content)) == ["differences", "throughput"]


def test_nulls_and_a_lone_step_are_drawn():
    content = made_up.content(steps=1, seeds=1, evaluations=1)
    content["steps"][0]["curves"][0] = {"seed": 1337, "tokens": [10, 20, None], "seconds": [1.0, None, 3.0],
                                                "val_loss": [3.0, None, 2.0]}
    specs = charts.charts(content)
    assert list(specs) == ["loss_by_tokens", "loss_by_seconds", "throughput", "memory"]
    assert [(r["x"], r["loss"]) for r in rows(specs["loss_by_seconds"])[0]] == [(1.0, 3.0), (3.0, 2.0)]
    for spec in specs.values():
        assert charts.png(spec)[:4] == b"\x89PNG"


def test_the_colours_are_told_from_both_papers():
    def luminance(colour):
        parts = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4)
                   for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    for paper in (charts.LIGHT[3], charts.DARK[3]):
        for colour in [*charts.PALETTE, *charts.LAYERS, *(c for c, _ in charts.WORDS.values())]:
            a, b = sorted((luminance(paper), luminance(colour)))
            assert (b + 0.05) / (a + 0.05) > 2.8, (colour, paper)


def test_no_name_can_break_an_expression():
    content = made_up.normal()
    one(content, "V1")["name"] = "\"'\\ V1 </script> \u2028"
    for spec in charts.charts(content).values():
        vega = vl_convert.vegalite_to_vega(spec, vl_version=charts.VEGA_LITE)
        assert vl_convert.vega_to_svg(vega)
    assert re.search(r"V1 <", charts.differences(content)["description"])
