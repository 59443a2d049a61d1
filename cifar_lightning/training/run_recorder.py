"""RunRecorder: writes split.json, environment.json, metrics.csv, timing.csv and learning_rates.json of a run."""

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from torch.nn.parameter import is_lazy

from cifar_lightning.errors import remark
from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.formatting import printable
from cifar_lightning.runs.contents import read_environment
from cifar_lightning.runs.ending import write_ending
from cifar_lightning.runs.environment import describe_environment, portable, processor_change
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.training.ending import describe_ending
from cifar_lightning.training.lightning_patches import skip_idle_hooks
from cifar_lightning.training.model_checks import validated_by
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.signals import Stopped
from cifar_lightning.training.step_count import current_lr
from cifar_lightning.training.trainer_callbacks import callbacks_of
from cifar_lightning.training.trainer_data import training_data

MONITOR = "val/acc"
EPOCH_SO_FAR = "cifar_lightning_epoch"
"""Key of a checkpoint for what the row of an unfinished epoch needs."""
_MAX_LRS = 2000  # learning rates that are kept of a run: more than a chart has pixels
_CALLBACKS = "callbacks"
_OF_A_RESUME = ("versions", "cpu", "cpu_instructions", "num_threads", "device", "precision", "commit", "dirty")


class RunRecorder(pl.Callback):
    """Writes split.json and environment.json at the start and a row of metrics.csv and timing.csv each epoch.

    The learning rates of the steps, evenly thinned to at most 2,000, are in the checkpoints and written at the end of
    training.

    An epoch that is resumed in its middle counts the seconds up to its checkpoint, nan if the checkpoint does not have
    them. Its images per second are of this process alone.

    Args:
        run: The run's folder.
        resumed: Where a run is resumed, and with which changes; added to environment.json.
        config: New text of config.yaml. It is written after all processes have started, since each of them compares the
            flags with the old text.
    """

    def __init__(self, run: RunFolder, resumed: dict[str, Any] | None = None, config: str | None = None) -> None:
        self.run, self.resumed, self.config = run, resumed, config
        self.metrics, self.timing = MetricsTable(run.metrics_csv), MetricsTable(run.timing_csv)
        self.has_begun = False
        """Whether an epoch began in this process."""
        self._loaded: dict[str, Any] | None = None
        self._is_training = False
        self._lrs: dict[int, float] = {}
        self._lr_every = 1  # steps
        self._start_clock()

    def _start_clock(self, before: Mapping[str, float] | None = None) -> None:
        self._before = before or {"elapsed_s": 0.0, "validation_s": 0.0}  # of this epoch, in earlier processes
        self._started_s, self._validation_s = time.perf_counter(), 0.0
        self._validation_start_s: float | None = None  # while one runs
        self._val_metrics: dict[str, float] = {}  # of the epoch's last validation

    def clock(self) -> dict[str, float]:
        """Return the seconds of the epoch so far, total and of validation."""
        now_s = time.perf_counter()
        validation_s = self._validation_s + (now_s - (self._validation_start_s or now_s))
        return {
            "elapsed_s": self._before["elapsed_s"] + now_s - self._started_s,
            "validation_s": self._before["validation_s"] + validation_s,
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the metrics of the epoch's last validation and learning rates; the clock is saved in last.ckpt alone."""
        checkpoint[EPOCH_SO_FAR] = {"figures": self._val_metrics, "lrs": dict(self._lrs)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep them until training starts."""
        self._loaded = checkpoint.get(EPOCH_SO_FAR, {})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write split.json and environment.json."""
        skip_idle_hooks(callbacks_of(trainer, pl.Callback))
        if not trainer.is_global_zero:
            return
        if self.config is not None:
            write_text_durably(self.run.config, self.config)
        data = training_data(trainer)
        assert data is not None
        write_json(self.run.split, portable(data.split_summary()))
        environment = environment_of(trainer)
        if self.resumed is None and trainer.ckpt_path:
            environment["ckpt_path"] = portable(str(trainer.ckpt_path))
        if self.resumed is not None:
            before = read_environment(self.run.environment)
            again = {key: environment[key] for key in _OF_A_RESUME}
            if change := processor_change(before, environment):
                again["processor_change"] = change
                print(f"  Not bit for bit equal to the run without a stop: {change}.")
            if left_out := {*before.get(_CALLBACKS, ())} - {*environment[_CALLBACKS]}:
                names = printable(", ".join(sorted(left_out)))
                remark(f"warning: without the run's callbacks {names}; give them again, from Python callbacks=[...].")
            before.pop("ended", None)
            environment = before | {"resumed": [*before.get("resumed", []), portable(self.resumed) | again]}
        write_json(self.run.environment, environment)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the clock of an epoch that is resumed in its middle; otherwise the epoch's start resets it."""
        assert isinstance(pl_module, ImageClassifier)
        self._is_training, self._first_step = True, trainer.global_step
        self._lr_every = -(-pl_module.total_steps() // _MAX_LRS)
        if self._loaded is None:
            return
        self._lrs = dict(self._loaded.get("lrs", {}))
        self._start_clock(self._loaded.get("clock", {"elapsed_s": math.nan, "validation_s": math.nan}))
        self._val_metrics, self._loaded = self._loaded.get("figures", {}), None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.has_begun, self._first_step = True, trainer.global_step
        self._start_clock()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Keep the learning rate of the step; after a batch it is that of the next one."""
        if trainer.global_step % self._lr_every == 0 and not math.isnan(lr := current_lr(trainer)):
            self._lrs[trainer.global_step] = lr

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what ended training into environment.json."""
        assert isinstance(pl_module, ImageClassifier)
        self._is_training = False
        self._write_ending(trainer, describe_ending(trainer, pl_module.total_steps()))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write that a signal ended training into environment.json."""
        if isinstance(exception, Stopped) and self._is_training:
            assert isinstance(pl_module, ImageClassifier)
            self._write_ending(trainer, describe_ending(trainer, pl_module.total_steps(), by="signal"))

    def _write_ending(self, trainer: pl.Trainer, ending: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_learning_rates(self.run, self._lrs)  # first: a run whose ending is known has them
            write_ending(self.run, ending)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of training."""
        _finish_steps(trainer)
        self._validation_start_s = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock of training; keep the metrics."""
        assert self._validation_start_s is not None
        _finish_steps(trainer)
        self._validation_s += time.perf_counter() - self._validation_start_s
        self._validation_start_s = None
        logged = trainer.callback_metrics
        self._val_metrics = {name: float(logged[name]) for name in validated_by(pl_module) if name in logged}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's rows, before the checkpoint of the epoch."""
        assert isinstance(pl_module, ImageClassifier)
        _finish_steps(trainer)
        clock, own_s = self.clock(), time.perf_counter() - self._started_s - self._validation_s
        train = pl_module.epoch_metrics()  # collective: all ranks
        is_counted = pl_module.totals.num_images > 0
        if not trainer.is_global_zero or not (is_counted or trainer.global_step > self._first_step):
            return  # resumed at the epoch's very end
        if not is_counted and trainer.current_epoch == 0:
            remark(
                "remark: train/loss and train/acc are not known (nan): training_step does not add to them; add them by "
                "self.totals.add(loss, logits, labels), or call super().training_step."
            )
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step, **train}
        data = training_data(trainer)
        assert data is not None
        if data.num_images("val"):
            row |= {name: self._val_metrics.get(name, math.nan) for name in validated_by(pl_module)}
        self.metrics.append(row)
        self.timing.append(
            {
                "epoch": trainer.current_epoch,
                "elapsed_s": clock["elapsed_s"],
                "train_s": clock["elapsed_s"] - clock["validation_s"],
                "train_images_per_s": pl_module.totals.num_trained * trainer.world_size / own_s,
                "peak_memory_mb": peak_memory_mb(trainer.strategy.root_device),
            }
        )


def _finish_steps(trainer: pl.Trainer) -> None:
    """Wait for the device: a GPU computes later than the host asks it to, and a clock of the host reads too little."""
    if (device := trainer.strategy.root_device).type != "cpu":
        torch.accelerator.synchronize(device)


def write_learning_rates(run: RunFolder, lrs: Mapping[int, float]) -> None:
    """Write learning_rates.json, of at most 2,000 steps: a resumed run may have more."""
    kept = sorted(lrs.items())[:: -(-len(lrs) // _MAX_LRS) or 1]
    write_json(run.learning_rates, {"step": [step for step, _ in kept], "lr": [lr for _, lr in kept]})


def environment_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the content of environment.json."""
    device, module = trainer.strategy.root_device, trainer.lightning_module
    # Those of one's own: the config names only ours.
    own = [] if getattr(module, "plans_schedule", True) else [type(each).__name__ for each in trainer.optimizers]
    return describe_environment() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "num_devices": trainer.world_size,
        "precision": str(trainer.precision),
        "num_threads": torch.get_num_threads(),
        "num_parameters": sum(each.numel() for each in module.parameters() if not is_lazy(each)),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "optimizers": own,
        _CALLBACKS: _given_callbacks(trainer),
    }


def _given_callbacks(trainer: pl.Trainer) -> list[str]:
    """Return the names of the callbacks that are not ours, but for the Timer of --trainer.max_time."""
    kinds = {type(each) for each in callbacks_of(trainer, pl.Callback) if not isinstance(each, Timer)}
    paths = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return sorted(path for path in paths if not path.startswith("cifar_lightning."))


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in 10^6 bytes, of the GPU or else of this process; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
        import sys
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
