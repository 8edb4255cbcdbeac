"""Files that are either whole or absent.

Contract: after `write_text`, `write_bytes` or a finished `replacing` block the file holds the new content, on disk; if
anything fails or the process dies before that, the old content is still there. The temporary file lies in the same
folder, because a rename is atomic only within one file system.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; results are for the group too
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def write_bytes(path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    """Strict JSON: a NaN or infinity is refused here instead of breaking a reader later."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
