"""Rate of false insights: each insight on simulated test sets in which there is nothing to find.

python -m benchmarks.accuracy.insight_rates --json benchmarks/results/insight_rates.json
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lightning.metrics.classification import confusion_matrix
from cifar_lightning.metrics.significance import holm, mcnemar_test, poisson_binomial_test
from cifar_lightning.report import insights

SIZES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
CLASSES = (2, 3, 10, 30)
NUM_DRAWS = 1000
_NUM_SHUFFLES = 99  # for each simulated test set: the level of the test does not depend on it

Finding = Callable[[np.random.Generator, int, int], bool]


def _confusion(rng: np.random.Generator, number: int, weights: np.ndarray, accuracy: float = 0.8) -> np.ndarray:
    """Return a matrix of classes of equal recall whose wrong predictions are drawn by `weights`."""
    num_classes = len(weights)
    targets = rng.integers(num_classes, size=number)
    chances = np.where(np.eye(num_classes, dtype=bool), 0, weights)
    cumulative = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
    wrong = (rng.random(number)[:, None] > cumulative[targets]).sum(axis=1).clip(max=num_classes - 1)
    return confusion_matrix(targets, np.where(rng.random(number) < accuracy, targets, wrong), num_classes)


def _names(num_classes: int) -> list[str]:
    return [f"class_{index}" for index in range(num_classes)]


def confidence(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Calibrated confidences between chance and 1, or near 1 in half of the test sets."""
    lowest = 0.95 if rng.random() < 0.5 else 1 / num_classes
    confidences = rng.uniform(lowest, 1, number)
    # The test of `confidence_gap`, without its interval, which takes most of the time.
    return poisson_binomial_test(int((rng.random(number) < confidences).sum()), confidences) < insights.ALPHA


def groups(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Equal recall; one class is predicted ten times too often, by all classes alike."""
    cm = _confusion(rng, number, np.array([10.0] + [1.0] * (num_classes - 1)))
    half = max(2, 2 * num_classes // 3)
    members = {"first": list(range(half)), "second": list(range(half, num_classes))}
    return insights.group_effects(cm, _names(num_classes), members, "made", _NUM_SHUFFLES).is_found


def hard_classes(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Equal recall of all classes."""
    return insights.hard_classes(_confusion(rng, number, np.ones(num_classes)), _names(num_classes)).is_found


def over_predicted(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Wrong predictions spread evenly over all classes."""
    return insights.over_predicted(_confusion(rng, number, np.ones(num_classes)), _names(num_classes)).is_found


def asymmetric_pairs(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Wrong predictions spread evenly over all classes."""
    return insights.asymmetric_pairs(_confusion(rng, number, np.ones(num_classes)), _names(num_classes)).is_found


def validation_gap(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """A validation split of half the size with the same accuracy."""
    test, val = (_confusion(rng, size, np.ones(num_classes)) for size in (number, (number + 1) // 2))
    return insights.validation_gap(test, val, _names(num_classes)).is_found


def comparison(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Two models of equal accuracy."""
    first, second = rng.random((2, number)) < 0.8
    return _mcnemar(first, second) < insights.ALPHA


def comparison_classes(rng: np.random.Generator, number: int, num_classes: int) -> bool:
    """Two models of equal recall in each class, with Holm's correction."""
    (first, second), targets = rng.random((2, number)) < 0.8, rng.integers(num_classes, size=number)
    of_classes = [targets == index for index in range(num_classes)]
    return min(holm([_mcnemar(first[own], second[own]) for own in of_classes])) < insights.ALPHA


def _mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    return mcnemar_test(int((first & ~second).sum()), int((~first & second).sum()))


FINDINGS: dict[str, tuple[str, Finding]] = {
    "confidence": ("over- or underconfident", confidence),
    "groups": ("mistakes stay within groups, or a group is harder", groups),
    "hard_classes": ("hard classes", hard_classes),
    "over_predicted": ("over- or under-predicted classes", over_predicted),
    "asymmetric_pairs": ("pairs confused in one direction", asymmetric_pairs),
    "validation_gap": ("test and validation accuracy differ", validation_gap),
    "comparison": ("one run is better", comparison),
    "comparison_classes": ("one run is better in a class", comparison_classes),
}
NOT_BY_CLASS = {"confidence", "validation_gap", "comparison"}  # the number of classes changes little


def rates(
    findings: Sequence[str] = tuple(FINDINGS),
    sizes: Sequence[int] = SIZES,
    classes: Sequence[int] = CLASSES,
    num_draws: int = NUM_DRAWS,
) -> list[dict[str, Any]]:
    """Return the fraction of false findings for each finding, number of classes and number of test images."""
    rows = []
    for name in findings:
        for num_classes in classes[:1] if name in NOT_BY_CLASS else classes:
            if name == "groups" and num_classes < 3:
                continue  # two classes are one group
            for number in sizes:
                rng = np.random.default_rng([zlib.crc32(name.encode()), num_classes, number])
                false = sum(FINDINGS[name][1](rng, number, num_classes) for _ in range(num_draws))
                rows.append({"finding": name, "classes": num_classes, "images": number, "rate": false / num_draws})
    return rows


def main() -> None:
    """Simulate all findings; print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rates to this file; they depend on no machine")
    args = parser.parse_args()
    start = time.perf_counter()
    rows = []
    for name in FINDINGS:
        rows += rates([name])
        print(name, max(row["rate"] for row in rows if row["finding"] == name), flush=True)
    error = (insights.ALPHA * (1 - insights.ALPHA) / NUM_DRAWS) ** 0.5
    limit = insights.ALPHA + 3 * error
    print(f"{sum(row['rate'] > limit for row in rows)} of {len(rows)} rates are above {limit:.3f}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json is not None:
        written = {"num_draws": NUM_DRAWS, "standard_error": error, "rates": rows}
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
