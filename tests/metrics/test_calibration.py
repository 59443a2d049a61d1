import numpy as np
import pytest
import torch
from made_run import made_predictions
from scipy.optimize import minimize_scalar
from torchmetrics.classification import MulticlassCalibrationError

from cifar_lightning.metrics.calibration import (
    cross_entropy,
    expected_calibration_error,
    fit_temperature,
    reliability,
    softmax,
)
from cifar_lightning.report.results import Predictions
from cifar_lightning.report.temperature import temperature_of

LOGITS, TARGETS = made_predictions(10, 2000, skill=2, sharpness=1)


def test_softmax_and_loss_equal_torchs():
    logits, targets = torch.tensor(LOGITS).double(), torch.tensor(TARGETS)
    np.testing.assert_allclose(softmax(LOGITS), logits.softmax(1).numpy(), rtol=1e-12)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert cross_entropy(LOGITS, TARGETS) == pytest.approx(expected, rel=1e-12)
    assert cross_entropy(LOGITS.astype(np.float16), TARGETS) == pytest.approx(expected, rel=1e-3)


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    logits = np.array([[0.0, 60000.0], [60000.0, -60000.0]], dtype=np.float16)
    assert cross_entropy(logits, np.array([0, 0])) == pytest.approx(logits[0, 1].astype(float) / 2)
    assert np.isfinite(softmax(logits)).all()


@pytest.mark.parametrize("bins", [15, 10, 1])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_the_calibration_error_equals_torchmetrics(bins, sharpness):
    probs = torch.softmax(torch.tensor(LOGITS) * sharpness, dim=1)
    theirs = MulticlassCalibrationError(num_classes=10, n_bins=bins, norm="l1")(probs, torch.tensor(TARGETS)).item()
    assert expected_calibration_error(probs.numpy(), TARGETS, bins) == pytest.approx(theirs, abs=1e-5)


def test_the_calibration_error_of_four_images_equals_the_sum_by_hand():
    probs = np.array([[0.9, 0.1], [0.92, 0.08], [0.6, 0.4], [0.3, 0.7]])
    targets = np.array([0, 1, 0, 0])
    # 15 bins: 0.9 and 0.92 share [13/15, 14/15); 0.6 and 0.7 are alone. |1 - 1.82| + |1 - 0.6| + |0 - 0.7|, over 4
    assert expected_calibration_error(probs, targets) == pytest.approx((0.82 + 0.4 + 0.7) / 4)


@pytest.mark.parametrize("num_images", [100, 1000])
def test_the_error_by_chance_is_the_mean_error_of_calibrated_confidences(num_images):
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, (500, num_images))
    binned = [reliability(row, generator.random(num_images) < row) for row in confidence]
    by_chance = np.mean([each.error_by_chance for each in binned])
    assert np.mean([each.error for each in binned]) == pytest.approx(by_chance, rel=0.05)


def test_a_confidence_of_exactly_one_is_in_the_last_bin():
    probs, targets = np.array([[1.0, 0.0], [0.95, 0.05]]), np.array([1, 0])
    # Both in (14/15, 1]: one right, 1.95 claimed.
    assert expected_calibration_error(probs, targets) == pytest.approx(0.95 / 2)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_bins_and_error_equal_a_loop_over_the_bins_as_published(sharpness):
    probs = softmax(LOGITS * sharpness)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == TARGETS
    binned = reliability(confidence, right)
    error = 0.0
    for index, (low, high) in enumerate(zip(binned.edges[:-1], binned.edges[1:], strict=True)):
        inside = (confidence > low) & (confidence <= high)
        assert binned.num_images[index] == inside.sum()
        if inside.any():
            assert binned.num_correct[index] == right[inside].sum()
            assert binned.confidence[index] == pytest.approx(confidence[inside].mean())
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        else:
            assert np.isnan(binned.confidence[index])
    assert binned.error == pytest.approx(error)
    assert len(binned.num_images) == 15
    assert binned.num_images.sum() == 2000


def test_an_unknown_confidence_makes_the_error_unknown_without_a_warning():
    binned = reliability(np.array([np.nan, 0.5]), np.array([False, True]))
    assert np.isnan(binned.error)
    assert binned.num_images.sum() == 1


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 5.0, 40.0])
def test_the_temperature_is_where_the_loss_is_least(sharpness):
    logits = LOGITS * sharpness
    best = minimize_scalar(
        lambda log_t: cross_entropy(logits / np.exp(log_t), TARGETS), bounds=(-5, 5), method="bounded"
    )
    assert fit_temperature(logits, TARGETS) == pytest.approx(np.exp(best.x), rel=1e-4)


def test_the_temperature_of_sharpened_logits_is_sharper_by_as_much():
    assert fit_temperature(LOGITS * 8, TARGETS) == pytest.approx(8 * fit_temperature(LOGITS, TARGETS), rel=1e-6)


@pytest.mark.parametrize("sharpness", [0.4, 4.0])  # as label smoothing and as overfitting leave them
def test_temperature_lowers_the_error_and_changes_no_prediction(sharpness):
    val_logits, val_targets = made_predictions(10, 2000, seed=1, skill=2, sharpness=1)
    temperature = fit_temperature(val_logits * sharpness, val_targets)
    before, after = LOGITS * sharpness, LOGITS * sharpness / temperature
    assert (
        expected_calibration_error(softmax(after), TARGETS) < expected_calibration_error(softmax(before), TARGETS) / 2
    )
    assert (after.argmax(1) == before.argmax(1)).all()


def test_where_no_temperature_is_best_there_is_none():
    assert fit_temperature(np.eye(3, dtype=np.float32), np.arange(3)) is None  # all right: the surer the better
    assert fit_temperature(-np.eye(3, dtype=np.float32), np.arange(3)) is None  # worse than chance
    assert fit_temperature(np.zeros((4, 3), dtype=np.float32), np.zeros(4, dtype=np.int64)) is None
    assert fit_temperature(np.full((2, 3), np.nan, dtype=np.float32), np.zeros(2, dtype=np.int64)) is None
    assert fit_temperature(LOGITS[:0], TARGETS[:0]) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_why_there_is_no_temperature(bad):
    logits = LOGITS.copy()
    assert temperature_of(Predictions(logits, TARGETS, np.arange(len(TARGETS)), tuple("abcdefghij")))[0] is not None
    logits[0, 0] = bad
    temperature, why_none = temperature_of(Predictions(logits, TARGETS, np.arange(len(TARGETS)), tuple("abcdefghij")))
    assert temperature is None
    assert "infinite" in why_none


def test_the_loss_of_perfect_predictions_is_zero_and_has_no_sign():
    assert str(cross_entropy(100 * np.eye(3, dtype=np.float32), np.arange(3))) == "0.0"
