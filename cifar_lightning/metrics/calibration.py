"""Probabilities from logits and their calibration: reliability, expected calibration error, temperature."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

NUM_BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


def log_softmax(logits: Float[np.ndarray, "n classes"]) -> Float64[np.ndarray, "n classes"]:
    """Return log-probabilities, in float64 so that large logits do not overflow; NaN where a logit is infinite."""
    with np.errstate(invalid="ignore"):  # inf - inf
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        log_probs: Float64[np.ndarray, "n classes"] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs


def softmax(logits: Float[np.ndarray, "n classes"]) -> Float64[np.ndarray, "n classes"]:
    """Return probabilities, 0..1, each row summing to 1."""
    probs: Float64[np.ndarray, "n classes"] = np.exp(log_softmax(logits))
    return probs


def cross_entropy(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> float:
    """Return the mean cross-entropy in nats, without label smoothing."""
    return 0.0 - float(log_softmax(logits)[np.arange(len(targets)), targets].mean())  # 0.0, and not -0.0


@dataclass(frozen=True)
class Reliability:
    """Images binned by the probability of their predicted class, into bins (a, b] of equal width over 0..1."""

    edges: Float64[np.ndarray, " ends"]  # of the bins
    num_images: Int64[np.ndarray, " bins"]
    num_correct: Int64[np.ndarray, " bins"]
    confidence: Float64[np.ndarray, " bins"]  # mean probability of the predicted class, 0..1; NaN in an empty bin
    error: float  # expected calibration error, 0..1; NaN if any probability is
    error_by_chance: float  # about what it would be if each confidence were the probability of being correct


def reliability(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int = NUM_BINS
) -> Reliability:
    """Compare confidence and accuracy in each bin, as Guo et al. (2017)."""
    confidence = confidence.astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    known = ~np.isnan(confidence)
    places = np.clip(np.digitize(confidence[known], edges, right=True) - 1, 0, bins - 1)
    num_images = np.bincount(places, minlength=bins).astype(np.int64)
    num_correct = np.bincount(places, weights=correct[known], minlength=bins).astype(np.int64)
    summed = np.bincount(places, weights=confidence[known], minlength=bins)
    # |accuracy - mean confidence| of a bin times its fraction of the images is |correct - summed confidence| / n.
    error = float(np.abs(num_correct - summed).sum() / len(correct)) if known.all() and len(correct) else math.nan
    # The mean of |correct - summed confidence| of a normal distribution is sqrt(2 / pi) times its standard deviation.
    variances = np.bincount(places, weights=confidence[known] * (1 - confidence[known]), minlength=bins)
    by_chance = float(np.sqrt(2 / np.pi * variances).sum() / len(correct)) if not math.isnan(error) else math.nan
    mean = np.divide(summed, num_images, out=np.full(bins, np.nan), where=num_images > 0)
    return Reliability(edges, num_images, num_correct, mean, error, by_chance)


def expected_calibration_error(
    probs: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"], bins: int = NUM_BINS
) -> float:
    """Return the mean absolute difference of confidence and accuracy over the bins, 0..1; NaN if a probability is."""
    return reliability(probs.max(axis=1), probs.argmax(axis=1) == targets, bins).error


def fit_temperature(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> float | None:
    """Return the temperature T that minimizes the cross-entropy of softmax(logits / T), of a validation split.

    A temperature above 1 means the model was overconfident, below 1 underconfident. It is the same for all classes, so
    no prediction changes. Guo et al. (2017), section 4.2. None if there is no minimum: every prediction is correct, the
    predictions are no better than chance, or a logit is not finite.
    """
    from scipy.optimize import brentq

    if len(targets) == 0 or not np.isfinite(logits).all():
        return None
    logits = logits.astype(np.float64)
    margins = logits - logits[np.arange(len(targets)), targets][:, None]
    # The loss is convex in 1 / T. Its slope is negative at 0 and positive for large values exactly if it has a minimum.
    if margins.mean() >= 0 or margins.max() <= 0:
        return None

    def slope(inverse: float) -> float:
        return float((softmax(margins * inverse) * margins).sum(axis=1).mean())

    high = 1.0
    while slope(high) <= 0:
        high *= 2
    return 1 / float(brentq(slope, 0.0, high, xtol=1e-300, rtol=1e-12, maxiter=1000))
