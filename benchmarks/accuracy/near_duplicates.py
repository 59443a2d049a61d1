"""Near duplicates: recall on changed copies of CIFAR-10's test images, time for all, and a sheet of pairs to look at.

python -m benchmarks.accuracy.near_duplicates --data ROOT [--sheet pairs.png] [--json FILE]

ROOT holds CIFAR-10, or its images in class folders. The sheet has 50 pairs drawn at random from those that are found in
all 60,000 images; its precision is counted by eye.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.accuracy.label_issues import open_cifar10
from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.results import write_results
from cifar_lightning.data.near_duplicates import find_near_duplicates

NUM_COPIES, NUM_SHOWN, SCALE = 2000, 50, 3


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    """Return an image after JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Return an image shifted by a pixel; its border is repeated."""
    height, width, _ = image.shape
    return np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")[1 - down :, 1 - right :][:height, :width]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 75": lambda image: compressed(image, 75),
    "JPEG, quality 50": lambda image: compressed(image, 50),
    "1 pixel right": lambda image: shifted(image, 0, 1),
    "1 pixel down": lambda image: shifted(image, 1, 0),
    "1 pixel down and right": lambda image: shifted(image, 1, 1),
    "brightness +10 %": lambda image: np.clip(image * 1.1, 0, 255).astype(np.uint8),
    "brightness -10 %": lambda image: (image * 0.9).astype(np.uint8),
}


def draw_sheet(images: np.ndarray, pairs: np.ndarray, path: Path) -> None:
    """Write pairs side by side, five a row."""
    side = SCALE * images.shape[1]
    sheet = Image.new("RGB", (5 * (2 * side + 12), -(-len(pairs) // 5) * (side + 14)), "white")
    for place, pair in enumerate(pairs.tolist()):
        x, y = place % 5 * (2 * side + 12), place // 5 * (side + 14)
        for at, index in enumerate(pair):
            sheet.paste(
                Image.fromarray(images[index]).resize((side, side), Image.Resampling.NEAREST), (x + at * side, y)
            )
        ImageDraw.Draw(sheet).text((x, y + side), f"{place}: {pair}", fill="black")
    sheet.save(path)


def main() -> None:
    """Print recall, time and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    args = parser.parse_args()
    _, train, test = open_cifar10(args.data)
    some = np.array(test.images[:: len(test.images) // NUM_COPIES][:NUM_COPIES])
    recalls = {}
    for name, change in CHANGES.items():
        pairs = find_near_duplicates([some, np.stack([change(image) for image in some])])
        recalls[name] = float((pairs[:, 1] - pairs[:, 0] == NUM_COPIES).sum() / NUM_COPIES)
        print(f"{name:<24} recall {recalls[name]:.2%} of {NUM_COPIES:,} copies")
    began, began_cpu = time.perf_counter(), time.process_time()
    pairs = find_near_duplicates([train.images, test.images])
    took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    num_train, targets = len(train.images), np.concatenate([train.targets, test.targets])
    across = pairs[(pairs[:, 0] < num_train) & (pairs[:, 1] >= num_train)]
    num_two_labels = int((targets[pairs[:, 0]] != targets[pairs[:, 1]]).sum())
    num_in_train = len(np.unique(across[:, 1]))
    print(f"{len(targets):,} images: {took:.1f} s, {cpu:.1f} s of CPU time (n=1), {hardware_name()}")
    print(f"{len(pairs):,} pairs, {num_two_labels} with two labels")
    print(f"{num_in_train:,} of {len(test.images):,} test images have one in train")
    counts = {"num_pairs": len(pairs), "num_two_labels": num_two_labels, "num_in_train": num_in_train}
    write_results(args.json, recalls=recalls, num_copies=NUM_COPIES, **counts, elapsed_s=took, cpu_s=cpu)
    if args.sheet:
        chosen = np.random.default_rng(0).permutation(len(pairs))[:NUM_SHOWN]
        draw_sheet(np.concatenate([train.images, test.images]), pairs[chosen], args.sheet)


if __name__ == "__main__":
    main()
