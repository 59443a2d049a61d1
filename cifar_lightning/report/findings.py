"""Findings: every number of the report in plain types, as findings.json holds them and the page shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Int64

from cifar_lightning.formatting import is_index_name
from cifar_lightning.metrics.calibration import (
    Reliability,
    cross_entropy,
    log_softmax,
    reliability,
    softmax,
)
from cifar_lightning.metrics.classification import (
    TOP_K_FROM,
    accuracy,
    macro_f1,
    most_confused,
    per_class,
    top_k_accuracy,
)
from cifar_lightning.metrics.label_issues import find_label_issues
from cifar_lightning.metrics.selective import confidence_threshold
from cifar_lightning.metrics.significance import wilson_interval
from cifar_lightning.report.gallery import NUM_EXPLAINED, confident_mistakes, least_certain
from cifar_lightning.report.insights import (
    SECTIONS,
    Insight,
    asymmetric_pairs,
    confidence_gap,
    group_effects,
    groups_of,
    hard_classes,
    over_predicted,
    validation_gap,
)
from cifar_lightning.report.results import Predictions, Results
from cifar_lightning.report.temperature import temperature_of
from cifar_lightning.runs.environment import portable

COVERAGE_TARGETS = (0.95, 0.99, 0.999)  # accuracies
_MAX_MATRIX = 1000  # classes of which every cell is in the findings; of 10,000 findings.json would have 900 MB
_NUM_SHOWN = 24  # images of a gallery
_NUM_SHOWN_OF_PAIR = 6
_NUM_PAIRS_SHOWN = 5  # with images
_NUM_MISTAKES = 500  # of a page's list
# Fraction of wrong labels, at most: audited test sets have up to about 10 % (Northcutt, Athalye and Mueller 2021,
# https://arxiv.org/abs/2103.14749). A model of 62.6 % accuracy listed 26 % of the images; 17 % of them were wrong
# (docs/data-check.md).
_MOST_LABEL_ERRORS = 0.1
Matrix = Int64[np.ndarray, "classes classes"]


def find(results: Results) -> dict[str, Any]:
    """Return the content of the report as plain types; values that are not defined are None or NaN.

    Keys: `summary`, `calibration` (None without test predictions), `coverage`, `classes` (in class order),
    `confusion_matrix` (rows: true class; None of more than 1,000 classes), `confused_pairs`, `insights`, `mistakes`,
    `galleries`, `label_issues` (all, the least plausible label first), `label_check` (`checked`: images by split;
    `num_issues`; `is_reliable`: whether the model is better than always predicting the largest class; `is_many`:
    whether more are listed than labels are usually wrong), `epochs`, `learning_rates`, `training`, `run`, `problems`.
    """
    cm, test = results.confusion, results.test
    pairs = confused_pairs(cm, results.class_names)
    galleries = galleries_of(test, set(results.images), pairs) if test is not None else []
    predictions = {split: each for split, each in (("val", results.val), ("test", test)) if each is not None}
    issues, summary = label_issues_of(predictions), summary_of(cm, test)
    checked = {split: int(np.isfinite(each.logits).all(axis=1).sum()) for split, each in predictions.items()}
    return {
        "summary": {**summary, "accuracy_no_tta": results.accuracy_no_tta},
        "calibration": calibration_of(test, results.val) if test is not None else None,
        "coverage": coverage_of(test, results.val) if test is not None else [],
        "classes": classes_of(cm, results.class_names, test),
        "confusion_matrix": cm.tolist() if len(cm) <= _MAX_MATRIX else None,
        "confused_pairs": pairs,
        "insights": [asdict(it) | {"section": SECTIONS[it.kind]} for it in insights_of(results)],
        "mistakes": mistakes_of(test) if test is not None else None,
        "galleries": galleries,
        "label_issues": issues,
        "label_check": {
            "checked": checked,
            "num_issues": len(issues),
            "is_reliable": bool(summary["accuracy_interval_95"][0] > summary["majority"]),
            "is_many": len(issues) > _MOST_LABEL_ERRORS * sum(checked.values()),
        },
        "epochs": results.epochs,
        "learning_rates": learning_rates_of(results),
        "training": training_of(results),
        "run": vars(results.origin) | {"config": portable(results.origin.config)},
        "problems": results.problems,
    }


def summary_of(cm: Matrix, test: Predictions | None) -> dict[str, Any]:
    """Return accuracy, loss and macro F1; the loss is None without predictions.

    `chance` is the expected accuracy of guesses, `majority` that of always predicting class number `majority_class`.
    """
    num_correct, num_images = int(np.trace(cm)), int(cm.sum())
    support = cm.sum(axis=1)
    return {
        "accuracy": accuracy(cm),
        "accuracy_interval_95": list(wilson_interval(num_correct, num_images)),
        "chance": 1 / len(cm),
        "majority": float(support.max() / num_images) if num_images else math.nan,
        "majority_class": int(support.argmax()),
        **(
            {"accuracy_top5": top_k_accuracy(test.logits, test.targets)}
            if test is not None and len(cm) > TOP_K_FROM
            else {}
        ),
        "num_right": num_correct,
        "num_images": num_images,
        "num_classes": len(cm),
        "loss": cross_entropy(test.logits, test.targets) if test is not None else None,
        "macro_f1": macro_f1(cm),
    }


def calibration_of(test: Predictions, val: Predictions | None) -> dict[str, Any]:
    """Return calibration before and after temperature scaling; the temperature is fitted on validation images only.

    Keys: `temperature` (None without one, for the reason in `why_none`), `fitted_on` (validation images), `before`
    and `after`, each with `ece`, `ece_by_chance` (of calibrated probabilities and as many images), `loss`,
    `mean_confidence`, `bins` [{low, high, num_images, num_right, accuracy, accuracy_interval_95, confidence}].
    """
    temperature, why_none = temperature_of(val)
    return {
        "temperature": temperature,
        "why_none": why_none,
        "fitted_on": len(val.targets) if val is not None else 0,
        "before": _calibration_at(1.0, test),
        "after": _calibration_at(temperature, test) if temperature is not None else None,
    }


def coverage_of(test: Predictions, val: Predictions | None) -> list[dict[str, Any]]:
    """Return how many test images remain where only predictions above a confidence are accepted, for some accuracies.

    A threshold is chosen on the validation images, and what it gives is measured on the test images; without validation
    images it is chosen on the test images, whose accuracy then flatters. The confidence is the model's own, at
    temperature 1.

    Keys: `target` (accuracy), `threshold` (lowest accepted confidence), `coverage` (fraction of the test images),
    `num_images`, `accuracy` (of these), `accuracy_interval_95`, `chosen_on` ("val" or "test"). Where no threshold
    reaches the target, all but `target` and `chosen_on` are None.
    """
    chooser = val or test
    chosen_by = chooser.probs.max(axis=1), chooser.preds == chooser.targets
    confidence, correct = test.probs.max(axis=1), test.preds == test.targets
    rows = []
    for target in COVERAGE_TARGETS:
        threshold = confidence_threshold(*chosen_by, target)
        known = threshold is not None
        accepted = confidence >= threshold if known else np.zeros(len(confidence), dtype=bool)
        num_images, num_correct = int(accepted.sum()), int(correct[accepted].sum())
        rows.append(
            {
                "target": target,
                "threshold": threshold,
                "coverage": num_images / len(confidence) if known else None,
                "num_images": num_images if known else None,
                "accuracy": num_correct / num_images if num_images else None,
                "accuracy_interval_95": list(wilson_interval(num_correct, num_images)) if num_images else None,
                "chosen_on": "test" if val is None else "val",
            }
        )
    return rows


def _calibration_at(temperature: float, test: Predictions) -> dict[str, Any]:
    logits = test.logits.astype(np.float64) / temperature
    confidence, correct = softmax(logits).max(axis=1), test.preds == test.targets
    binned = reliability(confidence, correct)
    return {
        "ece": binned.error,
        "ece_by_chance": binned.error_by_chance,
        "loss": cross_entropy(logits, test.targets),
        "mean_confidence": float(confidence.mean()),
        "bins": [_bin(binned, index) for index in range(len(binned.num_images))],
    }


def _bin(binned: Reliability, index: int) -> dict[str, Any]:
    number, correct = int(binned.num_images[index]), int(binned.num_correct[index])
    return {
        "low": float(binned.edges[index]),
        "high": float(binned.edges[index + 1]),
        "num_images": number,
        "num_right": correct,
        "accuracy": correct / number if number else math.nan,
        "accuracy_interval_95": list(wilson_interval(correct, number)),
        "confidence": float(binned.confidence[index]),
    }


def classes_of(cm: Matrix, names: Sequence[str], test: Predictions | None) -> list[dict[str, Any]]:
    """Return the metrics of each class; `mean_confidence` is the mean confidence over its images."""
    rates = per_class(cm)
    rows = []
    for index, name in enumerate(names):
        confidence = math.nan
        if test is not None and (test.targets == index).any():
            confidence = float(test.probs[test.targets == index].max(axis=1).mean())
        correct, support = int(cm[index, index]), int(rates.support[index])
        rows.append(
            {
                "name": name,
                "support": support,
                "predicted": int(rates.predicted[index]),
                "right": correct,
                "precision": float(rates.precision[index]),
                "recall": float(rates.recall[index]),
                "recall_interval_95": list(wilson_interval(correct, support)),
                "f1": float(rates.f1[index]),
                "mean_confidence": confidence,
            }
        )
    return rows


def confused_pairs(cm: Matrix, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pairs of classes with the most confusions in both directions together.

    Keys: `true`, `predicted`, `count` and `share` (fraction of the images of `true`) of the more frequent direction;
    `reverse_count`, `reverse_share` of the other; `images` and `elsewhere`, which `galleries_of` adds.
    """
    support = per_class(cm).support
    both = np.triu(cm + cm.T, 1)
    pairs = []
    for pair in most_confused(both):
        i, j = sorted((pair.true, pair.pred), key=lambda index: -int(cm[index, pair.true + pair.pred - index]))
        fractions = [float(cm[a, b] / support[a]) if support[a] else math.nan for a, b in ((i, j), (j, i))]
        pairs.append(
            {
                "true": names[i],
                "predicted": names[j],
                "count": int(cm[i, j]),
                "share": fractions[0],
                "reverse_count": int(cm[j, i]),
                "reverse_share": fractions[1],
                "images": [],
                "elsewhere": [],
            }
        )
    return pairs


def insights_of(results: Results) -> list[Insight]:
    """Return the insights in the order of the report; those that cannot be computed are left out."""
    cm, names, test = results.confusion, list(results.class_names), results.test
    val_cm = results.val.confusion if results.val is not None else None
    insights = [hard_classes(cm, names), over_predicted(cm, names)]
    groups = groups_of(names, val_cm)
    if groups is not None:
        insights.append(group_effects(cm, names, *groups))
    insights.append(asymmetric_pairs(cm, names))
    if test is not None and np.isfinite(test.probs).all():
        insights.append(confidence_gap(test.probs.max(axis=1), test.probs.argmax(axis=1) == test.targets))
    if val_cm is not None:
        insights.append(validation_gap(cm, val_cm, names))
    return insights


def mistakes_of(test: Predictions) -> dict[str, Any]:
    """Return the test images with wrong predictions by loss, the highest first: those of a page.

    mistakes.csv has all, with those of the validation images.

    Keys: `count` of all, `named_by` ("path", or "index" of a data set without files), and `images` [{index, name, true,
    predicted, prob, loss}], at most 500.
    """
    wrong = np.flatnonzero(test.preds != test.targets)
    log_probs = log_softmax(test.logits[wrong])
    losses = -np.take_along_axis(log_probs, test.targets[wrong][:, None], axis=1)[:, 0]
    order = np.argsort(-losses, kind="stable")[:_NUM_MISTAKES].tolist()
    images = [
        {**_about(test, position), "prob": float(np.exp(log_probs[at].max())), "loss": float(losses[at])}
        for at, position in zip(order, wrong[order].tolist(), strict=True)
    ]
    named_by = "index" if all(map(is_index_name, test.names)) else "path"
    return {"count": len(wrong), "named_by": named_by, "images": images}


def _about(test: Predictions, position: int) -> dict[str, Any]:
    """Return `index`, `name`, `true` and `predicted` of an image."""
    return {
        "index": int(test.indices[position]),
        "name": test.names[position],
        "true": test.class_names[test.targets[position]],
        "predicted": test.class_names[test.logits[position].argmax()],
    }


def galleries_of(test: Predictions, available: set[int], pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the images of the page from those that the run kept; none is shown twice.

    Keys of each gallery: `kind`, `title`, `images` [{index, name, true, predicted, prob, prob_of_true}]. The mistakes
    of both directions of each of the first `pairs` are added to it: `images`, and the indices of those `elsewhere`.
    """
    of_mistakes = confident_mistakes(test.logits, test.targets).tolist()
    preds, names = test.preds, test.class_names
    left = set(available)

    def images(positions: list[int], limit: int) -> list[dict[str, Any]]:
        shown = []
        for position in [at for at in positions if int(test.indices[at]) in left][:limit]:
            probs, about = test.probs[position], _about(test, position)
            left.remove(about["index"])
            shown.append({**about, "prob": float(probs.max()), "prob_of_true": float(probs[test.targets[position]])})
        return shown

    mistakes = images(of_mistakes, NUM_EXPLAINED)
    for pair in pairs[:_NUM_PAIRS_SHOWN]:
        classes = {pair["true"], pair["predicted"]}
        of_pair = [at for at in of_mistakes if {names[test.targets[at]], names[preds[at]]} == classes]
        pair["images"] = images(of_pair, _NUM_SHOWN_OF_PAIR)
        pair["elsewhere"] = [item["index"] for item in mistakes if {item["true"], item["predicted"]} == classes]
    mistakes += images(of_mistakes, _NUM_SHOWN - NUM_EXPLAINED)
    galleries = [
        {"kind": "mistakes", "title": "Most confident mistakes", "images": mistakes},
        {
            "kind": "uncertain",
            "title": "Least certain of the other images",
            "images": images(least_certain(test.logits).tolist(), _NUM_SHOWN),
        },
    ]
    return [gallery for gallery in galleries if gallery["images"]]


def label_issues_of(predictions: Mapping[str, Predictions]) -> list[dict[str, Any]]:
    """Return the images whose label may be wrong, the least plausible label first.

    Each split is checked by itself: one may be labelled with more care. Predictions with NaN or infinite logits are
    left out. Keys: `name`, `index`, `split`, `label`, `suggested`, `prob_of_label`, `prob_of_suggested`.
    """
    found = []
    for split, each in predictions.items():
        finite = np.flatnonzero(np.isfinite(each.logits).all(1))
        probs, labels = each.probs[finite], each.targets[finite]
        for at in find_label_issues(probs, labels).tolist():
            suggested, position = int(probs[at].argmax()), int(finite[at])
            found.append(
                {
                    "name": each.names[position],
                    "index": int(each.indices[position]),
                    "split": split,
                    "label": each.class_names[labels[at]],
                    "suggested": each.class_names[suggested],
                    "prob_of_label": float(probs[at, labels[at]]),
                    "prob_of_suggested": float(probs[at, suggested]),
                }
            )
    return sorted(found, key=lambda issue: float(issue["prob_of_label"]))


def learning_rates_of(results: Results) -> list[tuple[float, float]]:
    """Return (epochs done, lr) of the recorded steps, or of the end of each epoch where the steps were not recorded."""
    ends = [(row.get("step", math.nan), row["epoch"] + 1) for row in results.epochs]
    if not results.learning_rates or not ends:
        return [(row["epoch"] + 1, row["lr"]) for row in results.epochs if "lr" in row]
    ends = [(0, 0), *ends]
    (step, epoch), (last_step, last_epoch) = ends[-2:]
    # An epoch that was not finished has no row; it has as many steps as the one before.
    ends.append((last_step + (last_step - step) / max(last_epoch - epoch, 1), last_epoch + 1))
    steps, epochs = zip(*ends, strict=True)
    done = np.interp([step for step, _ in results.learning_rates], steps, epochs).tolist()
    return list(zip(done, (lr for _, lr in results.learning_rates), strict=True))


def training_of(results: Results) -> dict[str, Any]:
    """Summarize metrics.csv and timing.csv; unknown values are None.

    `is_whole` is false if metrics.csv lacks epochs. `best_epoch` is None if no checkpoint was kept (the last weights
    were tested) or if an epoch was validated several times, of which the table has only the last. `tested_epoch` and
    `tested_val_acc` are of the tested weights, by default of the best epoch: best.ckpt may have been lost. `elapsed_s`
    is None if the time of any epoch is missing. `has_learning_rates` is whether those of the steps were recorded.
    """
    validated = [row for row in results.epochs if not math.isnan(row.get("val/acc", math.nan))]
    trainer = results.origin.config.get("trainer") or {}
    interval = trainer.get("val_check_interval")
    is_at_end = interval is None or (isinstance(interval, float) and interval == 1)
    is_kept = trainer.get("enable_checkpointing") is not False
    # The rule that chooses best.ckpt: highest accuracy, then lowest loss, then first epoch.
    candidates = validated if is_at_end and is_kept else []
    best = max(candidates, key=lambda row: (row["val/acc"], -row.get("val/loss", math.inf)), default=None)
    tested = best
    if results.tested_epoch is not None:
        tested = next((row for row in candidates if row["epoch"] + 1 == results.tested_epoch), None)
    is_timing_whole = "timing.csv" not in results.cut_tables
    elapsed = [row["elapsed_s"] for row in results.timing if "elapsed_s" in row and is_timing_whole]
    speeds = [row["train_images_per_s"] for row in results.timing if "train_images_per_s" in row]
    memory = [row["peak_memory_mb"] for row in results.timing if "peak_memory_mb" in row]
    return {
        "num_epochs": len({row["epoch"] for row in (*results.epochs, *results.timing)}),
        "is_whole": "metrics.csv" not in results.cut_tables,
        "best_epoch": int(best["epoch"]) + 1 if best else None,  # shown counting from 1
        "best_val_acc": best["val/acc"] if best else None,
        "tested_epoch": int(tested["epoch"]) + 1 if tested else None,
        "tested_val_acc": tested["val/acc"] if tested else None,
        "has_learning_rates": bool(results.learning_rates),
        "elapsed_s": sum(elapsed) if elapsed and not math.isnan(sum(elapsed)) else None,
        "train_images_per_s": float(np.median(speeds)) if speeds else None,
        "peak_memory_mb": max(memory) if memory else None,
    }
