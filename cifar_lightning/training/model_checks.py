"""Whether a network and its data agree: classes, the form of the answers, batches of one image."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from cifar_lightning.errors import UserError
from cifar_lightning.models.stems import needs_several, why_not
from cifar_lightning.training.step_count import takes_last_batch


def check_logits(logits: Any, num_images: int, num_classes: int) -> None:
    """Refuse what is not raw logits, (images, classes); shapes alone are read, which waits for no device.

    Raises:
        UserError: Says what the network gives instead.
    """
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network gives a {type(logits).__name__} and not a tensor of raw logits; "
            "wrap it in an nn.Module whose forward returns them alone."
        )
    if logits.shape == (num_images, num_classes):
        return
    if logits.ndim == 2 and len(logits) == num_images:
        raise UserError(
            f"the network gives {logits.shape[1]} logits an image, and there are {num_classes} classes; "
            "its outputs and num_classes=... must both be the data's number of classes."
        )
    raise UserError(
        f"the network gives {tuple(logits.shape)} for {num_images} images of {num_classes} classes, and not "
        f"raw logits ({num_images}, {num_classes}); its last layer must give one number a class for each image."
    )


def check_classes(trainer: pl.Trainer, num_classes: int) -> None:
    """Refuse data of other classes than a network is trained for.

    Raises:
        UserError: Says how many there are.
    """
    of_data = getattr(getattr(trainer, "datamodule", None), "num_classes", num_classes)
    if of_data != num_classes:
        raise UserError(
            f"num_classes {num_classes}: the data has {of_data} classes; give ImageClassifier(num_classes={of_data})."
        )


def check_batches(trainer: pl.Trainer, model: nn.Module) -> None:
    """Refuse before the first step a batch of one image that a network's BatchNorm cannot take.

    Args:
        trainer: Attached to its data, which has been set up; of other data than an `ImageDataModule` nothing is known.
        model: Takes images (batch, 3, height, width).

    Raises:
        UserError: Names what mends it.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "num_train_batches"):
        return
    size, num_ranks = data.batch_size, trainer.world_size
    batches, num_images = data.num_train_batches(num_ranks), data.num_images("train")
    in_last = num_images - (batches - 1) * size * num_ranks
    is_single = size == 1 or (in_last < 2 * num_ranks and takes_last_batch(trainer, batches))
    if not is_single or not needs_several(model, min(data.train_sizes)):
        return
    if size == 1:
        raise UserError("--batch_size 1: this network's BatchNorm cannot be trained with one image; give 2 or more.")
    dealt = f", dealt to {num_ranks} processes" if num_ranks > 1 else ""
    raise UserError(
        f"--batch_size {size}: of {num_images:,} training images the last batch has {in_last}{dealt}, and this "
        "network's BatchNorm cannot be trained with one image; give --data.drop_last true, or another --batch_size."
    )


def check_sizes(model: nn.Module, train_sizes: Sequence[int]) -> None:
    """Refuse images of an epoch that the network does not take.

    Args:
        model: Takes square images.
        train_sizes: Their sides in pixels, epoch by epoch; the last is the one that the network was made for.

    Raises:
        UserError: Names the size and the reason.
    """
    for size in sorted({*train_sizes} - {train_sizes[-1]}):
        reason = why_not(model, size)
        if reason:
            raise UserError(f"--data.train_sizes {list(train_sizes)}: the network takes no {size} ({reason}).")


def check_monitors(callbacks: Sequence[pl.Callback], validates: bool) -> None:
    """Refuse callbacks that wait for a figure of the validation where there is none, before anything is trained.

    Raises:
        UserError: Names the callback and what it watches.
    """
    for callback in callbacks:
        monitor = str(getattr(callback, "monitor", None))
        if monitor.startswith("val/") and not validates:
            raise UserError(
                f"--trainer.callbacks {type(callback).__name__}: watches {monitor}, but nothing is validated.\n"
                "Hold images out (--data.val_fraction 0.1, --trainer.limit_val_batches above 0), or leave it out."
            )
