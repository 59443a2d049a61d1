"""The threshold of selective classification equals a search over all thresholds."""

import numpy as np
import pytest

from cifar_lightning.metrics.selective import confidence_threshold


def searched(confidence, correct, target):
    reached = [t for t in np.unique(confidence[~np.isnan(confidence)]) if correct[confidence >= t].mean() >= target]
    return min(reached, default=None)


@pytest.mark.parametrize("decimals", [1, 2, 6])  # with few decimals most confidences are equal
@pytest.mark.parametrize("num", [1, 2, 30, 300])
def test_it_is_the_lowest_threshold_that_reaches_the_target(num, decimals):
    rng = np.random.default_rng([num, decimals])
    for _ in range(10):
        confidence = rng.uniform(0.3, 1, num).round(decimals)
        correct = rng.random(num) < confidence
        for target in (0.0, 0.5, 0.9, 0.95, 0.99, 1.0):
            assert confidence_threshold(confidence, correct, target) == searched(confidence, correct, target)


def test_unreachable_targets_and_nan_have_none():
    assert confidence_threshold(np.array([0.9, 0.5]), np.array([False, True]), 0.9) is None
    assert confidence_threshold(np.array([np.nan]), np.array([True]), 0.5) is None
    assert confidence_threshold(np.array([np.nan, 0.5]), np.array([False, True]), 1.0) == 0.5
    assert confidence_threshold(np.empty(0), np.empty(0, bool), 0.5) is None
