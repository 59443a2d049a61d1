"""EMA of the weights, used in validation, test and checkpoints; Lightning's callback with fixes."""

import itertools
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cifar_lightning.errors import UserError
from cifar_lightning.training.lightning_patches import use_double


class EmaWeights(WeightAveraging):
    """Averages the weights after each step; a checkpoint's `state_dict` is the average.

    `current_model_state` of a checkpoint is the raw weights. So that the first steps' random weights count little, the
    decay after n steps is min(decay, (1 + n) / (10 + n)), as in TensorFlow's `ExponentialMovingAverage`. Lightning
    2.6.6's `EMAWeightAveraging` exchanges the two in a checkpoint that is saved inside a validation; this callback does
    not.
    """

    def __init__(self, decay: float) -> None:
        # BatchNorm's statistics are averaged, too: those of the raw weights do not fit the average.
        super().__init__(use_buffers=True)
        self.decay, self._is_exchanged = decay, False
        self._finite = dict[tuple[torch.device, torch.dtype], list[int]]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average; its counter stays on the CPU, since reading it from the device would sync in each step.

        Raises:
            UserError: The weights are of half precision, in which small steps of an average are rounded to none.
        """
        if stage == "fit" and trainer.precision in ("bf16-true", "16-true"):
            mixed = trainer.precision.replace("true", "mixed")
            raise UserError(
                f"--model.ema_decay {self.decay} with --trainer.precision {trainer.precision}: the average would round "
                f"its steps to none; give {mixed}, or leave one of them out."
            )
        use_double(trainer, pl_module)  # the average is a copy
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Average after a step.

        `AveragedModel.update_parameters` gives the same, but copies its counter to the device for each dtype, for which
        the host waits.
        """
        if trainer.global_step <= self._latest_update_step:
            return
        averaged = self._average_model
        assert averaged is not None
        groups = dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]()
        of_average = itertools.chain(averaged.module.parameters(), averaged.module.buffers())
        of_module = itertools.chain(pl_module.parameters(), pl_module.buffers())
        for average, current in zip(of_average, of_module, strict=False):
            averages, currents = groups.setdefault((average.device, average.dtype), ([], []))
            averages.append(average.detach())
            currents.append(current.detach().to(average.device))
        for averages, currents in groups.values():
            self._average(averages, currents, int(averaged.n_averaged))
        averaged.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def _average(self, averages: list[Tensor], currents: list[Tensor], count: int) -> None:
        """Average tensors of one dtype on one device, after `count` averages."""
        if count == 0 or not averages[0].is_floating_point():  # counters and flags
            torch._foreach_copy_(averages, currents)
            return
        kind = averages[0].device, averages[0].dtype
        if kind not in self._finite:  # once, as it waits for the device
            self._finite[kind] = [at for at, current in enumerate(currents) if current.isfinite().all()]
        if len(self._finite[kind]) < len(averages):  # a mask of attention stays: the mean of infinities is NaN
            averages, currents = ([tensors[at] for at in self._finite[kind]] for tensors in (averages, currents))
        torch._foreach_lerp_(averages, currents, 1 - min(self.decay, (1 + count) / (10 + count)))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average while training; `trainer.validate` may be of another module, and has its weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)
            self._is_exchanged = self._average_model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)
            self._is_exchanged = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save both, also inside a validation, which has exchanged them."""
        if self._average_model is None:
            return
        validated = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._is_exchanged:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = validated

    def put_average(self, checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint of weights alone hold the average, also if it is saved while training."""
        if self._average_model is not None and not self._is_exchanged:
            average = self._average_model.module.state_dict()
            checkpoint["state_dict"] = {name: average[name] for name in checkpoint["state_dict"]}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load both to resume training; a test needs only the average, which Lightning has loaded."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
