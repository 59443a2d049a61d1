"""A data set streamed from disk: our loader against ImageFolder with v2 transforms, images/s and memory.

    python -m benchmarks.speed.streaming --work DIR                    200,000 generated images
    python -m benchmarks.speed.streaming --work DIR --data ROOT        class folders (CIFAR-10's) in four variants

The images are PNG and JPEG files of 32 to 64 pixels, written once below DIR. Both loaders have 2 workers, make batches
of 500 on 2 cores and transform each image in the same way: shorter side resized to 32, centre crop, random crop with 4
pixels of reflected padding, random flip, normalization to floats. ImageFolder decodes each file in every epoch. Ours
decodes each file once, into one file that its workers then read; that time is reported separately, and as the number of
epochs after which ours is ahead in total.

First a warm-up epoch of each, in which memory is sampled (ours in three epochs): the PSS of this process and its
workers, so that shared pages count once, with the pages of mapped files listed separately. Then rounds of about 20 s in
turn, each after a pause in which the other workers fill their queues. The last line is ours over torchvision.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.loader import NUM_CORES, PADDING_PX, use_cores
from benchmarks.speed.process_memory import IS_KNOWN, Memory, memory_of
from benchmarks.speed.results import print_rates, spread, write_results
from benchmarks.speed.streaming_images import SIDES_PX, make_images
from cifar_lightning import ImageDataModule
from cifar_lightning.data.image_folder import CACHE_FOLDER
from cifar_lightning.errors import UserError

NUM_WORKERS = 2
PAUSE_S = 2.0
NUM_SAMPLES = 20  # of memory, an epoch
OUR_EPOCHS = 3  # in which memory is sampled: ours is quick


@dataclass
class Way:
    """One of the two loaders that are compared.

    Args:
        batches: Finished batches, epoch after epoch, without an end.
        num_batches: Of an epoch.
        workers: Process ids.
    """

    batches: Iterator[Tensor]
    num_batches: int
    workers: list[int]


def make_data(root: Path, image_size: int, batch_size: int) -> tuple[ImageDataModule, float, float]:
    """Return the prepared data module, the seconds that took, and those of decoding alone."""
    began = time.perf_counter()
    settings: dict[str, Any] = {"val_fraction": 0, "drop_last": True, "crop_padding_px": PADDING_PX, "device": "cpu"}
    data = ImageDataModule("folder", str(root), batch_size, image_size=image_size, num_workers=NUM_WORKERS, **settings)
    listed = time.perf_counter()
    data.prepare_data()
    decode_s = time.perf_counter() - listed
    data.setup()
    return data, time.perf_counter() - began, decode_s


def make_peer(root: Path, data: ImageDataModule, batch_size: int) -> tuple[DataLoader[Any], float]:
    """Return ImageFolder with transforms in a DataLoader, as most projects write it, and the seconds that took."""
    began = time.perf_counter()
    assert data.mean is not None
    assert data.std is not None
    transform = v2.Compose(
        [
            # The fastest of six orders for images of this size, 0.29 ms each without decoding: on PIL's image
            # alone or on tensors alone they take 0.4 to 0.5.
            v2.Resize(data.image_size),
            v2.CenterCrop(data.image_size),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.RandomCrop(data.image_size, padding=PADDING_PX, padding_mode="reflect"),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(data.mean), list(data.std)),
        ]
    )
    settings: dict[str, Any] = {"num_workers": NUM_WORKERS, "persistent_workers": True, "drop_last": True}
    batches = DataLoader(ImageFolder(str(root / "train"), transform), batch_size, shuffle=True, **settings)
    return batches, time.perf_counter() - began


def begin(loader: Iterable[Any], num_batches: int, shape: tuple[int, ...]) -> Way:
    """Start a loader's workers; check that its batches are finished."""
    before = {process.pid for process in multiprocessing.active_children()}
    batches = (images for _ in itertools.count() for images, _ in loader)
    first = next(batches)
    assert first.shape == shape, first.shape
    assert first.dtype == torch.float32
    assert abs(float(first.mean())) < 0.5, "not normalised"
    assert 0.5 < float(first.std()) < 1.5, "not normalised"
    started = {process.pid for process in multiprocessing.active_children()} - before
    assert len(started) == NUM_WORKERS
    return Way(batches, num_batches, [pid for pid in started if pid is not None])


def watch(way: Way, epochs: int) -> tuple[list[Memory], float]:
    """Read the rest of an epoch and further epochs; return evenly spaced samples of memory, and batches/s."""
    total = epochs * way.num_batches - 1
    every = max(1, total // (epochs * NUM_SAMPLES))
    samples: list[Memory] = []
    sampling_s, began = 0.0, time.perf_counter()
    for number in range(1, total + 1):
        next(way.batches)
        if number % every == 0 and IS_KNOWN:
            sampled = time.perf_counter()
            samples.append(memory_of([os.getpid(), *way.workers]))
            sampling_s += time.perf_counter() - sampled
    return samples, total / (time.perf_counter() - began - sampling_s)


def compare(
    ways: dict[str, Way], num_batches: dict[str, int], batch_size: int, rounds: int, pause_s: float = PAUSE_S
) -> dict[str, list[float]]:
    """Read a number of batches of each in turn; return the images/s of each round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(pause_s)
            for _ in range(4 * NUM_WORKERS):  # the queue was filled before the clock starts
                next(way.batches)
            began = time.perf_counter()
            for _ in range(num_batches[name]):
                next(way.batches)
            rates[name].append(num_batches[name] * batch_size / (time.perf_counter() - began))
    return rates


def epochs_until_ahead(decode_s: float, num_images: int, ours: float, peer: float) -> float:
    """Return the number of epochs after which ours is ahead, including its decoding; infinite if it never is."""
    saved_s = num_images / peer - num_images / ours  # in each epoch
    return decode_s / saved_s if saved_s > 0 else math.inf


def read_arguments() -> argparse.Namespace:
    """Return the parsed arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder that the images are written to")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="class folders to vary; by default generated images")
    parser.add_argument("--images", type=int, default=200_000, help="training images (default 200,000)")
    parser.add_argument("--image_size", type=int, default=32, help="size of the finished images (default 32)")
    parser.add_argument("--batch_size", type=int, default=500, help="(default 500)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each (default 5)")
    parser.add_argument("--seconds", type=float, default=20, help="seconds per round (default 20)")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    use_cores(NUM_CORES)  # before --json is checked: its machine has as many
    return parser.parse_args()


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    args = read_arguments()
    try:
        root = make_images(args.work, args.data, args.images)
        shutil.rmtree(root / CACHE_FOLDER, ignore_errors=True)  # of an earlier run: the first decoding is measured
        _, first_s, decode_s = make_data(root, args.image_size, args.batch_size)
        data, again_s, _ = make_data(root, args.image_size, args.batch_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    ours = data.train_dataloader()
    peer, peer_s = make_peer(root, data, args.batch_size)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    assert len(ours) == len(peer) == args.images // args.batch_size
    ways: dict[str, Way] = {}
    memory: dict[str, list[Memory]] = {}
    num_batches: dict[str, int] = {}
    loaders: list[tuple[str, Iterable[Any], int]] = [("ours", ours, OUR_EPOCHS), ("torchvision", peer, 1)]
    for name, loader, epochs in loaders:
        ways[name] = begin(loader, len(ours), shape)
        memory[name], batches_per_s = watch(ways[name], epochs)
        num_batches[name] = max(1, round(args.seconds * batches_per_s))
    rates = compare(ways, num_batches, args.batch_size, args.rounds, min(PAUSE_S, args.seconds))
    starts = {"ours the first time": first_s, "ours later": again_s, "torchvision": peer_s}
    report(rates, memory, starts, decode_s, args)


Rates = dict[str, list[float]]


def report(
    rates: Rates, memory: dict[str, list[Memory]], starts: dict[str, float], decode_s: float, args: argparse.Namespace
) -> None:
    """Print the results; with `--json` also write them."""
    device = hardware_name()
    source = "generated" if args.data is None else "class folders in four variants"
    images = f"{args.images:,} images ({source}), PNG and JPEG of {SIDES_PX[0]} to {SIDES_PX[1]} pixels a side"
    print(f"{images}, as {args.image_size}x{args.image_size}; batches of {args.batch_size}, {NUM_WORKERS} workers")
    print("seconds until a loader is ready:", ", ".join(f"{name} {value:.1f}" for name, value in starts.items()))
    for name, samples in memory.items():
        print(f"  memory of {name:<12} {describe_memory(samples)}")
    print("images/s:")
    print_rates(rates)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ahead = epochs_until_ahead(decode_s, args.images, medians["ours"], medians["torchvision"])
    with_decoding = args.images / (decode_s + args.images / medians["ours"])
    print(
        f"decoding all images once takes {decode_s:.1f} s ({args.images / decode_s:,.0f} a second); with it the "
        f"first epoch makes {with_decoding:,.0f} images/s, and ours is ahead after {ahead:.1f} epochs"
    )
    ratios = [one / other for one, other in zip(rates["ours"], rates["torchvision"], strict=True)]
    write_results(
        args.json,
        images=images,
        image_size=args.image_size,
        batch_size=args.batch_size,
        num_workers=NUM_WORKERS,
        seconds_to_start=starts,
        decode_s=decode_s,
        first_epoch_images_per_s=with_decoding,
        epochs_until_ahead=ahead if math.isfinite(ahead) else None,
        memory={name: [asdict(sample) for sample in samples] for name, samples in memory.items()},
        images_per_s=rates,
        ratios=ratios,
    )
    print(f"ours over torchvision, {len(ratios)} rounds of about {args.seconds:g} s, {device}: {spread(ratios)}")
    print(f"ratio={statistics.median(ratios):.1f}")


def describe_memory(samples: list[Memory]) -> str:
    """Return the first, the last and the largest sample as text."""
    if not samples:
        return "not measured: it is read from Linux's /proc"
    parts: list[tuple[str, Callable[[Memory], float]]] = [
        ("in all", lambda sample: sample.total_mb),
        ("of mapped files", lambda sample: sample.mapped_mb),
        ("own", lambda sample: sample.own_mb),
    ]
    rows = [f"{name} {of(samples[0]):,.0f}, {of(samples[-1]):,.0f}, {max(map(of, samples)):,.0f}" for name, of in parts]
    return f"MB, first, last and largest of {len(samples)} samples: {'; '.join(rows)}"


if __name__ == "__main__":
    main()
