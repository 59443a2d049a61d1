"""predictions.csv, mistakes.csv and label_issues.csv: a row for each image, by its name."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int64, Shaped

from cifar_lightning.files import write_text_durably
from cifar_lightning.formatting import csv_cell
from cifar_lightning.metrics.calibration import log_softmax
from cifar_lightning.report.results import Predictions, Results
from cifar_lightning.runs.folder import RunFolder

TOP_K = 5  # classes an image, or all of fewer
_DIGITS = 7  # of numbers that are computed from float32


def write_prediction_tables(run: RunFolder, results: Results) -> None:
    """Write predictions.csv and mistakes.csv of the test and validation images whose predictions can be read."""
    of_splits = {"test": results.test, "val": results.val}
    known = {split: predictions for split, predictions in of_splits.items() if predictions is not None}
    if "test" in known:
        write_text_durably(run.predictions_csv, predictions_csv(known))
        write_text_durably(run.mistakes_csv, predictions_csv(known, only_mistakes=True))


def predictions_csv(of_splits: Mapping[str, Predictions], *, only_mistakes: bool = False) -> str:
    """Return a CSV with a row for each image.

    Columns: `path` (the image's name), `split`, `label`, `prediction`, `probability` of the prediction, `loss`
    (cross-entropy in nats, without label smoothing), then `class_2`, `probability_2` and so on, the next classes by
    probability. All splits have the same classes.

    Args:
        of_splits: Split -> predictions.
        only_mistakes: Leave out images whose prediction is the label, and sort by loss, the highest first; otherwise
            the order is that of the splits.
    """
    num_ranked = min(TOP_K, *(predictions.logits.shape[1] for predictions in of_splits.values()))
    header = ["path", "split", "label", "prediction", "probability", "loss"]
    for rank in range(2, num_ranked + 1):
        header += [f"class_{rank}", f"probability_{rank}"]
    rows: list[tuple[str, ...]] = []
    losses: list[float] = []
    for split, predictions in of_splits.items():
        wanted = predictions.preds != predictions.targets if only_mistakes else np.ones(len(predictions.targets), bool)
        rows_of_split, losses_of_split = _rows(split, predictions, np.flatnonzero(wanted), num_ranked)
        rows += rows_of_split
        losses += losses_of_split.tolist()
    order = np.argsort(-np.array(losses), kind="stable") if only_mistakes else range(len(rows))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows[position] for position in order)
    return table.getvalue()


def write_label_issues(run: RunFolder, issues: Sequence[Mapping[str, Any]]) -> None:
    """Write label_issues.csv, a row for each of `findings.label_issues_of`."""
    columns = ("split", "label", "suggested", "prob_of_label", "prob_of_suggested", "score")
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", *columns])
    for issue in issues:
        cells = (issue[column] for column in ("name", *columns))
        writer.writerow([csv_cell(cell) if isinstance(cell, str) else f"{cell:.{_DIGITS}g}" for cell in cells])
    write_text_durably(run.label_issues, table.getvalue())


def _rows(
    split: str, predictions: Predictions, positions: Int64[np.ndarray, " rows"], num_ranked: int
) -> tuple[list[tuple[str, ...]], Float64[np.ndarray, " rows"]]:
    """Return the rows of some images and their losses."""
    log_probs, targets = log_softmax(predictions.logits[positions]), predictions.targets[positions]
    losses = 0.0 - np.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]  # 0.0, and not -0.0
    ranked = most_probable(predictions, positions, num_ranked)
    probs = np.exp(np.take_along_axis(log_probs, ranked, axis=1))
    class_names = np.array([csv_cell(name) for name in predictions.class_names])
    columns = [
        [csv_cell(predictions.names[position]) for position in positions.tolist()],
        [split] * len(positions),
        class_names[targets].tolist(),
        class_names[ranked[:, 0]].tolist(),
        _numbers(probs[:, 0]),
        _numbers(losses),
    ]
    for rank in range(1, num_ranked):
        columns += [class_names[ranked[:, rank]].tolist(), _numbers(probs[:, rank])]
    return list(zip(*columns, strict=True)), losses


def most_probable(
    predictions: Predictions, positions: Int[np.ndarray, " rows"], num: int
) -> Int64[np.ndarray, "rows num"]:
    """Return the most probable classes of some images, the most probable first, which is the prediction.

    Partitioned before they are sorted: 10,000 images of 1,000 classes take 0.2 s.
    """
    logits = predictions.logits[positions].astype(np.float64)
    logits[np.arange(len(positions)), predictions.preds[positions]] = np.inf  # also of equal or NaN ones
    some = np.argpartition(-logits, num - 1, axis=1)[:, :num]
    order = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
    ranked: Int64[np.ndarray, "rows num"] = np.take_along_axis(some, order, axis=1)
    return ranked


def _numbers(values: Shaped[np.ndarray, " rows"]) -> list[str]:
    return [f"{value:.{_DIGITS}g}" for value in values.tolist()]
