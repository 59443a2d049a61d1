"""ResumedSettings: applies this run's optimizer and schedule settings over those that a checkpoint has loaded."""

from collections.abc import Callable

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifar_lightning.optim.resume import PlannedSettings


class ResumedSettings(pl.Callback):
    """Applies changed flags, such as `--epochs`, to a resumed run; Lightning loads the old values (#20310)."""

    def __init__(self, make_schedule: Callable[[Optimizer, int], LRScheduler]) -> None:
        self.make_schedule = make_schedule
        self._planned: PlannedSettings | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this run's settings before a checkpoint is loaded."""
        if trainer.lr_scheduler_configs:
            self._planned = PlannedSettings.of(trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply them where the checkpoint's differ."""
        if self._planned is None:
            return
        optimizer, config = trainer.optimizers[0], trainer.lr_scheduler_configs[0]
        if not self._planned.are_in_force(optimizer, config.scheduler):
            self._planned.apply_to(optimizer)
            config.scheduler = self.make_schedule(optimizer, trainer.global_step)
