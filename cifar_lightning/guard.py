"""Stops a run whose loss is no longer a number, before it can spoil the weights."""

import math

import torch
from torch import Tensor

from cifar_lightning.errors import RunError

_NEVER = torch.iinfo(torch.int64).max


class LossGuard:
    """Looks at each step's loss; NaN and infinity stop the run.

    On the CPU the loss is read in each step and nothing is updated. On a GPU reading would make the host wait, so the
    device keeps a flag that holds back this update and all later ones (optimisers that know `found_inf`, as those of
    torch do for GradScaler), and the first bad step, which `check` reads where the host waits anyway.

    Args:
        device: Where the losses are.
        is_deferred: Whether to keep the flag on the device; without it each loss is read.
    """

    def __init__(self, device: torch.device, is_deferred: bool) -> None:
        self.is_deferred = is_deferred
        self.found_inf = torch.zeros((), device=device)
        self._first_bad_step = torch.full((), _NEVER, device=device)

    def watch(self, loss: Tensor, step: int, epoch: int) -> None:
        """Look at a loss, a scalar; step and epoch count from 0.

        Raises:
            RunError: It is not finite and was read at once.
        """
        if self.is_deferred:
            is_bad = ~torch.isfinite(loss.detach())
            # In place: the optimiser holds the same tensor.
            torch.maximum(self.found_inf, is_bad.float(), out=self.found_inf)
            bad_step = torch.where(is_bad, step, _NEVER)
            torch.minimum(self._first_bad_step, bad_step, out=self._first_bad_step)
        elif not math.isfinite(loss.item()):
            raise _diverged(step, epoch)

    def check(self, epoch: int) -> None:
        """Read what the device has kept in this epoch; waits for it.

        Raises:
            RunError: There was a bad step.
        """
        if self.is_deferred and self.found_inf.item():
            raise _diverged(int(self._first_bad_step.item()), epoch)


def _diverged(step: int, epoch: int) -> RunError:
    return RunError(
        f"the loss became NaN or infinite in epoch {epoch + 1}, step {step + 1}; the weights were not updated by it.\n"
        "Lower --lr, or clip with --trainer.gradient_clip_val 1. Checkpoints of before are kept."
    )
