"""Token files on disk: what a shard looks like, and which files of a folder are which split.

Contract: a shard is opened only if its header, size and dtype agree, and is mapped, not read. Three kinds are known:
headerless little-endian uint16 (.bin, nanoGPT), the same behind a header of 256 int32 (.bin, llm.c and the fineweb
shards: magic, version, token count), and a 1-D uint16 or int32 array (.npy). The header's magic cannot be mistaken for
text: read as tokens it begins with id 55896, which GPT-2's vocabulary does not have.
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import UserError
from lib.paths import ROOT, shown

HEADER_BYTES, MAGIC, VERSION = 256 * 4, 20240520, 1
SPLITS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}


def repo_path(text: str) -> Path:
    """A path of the configuration: relative ones count from the repository, so the current folder does not matter."""
    return ROOT / Path(text).expanduser()


def open_shard(path: Path) -> np.ndarray:
    """The token ids of one file as a mapped, read-only 1-D array (uint16 or int32). UserError if it is not a shard."""
    if path.suffix == ".npy":
        return _open_npy(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror}") from error
    if size % 2:
        raise _broken(path, f"has {size} bytes, which is no whole number of 16-bit tokens")
    magic, version, count = struct.unpack("<3i", header[:12].ljust(12, b"\0"))
    if magic != MAGIC:
        return _mapped(path, 0, size // 2)
    if len(header) < HEADER_BYTES:
        raise _broken(path, f"ends inside its header of {HEADER_BYTES} bytes")
    if version != VERSION:
        raise _broken(path, f"has a header of version {version}, and only version {VERSION} (16-bit tokens) is known")
    held = (size - HEADER_BYTES) // 2
    if count != held:
        raise _broken(path, f"holds {held} tokens, but its header says {count}")
    return _mapped(path, HEADER_BYTES, count)


def listed(shards: Any) -> list[dict]:
    """The shards that an index lists. ValueError if one is not what a preparation writes, or lies outside the folder."""
    for shard in shards:
        file, tokens, digest = shard["file"], shard["tokens"], shard["sha256"]
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_]+\.bin", file):
            raise ValueError(f"{str(file)[:100]!r} is no name of a shard")
        if type(tokens) is not int or tokens < 1 or not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise ValueError(f"{file} is listed without its size or its checksum")
    return shards


def split_files(folder: Path) -> dict[str, list[Path]]:
    """{"train": [...], "val": [...]}: the shards of a folder, each list sorted by name.

    `train.bin` with `val.bin` (nanoGPT) is taken alone; otherwise every .bin or .npy whose name contains train or val,
    as a word if it can be (edufineweb_train_000001.npy). UserError if a split is missing or a name is ambiguous.
    """
    if (folder / "train.bin").is_file() and (folder / "val.bin").is_file():
        return {"train": [folder / "train.bin"], "val": [folder / "val.bin"]}
    found: dict[str, list[Path]] = {"train": [], "val": []}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".npy") and not path.name.startswith(".") and path.is_file():
            splits = _splits_of(path.stem.lower())
            if len(splits) > 1:
                raise UserError(f"{shown(path)} is named after both train and val.",
                                "rename it so that its name contains one of them")
            for split in splits:
                found[split].append(path)
    for split, paths in found.items():
        if not paths:
            raise UserError(f"{shown(folder)} holds no {split} shards.",
                            f"put {split}.bin there (16-bit token ids), or .bin or .npy shards with {split} in their "
                            "names")
        if len({path.suffix for path in paths}) > 1:  # most likely one corpus twice
            raise UserError(f"{shown(folder)} holds {split} shards both as .bin and as .npy.",
                            "keep one kind in the folder")
    return found


def _splits_of(stem: str) -> set[str]:
    words = set(re.findall("[a-z]+", stem))
    return ({split for split, names in SPLITS.items() if words & names}
            or {split for split in SPLITS if split in stem})


def _open_npy(path: Path) -> np.ndarray:
    try:  # allow_pickle off: a pickled array runs code of whoever made the file
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header numpy, zipfile and tokenize raise a dozen types
        raise _broken(path, "cannot be read as a .npy array") from error
    if not isinstance(array, np.ndarray):
        raise _broken(path, "is an archive of arrays, not one .npy array")
    if array.ndim != 1 or (array.dtype.kind, array.dtype.itemsize) not in {("u", 2), ("i", 4)}:
        raise _broken(path, f"holds a {array.ndim}-D array of {array.dtype}, and a shard is a 1-D uint16 or int32 one")
    if not len(array):
        raise _broken(path, "holds no tokens")
    return array


def _mapped(path: Path, offset: int, count: int) -> np.ndarray:
    if not count:
        raise _broken(path, "holds no tokens")
    return np.memmap(path, "<u2", mode="r", offset=offset, shape=(count,))


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{shown(path)} {what}.", "write or download the file again, or take it out of the folder")
