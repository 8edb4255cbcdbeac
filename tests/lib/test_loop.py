"""The seams of the loop, on a model that is no GPT-2: what modules may offer it, and which streams it draws from."""

import itertools
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib import gradients, loop, optimizers, runtime, tracking
from lib.config import load
from lib.data import IGNORED, EvalSet, draw_size, evaluation_set, open_corpus
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
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


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


# Moments

class Listening(nn.Module):
    """A test's mechanism: keeps what it is told; says at `changes` that the program of the model changed."""

    def __init__(self, width: int, changes: tuple[int, ...] = ()):
        super().__init__()
        self.changes, self.told = changes, []

    def forward(self, x):
        return x

    def advance(self, moment) -> bool:
        self.told.append(moment)
        return moment.iteration in self.changes


def listening(*changes, strength: float | None = None) -> Bigram:
    model = Bigram()
    model.layer.append(Listening(8, changes))
    if strength is not None:
        model.layer.append(Penalty(8, strength))
    return model


def plain(moments) -> list[tuple]:
    return [(m.iteration, m.progress, None if m.train_loss is None else m.train_loss.item(), m.first_loss, m.val_loss)
            for m in moments]


def test_modules_are_told_before_every_step_where_the_run_stands(tmp_path):
    model = listening()
    _, rows = run(tmp_path, model, GPT2_MAX_ITERS=5, GPT2_LOG_INTERVAL=1)
    told, losses = model.layer[0].told, [row["train_loss_step"] for row in rows if "train_loss_step" in row]
    first, second, last = (row["val_loss"] for row in rows if "val_loss" in row)
    begin = losses[0]
    assert plain(told) == [(0, 0.0, None, None, None), (1, 0.2, begin, begin, None), (2, 0.4, losses[1], begin, first),
                           (3, 0.6, losses[2], begin, first), (4, 0.8, losses[3], begin, second)]
    assert len({first, second, last}) == 3 and len(set(losses)) == 5
    assert not any(m.train_loss.requires_grad for m in told[1:]), "a moment must not hold a graph"


def test_under_a_budget_of_seconds_progress_rises_from_zero(tmp_path):
    model = listening()
    run(tmp_path, model, GPT2_MAX_TIME=1, GPT2_MAX_ITERS=0, GPT2_EVAL_INTERVAL=10 ** 6, GPT2_LOG_INTERVAL=10 ** 6)
    progress = [m.progress for m in model.layer[0].told]
    assert 0 <= progress[0] < 0.1 and progress[-1] > 0.5 and progress == sorted(progress) and len(set(progress)) > 10


def test_accumulated_micro_batches_are_one_moment_with_the_mean_of_their_losses(tmp_path):
    model = listening()
    _, rows = run(tmp_path, model, GPT2_GRADIENT_ACCUMULATION=3, GPT2_LOG_INTERVAL=1)
    told = model.layer[0].told
    assert [m.iteration for m in told] == [0, 1, 2, 3]
    assert [m.train_loss.item() for m in told[1:]] == [r["train_loss_step"] for r in rows if "train_loss_step" in r][:3]


def test_a_resumed_run_tells_the_same_moments_as_an_uninterrupted_one(tmp_path):
    """Interrupted in the middle of an interval of logging and of evaluation, so that the loss of the step before and both
    validation losses can only come from the checkpoint."""
    symbols = {"GPT2_MAX_ITERS": 8, "GPT2_EVAL_INTERVAL": 2, "GPT2_LOG_INTERVAL": 4}

    def fresh():
        torch.manual_seed(0)
        return listening()

    run(tmp_path / "whole", whole := fresh(), **symbols)
    with pytest.raises(loop.Interrupted):
        run(tmp_path / "parts", first := fresh(), StopAfter(5), **symbols)
    run(tmp_path / "parts", second := fresh(), **symbols)
    assert len(first.layer[0].told) == 5
    assert plain(first.layer[0].told + second.layer[0].told) == plain(whole.layer[0].told)
    assert [m.train_loss.dtype for m in second.layer[0].told] == [m.train_loss.dtype for m in whole.layer[0].told[5:]]


class WarmUps:
    """Counts what a change of the model's program costs, without compiling anything."""

    def __init__(self, monkeypatch, model, seconds=0.0):
        self.warmed, self.resets, self.compiled, self.seconds = [], 0, 0, seconds
        monkeypatch.setattr(loop, "warm_up", lambda cfg, model, *_: self._warm_up(model))
        monkeypatch.setattr(torch.compiler, "reset", self._reset)
        monkeypatch.setattr(model, "compile", self._compile)

    def _warm_up(self, model):
        time.sleep(self.seconds)
        self.warmed.append(len(model.layer[0].told))
        model.eval()  # whatever mode it leaves the model in

    def _reset(self):
        self.resets += 1

    def _compile(self, **_):
        self.compiled += 1


def test_a_change_of_the_program_is_one_recompilation_off_the_budget(tmp_path, monkeypatch):
    model = listening(0, 2)
    model.layer.append(Listening(8, (2,)))
    modes, forward = [], model.forward
    model.forward = lambda *args: (modes.append(model.training), forward(*args))[1]
    seen = WarmUps(monkeypatch, model, seconds=0.3)
    progress, _ = run(tmp_path, model, GPT2_COMPILE=True, GPT2_EVAL_INTERVAL=10 ** 6)
    assert seen.warmed == [0, 1, 3], "at the start, and before the first and the third step, after both were told"
    assert (seen.resets, seen.compiled) == (2, 1)
    assert 0.9 < progress.clocks["compile"] < 1.5 and progress.clocks["train"] < 0.3
    assert modes[:4] == [True] * 4, "the steps after it train"


def test_without_a_compiler_a_change_costs_nothing(tmp_path, monkeypatch):
    seen = WarmUps(monkeypatch, model := listening(0, 1, 2, 3))
    progress, _ = run(tmp_path, model)
    assert (seen.warmed, seen.resets, seen.compiled, progress.clocks["compile"]) == ([], 0, 0, 0.0)


# Penalties

class Penalty(nn.Module):
    """A parameter that nothing but the penalty depends on."""

    def __init__(self, width: int, strength: float):
        super().__init__()
        self.strength, self.value = strength, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x

    def penalty(self):
        return self.strength * self.value


def test_penalties_are_differentiated_but_not_reported(tmp_path, monkeypatch):
    found, rows = {}, {}
    for strength in (0.0, 5.0):
        seen = found[strength] = []
        torch.manual_seed(0)
        model = listening(strength=strength)
        model.layer.append(Penalty(8, 2 * strength))
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "clip", lambda model, *rest, real=gradients.clip, to=seen: (
                to.append([m.value.grad.item() for m in model.layer[1:]]), real(model, *rest))[1])
            _, rows[strength] = run(tmp_path / str(strength), model, GRAD_CLIP=0, GPT2_GRADIENT_ACCUMULATION=3)
    assert found[0.0] == [[0.0, 0.0]] * 4
    assert found[5.0] == [[pytest.approx(5.0), pytest.approx(10.0)]] * 4, "the mean over micro-batches, as the loss"
    without, with_it = ([[row.get(name) for name in ("train_loss", "train_loss_step", "val_loss")] for row in rows[strength]]
                        for strength in (0.0, 5.0))
    assert without == with_it


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


# How a global batch is split

def test_another_split_of_a_global_batch_trains_on_the_same_data_and_evaluates_on_the_same_set(tmp_path):
    """That a split is larger or smaller than what is drawn at a time changes rounding alone."""
    splits, found = {"4": (4, 2, 0), "8": (8, 1, 4), "1": (1, 8, 4)}, {}
    for name, (batch, times, drawn) in splits.items():
        torch.manual_seed(0)
        progress, rows = run(tmp_path / name, Bigram(0), BATCH_SIZE=batch, GPT2_GRADIENT_ACCUMULATION=times, BATCH_DRAWN=drawn,
                             GPT2_LOG_INTERVAL=1)
        found[name] = progress, [row["train_loss_step"] for row in rows if "train_loss_step" in row]
    for name in ("8", "1"):
        (one, losses), (other, own) = found["4"], found[name]
        assert other.eval_hash == one.eval_hash and own == pytest.approx(losses, rel=1e-5)
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-5)
    _, rows = run(tmp_path / "another draw", Bigram(0), BATCH_SIZE=8, GPT2_GRADIENT_ACCUMULATION=1, GPT2_LOG_INTERVAL=1)
    assert rows[0]["train_loss_step"] != pytest.approx(found["4"][1][0], rel=1e-5)


def test_evaluation_is_compiled_off_all_other_clocks_when_it_is_first_needed(tmp_path, monkeypatch):
    """At once after every change of the program, and not at all after one that ends before the next evaluation."""
    model, calls = listening(1, 4), []

    def slow(cfg, model, eval_set, device, *rest, real=loop.evaluate):
        batches = list(eval_set)
        calls.append((len(model.layer[0].told), len(batches)))
        time.sleep(0.2)
        return real(cfg, model, batches, device, *rest)

    WarmUps(monkeypatch, model)
    monkeypatch.setattr(loop, "evaluate", slow)
    monkeypatch.setattr(loop, "tell_graph_breaks", lambda cfg: calls.append("breaks told"))
    progress, _ = run(tmp_path, model, GPT2_COMPILE=True, GPT2_EVAL_INTERVAL=3, GPT2_MAX_ITERS=8)
    whole = max(call[1] for call in calls if call != "breaks told")
    assert calls == [(3, 1), "breaks told", (3, whole), (6, 1), "breaks told", (6, whole), (8, whole)]
    assert 0.4 < progress.clocks["compile"] < 0.6 < progress.clocks["eval"] < 1.0 and progress.clocks["train"] < 0.2


# Loss by position

class Positional(Bigram):
    """Knows the more, the further it has read: its loss differs from part to part."""

    def forward(self, x, targets=None):
        logits = super().forward(x, x)[0] + 9 * F.one_hot(x, 256) * torch.linspace(0, 1, x.shape[1])[:, None]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("block, samples", [(32, 5), (30, 1), (4, 2)])
def test_the_loss_by_position_is_that_of_each_part_of_every_window(block, samples):
    torch.manual_seed(0)
    cfg, model = configuration(GPT2_BLOCK_SIZE=block, GPT2_EVAL_SAMPLES=samples), Positional(0)
    batches = evaluation_set(cfg, open_corpus(cfg))
    edges = [round(block * part / 4) for part in range(5)]
    x, y = (torch.cat([torch.from_numpy(batch[i]) for batch in batches]) for i in range(2))
    with torch.no_grad():
        logits = model(x, y)[0]
    losses = [F.cross_entropy(logits[:, a:b].flatten(0, 1), y[:, a:b].flatten()).item() for a, b in itertools.pairwise(edges)]
    found = loop.evaluate_by_position(cfg, model, batches, torch.device("cpu"))
    assert found == pytest.approx(losses, rel=1e-6) and len(set(found)) == 4 and not model.training
    weights = [b - a for a, b in itertools.pairwise(edges)]
    whole = loop.evaluate(cfg, model, batches, torch.device("cpu"))
    assert sum(loss * weight for loss, weight in zip(found, weights, strict=True)) / block == pytest.approx(whole, rel=1e-6)


def test_a_context_too_short_to_divide_has_no_loss_by_position():
    cfg = configuration(GPT2_BLOCK_SIZE=3)
    assert loop.evaluate_by_position(cfg, Bigram(0), evaluation_set(cfg, open_corpus(cfg)), torch.device("cpu")) is None


def test_the_loss_by_position_is_that_of_the_trained_model(tmp_path):
    torch.manual_seed(0)
    model = Bigram(0)
    progress, _ = run(tmp_path, model, GPT2_EVAL_SAMPLES=8)
    cfg = configuration(GPT2_EVAL_SAMPLES=8)
    again = loop.evaluate_by_position(cfg, model, evaluation_set(cfg, open_corpus(cfg)), torch.device("cpu"))
    assert progress.val_loss_by_position == again and min(again) < progress.val_loss < max(again)


def test_graph_breaks_are_told_once_with_their_reason(capsys):
    cfg = configuration(GPT2_COMPILE=True)
    broken = torch.compile(lambda x: (x + 1, torch._dynamo.graph_break(), x + 2), backend="eager")
    torch._dynamo.utils.counters.clear()
    broken(torch.ones(2))
    loop.tell_graph_breaks(cfg)
    told = capsys.readouterr().err.splitlines()
    assert told and told[0].startswith("graph break, 1 times: ") and "graph_break" in told[0]
    loop.tell_graph_breaks(cfg)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_warming_up_trains_on_micro_batches(batch):
    cfg, seen = configuration(BATCH_SIZE=batch, BATCH_DRAWN=2), []
    model = Bigram(0)
    model.register_forward_hook(lambda module, inputs, _: seen.append((module.training, inputs[0].size(0))))
    corpus, device = open_corpus(cfg), runtime.setup(cfg)
    eval_set = EvalSet(corpus.val, cfg.GPT2_EVAL_SAMPLES, draw_size(cfg), cfg.GPT2_BLOCK_SIZE, corpus.vocab_size)
    loop.warm_up(cfg, model, optimizers.build(model, cfg), eval_set, device)
    assert set(seen) == {(True, batch)}
