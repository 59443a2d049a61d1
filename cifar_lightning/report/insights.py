"""Insights: what the test shows, in words, each with its numbers and the hypothesis test behind it.

An insight lists only what has a p-value below `ALPHA` after Holm's correction for all tests of its kind. An insight
that lists nothing still says what was tested, and never that there is no difference: few images show little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from cifar_lightning.formatting import counted, percent, plural, points, points_span, span
from cifar_lightning.metrics.classification import accuracy, per_class
from cifar_lightning.metrics.significance import (
    binomial_test,
    difference_interval,
    fisher_test,
    holm,
    mcnemar_test,
    poisson_binomial_interval,
    poisson_binomial_test,
    shuffle_test,
    wilson_interval,
)

ALPHA = 0.05
_MIN_BALANCE_GAP = 0.05  # of all images: difference in a class's fraction of test and validation that is mentioned
_MAX_CLUSTERED = 2000  # classes: the clusters of 1,000 take 4 s, and eight times as long of twice as many
_NO_DIFFERENCE = "No difference beyond chance was found between"
CIFAR10_GROUPS = {
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicles": ("airplane", "automobile", "ship", "truck"),
}
# Kind of an insight -> section of the page that it belongs to.
SECTIONS = {
    "validation_gap": "accuracy",
    "groups": "confusions",
    "asymmetric_pairs": "pairs",
    "hard_classes": "classes",
    "over_predicted": "classes",
    "confidence": "calibration",
}
Matrix = Int64[np.ndarray, "classes classes"]


@dataclass(frozen=True)
class Item:
    """A tested sentence, its p-value (in an `Insight` adjusted for all tests of its kind), its numbers by name."""

    text: str
    p: float
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Insight:
    """One question about the test and its outcome."""

    kind: str  # identifier for programs
    title: str  # the outcome in a few words
    text: str  # explains the title; empty where the items say it
    test: str  # the hypothesis test and its correction
    is_found: bool  # whether a difference beyond chance was found
    items: list[Item] = field(default_factory=list)  # significant ones, smallest p first, or a single comparison
    groups: dict[str, list[str]] = field(default_factory=dict)  # classes of each group that was tested


def hard_classes(cm: Matrix, names: Sequence[str]) -> Insight:
    """Find classes with a lower recall than the others."""
    support, correct = per_class(cm).support, np.diag(cm)
    total, all_correct = int(cm.sum()), int(correct.sum())
    tests = []
    for name, own, size in zip(names, correct.tolist(), support.tolist(), strict=True):
        if not 0 < size < total:
            continue
        others = (all_correct - own) / (total - size)
        low, high = wilson_interval(own, size)
        text = (
            f"{name}: recall {percent(own / size)} ({own:,} of {size:,}, 95 % interval {span((low, high))}); "
            f"all other classes {percent(others)}."
        )
        p = fisher_test(own, size, all_correct - own, total - size)
        numbers = {"class": name, "right": own, "support": size, "interval_95": [low, high], "others": others}
        tests.append(Item(text, p, numbers))
    items = [
        item for item in _significant(tests) if item.numbers["right"] / item.numbers["support"] < item.numbers["others"]
    ]
    num_tests = plural(len(tests), "test")
    test = f"Fisher's exact test of each class against all others, Holm's correction for {num_tests}"
    return _insight("hard_classes", items, "class", "classes", "with a lower recall than the rest", test)


def over_predicted(cm: Matrix, names: Sequence[str]) -> Insight:
    """Find classes that are predicted more or less often than they occur."""
    rates, correct = per_class(cm), np.diag(cm)
    tests = []
    for name, own, support, predicted in zip(
        names, correct.tolist(), rates.support.tolist(), rates.predicted.tolist(), strict=True
    ):
        missed, false = support - own, predicted - own
        text = (
            f"{name} is {'over' if false > missed else 'under'}-predicted: {plural(predicted, 'prediction')}, "
            f"{plural(support, 'image')} ({plural(false, 'false positive')}, {plural(missed, 'false negative')})."
        )
        numbers = {"class": name, "support": support, "predicted": predicted, "false_alarms": false, "missed": missed}
        tests.append(Item(text, mcnemar_test(missed, false), numbers))
    num_tests = plural(len(tests), "test")
    test = f"McNemar's exact test of false positives and false negatives, Holm's correction for {num_tests}"
    return _insight("over_predicted", _significant(tests), "class", "classes", "over- or under-predicted", test)


def asymmetric_pairs(cm: Matrix, names: Sequence[str]) -> Insight:
    """Find pairs of classes that are confused more often in one direction than in the other."""
    support = per_class(cm).support.tolist()

    def direction(i: int, j: int) -> str:
        fraction = f" ({percent(cm[i, j] / support[i])})" if support[i] else ""
        images = plural(support[i], "image")
        return f"{names[i]} is predicted as {names[j]} in {int(cm[i, j]):,} of {images}{fraction}"

    tests = []
    for first, second in np.argwhere(np.triu(cm + cm.T, 1)).tolist():
        fractions = [cm[i, j] / max(support[i], 1) for i, j in ((first, second), (second, first))]
        i, j = (first, second) if fractions[0] >= fractions[1] else (second, first)
        # Equal error rates split the confusions in proportion to the numbers of images.
        expected = support[first] / (support[first] + support[second])
        p = binomial_test(int(cm[first, second]), int(cm[first, second] + cm[second, first]), expected)
        numbers = {"true": names[i], "predicted": names[j], "count": int(cm[i, j]), "reverse": int(cm[j, i])}
        tests.append(Item(f"{direction(i, j)}, but {direction(j, i)}.", p, numbers))
    test = f"Exact binomial test of both directions, Holm's correction for {plural(len(tests), 'pair')}"
    return _insight("asymmetric_pairs", _significant(tests), "pair", "pairs", "confused mostly in one direction", test)


def _significant(tests: Sequence[Item]) -> list[Item]:
    """Return the items below `ALPHA` after Holm's correction for all of `tests`, in their order, with adjusted p."""
    adjusted = holm([item.p for item in tests])
    return [replace(item, p=p) for item, p in zip(tests, adjusted, strict=True) if p < ALPHA]


def _insight(kind: str, items: list[Item], noun: str, nouns: str, phrase: str, test: str) -> Insight:
    title = counted(len(items), f"{noun} {phrase}", f"{nouns} {phrase}") if items else f"No {noun} found {phrase}"
    text = "" if items else "No difference beyond chance was found."
    return Insight(kind, title, text, test, bool(items), sorted(items, key=lambda item: item.p))


def groups_of(names: Sequence[str], val_cm: Matrix | None) -> tuple[dict[str, list[int]], str] | None:
    """Return groups of classes and their origin; None where there are none.

    CIFAR-10 has two known groups: animals and vehicles. Groups of other classes are clusters in the confusions of the
    validation images, tested on the test images: on the images that formed them, the test would always be significant.
    More than 2,000 classes have none.
    """
    if set(names) == {name for group in CIFAR10_GROUPS.values() for name in group}:
        groups = {group: sorted(names.index(name) for name in members) for group, members in CIFAR10_GROUPS.items()}
        return groups, "known for CIFAR-10"
    if val_cm is None or len(val_cm) > _MAX_CLUSTERED:
        return None
    clusters = [cluster for cluster in find_clusters(val_cm) if len(cluster) > 1]
    if not clusters or len(clusters[0]) == len(names):
        return None
    groups = {_cluster_name(cluster, names): cluster for cluster in clusters}
    return groups, "found in the confusions of the validation images"


def find_clusters(cm: Int[np.ndarray, "classes classes"]) -> list[list[int]]:
    """Partition the classes into clusters that are mostly confused among themselves, the largest cluster first.

    Clusters are merged greedily while that raises the modularity of the graph whose edges weigh the confusion rates of
    both directions added: A. Clauset, M. Newman, C. Moore, "Finding community structure in very large networks", Phys.
    Rev. E 70 (2004).
    """
    rates = cm / np.maximum(cm.sum(axis=1, keepdims=True), 1)
    weights = rates + rates.T
    np.fill_diagonal(weights, 0)
    if not weights.sum():
        return [[index] for index in range(len(cm))]
    between = weights / weights.sum()  # off the diagonal between two clusters; on it, twice within one
    clusters = [[index] for index in range(len(cm))]
    while len(clusters) > 1:
        degree = between.sum(axis=1)
        gain = 2 * (between - np.outer(degree, degree))
        np.fill_diagonal(gain, -np.inf)
        best = int(gain.argmax())
        first, second = sorted(divmod(best, len(clusters)))
        if gain[first, second] <= 0:
            break
        between[first] += between[second]
        between[:, first] += between[:, second]
        between = np.delete(np.delete(between, second, 0), second, 1)
        clusters[first] = sorted(clusters[first] + clusters.pop(second))
    return sorted(clusters, key=lambda cluster: (-len(cluster), cluster))


def group_effects(
    cm: Matrix, names: Sequence[str], groups: dict[str, list[int]], origin: str, num_draws: int = 1999
) -> Insight:
    """Test whether mistakes stay within groups of classes, and the recall of each group.

    A class that is predicted too often attracts mistakes from its own group and from others, so the mistakes are
    compared to `num_draws` shuffles of their predictions (`shuffle_test`).
    """
    num_classes = len(cm)
    mistakes = cm - np.diag(np.diag(cm))
    is_within = np.zeros(cm.shape, dtype=bool)
    for members in groups.values():
        is_within[np.ix_(members, members)] = True
    # The mistakes of a class outside of all groups are never within a group.
    mistakes[~is_within.any(axis=1)] = 0
    within, total = int(mistakes[is_within].sum()), int(mistakes.sum())
    tests = []
    if total:
        p, expected = shuffle_test(mistakes, is_within, num_draws)
        text = (
            f"Of {plural(total, 'mistake')}, {within:,} ({percent(within / total)}) {'is' if within == 1 else 'are'} "
            "within a group; with the same "
            f"predictions in random order, {percent(expected / total)} would be."
        )
        numbers: dict[str, Any] = {"within": within, "mistakes": total, "expected": expected}
        tests.append(Item(text, p, numbers))
    # Two groups of all classes are each other's "all other classes": one test is enough.
    mirrored = len(groups) == 2 and sum(map(len, groups.values())) == num_classes
    for name, members in list(groups.items())[: 1 if mirrored else None]:
        others = [index for index in range(num_classes) if index not in members]
        correct, other_correct = (int(cm[rows, rows].sum()) for rows in (members, others))
        size, other_size = int(cm[members].sum()), int(cm[others].sum())
        low, high = difference_interval(correct, size, other_correct, other_size)
        recall, other = correct / max(size, 1), other_correct / max(other_size, 1)
        other_name = list(groups)[1] if mirrored else "all other classes"
        text = (
            f"{name}: recall {percent(recall)}, {other_name} {percent(other)}: "
            f"{points(recall - other)} points (95 % interval {points_span((low, high))})."
        )
        numbers = {"group": name, "accuracy": recall, "others": other, "interval_95": [low, high]}
        tests.append(Item(text, fisher_test(correct, size, other_correct, other_size), numbers))
    items = _significant(tests)
    title = f"{_NO_DIFFERENCE} groups of classes"
    if items:
        title = "Mistakes stay within groups" if "within" in items[0].numbers else "Groups of classes differ"
    return Insight(
        "groups",
        title,
        f"{plural(len(groups), 'group')} of classes, {origin}."
        + ("" if items else " No difference beyond chance was found."),
        "Monte Carlo test of mistakes within a group, given how often each class is predicted; Fisher's exact test of "
        f"each group against all other classes; Holm's correction for {plural(len(tests), 'test')}",
        bool(items),
        items,
        {name: [names[index] for index in members] for name, members in groups.items()},
    )


def confidence_gap(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> Insight:
    """Test whether the accuracy is what the confidences say: each the probability that its prediction is correct."""
    level, num_correct = float(confidence.mean()), int(correct.sum())
    mean = level - num_correct / len(correct)
    low, high = poisson_binomial_interval(num_correct, confidence)
    p = poisson_binomial_test(num_correct, confidence)
    acc = num_correct / len(correct)
    # As many decimals as tell the two apart.
    tell = (num for num in (1, 2, 3) if percent(level, num) != percent(acc, num) and round(100 * mean, num))
    decimals = next(tell, 4) if p < ALPHA else 1
    levels = f"mean confidence {percent(level, decimals)}, accuracy {percent(acc, decimals)}"
    title = f"{'Over' if mean > 0 else 'Under'}confident: {levels}"
    if p >= ALPHA:
        title = f"{_NO_DIFFERENCE} confidence and accuracy"
    interval = [level - high, level - low]
    text = f"M{levels[1:]}: {points(mean, decimals)} points (95 % interval {points_span(interval, decimals)})."
    test = "Poisson binomial test of the number of correct predictions, each with its confidence as probability"
    return Insight("confidence", title, "", test, p < ALPHA, [Item(text, p, {"gap": mean, "interval_95": interval})])


def validation_gap(cm: Matrix, val_cm: Matrix, names: Sequence[str]) -> Insight:
    """Test whether test accuracy differs from validation accuracy, and compare their class frequencies.

    The validation images chose the checkpoint, so their accuracy is the optimistic one.
    """
    correct, total, val_correct, val_total = (int(value) for m in (cm, val_cm) for value in (np.trace(m), m.sum()))
    low, high = difference_interval(correct, total, val_correct, val_total)
    p = fisher_test(correct, total, val_correct, val_total)
    test_acc, val_acc = accuracy(cm), accuracy(val_cm)
    text = (
        f"Test {percent(test_acc, 2)}, validation {percent(val_acc, 2)}: "
        f"{points(test_acc - val_acc)} points (95 % interval {points_span((low, high))})."
    )
    fractions, val_fractions = (m.sum(axis=1) / max(m.sum(), 1) for m in (cm, val_cm))
    most = int(np.abs(fractions - val_fractions).argmax())
    if p < ALPHA and abs(fractions[most] - val_fractions[most]) >= _MIN_BALANCE_GAP:
        text += (
            f" Different class frequencies may be a reason: {names[most]} is {percent(fractions[most])} of the test "
            f"images and {percent(val_fractions[most])} of the validation images."
        )
    title = f"{_NO_DIFFERENCE} test and validation accuracy"
    if p < ALPHA:
        title = f"Test accuracy is {'below' if test_acc < val_acc else 'above'} validation accuracy"
    numbers = {"test": test_acc, "validation": val_acc, "interval_95": [low, high]}
    return Insight("validation_gap", title, "", "Fisher's exact test", p < ALPHA, [Item(text, p, numbers)])


def _cluster_name(cluster: Sequence[int], names: Sequence[str]) -> str:
    shown = [names[index] for index in cluster[:3]]
    rest = len(cluster) - len(shown)
    return " + ".join(shown) + (f" + {rest} more" if rest else "")
