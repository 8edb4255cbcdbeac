"""The loop on real models: resume, streams, budgets, divergence. In process, a few steps each."""

import dataclasses
import functools
import json
import math
import time

import pytest
import torch

from gpt2.model import GPT
from lib import checkpoint, loop, optimizers, runtime, tracking
from lib.config import load
from lib.data import open_corpus
from lib.errors import UserError
from lib.report.mechanisms import COLUMNS
from tests.gpt2.conftest import STEPS
from tests.harness import Never, StopAfter

IDENTITY = {"hash": "x", "set": {"MODEL_TINY": "y"}, "default": {"RA_R": "4"}}


@functools.cache
def the_corpus():
    """That of every configuration here, opened once: to hash its megabytes takes longer than a step of training."""
    return open_corpus(load("gpt2-ra-ablation+tiny"))


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """The entropy that losses are compared with, for which every start of training counts the bytes of the corpus."""
    found, real = {}, loop.unigram_entropy

    def once(train, eval_set):
        key = train.fingerprint(), eval_set.hash
        return found[key] if key in found else found.setdefault(key, real(train, eval_set))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "unigram_entropy", once)
        yield


def run(cfg, folder, stop=Never, model=None, corpus=None, identity=None):
    """Train in `folder`; returns (model, progress)."""
    folder.mkdir(exist_ok=True)
    progress = loop.Progress()
    clock = loop.Clock(progress, runtime.setup(cfg), time.perf_counter())
    model = model or GPT(cfg)
    loop.train(cfg, model, optimizers.build(model, cfg), corpus or the_corpus(), folder, identity or IDENTITY,
               lambda keep: tracking.MetricsLog(folder, keep), clock, progress, stop)
    return model, progress


def rows(folder, *keys):
    return [tuple(r.get(k) for k in keys) for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def numbers(row):
    """A row less what depends on the clock."""
    return {k: v for k, v in json.loads(row).items() if "second" not in k and "time" not in k and "memory" not in k}


@pytest.mark.parametrize("step", [*STEPS, "A0"])
def test_resume_is_bit_exact(configuration, tmp_path, step):
    """9 steps straight equal 4 + stop + 2 + stop + 3, in weights, in every logged number, and across a momentum reset."""
    cfg = configuration(step, GPT2_MAX_ITERS=9, GPT2_EVAL_INTERVAL=3, GPT2_LOG_INTERVAL=2, SPAM_INTERVAL=5,
                        SPAM_WARMUP_STEPS=3, GPT2_GRADIENT_ACCUMULATION=2)
    straight, whole = run(cfg, tmp_path / "a")
    for steps in (4, 2):
        with pytest.raises(loop.Interrupted):
            run(cfg, tmp_path / "b", StopAfter(steps))
    resumed, parts = run(cfg, tmp_path / "b")
    assert same(straight, resumed)
    logs = [[numbers(r) for r in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4 + 3
    assert (parts.resumed, parts.val_loss, parts.train_loss) == (2, whole.val_loss, whole.train_loss)


# A step whose program, phase or coupling changes within 9 iterations, and where that shows in the log.
CHANGES = {
    "M2": ({"SKIP_START": "-1.0", "SKIP_AFTER": "0.0", "SKIP_CHECK": "0.1"}, "compute_ratio", lambda ratio: ratio < 1),
    "M5": ({"SKIP_AFTER": "0.3", "SKIP_CHECK": "0.1"}, "skip_rec_mlp", lambda value: value == 0),
    "V16": ({"COUPLING_WINDOW": 3, "COUPLING_SPREAD": "10.0", "COUPLING_TREND": "10.0"}, "coupling_scale", lambda s: s == 1),
    "V12": ({"COUPLING_DELAY_STEPS": 5, "COUPLING_SHARE": "1.0"}, "coupling_scale", lambda s: s == 1),
    "V1": ({"COUPLING_WARMUP": "y", "COUPLING_SHARE": "0.5"}, "coupling_scale", lambda s: s == 1),
    "RT1": ({"ROUTER_DROP": "0.0"}, "p_ra", lambda share: 0 < share < 1),
    "RALEARN0": ({"DIRECTION_SHARE": "0.5", "DIRECTION_MIN_STEPS": 5}, "p_recip", lambda p: 0 <= p <= 1),
}


@pytest.mark.parametrize("step", CHANGES)
def test_what_a_mechanism_decides_survives_a_stop(configuration, tmp_path, step):
    """Before and after the change: a run that is stopped twice decides what the uninterrupted one does, and logs it."""
    symbols, logged, changed = CHANGES[step]
    cfg = configuration(step, GPT2_MAX_ITERS=9, GPT2_EVAL_INTERVAL=1, GPT2_LOG_INTERVAL=1, **symbols)
    straight, whole = run(cfg, tmp_path / "a")
    for steps in (3, 3):
        with pytest.raises(loop.Interrupted):
            run(cfg, tmp_path / "b", StopAfter(steps))
    resumed, parts = run(cfg, tmp_path / "b")
    assert same(straight, resumed) and whole.inactive is None and parts.inactive is None
    logs = [[numbers(r) for r in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == logs[1]
    values = [value for value, in rows(tmp_path / "a", logged) if value is not None]
    assert changed(values[-1]) and (step == "RALEARN0" or values[0] != values[-1])


def test_a_checkpoint_older_than_the_log_drops_the_rows_after_it(configuration, tmp_path):
    cfg = configuration("V1", GPT2_MAX_ITERS=6, GPT2_LOG_INTERVAL=1, GPT2_EVAL_INTERVAL=100)
    with pytest.raises(loop.Interrupted):
        run(cfg, tmp_path, StopAfter(2))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "killed": true}\n{"iteration": 4, "hal')
    run(cfg, tmp_path)
    assert [i for i, in rows(tmp_path, "iteration")] == [1, 2, 3, 4, 5, 6, 6]


def test_training_seconds_carry_over(configuration, tmp_path):
    cfg = configuration("V0", GPT2_MAX_TIME=1)
    with pytest.raises(loop.Interrupted):
        run(cfg, tmp_path, StopAfter(3))
    before = checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["clocks"]["train"]
    _, progress = run(cfg, tmp_path)
    assert before > 0 and progress.resumed == 1
    seconds = [s for s, in rows(tmp_path, "train_seconds")]
    assert seconds == sorted(seconds) and 1 <= progress.clocks["train"] < 2


def test_every_step_sees_the_same_batches(configuration, tmp_path, monkeypatch):
    seen = {}
    for step in (*STEPS, "P0", "A0"):
        seen[step] = []

        def spy(*args, step=step, real=loop.train_batch):
            batch = real(*args)
            seen[step].append((args[1:], batch[0].tobytes(), batch[1].tobytes()))
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_batch", spy)
            run(configuration(step, GPT2_MAX_ITERS=2, GPT2_GRADIENT_ACCUMULATION=2), tmp_path / step)
    other = seen.pop("A0")  # the one step that sees others, because that is what it is for
    assert len(other) == 4 and not {x for _, x, _ in other} & {x for _, x, _ in seen["V0"]}
    assert all(s == seen["V0"] for s in seen.values()) and len(seen["V0"]) == 4
    assert len({x for _, x, _ in seen["V0"]}) == 4


def test_evaluation_and_logging_do_not_disturb_training(configuration, tmp_path):
    """An earlier implementation drew evaluation batches from the training stream."""
    base = {"GPT2_MAX_ITERS": 6, "GPT2_EVAL_INTERVAL": 100, "GPT2_LOG_INTERVAL": 100}
    quiet, _ = run(configuration("V6", **base), tmp_path / "a")
    busy, _ = run(configuration("V6", **base | {"GPT2_EVAL_INTERVAL": 1, "GPT2_LOG_INTERVAL": 1}), tmp_path / "b")
    assert same(quiet, busy)


def test_controls_end_elsewhere_than_the_baseline_on_the_same_evaluation_set(configuration, tmp_path):
    """A0 by chance alone, P0 because it has hardly moved."""
    cfg = {"GPT2_MAX_ITERS": 6, "GPT2_WARMUP_STEPS": 0, "GPT2_LOG_INTERVAL": 1}
    ended = {step: run(configuration(step, **cfg), tmp_path / step)[1] for step in ("V0", "A0", "P0")}
    assert len({p.val_loss for p in ended.values()}) == 3 and len({p.eval_hash for p in ended.values()}) == 1
    assert ended["P0"].val_loss > ended["V0"].val_loss + 0.2 > ended["A0"].val_loss
    plain, tenth = ([r for r, in rows(tmp_path / step, "learning_rate") if r] for step in ("V0", "P0"))
    assert tenth == pytest.approx([r / 10 for r in plain], rel=1e-12) and len(tenth) == 6


def test_dropout_is_drawn_anew_each_step_and_from_the_seed(configuration, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", lambda s, real=torch.manual_seed: (seeds.append(s), real(s))[1])
    for name, seed in (("a", 1337), ("b", 1337), ("c", 1338)):
        run(configuration("V0", GPT2_MAX_ITERS=3, SEED=seed), tmp_path / name)
    a, b, c = seeds[:3], seeds[3:6], seeds[6:]
    assert a == b and not set(a) & set(c) and len(set(a)) == 3


def test_gradient_accumulation_is_the_mean_over_micro_batches(configuration, tmp_path):
    """2 micro-batches of 2 are one batch of 4 with the same sequences, to rounding."""
    cfg = configuration("V0", GPT2_MAX_ITERS=1, GPT2_GRADIENT_ACCUMULATION=2, GPT2_DROPOUT="0.0", OPTIMIZER_ADAMW=True)
    corpus, model = the_corpus(), GPT(cfg)
    parts = [loop.train_batch(corpus.train, cfg.SEED, 0, m, 2, cfg.GPT2_BLOCK_SIZE) for m in (0, 1)]
    x, y = (torch.cat([torch.from_numpy(p[i]) for p in parts]) for i in (0, 1))
    expected = model.train()(x, y)[1]
    run(cfg.replace(GPT2_LOG_INTERVAL=1), tmp_path)
    assert rows(tmp_path, "train_loss_step")[0][0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_time_budget_finishes_its_schedule(configuration, tmp_path):
    cfg = configuration("V0", GPT2_MAX_TIME=1, GPT2_LOG_INTERVAL=1, GPT2_WARMUP_STEPS=100000)
    _, progress = run(cfg, tmp_path)
    rates = [r for r, in rows(tmp_path, "learning_rate") if r]
    assert max(rates) > 0.9 * cfg.LEARNING_RATE, "the warm-up ends within 10 % of the budget"
    assert rates[-1] < 1.5 * cfg.GPT2_MIN_LR
    assert 1 <= progress.clocks["train"] < 1.5


def test_only_training_counts(configuration, tmp_path, monkeypatch):
    """Slow evaluation, logging and trackers do not shorten the training of a time budget."""
    def slow(*args, real=loop.evaluate):
        time.sleep(0.4)
        return real(*args)

    monkeypatch.setattr(loop, "evaluate", slow)
    monkeypatch.setattr(tracking.MetricsLog, "_to_tracker", lambda *_: time.sleep(0.05))
    begun = time.perf_counter()
    _, progress = run(configuration("V0", GPT2_MAX_TIME=1, GPT2_EVAL_INTERVAL=20), tmp_path)
    clocks = progress.clocks
    assert clocks["eval"] > 0.4 and 1 <= clocks["train"] < 1.5 and clocks["other"] > 0.1
    assert sum(clocks.values()) == pytest.approx(time.perf_counter() - begun, abs=0.5), "every second is on a clock"


def test_a_checkpoint_of_another_cell_or_other_data_is_refused(configuration, tmp_path):
    cfg = configuration("V0", GPT2_MAX_ITERS=4)
    with pytest.raises(loop.Interrupted):
        run(cfg, tmp_path, StopAfter(2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    other = {"hash": "y", "set": {"MODEL_TINY": "y", "RA_R": "8"}, "default": {}}
    with pytest.raises(UserError, match="checkpoint.pt is of another run: RA_R 4 -> 8"):
        run(cfg, tmp_path, identity=other)
    corpus = the_corpus()
    swapped = dataclasses.replace(corpus, train=corpus.val)
    with pytest.raises(UserError, match="is of another run: train_hash"):
        run(cfg, tmp_path, corpus=swapped)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    newer = {"hash": "z", "set": {"MODEL_TINY": "y"}, "default": {"RA_R": "4", "NEW": "n"}}
    run(cfg, tmp_path, identity=newer)


def test_a_validation_loss_that_is_not_finite_ends_as_diverged(configuration, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *_: math.inf)
    with pytest.raises(loop.Diverged, match="the validation loss is inf at iteration 2"):
        run(configuration("V0", GPT2_MAX_ITERS=9, GPT2_EVAL_INTERVAL=2), tmp_path)


def test_the_tiny_study_learns_more_than_byte_frequencies(tmp_path):
    """What a newcomer's first make shows: at least 0.6 nats below the unigram entropy of the data."""
    short = {"GPT2_MAX_ITERS": 140, "GPT2_EVAL_INTERVAL": 140}  # of its 250: if these are enough, so are those
    _, progress = run(load("gpt2-ra-ablation+tiny", "V0", short), tmp_path)
    assert progress.val_loss < progress.unigram_entropy - 0.6


def test_a_token_budget_is_rounded_up_to_iterations(configuration, tmp_path):
    _, progress = run(configuration("V0", GPT2_MAX_TOKENS=65), tmp_path)
    assert progress.iteration == 2  # of 64 tokens each


def test_a_loss_that_is_not_finite_ends_as_diverged(configuration, tmp_path):
    cfg = configuration("V0", GPT2_MAX_ITERS=50, GPT2_LOG_INTERVAL=5)
    model = GPT(cfg)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(loop.Diverged, match=r"the training loss is nan at iteration 1 \(no step before it was finite\)"):
        run(cfg, tmp_path, model=model)
    assert rows(tmp_path, "train_loss_step") == [(None,)], "looked at when the log is written, five steps later"


def poisoned(cfg, where, step):
    """A model in which one number turns to NaN: of the loss or of one gradient in training step `step`, of a weight before it,
    or of the loss in evaluation after it."""
    model, done = GPT(cfg), []
    forward, gate = model.forward, model.transformer.ln_f.weight

    def spy(*args):
        done.extend([None] * model.training)
        if where == "weight" and len(done) == step:
            with torch.no_grad():
                gate[0] = math.nan
        logits, loss = forward(*args)
        wrong = where == ("loss" if model.training else "eval") and len(done) == step
        return logits, loss * math.nan if wrong else loss

    def hook(gradient):
        return gradient * torch.tensor([math.nan] + [1.0] * (len(gradient) - 1)) if len(done) == step else gradient

    model.forward = spy
    if where == "gradient":
        gate.register_hook(hook)
    return model


@pytest.mark.parametrize("kind", ["OPTIMIZER_ADAMW", "OPTIMIZER_ADAMWSPAM", "OPTIMIZER_SINKGD"])
@pytest.mark.parametrize("where, sentence", [
    ("loss", "the training loss is nan at iteration 4 (the last finite step, 3, had loss "),
    ("gradient", "the norm of the gradient is nan at iteration 4 (the last finite step, 3, had loss "),
])
def test_a_step_that_is_not_finite_never_reaches_the_weights(configuration, tmp_path, kind, where, sentence):
    """Noticed three steps later, when the log is written; nothing was saved or updated in between."""
    resets = {"SPAM_INTERVAL": 3, "SPAM_WARMUP_STEPS": 1} if kind == "OPTIMIZER_ADAMWSPAM" else {}
    cfg = configuration("V3", GPT2_MAX_ITERS=20, GPT2_LOG_INTERVAL=7, **{kind: True}, **resets)
    good = GPT(cfg)
    with pytest.raises(loop.Interrupted):
        run(cfg, tmp_path / "good", StopAfter(3), model=good)
    bad, progress = poisoned(cfg, where, 4), loop.Progress()
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(loop.Diverged) as raised:
        clock = loop.Clock(progress, runtime.setup(cfg), time.perf_counter())
        loop.train(cfg, bad, optimizers.build(bad, cfg), the_corpus(), folder, IDENTITY,
                   lambda keep: tracking.MetricsLog(folder, keep), clock, progress, Never)
    last = checkpoint.load(tmp_path / "good/checkpoint.pt")["progress"]
    assert str(raised.value) == f"{sentence}{last['last_loss']:.4f} and gradient norm {last['last_norm']:.4g})"
    assert same(bad, good) and progress.iteration == 3 and [i for i, in rows(folder, "iteration")] == [7]


@pytest.mark.parametrize("where, sentence", [("weight", "the training loss is nan at iteration 4 (the last finite step, 3, "),
                                             ("eval", "the validation loss is nan at iteration 4")])
def test_a_weight_or_an_evaluation_that_is_not_finite_ends_the_run(configuration, tmp_path, where, sentence):
    cfg = configuration("V0", GPT2_MAX_ITERS=20, GPT2_LOG_INTERVAL=10, GPT2_EVAL_INTERVAL=4)
    with pytest.raises(loop.Diverged) as raised:
        run(cfg, tmp_path, model=poisoned(cfg, where, 4))
    assert str(raised.value).startswith(sentence) and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_what_is_not_finite_is_never_saved(configuration, tmp_path, monkeypatch, where):
    """A row of a table that no batch looks up, or a moment: no loss shows it."""
    cfg = configuration("V0", GPT2_MAX_ITERS=9, GPT2_LOG_INTERVAL=100)
    model = GPT(cfg)
    optimizer = optimizers.build(model, cfg)
    monkeypatch.setattr(optimizers, "build", lambda *_: optimizer)

    class Stop(StopAfter):
        @property
        def asked(self):
            asked = super().asked
            if asked:
                table = model.transformer.wpe.weight
                with torch.no_grad():
                    (table if where == "weights" else optimizer.state[table]["exp_avg"])[5, 5] = math.inf
            return asked

    with pytest.raises(loop.Diverged, match=r"wpe\.weight is not finite after iteration 4"):
        run(cfg, tmp_path, Stop(4), model=model)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("step", ["V6", "V16", "RALEARN0"])
def test_resume_from_the_older_checkpoint_is_bit_exact(configuration, tmp_path, capsys, step):
    """The newest is damaged: its steps are done again, and the numbers are those of an undisturbed run."""
    cfg = configuration(step, GPT2_MAX_ITERS=9, GPT2_EVAL_INTERVAL=3, GPT2_LOG_INTERVAL=2, SPAM_INTERVAL=5, SPAM_WARMUP_STEPS=3)
    straight, whole = run(cfg, tmp_path / "a")
    for steps in (3, 4):
        with pytest.raises(loop.Interrupted):
            run(cfg, tmp_path / "b", StopAfter(steps))
    newest = tmp_path / "b/checkpoint.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed, parts = run(cfg, tmp_path / "b")
    assert "going on from the one before it, of iteration 3" in capsys.readouterr().out
    assert same(straight, resumed) and parts.resumed == 1
    assert (parts.val_loss, parts.train_loss) == (whole.val_loss, whole.train_loss)
    logs = [[numbers(r) for r in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == logs[1]


def test_every_micro_batch_and_evaluation_batch_is_a_sign_of_life(configuration, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(loop.process, "show_life", lambda: shown.append(None))
    run(configuration("V0", GPT2_MAX_ITERS=3, GPT2_GRADIENT_ACCUMULATION=4, GPT2_EVAL_SAMPLES=2), tmp_path)
    assert len(shown) == 3 * 4 + 2 + 2, "two evaluation batches, once for the loss and once for its parts of the context"


def test_metric_names(configuration, tmp_path):
    run(configuration("V6", RA_SELF_RESTART=True, GPT2_MAX_ITERS=2, GPT2_LOG_INTERVAL=2), tmp_path)
    log, final = (set(json.loads(r)) for r in (tmp_path / "metrics.jsonl").read_text().splitlines())
    gates = {f"{n}_{k}" for n in ("unified_ra_w_std", "unified_ra_w_rec", "unified_ra_rwr_alpha", "rmlp_w_std",
                                  "rmlp_w_rec", "rmlp_gate_alpha") for k in ("mean", "std", "min", "max")}
    clock = {"iteration", "tokens", "train_seconds", "progress"}
    assert log == gates | clock | {"train_loss_step", "learning_rate", "forward_time_ms", "tokens_per_second",
                                   "steps_per_second", "grad_norm", "peak_memory_bytes"}
    layers = {f"{gate.removesuffix('_mean')}/layer{n}" for gate in gates if gate.endswith("_mean") for n in (0, 1)}
    assert final == gates | layers | COLUMNS - {"inactive"} and clock < COLUMNS


def test_gates_move_in_training(configuration, tmp_path):
    """An earlier implementation froze its gates at .9/.1 for whole runs."""
    model, _ = run(configuration("V6", RA_SELF_RESTART=True, GPT2_MAX_ITERS=5), tmp_path)
    start = dict(GPT(configuration("V6", RA_SELF_RESTART=True)).named_parameters())
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), name


def test_compile_warm_up_leaves_no_trace(configuration, tmp_path, monkeypatch):
    """Warm-up steps run before the budget and are undone: weights, optimizer state and counters."""
    cfg = configuration("V3", GPT2_MAX_ITERS=3, SPAM_INTERVAL=2, SPAM_WARMUP_STEPS=1)
    plain, _ = run(cfg, tmp_path / "a")
    monkeypatch.setattr(GPT, "compile", lambda self, **_: None)  # the compiler itself is not what is tested
    warmed, progress = run(cfg.replace(GPT2_COMPILE=True), tmp_path / "b")
    assert same(plain, warmed) and progress.clocks["compile"] > 0


def test_model_file_loads_without_pickle(configuration, tmp_path):
    model, _ = run(configuration("V2", GPT2_MAX_ITERS=1), tmp_path)
    checkpoint.save(tmp_path / "model.pt", model=model.state_dict(), configuration=configuration("V2").as_json())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh = GPT(configuration("V2"))
    fresh.load_state_dict(content["model"])
    assert same(model, fresh) and content["configuration"]["RA_R"] == 4
