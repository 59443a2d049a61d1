"""WhiteningStem: whitens SpeedNet's stem from training images and trains it for a fraction of the steps."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import nn

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError
from cifar_lightning.models.speednet import WhiteningConv, num_whitening_images
from cifar_lightning.training.trainer_data import training_data


class WhiteningStem(pl.Callback):
    """Sets the stem's filters from the data, and stops training the stem after its fraction of the steps."""

    def __init__(self, stem: WhiteningConv, end: Callable[[], int]) -> None:
        self.stem, self.end = stem, end
        self._end = 0
        self._frozen: list[nn.Parameter] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Whiten the filters, unless they were loaded."""
        whiten(self.stem, training_data(trainer))
        self._end = self.end()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Freeze the stem when its steps are over.

        Without its gradient a step has 4 % less arithmetic. DDP waits for every gradient, so with DDP it is computed.
        """
        if self._frozen is not None or trainer.global_step < self._end:
            return
        self._frozen = [parameter for parameter in self.stem.parameters() if parameter.requires_grad]
        if trainer.model is pl_module:
            self.stem.requires_grad_(False)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Drop the gradients of a frozen stem, so that the optimizer skips it."""
        for parameter in self._frozen or ():
            parameter.grad = None

    def on_train_end(self, *args: Any) -> None:
        """Unfreeze the stem for a later training."""
        for parameter in self._frozen or ():
            parameter.requires_grad_(True)
        self._frozen = None

    def on_exception(self, *args: Any) -> None:
        self.on_train_end()


def whitening_stem_of(model: nn.Module) -> WhiteningConv | None:
    """Return the whitening stem of a model, None if it has none."""
    stem = getattr(model, "stem", None)
    return stem if isinstance(stem, WhiteningConv) else None


def whiten(stem: WhiteningConv, data: ImageDataModule | None) -> None:
    """Set a stem's filters from training images, unless they have been set.

    Raises:
        UserError: There is no `ImageDataModule` to take images from.
    """
    if stem.is_whitened:
        return
    if data is None:
        raise UserError("speednet: call model.stem.whiten(images) before `fit`, with normalized images.")
    images = data.sample_of_training(num_whitening_images(data.image_size))
    stem.whiten(images.to(stem.weight.device))
