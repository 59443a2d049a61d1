"""What a run leaves behind: tables and checkpoints; and early stopping that lets OneCycle finish."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError
from cifar_lightning.files import MetricsTable, read_json, write_json, write_text_durably
from cifar_lightning.runs.environment import describe_environment
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.limits import check_limits
from cifar_lightning.training.module import ImageClassifier

MONITOR = "val/acc"
EPOCH_SO_FAR = "cifar_lightning_epoch"
"""The key under which a checkpoint keeps what the row of an epoch that has not ended needs."""
_FIGURES = ("val/loss", "val/acc", "val/f1", "val/ece")
_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class RunRecorder(pl.Callback):
    """Writes split.json and environment.json at the start and a row of metrics.csv and timing.csv each epoch.

    An epoch that is resumed in its middle counts the seconds up to its checkpoint, not those of work that was lost;
    they are nan where the checkpoint does not know them. Its pictures per second are of this process alone.

    Args:
        run: The run's folder.
        resumed: Where and with which changes an earlier run is gone on with; environment.json lists them.
        config: What config.yaml holds from now on, where it changes. It is written once all processes have begun, which
            must all have found the same changes.
    """

    def __init__(self, run: RunFolder, resumed: dict[str, Any] | None = None, config: str | None = None) -> None:
        self.run, self.resumed, self.config = run, resumed, config
        self.metrics, self.timing = MetricsTable(run.metrics_csv), MetricsTable(run.timing_csv)
        self._loaded: dict[str, Any] | None = None
        self._start_clock()

    def _start_clock(self, before: Mapping[str, float] | None = None) -> None:
        self._before = before or {"elapsed_s": 0.0, "validation_s": 0.0}  # of this epoch, in earlier processes
        self._started_s, self._validation_s = time.perf_counter(), 0.0
        self._validation_start_s: float | None = None  # while one runs
        self._figures: dict[str, float] = {}  # of the epoch's last validation

    def clock(self) -> dict[str, float]:
        """Return the seconds of the epoch so far: all, and of validation."""
        now_s = time.perf_counter()
        validation_s = self._validation_s + (now_s - (self._validation_start_s or now_s))
        return {
            "elapsed_s": self._before["elapsed_s"] + now_s - self._started_s,
            "validation_s": self._before["validation_s"] + validation_s,
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the figures of the epoch's last validation; the clock is kept by last.ckpt alone."""
        checkpoint[EPOCH_SO_FAR] = {"figures": self._figures}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them up when training starts."""
        self._loaded = checkpoint.get(EPOCH_SO_FAR, {})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the run starts from."""
        skip_idle_hooks(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        if not trainer.is_global_zero:
            return
        if self.config is not None:
            write_text_durably(self.run.config, self.config)
        write_json(self.run.split, data_of(trainer).split_summary())
        device = trainer.strategy.root_device
        environment = describe_environment() | {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "num_devices": trainer.world_size,
            "precision": str(trainer.precision),
            "num_threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if self.resumed is not None:
            before = read_json(self.run.environment)
            again = {key: environment[key] for key in ("versions", "device", "precision", "commit", "dirty")}
            environment = before | {"resumed": [*before.get("resumed", []), self.resumed | again]}
        write_json(self.run.environment, environment)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up an epoch that is resumed in its middle; another one's start comes after this."""
        if self._loaded is None:
            return
        self._start_clock(self._loaded.get("clock", {"elapsed_s": math.nan, "validation_s": math.nan}))
        self._figures, self._loaded = self._loaded.get("figures", {}), None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start_clock()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of training."""
        self._validation_start_s = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock of training go on."""
        assert self._validation_start_s is not None
        self._validation_s += time.perf_counter() - self._validation_start_s
        self._validation_start_s = None
        logged = trainer.callback_metrics
        self._figures = {name: float(logged[name]) for name in _FIGURES if name in logged}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's rows, before the checkpoint that holds the epoch."""
        assert isinstance(pl_module, ImageClassifier)
        clock, own_s = self.clock(), time.perf_counter() - self._started_s - self._validation_s
        train = pl_module.epoch_metrics()  # collective: all ranks
        if not trainer.is_global_zero or pl_module.totals.num_pictures == 0:  # resumed at the epoch's very end
            return
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step, **train}
        if data_of(trainer).num_pictures("val"):
            row |= {name: self._figures.get(name, math.nan) for name in _FIGURES}
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


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory used so far in 10^6 bytes: of the GPU, or of this process without one; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
        import sys
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class AnnealingEarlyStopping(EarlyStopping):
    """Stops a run that no longer improves, but never before OneCycle's annealing had its chance.

    The accuracy of OneCycle comes with the annealing: until the learning rate's peak nothing is counted, and after it
    the patience is at least a third of the epochs, however often an epoch is validated.

    Args:
        patience: Validations without improvement after the peak; raised to a third of the epochs where it is smaller.
        min_delta: Smallest change of val/acc that counts as an improvement.

    Raises:
        UserError: A negative value.
    """

    def __init__(self, patience: int = 10, min_delta: float = 0.0) -> None:
        check_limits("early_stopping", patience=patience, min_delta=min_delta)
        super().__init__(monitor=MONITOR, mode="max", patience=patience, min_delta=min_delta)
        self._state_key = super().state_key

    @property
    def state_key(self) -> str:
        """Return the callback's key in a checkpoint, formatted once, as in `BestCheckpoint`."""
        return self._state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count, but with this run's own patience; a run that it had stopped is given all of it again.

        Such a run goes on only because something was changed, and would otherwise be stopped after an epoch.
        """
        again = {"wait_count": 0, "stopped_epoch": 0} if has_stopped(state_dict) else {}
        super().load_state_dict({**state_dict, "patience": self.patience, **again})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise the patience to a third of the epochs."""
        if trainer.max_epochs and trainer.max_epochs > 0:
            per_epoch = 1 / (trainer.check_val_every_n_epoch or 1)
            if isinstance(trainer.val_check_interval, float):
                per_epoch /= trainer.val_check_interval
            self.patience = max(self.patience, math.ceil(trainer.max_epochs * per_epoch / 3))

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, ImageClassifier)
        # --trainer.max_steps may end an epoch, the first one too, before anything was validated.
        if trainer.global_step >= module.peak_step() and MONITOR in trainer.callback_metrics:
            super()._run_early_stopping_check(trainer)


def has_stopped(state: Mapping[str, Any]) -> bool:
    """Whether early stopping, with that state in a checkpoint, had ended its run.

    Lightning's `stopped_epoch` does not tell: it counts from 0, which also stands for none.
    """
    return bool(state["wait_count"] >= max(1, state["patience"]))


class BestCheckpoint(ModelCheckpoint):
    """Keeps best.ckpt: the state at the best val/acc, and of equal ones at the lowest val/loss.

    A small validation split has few accuracies, so that many epochs share the best one; the first of them need not be
    any good on other pictures.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__(
            dirpath=run.checkpoints, filename="best", monitor=MONITOR, mode="max", enable_version_counter=False
        )
        self._state_key = super().state_key
        self._best_loss = math.inf

    @property
    def state_key(self) -> str:
        """Return the callback's key in a checkpoint, formatted once: Lightning asks for it seven times a step."""
        return self._state_key

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Return whether this epoch is the best so far; the figures are those of all processes."""
        if current is None:
            return False
        loss, best = float(trainer.callback_metrics["val/loss"]), self.best_model_score
        is_better = super().check_monitor_top_k(trainer, current)
        is_better = is_better or (best is not None and bool(current == best) and loss < self._best_loss)
        if is_better:
            self._best_loss = math.inf if math.isnan(loss) else loss
        return is_better

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state and the loss of the best epoch."""
        return super().state_dict() | {"best_loss": self._best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score also where the folder was moved, if its file moved with it.

        Lightning forgets the score of another path, and a worse epoch then overwrites the best.
        """
        own = f"{self.dirpath}/{self.filename}{self.FILE_EXTENSION}"
        if state_dict.get("best_model_path") and Path(own).is_file():
            score = state_dict.get("best_model_score")
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            moved: dict[str, Any] = {name: own for name in paths if state_dict.get(name)}
            moved["dirpath"] = str(self.dirpath)
            state_dict = {**state_dict, **moved, "best_k_models": {} if score is None else {own: score}}
        super().load_state_dict(state_dict)
        self._best_loss = state_dict.get("best_loss", math.inf)  # Lightning's own state has none


class NoProfiler(PassThroughProfiler):
    """Lightning's profiler that does nothing, without a generator for each of the fifty hooks of a step."""

    _NOTHING = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self._NOTHING


def skip_idle_hooks(callbacks: Sequence[pl.Callback]) -> None:
    """Let Lightning pass over the hooks of a step that a callback does not fill.

    It calls each of them, six a step for every callback, but leaves out what is not callable: with this, `fit` adds
    0.80 to 0.90 of what barebones adds to a step, without it 1.08 (benchmarks/LOG.md).
    """
    for callback in callbacks:
        for name in _STEP_HOOKS:
            if name not in vars(callback) and getattr(type(callback), name) is getattr(pl.Callback, name):
                setattr(callback, name, None)


def data_of(trainer: pl.Trainer) -> ImageDataModule:
    """Return the Trainer's ImageDataModule.

    Raises:
        UserError: The Trainer was given other data; these callbacks need names, splits and raw pictures.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise UserError("this callback needs trainer.fit(model, datamodule=ImageDataModule(...)).")
    return data


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
                "Hold pictures out (--data.val_fraction 0.1, --trainer.limit_val_batches above 0), or leave it out."
            )
