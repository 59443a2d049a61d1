"""ResumedSettings: applies this run's optimizer and schedule settings over those that a checkpoint has loaded."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifar_lightning.optim.resume import has_planned_lrs, planned_settings, use_fused


class ResumedSettings(pl.Callback):
    """Applies changed flags, such as `--epochs`, to a resumed run; Lightning loads the old values (#20310)."""

    def __init__(self, make_schedule: Callable[[Optimizer, int], LRScheduler]) -> None:
        self.make_schedule = make_schedule
        self._planned: tuple[list[dict[str, Any]], Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this run's settings before a checkpoint is loaded."""
        if trainer.lr_scheduler_configs:
            self._planned = planned_settings(trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply them where the checkpoint's differ; where none does, nothing may change, for a bit-identical resume."""
        if self._planned is None:
            return
        optimizer, config = trainer.optimizers[0], trainer.lr_scheduler_configs[0]
        is_in_force = planned_settings(optimizer, config.scheduler) == self._planned
        if not (is_in_force and has_planned_lrs(config.scheduler)):
            for group, settings in zip(optimizer.param_groups, self._planned[0], strict=True):
                group.update(settings)
            use_fused(optimizer)
            config.scheduler = self.make_schedule(optimizer, trainer.global_step)
