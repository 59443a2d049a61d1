"""What is in a data set: images by class and split, identical and near duplicates, constant and unreadable images."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cifar_lightning.data.datasets import Source, class_names_of, load_splits
from cifar_lightning.data.duplicates import find_duplicates
from cifar_lightning.data.image_decoding import read_headers
from cifar_lightning.data.image_folder import ClassFolders
from cifar_lightning.data.image_set import SPLITS, ImageSet, Split, is_constant, pixel_hashes
from cifar_lightning.data.near_duplicates import find_near_duplicates
from cifar_lightning.data.splits import SplitIndices, SplitSettings, make_splits
from cifar_lightning.data.statistics import describe_imbalance, evenly_spaced
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import index_name

_MAX_HEADERS = 10_000  # files of which size and mode are read, evenly spaced; 0.1 ms each
_MAX_PAIRS, _MAX_GROUPS = 60, 200  # near duplicates with their images, groups of identical images by name
_MAX_SAMPLES, _MAX_ALL_SAMPLES = 10, 500  # images of a class, and of all
_CHUNK = 1024


def inspect_source(source: Source, settings: SplitSettings, *, in_channels: int = 3) -> dict[str, Any]:
    """Look through a data set as `fit` would split it; images that cannot be read are left out.

    Args:
        source: The data set.
        settings: How it is split.
        in_channels: 1 compares gray images.

    Returns:
        `dataset`, `class_names`, `counts` (split -> images of each class), `problem` (why `fit` would not split it, or
        empty), `headers` (width, height and mode of files -> their number), `left_out` (path and reason of files),
        `duplicates` (as of `find_duplicates`), `constant` (names), `imbalance` (a sentence, or None), `num_near` (near
        duplicates: "pairs", "across splits": images of val and test, "other label": pairs), `near` (the first pairs:
        of each image `name`, `split`, `label` and `pixels`), `samples` (of each class some images).

    Raises:
        UserError: The data set is missing or damaged.
    """
    if isinstance(source, ClassFolders):
        source.skip_unreadable = True
    source.prepare()
    class_names = class_names_of(source)
    sets = load_splits(source, in_channels)
    targets = {split: image_set.targets for split, image_set in sets.items()}
    problem = ""
    try:
        splits = make_splits(targets, settings, class_names)
    except UserError as error:
        problem, splits = str(error), _unsplit(targets)
    hashes = {split: pixel_hashes(image_set.images) for split, image_set in sets.items()}
    name_of = getattr(source, "image_name", index_name)
    rows = _Rows(sets, splits, class_names, name_of)
    own = {split: sets[splits.source_of(split)].targets[splits.of(split).numpy()] for split in SPLITS}
    counts = {split: np.bincount(of, minlength=len(class_names)) for split, of in own.items() if len(of)}
    near = rows.near(find_near_duplicates([each.images for each in sets.values()]), np.concatenate([*hashes.values()]))
    headers = Counter(read_headers(_some_files(source))) if isinstance(source, ClassFolders) else Counter[Any]()
    return {
        "dataset": source.describe(),
        "class_names": class_names,
        "counts": counts,
        "problem": problem,
        "headers": headers,
        "left_out": source.skipped_files if isinstance(source, ClassFolders) else [],
        "duplicates": find_duplicates(sets, splits, hashes, name_of, num_shown=_MAX_GROUPS),
        "constant": [rows.name(at) for at in rows.constant().tolist()],
        "imbalance": describe_imbalance(torch.from_numpy(counts["train"]), class_names),
        "num_near": {kind: len(pairs) for kind, pairs in near.items()},
        "near": [[rows.about(at) for at in pair] for pair in near["pairs"][:_MAX_PAIRS].tolist()],
        "samples": rows.samples(max(1, min(_MAX_SAMPLES, _MAX_ALL_SAMPLES // len(class_names)))),
    }


def _some_files(source: ClassFolders) -> list[str]:
    paths = [path for listing in source.listings.values() for path in listing.paths]
    return [paths[at] for at in evenly_spaced(len(paths), _MAX_HEADERS)]


def _unsplit(targets: Mapping[Split, np.ndarray]) -> SplitIndices:
    train, val, test = (torch.arange(len(targets.get(split, ()))) for split in SPLITS)
    return SplitIndices(train, val, test, "val" if len(val) else "train", "test" if len(test) else "train")


class _Rows:
    """The images of all sets, counted through, and in which split each is."""

    def __init__(
        self,
        sets: Mapping[Split, ImageSet],
        splits: SplitIndices,
        class_names: Sequence[str],
        name_of: Callable[[Split, int], str],
    ) -> None:
        self.sets, self.class_names, self.name_of = sets, class_names, name_of
        self.firsts = dict(zip(sets, np.cumsum([0, *(len(each.images) for each in sets.values())]), strict=False))
        self.targets = np.concatenate([each.targets for each in sets.values()])
        self.split_of = np.full(len(self.targets), -1)  # place in SPLITS; -1 is in none, by --data.limit
        for place, split in enumerate(SPLITS):
            if len(own := splits.of(split).numpy()):
                self.split_of[self.firsts[splits.source_of(split)] + own] = place

    def pixels(self, at: int) -> np.ndarray:
        """Return an image, uint8 (height, width, channels)."""
        source, index = self._of_set(at)
        return np.asarray(self.sets[source].images[index])

    def name(self, at: int) -> str:
        """Return the name of an image."""
        return self.name_of(*self._of_set(at))

    def about(self, at: int) -> dict[str, Any]:
        """Return `name`, `split`, `label` and `pixels` of an image."""
        split, label = SPLITS[self.split_of[at]], self.class_names[self.targets[at]]
        return {"name": self.name(at), "split": split, "label": label, "pixels": self.pixels(at)}

    def _of_set(self, at: int) -> tuple[Split, int]:
        source = next(split for split in reversed([*self.sets]) if self.firsts[split] <= at)
        return source, int(at - self.firsts[source])

    def constant(self) -> np.ndarray:
        """Return the images of one colour that are in a split."""
        chunks = (
            is_constant(each.images[start : start + _CHUNK])
            for each in self.sets.values()
            for start in range(0, len(each.images), _CHUNK)
        )
        return np.flatnonzero(np.concatenate([*chunks]) & (self.split_of >= 0))

    def near(self, pairs: np.ndarray, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """Return near duplicates among pairs of images.

        "pairs" are those in a split that are not identical, of two labels first; "across splits" are the images of val
        and test that are like one of an earlier split; "other label" are the pairs of two labels.
        """
        pairs = pairs[(self.split_of[pairs] >= 0).all(1) & (hashes[pairs[:, 0]] != hashes[pairs[:, 1]])]
        across, mixed = (of[pairs[:, 0]] != of[pairs[:, 1]] for of in (self.split_of, self.targets))
        order = np.lexsort((~across, ~mixed))
        later = pairs[across][np.arange(across.sum()), self.split_of[pairs[across]].argmax(1)]
        return {"pairs": pairs[order], "across splits": np.unique(later), "other label": pairs[mixed]}

    def samples(self, num: int) -> list[list[np.ndarray]]:
        """Return up to `num` images of each class, evenly spaced over those of the training split."""
        train = np.flatnonzero(self.split_of == 0)
        by_class = train[self.targets[train].argsort(kind="stable")]
        ends = np.bincount(self.targets[train], minlength=len(self.class_names)).cumsum()
        return [
            [self.pixels(at) for at in own[evenly_spaced(len(own), num)].tolist()]
            for own in np.split(by_class, ends[:-1])
        ]
