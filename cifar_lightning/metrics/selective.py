"""Selective classification: how many images remain if only confident predictions are accepted."""

import numpy as np
from jaxtyping import Bool, Float


def confidence_threshold(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], target: float
) -> float | None:
    """Return the lowest threshold at and above which the accuracy is at least `target`; None if there is none.

    The confidence is the probability of the predicted class ("softmax response"), and images below the threshold are
    left to somebody else. Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017. They
    bound the risk of new images with high probability; this threshold is the empirical one, which reaches the target on
    the images that it is chosen on. What it gives on others is measured on others.

    Args:
        confidence: 0..1; images whose confidence is NaN are never accepted.
        correct: Whether the prediction is correct.
        target: Accuracy, 0..1.
    """
    confidence, correct = confidence[~np.isnan(confidence)], correct[~np.isnan(confidence)]
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    is_last = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]  # equal images are accepted together
    accuracy = np.cumsum(correct[order]) / np.arange(1, len(ordered) + 1)
    reached = ordered[is_last & (accuracy >= target)]
    return float(reached[-1]) if len(reached) else None
