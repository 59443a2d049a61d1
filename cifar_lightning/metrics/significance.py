"""Counts -> intervals and p-values. Every test is exact: a class may have ten images.

Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
Q. McNemar, Psychometrika 12 (1947); S. Holm, Scandinavian Journal of Statistics 6 (1979); R. G. Newcombe, "Interval
estimation for the difference between independent proportions" and "Improved confidence intervals for the difference
between binomial proportions based on paired data", both Statistics in Medicine 17 (1998), method 10 of each.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

Z_95 = 1.959964  # quantile of the normal distribution that leaves 2.5 % on either side
_TIE = 1e-7  # two outcomes count as equally likely within this, as in R's and SciPy's exact tests


def wilson_interval(successes: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Return the score interval of a share, within 0..1; without trials that is all of 0..1.

    Unlike the usual "plus or minus" it holds near 0 and 1 and for small classes.

    Args:
        successes: Right answers.
        total: Predictions.
        z: Quantile of the normal distribution.

    Raises:
        ValueError: Not 0 <= successes <= total.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes out of {total}")
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z**2 / (2 * total)
    half_width = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # At 0 and at 1 the end is exact; rounding must not move it.
    low = 0.0 if successes == 0 else (centre - half_width) / scale
    high = 1.0 if successes == total else (centre + half_width) / scale
    return low, high


def binomial_test(successes: int, trials: int, share: float = 0.5) -> float:
    """Return how likely an outcome at least as unlikely as this one is, if each trial succeeds with `share`.

    Two-sided and exact: the probabilities of all outcomes that are not likelier than this one, added up.
    """
    pmf = _binomial_pmf(trials, share)
    return min(float(pmf[pmf <= pmf[successes] * (1 + _TIE)].sum()), 1.0)


def mcnemar_test(only_first: int, only_second: int) -> float:
    """Return how likely so uneven a split is if both are equally good on the images that just one has right.

    Exact: a fair coin for each of these images. The images that both have right or wrong say nothing.
    """
    return binomial_test(only_first, only_first + only_second)


def fisher_test(right: int, total: int, other_right: int, other_total: int) -> float:
    """Return how likely two shares so far apart are if both are samples of one; two-sided, exact."""
    all_right, everything = right + other_right, total + other_total
    least, most = max(0, all_right - other_total), min(all_right, total)
    outcomes = np.arange(least, most + 1)
    factorials = _log_factorials(everything)
    # Hypergeometric: ways to have k of the right ones among `total`; constant factors cancel in the normalisation.
    log_weights = -(
        factorials[outcomes]
        + factorials[total - outcomes]
        + factorials[all_right - outcomes]
        + factorials[other_total - all_right + outcomes]
    )
    pmf = np.exp(log_weights - log_weights.max())
    pmf /= pmf.sum()
    return min(float(pmf[pmf <= pmf[right - least] * (1 + _TIE)].sum()), 1.0)


def at_least_test(observed: int, trials: Sequence[int], shares: Sequence[float]) -> float:
    """Return how likely it is that several binomials add up to `observed` or more; one-sided, exact."""
    pmf = np.ones(1)
    for number, share in zip(trials, shares, strict=True):
        pmf = np.convolve(pmf, _binomial_pmf(number, share))
    return min(float(pmf[observed:].sum()), 1.0)


def mean_test(mean: float, deviation: float, number: int) -> float:
    """Return how likely a mean so far from 0 is if the true one is 0; two-sided, by the normal approximation.

    Args:
        mean: Of the sample.
        deviation: Standard deviation of the sample.
        number: Size of the sample, large.
    """
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / deviation * math.sqrt(number / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that allow for having made all these tests: those below 0.05 are all right 19 times in 20."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def difference_interval(right: int, total: int, other_right: int, other_total: int) -> tuple[float, float]:
    """Return the 95 % interval of share minus other share, -1..1, of two separate samples."""
    share, other = _share(right, total), _share(other_right, other_total)
    (low, high), (other_low, other_high) = wilson_interval(right, total), wilson_interval(other_right, other_total)
    difference = share - other
    return (
        max(-1.0, difference - math.hypot(share - low, other_high - other)),
        min(1.0, difference + math.hypot(high - share, other - other_low)),
    )


def paired_difference_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of first share minus second share, -1..1, where both answered the same images.

    Args:
        both: Images that both have right.
        only_first: Images that the first alone has right.
        only_second: Images that the second alone has right.
        neither: Images that both have wrong.
    """
    total = both + only_first + only_second + neither
    right, other_right = both + only_first, both + only_second
    share, other = _share(right, total), _share(other_right, total)
    (low, high), (other_low, other_high) = wilson_interval(right, total), wilson_interval(other_right, total)
    product = float(both * neither - only_first * only_second)
    if product > 0:  # the method's continuity correction
        product = max(product - total / 2, 0)
    margins = math.sqrt(right * (total - right)) * math.sqrt(other_right * (total - other_right))
    correlation = product / margins if margins else 0.0

    def width(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * correlation * first * second + second**2, 0.0))

    difference = share - other
    return (
        max(-1.0, difference - width(share - low, other_high - other)),
        min(1.0, difference + width(high - share, other - other_low)),
    )


def _binomial_pmf(trials: int, share: float) -> Float64[np.ndarray, " outcomes"]:
    outcomes = np.arange(trials + 1)
    if share in (0.0, 1.0):
        sure: Float64[np.ndarray, " outcomes"] = (outcomes == round(share * trials)).astype(np.float64)
        return sure
    factorials = _log_factorials(trials)
    log_ways = factorials[trials] - factorials - factorials[::-1]
    pmf: Float64[np.ndarray, " outcomes"] = np.exp(
        log_ways + outcomes * math.log(share) + outcomes[::-1] * math.log1p(-share)
    )
    return pmf


def _log_factorials(last: int) -> Float64[np.ndarray, " numbers"]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, last + 1)))])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.5  # the middle of an interval that says nothing
