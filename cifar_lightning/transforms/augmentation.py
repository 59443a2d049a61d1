"""Batched augmentation on the device, with separate random draws for each image.

The draws of an epoch are small tables, a function of (seed, epoch) and indexed by image. No batch depends on the
batches before it, so a resumed run sees the same images, with any loader and on any device.

To add an augmentation: give `Augmentation` a field whose default turns it off, give `EpochDraws` a table, fill it in
`draw_epoch` from `seeded_generator(seed, epoch, N)` with an N that no other draw uses, and apply it in `augment`. The
flag is an argument of the same name in `ImageDataModule`, which passes it to `Augmentation`; then write the table of
flags again: `python -m cifar_lightning.cli.lightning_cli`. A new operation of the policies belongs in operations.py.

Input is uint8 RGB, 0-255, `(batch, height, width, channels)`; output is float32 `(batch, channels, height, width)` in
NHWC memory, which PyTorch calls channels_last.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from cifar_lightning.errors import UserError
from cifar_lightning.settings.limits import Pixels, check_settings
from cifar_lightning.transforms.operations import apply_operations
from cifar_lightning.transforms.policies import Policy, draw_erasing, draw_operations, erase_

CropMode = Literal["reflect", "zeros"]
FlipMode = Literal["random", "alternating", "none"]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation settings; the fields are documented as flags in `ImageDataModule`."""

    crop_padding_px: Pixels = 4
    crop_mode: CropMode = "reflect"
    flip: FlipMode = "random"
    cutout_px: Pixels = 0
    brightness: float = 0.0
    contrast: float = 0.0
    policy: Policy = "none"
    erasing: float = 0.0

    def __post_init__(self) -> None:
        check_settings("data", Augmentation, vars(self))

    def check(self, image_size: int) -> None:
        """Raise `UserError` for a value that is invalid for images of `image_size` pixels."""
        if not 0 <= self.crop_padding_px < image_size:
            raise UserError(
                f"--data.crop_padding_px {self.crop_padding_px}: 0 to {image_size - 1} for {image_size}-pixel images."
            )
        if not 0 <= self.cutout_px <= image_size:
            raise UserError(f"--data.cutout_px {self.cutout_px}: 0 (off) to {image_size}, the image size.")


@dataclass(frozen=True)
class EpochDraws:
    """Tables of one epoch with a row per image of the training source; None if the operation is off."""

    shift_y: Int64[Tensor, " images"] | None
    shift_x: Int64[Tensor, " images"] | None
    mirrored: Bool[Tensor, " images"] | None
    cutout_y: Int64[Tensor, " images"] | None
    cutout_x: Int64[Tensor, " images"] | None
    brightness: Float[Tensor, " images"] | None
    contrast: Float[Tensor, " images"] | None
    operations: Int64[Tensor, "images num_ops"] | None
    magnitudes: Float[Tensor, "images num_ops"] | None
    erased: Int64[Tensor, "images 4"] | None

    def of(self, images: Int64[Tensor, " batch"]) -> "EpochDraws":
        """Return the rows of a batch."""
        tables = (getattr(self, field.name) for field in fields(self))
        return EpochDraws(*(None if table is None else table.index_select(0, images) for table in tables))


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator seeded by the non-negative integers `key`: (seed, epoch, purpose)."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)  # manual_seed takes 63 bits


def draw_epoch(
    augmentation: Augmentation, *, num_images: int, image_size: int, seed: int, epoch: int, device: torch.device
) -> EpochDraws:
    """Draw the tables of one epoch, a pure function of the arguments.

    Each operation has its own generator, so enabling one does not change the draws of the others. The draws are made on
    the CPU and moved, since generators of other devices give other numbers.
    """

    def integers(purpose: int, low: int, high: int) -> Tensor:
        generator = seeded_generator(seed, epoch, purpose)
        return torch.randint(low, high + 1, (num_images,), generator=generator).to(device)

    def factors(purpose: int, strength: float) -> Tensor:
        generator = seeded_generator(seed, epoch, purpose)
        return (1 + strength * (2 * torch.rand(num_images, generator=generator) - 1)).to(device)

    pad, inside = augmentation.crop_padding_px, image_size - augmentation.cutout_px
    operations, magnitudes, erased = None, None, None
    if augmentation.policy != "none":
        kinds, strengths = seeded_generator(seed, epoch, 8), seeded_generator(seed, epoch, 9)
        drawn = draw_operations(augmentation.policy, num_images, image_size, kinds=kinds, strengths=strengths)
        operations, magnitudes = (table.to(device) for table in drawn)
    if augmentation.erasing:
        generator = seeded_generator(seed, epoch, 10)
        erased = draw_erasing(num_images, image_size, augmentation.erasing, generator).to(device)
    return EpochDraws(
        shift_y=integers(1, -pad, pad) if pad else None,
        shift_x=integers(2, -pad, pad) if pad else None,
        mirrored=_draw_mirrored(augmentation.flip, num_images, seed, epoch, device),
        cutout_y=integers(4, 0, inside) if augmentation.cutout_px else None,
        cutout_x=integers(5, 0, inside) if augmentation.cutout_px else None,
        brightness=factors(6, augmentation.brightness) if augmentation.brightness else None,
        contrast=factors(7, augmentation.contrast) if augmentation.contrast else None,
        operations=operations,
        magnitudes=magnitudes,
        erased=erased,
    )


def _draw_mirrored(flip: FlipMode, num_images: int, seed: int, epoch: int, device: torch.device) -> Tensor | None:
    """Draw which images are mirrored.

    "alternating" mirrors a random half in epoch 0, and from then on each image in every second epoch, so that two
    consecutive epochs show both sides of it (airbench, arXiv:2404.00498, section 3.6).
    """
    if flip == "none":
        return None
    drawn_in = 0 if flip == "alternating" else epoch
    mirrored = torch.rand(num_images, generator=seeded_generator(seed, drawn_in, 3)) < 0.5
    if flip == "alternating" and epoch % 2 == 1:
        mirrored = ~mirrored
    return mirrored.to(device)


def augment(
    images: UInt8[Tensor, "batch height width channels"],
    draws: EpochDraws,
    augmentation: Augmentation,
    *,
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Crop, mirror, apply the policy, jitter, normalize, cut out and erase.

    Args:
        images: uint8 RGB, 0-255.
        draws: One row per image.
        augmentation: The settings that the draws were made with.
        mean: Per channel, of images scaled to 0-1, on their device.
        std: Per channel, of images scaled to 0-1, on their device.
    """
    images = crop_and_mirror(
        images,
        draws.shift_y,
        draws.shift_x,
        draws.mirrored,
        padding_px=augmentation.crop_padding_px,
        crop_mode=augmentation.crop_mode,
    )
    if draws.operations is not None and draws.magnitudes is not None:
        images = apply_operations(images, draws.operations, draws.magnitudes)
    if draws.brightness is None and draws.contrast is None:
        finished = normalize(images, mean=mean, std=std)
    else:
        unit = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
        finished = _standardize_(jitter(unit, draws.brightness, draws.contrast), mean, std)
    if draws.cutout_y is not None and draws.cutout_x is not None:
        # After normalization the mean colour is 0; earlier, the jitter would shift it.
        cutout_(finished, draws.cutout_y, draws.cutout_x, augmentation.cutout_px)
    if draws.erased is not None:
        erase_(finished, draws.erased)
    return finished


def resize(
    images: UInt8[Tensor, "batch height width channels"], size: int
) -> UInt8[Tensor, "batch size size channels"]:
    """Resize images to `size` x `size` pixels, bilinear with antialiasing."""
    planes = images.permute(0, 3, 1, 2)
    if images.device.type != "cpu":  # CUDA has no uint8 kernel
        planes = planes.float()
    scaled = interpolate(planes, (size, size), mode="bilinear", antialias=True)
    if scaled.is_floating_point():
        scaled = scaled.round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1)


def crop_and_mirror(
    images: UInt8[Tensor, "batch height width channels"],
    shift_y: Int64[Tensor, " batch"] | None,
    shift_x: Int64[Tensor, " batch"] | None,
    mirrored: Bool[Tensor, " batch"] | None,
    *,
    padding_px: int,
    crop_mode: CropMode,
) -> UInt8[Tensor, "batch height width channels"]:
    """Shift each image by its own offset, at most `padding_px`, filling with padding, then mirror it horizontally.

    Equivalent to padding, cropping at `(padding_px + shift_y, padding_px + shift_x)` and flipping. Each output row is a
    contiguous piece of a padded row or of its mirror image and copied as a whole: gathering single pixels of 3 bytes by
    8-byte indices takes 1.5 times as long, with "zeros" 2.5 times (500 images of 32 pixels, 2 cores). None shifts or
    mirrors no image; "reflect" mirrors the image at its edge without repeating the edge pixel, "zeros" is black.
    """
    if shift_y is None and shift_x is None and mirrored is None:
        return images
    batch, height, width, channels = images.shape
    strips = _strips(images.reshape(batch * height, width, channels), padding_px, crop_mode)
    num_strips, strip_px, _ = strips.shape
    left = torch.full((batch,), padding_px, device=images.device)
    if shift_x is not None:
        left = left + shift_x
    if mirrored is not None:
        left = torch.where(mirrored, strip_px - width - left, left)
    rows = torch.arange(height, device=images.device).expand(batch, height)  # (B, H)
    if shift_y is not None:
        rows = rows + shift_y[:, None]
    first = torch.arange(batch, device=images.device)[:, None] * height
    starts = (first + _reflect(rows, height)) * strip_px + left[:, None]  # (B, H), in pixels of all strips
    # Overlapping views, one per starting pixel; only the selected ones are copied.
    pieces = strips.as_strided((num_strips * strip_px - width + 1, width * channels), (channels, 1))
    moved = pieces.index_select(0, starts.flatten()).view(batch, height, width, channels)
    if crop_mode == "zeros":
        moved *= ((rows >= 0) & (rows < height))[:, :, None, None]
    return moved


def _strips(
    rows: UInt8[Tensor, "rows width channels"], padding_px: int, crop_mode: CropMode
) -> UInt8[Tensor, "rows strip_px channels"]:
    """Pad each row and append its mirror image, so that the strip reads the same from both ends."""
    backwards = rows.flip(1)
    if crop_mode == "zeros":
        edge = rows.new_zeros(rows.shape[0], padding_px, rows.shape[2])
        return torch.cat([edge, rows, edge, backwards, edge], 1)
    # Reflected padding is a piece of the mirror image, without the edge pixel.
    return torch.cat([backwards[:, -1 - padding_px : -1], rows, backwards[:, 1:], rows[:, 1 : 1 + padding_px]], 1)


def _reflect(index: Int[Tensor, "*shape"], size: int) -> Int[Tensor, "*shape"]:
    """Fold indices of -(size - 1) to 2 * size - 2 back into 0 to size - 1, mirrored at the edges."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def jitter(
    images: Float[Tensor, "batch height width 3"],
    brightness: Float[Tensor, " batch"] | None,
    contrast: Float[Tensor, " batch"] | None,
) -> Float[Tensor, "batch height width 3"]:
    """Scale the brightness, then the contrast, of each image by its own factor, as torchvision's ColorJitter does.

    Contrast is the distance from the mean grey of the image (ITU-R 601); both results are clamped to 0-1.
    """
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 1)
    if contrast is not None:
        red, green, blue = images.unbind(-1)
        luma = 0.2989 * red + 0.587 * green + 0.114 * blue  # torchvision's rgb_to_grayscale
        grey = luma.mean((1, 2))[:, None, None, None]
        images = (grey + (images - grey) * contrast[:, None, None, None]).clamp(0, 1)
    return images


def cutout_(
    images: Float[Tensor, "batch channels height width"],
    top: Int64[Tensor, " batch"],
    left: Int64[Tensor, " batch"],
    size_px: int,
) -> Float[Tensor, "batch channels height width"]:
    """Set a square of each normalised image to 0, the mean colour, in place; images are channels_last in memory.

    The square lies inside the image, as in airbench; in the paper (arXiv:1708.04552) it may extend beyond it. Only the
    pixels of the square are written: a mask over whole images takes 5 times as long (12 of 32 pixels, 2 cores).
    """
    batch, channels, height, width = images.shape
    side = torch.arange(size_px, device=images.device)
    rows = (torch.arange(batch, device=images.device) * height + top)[:, None] + side
    inside = (rows * width + left[:, None])[:, :, None] + side  # (B, size_px, size_px) into (B * H * W)
    images.permute(0, 2, 3, 1).view(batch * height * width, channels).index_fill_(0, inside.flatten(), 0.0)
    return images


def normalize(
    images: UInt8[Tensor, "batch height width channels"],
    *,
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Scale uint8 images (0-255) to zero mean and unit variance, as an NCHW view of NHWC memory (channels_last).

    `mean` and `std` are of images scaled to 0-1, on the images' device: making a tensor here would block the host.
    """
    return _standardize_(images.to(torch.float32, memory_format=torch.contiguous_format), 255 * mean, 255 * std)


def _standardize_(
    images: Float[Tensor, "batch height width channels"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Subtract and divide in place; return the NCHW view.

    Works on whole rows of floats: by channel and from uint8 it takes 20 times as long on a CPU, since the innermost
    loop then has 3 steps.
    """
    batch, height, width, channels = images.shape
    rows = images.view(batch, height, width * channels)
    rows.sub_(mean.repeat(width)).div_(std.repeat(width))
    return images.permute(0, 3, 1, 2)
