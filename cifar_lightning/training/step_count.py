"""The number of optimizer steps of a run, which its schedule needs before the first step."""

import math
from collections.abc import Mapping

import lightning.pytorch as pl

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.image_set import Split
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import counted
from cifar_lightning.training.lightning_patches import set_up_loaders_again
from cifar_lightning.training.trainer_data import training_data


def count_steps(trainer: pl.Trainer, epochs_done: int = 0, steps_done: int = 0) -> int:
    """Return the optimizer steps of the whole run, also of a resumed one, computed from lengths alone.

    `trainer.estimated_stepping_batches` sets up the loaders too early and so loses a loader's position on resume
    (Lightning #20550). It is used for plain loaders, which are then set up twice on resume.

    Args:
        trainer: Attached to its data.
        epochs_done: Epochs finished before this `fit`.
        steps_done: Steps taken before it.

    Raises:
        UserError: The run has no end, or no step.
    """
    data = training_data(trainer)
    if data is None:
        total = _steps_of_loaders(trainer, epochs_done, steps_done)
    else:
        batches = _limited(data.num_train_batches(trainer.world_size), trainer.limit_train_batches)
        interval = getattr(trainer, "val_check_interval", None)  # Lightning sets none for a duration
        if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
            raise UserError(
                f"--trainer.val_check_interval {interval}: an epoch has {batches} batches; give fewer, or a fraction "
                "such as 0.5."
            )
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
        per_epoch = -(-batches // trainer.accumulate_grad_batches)
        reached = batches * epochs
        if trainer.max_steps != -1 and per_epoch:
            whole, steps = divmod(trainer.max_steps, per_epoch)
            reached = min(reached, whole * batches + min(steps * trainer.accumulate_grad_batches, batches))
        if isinstance(interval, int) and trainer.limit_val_batches and interval > reached:
            raise UserError(
                f"--trainer.val_check_interval {interval}: the run has {int(reached)} batches; nothing would be "
                "validated."
            )
        every = trainer.check_val_every_n_epoch or 1
        if every > 1 and trainer.limit_val_batches and every <= epochs and not epochs_done and interval is not None:
            first = batches * (every - 1) + (interval if isinstance(interval, int) else max(1, int(batches * interval)))
            if first > reached and data.num_images("val"):
                raise UserError(
                    f"--trainer.check_val_every_n_epoch {every}: the run has {int(reached)} batches, {batches} an "
                    "epoch; nothing would be validated."
                )
        total = steps_done + per_epoch * max(0, epochs - epochs_done)
        if trainer.max_steps != -1:
            total = min(total, trainer.max_steps)
    if total == float("inf"):
        raise UserError("the schedule needs an end: give --epochs N or --trainer.max_steps N.")
    if (trainer.min_steps or 0) > total:
        raise UserError(f"--trainer.min_steps {trainer.min_steps}: the run has {int(total)} steps; give fewer.")
    if total < 1:
        raise UserError(f"{_cause(trainer)}: leaves no step to train; give more, or leave it out.")
    return int(total)


def _steps_of_loaders(trainer: pl.Trainer, epochs_done: int, steps_done: int) -> float:
    """Return what `count_steps` does, of loaders of one's own; infinity of a run without an end."""
    is_early = trainer.train_dataloader is None
    total = trainer.estimated_stepping_batches
    if is_early and trainer.ckpt_path:
        set_up_loaders_again(trainer)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not steps_done or epochs in (None, -1) or math.isinf(batches):
        return total
    # Lightning estimates as if the epochs before had as many batches as these.
    total = steps_done + math.ceil(batches / trainer.accumulate_grad_batches) * max(0, epochs - epochs_done)
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def check_train_batches(trainer: pl.Trainer) -> None:
    """Refuse a `train_dataloader` of one's own with other batches than those the schedule is planned by."""
    data = training_data(trainer)
    if data is None or getattr(type(data), "train_dataloader", None) is ImageDataModule.train_dataloader:
        return
    planned = _limited(data.num_train_batches(trainer.world_size), trainer.limit_train_batches)
    if trainer.num_training_batches not in (planned, math.inf):
        raise UserError(
            f"{type(data).__name__}: train_dataloader gives {trainer.num_training_batches} batches and "
            f"num_train_batches {planned}, by which the schedule is planned; override both."
        )


def check_evaluation(trainer: pl.Trainer, num_batches: Mapping[Split, int]) -> None:
    """Refuse a fraction of the batches of a split that leaves none; Lightning does so only when it evaluates.

    Args:
        trainer: Its limits are checked.
        num_batches: Batches of each split that is evaluated.
    """
    for split, batches in num_batches.items():
        limit = getattr(trainer, f"limit_{split}_batches")
        if batches and limit and not _limited(batches, limit):
            overfits = split == "val" and trainer.overfit_batches  # type: ignore[attr-defined]  # set by a connector
            name = "overfit_batches" if overfits else f"limit_{split}_batches"
            raise UserError(
                f"--trainer.{name} {limit}: leaves no {split} batch of {batches}; give a whole number of batches, 1 or "
                "more, or a larger fraction."
            )


def takes_last_batch(trainer: pl.Trainer, num_batches: int) -> bool:
    """Whether a new run reaches the last batch of an epoch."""
    steps = -(-num_batches // trainer.accumulate_grad_batches)
    is_long_enough = trainer.max_steps == -1 or trainer.max_steps >= steps
    return is_long_enough and _limited(num_batches, trainer.limit_train_batches) == num_batches


def _limited(batches: int, limit: int | float) -> int:
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _cause(trainer: pl.Trainer) -> str:
    """Return the flag that leaves a run without a step, with its value."""
    for flag, value in (("epochs", trainer.max_epochs), ("trainer.max_steps", trainer.max_steps)):
        if value == 0:
            return f"--{flag} 0"
    data = training_data(trainer)
    if data is not None and data.drop_last and not data.num_train_batches(trainer.world_size):
        on = counted(trainer.world_size, "process", "processes")
        return f"--data.drop_last true with --batch_size {data.batch_size} on {on}"
    if trainer.limit_train_batches == 1:
        return "the training loader has no batch, which"
    overfits = trainer.overfit_batches  # type: ignore[attr-defined]  # set by a connector
    name = "overfit_batches" if overfits else "limit_train_batches"
    return f"--trainer.{name} {trainer.limit_train_batches}"


def current_lr(trainer: pl.Trainer) -> float:
    """Return the learning rate of the first group of parameters; NaN of an optimizer without one."""
    lr = trainer.optimizers[0].param_groups[0].get("lr") if trainer.optimizers else None  # None of Adafactor
    return math.nan if lr is None else float(lr)
