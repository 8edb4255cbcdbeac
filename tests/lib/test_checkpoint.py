"""Tensors on disk: whole files only, and nothing in them is executed."""

import os

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
