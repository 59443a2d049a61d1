"""Patches of Lightning, each with its reason and, for speed, its measured gain (benchmarks/LOG.md)."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.profilers import PassThroughProfiler

_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class NoProfiler(PassThroughProfiler):
    """A profiler that does nothing in 0.5 us; Lightning's takes 2.4 us, at each of the fifty hooks of a step."""

    _NOTHING = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self._NOTHING


class PlainHookNames(pl.LightningModule):
    """A module that stores the name of the running hook directly.

    Lightning sets `_current_fx_name` some fifty times a step, each time through nn.Module's `__setattr__`, which checks
    for parameters and modules. With `check_cuda_once` it brings what `fit` adds to a step over a hand-written loop from
    0.49 to 0.20 of what plain Lightning adds.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


def skip_idle_hooks(callbacks: Sequence[pl.Callback]) -> None:
    """Set the hooks of a step that a callback does not implement to None, which Lightning skips.

    It calls six hooks a step of every callback, but skips what is not callable. With this, `fit` adds 0.80 to 0.90 of
    what barebones adds to a step, without it 1.08.
    """
    for callback in callbacks:
        for name in _STEP_HOOKS:
            if name not in vars(callback) and getattr(type(callback), name) is getattr(pl.Callback, name):
                setattr(callback, name, None)


def check_cuda_once() -> None:
    """Have torch look for CUDA once, where there is none.

    Importing Lightning sets PYTORCH_NVML_BASED_CUDA_CHECK=1, with which torch looks for the driver's library each time
    it is asked, and torch's optimizers ask in every step: 0.1 ms of each step on a machine without a GPU.
    """
    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def use_double(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Make the weights double in 64-true before a checkpoint is loaded into them.

    Lightning 2.6.6 does so afterwards, when they are rounded to float32.
    """
    if trainer.precision == "64-true":
        module.double()


def set_up_loaders_again(trainer: pl.Trainer) -> None:
    """Have `fit` set up the training loaders again, after a checkpoint is loaded, though they have been counted.

    Lightning 2.6.6 otherwise loads no position into loaders that were set up before (Lightning #20550).
    """
    trainer.fit_loop._combined_loader = None


def mark_validation_interrupted(checkpoint: dict[str, Any]) -> None:
    """Have a run resumed from a checkpoint that was saved inside a validation run the validation again.

    Lightning 2.6.6 would skip it, or resume it in its middle without the metrics of its first batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = {"current": 0, "total": progress["total"]["ready"] - progress["current"]["ready"]}
    for name, count in done.items():  # batches of this validation, and of all validations in this epoch
        progress[name] |= {"ready": count + 1, "started": count + 1, "processed": count, "completed": count}


def start_next_epoch(trainer: pl.Trainer) -> None:
    """Have a run that is resumed at the end of an epoch start the next one.

    With `max_steps` Lightning 2.6.6 treats it as inside an epoch, and ends an epoch without a batch (Lightning #19617).
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # the setter of fit_loop turns it on again
        loop.reset()
        loop.epoch_progress.current.completed = loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # typed as its base


def logged_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the metrics that callbacks and schedules have seen, on the CPU; none is computed for this."""
    metrics = trainer._logger_connector._callback_metrics  # a user's callback may have put a plain number there
    return {name: value.cpu() for name, value in metrics.items() if isinstance(value, torch.Tensor)}


def restore_metrics(trainer: pl.Trainer, metrics: Mapping[str, Any]) -> None:
    """Have callbacks and schedules find these metrics before they are logged again; Lightning 2.6.6 saves none."""
    trainer._logger_connector._callback_metrics.update(metrics)


def step_plateaus(trainer: pl.Trainer, metrics: Mapping[int, float]) -> None:
    """Step the ReduceLROnPlateau schedules at these positions with the metrics of the epoch that a checkpoint ended.

    Lightning 2.6.6 steps them after the checkpoints of the epoch are saved, and a resumed run never would.
    """
    progress = trainer.fit_loop.epoch_loop.scheduler_progress
    for index, metric in metrics.items():
        progress.increment_ready()
        trainer.lightning_module.lr_scheduler_step(trainer.lr_scheduler_configs[index].scheduler, metric)
        progress.increment_completed()


def step_plateaus_after_validations(trainer: pl.Trainer) -> None:
    """Have the ReduceLROnPlateau schedules of a validation metric take a step in the epochs that validate.

    With `check_val_every_n_epoch` Lightning 2.6.6 steps them in every epoch: it fails where there was no validation
    yet, and takes the metric of an earlier epoch after that.
    """
    every = trainer.check_val_every_n_epoch or 1
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.interval == "epoch" and str(config.monitor).startswith("val/"):
            config.frequency = math.lcm(config.frequency, every)


def end_resumed_epoch_as_any(trainer: pl.Trainer) -> None:
    """Have a run that was resumed inside an epoch step its ReduceLROnPlateau schedules at the end of that epoch.

    Lightning 2.6.6 leaves them out while its loop still counts as restarting, to the end of that epoch.
    """
    _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined]  # without the setter of fit_loop


def validate_on_schedule_only(trainer: pl.Trainer) -> None:
    """Have no validation where `should_stop` ends an epoch before its last batch: the run without a stop has none.

    Lightning 2.6.6 validates there, and callbacks would take it for the validation of the epoch.
    """
    loop = trainer.fit_loop.epoch_loop
    is_due = loop._should_check_val_fx

    def is_scheduled(data_fetcher: Any) -> bool:
        stops, trainer.should_stop = trainer.should_stop, False
        try:
            return is_due(data_fetcher)
        finally:
            trainer.should_stop = stops

    loop._should_check_val_fx = is_scheduled  # type: ignore[method-assign]  # Lightning has no hook for it


def start_validation_again(trainer: pl.Trainer) -> None:
    """Set the loop of a validation that `mark_validation_interrupted` has marked to its first batch."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    if validation.restarted_mid_evaluation:
        validation.batch_progress.current.reset()
        validation.batch_progress.total.reset_on_restart()
