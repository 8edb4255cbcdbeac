import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import EvalSet, Tokens, train_batch, unigram_entropy
from lib.errors import UserError

quick = settings(max_examples=50, deadline=None)  # the machine may be busy

CORPUS = Tokens(np.arange(1000, dtype=np.uint16), vocab_size=1000)


@quick
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 999))
def test_a_batch_is_windows_and_their_next_tokens(seed, step, micro, batch, block):
    x, y = train_batch(CORPUS, seed, step, micro, batch, block)
    assert x.shape == y.shape == (batch, block)
    assert x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous and y.flags.c_contiguous
    # in this corpus a token is its own position
    assert (y == x + 1).all() and (np.diff(x) == 1).all()
    again = train_batch(CORPUS, seed, step, micro, batch, block)
    assert (again[0] == x).all() and (again[1] == y).all()


def starts(seed, step, micro, batch=64):
    return train_batch(CORPUS, seed, step, micro, batch, 4)[0][:, 0].tolist()


def test_every_seed_step_and_micro_batch_has_its_own_windows():
    keys = [(seed, step, micro) for seed in range(3) for step in range(3) for micro in range(3)]
    assert len({tuple(starts(*key)) for key in keys}) == len(keys)
    assert starts(1, 2, 3, batch=8) == starts(1, 2, 3, batch=64)[:8]


def test_batches_are_the_same_everywhere_and_forever():
    """Recorded once: a change here makes every earlier run incomparable."""
    assert starts(1337, 0, 0, batch=6) == [503, 418, 925, 586, 429, 288]
    assert starts(1337, 1, 2, batch=6) == [819, 248, 93, 675, 77, 58]


@quick
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_every_split_of_a_global_batch_holds_the_same_sequences_in_the_same_order(drawn, batch, count):
    """Whether draws are larger than micro-batches or smaller, and where neither divides the other."""
    def sequences(batch, drawn):
        parts = [train_batch(CORPUS, 5, 6, micro, batch, 4, drawn) for micro in range(-(-count // batch))]
        return np.concatenate([x for x, _ in parts])[:count].tolist()
    assert sequences(batch, drawn) == sequences(drawn, 0) == sequences(count, drawn)


def test_windows_are_uniform_and_reach_both_ends():
    drawn = np.array([start for step in range(400) for start in starts(7, step, 0)])
    assert drawn.min() == 0 and drawn.max() == 1000 - 5
    counts = np.bincount(drawn, minlength=996)
    expected = len(drawn) / 996
    assert ((counts - expected) ** 2 / expected).sum() < 996 + 5 * np.sqrt(2 * 996)  # chi square, five sigma


def test_one_window_is_enough_and_less_is_refused():
    tokens = Tokens(np.arange(5, dtype=np.uint16), 10)
    x, y = train_batch(tokens, 1, 0, 0, 3, 4)
    assert x.tolist() == [[0, 1, 2, 3]] * 3 and y.tolist() == [[1, 2, 3, 4]] * 3
    with pytest.raises(ValueError):
        train_batch(tokens, 1, 0, 0, 1, 5)


def test_a_batch_with_an_unknown_id_is_refused():
    with pytest.raises(UserError):
        train_batch(Tokens(np.full(100, 300, np.uint16), 256), 1, 0, 0, 1, 8)


sizes = st.tuples(st.integers(2, 999), st.integers(1, 20), st.integers(1, 6), st.integers(1, 50)).filter(
    lambda s: s[0] > s[3])


@quick
@given(sizes)
def test_the_evaluation_set_is_fixed_spread_and_scores_no_token_twice(size):
    length, batches, batch, block = size
    tokens = Tokens(np.arange(length, dtype=np.uint16), 1000)
    chosen = EvalSet(tokens, batches, batch, block, 1000)
    drawn = list(chosen)
    assert len(drawn) == len(chosen) == chosen.n_batches <= batches
    assert chosen.n_tokens == sum(y.size for _, y in drawn)
    for x, y in drawn:
        assert x.shape == y.shape == (batch, block) and x.dtype == y.dtype == np.int64
        assert (y == x + 1).all()
    targets = np.concatenate([y.ravel() for _, y in drawn])
    fitting = (length - 1) // block
    if fitting >= batch:  # whole batches fit: as many as asked for, or all of them, and none twice
        assert chosen.n_batches == min(batches, fitting // batch)
        assert len(set(targets.tolist())) == len(targets)
    else:
        assert chosen.n_batches == 1
    begins = [row[0] for x, _ in drawn for row in x]
    assert begins == sorted(begins) and begins[0] == 0
    if len(begins) > 1:
        assert targets.max() == length - 1  # reaches the end
        steps = np.diff(begins)
        assert steps.max() - steps.min() <= 1  # evenly
    assert all((a[0] == b[0]).all() for a, b in zip(drawn, chosen, strict=True))


def test_the_evaluation_hash_is_that_of_content_and_shape():
    ids = np.arange(200, dtype=np.uint16)
    known = EvalSet(Tokens(ids, 256), 2, 3, 8, 256).hash
    assert EvalSet(Tokens(np.split(ids, [17, 90]), 256), 2, 3, 8, 300).hash == known
    assert EvalSet(Tokens(ids, 256), 3, 2, 8, 256).hash != known
    changed = ids.copy()
    changed[0] = 9
    assert EvalSet(Tokens(changed, 256), 2, 3, 8, 256).hash != known
    windows = np.concatenate([np.column_stack([x, y[:, -1:]]) for x, y in EvalSet(Tokens(ids, 256), 2, 3, 8, 256)])
    assert known == hashlib.sha256(b"2 3 8\n" + windows.astype("<u2").tobytes()).hexdigest()


def test_windows_are_spread_over_a_corpus_beyond_64_bit_products():
    class Vast:
        vocab_size = 256

        def __len__(self):
            return 10**13

    chosen = EvalSet(Vast(), 10**6, 64, 1024, 256)
    last = chosen.starts(10**6 - 1)
    assert last[-1] == 10**13 - 1 - 1024
    assert all(isinstance(start, int) and start > 0 for start in last)


@pytest.mark.parametrize("length, batches, batch, block, vocab", [(8, 1, 1, 8, 256), (99, 0, 1, 8, 256),
                                                                  (99, 1, 0, 8, 256), (99, 1, 1, 8, 255)])
def test_an_impossible_evaluation_set_is_refused(length, batches, batch, block, vocab):
    with pytest.raises(ValueError):
        EvalSet(Tokens(np.zeros(length, np.uint16), 256), batches, batch, block, vocab)


def test_unigram_entropy_of_known_frequencies():
    rng = np.random.default_rng(0)
    ids = rng.choice(4, size=200_000, p=[0.5, 0.25, 0.125, 0.125]).astype(np.uint16)
    tokens = Tokens(ids, 4)
    assert unigram_entropy(tokens, EvalSet(tokens, 50, 8, 64, 4)) == pytest.approx(1.75 * np.log(2), abs=0.01)


def test_unigram_entropy_by_hand():
    train, val = Tokens(np.array([0, 0, 1], np.uint16), 3), Tokens(np.array([9, 0, 2, 2], np.uint16) % 3, 3)
    # counts plus one: 3/6, 2/6, 1/6; targets 0, 2, 2
    expected = -(np.log(3 / 6) + 2 * np.log(1 / 6)) / 3
    assert unigram_entropy(train, EvalSet(val, 1, 1, 3, 3)) == pytest.approx(expected)
