"""What the benches share: turns and ratios, a model's own memory, and the training loop's step."""

from types import SimpleNamespace

import pytest
import torch

from scripts import benching
from tests.harness import refusal


def test_turns_put_every_block_between_two_of_the_first():
    order = []
    calls = [lambda name=name: order.append(name) or len(order) for name in "ABC"]
    found = benching.in_turns(calls, 2)
    assert "".join(order) == "ABCABCA" and found == [[1, 4, 7], [2, 5], [3, 6]]


def test_a_ratio_is_to_the_mean_of_both_neighbours():
    assert benching.ratios([3.0, 3.0], [1.0, 2.0, 4.0]) == [2.0, 1.0]
    assert benching.spread("time", [3.0, 1.0, 2.0]) == {"time": 2.0, "time_min": 1.0, "time_max": 3.0}


def test_a_drift_of_the_clock_cancels():
    """Every block takes longer than the one before; what is 1.5 times the first stays so."""
    clock = iter(range(100, 200))
    found = benching.in_turns([lambda: 2.0 * next(clock), lambda: 3.0 * next(clock)], 5)
    assert benching.ratios(found[1], found[0]) == pytest.approx([1.5] * 5)


class Filled(benching.Training):
    def __init__(self, memory):
        self.device, self.own_bytes, self.peak, self.memory = SimpleNamespace(type="cuda"), 100, 0, memory

    def block(self, steps):
        self.memory.peak = max(self.memory.peak, self.memory.now + 40 * steps)
        return 1.0


def test_memory_on_a_gpu_is_this_models_alone(monkeypatch):
    """500 bytes belong to others; of this model's 100 are held between steps, and 40 a step come on top."""
    memory = SimpleNamespace(now=600, peak=10_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(memory, "peak", memory.now))
    one = Filled(memory)
    assert one.watched(1) == 1.0 and one.memory_bytes() == 140
    one.watched(3)
    assert one.memory_bytes() == 220
    one.watched(2)
    assert one.memory_bytes() == 220, "the most there was"


def test_a_failure_is_one_line():
    assert benching.failure(torch.OutOfMemoryError("CUDA out of memory ..."), 64) == "out of memory at a batch of 64"
    assert benching.failure(RuntimeError("two\nlines"), 1) == "RuntimeError: two"
    assert benching.failure(RuntimeError(), 1) == "RuntimeError: without a word"


def test_options_are_refused_by_name(tmp_path):
    args = SimpleNamespace(batch=[2, 0], head_dim=None)
    assert refusal(benching.check_options, args, ("head_dim", "batch"), None)[0] == "--batch 0 is below 1."
    args = SimpleNamespace(head_dim=0)
    assert refusal(benching.check_options, args, ("head_dim",), None)[0] == "--head-dim 0 is below 1."
    assert refusal(benching.check_options, args, (), tmp_path / "a" / "b")[0] == f"there is no folder {tmp_path / 'a'}."
    assert refusal(benching.assignments, ["GPT2_N_LAYER"], "--set")[0] == "'GPT2_N_LAYER' in --set is no assignment."
    given = benching.assignments(["CONFIG_A=1", "B=x=y"], "--set")
    assert [(a.name, a.value, a.where) for a in given] == [("A", "1", "--set"), ("B", "x=y", "--set")]
