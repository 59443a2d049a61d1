"""The sums of an epoch."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from cifar_lightning.training.train_metrics import TrainMetrics, means_of

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])


def test_means_are_of_all_images_also_of_uneven_batches():
    totals = TrainMetrics(torch.device("cpu"))
    totals.add(torch.tensor(2.0), LOGITS, torch.tensor([0, 2, 0]))
    totals.add(torch.tensor(6.0), LOGITS[:1], torch.tensor([1]))
    assert means_of(totals.stacked()) == {"train/loss": pytest.approx(3.0), "train/acc": pytest.approx(0.5)}
    assert totals.num_trained == 4


def test_of_mixed_images_the_class_of_the_larger_fraction_is_correct():
    totals = TrainMetrics(torch.device("cpu"))
    shares = 0.7 * one_hot(torch.tensor([0, 2, 2]), 3) + 0.3 * one_hot(torch.tensor([1, 1, 1]), 3)
    totals.add(torch.tensor(1.0), LOGITS, shares)
    assert means_of(totals.stacked())["train/acc"] == pytest.approx(2 / 3)


def test_of_no_images_there_is_no_mean():
    means = means_of(TrainMetrics(torch.device("cpu")).stacked())
    assert math.isnan(means["train/loss"])
    assert math.isnan(means["train/acc"])


def test_restored_sums_go_on_and_what_was_trained_before_is_not_counted_as_trained_here():
    before = TrainMetrics(torch.device("cpu"))
    before.add(torch.tensor(2.0), LOGITS, torch.tensor([0, 2, 0]))
    after = TrainMetrics(torch.device("cpu"))
    after.restore(before.state())
    assert (means_of(after.stacked()), after.num_trained) == (means_of(before.stacked()), 0)
    after.add(torch.tensor(2.0), LOGITS, torch.tensor([0, 2, 1]))
    assert (means_of(after.stacked()), after.num_trained) == ({"train/loss": 2.0, "train/acc": pytest.approx(5 / 6)}, 3)
