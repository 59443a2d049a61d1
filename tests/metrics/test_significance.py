"""Intervals and tests against published values, SciPy (which scikit-learn brings) and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cifar_lightning.metrics.significance import (
    binomial_test,
    difference_interval,
    fisher_test,
    holm,
    mcnemar_test,
    paired_difference_interval,
    poisson_binomial_interval,
    poisson_binomial_test,
    shuffle_test,
    wilson_interval,
)


def test_the_wilson_interval_equals_published_and_exact_values():
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
    # table I, method 3.
    for successes, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes out of 4"):
        wilson_interval(5, 4)


def test_the_wilson_interval_is_where_the_score_test_just_rejects():
    z = 1.959963985
    for end in wilson_interval(870, 1000):
        assert abs(0.87 - end) / math.sqrt(end * (1 - end) / 1000) == pytest.approx(z, rel=1e-9)


@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([0.5, 0.1, 0.327, 0.99]))
def test_the_binomial_test_equals_scipys(successes, failures, share):
    theirs = stats.binomtest(successes, successes + failures, share).pvalue if successes + failures else 1.0
    assert binomial_test(successes, successes + failures, share) == pytest.approx(theirs, rel=1e-7, abs=1e-300)


def test_mcnemar_is_a_fair_coin_on_the_images_that_one_alone_has_right():
    # By hand: 2 * (1 + 9 + 36) / 2**9, both tails of nine tosses with two heads or fewer.
    assert mcnemar_test(2, 7) == mcnemar_test(7, 2) == pytest.approx(2 * (1 + 9 + 36) / 512)
    assert mcnemar_test(0, 0) == mcnemar_test(5, 5) == 1.0
    assert mcnemar_test(6000, 4000) == pytest.approx(stats.binomtest(6000, 10000).pvalue, rel=1e-6)


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 400), st.integers(1, 400))
def test_fishers_test_equals_scipys(right, wrong, other_right, other_wrong):
    theirs = stats.fisher_exact([[right, wrong], [other_right, other_wrong]]).pvalue
    assert fisher_test(right, right + wrong, other_right, other_right + other_wrong) == pytest.approx(theirs, rel=1e-6)


def test_fishers_test_also_works_on_ten_thousand_images():
    theirs = stats.fisher_exact([[681, 319], [7631, 1369]]).pvalue
    assert fisher_test(681, 1000, 7631, 9000) == pytest.approx(theirs, rel=1e-6)


def test_the_poisson_binomial_test_equals_scipys_distribution():
    probabilities = np.random.default_rng(0).uniform(0.3, 1, 60)
    theirs = stats.poisson_binom(probabilities)
    for successes in (0, 30, 40, 45, 60):
        tails = theirs.cdf(successes), 1 - theirs.cdf(successes - 1)
        expected = min(1.0, 2 * min(tails))
        assert poisson_binomial_test(successes, probabilities) == pytest.approx(expected, abs=1e-9)
    same = 2 * stats.binom.cdf(9_400, 10_000, 0.945)
    assert poisson_binomial_test(9_400, np.full(10_000, 0.945)) == pytest.approx(same, rel=1e-6)


def test_the_poisson_binomial_test_at_its_limits():
    assert poisson_binomial_test(0, np.array([])) == 1.0
    assert poisson_binomial_test(3, np.ones(3)) == 1.0
    assert poisson_binomial_test(2, np.ones(3)) < 1e-6
    assert poisson_binomial_test(1, np.array([0.97])) == 1.0
    assert poisson_binomial_test(0, np.array([0.97])) == pytest.approx(0.06)


def test_the_interval_of_a_mean_probability_equals_clopper_and_pearsons_where_all_are_equal():
    for successes in (0, 3, 20):
        theirs = stats.binomtest(successes, 20).proportion_ci(method="exact")
        assert poisson_binomial_interval(successes, np.full(20, 0.3)) == pytest.approx(tuple(theirs), abs=1e-4)
    for successes, number in ((9_000, 10_000), (2_500, 5_001), (4_996, 5_001), (5_001, 5_001)):
        theirs = stats.binomtest(successes, number).proportion_ci(method="exact")
        assert poisson_binomial_interval(successes, np.full(number, 0.95)) == pytest.approx(tuple(theirs), abs=2.5e-4)


def test_shuffled_predictions_of_mistakes_never_become_correct_and_keep_the_counts():
    # Two mistakes can only exchange their predictions: one of the two tables has both within a group.
    mistakes = np.zeros((4, 4), dtype=np.int64)
    mistakes[0, 1] = mistakes[2, 3] = 1
    same = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    p, expected = shuffle_test(mistakes, same)
    assert p == pytest.approx(0.5, abs=0.05)
    assert expected == pytest.approx(1.0, abs=0.1)
    assert shuffle_test(np.zeros((4, 4), dtype=np.int64), same) == (1.0, 0.0)
    assert shuffle_test(mistakes, same) == shuffle_test(mistakes, same)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; never below an earlier one.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_difference_of_two_fractions_equals_newcombes_example():
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table II, method 10.
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_interval(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert difference_interval(10, 10, 0, 10) == pytest.approx((0.6075, 1.0), abs=5e-5)


def test_the_paired_interval_holds_the_true_difference_19_times_in_20():
    rng = np.random.default_rng(0)
    for shares in ([0.7, 0.12, 0.08, 0.1], [0.9, 0.05, 0.01, 0.04]):
        held = 0
        for counts in rng.multinomial(400, shares, size=2000).tolist():
            low, high = paired_difference_interval(*counts)
            held += low <= shares[1] - shares[2] <= high
        assert 0.935 <= held / 2000 <= 0.975


def test_the_paired_interval_is_antisymmetric_and_narrower_than_the_unpaired_one():
    low, high = paired_difference_interval(800, 70, 40, 90)
    assert paired_difference_interval(800, 40, 70, 90) == pytest.approx((-high, -low))
    separate = difference_interval(870, 1000, 840, 1000)
    assert high - low < separate[1] - separate[0]
    assert low < 0.03 < high


def test_without_images_every_difference_is_possible():
    assert paired_difference_interval(0, 0, 0, 0) == pytest.approx((-math.sqrt(0.5), math.sqrt(0.5)))
    assert difference_interval(0, 0, 0, 0)[0] < -0.5
