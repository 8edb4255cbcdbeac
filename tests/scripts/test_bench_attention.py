"""make bench-attention: what each design computes, the steps that are taken, and rows whatever happens."""

import json

import pytest
import torch
import torch.nn.functional as F

from gpt2.attention.unified_ra import UnifiedRAttention
from gpt2.layers import init_weights
from lib.config import Study
from scripts import bench_attention
from scripts.benching.lost_designs import DESIGNS, Sinkhorn, TwoCalls
from tests.harness import ROOT, refusal

torch.set_num_threads(1)
SMALL = ["--batch", "1", "--heads", "2", "--context", "8", "--head-dim", "16"]
QUICK = [*SMALL, "--rounds", "2", "--iterations", "1"]
TINY = "gpt2-ra-ablation+tiny"


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def bench(capsys, tmp_path, *arguments):
    """(rows, the whole record, what was printed on both streams)."""
    out = tmp_path / "rows.json"
    bench_attention.main([*QUICK, "--out", str(out), *arguments])
    record = json.loads(out.read_text(), parse_constant=refuse_constant)
    return record["rows"], record, capsys.readouterr()


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_of_the_baseline_a_step_and_every_design(capsys, tmp_path):
    rows, record, said = bench(capsys, tmp_path, "V1")
    names = ["V0", "V1", "two products", "concatenation", "gates on q, k", "two SDPA calls", "Sinkhorn"]
    assert [(r["pass"], r["arm"]) for r in rows] == [(p, n) for p in ("forward", "forward+backward") for n in names]
    for row in rows:
        assert row["error"] is None and (row["dtype"], row["mode"]) == ("float32", "eager")
        for name in ("seconds", "time"):
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
    memory = {(r["pass"], r["arm"]): r["memory"] for r in rows}
    assert memory["forward", "V0"] == memory["forward+backward", "V0"] == 1 < memory["forward", "V1"]
    assert all(memory["forward+backward", n] > 0.9 for n in names)
    assert rows[7]["memory_bytes"] > rows[0]["memory_bytes"], "a backward pass needs what the forward pass left"
    table = cells(said.out)
    assert table[0] == bench_attention.HEADER and [row[0] for row in table[2:16]] == names * 2
    best = table[16:]
    assert best[0] == bench_attention.BEST_HEADER and len(best) == 2 + 14 and best[2][-1] == "1.000"
    bench_attention.main(["--show", str(tmp_path / "rows.json")])
    shown = capsys.readouterr().out
    assert cells(shown)[2:16] == table[2:16] and cells(shown)[18:] == best[2:]
    assert "batch 1, 2 heads of 16, 8 tokens, rank 4; 2 rounds of 1 calls; relative to V0." in shown


def test_the_best_is_over_types_and_modes_against_the_baselines_best():
    def row(arm, dtype, mode, seconds):
        return {"arm": arm, "dtype": dtype, "mode": mode, "pass": "forward", "seconds": seconds}

    rows = [row("V0", "float16", "eager", 2.0), row("V0", "bfloat16", "compiled", 1.0), row("R", "float16", "eager", 1.5),
            row("R", "float16", "compiled", None), row("R", "bfloat16", "compiled", 3.0)]
    assert cells(bench_attention.best_table(rows, "V0"))[2:] == [
        ["V0", "forward", "1000.000", "bfloat16, compiled", "1.000"], ["R", "forward", "1500.000", "float16, eager", "1.500"]]


# The designs

def modules(name, rank=4):
    """The folded module and a design with the same numbers, and gates that are no longer those of the start."""
    made = [cls(64, 2, rank, init_seed=None) for cls in (UnifiedRAttention, DESIGNS[name])]
    for module in made:
        init_weights(module, 3)
        with torch.no_grad():
            module.c_attn.weight.mul_(10)  # scores that matter
            module.c_attn.bias.normal_(generator=torch.Generator().manual_seed(1))
            module.gate_std.copy_(torch.tensor([0.9, 0.7]))
            module.gate_rec.copy_(torch.tensor([0.5, 1.3]))
    return made


@pytest.mark.parametrize("name", [name for name in DESIGNS if DESIGNS[name] not in (TwoCalls, Sinkhorn)])
def test_three_designs_compute_what_the_folded_form_does(name):
    """Outputs and gradients, of the gates too."""
    folded, other = modules(name)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (folded, other):
        y = module(x)
        y.square().sum().backward()
        results.append((y, {n: p.grad for n, p in module.named_parameters()}))
    (y, grads), (z, others) = results
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    assert grads.keys() == others.keys() and {"gate_std", "gate_rec"} < grads.keys()
    for key in grads:
        torch.testing.assert_close(grads[key], others[key], rtol=1e-3, atol=1e-4)


def test_two_calls_mix_two_attentions():
    _, module = modules("two SDPA calls")
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (t.unflatten(2, (2, 32)).transpose(1, 2) for t in module.c_attn(x).chunk(3, 2))
    std, low = (F.scaled_dot_product_attention(a, b, v, is_causal=True) for a, b in ((q, k), (k, q)))
    w_std, w_rec = torch.tensor([0.81, 0.49]), torch.tensor([0.25, 1.69])
    mixed = w_std[:, None, None] * std + w_rec[:, None, None] * low
    torch.testing.assert_close(module(x), module.c_proj(mixed.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    """Causal weights whose rows and columns all sum to one are the identity; three iterations are on the way there."""
    _, module = modules("Sinkhorn")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5, 32, generator=generator) for _ in range(2))
    eye = torch.eye(5).expand(1, 2, 5, 5)
    weights = module.attend(q, k, eye)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5))
    assert not weights.triu(1).any()
    off = [(weights.sum(-2) - 1).abs().max()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sinkhorn, "ITERATIONS", 30)
        off.append((module.attend(q, k, eye).sum(-2) - 1).abs().max())
    assert off[1] < off[0] / 2


@pytest.mark.parametrize("name", DESIGNS)
def test_no_design_leaves_the_type_of_autocast(name):
    """A gate in float32 would make the scores, or queries and keys, float32 and the design slower than it need be."""
    _, module = modules(name)
    seen = []
    attend = type(module).attend
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: seen.extend((q, k, v)) or q)
        out = attend(module, *module.project(torch.randn(1, 8, 64)))
    assert out.dtype == torch.bfloat16 and all(t.dtype == torch.bfloat16 for t in (*seen, *module.gates(out)))


# What is measured

def test_without_steps_each_kind_of_attention_is_there_once():
    assert bench_attention.kinds_of_attention(Study(TINY), "V0") == ["V0", "V1", "V2"], "V3-V6 change the MLP"


def test_a_step_keeps_its_own_attention_at_the_sizes_of_the_bench():
    cfg = Study("gpt2-ra-ablation").resolve("V1@RA_R=8").config
    module = bench_attention.attention_of(cfg)
    assert module.R == 8 and module.c_attn.weight.std() > 0.01
    torch.testing.assert_close(module.c_attn.weight, bench_attention.attention_of(cfg).c_attn.weight, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_a_call_computes_in_its_type_and_leaves_nothing(dtype, backward):
    module = modules("concatenation")[0]
    subject, grads = bench_attention.Subject(module, (1, 8, 64), torch.device("cpu"), dtype, False), []
    for p in module.parameters():
        p.register_hook(lambda grad: grads.append(grad.dtype))
    y = subject.call(backward)
    assert y.dtype == dtype and y.requires_grad == backward
    assert grads == [torch.float32] * 6 * backward, "every parameter, in its own type"
    assert subject.x.grad is None and all(p.grad is None for p in module.parameters())


def test_compiled_is_one_program_a_module_and_pass(capsys, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, compile_it = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_it(self, backend=counter, **options))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, limit, 1)
    torch._dynamo.reset()
    try:
        rows, record, _ = bench(capsys, tmp_path, "V0", "--compile")
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 2 * 6, "the baseline, which is there twice, and five designs"
    assert {row["mode"] for row in rows} == {"compiled"} and not any(row["memory_bytes"] or row["error"] for row in rows)
    assert record["environment"]["compile"] is True


def test_what_does_not_run_is_a_row(capsys, tmp_path):
    rows, _, said = bench(capsys, tmp_path, "V0", "--rank", "16")
    assert [row["error"] for row in rows] == [None, *["ValueError: R 16 must be at least 1 and below head_dim 16"] * 5] * 2
    assert said.out.count("ValueError") == 10 and len(cells(said.out)) == 2 + 12 + 2 + 2


def test_bad_input_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    assert refusal(bench_attention.main, ["V11X"])[0] == "there is no step 'V11X'."
    assert refusal(bench_attention.main, [*QUICK, "V1@RA_R=16"])[0] == "RA_R=16 is not below the head width 16."
    assert refusal(bench_attention.main, ["--head-dim", "0"])[0] == "--head-dim 0 is below 1."
    nowhere = tmp_path / "none"
    assert refusal(bench_attention.main, ["--out", str(nowhere / "a.json")])[0] == f"there is no folder {nowhere}."

    def fails(cfg):
        raise RuntimeError("no")

    monkeypatch.setattr(bench_attention, "built", fails)
    assert refusal(bench_attention.main, [*QUICK, "V0"]) == (
        "the baseline's attention does not run (RuntimeError: no).", "give a smaller --batch or --context, or another --dtype.")


def test_it_is_no_module_of_the_program():
    """The tool and its designs stand beside it: nothing imports them."""
    for folder in ("lib", "gpt2", "scripts"):
        found = [p.name for p in (ROOT / folder).rglob("*.py")
                 if "bench_attention" in p.read_text() or "lost_designs" in p.read_text()]
        assert sorted(found) == (["bench_attention.py"] if folder == "scripts" else [])
