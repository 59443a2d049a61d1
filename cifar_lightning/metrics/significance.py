"""Confidence intervals and significance tests for counts, all exact: a class may have only ten images.

SciPy computes the tests. Not in SciPy, by hand: S. Holm, Scandinavian Journal of Statistics 6 (1979), and R. G.
Newcombe, "Interval estimation for the difference between independent proportions" and "Improved confidence intervals
for the difference between binomial proportions based on paired data", both Statistics in Medicine 17 (1998), method 10
of each. SciPy is imported where it is used because it takes longer to import than the rest of `analyze`.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964  # normal quantile of a two-sided 95 % interval


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a fraction, within 0..1; (0, 1) without trials.

    Unlike the normal approximation it is valid near 0 and 1 and for small classes.

    Raises:
        ValueError: Not 0 <= successes <= total.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes out of {total}")
    if total == 0:
        return 0.0, 1.0
    interval = binomtest(successes, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def binomial_test(successes: int, trials: int, probability: float = 0.5) -> float:
    """Return the two-sided exact p-value of `successes` if each trial succeeds with `probability`; 1 without trials."""
    from scipy.stats import binomtest

    return float(binomtest(successes, trials, probability).pvalue) if trials else 1.0


def mcnemar_test(only_first: int, only_second: int) -> float:
    """Return the exact p-value of McNemar's test: whether two models have the same accuracy on the same images."""
    return binomial_test(only_first, only_first + only_second)


def fisher_test(correct: int, total: int, other_correct: int, other_total: int) -> float:
    """Return the two-sided p-value of Fisher's exact test: whether two samples have the same accuracy."""
    from scipy.stats import fisher_exact

    table = [[correct, total - correct], [other_correct, other_total - other_correct]]
    return float(fisher_exact(table).pvalue)


def at_least_test(observed: int, trials: Sequence[int], probabilities: Sequence[float]) -> float:
    """Return the exact probability that a sum of binomial variables is `observed` or more.

    `scipy.stats.poisson_binom` is exact only to about 1e-9, too coarse for a small p-value.
    """
    from scipy.stats import binom

    pmfs = (binom.pmf(np.arange(n + 1), n, p) for n, p in zip(trials, probabilities, strict=True))
    pmf = functools.reduce(np.convolve, pmfs)
    return min(float(pmf[observed:].sum()), 1.0)


def mean_test(mean: float, deviation: float, number: int) -> float:
    """Return the two-sided p-value of a mean of a large sample if the true mean is 0, by the normal approximation."""
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / deviation * math.sqrt(number / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests by Holm's method, in the order given."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def difference_interval(correct: int, total: int, other_correct: int, other_total: int) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy minus the other accuracy, -1..1, of two independent samples."""
    accuracy, other = _fraction(correct, total), _fraction(other_correct, other_total)
    (low, high), (other_low, other_high) = wilson_interval(correct, total), wilson_interval(other_correct, other_total)
    difference = accuracy - other
    return (
        max(-1.0, difference - math.hypot(accuracy - low, other_high - other)),
        min(1.0, difference + math.hypot(high - accuracy, other - other_low)),
    )


def paired_difference_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of the first model's accuracy minus the second's, -1..1, on the same images.

    The arguments count the images that both models, only one, or neither of them classify correctly.
    """
    total = both + only_first + only_second + neither
    correct, other_correct = both + only_first, both + only_second
    accuracy, other = _fraction(correct, total), _fraction(other_correct, total)
    (low, high), (other_low, other_high) = wilson_interval(correct, total), wilson_interval(other_correct, total)
    product = float(both * neither - only_first * only_second)
    if product > 0:  # the method's continuity correction
        product = max(product - total / 2, 0)
    margins = math.sqrt(correct * (total - correct)) * math.sqrt(other_correct * (total - other_correct))
    correlation = product / margins if margins else 0.0

    def width(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * correlation * first * second + second**2, 0.0))

    difference = accuracy - other
    return (
        max(-1.0, difference - width(accuracy - low, other_high - other)),
        min(1.0, difference + width(high - accuracy, other - other_low)),
    )


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.5  # the middle of (0, 1), the interval without trials
