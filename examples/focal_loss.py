"""A focal loss (arXiv:1708.02002) in place of cross entropy: python examples/focal_loss.py.

On the command line: python train.py fit --model.loss examples.focal_loss:FocalLoss --model.loss_kwargs '{gamma: 2}'
"""

import lightning.pytorch as pl
import torch
from torch import nn

from cifar_lightning import ImageClassifier, ImageDataModule, SmallNet


class FocalLoss(nn.Module):
    """Cross entropy in which images count less the better they are predicted."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of logits (batch, classes) and labels (batch,)."""
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()


if __name__ == "__main__":
    data = ImageDataModule("synthetic", batch_size=64)
    model = SmallNet(data.num_classes, widths=(8, 16, 32))
    classifier = ImageClassifier(model=model, num_classes=data.num_classes, lr=1e-2, loss=FocalLoss())
    trainer = pl.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(classifier, datamodule=data)
    print("test accuracy", trainer.test(classifier, datamodule=data, verbose=False)[0]["test/acc"])
