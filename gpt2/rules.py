"""Rules between symbols that Kconfig cannot state, checked at configuration time, without torch: `check` refuses what
cannot be built or run, `warnings` says what can be run but would not do what it is for.

Also the sizes that follow from symbols: `hidden_width`, and `resolve_size`, the one place where a ratio becomes a count.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

from lib.errors import UserError
from lib.schedule import Budget

if TYPE_CHECKING:
    from lib.config import Config


def resolve_size(value: Fraction, whole: int) -> int:
    """A symbol of kind ratio as a count: below 1 it is a share of `whole`, otherwise absolute. At least 1."""
    return max(1, round(value * whole)) if value < 1 else int(value)


def hidden_width(cfg: "Config") -> int:
    """d_ff, the hidden width of the MLP."""
    return cfg.GPT2_MLP_EXPANSION * cfg.GPT2_N_EMBD


def latent_width(cfg: "Config") -> int:
    """L, the channels of a latent of MLA."""
    return resolve_size(cfg.MLA_D_LATENT, cfg.GPT2_N_EMBD)


def splice_width(cfg: "Config") -> int:
    """L', the channels of a latent that the learned KVSplice has compressed."""
    return resolve_size(cfg.MLA_KVSPLICE_D, cfg.GPT2_N_EMBD)


def kv_block(cfg: "Config") -> int:
    """b, the tokens of a block of KV pruning."""
    return resolve_size(cfg.KV_BLOCK, cfg.GPT2_BLOCK_SIZE)


def kv_keep(cfg: "Config") -> int:
    """k, the tokens that KV pruning keeps; the context or more keeps all."""
    return resolve_size(cfg.KV_KEEP_RATIO, cfg.GPT2_BLOCK_SIZE)


def kvsplice_width(cfg: "Config") -> int:
    """Channels of a stored value of one head."""
    width = cfg.GPT2_N_EMBD // cfg.GPT2_N_HEAD
    return resolve_size(cfg.KVSPLICE_K, width) if cfg.KVSPLICE else width


def check(cfg: "Config") -> None:
    """Raise UserError for symbols that do not fit together."""
    heads, width = cfg.GPT2_N_HEAD, cfg.GPT2_N_EMBD
    if width % heads:
        raise UserError(f"GPT2_N_EMBD={width} is not divisible by GPT2_N_HEAD={heads}.",
                        f"choose a width that is a multiple of {heads}.")
    if cfg.RA_R is not None and width // heads <= cfg.RA_R:
        raise UserError(f"RA_R={cfg.RA_R} is not below the head width {width // heads}.",
                        f"set RA_R to at most {width // heads - 1}.")
    if cfg.RMLP_R_FF is not None:
        hidden = hidden_width(cfg)
        count = resolve_size(cfg.RMLP_R_FF, hidden)
        if count >= hidden:
            raise UserError(f"RMLP_R_FF={cfg.RMLP_R_FF} ({count} features) is not below the hidden width {hidden}.",
                            f"set RMLP_R_FF to at most {hidden - 1}, or to a ratio below 1.")
        for name, rows in {"RMLP_TIED_UP": hidden - count, "RMLP_TIED_PROJ": width}.items():
            if getattr(cfg, name) and count > rows:
                raise UserError(f"RMLP_R_FF={cfg.RMLP_R_FF} ({count} features) is more than the {rows} rows that {name} ties "
                                "it to.", f"set RMLP_R_FF to at most {min(rows, hidden // 2)}.")
    if cfg.RA_TIED and width // heads < 2 * cfg.RA_R:
        raise UserError(f"RA_R={cfg.RA_R} is more than half the head width {width // heads}, and RA_TIED takes them from the "
                        "rest.", f"set RA_R to at most {width // heads // 2}.")
    if cfg.DIRECTION_EARLY and cfg.GPT2_N_LAYER < 2:
        raise UserError("DIRECTION_EARLY is set, but one layer has no first half.",
                        "choose DIRECTION_ALL, or a model of two layers and more.")
    if cfg.ROUTER_RA_HEADS is not None:
        count = resolve_size(cfg.ROUTER_RA_HEADS, heads)
        if count >= heads:
            raise UserError(f"ROUTER_RA_HEADS={cfg.ROUTER_RA_HEADS} ({count} heads) leaves none of {heads} to the full path.",
                            f"set ROUTER_RA_HEADS to at most {heads - 1}." if heads > 1 else "choose a model of two heads and "
                            "more.")
    if cfg.MLA_D_LATENT is not None and latent_width(cfg) >= width:
        raise UserError(f"MLA_D_LATENT={cfg.MLA_D_LATENT} ({latent_width(cfg)} channels) is not below the width {width}, so a "
                        "layer's input would be as small a latent.",
                        f"set MLA_D_LATENT to at most {width - 1}, or to a ratio below 1.")
    if cfg.MLA_KVSPLICE_D is not None and splice_width(cfg) >= latent_width(cfg):
        latent = latent_width(cfg)
        raise UserError(f"MLA_KVSPLICE_D={cfg.MLA_KVSPLICE_D} ({splice_width(cfg)} channels) is not below the latent's {latent}"
                        ", so nothing would be compressed.",
                        f"set MLA_KVSPLICE_D to at most {latent - 1}." if latent > 1 else "set MLA_D_LATENT to 2 or more.")
    if cfg.ATTENTION_LENS and not (cfg.LENS_TRANSPOSE or cfg.LENS_COLUMN_BIAS):
        raise UserError("lens attention has neither LENS_TRANSPOSE nor LENS_COLUMN_BIAS, so its gates have nothing to weigh.",
                        "set one of the two, or ATTENTION_SDPA.")
    if cfg.WALK_NEIGHBOURS == 1:
        raise UserError("WALK_NEIGHBOURS=1 leaves one neighbour, whose weight is 1 whatever the graph learns.",
                        "set at least 2, or a ratio of the context.")
    if cfg.WALK_REVERSIBLE and resolve_size(cfg.WALK_WINDOW, cfg.GPT2_BLOCK_SIZE) >= cfg.GPT2_BLOCK_SIZE:
        raise UserError(f"WALK_WINDOW={cfg.WALK_WINDOW} is the whole context, so no block of tokens has a graph before it.",
                        "set WALK_WINDOW below GPT2_BLOCK_SIZE, or to a ratio below 1.")
    if cfg.KV_KEEP_RATIO is not None:
        check_pruning(cfg)
    if cfg.KVSPLICE and kvsplice_width(cfg) > width // heads:
        raise UserError(f"KVSPLICE_K={cfg.KVSPLICE_K} is more than the head width {width // heads}.",
                        f"set KVSPLICE_K to at most {width // heads}, or to a ratio below 1.")
    if cfg.GPT2_MIN_LR > cfg.LEARNING_RATE:
        raise UserError(f"GPT2_MIN_LR={cfg.GPT2_MIN_LR} is above LEARNING_RATE={cfg.LEARNING_RATE}.",
                        "set GPT2_MIN_LR to the rate the schedule ends at, usually a tenth of the peak.")
    if cfg.SPAM_INTERVAL and cfg.SPAM_WARMUP_STEPS >= cfg.SPAM_INTERVAL:
        raise UserError(f"SPAM_WARMUP_STEPS={cfg.SPAM_WARMUP_STEPS} is not below SPAM_INTERVAL={cfg.SPAM_INTERVAL}, so the "
                        "learning rate would never leave its re-warm-up.",
                        "set it below SPAM_INTERVAL (the paper: 150 of 500).")
    if cfg.INIT_FROM_STEP and not cfg.SAVE_MODEL:
        raise UserError(f"a step starts from {cfg.INIT_FROM_STEP}'s model, but SAVE_MODEL is off.",
                        "set SAVE_MODEL=y in make menuconfig, or leave out the steps that start from another's model.")


def check_pruning(cfg: "Config") -> None:
    """Raise UserError for a KV pruning that cannot be: too few tokens, or a share to learn where nothing is dropped."""
    keep, block, context = kv_keep(cfg), kv_block(cfg), cfg.GPT2_BLOCK_SIZE
    if keep < 2 * block:
        raise UserError(f"KV_KEEP_RATIO={cfg.KV_KEEP_RATIO} ({counted(keep)}) is below two blocks of KV_BLOCK={cfg.KV_BLOCK} "
                        f"({counted(block)}): the latest block and the one that is being filled are always kept.",
                        f"set KV_KEEP_RATIO to at least {2 * block}, or to a ratio of {context} that gives as many."
                        if 2 * block < context else f"set KV_BLOCK to at most {max(1, keep // 2)}.")
    if cfg.KV_KEEP_LEARNED and keep >= context:
        raise UserError(f"KV_KEEP_LEARNED has nothing to learn: KV_KEEP_RATIO={cfg.KV_KEEP_RATIO} keeps the whole context of "
                        f"{counted(context)}.", f"set KV_KEEP_RATIO to at most {context - 1}, or to a ratio below 1.")


def counted(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens != 1)}"


def warnings(cfg: "Config") -> list[str]:
    """What of a resolved configuration cannot act within its budget, a sentence each; the plan shows them.

    A mechanism that acts only after a number of steps adds its sentence here, and `inactive()` to its module, which says
    it of the cell that was run. Under a budget of seconds the number of iterations is not known beforehand.
    """
    found, iterations = [], Budget.from_config(cfg).iterations
    if cfg.SPAM_INTERVAL and iterations and iterations <= cfg.SPAM_INTERVAL:  # the reset is part of the step *after* those
        found.append(f"the optimizer's momentum reset every {cfg.SPAM_INTERVAL} steps is never reached in {iterations} "
                     "iterations")
    if cfg.COUPLING_WINDOW and iterations and iterations <= cfg.COUPLING_WINDOW:  # the step after those is the first to act
        found.append(f"the coupling waits until the loss of {cfg.COUPLING_WINDOW} steps has settled, and so stays at 0 for all "
                     f"{iterations} iterations")
    last = (iterations - 1) / iterations if iterations else 1.0  # progress at the last step
    if cfg.COUPLING_DELAY_STEPS and iterations and iterations <= cfg.COUPLING_DELAY_STEPS and last < cfg.COUPLING_SHARE:
        found.append(f"the coupling waits for {cfg.COUPLING_DELAY_STEPS} steps or {cfg.COUPLING_SHARE:g} of the budget, and so "
                     f"stays at 0 for all {iterations} iterations")
    if cfg.SKIP_GATES and max(cfg.SKIP_AFTER, cfg.SKIP_CHECK) + 2 * cfg.SKIP_CHECK > last:
        found.append(f"no path can go off: three looks, {cfg.SKIP_CHECK:g} of the budget apart from {cfg.SKIP_AFTER:g} on, "
                     "do not fit into it")
    if cfg.SKIP_GATES and cfg.RA_R is not None and cfg.RA_R < 8:
        found.append(f"a low-rank path of R={cfg.RA_R} channels that goes off saves nothing: channels are computed in eights")
    if cfg.DIRECTION_LEARNED and iterations and (
            iterations <= cfg.DIRECTION_MIN_STEPS or (iterations - 1) / iterations < cfg.DIRECTION_SHARE):
        found.append(f"the directions are fixed after {cfg.DIRECTION_MIN_STEPS} steps and {cfg.DIRECTION_SHARE:g} of the "
                     f"budget, and so never in {iterations} iterations")
    if cfg.ROUTER_DROP is not None and iterations and iterations <= cfg.GPT2_EVAL_INTERVAL:  # that of the end is late
        found.append("routing waits for an evaluation that is below the loss of the untrained model, and "
                     f"{iterations} iterations evaluated every {cfg.GPT2_EVAL_INTERVAL} have none before their end")
    if cfg.KV_KEEP_RATIO is not None and kv_keep(cfg) >= cfg.GPT2_BLOCK_SIZE:
        found.append(f"KV_KEEP_RATIO={cfg.KV_KEEP_RATIO} keeps the whole context of {counted(cfg.GPT2_BLOCK_SIZE)}, so no "
                     "token is ever dropped")
    if cfg.KVSPLICE and kvsplice_width(cfg) == cfg.GPT2_N_EMBD // cfg.GPT2_N_HEAD:
        found.append(f"KVSPLICE_K={cfg.KVSPLICE_K} keeps every channel of a head, so a stored value is no smaller")
    return found
