"""Batched transforms that photographs need, with torchvision's rules: crop and resize, rotate, affine, grayscale, blur.

Each has the arguments of torchvision.transforms.v2's of the same name, and for given draws its result on uint8 tensors,
within 1 of 255. Images keep their size; pixels from outside are black, as torchvision's without `fill`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cifar_lightning.errors import UserError
from cifar_lightning.settings.limits import Strength, check_settings
from cifar_lightning.transforms.operations import Images, grey
from cifar_lightning.transforms.transform import EpochGenerator, Tables, Transform

Interpolation = Literal["bilinear", "nearest"]

_CROP_TRIES = 10  # as torchvision: then the largest crop in the middle that has an allowed ratio
# On a CPU, from here on torch's own uint8 kernel image by image is faster than a grid of the whole batch: at 32, 64
# and 224 pixels 30, 40 and 147 microseconds an image against 16, 66 and 1,949 (1 thread, least of 10 batches of 128).
_LARGE_PX = 64


class RandomResizedCrop(Transform):
    """Crops each image at random and resizes the crop to the image's size, bilinear with antialiasing.

    Args:
        scale: Least and largest area of the crop, as fractions of the image's.
        ratio: Least and largest width of the crop, divided by its height.
    """

    def __init__(
        self, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0)
    ) -> None:
        self.scale, self.ratio = _range(self, "scale", scale, above=0.0), _range(self, "ratio", ratio, above=0.0)

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        """Draw top, left, height and width by torchvision's rule.

        The area is uniform and the logarithm of the ratio is; a crop that does not fit is drawn again.
        """

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(num_images, generator=generator, dtype=torch.float64)

        in_the_middle = image_size * torch.tensor([1 / self.ratio[0], self.ratio[1]]).clamp(max=1)
        size = in_the_middle.round().long().clamp(min=1).expand(num_images, 2)  # height and width
        is_drawn = torch.zeros(num_images, dtype=torch.bool)
        for _ in range(_CROP_TRIES):
            area = image_size**2 * between(*self.scale)
            aspect = between(math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
            tried = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], 1).round().long()
            fits = ((tried > 0) & (tried <= image_size)).all(1) & ~is_drawn
            size = torch.where(fits[:, None], tried, size)
            is_drawn |= fits
        corners = torch.rand(num_images, 2, generator=generator, dtype=torch.float64)
        corner = torch.where(is_drawn[:, None], (corners * (image_size - size + 1)).long(), (image_size - size) // 2)
        return {"boxes": torch.cat([corner, size], 1)}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        return resized_crop(images, rows["boxes"])


class RandomAffine(Transform):
    """Rotates, shifts, scales and shears each image.

    Args:
        degrees: Largest rotation, or the least and the largest, in degrees.
        translate: Largest shift to the side and down, as fractions of the image size.
        scale: Least and largest scale.
        shear: Largest shear along x, or the least and the largest, or these of x and y, in degrees.
        interpolation: bilinear or nearest.
    """

    def __init__(
        self,
        degrees: float | list[float],
        translate: tuple[float, float] | None = None,
        scale: tuple[float, float] | None = None,
        shear: float | list[float] | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.degrees = _range(self, "degrees", degrees)
        self.translate = (0.0, 0.0) if translate is None else translate
        if not all(0 <= most <= 1 for most in self.translate):
            raise UserError(
                f"--data.transforms RandomAffine: translate {translate}; fractions of the image size, 0 to 1."
            )
        self.scale = (1.0, 1.0) if scale is None else _range(self, "scale", scale, above=0.0)
        shears = [0.0, 0.0] if shear is None else shear
        several = shears if isinstance(shears, Sequence) else [-shears, shears]
        self.shear = [_range(self, "shear", pair) for pair in (several[:2], several[2:] or [0.0, 0.0])]
        self.interpolation: Interpolation = interpolation

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(num_images, generator=generator)

        angle = uniform(*self.degrees)
        shifts = [uniform(-most * image_size, most * image_size).round() for most in self.translate]
        scale, shears = uniform(*self.scale), [uniform(*bounds) for bounds in self.shear]
        return {"affine": torch.stack([angle, *shifts, scale, *shears], 1)}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        return affine(images, rows["affine"], self.interpolation)


class RandomRotation(RandomAffine):
    """Rotates each image about its centre.

    Args:
        degrees: Largest rotation, or the least and the largest, in degrees.
        interpolation: bilinear or nearest.
    """

    def __init__(self, degrees: float | list[float], interpolation: Interpolation = "bilinear") -> None:
        low, high = _range(self, "degrees", degrees)
        super().__init__([-high, -low], interpolation=interpolation)  # torchvision's `rotate` turns the other way


class RandomGrayscale(Transform):
    """Makes some images gray; they keep their channels.

    Args:
        p: Fraction of the images.
    """

    def __init__(self, p: Strength = 0.1) -> None:
        check_settings("data.transforms RandomGrayscale", RandomGrayscale.__init__, {"p": p})
        self.p = p

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        return {"chosen": torch.rand(num_images, generator=generator) < self.p}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        return _where(rows["chosen"], grayscale, images)


class GaussianBlur(Transform):
    """Blurs images, each by a width of its own.

    Args:
        kernel_size: Odd, in pixels; a tenth of the image size is usual.
        sigma: Standard deviation of the blur in pixels, or the least and the largest.
        p: Fraction of the images.
    """

    def __init__(self, kernel_size: int, sigma: float | list[float] | None = None, p: Strength = 1.0) -> None:
        check_settings("data.transforms GaussianBlur", GaussianBlur.__init__, {"p": p})
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"--data.transforms GaussianBlur: kernel_size {kernel_size}; odd and 1 or more.")
        sigmas = [0.1, 2.0] if sigma is None else sigma
        self.sigma = _range(self, "sigma", sigmas if isinstance(sigmas, Sequence) else [sigmas, sigmas], above=0.0)
        self.kernel_size, self.p = kernel_size, p

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        if self.kernel_size // 2 >= image_size:  # the mirrored edge has no more pixels
            raise UserError(
                f"--data.transforms GaussianBlur: kernel_size {self.kernel_size}: up to {2 * image_size - 1} for "
                f"{image_size}-pixel images."
            )
        low, high = self.sigma
        sigma = low + (high - low) * torch.rand(num_images, generator=generator)
        return {"sigma": sigma, "chosen": torch.rand(num_images, generator=generator) < self.p}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        size = self.kernel_size
        return _where(rows["chosen"], lambda some, sigma: gaussian_blur(some, sigma, size), images, rows["sigma"])


def resized_crop(images: Images, boxes: Int64[Tensor, "batch 4"]) -> Images:
    """Resize a crop of each image, (top, left, height, width), to the size of the images.

    A crop is never larger than its image, so antialiasing changes nothing: two pixels weigh in along each side.
    """
    _, height, width, _ = images.shape
    if images.device.type == "cpu" and height >= _LARGE_PX:
        planes, resized = images.permute(0, 3, 1, 2), list[Tensor]()
        for k, (top, left, rows, columns) in enumerate(boxes.tolist()):
            crop = planes[k : k + 1, :, top : top + rows, left : left + columns]
            resized.append(F.interpolate(crop, (height, width), mode="bilinear", antialias=True))
        return torch.cat(resized).permute(0, 2, 3, 1)
    top, left, rows, columns = boxes.float().unbind(1)
    y, x = _source(top, rows, height), _source(left, columns, width)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    return _sample(images, grid, "bilinear")


def _source(start: Float[Tensor, " batch"], length: Float[Tensor, " batch"], size: int) -> Float[Tensor, "batch size"]:
    """Return where the pixels along a side come from, -1 to 1, kept inside the crop."""
    inside = (torch.arange(size, device=start.device) + 0.5) * (length / size)[:, None] - 0.5
    inside = torch.minimum(inside.clamp_(min=0), (length - 1)[:, None])
    return ((inside + start[:, None]) * 2 + 1) / size - 1


def affine(images: Images, affine: Float[Tensor, "batch 6"], interpolation: Interpolation) -> Images:
    """Transform each image by (angle, shift x, shift y, scale, shear x, shear y), as torchvision's `affine`.

    Angles are in degrees, clockwise, and shifts in pixels.
    """
    _, height, width, _ = images.shape
    angle, shift_x, shift_y, scale, shear_x, shear_y = affine.unbind(1)
    turn, shear_x, shear_y = torch.deg2rad(angle), torch.deg2rad(shear_x), torch.deg2rad(shear_y)
    # torchvision's inverse of rotation * shear * scale.
    a = (turn - shear_y).cos() / shear_y.cos()
    b = -(turn - shear_y).cos() * shear_x.tan() / shear_y.cos() - turn.sin()
    c = (turn - shear_y).sin() / shear_y.cos()
    d = -(turn - shear_y).sin() * shear_x.tan() / shear_y.cos() + turn.cos()
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)[None, None, :]
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)[None, :, None]
    x, y = x - shift_x[:, None, None], y - shift_y[:, None, None]
    a, b, c, d = (each[:, None, None] for each in (d / scale, -b / scale, -c / scale, a / scale))
    grid = torch.stack([(a * x + b * y) / (width / 2), (c * x + d * y) / (height / 2)], -1)
    return _sample(images, grid, interpolation)


def _sample(images: Images, grid: Float[Tensor, "batch height width 2"], interpolation: Interpolation) -> Images:
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    sampled = F.grid_sample(planes, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return sampled.round_().to(torch.uint8).permute(0, 2, 3, 1)


def grayscale(images: Images) -> Images:
    """Return the luma (ITU-R 601), rounded down, in all channels."""
    return grey(images.float().permute(0, 3, 1, 2)).to(torch.uint8).permute(0, 2, 3, 1).expand(images.shape)


def gaussian_blur(images: Images, sigma: Float[Tensor, " batch"], kernel_size: int) -> Images:
    """Blur each image by its own standard deviation, mirrored at the edges."""
    batch, height, width, channels = images.shape
    margin = kernel_size // 2
    distance = torch.arange(-margin, margin + 1, device=images.device)
    kernels = torch.softmax(-0.5 * (distance / sigma[:, None]) ** 2, 1)  # (B, kernel_size)
    weights = kernels.repeat_interleave(channels, 0)[:, None]  # (B * C, 1, kernel_size)
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    planes = F.pad(planes, [margin] * 4, mode="reflect").view(1, batch * channels, height + 2 * margin, -1)
    for kernel in (weights[..., None], weights[:, :, None]):  # down, then to the side
        planes = F.conv2d(planes, kernel, groups=batch * channels)
    return planes.view(batch, channels, height, width).round_().to(torch.uint8).permute(0, 2, 3, 1)


def _where(chosen: Bool[Tensor, " batch"], change: Callable[..., Tensor], images: Images, *rows: Tensor) -> Images:
    """Change the chosen images; on a CPU only those: elsewhere counting them would block the host."""
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], change(images, *rows), images)
    some = chosen.nonzero().flatten()
    if len(some):
        images[some] = change(images[some], *(row[some] for row in rows))
    return images


def _range(
    transform: Transform, name: str, given: float | Sequence[float], above: float = -math.inf
) -> tuple[float, float]:
    """Return the least and the largest value; a number alone is both of its signs."""
    low, high = (-given, given) if isinstance(given, int | float) else given
    if not above < low <= high < math.inf:
        limit = f"above {above}, " if above > -math.inf else ""
        raise UserError(
            f"--data.transforms {type(transform).__name__}: {name} {given}; two numbers, {limit}least first."
        )
    return low, high
