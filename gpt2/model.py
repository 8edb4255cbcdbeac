"""GPT-2, built once from a configuration. Which attention and MLP a block has is decided by the configuration's class
symbols and nowhere else; no step name occurs here.

    logits, loss = GPT(cfg)(idx, targets)        idx, targets: [B, T] int64; logits: [B, T, padded vocabulary]

Invariants: parameter names are nanoGPT's; the head is tied to wte; the start comes from keyed streams (gpt2/layers.py);
no output at position t depends on a token after t; decoding with a cache equals the full forward pass.
"""

import copy
import pkgutil

import torch
import torch.nn.functional as F
from torch import nn

from gpt2.kv_cache import KVCache
from gpt2.layers import Embedding, init_weights
from gpt2.rules import hidden_width
from lib.streams import cell_seed

VOCAB_MULTIPLE = 64  # matmuls like it; the ids above the vocabulary are never targets and never sampled


def padded_vocabulary(cfg) -> int:
    """Rows of the token embedding: the vocabulary rounded up to VOCAB_MULTIPLE."""
    return -(-cfg.VOCAB_SIZE // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.GPT2_N_EMBD, bias=cfg.GPT2_BIAS)
        self.attn = pkgutil.resolve_name(cfg.ATTENTION_CLASS).from_config(cfg)
        self.ln_2 = nn.LayerNorm(cfg.GPT2_N_EMBD, bias=cfg.GPT2_BIAS)
        self.mlp = pkgutil.resolve_name(cfg.MLP_CLASS).from_config(cfg)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model of one cell. `cfg` is a lib.config.Config (or anything with its attributes)."""

    def __init__(self, cfg):
        super().__init__()
        self.block_size, self.vocab_size = cfg.GPT2_BLOCK_SIZE, cfg.VOCAB_SIZE
        padded = padded_vocabulary(cfg)
        self.transformer = nn.ModuleDict({
            "wte": Embedding(padded, cfg.GPT2_N_EMBD),
            "wpe": Embedding(cfg.GPT2_BLOCK_SIZE, cfg.GPT2_N_EMBD),
            "drop": nn.Dropout(cfg.GPT2_DROPOUT),
            "h": nn.ModuleList([Block(cfg) for _ in range(cfg.GPT2_N_LAYER)]),
            "ln_f": nn.LayerNorm(cfg.GPT2_N_EMBD, bias=cfg.GPT2_BIAS),
        })
        self.lm_head = nn.Linear(cfg.GPT2_N_EMBD, padded, bias=False, device="meta")
        self.lm_head.weight = self.transformer.wte.weight  # tied; named_parameters() lists it once, as wte
        if self.transformer.wte.weight.device.type != "meta":
            init_weights(self, cell_seed(cfg))

    def forward(self, idx, targets=None, cache: KVCache | None = None):
        """Logits [B, T, padded vocabulary] and the mean cross-entropy in nats (None without targets).

        With a cache, `idx` continues what the cache holds. Raises ValueError beyond the context.
        """
        past = cache.length if cache else 0
        T = idx.size(1)
        if past + T > self.block_size:
            raise ValueError(f"{past + T} tokens do not fit into a context of {self.block_size}")
        position = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for number, block in enumerate(self.transformer.h):
            x = block(x, cache.layers[number] if cache else None)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def new_cache(self, batch_size: int, capacity: int | None = None, dtype=None) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `capacity` (default: the context) tokens."""
        weight = self.transformer.wte.weight
        capacity = min(capacity or self.block_size, self.block_size)
        return KVCache([block.attn.new_cache(batch_size, capacity, dtype or weight.dtype, weight.device)
                        for block in self.transformer.h])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, generator=None):
        """Continue idx [B, T] by `max_new_tokens` sampled tokens (temperature 0: the likeliest); returns both.

        Decodes with a cache. Beyond the context the window moves one token at a time and is computed anew, because
        learned positions move with it.
        """
        was_training = self.training
        self.eval()
        cache, new = None, idx
        for _ in range(max_new_tokens):
            if cache is None or cache.length + new.size(1) > self.block_size:
                new = idx[:, -self.block_size:]
                cache = self.new_cache(idx.size(0))
            logits = self(new, cache=cache)[0][:, -1, :self.vocab_size].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, new], 1)
        self.train(was_training)
        return idx

    def sizes(self) -> dict:
        """Integers that ratios resolved to, for metrics.json."""
        block = self.transformer.h[0]
        return {**block.attn.sizes(), **block.mlp.sizes()}

    def collapse(self) -> "GPT | None":
        """A copy in the simplest function class that computes the same; None where a part has no known one."""
        parts = [(block, name, getattr(block, name)) for block in self.transformer.h for name in ("attn", "mlp")]
        plain = {id(part): part.collapse() if hasattr(part, "collapse") else part for _, _, part in parts}
        if any(part is None for part in plain.values()):
            return None
        return copy.deepcopy(self, {id(part): plain[id(part)] for _, _, part in parts})


def expected_parameters(cfg) -> int:
    """Parameters in closed form: GPT-2's, plus what each mechanism says it adds to a layer."""
    E, L, bias = cfg.GPT2_N_EMBD, cfg.GPT2_N_LAYER, cfg.GPT2_BIAS
    d_ff = hidden_width(cfg)
    norm = E * (1 + bias)
    layer = 2 * norm + 4 * E * E + 2 * E * d_ff + bias * (3 * E + E + d_ff + E)
    extra = sum(pkgutil.resolve_name(name).extra_parameters(cfg) for name in (cfg.ATTENTION_CLASS, cfg.MLP_CLASS))
    return (padded_vocabulary(cfg) + cfg.GPT2_BLOCK_SIZE) * E + L * (layer + extra) + norm
