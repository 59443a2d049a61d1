"""3x3 convolutions with a quarter of the multiplications, for prediction in float32 on a CPU.

Winograd's F(4x4, 3x3) of Lavin and Gray, https://arxiv.org/abs/1509.09308: 36 multiplications for a tile of 4x4 outputs
and a pair of channels in place of 144. Tiles are transformed by products with small matrices, which with few channels
cost more than that saves. Sums are rounded in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MIN_CHANNELS = 128  # of the input; with 64 nothing is gained on AVX2 (benchmarks/LOG.md)
_TILE_BYTES = 8 << 20  # of the tiles transformed at a time, which stay in the cache
_INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
_INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
_WEIGHT = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # over 24
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_CONSTANT = 7  # the product, of the 36, that every output of a tile has once: where a bias is added


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1, whose weights are transformed once."""

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Return the convolution in the memory format of `Conv2d`.

        `Conv2d` computes it where a gradient is wanted, under autocast, and where the weights have changed.
        """
        # Another thread may take the transformed weights, and the class, away in between: `fewer_multiplications`.
        transformed = self.__dict__.get("transformed")
        is_batch = input.dim() == 4 and input.dtype == torch.float32 and min(input.shape[2:]) >= 4
        is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if transformed is None or not (is_batch and is_plain and torch.equal(self.weight, transformed[0])):
            return nn.Conv2d.forward(self, input)
        _, weight, of_input, of_output = transformed
        num, channels, height, width = input.shape
        rows, columns = -(-height // 4), -(-width // 4)
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns - width + 1, 1, 4 * rows - height + 1))
        output = input.new_empty((num, height, width, self.out_channels))
        at_once = max(1, _TILE_BYTES // (36 * 4 * rows * columns * channels))
        for images, into in zip(padded.split(at_once), output.split(at_once), strict=True):
            image, row, column, _ = images.stride()
            shape, strides = (len(images), rows, columns, 6, 6, channels), (image, 4 * row, 4 * column, row, column, 1)
            tiles = images.as_strided(shape, strides).reshape(-1, 36, channels)
            products = (of_input @ tiles).transpose(0, 1) @ weight  # (36, tiles, out_channels)
            if self.bias is not None:
                products[_CONSTANT] += self.bias
            squares = (of_output @ products.transpose(0, 1)).view(*shape[:3], 4, 4, self.out_channels)
            whole = squares.transpose(2, 3).reshape(len(images), 4 * rows, 4 * columns, self.out_channels)
            into.copy_(whole[:, :height, :width])
        found = output.permute(0, 3, 1, 2)
        return found if any(map(_is_channels_last, (input, self.weight))) else found.contiguous()


@contextmanager
def fewer_multiplications(model: nn.Module) -> Iterator[None]:
    """Let the convolutions of a model on the CPU that gain by it use Winograd's algorithm, for as long as it is open.

    The weights are kept a second time, and transformed ones take 4 times their memory. Other threads may call the model
    meanwhile: they get its predictions by either algorithm.
    """
    changed = [module for module in model.modules() if type(module) is nn.Conv2d and _gains(module)]
    try:
        for module in changed:
            module.__dict__["transformed"] = _transformed(module.weight.detach())  # first: it may be in use
            module.__class__ = WinogradConv2d  # and not another module, so that hooks and shared layers stay
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Conv2d
            module.__dict__.pop("transformed", None)


def _transformed(weight: Float[Tensor, "out_channels in_channels 3 3"]) -> tuple[Tensor, ...]:
    """Return a copy of the weights, and what the algorithm multiplies by, computed in float64.

    That is the transformed weights (36, in_channels, out_channels), and the matrices that transform tiles of the input
    (36, 36) and of the output (16, 36).
    """
    of_input, of_weight, of_output = (torch.tensor(rows, dtype=torch.float64) for rows in (_INPUT, _WEIGHT, _OUTPUT))
    products = torch.einsum("ai,bj,ocij->abco", of_weight / 24, of_weight / 24, weight.double())
    kron = (torch.kron(matrix, matrix).float() for matrix in (of_input, of_output))
    return weight.clone(), products.flatten(0, 1).float().contiguous(), *kron


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _gains(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    is_plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    # Pruning and the hooks of spectral_norm and weight_norm compute a weight that is no parameter in every forward.
    is_fixed = isinstance(conv.weight, nn.Parameter) and conv.weight.dtype == torch.float32
    return is_plain and is_fixed and conv.in_channels >= MIN_CHANNELS
