"""Images in shards: against the streaming loader's decoded file, or JPEGs of 256 pixels against ImageFolder, images/s.

    python -m benchmarks.speed.shards --work DIR --data ROOT             200,000 images of 32 pixels, as uint8
    python -m benchmarks.speed.shards --work DIR --data ROOT --jpeg      4,000 JPEGs of 256 pixels, trained at 224

The 32-pixel images are those of class folders (CIFAR-10's), mirrored, upside down and both, as PNG files. Both loaders
have 2 workers, make batches of 500 on 2 cores and give the same images, with crops and flips. The JPEGs are drawn from
scikit-learn's two photographs: squares of 128 to 400 pixels, resized to 256 (--jpeg_px), quality 90. ImageFolder
decodes, transforms and normalizes in 2 workers as `benchmarks.speed.streaming` has it, in batches of 64.

A warm-up epoch of shards in which memory is sampled comes first (three epochs of the small images), then rounds in
turn. The last line is shards over the other loader.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.loader import NUM_CORES, PADDING_PX, use_cores
from benchmarks.speed.process_memory import Memory
from benchmarks.speed.results import print_rates, spread, write_results
from benchmarks.speed.streaming import NUM_WORKERS, begin, compare, describe_memory, make_peer, watch
from cifar_lightning import ImageDataModule
from cifar_lightning.data.image_folder import ClassFolders, scan
from cifar_lightning.data.shard_writer import write_shards
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json

TRAINED_PX = 224
VARIANTS = (None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
NUM_CLASSES = 10  # of the JPEGs


def small_images(root: Path, data: Path, num: int) -> None:
    """Write the variants of the first training images of each class, unless they are there."""
    names, listings = scan(data)
    listing = listings["train"]
    chosen = np.linspace(0, len(listing.names) - 1, num // len(VARIANTS)).astype(int)
    paths, targets = listing.paths, listing.targets
    jobs = [(paths[at], names[targets[at]]) for at in chosen]
    with ProcessPoolExecutor(NUM_CORES) as pool:
        list(pool.map(partial(_write_variants, root), enumerate(jobs), chunksize=500))


def _write_variants(root: Path, job: tuple[int, tuple[str, str]]) -> None:
    at, (path, name) = job
    image = Image.open(path)
    for number, variant in enumerate(VARIANTS):
        made = image if variant is None else image.transpose(variant)
        made.save(_folder(root, at, name) / f"{at:06}_{number}.png", compress_level=1)


def jpegs(root: Path, num: int, size: int) -> None:
    """Write squares of two photographs as JPEGs."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(each) for each in load_sample_images().images]
    rng = np.random.default_rng(0)
    for at in range(num):
        photograph, side = photographs[at % 2], int(rng.integers(128, 401))
        x, y = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        image = photograph.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        image.save(_folder(root, at, str(at % NUM_CLASSES)) / f"{at:06}.jpg", quality=90)


def _folder(root: Path, at: int, name: str) -> Path:
    """Return the folder of an image: 2 % are the test split that the data module wants."""
    folder = root / ("train" if at // NUM_CLASSES % 50 else "test") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare(args: argparse.Namespace) -> tuple[Path, Path, float]:
    """Write images and shards, unless they are there; return both roots, and the seconds that the shards took.

    Raises:
        UserError: --work holds other images.
    """
    root, shards, note = args.work / "images", args.work / "shards", args.work / "images.json"
    about = {"data": None if args.jpeg else str(args.data), "jpeg_px": args.jpeg and args.jpeg_px, "num": args.images}
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != about:
        raise UserError(f"--work {args.work}: holds other images; name another folder.")
    if not note.exists():
        shutil.rmtree(root, ignore_errors=True)
        if args.jpeg:
            jpegs(root, args.images, args.jpeg_px)
        else:
            small_images(root, args.data, args.images)
        write_json(note, about)
    began = time.perf_counter()
    if not (shards / "shards.json").exists():
        shutil.rmtree(shards, ignore_errors=True)
        print("\n".join(write_shards(ClassFolders(root, TRAINED_PX if args.jpeg else 32), shards)))
    return root, shards, time.perf_counter() - began


def module(dataset: str, root: Path, batch_size: int) -> ImageDataModule:
    """Return a data module that is set up."""
    settings: dict[str, Any] = {"val_fraction": 0, "drop_last": True, "crop_padding_px": PADDING_PX, "device": "cpu"}
    data = ImageDataModule(dataset, str(root), batch_size, num_workers=NUM_WORKERS, **settings)
    data.prepare_data()
    data.setup()
    return data


def main() -> None:
    """Measure and print; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder that the images are written to")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="class folders of 32-pixel images")
    parser.add_argument("--jpeg", action="store_true", help="JPEGs of 256 pixels")
    parser.add_argument("--jpeg_px", type=int, default=256, help="their width and height (default 256)")
    parser.add_argument("--images", type=int, help="training images (default 200,000; JPEGs 4,000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each (default 5)")
    parser.add_argument("--seconds", type=float, default=8, help="seconds per round (default 8)")
    parser.add_argument("--prepare", action="store_true", help="only write images and shards")
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    use_cores(NUM_CORES)  # before --json is checked: its machine has as many
    args = parser.parse_args()
    args.images = args.images or (4_000 if args.jpeg else 200_000)
    if not args.jpeg and args.data is None:
        parser.error("--data ROOT, or --jpeg")
    torch.set_num_threads(1)  # more would spin on the cores of the workers, in both loaders
    try:
        measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def measure(args: argparse.Namespace) -> None:
    """Prepare, measure in turn, print."""
    batch_size, epochs, other = (64, 1, "ImageFolder") if args.jpeg else (500, 3, "streaming")
    args.work.mkdir(parents=True, exist_ok=True)
    root, folder, shard_s = prepare(args)
    began = time.perf_counter()
    data = module("shards", folder, batch_size)
    ready = time.perf_counter()
    theirs = None if args.jpeg else module("folder", root, batch_size)
    print(f"set up in {ready - began:.1f} s, {other} {time.perf_counter() - ready:.1f} s", flush=True)
    if args.prepare:
        print(f"shards written in {shard_s:.1f} s")
        return
    size = data.image_size
    shape = (batch_size, 3, size, size)
    loader: Any = theirs.train_dataloader() if theirs is not None else make_peer(root, data, batch_size)[0]
    ours = data.train_dataloader()
    ways = {"shards": begin(ours, len(ours), shape)}
    memory, batches_per_s = watch(ways["shards"], epochs)
    print(f"warm-up: {batches_per_s * batch_size:,.0f} images/s", flush=True)
    ways[other] = begin(loader, len(loader), shape)
    _, other_per_s = watch(ways[other], 1)
    print(f"warm-up of {other}: {other_per_s * batch_size:,.0f} images/s", flush=True)
    num_batches = {"shards": max(1, round(args.seconds * batches_per_s))}
    num_batches[other] = max(1, round(args.seconds * other_per_s))
    rates = compare(ways, num_batches, batch_size, args.rounds, min(1.0, args.seconds))
    report(args, rates, memory, batch_size, size, sum(path.stat().st_size for path in folder.rglob("*.bin")) / 1e6)


def report(
    args: argparse.Namespace,
    rates: dict[str, list[float]],
    memory: list[Memory],
    batch_size: int,
    size: int,
    stored_mb: float,
) -> None:
    """Print the results; with `--json` also write them."""
    _, other = rates
    ratios = [one / two for one, two in zip(rates["shards"], rates[other], strict=True)]
    kind = f"JPEGs of {args.jpeg_px} pixels as {size}x{size}" if args.jpeg else f"images of {size} pixels"
    print(f"{args.images:,} {kind}, batches of {batch_size}, {NUM_WORKERS} workers; shards of {stored_mb:,.0f} MB")
    print(f"  memory of shards {describe_memory(memory)}")
    print("images/s:")
    print_rates(rates)
    write_results(
        args.json,
        images=f"{args.images:,} {kind}",
        batch_size=batch_size,
        num_workers=NUM_WORKERS,
        stored_mb=stored_mb,
        memory=[asdict(sample) for sample in memory],
        images_per_s=rates,
        ratios=ratios,
    )
    print(
        f"shards over {other}, {len(ratios)} rounds of about {args.seconds:g} s, {hardware_name()}: {spread(ratios, 2)}"
    )
    print(f"ratio={statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
