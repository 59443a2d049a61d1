"""3x3 convolutions with fewer multiplications, for training and prediction in float32 on a CPU.

Winograd's F(m x m, 3x3) of Lavin and Gray, https://arxiv.org/abs/1509.09308: (m+2)^2 multiplications for a tile of
m x m outputs and a pair of channels in place of 9 m^2. Tiles are transformed by products with small matrices, which
with few channels cost more than that saves. Sums are rounded in another order.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_WORTHWHILE = 2.4  # times fewer multiplications, from which on a convolution is faster: benchmarks/LOG.md
_TILE_BYTES = 8 << 20  # of the tiles transformed at a time, which stay in the cache
_POINTS = [0, 1, -1, 2, -2, 0.5, -0.5]  # where polynomials are evaluated: small numbers, so that rounding stays small
_LARGEST_TILE = len(_POINTS) - 1


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1 that uses Winograd's algorithm where it needs less time."""

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Return the convolution in the memory format of `Conv2d`."""
        weight = self.weight
        is_float = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
        is_traced = torch.compiler.is_compiling() or torch._C._is_tracing()
        is_plain = is_float and not torch.is_autocast_enabled("cpu") and not is_traced
        if not (is_plain and input.dim() == 4 and _is_worthwhile(input.shape, len(weight))):
            return nn.Conv2d.forward(self, input)
        output: Tensor = _Winograd.apply(input, weight)
        if self.bias is not None:
            output = output + self.bias.view(-1, 1, 1)
        return output if any(map(_is_channels_last, (input, weight))) else output.contiguous()


def use_winograd(model: nn.Module) -> None:
    """Let the 3x3 convolutions of a model on the CPU use Winograd's algorithm where they gain by it.

    Without MKL nothing changes: the products of matrices that the algorithm needs were not measured there.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_3x3(module) and torch.backends.mkl.is_available():
            _become(module, WinogradConv2d)


def use_direct(model: nn.Module) -> None:
    """Undo `use_winograd`."""
    for module in model.modules():
        if type(module) is WinogradConv2d:
            _become(module, nn.Conv2d)


@contextmanager
def fewer_multiplications(model: nn.Module) -> Iterator[None]:
    """`use_winograd` for as long as it is open. Other threads may call the model meanwhile, by either algorithm."""
    try:
        use_winograd(model)
        yield
    finally:
        use_direct(model)


class _Winograd(torch.autograd.Function):
    """The convolution of `WinogradConv2d` and its gradients, by the same tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "batch channels height width"],
        weight: Float[Tensor, "filters channels 3 3"],
    ) -> Float[Tensor, "batch filters height width"]:
        ctx.save_for_backward(images, weight)
        return _convolve(images, weight)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "batch filters height width"]) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        of_images, of_weight = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted, which the loop over tiles has not
            ones, needed = (1, 1), (of_images, of_weight, False)
            direct = torch.ops.aten.convolution_backward
            of_each = direct(grad, images, weight, None, ones, ones, ones, False, (0, 0), 1, needed)
            return of_each[0], of_each[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        return _gradients(images, weight, grad, of_images, of_weight)


class _Tiling(NamedTuple):
    """How a batch is divided into tiles of size x size outputs."""

    size: int
    rows: int
    columns: int

    def at_once(self, num: int, channels: int) -> int:
        """Return how many images' tiles fit into the cache."""
        return max(1, min(num, _TILE_BYTES // (4 * (self.size + 2) ** 2 * self.rows * self.columns * channels)))


def _convolve(images: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution, channels_last."""
    (num, channels, height, width), filters = images.shape, len(weight)
    tiling = _tiling(images.shape, filters)
    size, rows, columns = tiling
    n = size + 2
    of_input, of_weight, of_output = _transforms(size)
    transformed = (of_weight @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(n * n, channels, filters)
    at_once = tiling.at_once(num, max(channels, filters))
    padded = images.new_zeros(at_once, size * rows + 2, size * columns + 2, channels)
    a, b = (images.new_empty(n * n * at_once * rows * columns * max(channels, filters)) for _ in range(2))
    output = images.new_empty(num, height, width, filters)
    for some, into in zip(images.permute(0, 2, 3, 1).split(at_once), output.split(at_once), strict=True):
        padded[: len(some), 1 : height + 1, 1 : width + 1] = some
        tiles = _transformed_tiles(padded[: len(some)], tiling, of_input, a, b)
        products = torch.bmm(tiles, transformed, out=_part(a, n * n, tiles.shape[1], filters))
        squares = torch.mm(of_output, products.flatten(1), out=_part(b, size * size, products[0].numel()))
        whole = squares.view(size, size, len(some), rows, columns, filters).permute(2, 3, 0, 4, 1, 5)
        if (size * rows, size * columns) == (height, width):
            into.view(whole.shape).copy_(whole)
        else:
            into.copy_(whole.reshape(len(some), size * rows, size * columns, filters)[:, :height, :width])
    return output.permute(0, 3, 1, 2)


def _gradients(
    images: Tensor, weight: Tensor, grad: Tensor, of_images: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the images, channels_last, and of the weight: the transposes of each step."""
    (num, channels, height, width), filters = images.shape, len(weight)
    tiling = _tiling(images.shape, filters)
    size, rows, columns = tiling
    n, bottom, right = size + 2, size * rows, size * columns
    by_input, by_weight, by_output = _transforms(size)
    transformed = (by_weight @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(n * n, filters, channels)
    at_once = tiling.at_once(num, max(channels, filters))
    padded = images.new_zeros(at_once, bottom + 2, right + 2, channels)
    padded_grad = images.new_zeros(at_once, bottom, right, filters)
    a, b, c = (images.new_empty(n * n * at_once * rows * columns * max(channels, filters)) for _ in range(3))
    sums = images.new_zeros(at_once, rows + 1, size, columns + 1, size, channels)
    image_grad = images.new_empty(num, height, width, channels)
    transformed_grad = images.new_zeros(n * n, channels, filters)
    parts = (tensor.permute(0, 2, 3, 1).split(at_once) for tensor in (images, grad))
    for some, some_grad, into in zip(*parts, image_grad.split(at_once), strict=True):
        k = len(some)
        padded_grad[:k, :height, :width] = some_grad
        squares = _part(a, size, size, k, rows, columns, filters)
        squares.copy_(padded_grad[:k].view(k, rows, size, columns, size, filters).permute(2, 4, 0, 1, 3, 5))
        products = torch.mm(by_output.T, squares.view(size * size, -1), out=_part(c, n * n, squares[0, 0].numel()))
        products = products.view(n * n, -1, filters)
        if of_weight:
            padded[:k, 1 : height + 1, 1 : width + 1] = some
            tiles = _transformed_tiles(padded[:k], tiling, by_input, a, b)
            transformed_grad.baddbmm_(tiles.transpose(1, 2), products)
        if of_images:
            tiles = torch.bmm(products, transformed, out=_part(b, n * n, products.shape[1], channels))
            tiles = torch.mm(by_input.T, tiles.flatten(1), out=_part(a, n * n, tiles[0].numel()))
            into.copy_(_overlapping_sums(tiles.view(n, n, k, rows, columns, channels), sums[:k])[:, :height, :width])
    weight_grad = (by_weight.T @ transformed_grad.flatten(1)).view(3, 3, channels, filters).permute(3, 2, 0, 1)
    return image_grad.permute(0, 3, 1, 2) if of_images else None, weight_grad if of_weight else None


def _transformed_tiles(padded: Tensor, tiling: _Tiling, of_input: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the transformed overlapping tiles of padded images, (n * n, tiles, channels), in `b`; `a` is scratch."""
    size, rows, columns = tiling
    image, row, column, _ = padded.stride()
    shape = (size + 2, size + 2, len(padded), rows, columns, padded.shape[-1])
    tiles = _part(a, *shape)
    tiles.copy_(padded.as_strided(shape, (row, column, image, size * row, size * column, 1)))
    flat = tiles.view(len(of_input), -1)
    return torch.mm(of_input, flat, out=_part(b, *flat.shape)).view(len(of_input), -1, shape[-1])


def _overlapping_sums(tiles: Tensor, sums: Tensor) -> Tensor:
    """Add tiles (n, n, batch, rows, columns, channels) up where they overlap; return them without the padding of 1."""
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
    return buffer[: functools.reduce(int.__mul__, shape)].view(shape)


@functools.lru_cache
def _tiling(shape: torch.Size, filters: int) -> _Tiling:
    """Return the tiling with the fewest multiplications for images (batch, channels, height, width)."""
    size = min(range(2, _LARGEST_TILE + 1), key=lambda size: _multiplications(size, shape, filters))
    return _Tiling(size, -(-shape[2] // size), -(-shape[3] // size))


def _multiplications(size: int, shape: torch.Size, filters: int) -> int:
    """Return how many multiplications tiles of a size need, those of the transforms included."""
    num, channels, height, width = shape
    points = (size + 2) ** 2
    a_tile = points * (channels * filters + points * channels + size**2 * filters)
    return num * -(-height // size) * -(-width // size) * a_tile + 9 * points * channels * filters


def _is_worthwhile(shape: torch.Size, filters: int) -> bool:
    needed = _multiplications(_tiling(shape, filters).size, shape, filters)
    return 9 * shape.numel() * filters > _WORTHWHILE * needed


@functools.cache
def _transforms(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices that transform tiles of the input (n^2, n^2), weights (n^2, 9) and outputs (size^2, n^2).

    n is size + 2. By Cook and Toom: a convolution is a product of polynomials, and that is the product of their values
    at n - 1 points and of their leading coefficients, from which it is interpolated.
    """
    points = torch.tensor(_POINTS[: size + 1], dtype=torch.float64)
    others = [torch.cat([points[:k], points[k + 1 :]]) for k in range(len(points))]
    leading = torch.eye(3, dtype=torch.float64)[2]
    of_input = torch.stack([F.pad(_with_roots(roots), (0, 1)) for roots in others] + [_with_roots(points)])
    values = [point ** torch.arange(3) / (point - roots).prod() for point, roots in zip(points, others, strict=True)]
    of_weight = torch.stack([*values, leading])
    of_output = torch.cat([points ** torch.arange(size)[:, None], torch.eye(size, dtype=torch.float64)[:, -1:]], 1)
    kron_of_input, kron_of_weight, kron_of_output = (
        torch.kron(matrix, matrix).float() for matrix in (of_input, of_weight, of_output)
    )
    return kron_of_input, kron_of_weight, kron_of_output


def _with_roots(roots: Tensor) -> Tensor:
    """Return the coefficients of the polynomial with these roots, the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


def _become(module: nn.Module, kind: type[nn.Conv2d]) -> None:
    module.__class__ = kind  # and no other module, so that hooks and shared layers stay


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _is_3x3(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
