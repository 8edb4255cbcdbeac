"""Statistics of paired seeds: what a difference between two arms is worth, for a number of seeds fixed beforehand.

All functions take final validation losses in nats (or their differences) and know nothing of cells. Distributions are
scipy's. Student's t assumes that differences are about normal over seeds; the exact sign-flip test beside it assumes only
that they are symmetric, and its floor says what it could show at best. What may be looked at again and again is in
lib/anytime.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

from lib.design import ERROR_RATE

POWER = 0.8
EXACT_SIGN_FLIPS = 20  # up to 2^20 sign patterns are enumerated; beyond that so many are drawn:
DRAWN_SIGN_FLIPS = 100_000
MOST_SEEDS = 1000  # a study that needs more is not going to be run


@dataclass(frozen=True)
class Estimate:
    """A difference of means with its two-sided 95 % interval and p value; None where n does not allow one.

    `n` and `n_reference` are the seeds of the two arms, `se` the standard error of the difference, `df` its degrees of
    freedom, `method` "paired", "welch" or "anytime".
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    n_reference: int
    se: float | None
    df: float | None
    method: str


def paired(differences: Sequence[float]) -> Estimate:
    """Paired t interval and test of a mean difference of zero; `differences` are arm minus reference, one a seed."""
    d = np.asarray(differences, float)
    n, mean = len(d), float(np.mean(d))
    if n < 2:
        return Estimate(mean, None, None, None, n, n, None, None, "paired")
    return _student(mean, float(np.std(d, ddof=1)) / math.sqrt(n), n - 1, n, n, "paired")


def welch(arm: Any, reference: Any) -> Estimate:
    """Welch's t for two sets of seeds that are not the same (Welch 1947; degrees of freedom of Satterthwaite)."""
    a, b = np.asarray(arm, float), np.asarray(reference, float)
    mean = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return Estimate(mean, None, None, None, len(a), len(b), None, None, "welch")
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    spread = va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1)
    df = float((va + vb) ** 2 / spread) if spread else float(len(a) + len(b) - 2)
    return _student(mean, float(math.sqrt(va + vb)), df, len(a), len(b), "welch")


def _student(mean: float, se: float, df: float, n: int, n_reference: int | None, method: str) -> Estimate:
    half = float(stdtrit(df, 1 - ERROR_RATE / 2)) * se
    return Estimate(mean, mean - half, mean + half, two_sided_p(mean, se, df), n, n_reference, se, df, method)


def two_sided_p(difference: float, se: float, df: float) -> float:
    """p of a t test; arms that differ by the same amount in every seed have no standard error."""
    if se == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stdtr(df, -abs(difference) / se))


def equivalence_p(estimate: Estimate, margin: float) -> float | None:
    """TOST (Schuirmann 1987): the larger p of the one-sided tests that the difference lies beyond either margin."""
    if estimate.se is None:
        return None
    distance = margin - abs(estimate.difference)
    if estimate.se == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stdtr(estimate.df, -distance / estimate.se))


def sign_flip(differences: Sequence[float]) -> tuple[float, float]:
    """Two-sided p of the exact sign-flip (randomisation) test of the mean, and the smallest p these seeds allow.

    Every pattern of signs is as likely as the one seen if the differences are symmetric about zero (Fisher 1935).
    """
    d = np.asarray(differences, float)
    n = len(d)
    seen = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # sums of the same terms in another order count as equal
    if n <= EXACT_SIGN_FLIPS:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= seen)), 2.0 ** (1 - n)
    # not by a product of matrices, whose threads wait for each other longer than one takes
    extreme = sum(int(np.sum(np.abs(np.einsum("ij,j->i", signs, d)) >= seen)) for signs in _drawn_signs(n))
    return (extreme + 1) / (DRAWN_SIGN_FLIPS + 1), 1 / (DRAWN_SIGN_FLIPS + 1)


@lru_cache(maxsize=1)
def _drawn_signs(n: int) -> list[np.ndarray]:
    """Patterns of n signs, in parts: the same for every arm, and drawn once, which takes longer than all that is done with
    them."""
    random = np.random.default_rng(0)
    return [(random.integers(0, 2, (DRAWN_SIGN_FLIPS // 20, n)) * 2 - 1).astype(np.int8) for _ in range(20)]


def holm(p_values: list[float | None], comparisons: int | None = None) -> list[float | None]:
    """Holm's step-down adjustment (Holm 1979) over the comparisons of a plan.

    A comparison without a p (None) keeps None and still counts: leaving one out cannot make the others look better.
    `comparisons` is their number in the plan if that is larger.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    total, adjusted, largest = max(len(p_values), comparisons or 0), list(p_values), 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (total - rank) * p))
        adjusted[index] = largest
    return adjusted


def power_of(difference: float, sd: float, n: int, alpha: float) -> float:
    """Chance that a two-sided paired t test at `alpha` with n seeds sees a true difference; sd is that of differences."""
    df, shift = n - 1, abs(difference) / sd * math.sqrt(n)
    critical = float(stdtrit(df, 1 - alpha / 2))
    # nctdtr gives nan where the lower tail underflows: there the upper one decides
    lower = np.nan_to_num(nctdtr(df, shift, -critical), nan=0.0)
    return float(1 - nctdtr(df, shift, critical) + lower)


def detectable(sd: float, n: int, alpha: float = ERROR_RATE) -> float | None:
    """The smallest true difference that n paired seeds see with 80 % power at `alpha`; None for n < 2."""
    if n < 2:
        return None
    if sd == 0:
        return 0.0
    low, high = 0.0, 1.0
    while power_of(high * sd, sd, n, alpha) < POWER:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power_of(middle * sd, sd, n, alpha) < POWER else (low, middle)
    return high * sd


def seeds_needed(sd: float, difference: float, alpha: float = ERROR_RATE) -> int | None:
    """Paired seeds that see `difference` with 80 % power at `alpha`; None if it would take more than MOST_SEEDS."""
    if difference == 0:
        return None
    if sd == 0:
        return 2
    low, high = 1, MOST_SEEDS + 1  # power grows with n: bisect for the first n that is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power_of(difference, sd, middle, alpha) < POWER else (low, middle)
    return None if high > MOST_SEEDS else high


def correlation(arm: Any, reference: Any) -> float | None:
    """Pearson's correlation over seeds: how much of the noise the pairing removes. None where an arm does not vary."""
    a, b = np.asarray(arm, float), np.asarray(reference, float)
    if len(a) < 3 or np.std(a) == 0 or np.std(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def ratio(arm: Any, reference: Any, estimator: Any = paired) -> tuple[float, float | None, float | None]:
    """Geometric mean of the paired ratios arm/reference, with the 95 % interval of their logarithms by `estimator`."""
    found = estimator(np.log(np.asarray(arm, float)) - np.log(np.asarray(reference, float)))
    return tuple(  # type: ignore[return-value]  # three of them
        None if x is None else math.exp(x) for x in (found.difference, found.low, found.high))


def single_run_difference(sd: float, n: int) -> float:
    """How far two single runs of one arm lie apart in 95 % of cases, from its standard deviation over n seeds."""
    return float(stdtrit(n - 1, 1 - ERROR_RATE / 2)) * math.sqrt(2) * sd
