"""TrainingData: what training asks of a data module."""

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import numpy as np
from jaxtyping import Float
from torch import Tensor

from cifar_lightning.data.datasets import Source
from cifar_lightning.data.image_set import Split
from cifar_lightning.data.loaders import ImageLoader
from cifar_lightning.data.sampler import Rank
from cifar_lightning.errors import UserError


@runtime_checkable
class TrainingData(Protocol):
    """A data module that knows its classes, splits, raw images and batches; `ImageDataModule` is one.

    Everything but `class_names`, `num_classes` and the sizes is known after `setup()`.
    """

    class_names: tuple[str, ...]
    num_classes: int
    image_size: int
    train_sizes: tuple[int, ...]
    batch_size: int
    drop_last: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    source: Source

    @property
    def class_weights(self) -> list[float] | None:
        """Weight of each class in the loss; None without weights."""

    def num_images(self, split: Split, /) -> int:
        """Return the number of images of a split."""

    def num_train_batches(self, num_ranks: int = 1) -> int:
        """Return the number of training batches of an epoch on each of `num_ranks` processes."""

    def images(self, split: Split, positions: np.ndarray, /) -> np.ndarray:
        """Return raw uint8 images (n, height, width, channels) at positions of a split."""

    def image_names(self, split: Split, /) -> np.ndarray:
        """Return the name of each image of a split, str (n,)."""

    def targets(self, split: Split, positions: np.ndarray, /) -> np.ndarray:
        """Return the classes, int64, of the images at positions of a split."""

    def rank_positions(self, split: Split, rank: Rank, /) -> np.ndarray:
        """Return the positions of a split that a rank evaluates, in the order of its loader."""

    def sample_of_training(self, num_images: int) -> Float[Tensor, "images channels height width"]:
        """Return normalized training images, evenly spaced, on the CPU."""

    def use_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalize images with this mean and std of each channel."""

    def split_summary(self) -> dict[str, Any]:
        """Return the split as plain types, for split.json."""

    def describe_classes(self) -> list[str]:
        """Return the classes in one or two lines."""


def channels_of(data: TrainingData) -> int:
    """Return the number of channels of the images, which is known after `setup()`."""
    return len(data.mean or ()) or 3


def training_data(trainer: pl.Trainer) -> TrainingData | None:
    """Return the Trainer's data module if it is a `TrainingData`, None for plain loaders and other data modules."""
    data = getattr(trainer, "datamodule", None)  # Lightning sets it only where one is given
    hooks = getattr(getattr(trainer, "_data_connector", None), "_datahook_selector", None)
    if hooks is not None and hooks.datamodule is None:  # and keeps that of an earlier fit next to the loaders given now
        return None
    return data if isinstance(data, TrainingData) else None


def repeat_if_overfitting(trainer: pl.Trainer) -> None:
    """Have one of our loaders repeat the order of its first epoch for `overfit_batches`, and only for it."""
    loader = trainer.train_dataloader
    if isinstance(loader, ImageLoader):
        loader.sampler.repeats = trainer.overfit_batches > 0  # type: ignore[attr-defined]  # by a connector


def require_training_data(trainer: pl.Trainer) -> TrainingData:
    """Return the Trainer's `TrainingData`, or raise."""
    data = training_data(trainer)
    if data is None:
        raise UserError("this callback needs trainer.fit(model, datamodule=ImageDataModule(...)).")
    return data
