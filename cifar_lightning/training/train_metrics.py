"""Training loss and accuracy, summed over the epoch so far."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


class TrainMetrics:
    """Sums of loss, correct predictions and images of this process, kept on the device so that adding does not sync.

    `self.log` reads from the device and costs more host time than a small step.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum, self.num_correct = torch.zeros((), device=device), torch.zeros((), device=device)
        self.num_images = 0
        self._num_restored = 0  # of earlier processes

    @torch.no_grad()
    def add(
        self,
        loss: Float[Tensor, ""],
        logits: Float[Tensor, "batch classes"],
        targets: Tensor,
    ) -> None:
        """Add a batch; the target of a mixed image, given as weights of the classes, is the largest."""
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self.loss_sum += loss.detach() * len(targets)
        self.num_correct += (logits.argmax(1) == labels).sum()
        self.num_images += len(targets)

    @property
    def num_trained(self) -> int:
        """Images since this process started or resumed the epoch."""
        return self.num_images - self._num_restored

    def stacked(self) -> Float[Tensor, "3"]:
        """Return loss sum, correct predictions and images, to be summed over processes."""
        return torch.stack([self.loss_sum, self.num_correct, torch.full_like(self.loss_sum, self.num_images)])

    def state(self) -> tuple[Tensor, Tensor, int]:
        """Return what `restore` takes, on the CPU, for a checkpoint."""
        return self.loss_sum.cpu(), self.num_correct.cpu(), self.num_images

    def restore(self, state: tuple[Tensor, Tensor, int]) -> None:
        """Load the sums of an epoch that is resumed in its middle."""
        loss_sum, num_correct, self.num_images = state
        self.loss_sum = loss_sum.to(self.loss_sum.device)
        self.num_correct = num_correct.to(self.num_correct.device)
        self._num_restored = self.num_images


def means_of(sums: Float[Tensor, "3"]) -> dict[str, float]:
    """Return train/loss and train/acc of loss sum, correct predictions and images; NaN of no image. Syncs."""
    loss_sum, num_correct, num_images = sums.tolist()
    if not num_images:
        return {"train/loss": math.nan, "train/acc": math.nan}
    return {"train/loss": loss_sum / num_images, "train/acc": num_correct / num_images}
