"""The data sets a study can name, opened and checked.

Contract: `open_corpus` returns a corpus whose two splits exist, are long enough for one window, agree with the
tokenizer, and are what was prepared; or it raises UserError saying what is missing and what makes it. There is no
fallback: a run on the wrong data looks like a run.
"""

import hashlib
import json
import os
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib.data.files import listed, open_shard, repo_path, split_files
from lib.data.tokens import Tokens
from lib.errors import UserError
from lib.paths import shown

if TYPE_CHECKING:
    from lib.config import Config

VOCAB_SIZE = {"bytes": 256, "gpt2": 50257}
PREPARED = ("shakespeare", "tinystories", "finewebedu")
# The library's own tests, encodings and pydoc_data are mostly generated tables; site-packages is not the library.
# _sysconfigdata and config-* hold what is particular to one machine's build: without them, one release of Python gives
# one corpus.
PRUNED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
PRUNED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Corpus:
    """A data set: `name` as in the configuration, `tokenizer` (bytes or gpt2), `vocab_size` ids, two splits."""

    name: str
    tokenizer: str
    vocab_size: int
    train: Tokens
    val: Tokens

    def record(self) -> dict:
        """What metrics.json keeps of the data: plain JSON, identifying the content and not where it lies."""
        return {"name": self.name, "tokenizer": self.tokenizer, "vocab_size": self.vocab_size,
                "train_tokens": len(self.train), "val_tokens": len(self.val),
                "train_hash": self.train.fingerprint(), "val_hash": self.val.fingerprint()}


def open_corpus(cfg: "Config") -> Corpus:
    """The configured data set. Reads cfg.DATASET, TOKENIZER, DATA_DIR, DATA_LOCAL_DIR and GPT2_BLOCK_SIZE.

    Raises UserError if it is missing, unfinished, damaged, has ids outside the vocabulary (see `Tokens.check` for how
    much is read), or a split is too short for one window of GPT2_BLOCK_SIZE tokens and their targets.
    """
    if cfg.DATASET == "pystdlib":
        train, val = _pystdlib(cfg.TOKENIZER)
    elif cfg.DATASET == "local":
        train, val = _local(repo_path(cfg.DATA_LOCAL_DIR), cfg.TOKENIZER)
    elif cfg.DATASET in PREPARED:
        train, val = _prepared(repo_path(cfg.DATA_DIR) / cfg.DATASET, cfg.DATASET, cfg.TOKENIZER)
    else:
        raise UserError(f"There is no data set {cfg.DATASET!r}.", "choose one with make menuconfig")
    for split, tokens in (("training", train), ("validation", val)):
        if len(tokens) < cfg.GPT2_BLOCK_SIZE + 1:
            raise UserError(f"The {split} split of {cfg.DATASET} has {len(tokens)} tokens, and one window of "
                            f"GPT2_BLOCK_SIZE={cfg.GPT2_BLOCK_SIZE} needs {cfg.GPT2_BLOCK_SIZE + 1}.",
                            "use a larger data set, or lower GPT2_BLOCK_SIZE with make menuconfig")
        tokens.check()
    return Corpus(cfg.DATASET, cfg.TOKENIZER, VOCAB_SIZE[cfg.TOKENIZER], train, val)


def _pystdlib(tokenizer: str) -> tuple[Tokens, Tokens]:
    if tokenizer != "bytes":
        raise UserError(f"The data set pystdlib is made of bytes, not of {tokenizer} tokens.",
                        "choose another data set with make menuconfig")
    train, val = python_sources(sysconfig.get_paths()["stdlib"])
    return (Tokens(train, VOCAB_SIZE["bytes"], ["pystdlib"], "bytes"),
            Tokens(val, VOCAB_SIZE["bytes"], ["pystdlib"], "bytes"))


@lru_cache(maxsize=1)
def python_sources(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): the bytes of the .py files under `folder`, uint16, in the order of their relative paths.

    Each file is followed by one zero byte. The split is by file, so that no text is on both sides: a file goes to val
    if the sha256 of its relative posix path falls into the lowest 5 %, whatever other files there are.
    """
    paths = {}
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders
                      if name not in PRUNED_FOLDERS and not name.startswith(PRUNED_PREFIXES)]
        for name in names:
            if name.endswith(".py") and not name.startswith(PRUNED_PREFIXES):
                path = Path(where, name)
                paths[path.relative_to(folder).as_posix()] = path
    if not paths:
        raise UserError(f"The standard library in {folder} has no .py files.",
                        "use a Python that comes with its sources, or choose another data set with make menuconfig")
    parts: dict[str, list[bytes]] = {"train": [], "val": []}
    for name in sorted(paths):
        low = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") * 20 < 2**64
        parts["val" if low else "train"] += [paths[name].read_bytes(), b"\0"]
    return tuple(  # type: ignore[return-value]  # two of them
        np.frombuffer(b"".join(parts[split]), np.uint8).astype(np.uint16) for split in ("train", "val"))


def _local(folder: Path, tokenizer: str) -> tuple[Tokens, Tokens]:
    if not folder.is_dir():
        raise UserError(f"The folder {shown(folder)} of the local data set does not exist.",
                        "set DATA_LOCAL_DIR with make menuconfig to a folder with train.bin and val.bin")
    splits = split_files(folder)
    return _tokens(splits["train"], tokenizer), _tokens(splits["val"], tokenizer)


def _prepared(folder: Path, name: str, tokenizer: str) -> tuple[Tokens, Tokens]:
    """The shards that corpus.json lists: it is written last, so a folder without it is not finished, and files that
    an earlier preparation left behind do not count."""
    if not folder.is_dir():
        raise UserError(f"The data set {name} is not there: {shown(folder)} does not exist.", "make data")
    try:
        corpus = json.loads((folder / "corpus.json").read_text())
        made_with, shards = corpus["tokenizer"], {"train": [], "val": []}
        for shard in listed(corpus["shards"]):
            shards[shard["split"]].append((folder / shard["file"], shard["tokens"]))
    except FileNotFoundError as error:
        raise UserError(f"The preparation of {name} in {shown(folder)} did not finish.", "make data") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{shown(folder)}/corpus.json cannot be read.",
                        f"delete {shown(folder)}, then make data") from error
    if made_with != tokenizer:
        raise UserError(f"{shown(folder)} holds {made_with} tokens, and the configuration asks for {tokenizer}.",
                        "choose another data set with make menuconfig")
    for path, count in shards["train"] + shards["val"]:
        if not path.is_file() or path.stat().st_size != 2 * count:
            raise UserError(f"{shown(path)} is missing or damaged: corpus.json says {count} tokens.",
                            f"delete {shown(folder)}, then make data")
    return tuple(  # type: ignore[return-value]  # two of them
        _tokens([path for path, _ in shards[split]], tokenizer) for split in ("train", "val"))


def _tokens(paths: list[Path], tokenizer: str) -> Tokens:
    return Tokens([open_shard(path) for path in paths], VOCAB_SIZE[tokenizer], [shown(path) for path in paths],
                  tokenizer)
