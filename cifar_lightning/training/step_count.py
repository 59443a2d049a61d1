"""How many optimiser steps a run has, which its schedule must know before the first one."""

from typing import Any

import lightning.pytorch as pl

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import counted


def count_steps(trainer: pl.Trainer, epochs_done: int = 0, steps_done: int = 0) -> int:
    """Return the optimiser steps of the whole run, computed from lengths alone.

    Not `trainer.estimated_stepping_batches`: it sets up the loaders too early and so loses a loader's position on
    resume (Lightning #20550). With loaders other than ours, which have no position, there is nothing to lose.

    Args:
        trainer: Attached to its data.
        epochs_done: Finished before this process.
        steps_done: Taken in them.

    Raises:
        UserError: The run has no end, or no step.
    """
    count_batches = getattr(getattr(trainer, "datamodule", None), "num_train_batches", None)
    if count_batches is None:
        total = trainer.estimated_stepping_batches
    else:
        batches = _limited(count_batches(trainer.world_size), trainer.limit_train_batches)
        interval = trainer.val_check_interval
        if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
            raise UserError(
                f"--trainer.val_check_interval {interval}: an epoch has {batches} batches; give fewer, or a share such "
                "as 0.5."
            )
        per_epoch = -(-batches // trainer.accumulate_grad_batches)
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
        total = steps_done + per_epoch * max(0, epochs - epochs_done)
        if trainer.max_steps != -1:
            total = min(total, trainer.max_steps)
    if total == float("inf"):
        raise UserError("the schedule needs an end: give --epochs N or --trainer.max_steps N.")
    if total < 1:
        raise UserError(f"{_cause(trainer)}: leaves no step to train; give more, or leave it out.")
    return int(total)


def _limited(batches: int, limit: int | float) -> int:
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _cause(trainer: pl.Trainer) -> str:
    """Return the flag for which a run has no step, with its value."""
    for flag, value in (("epochs", trainer.max_epochs), ("trainer.max_steps", trainer.max_steps)):
        if value == 0:
            return f"--{flag} 0"
    data: Any = getattr(trainer, "datamodule", None)
    if getattr(data, "drop_last", False) and not data.num_train_batches(trainer.world_size):
        on = counted(trainer.world_size, "process", "processes")
        return f"--data.drop_last true beside --batch_size {data.batch_size} on {on}"
    if trainer.limit_train_batches == 1:
        return "the training loader has no batch, which"
    return f"--trainer.limit_train_batches {trainer.limit_train_batches}"


def takes_last_batch(trainer: pl.Trainer, num_batches: int) -> bool:
    """Whether an epoch goes to its last batch, in a run that begins anew."""
    steps = -(-num_batches // trainer.accumulate_grad_batches)
    is_long_enough = trainer.max_steps == -1 or trainer.max_steps >= steps
    return is_long_enough and _limited(num_batches, trainer.limit_train_batches) == num_batches
