"""Verdicts: each arm of a study against its baseline, in one word and one sentence, with a stated error rate.

The words: BETTER, WORSE (a difference of final validation loss that Holm's test keeps over the whole family), NEGLIGIBLE
(such a difference, but within the practical margin), EQUIVALENT (no difference seen, and within the margin), INCONCLUSIVE,
UNDERPOWERED (fewer than 3 seeds), INCOMPLETE (planned cells are missing), INVALID (a validity gate failed: no number).

The chance of any false BETTER, WORSE or NEGLIGIBLE in a family is at most ERROR_RATE, and that of any false
EQUIVALENT or NEGLIGIBLE too. With the test "fixed" this holds for the number of seeds that was planned; with "anytime" for
any number of looks. A family is every comparison that the plan announced: one that is missing still counts.
"""

from dataclasses import dataclass, field

import numpy as np

from lib import anytime, gates, stats
from lib.design import ERROR_RATE, FEWEST_SEEDS

DECIDED = ("BETTER", "WORSE", "NEGLIGIBLE", "EQUIVALENT", "INVALID")
NO_NUMBER = ("INVALID", "INCOMPLETE")  # a difference under these words must not be read as an effect


@dataclass
class Arm:
    """The cells of one step (under one optimizer). `records` holds the finished ones by seed, diverged ones included;
    `missing` says of each planned seed without a result why ("planned", "failed", ...)."""

    name: str
    records: dict[int, dict]
    missing: dict[int, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """An arm against its reference. Numbers are in nats and null where they cannot be had."""

    name: str
    reference: str
    word: str = ""
    sentence: str = ""
    estimate: stats.Estimate | None = None
    by_seed: dict[int, float] = field(default_factory=dict)
    p_holm: float | None = None
    p_equivalence: float | None = None
    p_sign_flip: float | None = None
    sign_flip_floor: float | None = None
    detectable: float | None = None
    seeds_needed: int | None = None
    correlation: float | None = None
    gates: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def decided(self) -> bool:
        return self.word in DECIDED


def family(pairs: list[tuple[Arm, Arm]], order: list[int], margin: float, test: str = "fixed",
           comparisons: int = 0) -> list[Comparison]:
    """Compare each (arm, reference). `order` is that of the seeds in the plan, which the anytime test walks through;
    `comparisons` the size of the family, if the plan had more."""
    size = max(comparisons, len(pairs))
    found = [_measure(arm, reference, order, margin, test) for arm, reference in pairs]
    ready = [_ready(c) for c in found]
    different = stats.holm([c.estimate.p if ok else None for c, ok in zip(found, ready, strict=True)], size)
    equivalent = stats.holm([c.p_equivalence if ok else None for c, ok in zip(found, ready, strict=True)], size)
    for comparison, p_different, p_equivalent in zip(found, different, equivalent, strict=True):
        comparison.p_holm, comparison.p_equivalence = p_different, p_equivalent
        _plan_ahead(comparison, size)
        comparison.word = _word(comparison)
        comparison.sentence = _sentence(comparison, margin)
    return found


def _measure(arm: Arm, reference: Arm, order: list[int], margin: float, test: str) -> Comparison:
    """Everything about one comparison that does not depend on the others."""
    found = Comparison(arm.name, reference.name)
    for one in (reference, arm):
        found.missing |= {f"{one.name} seed {seed}": why for seed, why in _missing(one, order, test).items()}
    shared = [seed for seed in order if seed in arm.records and seed in reference.records]
    is_paired = bool(shared) and (test == "anytime" or arm.records.keys() == reference.records.keys())
    names = (arm.name, reference.name)
    found.gates = gates.broken(arm.records, reference.records, names, is_paired)
    if found.gates and found.missing and shared and not is_paired:
        # Half of a study that runs on several machines: only its whole blocks can be compared yet.
        is_paired = True
        found.gates = gates.broken({s: arm.records[s] for s in shared}, {s: reference.records[s] for s in shared}, names,
                                   paired=True)
    if found.gates or not arm.records or not reference.records:
        return found
    losses, base = ({seed: record["val_loss"] for seed, record in one.records.items()} for one in (arm, reference))
    found.by_seed = {seed: losses[seed] - base[seed] for seed in shared}
    differences = list(found.by_seed.values())
    if not is_paired:
        found.estimate = stats.welch(list(losses.values()), list(base.values()))
        found.p_equivalence = stats.equivalence_p(found.estimate, margin)
    elif test == "anytime":
        found.estimate = anytime.estimate(differences)
        found.p_equivalence = anytime.equivalence_p(differences, margin)
    else:
        found.estimate = stats.paired(differences)
        found.p_equivalence = stats.equivalence_p(found.estimate, margin)
    if is_paired and len(differences) > 1:
        found.p_sign_flip, found.sign_flip_floor = stats.sign_flip(differences)
        found.correlation = stats.correlation([losses[s] for s in shared], [base[s] for s in shared])
    return found


def _missing(one: Arm, order: list[int], test: str) -> dict[int, str]:
    """Which seeds without a result a verdict must wait for. Under the anytime test, that may end at any look, those are
    the failed ones and holes: seeds before others that have a result."""
    if test != "anytime":
        return one.missing
    place = {seed: index for index, seed in enumerate(order)}
    last = max((place[seed] for seed in one.records if seed in place), default=-1)
    return {seed: why for seed, why in one.missing.items() if why == "failed" or place.get(seed, last) < last}


def _ready(c: Comparison) -> bool:
    """Whether the comparison has all it needs for a verdict."""
    return not c.gates and not c.missing and c.estimate is not None and _seeds(c) >= FEWEST_SEEDS


def _seeds(c: Comparison) -> int:
    return min(c.estimate.n, c.estimate.n_reference)


def _plan_ahead(c: Comparison, comparisons: int) -> None:
    """What these seeds could see, and how many the difference would need, at the level of Holm's first step."""
    if c.estimate is None or _seeds(c) < 2 or c.estimate.method == "welch":
        return
    sd, alpha = float(np.std(list(c.by_seed.values()), ddof=1)), ERROR_RATE / comparisons
    plans = anytime if c.estimate.method == "anytime" else stats
    c.detectable = plans.detectable(sd, _seeds(c), alpha)
    c.seeds_needed = plans.seeds_needed(sd, rounded(c.estimate.difference), alpha)


def rounded(difference: float) -> float:
    """To two significant digits: more would pretend to know the effect that the seeds are for, and one can halve them."""
    return float(f"{abs(difference):.1e}")


def _word(c: Comparison) -> str:
    if c.gates:
        return "INVALID"
    if c.missing or c.estimate is None:
        return "INCOMPLETE"
    if _seeds(c) < FEWEST_SEEDS:
        return "UNDERPOWERED"
    different, within = c.p_holm <= ERROR_RATE, c.p_equivalence <= ERROR_RATE
    if different:
        return "NEGLIGIBLE" if within else "BETTER" if c.estimate.difference < 0 else "WORSE"
    return "EQUIVALENT" if within else "INCONCLUSIVE"


def _sentence(c: Comparison, margin: float) -> str:
    if c.gates:
        more = f" (and {len(c.gates) - 1} more)" if len(c.gates) > 1 else ""
        return f"{c.name} vs {c.reference}: INVALID: {c.gates[0]}{more}."
    missing = ", ".join(f"{name} {why}" for name, why in list(c.missing.items())[:3])
    missing += f" and {len(c.missing) - 3} more" if len(c.missing) > 3 else ""
    if c.estimate is None:
        return f"{c.name} vs {c.reference}: INCOMPLETE: {missing or 'no finished cells'}."
    return f"{c.name} vs {c.reference}: {signed(c.estimate.difference)} nats ({_how(c)}): {c.word}{_after(c, margin, missing)}."


def _after(c: Comparison, margin: float, missing: str) -> str:
    """What the word leaves open."""
    if c.word == "INCOMPLETE":
        return f"; missing: {missing}"
    if c.word == "UNDERPOWERED":
        return f"; fewer than {FEWEST_SEEDS} seeds: make SEEDS={FEWEST_SEEDS}"
    if c.word == "INCONCLUSIVE":
        return f"; {_prospects(c)}"
    if c.word in ("BETTER", "WORSE"):
        return f"; perhaps by less than the margin of {margin:g}" if margin and _near(c.estimate, margin) else ""
    what = "real, but smaller than" if c.word == "NEGLIGIBLE" else "within"
    return f"; {what} the margin of {margin:g} (equivalence Holm p {shown_p(c.p_equivalence)})"


def _near(e: stats.Estimate, margin: float) -> bool:
    """Whether the end of the interval that is closer to zero lies within the margin."""
    return e.low is None or min(abs(e.low), abs(e.high)) < margin or e.low < 0 < e.high


def _how(c: Comparison) -> str:
    """'95 % CI -0.0061..+0.0019, 5 paired seeds, Holm p .62'."""
    e = c.estimate
    seeds = {"paired": f"{e.n} paired seed{'s' * (e.n > 1)}",
             "anytime": f"{e.n} paired seed{'s' * (e.n > 1)}, anytime-valid",
             "welch": f"Welch, because the seeds differ: {e.n} and {e.n_reference}"}[e.method]
    name = "95 % confidence sequence" if e.method == "anytime" else "95 % CI"
    parts = [f"{name} {signed(e.low)}..{signed(e.high)}"] if e.low is not None else []
    parts += [seeds] + ([f"Holm p {shown_p(c.p_holm)}"] if c.p_holm is not None else [])
    return ", ".join(parts)


def _prospects(c: Comparison) -> str:
    """What these seeds can see, and what the difference seen would need."""
    if c.estimate.method == "welch":
        return "equal sets of seeds would be compared in pairs, which sees more"
    effect = rounded(c.estimate.difference)
    found = f"{_seeds(c)} seeds can see {'nothing yet' if c.detectable is None else f'{c.detectable:.4f}'}"
    if effect == 0:
        return found
    if c.seeds_needed is None:
        return f"{found}; more than {stats.MOST_SEEDS} needed for {effect:g}"
    if c.seeds_needed <= _seeds(c):
        return f"{found}; about {_seeds(c) + 1} or more needed for {effect:g}"
    return f"{found}; about {c.seeds_needed} needed for {effect:g}"


def signed(nats: float) -> str:
    """'+0.0019', and '0.0000' without a sign that would mean nothing."""
    text = f"{nats:+.4f}"
    return text[1:] if float(text) == 0 else text


def shown_p(p: float) -> str:
    """'.62', '.0031', '<.0001', '1'."""
    if p < 1e-4:
        return "<.0001"
    text = f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
    return "1" if float(text) >= 1 else text.removeprefix("0")
