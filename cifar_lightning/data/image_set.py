"""ImageSet: the images and targets of one split, with their hash."""

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from cifar_lightning.data.memory import give_back_pages

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ImageSet(NamedTuple):
    """The images of one split."""

    images: np.ndarray  # uint8 RGB (N, H, W, 3), 0-255; may be mapped from a file, read-only
    targets: np.ndarray  # int64 (N,), indices into the source's class names
    sha256: str  # `digest` of both


def digest(images: np.ndarray, targets: np.ndarray) -> str:
    """Return the SHA-256 of the images' bytes, then the targets' (int64, little-endian)."""
    sha256 = hashlib.sha256()
    for start in range(0, len(images), 4096):
        sha256.update(np.ascontiguousarray(images[start : start + 4096]).data)
        give_back_pages(images)
    sha256.update(targets.astype("<i8").data)
    return sha256.hexdigest()
