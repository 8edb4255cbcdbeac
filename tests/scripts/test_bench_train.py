"""make bench-train: arms side by side on the same batches, a peer of the user's own, losses that are the loop's."""

import json

import numpy as np
import pytest
import torch

from gpt2.model import GPT
from lib import loop
from lib.config import Study, load
from lib.data import EvalSet, open_corpus
from lib.kconfig import Assignment
from scripts import bench_train
from scripts.benching import contenders
from scripts.benching.peer import USAGE, take_start
from tests.harness import ROOT, refusal
from tests.lib.test_loop import run as run_loop
from tests.scripts.benching.peers import MODEL

torch.set_num_threads(1)
QUICK = ["--batch", "1", "--rounds", "2", "--iterations", "1"]
TINY = "gpt2-ra-ablation+tiny"
CPU = torch.device("cpu")


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def bench(capsys, tmp_path, *arguments):
    """({arm: row}, the whole record, what was printed on both streams)."""
    out = tmp_path / "rows.json"
    bench_train.main([*QUICK, "--out", str(out), *map(str, arguments)])
    record = json.loads(out.read_text(), parse_constant=refuse_constant)
    return {row["arm"]: row for row in record["rows"]}, record, capsys.readouterr()


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_of_the_baseline_a_step_and_a_peer(capsys, tmp_path, peer_file):
    rows, record, said = bench(capsys, tmp_path, "V1", "--peer", peer_file, "--losses", "3", "--seeds", "2")
    assert list(rows) == ["V0", "V1", "peer/model.py"]
    for row in rows.values():
        assert row.keys() == {"arm", "batch", *bench_train.EMPTY} and row["error"] is None
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"] and row["compile_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"]) and row["mfu"] is row["kernels"] is None
        assert [one["seed"] for one in row["losses"]] == record["seeds"] == [1337, 1338]
        assert all(len(one["curve"]) == 3 and 5 < one["curve"][0] < 6 for one in row["losses"])
        assert row["val_loss_std"] > 0 and row["val_loss"] == pytest.approx(np.mean([o["val_loss"] for o in row["losses"]]))
    ours, step, theirs = rows.values()
    assert ours["time"] == 1 and step["time"] > 0 and theirs["time"] > 0
    assert ours["parameters"] == theirs["parameters"] == step["parameters"] - 8 and ours["memory"] == 1
    assert theirs["memory"] == pytest.approx(1, abs=0.1) and 1 < step["memory"] < 1.2
    # The same function from the same start on the same batches.
    assert theirs["remark"] == "" and theirs["val_loss"] == pytest.approx(ours["val_loss"], abs=1e-5)
    for one, other in zip(ours["losses"], theirs["losses"], strict=True):
        assert one["curve"] == pytest.approx(other["curve"], abs=2e-5)
    assert ours["losses"][0]["curve"] != ours["losses"][1]["curve"], "another start and other batches"
    assert record["peer"]["name"] == "peer/model.py" and not record["peer"]["own_optimizer"]
    assert str(tmp_path) not in json.dumps(record)
    assert "a peer that talks" in said.err and "a peer that talks" not in said.out
    table = cells(said.out)
    assert table[0] == bench_train.HEADER and [row[0] for row in table[2:]] == list(rows)
    bench_train.main(["--show", str(tmp_path / "rows.json")])
    shown = capsys.readouterr().out
    assert cells(shown)[2:] == table[2:] and "losses after 3 steps" in shown and shown.startswith("### rows\n")


def test_the_losses_are_those_of_the_training_loop(tmp_path):
    """A cell of the same seed, steps and settings, logged at every step."""
    symbols = {"OPTIMIZER_ADAMW": True, "GPT2_LOG_INTERVAL": 1, "GPT2_MAX_ITERS": 4, "GPT2_EVAL_INTERVAL": 9, "GRAD_CLIP": 0.5}
    sizes = {"GPT2_BLOCK_SIZE": 32, "BATCH_SIZE": 2, "GPT2_EVAL_SAMPLES": 2}
    cfg = load(TINY, "V0", sizes | symbols)
    progress, rows = run_loop(tmp_path, GPT(cfg), **symbols)
    given = {name: "y" if value is True else str(value) for name, value in (sizes | symbols).items()}
    study = Study(TINY, overrides=[Assignment(name, value, "here") for name, value in given.items()])
    corpus, (arm,) = open_corpus(cfg), contenders.arms_of(study, ["V0"], None)

    def losses(*seeds):
        return contenders.losses_of(arm, CPU, seeds, lambda seed: contenders.batches_of(corpus, 256, seed, 2, 32), 4, False,
                                    EvalSet(corpus.val, 2, 2, 32, 256))

    other, found = losses(cfg.SEED + 1, cfg.SEED)
    assert losses(cfg.SEED) == [found] and other["curve"] != found["curve"], "the second start is as new as the first"
    assert [row["train_loss_step"] for row in rows if "train_loss_step" in row] == pytest.approx(found["curve"], abs=6e-6)
    assert found["val_loss"] == pytest.approx(progress.val_loss, abs=1e-7)
    assert found["train_loss"] == pytest.approx(found["curve"][-1], abs=6e-6), "a tenth of four is one"


def test_every_arm_sees_the_same_batches_in_order(capsys, tmp_path, monkeypatch, peer_file):
    seen = []
    monkeypatch.setattr(contenders, "to_device", lambda batch, device: seen.append(batch) or loop.to_device(batch, device))
    bench(capsys, tmp_path, "--peer", peer_file)
    warm, total = 3, 2 * (3 + 2) + 2 + 1
    assert len(seen) == total, "of two arms: three to warm up, two rounds of one, one for memory; and one more of the first"
    first = seen[:warm] + [seen[i] for i in (6, 8, 10, 11)]
    second = seen[warm:6] + [seen[i] for i in (7, 9, 12)]
    for (x, y), (u, v) in zip(first, second, strict=False):
        assert np.array_equal(x, u) and np.array_equal(y, v)
    assert not np.array_equal(first[0][0], first[1][0]) and np.array_equal(first[0][0][:, 1:], first[0][1][:, :-1])


def test_a_folder_of_tokens_is_trained_on(capsys, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for split, count in (("train", 4000), ("val", 700)):
        np.arange(count, dtype=np.uint16).tofile(folder / f"{split}.bin")
    _, record, _ = bench(capsys, tmp_path, "--data", folder, "--losses", "1", "--set", "MODEL_CUSTOM=y", "GPT2_N_LAYER=1",
                         "GPT2_N_HEAD=1", "GPT2_N_EMBD=8", "GPT2_BLOCK_SIZE=16")
    assert (record["data"], record["block_size"]) == ("local", 16) and str(folder) not in json.dumps(record)
    assert record["eval_tokens"] == 5 * 8 * 16 and "GPT2_N_LAYER=1" in record["settings"]
    start, = record["rows"][0]["losses"]
    assert start["curve"][0] == pytest.approx(np.log(50304), abs=0.05), "the vocabulary of GPT-2, padded"


def test_dropout_and_optimizer_are_the_same_for_all():
    """Whatever the study and the step say."""
    equal = {"GPT2_DROPOUT": "0.0", "OPTIMIZER_ADAMW": "y", "MODEL_TINY": "y"}
    study = Study("gpt2-ra-ablation", overrides=[Assignment(name, value, "here") for name, value in equal.items()])
    for step in ("V0", "S1"):
        cfg, model, optimizer, _ = contenders.arms_of(study, [step], None)[0].make(CPU, 1)
        assert cfg.GPT2_DROPOUT == 0 and type(optimizer) is torch.optim.AdamW and cfg.SEED == 1
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_a_peer_of_other_parameters_starts_from_its_own_and_says_so(capsys, tmp_path, peer_file):
    peer_file.write_text(MODEL.replace("self.c_fc", "self.up"))
    rows, _, said = bench(capsys, tmp_path, "--peer", peer_file)
    assert rows["peer/model.py"]["remark"] == "a start of its own" and cells(said.out)[-1][-1] == "a start of its own"
    model = torch.nn.Linear(2, 2)
    start = model.weight.clone()
    assert not take_start(model, torch.nn.Linear(2, 3)) and torch.equal(model.weight, start)


def test_a_peer_that_is_not_there_and_other_bad_input(tmp_path):
    assert refusal(bench_train.main, ["--peer", str(tmp_path / "no.py")]) == (f"there is no peer {tmp_path / 'no.py'}.", USAGE)
    (tmp_path / "peer.txt").write_text(MODEL)
    assert refusal(bench_train.main, ["--peer", str(tmp_path / "peer.txt")])[0] == f"{tmp_path / 'peer.txt'} is no Python file."
    assert refusal(bench_train.main, ["V11X"])[0] == "there is no step 'V11X'."
    assert refusal(bench_train.main, ["V1@RA_R=64"])[0] == "RA_R=64 is not below the head width 64."
    assert refusal(bench_train.main, ["--losses", "0"])[0] == "--losses 0 is below 1."
    assert "does not exist" in refusal(bench_train.main, ["--data", str(tmp_path / "none")])[0]


def test_an_arm_that_does_not_run_is_a_row(capsys, tmp_path, monkeypatch):
    class Large(contenders.GPT):
        def __init__(self, cfg):
            if cfg.RA_R == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(cfg)

    monkeypatch.setattr(contenders, "GPT", Large)
    rows, _, said = bench(capsys, tmp_path, "V1@RA_R=8", "V1", "--losses", "1")
    assert {arm: row["error"] for arm, row in rows.items()} == {
        "V0": None, "V1@RA_R=8": "out of memory at a batch of 1", "V1": None}
    assert rows["V1@RA_R=8"]["seconds"] is rows["V1@RA_R=8"]["val_loss"] is None and rows["V1"]["val_loss"]
    assert cells(said.out)[3][-1] == "out of memory at a batch of 1"


def test_kernel_times_stand_below_the_rows_and_their_lack_is_said(capsys, tmp_path, monkeypatch):
    """With a stand-in for the profiler, which needs a GPU."""
    study, steps = Study(TINY), []

    def profile(device, step, count):
        if steps:
            raise RuntimeError("the profiler saw no kernel")
        steps.extend(step() for _ in range(count))
        return bench_train.kernels.tally([("nvjet_a", 6000.0), ("odd", 3000.0)], count)

    monkeypatch.setattr(bench_train.kernels, "profile", profile)
    batches = contenders.batches_of(None, 256, 1, 1, 128)
    rows = bench_train.timed(contenders.arms_of(study, ["V0", "V1"], None), CPU, 1, batches, 1, 1, 1, False, 3, 1e12, print)
    assert len(steps) == 3 and rows[0]["kernels"]["ms"] == 3 and rows[1]["kernels"] is None and rows[1]["seconds"]
    assert rows[0]["mfu"] == pytest.approx(rows[0]["flops_per_token"] * rows[0]["tokens_per_second"] / 1e12)
    assert rows[1]["remark"] == "no kernel times: RuntimeError: the profiler saw no kernel"
    page = bench_train.kernel_table(rows)
    assert ["kernels, ms a step", "V0, 1"] in cells(page) and ["matmul", "2.00"] in cells(page)
    assert bench_train.kernel_table(rows[1:]) == ""


def test_several_batches_are_kept_as_they_are_known(capsys, tmp_path, monkeypatch):
    written, file, timed = [], tmp_path / "rows.json", bench_train.timed

    def watched(*rest):
        written.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
        return timed(*rest)

    monkeypatch.setattr(bench_train, "timed", watched)
    _, record, _ = bench(capsys, tmp_path, "--batch", "1", "2")
    assert [row["batch"] for row in record["rows"]] == [1, 2] and written == [0, 1]


def test_a_second_model_of_an_arm_runs_the_program_of_the_first(capsys, tmp_path, monkeypatch):
    """Two arms, each built again for two starts, are two programs."""
    from torch._dynamo.testing import CompileCounter

    counter, compile_it = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_it(self, backend=counter, **options))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, limit, 1)
    torch._dynamo.reset()
    try:
        _, record, _ = bench(capsys, tmp_path, "V1", "--compile", "--losses", "2", "--seeds", "2")
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 2 and record["environment"]["compile"] is True


def test_it_is_no_module_of_the_program():
    """The tool stands beside it: nothing imports it."""
    for folder in ("lib", "gpt2", "scripts"):
        assert not [p for p in (ROOT / folder).rglob("*.py") if "import bench_train" in p.read_text()]
