"""Transforms of training images against torchvision's: batched random resized crops, and a v2 transform in 2 workers.

    python -m benchmarks.speed.transforms                      crops at 32, 64 and 224 pixels, then RandomPerspective
    python -m benchmarks.speed.transforms --only crops
    python -m benchmarks.speed.transforms --only workers --num 2000

Crops: ours draws the boxes of an epoch, gathers batches of 128 as the loader does and crops them whole;
torchvision.transforms.v2 draws and crops each uint8 CHW tensor and stacks the batch; both in this process with the same
number of threads. Workers: a v2 transform in our data module with 2 workers, against torchvision's DataLoader with 2
workers on the same images in memory, with the same transform, ToDtype and Normalize; both give normalized floats in
batches of 128.

Who runs first alternates; the two are compared within a round, after a warm-up round. The cores must be free. The last
line is the least of the medians of ours over torchvision, each divided by what is asked of it: 5 at 32 and 64 pixels,
1 at 224 and in workers.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.loader import TransformedImages
from benchmarks.speed.results import print_rates, spread, write_results
from cifar_lightning import ImageDataModule, RandomResizedCrop
from cifar_lightning.transforms.augmentation import Augmentation
from cifar_lightning.transforms.pipeline import Pipeline, apply_stage, rows_of

BATCH_SIZE = 128
ASKED = {32: 5.0, 64: 5.0, 224: 1.0}
SIZES = {32: 4_000, 64: 2_000, 224: 400}  # images of an epoch, by their size in pixels

Epoch = Callable[[int], Iterable[Tensor]]
"""Gives the batches of the epoch with this number."""


def our_crops(images: Tensor) -> Epoch:
    """Return a function that crops an epoch of whole batches."""
    pipeline = Pipeline(Augmentation(), [RandomResizedCrop()])
    shape = {"num_images": len(images), "image_size": images.shape[1]}

    def epoch(number: int) -> Iterable[Tensor]:
        _, draws = pipeline.draw(seed=0, epoch=number, device=images.device, **shape)
        for indices in torch.arange(len(images)).split(BATCH_SIZE):
            yield apply_stage("uint8", images.index_select(0, indices), rows_of(draws, indices))

    return epoch


def torchvision_crops(images: Tensor) -> Epoch:
    """Return a function that crops an epoch image by image."""
    crop = v2.RandomResizedCrop(images.shape[1], antialias=True)
    planes = images.permute(0, 3, 1, 2).contiguous()

    def epoch(_: int) -> Iterable[Tensor]:
        for indices in torch.arange(len(planes)).split(BATCH_SIZE):
            yield torch.stack([crop(planes[k]) for k in indices.tolist()])

    return epoch


def in_workers(transform: Callable[[Tensor], Tensor], num: int) -> dict[str, Epoch]:
    """Return epochs of our data module and of torchvision's loader, each with 2 workers."""
    shared: dict[str, Any] = {"val_fraction": 0.0, "limit": num, "drop_last": True}
    listed = [transform]
    data = ImageDataModule("synthetic", batch_size=BATCH_SIZE, num_workers=2, transforms=listed, **shared)
    loader = data.train_dataloader()
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(data.mean or ()), list(data.std or ()))]
    images, targets = torch.from_numpy(data.images("train", np.arange(num))), torch.zeros(num, dtype=torch.int64)
    peer = DataLoader(
        TransformedImages(images, targets, v2.Compose([transform, *finish])),
        BATCH_SIZE,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
    )
    return {
        "ours": lambda _: (images for images, _ in loader),
        "torchvision": lambda _: (images for images, _ in peer),
    }


def compare(ways: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Run an epoch of each in turn, after a warm-up epoch; return the images/s of each round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    shapes = {name: [batch.shape[0] for batch in epoch(0)] for name, epoch in ways.items()}
    assert len(set(map(tuple, shapes.values()))) == 1, shapes
    for number in range(1, rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            num = sum(len(batch) for batch in ways[name](number))
            rates[name].append(num / (time.perf_counter() - began))
    return rates


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["crops", "workers"], help="measure one of both")
    parser.add_argument("--num", type=int, default=4_000, help="images of an epoch in workers (default 4,000)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the main process (default 2)")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = f"{hardware_name()}, {args.threads} threads"
    measured: dict[str, dict[str, Any]] = {}

    def measure(title: str, ways: dict[str, Epoch], asked: float) -> None:
        rates = compare(ways, args.rounds)
        ratios = [ours / peer for ours, peer in zip(rates["ours"], rates["torchvision"], strict=True)]
        print(f"{title}, images/s:")
        print_rates(rates)
        print(f"  ours over torchvision {spread(ratios)}, asked {asked:g}", flush=True)
        measured[title] = {"images_per_s": rates, "ratios": ratios, "asked": asked}

    for size, num in SIZES.items() if args.only != "workers" else ():
        images = torch.randint(0, 256, (num, size, size, 3), dtype=torch.uint8)
        crops = {"ours": our_crops(images), "torchvision": torchvision_crops(images)}
        measure(f"RandomResizedCrop of {num:,} random images, {size}x{size}", crops, ASKED[size])
    if args.only != "crops":
        title = f"RandomPerspective of {args.num:,} images, 32x32, in 2 workers"
        measure(title, in_workers(v2.RandomPerspective(p=1.0), args.num), 1.0)
    write_results(args.json, num_threads=args.threads, rounds=args.rounds, measured=measured)
    least = min(statistics.median(each["ratios"]) / each["asked"] for each in measured.values())
    print(f"least of ours over torchvision, over what is asked, {args.rounds} rounds of an epoch, {device}")
    print(f"ratio={least:.2f}")


if __name__ == "__main__":
    main()
