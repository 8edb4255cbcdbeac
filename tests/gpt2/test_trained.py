"""The model of a finished cell: as it was trained, or one sentence on what is wrong with the file."""

import pytest
import torch

from gpt2 import trained
from gpt2.model import GPT
from lib import checkpoint
from lib.config import load
from tests.harness import refusal

MEND = "use the version of the code that trained it, or move the folder away and run make again."


@pytest.fixture(scope="module")
def cfg():
    return load("gpt2-ra-ablation+tiny", "V1", {"GPT2_BLOCK_SIZE": 16})


def test_it_is_the_model_as_it_was_saved(tmp_path, cfg):
    model = GPT(cfg)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    checkpoint.save(tmp_path / "model.pt", model=model.state_dict(), identity="mine")
    for identity in ("mine", None):
        found = trained.load(tmp_path, cfg, identity).state_dict()
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_what_is_wrong_with_the_file_is_said(tmp_path, cfg):
    path = tmp_path / "model.pt"
    assert refusal(trained.load, tmp_path, cfg) == (
        f"{tmp_path} has no model.pt: it is not finished, SAVE_MODEL was off, or it was unpacked from an archive.",
        "run the cell with SAVE_MODEL=y.")
    path.write_bytes(b"no")
    assert refusal(trained.load, tmp_path, cfg)[0].startswith(f"{path} cannot be read: ")
    state = GPT(cfg).state_dict()
    for content, identity, what, then in (
            ({"model": state}, "mine", "is not the model of the result beside it.", "move the folder away and run make again."),
            ({"model": state, "identity": "another"}, "mine", "is not the model of the result beside it.",
             "move the folder away and run make again."),
            ({"model": {}}, None, "does not fit the model of its configuration: Missing key", MEND),
            ({}, None, "does not fit the model of its configuration: ", MEND),
            ({"model": state | {"transformer.ln_f.bias": torch.full((128,), float("nan"))}}, None,
             "holds numbers that are not finite: its training diverged.", "choose a cell that did not.")):
        checkpoint.save(path, **content)
        found = refusal(trained.load, tmp_path, cfg, identity)
        assert found[0].startswith(f"{path} {what}") and found[1] == then
