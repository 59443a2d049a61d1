"""Stops a run whose loss is no longer a number, before it can spoil the weights."""

import math
from typing import NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from cifar_lightning.errors import RunError
from cifar_lightning.optim.muon import Muon

_NEVER = torch.iinfo(torch.int64).max


class NanGuard:
    """Looks at each step's loss; NaN and infinity stop the run.

    On the CPU the loss is read in each step and nothing is updated. On a GPU reading would make the host wait, so the
    device keeps a flag, and the first bad step, which `check` reads where the host waits anyway. An optimiser that was
    given the flag as `found_inf` (torch's fused ones and Muon know it) makes neither this update nor a later one. In
    16-mixed it is not given: there GradScaler leaves out each update whose gradients are not finite, and only those.

    Several processes share their gradients, so the bad loss of one is that of all, and all of them stop in that step.

    Args:
        device: Where the losses are.
        is_deferred: Whether to keep the flag on the device; without it each loss is read.
    """

    def __init__(self, device: torch.device, is_deferred: bool) -> None:
        self.is_deferred = is_deferred
        self._num_processes = _num_processes()
        self.found_inf = torch.zeros((), device=device)
        self._first_bad_step = torch.full((), _NEVER, device=device)

    def watch(self, loss: Tensor, step: int, epoch: int) -> None:
        """Look at a loss, a scalar; step and epoch count from 0. Every process must call it in every step.

        Raises:
            RunError: It is not finite and was read at once.
        """
        if not self.is_deferred and self._num_processes == 1:
            if not math.isfinite(loss.item()):
                raise _diverged(step, epoch)
            return
        is_bad = ~torch.isfinite(loss.detach())
        if self._num_processes > 1:
            is_bad = is_bad.float()
            # Not the strategy's reduce, whose barrier would make the host wait for the device.
            distributed.all_reduce(is_bad, distributed.ReduceOp.MAX)
            is_bad = is_bad > 0
        if self.is_deferred:
            # In place: the optimiser holds the same tensor.
            torch.maximum(self.found_inf, is_bad.float(), out=self.found_inf)
            bad_step = torch.where(is_bad, step, _NEVER)
            torch.minimum(self._first_bad_step, bad_step, out=self._first_bad_step)
        elif is_bad.item():
            self._stop(step, epoch)

    def check(self, epoch: int) -> None:
        """Read what the device has kept in this epoch; waits for it. Every process must call it.

        Raises:
            RunError: There was a bad step.
        """
        if self.is_deferred and self.found_inf.item():
            self._stop(int(self._first_bad_step.item()), epoch)

    def _stop(self, step: int, epoch: int) -> NoReturn:
        # The first process speaks for all. Lightning's launcher kills it where another one ends with an error.
        if self._num_processes > 1 and distributed.get_rank() > 0:
            raise SystemExit(0)
        raise _diverged(step, epoch)


def make_nan_guard(trainer: pl.Trainer) -> NanGuard:
    """Return a guard for a Trainer that is about to train: deferred where its optimiser can hold an update back."""
    optimizer, device = trainer.optimizers[0], trainer.strategy.root_device
    has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None  # holds updates back itself
    holds_back = has_scaler or isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))
    guard = NanGuard(device, is_deferred=device.type == "cuda" and holds_back)
    if guard.is_deferred and not has_scaler:
        optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]  # as GradScaler does for torch's fused ones
    return guard


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _diverged(step: int, epoch: int) -> RunError:
    return RunError(
        f"the loss became NaN or infinite in epoch {epoch + 1}, step {step + 1}; the weights were not updated by it.\n"
        "Lower --lr, or clip with --trainer.gradient_clip_val 1. Checkpoints of before are kept."
    )
