"""Milliseconds of the training loader's epochs, for `loader.py --against`: one line for each line on stdin.

    python -P benchmarks/speed/loader_epochs.py CHECKOUT [ROOT]

It works with any checkout of this project on PYTHONPATH, because it uses only `ImageDataModule` and its loader.
"""

import sys
import time
from pathlib import Path

import cifar_lightning
from cifar_lightning import ImageDataModule

NUM_EPOCHS = 10  # of the generated set, 5,000 images


def main() -> None:
    """Measure until stdin ends."""
    checkout, *folders = sys.argv[1:]
    assert Path(checkout) in Path(cifar_lightning.__file__).parents, cifar_lightning.__file__
    data = ImageDataModule(
        "folder" if folders else "synthetic",
        folders[0] if folders else ".",
        500,
        image_size=32,
        val_fraction=0,
        num_workers=0,
        cutout_px=12,
        drop_last=True,
        device="cpu",
    )
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(1 if folders else NUM_EPOCHS):
            for _ in loader:
                pass
        print(1e3 * (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
