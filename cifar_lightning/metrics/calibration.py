"""Logits -> probabilities, and how far they can be trusted: reliability, calibration error, temperature; NumPy only."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

NUM_BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


def log_softmax(logits: Float[np.ndarray, "n classes"]) -> Float64[np.ndarray, "n classes"]:
    """Return log-probabilities; in float64, so that large logits neither overflow nor saturate; NaN where infinite."""
    with np.errstate(invalid="ignore"):  # inf - inf
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        log_probs: Float64[np.ndarray, "n classes"] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs


def softmax(logits: Float[np.ndarray, "n classes"]) -> Float64[np.ndarray, "n classes"]:
    """Return probabilities, 0..1, each row summing to 1."""
    probs: Float64[np.ndarray, "n classes"] = np.exp(log_softmax(logits))
    return probs


def cross_entropy(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> float:
    """Return the mean of minus the log-probability of the true class, in nats, without label smoothing."""
    return float(-log_softmax(logits)[np.arange(len(targets)), targets].mean())


@dataclass(frozen=True)
class Reliability:
    """Images binned by the probability of their predicted class, into equal parts (a, b] of 0..1.

    Attributes:
        edges: Ends of the bins, shape (bins + 1,).
        num_images: Images in each bin.
        num_right: Those of them whose predicted class is the true one.
        confidence: Mean probability of the predicted class in each bin, 0..1; NaN in an empty one.
        error: Expected calibration error, 0..1; NaN if any probability is.
    """

    edges: Float64[np.ndarray, " ends"]
    num_images: Int64[np.ndarray, " bins"]
    num_right: Int64[np.ndarray, " bins"]
    confidence: Float64[np.ndarray, " bins"]
    error: float


def reliability(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = NUM_BINS
) -> Reliability:
    """Compare confidence and accuracy, bin by bin, as Guo et al. do.

    Args:
        confidence: Probability of the predicted class, 0..1.
        right: Whether it is the true class.
        bins: Number of bins.
    """
    confidence = confidence.astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    known = ~np.isnan(confidence)
    places = np.clip(np.digitize(confidence[known], edges, right=True) - 1, 0, bins - 1)
    num_images = np.bincount(places, minlength=bins).astype(np.int64)
    num_right = np.bincount(places, weights=right[known], minlength=bins).astype(np.int64)
    summed = np.bincount(places, weights=confidence[known], minlength=bins)
    # A bin's |accuracy - mean confidence| times its share of the images is |right - summed confidence| / n.
    error = float(np.abs(num_right - summed).sum() / len(right)) if known.all() and len(right) else math.nan
    mean = np.divide(summed, num_images, out=np.full(bins, np.nan), where=num_images > 0)
    return Reliability(edges, num_images, num_right, mean, error)


def expected_calibration_error(
    probs: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"], bins: int = NUM_BINS
) -> float:
    """Return how far confidence and accuracy are apart on average, 0..1; NaN if any probability is."""
    return reliability(probs.max(axis=1), probs.argmax(axis=1) == targets, bins).error


def fit_temperature(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> float | None:
    """Return the T that makes softmax(logits / T) most likely, by Newton's method on 1 / T.

    Above 1 the network was too sure of itself, below 1 not sure enough. One number for all classes keeps the order of
    the classes, so no answer changes. Guo et al. (2017), section 4.2. None where there is no best one: every answer is
    right (the surer the better), the answers are no better than chance, or a logit is not finite.

    Args:
        logits: Of images that the network was not trained on and that are not the test's.
        targets: Their classes.
    """
    if len(targets) == 0 or not np.isfinite(logits).all():
        return None
    logits = logits.astype(np.float64)
    margins = logits - logits[np.arange(len(targets)), targets][:, None]
    # The loss is convex in b = 1 / T; its slope is negative at 0 and positive far out exactly if there is a minimum.
    if margins.mean() >= 0 or margins.max() <= 0:
        return None
    low, high, scale = 0.0, math.inf, 1.0
    for _ in range(200):
        probs = softmax(margins * scale)
        mean = (probs * margins).sum(axis=1)
        slope = mean.mean()
        curvature = ((probs * margins**2).sum(axis=1) - mean**2).mean()
        low, high = (low, scale) if slope > 0 else (scale, high)
        step = slope / curvature if curvature > 0 else math.inf
        following = scale - step
        if not low < following < high:  # Newton left the bracket
            following = (low + high) / 2 if high < math.inf else 2 * scale
        if abs(following - scale) <= 1e-12 * scale:
            return 1 / following
        scale = following
    return 1 / scale
