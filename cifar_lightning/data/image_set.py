"""ImageSet: the images and targets of one split, with their hashes."""

import hashlib
import math
from typing import Literal, NamedTuple

import numpy as np

from cifar_lightning.data.memory import give_back_pages

Split = Literal["train", "val", "test"]
Cache = Literal["none", "memory", "disk"]  # how decoded images are kept
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_OF_WORD: dict[str, Split] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF_WORD |= {"val": "val", "valid": "val", "validation": "val"}  # what people call it, in lower case
_LUMA = np.array([19_595, 38_470, 7_471], np.uint32)  # of red, green and blue, in 1/65536: ITU-R 601 as Pillow's "L"
_HASHED_BYTES = 1 << 26  # of images at a time
READ_BEFORE_BYTES = 1 << 30  # what is read before training to find damaged bytes: half a second from memory (2.1 GB/s)


class ImageSet(NamedTuple):
    """The images of one split."""

    images: np.ndarray  # uint8 (N, H, W, channels), RGB or gray, 0-255; may be mapped from a file, read-only
    targets: np.ndarray  # int64 (N,), indices into the source's class names
    sha256: str  # `digest` of both; of shards, of their names, files and pixels


def as_gray(image_set: ImageSet) -> ImageSet:
    """Return RGB images as images of one channel, with the values of Pillow's mode "L"; gray ones are not changed."""
    images = image_set.images
    if images.shape[-1] == 1:
        return image_set
    gray = np.empty((*images.shape[:-1], 1), np.uint8)
    for start in range(0, len(images), 1024):
        gray[start : start + 1024] = luma(images[start : start + 1024])
    return image_set._replace(images=gray, targets=image_set.targets.copy())  # both writable, as tensors need


def luma(images: np.ndarray) -> np.ndarray:
    """Return RGB or gray images (n, height, width, channels) as uint8 of one channel, as Pillow's mode "L"."""
    if images.shape[-1] == 1:
        return images
    gray: np.ndarray = (((images * _LUMA).sum(-1, keepdims=True, dtype=np.uint32) + 0x8000) >> 16).astype(np.uint8)
    return gray


def is_constant(images: np.ndarray) -> np.ndarray:
    """Return bool (n,): which images (n, height, width, channels) of more than one pixel have one colour."""
    flat = images.reshape(len(images), -1, images.shape[-1])
    # Three pixels of each rule most images out.
    alike: np.ndarray = (flat[:, 0] == flat[:, -1]).all(1) & (flat[:, 0] == flat[:, flat.shape[1] // 3]).all(1)
    for at in np.flatnonzero(alike):
        alike[at] = flat.shape[1] > 1 and (flat[at] == flat[at, 0]).all()
    return alike


def digest(images: np.ndarray, targets: np.ndarray) -> str:
    """Return the SHA-256 of the images' bytes, then the targets' (int64, little-endian)."""
    sha256 = hashlib.sha256()
    for start in range(0, len(images), 4096):
        sha256.update(np.ascontiguousarray(images[start : start + 4096]).data)
        give_back_pages(images)
    sha256.update(targets.astype("<i8").data)
    return sha256.hexdigest()


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """Return uint64 (N,): equal for identical images, and nearly always different for different ones.

    A polynomial in the image's 8-byte words, modulo 2^64: 60,000 images of 32 pixels take 0.05 s, and cryptographic
    hashes 0.2 s. Whoever needs certainty compares the images that agree.
    """
    size = math.prod(images.shape[1:])
    factors = np.multiply.accumulate(np.full(-(-size // 8), 0x9E3779B97F4A7C15, "<u8"))  # odd: no byte is lost
    hashes = np.empty(len(images), "<u8")
    num = max(1, _HASHED_BYTES // size)
    for start in range(0, len(images), num):
        rows = images[start : start + num].reshape(-1, size)
        if size % 8:
            rows = np.pad(rows, ((0, 0), (0, -size % 8)))
        hashes[start : start + num] = np.ascontiguousarray(rows).view("<u8") @ factors
        give_back_pages(images)
    return hashes
