"""Files that are either whole or absent.

Contract: after `write_text`, `write_bytes`, `copy` or a finished `replacing` block the file holds the new content, on disk; if
anything fails or the process dies before that, the old content is still there. The temporary file lies in the same
folder, because a rename is atomic only within one file system. It is locked while its writer lives, so that what a killed
process has left can be told from what is being written. What `rename` moves and `make_folder` makes is on disk too.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path | str, kept_as: Path | str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`.

    The old file becomes `kept_as`, if that is given: between the two renames there is only that one.
    """
    path = Path(path)
    handle, temporary = _locked_beside(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; results are for the group too
        if kept_as is not None and path.exists():
            os.replace(path, kept_as)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    _sync(path.parent)


def _sync(folder: Path | str) -> None:
    """What was made, renamed or moved in `folder` is to survive a power cut: the names are the folder's own content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path | str, new: Path | str) -> None:
    """Rename a file or a folder, also into another folder of the file system; a file that has the new name is replaced."""
    old, new = Path(old), Path(new)
    os.replace(old, new)
    _sync(new.parent)  # first: a power cut between the two leaves it under two names rather than under none
    if old.parent != new.parent:
        _sync(old.parent)


def make_folder(folder: Path | str) -> None:
    """Make `folder`, with those above it that are missing, if it is not there."""
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _locked_beside(path: Path) -> tuple[int, Path]:
    """A new temporary file beside `path` that is locked: its handle and its name. `remove_orphans` may take it for an orphan in
    the instant between the two; then another is made."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks has no orphans that could be told from others
            fcntl.flock(handle, fcntl.LOCK_EX)  # waits while `remove_orphans` has it
        if os.path.exists(name):
            return handle, Path(name)
        os.close(handle)


def remove_orphans(folder: Path | str) -> None:
    """Remove the temporary files in `folder` whose writers are gone; those that are being written stay."""
    for orphan in Path(folder).glob(".*.tmp"):
        try:
            handle = os.open(orphan, os.O_RDWR)
        except OSError:  # just renamed, or another user's
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink(missing_ok=True)
        except OSError:  # its writer lives
            continue
        finally:
            os.close(handle)


def write_bytes(path: Path | str, data: bytes | bytearray) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def copy(source: Path | str, path: Path | str) -> None:
    """Copy the content of a file, piece by piece."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Strict JSON: a NaN or infinity is refused here instead of breaking a reader later."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
