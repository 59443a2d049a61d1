"""predictions.csv, mistakes.csv and label_issues.csv: a row for each image, by its name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Shaped

from cifar_lightning.files import csv_table, write_text_durably
from cifar_lightning.formatting import csv_cell
from cifar_lightning.metrics.calibration import log_softmax
from cifar_lightning.report.results import Predictions, Results
from cifar_lightning.runs.folder import RunFolder

_TOP_K = 5  # classes per image, or all of fewer
_DIGITS = 7  # of numbers that are computed from float32
_CHUNK = 512  # images at a time: a chunk of 1,000 classes stays in the cache


class _Row(NamedTuple):
    cells: tuple[str, ...]
    loss: float
    is_mistake: bool


def write_prediction_tables(run: RunFolder, results: Results) -> None:
    """Write predictions.csv and mistakes.csv of the test and validation images whose predictions can be read."""
    if results.test is not None:
        of_splits = {"test": results.test} | ({} if results.val is None else {"val": results.val})
        predictions, mistakes = prediction_tables(of_splits)
        write_text_durably(run.predictions_csv, predictions)
        write_text_durably(run.mistakes_csv, mistakes)


def prediction_tables(of_splits: Mapping[str, Predictions]) -> tuple[str, str]:
    """Return CSVs with a row for each image, in the order of the splits, and for each mistake, the highest loss first.

    Columns: `path` (the image's name), `split`, `label`, `prediction`, `probability` of the prediction, `loss`
    (cross-entropy in nats, without label smoothing), then `class_2`, `probability_2` and so on, the next classes by
    probability. All splits have the same classes.
    """
    num_ranked = min(_TOP_K, *(predictions.logits.shape[1] for predictions in of_splits.values()))
    header = ["path", "split", "label", "prediction", "probability", "loss"]
    for rank in range(2, num_ranked + 1):
        header += [f"class_{rank}", f"probability_{rank}"]
    rows = [row for split, predictions in of_splits.items() for row in _rows(split, predictions, num_ranked)]
    mistakes = [row for row in rows if row.is_mistake]
    order = np.argsort([-row.loss for row in mistakes], kind="stable")  # NaN last
    by_loss = (mistakes[position].cells for position in order)
    return csv_table(header, (row.cells for row in rows)), csv_table(header, by_loss)


def write_label_issues(run: RunFolder, issues: Sequence[Mapping[str, Any]]) -> None:
    """Write label_issues.csv, a row for each of `findings.label_issues_of`."""
    columns = ("split", "label", "suggested", "prob_of_label", "prob_of_suggested")
    rows = ([issue[column] for column in ("name", *columns)] for issue in issues)
    cells = ([csv_cell(cell) if isinstance(cell, str) else f"{cell:.{_DIGITS}g}" for cell in row] for row in rows)
    write_text_durably(run.label_issues, csv_table(["path", *columns], cells))


def _rows(split: str, predictions: Predictions, num_ranked: int) -> Iterator[_Row]:
    class_names = np.array([csv_cell(name) for name in predictions.class_names])
    preds, targets = predictions.preds, predictions.targets
    for start in range(0, len(targets), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        logits, labels = predictions.logits[chunk], targets[chunk]
        log_probs, ranked = log_softmax(logits), _ranked(logits, preds[chunk], num_ranked)
        losses = 0.0 - np.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]  # 0.0, and not -0.0
        probs = np.exp(np.take_along_axis(log_probs, ranked, axis=1))
        columns = [
            [csv_cell(name) for name in predictions.names[chunk]],
            [split] * len(labels),
            class_names[labels].tolist(),
            class_names[ranked[:, 0]].tolist(),
            _numbers(probs[:, 0]),
            _numbers(losses),
        ]
        for rank in range(1, num_ranked):
            columns += [class_names[ranked[:, rank]].tolist(), _numbers(probs[:, rank])]
        yield from map(_Row, zip(*columns, strict=True), losses.tolist(), (preds[chunk] != labels).tolist())


def _ranked(
    logits: Float[np.ndarray, "n classes"], preds: Int64[np.ndarray, " n"], num: int
) -> Int64[np.ndarray, "n num"]:
    """Return the `num` most probable classes, the most probable first, which is the prediction."""
    below = -logits
    below[np.arange(len(preds)), preds] = -np.inf  # first also of equal or NaN ones
    some = np.argpartition(below, num - 1, axis=1)[:, :num]  # before sorting: a tenth of the time at 1,000 classes
    order = np.argsort(np.take_along_axis(below, some, axis=1), axis=1, kind="stable")
    ranked: Int64[np.ndarray, "n num"] = np.take_along_axis(some, order, axis=1)
    return ranked


def _numbers(values: Shaped[np.ndarray, " n"]) -> list[str]:
    return [f"{value:.{_DIGITS}g}" for value in values.tolist()]
