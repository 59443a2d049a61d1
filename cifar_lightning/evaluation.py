"""How a network is asked and marked: answers averaged over views of a picture, and the metrics of a stage."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

Views = Literal["none", "mirror", "six"]


def view_logits(
    network: Callable[[Tensor], Tensor], images: Float[Tensor, "batch channels height width"], views: Views
) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
    """Return a network's logits averaged over views of each picture, and those of the picture as it is.

    Args:
        network: Takes pictures, gives logits.
        images: Normalised.
        views: "none"; "mirror", the mean of a picture and its mirror image; "six", airbench's: these two at a quarter
            each, and both moved by a pixel up-left and down-right at an eighth each, reflected at the border.
    """
    plain = network(images)
    if views == "none":
        return plain, plain
    averaged = 0.5 * plain + 0.5 * network(images.flip(-1))
    if views == "mirror":
        return averaged, plain
    averaged = 0.5 * averaged
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    for offset in (0, 2):
        moved = padded[:, :, offset : offset + height, offset : offset + width]
        averaged = averaged + 0.125 * network(moved) + 0.125 * network(moved.flip(-1))
    return averaged, plain


def evaluation_metrics(num_classes: int) -> MetricCollection:
    """Return loss, calibration error (15 bins), the confusion matrix, from which all else is read, and plain accuracy.

    "acc_one_view" is the share of right answers to the pictures as they are, where views are averaged.
    """
    return MetricCollection(
        {
            "loss": MeanMetric(),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            "confusion": MulticlassConfusionMatrix(num_classes, validate_args=False),
            "acc_one_view": MeanMetric(),
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
        plain: Those to the pictures as they are.
        targets: The true classes.
    """
    metrics["loss"].update(F.cross_entropy(logits, targets), weight=len(targets))
    metrics["ece"].update(logits.softmax(1), targets)
    metrics["confusion"].update(logits.argmax(1), targets)
    metrics["acc_one_view"].update((plain.argmax(1) == targets).float())
