"""How a network's answers are marked: the metrics of a stage."""

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix


def evaluation_metrics(num_classes: int) -> MetricCollection:
    """Return loss, calibration error (15 bins), the confusion matrix, from which all else is read, and plain accuracy.

    "acc_no_tta" is the share of right answers to the images as they are, where views are averaged.
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
    plain: Float[Tensor, "batch classes"],
    targets: Int64[Tensor, " batch"],
) -> None:
    """Add one batch's answers to the metrics of a stage.

    Args:
        metrics: Of `evaluation_metrics`.
        logits: The answers that count.
        plain: Those to the images as they are.
        targets: The true classes.
    """
    metrics["loss"].update(F.cross_entropy(logits, targets), weight=len(targets))
    metrics["ece"].update(logits.softmax(1), targets)
    metrics["confusion"].update(logits.argmax(1), targets)
    metrics["acc_no_tta"].update((plain.argmax(1) == targets).float())
