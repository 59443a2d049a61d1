"""Paired comparison of two runs on the same test images."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import command_line, is_index_name, run_name
from cifar_lightning.metrics.calibration import cross_entropy, expected_calibration_error
from cifar_lightning.metrics.classification import accuracy
from cifar_lightning.metrics.significance import holm, mcnemar_test, paired_difference_interval, wilson_interval
from cifar_lightning.report.results import Predictions, Results

_NUM_SHOWN = 24  # images in each direction
_RESIZING = ("image_size", "resize")  # settings of `data` that give other pixels of the same images
_DECODING = (*_RESIZING, "in_channels")  # of the same files: images without files are hashed before they become gray


def compare(path: Path, results: Results, other_path: Path, other: Results) -> dict[str, Any]:
    """Compare two runs; positive differences favour the first.

    Keys: `runs` (two of {name, path, accuracy, accuracy_interval_95, loss, ece}), `difference`,
    `difference_interval_95` (Newcombe, paired), `both_right`, `only_first`, `only_second`, `both_wrong`, `p` (McNemar's
    exact test), `classes` [{name, support, first, second, difference, difference_interval_95, only_first, only_second,
    p (Holm)}], `changed` {won, lost}: images that only the first or only the second run classifies correctly, the
    most confident mistake first: their `count`, all `indices`, and `images` [{index, name, true, first, first_prob,
    second, second_prob}], the first of those that the runs kept; `unchecked`: why the identity of the images could not
    be checked, empty if it was.

    Raises:
        UserError: A run has no test predictions, or the test images differ.
    """
    first, second = predictions_of(path, results), predictions_of(other_path, other)
    if reason := other_images(first, second, results, other):
        raise UserError(f"--compare {other_path}: not tested on the same images as {path}: {reason}.")
    available = set(results.images) | set(other.images)
    # Reorder the second to match the first: the order of predictions does not matter.
    order = np.argsort(second.indices)[np.searchsorted(np.sort(second.indices), first.indices)]
    ordered = replace(first, logits=second.logits[order])
    correct, other_correct = (each.preds == first.targets for each in (first, ordered))
    return {
        "runs": [summarize(path, first), summarize(other_path, second)],
        "difference": float(correct.mean() - other_correct.mean()),
        "both_right": int((correct & other_correct).sum()),
        "both_wrong": int((~correct & ~other_correct).sum()),
        **paired_test(correct, other_correct),
        "classes": _classes(first, correct, other_correct),
        "changed": {
            "won": _changed(first, ordered, correct & ~other_correct, available),
            "lost": _changed(first, ordered, ~correct & other_correct, available),
        },
        "unchecked": unchecked_images(path, results, other_path, other),
    }


def predictions_of(path: Path, results: Results) -> Predictions:
    """Return the test predictions of a run to compare.

    Raises:
        UserError: They cannot be read.
    """
    if results.test is None:
        raise UserError(
            f"--compare: the predictions of {path} cannot be read ({' '.join(results.problems)})\n"
            f"Recreate them with: {command_line('test', path)}"
        )
    return results.test


def other_images(first: Predictions, second: Predictions, results: Results, other: Results) -> str:
    """Return how the test images of two runs differ; empty if they do not."""
    if first.class_names != second.class_names:
        num, other_num = len(first.class_names), len(second.class_names)
        return f"{num} and {other_num} classes" if num != other_num else "classes of other names, or in another order"
    if _are_drawn_otherwise(results, other):
        return "their test splits were drawn differently (--data.seed, --data.test_fraction)"
    if len(first.targets) != len(second.targets):
        return f"{len(first.targets):,} and {len(second.targets):,} images"
    hashes = _hashes(results, other)
    if _are_decoded_otherwise(results, other):
        if _have_other_names(first, second):
            return "the images have other names"
    elif hashes[0] != hashes[1] if all(hashes) else _kept_others(results, other):
        return "the images themselves differ"
    return "" if _by_index(first) == _by_index(second) else "the images have different indices or labels"


def _hashes(results: Results, other: Results) -> list[str]:
    """Return the hash of the test images of each run; empty where split.json has none.

    If both test splits are drawn from the training images, it is that of these: `_are_drawn_otherwise` compares them.
    """
    splits = [run.origin.split for run in (results, other)]
    image_set = "train" if all("test_indices_sha256" in split for split in splits) else "test"
    return [str((split.get("sha256") or {}).get(image_set) or "") for split in splits]


def _are_drawn_otherwise(results: Results, other: Results) -> bool:
    """Whether the test splits are other images of the same training images."""
    drawn = [run.origin.split.get("test_indices_sha256") for run in (results, other)]
    hashes = _hashes(results, other)
    return all(drawn) and drawn[0] != drawn[1] and all(hashes) and hashes[0] == hashes[1]


def _are_decoded_otherwise(results: Results, other: Results) -> bool:
    """Whether the hashes, of decoded pixels, differ also for the same images.

    They do by the settings of both runs or by the sizes of the images that they kept.
    """
    hashes = _hashes(results, other)
    if hashes[0] == hashes[1]:
        return False
    one, two = (run.origin.config.get("data") or {} for run in (results, other))
    shapes = [{image.shape for image in run.images.values()} for run in (results, other)]
    names = _DECODING if _have_files(results, other) else _RESIZING
    is_set = any(one[name] != two[name] for name in names if name in one and name in two)
    return is_set or (all(shapes) and shapes[0] != shapes[1])


def _have_files(results: Results, other: Results) -> bool:
    """Whether the images of a run are named by their files; older runs and data without files have indices."""
    return any(run.test is not None and not all(map(is_index_name, run.test.names)) for run in (results, other))


def _have_other_names(first: Predictions, second: Predictions) -> bool:
    """Whether an image has another name in the other run; that of an older run, by its index, is not compared."""
    of_second = dict(zip(second.indices.tolist(), second.names, strict=True))
    for index, name in zip(first.indices.tolist(), first.names, strict=True):
        other = of_second.get(index, name)
        if name != other and is_index_name(name) == is_index_name(other):
            return True
    return False


def _kept_others(results: Results, other: Results) -> bool:
    """Return whether an image that both runs kept differs; images of different sizes are not compared."""
    pairs = ((results.images[index], other.images[index]) for index in set(results.images) & set(other.images))
    return any(first.shape == second.shape and (first != second).any() for first, second in pairs)


def unchecked_images(path: Path, results: Results, other_path: Path, other: Results) -> str:
    """Return why it could not be checked whether the test images of two runs are the same; empty if it was."""
    if _are_decoded_otherwise(results, other):
        names = "names" if _have_files(results, other) else "indices"
        return (
            f"The test images of {path} and {other_path} are decoded with other --data.image_size, --data.resize or "
            f"--data.in_channels: that they are the same is known only by their {names} and labels."
        )
    hashes = _hashes(results, other)
    lacking = [str(place) for place, sha256 in ((path, hashes[0]), (other_path, hashes[1])) if not sha256]
    if not lacking:
        return ""
    return (
        "Whether the test images are identical could not be checked: split.json has no hash of them in "
        f"{' and '.join(lacking)}. Their number and labels agree."
    )


def _by_index(predictions: Predictions) -> dict[int, int]:
    return dict(zip(predictions.indices.tolist(), predictions.targets.tolist(), strict=True))


def summarize(path: Path, predictions: Predictions) -> dict[str, Any]:
    """Return `name`, `path`, `accuracy`, `accuracy_interval_95`, `loss` and `ece` of a run."""
    cm = predictions.confusion
    return {
        "name": run_name(path),
        "path": str(path),
        "accuracy": accuracy(cm),
        "accuracy_interval_95": list(wilson_interval(int(np.trace(cm)), int(cm.sum()))),
        "loss": cross_entropy(predictions.logits, predictions.targets),
        "ece": expected_calibration_error(predictions.probs, predictions.targets),
    }


def paired_test(correct: Bool[np.ndarray, " n"], other_correct: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """Compare two models by which of the same images each classifies correctly.

    Returns:
        `difference_interval_95` of the accuracies, `only_first` and `only_second`: the images that one of them alone
        classifies correctly, and `p` of McNemar's exact test.
    """
    only_first, only_second = int((correct & ~other_correct).sum()), int((~correct & other_correct).sum())
    both, neither = int((correct & other_correct).sum()), int((~correct & ~other_correct).sum())
    interval = paired_difference_interval(both=both, only_first=only_first, only_second=only_second, neither=neither)
    return {
        "difference_interval_95": list(interval),
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar_test(only_first, only_second),
    }


def _classes(
    predictions: Predictions, correct: Bool[np.ndarray, " n"], other_correct: Bool[np.ndarray, " n"]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(predictions.class_names):
        of_class = predictions.targets == index
        support = int(of_class.sum())
        parts = [each[of_class] for each in (correct, other_correct)]
        first, second = (int(part.sum()) / support if support else math.nan for part in parts)
        rows.append(
            {
                "name": name,
                "support": support,
                "first": first,
                "second": second,
                "difference": first - second,
                **paired_test(*parts),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p"] = p
    return rows


def _changed(
    first: Predictions, second: Predictions, changed: Bool[np.ndarray, " n"], available: set[int]
) -> dict[str, Any]:
    """Return the images of one direction, the most confident mistakes first; both are in the same order."""
    probs, other_probs, preds, other_preds = first.probs, second.probs, first.preds, second.preds
    positions = np.flatnonzero(changed)
    wrong = np.where(preds == first.targets, other_probs.max(1), probs.max(1))
    positions = positions[np.argsort(-wrong[positions], kind="stable")]
    kept = [position for position in positions.tolist() if int(first.indices[position]) in available][:_NUM_SHOWN]
    names = first.class_names
    return {
        "count": len(positions),
        "indices": first.indices[positions].tolist(),
        "images": [
            {
                "index": int(first.indices[position]),
                "name": first.names[position],
                "true": names[first.targets[position]],
                "first": names[preds[position]],
                "first_prob": float(probs[position].max()),
                "second": names[other_preds[position]],
                "second_prob": float(other_probs[position].max()),
            }
            for position in kept
        ],
    }
