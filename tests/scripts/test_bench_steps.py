"""make bench-steps: a row a step whatever happens, numbers shared where the program is, and strict JSON."""

import json
import re

import pytest
import torch

from lib.steps import step_files
from scripts import bench_steps
from tests.harness import ROOT, refusal

QUICK = ["--batch", "1", "--rounds", "2", "--iterations", "1"]


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def bench(capsys, tmp_path, *arguments):
    """({step: row}, what was printed on both streams)."""
    out = tmp_path / "rows.json"
    bench_steps.main([*QUICK, "--out", str(out), *arguments])
    record = json.loads(out.read_text(), parse_constant=refuse_constant)
    return {row["step"]: row for row in record["rows"]}, record, capsys.readouterr()


def test_rows_of_the_baseline_a_variant_and_a_twin(capsys, tmp_path):
    rows, record, said = bench(capsys, tmp_path, "V1", "P0")
    assert list(rows) == ["V0", "V1", "P0"] and not any(row["error"] for row in rows.values()), "the baseline comes first"
    for row in rows.values():
        assert 0 < row["time_min"] <= row["time"] <= row["time_max"] and row["seconds"] > 0 and row["baseline_seconds"] > 0
    assert rows["P0"] == rows["V0"] | {"step": "P0", "as": "V0"} and rows["V0"]["as"] is rows["V1"]["as"] is None
    assert rows["V1"]["parameters"] - rows["V0"]["parameters"] == 2 * 2 * 2, "two gates a head and layer"
    assert rows["V0"]["memory"] == 1 and 1 < rows["V1"]["memory"] < 1.2
    table = [[cell.strip() for cell in text.strip("|").split("|")] for text in said.out.splitlines()]
    assert table[0] == bench_steps.HEADER and [row[0] for row in table[2:]] == ["V0", "V1", "P0"]
    assert [row[-1] for row in table[2:]] == ["", "", "as V0"] and table[2][1:-1] == table[4][1:-1]
    assert said.err.count("\n") == 3 and "2 of 3: V1" in said.err and "3 of 3" not in said.err
    assert record["environment"]["torch"] == torch.__version__ and record["environment"]["compile"] is False
    assert (record["study"], record["baseline"], record["batch"], record["rounds"]) == ("gpt2-ra-ablation+tiny", "V0", 1, 2)


def test_a_broken_step_is_a_row_and_what_is_known_is_kept(capsys, tmp_path, monkeypatch):
    written, file = [], tmp_path / "rows.json"

    class Fails(bench_steps.GPT):
        def __init__(self, cfg):
            written.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
            if cfg.RA_R == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if cfg.RA_R == 9:
                raise RuntimeError("two\nlines | of it")
            super().__init__(cfg)

    monkeypatch.setattr(bench_steps, "GPT", Fails)
    rows, _, said = bench(capsys, tmp_path, "V1@RA_R=64", "V1@RA_R=8", "V1@RA_R=9", "V1@RA_R=9,STREAMS=1", "V1")
    assert {step: row["error"] for step, row in rows.items()} == {
        "V0": None, "V1@RA_R=64": "RA_R=64 is not below the head width 64.", "V1@RA_R=8": "out of memory at a batch of 1",
        "V1@RA_R=9": "RuntimeError: two", "V1@RA_R=9,STREAMS=1": "RuntimeError: two", "V1": None}
    assert all(row["time"] is row["memory"] is None for row in rows.values() if row["error"]) and rows["V1"]["time"]
    assert said.out.count("RuntimeError: two") == 2
    assert written == [0, 0, 2, 3, 5], "before each model all rows so far are on disk"


def test_bad_input_is_refused_before_anything_is_built(tmp_path):
    assert refusal(bench_steps.main, ["V11X"])[0] == "there is no step 'V11X'."
    assert refusal(bench_steps.main, ["--rounds", "0"])[0] == "--rounds 0 is below 1."
    assert refusal(bench_steps.main, ["V0", "--closed", "1.5"])[0] == "--closed 1.5 is no share."
    nowhere = tmp_path / "none"
    assert refusal(bench_steps.main, ["V0", "--out", str(nowhere / "a.json")])[0] == f"there is no folder {nowhere}."


def test_closed_paths_are_left_out_of_the_step_and_their_flops_are_told(capsys, tmp_path):
    """Memory tells whether they are: it is counted from what the step keeps."""
    found = {}
    for closed in ("0", ".5", "1"):
        bench_steps.main(["M1", "--batch", "1", "--rounds", "1", "--iterations", "1", "--closed", closed,
                          "--out", str(tmp_path / "a.json")])
        base, found[closed] = json.loads((tmp_path / "a.json").read_text())["rows"]
        assert base["flops"] is None, "a step without gates has nothing to close"
    assert found["0"]["flops"] is None and "flops" not in bench_steps.line(found["0"])[-1]
    assert bench_steps.line(found[".5"])[-1] == f"flops {found['.5']['flops']:.3f}"
    assert 1 > found[".5"]["flops"] > found["1"]["flops"] > 0
    assert found["0"]["memory"] > found[".5"]["memory"] > found["1"]["memory"]


def test_a_baseline_that_does_not_run_ends_it(monkeypatch):
    def fails(cfg):
        raise RuntimeError("no")

    monkeypatch.setattr(bench_steps, "GPT", fails)
    what, run = refusal(bench_steps.main, ["V1", *QUICK])
    assert what == "the baseline V0 does not run at a batch of 1 (RuntimeError: no)." and run.startswith("give a smaller")


def test_every_program_is_compiled_once_beyond_the_compilers_own_limit(capsys, tmp_path, monkeypatch):
    """V0 twice, then V1: two programs, though the limit was one; the baseline's is not compiled again beside another."""
    from torch._dynamo.testing import CompileCounter

    counter, compile_it = CompileCounter(), torch.nn.Module.compile
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, limit, 1)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_it(self, backend=counter, **options))
    torch._dynamo.reset()
    try:
        rows, record, _ = bench(capsys, tmp_path, "V1", "--compile", "whole", "--progress", "0.5")
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 2 and record["environment"]["compile"] is True and record["progress"] == 0.5
    assert rows["V1"]["error"] is None


@pytest.mark.parametrize("step, gated", [("V0", False), ("V1", True)])
def test_memory_on_the_cpu_is_the_sum_of_its_parts(step, gated):
    """Parameters, as many gradients and two moments (with a counter a tensor), what a sequence leaves for backward, and for V1
    the projections with the gates on them."""
    from lib.config import load

    cfg = load("gpt2-ra-ablation+tiny", step, {"OPTIMIZER_ADAMW": True})
    sizes = {}
    for batch in (2, 3, 4):
        subject = bench_steps.Subject(cfg, torch.device("cpu"), batch, "no")
        subject.block(1)
        sizes[batch] = subject.counted_bytes()
        assert subject.counted_bytes() == sizes[batch], "the same again"
    parameters = list(subject.model.parameters())
    fixed = 4 * sum(4 * p.numel() + 1 for p in parameters)
    a_sequence = sizes[3] - sizes[2]
    assert sizes[4] - sizes[3] == a_sequence > 4 * cfg.GPT2_BLOCK_SIZE * cfg.VOCAB_SIZE, "the logits alone are more"
    projections = gated * 2 * 4 * 3 * cfg.GPT2_N_EMBD ** 2  # of two layers
    assert projections <= sizes[2] - 2 * a_sequence - fixed < projections + 16 * 1024, "the rest is positions and small vectors"


def test_it_is_no_module_of_the_program():
    """The tool stands beside it: nothing imports it."""
    for folder in ("lib", "gpt2", "scripts"):
        assert not [p for p in (ROOT / folder).rglob("*.py") if "bench_steps" in p.read_text() and p.name != "bench_steps.py"]


def test_the_committed_tables_are_what_the_files_beside_them_hold(capsys):
    folder = ROOT / "docs/results/bench-steps"
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    page = (folder / "README.md").read_text()
    assert [path.stem for path in files] == sorted(re.findall(r"^### (\S+)$", page, re.M))
    for path in files:
        bench_steps.main(["--show", str(path)])
        assert capsys.readouterr().out in page
    rows = json.loads((folder / "cpu.json").read_text())["rows"]
    assert not any(row["error"] for row in rows) and {row["step"] for row in rows} <= set(step_files())
