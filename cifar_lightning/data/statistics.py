"""Statistics of the training split: mean and std of each channel, weights and balance of the classes."""

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from cifar_lightning.data.memory import give_back_pages
from cifar_lightning.formatting import plural

_CHUNK = 1024  # images of 32x32 summed at a time, 25 MB of float64; fewer of larger ones
_UNEVEN = 1.5  # ratio of the largest to the smallest class from which it is mentioned


def channel_statistics(images: np.ndarray, indices: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, of images scaled to 0-1; images may be memory-mapped."""
    total = np.zeros(images.shape[-1])
    squares = np.zeros(images.shape[-1])
    chunk = max(1, min(_CHUNK, _CHUNK * 32 * 32 // (images.shape[1] * images.shape[2])))
    for start in range(0, len(indices), chunk):
        pixels = images[indices[start : start + chunk]].reshape(-1, images.shape[-1]) / 255.0
        total += pixels.sum(0)
        squares += (pixels**2).sum(0)
        give_back_pages(images)
    return _mean_and_std(total, squares, len(indices) * images.shape[1] * images.shape[2])


def _mean_and_std(total: np.ndarray, squares: np.ndarray, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = total / count
    # At least 1e-3: normalizing a constant channel would divide by 0.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return tuple(mean.tolist()), tuple(std.tolist())


def moments(images: np.ndarray) -> np.ndarray:
    """Return float32 (n, 2, channels): the mean of each image's values, scaled to 0-1, and that of their squares."""
    rows = []
    for image in images:
        pixels = image.reshape(-1, image.shape[-1]) / 255.0
        rows.append([pixels.mean(0), (pixels**2).mean(0)])
    return np.array(rows, np.float32)


def statistics_of_moments(of_images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what `channel_statistics` does, from the `moments` of the images."""
    total, squares = of_images.sum(0, dtype=np.float64)
    return _mean_and_std(total, squares, len(of_images))


def evenly_spaced(num_images: int, num_wanted: int) -> np.ndarray:
    """Return int64 positions of `num_wanted` images (all, if there are fewer), evenly spaced over a split."""
    return np.linspace(0, num_images - 1, min(num_wanted, num_images)).astype(np.int64)


def balanced_weights(counts: Int64[Tensor, " classes"]) -> list[float]:
    """Return the weight of each class in the loss, n / (classes * count): all classes count the same in total.

    A class without images does not count; its weight is 0.
    """
    weight = counts.sum() / (int((counts > 0).sum()) * counts.double())
    weights: list[float] = weight.where(counts > 0, 0).tolist()
    return weights


def describe_imbalance(counts: Int64[Tensor, " classes"], class_names: tuple[str, ...]) -> str | None:
    """Return a sentence about the largest and the smallest class; None if they are nearly even."""
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] < _UNEVEN * counts[least]:
        return None
    return (
        f"Uneven classes: {class_names[most]} has {plural(int(counts[most]), 'training image')}, {class_names[least]} "
        f"{int(counts[least]):,}"
    )
