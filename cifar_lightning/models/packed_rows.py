"""3x3 convolutions in bfloat16 on a CPU with AMX, with faster weight gradients of small images.

AMX multiplies tiles of 32 values, and oneDNN fills them with a row of an image at a time: of a row of 5 pixels most of
the tile is zeros. Several images next to each other, with a column of zeros between them, are one image with a longer
row and the same gradient.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_WIDTHS = range(2, 9)  # pixels, for which it was measured to gain: benchmarks/LOG.md
_MIN_CHANNELS = 64  # the same
_ROW = 32  # pixels of a packed row, at most: values of bfloat16 in a row of an AMX tile
_ONES = (1, 1)


def is_worthwhile(shape: torch.Size, out_channels: int) -> bool:
    """Return whether the weight gradient of images (batch, channels, height, width) is faster in packed rows."""
    num, channels, _, width = shape
    # Few channels do not fill the tiles in the other dimension, few images no row.
    is_narrow = width in _WIDTHS and min(channels, out_channels) >= _MIN_CHANNELS and num >= 2 * _ROW
    return is_narrow and torch.cpu._is_amx_tile_supported()


def convolve(
    images: Float[Tensor, "batch in_channels height width"], weight: Float[Tensor, "out_channels in_channels 3 3"]
) -> Float[Tensor, "batch out_channels height width"]:
    """Return the convolution with padding 1 in bfloat16, whose weight gradient is computed in packed rows."""
    bfloat16 = torch.bfloat16
    output: Tensor = _PackedRows.apply(images.to(bfloat16), weight.to(bfloat16))
    return output


class _PackedRows(torch.autograd.Function):
    """A convolution whose weight gradient is that of images packed next to each other."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        needs_images, needs_weight = ctx.needs_input_grad
        # A gradient of the gradient is wanted, or gradients of several outputs: those of torch have both.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return _gradients(grad, images, weight, needs_images, needs_weight)
        image_grad = _gradients(grad, images, weight, True, False)[0] if needs_images else None
        weight_grad = None
        if needs_weight:
            num_in_row = max(2, _ROW // (images.shape[3] + 1))
            packed_grad, packed_images = (_packed(tensor, num_in_row) for tensor in (grad, images))
            weight_grad = _gradients(packed_grad, packed_images, weight, False, True)[1]
        return image_grad, weight_grad


def _gradients(
    grad: Tensor, images: Tensor, weight: Tensor, needs_images: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the images and of the weight where they are needed."""
    mask = (needs_images, needs_weight, False)
    convolution_backward = torch.ops.aten.convolution_backward
    found = convolution_backward(grad, images, weight, None, _ONES, _ONES, _ONES, False, (0, 0), 1, mask)
    return found[0], found[1]


def _packed(
    images: Float[Tensor, "batch channels height width"], num_in_row: int
) -> Float[Tensor, "rows channels height packed_width"]:
    """Return the images `num_in_row` next to each other, each followed by a column of zeros, channels_last.

    The last row is filled up with images of zeros.
    """
    num, channels, height, width = images.shape
    num_rows, num_full = -(-num // num_in_row), num // num_in_row
    packed = images.new_empty(num_rows, height, num_in_row, width + 1, channels)
    packed[:, :, :, width] = 0
    inside, channels_last = packed[:, :, :, :width], images.permute(0, 2, 3, 1)
    full, rest = channels_last.split([num_full * num_in_row, num - num_full * num_in_row])
    inside[:num_full] = full.unflatten(0, (num_full, num_in_row)).transpose(1, 2)
    if len(rest):
        inside[num_full, :, : len(rest)] = rest.transpose(0, 1)
        inside[num_full, :, len(rest) :] = 0
    return packed.flatten(2, 3).permute(0, 3, 1, 2)
