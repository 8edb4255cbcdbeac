"""make bench-ranks: a row for each way to exchange gradients, of ranks that really share a step, and refusals in words."""

import json

import pytest

from scripts import bench_ranks
from tests.harness import refusal, run


def test_two_ranks_share_a_step(tmp_path, capsys):
    out = tmp_path / "rows.json"
    done = run("scripts.bench_ranks", "V1", "--ranks", "2", "--batch", "1", "--rounds", "1", "--iterations", "1", "--buckets",
               "25", "--out", out)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert (record["ranks"], record["batch"], record["block_size"], record["compiled"]) == (2, 1, 128, "no")
    assert [(row["step"], row["bucket_mib"], row["static"]) for row in record["rows"]] == [
        ("V1", 25, False), ("V1", 25, True)]
    for row in record["rows"]:
        assert row["speed"] == pytest.approx(row["one_seconds"] / row["seconds"], rel=.5) and row["speed"] > 0
        assert row["kernels"] is None, "a CPU has none"
    bench_ranks.main(["--show", str(out)])
    shown = capsys.readouterr().out
    assert done.stdout.splitlines()[2:] == shown.splitlines()[-2:], "the same rows as while it ran, once and by one rank"
    assert "2 x 1 x 128 tokens a step" in shown


def test_efficiency_and_reduction_of_a_row():
    kernels = {"ms": 9.0, "classes": {bench_ranks.kernels.REDUCTION: {"ms": 2.5}}}
    row = {"step": "V0", "bucket_mib": 25, "static": True, "one_seconds": .02, "seconds": .011, "speed": 1.8, "speed_min": 1.7,
           "speed_max": 1.9, "kernels": kernels}
    assert bench_ranks.line(row, 2) == ["V0", "25, static", "20.0", "11.0", "1.800", "1.700 .. 1.900", "0.900", "2.50", "9.00"]


@pytest.mark.parametrize("arguments, what, todo", [
    (["--ranks", "1"], "one rank shares its step with nobody.", "give --ranks 2 or more, on as many GPUs."),
    (["--buckets", "0"], "--buckets 0 is below 1.", "leave it out for the default."),
    (["V99"], "there is no step 'V99'", "did you mean"),
])
def test_bad_input(arguments, what, todo):
    error = refusal(bench_ranks.main, arguments)
    assert what in str(error) and todo in str(error)
