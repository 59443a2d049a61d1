import numpy as np
import pytest
from made_run import CIFAR10, made_predictions
from scipy import stats

from cifar_lightning.metrics.classification import confusion_matrix
from cifar_lightning.report import insights

NAMES = ["ant", "bee", "cow", "elk"]


def even(num_classes=4, right=900, wrong=33):
    """A matrix that treats all classes alike."""
    return np.full((num_classes, num_classes), wrong) + np.eye(num_classes, dtype=np.int64) * (right - wrong)


def test_where_all_classes_are_alike_nothing_is_found():
    for insight in (
        insights.hard_classes(even(), NAMES),
        insights.over_predicted(even(), NAMES),
        insights.asymmetric_pairs(even(), NAMES),
    ):
        assert insight.items == []
        assert not insight.is_found
        assert insight.title.startswith("No ")
        assert " found " in insight.title
        # The text is about the search, not the classes: with too few images the outcome is the same.
        assert insight.text.startswith("No difference beyond chance was found")


def test_a_hard_class_is_named_with_its_numbers_and_fishers_test():
    cm = even()
    cm[2] = (60, 60, 819, 60)
    insight = insights.hard_classes(cm, NAMES)
    assert insight.title == "One class with a lower recall than the rest"
    (item,) = insight.items
    assert item.text.startswith(
        "cow: recall 82.0 % (819 of 999, 95 % interval 79.5 to 84.2 %); all other classes 90.1 %."
    )
    theirs = stats.fisher_exact([[819, 180], [2700, 297]]).pvalue
    assert item.p == pytest.approx(4 * theirs, rel=1e-6)  # Holm: the smallest of four tests
    assert item.numbers["right"] == 819


def test_an_easy_class_is_not_a_hard_one():
    cm = even()
    cm[0] = (999, 0, 0, 0)
    assert "ant" not in str([item.text for item in insights.hard_classes(cm, NAMES).items])


def test_an_over_predicted_class_is_found_by_mcnemars_test():
    cm = even()
    cm[0, 1], cm[0, 0] = 133, 800
    insight = insights.over_predicted(cm, NAMES)
    assert [item.numbers["class"] for item in insight.items] == ["ant", "bee"]
    ant, bee = insight.items
    assert "ant is under-predicted: 899 predictions, 999 images (99 false positives, 199 false negatives)" in ant.text
    assert "bee is over-predicted: 1,099 predictions, 999 images" in bee.text
    assert ant.p == pytest.approx(4 * stats.binomtest(99, 298).pvalue, rel=1e-6)


def test_a_one_way_confusion_is_found_and_the_larger_direction_named_first():
    cm = even()
    cm[3, 1], cm[3, 3] = 90, 843
    (item,) = insights.asymmetric_pairs(cm, NAMES).items
    assert item.text == (
        "elk is predicted as bee in 90 of 999 images (9.0 %), but bee is predicted as elk in 33 of 999 images (3.3 %)."
    )
    assert item.p == pytest.approx(6 * stats.binomtest(33, 123).pvalue, rel=1e-6)


def test_a_rare_class_with_the_same_rate_of_mistakes_is_not_called_one_way():
    cm = np.array([[9000, 1000], [90, 10]])
    cm[1] = (10, 90)  # both a tenth: 1,000 mistakes of the large class and 10 of the small one
    assert insights.asymmetric_pairs(cm, ["large", "small"]).items == []


def test_cifar_10_has_its_known_groups_and_other_names_have_none_without_validation():
    groups, origin = insights.groups_of(CIFAR10, None)
    assert groups == {"animals": [2, 3, 4, 5, 6, 7], "vehicles": [0, 1, 8, 9]}
    assert "CIFAR-10" in origin
    assert insights.groups_of(NAMES, None) is None


def test_mistakes_within_groups_are_compared_to_predictions_shuffled_among_them():
    cm = even(4, 900, 10)
    cm[0, 1] = cm[1, 0] = cm[2, 3] = cm[3, 2] = 60
    insight = insights.group_effects(cm, NAMES, {"small": [0, 1], "large": [2, 3]}, "made")
    item = insight.items[0]
    assert item.p == pytest.approx(2 / 2000)  # Holm: the smaller of two tests; no shuffle is so extreme
    assert item.text.startswith("Of 320 mistakes, 240 (75.0 %) are within a group; ")
    # All classes are predicted equally often: each mistake is within its group one time in three.
    assert item.numbers["expected"] == pytest.approx(320 / 3, rel=0.03)
    assert insight.title == "Mistakes stay within groups"
    assert insight.is_found


def test_an_over_predicted_class_alone_is_no_group():
    cm = np.diag([200] * 6)
    cm[:, 0] += 30  # every class is mistaken for class 0 alone, most mistakes by the large group that holds it
    insight = insights.group_effects(cm, list("abcdef"), {"first": [0, 1, 2, 3], "second": [4, 5]}, "made")
    assert "within" not in str([item.numbers for item in insight.items])


def test_every_group_is_there_with_all_its_classes_however_many_there_are():
    names = [f"class_{index:02}" for index in range(30)]
    groups = {f"group_{number}": list(range(6 * number, 6 * number + 6)) for number in range(5)}
    insight = insights.group_effects(even(30, 900, 3), names, groups, "made")
    assert insight.groups == {group: [names[index] for index in members] for group, members in groups.items()}
    assert insight.text.startswith("5 groups of classes, made.")


def test_clusters_are_the_blocks_of_the_matrix():
    cm = np.eye(9, dtype=np.int64) * 800
    for block in ([0, 4, 7], [1, 2], [3, 5, 6, 8]):
        for i in block:
            for j in block:
                cm[i, j] += 20 * (i != j)
    cm += 1
    assert insights.find_clusters(cm) == [[3, 5, 6, 8], [0, 4, 7], [1, 2]]


def test_without_mistakes_each_class_stays_alone():
    assert insights.find_clusters(np.eye(3, dtype=np.int64)) == [[0], [1], [2]]


def test_clusters_of_the_validation_are_confirmed_on_the_test():
    names = [f"class_{index}" for index in range(20)]
    val, test = (
        confusion_matrix(targets, logits.argmax(1), 20)
        for logits, targets in (made_predictions(20, 2000, seed) for seed in (0, 1))
    )
    groups, origin = insights.groups_of(names, val)
    assert "validation" in origin
    assert all(len(members) > 1 for members in groups.values())
    item = insights.group_effects(test, names, groups, origin).items[0]
    assert item.p == pytest.approx(
        (len(groups) + 1) / 2000
    )  # no shuffle is so extreme; Holm: one test more than groups


def test_no_groups_are_sought_among_thousands_of_classes(monkeypatch):
    names = [str(index) for index in range(2001)]
    sought = []
    monkeypatch.setattr(insights, "find_clusters", lambda cm: sought.append(len(cm)) or [])
    for num_classes in (2000, 2001):
        assert insights.groups_of(names[:num_classes], np.eye(num_classes, dtype=np.int64)) is None
    assert sought == [2000]


def test_an_over_or_underconfident_model_is_called_so():
    right = np.arange(1000) % 10 != 0  # 90 %
    noise = np.random.default_rng(0).normal(0, 0.01, 1000)
    gaps = [insights.confidence_gap(level + noise, right) for level in (0.99, 0.9, 0.7)]
    assert [gap.is_found for gap in gaps] == [True, False, True]
    assert [gap.title for gap in gaps] == [
        "Overconfident: mean confidence 99.0 %, accuracy 90.0 %",
        "No difference beyond chance was found between confidence and accuracy",
        "Underconfident: mean confidence 70.0 %, accuracy 90.0 %",
    ]
    item = insights.confidence_gap(np.full(1000, 0.7), right).items[0]
    assert "confidence 70.0 %, accuracy 90.0 %: -20.0 points" in item.text


def test_a_small_gap_is_shown_with_the_decimals_that_tell_both_levels_apart():
    gap = insights.confidence_gap(np.full(200_000, 0.99996), np.ones(200_000, bool))
    assert gap.title == "Underconfident: mean confidence 99.996 %, accuracy 100.000 %"
    assert ": -0.004 points" in gap.items[0].text


def test_two_levels_that_round_to_100_percent_are_shown_as_different():
    gap = insights.confidence_gap(np.full(10_000, 0.9997), np.arange(10_000) < 9990)
    assert gap.title == "Overconfident: mean confidence 99.97 %, accuracy 99.9 %"


@pytest.mark.parametrize("number", [1, 2, 5, 20, 50])
def test_calibrated_confidences_near_1_are_called_uncalibrated_in_at_most_5_percent_of_test_sets(number):
    for confidence in np.random.default_rng(number).uniform(0.95, 1, (2, number)):
        gaps = [insights.confidence_gap(confidence, np.arange(number) < correct) for correct in range(number + 1)]
        probabilities = stats.poisson_binom(confidence).pmf(np.arange(number + 1))
        assert probabilities[[gap.is_found for gap in gaps]].sum() <= 0.05


@pytest.mark.parametrize(("num_correct", "number"), [(0, 1), (1, 1), (40, 50), (48, 50), (50, 50)])
def test_the_interval_of_the_confidence_gap_holds_0_exactly_where_no_gap_is_found(num_correct, number):
    for level in np.linspace(0.5, 1, 26):
        insight = insights.confidence_gap(np.full(number, level), np.arange(number) < num_correct)
        low, high = insight.items[0].numbers["interval_95"]
        assert (low <= 0 <= high) is not insight.is_found
        assert low - 1e-9 <= level - num_correct / number <= high + 1e-9


def test_the_gap_between_test_and_validation():
    insight = insights.validation_gap(even(4, 700, 100), even(4, 910, 30), "abcd")
    assert insight.title == "Test accuracy is below validation accuracy"
    assert insight.is_found


def test_a_large_gap_of_few_images_is_not_called_agreement():
    insight = insights.validation_gap(np.array([[35, 10], [10, 35]]), np.diag([40, 40]) + 5, "ab")
    assert insight.items[0].text.startswith("Test 77.78 %, validation 90.00 %")
    insight = insights.validation_gap(np.array([[35, 10], [10, 35]]), np.array([[16, 2], [2, 16]]), "ab")
    assert "-11.1 points" in insight.items[0].text
    assert insight.title == "No difference beyond chance was found between test and validation accuracy"
    assert not insight.is_found


def test_different_class_frequencies_in_validation_and_test_are_named_and_equal_ones_are_not():
    val_cm, cm = np.diag([60, 30, 10]), np.array([[23, 5, 5], [0, 33, 0], [0, 0, 34]])
    (item,) = insights.validation_gap(cm, val_cm, ["cat", "dog", "ship"]).items
    assert (
        "class frequencies may be a reason: cat is 33.0 % of the test images and 60.0 % of the validation images."
        in item.text
    )
    (item,) = insights.validation_gap(cm, np.diag([110, 110, 113]), ["cat", "dog", "ship"]).items
    assert "frequencies" not in item.text
    # Where no gap was found there is nothing to explain.
    (item,) = insights.validation_gap(np.diag([33, 33, 34]), val_cm, ["cat", "dog", "ship"]).items
    assert "frequencies" not in item.text


@pytest.mark.parametrize(
    "cm",
    [np.zeros((3, 3), dtype=np.int64), np.diag([5, 0, 0]), np.array([[5, 0, 0]] * 3), np.ones((1, 1), dtype=np.int64)],
)
def test_empty_and_one_sided_matrices_raise_no_warning(cm):
    names = [str(index) for index in range(len(cm))]
    for find in (insights.hard_classes, insights.over_predicted, insights.asymmetric_pairs):
        assert find(cm, names).test
    assert insights.groups_of(names, cm) is None or len(cm) > 1
