"""Winograd's 3x3 convolutions, which have fewer multiplications, in float32 on a CPU.

Winograd's F(m x m, 3x3) of Lavin and Gray, https://arxiv.org/abs/1509.09308: (m+2)^2 multiplications for a tile of
m x m outputs and a pair of channels in place of 9 m^2. Tiles are transformed by products with small matrices, which
with few channels cost more than that saves. Sums are rounded in another order.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_WORTHWHILE = 2.4  # times fewer multiplications, from which on a convolution is faster: benchmarks/LOG.md
_TILE_BYTES = 4 << 20  # a thread, of the tiles transformed at a time, which stay in the cache
_POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)  # where polynomials are evaluated: small numbers, so that rounding stays small
_TILE_SIZES = range(2, len(_POINTS))


def is_worthwhile(kept: torch.Size, out_channels: int) -> bool:
    """Return whether the algorithm is faster for images (batch, channels, kept height, kept width), and as precise."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # of the class that replaces the module
    is_precise = matmul.fp32_precision in ("none", "ieee")  # else products are rounded to bfloat16 or TF32
    # Without MKL the products of matrices that the algorithm needs were not measured.
    return is_precise and torch.backends.mkl.is_available() and _saving(kept, out_channels) > _WORTHWHILE


def convolve(
    images: Float[Tensor, "batch in_channels height width"],
    weight: Float[Tensor, "out_channels in_channels 3 3"],
    kept: torch.Size,
) -> Float[Tensor, "batch out_channels kept_height kept_width"]:
    """Return the convolution with padding 1 of float32 images, channels_last, and only the first rows and columns.

    `kept` is the shape of the images with as many rows and columns as the output has.
    """
    output: Tensor = _Winograd.apply(images, weight, kept)
    return output


class _Winograd(torch.autograd.Function):
    """The convolution of `convolve` and its gradients, by the same tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "batch in_channels height width"],
        weight: Float[Tensor, "out_channels in_channels 3 3"],
        kept: torch.Size,
    ) -> Float[Tensor, "batch out_channels kept_height kept_width"]:
        ctx.save_for_backward(images, weight)
        return _convolve(images, weight, kept)

    @staticmethod
    def backward(
        ctx: Any, grad: Float[Tensor, "batch out_channels kept_height kept_width"]
    ) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        # A gradient of the gradient is wanted, which the loop over tiles has not, or gradients of several outputs.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            ones, direct = (1, 1), torch.ops.aten.convolution_backward
            grad = F.pad(grad, (0, images.shape[3] - grad.shape[3], 0, images.shape[2] - grad.shape[2]))
            gradients = direct(grad, images, weight, None, ones, ones, ones, False, (0, 0), 1, (*needed, False))
            return gradients[0], gradients[1], None
        with torch.autocast("cpu", enabled=False):
            return *_gradients(images, weight, grad, *needed), None


class _Tiling(NamedTuple):
    """How an image is divided into tiles of size x size outputs."""

    size: int
    rows: int
    columns: int

    def chunk_size(self, num: int, channels: int) -> int:
        """Return the tiles of how many images fit into the cache."""
        image_bytes = 4 * (self.size + 2) ** 2 * self.rows * self.columns * channels
        return max(1, min(num, torch.get_num_threads() * _TILE_BYTES // image_bytes))


def _convolve(
    images: Float[Tensor, "batch in_channels height width"],
    weight: Float[Tensor, "out_channels in_channels 3 3"],
    kept: torch.Size,
) -> Float[Tensor, "batch out_channels kept_height kept_width"]:
    """Return the convolution, channels_last, of as many rows and columns as `kept` has, a shape as that of `images`."""
    (num, in_channels, height, width), out_channels = kept, len(weight)
    tiling = _tiling(kept, out_channels)
    size, rows, columns = tiling
    n, bottom, right = size + 2, size * rows, size * columns
    input_matrix, weight_matrix, output_matrix = _matrices(size)
    weights = (weight_matrix @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(n * n, in_channels, out_channels)
    most_channels = max(in_channels, out_channels)
    chunk_size = tiling.chunk_size(num, most_channels)
    padded = images.new_zeros(chunk_size, bottom + 2, right + 2, in_channels)
    scratch, transformed = (images.new_empty(n * n * chunk_size * rows * columns * most_channels) for _ in range(2))
    # Not a view of a tensor (height, width, channels), which autograd lets nobody change in place.
    output = torch.empty(
        (num, out_channels, height, width), dtype=images.dtype, device=images.device, memory_format=torch.channels_last
    )
    chunks = (tensor.permute(0, 2, 3, 1).split(chunk_size) for tensor in (images, output))
    for chunk, into in zip(*chunks, strict=True):
        count = len(chunk)
        tiles = _transformed_tiles(chunk, padded[:count], tiling, input_matrix, scratch, transformed)
        products = torch.bmm(tiles, weights, out=_part(scratch, n * n, tiles.shape[1], out_channels))
        squares = torch.mm(output_matrix, products.flatten(1), out=_part(transformed, size * size, products[0].numel()))
        whole = squares.view(size, size, count, rows, columns, out_channels).permute(2, 3, 0, 4, 1, 5)
        if (bottom, right) == (height, width):
            into.view(whole.shape).copy_(whole)
        else:
            into.copy_(whole.reshape(count, bottom, right, out_channels)[:, :height, :width])
    return output


def _gradients(
    images: Float[Tensor, "batch in_channels height width"],
    weight: Float[Tensor, "out_channels in_channels 3 3"],
    grad: Float[Tensor, "batch out_channels kept_height kept_width"],
    needs_images: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the images, channels_last, and of the weight: the transpose of each step."""
    (num, in_channels, height, width), (out_channels, *kept) = images.shape, grad.shape[1:]
    tiling = _tiling(torch.Size((num, in_channels, *kept)), out_channels)
    size, rows, columns = tiling
    n, bottom, right = size + 2, size * rows, size * columns
    input_matrix, weight_matrix, output_matrix = _matrices(size)
    weights = (weight_matrix @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(n * n, out_channels, in_channels)
    most_channels = max(in_channels, out_channels)
    chunk_size = tiling.chunk_size(num, most_channels)
    padded = images.new_zeros(chunk_size, bottom + 2, right + 2, in_channels)
    padded_grad = images.new_zeros(chunk_size, bottom, right, out_channels)
    buffers = (images.new_empty(n * n * chunk_size * rows * columns * most_channels) for _ in range(3))
    scratch, transformed, products_buffer = buffers
    sums = images.new_empty(chunk_size, rows + 1, size, columns + 1, size, in_channels)
    image_grad = torch.empty_like(images, memory_format=torch.channels_last)
    weights_grad = images.new_zeros(n * n, in_channels, out_channels)
    chunks = (tensor.permute(0, 2, 3, 1).split(chunk_size) for tensor in (images, grad, image_grad))
    for chunk, chunk_grad, into in zip(*chunks, strict=True):
        count = len(chunk)
        padded_grad[:count, : kept[0], : kept[1]] = chunk_grad
        squares = _part(scratch, size, size, count, rows, columns, out_channels)
        of_tiles = padded_grad[:count].view(count, rows, size, columns, size, out_channels)
        squares.copy_(of_tiles.permute(2, 4, 0, 1, 3, 5))
        flat = squares.view(size * size, -1)
        products = torch.mm(output_matrix.T, flat, out=_part(products_buffer, n * n, flat.shape[1]))
        products = products.view(n * n, -1, out_channels)
        if needs_weight:
            tiles = _transformed_tiles(chunk, padded[:count], tiling, input_matrix, scratch, transformed)
            weights_grad.baddbmm_(tiles.mT, products)
        if needs_images:
            tiles = torch.bmm(products, weights, out=_part(transformed, n * n, products.shape[1], in_channels))
            tiles = torch.mm(input_matrix.T, tiles.flatten(1), out=_part(scratch, n * n, tiles[0].numel()))
            tiles = tiles.view(n, n, count, rows, columns, in_channels)
            into.copy_(_overlapping_sums(tiles, sums[:count])[:, :height, :width])
    weight_grad = (weight_matrix.T @ weights_grad.flatten(1)).view(3, 3, in_channels, out_channels)
    return image_grad if needs_images else None, weight_grad.permute(3, 2, 0, 1) if needs_weight else None


def _transformed_tiles(
    images: Float[Tensor, "batch height width channels"],
    padded: Float[Tensor, "batch bottom right channels"],
    tiling: _Tiling,
    input_matrix: Float[Tensor, "points points"],
    scratch: Tensor,
    out: Tensor,
) -> Float[Tensor, "points tiles channels"]:
    """Return the transformed overlapping tiles of images, in the buffer `out`; the border of `padded` is of zeros."""
    size, rows, columns = tiling
    _, height, width, _ = images.shape
    inside = padded[:, 1 : height + 1, 1 : width + 1]  # with `kept`, the last row may lie outside
    inside.copy_(images[:, : inside.shape[1], : inside.shape[2]])
    image, row, column, _ = padded.stride()
    shape = (size + 2, size + 2, len(padded), rows, columns, padded.shape[-1])
    tiles = _part(scratch, *shape)
    tiles.copy_(padded.as_strided(shape, (row, column, image, size * row, size * column, 1)))
    flat = tiles.view(len(input_matrix), -1)
    return torch.mm(input_matrix, flat, out=_part(out, *flat.shape)).view(len(input_matrix), -1, shape[-1])


def _overlapping_sums(
    tiles: Float[Tensor, "n n batch rows columns channels"], sums: Float[Tensor, "batch rows+1 m columns+1 m channels"]
) -> Float[Tensor, "batch bottom right channels"]:
    """Add tiles up where they overlap, in the buffer `sums`; return them without the padding of 1."""
    n, _, num, rows, columns, channels = tiles.shape
    size = n - 2
    tiles = tiles.permute(2, 3, 0, 4, 1, 5)
    sums[:, rows, :2] = 0  # of the blocks beyond the last row and column only this is read
    sums[:, :, :, columns, :2] = 0
    sums[:, :rows, :, :columns] = tiles[:, :, :size, :, :size]
    for rows_by, columns_by in ((1, 0), (0, 1), (1, 1)):  # what a tile adds to the next row, column and both
        from_row, from_column = (slice(size, n) if by else slice(0, size) for by in (rows_by, columns_by))
        to_row, to_column = (slice(0, 2) if by else slice(0, size) for by in (rows_by, columns_by))
        into = sums[:, rows_by : rows + rows_by, to_row, columns_by : columns + columns_by, to_column]
        into += tiles[:, :, from_row, :, from_column]
    return sums.view(num, (rows + 1) * size, (columns + 1) * size, channels)[:, 1:, 1:]


def _part(buffer: Tensor, *shape: int) -> Tensor:
    """Return the first elements of a buffer, in a shape."""
    return buffer[: math.prod(shape)].view(shape)


@functools.lru_cache
def _tiling(shape: torch.Size, out_channels: int) -> _Tiling:
    """Return the tiling with the fewest multiplications for images (batch, channels, height, width)."""
    size = min(_TILE_SIZES, key=lambda size: _multiplications(size, shape, out_channels))
    return _Tiling(size, -(-shape[2] // size), -(-shape[3] // size))


def _multiplications(size: int, shape: torch.Size, out_channels: int) -> int:
    """Return how many multiplications tiles of a size need, those of the transforms included."""
    num, in_channels, height, width = shape
    points = (size + 2) ** 2
    per_tile = points * (in_channels * out_channels + points * in_channels + size**2 * out_channels)
    return num * -(-height // size) * -(-width // size) * per_tile + 9 * points * in_channels * out_channels


def _saving(shape: torch.Size, out_channels: int) -> float:
    """Return how many times fewer multiplications there are than in a direct convolution."""
    return 9 * shape.numel() * out_channels / _multiplications(_tiling(shape, out_channels).size, shape, out_channels)


@functools.cache
def _matrices(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices that transform tiles of the input (n^2, n^2), weights (n^2, 9) and outputs (size^2, n^2).

    n is size + 2. By Cook and Toom: a convolution is a product of polynomials, and that is the product of their values
    at n - 1 points and of their leading coefficients, from which it is interpolated.
    """
    points = torch.tensor(_POINTS[: size + 1], dtype=torch.float64)
    others = [torch.cat([points[:k], points[k + 1 :]]) for k in range(len(points))]
    of_input = torch.stack([F.pad(_with_roots(roots), (0, 1)) for roots in others] + [_with_roots(points)])
    values = [point ** torch.arange(3) / (point - roots).prod() for point, roots in zip(points, others, strict=True)]
    of_weight = torch.stack([*values, torch.eye(3, dtype=torch.float64)[2]])
    of_output = torch.cat([points ** torch.arange(size)[:, None], torch.eye(size, dtype=torch.float64)[:, -1:]], 1)
    input_matrix, weight_matrix, output_matrix = (
        torch.kron(matrix, matrix).float() for matrix in (of_input, of_weight, of_output)
    )
    return input_matrix, weight_matrix, output_matrix


def _with_roots(roots: Float[Tensor, " degree"]) -> Float[Tensor, " degree+1"]:
    """Return the coefficients of the polynomial with these roots, the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients
