"""LeftOutHooks: what hooks of ImageClassifier do, for a subclass that overrides them without super()."""

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer


class LeftOutHooks(pl.Callback):
    """Calls the hooks of the base class, which may be called twice; on_fit_start only where it was left out.

    Hooks of a LightningModule do nothing, and nobody calls super() in them. Without those of ImageClassifier class
    weights are ignored, train/loss is of all epochs so far, DDP trains layers that are still frozen, and a whole
    checkpoint does not name the class that it is of; for one of weights alone Lightning calls no callback.

    Args:
        base: `ImageClassifier`.
    """

    def __init__(self, base: Any) -> None:
        self.base = base

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(pl_module, self.base):  # the Trainer keeps this callback for later modules
            self.base.setup(pl_module, stage)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if isinstance(pl_module, self.base):
            self.base.on_load_checkpoint(pl_module, checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if isinstance(pl_module, self.base):
            self.base.on_save_checkpoint(pl_module, checkpoint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, self.base):
            return
        if not pl_module.has_begun:
            sums = pl_module.totals.state()  # those of an epoch that is resumed inside
            self.base.on_fit_start(pl_module)
            pl_module.totals.restore(sums)
        self.base.on_train_start(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, self.base):
            self.base.on_train_epoch_start(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if isinstance(pl_module, self.base):
            self.base.on_before_optimizer_step(pl_module, optimizer)
