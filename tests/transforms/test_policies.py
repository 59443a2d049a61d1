"""What policies draw, against torchvision's tables, and erasing against a naive slice."""

import pytest
import torch
from torchvision.transforms import v2

from cifar_lightning.transforms.operations import OPERATIONS, SIGNED
from cifar_lightning.transforms.policies import NUM_BINS, draw_erasing, draw_operations, erase_, magnitude_table


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(policy, count, size=32, seed=0):
    return draw_operations(policy, count, size, kinds=generator(seed), strengths=generator(seed + 1))


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(("policy", "peer"), [("trivial", v2.TrivialAugmentWide), ("rand", v2.RandAugment)])
def test_operations_and_magnitudes_are_torchvisions(policy, peer, size):
    space = peer._AUGMENTATION_SPACE
    assert tuple(space) == OPERATIONS
    table = magnitude_table(policy, size)
    for row, (name, (magnitudes_of, signed)) in zip(table, space.items(), strict=True):
        expected = magnitudes_of(NUM_BINS, size, size)
        assert torch.equal(row, torch.zeros(NUM_BINS) if expected is None else expected.float()), name
        assert (name in SIGNED) == signed


def test_trivial_draws_every_operation_and_every_strength_of_either_sign_about_equally_often():
    operations, magnitudes = drawn("trivial", 140_000)
    assert operations.shape == magnitudes.shape == (140_000, 1)
    table = magnitude_table("trivial", 32)
    for index, name in enumerate(OPERATIONS):
        found = magnitudes[operations == index]
        assert 9_500 < len(found) < 10_500  # 5 standard deviations
        values, counts = found.abs().unique(return_counts=True)
        assert torch.equal(values, table[index].unique())
        if name in SIGNED:
            assert 0.475 < (found[found != 0] < 0).float().mean() < 0.525
            assert counts.min() > 230  # of 323
            assert counts.max() < 420
        else:
            assert (found >= 0).all()


def test_rand_draws_two_operations_at_bin_9():
    operations, magnitudes = drawn("rand", 14_000, size=64)
    assert operations.shape == magnitudes.shape == (14_000, 2)
    strongest = magnitude_table("rand", 64)[:, 9]
    assert torch.equal(magnitudes.abs(), strongest[operations])
    signed = torch.tensor([name in SIGNED for name in OPERATIONS])[operations]
    assert (magnitudes[~signed] >= 0).all()
    assert 0.47 < (magnitudes[signed] < 0).float().mean() < 0.53
    pairs = (operations[:, 0] * 14 + operations[:, 1]).bincount(minlength=196)
    assert pairs.min() > 30  # of 71: the second does not depend on the first
    assert pairs.max() < 120


def torchvisions_rectangles(count, size):
    """What RandomErasing draws: height, width of what it erases."""
    erasing = v2.RandomErasing(p=1)
    params = [erasing.make_params([torch.empty(3, size, size)]) for _ in range(count)]
    return torch.tensor([[p["i"], p["j"], p["h"], p["w"]] for p in params if p["v"] is not None])


def test_rectangles_lie_inside_and_are_distributed_as_torchvisions():
    ours = draw_erasing(20_000, 32, 1.0, generator(0))
    top, left, height, width = ours.unbind(1)
    assert (height < 32).all()
    assert (width < 32).all()
    assert top.min() == left.min() == 0
    assert (top + height).max() == (left + width).max() == 32
    area = height * width / 32**2
    assert 0.012 < area.min() < 0.03  # sides are rounded
    assert 0.31 < area.max() < 0.36
    assert (width > 3 * height).any()
    assert (height > 3 * width).any()
    peers = torchvisions_rectangles(3_000, 32).float()
    for mine, peer in zip(ours.float().unbind(1), peers.unbind(1), strict=True):
        assert abs(mine.mean() - peer.mean()) < 5 * peer.std() / 3_000**0.5
        assert abs(mine.std() - peer.std()) < 0.1 * peer.std()


def test_the_given_fraction_of_images_is_erased_and_which_ones_does_not_move_their_rectangles():
    few, all_of_them = draw_erasing(10_000, 32, 0.25, generator(3)), draw_erasing(10_000, 32, 1.0, generator(3))
    erased = few[:, 2] > 0
    assert 0.23 < erased.float().mean() < 0.27
    assert torch.equal(few[erased], all_of_them[erased])
    assert (few[~erased] == 0).all()


def test_after_ten_rectangles_as_high_or_wide_as_the_image_nothing_is_erased(monkeypatch):
    monkeypatch.setattr("cifar_lightning.transforms.policies.ERASED_FRACTION", (0.9, 1.0))
    monkeypatch.setattr("cifar_lightning.transforms.policies.ERASED_ASPECT", (0.5, 2.0))
    rectangles = draw_erasing(2_000, 32, 1.0, generator(0))
    erased = rectangles[:, 2] > 0
    assert 0 < erased.sum() < 2_000
    assert (rectangles[:, 2:] < 32).all()
    assert (rectangles[~erased] == 0).all()
    assert (rectangles[erased][:, 2] * rectangles[erased][:, 3] > 0.85 * 32**2).all()


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_erasing_clears_exactly_the_rectangle_of_each_image_in_place(size):
    images = torch.randn(40, 3, *size).add_(9).contiguous(memory_format=torch.channels_last)
    rectangles = draw_erasing(40, 12, 0.6, generator(1))
    expected = images.clone()
    for image, (top, left, height, width) in zip(expected, rectangles.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0
    assert erase_(images, rectangles) is images
    assert torch.equal(images, expected)
    assert (images == 0).flatten(1).any(1).sum() == (rectangles[:, 2] > 0).sum() > 10


def test_where_nothing_is_erased_nothing_changes():
    images = torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    assert torch.equal(erase_(images, torch.zeros(3, 4, dtype=torch.int64)), before)
