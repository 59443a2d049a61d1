"""Two runs on the same test images -> who is better, where, and whether chance explains it; NumPy only."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import run_name
from cifar_lightning.metrics.calibration import cross_entropy, expected_calibration_error, softmax
from cifar_lightning.metrics.classification import accuracy
from cifar_lightning.metrics.significance import holm, mcnemar_test, paired_difference_interval, wilson_interval
from cifar_lightning.report.results import Predictions, Results

_NUM_SHOWN = 24  # images that changed sides, in each direction


def compare(path: Path, results: Results, other_path: Path, other: Results) -> dict[str, Any]:
    """Return how a run differs from another one; positive differences are in favour of the first.

    Keys: `runs` (two of {name, path, accuracy, accuracy_interval_95, loss, ece}), `difference`,
    `difference_interval_95` (Newcombe, paired), `both_right`, `only_first`, `only_second`, `both_wrong`, `p` (McNemar's
    exact test), `classes` [{name, support, first, second, difference, difference_interval_95, only_first, only_second,
    p (Holm)}], `changed` {won, lost}: of each the number `count` and all `indices` whose answers changed sides, the
    surest wrong answer first, and of those that the runs kept the first `images` [{index, true, first, first_prob,
    second, second_prob}]; `unchecked`: why it is not known that the images are the same, empty where it is.

    Raises:
        UserError: A run has no answers, or they are not of the same images.
    """
    first, second = _predictions_of(path, results), _predictions_of(other_path, other)
    _refuse_other_images(path, results, other_path, other)
    available = set(results.images) | set(other.images)
    # Both in the order of the first: the order of answers is not part of a test set.
    order = np.argsort(second.indices)[np.searchsorted(np.sort(second.indices), first.indices)]
    logits = second.logits[order]
    right, other_right = first.logits.argmax(1) == first.targets, logits.argmax(1) == first.targets
    counts = _counts(right, other_right)
    return {
        "runs": [_run(path, first), _run(other_path, second)],
        "difference": float(right.mean() - other_right.mean()),
        "difference_interval_95": list(paired_difference_interval(**counts)),
        "both_right": counts["both"],
        "only_first": counts["only_first"],
        "only_second": counts["only_second"],
        "both_wrong": counts["neither"],
        "p": mcnemar_test(counts["only_first"], counts["only_second"]),
        "classes": _classes(first, right, other_right),
        "changed": {
            "won": _changed(first, logits, right & ~other_right, available),
            "lost": _changed(first, logits, ~right & other_right, available),
        },
        "unchecked": _unchecked(path, results, other_path, other),
    }


def _predictions_of(path: Path, results: Results) -> Predictions:
    if results.test is None:
        raise UserError(
            f"--compare: the answers of {path} cannot be read ({' '.join(results.problems)})\n"
            f"Make them with: python train.py test {path}"
        )
    return results.test


def _refuse_other_images(path: Path, results: Results, other_path: Path, other: Results) -> None:
    first, second = _predictions_of(path, results), _predictions_of(other_path, other)
    hashes = [_hash_of(run) for run in (results, other)]
    reason = ""
    if first.class_names != second.class_names:
        reason = f"{len(first.class_names)} and {len(second.class_names)} classes, or other names"
    elif len(first.targets) != len(second.targets):
        reason = f"{len(first.targets):,} and {len(second.targets):,} images"
    elif (all(hashes) and hashes[0] != hashes[1]) or (not all(hashes) and _kept_others(results, other)):
        reason = "the images themselves differ"
    elif _by_index(first) != _by_index(second):
        reason = "the images have other numbers or classes"
    if reason:
        raise UserError(
            f"--compare {other_path}: was not tested on the same images as {path}: {reason}.\n"
            "Only answers to the same images can be compared one by one."
        )


def _hash_of(results: Results) -> str:
    hashes = results.origin.split.get("sha256")
    return str(hashes.get("test") or "") if isinstance(hashes, dict) else ""


def _kept_in_common(results: Results, other: Results) -> list[int]:
    return sorted(set(results.images) & set(other.images))


def _kept_others(results: Results, other: Results) -> bool:
    """Return whether an image that both runs kept differs; in another size it says nothing."""
    pairs = ((results.images[index], other.images[index]) for index in _kept_in_common(results, other))
    return any(first.shape == second.shape and (first != second).any() for first, second in pairs)


def _unchecked(path: Path, results: Results, other_path: Path, other: Results) -> str:
    lacking = [str(place) for place, run in ((path, results), (other_path, other)) if not _hash_of(run)]
    if not lacking:
        return ""
    return (
        "That the images are the same could not be checked: there is no hash of them in split.json of "
        f"{' and '.join(lacking)}. Their number and classes agree."
    )


def _by_index(answers: Predictions) -> dict[int, int]:
    return dict(zip(answers.indices.tolist(), answers.targets.tolist(), strict=True))


def _run(path: Path, answers: Predictions) -> dict[str, Any]:
    cm = answers.confusion
    return {
        "name": run_name(path),
        "path": str(path),
        "accuracy": accuracy(cm),
        "accuracy_interval_95": list(wilson_interval(int(np.trace(cm)), int(cm.sum()))),
        "loss": cross_entropy(answers.logits, answers.targets),
        "ece": expected_calibration_error(softmax(answers.logits), answers.targets),
    }


def _counts(right: Bool[np.ndarray, " n"], other_right: Bool[np.ndarray, " n"]) -> dict[str, int]:
    return {
        "both": int((right & other_right).sum()),
        "only_first": int((right & ~other_right).sum()),
        "only_second": int((~right & other_right).sum()),
        "neither": int((~right & ~other_right).sum()),
    }


def _classes(
    answers: Predictions, right: Bool[np.ndarray, " n"], other_right: Bool[np.ndarray, " n"]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(answers.class_names):
        of_class = answers.targets == index
        counts = _counts(right[of_class], other_right[of_class])
        support = int(of_class.sum())
        right_here, right_there = (counts["both"] + counts[key] for key in ("only_first", "only_second"))
        first, second = (part / support if support else math.nan for part in (right_here, right_there))
        rows.append(
            {
                "name": name,
                "support": support,
                "first": first,
                "second": second,
                "difference": first - second,
                "difference_interval_95": list(paired_difference_interval(**counts)),
                "only_first": counts["only_first"],
                "only_second": counts["only_second"],
                "p": mcnemar_test(counts["only_first"], counts["only_second"]),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p"] = p
    return rows


def _changed(
    first: Predictions, second_logits: np.ndarray, changed: Bool[np.ndarray, " n"], available: set[int]
) -> dict[str, Any]:
    """Return the images of one direction, the surest wrong answers first."""
    probs, other_probs = softmax(first.logits), softmax(second_logits)
    preds, other_preds = probs.argmax(1), other_probs.argmax(1)
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
                "true": names[first.targets[position]],
                "first": names[preds[position]],
                "first_prob": float(probs[position].max()),
                "second": names[other_preds[position]],
                "second_prob": float(other_probs[position].max()),
            }
            for position in kept
        ],
    }
