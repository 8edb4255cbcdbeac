"""Writing a prepared data set: documents in, shards and corpus.json out, resumable after every shard.

Contract: the bytes depend on the documents and the settings, not on interruptions. `progress.json` is replaced after
each full training shard and says how many documents the shards hold so far; whatever was gathered after it is gathered
again. `corpus.json` is written last, so a folder that has it is whole.

Documents are arrays of token ids. Shards are headerless little-endian uint16 and end between documents; a shard is in
memory until it is full, so memory is bounded by one shard, the validation tokens and the longest document.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lib import atomic
from lib.data.files import listed
from lib.errors import UserError
from lib.paths import shown

SHARD_TOKENS = 100_000_000
VAL_EVERY, VAL_TOKENS = 20, 10_000_000  # every 20th document validates, until these tokens are reached
VAL_FILE = "val_000000.bin"


def write_corpus(folder: Path, request: dict, documents: Callable[[str, int], Iterator[np.ndarray]], own_val: bool,
                 train_limit: int = 0, progress: Callable[[int, int], None] = lambda tokens, documents: None) -> dict:
    """Write (or continue) the data set in `folder` and return what corpus.json holds.

    `request`: JSON that says what is being prepared; continuing what was begun with another one is refused.
    `documents(split, skip)`: the documents of "train" or "val" as uint16 arrays, without the first `skip`; an empty
    array is a document without text and counts as one. `own_val`: the source has a "val" split, which is used (up to
    VAL_TOKENS). Otherwise every VAL_EVERY-th document goes to val, which serves a source of any size and order; from a
    source of fewer documents, the last tenth of the tokens. `train_limit`: stop after the document that reaches so many
    training tokens; 0 takes all. `progress(train_tokens, documents)` is called after each document; what it raises
    interrupts, and a later call continues.
    """
    writer = _Writer(folder, request)
    if own_val and not writer.resumed:
        for tokens in documents("val", 0):
            if writer.val_tokens >= VAL_TOKENS:
                break
            writer.add("val", tokens)
        writer.save_progress()
    exhausted = True
    if not train_limit or writer.train_tokens < train_limit:
        for tokens in documents("train", writer.documents):
            chosen = not own_val and writer.documents % VAL_EVERY == VAL_EVERY - 1 and writer.val_tokens < VAL_TOKENS
            writer.documents += 1
            writer.add("val" if chosen else "train", tokens)
            progress(writer.train_tokens, writer.documents)
            if train_limit and writer.train_tokens >= train_limit:
                exhausted = False
                break
    else:
        exhausted = False
    return writer.finish(train_limit, exhausted)


def verify_prepared(folder: Path) -> None:
    """Compare every shard of a prepared data set that `open_corpus` has opened with its checksum."""
    verify_shards(folder, listed(json.loads((folder / "corpus.json").read_text())["shards"]))


def verify_shards(folder: Path, shards: list[dict]) -> None:
    """Read the listed shards and compare their sha256; UserError for the first that is missing or differs."""
    for shard in shards:
        path = folder / shard["file"]
        try:
            with open(path, "rb") as file:
                # the validation file may already be longer than what the last progress.json knows of it
                digest = _sha256(file.read(2 * shard["tokens"])) if shard["file"] == VAL_FILE else \
                    hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            digest = None
        if digest != shard["sha256"]:
            raise UserError(f"{shown(path)} is missing or not what was written.",
                            f"delete {shown(folder)}, then make data")


class _Writer:
    """The state of one preparation: finished shards, and what is gathered for the next."""

    def __init__(self, folder: Path, request: dict):
        self.folder = folder
        self.request = {**request, "shard_tokens": SHARD_TOKENS, "val_every": VAL_EVERY, "val_limit": VAL_TOKENS}
        self.shards: list[dict] = []
        self.documents = 0  # of "train", consumed
        self._train, self._val = bytearray(), bytearray()
        self._train_tokens = 0  # in finished shards
        self.resumed = (folder / "progress.json").exists()
        if self.resumed:
            self._resume()

    @property
    def train_tokens(self) -> int:
        return self._train_tokens + len(self._train) // 2

    @property
    def val_tokens(self) -> int:
        return len(self._val) // 2

    def add(self, split: str, tokens: np.ndarray) -> None:
        data = tokens.astype("<u2", copy=False).tobytes()
        if split == "val":
            self._val += data
            return
        self._train += data
        if len(self._train) >= 2 * SHARD_TOKENS:
            self._flush()
            self.save_progress()

    def save_progress(self) -> None:
        # the validation file first: if this is as far as it gets, it is longer than progress.json says, which is cut
        val = self._write_val()
        atomic.write_json(self.folder / "progress.json", {
            "request": self.request, "documents": self.documents, "val": val, "shards": self.shards})

    def finish(self, train_limit: int, exhausted: bool) -> dict:
        """Write what is left, then corpus.json. progress.json keeps knowing full shards only, so that being killed in
        here costs one shard and changes nothing."""
        if not self._val and not self.shards:
            cut = len(self._train) // 20 * 18  # nine tenths, a whole number of tokens
            self._val, self._train = self._train[cut:], self._train[:cut]
        if self._train:
            self._flush()
        if not self.shards or not self._val:
            raise UserError(f"{self.request['source']} has too few documents for a training and a validation split.",
                            "set DATA_SOURCE with make menuconfig to a larger one, or to one with a validation split")
        corpus = {**self.request, "train_limit": train_limit, "exhausted": exhausted, "documents": self.documents,
                  "train_tokens": self._train_tokens, "val_tokens": self.val_tokens,
                  "shards": [{"split": "train", **shard} for shard in self.shards]
                  + [{"split": "val", **self._write_val()}]}
        atomic.write_json(self.folder / "corpus.json", corpus)
        (self.folder / "progress.json").unlink(missing_ok=True)
        return corpus

    def _flush(self) -> None:
        name = f"train_{len(self.shards):06d}.bin"
        atomic.write_bytes(self.folder / name, self._train)
        self.shards.append({"file": name, "tokens": len(self._train) // 2, "sha256": _sha256(self._train)})
        self._train_tokens += len(self._train) // 2
        self._train = bytearray()

    def _write_val(self) -> dict:
        atomic.write_bytes(self.folder / VAL_FILE, self._val)
        return {"file": VAL_FILE, "tokens": self.val_tokens, "sha256": _sha256(self._val)}

    def _resume(self) -> None:
        again = f"delete {shown(self.folder)}, then make data"
        try:
            state = json.loads((self.folder / "progress.json").read_text())
            request, self.documents, self.shards, val = (
                state["request"], state["documents"], listed(state["shards"]), state["val"])
            if not isinstance(request, dict) or type(self.documents) is not int:
                raise ValueError("a value of another kind")
            if val["tokens"]:  # none may have been gathered yet
                listed([val])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{shown(self.folder)}/progress.json cannot be read.", again) from error
        if request != self.request:
            changed = sorted(key for key in request.keys() | self.request.keys()
                             if request.get(key) != self.request.get(key))
            raise UserError(f"{shown(self.folder)} was begun with another {', '.join(changed)}.", again)
        verify_shards(self.folder, [*self.shards, val])
        self._val = bytearray((self.folder / VAL_FILE).read_bytes()[:2 * val["tokens"]])
        self._train_tokens = sum(shard["tokens"] for shard in self.shards)


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
