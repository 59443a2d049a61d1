"""NanGuard: stops a run when its loss is NaN or infinite, before the weights are updated."""

import math
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.data.sampler import Rank
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.optim.muon import Muon
from cifar_lightning.training.trainer_callbacks import callbacks_of

_NEVER = torch.iinfo(torch.int64).max


class NanGuard(pl.Callback):
    """Reads the loss of each step and stops the run with a `RunError` at the first one that is NaN or infinite.

    On the CPU the loss is read in each step and nothing is updated. On a GPU reading would make the host wait, so the
    device keeps a flag and the first bad step, which `check` reads where the host waits anyway. An optimizer that was
    given the flag as `found_inf` (torch's fused ones and Muon know it) skips this update and all later ones. In
    16-mixed it is not given: there GradScaler skips exactly the updates whose gradients are not finite.

    Several processes share their gradients, so a bad loss of one stops all of them in that step.
    """

    def __init__(self) -> None:
        self.start(torch.device("cpu"), is_deferred=False)

    def start(self, device: torch.device, *, is_deferred: bool) -> None:
        """Forget earlier losses."""
        self.is_deferred = is_deferred
        self._num_processes = Rank.of_process().count
        self.found_inf = torch.zeros((), device=device)
        self._first_bad_step = torch.full((), _NEVER, device=device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Defer the check where the optimizer can skip an update; note what is not finite before it is trained."""
        checkpoint_io = trainer.strategy.checkpoint_io
        if isinstance(checkpoint_io, DurableCheckpointIO):
            checkpoint_io.note_start(pl_module.state_dict())
        optimizer, device = trainer.optimizers[0], trainer.strategy.root_device
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None  # skips updates itself
        can_skip = has_scaler or isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))
        self.start(device, is_deferred=device.type == "cuda" and can_skip)
        if self.is_deferred and not has_scaler:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]  # GradScaler sets it likewise

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Test the loss, which must be one number."""
        if loss.numel() != 1:
            raise UserError(f"training_step returns a loss of shape {tuple(loss.shape)}; return its mean, one number.")
        self.watch(loss, trainer.global_step, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer.current_epoch)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save nothing after a bad step."""
        self.check(trainer.current_epoch)

    def watch(self, loss: Tensor, step: int, epoch: int) -> None:
        """Test a loss, a scalar; step and epoch count from 0. Every process must call it in every step.

        Raises:
            RunError: The loss was read at once and is not finite.
        """
        if not self.is_deferred and self._num_processes == 1:
            if not math.isfinite(loss.item()):
                raise _diverged(step, epoch)
            return
        is_bad = ~torch.isfinite(loss.detach())
        if self._num_processes > 1:
            is_bad = is_bad.float()
            # The strategy's reduce has a barrier that would make the host wait for the device.
            distributed.all_reduce(is_bad, distributed.ReduceOp.MAX)
            is_bad = is_bad > 0
        if self.is_deferred:
            # In place: the optimizer holds the same tensor.
            torch.maximum(self.found_inf, is_bad.float(), out=self.found_inf)
            bad_step = torch.where(is_bad, step, _NEVER)
            torch.minimum(self._first_bad_step, bad_step, out=self._first_bad_step)
        elif is_bad.item():
            self._stop(step, epoch)

    def check(self, epoch: int) -> None:
        """Read the device's flag; waits for the device. Every process must call it.

        Raises:
            RunError: A step's loss was not finite.
        """
        if self.is_deferred and self.found_inf.item():
            self._stop(int(self._first_bad_step.item()), epoch)

    def _stop(self, step: int, epoch: int) -> NoReturn:
        # The first process reports for all. Lightning's launcher kills it where another one ends with an error.
        if self._num_processes > 1 and distributed.get_rank() > 0:
            raise SystemExit(0)
        raise _diverged(step, epoch)


def check_losses(trainer: pl.Trainer) -> None:
    """Check a Trainer's NanGuard, before metrics are read in other callbacks. Every process must call it."""
    for guard in callbacks_of(trainer, NanGuard):
        guard.check(trainer.current_epoch)


def _diverged(step: int, epoch: int) -> RunError:
    return RunError(
        f"the loss became NaN or infinite in epoch {epoch + 1}, step {step + 1}; the weights were not updated by it.\n"
        "Lower --lr or --model.weight_decay, or clip with --trainer.gradient_clip_val 1. Earlier checkpoints are kept."
    )
