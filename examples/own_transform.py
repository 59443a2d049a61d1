"""A transform of one's own next to torchvision's: python examples/own_transform.py [--dataset cifar10 --epochs 10]."""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchvision.transforms import v2

from cifar_lightning import ImageClassifier, ImageDataModule, SmallNet, Transform


class ChannelShift(Transform):
    """Adds to each channel of an image a number of its own: drawn once an epoch, applied to whole batches."""

    def draw(self, generator: torch.Generator, num_images: int, image_size: int) -> dict[str, Tensor]:
        return {"shift": torch.randint(-20, 21, (num_images, 3), generator=generator)}

    def apply(self, images: Tensor, rows: dict[str, Tensor]) -> Tensor:
        return (images + rows["shift"][:, None, None]).clamp(0, 255).to(torch.uint8)


def main() -> None:
    """Train a small model and print its test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic", choices=["synthetic", "cifar10", "cifar100", "folder"])
    parser.add_argument("--root", default="data", help="folder of the images; downloads go there")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    transforms = ["default", ChannelShift(), v2.RandomGrayscale(p=0.1)]  # default: crop and flip
    data = ImageDataModule(args.dataset, args.root, batch_size=64, num_workers=0, transforms=transforms)
    model = ImageClassifier(model=SmallNet(data.num_classes, widths=(8, 16, 32)), num_classes=data.num_classes, lr=1e-2)
    trainer = pl.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    print("test accuracy", trainer.test(model, datamodule=data, verbose=False)[0]["test/acc"])


if __name__ == "__main__":
    main()
