"""Finished training images a second on 2 CPU cores: our resident loader against torchvision and airbench.

    python -m benchmarks.speed.loader                         50,000 random 32x32 images, against torchvision
    python -m benchmarks.speed.loader --peer airbench=DIR     also against the loader in a checkout of
                                                        github.com/KellerJordan/cifar10-airbench
    python -m benchmarks.speed.loader --data ROOT             the training images of class folders, scaled to 32x32

Each transforms the same uint8 images in the same way: a random crop with 4 pixels of reflected padding, a random flip,
normalization to floats, a square of 12 pixels set to 0, in shuffled batches of 500. They run in turn, an epoch each,
after one warm-up epoch each, and are compared within a round. torchvision.transforms.v2 processes single images in 2
persistent workers of a DataLoader; ours and airbench's process whole batches with 2 threads. The cores must be free of
other programs. The last line is ours over torchvision.
"""

import argparse
import hashlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed import paired
from benchmarks.speed.peers import changed_for_cpu, peer_of, read_peer
from benchmarks.speed.results import print_rates, spread, write_results
from cifar_lightning import ImageDataModule
from cifar_lightning.data.datasets import Channels, ImageSet
from cifar_lightning.data.loaders import ResidentLoader
from cifar_lightning.errors import UserError

NUM_CORES = 2
BATCH_SIZE = 500  # the default of airbench's loader
IMAGE_SIZE = 32  # airbench's loader knows no other
PADDING_PX, CUTOUT_PX = 4, 12  # as airbench96_faster.py has them

AIRBENCH_FILE = "airbench96_faster.py"
# Its loader stands between these two headings; the rest of the file is a training script.
AIRBENCH_BEGIN, AIRBENCH_END = (
    "#                DataLoader                 #",
    "#               Evaluation                 #",
)
# Changes for a CPU. Each text must occur once; otherwise the checkout is of another version.
AIRBENCH_CHANGES = {
    "map_location='cuda'": "map_location='cpu'",
    "len(self.images)).cuda()": "len(self.images)).cpu()",
    "self.images.half() / 255": "self.images.float() / 255",
}

Epoch = Callable[[], Iterable[Tensor]]
"""Starts an epoch; yields the images of each batch."""


@dataclass(frozen=True)
class RandomImages:
    """A source of random pixels, which are ready at once and cost a loader as much as others."""

    num_train: int
    class_names: tuple[str, ...] = tuple(f"class {k}" for k in range(10))
    image_size: int = IMAGE_SIZE
    in_channels: int = 3
    mean: Channels = (0.4914, 0.4822, 0.4465)  # CIFAR-10's
    std: Channels = (0.2470, 0.2435, 0.2616)

    def prepare(self) -> None:
        """Nothing to do."""

    def load(self, split: str) -> ImageSet | None:
        """Draw the training images, or one test image."""
        if split == "val":
            return None
        count = self.num_train if split == "train" else 1
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, self.in_channels), dtype=np.uint8)
        return ImageSet(images, rng.integers(0, len(self.class_names), count), sha256="")

    def describe(self) -> str:
        """One line for the terminal."""
        return f"{self.num_train:,} random images, {IMAGE_SIZE}x{IMAGE_SIZE}"


def use_cores(num: int) -> None:
    """Restrict this process and its workers to a number of cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num])
    torch.set_num_threads(num)


def make_data(root: Path | None, num: int) -> ImageDataModule:
    """Return a data module that trains on all of these images."""
    dataset = "synthetic" if root is None else "folder"
    settings: dict[str, Any] = {"crop_padding_px": PADDING_PX, "crop_mode": "reflect", "cutout_px": CUTOUT_PX}
    settings |= {"image_size": IMAGE_SIZE, "val_fraction": 0, "num_workers": 0, "drop_last": True, "device": "cpu"}
    data = ImageDataModule(dataset, str(root or "."), BATCH_SIZE, **settings)
    if root is None:
        data.source = RandomImages(num)
    data.prepare_data()
    data.setup()
    return data


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """A data set in memory as most projects write it: an image is transformed when it is read."""

    def __init__(self, images: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.targets, self.transform = images.permute(0, 3, 1, 2).contiguous(), targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.targets[index])


def torchvision_epochs(loader: ResidentLoader, num_workers: int) -> Epoch:
    """Return epochs of torchvision's transforms in a DataLoader, over our loader's images."""
    area = (CUTOUT_PX / IMAGE_SIZE) ** 2
    transform = v2.Compose(
        [
            v2.Pad(PADDING_PX, padding_mode="reflect"),
            v2.RandomCrop(IMAGE_SIZE),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(loader.mean.tolist(), loader.std.tolist()),
            # One area and one ratio: always the square of CUTOUT_PX.
            v2.RandomErasing(p=1, scale=(area, area), ratio=(1, 1), value=0),
        ]
    )
    settings: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": True, "drop_last": True}
    transformed = TransformedImages(loader.images, loader.targets, transform)
    batches = DataLoader(transformed, batch_size=BATCH_SIZE, shuffle=True, **settings)
    return lambda: (images for images, _ in batches)


def airbench_loader_text(checkout: Path) -> str:
    """Return the section of airbench's file that defines its loader, changed for a CPU.

    Raises:
        UserError: No checkout, or one of another version.
    """
    text = read_peer("airbench", checkout, AIRBENCH_FILE).partition(AIRBENCH_BEGIN)[2].partition(AIRBENCH_END)[0]
    text = changed_for_cpu("airbench", checkout, text, AIRBENCH_CHANGES)
    if "cuda" in text or ".half()" in text or "class InfiniteCifarLoader:" not in text:
        raise UserError(f"--peer airbench={checkout}: its {AIRBENCH_FILE} is another version, which a CPU cannot run.")
    return text


def airbench_epochs(loader: ResidentLoader, text: str) -> Epoch:
    """Return epochs of airbench's loader, whose own iterator never ends, over our loader's images."""
    names: dict[str, Any] = {"os": os, "torch": torch, "F": F, "torchvision": torchvision}
    names["T"] = torchvision.transforms
    exec(compile(text, AIRBENCH_FILE, "exec"), names)
    num_batches = len(loader)
    whole = slice(num_batches * BATCH_SIZE)  # or a batch would reach into the next epoch
    with tempfile.TemporaryDirectory() as folder:
        data = {"images": loader.images[whole].clone(), "labels": loader.targets[whole].clone(), "classes": []}
        torch.save(data, Path(folder) / "train.pt")
        aug = {"flip": True, "translate": PADDING_PX, "cutout": CUTOUT_PX}
        # Flips are drawn in each epoch, as the others do.
        peer = names["InfiniteCifarLoader"](folder, batch_size=BATCH_SIZE, aug=aug, altflip=False)
    batches = iter(peer)
    return lambda: (images for _, images, _ in itertools.islice(batches, num_batches))


def check(name: str, batches: Iterable[Tensor], num_batches: int) -> None:
    """Run an epoch without timing it; check that it is whole and its first batch finished."""
    iterator: Iterator[Tensor] = iter(batches)
    first = next(iterator)
    assert first.shape == (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), f"{name}: {first.shape}"
    assert first.dtype == torch.float32, f"{name}: {first.dtype}"
    cut_out = (first == 0).all(1).flatten(1).sum(1)
    assert (cut_out >= CUTOUT_PX**2).all(), f"{name}: an image without its square"
    assert 1 + sum(1 for _ in iterator) == num_batches, name


def compare(ways: dict[str, Epoch], num_batches: int, rounds: int) -> dict[str, list[float]]:
    """Run an epoch of each in turn, `rounds` times after a warm-up epoch; return the images/s of each round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for name, epoch in ways.items():
        check(name, epoch(), num_batches)
    for _ in range(rounds):
        for name, epoch in ways.items():
            began = time.perf_counter()
            for _ in epoch():
                pass
            rates[name].append(num_batches * BATCH_SIZE / (time.perf_counter() - began))
    return rates


def compare_checkouts(args: argparse.Namespace) -> None:
    """Compare the training loader of another checkout with ours; the last line is `ratio=X`."""
    folders = [str(args.data.resolve())] if args.data else []
    ratios = paired.ratios_to(args.against, "loader_epochs.py", folders, args.rounds)
    device = hardware_name()
    paired.report(f"time of epochs of the training loader, batch size {BATCH_SIZE}", ratios, device)


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", type=peer_of(["airbench"]), metavar="airbench=DIR", help="also compare with airbench's loader"
    )
    parser.add_argument("--data", type=Path, metavar="ROOT", help="class folders; by default random images")
    parser.add_argument("--num", type=int, default=50_000, help="random images (default 50,000, as CIFAR-10 has)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of every loader (default 5)")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    paired.add_argument(parser)
    use_cores(NUM_CORES)  # before --json is checked: its machine has as many
    args = parser.parse_args()
    try:
        if args.against:
            compare_checkouts(args)
            return
        text = airbench_loader_text(args.peer[1]) if args.peer else None
        data = make_data(args.data, args.num)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    loader = data.train_dataloader()
    assert isinstance(loader, ResidentLoader)
    ways: dict[str, Epoch] = {"ours": lambda: (images for images, _ in loader)}
    ways["torchvision"] = torchvision_epochs(loader, NUM_CORES)
    if text is not None:
        ways["airbench"] = airbench_epochs(loader, text)
    rates = compare(ways, len(loader), args.rounds)
    report(rates, data.source.describe(), text, args)


def report(rates: dict[str, list[float]], images: str, airbench_text: str | None, args: argparse.Namespace) -> None:
    """Print the results; with `--json` also write them."""
    device = hardware_name()
    print(f"{images}; batches of {BATCH_SIZE}, images/s:")
    print_rates(rates)
    where = f"{len(rates['ours'])} rounds of an epoch, {device}"
    peers = [name for name in rates if name != "ours"]
    ratios = {name: [ours / peer for ours, peer in zip(rates["ours"], rates[name], strict=True)] for name in peers}
    if airbench_text is not None:
        changes = "; ".join(f"{original} -> {changed}" for original, changed in AIRBENCH_CHANGES.items())
        print(f"  airbench is InfiniteCifarLoader of its {AIRBENCH_FILE}, changed for a CPU: {changes}")
        print(f"ours over airbench, {where}: {spread(ratios['airbench'])}")
    write_results(
        args.json,
        images=images,
        batch_size=BATCH_SIZE,
        images_per_s=rates,
        ratios=ratios,
        airbench_sha256=airbench_text and hashlib.sha256(airbench_text.encode()).hexdigest(),
    )
    print(f"ours over torchvision in {NUM_CORES} workers, {where}: {spread(ratios['torchvision'])}")
    print(f"ratio={statistics.median(ratios['torchvision']):.1f}")


if __name__ == "__main__":
    main()
