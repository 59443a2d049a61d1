"""The clock of `benchmarks/speed/speedrun.py`: a callback for `fit` that writes how long each phase took."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


class Clock(pl.Callback):
    """Measures the two times of a run, and the seconds of each epoch's training.

    Args:
        path: JSON file to write: `seconds` (the records' window: whitening, training, final evaluation), `fit_s` (the
            whole of Trainer.fit), `evaluate_s`, `train_s` of each epoch. Compiling, where a recipe
            does, is in them.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.times: dict[str, float] = {}
        self.epochs_s: list[float] = []

    def _note(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name] = time.perf_counter()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start `fit_s`."""
        if stage == "fit":
            self._note("fit_setup")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End `fit_s`."""
        if stage == "fit":
            self._note("fit_teardown")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the records' time: the module whitens after this."""
        self._note("fit_start")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start an epoch."""
        self._note("epoch_start")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End an epoch."""
        self._note("epoch_end")
        self.epochs_s.append(self.times["epoch_end"] - self.times["epoch_start"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the training."""
        self._note("train_end")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the final evaluation."""
        self._note("test_start")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End it, and write all."""
        self._note("test_end")
        at = self.times
        evaluate_s = at["test_end"] - at["test_start"]
        figures: dict[str, Any] = {
            "seconds": at["train_end"] - at["fit_start"] + evaluate_s,
            "fit_s": at["fit_teardown"] - at["fit_setup"],
            "evaluate_s": evaluate_s,
            "train_s": self.epochs_s,
        }
        self.path.write_text(json.dumps(figures) + "\n", encoding="utf-8")
