"""What a decoding step cannot avoid, and what it takes."""

import pytest
import torch

from gpt2 import decode_costs
from gpt2.model import GPT
from lib.config import load

TINY = "gpt2-ra-ablation+tiny"


def test_bytes_that_must_move():
    """The tied head whole, of the embedding a row a sequence, of the positions one row, every other parameter once."""
    model = GPT(load(TINY, "V0")).to(torch.bfloat16)
    layer = 4 * 128 * 128 + 2 * 128 * 512 + (3 + 1 + 4 + 1) * 128 + 4 * 128
    expected = 2 * (256 * 128 + 2 * layer + 2 * 128 + 5 * 128 + 128)
    assert decode_costs.moved_bytes(model, batch=5, cache_bytes=1000) == expected + 1000


def test_the_share_of_the_floor():
    assert decode_costs.floor_share(moved=3e6, bandwidth=3e9, seconds=4e-3) == pytest.approx(0.25)


def test_a_copy_moves_every_byte_twice(monkeypatch):
    """By a made-up clock in which either takes a second, or reading a tenth of it."""
    for seconds, expected in (([1, 1], 2 * 2 * 2 ** 20), ([1, 0.1], 10 * 2 * 2 ** 20)):
        clock = iter([0, seconds[0], 0, seconds[1]])
        monkeypatch.setattr(decode_costs.time, "perf_counter", lambda clock=clock: next(clock))
        assert decode_costs.bandwidth_of(torch.device("cpu"), 2, rounds=1) == pytest.approx(expected)


def test_live_bytes_are_counted_once_and_given_back():
    kept = torch.ones(1000)

    def work():
        one = kept + 1  # 4000 bytes
        view = one.view(10, 100)
        del one
        two = view.double()  # 8000 more
        del view
        kept.add_(1)  # nothing new
        return two

    assert decode_costs.peak_bytes(torch.device("cpu"), work) == 12000
    assert decode_costs.held_bytes([kept, kept[:10], torch.ones(2)]) == 4008
