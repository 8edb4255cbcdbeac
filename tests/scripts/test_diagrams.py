"""make diagrams: pictures say what the tensors and the committed results say, and the docs show them and no others."""

import json
import math
import re
from html import unescape

import pytest

from scripts import diagrams
from scripts.diagramming import PICTURES, draw
from scripts.diagramming.sources import RESULTS, Sources, Waits
from tests.harness import ROOT, refusal

mpl = pytest.importorskip("matplotlib")
IMAGES = ROOT / "docs/images"
PAGES = {path: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SHOWN = [(path, *found) for path, page in PAGES.items()
         for found in re.findall(r"\[!\[([^]]*)\]\((images/[\w.]+)\)\]\((images/[\w.]+)\)", page)]


@pytest.fixture(scope="module")
def sources():
    return Sources()


def texts(svg):
    return [unescape(text) for text in re.findall(r"<text [^>]*>([^<]*)</text>", svg)]


def drawn(folder, name, *options):
    diagrams.main([name, "--out", str(folder), *options])
    return texts((folder / f"{name}.svg").read_text())


def test_the_folded_layout_is_that_of_the_module_and_of_another_r(tmp_path, sources):
    for options, R in ([], 4), (["--set", "RA_R=8"], 8):
        said = drawn(tmp_path, "folded_layout", *options)
        assert {f"Q_std: {64 - R} channels", f"K_low: {R} channels", f"w_rec = {R / 64:.4g}"} <= set(said)
        assert f"w_std = {(64 - R) / 64:.4g} at the start" in said and "V: rows 1,536 to 2,303" in said


def test_the_same_picture_has_the_same_bytes(tmp_path):
    for folder in "ab":
        drawn(tmp_path / folder, "geometric_init")
    for kind in "svg", "png":
        one, two = ((tmp_path / folder / f"geometric_init.{kind}").read_bytes() for folder in "ab")
        assert one == two


def test_self_restart_mixes_values_as_the_picture_says(sources):
    """The picture's matrix, applied to the values, is what the module hands to its output projection."""
    import torch

    from scripts.diagramming.attention import STUDY, TOKENS, mixing

    attention = sources.block(STUDY, sources.first(STUDY, "RA_SELF_RESTART")).attn
    weights, share = mixing(attention, TOKENS)
    x = torch.randn(1, TOKENS, attention.n_embd, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = attention.resid_dropout.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        attention(x)
        values = attention.project(x)[2][0, 0]
        mixed = ((1 - share) * weights + share * torch.eye(TOKENS)) @ values
    hook.remove()
    assert 0 < share < 0.5
    solved = torch.linalg.lstsq(attention.c_proj.weight.double(), (seen[0][0] - attention.c_proj.bias).double().T).solution.T
    torch.testing.assert_close(solved[:, :attention.head_dim].float(), mixed, rtol=1e-3, atol=1e-4)


def test_the_forward_pass_shows_the_calls_that_the_modules_make(sources):
    from scripts.diagramming.attention import STUDY, operations

    attention = sources.block(STUDY, sources.first(STUDY, "ATTENTION_UNIFIED_RA")).attn
    calls = operations(attention, 1, 16, 768)
    assert [name for name, _, _ in calls] == ["linear", "scaled_dot_product_attention", "linear"]
    assert [out for _, _, out in calls] == [(1, 16, 2304), (1, 12, 16, 64), (1, 16, 768)]


def test_caches_are_those_that_cells_measured(sources):
    """Bytes of the picture's models, and those in a committed report of cells that ran."""
    import torch

    from scripts.diagramming.caches import STUDY, TRAINED

    measured = {step["name"]: step["kv_cache"]["bytes"] for step in sources.read(TRAINED, "report.json")["steps"]}
    said = texts((IMAGES / "cache_compression.svg").read_text())
    steps = [name for name in sources.steps(STUDY) if name in measured]
    assert {"V0", "V14", "V19", "C3", "MLA0", "RAMLAKV0"} <= set(steps)
    for step in steps:
        assert sources.model(STUDY, step).new_cache(1, dtype=torch.bfloat16).nbytes() == measured[step]
        assert any(text.startswith(f"{measured[step] / 2 ** 20:.1f} MiB") for text in said)


def test_gates_begin_where_the_modules_begin_and_end_where_cells_ended(sources):
    from scripts.diagramming.starts import TRAINED

    ax = draw("gate_evolution", sources).axes[0]
    step, gate = ax.get_title().split(": ")
    rows = [rows[-1] for record, rows in sources.curves(TRAINED) if record["step"] == step]
    layer0 = ax.get_lines()[1].get_ydata()
    assert math.isclose(layer0[0], getattr(sources.block(TRAINED.partition("+")[0], step).attn, gate)[0].item(), rel_tol=1e-6)
    assert math.isclose(layer0[-1], sum(row[f"unified_ra_{gate}/layer0"] for row in rows) / len(rows), rel_tol=1e-9)


def test_what_is_not_measured_is_not_drawn(tmp_path, capsys):
    waiting = ["performance_comparison", "inference_speed", "gate_evolution", "router_gpu_memory", "lmeval_benchmarks"]
    (tmp_path / "none").mkdir()
    diagrams.main([*waiting, "--results", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" waits for docs/results/")[0] for line in lines[:-1]] == waiting
    assert lines[-1] == "0 files written" and not (tmp_path / "out").exists()


def test_a_picture_that_waits_leaves_no_older_one(tmp_path, capsys):
    """Once its results are gone; pictures that were not asked for stay."""
    drawn(tmp_path, "performance_comparison")
    drawn(tmp_path, "inference_speed")
    (tmp_path / "none").mkdir()
    diagrams.main(["performance_comparison", "--results", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"none", "inference_speed.svg", "inference_speed.png"}
    assert capsys.readouterr().out.count(" removed\n") == 2


def test_results_that_come_later_are_drawn(tmp_path):
    """A router's study under its name, made of another's report, and one that was asked downstream tasks."""
    from scripts.diagramming.quality import ROUTER

    (tmp_path / ROUTER).symlink_to(RESULTS / "gpt2-kvsplice-ablation+local+brief")
    (tmp_path / "asked").mkdir()
    row = {"name": "X9", "task": "a_task", "metric": "acc", "items": 70, "seeds": 3}
    compared = {"difference": 0.1, "low": -0.1, "high": 0.3, "items": 69, "seeds": [1, 2]}
    downstream = [row | {"comparison": compared}, row | {"name": "X0", "comparison": None}]
    (tmp_path / "asked/report.json").write_text(json.dumps({"study": "asked", "downstream": downstream}))
    options = ["--results", str(tmp_path)]
    assert "WORSE" in drawn(tmp_path / "out", "router_final_comparison", *options)
    assert "11,207 MiB" in drawn(tmp_path / "out", "router_gpu_memory", *options)
    assert {"X9: a_task, acc", "69 x 2"} <= set(said := drawn(tmp_path / "out", "lmeval_benchmarks", *options))
    assert not any("X0" in text for text in said)
    assert "validation perplexity" in drawn(tmp_path / "out", "router_validation_perplexity", *options)


def test_refusals():
    assert "no picture fold" in refusal(diagrams.main, ["fold"])[0]
    assert "no symbol RA_Q" in refusal(diagrams.main, ["folded_layout", "--set", "RA_Q=8"])[0]
    assert "R" in refusal(diagrams.main, ["folded_layout", "--set", "RA_R=none"])[0]


@pytest.mark.parametrize("name", list(PICTURES))
def test_a_committed_picture_is_what_is_drawn_today_and_nothing_is_clipped(name, sources, tmp_path):
    from scripts.diagramming.canvas import STYLE

    with mpl.rc_context(STYLE):
        try:
            figure = draw(name, sources)
        except Waits:
            assert not (IMAGES / f"{name}.svg").exists()
            return
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01, box
        figure.savefig(tmp_path / "now.svg")

    assert texts((tmp_path / "now.svg").read_text()) == texts((IMAGES / f"{name}.svg").read_text()), "run make diagrams"


def test_docs_show_every_picture_and_no_other():
    named = {target for _, _, *targets in SHOWN for target in targets}
    assert named == {f"images/{path.name}" for path in IMAGES.iterdir()}
    assert {path.stem for path in IMAGES.iterdir()} <= PICTURES.keys()
    for path, alt, picture, behind in SHOWN:
        assert len(alt) > 20 and picture.endswith(".png") and behind == f"{picture[:-4]}.svg", f"{path}: {alt}"
    assert sum(page.count("![") for page in PAGES.values()) == len(SHOWN), "a picture without its SVG behind it"


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in IMAGES.iterdir()}
    assert all(size < (120e3 if name.endswith(".png") else 150e3) for name, size in sizes.items()) and sum(sizes.values()) < 2e6
