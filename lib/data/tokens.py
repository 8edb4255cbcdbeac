"""One split of a corpus as one long, read-only sequence of token ids.

Contract: a `Tokens` is the concatenation of its shards, and nothing that is read from it shows where one ends. Shards
are memory-mapped files (or an array in memory) and are never loaded whole. Every id that leaves `slice` or `windows` is
known to lie in the vocabulary: ids beyond it would index past the embedding, which on an accelerator ends in an
assertion far from its cause.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np

from lib.errors import UserError

FULL_TOKENS = 128 * 2**20  # up to here (256 MiB of uint16) `fingerprint` and `check` read everything
SAMPLE_BLOCKS, SAMPLE_TOKENS = 256, 128 * 2**10  # beyond: so many blocks of so many tokens, 64 MiB together
CHUNK_TOKENS = 2**20


class Tokens:
    """Token ids of one split.

    `shards`: one 1-D array or a sequence of them, uint16 (or int32, as some .npy shards are). `vocab_size`: ids are
    0 .. vocab_size-1. `names` (one a shard) and `tokenizer` only serve messages. Raises TypeError for another dtype or
    shape: checking files is the business of `lib.data.files`.
    """

    def __init__(self, shards: np.ndarray | Sequence[np.ndarray], vocab_size: int, names: Sequence[str] | None = None,
                 tokenizer: str = ""):
        shards = [shards] if isinstance(shards, np.ndarray) else list(shards)
        for shard in shards:
            if shard.ndim != 1 or (shard.dtype.kind, shard.dtype.itemsize) not in {("u", 2), ("i", 4)}:
                raise TypeError(f"a shard is a 1-D uint16 or int32 array, not {shard.ndim}-D {shard.dtype}")
        self.vocab_size, self.tokenizer = vocab_size, tokenizer
        self._names = list(names) if names is not None else [f"shard {i}" for i in range(len(shards))]
        # plain ndarray views: slicing an np.memmap object itself costs several times as much
        self._shards = [_read_only(shard) for shard in shards]
        self._signed = any(shard.dtype.kind == "i" for shard in shards)
        self._ends = list(accumulate(len(shard) for shard in shards))
        self._starts = [end - len(shard) for end, shard in zip(self._ends, shards, strict=True)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def slice(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start+length-1 as int64 [length], a copy; IndexError if they are not all there."""
        return self.windows([start], length)[0]

    def windows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """The windows of `length` tokens that begin at `starts`, as int64 [len(starts), length].

        IndexError for a window that is not wholly inside; UserError for an id outside the vocabulary.
        """
        rows, total = np.empty((len(starts), length), np.int64), len(self)
        for row, start in zip(rows, starts, strict=True):
            if start < 0 or start + length > total:
                raise IndexError(f"tokens {start} .. {start + length - 1} of a sequence of {total}")
            filled = 0
            while filled < length:  # once, unless the window crosses into the next shard
                shard = bisect_right(self._ends, start + filled)
                offset = start + filled - self._starts[shard]
                piece = self._shards[shard][offset:offset + length - filled]
                row[filled:filled + len(piece)] = piece
                filled += len(piece)
        if rows.size and self._outside(rows):
            row, column = np.argwhere((rows >= self.vocab_size) | (rows < 0))[0].tolist()
            self._refuse(starts[row] + column, int(rows[row, column]))
        return rows

    def chunks(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """The sequence (or its first `limit` tokens) in order, in read-only pieces of at most a mebitoken."""
        return self._pieces(0, len(self) if limit is None else min(limit, len(self)))

    def check(self) -> None:
        """Raise UserError if an id lies outside the vocabulary. Complete up to FULL_TOKENS tokens, beyond that the
        blocks that `fingerprint` reads; what is not seen here is seen by `windows` when it is used."""
        for start, length in self._inspected():
            position = start
            for piece in self._pieces(start, length):
                if self._outside(piece):
                    first = int(np.argmax((piece >= self.vocab_size) | (piece < 0)))
                    self._refuse(position + first, int(piece[first]))
                position += len(piece)

    def fingerprint(self) -> str:
        """sha256 (hex) of the ids as little-endian uint16, however they are cut into shards and files.

        Up to FULL_TOKENS tokens (256 MiB) it covers all of them, and for one headerless file equals the file's own
        sha256. A longer sequence is identified by its length and SAMPLE_BLOCKS blocks of SAMPLE_TOKENS tokens spread
        evenly from its first to its last token: a change elsewhere goes unseen. Computed once.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        if len(self) > FULL_TOKENS:
            digest.update(f"sample of {len(self)} tokens\n".encode())
        for start, length in self._inspected():
            for piece in self._pieces(start, length):
                digest.update(piece.astype("<u2", copy=False).data)
        return digest.hexdigest()

    def _outside(self, ids: np.ndarray) -> bool:
        return ids.max() >= self.vocab_size or (self._signed and ids.min() < 0)

    def _inspected(self) -> list[tuple[int, int]]:
        """(start, length) of what `check` and `fingerprint` read: everything, or blocks spread over it."""
        if len(self) <= FULL_TOKENS:
            return [(0, len(self))]
        last = len(self) - SAMPLE_TOKENS
        return [(i * last // (SAMPLE_BLOCKS - 1), SAMPLE_TOKENS) for i in range(SAMPLE_BLOCKS)]

    def _pieces(self, start: int, length: int) -> Iterator[np.ndarray]:
        """The raw pieces, of 1 to CHUNK_TOKENS tokens each, that make up tokens start .. start+length-1."""
        end = start + length
        while start < end:
            shard = bisect_right(self._ends, start)  # the one that holds token `start`: never an empty one
            stop = min(end, self._ends[shard], start + CHUNK_TOKENS)
            yield self._shards[shard][start - self._starts[shard]:stop - self._starts[shard]]
            start = stop

    def _refuse(self, position: int, token: int) -> None:
        shard = bisect_right(self._ends, position)
        raise UserError(
            f"{self._names[shard]} holds token id {token} at position {position - self._starts[shard]}, but the "
            f"{self.tokenizer + ' ' if self.tokenizer else ''}vocabulary ends at {self.vocab_size - 1}.",
            "tokenize the data set with that vocabulary, or choose another data set with make menuconfig")


def _read_only(shard: np.ndarray) -> np.ndarray:
    view = np.asarray(shard).view()
    view.flags.writeable = False
    return view
