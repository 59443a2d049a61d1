"""The table of data sets: cifar10, cifar100, folder, shards and synthetic, all read as uint8 NumPy arrays.

To add a data set: write a class with the members of `Source` and give it a line in `DATASETS` at the end of this file.
Its key is a value of `--data.dataset`, once `python -m cifar_lightning.cli.lightning_cli` has written the table of
flags again. How a source is used:

    source = open_source("cifar10", "data", None)   class names and image size are known, nothing is downloaded yet
    source.prepare()                                 downloads, or decodes into a cache; safe to call again
    source.load("train")                             ImageSet, or None for a split that the source does not have
"""

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from cifar_lightning.data import synthetic
from cifar_lightning.data.download import ARCHIVES, download
from cifar_lightning.data.image_decoding import Resize
from cifar_lightning.data.image_folder import ClassFolders, holds_class_folders
from cifar_lightning.data.image_set import SPLITS, Cache, ImageSet, Split, as_gray, digest
from cifar_lightning.data.shards import Shards
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, printable, raised_by, suggest
from cifar_lightning.settings.import_path import import_object, is_import_path

Channels = tuple[float, float, float]

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


@runtime_checkable
class Source(Protocol):
    """A data set. Everything but the images is known without downloading or decoding.

    A source may also have `mean` and `std` of each channel of its training images, scaled to 0-1, as published; without
    them they are measured. What is missing or damaged raises `UserError`. (Properties, so that fields of frozen
    dataclasses fit.)
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the targets."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""

    def prepare(self) -> None:
        """Download, or decode into a cache, once; safe to call again and from several processes."""

    def load(self, split: Split) -> ImageSet | None:
        """Read a split, uint8 RGB squares of `image_size` with their classes; return None if the source lacks it."""

    def describe(self) -> str:
        """Return one line for the terminal."""


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html), read by torchvision."""

    name: Literal["cifar10", "cifar100"]
    root: Path
    wanted_size: int | None
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels
    image_size: int = 32

    def __post_init__(self) -> None:
        if self.wanted_size not in (None, self.image_size):
            raise UserError(
                f"--data.image_size {self.wanted_size}: {self.name} has 32-pixel images and they are not resized; "
                "leave the flag out"
            )

        archive = ARCHIVES[self.name]
        is_here = any(
            (self.root / name).exists() for name in (archive.filename, f"{archive.filename}.part", archive.folder)
        )
        if not is_here and holds_class_folders(self.root):
            raise UserError(
                f"--data.root {self.root}: holds class folders, and {self.name} would be downloaded into it.\n"
                f"For these images give --data.dataset folder; for {self.name} another --data.root."
            )

    def prepare(self) -> None:
        """Download and unpack the archive unless it is there."""
        download(self.name, self.root)

    def load(self, split: Split) -> ImageSet | None:
        """Read the 50,000 training or 10,000 test images; torchvision checks the MD5 of each file."""
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
                    f"Delete it and start again: it is unpacked from {ARCHIVES[self.name].filename}, or downloaded."
                ) from error
        assert tuple(read.classes) == self.class_names
        targets = np.asarray(read.targets, dtype=np.int64)
        return ImageSet(read.data, targets, digest(read.data, targets))

    def describe(self) -> str:
        """Return one line for the terminal."""
        return f"{self.name}: 50,000 + 10,000 images, {len(self.class_names)} classes, 32x32, in {self.root}"


@dataclass(frozen=True)
class Synthetic:
    """Generated images of ten classes, for the quick start and for tests."""

    num_train: int = 5000
    num_test: int = 1000
    image_size: int = 32
    class_names: tuple[str, ...] = synthetic.CLASS_NAMES

    def __post_init__(self) -> None:
        synthetic.check(self.num_train, self.image_size)
        synthetic.check(self.num_test, self.image_size)

    def prepare(self) -> None:
        """Do nothing: images are drawn in a second."""

    def load(self, split: Split) -> ImageSet | None:
        """Draw the training or test images."""
        if split == "val":
            return None
        return _drawn(split, self.num_train if split == "train" else self.num_test, self.image_size)

    def describe(self) -> str:
        """Return one line for the terminal."""
        size = f"{self.image_size}x{self.image_size}"
        return (
            f"synthetic: {self.num_train:,} + {self.num_test:,} generated images, {len(self.class_names)} classes, "
            f"{size} (not a real data set)"
        )


@functools.lru_cache(maxsize=2)  # the last train and test: a fit with its test draws each once
def _drawn(split: str, count: int, image_size: int) -> ImageSet:
    images, targets = synthetic.draw(split, count, image_size)
    images.flags.writeable = targets.flags.writeable = False  # shared by all callers
    return ImageSet(images, targets, digest(images, targets))


DATASETS: dict[str, Callable[..., Source]] = {
    "cifar10": lambda root, image_size: Cifar(
        "cifar10", Path(root), image_size, CIFAR10_CLASSES, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": lambda root, image_size: Cifar(
        "cifar100", Path(root), image_size, CIFAR100_CLASSES, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "folder": ClassFolders,
    "shards": Shards,
    "synthetic": lambda root, image_size: Synthetic(image_size=32 if image_size is None else image_size),
}
"""Makes a source by the name that `--data.dataset` takes, of root, image_size or None and settings by their names."""


def open_source(
    dataset: str | Any,
    root: str | Path,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    resize: Resize = "crop",
    cache: Cache | None = None,
    **of_folder: Any,
) -> Source:
    """Return a data set by name, import path or object, without downloading or decoding.

    An object that does not say what classes it has is read for it. `of_folder` are arguments of `ClassFolders`.

    Raises:
        UserError: An unknown name, a size or setting that the data set does not have, invalid class folders, or an
            object that is no data set.
    """
    name = dataset if isinstance(dataset, str) else ""
    settings = of_folder | ({} if cache is None else {"cache": cache})
    if name in DATASETS:
        if class_names:
            raise UserError(f"--data.class_names: only for a data set of your own; {name} has names.")
        settings |= {"resize": resize}  # the others' images are squares
        taken = settings.keys() & inspect.signature(DATASETS[name]).parameters.keys()
        _refuse({key: value for key, value in settings.items() if key not in taken}, name)
        return DATASETS[name](root, image_size, **{key: settings[key] for key in taken})
    _refuse(settings, name or type(dataset).__name__)
    if name and not is_import_path(name):
        hint, names = suggest(name, [*DATASETS]), ", ".join(DATASETS)
        raise UserError(f"--data.dataset {clipped(name)}: unknown; one of {names}, or package.module:name.{hint}")
    given = import_object(name, "--data.dataset") if name else dataset
    if isinstance(given, type) or (callable(given) and not hasattr(given, "__getitem__")):
        given = _made(given, name or getattr(given, "__name__", type(given).__name__))
    if isinstance(given, Source):
        if class_names or image_size not in (None, given.image_size) or resize != "crop":
            kind = type(given).__name__
            raise UserError(
                f"--data.image_size, --data.class_names and --data.resize: {kind} has its own; leave them out."
            )
        return given
    from cifar_lightning.data.object_source import ObjectSource, kind_of  # imports torch and Lightning

    return ObjectSource(given, image_size, class_names, name or kind_of(given), resize)


def class_names_of(source: Source) -> tuple[str, ...]:
    """Return the class names of a source, which may have them as a list or as numbers.

    Raises:
        UserError: Two of them are equal.
    """
    names = tuple(map(str, source.class_names))
    if twice := [name for name, num in Counter(names).items() if num > 1]:
        raise UserError(f"{source.describe()}: two classes are named {clipped(printable(twice[0]))}.")
    return names


def load_splits(source: Source, in_channels: int) -> dict[Split, ImageSet]:
    """Read the splits that a source has; RGB images become gray for `in_channels` 1.

    Raises:
        UserError: It returns other arrays than `Source` says.
    """
    loaded = {split: source.load(split) for split in SPLITS}
    found = {split: image_set for split, image_set in loaded.items() if image_set is not None}
    for split, image_set in found.items():
        if fault := _fault_of(image_set, source.image_size, {3, in_channels}, len(source.class_names)):
            size, last = source.image_size, len(source.class_names) - 1
            raise UserError(
                f"--data.dataset {type(source).__name__}: load({split!r}) returns {clipped(fault)}.\nNeeded: "
                f"ImageSet(images, targets, sha256) of uint8 (n, {size}, {size}, {in_channels}) and int64 (n,), "
                f"0 to {last}."
            )
    return {split: as_gray(image_set) if in_channels == 1 else image_set for split, image_set in found.items()}


def _fault_of(image_set: Any, image_size: int, channels: set[int], num_classes: int) -> str:
    """Return what is wrong with an image set; empty if nothing is."""
    if not isinstance(image_set, ImageSet):
        return f"{type(image_set).__name__}, not an ImageSet"
    images, targets, _ = image_set
    shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
    is_square = len(shape) == 4 and shape[0] > 0 and shape[1] == shape[2] == image_size and shape[3] in channels
    if not is_square or getattr(images, "dtype", None) != np.uint8:
        return f"images {_kind_of(images)}"
    if not isinstance(targets, np.ndarray) or targets.dtype != np.int64 or targets.shape != shape[:1]:
        return f"targets {_kind_of(targets)} of {shape[0]:,} images"
    low, high = int(targets.min()), int(targets.max())
    return "" if 0 <= low <= high < num_classes else f"targets from {low} to {high}"


def _kind_of(array: Any) -> str:
    about = (str(getattr(array, name)) for name in ("dtype", "shape") if hasattr(array, name))
    return " ".join([type(array).__name__, *about])


def _refuse(of_folder: dict[str, Any], what: str) -> None:
    """Refuse settings of a folder that are not at their defaults, and any cache."""
    defaults = inspect.signature(ClassFolders).parameters
    for key, value in of_folder.items():
        if value != defaults[key].default or key == "cache":
            text = str(value).lower() if isinstance(value, bool) else value
            which = [name for name, make in DATASETS.items() if key in inspect.signature(make).parameters]
            raise UserError(f"--data.{key} {text}: only for --data.dataset {' and '.join(which)}, not {clipped(what)}.")


def _made(make: Callable[[], Any], name: str) -> Any:
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UserError(f"--data.dataset {name}: {error}; it is called without arguments.") from error
    except ValueError:  # of builtins, which may have no signature
        pass
    try:
        return make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # code of the user's raises anything
        raise UserError(f"--data.dataset {name}: it raises {raised_by(error)}.") from error
