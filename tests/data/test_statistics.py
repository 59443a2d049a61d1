"""Channel statistics and class balance of the training split."""

import tracemalloc

import numpy as np
import torch

from cifar_lightning.data.statistics import balanced_weights, channel_statistics, describe_imbalance


def test_statistics_are_those_of_the_chosen_images_alone():
    images = np.random.default_rng(0).integers(0, 256, (9000, 4, 4, 3), np.uint8)
    chosen = np.arange(0, 9000, 2)
    mean, std = channel_statistics(images, chosen)
    pixels = images[chosen].reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)


def test_statistics_of_large_images_take_as_little_memory_as_those_of_small_ones():
    images = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)
    tracemalloc.start()
    mean, std = channel_statistics(images, np.arange(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1024 * 32 * 32 * 3 * 8
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 1, 2)) / 255, rtol=1e-9)


def test_weights_let_every_class_count_the_same_and_are_1_where_they_do():
    counts = torch.tensor([300, 70, 25, 5])
    weighted = counts * torch.tensor(balanced_weights(counts))
    torch.testing.assert_close(weighted, torch.full((4,), 100.0), check_dtype=False)
    assert balanced_weights(torch.tensor([7, 7])) == [1.0, 1.0]


def test_imbalance_is_mentioned_from_one_and_a_half_times_on():
    assert describe_imbalance(torch.tensor([140, 100]), ("cat", "dog")) is None
    sentence = describe_imbalance(torch.tensor([3000, 20]), ("cat", "dog"))
    assert sentence == "Uneven classes: cat has 3,000 training images, dog 20"
