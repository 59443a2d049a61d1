"""LastCheckpoint: saves last.ckpt, and stops a run at a signal."""

import time
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import Field

from cifar_lightning.checkpoints.loading import is_inside_epoch
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.limits import Count, check_settings
from cifar_lightning.training.ending import has_all_steps, is_cut, is_ending, is_validation_due
from cifar_lightning.training.lightning_patches import mark_validation_interrupted, start_validation_again
from cifar_lightning.training.run_recorder import EPOCH_SO_FAR, RunRecorder
from cifar_lightning.training.signals import Stopped, StopSignals
from cifar_lightning.training.trainer_callbacks import callbacks_of

_MINUTES_ARE_UP = 0.5  # below every signal's number, so that the maximum over ranks is the request that counts


class CheckpointSchedule:
    """When last.ckpt is saved, in addition to the end of each epoch.

    Args:
        every_n_train_steps: Also save last.ckpt every this many optimizer steps.
        every_n_minutes: Also save last.ckpt every this many minutes.
    """

    def __init__(
        self,
        every_n_train_steps: Count | None = None,
        every_n_minutes: Annotated[
            float, Field(gt=0, allow_inf_nan=False, description="a positive number of minutes, such as 10")
        ]
        | None = None,
    ) -> None:
        check_settings("checkpoint", CheckpointSchedule.__init__, locals())
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt at the end of each epoch, on schedule, and when a signal asks the run to stop.

    Lightning's ModelCheckpoint with `save_last=True` saves "last" only with a new best. A checkpoint between a batch
    and its validation makes the resumed run skip the validation (Lightning 2.6.6), so it is saved after the validation;
    inside a validation it is saved so that the validation is run again from its start.

    Once `max_steps` are trained, it is saved after the epoch's row, and a signal waits for that: a resumed run would
    find nothing left to train, and never write the row.
    """

    def __init__(self, run: RunFolder, schedule: CheckpointSchedule, signals: StopSignals) -> None:
        self.run, self.schedule, self.signals = run, schedule, signals
        self._saved_at_step, self._saved_at_s = 0, 0.0
        self._is_validating = False
        self._is_writing = False
        self._is_due = False  # at the end of the next validation
        self._is_stop_due = False  # at the end of the accumulation window

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Defer signals to the next batch boundary."""
        start_validation_again(trainer)
        self._note_saved(trainer)
        self.signals.defer()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop deferring signals; stop at one that came after the end of the last epoch."""
        self.signals.release()
        self._stop(trainer, highest_of_ranks(trainer, self.signals.signum))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save if it is due or training ends inside an epoch; stop at a signal."""
        self._hold_stop(trainer)
        if has_all_steps(trainer):
            return
        request = highest_of_ranks(trainer, self.signals.signum or self._minutes_are_up())
        if not (request or self._steps_are_up(trainer) or is_ending(trainer)):
            return
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop._num_ready_batches_reached():
            return  # gradients are in no checkpoint, and the end of the epoch follows
        if is_validation_due(trainer):
            self._is_due = True
            return
        self._save(trainer)
        self._stop(trainer, request)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save and stop inside a validation at a signal."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if has_all_steps(trainer):
            return
        request = highest_of_ranks(trainer, self.signals.signum)
        if request:
            self._is_validating = True
            self._save(trainer)
        self._stop(trainer, request)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was due before a validation inside an epoch, or if it ends training there."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._hold_stop(trainer)
        is_new_end = is_ending(trainer) and is_cut(trainer) and self._saved_at_step != trainer.global_step
        if self._is_due or (is_new_end and not has_all_steps(trainer)):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the epoch's row and the best checkpoint; stop at a signal.

        A cut epoch was saved after its last batch, to be resumed inside it, unless `max_steps` cut it or the module's
        own hook set `should_stop` after that.
        """
        loop = trainer.fit_loop
        if not is_cut(trainer):
            self._save(trainer)
        elif self._saved_at_step != trainer.global_step and not loop.epoch_loop._should_accumulate():
            for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
                progress.processed -= 1  # type: ignore[attr-defined]  # typed as its base
            self._save(trainer)
            for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
                progress.processed += 1  # type: ignore[attr-defined]  # typed as its base
        self._stop(trainer, highest_of_ranks(trainer, self.signals.signum))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark an interrupted validation to be run again, since its metrics are not saved.

        Inside an epoch last.ckpt also has the epoch's clock. best.ckpt, and last.ckpt at the end of an epoch, are equal
        in equal runs.
        """
        if self._is_writing and is_inside_epoch(checkpoint):
            for recorder in callbacks_of(trainer, RunRecorder):
                checkpoint[EPOCH_SO_FAR]["clock"] = recorder.clock()
        if self._is_validating:
            mark_validation_interrupted(checkpoint)

    def _hold_stop(self, trainer: pl.Trainer) -> None:
        """Defer a stop inside an accumulation window to its end: no checkpoint has the gradients."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self._is_stop_due |= trainer.should_stop
            trainer.should_stop = False
        elif self._is_stop_due:
            self._is_stop_due, trainer.should_stop = False, True

    def _steps_are_up(self, trainer: pl.Trainer) -> bool:
        every = self.schedule.every_n_train_steps
        return every is not None and trainer.global_step % every == 0 and trainer.global_step != self._saved_at_step

    def _minutes_are_up(self) -> float:
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
    def _stop(trainer: pl.Trainer, request: float) -> None:
        if request > _MINUTES_ARE_UP:
            raise Stopped(int(request), is_reporting=trainer.is_global_zero)


def highest_of_ranks(trainer: pl.Trainer, value: float) -> float:
    """Return the maximum over all ranks; every rank must call it.

    Several processes wait for each other, as they do in Lightning's own broadcast in each step. The strategy's reduce
    would add a barrier, for which a host waits on its GPU.
    """
    if trainer.world_size == 1:
        return value
    highest = torch.full((), float(value), device=trainer.strategy.root_device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return float(highest)
