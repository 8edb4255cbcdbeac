"""make ladder: the files it writes of committed reports, where, and what it refuses; and the sizes it is for."""

import json

import pytest

from gpt2.model import GPT
from lib.config import Study
from scripts import ladder as tool
from tests.harness import ROOT, refusal

TINY = ROOT / "docs/results/gpt2-controls+tiny/report.json"


@pytest.fixture
def folders(tmp_path):
    """The committed report, and a copy that says it is of a model ten times as large, with another effect of P0."""
    content = json.loads(TINY.read_text())
    for name, factor in (("one", 1), ("ten", 10)):
        for step in content["steps"]:
            step["mean"]["parameters"] *= factor
            if step["name"] == "P0" and factor > 1:
                step["comparison"]["by_seed"] = {s: d / 2 for s, d in step["comparison"]["by_seed"].items()}
                for key in ("difference", "low", "high"):
                    step["comparison"][key] /= 2
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "report.json").write_text(json.dumps(content))
    return [tmp_path / "in" / "one", tmp_path / "in" / "ten"]


def test_the_files_of_two_reports(folders, capsys, monkeypatch):
    before = [(f / "report.json").read_bytes() for f in folders]
    monkeypatch.setenv("FROM", f" {folders[1]}  {folders[0]} ")
    tool.main([])
    out = folders[1]
    text, found = (out / "ladder.md").read_text(), json.loads((out / "ladder.json").read_text())
    assert text in capsys.readouterr().out
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG") and (out / "ladder.svg").read_text().startswith("<svg")
    assert [s["parameters"] for s in found["sizes"]] == [445952, 4459520]
    harm = next(arm for arm in found["arms"] if arm["name"] == "P0")
    assert harm["change"]["difference"] == pytest.approx(-harm["at"][0]["difference"] / 2) and harm["change"]["p_holm"] < 1e-6
    assert all(arm["change"]["difference"] == 0 for arm in found["arms"] if arm["name"] != "P0")
    assert [(f / "report.json").read_bytes() for f in folders] == before


def test_out_says_where(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("KABLATE_OUT", str(tmp_path))
    tool.main([str(f) for f in folders])
    assert (tmp_path / "ladder.md").exists() and not list(tmp_path.glob("in/*/ladder.md"))
    assert refusal(tool.main, [*map(str, folders), "--out", str(tmp_path / "no")])[0] == f"there is no folder {tmp_path}/no."


def test_bad_input_writes_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("FROM", raising=False)
    one, path = str(folders[0]), folders[1] / "report.json"
    larger = json.loads(path.read_text())
    assert refusal(tool.main, []) == refusal(tool.main, [one]) == (
        "a ladder needs the reports of two or more sizes.", tool.AGAIN)
    assert refusal(tool.main, [one, one])[0].endswith("are of one size, 445,952 parameters.")
    assert refusal(tool.main, [one, str(tmp_path)]) == (f"there is no {tmp_path}/report.json.", tool.AGAIN)
    for text in ("{", "[]", "{}", "[" * 100_000, '{"format": 1}'):
        path.write_text(text)
        assert refusal(tool.main, [one, str(folders[1])])[0].startswith(f"{path} cannot be read: ")
    content = json.loads(TINY.read_text())
    path.write_text(json.dumps(content | {"format": 2}))
    assert refusal(tool.main, [one, str(folders[1])])[0] == f"{path} is not of make report."
    larger["steps"][1]["comparison"]["low"] = float("-inf")
    path.write_text(json.dumps(larger))
    assert refusal(tool.main, [str(folders[1]), one])[0].startswith("these reports give no ladder: ")
    content["steps"][0]["mean"]["parameters"] = 99  # something is missing further in
    del content["steps"][0]["mean"]["tokens"]
    path.write_text(json.dumps(content))
    assert refusal(tool.main, [one, str(folders[1])])[0] == "these reports give no ladder: KeyError: 'tokens'."
    assert not list(tmp_path.rglob("ladder*"))


@pytest.mark.parametrize("fragment", ["10m", "30m"])
def test_a_size_has_the_parameters_that_its_fragment_says(fragment):
    study = Study(f"gpt2-ladder-ablation+{fragment}")
    cfg = study.resolve("V0").config
    model = GPT(cfg)
    total = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for name, p in model.named_parameters() if ".wte." in name or ".wpe." in name)
    said = (ROOT / "defconfigs/fragments" / fragment).read_text()
    assert f": {total:,} parameters, {total - embeddings:,} of them without" in said
    assert cfg.GPT2_N_EMBD == 64 * cfg.GPT2_N_HEAD and cfg.GPT2_MAX_TIME == 0, "as many tokens at every size"


def test_fragments_of_sizes_work_with_a_budget_of_the_laptop():
    cfg = Study("gpt2-ladder-ablation+tiny+10m").resolve("V0").config
    assert (cfg.GPT2_N_LAYER, cfg.GPT2_N_EMBD, cfg.DEVICE, cfg.DATASET) == (4, 192, "cpu", "pystdlib")
