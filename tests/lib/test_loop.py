"""The seams of the loop, on a model that is no GPT-2: what modules may offer it, and which streams it draws from."""

import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib import loop, optimizers, runtime, tracking
from lib.config import load
from lib.data import open_corpus
from lib.streams import cell_seed, stream_seed
from tests.harness import Never, StopAfter

torch.set_num_threads(1)
SIZES = {"GPT2_BLOCK_SIZE": 32, "BATCH_SIZE": 2, "GPT2_EVAL_SAMPLES": 2, "GPT2_EVAL_INTERVAL": 2, "GPT2_LOG_INTERVAL": 2}


class Late(nn.Module):
    """A test's mechanism: a bias per head that acts only after `delay` training steps."""

    def __init__(self, width: int, delay: int, heads: int = 2):
        super().__init__()
        self.delay, self.bias = delay, nn.Parameter(torch.zeros(heads, width // heads))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.asked = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
        return x + self.bias.flatten() if self.steps > self.delay else x + 0 * self.bias.flatten()

    def stats(self) -> dict:
        return {"late_bias": self.bias.mean(1)}

    def inactive(self) -> str | None:
        self.asked += 1
        return f"the bias stayed off (delay of {self.delay} steps)" if self.steps <= self.delay else None


class Bigram(nn.Module):
    def __init__(self, *delays: int, width: int = 8):
        super().__init__()
        self.wte = nn.Embedding(256, width)
        self.layer = nn.ModuleList([Late(width, delay) for delay in delays])
        self.head = nn.Linear(width, 256)

    def forward(self, x, targets=None):
        h = self.wte(x)
        for layer in self.layer:
            h = layer(h)
        logits = self.head(h)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def configuration(**symbols):
    return load("gpt2-ra-ablation+tiny", "V0", SIZES | {"GPT2_MAX_ITERS": 4} | symbols)


def run(folder, model, stop=Never, **symbols):
    """Train; returns (progress, rows)."""
    folder.mkdir(exist_ok=True)
    cfg, progress = configuration(**symbols), loop.Progress()
    clock = loop.Clock(progress, runtime.setup(cfg), time.perf_counter())
    loop.train(cfg, model, optimizers.build(model, cfg), open_corpus(cfg), folder, {"set": {}, "default": {}},
               lambda keep: tracking.MetricsLog(folder, keep), clock, progress, stop)
    return progress, [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


# A mechanism that never acts

def test_a_mechanism_that_never_acted_is_named_in_the_last_row_and_in_the_progress(tmp_path):
    progress, rows = run(tmp_path, Bigram(2, 75, 99))
    assert progress.inactive == "layer.1: the bias stayed off (delay of 75 steps)", "the first that says so, not the first"
    assert [row.get("inactive") for row in rows] == [None] * (len(rows) - 1) + [progress.inactive]
    assert all("inactive" not in row for row in rows[:-1]) and "val_loss" in rows[-1] and rows[-1]["iteration"] == 4


@pytest.mark.parametrize("delay, sentence", [(3, None), (4, "layer.0: the bias stayed off (delay of 4 steps)")])
def test_acting_in_the_last_step_is_enough(tmp_path, delay, sentence):
    model = Bigram(delay)
    progress, rows = run(tmp_path, model)
    assert progress.inactive == sentence and rows[-1].get("inactive") == sentence
    assert bool(model.layer[0].bias.any()) == (sentence is None)


def test_modules_are_asked_once_after_the_last_evaluation(tmp_path, monkeypatch):
    model, evaluations = Bigram(0), []

    def spy(*args, real=loop.evaluate):
        evaluations.append(model.layer[0].asked)
        return real(*args)

    monkeypatch.setattr(loop, "evaluate", spy)
    run(tmp_path, model)
    assert evaluations == [0, 0] and model.layer[0].asked == 1


def test_a_resumed_run_knows_what_happened_before(tmp_path):
    """Two steps, then two: neither part alone reaches the delay of 3."""
    with pytest.raises(loop.Interrupted):
        run(tmp_path, Bigram(3), StopAfter(2))
    progress, rows = run(tmp_path, Bigram(3))
    assert progress.resumed == 1 and progress.inactive is None and "inactive" not in rows[-1]


def test_a_run_that_diverges_at_its_end_says_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *_: math.nan)
    with pytest.raises(loop.Diverged):
        run(tmp_path, Bigram(75), GPT2_EVAL_INTERVAL=100)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] is None and last["inactive"] == "layer.0: the bias stayed off (delay of 75 steps)"


def test_a_model_may_speak_for_itself_and_silence_is_active():
    assert loop.inactive(Late(8, 1)) == "the bias stayed off (delay of 1 steps)"
    assert loop.inactive(nn.Linear(2, 2)) is None and loop.inactive(Bigram()) is None


# Statistics

def test_evaluation_rows_have_a_mean_a_layer_and_logging_rows_do_not(tmp_path):
    model = Bigram(0, 0)
    _, rows = run(tmp_path, model)
    layered = {"late_bias/layer0", "late_bias/layer1"}
    for row in rows:
        assert layered & row.keys() == (layered if "val_loss" in row else set())
        assert {f"late_bias_{kind}" for kind in ("mean", "min", "max", "std")} <= row.keys()
    for n in (0, 1):
        assert rows[-1][f"late_bias/layer{n}"] == pytest.approx(model.layer[n].bias.mean().item(), rel=1e-5)
    assert rows[-1]["late_bias_mean"] == pytest.approx((rows[-1]["late_bias/layer0"] + rows[-1]["late_bias/layer1"]) / 2)


class Fixed(nn.Module):
    def __init__(self, **values):
        super().__init__()
        self.values = values

    def stats(self) -> dict:
        return {name: torch.tensor(value) for name, value in self.values.items()}


@pytest.mark.parametrize("name, layer", [
    ("transformer.h.0.attn", 0), ("transformer.h.11.mlp", 11), ("h.3.heads.7", 3), ("7", 7), ("", None), ("attn", None),
    ("h2.attn", None), ("layer_3.x", None), ("a.-1.b", None),
])
def test_a_layer_is_the_first_whole_number_of_a_name(name, layer):
    assert loop.layer_number(name) == layer
    found = loop.gate_statistics([(name, Fixed(w=[1.0, 2.0]))], by_layer=True)
    assert {k for k in found if "/" in k} == (set() if layer is None else {f"w/layer{layer}"})


def test_what_several_modules_of_a_layer_call_the_same_is_one_mean_over_all_heads():
    found = loop.gate_statistics([("h.0.attn", Fixed(w=[1.0, 2.0, 3.0], v=[5.0])), ("h.0.mlp", Fixed(w=[8.0])),
                                  ("h.1.attn", Fixed(w=[[0.0, 1.0]]))], by_layer=True)
    assert found["w/layer0"] == 3.5 and found["w/layer1"] == 0.5 and found["v/layer0"] == 5.0
    assert (found["w_min"], found["w_max"], found["w_mean"]) == (0.0, 8.0, 2.5)
    assert loop.gate_statistics([], by_layer=True) == {}


@pytest.mark.parametrize("by_layer", [False, True])
def test_all_statistics_come_to_the_host_in_one_transfer(monkeypatch, by_layer):
    transfers = []

    def counted(name, real):
        def spy(self, *args):
            transfers.append(name)
            return real(self, *args)
        return spy

    for name in ("tolist", "item", "cpu", "numpy", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    modules = [(f"h.{n}", Fixed(a=[1.0, 2.0], b=[3.0], c=4.0)) for n in range(12)]
    assert len(loop.gate_statistics(modules, by_layer)) == 3 * 4 + (3 * 12 if by_layer else 0)
    assert transfers == ["tolist"]


# Streams

@given(st.integers(0, 2 ** 31 - 1), st.integers(1, 10 ** 6), st.integers(1, 10 ** 6))
def test_set_0_is_the_seed_itself_and_every_other_set_another_seed(seed, one, other):
    cfg = CFG.replace(SEED=seed, STREAMS=0)
    assert cell_seed(cfg) == seed
    assert cell_seed(cfg.replace(STREAMS=one)) == stream_seed(seed, "streams", one) != seed
    assert (cell_seed(cfg.replace(STREAMS=one)) == cell_seed(cfg.replace(STREAMS=other))) == (one == other)


CFG = configuration()


def test_another_set_of_streams_changes_batches_and_dropout_but_not_the_evaluation_set(tmp_path, monkeypatch):
    drawn = {}
    for streams in (0, 1, 2):
        batches, dropout = drawn[streams] = [], []
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_batch", lambda *a, real=loop.train_batch, to=batches: (to.append(b := real(*a)), b)[1])
            patch.setattr(torch, "manual_seed", lambda s, real=torch.manual_seed, to=dropout: (to.append(s), real(s))[1])
            torch.nn.init.zeros_((model := Bigram()).head.weight)
            progress, _ = run(tmp_path / str(streams), model, STREAMS=streams)
        drawn[streams] = [x.tobytes() for x, _ in batches], dropout, progress.eval_hash
    assert drawn[0][1] == [stream_seed(1337, "dropout", i) for i in range(4)], "set 0 draws as if there were no sets"
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not set(drawn[one][0]) & set(drawn[other][0]) and not set(drawn[one][1]) & set(drawn[other][1])
    assert len({eval_hash for *_, eval_hash in drawn.values()}) == 1
