import hashlib
import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import shards
from lib.errors import UserError

REQUEST = {"name": "x", "tokenizer": "gpt2", "source": "there"}


class Killed(Exception):
    pass


def source(lengths, val_lengths=None):
    """`documents` of write_corpus: document i has lengths[i] tokens, all different; 0 is one without text."""
    def documents(split, skip):
        sizes = lengths if split == "train" else val_lengths
        first = 0 if split == "train" else 30_000
        begins = np.cumsum([first, *sizes])
        for begin, size in list(zip(begins, sizes, strict=False))[skip:]:
            yield np.arange(begin, begin + size).astype(np.uint16)
    return documents


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder, lengths, val_lengths=None, **options):
    folder.mkdir(exist_ok=True)
    return shards.write_corpus(folder, REQUEST, source(lengths, val_lengths), own_val=val_lengths is not None,
                               **options)


def tokens_of(folder, corpus, split):
    files = [shard["file"] for shard in corpus["shards"] if shard["split"] == split]
    return np.concatenate([np.fromfile(folder / name, "<u2") for name in files]).tolist()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    monkeypatch.setattr(shards, "VAL_EVERY", 4)
    monkeypatch.setattr(shards, "VAL_TOKENS", 40)
    monkeypatch.setattr(shards.atomic.os, "fsync", lambda file: None)  # hypothesis writes thousands of files


def test_every_nth_document_validates_until_there_are_enough(tmp_path):
    corpus = write(tmp_path / "a", [15] * 40)
    expected_val = [i for i in range(600) if i // 15 % 4 == 3][:45]  # three documents reach 40 tokens
    assert tokens_of(tmp_path / "a", corpus, "val") == expected_val
    assert tokens_of(tmp_path / "a", corpus, "train") == [i for i in range(600) if i not in set(expected_val)]
    assert corpus["train_tokens"] == 555 and corpus["val_tokens"] == 45
    assert corpus["documents"] == 40 and corpus["exhausted"]
    assert json.loads((tmp_path / "a" / "corpus.json").read_text()) == corpus


def test_shards_end_between_documents_and_are_hashed(tmp_path):
    corpus = write(tmp_path / "a", [15] * 40)
    train = [shard for shard in corpus["shards"] if shard["split"] == "train"]
    assert [shard["tokens"] for shard in train] == [60] * 9 + [15]
    assert [shard["file"] for shard in train] == [f"train_{i:06d}.bin" for i in range(10)]
    for shard in corpus["shards"]:
        assert hashlib.sha256((tmp_path / "a" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert set(contents(tmp_path / "a")) == {shard["file"] for shard in corpus["shards"]} | {"corpus.json"}


def test_an_own_validation_split_is_used_up_to_the_limit(tmp_path):
    corpus = write(tmp_path / "a", [15] * 8, val_lengths=[12] * 8)
    assert tokens_of(tmp_path / "a", corpus, "val") == list(range(30_000, 30_048))
    assert tokens_of(tmp_path / "a", corpus, "train") == list(range(120))


def test_it_stops_after_the_tokens_asked_for(tmp_path):
    corpus = write(tmp_path / "a", [15] * 40, train_limit=100)
    assert corpus["train_tokens"] == 105 and not corpus["exhausted"]


def test_few_documents_are_cut_in_tokens(tmp_path):
    corpus = write(tmp_path / "a", [40])
    assert tokens_of(tmp_path / "a", corpus, "train") == list(range(36))
    assert tokens_of(tmp_path / "a", corpus, "val") == list(range(36, 40))


@pytest.mark.parametrize("lengths", [[], [0], [1], [60], [0, 0, 0, 5]])
def test_too_little_text_is_refused(tmp_path, lengths):
    with pytest.raises(UserError):
        write(tmp_path / "a", lengths)
    assert not (tmp_path / "a" / "corpus.json").exists()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=8, max_size=40).filter(lambda sizes: sum(sizes) > 60),
       st.none() | st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 300),
       st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_interruptions_do_not_change_a_byte(tmp_path_factory, lengths, val_lengths, limit, deaths):
    straight, broken = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("broken")
    try:
        whole = write(straight, lengths, val_lengths, train_limit=limit)
    except UserError:
        whole = None  # too few documents for a validation split: then so it must be below
    for death in deaths:  # each time killed after so many documents, at a shard's border or inside
        left = iter(range(death))

        def progress(tokens, documents, left=left):
            if next(left, None) is None:
                raise Killed

        try:
            write(broken, lengths, val_lengths, train_limit=limit, progress=progress)
            break
        except Killed:
            assert not (broken / "corpus.json").exists()
        except UserError:
            break
    if whole is None:
        return
    if not (broken / "corpus.json").exists():
        assert write(broken, lengths, val_lengths, train_limit=limit) == whole
    assert contents(broken) == contents(straight)


@pytest.mark.parametrize("kind", ["own", "every"])
def test_death_at_any_write_does_not_change_a_byte(tmp_path, kind):
    lengths, val_lengths = [15] * 20, ([12] * 3 if kind == "own" else None)
    write(tmp_path / "straight", lengths, val_lengths)
    replace = shards.atomic.os.replace
    for survived in range(20):
        folder = tmp_path / str(survived)
        left = iter(range(survived))

        def dying(old, new, left=left):
            if next(left, None) is None:
                raise Killed
            replace(old, new)

        with mock.patch.object(shards.atomic.os, "replace", dying):
            try:
                write(folder, lengths, val_lengths)
                break
            except Killed:
                pass
        write(folder, lengths, val_lengths)
        assert contents(folder) == contents(tmp_path / "straight")
    assert survived > 10


def interrupted(folder):
    def progress(tokens, documents):
        if documents == 12:
            raise Killed
    with pytest.raises(Killed):
        write(folder, [15] * 20, progress=progress)
    assert (folder / "progress.json").exists()


def test_it_continues_after_the_last_full_shard(tmp_path):
    interrupted(tmp_path / "a")
    seen = []
    write(tmp_path / "a", [15] * 20, progress=lambda tokens, documents: seen.append(documents))
    assert seen[0] == 11 and seen[-1] == 20  # two shards of four documents, and two that validate


def test_what_was_begun_otherwise_or_damaged_is_not_continued(tmp_path, monkeypatch):
    interrupted(tmp_path / "a")
    with pytest.raises(UserError, match="another source"):
        shards.write_corpus(tmp_path / "a", REQUEST | {"source": "elsewhere"}, source([15] * 20), own_val=False)
    (tmp_path / "a" / "train_000001.bin").write_bytes(bytes(120))
    with pytest.raises(UserError, match="train_000001.bin"):
        write(tmp_path / "a", [15] * 20)
    (tmp_path / "a" / "train_000001.bin").unlink()
    with pytest.raises(UserError, match="train_000001.bin"):
        write(tmp_path / "a", [15] * 20)
    (tmp_path / "a" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="progress.json"):
        write(tmp_path / "a", [15] * 20)
