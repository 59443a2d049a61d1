"""The end of a training, from the state of the Trainer: cause, epochs and steps."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from cifar_lightning.checkpoints.resume import has_stopped
from cifar_lightning.training.trainer_callbacks import callbacks_of


def is_cut(trainer: pl.Trainer) -> bool:
    """Whether the last epoch ended before its last batch."""
    return not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_ending(trainer: pl.Trainer) -> bool:
    """Whether the Trainer trains no further batch, whatever is left of the epoch."""
    if trainer.should_stop:
        return bool(trainer.fit_loop._can_stop_early)
    return has_all_steps(trainer)


def has_all_steps(trainer: pl.Trainer) -> bool:
    """Whether the steps of `max_steps` are trained."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def time_left(trainer: pl.Trainer) -> float:
    """Return the seconds left of `max_time`, negative once it is over; infinity without it."""
    timers_s = (timer.time_remaining() for timer in callbacks_of(trainer, Timer))
    return min((left_s for left_s in timers_s if left_s is not None), default=math.inf)  # None without a duration


def is_time_up(trainer: pl.Trainer) -> bool:
    """Whether the time of `max_time` is over."""
    return time_left(trainer) <= 0


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows this batch."""
    assert trainer.fit_loop._data_fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def describe_ending(trainer: pl.Trainer, planned_steps: int, by: str = "") -> dict[str, Any]:
    """Return what ended a training, after how many whole epochs and which of the planned steps.

    Args:
        trainer: The Trainer, at the end of training or where `by` stopped it.
        planned_steps: Steps of the whole run.
        by: What ended it, if not the Trainer, such as a signal.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    # The loop counts a cut epoch, too, but only once it has come to the hooks of its end.
    is_counted = not by or progress.processed > progress.completed
    epochs = progress.processed - (is_counted and is_cut(trainer))
    return {
        "by": by or _cause(trainer, epochs),
        "epochs": epochs,
        "step": trainer.global_step,
        "planned_steps": planned_steps,
    }


def _cause(trainer: pl.Trainer, epochs: int) -> str:
    if trainer.max_epochs not in (None, -1) and epochs >= int(trainer.max_epochs or 0):
        return "epochs"
    if has_all_steps(trainer):
        return "max_steps"
    if is_time_up(trainer):
        return "max_time"
    if any(has_stopped(callback.state_dict()) for callback in trainer.early_stopping_callbacks):
        return "early_stopping"
    return "should_stop"
