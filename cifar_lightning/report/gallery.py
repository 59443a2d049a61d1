"""Selection of test images to look at: mistakes, high losses, uncertain predictions, confused pairs."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int64

from cifar_lightning.metrics.calibration import log_softmax
from cifar_lightning.metrics.classification import ConfusedPair, confusion_matrix, most_confused

NUM_EXPLAINED = 12  # most confident mistakes: a test explains them, and the page shows them first
Positions = Int64[np.ndarray, " _"]  # as many as there are


@dataclass(frozen=True)
class Rankings:
    """Positions of images in the predictions, the most informative first."""

    mistakes: Positions  # all, the most confident first
    losses: Positions  # all images, the highest loss first
    uncertain: Positions  # all images, the smallest gap between the two most probable classes first
    pairs: list[tuple[ConfusedPair, Positions]]  # the most confused, each with its mistakes, the most confident first


def rank_images(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> Rankings:
    """Rank the images by each criterion; ties stay in the order of the predictions."""
    log_probs = log_softmax(logits)
    probs = np.exp(log_probs)
    preds = logits.argmax(axis=1)
    confidence = probs.max(axis=1)
    mistakes = np.flatnonzero(preds != targets)
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")]
    losses = -log_probs[np.arange(len(targets)), targets]
    gaps = -np.diff(np.partition(probs, -2, axis=1)[:, -2:], axis=1)[:, 0] if probs.shape[1] > 1 else -confidence
    pairs = most_confused(confusion_matrix(targets, preds, logits.shape[1]))
    return Rankings(
        mistakes=mistakes,
        losses=np.argsort(-losses, kind="stable"),
        uncertain=np.argsort(-gaps, kind="stable"),
        pairs=[(pair, mistakes[(targets[mistakes] == pair.true) & (preds[mistakes] == pair.pred)]) for pair in pairs],
    )


def gallery_positions(
    logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"], limit: int = 500
) -> Positions:
    """Return the positions of the images that a run keeps for its report: unique, ascending, at most `limit`.

    A quarter each: the most confident mistakes, the highest losses, the least certain predictions, and the most
    confident mistakes of the most confused pairs. If these are fewer than three fifths of `limit`, evenly spaced images
    are added, for the parity check of exports.
    """
    ranked = rank_images(logits, targets)
    quarter = limit // 4
    chosen = [order[:quarter] for order in (ranked.mistakes, ranked.losses, ranked.uncertain)]
    of_pairs = [order[: limit // 40] for _, order in ranked.pairs]
    shown = np.unique(np.concatenate([*chosen, *of_pairs])).astype(np.int64)
    missing = min(limit * 3 // 5, len(targets)) - len(shown)
    if missing > 0:
        others = np.setdiff1d(np.arange(len(targets)), shown)
        shown = np.union1d(shown, others[np.linspace(0, len(others) - 1, missing).astype(np.int64)])
    return shown
