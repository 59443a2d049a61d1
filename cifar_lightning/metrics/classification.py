"""Classification metrics with NumPy: confusion matrix, accuracy, per-class precision and recall, most confused pairs.

A confusion matrix is int64 with rows for the true class and columns for the predicted class. All per-class metrics are
computed from it. An undefined metric (the precision of a class that is never predicted) is NaN, without a warning.
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
    """Count the images of each true class (row) that are predicted as each class (column).

    Raises:
        ValueError: A target or prediction is not in 0..num_classes-1, or their numbers differ.
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
    """Return the fraction of images that are classified correctly, 0..1; NaN without images."""
    return float(_ratio(np.trace(cm), cm.sum()))


@dataclass(frozen=True)
class PerClass:
    """Metrics of each class, in class order; NaN where undefined. F1 is 0 for a class with images, never predicted."""

    support: Int64[np.ndarray, " classes"]  # images of the class
    predicted: Int64[np.ndarray, " classes"]  # images that are predicted as the class
    precision: Float64[np.ndarray, " classes"]  # correct fraction of `predicted`, 0..1
    recall: Float64[np.ndarray, " classes"]  # correct fraction of `support`, 0..1
    f1: Float64[np.ndarray, " classes"]  # 2 TP / (support + predicted), 0..1


def per_class(cm: Int[np.ndarray, "classes classes"]) -> PerClass:
    """Return the metrics of each class."""
    correct = np.diag(cm).astype(np.int64)
    support = cm.sum(axis=1, dtype=np.int64)
    predicted = cm.sum(axis=0, dtype=np.int64)
    return PerClass(
        support=support,
        predicted=predicted,
        precision=_ratio(correct, predicted),
        recall=_ratio(correct, support),
        f1=_ratio(2 * correct, support + predicted),
    )


def macro_f1(cm: Int[np.ndarray, "classes classes"]) -> float:
    """Return the mean F1 of the classes that have images or are predicted, as scikit-learn and torchmetrics do."""
    f1 = per_class(cm).f1
    f1 = f1[~np.isnan(f1)]
    return float(f1.mean()) if len(f1) else math.nan


@dataclass(frozen=True)
class ConfusedPair:
    """An off-diagonal cell of the confusion matrix; `fraction` is `count` over all images of the true class, 0..1."""

    true: int
    pred: int
    count: int
    fraction: float


def most_confused(cm: Int[np.ndarray, "classes classes"], top: int = 10) -> list[ConfusedPair]:
    """Return the largest off-diagonal cells, in descending order, ties in class order, without empty cells."""
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


TOP_K = 5
"""Accuracy among so many classes is reported where there are more than `TOP_K_FROM`."""
TOP_K_FROM = 10


def top_k_accuracy(scores: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> float:
    """Return the fraction of images whose class is among the `TOP_K` with the highest logits or probabilities.

    Of equal ones the first count, as for `argmax`.
    """
    best = scores.shape[1] - 1 - np.argsort(scores[:, ::-1], axis=1, kind="stable")[:, -TOP_K:]
    return float((best == targets[:, None]).any(axis=1).mean())


def test_metrics(
    logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"], class_names: Sequence[str]
) -> dict[str, Any]:
    """Return the content of `test_metrics.json` in plain Python types.

    Keys: `accuracy`, `accuracy_interval_95` [low, high] (Wilson), `num_images`, `loss` (`cross_entropy`), `ece`
    (`expected_calibration_error`, 15 bins), `macro_f1`, `per_class` {name: {support, precision, recall, f1}}, and
    `most_confused` [{true, predicted, count, share}] with class names; with more than ten classes `accuracy_top5`.
    Undefined metrics are None.

    Raises:
        ValueError: No images, or the names are not distinct or not as many as the columns of the logits.
    """
    num_classes = logits.shape[1]
    if len(targets) == 0:
        raise ValueError("no images to measure on")
    if len(set(class_names)) != len(class_names) or len(class_names) != num_classes:
        raise ValueError(f"{num_classes} classes need as many distinct names, got {list(class_names)}")
    cm = confusion_matrix(targets, logits.argmax(axis=1), num_classes)
    classes = per_class(cm)
    return {
        "accuracy": accuracy(cm),
        "accuracy_interval_95": list(wilson_interval(int(np.trace(cm)), len(targets))),
        **({"accuracy_top5": top_k_accuracy(logits, targets)} if num_classes > TOP_K_FROM else {}),
        "num_images": len(targets),
        "loss": _plain(cross_entropy(logits, targets)),
        "ece": _plain(expected_calibration_error(softmax(logits), targets)),
        "macro_f1": _plain(macro_f1(cm)),
        "per_class": {
            name: {
                "support": int(classes.support[index]),
                "precision": _plain(classes.precision[index]),
                "recall": _plain(classes.recall[index]),
                "f1": _plain(classes.f1[index]),
            }
            for index, name in enumerate(class_names)
        },
        "most_confused": [
            {
                "true": class_names[pair.true],
                "predicted": class_names[pair.pred],
                "count": pair.count,
                "share": pair.fraction,
            }
            for pair in most_confused(cm)
        ],
    }


test_metrics.__test__ = False  # type: ignore[attr-defined]  # pytest would collect an imported `test_...`


def _ratio(part: Any, whole: Any) -> Any:
    """Divide; NaN where `whole` is 0."""
    whole = np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
