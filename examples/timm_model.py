"""A timm model trained by ImageClassifier: python examples/timm_model.py [--model convnext_atto]."""

import argparse
import sys

import lightning.pytorch as pl

from cifar_lightning import ImageClassifier, ImageDataModule

try:
    import timm
except ImportError:
    sys.exit("timm is not installed; in the folder of the repository: pip install -e '.[timm]'")


def main() -> None:
    """Train the model from random weights and print its test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet10t", help="name of timm.list_models()")
    parser.add_argument("--dataset", default="synthetic", choices=["synthetic", "cifar10", "cifar100", "folder"])
    parser.add_argument("--root", default="data", help="folder of the images; downloads go there")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    data = ImageDataModule(args.dataset, args.root, batch_size=64)
    model = timm.create_model(args.model, num_classes=data.num_classes)
    classifier = ImageClassifier(model=model, num_classes=data.num_classes, lr=2e-3)
    trainer = pl.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(classifier, datamodule=data)
    print("test accuracy", trainer.test(classifier, datamodule=data, verbose=False)[0]["test/acc"])


if __name__ == "__main__":
    main()
