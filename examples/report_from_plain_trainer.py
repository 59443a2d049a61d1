"""The report of any LightningModule in a plain Trainer: python examples/report_from_plain_trainer.py [EPOCHS]."""

import sys

import lightning.pytorch as pl
from torch import Tensor, nn, optim

from cifar_lightning import Dashboard, ImageDataModule, RunReport, load


class OtherModule(pl.LightningModule):
    """Any module; the report takes the logits that `test_step` returns, or else those of `forward`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        filters = [nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1)]
        self.model = nn.Sequential(*filters, nn.Flatten(), nn.Linear(64, num_classes))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.model(batch[0])}

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    data = ImageDataModule("synthetic", batch_size=64)
    module = OtherModule(data.num_classes)
    report, dashboard = RunReport(), Dashboard()  # write runs/OtherModule/N, and into the logger's TensorBoard
    trainer = pl.Trainer(max_epochs=int(*sys.argv[1:] or ["3"]), callbacks=[report, dashboard])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert report.run
    print("test accuracy", load(report.run.path).metrics["accuracy"])
