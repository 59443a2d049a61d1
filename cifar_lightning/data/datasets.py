"""Where images come from: the table of data sets, all read the same way as uint8 NumPy arrays.

    source = open_source("cifar10", "data", None)   class names and size are known: nothing downloaded or decoded yet
    source.prepare()                                 downloads, or decodes into a cache; safe to call again
    source.load("train")                             ImageSet, or None for a split that the source does not have

To add a data set, write a class with `Source`'s members and give it a line in `open_source`.
"""

import difflib
import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from cifar_lightning.data import synthetic
from cifar_lightning.data.download import ARCHIVES, download
from cifar_lightning.data.image_folder import ClassFolders, digest
from cifar_lightning.errors import UserError

Split = Literal["train", "val", "test"]
Channels = tuple[float, float, float]

DATASETS = ("cifar10", "cifar100", "folder", "synthetic")

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
# fmt: on


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    Args:
        images: uint8 RGB (N, H, W, 3), 0-255; may be mapped from a file, read-only.
        targets: int64 (N,), indices into the source's class names.
        sha256: of the bytes of `images`, then of `targets`.
    """

    images: np.ndarray
    targets: np.ndarray
    sha256: str


class Source(Protocol):
    """What the rest needs of a data set. Everything but the images is known without downloading or decoding.

    (Properties, so that fields of frozen dataclasses fit.)
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the targets."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""

    @property
    def in_channels(self) -> int:
        """Colour channels: 3."""

    @property
    def mean(self) -> Channels | None:
        """Published mean of each channel of the training images scaled to 0-1, or None: to be measured."""

    @property
    def std(self) -> Channels | None:
        """The same of the standard deviation."""

    def prepare(self) -> None:
        """Downloads, or decodes into a cache, once; safe to call again and from several processes.

        Raises:
            UserError: The data cannot be had, or is damaged.
        """

    def load(self, split: Split) -> ImageSet | None:
        """Reads a split; None if there is none of that name.

        Raises:
            UserError: The data is missing or damaged.
        """

    def describe(self) -> str:
        """One line for the terminal."""


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html), read by torchvision.

    Args:
        name: cifar10 or cifar100.
        root: Folder that holds the archive or what it unpacks to.
        class_names: In the order of the targets.
        mean: Mean of each channel of the training images, 0-1.
        std: Standard deviation of the same.
    """

    name: Literal["cifar10", "cifar100"]
    root: Path
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels
    image_size: int = 32
    in_channels: int = 3

    def prepare(self) -> None:
        """Downloads and unpacks the archive unless it is there."""
        download(self.name, self.root)

    def load(self, split: Split) -> ImageSet | None:
        """Reads 50,000 images of train or 10,000 of test; torchvision checks the MD5 of each file."""
        if split == "val":
            return None
        from torchvision import datasets  # takes seconds to import

        folder = download(self.name, self.root)
        reader = datasets.CIFAR10 if self.name == "cifar10" else datasets.CIFAR100
        with warnings.catch_warnings():
            # The archives were pickled by an old NumPy; 2.4.0 to 2.4.4 warn of each array (numpy pull request 31177).
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            try:
                read = reader(self.root, train=split == "train", download=False)
            except (RuntimeError, OSError, EOFError) as error:
                raise UserError(
                    f"{folder} is incomplete or damaged: {' '.join(str(error).split())}\n"
                    f"Delete it and start again: it is made from {ARCHIVES[self.name].filename}, or downloaded."
                ) from error
        assert tuple(read.classes) == self.class_names
        targets = np.asarray(read.targets, dtype=np.int64)
        return ImageSet(read.data, targets, digest(read.data, targets))

    def describe(self) -> str:
        """One line for the terminal."""
        return f"{self.name}: 50,000 + 10,000 images, {len(self.class_names)} classes, 32x32, in {self.root}"


@dataclass(frozen=True)
class Folder:
    """Somebody's own images, as class folders.

    Args:
        root: Folder with `train/<class>/*`, `test/<class>/*` and perhaps `val/<class>/*`.
        wanted_size: Side of the squares in pixels; None finds one that suits the images.
    """

    root: Path
    wanted_size: int | None = None
    mean: None = None
    std: None = None
    in_channels: int = 3
    _folders: ClassFolders = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_folders", ClassFolders(self.root, self.wanted_size))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the folders, sorted."""
        return self._folders.class_names

    @property
    def image_size(self) -> int:
        """Side of the squares in pixels."""
        return self._folders.image_size

    def prepare(self) -> None:
        """Decodes the images into the cache unless they are there."""
        self._folders.prepare()

    def load(self, split: Split) -> ImageSet | None:
        """Reads a split from the cache, or decodes it."""
        loaded = self._folders.load(split)
        return loaded and ImageSet(*loaded)

    def describe(self) -> str:
        """One line for the terminal."""
        counts = {split: len(listing.names) for split, listing in self._folders.listings.items()}
        parts = " + ".join(f"{count:,} {split}" for split, count in counts.items())
        size = f"{self.image_size}x{self.image_size}"
        return f"folder: {parts} images, {len(self.class_names)} classes, {size}, in {self.root}"


@dataclass(frozen=True)
class Synthetic:
    """Generated images of ten classes: for the quick start and for tests.

    Args:
        num_train: Training images.
        num_test: Test images.
        image_size: Height and width in pixels, at least 16.
    """

    num_train: int = 5000
    num_test: int = 1000
    image_size: int = 32
    class_names: tuple[str, ...] = synthetic.CLASS_NAMES
    mean: None = None
    std: None = None
    in_channels: int = 3

    def __post_init__(self) -> None:
        synthetic.check(self.num_train, self.image_size)
        synthetic.check(self.num_test, self.image_size)

    def prepare(self) -> None:
        """Nothing to do: images are drawn in a second."""

    def load(self, split: Split) -> ImageSet | None:
        """Draws train or test."""
        if split == "val":
            return None
        return _drawn(split, self.num_train if split == "train" else self.num_test, self.image_size)

    def describe(self) -> str:
        """One line for the terminal."""
        size = f"{self.image_size}x{self.image_size}"
        return (
            f"synthetic: {self.num_train:,} + {self.num_test:,} generated images, {len(self.class_names)} classes, "
            f"{size} (not a real data set)"
        )


@functools.lru_cache(maxsize=2)  # the last train and test: a fit that tests afterwards draws once
def _drawn(split: str, count: int, image_size: int) -> ImageSet:
    images, targets = synthetic.draw(split, count, image_size)
    images.flags.writeable = targets.flags.writeable = False  # shared by all who ask
    return ImageSet(images, targets, digest(images, targets))


def open_source(dataset: str, root: str | Path, image_size: int | None = None) -> Source:
    """Finds a data set by name, without downloading or decoding.

    Args:
        dataset: One of `DATASETS`.
        root: Where its images lie or are downloaded to; synthetic needs none.
        image_size: Side of the images in pixels; None is the data set's own.

    Raises:
        UserError: An unknown name, a size that the data set does not have, or class folders that do not fit.
    """
    root = Path(root)
    if dataset in ("cifar10", "cifar100") and image_size not in (None, 32):
        raise UserError(
            f"--data.image_size {image_size}: {dataset} is 32 pixels, resizing it is not supported; leave the flag out"
        )
    match dataset:
        case "cifar10":  # mean and std: of the 50,000 training images, as published with most CIFAR-10 code
            return Cifar("cifar10", root, CIFAR10_CLASSES, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        case "cifar100":
            return Cifar("cifar100", root, CIFAR100_CLASSES, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
        case "folder":
            return Folder(root, image_size)
        case "synthetic":
            return Synthetic(image_size=32 if image_size is None else image_size)
    near = difflib.get_close_matches(str(dataset), DATASETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--data.dataset {dataset}: unknown, choose one of {', '.join(DATASETS)}{hint}")
