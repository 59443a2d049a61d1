"""What an epoch's training adds up to so far: loss, correct answers, pictures."""

import torch
from jaxtyping import Float
from torch import Tensor


class TrainTotals:
    """Sums of this process's share of an epoch, kept on the device: adding to them does not wait for it.

    They stand for `self.log`, which reads back from the device and costs more host time than a small step.

    Args:
        device: Where the sums lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum, self.num_correct = torch.zeros((), device=device), torch.zeros((), device=device)
        self.num_pictures = 0
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
            targets: int64 (batch,), or the shares of all classes (batch, classes) of mixed pictures, of which the
                largest is the right answer.
        """
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self.loss_sum += loss.detach() * len(targets)
        self.num_correct += (logits.argmax(1) == labels).sum()
        self.num_pictures += len(targets)

    @property
    def num_trained(self) -> int:
        """Pictures since this process began the epoch, or went on with it."""
        return self.num_pictures - self._num_restored

    def means(self) -> dict[str, float]:
        """Return train/loss and train/acc so far; waits for the device."""
        count = max(1, self.num_pictures)
        return {"train/loss": self.loss_sum.item() / count, "train/acc": self.num_correct.item() / count}

    def state(self) -> tuple[Tensor, Tensor, int]:
        """Return loss sum, correct answers (both on the CPU) and pictures, for a checkpoint."""
        return self.loss_sum.cpu(), self.num_correct.cpu(), self.num_pictures

    def restore(self, state: tuple[Tensor, Tensor, int]) -> None:
        """Take up the sums of an epoch that is gone on with in its middle."""
        loss_sum, num_correct, self.num_pictures = state
        self.loss_sum = loss_sum.to(self.loss_sum.device)
        self.num_correct = num_correct.to(self.num_correct.device)
        self._num_restored = self.num_pictures
