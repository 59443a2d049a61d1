"""Validation and test metrics."""

from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix


def evaluation_metrics(num_classes: int) -> MetricCollection:
    """Return loss, calibration error (15 bins), confusion matrix, and accuracy without TTA.

    Accuracy and F1 are computed from the confusion matrix.
    """
    return MetricCollection(
        {
            "loss": MeanMetric(),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            "confusion": MulticlassConfusionMatrix(num_classes, validate_args=False),
            "acc_no_tta": MeanMetric(),
        },
        compute_groups=False,
    )


def update_evaluation(
    metrics: MetricCollection,
    logits: Float[Tensor, "batch classes"],
    plain_logits: Float[Tensor, "batch classes"],
    targets: Int64[Tensor, " batch"],
    loss: Callable[..., Tensor],
) -> None:
    """Update the metrics with a batch; `loss` is a function of logits and targets."""
    metrics["loss"].update(loss(logits, targets), weight=len(targets))
    metrics["ece"].update(logits.softmax(1), targets)
    metrics["confusion"].update(logits.argmax(1), targets)
    metrics["acc_no_tta"].update((plain_logits.argmax(1) == targets).float())
