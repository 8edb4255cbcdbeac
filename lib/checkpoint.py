"""Tensors on disk: written atomically, read without executing anything, and only if every byte is the one that was written.

Files hold tensors and plain JSON types only, so that they load with weights_only=True. They are torch's zip archives, in which
every member has a CRC-32 that torch computes as it writes; torch does not look at it again, `load` does.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from lib import failures
from lib.atomic import replacing
from lib.errors import UserError
from lib.paths import shown

FORMAT = 1
READ_BYTES = 1 << 20


class Damaged(UserError):
    """A file that is there and can be read, but does not hold what `save` wrote."""


def save(path: Path | str, *, kept_as: Path | str | None = None, **content: Any) -> None:
    """Write `content` (tensors, dicts, lists, numbers, strings) to `path`, whole or not at all; the file that was there becomes
    `kept_as`, if given. OSError if the disk fails."""
    with replacing(path, kept_as) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError:
            _ask_the_disk(temporary)
            raise


def _ask_the_disk(path: Path) -> None:
    """torch's writer says that a write fell short, but not why; another write says it as an OSError, if it still holds."""
    with open(path, "ab", buffering=0) as file:
        file.write(bytes(READ_BYTES))
        os.fsync(file.fileno())


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save` wrote; UserError if it is missing, and Damaged if it is not whole or of another format.

    An error of too little memory says nothing about the file, and comes through."""
    try:
        verify(path)
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}.", "run the cell that writes it.") from None
    except Exception as error:  # torch and zipfile raise a dozen types for damaged files
        if failures.kind(error) == failures.MEMORY:
            raise
        if isinstance(error, OSError):  # says nothing about the file either
            raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}.",
                            "mend the disk or the permissions, then make again.") from None
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise Damaged(f"{path} cannot be read: {reason}.", "move it away and run make again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Damaged(f"{path} is not of format {FORMAT}.", "move it away and run make again.")
    return content


def verify(path: Path) -> None:
    """Compare every member of the archive with its checksum; zipfile.BadZipFile names the first that differs."""
    buffer = bytearray(READ_BYTES)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{member.filename} is compressed")
            with archive.open(member) as file:  # raises at a wrong sum once it has read to the end
                while file.readinto(buffer):  # type: ignore[attr-defined]  # a file without a buffer
                    pass
