"""last.ckpt: when it is written, and how a signal ends a run."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from cifar_lightning.checkpoints.loading import is_inside_epoch
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.limits import check_limits
from cifar_lightning.training.run_recorder import EPOCH_SO_FAR, RunRecorder
from cifar_lightning.training.signals import Stopped, StopSignals

_MINUTES_ARE_UP = 1  # below every signal's number, so that the highest of all ranks' wishes is the one that counts


class CheckpointSchedule:
    """When last.ckpt is written beside the end of each epoch.

    Args:
        every_n_train_steps: Also after this many optimiser steps.
        every_n_minutes: Also when this much time has passed since the last one.

    Raises:
        UserError: A value of 0 or below.
    """

    def __init__(self, every_n_train_steps: int | None = None, every_n_minutes: float | None = None) -> None:
        check_limits("checkpoint", every_n_train_steps=every_n_train_steps, every_n_minutes=every_n_minutes)
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt at the end of each epoch, as scheduled, and when a signal asks the run to stop.

    Lightning's ModelCheckpoint is not used for it: with `save_last=True` it saves "last" only beside a new best, and a
    checkpoint of a batch that a validation follows makes the resumed run skip it (Lightning 2.6.6). Such a batch is
    saved after the validation, and inside a validation with the mark that it is to be run from its start.

    Args:
        run: The run's folder.
        schedule: When it is written inside epochs.
        signals: What may ask the run to stop.
    """

    def __init__(self, run: RunFolder, schedule: CheckpointSchedule, signals: StopSignals) -> None:
        self.run, self.schedule, self.signals = run, schedule, signals
        self._saved_at_step, self._saved_at_s = 0, 0.0
        self._is_validating = False
        self._is_writing = False
        self._is_due = False  # at the end of the validation that is next

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a signal waits for the next batch boundary."""
        validation = trainer.fit_loop.epoch_loop.val_loop
        if validation.restarted_mid_evaluation:  # the mark has been seen: it counts from its start
            validation.batch_progress.current.reset()
            validation.batch_progress.total.reset_on_restart()
        self._note_saved(trainer)
        self.signals.defer()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals end the program again, also one that came after the last epoch's end."""
        self.signals.release()
        self._stop(trainer, highest_of_ranks(trainer, self.signals.signum))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write it if that is due; stop where a signal asked for it."""
        wish = highest_of_ranks(trainer, self.signals.signum or self._minutes_are_up())
        if not (wish or self._steps_are_up(trainer)):
            return
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop._num_ready_batches_reached():
            return  # gradients are in no checkpoint, and the end of the epoch follows
        assert trainer.fit_loop._data_fetcher is not None
        if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._is_due = True
            return
        self._save(trainer)
        self._stop(trainer, wish)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop inside a validation where a signal asked for it."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        wish = highest_of_ranks(trainer, self.signals.signum)
        if wish:
            self._is_validating = True
            self._save(trainer)
        self._stop(trainer, wish)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was due before a validation inside an epoch."""
        if self._is_due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it after the epoch's row and the best checkpoint; stop where a signal asked for it."""
        self._save(trainer)
        self._stop(trainer, highest_of_ranks(trainer, self.signals.signum))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark a validation that was cut short as one that has to begin anew: its sums are not kept.

        Inside an epoch last.ckpt also keeps the epoch's clock. best.ckpt, which may be written there, has nothing that
        differs between two equal runs, and neither has last.ckpt at the end of an epoch.
        """
        if self._is_writing and is_inside_epoch(checkpoint):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
                if isinstance(callback, RunRecorder):
                    checkpoint[EPOCH_SO_FAR]["clock"] = callback.clock()
        if self._is_validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            done = {"current": 0, "total": progress["total"]["ready"] - progress["current"]["ready"]}
            for name, count in done.items():  # of this validation, and of all in this epoch
                progress[name] |= {"ready": count + 1, "started": count + 1, "processed": count, "completed": count}

    def _steps_are_up(self, trainer: pl.Trainer) -> bool:
        every = self.schedule.every_n_train_steps
        return every is not None and trainer.global_step % every == 0 and trainer.global_step != self._saved_at_step

    def _minutes_are_up(self) -> int:
        every = self.schedule.every_n_minutes
        return _MINUTES_ARE_UP if every and time.monotonic() - self._saved_at_s >= 60 * every else 0

    def _save(self, trainer: pl.Trainer) -> None:
        self._is_writing = True
        trainer.save_checkpoint(self.run.last_checkpoint)
        self._is_writing = False
        self._note_saved(trainer)

    def _note_saved(self, trainer: pl.Trainer) -> None:
        self._saved_at_step, self._saved_at_s, self._is_due = trainer.global_step, time.monotonic(), False

    @staticmethod
    def _stop(trainer: pl.Trainer, wish: int) -> None:
        if wish > _MINUTES_ARE_UP:
            raise Stopped(wish, is_reporting=trainer.is_global_zero)


def highest_of_ranks(trainer: pl.Trainer, value: int) -> int:
    """Return the highest of all ranks' values; every rank must call it.

    One process answers at once. Several wait for each other, as they do in Lightning's own broadcast in each step.
    """
    if trainer.world_size == 1:
        return value
    own = torch.tensor(value, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(own, reduce_op="max"))
