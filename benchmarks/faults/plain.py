"""Plain Lightning on class folders, as in its documentation: the peer of `benchmarks.faults.run --subject plain`.

python -m benchmarks.faults.plain --data DIR --out DIR [--epochs N] [--ckpt_path FILE]
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import ImageFolder


class PlainClassifier(pl.LightningModule):
    """A small network with its loss, metrics, optimiser and schedule."""

    def __init__(self, num_classes: int, lr: float, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths, layers = (3, 8, 8, 16), []
        for wide_in, wide_out in pairwise(widths):
            layers += [nn.Conv2d(wide_in, wide_out, 3, padding=1), nn.BatchNorm2d(wide_out), nn.ReLU(), nn.MaxPool2d(2)]
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, num_classes)]
        self.model = nn.Sequential(*layers, *tail)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return and log the loss."""
        images, targets = batch
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=0.1)
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("val/acc", self.accuracy(self.model(batch[0]), batch[1]), on_epoch=True, sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("test/acc", self.accuracy(self.model(batch[0]), batch[1]), on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        """Return AdamW and OneCycle."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train, then test; with `--test`, test a checkpoint alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (("epochs", 3), ("batch_size", 32), ("num_workers", 2), ("devices", 1), ("image_size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--val_fraction", type=float, default=0.1)
    parser.add_argument("--patience", type=int, help="stop early after this many validations without improvement")
    parser.add_argument("--every_n_train_steps", type=int)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--drop_last", action="store_true")
    parser.add_argument("--ckpt_path", type=Path)
    parser.add_argument("--trainer", type=json.loads, default={}, help="more arguments of the Trainer, as JSON")
    parser.add_argument("--test", action="store_true")
    args = parser.parse_args()
    pl.seed_everything(0, workers=True)
    tail = [transforms.Resize(args.image_size), transforms.CenterCrop(args.image_size), transforms.ToTensor()]
    augment = transforms.Compose([transforms.RandomHorizontalFlip(), *tail])
    train, test = (ImageFolder(args.data / part, augment if part == "train" else None) for part in ("train", "test"))
    test.transform = transforms.Compose(tail)
    fit, val = random_split(train, [1 - args.val_fraction, args.val_fraction], torch.Generator().manual_seed(0))
    kwargs = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    model = PlainClassifier(len(train.classes), args.lr)
    callbacks = [
        ModelCheckpoint(dirpath=args.out, filename="best", monitor="val/acc", mode="max"),
        ModelCheckpoint(dirpath=args.out, every_n_train_steps=args.every_n_train_steps, save_last=True),
    ]
    if args.patience is not None:
        callbacks.append(EarlyStopping("val/acc", mode="max", patience=args.patience))
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=args.devices,
        precision=args.precision,
        callbacks=callbacks,
        logger=CSVLogger(args.out),
        enable_progress_bar=False,
        **args.trainer,
    )
    if not args.test:
        loader = DataLoader(fit, shuffle=True, drop_last=args.drop_last, **kwargs)
        trainer.fit(model, loader, DataLoader(val, **kwargs), ckpt_path=args.ckpt_path)
    trainer.test(model, DataLoader(test, **kwargs), ckpt_path=args.ckpt_path if args.test else "best")


if __name__ == "__main__":
    main()
