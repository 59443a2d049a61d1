"""AnnealingEarlyStopping: early stopping that waits for the learning rate to fall."""

import math
from collections.abc import Collection
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from pydantic import Field

from cifar_lightning.checkpoints.resume import has_stopped
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.settings.limits import check_settings
from cifar_lightning.training.ending import is_cut, is_validation_due
from cifar_lightning.training.model_checks import TRAIN_METRICS, VAL_METRICS
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.run_recorder import MONITOR

_LOWER_IS_BETTER = {"loss", "ece"}


class AnnealingEarlyStopping(EarlyStopping):
    """Stops a run when a metric no longer improves after the peak of the learning rate.

    With OneCycle accuracy improves most while the learning rate falls. Validations before the peak are not counted, and
    the patience is at least a third of the epochs, however often an epoch is validated.

    Args:
        patience: Validations without improvement after the peak of the learning rate; at least a third of the epochs.
        min_delta: Smallest change of the metric that counts as an improvement.
        monitor: Metric of a validation; best.ckpt stays that of the best val/acc.
        mode: max or min, whichever is better; by default min for val/loss and val/ece, else max.

    Raises:
        UserError: A value outside its range, or a mode that contradicts the metric.
    """

    def __init__(
        self,
        patience: Annotated[int, Field(ge=0, description="0 or more validations, such as 10")] = 10,
        min_delta: Annotated[
            float,
            Field(ge=0, lt=1, allow_inf_nan=False, description="0 (any gain counts) to below 1, such as 0.001"),
        ] = 0.0,
        monitor: str = MONITOR,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        check_settings("early_stopping", AnnealingEarlyStopping.__init__, locals())
        better = "min" if monitor.rpartition("/")[2] in _LOWER_IS_BETTER else "max"
        if mode not in (None, better) and monitor in VAL_METRICS:
            raise UserError(f"--early_stopping.mode {mode}: {monitor} is better at its {better}; leave it out.")
        super().__init__(monitor=monitor, mode=mode or better, patience=patience, min_delta=min_delta)
        self._has_stopped = False  # before the resume

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check after each validation where a number of batches is between two; Lightning takes 1 for 1.0, an epoch."""
        super().setup(trainer, pl_module, stage)
        if isinstance(getattr(trainer, "val_check_interval", None), int):  # which Lightning does not set for a duration
            self._check_on_train_epoch_end = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the count, with this run's patience."""
        super().load_state_dict({**state_dict, "patience": self.patience})
        self._has_stopped = has_stopped(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise the patience to a third of the epochs; count again in a run that was stopped.

        Such a run is resumed only with changed settings, and would otherwise be stopped after an epoch. One that
        `min_epochs` or `min_steps` still keeps from its stop stops there.
        """
        assert isinstance(pl_module, ImageClassifier)
        interval, batches, epochs = trainer.val_check_interval, trainer.num_training_batches, trainer.max_epochs
        if not epochs or epochs < 0 or (isinstance(interval, int) and math.isinf(batches)):
            total, window = pl_module.total_steps(), trainer.accumulate_grad_batches
            batches = min(batches, total * window)  # a loader without a length is read once
            epochs = math.ceil(total / math.ceil(batches / window))
        per_epoch = 1 / (trainer.check_val_every_n_epoch or 1)
        per_epoch /= interval if isinstance(interval, float) else interval / batches
        self.patience = max(self.patience, math.ceil(epochs * per_epoch / 3))
        if self._has_stopped and trainer.fit_loop._can_stop_early:
            self.wait_count = self.stopped_epoch = 0
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        elif self._has_stopped:
            trainer.should_stop = True
        self._has_stopped = False

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, ImageClassifier)
        # A limit may cut an epoch, the first one too, before it was validated.
        if is_cut(trainer) and not is_validation_due(trainer):
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics and MONITOR in metrics:
            logged = ", ".join(name for name in metrics if name.startswith("val/"))
            raise UserError(f"--early_stopping.monitor {clipped(self.monitor)}: not logged; one of {logged}.")
        if trainer.global_step >= module.peak_step() and self.monitor in metrics:
            super()._run_early_stopping_check(trainer)


def skip_cut_epochs(trainer: pl.Trainer) -> None:
    """Have the user's EarlyStopping callbacks skip what is cut before its validation, as AnnealingEarlyStopping does.

    Lightning 2.6.6 checks them at the end of every epoch: in a cut one a validation metric is missing, which ends the
    run, or of the epoch before, and a training metric is of a part of the epoch, which a resume checks again.
    """
    for callback in trainer.early_stopping_callbacks:
        if not isinstance(callback, AnnealingEarlyStopping):
            _skip_cut_epochs(callback)


def forget_earlier_stop(trainer: pl.Trainer, stopped: Collection[str]) -> None:
    """Have the user's EarlyStopping callbacks not count as having stopped a run that is resumed after their stop.

    It is resumed with changed settings, and counts again. A stop that `min_epochs` or `min_steps` hold back is kept.

    `stopped` are the state keys of those that had stopped it.
    """
    for callback in trainer.early_stopping_callbacks:
        if trainer.fit_loop._can_stop_early and callback.state_key in stopped:
            callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            if has_stopped(callback.state_dict()):
                callback.wait_count = 0


def _skip_cut_epochs(callback: EarlyStopping) -> None:
    check = callback._run_early_stopping_check

    def checked(trainer: pl.Trainer) -> None:
        is_known = not is_cut(trainer) or (callback.monitor not in TRAIN_METRICS and is_validation_due(trainer))
        if is_known:
            check(trainer)

    callback._run_early_stopping_check = checked  # type: ignore[method-assign]  # Lightning has no hook for it
