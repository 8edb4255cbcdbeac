"""Tensors on disk: whole files only, and nothing in them is executed."""

import errno
import os
import resource
import zipfile

import pytest
import torch

from lib import checkpoint
from lib.errors import UserError


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "x.pt", tensor=torch.arange(3), nested={"a": [1, 2.5, "b", None]})
    content = checkpoint.load(tmp_path / "x.pt")
    assert content["tensor"].tolist() == [0, 1, 2] and content["nested"] == {"a": [1, 2.5, "b", None]}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "x.pt", value=1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "x.pt", value=2)
    assert checkpoint.load(tmp_path / "x.pt")["value"] == 1
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_file_before_is_kept_where_that_is_asked_for(tmp_path):
    for value in (1, 2, 3):
        checkpoint.save(tmp_path / "x.pt", kept_as=tmp_path / "y.pt", value=value)
    assert [checkpoint.load(tmp_path / name)["value"] for name in ("x.pt", "y.pt")] == [3, 2]
    assert sorted(os.listdir(tmp_path)) == ["x.pt", "y.pt"]


def test_any_bit_that_flips_is_found_or_means_nothing(tmp_path):
    path, tensors = tmp_path / "x.pt", {"a": torch.randn(300), "b": torch.arange(40)}
    checkpoint.save(path, tensors=tensors, note="as written")
    good, refused = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        starts = [i.header_offset + i.file_size for i in archive.infolist()]  # within or near each member's content
    for position in sorted({*range(0, len(good), 41), *starts}):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1:])
        try:
            content = checkpoint.load(path)
        except checkpoint.Damaged:
            refused += 1
            continue
        assert content["note"] == "as written" and all(torch.equal(content["tensors"][n], t) for n, t in tensors.items())
    assert refused > 40
    tensor = good.index(tensors["a"].numpy().tobytes())
    path.write_bytes(good[:tensor + 5] + b"\0" + good[tensor + 6:])
    with pytest.raises(checkpoint.Damaged, match="cannot be read: Bad CRC-32 for file"):
        checkpoint.load(path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_is_damaged(tmp_path, share):
    path = tmp_path / "x.pt"
    checkpoint.save(path, tensor=torch.randn(1000))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(checkpoint.Damaged, match="cannot be read"):
        checkpoint.load(path)


def test_a_disk_that_fails_is_not_taken_for_damage(tmp_path, monkeypatch):
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(UserError, match="x.pt cannot be read: Is a directory.") as raised:
        checkpoint.load(tmp_path / "x.pt")
    assert not isinstance(raised.value, checkpoint.Damaged)


def test_a_disk_that_is_full_says_so_and_leaves_the_old_file(tmp_path):
    """torch's own writer would only say that a position is unexpected."""
    checkpoint.save(tmp_path / "x.pt", value=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the largest file this process may write
    try:
        with pytest.raises(OSError) as raised:
            checkpoint.save(tmp_path / "x.pt", tensor=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert checkpoint.load(tmp_path / "x.pt")["value"] == 1 and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("damage", ["cut", "text", "other format", "pickle"])
def test_damaged_and_hostile_files_are_refused_with_a_sentence(tmp_path, damage):
    path = tmp_path / "x.pt"
    checkpoint.save(path, tensor=torch.zeros(1000))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "other format":
        torch.save({"format": 99}, path)
    else:
        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/executed",)
        torch.save({"format": 1, "x": Hostile()}, path)
    with pytest.raises(UserError, match="cannot be read|is not of format 1"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no .*x.pt"):
        checkpoint.load(tmp_path / "x.pt")
