"""A Dataset of your own: python examples/own_dataset.py [EPOCHS], or from the repository's root

python train.py fit --data.dataset examples.own_dataset:make_dataset
"""

import sys

import lightning.pytorch as pl
import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from cifar_lightning import ImageClassifier, ImageDataModule


class Shapes(Dataset[tuple[Image.Image, int]]):
    """Drawn shapes. An image that is read again must be the same: its index seeds it."""

    classes = ("ellipse", "rectangle", "line")

    def __len__(self) -> int:
        return 900

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        left, top, width, height, gray = np.random.default_rng(index).integers(3, 12, 5).tolist()
        image, label = Image.new("L", (24, 24), 5 * gray), index % 3
        getattr(ImageDraw.Draw(image), self.classes[label])((left, top, left + width, top + height), fill=20 * gray)
        return image, label


make_dataset = Shapes  # a function or class without arguments; (train, test) of them has a test split of its own

if __name__ == "__main__":
    data = ImageDataModule(make_dataset(), batch_size=50)
    trainer = pl.Trainer(max_epochs=int(*sys.argv[1:] or ["4"]), logger=False, enable_checkpointing=False)
    classifier = ImageClassifier(num_classes=3, image_size=24, lr=1e-2, model_kwargs={"widths": [8, 16, 32]})
    trainer.fit(classifier, datamodule=data)
    print("test accuracy", trainer.test(classifier, datamodule=data, verbose=False)[0]["test/acc"])
