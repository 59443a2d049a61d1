"""What an epoch's training adds up to so far: loss, correct answers, images."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


class TrainMetrics:
    """Sums of this process's share of an epoch, kept on the device: adding to them does not wait for it.

    They stand for `self.log`, which reads back from the device and costs more host time than a small step.

    Args:
        device: Where the sums lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum, self.num_correct = torch.zeros((), device=device), torch.zeros((), device=device)
        self.num_images = 0
        self._num_restored = 0  # trained on before this process

    @torch.no_grad()
    def add(
        self,
        loss: Float[Tensor, ""],
        logits: Float[Tensor, "batch classes"],
        targets: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            loss: Mean over the batch.
            logits: Its answers.
            targets: int64 (batch,), or the shares of all classes (batch, classes) of mixed images, of which the
                largest is the right answer.
        """
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self.loss_sum += loss.detach() * len(targets)
        self.num_correct += (logits.argmax(1) == labels).sum()
        self.num_images += len(targets)

    @property
    def num_trained(self) -> int:
        """Images since this process began the epoch, or went on with it."""
        return self.num_images - self._num_restored

    def stacked(self) -> Float[Tensor, "3"]:
        """Return loss sum, correct answers and images, which several processes may add up."""
        return torch.stack([self.loss_sum, self.num_correct, torch.full_like(self.loss_sum, self.num_images)])

    def state(self) -> tuple[Tensor, Tensor, int]:
        """Return loss sum, correct answers (both on the CPU) and images, for a checkpoint."""
        return self.loss_sum.cpu(), self.num_correct.cpu(), self.num_images

    def restore(self, state: tuple[Tensor, Tensor, int]) -> None:
        """Take up the sums of an epoch that is gone on with in its middle."""
        loss_sum, num_correct, self.num_images = state
        self.loss_sum = loss_sum.to(self.loss_sum.device)
        self.num_correct = num_correct.to(self.num_correct.device)
        self._num_restored = self.num_images


def means_of(sums: Float[Tensor, "3"]) -> dict[str, float]:
    """Return train/loss and train/acc of loss sum, correct answers and images; NaN of none. Waits for the device."""
    loss_sum, num_correct, num_images = sums.tolist()
    if not num_images:
        return {"train/loss": math.nan, "train/acc": math.nan}
    return {"train/loss": loss_sum / num_images, "train/acc": num_correct / num_images}
