"""Augmentation policies: which operations each image gets, how strong, and which part of it is erased.

TrivialAugmentWide (arXiv:2103.10158) draws one of 14 operations and one of 31 strengths for each image; RandAugment
(arXiv:1909.13719) draws two operations at one strength. Operations, their order and their ranges are those of
torchvision.transforms.v2; `operations.py` applies them. Random erasing (arXiv:1708.04896) clears a rectangle of a
finished image. What is drawn are tables with a row for each image.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cifar_lightning.transforms.operations import OPERATIONS, SIGNED

Policy = Literal["none", "trivial", "rand"]

NUM_BINS = 31
"""Strengths of an operation, from none to the strongest; both papers have 31."""
RAND_NUM_OPS = 2
RAND_BIN = 9  # with RAND_NUM_OPS the defaults of torchvision's RandAugment

ERASED_SHARE = (0.02, 0.33)  # of the image's area; these two ranges are the paper's, as torchvision has them
ERASED_ASPECT = (0.3, 3.3)
_ERASING_TRIES = 10  # of torchvision: a rectangle as high or as wide as the image is drawn again


def magnitude_table(policy: Policy, image_size: int) -> Float[Tensor, "operations bins"]:
    """Return what each strength of each operation means, without a sign; 0 where an operation has no strength.

    Shears are in pixels a pixel, shifts in pixels, rotations in degrees; colours are blended by 1 + magnitude;
    "Posterize" is the number of bits that are kept and "Solarize" the share of 255 from which values are inverted.

    Args:
        policy: "trivial" has the wide ranges, "rand" the narrower ones.
        image_size: Side in pixels; shifts of "rand" are a share of it.
    """
    wide = policy == "trivial"
    shear, degrees, blend = (0.99, 135.0, 0.99) if wide else (0.3, 30.0, 0.9)
    shift_px = 32.0 if wide else 150.0 / 331.0 * image_size
    strongest = {"ShearX": shear, "ShearY": shear, "TranslateX": shift_px, "TranslateY": shift_px, "Rotate": degrees}
    strongest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), blend)
    rows = {name: torch.linspace(0.0, top, NUM_BINS) for name, top in strongest.items()}
    rows["Posterize"] = (8 - torch.arange(NUM_BINS) / ((NUM_BINS - 1) / (6 if wide else 4))).round()
    rows["Solarize"] = torch.linspace(1.0, 0.0, NUM_BINS)
    return torch.stack([rows.get(name, torch.zeros(NUM_BINS)) for name in OPERATIONS])


def draw_operations(
    policy: Policy, num_images: int, image_size: int, *, kinds: torch.Generator, strengths: torch.Generator
) -> tuple[Int64[Tensor, "images num_ops"], Float[Tensor, "images num_ops"]]:
    """Draw indices into `OPERATIONS` and signed magnitudes for each image, on the CPU.

    Args:
        policy: "trivial": one operation and any strength; "rand": two operations, both at bin 9 of 31.
        num_images: Rows of the tables.
        image_size: Side in pixels.
        kinds: Generator of the operations.
        strengths: Generator of magnitudes and signs.
    """
    shape = (num_images, 1 if policy == "trivial" else RAND_NUM_OPS)
    operations = torch.randint(len(OPERATIONS), shape, generator=kinds)
    bins = torch.randint(NUM_BINS, shape, generator=strengths) if policy == "trivial" else torch.tensor(RAND_BIN)
    negative = torch.rand(shape, generator=strengths) < 0.5
    signed = torch.tensor([name in SIGNED for name in OPERATIONS])[operations]
    magnitudes = magnitude_table(policy, image_size)[operations, bins]
    return operations, torch.where(signed & negative, -magnitudes, magnitudes)


def draw_erasing(
    num_images: int, image_size: int, probability: float, generator: torch.Generator
) -> Int64[Tensor, "images 4"]:
    """Draw a rectangle for each image as torchvision's RandomErasing does: top, left, height and width.

    Height and width are 0 where nothing is erased: with `1 - probability`, or after 10 rectangles that did not fit.

    Args:
        num_images: Rows of the table.
        image_size: Side in pixels.
        probability: Share of the images that lose a rectangle.
        generator: On the CPU.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * uniform(num_images)

    chosen, corners = uniform(num_images) < probability, uniform(num_images, 2)
    sides = torch.full((num_images, 2), image_size)
    for _ in range(_ERASING_TRIES):
        too_long = (sides >= image_size).any(1)
        if not too_long.any():
            break
        area = image_size**2 * between(*ERASED_SHARE)
        aspect = between(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])).exp()
        tried = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).round().long()
        sides = torch.where(too_long[:, None], tried, sides)
    erased = chosen & (sides < image_size).all(1)
    return torch.cat([(corners * (image_size - sides + 1)).long(), sides], 1) * erased[:, None]


def erase_(
    images: Float[Tensor, "batch channels height width"], rectangles: Int64[Tensor, "batch 4"]
) -> Float[Tensor, "batch channels height width"]:
    """Set a rectangle of each normalised image to 0, the mean colour, in place.

    Args:
        images: channels_last in memory.
        rectangles: Top, left, height and width; of no height where nothing is erased.
    """
    batch, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)
    if images.device.type != "cpu":
        pixels.masked_fill_(_inside(rectangles, height, width)[:, :, :, None], 0.0)
        return images
    # Only what is erased is touched: half the time of a mask over everything. Elsewhere the host would have to wait for
    # how much that is.
    some = rectangles[:, 2].nonzero()
    index = some * (height * width) + torch.arange(height * width)
    erased = index.view(-1, height, width).masked_select(_inside(rectangles[some[:, 0]], height, width))
    pixels.view(batch * height * width, channels).index_fill_(0, erased, 0.0)
    return images


def _inside(rectangles: Int64[Tensor, "batch 4"], height: int, width: int) -> Bool[Tensor, "batch height width"]:
    y, x = torch.arange(height, device=rectangles.device), torch.arange(width, device=rectangles.device)
    top, left, num_rows, num_columns = rectangles[:, :, None].unbind(1)  # each (B, 1)
    in_rows = (y >= top) & (y < top + num_rows)
    in_columns = (x >= left) & (x < left + num_columns)
    return in_rows[:, :, None] & in_columns[:, None, :]
