"""LR finder (arXiv:1506.01186): raises the learning rate over some steps and suggests where the loss falls fastest.

Lightning's `Tuner.lr_find` runs on a copy of the model with a Trainer of its own, so that the run that follows does not
depend on it.
"""

import contextlib
import copy
import io
import math
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner.tuning import Tuner

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError, silenced
from cifar_lightning.files import write_bytes_durably, write_json
from cifar_lightning.models.cpu_convolutions import faster_convolutions
from cifar_lightning.report.figures import figure_to_png, lr_range_figure
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.module import ImageClassifier

MIN_LR, MAX_LR, NUM_STEPS = 1e-5, 1.0, 100


@dataclass(frozen=True)
class LrRange:
    """Result of the LR finder."""

    lrs: list[float]  # of each step
    losses: list[float]  # smoothed training loss after each step
    suggestion: float  # where the loss falls fastest


def find_lr(module: ImageClassifier, data: ImageDataModule, **trainer_settings: Any) -> LrRange:
    """Run the LR finder on a copy of the module; module and random state are left as they were.

    It stops after `NUM_STEPS` steps, or when the loss has grown fourfold.

    Args:
        module: The model to train.
        data: The training batches.
        **trainer_settings: Arguments of the Trainer, such as precision and accelerator.

    Raises:
        UserError: More than one process, or the loss falls at no learning rate.
    """
    quiet = {"logger": False, "callbacks": [], "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "max_epochs": -1, "limit_val_batches": 0, "max_steps": NUM_STEPS}
    quiet |= {"min_epochs": None, "min_steps": None, "fast_dev_run": False, "profiler": None}  # of the run alone
    quiet["strategy"] = copy.deepcopy(trainer_settings.get("strategy", "auto"))  # an object serves one Trainer
    tuned = copy.deepcopy(module)
    data.setup()
    # Lightning's finder calls neither on_fit_start nor callbacks.
    tuned.prepare(data)
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()  # without a terminal the bar writes a line per step
    with (
        tempfile.TemporaryDirectory() as folder,
        silenced("lightning.pytorch"),  # it logs the checkpoint that it restores
        contextlib.redirect_stderr(bar),
        warnings.catch_warnings(action="ignore"),
        torch.random.fork_rng(),
        faster_convolutions(tuned),  # Lightning leaves out the callback that does it
    ):
        trainer = pl.Trainer(**{**trainer_settings, **quiet, "default_root_dir": folder})
        if trainer.world_size > 1:
            raise UserError("the LR finder runs in one process: tune with --trainer.devices 1, then give --lr.")
        # Lightning's default minimum, 1e-8, spends a third of the steps where nothing changes.
        found = Tuner(trainer).lr_find(
            tuned, datamodule=data, min_lr=MIN_LR, max_lr=MAX_LR, num_training=NUM_STEPS, update_attr=False
        )
    data.trainer = None
    suggestion = found.suggestion() if found is not None else None
    if found is None or suggestion is None or not math.isfinite(suggestion):
        raise UserError("tune: the loss fell at no learning rate; check the data, or give --lr.")
    lrs, losses = [float(lr) for lr in found.results["lr"]], [float(loss) for loss in found.results["loss"]]
    return LrRange(lrs, losses, float(suggestion))


def write_lr_range(run: RunFolder, found: LrRange) -> None:
    """Write lr_range.json and lr_range.png."""
    write_json(run.lr_range, asdict(found))
    write_bytes_durably(run.lr_range_png, figure_to_png(lr_range_figure(found.lrs, found.losses, found.suggestion)))
