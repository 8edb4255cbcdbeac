import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import Tokens, tokens
from lib.errors import UserError

quick = settings(max_examples=50, deadline=None)  # the machine may be busy

shard_sizes = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(sum)


def cut(sizes):
    """(whole, shards): distinct ids cut at the given sizes, empty shards included."""
    whole = np.arange(sum(sizes), dtype=np.uint16)
    return whole, np.split(whole, np.cumsum(sizes)[:-1])


@quick
@given(shard_sizes, st.data())
def test_a_slice_does_not_show_where_shards_end(sizes, data):
    whole, shards = cut(sizes)
    sequence = Tokens(shards, vocab_size=256)
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    got = sequence.slice(start, length)
    assert len(sequence) == len(whole)
    assert got.dtype == np.int64
    assert got.tolist() == whole[start:start + length].tolist()


@quick
@given(shard_sizes, st.integers(1, 12))
def test_windows_are_slices(sizes, length):
    whole, shards = cut(sizes)
    sequence = Tokens(shards, vocab_size=256)
    starts = list(range(len(whole) - length + 1))
    rows = sequence.windows(starts, length)
    assert rows.shape == (len(starts), length)
    assert all(row.tolist() == whole[s:s + length].tolist() for row, s in zip(rows, starts, strict=True))


@pytest.mark.parametrize("start, length", [(-1, 2), (9, 2), (0, 11), (10, 1)])
def test_a_slice_outside_is_refused(start, length):
    with pytest.raises(IndexError):
        Tokens(np.zeros(10, np.uint16), 256).slice(start, length)


def test_a_slice_is_a_copy_and_the_corpus_read_only():
    source = np.zeros(4, np.uint16)
    sequence = Tokens(source, 256)
    sequence.slice(0, 4)[:] = 7
    assert source.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError):
        next(sequence.chunks())[0] = 1


@quick
@given(shard_sizes)
def test_chunks_are_the_sequence(sizes):
    whole, shards = cut(sizes)
    sequence = Tokens(shards, 256)
    assert np.concatenate(list(sequence.chunks())).tolist() == whole.tolist()
    assert sum(map(len, sequence.chunks(5))) == min(5, len(whole))


@quick
@given(shard_sizes)
def test_the_fingerprint_is_that_of_the_content(sizes):
    whole, shards = cut(sizes)
    expected = hashlib.sha256(whole.astype("<u2").tobytes()).hexdigest()
    assert Tokens(shards, 256).fingerprint() == expected
    assert Tokens([shard.astype(np.int32) for shard in shards], 256).fingerprint() == expected
    assert Tokens(whole.astype(">u2"), 256).fingerprint() == expected
    whole[len(whole) // 2] ^= 1
    assert Tokens(whole, 256).fingerprint() != expected


def test_a_large_corpus_is_fingerprinted_from_a_sample(monkeypatch):
    monkeypatch.setattr(tokens, "FULL_TOKENS", 100)
    monkeypatch.setattr(tokens, "SAMPLE_BLOCKS", 4)
    monkeypatch.setattr(tokens, "SAMPLE_TOKENS", 10)
    whole = np.arange(1000, dtype=np.uint16)
    known = Tokens(whole, 1000).fingerprint()
    assert Tokens(np.split(whole, [5, 500]), 1000).fingerprint() == known
    assert Tokens(whole[:-1], 1000).fingerprint() != known
    for position in (0, 335, 999):
        changed = whole.copy()
        changed[position] = 1
        assert (Tokens(changed, 1000).fingerprint() != known) == (whole[position] != 1)
    unseen = whole.copy()
    unseen[100] = 60000
    Tokens(unseen, 1000).check()
    with pytest.raises(UserError):  # the batch that uses it still sees it
        Tokens(unseen, 1000).slice(95, 10)


@quick
@given(shard_sizes, st.data())
def test_an_id_outside_the_vocabulary_is_named(sizes, data):
    whole, shards = cut(sizes)
    names = [f"shard_{i}.bin" for i in range(len(shards))]
    index = data.draw(st.sampled_from([i for i, shard in enumerate(shards) if len(shard)]))
    position = data.draw(st.integers(0, len(shards[index]) - 1))
    shards[index][position] = 60000
    sequence = Tokens(shards, 50257, names, "gpt2")
    expected = (f"shard_{index}.bin holds token id 60000 at position {position}, "
                "but the gpt2 vocabulary ends at 50256.")
    for act in (sequence.check, lambda: sequence.slice(0, len(whole))):
        with pytest.raises(UserError) as raised:
            act()
        assert raised.value.what == expected


def test_a_negative_id_is_outside():
    sequence = Tokens(np.array([0, -1], np.int32), 50257)
    with pytest.raises(UserError):
        sequence.check()
    with pytest.raises(UserError):
        sequence.slice(0, 2)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint16), np.zeros(2, np.int64), np.zeros(2, np.float32)])
def test_other_arrays_are_no_shards(array):
    with pytest.raises(TypeError):
        Tokens(array, 256)
