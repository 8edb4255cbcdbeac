"""make bench-decode: a row a step, context and batch whatever happens; what is counted, and that a cache is put back."""

import json
import re

import pytest
import torch

from gpt2.model import GPT
from lib.config import Study, load
from lib.kconfig import Assignment
from lib.steps import step_files
from scripts import bench_decode
from tests.harness import ROOT, refusal

torch.set_num_threads(1)
QUICK = ["--rounds", "2", "--tokens", "2", "--context", "16", "--batch", "2"]
TINY = "gpt2-ra-ablation+tiny"


BANDWIDTH = bench_decode.bandwidth_of


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr(bench_decode, "bandwidth_of", lambda device, megabytes: BANDWIDTH(device, 1, rounds=1))


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def bench(capsys, tmp_path, *arguments):
    """(rows, the whole record, what was printed on both streams)."""
    out = tmp_path / "rows.json"
    bench_decode.main([*QUICK, "--out", str(out), *arguments])
    record = json.loads(out.read_text(), parse_constant=refuse_constant)
    return record["rows"], record, capsys.readouterr()


def test_rows_of_the_baseline_and_of_a_smaller_cache(capsys, tmp_path):
    rows, record, said = bench(capsys, tmp_path, "G2N", "--batch", "1", "2", "--context", "16", "32")
    assert [(r["step"], r["context"], r["batch"]) for r in rows] == [
        (s, c, b) for c in (16, 32) for s in ("V0", "G2N") for b in (1, 2)], "the baseline comes first"
    for row in rows:
        assert row["error"] is None and row.keys() == {"step", "context", "batch", *bench_decode.EMPTY}
        for name in bench_decode.NAMES:
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
        with torch.device("meta"):
            cache = GPT(load(TINY, row["step"])).new_cache(row["batch"], row["context"])
        assert row["cache_bytes"] == cache.nbytes() and row["floor_share"] > 0
        held = 4 * row["parameters"] + row["cache_bytes"]
        assert held < row["peak_decoding_bytes"] < row["peak_prompt_bytes"] < 1.5 * held
    assert [r["cache"] for r in rows] == [1, 1, 42 / 256, 42 / 256] * 2, "two latents of 21 for keys and values of 128"
    table = [[cell.strip() for cell in text.strip("|").split("|")] for text in said.out.splitlines()]
    assert table[0] == bench_decode.HEADER and [row[:3] for row in table[2:4]] == [["V0", "16", "1"], ["V0", "16", "2"]]
    assert (record["eager"], record["dtype"], record["baseline"], record["study"]) == (True, "float32", "V0", TINY)
    bench_decode.main(["--show", str(tmp_path / "rows.json")])
    shown = capsys.readouterr().out
    assert shown.startswith("### rows\n\n") and "an eager loop of 2 tokens a block, 2 rounds; memory moves" in shown
    assert [[cell.strip() for cell in text.strip("|").split("|")] for text in shown.splitlines()[4:]][2:] == table[2:]


def test_a_context_beyond_the_studys_is_measured_on_a_model_of_that_size(capsys, tmp_path):
    rows, _, _ = bench(capsys, tmp_path, "V0", "--context", "128", "144")
    assert rows[1]["parameters"] - rows[0]["parameters"] == (144 - 128) * 128, "as many more positions"
    assert rows[1]["cache_bytes"] == rows[0]["cache_bytes"] * 144 / 128
    cfg = bench_decode.sized(Study(TINY, overrides=[Assignment("GPT2_MLP_EXPANSION", "2", "x")]), "V0", 144)
    assert (cfg.GPT2_BLOCK_SIZE, cfg.GPT2_MLP_EXPANSION) == (144, 2), "overrides of the study stay"


def test_a_broken_step_is_a_row_and_what_is_known_is_kept(capsys, tmp_path, monkeypatch):
    class Fails(bench_decode.GPT):
        def __init__(self, cfg):
            if cfg.RA_R == 9:
                raise RuntimeError("two\nlines | of it")
            super().__init__(cfg)

        def new_cache(self, batch_size, *rest):
            if isinstance(self, Fails) and self.step == 8 and batch_size == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().new_cache(batch_size, *rest)

    build = bench_decode.build

    def built(cfg, device, dtype):
        model = build(cfg, device, dtype)
        model.step = cfg.RA_R
        return model

    monkeypatch.setattr(bench_decode, "GPT", Fails)
    monkeypatch.setattr(bench_decode, "build", built)
    rows, _, said = bench(capsys, tmp_path, "V1@RA_R=64", "V1@RA_R=8", "V1@RA_R=9", "V1", "--batch", "1", "2")
    assert [(r["step"], r["batch"], r["error"]) for r in rows] == [
        ("V0", 1, None), ("V0", 2, None), ("V1@RA_R=64", None, "RA_R=64 is not below the head width 64."),
        ("V1@RA_R=8", 1, None), ("V1@RA_R=8", 2, "out of memory at a batch of 2"),
        ("V1@RA_R=9", None, "RuntimeError: two"), ("V1", 1, None), ("V1", 2, None)]
    assert all(row["speed"] is row["cache_bytes"] is None for row in rows if row["error"])
    assert said.out.count("RuntimeError: two") == 1


def test_bad_input_is_refused_before_anything_is_built(tmp_path):
    assert refusal(bench_decode.main, ["V11X"])[0] == "there is no step 'V11X'."
    assert refusal(bench_decode.main, ["--rounds", "0"])[0] == "--rounds 0 is below 1."
    assert refusal(bench_decode.main, ["--context", "16", "1"])[0] == "--context 1 is below 2."
    assert refusal(bench_decode.main, ["--batch", "0"])[0] == "--batch 0 is below 1."
    nowhere = tmp_path / "none"
    assert refusal(bench_decode.main, ["V0", "--out", str(nowhere / "a.json")])[0] == f"there is no folder {nowhere}."
    assert refusal(bench_decode.main, ["V0", *QUICK, "--compile", "whole"]) == (
        "--compile makes a program of one position, and a loop goes over many.",
        "compile only what is captured: on a GPU, without --eager.")


def test_a_baseline_that_does_not_run_ends_it(monkeypatch):
    def fails(cfg):
        raise RuntimeError("no")

    monkeypatch.setattr(bench_decode, "GPT", fails)
    assert refusal(bench_decode.main, ["V1", *QUICK]) == (
        "the baseline V0 does not run at a context of 16 (RuntimeError: no).", "leave the context out with --context.")


def test_without_steps_every_kind_of_cache_is_there_once():
    found = bench_decode.kinds_of_caches(Study(TINY), "V0")
    assert found[0] == "V0" and {"G2", "G2N", "L6"} <= set(found) and not {"V1", "B0", "L7", "P0"} & set(found)
    assert len(set(found)) == len(found) < len(step_files())
    assert bench_decode.kinds_of_caches(Study(TINY), "V1")[0] == "V1", "the baseline stands for its kind"


def subject(step, **options):
    model = bench_decode.build(load(TINY, step), torch.device("cpu"), torch.float32)
    return bench_decode.Subject(model, **{"batch": 2, "context": 12, "steps": 3, "eager": True, "compiled": "no"} | options)


def test_the_likeliest_token_is_the_first_largest_of_the_vocabulary():
    logits = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)).round()  # with ties
    logits[:, 130:] = 9.0
    assert torch.equal(bench_decode.likeliest(logits, 130), logits[:, :130].argmax(-1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("step", ["V0", "G2", "L6"])
def test_a_block_decodes_the_last_positions_and_every_block_the_same(step):
    """Each from the same filled cache, which is put back in positions and in numbers."""
    s = subject(step)
    s.fill()
    assert s.cache.length == 9
    seen = []

    def watched(token, cache, last):
        at = cache.length
        logits = GPT.forward(s.model, token, cache=cache, last=last)[0]
        seen.append((at, token.clone(), logits.clone()))
        return logits, None

    s.model.forward = watched
    first = s.token.clone()
    for _ in range(2):
        s.token.copy_(first)
        s.block()
    assert [at for at, _, _ in seen] == [9, 10, 11] * 2
    for (_, a, b), (_, c, d) in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    tokens = torch.cat([s.tokens[:, :9], *(token for _, token, _ in seen[:2])], 1)
    torch.testing.assert_close(seen[1][2], GPT.forward(s.model, tokens)[0][:, -1:], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("step", ["V0", "G2"])
def test_what_is_captured_is_the_step_at_the_last_position(step, monkeypatch):
    """With stand-ins for CUDA: after the warm-up the cache is put back, and a block is so many replays and no more steps."""
    s, at, replays = subject(step, steps=5, eager=False), [], []

    class Stands:
        def __init__(self, *_):
            pass

        wait_stream = __enter__ = lambda self, *_: None
        __exit__ = lambda self, *_: False  # noqa: E731
        replay = lambda self: replays.append(1)  # noqa: E731

    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Stands)
    s.fill()
    step = s.next
    s.next = lambda token, cache: at.append(cache.length) or step(token, cache)
    s.prepare()
    assert at == [11] * (bench_decode.WARMUP + 1) and len(replays) == 5
    s.block()
    assert len(at) == bench_decode.WARMUP + 1 and len(replays) == 10


def test_a_loop_leaves_a_prompt_of_one_token():
    assert subject("V0", steps=50).positions == 11 and subject("V0", steps=50, eager=False).positions == 1


def test_a_learned_direction_is_decided_before_anything_is_timed():
    """An undecided layer computes both, and a trained cell's is decided."""
    model = bench_decode.build(load(TINY, "RAMLA0"), torch.device("cpu"), torch.float32)
    assert [block.attn.reciprocal for block in model.transformer.h] == [False, False]


def test_with_a_study_its_own_steps_are_timed_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_decode, "kinds_of_caches", lambda study, first: [first])
    _, record, _ = bench(capsys, tmp_path, "--study", "gpt2-kv-tying-ablation+tiny")
    assert [row["step"] for row in record["rows"]] == ["V0", "KT1"]


def test_gates_are_folded_before_anything_is_timed():
    model = bench_decode.build(load(TINY, "V3"), torch.device("cpu"), torch.bfloat16)
    gates = [p for name, p in model.named_parameters() if ".gate_" in name]
    assert len(gates) == 8 and all((p == 1).all() for p in gates)
    assert not model.training and not any(p.requires_grad or p.dtype != torch.bfloat16 for p in model.parameters())


def test_it_is_no_module_of_the_program():
    """The tool stands beside it: nothing imports it."""
    for folder in ("lib", "gpt2", "scripts"):
        assert not [p for p in (ROOT / folder).rglob("*.py")
                    if "bench_decode" in p.read_text() and p.name != "bench_decode.py"]


def test_the_committed_tables_are_what_the_files_beside_them_hold(capsys):
    folder = ROOT / "docs/results/bench-decode"
    page = (folder / "README.md").read_text()
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    assert [path.stem for path in files] == sorted(re.findall(r"^### (\S+)$", page, re.M))
    for path in files:
        bench_decode.main(["--show", str(path)])
        assert capsys.readouterr().out in page
        assert all(row["error"] is None and row["floor_share"] < 1 for row in json.loads(path.read_text())["rows"])
