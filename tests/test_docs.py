"""Every command of the README and of docs/ runs, or would: make goals exist, scripts take their arguments."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import run_here

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
                                             *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = sorted({line for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.S)
                   for line in block.splitlines()})


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"([A-Z0-9_]+=\S+ )?make\b", c)])
def test_make_commands(command, tmp_path):
    """make -n: the goals exist and their recipes expand."""
    words = shlex.split(command)
    variables = dict(w.split("=", 1) for w in words[:words.index("make")])
    done = subprocess.run(["make", "-n", f"PYTHON={sys.executable}", *words[words.index("make") + 1:]], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | variables | {"KCONFIG_CONFIG": str(tmp_path / "none")})
    assert done.returncode == 0 and sys.executable in done.stdout, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_python_commands(command, tmp_path, monkeypatch):
    words = [sys.executable, *shlex.split(command)[1:]]
    if "--out" in words:
        words += ["--dry-run"]  # the arguments are read and the step is built, but not trained
    if words[1] == "gpt2/train_ra_mla.py":  # as a process: tests/gpt2/test_train_ra_mla.py
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("KCONFIG_CONFIG", str(tmp_path / "none"))
        done = run_here(*words[1:])
        assert done.returncode == 0, done.stdout + done.stderr
        return
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, env=os.environ | {
        "KCONFIG_CONFIG": str(tmp_path / "none"), "PYTEST_ADDOPTS": "--collect-only -n 0 -p no:cacheprovider"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_commands_are_tested():
    assert len(COMMANDS) > 15
    assert all(re.match(r"([A-Z0-9_]+=\S+ )?make\b|python ", c) for c in COMMANDS)


def test_goals_named_in_the_text_exist():
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    goals |= {"menuconfig", "savedefconfig"}
    for path, page in PAGES.items():
        for goal in re.findall(r"`make ([a-z][a-z-]*)", page):
            assert goal in goals, f"{path}: {goal}"


def test_links_lead_somewhere():
    for path, page in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"


def test_the_step_of_the_readme_is_valid(tmp_path):
    from lib.config import Study
    from lib.kconfig import read_layer

    text = re.search(r"```\n(# Help: .*?)```", README, re.S).group(1)
    (tmp_path / "X.config").write_text(text)
    layer = read_layer(tmp_path / "X.config")
    assert Study("gpt2-ra-ablation").resolve("V0", overrides=layer).config.RA_R == 16


def test_the_table_of_function_classes_is_true():
    from lib.classes import function_classes
    from lib.config import load

    rows = re.findall(r"^\| (V\d) \|.*\| ([^|]+) \|$", README, re.M)
    steps = [f"V{i}" for i in range(7)]
    known = function_classes({step: load("gpt2-ra-ablation", step) for step in steps})
    assert rows == [(step, str(known[step])) for step in steps]


def test_committed_results_are_small_and_of_few_forms():
    """Pages are drawn again from report.json, and cells come back from what make pack made; weights stay where they were."""
    files = [p for p in (ROOT / "docs/results").rglob("*") if p.is_file() and p.name != "report.html"]
    assert sum(p.stat().st_size for p in files) < 8e6
    assert {p.suffix for p in files if p.name != "cells.tar.gz"} <= {".md", ".csv", ".json", ".png"}
    tools = ("bench-", "compile-", "slurm", "start", "torture")  # whose tables are no study's
    for folder in {p.parent for p in files if not p.parent.name.startswith(tools)}:
        assert {"report.md", "report.csv", "report.json"} <= {p.name for p in folder.iterdir()}, folder
