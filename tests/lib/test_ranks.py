"""How a step is dealt out to ranks, and what a process without others does. What several train is in
tests/gpt2/test_data_parallel.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import ranks
from lib.data import train_batch
from lib.data.tokens import Tokens
from lib.plan import Options, Plan
from tests.harness import TINY, refusal, run


def step_of(batch_size, accumulation, **symbols):
    return SimpleNamespace(BATCH_SIZE=batch_size, GPT2_GRADIENT_ACCUMULATION=accumulation, **symbols)


@pytest.mark.parametrize("batch_size, accumulation, size, expected", [
    (8, 8, 1, (8, 8)), (8, 8, 2, (8, 4)), (8, 8, 8, (8, 1)), (8, 8, 16, (4, 1)), (8, 8, 64, (1, 1)),
    (6, 2, 3, (4, 1)), (4, 9, 2, (3, 6)),  # a share of 18: the largest divisor up to 4
])
def test_a_rank_takes_the_largest_micro_batch_that_divides_its_share(batch_size, accumulation, size, expected):
    assert ranks.split(step_of(batch_size, accumulation), size) == expected


def test_what_cannot_be_dealt_out_evenly_is_refused_with_its_numbers():
    assert refusal(ranks.split, step_of(6, 4), 5) == (
        "a step has 24 sequences (BATCH_SIZE 6 x GPT2_GRADIENT_ACCUMULATION 4), which 5 processes cannot share evenly.",
        "set CONFIG_GPUS_PER_STEP=4 in make menuconfig, or a multiple of 5 sequences a step.")


def test_the_plan_refuses_it_before_anything_is_written(dotconfig, tmp_path):
    dotconfig(*TINY, "GPUS_PER_STEP=3", "BATCH_SIZE=8", "GPT2_GRADIENT_ACCUMULATION=1")
    plan = Plan(Options(out=str(tmp_path / "out")))
    assert refusal(plan.write)[0].startswith("a step has 8 sequences (BATCH_SIZE 8 x GPT2_GRADIENT_ACCUMULATION 1), which 3 ")
    assert not (tmp_path / "out").exists()
    dotconfig(*TINY, "GPUS_PER_STEP=4", "BATCH_SIZE=8", "GPT2_GRADIENT_ACCUMULATION=1")
    assert Plan(Options(out=str(tmp_path / "out"))).write().exists()


@given(batch_size=st.integers(1, 9), accumulation=st.integers(1, 6), size=st.integers(1, 12), drawn=st.integers(0, 7))
def test_ranks_together_train_on_the_sequences_of_one_process_in_their_order(batch_size, accumulation, size, drawn):
    cfg, total = step_of(batch_size, accumulation), batch_size * accumulation
    if total % size:
        return
    tokens = Tokens([np.arange(3000, dtype=np.uint16)], 3000)

    def sequences(rank, of):
        micro_batch, parts = ranks.split(cfg, of)
        assert micro_batch <= batch_size and micro_batch * parts * of == total
        return [train_batch(tokens, 1, 0, rank * parts + micro, micro_batch, 4, drawn or batch_size)[0]
                for micro in range(parts)]

    dealt = [part for rank in range(size) for part in sequences(rank, size)]
    assert np.array_equal(np.concatenate(dealt), np.concatenate(sequences(0, 1)))


def test_one_process_gives_back_what_it_was_given():
    alone, thing = ranks.ALONE, object()
    assert alone.agree(0.25, True, False) == (0.25, True, False)
    assert all(call(thing) is thing for call in (alone.mean, alone.total, alone.largest))
    assert alone.parallel(thing, True) is thing and (alone.rank, alone.size, alone.first, alone.stream) == (0, 1, True, ())


def test_a_cell_that_has_no_step_to_share_stays_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    evaluated = step_of(1, 1, EVALUATE_ONLY=True)
    compressed = step_of(1, 1, EVALUATE_ONLY=False, KVSPLICE=True, INIT_FROM_STEP="V0")
    assert all(ranks.join(cfg, None) is ranks.ALONE for cfg in (evaluated, compressed))


def test_neither_the_plan_nor_the_launcher_imports_torch_for_it(tmp_path):
    (tmp_path / "look.py").write_text("import sys, lib.agent, lib.launch, lib.plan, lib.ranks; print('torch' in sys.modules)")
    assert run("look", PYTHONPATH=f"{tmp_path}:.").stdout == "False\n"
