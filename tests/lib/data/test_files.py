import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from lib.data.files import MAGIC, open_shard, repo_path, split_files
from lib.errors import UserError
from lib.paths import ROOT, shown

quick = settings(max_examples=50, deadline=None)  # the machine may be busy

IDS = np.array([1, 2, 50256, 3], np.uint16)


def headered(ids, magic=MAGIC, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.astype("<u2").tobytes()


def refusal(path):
    with pytest.raises(UserError) as raised:
        open_shard(path)
    assert raised.value.what.startswith(str(path)) and raised.value.what.endswith(".")
    return raised.value.what


@quick
@given(st_numpy.arrays(np.uint16, st.integers(1, 600), elements=st.integers(0, 50256)))
def test_every_kind_of_file_gives_the_ids_back(tmp_path_factory, ids):
    folder = tmp_path_factory.getbasetemp() / "kinds"
    folder.mkdir(exist_ok=True)
    (folder / "plain.bin").write_bytes(ids.astype("<u2").tobytes())
    (folder / "headered.bin").write_bytes(headered(ids))
    np.save(folder / "short.npy", ids)
    np.save(folder / "long.npy", ids.astype(np.int32))
    for name in ("plain.bin", "headered.bin", "short.npy", "long.npy"):
        shard = open_shard(folder / name)
        assert shard.tolist() == ids.tolist()
        assert isinstance(shard, np.memmap) and not shard.flags.writeable


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "train.bin"
    for content, reason in [
        (b"", "no tokens"),
        (b"abc", "3 bytes"),
        (headered(IDS)[:100], "ends inside its header"),
        (headered(IDS, version=7), "version 7"),
        (headered(IDS)[:-2], "header says 4"),
        (headered(IDS) + b"\0\0", "holds 5 tokens, but its header says 4"),
        (headered(IDS[:0]), "no tokens"),
    ]:
        path.write_bytes(content)
        assert reason in refusal(path)


def test_other_arrays_are_refused_by_name(tmp_path):
    path = tmp_path / "train.npy"
    for array, reason in [
        (IDS.reshape(2, 2), "2-D"),
        (IDS.astype(np.float32), "float32"),
        (IDS.astype(np.int64), "int64"),
        (IDS[:0], "no tokens"),
    ]:
        np.save(path, array)
        assert reason in refusal(path)
    np.save(path, IDS)
    path.write_bytes(path.read_bytes()[:-2])
    assert "cannot be read" in refusal(path)
    path.write_bytes(b"text")
    assert "cannot be read" in refusal(path)
    np.save(path, np.array([{"an": "object"}]), allow_pickle=True)
    assert "cannot be read" in refusal(path)
    with open(path, "wb") as file:
        np.savez(file, IDS)
    assert "archive" in refusal(path)


def laid_out(folder, *names):
    for name in names:
        (folder / name).touch()
    return {split: [path.name for path in paths] for split, paths in split_files(folder).items()}


def test_the_layouts_people_have(tmp_path):
    for index, (names, train, val) in enumerate([
        (["train.bin", "val.bin", "meta.pkl"], ["train.bin"], ["val.bin"]),
        (["train.bin", "val.bin", "train_000000.bin"], ["train.bin"], ["val.bin"]),
        (["fineweb_val_000000.bin", "fineweb_train_000002.bin", "fineweb_train_000001.bin"],
         ["fineweb_train_000001.bin", "fineweb_train_000002.bin"], ["fineweb_val_000000.bin"]),
        (["edufineweb_train_000001.npy", "edufineweb_val_000000.npy"],
         ["edufineweb_train_000001.npy"], ["edufineweb_val_000000.npy"]),
        (["retrieval_train_0.bin", "retrieval_validation_0.bin"], ["retrieval_train_0.bin"],
         ["retrieval_validation_0.bin"]),
        (["mytrain0.bin", "myval0.bin", ".train_1.bin.x.tmp", ".train_1.bin"], ["mytrain0.bin"], ["myval0.bin"]),
    ]):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert laid_out(folder, *names) == {"train": train, "val": val}


@pytest.mark.parametrize("names, reason", [
    ([], "no train shards"),
    (["train.bin"], "no val shards"),
    (["a.bin", "b.bin"], "no train shards"),
    (["train_val.bin", "val.bin"], "both train and val"),
    (["train.bin", "train.npy", "val_1.bin"], "both as .bin and as .npy"),
])
def test_unclear_layouts_are_refused(tmp_path, names, reason):
    with pytest.raises(UserError) as raised:
        laid_out(tmp_path, *names)
    assert reason in raised.value.what and str(tmp_path) in raised.value.what


def test_relative_paths_count_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repo_path("data/local") == ROOT / "data" / "local"
    assert (ROOT / "lib" / "data" / "files.py").is_file()
    assert repo_path(str(tmp_path)) == tmp_path
    assert shown(ROOT / "data" / "x.bin") == "data/x.bin"
    assert shown(tmp_path) == str(tmp_path)
