"""Function classes: which simplest configuration computes the same functions as a given one. Needs no torch.

`simplest(cfg)` states it, symbol by symbol; the modules' `collapse()` carries it out on weights, and the law `function_class`
holds one against the other for every step: the collapsed model must be the simplest configuration's in every tensor's name
and shape, and must compute the same logits. Where two steps have the same simplest configuration, a difference between them
is optimisation only (start, gates, rates), not what the model can express. Where none is known the configuration stands for
itself; that is no proof that there is none.

The relation is "equal", or "inside" when the simplest configuration computes whatever this one does, and more.
"""

import re
from functools import cache

from lib.config import Config
from lib.paths import ROOT

PLAIN_ATTENTION = "gpt2.attention.baseline:CausalSelfAttention"
PLAIN_MLP = "gpt2.mlp.baseline:MLP"

# Symbols that move a model within its class, or say again what the class symbols say, as prefixes. No symbol of Kconfig and
# lib/Kconfig is part of a function either, but the vocabulary.
NOT_ITS_FUNCTION = (
    "ATTENTION_", "MLP_", "MODEL_", "COUPLED", "COUPLING_", "SKIP_", "RA_GATES_", "RA_GATE_", "RMLP_GATES_", "RMLP_GATE_",
    "DIRECTION_CONTROLLER", "DIRECTION_SHARE", "DIRECTION_MIN_STEPS", "DIRECTION_BALANCE", "ROUTER_PENALTY", "ROUTER_DROP",
    "INIT_FROM_", "EVALUATE_ONLY", "GPT2_DROPOUT", "GPT2_RECOMPUTE", "LOSS_CHUNKS", "PRUNABLE", "KV_CACHE_",
    "KV_KEEP_PENALTY", "KVSPLICE_SAMPLES", "KVSPLICE_MAX_BATCHES", "KVSPLICE_EPOCHS", "KVSPLICE_LR",
)


@cache
def of_no_model() -> frozenset[str]:
    """Names of the symbols of Kconfig and lib/Kconfig, less VOCAB_SIZE."""
    files = "".join((ROOT / name).read_text() for name in ("Kconfig", "lib/Kconfig"))
    return frozenset(re.findall(r"^config (\w+)", files, re.M)) - {"VOCAB_SIZE"}


def simplest(cfg: Config) -> tuple[Config, str]:
    """The simplest configuration known that computes what `cfg` does, and the relation: "equal" or "inside"."""
    changes, inside = {"COUPLING_CONTROLLER": "", "SKIP_CONTROLLER": "", "DIRECTION_CONTROLLER": "", "SKIP_GATES": False}, False
    if cfg.ATTENTION_UNIFIED_RA:
        # The reciprocal channels are rows of the projection like any other, and gates rescale rows.
        changes |= {"RA_R": 1, "RA_PER_HEAD_GATES": False, "RA_TIED": False}
        if cfg.RA_SELF_RESTART:
            changes |= {"ATTENTION_CLASS": "gpt2.attention.unified_ra:UnifiedRAttention"}
        else:
            changes |= {"ATTENTION_CLASS": PLAIN_ATTENTION, **unset(cfg, "RA_")}
        inside |= cfg.RA_TIED
    if cfg.ATTENTION_DIRECTION:  # the reciprocal direction is the query and key rows under each other's names
        changes |= {"ATTENTION_CLASS": PLAIN_ATTENTION, **unset(cfg, "DIRECTION_")}
    if cfg.ATTENTION_MLA:  # rows of rank L for keys and values, with a token latent for queries, too; a splice is affine
        changes |= {"ATTENTION_CLASS": PLAIN_ATTENTION, **unset(cfg, "MLA_"), **unset(cfg, "DIRECTION_")}
        inside = True
    if cfg.ATTENTION_TRANSPOSE:  # the sum of its two weights is a scale of the query rows; the ratio is the lens's
        changes |= {"ATTENTION_CLASS": "gpt2.attention.lens:LensAttention", "LENS_TRANSPOSE": True}
    if cfg.ATTENTION_TIED_KV:  # the key rows once more as value rows
        changes |= {"ATTENTION_CLASS": PLAIN_ATTENTION}
        inside = True
    if cfg.ATTENTION_LATENT_BAND and not (
            cfg.BAND_RECIPROCAL or cfg.BAND_HEAD_GATES or cfg.BAND_CROSS_TOKEN or cfg.BAND_EXCHANGE):
        changes |= {"ATTENTION_CLASS": PLAIN_ATTENTION, **unset(cfg, "BAND_")}  # key and value rows of rank L
        inside = True
    if cfg.MLP_RECIPROCAL:
        # Weights and mixer are columns of the down projection; a tied up projection is one with equal rows.
        changes |= {"RMLP_MIXER": False, "RMLP_UNTIED": True, "RMLP_TIED_UP": False, "RMLP_TIED_PROJ": False}
        if not (cfg.RMLP_TOKEN_GATE or cfg.RMLP_INJECTION):
            changes |= {"MLP_CLASS": PLAIN_MLP, **unset(cfg, "RMLP_")}
        inside |= not cfg.RMLP_UNTIED
    if cfg.ATTENTION_LENS:
        # The column bias is a bias of the query, beside transposed scores too; without biases there is none to take it.
        if cfg.LENS_COLUMN_BIAS and cfg.GPT2_BIAS and cfg.LENS_TRANSPOSE:
            changes |= {"LENS_COLUMN_BIAS": False}
        elif cfg.LENS_COLUMN_BIAS and cfg.GPT2_BIAS and not cfg.LENS_LATENT_KV:
            changes |= {"ATTENTION_CLASS": PLAIN_ATTENTION, **unset(cfg, "LENS_")}
        if cfg.LENS_ROUTE_GATE:  # factors of two output projections, the conductor one of the context's share
            changes |= {"BLOCK_CLASS": "gpt2.block:Block", "LENS_ROUTE_GATE": False, "CONTEXT_CONDUCTOR": False}
    return cfg.replace(**changes), "inside" if inside else "equal"


def unset(cfg: Config, prefix: str) -> dict:
    """Every symbol with this prefix as it is in a configuration that does not show it: no value, and no for a bool."""
    return {name: False if isinstance(value, bool) else None
            for name, value in cfg.as_json().items() if name.startswith(prefix)}


def key(cfg: Config) -> tuple[tuple, str]:
    """What two configurations of one function class have in common, hashable, and the relation to that class."""
    simple, relation = simplest(cfg)
    values = simple.as_json()
    kept = (name for name in values
            if name.endswith("_CLASS") or not (name in of_no_model() or name.startswith(NOT_ITS_FUNCTION)))
    return tuple((name, values[name]) for name in kept), relation
