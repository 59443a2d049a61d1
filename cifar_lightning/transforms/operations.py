"""Operations of augmentation policies on uint8 batches, with a magnitude per image.

The operations, their order and their results are those of torchvision.transforms.v2 on uint8 tensors (nearest
neighbour, black outside), value for value on a CPU. On a device that rounds float32 differently, a pixel whose source
is within 1e-4 of the midpoint of two pixels may take either. Without float64 (MPS) blended colours may differ by 1, and
so may the contrast of images of more than 65,793 pixels, whose sum exceeds float32.

Images are uint8 `(batch, height, width, channels)`, 0-255, RGB or gray.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Images = UInt8[Tensor, "batch height width channels"]
Magnitudes = Float[Tensor, " batch"]

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
SIGNED = OPERATIONS[1:10]
"""Operations with a signed magnitude: half of the draws are negative."""

# One kernel computes all five geometric operations, so that a batch is divided into fewer, larger groups.
_MOVES = range(1, 6)
_GROUPS = (_MOVES, *(range(k, k + 1) for k in range(6, len(OPERATIONS))))


def apply_operations(
    images: Images,
    operations: Int64[Tensor, "batch num_ops"],
    magnitudes: Float[Tensor, "batch num_ops"],
) -> Images:
    """Apply its own operations to each image, one after the other; magnitudes are as `magnitude_table`'s, signed.

    On a CPU the images are sorted by operation and each kernel gets its group; the host reads the group sizes once for
    each of `num_ops`. On other devices that read would block the host, so every kernel gets the whole batch and the
    results are selected: 9 times the work, little for a GPU. Both give the same values.
    """
    apply = _apply_sorted if images.device.type == "cpu" else _apply_everywhere
    for some, strengths in zip(operations.unbind(1), magnitudes.unbind(1), strict=True):
        images = apply(images, some, strengths)
    return images


def _apply_sorted(
    images: Images,
    operations: Int64[Tensor, " batch"],
    magnitudes: Magnitudes,
) -> Images:
    order = operations.argsort()
    sizes = torch.bincount(operations, minlength=len(OPERATIONS))
    ends = [0, *sizes.cumsum(0).tolist()]
    sorted_images = images.index_select(0, order)
    operations, magnitudes = operations.index_select(0, order), magnitudes.index_select(0, order)
    for group in _GROUPS:
        own = slice(ends[group.start], ends[group.stop])
        if own.start < own.stop:
            sorted_images[own] = _apply_group(group, sorted_images[own], operations[own], magnitudes[own])
    return sorted_images.index_select(0, order.argsort())  # 0.04 ms; index_copy_ takes 1.2


def _apply_everywhere(
    images: Images,
    operations: Int64[Tensor, " batch"],
    magnitudes: Magnitudes,
) -> Images:
    changed = images
    for group in _GROUPS:
        own = (operations >= group.start) & (operations < group.stop)
        result = _apply_group(group, images, operations, torch.where(own, magnitudes, 0.0))
        changed = torch.where(own[:, None, None, None], result, changed)
    return changed


def _apply_group(group: range, images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    if group is _MOVES:
        return _move(images, operations, magnitudes)
    return _COLOURS[OPERATIONS[group.start]](images, magnitudes)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _move(
    images: Images,
    operations: Int64[Tensor, " batch"],
    magnitudes: Magnitudes,
) -> Images:
    """Shear, shift or rotate by nearest neighbour; pixels from outside the image are black.

    Gathers 3-byte pixels in NHWC memory in 0.6 ms. `grid_sample` takes 0.3 ms, but needs 0.7 ms more for conversions to
    float planes and back (180 images of 32 pixels, 1 core).
    """
    batch, height, width, channels = images.shape
    (xx, xy, x0), (yx, yy, y0) = _source_of(operations, magnitudes, height, width)
    # The same steps in the same order as torchvision's affine grid, so that ties are rounded alike.
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)
    columns = (xx * x)[:, None, :] + (xy * y)[:, :, None] + x0[:, :, None]  # (B, H, W), -1 to 1 inside
    rows = (yx * x)[:, None, :] + (yy * y)[:, :, None] + y0[:, :, None]
    # Outside pixels are clamped to a black border of 1 pixel, which is cheaper than a mask.
    columns = columns.add_(1).mul_(width / 2).sub_(0.5).round_().clamp_(-1, width)
    rows = rows.add_(1).mul_(height / 2).sub_(0.5).round_().clamp_(-1, height)
    bordered = images.new_zeros(batch, height + 2, (width + 2) * channels)
    bordered[:, 1:-1, channels:-channels] = images.reshape(batch, height, width * channels)
    inside = rows.mul_(width + 2).add_(columns).to(torch.int32)  # whole numbers, exact below 2 ** 24
    # int32, enough for 2 ** 31 pixels a batch: adding int32 and int64 takes 1 ms, this 0.01 ms.
    first = torch.arange(batch, dtype=torch.int32, device=images.device) * ((height + 2) * (width + 2)) + width + 3
    index = inside.add_(first[:, None, None]).flatten()
    return bordered.view(-1, channels).index_select(0, index).view(images.shape)


def _source_of(
    operations: Int64[Tensor, " batch"], magnitudes: Magnitudes, height: int, width: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the affine map to source coordinates: for column and row, (batch, 1) factors of x, y and 1.

    Coordinates are relative to the centre; those of the source are scaled to -1 to 1. Shears keep the upper left corner
    in place, as in AutoAugment; shifts are whole pixels.
    """

    def of(operation: str) -> Tensor:
        own = operations == OPERATIONS.index(operation)
        return torch.where(own, magnitudes, 0.0).to(_exact(magnitudes.device))[:, None]

    angle, shear_x, shear_y = torch.deg2rad(of("Rotate")), of("ShearX"), of("ShearY")
    cosine, sine = angle.cos(), angle.sin()
    column = (cosine, shear_x - sine, shear_x * (height / 2) - of("TranslateX").trunc())
    row = (shear_y + sine, cosine, shear_y * (width / 2) - of("TranslateY").trunc())
    # Divide by tensors: for Python numbers a GPU multiplies by the rounded reciprocal.
    half_width, half_height = magnitudes.new_full((), width / 2), magnitudes.new_full((), height / 2)
    return [factor.float() / half_width for factor in column], [factor.float() / half_height for factor in row]


def _brightness(images: Images, magnitudes: Magnitudes) -> Images:
    return _bytes(images.float() * (1 + magnitudes)[:, None, None, None])


def _color(images: Images, magnitudes: Magnitudes) -> Images:
    if images.shape[-1] == 1:
        return images
    # In NCHW memory: with the channels last, the innermost loop of the blend has 3 steps.
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return _blend(planes, grey(planes), magnitudes).permute(0, 2, 3, 1)


def _contrast(images: Images, magnitudes: Magnitudes) -> Images:
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    luma = grey(planes)
    mean = luma.sum((1, 2, 3), keepdim=True) / luma.new_full((), luma[0].numel())  # as in _source_of
    return _blend(images.float(), mean, magnitudes)


def grey(planes: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Return the luma (ITU-R 601), rounded down; of gray images, these."""
    if planes.shape[1] == 1:
        return planes
    red, green, blue = planes.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blend(
    images: Float[Tensor, "batch a b c"], other: Float[Tensor, "batch _ _ _"], magnitudes: Magnitudes
) -> UInt8[Tensor, "batch a b c"]:
    """Return `(1 + magnitude) * images - magnitude * other`, rounded down.

    torchvision computes the second product and the sum as one float32 operation, which rounds once; rounding the
    product as well would darken grey pixels by 1. float64 represents the sum exactly.
    """
    by = magnitudes[:, None, None, None]
    exact = _exact(images.device)
    return _bytes((images * (1 + by)).to(exact).sub_(by.to(exact) * other.to(exact)).float())


def _bytes(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    return images.clamp_(0, 255).to(torch.uint8)


def _sharpness(images: Images, magnitudes: Magnitudes) -> Images:
    """Blend with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; edge pixels are not changed."""
    batch, height, width, channels = images.shape
    rows = images.reshape(batch, height, width * channels).float()
    middle = rows[:, 1:-1, channels:-channels]
    sideways = rows[:, :, : -2 * channels] + rows[:, :, channels:-channels] + rows[:, :, 2 * channels :]
    sums = (sideways[:, :-2] + sideways[:, 1:-1] + sideways[:, 2:]).add_(middle, alpha=4)
    change = sums.div_(13).round_().sub_(middle)  # integers: a multiple of 1/13 is never a tie
    exact = _exact(images.device)
    by = magnitudes.to(exact)[:, None, None]
    sharpened = images.reshape(rows.shape).clone()
    sharpened[:, 1:-1, channels:-channels] = _bytes((middle.to(exact) - by * change.to(exact)).float())
    return sharpened.view(images.shape)


def _posterize(images: Images, magnitudes: Magnitudes) -> Images:
    lost = 8 - magnitudes.to(torch.int32)
    return images & ((255 >> lost) << lost).to(torch.uint8)[:, None, None, None]


def _solarize(images: Images, magnitudes: Magnitudes) -> Images:
    threshold = (255 * magnitudes).ceil().clamp(0, 255).to(torch.uint8)  # equivalent for integer values
    inverted = images >= threshold[:, None, None, None]
    return images ^ (inverted.to(torch.uint8) * 255)


def _autocontrast(images: Images) -> Images:
    """Stretch each channel to 0-255; a constant channel is not changed."""
    batch, height, width, channels = images.shape
    rows = images.reshape(batch, height, width * channels)
    low = rows.amin(1).view(batch, width, channels).amin(1).float()
    high = rows.amax(1).view(batch, width, channels).amax(1).float()
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    low = torch.where(flat, 0.0, low)
    stretched = rows.float().sub_(low.repeat(1, width)[:, None]).div_(scale.repeat(1, width)[:, None])
    return _bytes(stretched).view(images.shape)


def _equalize(images: Images) -> Images:
    """Equalize the histogram of each channel in Pillow's integer arithmetic; a channel of few values is not changed."""
    batch, height, width, channels = images.shape
    first = 256 * torch.arange(batch * channels, dtype=torch.int32, device=images.device).view(batch, channels)
    values = images.reshape(batch, height, width * channels).to(torch.int32)
    values = values.add_(first.repeat(1, width)[:, None]).flatten()
    counts = torch.zeros(batch * channels * 256, dtype=torch.int32, device=images.device)
    counts.index_add_(0, values, counts.new_ones(1).expand(len(values)))
    counts = counts.view(-1, 256)
    upto = counts.cumsum(1, dtype=torch.int32)
    brightest = counts.gather(1, upto.argmax(1, keepdim=True))  # count of the highest value that occurs
    step = (height * width - brightest) // 255
    below = upto - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table).to(torch.uint8)
    return table.flatten().index_select(0, values).view(images.shape)


_COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": lambda images, _: _autocontrast(images),
    "Equalize": lambda images, _: _equalize(images),
}
