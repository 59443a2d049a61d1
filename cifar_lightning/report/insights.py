"""Findings in words, each with its numbers and the test behind it: nothing is said that chance explains as well.

A finding is listed where its p-value, adjusted for all tests of its kind (Holm), is below `ALPHA`. That nothing was
found is said, too: it was looked for. It never reads as if nothing were there: with few images little is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from cifar_lightning.formatting import counted, percent, points, points_span, span
from cifar_lightning.metrics.classification import accuracy, per_class
from cifar_lightning.metrics.significance import (
    Z_95,
    at_least_test,
    binomial_test,
    difference_interval,
    fisher_test,
    holm,
    mcnemar_test,
    mean_test,
    wilson_interval,
)

ALPHA = 0.05
_OTHER_SHARE = 0.05  # of all images: a class's share in test and validation, from which it is worth a word
CIFAR10_GROUPS = {
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicles": ("airplane", "automobile", "ship", "truck"),
}
Matrix = Int64[np.ndarray, "classes classes"]


@dataclass(frozen=True)
class Item:
    """One finding.

    Attributes:
        text: A sentence with its numbers.
        p: p-value after the adjustment; None where nothing was tested.
        numbers: What the sentence is made of, by name.
    """

    text: str
    p: float | None
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Insight:
    """What was looked for and what was found.

    Attributes:
        kind: A word for programs.
        title: What was found, in a few words.
        text: What this is about, also where nothing was found; empty where one item says it.
        test: The test that was used, and how it was adjusted.
        is_found: Whether anything was, beyond chance.
        items: The findings, the surest first; a single comparison has its numbers also where nothing was found.
        groups: Classes of each group that this is about.
    """

    kind: str
    title: str
    text: str
    test: str
    is_found: bool
    items: list[Item] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)


def hard_classes(cm: Matrix, names: Sequence[str]) -> Insight:
    """Say which classes are found less often than the others."""
    rates = per_class(cm)
    right, total = np.diag(cm), int(cm.sum())
    all_right = int(right.sum())
    classes = [index for index in range(len(names)) if 0 < rates.support[index] < total]
    p_values = holm(
        [
            fisher_test(int(right[i]), int(rates.support[i]), all_right - int(right[i]), total - int(rates.support[i]))
            for i in classes
        ]
    )
    items = []
    for index, p in zip(classes, p_values, strict=True):
        own, support = int(right[index]), int(rates.support[index])
        others = (all_right - own) / (total - support)
        if p < ALPHA and own / support < others:
            low, high = wilson_interval(own, support)
            text = (
                f"{names[index]}: {own:,} of {support:,} found ({percent(own / support)}, 95 % interval "
                f"{span((low, high))}); of all other classes {percent(others)}."
            )
            numbers = {"class": names[index], "right": own, "support": support, "interval_95": [low, high]}
            items.append(Item(text, p, {**numbers, "others": others}))
    return Insight(
        "hard_classes",
        f"{counted(len(items), 'class is', 'classes are')} harder than the rest"
        if items
        else "No class was found to be harder than the rest",
        "Found less often than all other classes together."
        if items
        else "No difference beyond chance was found between a class and all others.",
        f"Fisher's exact test of each class against all others, Holm's correction for {len(classes)} tests",
        bool(items),
        _surest_first(items),
    )


def over_predicted(cm: Matrix, names: Sequence[str]) -> Insight:
    """Say which classes are predicted more or less often than they are there."""
    rates = per_class(cm)
    right = np.diag(cm)
    missed, false = rates.support - right, rates.predicted - right
    p_values = holm([mcnemar_test(int(m), int(f)) for m, f in zip(missed, false, strict=True)])
    items = []
    for index, p in enumerate(p_values):
        if p < ALPHA:
            more = false[index] > missed[index]
            support, predicted = int(rates.support[index]), int(rates.predicted[index])
            text = (
                f"{names[index]} is predicted too {'often' if more else 'rarely'}: {predicted:,} times, and is there "
                f"{support:,} times ({int(false[index]):,} false alarms, {int(missed[index]):,} missed)."
            )
            numbers = {"class": names[index], "support": support, "predicted": predicted}
            items.append(Item(text, p, {**numbers, "false_alarms": int(false[index]), "missed": int(missed[index])}))
    return Insight(
        "over_predicted",
        f"{counted(len(items), 'class is', 'classes are')} predicted too often or too rarely"
        if items
        else "No class was found to be predicted too often or too rarely",
        "How often a class is predicted differs from how often it is there."
        if items
        else "No difference beyond chance was found between how often a class is predicted and how often it is there.",
        f"McNemar's exact test of false alarms against missed images, Holm's correction for {len(names)} tests",
        bool(items),
        _surest_first(items),
    )


def asymmetric_pairs(cm: Matrix, names: Sequence[str]) -> Insight:
    """Say which two classes are taken for each other more often in one direction."""
    support = per_class(cm).support
    rows, columns = np.nonzero(np.triu(cm + cm.T, 1))
    pairs = [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]
    p_values = holm(
        [
            # If both were mistaken at the same rate, the mistakes would fall as the numbers of images do.
            binomial_test(int(cm[i, j]), int(cm[i, j] + cm[j, i]), float(support[i] / (support[i] + support[j])))
            for i, j in pairs
        ]
    )
    items = []
    for (first, second), p in zip(pairs, p_values, strict=True):
        if p < ALPHA:
            shares = [cm[i, j] / max(support[i], 1) for i, j in ((first, second), (second, first))]
            i, j = (first, second) if shares[0] >= shares[1] else (second, first)
            text = f"{_taken(cm, support, names, i, j)}, but {_taken(cm, support, names, j, i)}."
            numbers = {"true": names[i], "predicted": names[j], "count": int(cm[i, j]), "reverse": int(cm[j, i])}
            items.append(Item(text, p, numbers))
    return Insight(
        "asymmetric_pairs",
        f"{counted(len(items), 'confusion goes', 'confusions go')} one way"
        if items
        else "No confusion was found to go one way",
        "Two classes are taken for each other, but much more often in one direction."
        if items
        else "No difference beyond chance was found between the two directions in which classes are confused.",
        f"Exact binomial test of both directions, Holm's correction for {len(pairs)} pairs",
        bool(items),
        _surest_first(items),
    )


def groups_of(names: Sequence[str], val_cm: Matrix | None) -> tuple[dict[str, list[int]], str] | None:
    """Return groups of classes and where they are from; None where there are none.

    CIFAR-10's names have two: animals and vehicles. Others are found in the confusions of the validation images, so
    that the test images can confirm them: a test on the images that they were found in would always agree.
    """
    if set(names) == {name for group in CIFAR10_GROUPS.values() for name in group}:
        groups = {group: sorted(names.index(name) for name in of) for group, of in CIFAR10_GROUPS.items()}
        return groups, "known for CIFAR-10"
    if val_cm is None:
        return None
    clusters = [cluster for cluster in find_clusters(val_cm) if len(cluster) > 1]
    if not clusters or len(clusters[0]) == len(names):
        return None
    return {_cluster_name(cluster, names): cluster for cluster in clusters}, "found in the validation's confusions"


def find_clusters(cm: Int[np.ndarray, "classes classes"]) -> list[list[int]]:
    """Return classes that are mostly confused among themselves, the largest cluster first; each class is in one.

    Two clusters are merged as long as that raises the modularity of the graph whose edges are the rates of confusion in
    both directions: A. Clauset, M. Newman, C. Moore, "Finding community structure in very large networks", Phys. Rev. E
    70 (2004).
    """
    rates = cm / np.maximum(cm.sum(axis=1, keepdims=True), 1)
    weights = rates + rates.T
    np.fill_diagonal(weights, 0)
    if not weights.sum():
        return [[index] for index in range(len(cm))]
    between = weights / weights.sum()  # between two clusters, and twice within one on the diagonal
    clusters = [[index] for index in range(len(cm))]
    while len(clusters) > 1:
        share = between.sum(axis=1)
        gain = 2 * (between - np.outer(share, share))
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


def group_effects(cm: Matrix, names: Sequence[str], groups: dict[str, list[int]], origin: str) -> Insight:
    """Say whether mistakes stay within groups, and how well each group is found."""
    num_classes = len(cm)
    mistakes = cm - np.diag(np.diag(cm))
    within = sum(int(mistakes[np.ix_(members, members)].sum()) for members in groups.values())
    of_groups = [int(mistakes[members].sum()) for members in groups.values()]
    chances = [(len(members) - 1) / (num_classes - 1) for members in groups.values()]
    total = sum(of_groups)
    expected = sum(number * chance for number, chance in zip(of_groups, chances, strict=True))
    tests = [_within_item(within, total, expected, at_least_test(within, of_groups, chances))] if total else []
    # Of two groups that are all classes, each is the other's "all other classes".
    mirrored = len(groups) == 2 and sum(map(len, groups.values())) == num_classes
    for name, members in list(groups.items())[: 1 if mirrored else None]:
        others = [index for index in range(num_classes) if index not in members]
        tests.append(_group_item(cm, name, members, others, list(groups)[1] if mirrored else "all other classes"))
    adjusted = holm([item.p if item.p is not None else 1.0 for item in tests])
    items = [Item(item.text, p, item.numbers) for item, p in zip(tests, adjusted, strict=True) if p < ALPHA]
    return Insight(
        "groups",
        "Mistakes stay within groups" if items and "within" in items[0].numbers else "Groups of classes",
        f"{len(groups)} group{'s' if len(groups) > 1 else ''} of classes, {origin}."
        + ("" if items else " No difference beyond chance was found."),
        "Exact test of mistakes within a group against a wrong class drawn at random; Fisher's exact test of each "
        f"group against all other classes; Holm's correction for {len(tests)} tests",
        bool(items),
        items,
        {name: [names[index] for index in members] for name, members in groups.items()},
    )


def confidence_gap(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Insight:
    """Say whether the network is surer, or less sure, of its answers than it is right."""
    gaps = confidence - right
    mean, deviation = float(gaps.mean()), float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0
    margin = Z_95 * deviation / len(gaps) ** 0.5
    p = mean_test(mean, deviation, len(gaps))
    title = "No difference beyond chance was found between confidence and accuracy"
    if p < ALPHA:
        title = "The network is too sure of itself" if mean > 0 else "The network is not sure enough of itself"
    text = (
        f"On average it gives its answers a probability of {percent(float(confidence.mean()))} and is right in "
        f"{percent(float(right.mean()))}: {points(mean)} points (95 % interval {points(mean - margin)} to "
        f"{points(mean + margin)})."
    )
    numbers = {"gap": mean, "interval_95": [mean - margin, mean + margin]}
    test = "z-test of the mean difference between confidence and right (1) or wrong (0)"
    return Insight("confidence", title, "", test, p < ALPHA, [Item(text, p, numbers)])


def validation_gap(cm: Matrix, val_cm: Matrix, names: Sequence[str]) -> Insight:
    """Say whether the test is passed as well as the validation, which chose it, and where their classes differ."""
    right, total, val_right, val_total = (int(value) for m in (cm, val_cm) for value in (np.trace(m), m.sum()))
    low, high = difference_interval(right, total, val_right, val_total)
    p = fisher_test(right, total, val_right, val_total)
    text = (
        f"Test {percent(accuracy(cm), 2)}, validation {percent(accuracy(val_cm), 2)}: "
        f"{points(accuracy(cm) - accuracy(val_cm))} points (95 % interval {points_span((low, high))})."
    )
    shares, val_shares = (m.sum(axis=1) / max(m.sum(), 1) for m in (cm, val_cm))
    most = int(np.abs(shares - val_shares).argmax())
    if p < ALPHA and abs(shares[most] - val_shares[most]) >= _OTHER_SHARE:
        text += (
            f" Split of it may be that the classes have other shares: {names[most]} is {percent(shares[most])} of the "
            f"test and {percent(val_shares[most])} of the validation."
        )
    title = "No difference beyond chance was found between test and validation"
    if p < ALPHA:
        title = "The test is " + ("harder" if accuracy(cm) < accuracy(val_cm) else "easier") + " than the validation"
    numbers = {"test": accuracy(cm), "validation": accuracy(val_cm), "interval_95": [low, high]}
    return Insight("validation_gap", title, "", "Fisher's exact test", p < ALPHA, [Item(text, p, numbers)])


def _surest_first(items: list[Item]) -> list[Item]:
    return sorted(items, key=lambda item: item.p if item.p is not None else 1.0)


def _taken(cm: Matrix, support: Int64[np.ndarray, " classes"], names: Sequence[str], i: int, j: int) -> str:
    share = f" ({percent(cm[i, j] / support[i])})" if support[i] else ""
    return f"{names[i]} is taken for {names[j]} {int(cm[i, j]):,} of {int(support[i]):,} times{share}"


def _within_item(within: int, total: int, expected: float, p: float) -> Item:
    text = (
        f"Of {total:,} mistakes, {within:,} ({percent(within / total)}) are within a group; a wrong class drawn at "
        f"random would be {percent(expected / total)} of the time."
    )
    return Item(text, p, {"within": within, "mistakes": total, "expected": expected})


def _group_item(cm: Matrix, name: str, members: list[int], others: list[int], other_name: str) -> Item:
    right, other_right = (int(cm[rows, rows].sum()) for rows in (members, others))
    total, other_total = (int(cm[rows].sum()) for rows in (members, others))
    low, high = difference_interval(right, total, other_right, other_total)
    share, other = (part / whole if whole else 0.0 for part, whole in ((right, total), (other_right, other_total)))
    text = (
        f"{name}: {percent(share)} found, {other_name} {percent(other)}: {points(share - other)} points "
        f"(95 % interval {points_span((low, high))})."
    )
    numbers = {"group": name, "accuracy": share, "others": other, "interval_95": [low, high]}
    return Item(text, fisher_test(right, total, other_right, other_total), numbers)


def _cluster_name(cluster: Sequence[int], names: Sequence[str]) -> str:
    shown = [names[index] for index in cluster[:3]]
    rest = len(cluster) - len(shown)
    return " + ".join(shown) + (f" + {rest} more" if rest else "")
