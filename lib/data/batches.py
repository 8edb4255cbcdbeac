"""What is drawn from a corpus: training batches, the evaluation set, and the loss of guessing without a model.

Invariants: a batch is a function of (seed, step, micro), of the shapes, and of nothing that happened before; the evaluation
set is a function of the validation tokens and the shapes, not of the seed. All arms of a study therefore see the same
numbers.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lib.data.tokens import Tokens
from lib.streams import stream_seed

if TYPE_CHECKING:
    from lib.config import Config
    from lib.data.sources import Corpus

UNIGRAM_TOKENS = 10_000_000
IGNORED = -1  # a target that does not count


def draw_size(cfg: "Config") -> int:
    """Sequences of one draw: BATCH_DRAWN, or BATCH_SIZE where that is 0."""
    return cfg.BATCH_DRAWN or cfg.BATCH_SIZE


def train_batch(tokens: Tokens, seed: int, step: int, micro: int, batch: int, block: int, drawn: int = 0) -> tuple:
    """(x, y), int64 [batch, block] each; y is x one token later. Uniform random windows with replacement, as nanoGPT.

    `micro` counts within a step: accumulation steps, and ranks too where several share a step. The global batch of a step
    is drawn `drawn` sequences at a time (0: `batch`), and micro-batches are cut from it in order: of two splits of it that
    are drawn alike, both see the same sequences. The window starts are raw output of the counter-based generator Philox,
    whose key is the seed and whose counter is (step, draw): no two (step, draw) overlap, any is reached at once, and the raw
    stream is the same for every machine and numpy (what Generator.integers makes of it may change between releases).
    ValueError if not even one window fits.
    """
    count = len(tokens) - block
    if count < 1:
        raise ValueError(f"{len(tokens)} tokens hold no window of {block} tokens and their targets")
    key, drawn, first, end = stream_seed(seed, "data"), drawn or batch, micro * batch, (micro + 1) * batch
    draws = range(first // drawn, -(-end // drawn))
    raw = np.concatenate([np.random.Philox(key=key, counter=step << 128 | draw << 64).random_raw(drawn) for draw in draws])
    skipped = first - draws[0] * drawn
    starts = raw[skipped:skipped + batch] % np.uint64(count)  # the bias of the modulo is below count / 2^64
    return _shifted(tokens.windows(starts.tolist(), block + 1))


def evaluation_set(cfg: "Config", corpus: "Corpus") -> "EvalSet":
    """The evaluation set of a configuration."""
    return EvalSet(corpus.val, cfg.GPT2_EVAL_SAMPLES, draw_size(cfg), cfg.GPT2_BLOCK_SIZE, corpus.vocab_size)


class EvalSet:
    """A fixed, fully enumerated set of evaluation windows.

    Asks for batches * batch windows of `block` inputs and their targets, spread evenly over `tokens`, none of which
    scores a token twice. Where fewer fit, it is all that fill whole batches; where not even one batch fits, it is one
    batch of evenly spaced windows that overlap. `n_batches` says how many batches there are, and iterating yields them
    as (x, y), int64 [batch, block], in the same order each time. `vocab_size` is the model's; ValueError if it is
    smaller than the corpus's, or if not one window fits.
    """

    def __init__(self, tokens: Tokens, batches: int, batch: int, block: int, vocab_size: int):
        if vocab_size < tokens.vocab_size:
            raise ValueError(f"a vocabulary of {vocab_size} ids for tokens of {tokens.vocab_size}")
        if min(batches, batch, block) < 1 or len(tokens) < block + 1:
            raise ValueError(f"no evaluation window of {block} tokens and their targets in {len(tokens)} tokens")
        self.tokens, self.batch, self.block, self.vocab_size = tokens, batch, block, vocab_size
        # windows may share the token that is the last target of one and the first input of the next
        fitting = (len(tokens) - 1) // block
        self.n_batches = max(1, min(batches, fitting // batch))

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple]:
        for index in range(self.n_batches):
            yield _shifted(self._windows(index))

    @property
    def n_tokens(self) -> int:
        """Targets scored in one pass."""
        return self.n_batches * self.batch * self.block

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the windows' shape and token ids: equal hashes mean comparable losses."""
        digest = hashlib.sha256(f"{self.n_batches} {self.batch} {self.block}\n".encode())
        for index in range(self.n_batches):
            digest.update(self._windows(index).astype("<u2").data)
        return digest.hexdigest()

    def starts(self, index: int) -> list[int]:
        """Where the windows of batch `index` begin. The first window of the set is the first of the tokens, the last
        ends with the last token; Python integers, because the products leave 64 bits on large corpora."""
        windows, last = self.n_batches * self.batch, len(self.tokens) - 1 - self.block
        return [i * last // max(1, windows - 1) for i in range(index * self.batch, (index + 1) * self.batch)]

    def _windows(self, index: int) -> np.ndarray:
        return self.tokens.windows(self.starts(index), self.block + 1)


def unigram_entropy(train: Tokens, eval_set: EvalSet) -> float:
    """Nats a token of predicting the evaluation targets by how often each id occurs in `train`: the number a model
    must beat to have learned anything about order.

    Cross-entropy under the frequencies of the first UNIGRAM_TOKENS training tokens, each count plus one, so that an
    unseen id costs much but not infinity.
    """
    counts = np.ones(eval_set.vocab_size, np.int64)
    for chunk in train.chunks(UNIGRAM_TOKENS):
        counts += np.bincount(chunk, minlength=len(counts))
    targets = np.zeros(len(counts), np.int64)
    for _, y in eval_set:
        targets += np.bincount(y.ravel(), minlength=len(counts))
    return float(targets @ (np.log(counts.sum()) - np.log(counts)) / targets.sum())


def _shifted(windows: np.ndarray) -> tuple:
    pair = np.empty((2, windows.shape[0], windows.shape[1] - 1), np.int64)  # one allocation: two cost much more
    pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
    return pair[0], pair[1]
