"""GPT-2, built once from a configuration. Which block, attention and MLP a layer has is decided by the configuration's class
symbols and nowhere else; no step name occurs here.

    logits, loss = GPT(cfg)(idx, targets)        idx, targets: [B, T] int64; logits: [B, T, padded vocabulary], or None with
                                                 targets and LOSS_CHUNKS > 1 (gpt2/head.py)

Invariants: parameter names are nanoGPT's; the head is tied to wte; the start comes from keyed streams (gpt2/layers.py);
no output at position t depends on a token after t; decoding with a cache equals the full forward pass.
"""

import copy
import pkgutil
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.block import Context
from gpt2.head import linear_cross_entropy
from gpt2.kv_cache import KVCache
from gpt2.layers import Embedding, autocast_dtype, init_weights
from gpt2.recompute import allow_in_programs, recomputed
from gpt2.rules import hidden_width
from lib.data import IGNORED
from lib.streams import cell_seed

if TYPE_CHECKING:
    from lib.config import Config

VOCAB_MULTIPLE = 64  # matmuls like it; the ids above the vocabulary are never targets and never sampled


def padded_vocabulary(cfg: "Config") -> int:
    """Rows of the token embedding: the vocabulary rounded up to VOCAB_MULTIPLE."""
    return -(-cfg.VOCAB_SIZE // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


CONTROLLERS = ("coupling", "skip", "direction")  # each named by <NAME>_CONTROLLER, if the configuration has one


class GPT(nn.Module):
    """The model of one cell. `cfg` is a lib.config.Config (or anything with its attributes)."""

    transformer: Any  # a ModuleDict, by the names of nanoGPT

    def __init__(self, cfg: "Config"):
        super().__init__()
        self.block_size, self.vocab_size = cfg.GPT2_BLOCK_SIZE, cfg.VOCAB_SIZE
        self.loss_chunks = cfg.LOSS_CHUNKS
        self.residual_bf16 = cfg.RESIDUAL_BF16
        self.recompute, self.draws = cfg.GPT2_RECOMPUTE, float(cfg.GPT2_DROPOUT) > 0
        if self.recompute:
            allow_in_programs()
        self.cache_dtype = getattr(torch, cfg.KV_CACHE_DTYPE) if cfg.KV_CACHE_DTYPE else None  # None: that of the weights
        padded = padded_vocabulary(cfg)
        block = pkgutil.resolve_name(cfg.BLOCK_CLASS)
        self.transformer = nn.ModuleDict({
            "wte": Embedding(padded, cfg.GPT2_N_EMBD),
            "wpe": Embedding(cfg.GPT2_BLOCK_SIZE, cfg.GPT2_N_EMBD),
            "drop": nn.Dropout(cfg.GPT2_DROPOUT),
            "h": nn.ModuleList([block(cfg, layer) for layer in range(cfg.GPT2_N_LAYER)]),
            "ln_f": nn.LayerNorm(cfg.GPT2_N_EMBD, bias=cfg.GPT2_BIAS),
        })
        self.lm_head = nn.Linear(cfg.GPT2_N_EMBD, padded, bias=False, device="meta")
        self.lm_head.weight = self.transformer.wte.weight  # tied; named_parameters() lists it once, as wte
        # What steers a mechanism over the whole depth and the whole budget; none has parameters of its own.
        self.controllers = nn.ModuleDict({
            name: pkgutil.resolve_name(where)(cfg, self.transformer.h)
            for name in CONTROLLERS if (where := getattr(cfg, f"{name.upper()}_CONTROLLER"))})
        if self.transformer.wte.weight.device.type != "meta":
            init_weights(self, cell_seed(cfg))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None,
                last: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits [B, T, padded vocabulary] (None with targets, if they were made in chunks) and the mean cross-entropy in nats
        (None without targets).

        With a cache, `idx` continues what the cache holds. With `last` only the logits of the last position are computed,
        [B, 1, padded vocabulary]: the next token of a prompt needs no others, and they are its largest tensor. Raises
        ValueError beyond the context.
        """
        past = cache.length if cache else 0
        T = idx.size(1)
        if past + T > self.block_size:
            raise ValueError(f"{past + T} tokens do not fit into a context of {self.block_size}")
        position = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        if self.residual_bf16 and (dtype := autocast_dtype(x.device)):
            x = x.to(dtype)
        context = Context(x)
        recompute = self.recompute and self.training and not cache and torch.is_grad_enabled()
        for number, block in enumerate(self.transformer.h):
            x = (recomputed(block, x, context, self.draws) if recompute
                 else block(x, cache.layers[number] if cache else None, context))
        if cache:
            cache.length += T
        return self.finish(x[:, -1:] if last else x, targets)

    def finish(self, x: torch.Tensor, targets: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The last norm, the tied head, and the loss if there are targets: logits and loss of `forward`."""
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x), None
        if self.loss_chunks > 1:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_chunks)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def compile_regions(self) -> None:
        """Compile, in place, the blocks, which share one program, and what follows them: a fifth of the time that the whole
        model takes to compile, for Python between the blocks and a little more memory traffic."""
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.finish = torch.compile(self.finish, dynamic=False)  # type: ignore[method-assign]  # in its place

    def new_cache(self, batch_size: int, capacity: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `capacity` (default: the context) tokens, of type `dtype`
        (default: KV_CACHE_DTYPE, or that of the weights)."""
        weight = self.transformer.wte.weight
        capacity = min(capacity or self.block_size, self.block_size)
        return KVCache([block.new_cache(batch_size, capacity, dtype or self.cache_dtype or weight.dtype, weight.device)
                        for block in self.transformer.h])

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Continue idx [B, T] by `max_new_tokens` sampled tokens; returns both. See `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)], 1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               generator: torch.Generator | None = None) -> Generator[torch.Tensor, None, None]:
        """Yield `max_new_tokens` sampled tokens [B, 1] that continue idx [B, T], each once it is known (temperature 0: the
        likeliest; `top_k` beyond the vocabulary is all of it).

        Decodes with a cache. Of a prompt that is longer than the context only its end is read. Beyond the context the window
        moves one token at a time and is computed anew, because learned positions move with it.
        """
        was_training = self.training
        self.eval()
        try:
            cache, new = None, idx
            for _ in range(max_new_tokens):
                if cache is None or cache.length + new.size(1) > self.block_size:
                    new = idx[:, -self.block_size:]
                    cache = self.new_cache(idx.size(0))
                logits = self(new, cache=cache, last=True)[0][:, -1, :self.vocab_size].float()
                new = pick(logits, temperature, top_k, generator)
                idx = torch.cat([idx, new], 1)
                yield new
        finally:  # also when the reader stops early
            self.train(was_training)

    def sizes(self) -> dict:
        """Integers that ratios resolved to, for metrics.json."""
        return self.transformer.h[0].sizes()

    def collapse(self) -> "GPT":
        """A copy of the simplest model that computes the same function; which one that is says gpt2/function_class.py."""
        blocks = {id(block): block.collapse() for block in self.transformer.h}
        return copy.deepcopy(self, blocks | {id(self.controllers): nn.ModuleDict()})

    def bake(self) -> "GPT":
        """Fold every gate on the weight side into its weights, in place: the same function, for inference."""
        for block in self.transformer.h:
            block.bake()
        return self


def pick(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row, [B, 1], drawn from logits [B, vocabulary]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def expected_parameters(cfg: "Config") -> int:
    """Parameters in closed form: GPT-2's, plus what each mechanism says it adds to a layer."""
    E, L, bias = cfg.GPT2_N_EMBD, cfg.GPT2_N_LAYER, cfg.GPT2_BIAS
    d_ff = hidden_width(cfg)
    norm = E * (1 + bias)
    layer = 2 * norm + 4 * E * E + 2 * E * d_ff + bias * (3 * E + E + d_ff + E)
    extra = pkgutil.resolve_name(cfg.BLOCK_CLASS).total_extra_parameters(cfg)
    return (padded_vocabulary(cfg) + cfg.GPT2_BLOCK_SIZE) * E + L * layer + extra + norm
