"""EMA: validation, test and checkpoints use a moving average of the weights; Lightning's callback, made exact."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class EmaWeights(WeightAveraging):
    """Averages the weights after each step; a checkpoint's `state_dict` is the average, the raw weights lie beside it.

    The average of a run's first steps would be of random weights: as in TensorFlow's `ExponentialMovingAverage`, the
    decay rises to its value as min(decay, (1 + n) / (10 + n)) after n steps. Of Lightning 2.6.6's `EMAWeightAveraging`,
    which this is after, a checkpoint that is saved inside a validation has average and raw weights exchanged.

    Args:
        decay: Share of the average that a step leaves, 0 to below 1.
    """

    def __init__(self, decay: float) -> None:
        def average(averages: list[Tensor], currents: list[Tensor], _: Tensor | int) -> None:
            if not averages[0].is_floating_point():  # counts and marks; all of a list are of one type
                torch._foreach_copy_(averages, currents)
                return
            assert self._average_model is not None
            count = int(self._average_model.n_averaged)
            torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + count) / (10 + count)))

        # BatchNorm's statistics are averaged, too: those of the raw weights do not fit the averaged ones.
        super().__init__(use_buffers=True, multi_avg_fn=average)
        self._is_exchanged = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average; its counter stays on the CPU, since reading it makes the host wait in each step."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._is_exchanged = self._average_model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train the raw weights on."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._is_exchanged = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average into `state_dict`, the raw weights beside it, also where a validation has exchanged them."""
        if self._average_model is None:
            return
        validated = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._is_exchanged:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = validated

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up both where training goes on; a test needs the average alone, which Lightning has loaded."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
