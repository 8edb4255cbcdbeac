"""Log-likelihoods of continuations, as tests of language models ask for them: how probable are these tokens after those?

    log_likelihoods(model, [(context ids, continuation ids), ...]) -> [(sum of log p, whether greedy decoding writes it), ...]

Contract: each number is that of its pair alone, to rounding: the order of the pairs and what else is in a batch play no part.
The distribution is over the vocabulary, as `GPT.generate` draws from it; rows that pad the embedding are not in it. A pair
that is longer than the model's context loses the beginning of its context.

How: contexts of one length are read together, once each, into a cache, of which only the last position's logits are computed;
each continuation gets a copy of its context's cache and is read without its last token, padded on the right, where a causal
model cannot see the padding. So four choices of one question cost one reading of the question. This is cached decoding, and
what it returns is what the full forward pass returns because that is a law of every step here (gpt2/laws.py), pruned and
compressed caches included. The cache is of the weights' type even where KV_CACHE_DTYPE says otherwise, so that no rounding of
the cache is in a score, as none is in the validation loss.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.kv_cache import KVCache
from lib.errors import UserError

if TYPE_CHECKING:
    from gpt2.model import GPT

ROWS = 32  # continuations side by side
POSITIONS = 4096  # of them, padding included: their logits are the largest tensor, 0.8 GB of GPT-2's vocabulary

# Without cuDNN's, which makes a plan for every length that it meets: 800 pairs of some 200 lengths took 12 s in bfloat16 on an
# H200, and 1.3 s in float32, which it does not do.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Pair = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def log_likelihoods(model: "GPT", pairs: Sequence[Pair], rows: int = ROWS, autocast: Callable = contextlib.nullcontext,
                    done: Callable[[int], object] = lambda count: None) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, is greedy) of each continuation after its context, in the order of `pairs`.

    `autocast()` is the context of forward passes; `done(n)` hears of n more pairs. The model is to be in evaluation mode. An
    empty continuation is certain. ValueError for an empty context (what stands for it, the caller knows), UserError for a
    continuation that does not fit into the model's context.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for batch in _batches(model.block_size, pairs, rows):
        numbers = [i for _, members in batch for i in members]
        with autocast(), sdpa_kernel(KERNELS):
            scores = _score([context for context, _ in batch], [[pairs[i][1] for i in members] for _, members in batch], model)
        for i, score in zip(numbers, scores, strict=True):
            found[i] = score
        done(len(numbers))
    return found


def _batches(block: int, pairs: Sequence[Pair], rows: int) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Lists of (context, numbers of the pairs that have it), the contexts of a list of one length, the longest first: what does
    not fit into memory is known at once."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not len(context):
            raise ValueError("an empty context")
        if len(continuation) > block:
            raise UserError(f"a continuation of {len(continuation)} tokens does not fit into the model's context of {block}.",
                            "choose another task, or a cell with a longer GPT2_BLOCK_SIZE.")
        if len(continuation):
            shared.setdefault(tuple(context[-(block + 1 - len(continuation)):]), []).append(number)
    longest = {context: max(len(pairs[i][1]) for i in members) for context, members in shared.items()}
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    for context in sorted(shared, key=lambda c: (-len(c), -longest[c], c)):
        most = max(1, min(rows, POSITIONS // longest[context]))
        for start in range(0, len(shared[context]), most):
            members = shared[context][start:start + most]
            if batch:
                count = sum(len(m) for _, m in batch) + len(members)
                width = max(longest[c] for c, _ in [*batch, (context, members)])
                if len(context) != len(batch[0][0]) or count > rows or count * width > POSITIONS:
                    yield batch
                    batch = []
            batch.append((context, members))
    if batch:
        yield batch


def _score(contexts: list, continuations: list[list], model: "GPT") -> Iterator[tuple[float, bool]]:
    """Of contexts of one length, and the continuations of each, in their order."""
    weight, vocabulary = model.transformer.wte.weight, model.vocab_size
    flat = [list(one) for several in continuations for one in several]
    width = max(map(len, flat))
    copies = torch.tensor([len(several) for several in continuations], device=weight.device)
    targets = torch.tensor([one + [-1] * (width - len(one)) for one in flat], device=weight.device)
    cache = model.new_cache(len(contexts), len(contexts[0]) + width - 1, dtype=weight.dtype)
    first = model(torch.tensor(contexts, device=weight.device), cache=cache, last=True)[0]
    log_p, greedy = _judged(first.repeat_interleave(copies, 0), targets[:, :1], vocabulary)
    if width > 1:
        rest = model(targets[:, :-1].clamp(min=0), cache=repeated(cache, copies))[0]
        later, also = _judged(rest, targets[:, 1:], vocabulary)
        log_p, greedy = log_p + later, greedy & also
    return zip(log_p.tolist(), greedy.tolist(), strict=True)


def _judged(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods [N] (float64) of targets [N, n], -1 where there is none, and whether each is the likeliest token."""
    logits = logits[..., :vocabulary].float()
    there = targets >= 0
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    log_p = (chosen - logits.logsumexp(-1)).double().masked_fill(~there, 0)
    return log_p.sum(1), ((logits.argmax(-1) == targets) | ~there).all(1)


def repeated(cache: KVCache, copies: torch.Tensor) -> KVCache:
    """A new cache that holds sequence i of `cache` copies[i] times (int64 [batch]), one after the other. The first dimension of
    every tensor of a layer's cache is the batch."""
    layers = []
    for layer in cache.layers:
        one = copy.copy(layer)
        for name, held in vars(layer).items():
            if isinstance(held, torch.Tensor):
                setattr(one, name, held.repeat_interleave(copies, 0))
        layers.append(one)
    grown = KVCache(layers)
    grown.length = cache.length
    return grown
