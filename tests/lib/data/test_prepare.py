import errno
import io
import json
import logging
import os

import filelock
import numpy as np
import pytest

from lib.data import open_corpus, prepare, shards
from lib.data.sources import PREPARED
from lib.errors import UserError

TEXTS = [f"Story number {i}.\n\nIt ends with the word {'very ' * (i % 9)}well." for i in range(60)]


@pytest.fixture
def encoding(gpt2_files, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "TORCH_AVAILABLE", False)  # it would import torch, seconds for nothing
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return prepare.gpt2_encoding()


def jsonl(path, texts, key="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def ids(encoding, texts):
    return [token for text in texts if text for token in [50256, *encoding.encode_ordinary(text)]]


def prepared(cfg, **options):
    prepare.prepare(cfg, progress=lambda tokens, documents: None, **options)
    corpus = open_corpus(cfg)
    return (split.slice(0, len(split)).tolist() for split in (corpus.train, corpus.val))


def refusal(cfg):
    with pytest.raises(UserError) as raised:
        prepare.prepare(cfg, progress=lambda tokens, documents: None)
    assert raised.value.what.endswith(".")
    return raised.value


def test_the_encoding_is_gpt2s(encoding):
    assert encoding.n_vocab == 50257 and encoding.eot_token == 50256
    assert encoding.encode_ordinary("hello world") == [31373, 995]
    assert encoding.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    text = "naïve 日本 🙂\n\n\tdef f(x):  return x"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_another_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_GPT2_DIR", str(tmp_path))
    with pytest.raises(UserError, match="TIKTOKEN_GPT2_DIR"):
        prepare.gpt2_encoding()
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match="TIKTOKEN_GPT2_DIR"):
        prepare.gpt2_encoding()


def test_no_vocabulary_and_no_network(monkeypatch):
    import tiktoken

    def unreachable(name):
        raise OSError("Name or service not known")

    monkeypatch.delenv("TIKTOKEN_GPT2_DIR", raising=False)
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError) as raised:
        prepare.gpt2_encoding()
    assert "TIKTOKEN_GPT2_DIR" in raised.value.run


def test_documents_become_tokens_in_order(config, tmp_path, encoding):
    cfg = config(DATASET="finewebedu", DATA_SOURCE=jsonl(tmp_path / "in.jsonl", TEXTS))
    train, val = prepared(cfg)
    assert train == ids(encoding, [text for i, text in enumerate(TEXTS) if i % 20 != 19])
    assert val == ids(encoding, TEXTS[19::20])


def test_empty_documents_leave_nothing_and_long_ones_pass(config, tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 50)
    texts = ["", None, "one", "", "two " * 100, "<|endoftext|>", *["three"] * 20]
    train, val = prepared(config(DATASET="finewebedu", GPT2_BLOCK_SIZE=1,
                                 DATA_SOURCE=jsonl(tmp_path / "in.jsonl", texts)))
    assert train == ids(encoding, texts[:19] + texts[20:])
    assert val == ids(encoding, [texts[19]])


@pytest.mark.parametrize("kind", ["folder", "save_to_disk", "parquet folder"])
def test_a_sources_own_validation_split_is_used(config, tmp_path, encoding, kind):
    import datasets

    folder = tmp_path / "in"
    splits = {"train": TEXTS[:30], "validation": TEXTS[30:35]}
    for name, texts in splits.items():
        if kind == "folder":
            jsonl(folder / f"{name}.jsonl", texts)
        elif kind == "parquet folder":
            folder.mkdir(exist_ok=True)
            datasets.Dataset.from_dict({"text": texts}).to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
    if kind == "save_to_disk":
        datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
                             ).save_to_disk(str(folder))
    train, val = prepared(config(DATASET="tinystories", DATA_SOURCE=str(folder)))
    assert train == ids(encoding, TEXTS[:30]) and val == ids(encoding, TEXTS[30:35])


def test_a_text_file_is_one_document(config, tmp_path, encoding):
    text = "\n\n".join(TEXTS)
    (tmp_path / "input.txt").write_text(text)
    train, val = prepared(config(DATASET="shakespeare", DATA_SOURCE=str(tmp_path / "input.txt")))
    assert train + val == ids(encoding, [text])
    assert len(val) / len(train) == pytest.approx(1 / 9, rel=0.01)


def test_a_folder_of_text_files(config, tmp_path, encoding):
    (tmp_path / "in").mkdir()
    for index, text in enumerate(TEXTS[:25]):
        (tmp_path / "in" / f"{index:02d}.txt").write_text(text)
    train, val = prepared(config(DATASET="shakespeare", DATA_SOURCE=str(tmp_path / "in")))
    assert train == ids(encoding, TEXTS[:19] + TEXTS[20:25]) and val == ids(encoding, [TEXTS[19]])


def test_a_full_disk_is_one_sentence_and_the_next_call_goes_on(config, tmp_path, encoding, monkeypatch):
    cfg = config(DATASET="finewebedu", DATA_SOURCE=jsonl(tmp_path / "in.jsonl", TEXTS))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards.atomic, "write_bytes", full)
        with pytest.raises(UserError, match="finewebedu cannot be written: No space left on device.") as raised:
            prepare.prepare(cfg)
    assert "make data" in raised.value.run
    train, val = prepared(cfg)
    assert train and val


@pytest.mark.parametrize("stop", [10, 30, 50])
def test_interrupted_it_ends_with_the_same_bytes(config, tmp_path, encoding, monkeypatch, stop):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200)
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    cfg, whole = (config(DATASET="finewebedu", DATA_SOURCE=source, DATA_DIR=str(tmp_path / name))
                  for name in ("broken", "whole"))

    def progress(tokens, documents):
        if documents == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(cfg, progress=progress)
    with pytest.raises(UserError, match="did not finish"):
        open_corpus(cfg)
    (tmp_path / "broken" / "finewebedu" / ".train_000000.bin.abc.tmp").touch()  # what a kill leaves behind
    assert list(prepared(cfg)) == list(prepared(whole))
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name / "finewebedu").iterdir()}
            for name in ("broken", "whole"))
    assert a == b


def test_a_finished_data_set_is_verified_and_kept(config, tmp_path, encoding):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    cfg = config(DATASET="finewebedu", DATA_SOURCE=source, DATA_PREPARE_TOKENS=300)
    train, _ = prepared(cfg)
    assert 250 < len(train) < 350
    folder = tmp_path / "data" / "finewebedu"
    before = (folder / "train_000000.bin").stat().st_mtime_ns
    prepared(cfg)
    prepared(config(DATASET="finewebedu", DATA_PREPARE_TOKENS=100))  # less is there too, from whatever source
    assert (folder / "train_000000.bin").stat().st_mtime_ns == before
    for wanted in (1000, 0):
        error = refusal(config(DATASET="finewebedu", DATA_SOURCE=source, DATA_PREPARE_TOKENS=wanted))
        assert "DATA_PREPARE_TOKENS" in error.what and str(folder) in error.run
    assert "made from" in refusal(config(DATASET="finewebedu", DATA_SOURCE=jsonl(tmp_path / "b.jsonl", TEXTS))).what
    data = bytearray((folder / "train_000000.bin").read_bytes())
    data[100] ^= 1
    (folder / "train_000000.bin").write_bytes(data)
    assert "train_000000.bin" in refusal(cfg).what


def test_an_exhausted_source_is_finished_whatever_is_asked(config, tmp_path, encoding):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    prepared(config(DATASET="finewebedu", DATA_SOURCE=source, DATA_PREPARE_TOKENS=10**6))
    prepared(config(DATASET="finewebedu", DATA_SOURCE=source, DATA_PREPARE_TOKENS=10**7))
    prepared(config(DATASET="finewebedu", DATA_SOURCE=source))


def test_sources_that_cannot_be_read_are_refused(config, tmp_path, encoding, caplog):
    caplog.set_level(logging.CRITICAL, "datasets")
    (tmp_path / "odd.pdf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"te\n')
    (tmp_path / "broken.parquet").write_text("no parquet")
    for name in ("absent", "odd.pdf", "empty", "broken.jsonl", "broken.parquet"):
        assert name in refusal(config(DATASET="finewebedu", DATA_SOURCE=str(tmp_path / name))).what
    error = refusal(config(DATASET="finewebedu", DATA_SOURCE=jsonl(tmp_path / "in.jsonl", TEXTS, key="body")))
    assert "text field" in error.what and "body" in error.what
    assert not (tmp_path / "data" / "finewebedu" / "corpus.json").exists()


def test_an_unreachable_hub_is_one_sentence(config, encoding, monkeypatch):
    import datasets

    asked = []

    def unreachable(path, **options):
        asked.append(path)
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for dataset, (name, _) in prepare.HUB.items():
        error = refusal(config(DATASET=dataset))
        assert name in error.what and "long story" not in error.what
        assert error.run.startswith("make data") and "DATA_SOURCE" in error.run
    assert asked == [name for name, _ in prepare.HUB.values()]


def test_a_stream_that_breaks_can_be_continued(config, encoding, monkeypatch):
    import datasets

    class Flaky:
        def __init__(self, first=0):
            self.first = first

        def skip(self, count):
            return Flaky(count)

        def __iter__(self):
            for index in range(self.first, len(TEXTS)):
                if index == 40 and not self.first:
                    raise TimeoutError("no answer")
                yield {"text": TEXTS[index]}

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: {"train": Flaky()})
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200)
    monkeypatch.setattr(prepare, "BATCH_DOCUMENTS", 4)
    cfg = config(DATASET="finewebedu")
    error = refusal(cfg)
    assert "after 40 documents" in error.what and "make data again" in error.run
    train, _ = prepared(cfg)
    assert train == ids(encoding, [text for i, text in enumerate(TEXTS) if i % 20 != 19])


def test_two_preparations_do_not_meet(config, tmp_path, encoding):
    folder = tmp_path / "data" / "finewebedu"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        assert "Another process" in refusal(config(DATASET="finewebedu")).what


def test_only_public_data_sets_are_prepared(config):
    assert set(prepare.HUB) == set(PREPARED)
    refusal(config(DATASET="pystdlib"))


@pytest.mark.parametrize("terminal, term", [(False, "xterm"), (True, "xterm"), (True, "dumb")])
def test_progress_is_shown(config, tmp_path, encoding, monkeypatch, terminal, term):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal or term == "dumb"  # a dumb terminal is one, and gets lines

    terminal = terminal and term != "dumb"
    monkeypatch.setenv("TERM", term)
    clock = iter(np.arange(0, 10**4, 6.0).tolist())
    if not terminal:
        monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    prepare.prepare(config(DATASET="finewebedu", DATA_SOURCE=jsonl(tmp_path / "in.jsonl", TEXTS),
                           DATA_PREPARE_TOKENS=400))
    assert "in.jsonl" in screen.getvalue() and "finewebedu" in screen.getvalue()
    assert ("M tokens" if terminal else " %), ") in screen.getvalue()
