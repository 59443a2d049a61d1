"""The operations of augmentation policies against torchvision, image by image."""

import math

import pytest
import torch
from photos import random_images
from torchvision.transforms.v2 import functional as F

from cifar_lightning.transforms.operations import (
    OPERATIONS,
    SIGNED,
    _apply_everywhere,
    _apply_sorted,
    apply_operations,
)

# Ranges at least as wide as those of either policy.
STRONGEST = dict(zip(SIGNED, [0.99, 0.99, 32.0, 32.0, 135.0, 0.99, 0.99, 0.99, 0.99], strict=True))


def apply_operation(images, operation, magnitudes):
    """One operation on all images, each with its own magnitude."""
    operations = torch.full((len(images), 1), OPERATIONS.index(operation))
    return apply_operations(images, operations, magnitudes[:, None])


def odd_images():
    """Images at the edge of what the operations tell apart: flat, grey, of two values, of few values, smooth."""
    flat = torch.full((1, 32, 32, 3), 77)
    grey = torch.randint(0, 256, (4, 32, 32, 1)).expand(-1, -1, -1, 3)
    two = torch.randint(0, 2, (1, 32, 32, 3)) * 9 + 100
    one_channel_flat = torch.randint(0, 256, (1, 32, 32, 3)) * torch.tensor([1, 0, 1])
    few = torch.randint(0, 4, (1, 32, 32, 3)) * 60 + 20
    smooth = torch.arange(32)[:, None, None] * 4 + torch.arange(32)[:, None] * 3 + torch.tensor([0, 5, 9])
    return torch.cat([flat, grey, two, one_channel_flat, few, smooth[None]]).to(torch.uint8)


def strengths_of(operation):
    """31 strengths, both signs of those that have one."""
    if operation in SIGNED:
        upwards = torch.linspace(0, STRONGEST[operation], 31)
        return torch.cat([upwards, -upwards[1:]])
    if operation == "Posterize":
        return torch.arange(9.0)
    return torch.linspace(1, 0, 31) if operation == "Solarize" else torch.zeros(3)


def by_torchvision(image, operation, magnitude):
    """One image (H, W, 3) as TrivialAugmentWide of torchvision changes it."""
    chw = image.permute(2, 0, 1).contiguous()
    degrees = math.degrees(math.atan(magnitude))
    still = {"angle": 0.0, "scale": 1.0}
    changed = {
        "Identity": lambda: chw,
        "ShearX": lambda: F.affine(chw, translate=[0, 0], shear=[degrees, 0.0], center=[0, 0], **still),
        "ShearY": lambda: F.affine(chw, translate=[0, 0], shear=[0.0, degrees], center=[0, 0], **still),
        "TranslateX": lambda: F.affine(chw, translate=[int(magnitude), 0], shear=[0.0, 0.0], **still),
        "TranslateY": lambda: F.affine(chw, translate=[0, int(magnitude)], shear=[0.0, 0.0], **still),
        "Rotate": lambda: F.rotate(chw, angle=magnitude),
        "Brightness": lambda: F.adjust_brightness(chw, 1.0 + magnitude),
        "Color": lambda: F.adjust_saturation(chw, 1.0 + magnitude),
        "Contrast": lambda: F.adjust_contrast(chw, 1.0 + magnitude),
        "Sharpness": lambda: F.adjust_sharpness(chw, 1.0 + magnitude),
        "Posterize": lambda: F.posterize(chw, int(magnitude)),
        "Solarize": lambda: F.solarize(chw, 255 * magnitude),
        "AutoContrast": lambda: F.autocontrast(chw),
        "Equalize": lambda: F.equalize(chw),
    }
    return changed[operation]().permute(1, 2, 0)


def assert_equal_to_torchvision(images, operation, magnitudes):
    changed = apply_operation(images, operation, magnitudes)
    for image, magnitude, got in zip(images, magnitudes.tolist(), changed, strict=True):
        expected = by_torchvision(image, operation, magnitude)
        assert torch.equal(got, expected), f"{operation} {magnitude}: {int((got != expected).sum())} values differ"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_equals_torchvisions_value_for_value(operation):
    strengths = strengths_of(operation)
    raw_images = torch.cat([random_images(3), odd_images()])
    images = raw_images.repeat_interleave(len(strengths), 0)
    assert_equal_to_torchvision(images, operation, strengths.repeat(len(raw_images)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [(28, 28), (24, 40), (47, 31), (2, 7), (1, 1)])
def test_images_of_any_size_are_changed_as_torchvision_does(operation, size):
    strengths = strengths_of(operation)[::3]
    assert_equal_to_torchvision(random_images(len(strengths), *size), operation, strengths)


@pytest.mark.parametrize("operation", ["ShearX", "ShearY", "Rotate"])
def test_moved_pixels_come_from_the_nearest_one_but_for_ties(operation):
    """Against float64: what differs must lie within 1e-4 of the middle between two pixels."""
    size, count = 40, 60
    magnitudes = (torch.rand(count) * 2 - 1) * STRONGEST[operation]
    images = random_images(count, size, size)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for image, magnitude, got in zip(
        images, magnitudes.tolist(), apply_operation(images, operation, magnitudes), strict=True
    ):
        from_x, from_y = x.double(), y.double()
        if operation == "Rotate":
            cosine, sine = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
            u, v = x - (size - 1) / 2, y - (size - 1) / 2
            from_x, from_y = (cosine * u - sine * v + (size - 1) / 2, sine * u + cosine * v + (size - 1) / 2)
        elif operation == "ShearX":
            from_x = from_x + magnitude * (y + 0.5)
        else:
            from_y = from_y + magnitude * (x + 0.5)
        column, row = from_x.round().long(), from_y.round().long()
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        expected = image[row.clamp(0, size - 1), column.clamp(0, size - 1)] * inside[:, :, None]
        tie = ((from_x - from_x.floor() - 0.5).abs() < 1e-4) | ((from_y - from_y.floor() - 0.5).abs() < 1e-4)
        assert torch.equal(got[~tie], expected[~tie])
        assert tie.float().mean() < 0.05


def mixed_batch(count=280, num_ops=1, size=32):
    """Every operation, at any strength, in any order."""
    operations = torch.randint(len(OPERATIONS), (count, num_ops))
    magnitudes = torch.zeros(count, num_ops)
    for index, name in enumerate(OPERATIONS):
        strengths = strengths_of(name)
        chosen = operations == index
        magnitudes[chosen] = strengths[torch.randint(len(strengths), (int(chosen.sum()),))]
    return random_images(count, size, size), operations, magnitudes


@pytest.mark.parametrize("num_ops", [1, 2])
def test_a_batch_of_mixed_operations_equals_each_image_done_alone(num_ops):
    images, operations, magnitudes = mixed_batch(num_ops=num_ops)
    assert set(operations.flatten().tolist()) == set(range(14))
    got = apply_operations(images, operations, magnitudes)
    for k, image in enumerate(images):
        for operation, magnitude in zip(operations[k].tolist(), magnitudes[k], strict=True):
            image = apply_operation(image[None], OPERATIONS[operation], magnitude[None])[0]
        assert torch.equal(got[k], image), [OPERATIONS[operation] for operation in operations[k]]


def test_every_kernel_over_the_whole_batch_gives_the_same_as_over_sorted_groups():
    images, operations, magnitudes = mixed_batch()
    sorted_shares = _apply_sorted(images, operations[:, 0], magnitudes[:, 0])
    assert torch.equal(_apply_everywhere(images, operations[:, 0], magnitudes[:, 0]), sorted_shares)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_images_are_left_as_they_were_in_any_memory_layout(operation):
    images = random_images(4)
    magnitudes = strengths_of(operation)[1:2].expand(4)
    planes_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    before = images.clone()
    changed = apply_operation(images, operation, magnitudes)
    assert torch.equal(apply_operation(planes_first, operation, magnitudes), changed)
    assert torch.equal(images, before)
    assert torch.equal(planes_first, before)


def test_an_empty_batch_stays_empty():
    images, operations, magnitudes = mixed_batch(count=0)
    assert apply_operations(images, operations, magnitudes).shape == (0, 32, 32, 3)
