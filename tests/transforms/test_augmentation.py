"""Batched augmentation against naive slicing and against torchvision, image by image."""

import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import random_images
from PIL import Image
from torchvision.transforms import v2

from cifar_lightning.errors import UserError
from cifar_lightning.transforms.augmentation import (
    Augmentation,
    crop_and_mirror,
    cutout_,
    jitter,
    normalize,
    resize,
)
from cifar_lightning.transforms.operations import OPERATIONS, apply_operations
from cifar_lightning.transforms.pipeline import Pipeline, augment, rows_of
from cifar_lightning.transforms.transform import seeded_generator

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def draw_epoch(chosen, **kwargs):
    """Return the default transforms with their tables of an epoch."""
    on_cpu, on_device = Pipeline(chosen).draw(**kwargs)
    assert on_cpu == []
    return on_device


def tables(drawn):
    """Return all tables as attributes."""
    return SimpleNamespace(**{name: table for _, tables in drawn for name, table in tables.items()})


def naive_crop_and_mirror(image, shift_y, shift_x, mirrored, padding, mode):
    """Pad one image (H, W, C), slice it, flip it: the obvious way."""
    height, width, _ = image.shape
    chw = image.permute(2, 0, 1).float()[None]
    padded = F.pad(chw, (padding,) * 4, mode="reflect") if mode == "reflect" else F.pad(chw, (padding,) * 4)
    top, left = padding + shift_y, padding + shift_x
    crop = padded[0, :, top : top + height, left : left + width]
    if mirrored:
        crop = crop.flip(-1)
    return crop.permute(1, 2, 0).to(torch.uint8)


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (24, 40, 5), (8, 8, 7)])
def test_crop_and_mirror_equals_padding_slicing_and_flipping_each_image(mode, height, width, padding):
    images = random_images(256, height, width)
    shift_y, shift_x = torch.randint(-padding, padding + 1, (2, 256))
    mirrored = torch.rand(256) < 0.5
    got = crop_and_mirror(images, shift_y, shift_x, mirrored, padding_px=padding, crop_mode=mode)
    for k in range(256):
        expected = naive_crop_and_mirror(images[k], int(shift_y[k]), int(shift_x[k]), bool(mirrored[k]), padding, mode)
        assert torch.equal(got[k], expected)


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_mirror_alone_gives_the_image_or_its_mirror_image(mode):
    images = random_images(8)
    mirrored = torch.tensor([True, False] * 4)
    got = crop_and_mirror(images, None, None, mirrored, padding_px=0, crop_mode=mode)
    assert torch.equal(got[0::2], images[0::2].flip(2))
    assert torch.equal(got[1::2], images[1::2])


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_a_shift_along_one_side_leaves_the_other(mode):
    images = random_images(1)
    down = crop_and_mirror(images, torch.tensor([3]), None, None, padding_px=4, crop_mode=mode)
    right = crop_and_mirror(images, None, torch.tensor([-2]), None, padding_px=4, crop_mode=mode)
    assert torch.equal(down[0], naive_crop_and_mirror(images[0], 3, 0, False, 4, mode))
    assert torch.equal(right[0], naive_crop_and_mirror(images[0], 0, -2, False, 4, mode))


def test_normalize_equals_torchvision_and_leaves_channels_last_memory():
    images = random_images()
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN.tolist(), STD.tolist())])
    got = normalize(images, mean=MEAN, std=STD)
    torch.testing.assert_close(got, reference(images.permute(0, 3, 1, 2)))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_finished_image_is_the_crop_normalised_by_torchvision_and_cut_out_by_slicing():
    chosen = Augmentation(crop_padding_px=3, cutout_px=10)
    images = random_images(64, 24, 24)
    draws = draw_epoch(chosen, num_images=64, image_size=24, seed=0, epoch=0, device=CPU)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN.tolist(), STD.tolist())])
    got, of = augment(images, draws, mean=MEAN, std=STD), tables(draws)
    for k in range(64):
        shift_y, shift_x, mirrored = int(of.shift_y[k]), int(of.shift_x[k]), bool(of.mirrored[k])
        crop = naive_crop_and_mirror(images[k], shift_y, shift_x, mirrored, 3, "reflect")
        expected = reference(crop.permute(2, 0, 1))
        top, left = int(of.cutout_y[k]), int(of.cutout_x[k])
        expected[:, top : top + 10, left : left + 10] = 0
        torch.testing.assert_close(got[k], expected)


@pytest.mark.parametrize("contrast", [0.0, 0.3])
def test_images_in_any_memory_layout_come_out_alike_and_are_left_as_they_were(contrast):
    chosen = Augmentation(cutout_px=6, contrast=contrast, policy="trivial", erasing=0.5)
    images = random_images()
    planes_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    draws = draw_epoch(chosen, num_images=16, image_size=32, seed=0, epoch=0, device=CPU)
    for some in (draws, draws[1:]):
        before = images.clone()
        got = augment(images, some, mean=MEAN, std=STD)
        assert torch.equal(images, before)
        assert torch.equal(got, augment(planes_first, some, mean=MEAN, std=STD))
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_jitter_equals_torchvision_image_by_image(factor):
    images = random_images(4).float() / 255
    chw = images.permute(0, 3, 1, 2)
    factors = torch.full((4,), factor)
    brighter = jitter(images, factors, None).permute(0, 3, 1, 2)
    torch.testing.assert_close(brighter, v2.functional.adjust_brightness(chw, factor))
    contrasted = jitter(images, None, factors).permute(0, 3, 1, 2)
    torch.testing.assert_close(contrasted, v2.functional.adjust_contrast(chw, factor))


def test_cutout_clears_exactly_the_square_of_each_image_in_place():
    images = torch.ones(3, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    got = cutout_(images, torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6]), 3)
    assert got is images
    for k, (top, left) in enumerate([(0, 0), (2, 4), (5, 6)]):
        expected = torch.ones(3, 8, 9)
        expected[:, top : top + 3, left : left + 3] = 0
        assert torch.equal(images[k], expected)


def test_draws_are_a_function_of_seed_and_epoch_and_cover_their_range():
    chosen = Augmentation(crop_padding_px=3, cutout_px=8, brightness=0.2, contrast=0.1, policy="trivial", erasing=0.5)

    def drawn(seed, epoch):
        return tables(draw_epoch(chosen, num_images=5000, image_size=32, seed=seed, epoch=epoch, device=CPU))

    first, again, other_epoch, other_seed = drawn(1, 0), drawn(1, 0), drawn(1, 1), drawn(2, 0)
    assert len(vars(first)) == 10
    for name, table in vars(first).items():
        assert torch.equal(table, getattr(again, name))
        assert not torch.equal(table, getattr(other_epoch, name))
        assert not torch.equal(table, getattr(other_seed, name))
    assert set(first.shift_y.tolist()) == set(range(-3, 4)) == set(first.shift_x.tolist())
    assert set(first.cutout_y.tolist()) == set(range(25))
    assert 0.8 <= first.brightness.min() < 0.81
    assert 1.19 < first.brightness.max() <= 1.2
    assert 0.47 < first.mirrored.float().mean() < 0.53
    assert set(first.operations.flatten().tolist()) == set(range(len(OPERATIONS)))
    assert 0.47 < (first.erased[:, 2] > 0).float().mean() < 0.53


def test_one_operation_more_leaves_the_draws_of_the_others():
    def drawn(chosen):
        return tables(draw_epoch(chosen, num_images=100, image_size=32, seed=0, epoch=0, device=CPU))

    plain, with_cutout = drawn(Augmentation()), drawn(Augmentation(cutout_px=8, contrast=0.5))
    assert torch.equal(plain.shift_x, with_cutout.shift_x)
    assert torch.equal(plain.mirrored, with_cutout.mirrored)
    with_policy = drawn(Augmentation(cutout_px=8, contrast=0.5, policy="rand", erasing=0.5))
    for name in ("shift_y", "shift_x", "mirrored", "cutout_y", "cutout_x", "contrast"):
        assert torch.equal(getattr(with_policy, name), getattr(with_cutout, name))


def test_draws_are_those_of_runs_made_before():
    """A resumed run needs the tables of the version that started it."""
    chosen = Augmentation(cutout_px=8, brightness=0.2, contrast=0.1, policy="trivial", erasing=0.5)
    draws = draw_epoch(chosen, num_images=100, image_size=32, seed=3, epoch=2, device=CPU)
    of = {name: table.numpy() for name, table in vars(tables(draws)).items()}
    of["magnitudes"] = of["magnitudes"] < 0  # the last bits of their values are linspace's
    found = {name: hashlib.sha256(table.tobytes()).hexdigest()[:12] for name, table in of.items()}
    assert found == {
        "shift_y": "22b98b68d958",
        "shift_x": "9d1c84bee606",
        "mirrored": "bfab4a313b29",
        "cutout_y": "564e6a952ec9",
        "cutout_x": "0f4014e14e99",
        "brightness": "bf8b00e82d76",
        "contrast": "fd78ddc47d37",
        "operations": "1c863b4081c1",
        "magnitudes": "25ec62ae8bca",
        "erased": "23428466c479",
    }


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_policy_changes_the_cropped_bytes_and_erasing_the_finished_image(policy):
    chosen = Augmentation(crop_padding_px=3, policy=policy, erasing=0.5)
    images = random_images(64)
    draws = draw_epoch(chosen, num_images=64, image_size=32, seed=0, epoch=0, device=CPU)
    got, of = augment(images, draws, mean=MEAN, std=STD), tables(draws)
    cropped = crop_and_mirror(images, of.shift_y, of.shift_x, of.mirrored, padding_px=3, crop_mode="reflect")
    expected = normalize(apply_operations(cropped, of.operations, of.magnitudes), mean=MEAN, std=STD)
    for image, (top, left, height, width) in zip(expected, of.erased.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0
    assert torch.equal(got, expected)
    assert 20 < (of.erased[:, 2] > 0).sum() < 44
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_alternating_flip_shows_both_sides_of_every_image_in_two_epochs():
    chosen = Augmentation(flip="alternating")
    shape = {"num_images": 1000, "image_size": 32, "seed": 0, "device": CPU}
    epochs = [tables(draw_epoch(chosen, epoch=epoch, **shape)) for epoch in range(4)]
    for first, second in itertools.pairwise(epochs):
        assert torch.equal(first.mirrored, ~second.mirrored)
    assert 400 < int(epochs[0].mirrored.sum()) < 600


@pytest.mark.parametrize("policy", ["none", "trivial", "rand"])
def test_an_image_is_augmented_alike_in_any_batch(policy):
    chosen = Augmentation(cutout_px=6, brightness=0.3, contrast=0.3, policy=policy, erasing=0.5)
    images = random_images(32)
    draws = draw_epoch(chosen, num_images=32, image_size=32, seed=0, epoch=3, device=CPU)
    everything = torch.arange(32)
    together = augment(images, rows_of(draws, everything), mean=MEAN, std=STD)
    order = torch.randperm(32, generator=seeded_generator(9))
    for indices in order.split(5):
        alone = augment(images[indices], rows_of(draws, indices), mean=MEAN, std=STD)
        assert torch.equal(alone, together[indices])


def test_cutout_is_the_mean_colour_even_with_jitter():
    chosen = Augmentation(crop_padding_px=0, flip="none", cutout_px=32, brightness=0.9, contrast=0.9)
    draws = draw_epoch(chosen, num_images=4, image_size=32, seed=0, epoch=0, device=CPU)
    assert augment(random_images(4), draws, mean=MEAN, std=STD).count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"crop_padding_px": 32}, "crop_padding_px 32"),
        ({"crop_padding_px": -1}, "crop_padding_px -1"),
        ({"cutout_px": 33}, "cutout_px 33"),
    ],
)
def test_a_value_out_of_range_names_its_flag(change, flag):
    with pytest.raises(UserError, match=f"--data.{flag}"):
        Augmentation(**change).check(32)


def test_resize_equals_pillows_bilinear_filter():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    scaled = resize(images, 24)
    assert scaled.shape == (3, 24, 24, 3)
    for image, small in zip(images, scaled, strict=True):
        expected = np.asarray(Image.fromarray(image.numpy()).resize((24, 24), Image.Resampling.BILINEAR))
        assert np.abs(small.numpy().astype(int) - expected.astype(int)).max() <= 1
