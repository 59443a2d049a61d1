"""The default transforms: crop, flip, policy, jitter, cutout and erasing, with separate random draws for each image.

The draws of an epoch are small tables, a function of (seed, epoch) and indexed by image. No batch depends on the
batches before it, so a resumed run sees the same images, with any loader and on any device.

To add one that has a short flag: write a `Transform`, give `Augmentation` a field whose default turns it off, and make
it in `transforms()`. Draw from `generator.stream(N)` with an N that no other uses: it leaves the draws of the others.
The flag is an argument of the same name in `ImageDataModule`, which passes it to `Augmentation`; then write the table
of flags again: `python -m cifar_lightning.cli.lightning_cli`. A new operation of the policies belongs in operations.py.

Images are uint8, 0-255, `(batch, height, width, channels)`; finished they are float32 `(batch, channels, height,
width)` in NHWC memory, which PyTorch calls channels_last.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from cifar_lightning.errors import UserError
from cifar_lightning.settings.limits import Pixels, Strength, check_settings
from cifar_lightning.transforms.operations import apply_operations
from cifar_lightning.transforms.policies import Policy, draw_erasing, draw_operations, erase_
from cifar_lightning.transforms.transform import EpochGenerator, Tables, Transform

CropMode = Literal["reflect", "zeros"]
FlipMode = Literal["random", "alternating", "none"]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation settings; the fields are documented, and checked, as flags of `ImageDataModule`."""

    crop_padding_px: Pixels = 4
    crop_mode: CropMode = "reflect"
    flip: FlipMode = "random"
    cutout_px: Pixels = 0
    brightness: float = 0.0
    contrast: float = 0.0
    policy: Policy = "none"
    erasing: float = 0.0

    def check(self, image_size: int) -> None:
        """Raise `UserError` for a value that is invalid for images of `image_size` pixels."""
        if not 0 <= self.crop_padding_px < image_size:
            raise UserError(
                f"--data.crop_padding_px {self.crop_padding_px}: 0 to {image_size - 1} for {image_size}-pixel images."
            )
        if not 0 <= self.cutout_px <= image_size:
            raise UserError(f"--data.cutout_px {self.cutout_px}: 0 (off) to {image_size}, the image size.")

    def transforms(self) -> list[Transform]:
        """Return the transforms that are on, in order."""
        made: list[Transform] = []
        if self.crop_padding_px or self.flip != "none":
            made.append(CropAndFlip(self.crop_padding_px, self.crop_mode, self.flip))
        if self.policy != "none":
            made.append(RandomPolicy(self.policy))
        if self.brightness or self.contrast:
            made.append(Jitter(self.brightness, self.contrast))
        # After normalization the mean colour is 0; earlier, the jitter would shift it.
        if self.cutout_px:
            made.append(Cutout(self.cutout_px))
        if self.erasing:
            made.append(Erasing(self.erasing))
        return made


class CropAndFlip(Transform):
    """Shifts each image and mirrors it horizontally, in one pass.

    "alternating" mirrors a random half in epoch 0, and from then on each image in every second epoch, so that two
    consecutive epochs show both sides of it (airbench, arXiv:2404.00498, section 3.6).

    Args:
        padding_px: Largest shift in each direction, in pixels.
        mode: Padding of shifted images: reflect or zeros.
        flip: random, alternating or none.
    """

    def __init__(self, padding_px: Pixels = 4, mode: CropMode = "reflect", flip: FlipMode = "random") -> None:
        check_settings("data.transforms CropAndFlip", CropAndFlip.__init__, {"mode": mode, "flip": flip})
        self.padding_px, self.mode, self.flip = padding_px, mode, flip
        # The next epoch must show the other side of an image, whatever its place there.
        self.of_image = ("mirrored",) if flip == "alternating" else ()

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        tables, pad = {}, self.padding_px
        if not 0 <= pad < image_size:  # a larger shift would show rows of other images
            raise UserError(
                f"--data.transforms CropAndFlip: padding_px {pad}: 0 to {image_size - 1} for {image_size}-pixel images."
            )
        if pad:
            for purpose, name in ((1, "shift_y"), (2, "shift_x")):
                tables[name] = torch.randint(-pad, pad + 1, (num_images,), generator=generator.stream(purpose))
        if self.flip != "none":
            drawn_in = 0 if self.flip == "alternating" else generator.epoch
            mirrored = torch.rand(num_images, generator=generator.stream(3, drawn_in)) < 0.5
            is_turned = self.flip == "alternating" and generator.epoch % 2 == 1
            tables["mirrored"] = ~mirrored if is_turned else mirrored
        return tables

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        shifts = rows.get("shift_y"), rows.get("shift_x"), rows.get("mirrored")
        return crop_and_mirror(images, *shifts, padding_px=self.padding_px, crop_mode=self.mode)


class RandomPolicy(Transform):
    """An augmentation policy.

    Args:
        policy: trivial (TrivialAugmentWide) or rand (RandAugment).
    """

    def __init__(self, policy: Literal["trivial", "rand"] = "trivial") -> None:
        check_settings("data.transforms RandomPolicy", RandomPolicy.__init__, {"policy": policy})
        self.policy: Policy = policy

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        kinds, strengths = generator.stream(8), generator.stream(9)
        drawn = draw_operations(self.policy, num_images, image_size, kinds=kinds, strengths=strengths)
        return dict(zip(("operations", "magnitudes"), drawn, strict=True))

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        return apply_operations(images, rows["operations"], rows["magnitudes"])


class Jitter(Transform):
    """Random brightness, then contrast.

    Args:
        brightness: Largest relative change.
        contrast: Largest relative change.
    """

    stage = "float"

    def __init__(self, brightness: Strength = 0.0, contrast: Strength = 0.0) -> None:
        check_settings("data.transforms Jitter", Jitter.__init__, {"brightness": brightness, "contrast": contrast})
        self._strengths = {"brightness": (6, brightness), "contrast": (7, contrast)}

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        def factors(purpose: int, strength: float) -> Tensor:
            return 1 + strength * (2 * torch.rand(num_images, generator=generator.stream(purpose)) - 1)

        return {name: factors(*drawn) for name, drawn in self._strengths.items() if drawn[1]}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        jittered = jitter(images.permute(0, 2, 3, 1), rows.get("brightness"), rows.get("contrast"))
        return jittered.permute(0, 3, 1, 2)


class Cutout(Transform):
    """Sets a square of each image to the mean colour.

    Args:
        size_px: Its side in pixels.
    """

    stage = "normalized"

    def __init__(self, size_px: Pixels) -> None:
        self.size_px = size_px

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        places = image_size - self.size_px + 1
        if not 0 <= self.size_px <= image_size:
            raise UserError(
                f"--data.transforms Cutout: size_px {self.size_px}: 0 to {image_size} for {image_size}-pixel images."
            )
        streams = {"cutout_y": generator.stream(4), "cutout_x": generator.stream(5)}
        return {name: torch.randint(places, (num_images,), generator=stream) for name, stream in streams.items()}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        return cutout_(images, rows["cutout_y"], rows["cutout_x"], self.size_px)


class Erasing(Transform):
    """Sets a rectangle of some images to the mean colour, as torchvision's RandomErasing.

    Args:
        p: Fraction of the images.
    """

    stage = "normalized"

    def __init__(self, p: Strength = 0.5) -> None:
        check_settings("data.transforms Erasing", Erasing.__init__, {"p": p})
        self.p = p

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        return {"erased": draw_erasing(num_images, image_size, self.p, generator.stream(10))}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        return erase_(images, rows["erased"])


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
    images: Float[Tensor, "batch height width channels"],
    brightness: Float[Tensor, " batch"] | None,
    contrast: Float[Tensor, " batch"] | None,
) -> Float[Tensor, "batch height width channels"]:
    """Scale the brightness, then the contrast, of each image by its own factor, as torchvision's ColorJitter does.

    Contrast is the distance from the mean grey of the image (ITU-R 601); both results are clamped to 0-1.
    """
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 1)
    if contrast is not None:
        luma = images[..., 0]
        if images.shape[-1] == 3:
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
    return standardize_(images.to(torch.float32, memory_format=torch.contiguous_format), 255 * mean, 255 * std)


def standardize_(
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
