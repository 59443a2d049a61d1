"""Validation and test metrics."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from cifar_lightning.checkpoints.rng_state import rng_state_kept
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, reason_of
from cifar_lightning.metrics.calibration import NUM_BINS
from cifar_lightning.metrics.classification import TOP_K, TOP_K_FROM

_IN_FILES = ("accuracy", "accuracy_interval_95", "accuracy_top5", "accuracy_no_tta", "num_images", "macro_f1")
OURS = ("loss", "acc", "f1", "ece", "acc_top5", "acc_no_tta", "per_class", "most_confused", *_IN_FILES)
"""Names that metrics of one's own cannot have."""


class ConfusionMatrix(MulticlassConfusionMatrix):
    """torchmetrics' confusion matrix, updated in place.

    torchmetrics adds a new matrix for each batch, and with deterministic algorithms makes `classes**2` numbers for each
    image of it: 205 GB for 256 images of 10,000 classes.
    """

    def update(self, preds: Int64[Tensor, " batch"], target: Num[Tensor, " batch"]) -> None:
        """Count a batch of predicted and true classes; these are floats where a loss of one's own takes them."""
        cells = target.long() * self.num_classes + preds
        self.confmat.view(-1).index_add_(0, cells, torch.ones_like(cells))


def evaluation_metrics(num_classes: int) -> MetricCollection:
    """Return loss, calibration error (15 bins), confusion matrix, accuracy without TTA, and top 5 of many classes.

    Accuracy and F1 are computed from the confusion matrix.
    """
    return MetricCollection(
        {
            "loss": MeanMetric(nan_strategy=math.nan),  # a batch whose loss is NaN makes the mean NaN
            "ece": MulticlassCalibrationError(num_classes, n_bins=NUM_BINS, validate_args=False),
            "confusion": ConfusionMatrix(num_classes, validate_args=False),
            "acc_no_tta": MeanMetric(),
            **({"acc_top5": MeanMetric()} if num_classes > TOP_K_FROM else {}),
        },
        compute_groups=False,
    )


def update_evaluation(
    metrics: MetricCollection,
    logits: Float[Tensor, "batch classes"],
    plain_logits: Float[Tensor, "batch classes"],
    targets: Num[Tensor, " batch"],
    loss: Callable[..., Tensor],
) -> None:
    """Update the metrics with a batch; `loss` is a function of logits and targets."""
    metrics["loss"].update(loss(logits, targets), weight=len(targets))
    metrics["ece"].update(logits.softmax(1), targets)
    metrics["confusion"].update(logits.argmax(1), targets)
    metrics["acc_no_tta"].update((plain_logits.argmax(1) == targets).float())
    if "acc_top5" in metrics:
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP_K]  # of equal ones the first, as argmax
        metrics["acc_top5"].update((best == targets[:, None]).any(1).float())


def own_metrics(given: Any) -> MetricCollection | None:
    """Return metrics of one's own by name.

    Args:
        given: A Metric, a MetricCollection, a list, named by their classes, or a dict; None and empty ones give None.

    Raises:
        UserError: Something else, or a name that is ours or given twice.
    """
    items: Any = given.items() if isinstance(given, dict | MetricCollection) else given
    if isinstance(given, Metric) or given is None:
        items = [] if given is None else [given]
    named = items if items is not given and not isinstance(items, list) else [(type(x).__name__, x) for x in items]
    metrics = dict[str, Metric]()
    for name, metric in named:
        if not isinstance(metric, Metric):
            raise UserError(f"--model.metrics {clipped(str(name))}: a {type(metric).__name__}, no torchmetrics.Metric.")
        if name in OURS or name in metrics or not re.fullmatch(r"[\w.-]+", name):
            reason = "given twice; name them in a dict" if name in metrics else f"no name; {', '.join(OURS)} are taken"
            raise UserError(f"--model.metrics {clipped(name)}: {reason}.")
        metrics[name] = metric
    return MetricCollection(dict(metrics), compute_groups=False) if metrics else None


def check_metrics(metrics: MetricCollection, num_classes: int, device: torch.device) -> None:
    """Try metrics of one's own on the probabilities of a few images; they and the random state are not changed.

    Raises:
        UserError: One fails, or gives something else than one number.
    """
    labels = torch.arange(2 * num_classes, device=device) % num_classes
    probs = torch.randn(len(labels), num_classes, generator=torch.Generator().manual_seed(0)).softmax(1).to(device)
    for name, metric in metrics.clone().to(device).items():
        given = f"--model.metrics {name}: for probabilities {tuple(probs.shape)} and labels {tuple(labels.shape)} it"
        try:
            with rng_state_kept(device), warnings.catch_warnings(action="ignore"):
                metric.update(probs, labels)
                value = metric.compute()
        except Exception as error:  # a metric of one's own raises anything
            raise UserError(f"{given} fails ({type(error).__name__}: {reason_of(error)}).") from error
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
            kind = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{given} gives {kind}, not one number; give average='macro' or a wrapper.")
