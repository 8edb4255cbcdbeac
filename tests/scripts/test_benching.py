"""What the benches share: files that are shown again."""

import json

import pytest

from scripts import bench_attention, bench_decode, bench_steps, bench_train, compile_matrix
from tests.harness import refusal

AGAIN = "give a file that --out wrote."


@pytest.mark.parametrize("bench", [bench_attention, bench_decode, bench_steps, bench_train, compile_matrix])
def test_a_file_that_is_none_of_a_bench_is_refused_in_a_sentence(bench, tmp_path):
    path = tmp_path / "x.json"
    assert refusal(bench.main, ["--show", str(path)]) == (f"{path} cannot be read: No such file or directory.", AGAIN)
    for content in ("", "[]", "{}", "7", "null", '{"rows": 1, "environment": {}}', "[" * 100_000, json.dumps({"rows": [{}]})):
        path.write_text(content)
        assert refusal(bench.main, ["--show", str(path)]) == (f"{path} is not what this bench writes.", AGAIN), content[:40]
    path.write_bytes(b"\xff\xfe")
    assert refusal(bench.main, ["--show", str(path)])[1] == AGAIN
