"""Two checkpoints a cell: whatever happens to the newest, the one before it is there and good."""

import errno
import os

import pytest
import torch

from lib import atomic, checkpoint, generations
from tests.harness import refusal

NEWEST, BEFORE = generations.NAMES
TOO_LITTLE_MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"),
                     RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
                     OSError(errno.ENOMEM, "Cannot allocate memory")]


def save(folder, *iterations):
    for number in iterations:
        generations.save(folder, progress={"iteration": number})


def iteration(folder):
    return generations.load(folder, "cpu")["progress"]["iteration"]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 16
    path.write_bytes(content)


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path, capsys):
    assert not generations.there(tmp_path) and generations.load(tmp_path, "cpu") is None
    save(tmp_path, 10)
    assert generations.there(tmp_path) and os.listdir(tmp_path) == [NEWEST]
    save(tmp_path, 20, 30)
    assert sorted(os.listdir(tmp_path)) == sorted(generations.NAMES) and iteration(tmp_path) == 30
    assert checkpoint.load(tmp_path / BEFORE)["progress"]["iteration"] == 20 and capsys.readouterr().out == ""
    generations.remove(tmp_path)
    assert os.listdir(tmp_path) == [] and not generations.there(tmp_path)
    generations.remove(tmp_path)


@pytest.mark.parametrize("harm", [damage, lambda path: os.truncate(path, 200), lambda path: path.write_text("hello")])
def test_a_damaged_newest_falls_back_with_one_sentence_and_is_pushed_out(tmp_path, capsys, harm):
    save(tmp_path, 10, 20)
    harm(tmp_path / NEWEST)
    assert iteration(tmp_path) == 10
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {tmp_path}/{NEWEST} cannot be read: ") and said.count("\n") == 1
    assert said.endswith(", it is checkpoint.damaged.pt now; going on from the one before it, of iteration 10\n")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.damaged.pt", NEWEST]
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(tmp_path / "checkpoint.damaged.pt")
    save(tmp_path, 30)
    assert iteration(tmp_path) == 30
    damage(tmp_path / NEWEST)
    assert iteration(tmp_path) == 10, "the good one was not pushed out by the damaged one"
    generations.remove(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", TOO_LITTLE_MEMORY)
def test_too_little_memory_costs_no_checkpoint(tmp_path, monkeypatch, capsys, error):
    save(tmp_path, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            generations.load(tmp_path, "cpu")
    assert iteration(tmp_path) == 20 and capsys.readouterr().out == ""
    assert sorted(os.listdir(tmp_path)) == sorted(generations.NAMES)


def test_a_process_that_died_between_the_two_renames_has_lost_nothing(tmp_path, monkeypatch, capsys):
    save(tmp_path, 10)
    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", lambda old, new: real(old, new) if str(new).endswith(BEFORE) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 20)
    assert os.listdir(tmp_path) == [BEFORE] and generations.there(tmp_path)
    assert iteration(tmp_path) == 10 and capsys.readouterr().out == "" and os.listdir(tmp_path) == [NEWEST]


def test_a_save_that_fails_costs_neither(tmp_path, monkeypatch):
    save(tmp_path, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 30)
    assert [checkpoint.load(tmp_path / name)["progress"]["iteration"] for name in generations.NAMES] == [20, 10]


def test_two_damaged_ones_are_one_sentence_and_stay(tmp_path):
    save(tmp_path, 10, 20)
    for name in generations.NAMES:
        damage(tmp_path / name)
    what, run = refusal(generations.load, tmp_path, "cpu")
    assert what.startswith(f"{tmp_path} has no checkpoint that can be read: {tmp_path}/{NEWEST} cannot be read: ")
    assert "RETRY=1 then starts the cell anew" in run and sorted(os.listdir(tmp_path)) == sorted(generations.NAMES)


def test_a_disk_that_fails_does_not_cost_the_newest(tmp_path):
    save(tmp_path, 10)
    os.rename(tmp_path / NEWEST, tmp_path / BEFORE)
    (tmp_path / NEWEST).mkdir()
    what, _ = refusal(generations.load, tmp_path, "cpu")
    assert what == f"{tmp_path}/{NEWEST} cannot be read: Is a directory." and (tmp_path / BEFORE).exists()


def test_what_moves_at_a_fall_back_is_on_disk(tmp_path, monkeypatch):
    """After a power cut the good one would else lie under the name of the older one, and be pushed out."""
    save(tmp_path, 10, 20)
    damage(tmp_path / NEWEST)
    seen, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(os.path.basename(new)), real(old, new)))
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.readlink(f"/proc/self/fd/{handle}")))
    assert iteration(tmp_path) == 10
    assert seen == [generations.DAMAGED, str(tmp_path), NEWEST, str(tmp_path)]
