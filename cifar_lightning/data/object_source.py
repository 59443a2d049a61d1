"""Data sets given as objects: a PyTorch Dataset, a Hugging Face data set, arrays, or (train, test) of them.

Every image is read once, as uint8 RGB. Nothing is cached on disk: whether an object still returns what it returned
yesterday is only known after it has returned all of it.
"""

import multiprocessing
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from cifar_lightning.data.image_decoding import choose_image_size, decode_image, header_size, square_of
from cifar_lightning.data.image_set import SPLITS, ImageSet, Split, digest
from cifar_lightning.data.loaders import leave_signals_to_parent
from cifar_lightning.data.memory import usable_cpus
from cifar_lightning.data.progress import progress
from cifar_lightning.data.statistics import evenly_spaced
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import clipped, printable, reason_of

IMAGE_KEYS = ("image", "img", "pixel_values")  # of samples that are dicts; the first one that is there
LABEL_KEYS = ("label", "labels", "fine_label", "target")
_SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_CHANNELS = (1, 3, 4)
_NUM_PROBES = 32  # samples that decide the image size, and that are read twice; a random flip escapes in 1 of 2^32
_SERIAL_S = 3.0  # of reading; starting worker processes pays above it
_BATCH = 64  # samples that a worker sends back at once
_MAX_WORKERS = 16
_CHUNK = 1024  # images of an array that are converted at once
_LOGGED_FROM = 2_000  # samples: fewer are not worth a line in a log
_FORMS = (
    "a Dataset with __len__ and __getitem__, a Hugging Face data set, (images, labels) arrays, or (train, test) or "
    "(train, val, test) of them"
)


class ObjectSource:
    """A data set given as an object.

    Args:
        given: A map-style Dataset, a Hugging Face Dataset or DatasetDict, arrays (images, labels), (train, test) or
            (train, val, test) of any of them, or a function without arguments that returns one.
        image_size: Height and width in pixels. By default that of the images where all of a sample are squares of one
            size, otherwise chosen as for class folders.
        class_names: Names in the order of the labels; by default those that the data set knows.
        name: How messages call the object.

    Raises:
        UserError: Another object, another form of the samples, or labels that are not 0 to n-1.
    """

    mean: None = None
    std: None = None

    def __init__(self, given: Any, image_size: int | None, class_names: Sequence[str] | None, name: str) -> None:
        self.name = name
        self._samples = {split: _samples_of(each, f"{name}: {split}") for split, each in _splits_of(given, name)}
        sizes = {split: samples.probe() for split, samples in self._samples.items()}
        self.image_size = image_size or choose_image_size(sizes["train"], is_square_kept=True)
        self._read: dict[Split, tuple[np.ndarray, np.ndarray]] = {}
        self._loaded: dict[Split, ImageSet] = {}
        self.class_names = self._find_class_names(class_names)

    def prepare(self) -> None:
        """Read the images; what has been read is kept, and the objects are not."""
        for split in SPLITS:
            self.load(split)
        self._samples.clear()

    def load(self, split: Split) -> ImageSet | None:
        """Return the images of a split; None if it is not given."""
        if split not in self._loaded and split in self._samples:
            read = self._read.pop(split) if split in self._read else self._samples[split].read(self.image_size)
            images, labels = read
            targets = self._targets(split, labels)
            self._loaded[split] = ImageSet(images, targets, digest(images, targets))
        return self._loaded.get(split)

    def describe(self) -> str:
        """Return one line for the terminal."""
        nums = {split: len(each.targets) for split, each in self._loaded.items()} or {
            split: len(samples) for split, samples in self._samples.items()
        }
        counts = " + ".join(f"{num:,}{'' if len(nums) == 1 else f' {split}'}" for split, num in nums.items())
        size = f"{self.image_size}x{self.image_size}"
        return f"{self.name}: {counts} images, {len(self.class_names)} classes, {size}"

    def _find_class_names(self, chosen: Sequence[str] | None) -> tuple[str, ...]:
        names = chosen or _known_class_names(self._samples["train"].dataset)
        if names is None:
            labels = self._train_labels()
            if labels.dtype.kind == "U":
                return tuple(map(str, np.unique(labels)))
            self._refuse_negative("train", labels)
            names = [str(label) for label in range(int(labels.max(initial=0)) + 1)]
            if missing := sorted({*range(len(names))} - {*labels.tolist()}):
                raise UserError(
                    f"--data.dataset {self.name}: labels must be 0 to n-1; the largest is {len(names) - 1}, and no "
                    f"training image has {missing[0]}.\nNumber them again, or give --data.class_names if it is right."
                )
        if len({*names}) < len(names):
            raise UserError(f"--data.class_names: {printable(max(names, key=list(names).count))} is given twice.")
        return tuple(map(str, names))

    def _train_labels(self) -> np.ndarray:
        """Return the labels of the training images, which are read for it: their number of classes is not known."""
        self._read["train"] = self._samples["train"].read(self.image_size)
        return self._read["train"][1]

    def _targets(self, split: Split, labels: np.ndarray) -> np.ndarray:
        where, num = f"--data.dataset {self.name}: {split}", len(self.class_names)
        if labels.dtype.kind == "U":
            if unknown := sorted({*labels.tolist()} - {*self.class_names}):
                raise UserError(
                    f"{where}: label {printable(unknown[0])} is none of the classes "
                    f"{clipped(', '.join(self.class_names))}; correct it, or give all names by --data.class_names."
                )
            index = {name: at for at, name in enumerate(self.class_names)}
            return np.array([index[label] for label in labels.tolist()], np.int64)
        self._refuse_negative(split, labels)
        if (high := int(labels.max())) >= num:
            raise UserError(
                f"{where}: labels up to {high}; for {num} classes ({clipped(', '.join(self.class_names))}) they must "
                f"be 0 to {num - 1}."
            )
        return labels.astype(np.int64)

    def _refuse_negative(self, split: Split, labels: np.ndarray) -> None:
        where, low = f"--data.dataset {self.name}: {split}", int(labels.min())
        if low == -1 == labels.max():
            raise UserError(f"{where}: no labels (all are -1); without a test set of its own, one is split off train.")
        if low < 0:
            raise UserError(f"{where}: label {low}; labels must be 0 to n-1.")


# -- which object it is -------------------------------------------------------------------------------------------


def _splits_of(given: Any, name: str) -> Iterator[tuple[Split, Any]]:
    if isinstance(given, Mapping) and not hasattr(given, "features"):
        by_split = {_SPLIT_NAMES[key]: each for key, each in given.items() if key in _SPLIT_NAMES}
        if "train" not in by_split:
            raise UserError(f"--data.dataset {name}: no train among its splits {clipped(', '.join(map(str, given)))}.")
        if unused := [str(key) for key in given if key not in _SPLIT_NAMES]:
            remark(f"{name}: only train, validation and test are used, not {clipped(', '.join(unused))}")
        yield from by_split.items()
    elif isinstance(given, tuple | list) and len(given) in (2, 3) and not _is_array(given[0]):
        splits: tuple[Split, ...] = ("train", "test") if len(given) == 2 else SPLITS
        for split, each in zip(splits, given, strict=True):
            if each is not None or split == "train":
                yield split, each
    else:
        yield "train", given


def kind_of(given: Any) -> str:
    """Return the type of an object, of several that of the first."""
    while isinstance(given, tuple | list | dict) and given and not _is_array(given):
        given = next(iter(given.values())) if isinstance(given, dict) else given[0]
    return "arrays" if _is_array(given) else type(given).__name__


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor)


def _samples_of(given: Any, where: str) -> "_Samples":
    if isinstance(given, tuple | list) and len(given) == 2 and _is_array(given[0]):
        images, labels = given
        labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if len(images) != len(labels):
            raise UserError(f"--data.dataset {where}: {len(images):,} images and {len(labels):,} labels.")
        return _Samples(_Pairs(images, labels), where)
    problem = ""
    if isinstance(given, IterableDataset) or (hasattr(given, "features") and not hasattr(given, "__len__")):
        problem = "an iterable data set has no order and no length"
    elif isinstance(given, DataLoader):
        problem = "a DataLoader; give its dataset"
    elif missing := [each for each in ("__len__", "__getitem__") if not hasattr(given, each)]:
        problem = f"it has no {' and no '.join(missing)}"
    elif isinstance(given, str | bytes | Mapping) or _is_array(given):
        problem = "labels are missing" if _is_array(given) else "it holds no samples"
    if problem:
        raise UserError(f"--data.dataset {where}: {type(given).__name__}: {problem}.\nNeeded: {_FORMS}.")
    return _Samples(given, where)


class _Pairs(Dataset[tuple[Any, Any]]):
    """Images and labels as arrays."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def _arrays_of(dataset: Any) -> tuple[Any, Any] | None:
    """Return (images, labels) of a set whose samples are the rows of its arrays; None for any other."""
    reads: Any = getattr(type(dataset), "__getitem__", None)
    if isinstance(dataset, _Pairs):
        return dataset.images, dataset.labels
    if reads is TensorDataset.__getitem__ and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    if reads is Subset.__getitem__ and (inner := _arrays_of(dataset.dataset)):
        return inner[0][dataset.indices], np.asarray(inner[1])[dataset.indices]
    if reads is ConcatDataset.__getitem__:
        parts = [arrays for each in dataset.datasets if (arrays := _arrays_of(each))]
        if len(parts) == len(dataset.datasets) and len({np.shape(images)[1:] for images, _ in parts}) == 1:
            return np.concatenate([np.asarray(images) for images, _ in parts]), np.concatenate(
                [np.asarray(labels) for _, labels in parts]
            )
    is_torchvisions = getattr(reads, "__module__", "").startswith("torchvision.datasets.")
    if is_torchvisions and getattr(dataset, "transforms", True) is None and _is_array(getattr(dataset, "data", None)):
        of_rows: Any = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if np.shape(of_rows) == (len(dataset),):
            return dataset.data, of_rows
    return None


def _known_class_names(dataset: Any) -> list[str] | None:
    """Return the names that a data set has, or the one that it wraps."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        of_labels = [features[key] for key in (*LABEL_KEYS, *features) if hasattr(features.get(key), "names")]
        return list(of_labels[0].names) if of_labels else None
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and classes:  # those of ImageNet are tuples of synonyms
        return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes]
    inner = getattr(dataset, "dataset", None) or next(iter(getattr(dataset, "datasets", None) or ()), None)
    return None if inner is None else _known_class_names(inner)


# -- samples ------------------------------------------------------------------------------------------------------


class _Samples(Dataset[Any]):
    """The samples of a split, as (uint8 image, label) of a size, or the reason why one cannot be read."""

    def __init__(self, dataset: Any, where: str) -> None:
        self.dataset, self.name, self.where, self.image_size = dataset, where, f"--data.dataset {where}", 0
        self.form = ""
        try:
            self._num = len(dataset)
        except (TypeError, NotImplementedError, AttributeError) as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise UserError(f"{self.where}: {type(dataset).__name__}: its __len__ fails ({reason}).") from error
        if not self._num:
            raise UserError(f"{self.where}: empty; it needs images of every class.")
        self._probes = evenly_spaced(self._num, _NUM_PROBES).tolist()

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> tuple[np.ndarray, int | str] | str:
        try:
            image, label = self._pair(self.dataset[index])
            return to_square(image, self.image_size), _label(label)
        except Exception as error:  # code of the user's raises anything
            return self._problem(index, error)

    def _problem(self, index: int, error: Exception) -> str:
        if isinstance(error, UserError):  # of the form of a sample
            return f"{self.where}: sample {index:,}: {error}{self.form}"
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        line = f", {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else ""
        return f"{self.where}: sample {index:,} cannot be read ({type(error).__name__}: {reason_of(error)}{line})."

    def _pair(self, sample: Any) -> tuple[Any, Any]:
        """Return image and label of a sample."""
        if isinstance(sample, Mapping):
            features = getattr(self.dataset, "features", None) or {}
            of_features = [key for key in features if hasattr(features[key], "names")]
            keys = [next((key for key in names if key in sample), None) for names in (IMAGE_KEYS, LABEL_KEYS)]
            keys[1] = keys[1] or next(iter(of_features), None)
            if None in keys:
                raise UserError(
                    f"a dict of {clipped(', '.join(map(str, sample)))}; it needs one of {', '.join(IMAGE_KEYS)} and "
                    f"one of {', '.join(LABEL_KEYS)}."
                )
            return sample[keys[0]], sample[keys[1]]
        if isinstance(sample, tuple | list) and len(sample) == 2:
            return sample[0], sample[1]
        if _is_array(sample) or isinstance(sample, Image.Image):
            raise UserError("an image without a label; predict-images predicts images that have none.")
        raise UserError("(image, label) is needed.")

    def probe(self) -> list[tuple[int, int]]:
        """Return width and height of some images; refuse samples of another form."""
        found = []
        with isolate_rng(include_cuda=False):
            for index in self._probes:
                try:
                    sample = self.dataset[index]
                    self.form = self.form or f"\nThe first sample is {_form(sample)}."
                    image, label = self._pair(sample)
                    _label(label)
                    found.append(_size(image))
                except Exception as error:  # code of the user's raises anything
                    raise UserError(self._problem(index, error)) from error
        return found

    def read(self, image_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all images uint8 (N, image_size, image_size, 3), and labels, integers or text (N,)."""
        self.image_size = image_size
        with isolate_rng(include_cuda=False):
            arrays = _arrays_of(self.dataset)
            try:
                images, labels = self._read_all() if arrays is None else _read_arrays(*arrays, image_size)
            except UserError as error:
                raise UserError(f"{self.where}: {error}{self.form}" if arrays else str(error)) from error
            for index in self._probes:
                again = self._checked(self[index])
                if again[1] != labels[index] or not np.array_equal(again[0], images[index]):
                    raise UserError(
                        f"{self.where}: sample {index:,} differs between two reads; images are read once.\n"
                        "Take random transforms out of the data set and give them by --data.transforms."
                    )
        return images, labels

    def _read_all(self) -> tuple[np.ndarray, np.ndarray]:
        num, began = len(self), time.monotonic()
        images = np.empty((num, self.image_size, self.image_size, 3), np.uint8)
        labels: list[int | str] = []
        with progress(num, f"Reading images of {self.name}") as show:
            for batch in self._batches():
                for image, label in map(self._checked, batch):
                    images[len(labels)] = image
                    labels.append(label)
                show(len(labels))
        if len({isinstance(label, str) for label in labels}) > 1:
            raise UserError(f"{self.where}: some labels are text and some are numbers.")
        if num >= _LOGGED_FROM and not sys.stderr.isatty():
            remark(f"Read {num:,} images of {self.name} in {time.monotonic() - began:.1f} s")
        return images, np.asarray(labels)

    def _checked(self, read: tuple[np.ndarray, int | str] | str) -> tuple[np.ndarray, int | str]:
        if isinstance(read, str):
            raise UserError(read)
        return read

    def _batches(self) -> Iterator[list[Any]]:
        began = time.monotonic()
        first = [self[index] for index in range(min(_NUM_PROBES, len(self)))]
        yield first
        expected_s = (time.monotonic() - began) / len(first) * (len(self) - len(first))
        rest = Subset(self, range(len(first), len(self)))
        num_workers = min(usable_cpus(), _MAX_WORKERS) if expected_s > _SERIAL_S and _is_forkable(self.dataset) else 0
        yield from DataLoader(
            rest,
            batch_size=_BATCH,
            collate_fn=list,
            num_workers=num_workers if num_workers > 1 else 0,
            multiprocessing_context="fork" if num_workers > 1 else None,
            worker_init_fn=leave_signals_to_parent,
        )


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _is_forkable(dataset: Any) -> bool:
    """Whether forked processes can read a data set at once.

    One that cannot be pickled may hold an open file, whose position they would have in common: images would be mixed.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":  # unsafe there
        return False
    try:
        pickle.Pickler(cast(Any, _Nowhere()), protocol=5, buffer_callback=lambda buffer: None).dump(dataset)
    except Exception:  # reductions of the user's classes raise anything
        return False
    return True


def _form(sample: Any) -> str:
    """Return the types of a sample, as an error shows them."""
    if isinstance(sample, Mapping):
        return f"{{{', '.join(f'{key}: {_form(value)}' for key, value in list(sample.items())[:6])}}}"
    if isinstance(sample, tuple | list):
        return f"({', '.join(map(_form, sample[:4]))}{', ...' if len(sample) > 4 else ''})"
    if _is_array(sample):
        return f"{type(sample).__name__} {str(sample.dtype).removeprefix('torch.')} {tuple(sample.shape)}"
    return f"{type(sample).__name__}{f' {sample.mode} {sample.size}' if isinstance(sample, Image.Image) else ''}"


def _label(label: Any) -> int | str:
    if isinstance(label, str):
        return label
    if isinstance(label, list | tuple) or (_is_array(label) and label.reshape(-1).shape != (1,)):
        raise UserError("several values a label; one class an image is needed, of a one-hot label its argmax.")
    if _is_array(label):
        label = label.item()
    if label is None:
        raise UserError("no label; predict-images predicts images that have none.")
    if isinstance(label, float | np.floating):
        raise UserError(f"label {label} is a float; give int(label) if it is the number of a class.")
    if not isinstance(label, int | np.integer | np.bool_):
        raise UserError(f"a label of type {type(label).__name__}; a whole number or the name of a class is needed.")
    return int(label)


def _encoded(image: Any) -> bytes | str | None:
    """Return the content or the path of an image file in a sample, as Hugging Face has it; None for other images."""
    if isinstance(image, Mapping) and {"bytes", "path"} & {*image}:
        return image.get("bytes") or image.get("path")
    return image if isinstance(image, bytes) else None


def _size(image: Any) -> tuple[int, int]:
    """Return width and height of an image."""
    if isinstance(image, Image.Image):
        return image.size
    if encoded := _encoded(image):
        return header_size(encoded)
    height, width, _ = _pixels(image).shape
    return width, height


def to_square(image: Any, image_size: int) -> np.ndarray:
    """Return an image as uint8 RGB (image_size, image_size, 3)."""
    if isinstance(image, Image.Image):
        return square_of(image, image_size)
    if encoded := _encoded(image):
        if isinstance(encoded, str):
            return decode_image(encoded, image_size)
        return decode_image("the image", image_size, read=lambda _: encoded)
    square: np.ndarray = _squares(_pixels(image)[None], image_size)[0]
    return square


def _read_arrays(images: Any, labels: Any, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray([_label(label) for label in labels])
    first = _squares(_pixels(images[:1], is_batch=True), image_size)
    if np.shape(images)[1:] == first.shape[1:] and str(images.dtype).endswith("uint8"):
        return np.ascontiguousarray(images), labels
    squares = np.empty((len(images), *first.shape[1:]), np.uint8)
    for start in range(0, len(images), _CHUNK):
        stop = start + _CHUNK
        squares[start:stop] = _squares(_pixels(images[start:stop], is_batch=True), image_size)
    return squares, labels


def _pixels(image: Any, *, is_batch: bool = False) -> np.ndarray:
    """Return an array or tensor (..., H, W), (..., H, W, C) or (..., C, H, W) as uint8 (..., H, W, C)."""
    if not _is_array(image):
        raise UserError(f"an image of type {type(image).__name__}; a Pillow image, an array or a tensor is needed.")
    array: np.ndarray = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    shape = array.shape[is_batch:]
    if len(shape) == 2:
        array = array[..., None]
    elif len(shape) == 3 and shape[0] in _CHANNELS and (isinstance(image, Tensor) or shape[2] not in _CHANNELS):
        array = np.moveaxis(array, -3, -1)
    elif len(shape) != 3 or shape[2] not in _CHANNELS:
        raise UserError(f"an image of shape {tuple(shape)}; (H, W, C) or (C, H, W) of 1, 3 or 4 channels is needed.")
    if array.dtype == np.uint8:
        return array
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if array.dtype.kind == "b":
        return np.where(array, np.uint8(255), np.uint8(0))
    if array.dtype.kind in "iu" and 0 <= low <= high <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and -1e-3 <= low <= high <= 1 + 1e-3:  # resizing may leave 0 to 1 by little
        scaled: np.ndarray = np.rint(array.astype(np.float32).clip(0, 1) * 255)
        return scaled.astype(np.uint8)
    way_out = "Convert them to uint8, or divide them by their white, such as 255."
    if low < 0:
        way_out = "Drop Normalize from the transforms; batches are normalized on the device."
    raise UserError(
        f"pixels of type {array.dtype} from {low:.4g} to {high:.4g}; uint8, or float from 0 to 1, is needed.\n{way_out}"
    )


def _squares(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """Return uint8 (N, H, W, C) as uint8 RGB (N, image_size, image_size, 3)."""
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    if pixels.shape[1:] == (image_size, image_size, 3):
        return pixels
    return np.stack([square_of(Image.fromarray(np.ascontiguousarray(each)), image_size) for each in pixels])
