"""docs/steps.md: its tables of steps, studies and defaults are those of the fragments, defconfigs and Kconfig files."""

import re

import pytest
import torch

from gpt2.model import GPT
from lib.config import defconfig_names, load
from lib.kconfig import read_layer
from lib.report.caches import savings
from lib.steps import step_files, step_header
from scripts.listing import classes_of_steps
from tests.harness import ROOT

PAGE = (ROOT / "docs/steps.md").read_text()
KCONFIG = "".join((ROOT / name).read_text() for name in ("Kconfig", "gpt2/Kconfig", "lib/Kconfig"))
TABLES = [[[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
          for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)]


def rows(*header):
    """The rows of the one table with this header."""
    (found,) = (table[2:] for table in TABLES if table[0] == list(header))
    return found


def arms(path) -> list[str]:
    return next(a.value for a in read_layer(path) if a.name == "ABLATION_STEPS").split()


def symbol(name) -> str:
    """The entry of a symbol in the Kconfig files."""
    return re.search(rf"^config {name}\n((?:\t.*\n|\n)+)", KCONFIG, re.M)[1]


def test_every_step_is_there_with_its_change_and_its_function_class():
    classes = classes_of_steps()
    expected = [[name, step_header(path, "Help"), classes[name]] for name, path in step_files().items()]
    assert [row[:3] for row in rows("step", "change", "class", "studies")] == expected


def test_every_study_is_there_with_its_steps():
    studies = {number: name.strip("`") for number, name, _ in rows("", "study", "question")}
    assert sorted(studies.values()) == sorted(defconfig_names()) and list(studies) == [str(n + 1) for n in range(len(studies))]
    listed = {studies[number]: steps.replace("`", "").split() for number, steps in rows("", "steps")}
    assert listed == {name: arms(path) for name, path in defconfig_names().items()}
    old = [number for number, name in studies.items() if defconfig_names()[name].parent.name == "old"]
    assert f"Numbers {old[0]} to {old[-1]} are in `defconfigs/old/`" in PAGE and old[-1] == list(studies)[-1]
    for step, *_, where in rows("step", "change", "class", "studies"):
        found = [number for number, name in studies.items() if step in {arm.partition("@")[0] for arm in listed[name]}]
        assert where == (", ".join(found) or "none"), step


@pytest.mark.parametrize("name, value", [row[:2] for table in TABLES if table[0][:2] == ["symbol", "default"]
                                         for row in table[2:]])
def test_defaults_are_those_of_kconfig(name, value):
    assert re.findall(r"^\tdefault (.*)$", symbol(name.strip("`")), re.M) in ([value], [f'"{value}"'])


def test_sizes_of_caches_are_those_of_the_caches():
    def cache(step):
        with torch.device("meta"):
            return GPT(load("gpt2-kv-pruning-ablation", step)).new_cache(1, dtype=torch.bfloat16)

    full = cache("V0")
    for choice, step in (("KV_PRUNING_NONE", "V0"), ("KV_PRUNING_KV", "V14"), ("KV_PRUNING_V", "V19")):
        (row,) = (row for row in rows("choice", "what is dropped", "cache at T=1024") if row[0] == f"`{choice}`")
        assert float(row[2].removesuffix(" MiB")) == pytest.approx(cache(step).nbytes() / 2 ** 20, abs=0.05)
    for step, *shares in rows("step", "values", "values, index and importance", "whole KV cache"):
        found = savings(cache(step).parts(), full.parts())
        assert shares[:2] == [f"{100 * share:.1f} %" for share in list(found.values())[:2]]
        assert shares[2] == f"{100 * found['kv_cache']:.0f} %"


def test_symbols_files_and_metrics_named_in_the_text_exist():
    code = set(re.findall(r"`([^`\n]+)`", PAGE))
    for name in code:
        if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", name):
            assert symbol(name), name
        if re.fullmatch(r"(gpt2|lib|defconfigs)/\S*", name):
            assert (ROOT / name).exists(), name
    sources = "".join(path.read_text() for path in (ROOT / "gpt2").rglob("*.py"))
    metrics = {"coupling_scale", "compute_ratio", "p_recip", "balance_loss", "p_full", "p_ra", "skip_std_attn",
               "skip_lowrank_attn", "skip_std_mlp", "skip_rec_mlp", "kv_keep_ratio"}
    assert metrics <= code and all(f'"{name}"' in sources for name in metrics)


def test_no_line_but_a_pictures_is_longer_than_128_characters():
    assert [line for line in PAGE.splitlines() if len(line) > 128 and not line.startswith("[![")] == []
