"""Splits and subsets: exact numbers of images, from every class its fraction."""

import numpy as np
import pytest
import torch

from cifar_lightning.data.splits import SplitSettings, _pick, make_splits
from cifar_lightning.data.splits import stratified_split as split_by_settings
from cifar_lightning.errors import UserError
from cifar_lightning.transforms.transform import seeded_generator

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
def test_a_fraction_that_leaves_a_class_without_an_image_names_the_smallest_class(fraction):
    message = refused(stratified_split, UNEVEN, fraction)
    assert message.startswith(f"--data.val_fraction {fraction}: class d has 5 training images")


def test_a_class_with_one_image_cannot_be_split_by_a_fraction_that_is_given():
    targets = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 70, 25, 1]))
    assert refused(stratified_split, targets, 0.2).startswith("--data.val_fraction 0.2: class d has 1 training image")


@pytest.mark.parametrize("counts", [[3, 3, 3], [2, 2], [300, 70, 25, 5], [40, 2, 1, 1], [1, 1]])
def test_the_default_fraction_of_validation_fits_classes_of_any_size(counts):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    train, val = stratified_split(targets, SplitSettings.val_fraction, seed=0, class_names=NAMES[: len(counts)])
    held_out = torch.bincount(targets[val], minlength=len(counts)).tolist()
    assert all(num == 0 if count == 1 else 1 <= num < count for count, num in zip(counts, held_out, strict=True))
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(sum(counts)))


@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("limit", [None, 60])
def test_a_test_split_is_held_out_first_and_depends_on_seed_and_fraction_alone(val_fraction, limit):
    targets = {"train": np.arange(120) % 3}
    splits = make_splits(targets, SplitSettings(val_fraction, limit), NAMES[:3])
    plain = make_splits(targets, SplitSettings(), NAMES[:3])
    assert torch.equal(splits.test, plain.test)
    assert np.bincount(targets["train"][splits.test]).tolist() == [8, 8, 8]
    everything = torch.cat([splits.train, splits.val, splits.test])
    assert len(everything.unique()) == len(everything) == (limit or 96) + 24
    assert (splits.source_of("test"), splits.source_of("val")) == ("train", "train")
    assert not torch.equal(make_splits(targets, SplitSettings(seed=1), NAMES[:3]).test, plain.test)
    assert len(make_splits(targets, SplitSettings(test_fraction=0.5), NAMES[:3]).test) == 60


@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 3], [100, 2]])
def test_the_default_test_split_has_every_class_of_two_images(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    splits = make_splits({"train": labels}, SplitSettings(), NAMES[: len(counts)])
    assert np.bincount(labels[splits.test], minlength=len(counts)).min() == 1
    assert np.bincount(labels[splits.train], minlength=len(counts)).min() >= 1


def refused_split(targets, **settings):
    with pytest.raises(UserError) as caught:
        make_splits(targets, SplitSettings(**settings), NAMES[:2])
    return str(caught.value)


def test_a_test_split_that_cannot_be_held_out_is_refused():
    of_one = {"train": np.array([0, 0, 0, 1])}
    assert "class b has 1" in refused_split(of_one)
    few = {"train": np.array([0, 0, 0, 1, 1])}
    assert "--data.test_fraction 0.1: class" in refused_split(few, test_fraction=0.1)
    own = {"train": np.array([0, 0, 1, 1]), "test": np.array([0, 1])}
    assert "--data.test_fraction 0.5" in refused_split(own, test_fraction=0.5)


def test_a_limit_that_leaves_a_class_without_images_is_refused_and_a_larger_one_keeps_every_class():
    message = refused(stratified_subset, UNEVEN, 10)
    assert message.startswith("--data.limit 10: too few. Class d, 5 of 400 images, would get 0;")
    subset = stratified_subset(UNEVEN, 80, seed=0, class_names=NAMES[:4])
    assert len(subset) == 80
    assert torch.bincount(UNEVEN[subset], minlength=4).min() >= 1


def test_the_limit_is_blamed_for_a_split_that_all_images_would_allow():
    stratified_split(UNEVEN, 0.2, seed=0, class_names=NAMES[:4])
    message = refused(stratified_split, UNEVEN, 0.2, limit=150)
    assert message.startswith("--data.limit 150: too few. Class d, 5 of 400 images, would get ")
    train, val = stratified_split(UNEVEN, 0.2, limit=399, seed=0, class_names=NAMES[:4])
    assert len(train) + len(val) == 399
    assert all(torch.bincount(UNEVEN[part], minlength=4).min() >= 1 for part in (train, val))


def test_a_limit_is_not_blamed_for_what_all_images_would_not_allow_either():
    assert refused(stratified_split, UNEVEN, 0.01, limit=200).startswith("--data.val_fraction 0.01")


@pytest.mark.parametrize(("counts", "limit"), [([5000] * 10, 50), ([5000] * 10, 90), ([300, 70, 25, 5], 200)])
def test_the_default_fraction_of_validation_fits_a_limit_that_leaves_each_class_some_images(counts, limit):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    names = NAMES[: len(counts)]
    train, val = stratified_split(targets, SplitSettings.val_fraction, limit=limit, seed=0, class_names=names)
    assert len(train) + len(val) == limit
    assert all(torch.bincount(targets[part], minlength=len(counts)).min() >= 1 for part in (train, val))


def test_a_source_with_its_own_validation_images_keeps_them_and_all_training_images():
    targets = {"train": UNEVEN.numpy(), "val": np.array([0, 1, 2, 3]), "test": np.array([0, 1])}
    splits = make_splits(targets, SplitSettings(val_fraction=0.5), NAMES[:4])
    assert [len(splits.of(split)) for split in ("train", "val", "test")] == [400, 4, 2]
    assert [splits.source_of(split) for split in ("train", "val", "test")] == ["train", "val", "test"]
    del targets["val"]
    splits = make_splits(targets, SplitSettings(val_fraction=0.5, seed=1), NAMES[:4])
    assert sorted([*splits.train.tolist(), *splits.val.tolist()]) == list(range(400))
    assert splits.source_of("val") == "train"


@pytest.mark.parametrize("seed", range(5))
def test_of_each_class_the_first_of_the_shuffled_images_are_picked(seed):
    counts, numbers = torch.tensor([300, 0, 25, 1, 70, 0]), torch.tensor([100, 0, 25, 0, 1, 0])
    targets = torch.repeat_interleave(torch.arange(6), counts)
    targets = targets[torch.randperm(len(targets), generator=seeded_generator(seed, 1, 0))]
    shuffled = torch.randperm(len(targets), generator=seeded_generator(seed, 0, 0))
    expected = torch.zeros(len(targets), dtype=torch.bool)
    for label, num in enumerate(numbers.tolist()):
        expected[shuffled[targets[shuffled] == label][:num]] = True
    assert torch.equal(_pick(targets, numbers, seeded_generator(seed, 0, 0)), expected)
