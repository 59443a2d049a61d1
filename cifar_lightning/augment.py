"""Batched augmentation: every picture of a batch gets its own draw, on the device, from uint8 to finished floats.

A draw is a row of small tables that depend on (seed, epoch) and are indexed by picture, so that a batch does not depend
on the batches before it: a run that was stopped goes on with the same pictures, on any loader and any device.

Pictures come in as uint8 RGB, 0-255, `(batch, height, width, channels)`, as they lie in memory, and leave as float32
`(batch, channels, height, width)` whose memory is still NHWC: PyTorch calls that channels_last.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from cifar_lightning.errors import UserError

CropMode = Literal["reflect", "zeros"]
FlipMode = Literal["random", "alternating", "none"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training picture; the fields are documented as flags in `ImageDataModule`."""

    crop_padding_px: int = 4
    crop_mode: CropMode = "reflect"
    flip: FlipMode = "random"
    cutout_px: int = 0
    brightness: float = 0.0
    contrast: float = 0.0

    def check(self, image_size: int) -> None:
        """Raise `UserError` where a value does not fit pictures of `image_size` pixels."""
        if not 0 <= self.crop_padding_px < image_size:
            raise UserError(
                f"--data.crop_padding_px {self.crop_padding_px}: 0 to {image_size - 1} for {image_size}-pixel pictures."
            )
        if not 0 <= self.cutout_px <= image_size:
            raise UserError(f"--data.cutout_px {self.cutout_px}: 0 (off) to {image_size}, the side of a picture.")


@dataclass(frozen=True)
class EpochDraws:
    """One epoch's draws, a row for each picture of the training source; None where the operation is off."""

    shift_y: Int64[Tensor, " pictures"] | None
    shift_x: Int64[Tensor, " pictures"] | None
    mirrored: Bool[Tensor, " pictures"] | None
    cutout_y: Int64[Tensor, " pictures"] | None
    cutout_x: Int64[Tensor, " pictures"] | None
    brightness: Float[Tensor, " pictures"] | None
    contrast: Float[Tensor, " pictures"] | None

    def of(self, pictures: Int64[Tensor, " batch"]) -> "EpochDraws":
        """Return the rows of some pictures."""
        tables = (getattr(self, field.name) for field in fields(self))
        return EpochDraws(*(None if table is None else table.index_select(0, pictures) for table in tables))


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that is a function of the non-negative integers `key`: (seed, epoch, purpose)."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)  # manual_seed takes 63 bits


def draw_epoch(
    augmentation: Augmentation, *, num_pictures: int, image_size: int, seed: int, epoch: int, device: torch.device
) -> EpochDraws:
    """Draw one epoch's tables, a pure function of the arguments.

    Each operation has a generator of its own, so that switching one on leaves the draws of the others as they are.
    The draws are made on the CPU and moved: the generators of devices differ, and the same run must be the same run.
    """

    def integers(purpose: int, low: int, high: int) -> Tensor:
        generator = seeded_generator(seed, epoch, purpose)
        return torch.randint(low, high + 1, (num_pictures,), generator=generator).to(device)

    def factors(purpose: int, strength: float) -> Tensor:
        generator = seeded_generator(seed, epoch, purpose)
        return (1 + strength * (2 * torch.rand(num_pictures, generator=generator) - 1)).to(device)

    pad, inside = augmentation.crop_padding_px, image_size - augmentation.cutout_px
    return EpochDraws(
        shift_y=integers(1, -pad, pad) if pad else None,
        shift_x=integers(2, -pad, pad) if pad else None,
        mirrored=_draw_mirrored(augmentation.flip, num_pictures, seed, epoch, device),
        cutout_y=integers(4, 0, inside) if augmentation.cutout_px else None,
        cutout_x=integers(5, 0, inside) if augmentation.cutout_px else None,
        brightness=factors(6, augmentation.brightness) if augmentation.brightness else None,
        contrast=factors(7, augmentation.contrast) if augmentation.contrast else None,
    )


def _draw_mirrored(flip: FlipMode, num_pictures: int, seed: int, epoch: int, device: torch.device) -> Tensor | None:
    """Draw which pictures are mirrored.

    "alternating" mirrors a random half in epoch 0 and from then on every picture each second epoch, so that two epochs
    in a row always show both sides of it (airbench, arXiv:2404.00498, section 3.6).
    """
    if flip == "none":
        return None
    drawn_in = 0 if flip == "alternating" else epoch
    mirrored = torch.rand(num_pictures, generator=seeded_generator(seed, drawn_in, 3)) < 0.5
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
    """Crop, mirror, jitter, normalise and cut out; `draws` holds one row for each picture of the batch.

    Args:
        images: uint8 RGB, 0-255.
        draws: This batch's rows.
        augmentation: The operations that the draws were made for.
        mean: Of pictures scaled to 0-1, on their device.
        std: Of pictures scaled to 0-1, on their device.
    """
    images = crop_and_mirror(images, draws.shift_y, draws.shift_x, draws.mirrored, augmentation.crop_mode)
    if draws.brightness is None and draws.contrast is None:
        finished = normalize(images, mean=mean, std=std)
    else:
        unit = jitter(images.float() / 255, draws.brightness, draws.contrast)
        finished = ((unit - mean) / std).permute(0, 3, 1, 2)
    if draws.cutout_y is not None and draws.cutout_x is not None:
        # The mean colour is 0 by now; cutting out earlier would let the jitter shift it.
        finished = cutout(finished, draws.cutout_y, draws.cutout_x, augmentation.cutout_px)
    return finished


def resize(
    images: UInt8[Tensor, "batch height width channels"], size: int
) -> UInt8[Tensor, "batch size size channels"]:
    """Scale pictures to `size` pixels a side, bilinear with antialiasing.

    Args:
        images: uint8 RGB, 0-255.
        size: New side in pixels.
    """
    planes = images.permute(0, 3, 1, 2)
    if images.device.type == "cuda":  # has no kernel for bytes
        planes = planes.float()
    scaled = interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return (
        scaled.round().to(torch.uint8).permute(0, 2, 3, 1) if scaled.is_floating_point() else scaled.permute(0, 2, 3, 1)
    )


def crop_and_mirror(
    images: UInt8[Tensor, "batch height width channels"],
    shift_y: Int64[Tensor, " batch"] | None,
    shift_x: Int64[Tensor, " batch"] | None,
    mirrored: Bool[Tensor, " batch"] | None,
    crop_mode: CropMode,
) -> UInt8[Tensor, "batch height width channels"]:
    """Move each picture by its own shift (what comes in from outside is padding), then mirror it left to right.

    The same as padding, cropping at `(padding + shift_y, padding + shift_x)` and flipping, in one gather: rows and
    columns are looked up at their source, so no padded copy of the set is kept.

    Args:
        images: uint8 RGB, 0-255.
        shift_y: Rows, at most height - 1 either way; None is no shift.
        shift_x: Columns, at most width - 1 either way; None is no shift.
        mirrored: None mirrors none.
        crop_mode: "reflect" mirrors the picture at its edge (the edge itself not repeated), "zeros" is black.
    """
    if shift_y is None and shift_x is None and mirrored is None:
        return images
    batch, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device).expand(batch, height)  # (B, H)
    columns = torch.arange(width, device=images.device).expand(batch, width)  # (B, W)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    if shift_y is not None:
        rows = rows + shift_y[:, None]
    if shift_x is not None:
        columns = columns + shift_x[:, None]
    inside_y, inside_x = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    rows, columns = _reflect(rows, height), _reflect(columns, width)
    first = torch.arange(batch, device=images.device)[:, None, None] * (height * width)
    pixels = first + rows[:, :, None] * width + columns[:, None, :]  # (B, H, W) into (B * H * W)
    moved = images.reshape(-1, channels).index_select(0, pixels.flatten()).view(images.shape)
    if crop_mode == "zeros":
        moved = moved * (inside_y[:, :, None] & inside_x[:, None, :])[..., None]
    return moved


def _reflect(index: Int[Tensor, "*shape"], size: int) -> Int[Tensor, "*shape"]:
    """Fold indices of -(size - 1) to 2 * size - 2 back into 0 to size - 1, mirrored at the edges."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def jitter(
    images: Float[Tensor, "batch height width 3"],
    brightness: Float[Tensor, " batch"] | None,
    contrast: Float[Tensor, " batch"] | None,
) -> Float[Tensor, "batch height width 3"]:
    """Scale brightness, then contrast, of each picture by its own factor, as torchvision's ColorJitter defines them.

    Args:
        images: RGB, 0-1.
        brightness: Factors of the pixel values, 1 leaves them; the result is clamped to 0-1.
        contrast: Factors of the distance from the picture's mean grey (ITU-R 601), clamped likewise.
    """
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 1)
    if contrast is not None:
        red, green, blue = images.unbind(-1)
        luma = 0.2989 * red + 0.587 * green + 0.114 * blue  # torchvision's rgb_to_grayscale
        grey = luma.mean((1, 2))[:, None, None, None]
        images = (grey + (images - grey) * contrast[:, None, None, None]).clamp(0, 1)
    return images


def cutout(
    images: Float[Tensor, "batch channels height width"],
    top: Int64[Tensor, " batch"],
    left: Int64[Tensor, " batch"],
    size_px: int,
) -> Float[Tensor, "batch channels height width"]:
    """Set a square of each normalised picture to 0, the mean colour.

    The square lies wholly inside the picture, as in airbench; the paper (arXiv:1708.04552) lets it stick out.
    """
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside_y = (rows >= top[:, None]) & (rows < top[:, None] + size_px)
    inside_x = (columns >= left[:, None]) & (columns < left[:, None] + size_px)
    inside = (inside_y[:, :, None] & inside_x[:, None, :])[..., None]
    # In NHWC, as the pictures lie: a broadcast mask on the NCHW view would give NCHW memory back.
    return images.permute(0, 2, 3, 1).masked_fill(inside, 0.0).permute(0, 3, 1, 2)


def normalize(
    images: UInt8[Tensor, "batch height width channels"],
    *,
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Scale uint8 pictures (0-255) to zero mean and unit variance, as an NCHW view of NHWC memory (channels_last).

    Args:
        images: uint8 RGB, 0-255.
        mean: Of pictures scaled to 0-1, on their device: making it from numbers here would stop the host each time.
        std: Of pictures scaled to 0-1, on their device.
    """
    return ((images - 255 * mean) / (255 * std)).permute(0, 3, 1, 2)
