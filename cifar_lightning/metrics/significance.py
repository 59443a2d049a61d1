"""Confidence intervals and significance tests for counts that hold their level for small samples, too.

The tests compute exact distributions, except `shuffle_test` (Monte Carlo). The intervals are approximate: Wilson's and
Newcombe's of fractions, and `poisson_binomial_interval`, which assumes one shift of all logits and for more than 5,000
predictions normal tails.

SciPy computes most tests. Not in SciPy, by hand: S. Holm, Scandinavian Journal of Statistics 6 (1979), and R. G.
Newcombe, "Interval estimation for the difference between independent proportions" and "Improved confidence intervals
for the difference between binomial proportions based on paired data", both Statistics in Medicine 17 (1998), method 10
of each. So is the distribution of `poisson_binomial_test`: the time of `scipy.stats.poisson_binom` grows with the
square of the trials, 0.68 s for a test of 10,000 in place of 0.03 s (one thread of an Intel Xeon), and an interval
takes dozens of them. SciPy is imported where it is used because it takes longer to import than the rest of `analyze`.
Functions of whole numbers are cached: SciPy takes up to 1 ms for one, and small counts repeat.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

_NUM_EXACT = 5_000  # predictions up to which the interval of their mean probability is exact


@functools.lru_cache(100_000)
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


@functools.lru_cache(100_000)
def binomial_test(successes: int, trials: int, probability: float = 0.5) -> float:
    """Return the two-sided exact p-value of `successes` if each trial succeeds with `probability`; 1 without trials."""
    from scipy.stats import binomtest

    return float(binomtest(successes, trials, probability).pvalue) if trials else 1.0


def mcnemar_test(only_first: int, only_second: int) -> float:
    """Return the exact p-value of McNemar's test: whether two models have the same accuracy on the same images."""
    return binomial_test(only_first, only_first + only_second)


@functools.lru_cache(100_000)
def fisher_test(correct: int, total: int, other_correct: int, other_total: int) -> float:
    """Return the two-sided p-value of Fisher's exact test: whether two samples have the same accuracy."""
    from scipy.stats import fisher_exact

    table = [[correct, total - correct], [other_correct, other_total - other_correct]]
    return float(fisher_exact(table).pvalue)


def poisson_binomial_test(successes: int, probabilities: Float[np.ndarray, " n"]) -> float:
    """Return the two-sided p-value, twice the smaller tail, of `successes` if trial i succeeds with `probabilities[i]`.

    The distribution is exact but for rounding of about 1e-15: smaller p-values are no more than small. 100,000
    trials take less than a second.
    """
    return min(1.0, 2 * min(_tails(_pmf(_clipped(probabilities)), successes)))


def poisson_binomial_interval(successes: int, probabilities: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the 95 % interval of the true mean probability, given that all `probabilities` are off by the same logit.

    It holds the mean of `probabilities` where `poisson_binomial_test` gives 0.05 or more, and is Clopper and Pearson's
    interval where all probabilities are equal. For more than 5,000 trials the tails are the normal approximation's with
    a continuity correction: each end is then off by at most 0.00025, 0.025 points of accuracy (measured for mean
    probabilities of 0.5 to 1; 0.00001 where they are 0.5, most where all are near 1).
    """
    from scipy.optimize import brentq
    from scipy.special import expit, logit, ndtr

    number = len(probabilities)
    logits = logit(_clipped(probabilities))

    def tails(shift: float) -> tuple[float, float]:
        shifted = expit(logits + shift)
        if number <= _NUM_EXACT:
            return _tails(_pmf(shifted), successes)
        mean, deviation = shifted.sum(), max(float((shifted * (1 - shifted)).sum()) ** 0.5, 1e-12)
        return ndtr((successes + 0.5 - mean) / deviation), ndtr((mean - successes + 0.5) / deviation)

    def end(tail: int) -> float:
        shift = brentq(lambda shift: tails(shift)[tail] - 0.025, -60.0, 60.0, xtol=1e-5)
        return float(expit(logits + shift).mean())

    return end(1) if successes > 0 else 0.0, end(0) if successes < number else 1.0


def _clipped(probabilities: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.clip(probabilities.astype(np.float64), 1e-9, 1 - 1e-9)


def _pmf(probabilities: Float[np.ndarray, " n"]) -> Float[np.ndarray, " outcomes"]:
    """Return the probability of each number of successes.

    Trials are added one by one in blocks of 64, and pairs of blocks are convolved until one is left.
    """
    num_blocks = 1 << max((len(probabilities) - 1) // 64, 0).bit_length()
    padded = np.zeros(num_blocks * min(64, len(probabilities)))
    padded[: len(probabilities)] = probabilities
    trials = padded.reshape(num_blocks, -1)
    pmfs = np.zeros((num_blocks, trials.shape[1] + 1))
    pmfs[:, 0] = 1
    for one in trials.T[:, :, None]:
        pmfs[:, 1:] += one * (pmfs[:, :-1] - pmfs[:, 1:])
        pmfs[:, :1] *= 1 - one
    while len(pmfs) > 1:
        length = 2 * pmfs.shape[1]  # one more than the outcomes: the last is 0
        spectra = np.fft.rfft(pmfs, length)
        pmfs = np.fft.irfft(spectra[::2] * spectra[1::2], length)[:, :-1]
    pmf: Float[np.ndarray, " outcomes"] = np.maximum(pmfs[0], 0)
    return pmf


def _tails(pmf: Float[np.ndarray, " outcomes"], observed: int) -> tuple[float, float]:
    """Return the probabilities of at most and of at least `observed`."""
    return float(pmf[: observed + 1].sum()), float(pmf[observed:].sum())


def shuffle_test(
    mistakes: Int64[np.ndarray, "classes classes"], counted: Bool[np.ndarray, "classes classes"], num_draws: int = 1999
) -> tuple[float, float]:
    """Test whether more mistakes are in the `counted` cells than if true and predicted class were unrelated.

    A Monte Carlo test given the number of mistakes of each true class and of each predicted class: the predictions are
    exchanged at random among the mistakes, and none becomes correct. The observed table is put at a random place of a
    reversible Markov chain, which keeps the level at any number of mistakes and draws, however slowly the chain mixes:
    J. Besag, P. Clifford, "Generalized Monte Carlo significance tests", Biometrika 76 (1989). The seed is fixed.

    Args:
        mistakes: Number of mistakes of each true (row) and predicted class, 0 on the diagonal.
        counted: Cells whose sum is tested.
        num_draws: Tables drawn; fewer, but at least 199, for more than 10,000 mistakes. The smallest possible p-value
            is 1 / (`num_draws` + 1).

    Returns:
        One-sided p-value, and the mean of the sum over all tables.
    """
    total = int(mistakes.sum())
    if total == 0:
        return 1.0, 0.0
    num_draws = min(num_draws, max(199, 20_000_000 // total))
    rng = np.random.default_rng(0)
    true, observed = (np.repeat(axis, mistakes.ravel()) for axis in np.indices(mistakes.shape).reshape(2, -1))
    half, place = total // 2, int(rng.integers(num_draws + 1))
    sums = [int(mistakes[counted].sum())]
    for steps in (place, num_draws - place):
        predicted = observed.copy()
        for _ in range(steps):
            order = rng.permutation(total)
            first, second = order[:half], order[half : 2 * half]
            swap = (true[first] != predicted[second]) & (true[second] != predicted[first]) & (rng.random(half) < 0.5)
            first, second = first[swap], second[swap]
            predicted[first], predicted[second] = predicted[second], predicted[first]
            sums.append(int(counted[true, predicted].sum()))
    return float(np.mean(np.array(sums) >= sums[0])), float(np.mean(sums))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests by Holm's method, in the order given."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return `n`, `mean`, `std` (with n - 1; None for one value), `min` and `max` of at least one value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(np.mean(values)), "std": std, "min": min(values), "max": max(values)}


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean of normal values, such as differences of pairs; None for one value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1))
    return mean - half / math.sqrt(len(values)), mean + half / math.sqrt(len(values))


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
