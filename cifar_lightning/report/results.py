"""Results of a run, read from its folder. Missing and damaged files are reported and the rest is kept."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8

from cifar_lightning.errors import UserError
from cifar_lightning.files import read_bytes
from cifar_lightning.formatting import command_line, index_name, plural
from cifar_lightning.metrics.calibration import softmax
from cifar_lightning.metrics.classification import confusion_matrix
from cifar_lightning.runs.contents import (
    read_arrays,
    read_config,
    read_environment,
    read_explanations,
    read_gallery,
    read_learning_rates,
    read_matrix,
    read_split,
    read_table,
    read_test_metrics,
)
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.metrics_table import MAX_TABLE_BYTES


@dataclass(frozen=True)
class Predictions:
    """Predictions for the images of a split.

    Attributes:
        logits: Raw logits.
        targets: True classes.
        indices: Positions of the images in their split's file.
        class_names: In class order.
        names: Names of the images (`ImageDataModule.image_names`); by default the test split's indices, as `test[17]`.
    """

    logits: Float[np.ndarray, "n classes"]
    targets: Int64[np.ndarray, " n"]
    indices: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(index_name("test", index) for index in self.indices.tolist()))

    @cached_property
    def probs(self) -> Float[np.ndarray, "n classes"]:
        """Probabilities."""
        return softmax(self.logits)

    @property
    def preds(self) -> Int64[np.ndarray, " n"]:
        """Predicted classes."""
        preds: Int64[np.ndarray, " n"] = self.logits.argmax(1)
        return preds

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with a row for each image: index, name, label, prediction and probabilities.

        These are named by their classes; that of a class called "label" is "probability of label".

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_dataframe() needs pandas: pip install pandas") from error
        names = np.array(self.class_names)
        columns = {
            "index": self.indices,
            "name": self.names,
            "label": names[self.targets],
            "prediction": names[self.preds],
        }
        of_classes = (f"probability of {name}" if name in columns else name for name in self.class_names)
        return pandas.DataFrame(columns | dict(zip(of_classes, self.probs.T, strict=True)))

    @property
    def confusion(self) -> Int64[np.ndarray, "classes classes"]:
        """The confusion matrix; rows: true class."""
        return confusion_matrix(self.targets, self.preds, len(self.class_names))


@dataclass(frozen=True)
class Explanations:
    """What the model looked at in its first mistakes, and what it knows that is like them.

    Attributes:
        indices: Positions of the images in the test split.
        cam: Grad-CAM for the predicted class, 0-255, of the size of the images; None for a model without convolutions.
        neighbours: The nearest training images, nearest first; None for a model that does not end with a linear layer.
        neighbour_names: Their names.
        neighbour_labels: Their classes.
    """

    indices: Int64[np.ndarray, " n"]
    cam: UInt8[np.ndarray, "n height width"] | None = None
    neighbours: UInt8[np.ndarray, "n k size size 3"] | None = None
    neighbour_names: Shaped[np.ndarray, "n k"] | None = None
    neighbour_labels: Int64[np.ndarray, "n k"] | None = None


@dataclass(frozen=True)
class Origin:
    """Content of config.yaml, environment.json and split.json without the indices of the splits.

    `split` has `test_indices_sha256` where the test split is drawn from the training images.
    """

    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Input of a report.

    Attributes:
        class_names: In class order.
        confusion: Confusion matrix of the test images; rows: true class.
        test: Predictions of the test split; None if only the confusion matrix can be read.
        val: Predictions of the validation split; None without a validation split or a readable file.
        images: Test images by their index, uint8 RGB (height, width, 3), 0-255; gray ones have three equal channels.
        epochs: Rows of metrics.csv.
        timing: Rows of timing.csv.
        cut_tables: Names of those two files that lack epochs.
        learning_rates: Optimizer step, counted from 0, and its learning rate; empty where they were not recorded.
        origin: Settings, environment and split.
        accuracy_no_tta: Test accuracy without test-time augmentation; None if the run uses none.
        tested_epoch: Epoch of the tested weights, counted from 1; None where it was not recorded.
        explanations: Grad-CAM and nearest training images of the first mistakes; None without either.
        explanations_reason: Why one or both are missing.
        problems: One message for each missing or damaged file.
    """

    class_names: tuple[str, ...]
    confusion: Int64[np.ndarray, "classes classes"]
    test: Predictions | None = None
    val: Predictions | None = None
    images: dict[int, UInt8[np.ndarray, "height width 3"]] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    timing: list[dict[str, float]] = field(default_factory=list)
    cut_tables: tuple[str, ...] = ()
    learning_rates: list[tuple[int, float]] = field(default_factory=list)
    origin: Origin = field(default_factory=Origin)
    accuracy_no_tta: float | None = None
    tested_epoch: int | None = None
    explanations: Explanations | None = None
    explanations_reason: str = ""
    problems: list[str] = field(default_factory=list)


def read_results(run: RunFolder) -> Results:
    """Read a run's files.

    Raises:
        UserError: Neither the test predictions nor the confusion matrix can be read.
    """
    problems: list[str] = []
    if not (run.predictions.exists() or run.confusion_matrix_csv.exists()):
        run.require(run.predictions)
    test = _try(read_predictions, run.predictions, problems)
    names, confusion = (test.class_names, test.confusion) if test else _matrix_alone(run, problems)
    origin = read_origin(run, problems)
    # RunReport writes neither key: its Trainer need not have fitted or validated.
    is_of_fit = not origin.config or bool({"data", "data_class"} & origin.config.keys())
    is_validated = (origin.config.get("trainer") or {}).get("limit_val_batches") != 0
    was_held_out = is_of_fit and is_validated and origin.split.get("sizes", {}).get("val", 0) > 0
    val = None
    if was_held_out or run.predictions_val.exists():
        val = _try(read_predictions, run.predictions_val, problems)
        if val is not None and val.class_names != names:
            problems.append(f"{run.predictions_val.name}: classes differ from those of {run.predictions.name}.")
            val = None
    for path, predictions in ((run.predictions, test), (run.predictions_val, val)):
        problems += _non_finite_problems(path, predictions)
    has_gallery = "sha256" in origin.split or run.gallery.exists()  # not of loaders without an ImageDataModule
    images, shown = (_try(read_gallery, run.gallery, problems) if has_gallery else None) or ((), ())
    explanations, reason = _explanations(run, len(names), problems)
    tables = {
        path: _try(read_table, path, problems) if is_of_fit or path.exists() else None
        for path in (run.metrics_csv, run.timing_csv)
    }
    cut = _name_cut_tables(tables)
    # Runs of an earlier version, killed ones and those of a Trainer of one's own have none.
    lrs = _try(read_learning_rates, run.learning_rates, problems) if run.learning_rates.exists() else []
    has_tta = (origin.config.get("model") or {}).get("tta", "none") != "none"
    metrics = _try(read_test_metrics, run.test_metrics, problems) if has_tta or run.test_metrics.exists() else None
    return Results(
        class_names=names,
        confusion=confusion,
        test=test,
        val=val,
        images=dict(
            zip(map(int, shown), (image.repeat(3 // image.shape[-1], axis=-1) for image in images), strict=True)
        ),
        epochs=tables[run.metrics_csv] or [],
        timing=tables[run.timing_csv] or [],
        cut_tables=tuple(cut),
        learning_rates=lrs or [],
        origin=origin,
        accuracy_no_tta=(metrics or {}).get("accuracy_no_tta") if has_tta else None,
        tested_epoch=(metrics or {}).get("epoch"),
        explanations=explanations,
        explanations_reason=reason,
        problems=[*problems, *cut.values()],
    )


def read_origin(run: RunFolder, problems: list[str]) -> Origin:
    """Read config.yaml, environment.json and split.json; an unreadable file is empty and added to `problems`."""
    split = _try(read_split, run.split, problems) or {}
    drawn = {}
    if split.get("test") is not None:
        drawn["test_indices_sha256"] = hashlib.sha256(str(split["test"]).encode()).hexdigest()
    return Origin(
        config=_try(read_config, run.config, problems) or {},
        environment=_try(read_environment, run.environment, problems) or {},
        split={key: value for key, value in split.items() if key not in ("train", "val", "test")} | drawn,
    )


def read_predictions(path: Path) -> Predictions:
    """Read predictions.npz or predictions_val.npz; those of older runs have no names of the images.

    Raises:
        UserError: It cannot be read or is damaged.
    """
    kinds = {"logits": ("f", 2), "targets": ("iu", 1), "indices": ("iu", 1), "class_names": ("U", 1)}
    arrays = read_arrays(path, {**kinds, "names": ("U", 1)}, optional=("names",))
    logits, targets, indices, of_classes = (arrays[name] for name in kinds)
    class_names, split = tuple(map(str, of_classes)), "val" if path.stem.endswith("_val") else "test"
    of_images = arrays.get("names")
    by_index = (index_name(split, index) for index in indices.tolist())
    names = tuple(by_index if of_images is None else map(str, of_images))
    if logits.shape != (len(targets), len(class_names)) or {len(indices), len(names)} != {len(targets)}:
        raise UserError(f"{path}: damaged: arrays have different lengths.")
    if not ((targets >= 0) & (targets < len(class_names))).all():
        raise UserError(f"{path}: damaged: a class is not in 0..{len(class_names) - 1}.")
    if len(np.unique(indices)) != len(indices):
        raise UserError(f"{path}: damaged: an image occurs twice.")
    targets, indices = targets.astype(np.int64), indices.astype(np.int64)
    return Predictions(logits.astype(np.float32), targets, indices, class_names, names)


def _explanations(run: RunFolder, num_classes: int, problems: list[str]) -> tuple[Explanations | None, str]:
    if not run.explanations.exists():  # of an earlier version
        return None, f"No Grad-CAM and nearest images: the run has no {run.explanations.name}."
    read: tuple[dict[str, np.ndarray], list[str]] | None = _try(read_explanations, run.explanations, problems)
    arrays, reasons = read or ({}, ["it is damaged"] * 2)
    labels = arrays.get("neighbour_labels", np.zeros(1))
    if not ((labels >= 0) & (labels < num_classes)).all():
        problems.append(f"{run.explanations.name} is damaged: a class is not in 0..{num_classes - 1}.")
        arrays, reasons = {}, ["it is damaged"] * 2
    missing = zip(("Grad-CAM", "nearest images"), reasons, strict=True)
    texts = [f"No {what}: {reason}." for what, reason in missing if reason]
    if reasons[0] and reasons[0] == reasons[1]:
        texts = [f"No Grad-CAM and nearest images: {reasons[0]}."]
    return Explanations(**arrays) if arrays else None, " ".join(texts)


def _matrix_alone(run: RunFolder, problems: list[str]) -> tuple[tuple[str, ...], Int64[np.ndarray, "classes classes"]]:
    read: tuple[tuple[str, ...], np.ndarray] | None = _try(read_matrix, run.confusion_matrix_csv, problems)
    if read is None:
        raise UserError(f"run {run.path}: {' '.join(problems)}\nRecreate them with: {command_line('test', run.path)}")
    return read


def _try(read: Any, path: Path, problems: list[str]) -> Any:
    """Return `read(path)`; None and a message in `problems` if the file is missing or damaged."""
    try:
        if not path.exists():
            problems.append(f"{path.name} is missing.")
            return None
        return read(path)
    except UserError as error:
        message = str(error).replace(f"{path}: damaged", f"{path} is damaged", 1)
        problems.append(message.replace(str(path), path.name))
        return None


def _non_finite_problems(path: Path, predictions: Predictions | None) -> list[str]:
    if predictions is None or np.isfinite(predictions.logits).all():
        return []
    num_lost = int((~np.isfinite(predictions.logits)).any(axis=1).sum())
    return [
        f"{path.name}: {num_lost:,} of {plural(len(predictions.targets), 'prediction')} "
        f"{'has' if num_lost == 1 else 'have'} NaN or infinite logits; the class that is counted there is meaningless."
    ]


def _name_cut_tables(tables: dict[Path, list[dict[str, float]] | None]) -> dict[str, str]:
    """Return a message for each truncated table, by file name; tables that are None are reported elsewhere.

    Each epoch has a row in both tables, also if training was stopped early, killed or resumed. An epoch that only one
    table has, or that is missing between two others, was lost.
    """
    known = [int(row["epoch"]) for rows in tables.values() for row in rows or []]
    num_epochs = max(known) - min(known) + 1 if known else 0
    messages = {}
    for path, rows in tables.items():
        if rows is None:
            continue
        num_lost = num_epochs - len({row["epoch"] for row in rows})
        if num_lost or not rows:
            are = "is" if num_lost == 1 else "are"
            lost = f"{num_lost} of {plural(num_epochs, 'epoch')} {are} missing" if num_lost else "it has no epochs"
            messages[path.name] = f"{path.name} is truncated: {lost}."
        elif not read_bytes(path, MAX_TABLE_BYTES).endswith(b"\n"):
            messages[path.name] = f"{path.name} is truncated: its last line is incomplete and ignored."
    return messages
