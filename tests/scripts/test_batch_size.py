"""Looking for the micro-batch: one trial is a cell in small, and make looks before the first cell alone."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import loop
from lib.config import load
from scripts import batch_size
from tests.harness import TINY, copy_tree_that_trains_nothing, refusal, replace, run

SMALL = {"GPT2_BLOCK_SIZE": 16, "BATCH_SIZE": 3, "GPT2_GRADIENT_ACCUMULATION": 5, "BATCH_DRAWN": 2, "EVALUATE_ONLY": False,
         "GPT2_DROPOUT": "0.1"}
# In place of the GPU: a step needs 100 MiB and, by architecture, 5 or 10 MiB a sequence, of 1000 MiB.
MADE_UP = '''
def device(cfg):
    return {"type": "cuda", "name": "a GPU", "memory_bytes": 1000 * 2 ** 20, "torch": "2.13.0"}


def trial(cfg, share, folder):
    with open("trials", "a") as file:
        file.write(f"{cfg.BATCH_SIZE} x {cfg.GPT2_GRADIENT_ACCUMULATION}, {cfg.BATCH_DRAWN}, {cfg.RA_R}, {share}\\n")
    peak = (100 + (10 if cfg.RA_R else 5) * cfg.BATCH_SIZE) * 2 ** 20
    return peak if peak <= share * 1000 * 2 ** 20 else None


if __name__ == "__main__":
'''


@pytest.mark.parametrize("step", ["V0", "C2"])
def test_a_trial_is_a_cell_in_small(tmp_path, step):
    """Through the loop, and without its data: also of a step that starts from another's model."""
    cfg = load("gpt2-ra-ablation+tiny", step, SMALL | {"DATA_LOCAL_DIR": "/nowhere"})
    assert batch_size.trial(cfg, 0.5, tmp_path) > 2 ** 20
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] == 2 * (3 * 2) * 16, "two iterations, of two micro-batches at most"


@pytest.mark.parametrize("error, fits_not", [
    (torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("a shape is wrong"), False)])
def test_only_what_is_out_of_memory_does_not_fit(tmp_path, monkeypatch, error, fits_not):
    def train(*_):
        raise error
    monkeypatch.setattr(loop, "train", train)
    cfg = load("gpt2-ra-ablation+tiny", "V0", SMALL)
    if fits_not:
        assert batch_size.trial(cfg, 0.5, tmp_path) is None
    else:
        with pytest.raises(RuntimeError, match="a shape"):
            batch_size.trial(cfg, 0.5, tmp_path)


def test_a_trial_that_fails_otherwise_says_why_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=1, stdout="", stderr="Traceback\nRuntimeError: a shape is wrong\n"))
    assert refusal(batch_size.trial_of, SimpleNamespace(DEVICE="cpu"), tmp_path, "--probe", "x") == (
        "trying a micro-batch failed with exit status 1: RuntimeError: a shape is wrong.",
        "make check, which finds what is wrong with a step.")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = copy_tree_that_trains_nothing(tmp_path_factory.mktemp("copy") / "tree")
    replace(tree / "scripts/batch_size.py", '\nif __name__ == "__main__":\n', MADE_UP)
    return tree


def configure(tree, *assignments):
    lines = [*TINY[:3], 'ABLATION_STEPS="V0 V1 A0"', 'SEEDS="2"', "BATCH_SIZE=16", "GPT2_GRADIENT_ACCUMULATION=8",
             "BATCH_SIZE_AUTO=y", 'OUTPUT_DIR="out"', *assignments]
    (tree / "dot.config").write_text("".join(f"CONFIG_{line}\n" for line in lines))
    (tree / "trials").unlink(missing_ok=True)


def make(tree, *words, **variables):
    return subprocess.run(["make", f"PYTHON={sys.executable}", *words], cwd=tree, text=True, capture_output=True, timeout=120,
                          env={"PATH": "/usr/bin:/bin", "KCONFIG_CONFIG": "dot.config"} | variables)


def test_make_finds_it_before_the_first_cell_and_never_again(tree):
    configure(tree)
    done = make(tree, "cells")
    assert done.returncode == 0, done.stderr
    assert (tree / "trials").read_text().splitlines() == [
        "128 x 1, 16, None, 0.92", "128 x 1, 16, 4, 0.92", "8 x 16, 16, 4, 0.92", "32 x 4, 16, 4, 0.92", "64 x 2, 16, 4, 0.92"]
    assert re.sub(r"\(\d+ s\)", "(0 s)", done.stderr).splitlines()[:7] == [
        "BATCH_SIZE_AUTO: looking for the largest micro-batch on a GPU", "  V0 adamwspam: 128 sequences: 0.7 GiB (0 s)",
        "  V1 adamwspam: 128 sequences: does not fit (0 s)", "  V1 adamwspam: 8 sequences: 0.2 GiB (0 s)",
        "  V1 adamwspam: 32 sequences: 0.4 GiB (0 s)", "  V1 adamwspam: 64 sequences: 0.7 GiB (0 s)",
        "BATCH_SIZE_AUTO: 64 sequences at once, 2 times a step, all that fits in 92 % of a GPU for V1 adamwspam "
        "(out/batch_size.json)"]
    for folder in (tree / "out").glob("test_*"):
        assert {"CONFIG_BATCH_SIZE=64", "# CONFIG_BATCH_SIZE_AUTO is not set", "CONFIG_GPT2_GRADIENT_ACCUMULATION=2",
                "CONFIG_BATCH_DRAWN=16"} <= set((folder / ".config").read_text().splitlines())
        found = json.loads((folder / "provenance.json").read_text())["symbols"]["GPT2_GRADIENT_ACCUMULATION"]
        assert found == ["2", "out/batch_size.json: all that fits in 92 % of a GPU for V1 adamwspam"]
    (tree / "trials").unlink()
    (tree / "out/batch_size.json").unlink()
    again = make(tree, "cells", "SEEDS=3")
    assert again.returncode == 0 and not (tree / "trials").exists(), again.stderr
    assert "3 of 9 cells to run" in again.stderr and "as in the cells that are there" in again.stderr
    assert "nothing to run" in make(tree, "cells").stderr


def test_cells_side_by_side_share_the_memory_and_what_is_kept_is_not_tried_again(tree):
    configure(tree, "CELLS_PER_GPU=2", 'STUDY="pair"')
    options = {"tree": tree, "KCONFIG_CONFIG": "dot.config", "KABLATE_OUT": "pair"}
    done = run("scripts.plan", "--write", **options)
    assert Path(done.stdout.strip()).read_text() == (tree / "pair/cells.mk").read_text()
    assert "32 sequences at once, 4 times a step" in done.stderr
    (tree / "trials").unlink()
    assert "32 sequences at once" in run("scripts.batch_size", **options).stdout and not (tree / "trials").exists()
    assert "32 sequences at once" in run("scripts.batch_size", "--again", **options).stdout and (tree / "trials").exists()


def test_where_nothing_fits_make_stops_with_one_sentence(tree):
    configure(tree, 'STUDY="large"')
    replace(tree / "scripts/batch_size.py", "peak = (100 +", "peak = (1000 +")
    done = make(tree, "cells", "OUT=large")
    replace(tree / "scripts/batch_size.py", "peak = (1000 +", "peak = (100 +")
    assert done.returncode != 0 and not (tree / "large/cells.mk").exists()
    assert ("error: not even one sequence fits: V0 adamwspam does not train in the memory of a GPU (1.0 GiB).\n"
            "  try: set GPT2_RECOMPUTE=y or a smaller GPT2_BLOCK_SIZE in make menuconfig, then make.\n") in done.stderr


def test_a_study_that_has_it_off_is_told_so(tree):
    configure(tree)
    text = (tree / "dot.config").read_text().replace("CONFIG_BATCH_SIZE_AUTO=y\n", "")
    (tree / "dot.config").write_text(text)
    done = run("scripts.batch_size", tree=tree, KCONFIG_CONFIG="dot.config")
    assert done.returncode == 2 and "error: study custom has BATCH_SIZE_AUTO off.\n" in done.stderr
