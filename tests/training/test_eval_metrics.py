"""The metrics of a stage against plain arithmetic over all images at once."""

import math

import pytest
import torch
import torch.nn.functional as F

from cifar_lightning.training.eval_metrics import evaluation_metrics, update_evaluation


def test_uneven_batches_count_image_by_image():
    torch.manual_seed(0)
    logits, plain, targets = torch.randn(50, 4), torch.randn(50, 4), torch.randint(0, 4, (50,))
    metrics = evaluation_metrics(4)
    for part in (slice(0, 32), slice(32, 47), slice(47, 50)):
        update_evaluation(metrics, logits[part], plain[part], targets[part], F.cross_entropy)
    values = metrics.compute()
    assert values["loss"].item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
    assert values["acc_no_tta"].item() == pytest.approx((plain.argmax(1) == targets).float().mean().item(), abs=1e-6)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for target, pred in zip(targets, logits.argmax(1), strict=True):
        expected[target, pred] += 1
    assert torch.equal(values["confusion"], expected)


def test_a_batch_whose_loss_is_nan_makes_the_loss_of_the_stage_nan():
    logits, targets, metrics = torch.randn(6, 4), torch.randint(0, 4, (6,)), evaluation_metrics(4)
    for part in (logits[:4], logits[4:] * math.nan):
        update_evaluation(metrics, part, part, targets[: len(part)], F.cross_entropy)
    assert math.isnan(metrics.compute()["loss"])
