"""Stratified, seeded splits: train, val and test indices, and subsets of a data set."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from cifar_lightning.data.image_set import Split
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import printable
from cifar_lightning.transforms.transform import seeded_generator

# Purposes of the generators; the purposes of an epoch are far below.
_SPLIT, _SUBSET, _TEST = 1_000_003, 1_000_033, 1_000_081
_TEST_FRACTION = 0.2  # unless one is given, and only where the data has no test images
_WORDS = {"val": "validation", "test": "testing"}


@dataclass(frozen=True)
class SplitSettings:
    """How to split; the fields are documented as flags in `ImageDataModule`."""

    val_fraction: float = 0.1
    limit: int | None = None
    seed: int = 0
    test_fraction: float | None = None


@dataclass(frozen=True)
class SplitIndices:
    """Indices of the images of each split."""

    train: Tensor  # int64, sorted, into the source's train images
    val: Tensor  # int64, sorted, into the source's images of `val_source`
    test: Tensor  # int64, all of the source's test images, or sorted indices into its train images
    val_source: Split  # "val" where the source has validation images of its own, otherwise "train"
    test_source: Split = "test"  # "train" where the source has no test images of its own

    def of(self, split: Split) -> Tensor:
        """Return the indices of a split."""
        indices: Tensor = getattr(self, split)
        return indices

    def source_of(self, split: Split) -> Split:
        """Return which of the source's image sets the indices of a split refer to."""
        return {"train": "train", "val": self.val_source, "test": self.test_source}[split]


def make_splits(
    targets: Mapping[Split, np.ndarray], settings: SplitSettings, class_names: tuple[str, ...]
) -> SplitIndices:
    """Split a data set.

    Test and validation images are the source's own if it has any, otherwise a stratified fraction of its training
    images: first test, so that it depends neither on `val_fraction` nor on `limit`, then validation.

    Raises:
        UserError: A class would have no image in a split.
    """
    of_train = torch.tensor(targets["train"])
    kept = torch.arange(len(of_train))
    if "test" in targets:
        if settings.test_fraction is not None:
            raise UserError(f"--data.test_fraction {settings.test_fraction}: the data has test images; leave it out.")
        test = torch.arange(len(targets["test"]))
    else:
        is_default = settings.test_fraction is None
        fraction = _TEST_FRACTION if settings.test_fraction is None else settings.test_fraction
        held_out = _held_out_counts(of_train, fraction, class_names, "test", is_default=is_default)
        is_test = _pick(of_train, held_out, seeded_generator(settings.seed, 0, _TEST))
        test, kept = kept[is_test], kept[~is_test]
    if "val" in targets:
        settings = replace(settings, val_fraction=0.0)
    train, val = stratified_split(of_train[kept], settings, class_names)
    val = torch.arange(len(targets["val"])) if "val" in targets else kept[val]
    val_source: Split = "val" if "val" in targets else "train"
    return SplitIndices(kept[train], val, test, val_source, "test" if "test" in targets else "train")


def stratified_split(
    targets: Int64[Tensor, " images"], settings: SplitSettings, class_names: tuple[str, ...]
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " val"]]:
    """Take exactly `limit` images and hold out exactly `round(val_fraction * n)` of them; return sorted indices.

    Both numbers are divided among the classes by largest remainder; the seed decides which images of a class are taken.
    Of classes too small for the default `val_fraction`, one image is held out, and none of a class of one image.

    Raises:
        UserError: A class would have no validation image by another fraction, or no training image.
    """
    val_fraction = settings.val_fraction
    is_default = val_fraction == SplitSettings.val_fraction
    counts = torch.bincount(targets, minlength=len(class_names))
    _held_out_counts(targets, val_fraction, class_names, "val", is_default=is_default)  # raises before `limit` does
    chosen = _subset(targets, counts, settings, class_names, is_default=is_default)
    if val_fraction == 0:
        return chosen, chosen[:0]
    targets = targets[chosen]
    held_out = _held_out_counts(targets, val_fraction, class_names, "val", is_default=is_default)
    is_val = _pick(targets, held_out, seeded_generator(settings.seed, 0, _SPLIT))
    return chosen[~is_val], chosen[is_val]


def _subset(
    targets: Tensor, counts: Tensor, settings: SplitSettings, class_names: tuple[str, ...], *, is_default: bool
) -> Tensor:
    limit, val_fraction, total = settings.limit, settings.val_fraction, len(targets)
    if limit is None or limit >= total:
        return torch.arange(total)
    taken = _stratified_counts(counts, limit / total)
    scarce = _scarcest(taken, 0.0 if is_default else val_fraction, counts)  # the default fits classes of any size
    if scarce is None and val_fraction and taken.max() < 2:  # no class has one for validation
        scarce = int(taken.argmax())
    if scarce is not None:
        some = "a class" if is_default else "each"
        of_val = f" and, unless --data.val_fraction is 0, {some} one more for validation" if val_fraction else ""
        raise UserError(
            f"--data.limit {limit}: too few. Class {printable(class_names[scarce])}, {int(counts[scarce]):,} "
            f"of {total:,} images, would get {int(taken[scarce])}; every class needs one for training{of_val}."
        )
    return _pick(targets, taken, seeded_generator(settings.seed, 0, _SUBSET)).nonzero().flatten()


def _held_out_counts(
    targets: Tensor, fraction: float, class_names: tuple[str, ...], split: str, *, is_default: bool
) -> Tensor:
    """Return how many images of each class are held out; a default fraction fits classes of any size."""
    counts = torch.bincount(targets, minlength=len(class_names))
    scarce = _scarcest(counts, fraction)
    if scarce is None:
        return _stratified_counts(counts, fraction)
    if is_default:
        scarce = int(counts.where(counts > 0, counts.max()).argmin())
        if counts[scarce] >= {"val": 1, "test": 2}[split]:
            return _stratified_counts(counts, fraction).clamp(min=1).minimum((counts - 1).clamp(min=0))
    out = {"val": "0 trains on all.", "test": "Add images, or test images of their own."}[split]
    raise UserError(
        f"--data.{split}_fraction {fraction}: class {printable(class_names[scarce])} has {int(counts[scarce])} "
        f"training images; every class needs one for training and one for {_WORDS[split]}. {out}"
    )


def _stratified_counts(counts: Tensor, fraction: float) -> Tensor:
    """Divide a fraction of all images, rounded once, among the classes by largest remainder."""
    quota = counts.double() * fraction
    taken = quota.floor().long()
    missing = round(fraction * int(counts.sum())) - int(taken.sum())
    # Stable: equal remainders go to the first classes, on every machine.
    taken[(quota - taken).argsort(descending=True, stable=True)[:missing]] += 1
    return taken


def _scarcest(counts: Tensor, val_fraction: float, in_data: Tensor | None = None) -> int | None:
    """Return the smallest class without an image for training or for validation; None if there is none.

    Classes that a data set names and has no image of do not count; `in_data` is how many images it has of each.
    """
    held_out = _stratified_counts(counts, val_fraction)
    lacks = held_out >= counts
    if val_fraction:
        lacks |= held_out < 1
    lacks &= (counts if in_data is None else in_data) > 0
    return int(counts.where(lacks, counts.max() + 1).argmin()) if lacks.any() else None


def _pick(targets: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Mark that many images of each class, drawn at random."""
    shuffled = torch.randperm(len(targets), generator=generator)
    counts = torch.bincount(targets, minlength=len(numbers))
    by_class = shuffled[targets[shuffled].argsort(stable=True)].split(counts.tolist())
    is_picked = torch.zeros(len(targets), dtype=torch.bool)
    is_picked[torch.cat([own[:num] for own, num in zip(by_class, numbers.tolist(), strict=True)])] = True
    return is_picked
