"""The data module of a Trainer, where it is an ImageDataModule."""

import lightning.pytorch as pl

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.loaders import ImageLoader


def training_data(trainer: pl.Trainer) -> ImageDataModule | None:
    """Return the Trainer's data module if it is an `ImageDataModule`, None for plain loaders and other data modules."""
    data = getattr(trainer, "datamodule", None)  # Lightning sets it only where one is given
    hooks = getattr(getattr(trainer, "_data_connector", None), "_datahook_selector", None)
    if hooks is not None and hooks.datamodule is None:  # and keeps that of an earlier fit next to the loaders given now
        return None
    return data if isinstance(data, ImageDataModule) else None


def repeat_if_overfitting(trainer: pl.Trainer) -> None:
    """Have one of our loaders repeat the order of its first epoch for `overfit_batches`, and only for it."""
    loader = trainer.train_dataloader
    if isinstance(loader, ImageLoader):
        loader.sampler.repeats = trainer.overfit_batches > 0  # type: ignore[attr-defined]  # set by a connector
