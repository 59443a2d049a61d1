"""Faster convolutions while a Trainer runs on a CPU."""

import lightning.pytorch as pl
from torch import nn

from cifar_lightning.models.cpu_convolutions import restore_convolutions, use_faster_convolutions


class FasterConvolutions(pl.Callback):
    """Lets a model on a CPU use faster convolutions, and gives it back as it was, also on errors."""

    def __init__(self) -> None:
        self._changed: list[nn.Conv2d] = []

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `setup`: before training starts the model is compared with a new one of its class, and compiled.
        if trainer.strategy.root_device.type == "cpu":
            self._changed += use_faster_convolutions(pl_module)

    on_train_start = on_validation_start = on_test_start = on_predict_start = _begin

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        restore_convolutions(self._changed)
        self._changed = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")
