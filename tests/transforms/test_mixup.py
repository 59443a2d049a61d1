"""MixUp and CutMix: what is mixed, how the targets follow, and that the seed decides."""

import pytest
import torch

from cifar_lightning.errors import UserError
from cifar_lightning.transforms.mixup import Mixing

IMAGES = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
TARGETS = torch.tensor([0, 1, 2, 3, 4, 5])


def mixed(seed=0, **strengths):
    torch.manual_seed(seed)
    return Mixing(6, **strengths)(IMAGES, TARGETS)


def test_mixup_blends_images_and_targets_in_one_proportion():
    images, shares = mixed(mixup=1.0)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    # An image's value is its class, so blended values are the targets' means.
    torch.testing.assert_close(images, (shares @ TARGETS.float()).view(6, 1, 1, 1).expand_as(images))
    assert ((shares > 0).sum(1) == 2).all()


def test_cutmix_pastes_a_rectangle_and_its_fraction_of_the_pixels_is_the_targets():
    images, shares = next(found for found in (mixed(seed, cutmix=1.0) for seed in range(20)) if found[1].max() < 1)
    torch.testing.assert_close(images.mean((1, 2, 3)), shares @ TARGETS.float())
    assert set(images.unique().tolist()) <= set(range(6))


def test_with_both_each_batch_gets_one_of_them():
    kinds = {bool((mixed(seed, mixup=1.0, cutmix=1.0)[0] % 1 == 0).all()) for seed in range(20)}
    assert kinds == {True, False}  # whole values: pasted; others: blended


def test_the_global_generator_decides_which_checkpoints_keep():
    assert torch.equal(mixed(3, mixup=0.4, cutmix=1.0)[0], mixed(3, mixup=0.4, cutmix=1.0)[0])
    assert not torch.equal(mixed(3, mixup=0.4)[0], mixed(4, mixup=0.4)[0])


def test_images_stay_channels_last():
    for strengths in ({"mixup": 1.0}, {"cutmix": 1.0}):
        assert mixed(**strengths)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("strengths", [{"mixup": 1.0}, {"cutmix": 1.0}])
@pytest.mark.parametrize("targets", [[2, 2, 2], [4]])
def test_a_batch_of_one_class_keeps_its_targets(strengths, targets):
    _, shares = Mixing(6, **strengths)(IMAGES[: len(targets)], torch.tensor(targets))
    assert shares.argmax(1).tolist() == targets
    torch.testing.assert_close(shares.max(1).values, torch.ones(len(targets)))


@pytest.mark.parametrize("alpha", [0.02, 0.2, 1.0, 1000.0])
def test_the_least_and_the_greatest_strength_draw_a_proportion(alpha):
    for _ in range(200):
        images, targets = Mixing(6, mixup=alpha)(IMAGES, TARGETS)
        assert images.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-3, 0.0199])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_strength_whose_draws_underflow_is_refused(name, alpha):
    with pytest.raises(UserError, match=rf"--model\.{name} .*0\.02"):
        Mixing(6, **{name: alpha})
