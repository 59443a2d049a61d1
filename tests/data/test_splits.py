"""Splits and subsets: exact numbers of images, from every class its fraction."""

import re

import numpy as np
import pytest
import torch

from cifar_lightning.data.splits import SplitSettings, make_splits
from cifar_lightning.data.splits import stratified_split as split_by_settings
from cifar_lightning.errors import UserError

NAMES = tuple("abcdefghij")
UNEVEN = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 70, 25, 5]))


def stratified_split(targets, val_fraction, *, seed, class_names, limit=None):
    return split_by_settings(targets, SplitSettings(val_fraction, limit, seed), class_names)


def stratified_subset(targets, limit, *, seed, class_names):
    return stratified_split(targets, 0.0, seed=seed, class_names=class_names, limit=limit)[0]


def test_cifar10_would_be_split_into_45000_and_5000_with_500_of_each_class():
    targets = torch.arange(50_000) % 10
    train, val = stratified_split(targets, 0.1, seed=0, class_names=NAMES)
    assert (len(train), len(val)) == (45_000, 5_000)
    assert torch.bincount(targets[val]).tolist() == [500] * 10
    assert sorted(torch.cat([train, val]).tolist()) == list(range(50_000))


@pytest.mark.parametrize("fraction", [0.1, 0.137, 0.333, 0.5])
def test_a_split_holds_out_exactly_the_rounded_fraction_by_largest_remainder(fraction):
    counts = [11, 23, 37, 101, 64]
    targets = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    _, val = stratified_split(targets, fraction, seed=0, class_names=NAMES[:5])
    held_out = torch.bincount(targets[val], minlength=5)
    assert int(held_out.sum()) == round(fraction * sum(counts))
    for count, val_count in zip(counts, held_out.tolist(), strict=True):
        assert abs(val_count - fraction * count) < 1


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    targets = torch.arange(1000) % 10
    first = stratified_split(targets, 0.1, seed=0, class_names=NAMES)[1]
    torch.manual_seed(5)
    again, other = (stratified_split(targets, 0.1, seed=s, class_names=NAMES)[1] for s in (0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_subset_has_exactly_the_images_asked_for_and_every_class_its_fraction():
    for limit in (60, 100, 399):
        subset = stratified_subset(UNEVEN, limit, seed=0, class_names=NAMES[:4])
        counts = torch.bincount(UNEVEN[subset], minlength=4)
        assert len(subset.unique()) == len(subset) == limit
        for count, taken in zip([300, 70, 25, 5], counts.tolist(), strict=True):
            assert abs(taken - count * limit / 400) < 1


def test_a_subset_as_large_as_the_set_is_the_set_and_the_seed_decides_which():
    assert torch.equal(stratified_subset(UNEVEN, 400, seed=0, class_names=NAMES[:4]), torch.arange(400))
    subsets = [stratified_subset(UNEVEN, 100, seed=seed, class_names=NAMES[:4]) for seed in (0, 0, 1)]
    assert torch.equal(subsets[0], subsets[1])
    assert not torch.equal(subsets[0], subsets[2])


def refused(function, *arguments, **more):
    with pytest.raises(UserError) as caught:
        function(*arguments, **{"seed": 0, "class_names": NAMES[:4], **more})
    assert str(caught.value).count("\n") <= 2
    return str(caught.value)


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.95, 0.999])
def test_a_fraction_that_leaves_a_class_without_an_image_names_the_smallest_class_and_fractions_that_work(fraction):
    message = refused(stratified_split, UNEVEN, fraction)
    assert message.startswith(f"--data.val_fraction {fraction}: of the 5 training images of class d, ")
    bounds = re.search(r": ([0-9.]+) to ([0-9.]+) works, and 0 trains on all", message).groups()
    for works in map(float, bounds):
        _, val = stratified_split(UNEVEN, works, seed=0, class_names=NAMES[:4])
        assert 1 <= int((UNEVEN[val] == 3).sum()) < 5
        assert abs(works - 0.5) < abs(fraction - 0.5)


@pytest.mark.parametrize("counts", [(2, 9), (3, 7, 11), (6, 100, 1000)])
def test_the_fractions_that_are_said_to_work_do(counts):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    message = refused(stratified_split, targets, 0.001, class_names=NAMES[: len(counts)])
    for works in map(float, re.search(r": ([0-9.]+) to ([0-9.]+) works", message).groups()):
        for part in stratified_split(targets, works, seed=0, class_names=NAMES[: len(counts)]):
            assert torch.bincount(targets[part], minlength=len(counts)).min() >= 1


def test_of_a_class_with_one_image_no_fraction_is_named():
    targets = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 70, 25, 1]))
    message = refused(stratified_split, targets, 0.1)
    assert "of the 1 training image of class d, 0 would be" in message
    assert message.endswith("add images, or 0 trains on all.")


def test_a_limit_that_leaves_a_class_without_images_is_refused_and_one_that_is_enough_is_named():
    message = refused(stratified_subset, UNEVEN, 10)
    assert message.startswith("--data.limit 10: too few. Class d, 5 of 400 images, would get 0.")
    enough = int(re.search(r"(\d+) is enough", message)[1])
    subset = stratified_subset(UNEVEN, enough, seed=0, class_names=NAMES[:4])
    assert len(subset) == enough <= 80
    assert torch.bincount(UNEVEN[subset], minlength=4).min() >= 1


def test_where_all_images_are_too_few_for_a_split_no_limit_is_said_to_be_enough():
    targets = torch.tensor([0] * 1000 + [1])
    message = refused(stratified_split, targets, 0.1, limit=50, class_names=NAMES[:2])
    assert "--data.val_fraction 0.1: of the 1 training image of class" in message
    assert "is enough" not in message


def test_the_limit_is_blamed_for_a_split_that_all_images_would_allow_and_one_that_is_enough_is_named():
    stratified_split(UNEVEN, 0.2, seed=0, class_names=NAMES[:4])
    message = refused(stratified_split, UNEVEN, 0.2, limit=150)
    assert message.startswith("--data.limit 150: too few. Class d, 5 of 400 images, would get ")
    enough = int(re.search(r"(\d+) is enough", message)[1])
    train, val = stratified_split(UNEVEN, 0.2, limit=enough, seed=0, class_names=NAMES[:4])
    assert len(train) + len(val) == enough
    assert all(torch.bincount(UNEVEN[part], minlength=4).min() >= 1 for part in (train, val))


def test_a_limit_is_not_blamed_for_what_all_images_would_not_allow_either():
    assert refused(stratified_split, UNEVEN, 0.01, limit=200).startswith("--data.val_fraction 0.01")


def test_a_source_with_its_own_validation_images_keeps_them_and_all_training_images():
    targets = {"train": UNEVEN.numpy(), "val": np.array([0, 1, 2, 3]), "test": np.array([0, 1])}
    splits = make_splits(targets, SplitSettings(val_fraction=0.5), NAMES[:4])
    assert [len(splits.of(split)) for split in ("train", "val", "test")] == [400, 4, 2]
    assert [splits.source_of(split) for split in ("train", "val", "test")] == ["train", "val", "test"]
    del targets["val"]
    splits = make_splits(targets, SplitSettings(val_fraction=0.5, seed=1), NAMES[:4])
    assert sorted([*splits.train.tolist(), *splits.val.tolist()]) == list(range(400))
    assert splits.source_of("val") == "train"
