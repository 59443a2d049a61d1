"""Data sets given as objects: a PyTorch Dataset, a Hugging Face data set, arrays, or (train, test) of them.

Every image is read once, as uint8 RGB. Nothing is cached on disk: whether an object still returns what it returned
yesterday is only known after it has returned all of it.
"""

import io
import multiprocessing
import os
import pickle
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, StackDataset, Subset, TensorDataset

from cifar_lightning.data.image_decoding import Resize, choose_image_size, open_image, square_of
from cifar_lightning.data.image_set import SPLIT_OF_WORD, SPLITS, ImageSet, Split, digest
from cifar_lightning.data.loaders import leave_signals_to_parent
from cifar_lightning.data.memory import check_fits, usable_cpus
from cifar_lightning.data.progress import progress
from cifar_lightning.data.statistics import evenly_spaced
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import clipped, printable, raised_by

# Keys of samples that are dicts; the first one that is there.
_IMAGE_KEYS, _LABEL_KEYS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label", "target")
_CHANNELS = (1, 3, 4)
_NUM_PROBES = 32  # samples that decide the image size and are read twice; a random flip escapes in 1 of 2^32
_SERIAL_S = 3.0  # of reading; starting worker processes pays above it
_MAX_WORKERS = 16
_BATCH = 64  # samples that a worker sends back at once
_CHUNK = 1024  # images of an array that are converted at once
_LOGGED_FROM = 2_000  # samples: fewer are not worth a line in a log
_FORMS = (
    "a Dataset with __len__ and __getitem__, a Hugging Face data set, (images, labels) arrays, or (train, test) or "
    "(train, val, test) of them"
)


class ObjectSource:
    """A data set given as an object.

    Args:
        given: A map-style Dataset, a Hugging Face Dataset or DatasetDict, arrays (images, labels), or (train, test) or
            (train, val, test) of any of them.
        image_size: Height and width in pixels. By default that of the images where all of a sample are squares of one
            size, otherwise chosen as for class folders.
        class_names: Names in the order of the labels; by default those that the data set knows.
        name: How messages call the object.
        resize: How an image that is no square of `image_size` becomes one.

    Raises:
        UserError: Another object, another form of the samples, or labels that are not 0 to n-1.
    """

    def __init__(
        self,
        given: Any,
        image_size: int | None,
        class_names: Sequence[str] | None,
        name: str,
        resize: Resize = "crop",
    ) -> None:
        self.name = name
        self._samples = {
            split: _samples_of(each, f"{name}: {split}", resize) for split, each in _splits_of(given, name)
        }
        sizes = {split: samples.probe() for split, samples in self._samples.items()}
        self.image_size = image_size or choose_image_size(sizes["train"], is_square_kept=True)
        self._read: dict[Split, tuple[np.ndarray, np.ndarray]] = {}
        self._loaded: dict[Split, ImageSet] = {}
        self._known: dict[Split, list[list[str]]] = {}
        if not class_names:
            for split, each in self._samples.items():
                self._known[split] = [[*map(in_nfc, names)] for names in _class_names_in(each.dataset)]
        self.class_names = self._find_class_names(class_names)

    def prepare(self) -> None:
        """Read the images; what has been read is kept."""
        for split in SPLITS:
            self.load(split)

    def load(self, split: Split) -> ImageSet | None:
        """Return the images of a split; None if it is not given."""
        if split in self._samples and split not in self._loaded:
            images, labels = self._of(split)
            targets = self._targets(split, labels)
            self._loaded[split] = ImageSet(images, targets, digest(images, targets))
        return self._loaded.get(split)

    def describe(self) -> str:
        """Return one line for the terminal."""
        is_one = len(self._samples) == 1  # the other splits are split off
        counts = " + ".join(f"{len(each):,}{'' if is_one else f' {split}'}" for split, each in self._samples.items())
        size = f"{self.image_size}x{self.image_size}"
        return f"{self.name}: {counts} images, {len(self.class_names)} classes, {size}"

    def _of(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        if split not in self._read:
            self._read[split] = self._samples[split].read(self.image_size)
        return self._read[split]

    def _find_class_names(self, chosen: Sequence[str] | None) -> tuple[str, ...]:
        names = chosen or next(iter(self._known["train"]), None)
        if names is None:
            labels = self._of("train")[1]  # read now, as their number is not known
            if labels.dtype.kind == "U":
                return tuple(map(str, np.unique(labels)))
            self._refuse_negative("train", labels)
            present = sorted({*labels.tolist()})
            names = [str(label) for label in present]
            if (missing := next((at for at, label in enumerate(present) if at != label), None)) is not None:
                raise UserError(
                    f"--data.dataset {self.name}: labels must be 0 to n-1; the largest is {present[-1]}, and no "
                    f"training image has {missing}.\nNumber them again, or give --data.class_names if it is right."
                )
        names = [in_nfc(str(name)) for name in names]
        if not chosen:  # ImageNet has two cranes
            counts = Counter(names)
            names = [f"{name} ({label})" if counts[name] > 1 else name for label, name in enumerate(names)]
        if len({*names}) < len(names):
            raise UserError(f"--data.class_names: {printable(max(names, key=names.count))} is given twice.")
        return tuple(names)

    def _targets(self, split: Split, labels: np.ndarray) -> np.ndarray:
        names = f"the {len(self.class_names)} classes {clipped(', '.join(self.class_names))}"
        where, index = f"--data.dataset {self.name}: {split}", {name: at for at, name in enumerate(self.class_names)}
        if labels.dtype.kind == "U":
            if unknown := sorted({*labels.tolist()} - {*index}):
                raise UserError(f"{where}: label {printable(unknown[0])} is none of {names}; see --data.class_names.")
            return np.array([index[label] for label in labels.tolist()], np.int64)
        self._refuse_negative(split, labels)
        self._refuse_other_names(split)
        if labels.max() >= len(index):
            raise UserError(f"{where}: label {labels.max()}; for {names} they must be 0 to {len(index) - 1}.")
        return labels.astype(np.int64)

    def _refuse_other_names(self, split: Split) -> None:
        """Refuse numbers that name other classes than the same ones of the training images."""
        if not self._known.get("train"):
            return
        for names in self._known[split]:
            for label, (name, ours) in enumerate(zip(names, self._known["train"][0], strict=False)):
                if name != ours:
                    raise UserError(
                        f"--data.dataset {self.name}: {split}: label {label} is {printable(name)}, in the training "
                        f"images {printable(ours)}.\nNumber the classes alike, or give --data.class_names if they are."
                    )

    def _refuse_negative(self, split: Split, labels: np.ndarray) -> None:
        where, low = f"--data.dataset {self.name}: {split}", int(labels.min())
        if low == -1 == labels.max():
            raise UserError(f"{where}: no labels (all are -1); without a test set of its own, one is split off train.")
        if low < 0:
            raise UserError(f"{where}: label {low}; labels must be 0 to n-1.")


def in_nfc(name: str) -> str:
    """Return the name of a class in Unicode's form NFC, as `image_folder.class_name_of` does."""
    return unicodedata.normalize("NFC", name)


# -- which object it is -------------------------------------------------------------------------------------------


def _splits_of(given: Any, name: str) -> Iterator[tuple[Split, Any]]:
    if isinstance(given, Mapping):
        if "train" not in given:
            raise UserError(f"--data.dataset {name}: no train among its splits {clipped(', '.join(map(str, given)))}.")
        if unused := [str(key) for key in given if key not in SPLIT_OF_WORD]:
            remark(f"{name}: only train, validation and test are used, not {clipped(', '.join(unused))}")
        keys: dict[Split, str] = {}
        for key in (key for key in given if key in SPLIT_OF_WORD):
            if (first := keys.setdefault(SPLIT_OF_WORD[key], key)) != key:
                raise UserError(f"--data.dataset {name}: has {first} and {key}; keep one of them.")
        yield from ((split, given[key]) for split, key in keys.items())
    elif isinstance(given, tuple | list) and len(given) in (2, 3) and not _is_array(given[0]):
        splits: tuple[Split, ...] = ("train", "test") if len(given) == 2 else SPLITS
        for split, each in zip(splits, given, strict=True):
            if each is not None or split == "train":
                yield split, each
    else:
        yield "train", given


def kind_of(given: Any) -> str:
    """Return the type of an object, of several that of the first."""
    while isinstance(given, tuple | list | Mapping) and given:
        given = next(iter(given.values() if isinstance(given, Mapping) else given))
    return "arrays" if _is_array(given) else type(given).__name__


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor)


def _samples_of(given: Any, where: str, resize: Resize) -> "_Samples":
    if isinstance(given, tuple | list) and len(given) == 2 and _is_array(given[0]):
        images, labels = given
        try:
            # A Series of pandas is indexed by its rows' names.
            labels = cast(Any, labels if _is_array(labels) else list(labels))
            if len(images) != len(labels):
                raise UserError(f"--data.dataset {where}: {len(images):,} images and {len(labels):,} labels.")
        except TypeError as error:  # None, a number
            kinds = f"{type(images).__name__} and {type(labels).__name__}"
            raise UserError(f"--data.dataset {where}: {kinds}: {error}.\nNeeded: {_FORMS}.") from error
        return _Samples(StackDataset(images, labels), where, resize)
    problem = ""
    if isinstance(given, IterableDataset) or (hasattr(given, "features") and not hasattr(given, "__len__")):
        problem = "it has no order and no length; give a list of its samples"
    elif isinstance(given, tuple) and all(map(_is_array, given)):
        problem = f"{len(given)} arrays; pair images and labels, ((images, labels), (images, labels))"
    elif isinstance(given, DataLoader):
        problem = "give its dataset"
    elif missing := [each for each in ("__len__", "__getitem__") if not hasattr(given, each)]:
        problem = f"it has no {' and no '.join(missing)}"
    elif isinstance(given, str | bytes | Mapping) or _is_array(given):
        problem = "labels are missing" if _is_array(given) else "it holds no samples"
    if problem:
        raise UserError(f"--data.dataset {where}: {type(given).__name__}: {problem}.\nNeeded: {_FORMS}.")
    return _Samples(given, where, resize)


def _arrays_of(dataset: Any) -> tuple[Any, Any] | None:
    """Return (images, labels) of a set whose samples are the rows of its arrays; None for any other."""
    reads: Any = type(dataset).__getitem__
    if reads is TensorDataset.__getitem__ and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    if reads is StackDataset.__getitem__ and isinstance(dataset.datasets, tuple):  # a dict gives dicts
        images, labels = dataset.datasets
        return (images, labels) if _is_array(images) and (_is_array(labels) or isinstance(labels, list)) else None
    if reads is Subset.__getitem__ and (inner := _arrays_of(dataset.dataset)):
        rows = np.asarray(dataset.indices, np.int64)  # a tuple would be one index, and booleans a mask
        images, labels = inner
        return images[rows], labels[rows] if _is_array(labels) else [labels[row] for row in rows.tolist()]
    is_torchvisions = getattr(reads, "__module__", "").startswith("torchvision.datasets.")
    # `transforms` is of its making; a transform that it is given later is only in the other two.
    changes = (getattr(dataset, name, True) for name in ("transforms", "transform", "target_transform"))
    if is_torchvisions and all(each is None for each in changes) and _is_array(getattr(dataset, "data", None)):
        labels = cast(Any, getattr(dataset, "targets", getattr(dataset, "labels", None)))
        if np.shape(labels) == (len(dataset),):
            return dataset.data, labels
    return None


def _columns(names: Collection[Any], features: Any) -> tuple[Any, Any]:
    """Return the names of the image and the label, of those of a dict's keys; None for one that is not there."""
    by_name = features if isinstance(features, Mapping) else {}
    kinds = {type(feature).__name__: name for name, feature in reversed([*by_name.items()])}
    wanted = (_IMAGE_KEYS, "Image"), (_LABEL_KEYS, "ClassLabel")
    image, label = (next((key for key in keys if key in names), kinds.get(kind)) for keys, kind in wanted)
    return image, label


def _class_names_in(dataset: Any) -> list[list[str]]:
    """Return the names that a data set has, or those of each that it wraps; empty where none has any."""
    if isinstance(features := getattr(dataset, "features", None), Mapping):
        names = getattr(features.get(_columns(features, features)[1]), "names", None)
        return [[*map(str, names)]] if names else []
    classes = getattr(dataset, "classes", None)
    if getattr(dataset, "_target_types", None) == ["binary-category"]:  # of torchvision's OxfordIIITPet
        classes = getattr(dataset, "bin_classes", classes)
    inner, several = getattr(dataset, "dataset", None), getattr(dataset, "datasets", None)
    found: list[list[str]] = []
    if isinstance(classes, list | tuple) and classes:  # those of ImageNet are tuples of synonyms
        found = [[", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name) for name in classes]]
    elif inner is not None:
        found = _class_names_in(inner)
        found = [] if found and _renumbers(dataset, inner) else found
    elif isinstance(several, list | tuple):
        found = [names for each in several for names in _class_names_in(each)]
    change = getattr(dataset, "target_transform", None)  # the names are those of the labels before it
    return [names for names in found if not _changes_labels(change, len(names))]


def _renumbers(dataset: Any, inner: Any) -> bool:
    """Return whether a data set seems to give the classes of the one that it wraps other numbers.

    Labels of the same samples are compared, by the data set's `indices` where it has some. A class must always get the
    same number: where it does not, samples are in another order or labels are noise.
    """
    if getattr(type(dataset), "__getitem__", None) is Subset.__getitem__:
        return False
    pairs: list[tuple[int | str, int | str]] = []
    try:
        indices = getattr(dataset, "indices", None)
        places = range(len(inner)) if indices is None else indices
        if len(places) != len(dataset):
            return False
        theirs, ours = _Samples(inner, "", "crop"), _Samples(dataset, "", "crop")
        with isolate_rng(include_cuda=False):
            for index in evenly_spaced(len(dataset), _NUM_PROBES).tolist():
                before, after = theirs._pair(inner[int(places[index])])[1], ours._pair(dataset[index])[1]
                pairs.append((_label(before), _label(after)))
    except Exception:  # code of the user's raises anything, and samples may have another form
        return False
    num_classes, num_changed = len({before for before, _ in pairs}), sum(before != after for before, after in pairs)
    is_map = len({*pairs}) == num_classes and all(isinstance(label, int) for pair in pairs for label in pair)
    # Where most classes have one sample among these, noise is a map as well.
    return is_map and num_changed > 0 and (2 * num_changed > len(pairs) or 2 * num_classes <= len(pairs))


def _changes_labels(target_transform: Any, num_classes: int) -> bool:
    try:
        labels = [*range(num_classes)]
        return target_transform is not None and [int(target_transform(label)) for label in labels] != labels
    except Exception:  # code of the user's raises anything
        return True


# -- samples ------------------------------------------------------------------------------------------------------


class _Samples(Dataset[Any]):
    """The samples of a split: uint8 image and label, or the text of an error, which a worker process can send."""

    def __init__(self, dataset: Any, name: str, resize: Resize) -> None:
        self.dataset, self.name, self.where = dataset, name, f"--data.dataset {name}"
        self.resize: Resize = resize
        self.image_size, self.form = 0, ""
        try:
            self._num = len(dataset)
        except Exception as error:  # code of the user's raises anything
            kind = type(dataset).__name__
            raise UserError(f"{self.where}: {kind}: its __len__ fails ({raised_by(error)}).") from error
        if not self._num:
            raise UserError(f"{self.where}: empty; it needs images of every class.")
        self._probes = evenly_spaced(self._num, _NUM_PROBES).tolist()

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> tuple[np.ndarray, int | str] | str:
        try:
            return self._sample(index)
        except UserError as error:
            return str(error)

    def _sample(self, index: int) -> tuple[Any, int | str]:
        """Return image and label; as long as there is no `image_size`, the image is as it is opened."""
        sample: Any = None
        try:
            sample = self.dataset[index]
            self.form = self.form or f"\nThe first sample is {_form(sample)}."
            image, label = self._pair(sample)
            square = to_square(image, self.image_size, self.resize) if self.image_size else _opened(image)
            return square, _label(label)
        except UserError as error:  # of the form of a sample
            raise UserError(f"{self.where}: sample {index:,}: {error}\nThe sample is {_form(sample)}.") from error
        except (Exception, SystemExit) as error:  # code of the user's raises anything
            raise UserError(f"{self.where}: sample {index:,} cannot be read ({raised_by(error)}).") from error

    def _pair(self, sample: Any) -> tuple[Any, Any]:
        if isinstance(sample, Mapping):
            image, label = _columns(sample, getattr(self.dataset, "features", None))
            if image is None or label is None:
                keys, images, labels = (", ".join(map(str, each)) for each in (sample, _IMAGE_KEYS, _LABEL_KEYS))
                raise UserError(f"a dict of {clipped(keys)}; it needs one of {images} and one of {labels}.")
            return sample[image], sample[label]
        if isinstance(sample, tuple | list) and len(sample) == 2:
            return sample[0], sample[1]
        if _is_array(sample) or isinstance(sample, Image.Image):
            raise UserError("an image without a label; predict-images predicts images that have none.")
        raise UserError("(image, label) is needed.")

    def probe(self) -> list[tuple[int, int]]:
        """Return width and height of some images; refuse samples of another form."""
        with isolate_rng(include_cuda=False):
            images = [self._sample(index)[0] for index in self._probes]
        return [image.size if isinstance(image, Image.Image) else image.shape[1::-1] for image in images]

    def read(self, image_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all images uint8 (N, image_size, image_size, 3), and labels, integers or text (N,)."""
        self.image_size = image_size
        way_out = "Give a smaller --data.image_size, or class folders, which are cached on disk."
        is_subset = isinstance(self.dataset, Subset)  # whose arrays are copied
        arrays = None if is_subset else _arrays_of(self.dataset)
        if arrays is None or not _is_read_without_copy(arrays[0], image_size):
            check_fits((len(self), image_size, image_size, 3), self.where, way_out)
        with isolate_rng(include_cuda=False):  # a data set may draw random numbers
            arrays = _arrays_of(self.dataset) if is_subset else arrays
            try:
                images, labels = self._read_all() if arrays is None else _read_arrays(*arrays, image_size, self.resize)
            except UserError as error:
                raise UserError(f"{self.where}: {error}{self.form}" if arrays else str(error)) from error
            if len({type(label) for label in labels}) > 1:
                raise UserError(f"{self.where}: some labels are text and some are numbers.")
            for index in self._probes:
                image, label = self._sample(index)
                if label != labels[index] or not np.array_equal(image, images[index]):
                    raise UserError(
                        f"{self.where}: sample {index:,} differs between two reads; images are read once.\n"
                        "Take random transforms out of the data set and give them by --data.transforms."
                    )
        return images, np.asarray(labels)

    def _read_all(self) -> tuple[np.ndarray, list[int | str]]:
        num, began = len(self), time.monotonic()
        images = np.empty((num, self.image_size, self.image_size, 3), np.uint8)
        labels: list[int | str] = []
        with progress(num, f"Reading images of {self.name}") as show:
            for batch in self._batches():
                for sample in batch:
                    if isinstance(sample, str):
                        raise UserError(sample)
                    images[len(labels)], label = sample
                    labels.append(label)
                show(len(labels))
        if num >= _LOGGED_FROM and not sys.stderr.isatty():
            remark(f"Read {num:,} images of {self.name} in {time.monotonic() - began:.1f} s")
        return images, labels

    def _batches(self) -> Iterator[list[Any]]:
        began, num_first = time.monotonic(), min(_NUM_PROBES, len(self))
        yield [self[index] for index in range(num_first)]
        seconds = (time.monotonic() - began) / num_first * (len(self) - num_first)
        copied = _copy_for_workers(self) if seconds > _SERIAL_S else None
        num_workers = 0 if copied is None else min(usable_cpus(), _MAX_WORKERS)
        yield from DataLoader(
            Subset(self if copied is None else copied, range(num_first, len(self))),
            batch_size=_BATCH,
            collate_fn=list,
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=leave_signals_to_parent,
        )


class _Pickler(pickle.Pickler):
    """Leaves arrays, tensors, bytes and buffers, as of Arrow tables, where they are: most of a data set in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)
        self.kept: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Return the place of what is left where it is."""
        if not isinstance(obj, np.ndarray | Tensor | bytes):
            return None
        self.kept.append(obj)
        return len(self.kept) - 1


class _Unpickler(pickle.Unpickler):
    """Takes again what `_Pickler` has left."""

    def __init__(self, file: io.BytesIO, pickler: _Pickler) -> None:
        super().__init__(file, buffers=pickler.buffers)
        self.kept = pickler.kept

    def persistent_load(self, pid: int) -> Any:
        """Return what is left at a place."""
        return self.kept[pid]


def _copy_for_workers(samples: _Samples) -> _Samples | None:
    """Return samples that forked processes can read at once; None if there are none.

    Processes that read one open file move its position for each other: images would be mixed. A data set that cannot be
    pickled may hold such a file. One that can has none once it is unpickled, and opens its own in each process.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":  # unsafe there
        return None
    try:
        pickler = _Pickler(file := io.BytesIO())
        pickler.dump(samples)
        file.seek(0)
        copied: _Samples = _Unpickler(file, pickler).load()
    except Exception:  # code of the user's raises anything
        return None
    return copied


def _form(sample: Any, depth: int = 1) -> str:
    """Return the types of a sample, as an error shows them."""
    if isinstance(sample, Mapping) and depth:
        return f"{{{', '.join(f'{key}: {_form(value, depth - 1)}' for key, value in list(sample.items())[:6])}}}"
    if isinstance(sample, tuple | list) and depth:
        return f"({', '.join(_form(each, depth - 1) for each in sample[:4])}{', ...' if len(sample) > 4 else ''})"
    if _is_array(sample):
        return f"{type(sample).__name__} {str(sample.dtype).removeprefix('torch.')} {tuple(sample.shape)}"
    return f"{type(sample).__name__}{f' {sample.mode} {sample.size}' if isinstance(sample, Image.Image) else ''}"


def _label(label: Any) -> int | str:
    if isinstance(label, list | tuple) or (_is_array(label) and label.reshape(-1).shape != (1,)):
        raise UserError("several values a label; one class an image is needed, of a one-hot label its argmax.")
    value = label.item() if _is_array(label) or isinstance(label, np.generic) else label
    if value is None:
        raise UserError("no label; predict-images predicts images that have none.")
    if isinstance(value, float):
        raise UserError(f"label {value} is a float; give int(label) if it is the number of a class.")
    if not isinstance(value, int | str):
        raise UserError(f"a label of type {type(label).__name__}; a whole number or the name of a class is needed.")
    return in_nfc(value) if isinstance(value, str) else int(value)


# -- images -------------------------------------------------------------------------------------------------------


def to_square(image: Any, image_size: int, resize: Resize = "crop", in_channels: int = 3) -> np.ndarray:
    """Return an image of a sample as uint8 (image_size, image_size, in_channels); may raise anything."""
    opened = _opened(image)
    if isinstance(opened, Image.Image):
        return square_of(opened, image_size, resize, in_channels)
    if opened.shape[2] == 1:
        opened = opened.repeat(3, axis=2)
    if opened.shape == (image_size, image_size, in_channels):
        return opened
    return square_of(Image.fromarray(np.ascontiguousarray(opened)), image_size, resize, in_channels)


def _opened(image: Any) -> "Image.Image | np.ndarray":
    """Return an image of a sample as a Pillow image or uint8 (H, W, C)."""
    if isinstance(image, Mapping):  # of Hugging Face, which has not decoded it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | str | os.PathLike):
        return open_image(image)
    if isinstance(image, Image.Image) and image.format is None and image.mode[0] in "IF":  # no file says its white
        image = np.asarray(image)
    return image if isinstance(image, Image.Image) else _pixels(image)


def _read_arrays(images: Any, targets: Any, image_size: int, resize: Resize) -> tuple[np.ndarray, list[int | str]]:
    labels = [_label(target) for target in targets]
    images = images.detach().cpu() if isinstance(images, Tensor) else images
    if _is_finished(images, image_size):
        return np.ascontiguousarray(images), labels
    squares = np.empty((len(images), image_size, image_size, 3), np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = _pixels(images[start : start + _CHUNK], is_batch=True)
        if chunk.shape[1:3] == squares.shape[1:3] and chunk.shape[3] != 4:
            squares[start : start + _CHUNK] = chunk  # also of one channel
        else:
            squares[start : start + _CHUNK] = [to_square(each, image_size, resize) for each in chunk]
    return squares, labels


def _is_finished(images: Any, image_size: int) -> bool:
    return images.shape[1:] == (image_size, image_size, 3) and str(images.dtype).endswith("uint8")


def _is_read_without_copy(images: Any, image_size: int) -> bool:
    """Whether `_read_arrays` returns these images themselves."""
    if isinstance(images, Tensor):
        is_contiguous = images.device.type == "cpu" and images.is_contiguous()
    else:
        is_contiguous = images.flags.c_contiguous
    return is_contiguous and _is_finished(images, image_size)


def _pixels(image: Any, *, is_batch: bool = False) -> np.ndarray:
    """Return an array or tensor (..., H, W), (..., H, W, C) or (..., C, H, W) as uint8 (..., H, W, C)."""
    if not _is_array(image):
        raise UserError(f"an image of type {type(image).__name__}; a Pillow image, an array or a tensor is needed.")
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image  # which NumPy lacks
    array: np.ndarray = np.asarray(image)
    shape = array.shape[is_batch:]
    if len(shape) == 2:
        array = array[..., None]
    elif len(shape) == 3 and shape[0] in _CHANNELS and (isinstance(image, Tensor) or shape[2] not in _CHANNELS):
        array = np.moveaxis(array, -3, -1)
    elif len(shape) != 3 or shape[2] not in _CHANNELS:
        raise UserError(f"an image of shape {tuple(shape)}; (H, W, C) or (C, H, W) of 1, 3 or 4 channels is needed.")
    if array.size == 0:
        raise UserError(f"an image of shape {tuple(shape)}, without pixels.")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return np.where(array, np.uint8(255), np.uint8(0))
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind in "iu" and 0 <= low <= high <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and -1e-3 <= low <= high <= 1 + 1e-3:  # resizing may leave 0 to 1 by little
        scaled: np.ndarray = array.astype(np.float32).clip(0, 1) * 255
        return scaled.round().astype(np.uint8)
    way_out = "Convert them to uint8, or divide them by their white, such as 255."
    if low < 0:
        way_out = "Drop Normalize from the transforms; batches are normalized on the device."
    raise UserError(
        f"pixels of type {array.dtype} from {low:.4g} to {high:.4g}; uint8, or float from 0 to 1, is needed.\n{way_out}"
    )
