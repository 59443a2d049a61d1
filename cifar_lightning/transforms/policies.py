"""Augmentation policies and random erasing: what is drawn for each image.

TrivialAugmentWide (arXiv:2103.10158) draws one of 14 operations and one of 31 magnitudes per image, RandAugment
(arXiv:1909.13719) two operations at a fixed magnitude. The operations, their order and ranges are those of
torchvision.transforms.v2; operations.py applies them. Random erasing (arXiv:1708.04896) sets a rectangle of a
normalized image to the mean colour. All draws are tables with a row per image.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cifar_lightning.transforms.operations import OPERATIONS, SIGNED

Policy = Literal["none", "trivial", "rand"]

NUM_BINS = 31
"""Magnitudes of an operation, from none to the largest; both papers have 31."""
RAND_NUM_OPS = 2
RAND_BIN = 9  # with RAND_NUM_OPS the defaults of torchvision's RandAugment

ERASED_FRACTION = (0.02, 0.33)  # of the image area; these two ranges are the paper's and torchvision's
ERASED_ASPECT = (0.3, 3.3)
_ERASING_TRIES = 10  # as torchvision: a rectangle as high or as wide as the image is redrawn


def magnitude_table(policy: Policy, image_size: int) -> Float[Tensor, "operations bins"]:
    """Return the unsigned magnitude of each operation and bin; 0 for operations without a magnitude.

    Shears are in pixels per pixel, shifts in pixels ("rand": proportional to the image size), rotations in degrees;
    colours are blended by 1 + magnitude; "Posterize" is the number of bits to keep and "Solarize" the fraction of 255
    from which values are inverted. "trivial" has the wide ranges, "rand" the narrower ones.
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
        policy: "trivial": one operation, any bin; "rand": two operations, both at bin 9 of 31.
        num_images: Rows of the tables.
        image_size: In pixels.
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

    Height and width are 0 if nothing is erased: with probability `1 - probability`, or if 10 rectangles did not fit.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * uniform(num_images)

    chosen, corners = uniform(num_images) < probability, uniform(num_images, 2)
    size = torch.full((num_images, 2), image_size)  # height and width
    for _ in range(_ERASING_TRIES):
        too_large = (size >= image_size).any(1)
        if not too_large.any():
            break
        area = image_size**2 * between(*ERASED_FRACTION)
        aspect = between(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])).exp()
        tried = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).round().long()
        size = torch.where(too_large[:, None], tried, size)
    erased = chosen & (size < image_size).all(1)
    return torch.cat([(corners * (image_size - size + 1)).long(), size], 1) * erased[:, None]


def erase_(
    images: Float[Tensor, "batch channels height width"], rectangles: Int64[Tensor, "batch 4"]
) -> Float[Tensor, "batch channels height width"]:
    """Set a rectangle of each normalised image to 0, the mean colour, in place; images are channels_last in memory.

    Rectangles are top, left, height and width; a height of 0 erases nothing.
    """
    batch, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)
    if images.device.type != "cpu":
        pixels.masked_fill_(_inside(rectangles, height, width)[:, :, :, None], 0.0)
        return images
    # Writing only the erased pixels takes half the time of a mask; on other devices it would block the host.
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
