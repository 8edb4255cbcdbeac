"""The coupling scale and what moves it: at 0 the baseline, at 1 the mechanism, and between them a schedule."""

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.coupling import Coupling, CouplingController, set_ra_mlp_coupling_scale
from gpt2.model import GPT
from lib import loop
from lib.config import load
from lib.mechanisms import Mechanisms, Moment
from lib.schedule import Budget
from tests.gpt2.test_training import numbers, run, same
from tests.harness import StopAfter

SCHEDULES = ("COUPLING_WARMUP", "COUPLING_DELAY", "COUPLING_VARIANCE")


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return request.param


def controller(schedule, **symbols) -> CouplingController:
    """A controller of two mechanisms, without a model around them."""
    cfg = load("gpt2-ra-ablation+tiny", "V1", {schedule: "y", **symbols})
    return CouplingController(cfg, nn.ModuleList([Coupling(), Coupling()]))


def scales(controller, losses, iterations=None, budget=math.inf) -> list[float]:
    """The scale of every step; losses[i] is the loss of step i."""
    found = []
    for i in range(len(losses) + 1 if iterations is None else iterations):
        loss = torch.tensor(float(losses[i - 1]), dtype=torch.float64) if i else None
        assert controller.advance(Moment(i, min(i / budget, 1.0), loss)) is False, "the program stays the same"
        found.append(controller.couplings[0].scale.item())
        assert controller.couplings[1].scale.item() == found[-1] == controller.stats()["coupling_scale"].item()
    return found


def fires(losses, window=50, spread=0.2, trend=0.1):
    """The step at which the criterion is first met, in float64, None for never; and how far the limits were from any window."""
    clear = math.inf
    for i in range(window, len(losses) + 1):
        last = np.asarray(losses[i - window:i], dtype=np.float64)
        change = np.polyfit(np.arange(window), last, 1)[0] * (window - 1)
        found = last.std() / last.mean() - spread, abs(change) / last.mean() - trend
        clear = min(clear, *(abs(x) for x in found))
        if all(x < 0 for x in found):
            return i, clear
    return None, clear


def first_acting(found: list[float]):
    return next((i for i, s in enumerate(found) if s > 0), None)


# The scale itself

def test_weights_and_shares_between_neutral_and_full():
    coupling, w, alpha = Coupling(), torch.tensor([0.25, 3.0]), torch.tensor([0.5, -1.0])
    assert coupling.weight(w) is w and coupling.share(alpha) is alpha, "no operation until something moves it"
    model = nn.Sequential(coupling, Coupling())
    for s, weight, share in ((0, [1.0, 1.0], [0.0, 0.0]), (0.5, [0.625, 2.0], [0.25, -0.5]), (1, [0.25, 3.0], [0.5, -1.0])):
        set_ra_mlp_coupling_scale(model, s if s else torch.zeros((), dtype=torch.float64))
        assert coupling.weight(w).tolist() == weight and coupling.share(alpha).tolist() == share
        assert model[1].scale.item() == s


def test_a_scale_is_saved_and_loaded_and_a_loaded_one_acts():
    coupling, other, w = Coupling(), Coupling(), torch.tensor(3.0)
    other.load_state_dict(coupling.state_dict())
    assert other.weight(w) is w
    set_ra_mlp_coupling_scale(coupling, 0.5)
    other.load_state_dict(coupling.state_dict())
    assert other.weight(w).item() == 2.0


def logits(model, seed=0):
    model.eval()
    idx = torch.randint(model.vocab_size, (2, model.block_size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(idx)[0]


def disturbed(model):
    """The same model with gates, mixers and shares away from every neutral point."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name in (*getattr(module, "gate_parameters", ()), "mixer"):
                if (p := getattr(module, name, None)) is not None:
                    p.add_(0.3 * torch.rand(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("step", ["V1", "V2", "V3", "V6"])
def test_at_0_a_model_is_the_baseline_and_at_1_what_it_is_without_coupling(configuration, step):
    baseline, model = logits(GPT(configuration("V0"))), disturbed(GPT(configuration(step)))
    full = logits(model)
    assert (full - baseline).abs().max() > 1e-3
    for scale, expected in ((0.0, baseline), (1.0, full), (0.0, baseline)):
        set_ra_mlp_coupling_scale(model, scale)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    set_ra_mlp_coupling_scale(model, 0.5)
    half = logits(model)
    assert all((half - end).abs().max() > 1e-4 for end in (baseline, full)), "a scale between them is neither"


@pytest.mark.parametrize("step", ["V1", "V3", "V6"])
def test_before_its_first_step_a_scheduled_model_is_the_baseline_and_outside_a_loop_it_is_not(configuration, schedule, step):
    model, free = GPT(configuration(step, **{schedule: "y"})), GPT(configuration(step))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in free.named_parameters()]
    torch.testing.assert_close(logits(disturbed(model)), logits(disturbed(free)), rtol=0, atol=1e-5)
    assert Mechanisms(model).advance(Moment(0, 0.0)) is False
    torch.testing.assert_close(logits(model), logits(GPT(configuration("V0"))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", ["V1", "V3", "V6"])
def test_gates_learn_once_the_scale_is_above_0_and_every_weight_learns_at_0(configuration, step):
    model = disturbed(GPT(configuration(step)))
    idx = torch.randint(model.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    gates = {f"{where}.{name}".lstrip(".") for where, module in model.named_modules()
             for name in getattr(module, "gate_parameters", ())} | {n for n, _ in model.named_parameters() if "mixer" in n}
    for scale in (0.0, 0.1):
        set_ra_mlp_coupling_scale(model, scale)
        model.zero_grad()
        model(idx, idx.roll(-1, 1))[1].backward()
        learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        everything = {n for n, _ in model.named_parameters()}
        assert learning == (everything if scale else everything - gates)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Warm-up and delay, under each kind of budget

BUDGETS = [({"GPT2_MAX_ITERS": 250}, 25), ({"GPT2_MAX_ITERS": 4000}, 400), ({"GPT2_MAX_TOKENS": 250 * 1024}, 25),
           ({"GPT2_MAX_TIME": 100}, 20)]  # at half a second a step


def steps_of(symbols, seconds=0.5):
    """(scale of every step, its progress) under the controller that the configuration asks for."""
    cfg = load("gpt2-ra-ablation+tiny", "V1", symbols)
    budget, steers = Budget.from_config(cfg), CouplingController(cfg, nn.ModuleList([one := Coupling()]))
    found, i = [], 0
    while (progress := budget.progress(i, i * seconds)) < 1:
        steers.advance(Moment(i, progress))
        found.append((one.scale.item(), progress))
        i += 1
    return found, steers


@pytest.mark.parametrize("budget, full", BUDGETS)
def test_warm_up_rises_linearly_to_1_at_a_tenth_of_the_budget(budget, full):
    found, _ = steps_of({"COUPLING_WARMUP": "y", **budget})
    assert [s for s, _ in found] == [pytest.approx(min(1.0, 10 * progress), abs=1e-6) for _, progress in found]
    assert [s for s, _ in found].index(1.0) == full and found[0][0] == 0 and len(found) == 10 * full
    found, _ = steps_of({"COUPLING_WARMUP": "y", "COUPLING_SHARE": "0.5", **budget})
    assert [s for s, _ in found].index(1.0) == 5 * full


@pytest.mark.parametrize("budget, tenth", BUDGETS)
def test_a_delay_ends_after_its_steps_or_a_tenth_of_the_budget_whichever_is_first(budget, tenth):
    found, _ = steps_of({"COUPLING_DELAY": "y", **budget})
    assert [s for s, _ in found] == [float(i >= min(75, tenth)) for i in range(len(found))]
    found, _ = steps_of({"COUPLING_DELAY": "y", "COUPLING_DELAY_STEPS": 5, **budget})
    assert [s for s, _ in found].index(1.0) == 5


# Variance-guided

def curve(fall=60, length=300, noise=0.05, start=10.0, end=3.0, seed=0):
    """A loss that falls steeply for `fall` steps and then stays, with noise."""
    t = np.arange(length)
    rng = np.random.default_rng(seed)
    return end + (start - end) * np.exp(-5 * t / fall) + noise * rng.standard_normal(length)


@pytest.mark.parametrize("losses", [curve(), curve(fall=150), curve(noise=0.3), curve(fall=1), curve(seed=3, noise=0.5)])
def test_it_acts_from_the_step_at_which_the_loss_has_settled_after_a_fall(losses):
    expected, clear = fires(losses)
    assert 50 <= expected < 290 and clear > 1e-5
    found = scales(controller("COUPLING_VARIANCE"), losses)
    assert first_acting(found) == expected


@pytest.mark.parametrize("losses", [
    np.linspace(20, 1.5, 300),  # calm, but it falls: from end to end of a window by more than a tenth of the mean
    4 + 2.0 * (-1.0) ** np.arange(300),  # no trend, but it swings by half
    curve(length=49),  # settled, but not seen for long enough
    np.full(300, np.nan), np.linspace(2, 20, 300),
])
def test_it_does_not_act_while_the_loss_moves_or_the_window_is_not_full(losses):
    steers = controller("COUPLING_VARIANCE")
    assert np.isnan(losses).any() or fires(losses)[0] is None
    assert first_acting(scales(steers, losses)) is None
    assert steers.inactive() == "the coupling stayed at 0: no 50 steps had a loss that was settled"


def test_the_window_is_full_after_so_many_steps_and_a_constant_loss_has_settled():
    for window in (2, 7, 50):
        found = scales(controller("COUPLING_VARIANCE", COUPLING_WINDOW=window), [3.0] * 60)
        assert first_acting(found) == window


@pytest.mark.parametrize("symbols, moves", [({"COUPLING_SPREAD": "0.0"}, True), ({"COUPLING_TREND": "0.0"}, True),
                                            ({"COUPLING_SPREAD": "0.6"}, False)])
def test_both_limits_are_the_symbols(symbols, moves):
    losses = 4 + 2.0 * (-1.0) ** np.arange(80)
    calm = controller("COUPLING_VARIANCE", **({"COUPLING_SPREAD": "0.6"} | symbols))
    assert (first_acting(scales(calm, losses)) is None) == moves


def test_the_spread_is_that_of_the_window_itself():
    """Divided by its length: 0.19 of the mean, where one less would give 0.22."""
    losses = [4 + 0.76 * (-1) ** i for i in range(8)]
    found = scales(controller("COUPLING_VARIANCE", COUPLING_WINDOW=4, COUPLING_TREND="1.0"), losses)
    assert first_acting(found) == fires(losses, window=4, trend=1.0)[0] == 4


@given(st.floats(0.5, 20), st.floats(0, 1), st.floats(0, 3), st.lists(st.floats(-1, 1), min_size=4, max_size=24),
       st.floats(0, 0.9))
def test_on_any_curve_it_fires_where_the_criterion_says(end, pace, fall, jitter, noise):
    losses = [end * (1 + fall * math.exp(-pace * i) + noise * x) for i, x in enumerate(jitter)]
    assume(min(losses) > 0.01)
    expected, clear = fires(losses, window=5)
    assume(clear > 1e-4)  # the state is in float32
    steers = controller_of_five()
    assert first_acting(scales(steers, losses)) == expected
    assert steers.fired[0].item() == (-1 if expected is None else expected)


FIVE = load("gpt2-ra-ablation+tiny", "V1", {"COUPLING_VARIANCE": "y", "COUPLING_WINDOW": 5})


def controller_of_five():
    return CouplingController(FIVE, nn.ModuleList([Coupling(), Coupling()]))


def test_once_fired_it_stays_whatever_the_loss_does():
    losses = np.concatenate([np.full(60, 3.0), 3 + 2.9 * (-1.0) ** np.arange(400)])
    found = scales(controller("COUPLING_VARIANCE"), losses)
    assert first_acting(found) == 50 and found == sorted(found) and found[-1] == 1.0


@pytest.mark.parametrize("budget, length", [(10 ** 9, 200), (4000, 200), (1000, 100), (250, 25)])
def test_the_ramp_takes_its_steps_or_a_tenth_of_the_budget_whichever_is_shorter(budget, length):
    found = scales(controller("COUPLING_VARIANCE"), [3.0] * 300, budget=budget)
    assert found[:50] == [0.0] * 50
    for i in range(50, 301):
        assert found[i] == pytest.approx(min(1.0, max((i - 49) / 200, 10 * (i - 50) / budget)), abs=1e-5)
    assert found.index(1.0) in (50 + length - 1, 50 + length)
    short = scales(controller("COUPLING_VARIANCE", COUPLING_RAMP_STEPS=4), [3.0] * 60, budget=10 ** 9)
    assert short[49:55] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


# State

def test_a_model_that_starts_from_another_begins_its_own_schedule(schedule):
    """A parent's state says that its loss had settled, or that its delay was over."""
    parent, child, fresh = (controller(schedule) for _ in range(3))
    scales(parent, [3.0] * 300, budget=300)
    assert parent.scale == 1
    child.load_state_dict(parent.state_dict())
    losses = curve(fall=60, length=100)
    assert scales(child, losses, budget=300) == scales(fresh, losses, budget=300)


@pytest.mark.parametrize("stop", [3, 40, 50, 61, 65])
def test_the_state_survives_a_round_trip_bit_for_bit(schedule, stop):
    losses = curve(fall=5, length=80, noise=0.1)
    whole, first, second = (controller(schedule, COUPLING_DELAY_STEPS=60) if schedule == "COUPLING_DELAY" else
                            controller(schedule) for _ in range(3))
    expected = scales(whole, losses, budget=300)
    begun = scales(first, losses[:stop - 1], budget=300)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    ended = []
    for i in range(stop, 81):
        second.advance(Moment(i, i / 300, torch.tensor(losses[i - 1])))
        ended.append(second.couplings[1].scale.item())
    assert begun + ended == expected and len(set(expected)) > 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_resumed_model_continues_its_schedule(configuration, tmp_path, schedule):
    cfg = configuration("V3", **{schedule: "y"}, GPT2_MAX_ITERS=12, GPT2_EVAL_INTERVAL=4, GPT2_LOG_INTERVAL=1,
                        COUPLING_SHARE="0.5", **({"COUPLING_WINDOW": 3} if schedule == "COUPLING_VARIANCE" else {}))
    straight, whole = run(cfg, tmp_path / "a")
    with pytest.raises(loop.Interrupted):
        run(cfg, tmp_path / "b", StopAfter(5))
    resumed, _ = run(cfg, tmp_path / "b")
    assert same(straight, resumed) and whole.inactive is None
    logs = [[numbers(row) for row in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == logs[1]
    scale = {row["iteration"]: row["coupling_scale"] for row in logs[0]}
    assert list(scale) == list(range(1, 13)) and scale[1] == 0.0 and scale[12] == 1.0, "the scale of each step is in the log"
    if schedule == "COUPLING_WARMUP":
        assert [scale[i] for i in range(1, 8)] == [pytest.approx((i - 1) / 6) for i in range(1, 8)]


def test_a_model_whose_coupling_never_moved_says_so(configuration, tmp_path):
    cfg = configuration("V1", COUPLING_VARIANCE="y", GPT2_MAX_ITERS=3)
    _, progress = run(cfg, tmp_path)
    assert progress.inactive == "controllers.coupling: the coupling stayed at 0: no 50 steps had a loss that was settled"
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["inactive"] == progress.inactive and last["coupling_scale"] == 0.0


def test_a_delay_that_the_budget_does_not_reach_is_inactive():
    steers = controller("COUPLING_DELAY", COUPLING_SHARE="1.0")
    scales(steers, [3.0] * 75, iterations=75, budget=75)
    assert steers.inactive() == "the coupling stayed at 0 to the end of the budget"
    scales(steers, [3.0] * 80, budget=100)
    assert steers.inactive() is None


# Nothing waits for the device

class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::lift_fresh", "aten::lift_fresh_copy",
           "aten::scalar_tensor"}  # a value comes to the host, or a number of the host is made a tensor and copied over


def test_the_operations_that_wait_are_seen():
    for wait in (lambda x: x.item(), lambda x: bool(x), lambda x: x.new_tensor([1.0]),
                 lambda x: torch.where(x > 0, 0.0, x)):
        with Operations() as seen:
            wait(torch.ones(()))
        assert seen.names & WAITING


def test_advancing_waits_for_no_device(schedule, monkeypatch):
    steers, loss = controller(schedule), torch.tensor(3.0, dtype=torch.float64)
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value came to the host"))
    with Operations() as seen:
        for i in range(60):
            steers.advance(Moment(i, i / 1000, loss if i else None))
    assert seen.names and not seen.names & WAITING
