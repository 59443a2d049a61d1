"""A run's answers -> numbers: confusion matrix, per-class rates, most confused pairs; NumPy only.

Every function is pure. A confusion matrix is int64 with rows for the true class and columns for the predicted one; all
per-class numbers are read from it, so they cannot contradict each other. What has no value (the precision of a class
that was never predicted) is NaN, and nothing here warns about it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from cifar_lightning.metrics.calibration import cross_entropy, expected_calibration_error, softmax
from cifar_lightning.metrics.significance import wilson_interval


def confusion_matrix(
    targets: Int[np.ndarray, " n"], preds: Int[np.ndarray, " n"], num_classes: int
) -> Int64[np.ndarray, "classes classes"]:
    """Count the images of each true class (row) that were taken for each class (column).

    Raises:
        ValueError: A target or prediction is not in 0..num_classes-1, or there are not as many of both.
    """
    if len(targets) != len(preds):
        raise ValueError(f"{len(targets)} targets but {len(preds)} predictions")
    for name, values in (("target", targets), ("prediction", preds)):
        outside = values[(values < 0) | (values >= num_classes)]
        if len(outside):
            raise ValueError(f"{name} {outside[0]} is not in 0..{num_classes - 1}")
    cells = targets.astype(np.int64) * num_classes + preds
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def accuracy(cm: Int[np.ndarray, "classes classes"]) -> float:
    """Return the share of images on the diagonal, 0..1; NaN without images."""
    return float(_ratio(np.trace(cm), cm.sum()))


@dataclass(frozen=True)
class PerClass:
    """Rates of each class, in class order; each array has shape (classes,).

    Attributes:
        support: Images of the class, int64.
        predicted: Images that were taken for the class, int64.
        precision: Share of `predicted` that is right, 0..1; NaN where the class was never predicted.
        recall: Share of `support` that is right, 0..1; NaN where the class has no images.
        f1: Harmonic mean of the two as 2 TP / (support + predicted), 0..1: 0.0 for a class with images that was never
            predicted; NaN only for a class that is neither there nor predicted.
    """

    support: Int64[np.ndarray, " classes"]
    predicted: Int64[np.ndarray, " classes"]
    precision: Float64[np.ndarray, " classes"]
    recall: Float64[np.ndarray, " classes"]
    f1: Float64[np.ndarray, " classes"]


def per_class(cm: Int[np.ndarray, "classes classes"]) -> PerClass:
    """Read the rates of each class from the confusion matrix."""
    right = np.diag(cm).astype(np.int64)
    support = cm.sum(axis=1, dtype=np.int64)
    predicted = cm.sum(axis=0, dtype=np.int64)
    return PerClass(
        support=support,
        predicted=predicted,
        precision=_ratio(right, predicted),
        recall=_ratio(right, support),
        f1=_ratio(2 * right, support + predicted),
    )


def macro_f1(cm: Int[np.ndarray, "classes classes"]) -> float:
    """Return the mean F1 of the classes that are there or were predicted, as scikit-learn and torchmetrics do."""
    f1 = per_class(cm).f1
    f1 = f1[~np.isnan(f1)]
    return float(f1.mean()) if len(f1) else math.nan


@dataclass(frozen=True)
class ConfusedPair:
    """One cell off the diagonal.

    Attributes:
        true: Index of the true class.
        pred: Index of the class it was taken for.
        count: Images.
        share: `count` over all images of the true class, 0..1.
    """

    true: int
    pred: int
    count: int
    share: float


def most_confused(cm: Int[np.ndarray, "classes classes"], top: int = 10) -> list[ConfusedPair]:
    """Return the largest cells off the diagonal, largest first, equal ones in class order; never an empty one."""
    mistakes = cm.copy()
    np.fill_diagonal(mistakes, 0)
    support = cm.sum(axis=1)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:top]
    pairs = []
    for true, pred in zip(*np.unravel_index(order, cm.shape), strict=True):
        count = int(mistakes[true, pred])
        if count:
            pairs.append(ConfusedPair(int(true), int(pred), count, count / int(support[true])))
    return pairs


def test_metrics(
    logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"], class_names: Sequence[str]
) -> dict[str, Any]:
    """Return the content of `test_metrics.json` in plain Python types.

    Keys: `accuracy`, `accuracy_interval_95` [low, high] (Wilson), `num_images`, `loss` (`cross_entropy`), `ece`
    (`expected_calibration_error`, 15 bins), `macro_f1`, `per_class` {name: {support, precision, recall, f1}}, and
    `most_confused` [{true, predicted, count, share}] with class names. What has no value is None.

    Raises:
        ValueError: No images, or not one distinct name for each column of the logits.
    """
    num_classes = logits.shape[1]
    if len(targets) == 0:
        raise ValueError("no images to measure on")
    if len(set(class_names)) != len(class_names) or len(class_names) != num_classes:
        raise ValueError(f"{num_classes} classes need as many distinct names, got {list(class_names)}")
    cm = confusion_matrix(targets, logits.argmax(axis=1), num_classes)
    rates = per_class(cm)
    return {
        "accuracy": accuracy(cm),
        "accuracy_interval_95": list(wilson_interval(int(np.trace(cm)), len(targets))),
        "num_pictures": len(targets),
        "loss": _plain(cross_entropy(logits, targets)),
        "ece": _plain(expected_calibration_error(softmax(logits), targets)),
        "macro_f1": _plain(macro_f1(cm)),
        "per_class": {
            name: {
                "support": int(rates.support[index]),
                "precision": _plain(rates.precision[index]),
                "recall": _plain(rates.recall[index]),
                "f1": _plain(rates.f1[index]),
            }
            for index, name in enumerate(class_names)
        },
        "most_confused": [
            {
                "true": class_names[pair.true],
                "predicted": class_names[pair.pred],
                "count": pair.count,
                "share": pair.share,
            }
            for pair in most_confused(cm)
        ],
    }


test_metrics.__test__ = False  # type: ignore[attr-defined]  # pytest takes an imported `test_...` for a test


def _ratio(part: Any, whole: Any) -> Any:
    """Divides, NaN where `whole` is 0."""
    whole = np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
