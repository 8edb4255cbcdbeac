"""`make data`: the public data sets, streamed, tokenized with GPT-2's BPE and written as shards.

Contract: after `prepare` the folder DATA_DIR/<data set> is what `open_corpus` opens; interrupted, it continues after
its last full shard and ends with the same bytes (`lib.data.shards`). Each document is preceded by the end-of-text
token, which tells the model that nothing before it matters. The text comes from the hub, or from DATA_SOURCE.

Nothing here runs during training: `datasets`, `tiktoken`, `rich` and `filelock` are imported where they are used.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.data.files import listed, repo_path
from lib.data.shards import verify_shards, write_corpus
from lib.errors import UserError
from lib.paths import shown
from lib.terminal import redraws

if TYPE_CHECKING:
    import tiktoken

    from lib.config import Config

END_OF_TEXT = 50256
# (name on the hub, configuration). All three are parquet there, without a loading script, which datasets no longer
# runs. They cannot be reached in tests, which prepare from DATA_SOURCE. The first two have a validation split.
HUB = {
    "shakespeare": ("karpathy/tiny_shakespeare", None),
    "tinystories": ("roneneldan/TinyStories", None),
    "finewebedu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
# At the library's boundary anything else is bad input or a bad network: it raises its own errors, pyarrow's, fsspec's
# and the hub's, which have no common base. These are defects of a program and keep their traceback.
DEFECTS = (UserError, TypeError, AttributeError, NameError, ImportError)
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
# what the tokenizer's threads get at once: enough to keep them busy, little enough to stay small in memory
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1_000_000
GPT2_FILES = {  # sha256 of the vocabulary as its authors published it, so that a folder holds it and nothing else
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def prepare(cfg: "Config", progress: Callable[[int, int], None] | None = None) -> dict:
    """Prepare cfg.DATASET (shakespeare, tinystories or finewebedu) and return what its corpus.json holds.

    Reads cfg.DATA_DIR, DATA_PREPARE_TOKENS (training tokens to stop after, 0: all) and DATA_SOURCE. A finished folder
    is read once to verify its hashes and left as it is. `progress(train_tokens, documents)` replaces the display.
    UserError if the source cannot be reached or read, or if the folder was made from another source or with fewer
    tokens than are asked for now.
    """
    if cfg.DATASET not in HUB:
        raise UserError(f"The data set {cfg.DATASET} needs no preparation.", "make")
    import filelock

    folder = repo_path(cfg.DATA_DIR) / cfg.DATASET
    if (folder / "corpus.json").exists():  # asked before anything is written: the folder may be shared and read-only
        return _finished(folder, cfg)
    request = {"name": cfg.DATASET, "tokenizer": "gpt2", "source": _source_name(cfg)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            if (folder / "corpus.json").exists():  # finished by another process just now
                return _finished(folder, cfg)
            for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote; the lock is ours
                left.unlink()
            if progress is None:
                print(f"{cfg.DATASET}: from {request['source']} into {shown(folder)}", file=sys.stderr, flush=True)
            encoding = gpt2_encoding()
            splits = _open_source(cfg)

            def documents(split: str, skip: int) -> Iterator[np.ndarray]:
                return _encoded(_texts(splits[split], skip, request["source"]), encoding)

            with _display(cfg.DATASET, cfg.DATA_PREPARE_TOKENS) if progress is None else nullcontext(progress) as shows:
                return write_corpus(folder, request, documents, own_val="val" in splits,
                                    train_limit=cfg.DATA_PREPARE_TOKENS, progress=shows)
    except filelock.Timeout as error:
        raise UserError(f"Another process is preparing {shown(folder)}.", "wait for it, then make data") from error
    except BrokenPipeError:
        raise
    except OSError as error:  # of the disk: what reads the source has sentences of its own
        raise UserError(f"{shown(folder)} cannot be written: {error.strerror or error}.",
                        "make room, or set DATA_DIR with make menuconfig; then make data: it goes on after the last full shard"
                        ) from error


def gpt2_encoding() -> "tiktoken.Encoding":
    """GPT-2's byte-pair encoding as a tiktoken.Encoding of 50257 ids.

    tiktoken downloads the vocabulary once. Without a network, name a folder that holds the published vocab.bpe and
    encoder.json in the environment variable TIKTOKEN_GPT2_DIR, which is then used alone. UserError if neither works.
    """
    import tiktoken

    folder = os.environ.get("TIKTOKEN_GPT2_DIR")
    if folder:
        return _encoding_from(folder)
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network; or something else answered in its place
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}).",
                        "set TIKTOKEN_GPT2_DIR to a folder with vocab.bpe and encoder.json, then make data") from error


@lru_cache(maxsize=1)
def _encoding_from(folder: str) -> "tiktoken.Encoding":
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

    merges, names = (str(Path(folder).expanduser().absolute() / name) for name in GPT2_FILES)
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(merges, names, *GPT2_FILES.values())  # type: ignore[arg-type]  # two hashes
    except (OSError, ValueError) as error:
        raise UserError(f"TIKTOKEN_GPT2_DIR={folder} does not hold GPT-2's vocab.bpe and encoder.json.",
                        "put the published files there, then make data") from error
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: END_OF_TEXT}, explicit_n_vocab=50257)


def _source_name(cfg: "Config") -> str:
    if cfg.DATA_SOURCE:
        return shown(repo_path(cfg.DATA_SOURCE))
    name, config = HUB[cfg.DATASET]
    return f"{name} {config}" if config else name


def _finished(folder: Path, cfg: "Config") -> dict:
    again = f"delete {shown(folder)}, then make data"
    try:
        corpus = json.loads((folder / "corpus.json").read_text())
        source, shards, limit, exhausted = (
            corpus["source"], listed(corpus["shards"]), corpus["train_limit"], corpus["exhausted"])
        if type(limit) is not int or type(exhausted) is not bool or not isinstance(source, str):
            raise ValueError("a value of another kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{shown(folder)}/corpus.json cannot be read.", again) from error
    if cfg.DATA_SOURCE and source != _source_name(cfg):  # unset, any source will do: it was somebody's choice
        raise UserError(f"{shown(folder)} was made from {source}, and DATA_SOURCE is {_source_name(cfg)}.", again)
    wanted = cfg.DATA_PREPARE_TOKENS
    if not exhausted and (not wanted or wanted > limit):
        raise UserError(f"{shown(folder)} was made with DATA_PREPARE_TOKENS={limit}, which is now {wanted or 'all'}.",
                        again)
    verify_shards(folder, shards)
    return corpus


def _open_source(cfg: "Config") -> dict:
    """{"train": rows, "val": rows} (val only where the source has such a split), datasets that can skip rows."""
    import datasets

    path = repo_path(cfg.DATA_SOURCE) if cfg.DATA_SOURCE else None
    if path is not None and not path.exists():
        raise UserError(f"DATA_SOURCE {shown(path)} does not exist.", "set DATA_SOURCE with make menuconfig")
    try:
        if path is not None:
            found = _load_path(path)
        else:
            name, config = HUB[cfg.DATASET]
            found = datasets.load_dataset(name, name=config, streaming=True)
    except DEFECTS:
        raise
    except Exception as error:
        if path is not None:
            raise UserError(f"DATA_SOURCE {shown(path)} cannot be read ({_said(error)}).",
                            "set DATA_SOURCE with make menuconfig") from error
        raise UserError(f"{_source_name(cfg)} cannot be reached on the hub ({_said(error)}).",
                        "make data with a network, or set DATA_SOURCE with make menuconfig to a local copy") from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    if "train" not in splits and len(splits) != 1:
        raise UserError(f"{_source_name(cfg)} has the splits {', '.join(splits)} and no train.",
                        "set DATA_SOURCE with make menuconfig to one with a train split")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    val = next((splits[name] for name in ("validation", "valid", "val") if name in splits), None)
    return {"train": train} if val is None or val is train else {"train": train, "val": val}


def _load_path(path: Path) -> Any:
    """A local file or folder as the datasets library sees it. A text file is one document, blank lines and all."""
    import datasets

    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if {_builder(file) for file in path.rglob("*")} - {None} == {"text"}:
            return datasets.load_dataset("text", data_dir=str(path), sample_by="document", streaming=True)
        return datasets.load_dataset(str(path), streaming=True)
    builder = _builder(path)
    if builder is None:
        raise UserError(f"DATA_SOURCE {shown(path)} is none of {', '.join(BUILDERS)} and no folder.",
                        "set DATA_SOURCE with make menuconfig")
    options = {"sample_by": "document"} if builder == "text" else {}
    return datasets.load_dataset(builder, data_files=str(path), streaming=True, **options)


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def _texts(rows: Any, skip: int, source: str) -> Iterator[str]:
    iterator, number = iter(rows.skip(skip) if skip else rows), skip
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except DEFECTS:
            raise
        except Exception as error:
            raise UserError(f"Reading {source} failed after {number} documents ({_said(error)}).",
                            "make data again: it goes on after the last full shard") from error
        if "text" not in row or not isinstance(row["text"], str | None):
            raise UserError(f"{source} has no text field of strings, but {', '.join(map(str, row))}.",
                            "set DATA_SOURCE with make menuconfig to one whose documents are in the field text")
        number += 1
        yield row["text"] or ""  # some sources hold null


def _encoded(texts: Iterator[str], encoding: Any) -> Iterator[np.ndarray]:
    """Token ids of each text behind END_OF_TEXT, uint16; nothing at all for an empty text. Order is kept."""
    threads = min(16, os.cpu_count() or 1)
    for batch in _batched(texts):
        for ids in encoding.encode_ordinary_batch(batch, num_threads=threads):
            yield np.array([END_OF_TEXT, *ids] if ids else [], np.uint16)


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _display(name: str, total: int) -> Iterator[Any]:
    """Yield `progress(train_tokens, documents)`: a bar on a terminal, a line every ten seconds anywhere else."""
    if redraws(sys.stderr):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"),
                      TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total or None, done="")
            yield lambda tokens, documents: bar.update(task, completed=tokens, done=f"{tokens / 1e6:,.1f} M tokens")
        return
    last = time.monotonic()

    def line(tokens: int, documents: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            share = f" ({100 * tokens / total:.0f} %)" if total else ""
            print(f"{name}: {tokens:,} tokens{share}, {documents:,} documents", file=sys.stderr, flush=True)

    yield line


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
