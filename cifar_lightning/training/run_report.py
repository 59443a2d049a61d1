"""RunReport: the files and the report of a run, for any LightningModule in a Trainer of one's own."""

import json
import math
import re
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cifar_lightning.checkpoints.loading import plain
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.report.report import make_report
from cifar_lightning.runs.environment import portable
from cifar_lightning.runs.folder import RUNS, RunFolder, create_run
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.settings.roles import object_name
from cifar_lightning.training.predictions import PredictionWriter
from cifar_lightning.training.run_recorder import environment_of, peak_memory_mb
from cifar_lightning.training.step_count import current_lr
from cifar_lightning.training.trainer_data import training_data

_OTHER_NAME = re.compile(r"(train|val|valid|validation)[_/](loss|acc|accuracy)(_epoch)?")
_NAMES = {"valid": "val", "validation": "val", "accuracy": "acc"}


class RunReport(PredictionWriter):
    """Writes a run folder in any `Trainer`: a row of metrics.csv an epoch; after `trainer.test` predictions and report.

    The logits are what `test_step` returns (a tensor, or "logits" of a dict), or else what `forward` returns for the
    images of a batch. What the module logs as train_loss, val_acc or the like is named train/loss, val/acc. With an
    `ImageDataModule` the report also shows images. `cifar_lightning.load` and the command `analyze` read the folder.

    Args:
        run_dir: A new folder; by default runs/CLASS/N.
        class_names: Names of the classes in the order of the labels; by default those of the data module, or numbers.

    Raises:
        UserError: The folder holds a run with results.
    """

    def __init__(self, run_dir: str | Path | None = None, class_names: Sequence[str] | None = None) -> None:
        super().__init__(None, class_names=class_names)
        self.run_dir = run_dir
        # Of each Trainer that fits; None on all ranks but the first.
        self._run_of = weakref.WeakKeyDictionary[pl.Trainer, RunFolder | None]()
        self._has_fitted = False
        self._epoch: tuple[int, int, float] | None = None  # one that is trained: number, steps, seconds
        self._val: dict[str, float] = {}
        self._started_s = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the folder, once, or another one for the fit of another Trainer."""
        if stage == "fit" and self._has_fitted and trainer not in self._run_of:
            if self.run_dir is not None and self.run is not None and self.run.metrics_csv.exists():
                raise UserError(f"RunReport: {self.run_dir} is of another Trainer's fit; make one for each Trainer.")
            self.run = self._epoch = None
        self.run = self._run_of.get(trainer, self.run)
        self._make_run(trainer, pl_module, stage)
        if stage == "fit":
            self._has_fitted = True
            self._run_of[trainer] = self.run

    def _make_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and training_data(trainer) is None:
            raise UserError("RunReport: on several processes a loader repeats images; give Trainer(devices=1).")
        if self.run is not None or not trainer.is_global_zero or stage not in ("fit", "test"):
            return
        name = type(pl_module).__name__
        self.run = create_run(RUNS, name, self.run_dir)
        config = {"model": {**plain(dict(pl_module.hparams)), "name": object_name(pl_module)}}
        config["trainer"] = {"max_epochs": trainer.max_epochs, "enable_checkpointing": False}  # none of ours
        config["trainer"]["limit_val_batches"] = trainer.limit_val_batches
        as_json = json.dumps(portable(plain(config)), default=_without_types)  # YAML takes no tensors and no enums
        write_text_durably(self.run.config, yaml.safe_dump(json.loads(as_json)))
        write_json(self.run.environment, environment_of(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the folder."""
        if self.run is not None and self.run.lock is not None:
            self.run.lock.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the folder, as Lightning calls no `teardown`; forget the batches of a test that was cut."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write environment.json again: by now the Trainer has its optimizers."""
        if self.run is not None and trainer.is_global_zero:
            write_json(self.run.environment, environment_of(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row of the epoch before, whose metrics are complete by now."""
        self._write_row(trainer)
        self._val, self._started_s = {}, time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse several loaders in `trainer.validate`, whose images would be counted together."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _check_loaders("validate", trainer.num_val_batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics of a validation."""
        super().on_validation_end(trainer, pl_module)
        self._val = {name: value for name, value in metrics_of(trainer).items() if name.startswith("val")}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch, trainer.global_step, time.perf_counter() - self._started_s

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last row."""
        self._write_row(trainer)

    def _write_row(self, trainer: pl.Trainer) -> None:
        if self._epoch is None or self.run is None:
            return
        (epoch, step, elapsed_s), self._epoch = self._epoch, None
        logged = {name: math.nan if name.startswith("val") else value for name, value in metrics_of(trainer).items()}
        row = {"epoch": epoch, "step": step, "lr": current_lr(trainer), **logged, **self._val}
        MetricsTable(self.run.metrics_csv).append(row)
        memory = peak_memory_mb(trainer.strategy.root_device)
        MetricsTable(self.run.timing_csv).append({"epoch": epoch, "elapsed_s": elapsed_s, "peak_memory_mb": memory})

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse several loaders, whose images would be counted together."""
        _check_loaders("test", trainer.num_test_batches)

    def on_predict_batch_end(self, *args: Any) -> None:
        """Leave `trainer.predict` alone: predictions.npz is of the test."""

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write nothing."""

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write predictions and the report."""
        data = training_data(trainer)
        super().on_test_end(trainer, pl_module)
        if self.is_test_written and self.run is not None and self.test is not None:
            sizes = {"test": len(self.test.targets)}
            write_json(self.run.split, {"sizes": sizes} if data is None else portable(data.split_summary()))
            make_report(self.run, is_short=True)


def _check_loaders(stage: str, num_batches: Sequence[int | float]) -> None:
    if len(num_batches) > 1:
        raise UserError(f"RunReport: several loaders would be counted as one; call trainer.{stage} for each.")


def _without_types(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)


def metrics_of(trainer: pl.Trainer) -> dict[str, float]:
    """Return what a Trainer has logged of training and validation, by the names that a report knows."""
    named: dict[str, float] = {}
    for name, value in trainer.callback_metrics.items():
        match = _OTHER_NAME.fullmatch(name)
        words = [_NAMES.get(word, word) for word in match.groups()[:2]] if match else []
        is_known = words and (words[1] == "loss" or 0 <= float(value) <= 1)  # not a percentage
        named["/".join(words) if is_known else name] = float(value)
    return {name: value for name, value in named.items() if not name.startswith("test")}
