"""ResumeState: random states and training metrics of every rank in checkpoints, for a bit-identical resume."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn

from cifar_lightning.checkpoints.loading import IS_INSIDE_WINDOW, is_inside_epoch
from cifar_lightning.checkpoints.resume import has_stopped
from cifar_lightning.checkpoints.rng_state import restore_rng, rng_state
from cifar_lightning.checkpoints.schema import LOGGED_METRICS, RESUME_STATE
from cifar_lightning.errors import UserError
from cifar_lightning.training.early_stopping import AnnealingEarlyStopping, forget_earlier_stop, skip_cut_epochs
from cifar_lightning.training.ending import is_time_up
from cifar_lightning.training.lightning_patches import (
    end_resumed_epoch_as_any,
    logged_metrics,
    restore_metrics,
    start_next_epoch,
    step_plateaus,
    validate_on_schedule_only,
)
from cifar_lightning.training.model_checks import TRAIN_METRICS, VAL_METRICS
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.trainer_callbacks import callbacks_of

_PLATEAUS, _STOPS = "plateaus", "stops"
_LOGGED_AGAIN = (*TRAIN_METRICS, *VAL_METRICS)
"""Metrics of ImageClassifier, which are logged again before a schedule or a callback reads them."""


class ResumeState(pl.Callback):
    """Saves random states and the epoch's training metrics of every rank; restores them when training starts."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._stopped: set[str] = set()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the states of all ranks; collective."""
        assert isinstance(pl_module, ImageClassifier)
        own = {"rng": rng_state(trainer.strategy.root_device), "epoch_sums": pl_module.totals.state()}
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        of_others = {name: value for name, value in logged_metrics(trainer).items() if name not in _LOGGED_AGAIN}
        checkpoint[RESUME_STATE] = {"ranks": ranks, LOGGED_METRICS: of_others}
        if trainer.fit_loop.epoch_loop._should_accumulate():
            checkpoint[RESUME_STATE][IS_INSIDE_WINDOW] = True
        if not is_inside_epoch(checkpoint) and (monitored := _due_plateaus(trainer)):
            checkpoint[RESUME_STATE][_PLATEAUS] = monitored
        if trainer.should_stop and not trainer.fit_loop._can_stop_early and not is_time_up(trainer):  # it is held back
            checkpoint[RESUME_STATE][_STOPS] = True
        _drop_timers(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until training starts; validation and test need none.

        Raises:
            UserError: The checkpoint was saved inside an epoch by another number of processes, with other batches.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        _drop_timers(trainer, checkpoint)
        self._stopped = _keep_patience(trainer, checkpoint)
        self._loaded = checkpoint.get(RESUME_STATE)
        if self._loaded is None:
            return
        num_ranks = len(self._loaded["ranks"])
        if is_inside_epoch(checkpoint) and num_ranks != trainer.world_size:
            raise UserError(
                f"--trainer.devices: the checkpoint was saved inside an epoch on {num_ranks} process(es), not on "
                f"{trainer.world_size}.\nResume with as many, at least to the end of the epoch."
            )
        if not is_inside_epoch(checkpoint):
            for rank in self._loaded["ranks"]:
                rank["epoch_sums"] = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the states; nothing may draw random numbers between this and the first batch."""
        assert isinstance(pl_module, ImageClassifier)
        start_next_epoch(trainer)
        restore_metrics(trainer, (self._loaded or {}).get(LOGGED_METRICS, {}))
        step_plateaus(trainer, (self._loaded or {}).get(_PLATEAUS, {}))
        validate_on_schedule_only(trainer)
        skip_cut_epochs(trainer)
        forget_earlier_stop(trainer, self._stopped)
        if (self._loaded or {}).get(_STOPS) and not trainer.fit_loop._can_stop_early:
            trainer.should_stop = True
        if self._loaded is None:
            return
        ranks, self._loaded = self._loaded["ranks"], None
        if trainer.global_rank >= len(ranks):
            # More processes than before, at the start of an epoch: this one keeps the seed that all share, as in a new
            # run, where every process draws the same dropout masks for its own images.
            return
        own = ranks[trainer.global_rank]
        restore_rng(own["rng"], trainer.strategy.root_device)
        if own["epoch_sums"] is not None:
            pl_module.totals.restore(own["epoch_sums"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the schedules of the epoch take their steps."""
        end_resumed_epoch_as_any(trainer)


def _due_plateaus(trainer: pl.Trainer) -> dict[int, float]:
    """Return the metrics that ReduceLROnPlateau schedules wait for at the end of an epoch, by their positions."""
    metrics, epoch = trainer.callback_metrics, trainer.current_epoch + 1
    return {
        index: float(metrics[config.monitor])
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and epoch % config.frequency == 0
        and config.monitor in metrics
    }


def _drop_timers(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Leave out the time that --trainer.max_time has counted: a resumed run has all of it again."""
    for timer in callbacks_of(trainer, Timer):
        checkpoint.get("callbacks", {}).pop(timer.state_key, None)


def _keep_patience(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> set[str]:
    """Have the user's EarlyStopping keep the patience that it was given: Lightning restores the checkpoint's.

    Ours does so by itself, and needs the checkpoint's to know whether the run was stopped.

    Returns:
        The state keys of those that have stopped the run, with the checkpoint's patience.
    """
    states, stopped = checkpoint.get("callbacks", {}), set()
    for callback in trainer.early_stopping_callbacks:
        if not isinstance(callback, AnnealingEarlyStopping) and (state := states.get(callback.state_key)):
            if has_stopped(state):
                stopped.add(callback.state_key)
            state["patience"] = callback.patience
    return stopped
