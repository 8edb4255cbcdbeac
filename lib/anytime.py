"""Tests that may be looked at after every seed: the anytime-valid t test of paired differences.

The e-value after n differences is the mixture likelihood ratio of the t statistic, with a normal prior of variance SCALE
on the standardised mean (mean over standard deviation), which does not depend on the unknown variance. While the true
mean is mu the e-values for mu are a nonnegative martingale of mean 1, so by Ville's inequality the chance that they *ever*
reach 1/alpha is at most alpha, at whatever look and with whatever rule for stopping. Sources: Wang and Ramdas, "Anytime-
valid t-tests and confidence sequences for Gaussian means with unknown variance" (arXiv 2310.03722); Perez-Ortiz, Lardy,
de Heide and Gruenwald (arXiv 2208.07610). Like every t test it takes differences to be about normal.

1 / (the largest e-value so far) is a p value at every look, so Holm over a study's comparisons keeps the error rate of
the whole family, for unlimited looks.
"""

import math
from typing import Any

import numpy as np
from scipy.special import ndtri

from lib.design import ERROR_RATE
from lib.stats import MOST_SEEDS, POWER, Estimate

# Variance of the prior. 10 aims at differences of about three standard deviations, which a dozen seeds can see: by
# simulation (make bench-stats) it needs fewer seeds than 1 or 100 where the difference is 1.5 to 5 of them.
SCALE = 10.0


def e_values(differences: Any, mean: float = 0.0) -> np.ndarray:
    """E-values [n] for the hypothesis that the true mean difference is `mean`, after 1, 2, ... n differences."""
    d = np.asarray(differences, float)
    n = np.arange(1, len(d) + 1)
    centred = d - np.mean(d)  # the spread does not depend on where the differences lie, its rounding errors would
    running = np.cumsum(d - mean) / n
    squares = np.maximum(np.cumsum(centred ** 2) - np.cumsum(centred) ** 2 / n, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(running == 0, 0.0, n * running ** 2 / squares)  # t^2 / (n - 1)
        log_e = -0.5 * np.log1p(n * SCALE) + n / 2 * np.where(
            np.isinf(x), np.log1p(n * SCALE), np.log1p(x) - np.log1p(x / (1 + n * SCALE)))
    log_e[:1] = 0.0  # one difference says nothing about its own spread
    return np.exp(np.minimum(log_e, 700.0))


def p_value(differences: Any, mean: float = 0.0) -> float:
    """The anytime-valid p after these looks, in their order: it does not rise while the mean stays on its side.

    Only looks at which the mean lay where it lies now count, so that evidence for a gain is never read as one for a loss.
    """
    d = np.asarray(differences, float)
    side = np.cumsum(d - mean)
    counted = np.where(np.sign(side) == np.sign(side[-1]), e_values(d, mean), 1.0) if len(d) else np.ones(1)
    return float(min(1.0, 1.0 / np.max(counted)))


def equivalence_p(differences: Any, margin: float) -> float:
    """p of the claim that the mean lies within +-margin: both margins must have been ruled out, each from inside."""
    d = np.asarray(differences, float)
    running = np.cumsum(d) / np.arange(1, len(d) + 1)
    found = []
    for bound, inside in ((margin, running < margin), (-margin, running > -margin)):
        found.append(min(1.0, 1.0 / np.max(np.where(inside, e_values(d, bound), 1.0), initial=1.0)))
    return float(max(found))


def half_width(sd: float, n: int, alpha: float = ERROR_RATE) -> float:
    """Half the width of the confidence sequence at look n; infinite while n is too small for `alpha`."""
    if n < 2:
        return math.inf
    bound = (math.sqrt(1 + n * SCALE) / alpha) ** (2 / n)
    if bound >= 1 + n * SCALE:
        return math.inf
    return sd * math.sqrt((n - 1) / n * (bound - 1) / (1 - bound / (1 + n * SCALE)))


def estimate(differences: Any) -> Estimate:
    """Mean difference, 95 % confidence sequence and anytime-valid p after these looks. See lib.stats.Estimate."""
    d = np.asarray(differences, float)
    n, mean = len(d), float(np.mean(d))
    if n < 2:
        return Estimate(mean, None, None, None, n, n, None, None, "anytime")
    sd = float(np.std(d, ddof=1))
    half = half_width(sd, n)
    low, high = (None, None) if math.isinf(half) else (mean - half, mean + half)
    return Estimate(mean, low, high, p_value(d), n, n, sd / math.sqrt(n), n - 1, "anytime")


def detectable(sd: float, n: int, alpha: float) -> float | None:
    """The true difference that has about an 80 % chance to be seen at look n or before; None while none can be."""
    found = half_width(sd, n, alpha) + float(ndtri(POWER)) * sd / math.sqrt(n)
    return None if math.isinf(found) else found


def seeds_needed(sd: float, difference: float, alpha: float) -> int | None:
    """The look at which `difference` has about an 80 % chance to have been seen; None beyond MOST_SEEDS."""
    for n in range(2, MOST_SEEDS + 1):
        seen = detectable(sd, n, alpha)
        if seen is not None and seen <= abs(difference):
            return n
    return None
