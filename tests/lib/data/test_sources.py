import hashlib
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from lib.data import open_corpus, sources
from lib.data.shards import verify_prepared
from lib.errors import UserError
from lib.paths import ROOT


def write(path, count, offset=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = (np.arange(count) + offset).astype("<u2")
    path.write_bytes(ids.tobytes())
    return ids


def refusal(cfg):
    with pytest.raises(UserError) as raised:
        open_corpus(cfg)
    assert raised.value.what.endswith(".")
    return raised.value


def test_the_library_imports_no_torch_datasets_or_tiktoken():
    code = ("import sys, lib.data, lib.data.prepare; "
            "assert not {'torch', 'datasets', 'tiktoken', 'rich', 'filelock'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pystdlib_is_the_sources_of_this_python(config):
    start = time.perf_counter()
    corpus = open_corpus(config(DATASET="pystdlib", TOKENIZER="bytes"))
    assert time.perf_counter() - start < 3  # 0.2 s on an idle machine
    assert corpus.vocab_size == 256
    both = b"".join(np.concatenate(list(split.chunks())).astype(np.uint8).tobytes()
                    for split in (corpus.train, corpus.val))
    assert Path(json.__file__).read_bytes() + b"\0" in both
    assert Path(sysconfig.get_paths()["stdlib"], "os.py").read_bytes() + b"\0" in both
    assert Path(pytest.__file__).read_bytes() not in both
    assert 0.02 < len(corpus.val) / len(both) < 0.15


def test_python_files_are_split_by_name_and_nothing_else(tmp_path):
    names = [f"pkg{i % 7}/mod{i}.py" for i in range(400)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    for folder in ("site-packages", "dist-packages", "test", "pkg1/tests", "pkg2/test", "__pycache__", "config-3.11-x"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.py").write_text("# pruned")
    (tmp_path / "_sysconfigdata__linux.py").write_text("# pruned")
    (tmp_path / "notes.txt").write_text("# pruned")
    train, val = (split.astype(np.uint8).tobytes() for split in sources.python_sources(str(tmp_path)))
    parts = {"train": train.decode().split("\0"), "val": val.decode().split("\0")}
    assert parts["train"].pop() == parts["val"].pop() == ""
    assert sorted(parts["train"] + parts["val"]) == sorted(f"# {name}" for name in names)
    assert parts["train"] == sorted(parts["train"]) and parts["val"] == sorted(parts["val"])
    chosen = [f"# {n}" for n in sorted(names) if int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) < 2**64 / 20]
    assert parts["val"] == chosen and 5 <= len(chosen) <= 40
    for name in names[::2]:  # a file stays on its side when others go
        (tmp_path / name).unlink()
    sources.python_sources.cache_clear()
    fewer = sources.python_sources(str(tmp_path))[1].astype(np.uint8).tobytes().decode().split("\0")[:-1]
    assert set(fewer) == {part for part in chosen if (tmp_path / part[2:]).exists()}


def test_a_python_without_sources(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert str(tmp_path) in refusal(config(DATASET="pystdlib", TOKENIZER="bytes")).what


def test_a_local_folder(config, tmp_path):
    train = write(tmp_path / "local" / "train.bin", 100)
    write(tmp_path / "local" / "val.bin", 20, offset=200)
    corpus = open_corpus(config())
    assert (corpus.name, corpus.tokenizer, corpus.vocab_size) == ("local", "gpt2", 50257)
    assert corpus.train.slice(90, 5).tolist() == [90, 91, 92, 93, 94]
    record = corpus.record()
    assert json.loads(json.dumps(record)) == record == {
        "name": "local", "tokenizer": "gpt2", "vocab_size": 50257, "train_tokens": 100, "val_tokens": 20,
        "train_hash": hashlib.sha256(train.tobytes()).hexdigest(), "val_hash": corpus.val.fingerprint()}


def test_how_a_folder_is_cut_into_files_does_not_change_what_is_recorded(config, tmp_path):
    write(tmp_path / "a" / "train.bin", 100)
    write(tmp_path / "a" / "val.bin", 20)
    write(tmp_path / "b" / "x_train_0.bin", 60)
    write(tmp_path / "b" / "x_train_1.bin", 40, offset=60)
    np.save(tmp_path / "b" / "x_val_0.npy", np.arange(20, dtype=np.int32))
    a, b = (open_corpus(config(DATA_LOCAL_DIR=str(tmp_path / name))).record() for name in "ab")
    assert a == b


@pytest.mark.parametrize("dataset", ["local", "shakespeare", "tinystories", "finewebedu"])
def test_a_missing_data_set_is_an_error_that_says_where_and_what_to_run(config, tmp_path, dataset):
    error = refusal(config(DATASET=dataset))
    assert str(tmp_path) in error.what
    assert "DATA_LOCAL_DIR" in error.run if dataset == "local" else error.run == "make data"


def test_a_short_split_is_refused(config, tmp_path):
    write(tmp_path / "local" / "train.bin", 100)
    write(tmp_path / "local" / "val.bin", 9)
    assert len(open_corpus(config()).val) == 9
    write(tmp_path / "local" / "val.bin", 8)
    error = refusal(config())
    assert "validation" in error.what and "8 tokens" in error.what and "GPT2_BLOCK_SIZE=8" in error.what


def test_an_unknown_id_is_refused_by_file_and_position(config, tmp_path):
    write(tmp_path / "local" / "train.bin", 100)
    write(tmp_path / "local" / "val.bin", 20, offset=50250)
    path = tmp_path / "local" / "val.bin"
    assert refusal(config()).what == (
        f"{path} holds token id 50257 at position 7, but the gpt2 vocabulary ends at 50256.")


def prepared(folder, **changes):
    write(folder / "train_000000.bin", 60)
    write(folder / "train_000001.bin", 40, offset=60)
    write(folder / "val_000000.bin", 20)
    corpus = {"tokenizer": "gpt2", "shards": [
        {"split": name.partition("_")[0], "file": name, "tokens": (folder / name).stat().st_size // 2,
         "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in ("train_000000.bin", "train_000001.bin", "val_000000.bin")]}
    (folder / "corpus.json").write_text(json.dumps(corpus | changes))


def test_a_prepared_data_set_is_what_corpus_json_lists(config, tmp_path):
    folder = tmp_path / "data" / "tinystories"
    prepared(folder)
    write(folder / "train_000002.bin", 40)  # left behind by an earlier, larger preparation
    corpus = open_corpus(config(DATASET="tinystories"))
    assert (len(corpus.train), len(corpus.val)) == (100, 20)


def test_a_flipped_bit_of_a_shard_is_named_before_cells_run(config, tmp_path):
    folder = tmp_path / "data" / "tinystories"
    prepared(folder)
    verify_prepared(folder)
    data = bytearray((folder / "train_000001.bin").read_bytes())
    data[7] ^= 1 << 2
    (folder / "train_000001.bin").write_bytes(data)
    with pytest.raises(UserError, match="train_000001.bin is missing or not what was written"):
        verify_prepared(folder)


def test_an_unfinished_or_damaged_preparation_is_refused(config, tmp_path):
    folder, cfg = tmp_path / "data" / "tinystories", config(DATASET="tinystories")
    prepared(folder)
    (folder / "train_000001.bin").write_bytes(b"\0\0")
    assert "train_000001.bin" in refusal(cfg).what
    (folder / "train_000001.bin").unlink()
    assert "train_000001.bin" in refusal(cfg).what
    prepared(folder, tokenizer="other")
    assert "other tokens" in refusal(cfg).what
    outside = {"split": "val", "file": "../x.bin", "tokens": 9, "sha256": "0" * 64}
    for text in ("{", "[]", "{}", '{"tokenizer": "gpt2", "shards": [{"split": "test"}]}', "[" * 100_000,
                 *(json.dumps({"tokenizer": "gpt2", "shards": [outside | change]}) for change in (
                     {}, {"file": "/etc/passwd"}, {"file": "x.bin", "tokens": "9"}, {"file": "x.bin", "sha256": None}))):
        (folder / "corpus.json").write_text(text)
        assert "corpus.json cannot be read" in refusal(cfg).what
    (folder / "corpus.json").unlink()
    error = refusal(cfg)
    assert "did not finish" in error.what and error.run == "make data"


def test_names_that_do_not_fit_are_refused(config):
    refusal(config(DATASET="imaginary"))
    refusal(config(DATASET="pystdlib", TOKENIZER="gpt2"))
