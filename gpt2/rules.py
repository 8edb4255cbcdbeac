"""Rules between symbols that Kconfig cannot state, checked at configuration time, without torch: `check` refuses what
cannot be built or run, `warnings` says what can be run but would not do what it is for.

Also the sizes that follow from symbols: `hidden_width`, and `resolve_size`, the one place where a ratio becomes a count.
"""

from fractions import Fraction

from lib.errors import UserError
from lib.schedule import Budget


def resolve_size(value: Fraction, whole: int) -> int:
    """A symbol of kind ratio as a count: below 1 it is a share of `whole`, otherwise absolute. At least 1."""
    return max(1, round(value * whole)) if value < 1 else int(value)


def hidden_width(cfg) -> int:
    """d_ff, the hidden width of the MLP."""
    return cfg.GPT2_MLP_EXPANSION * cfg.GPT2_N_EMBD


def check(cfg) -> None:
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


def warnings(cfg) -> list[str]:
    """What of a resolved configuration cannot act within its budget, a sentence each; the plan shows them.

    A mechanism that acts only after a number of steps adds its sentence here, and `inactive()` to its module, which says
    it of the cell that was run. Under a budget of seconds the number of iterations is not known beforehand.
    """
    found, iterations = [], Budget.from_config(cfg).iterations
    if cfg.SPAM_INTERVAL and iterations and iterations <= cfg.SPAM_INTERVAL:  # the reset is part of the step *after* those
        found.append(f"the optimizer's momentum reset every {cfg.SPAM_INTERVAL} steps is never reached in {iterations} "
                     "iterations")
    return found
