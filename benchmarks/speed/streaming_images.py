"""The class folders that benchmarks/speed/streaming.py streams: four variants of each image of a data set."""

import hashlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cifar_lightning.data import synthetic
from cifar_lightning.data.image_folder import Listing, scan
from cifar_lightning.data.memory import usable_cpus
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json

RECIPE = 1  # raise it when other images come out
SIDES_PX = (32, 64)  # least and largest width and height, drawn for each file
SHIFT_PX = 4
BRIGHTER = 1.3
JPEG_QUALITY = 90
NUM_VARIANTS = 4  # as it is, mirrored, brighter, shifted
TEST_IMAGES = 4  # of each class: the data module wants a test split, and nothing is measured on it
_FEWEST = NUM_VARIANTS * 10  # CIFAR-10 and the generated set have ten classes
_CHUNK = 250  # images of the source that a process writes the variants of at once


@dataclass(frozen=True)
class Sources:
    """The images that variants are made of.

    Args:
        class_names: The classes' folder names.
        targets: int64 (n,).
        images: Paths, or generated images, uint8 (n, 32, 32, 3).
    """

    class_names: tuple[str, ...]
    targets: np.ndarray
    images: list[str] | np.ndarray


def make_images(work: Path, data: Path | None, num_images: int) -> Path:
    """Write the class folders below `work`, unless they are there; return their root.

    Args:
        work: Where they lie, as `work/images`.
        data: Class folders whose training images are varied; None generates images.
        num_images: Training images in all, a multiple of 4.

    Raises:
        UserError: Too few images, or `work` holds something else.
    """
    if num_images < _FEWEST or num_images % NUM_VARIANTS:
        raise UserError(f"--images {num_images}: give a multiple of {NUM_VARIANTS}, {_FEWEST} or more.")
    names, listings = ((), {}) if data is None else scan(data)
    fingerprint = "generated" if data is None else _fingerprint(listings["train"].paths)
    about = {"recipe": RECIPE, "images": num_images, "source": fingerprint}
    root, note = work / "images", work / "images.json"
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    is_whole = found.pop("is_whole", False)
    if root.exists() and found != about:
        raise UserError(f"--work {work}: holds other images; name another folder, or delete {root}.")
    if not is_whole:
        num = num_images // NUM_VARIANTS
        sources = _generated(num) if data is None else _listed(names, listings["train"], num)
        work.mkdir(parents=True, exist_ok=True)
        write_json(note, about | {"is_whole": False})  # what is cut off here is begun again, file over file
        _write(root, sources)
        write_json(note, about | {"is_whole": True})
    return root


def _fingerprint(paths: list[str]) -> str:
    """Return the SHA-256 of names, sizes in bytes and modification times."""
    seen = hashlib.sha256()
    for path in paths:
        about = os.stat(path)
        seen.update(os.fsencode(path) + f"\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def _generated(num: int) -> Sources:
    images, targets = synthetic.draw("train", num)
    return Sources(synthetic.CLASS_NAMES, targets, images)


def _listed(class_names: tuple[str, ...], train: Listing, num: int) -> Sources:
    if num > len(train.names):
        most = NUM_VARIANTS * len(train.names)
        raise UserError(f"--data: {train.folder} has {len(train.names):,} images, enough for --images {most}.")
    chosen = np.linspace(0, len(train.names) - 1, num).astype(np.int64)  # evenly spaced: of every class
    paths = train.paths
    return Sources(class_names, train.targets[chosen], [paths[k] for k in chosen])


def _write(root: Path, sources: Sources) -> None:
    for name in sources.class_names:
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
        (root / "test" / name).mkdir(parents=True, exist_ok=True)
    class_names = [sources.class_names[target] for target in sources.targets]
    starts = range(0, len(class_names), _CHUNK)
    with ProcessPoolExecutor(usable_cpus(), multiprocessing.get_context("spawn")) as pool:
        images = (sources.images[start : start + _CHUNK] for start in starts)
        classes = (class_names[start : start + _CHUNK] for start in starts)
        list(pool.map(partial(_write_variants, root / "train"), starts, images, classes))
    for name in sources.class_names:
        for path in sorted((root / "train" / name).iterdir())[:TEST_IMAGES]:
            shutil.copyfile(path, root / "test" / name / path.name)


def _write_variants(folder: Path, start: int, images: list[str] | np.ndarray, class_names: list[str]) -> None:
    """Write four files of each image into `folder/<class>`."""
    for at, (source, class_name) in enumerate(zip(images, class_names, strict=True)):
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source).convert("RGB")
        for variant in range(NUM_VARIANTS):
            rng = np.random.default_rng([start + at, variant])
            size = tuple(int(side) for side in rng.integers(SIDES_PX[0], SIDES_PX[1], 2, endpoint=True))
            made = _vary(image, variant, rng).resize(size, Image.Resampling.BICUBIC)
            path = folder / class_name / f"{start + at:06}_{variant}"
            if rng.random() < 0.5:
                made.save(path.with_suffix(".png"))
            else:
                made.save(path.with_suffix(".jpg"), quality=JPEG_QUALITY)


def _vary(image: Image.Image, variant: int, rng: np.random.Generator) -> Image.Image:
    match variant:
        case 1:
            return ImageOps.mirror(image)
        case 2:
            return ImageEnhance.Brightness(image).enhance(BRIGHTER)
        case 3:
            x, y = (int(offset) for offset in rng.integers(-SHIFT_PX, SHIFT_PX, 2, endpoint=True))
            return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))
    return image
