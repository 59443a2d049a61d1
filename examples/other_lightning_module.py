"""ImageDataModule with a LightningModule of another project: python examples/other_lightning_module.py."""

import argparse

import lightning.pytorch as pl
from torch import Tensor, nn, optim

from cifar_lightning import ImageDataModule


class OtherModule(pl.LightningModule):
    """Any module that takes images and labels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        filters = [nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1)]
        self.model = nn.Sequential(*filters, nn.Flatten(), nn.Linear(64, num_classes))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic", choices=["synthetic", "cifar10", "cifar100", "folder"])
    parser.add_argument("--root", default="data", help="folder of the images; downloads go there")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    data = ImageDataModule(args.dataset, args.root, batch_size=64)
    module = OtherModule(data.num_classes)
    trainer = pl.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    print("test accuracy", trainer.test(module, datamodule=data, verbose=False)[0]["accuracy"])
