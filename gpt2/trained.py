"""The model that a finished cell left in its folder.

Contract: the model on the CPU, as trained (not baked), of what the cell's configuration describes; whatever is wrong with the
file is a UserError that says what to do.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2 import kvsplice
from gpt2.model import GPT
from lib import checkpoint
from lib.errors import UserError
from lib.paths import shown

if TYPE_CHECKING:
    from lib.config import Config

NAME = "model.pt"


def load(folder: Path, cfg: "Config", identity: str | None = None) -> GPT:
    """The model in `folder`, of the configuration `cfg`. UserError if there is none, if it is damaged, does not fit, or holds
    numbers that are not finite, or if it is not of the cell with this `identity`, where one is given."""
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{shown(folder)} has no {NAME}: it is not finished, SAVE_MODEL was off, or it was unpacked from an "
                        "archive.", "run the cell with SAVE_MODEL=y.")
    content = checkpoint.load(path)
    if identity is not None and content.get("identity") != identity:
        raise UserError(f"{shown(path)} is not the model of the result beside it.", "move the folder away and run make again.")
    model = GPT(cfg)
    try:
        model.load_state_dict(content.get("model"))
    except (RuntimeError, TypeError) as error:  # another tensor; no tensors at all
        raise UserError(f"{shown(path)} does not fit the model of its configuration: {str(error).splitlines()[-1].strip()}.",
                        "use the version of the code that trained it, or move the folder away and run make again.") from None
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"{shown(path)} holds numbers that are not finite: its training diverged.",
                        "choose a cell that did not.")
    if kvsplice.codecs(model):
        for fit in sorted(folder.glob("kvsplice_*.pt")):  # what was published of the model is the model's
            kvsplice.verify(fit, model)
    return model
