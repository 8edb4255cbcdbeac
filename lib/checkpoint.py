"""Tensors on disk: written atomically, read without executing anything.

Files hold tensors and plain JSON types only, so that they load with weights_only=True.
"""

import torch

from lib.atomic import replacing
from lib.errors import UserError

FORMAT = 1


def save(path, **content) -> None:
    """Write `content` (tensors, dicts, lists, numbers, strings) to `path`, whole or not at all."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load(path, device="cpu") -> dict:
    """Read what `save` wrote; UserError if it is missing, damaged or of another format."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}.", "run the cell that writes it.") from None
    except Exception as error:  # torch raises a dozen types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}.", "move it away and run make again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}.", "move it away and run make again.")
    return content
