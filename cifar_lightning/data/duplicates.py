"""Identical images: in several splits, under different labels, and repeated within a split."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cifar_lightning.data.image_set import SPLITS, ImageSet, Split, pixel_hashes
from cifar_lightning.data.splits import SplitIndices
from cifar_lightning.formatting import plural

_ACROSS: tuple[tuple[Split, Split], ...] = (("test", "train"), ("test", "val"), ("val", "train"))


class _Row(NamedTuple):
    split: Split
    label: int
    name: str


def find_duplicates(
    images: Mapping[Split, ImageSet],
    splits: SplitIndices,
    hashes: Mapping[Split, np.ndarray],
    name_of: Callable[[Split, int], str],
    num_shown: int = 5,
) -> list[dict[str, Any]]:
    """Find identical decoded images among the splits.

    Args:
        images: The image sets of a source.
        splits: The images of each split.
        hashes: `pixel_hashes` of the sets for which they are known.
        name_of: Name of an image of a set, by its index.
        num_shown: Groups of identical images that are named, with up to 4 images each.

    Returns:
        For each kind of duplicates that there is: `kind` ("across splits", "other label" or "within splits"), `text`
        with the counts, `num_images`, and `first`: the names of the images of the first groups.
    """
    hashes = {split: hashes[split] if split in hashes else pixel_hashes(images[split].images) for split in images}
    indices = [splits.of(split).numpy() for split in SPLITS]
    split_of, index_of = np.repeat(np.arange(len(indices)), [len(of) for of in indices]), np.concatenate(indices)
    keys = np.concatenate([hashes[splits.source_of(split)][of] for split, of in zip(SPLITS, indices, strict=True)])
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    same: dict[bytes, list[_Row]] = {}
    for at in np.flatnonzero(counts[inverse] > 1).tolist():  # candidates, of equal 64-bit hashes: blake2b confirms them
        split, index = SPLITS[split_of[at]], int(index_of[at])
        source = splits.source_of(split)
        pixels = np.ascontiguousarray(images[source].images[index])
        row = _Row(split, int(images[source].targets[index]), name_of(source, index))
        same.setdefault(hashlib.blake2b(pixels.data).digest(), []).append(row)
    groups = [group for group in same.values() if len(group) > 1]
    in_split = [{split: sum(row.split == split for row in group) for split in SPLITS} for group in groups]
    found = []

    def add(kind: str, of_one: str, of_many: str, nums: list[int], differing: Callable[[_Row], object]) -> None:
        if num := sum(nums):
            text = of_one if num == 1 else of_many
            chosen = [group for group, of_group in zip(groups, nums, strict=True) if of_group][:num_shown]
            first = [list({differing(row): row.name for row in reversed(group)}.values())[-4:] for group in chosen]
            found.append({"kind": kind, "text": f"{num:,} {text}", "num_images": num, "first": first})

    for one, other in _ACROSS:
        of_all = f"of {plural(len(splits.of(one)), f'{one} image')}"
        texts = f"{of_all} is also in {other}", f"{of_all} are also in {other}"
        add("across splits", *texts, [nums[one] if nums[other] else 0 for nums in in_split], lambda row: row.split)
    nums = [len(group) * (len({row.label for row in group}) > 1) for group in groups]
    text = "images have an identical image with another label"  # at least two
    add("other label", text, text, nums, lambda row: row.label)
    nums = [sum(max(0, num - 1) for num in nums.values()) for nums in in_split]
    texts = "image repeats another one of its split", "images repeat another one of their split"
    add("within splits", *texts, nums, lambda row: row.name)
    return found
