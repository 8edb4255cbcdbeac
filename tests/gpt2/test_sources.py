"""What a cell records of the code that made its numbers, proved by what a cell imports."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import runtime
from lib.config import load
from tests.gpt2.test_train_ra_mla import FAST
from tests.harness import ROOT, run_here

TRAIN = """import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
names = [(n, getattr(m, "__file__", None)) for n, m in sys.modules.items() if n.split(".")[0] in ("gpt2", "lib")]
print("IMPORTED " + json.dumps([file for _, file in names if file]))"""


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """(files of the project that a cell imported, its environment): V6 on the path that make takes, --cell."""
    folder = tmp_path_factory.mktemp("cell") / "v6"
    trainer = ROOT / "gpt2/train_ra_mla.py"
    # Whatever the study's own way leaves in the folder is the same; only the process that follows is looked at.
    by_hand = run_here(trainer, "--defconfig", "gpt2-ra-ablation+tiny", "--ra-mla-ablation-step", "V6", *FAST, "--out", folder)
    assert by_hand.returncode == 0, by_hand.stderr
    for name in ("metrics.json", "metrics.jsonl", "model.pt"):
        (folder / name).unlink()
    done = subprocess.run([sys.executable, "-c", TRAIN, str(trainer), "--cell", str(folder)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout.rsplit("IMPORTED ", 1)[1])
    record = json.loads((folder / "metrics.json").read_text())
    return {str(p.relative_to(ROOT)) for p in map(Path, imported)}, record["environment"]


def left_out(name):
    return any(name == one or name.startswith(f"{one}/") for one in runtime.MAKES_NO_NUMBER)


def test_a_cell_imports_nothing_that_is_said_to_make_no_number(cell):
    imported, _ = cell
    assert len(imported) > 20 and not [name for name in imported if left_out(name)]


def test_all_that_a_cell_imports_is_recorded_but_for_two_modules_of_words(cell):
    """lib/steps.py finds fragments, which the cell does not read; lib/errors.py words refusals."""
    imported, environment = cell
    assert imported - environment["sources"].keys() == set(runtime.IMPORTED_BUT_MAKES_NO_NUMBER)
    assert {"gpt2/attention/unified_ra.py", "gpt2/mlp/reciprocal.py", "lib/loop.py"} <= imported


def test_every_module_of_lib_is_imported_by_a_cell_or_said_to_make_no_number(cell):
    """A module that does neither is one that nobody has thought of: list it in lib/runtime.py if it makes no number."""
    imported, environment = cell
    on_a_gpu = {"lib/optimizers/spike_kernel.py"}  # needs triton, and is imported where it runs
    assert {name for name in environment["sources"] if name.startswith("lib/")} - imported == on_a_gpu


def test_what_is_recorded_is_the_files_own_hash(cell):
    _, environment = cell
    assert environment["sources"] == runtime.sources()
    for name, digest in environment["sources"].items():
        assert digest == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()[:12] and name.endswith(".py")
    assert environment["source_hash"] == runtime.source_hash(environment["sources"]) and environment["world_size"] == 1


def test_every_name_that_is_left_out_exists():
    assert [name for name in runtime.MAKES_NO_NUMBER + runtime.IMPORTED_BUT_MAKES_NO_NUMBER if not (ROOT / name).exists()] == []


@pytest.fixture
def tree(tmp_path):
    for name in ("gpt2", "lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("name", ["lib/stats.py", "lib/report/__init__.py", "lib/report/new.py", "lib/errors.py", "lib/plan.py",
                                  "gpt2/laws.py", "lib/Kconfig", "gpt2/steps/V1.config"])
def test_a_change_of_what_makes_no_number_changes_no_hash(tree, name):
    before = runtime.sources(tree)
    with open(tree / name, "a") as file:
        file.write("# a comment\n")
    assert runtime.sources(tree) == before


@pytest.mark.parametrize("name", ["lib/loop.py", "gpt2/model.py", "gpt2/attention/unified_ra.py", "lib/optimizers/new.py",
                                  "lib/statistics.py", "lib/reporter.py", "lib/data/batches.py"])
def test_a_change_of_anything_else_changes_that_file_and_the_whole(tree, name):
    before = runtime.sources(tree)
    with open(tree / name, "a") as file:
        file.write("# a comment\n")
    after = runtime.sources(tree)
    assert {n for n in after if after[n] != before.get(n)} == {name}
    assert runtime.source_hash(after) != runtime.source_hash(before)


def test_the_cpu_is_named_by_its_model():
    cfg = load("gpt2-ra-ablation+tiny", "V0")
    named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    runtime.processor.cache_clear()
    found = runtime.environment(cfg, torch.device("cpu"))["device"]
    assert found and (named is None or found == named[1].strip())


@pytest.mark.parametrize("text, expected", [
    ("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz  \nprocessor\t: 1\nmodel name\t: Other\n", "Fast CPU @ 3 GHz"),
    ("processor\t: 0\nmodel name\t:\nBogoMIPS\t: 50.00\n", "the architecture"), (None, "the architecture"),
])
def test_where_the_system_names_no_model_the_architecture_does(monkeypatch, text, expected):
    def read(self):
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(runtime.Path, "read_text", read)
    monkeypatch.setattr(runtime.platform, "processor", lambda: "the architecture")
    runtime.processor.cache_clear()
    try:
        assert runtime.processor() == expected
    finally:
        runtime.processor.cache_clear()
