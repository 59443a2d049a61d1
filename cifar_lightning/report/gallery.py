"""Selection of test images to look at: mistakes, high losses, uncertain predictions, confused pairs."""

import numpy as np
from jaxtyping import Float, Int, Int64

from cifar_lightning.metrics.calibration import log_softmax, softmax
from cifar_lightning.metrics.classification import confusion_matrix, most_confused

NUM_EXPLAINED = 12  # most confident mistakes: a test explains them, and the page shows them first
Positions = Int64[np.ndarray, " _"]  # as many as there are


def confident_mistakes(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> Positions:
    """Return the positions of all mistakes, the most confident first; ties stay in the order of the predictions."""
    mistakes = np.flatnonzero(logits.argmax(axis=1) != targets)
    confidence = softmax(logits[mistakes]).max(axis=1)
    return mistakes[np.argsort(-confidence, kind="stable")]


def least_certain(logits: Float[np.ndarray, "n classes"]) -> Positions:
    """Return the positions of all images, the smallest gap between the two most probable classes first."""
    probs = softmax(logits)
    gaps = np.diff(np.partition(probs, -2, axis=1)[:, -2:], axis=1)[:, 0] if probs.shape[1] > 1 else probs[:, 0]
    return np.argsort(gaps, kind="stable")


def gallery_positions(
    logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"], limit: int = 500
) -> Positions:
    """Return the positions of the images that a run keeps for its report: unique, ascending, at most `limit`.

    A quarter each: the most confident mistakes, the highest losses, the least certain predictions, and the most
    confident mistakes of the most confused pairs. If these are fewer than three fifths of `limit`, evenly spaced images
    are added, for the parity check of exports.
    """
    mistakes, preds = confident_mistakes(logits, targets), logits.argmax(axis=1)
    losses = -log_softmax(logits)[np.arange(len(targets)), targets]
    orders = mistakes, np.argsort(-losses, kind="stable"), least_certain(logits)
    chosen = [order[: limit // 4] for order in orders]
    for pair in most_confused(confusion_matrix(targets, preds, logits.shape[1])):
        is_of_pair = (targets[mistakes] == pair.true) & (preds[mistakes] == pair.pred)
        chosen.append(mistakes[is_of_pair][: limit // 40])
    shown = np.unique(np.concatenate(chosen)).astype(np.int64)
    missing = min(limit * 3 // 5, len(targets)) - len(shown)
    if missing > 0:
        others = np.setdiff1d(np.arange(len(targets)), shown)
        shown = np.union1d(shown, others[np.linspace(0, len(others) - 1, missing).astype(np.int64)])
    return shown
