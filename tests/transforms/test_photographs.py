"""Batched transforms of photographs against torchvision's functionals, image by image."""

import jaxtyping
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from cifar_lightning.errors import UserError
from cifar_lightning.transforms import photographs
from cifar_lightning.transforms.augmentation import CropAndFlip, Erasing, Jitter, RandomPolicy
from cifar_lightning.transforms.photographs import (
    GaussianBlur,
    RandomAffine,
    RandomGrayscale,
    RandomResizedCrop,
    RandomRotation,
    resized_crop,
)
from cifar_lightning.transforms.transform import EpochGenerator


def made(transform, size=32, num=8, channels=3):
    """Return smooth images, their transformed ones and the draws."""
    noise = torch.rand(num, channels, size // 4, size // 4)
    images = (255 * torch.nn.functional.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)).to(torch.uint8)
    rows = transform.draw(EpochGenerator(0, 0, 1), num, size)
    return images, transform.apply(images.permute(0, 2, 3, 1).clone(), rows).permute(0, 3, 1, 2), rows


def assert_near(got, expected, but=0.0):
    assert got.dtype == expected.dtype == torch.uint8
    assert ((got.int() - expected.int()).abs() > 1).float().mean() <= but


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 96])
def test_resized_crop_is_torchvisions_of_the_same_boxes(size, channels, monkeypatch):
    images, _, rows = made(RandomResizedCrop(), size, channels=channels)
    boxes = rows["boxes"]
    boxes[:3] = torch.tensor([[0, 0, size, size], [size - 1, size - 1, 1, 1], [0, size - 5, size, 5]])
    for large in (photographs._LARGE_PX, 10_000):  # image by image, and the whole batch as on other devices
        monkeypatch.setattr(photographs, "_LARGE_PX", large)
        crops = resized_crop(images.permute(0, 2, 3, 1), boxes).permute(0, 3, 1, 2)
        for image, crop, box in zip(images, crops, boxes.tolist(), strict=True):
            assert_near(crop, functional.resized_crop(image, *box, [size, size], antialias=True))
        alone = resized_crop(images[5:6].permute(0, 2, 3, 1), boxes[5:6])
        assert torch.equal(alone, crops[5:6].permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (2.0, 3.0)), ((1.0, 1.0), (0.1, 0.2))]
)
def test_crops_are_distributed_as_torchvisions(scale, ratio):
    theirs = v2.RandomResizedCrop(32, scale=scale, ratio=ratio)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    drawn = [theirs.make_params([image]) for _ in range(1500)]
    expected = torch.tensor([[each[name] for name in ("top", "left", "height", "width")] for each in drawn]).float()
    boxes = RandomResizedCrop(scale, ratio).draw(EpochGenerator(0, 0), 20_000, 32)["boxes"]
    assert ((boxes[:, :2] + boxes[:, 2:]) <= 32).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    spread = expected.std(0) / 1500**0.5
    assert ((boxes.float().mean(0) - expected.mean(0)).abs() <= 4 * spread + 1e-6).all()
    assert torch.equal(boxes.amin(0)[2:] >= 1, torch.tensor([True, True]))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_affine_and_rotation_are_torchvisions_of_the_same_parameters(interpolation):
    mode = InterpolationMode(interpolation)
    transform = RandomAffine(40.0, (0.2, 0.1), (0.7, 1.4), [-20.0, 20.0, -10.0, 10.0], interpolation)
    images, got, rows = made(transform)
    for image, moved, (angle, x, y, scale, *shear) in zip(images, got, rows["affine"].tolist(), strict=True):
        expected = functional.affine(image, angle, [x, y], scale, shear, interpolation=mode)
        assert ((moved.int() - expected.int()).abs() > 1).float().mean() < (
            0.01 if interpolation == "nearest" else 1e-9
        )
    images, got, rows = made(RandomRotation([10.0, 70.0], interpolation))
    for image, moved, angle in zip(images, got, rows["affine"][:, 0].tolist(), strict=True):
        assert -70 <= angle <= -10
        expected = functional.rotate(image, -angle, interpolation=mode)
        assert ((moved.int() - expected.int()).abs() > 1).float().mean() < (
            0.01 if interpolation == "nearest" else 1e-9
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_blurred_images_are_torchvisions_and_the_others_stay(channels):
    images, got, rows = made(RandomGrayscale(0.5), channels=channels)
    assert 0 < rows["chosen"].sum() < 8
    for image, gray, is_chosen in zip(images, got, rows["chosen"], strict=True):
        assert torch.equal(gray, functional.rgb_to_grayscale(image, channels) if is_chosen else image)
    images, got, rows = made(GaussianBlur(5, [0.3, 2.0], p=0.5), channels=channels)
    for image, blurred, is_chosen, sigma in zip(images, got, rows["chosen"], rows["sigma"].tolist(), strict=True):
        assert_near(blurred, functional.gaussian_blur(image, [5, 5], [sigma, sigma]) if is_chosen else image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(scale=(1.0, 0.5)), "RandomResizedCrop: scale"),
        (lambda: RandomResizedCrop(ratio=(0.0, 0.5)), "RandomResizedCrop: ratio"),
        (lambda: RandomRotation(-3.0), "RandomRotation: degrees -3.0"),
        (lambda: GaussianBlur(4), "GaussianBlur: kernel_size 4"),
        (lambda: GaussianBlur(3, 0.0), "GaussianBlur: sigma"),
        (lambda: RandomGrayscale(1.5), "p 1.5"),
        (lambda: RandomAffine(0.0, (4.0, 4.0)), r"RandomAffine: translate \(4.0, 4.0\)"),
        (lambda: RandomAffine(0.0, (0.1, -0.1)), "RandomAffine: translate"),
        (lambda: RandomPolicy("none"), "policy none: one of trivial, rand"),
        (lambda: CropAndFlip(mode="zero"), "mode zero: one of reflect, zeros"),
        (lambda: CropAndFlip(flip="horizontal"), "flip horizontal: one of random"),
        (lambda: Jitter(5), "Jitter.brightness 5"),
        (lambda: Erasing(5), "Erasing.p 5"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would refuse some of these calls first
    with pytest.raises(UserError, match=message):
        make()
