"""3x3 convolutions of a model on a CPU by faster ways than torch's, for training and prediction.

In float32 by Winograd's algorithm (models/winograd.py), in bfloat16 with packed rows (models/packed_rows.py), each
where it was measured to gain.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from cifar_lightning.models import packed_rows, winograd


class FasterConv2d(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1 that is computed in the fastest way for its input."""

    pool = 1  # size of the pooling after it, which drops what remains of rows and columns

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Return the convolution in the memory format of `Conv2d`."""
        output = _faster(self, input, self.pool) if _is_computable(self, input) else None
        if output is None:
            return nn.Conv2d.forward(self, input)
        if self.bias is not None:
            output += self.bias.view(-1, 1, 1)
        return output if any(map(_is_channels_last, (input, self.weight))) else output.contiguous()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Let a copy, also a saved one, be of the class that the model's layer is of afterwards."""
        return object.__new__, (_PLAIN[type(self)],), self.__dict__


class PooledConv2d(nn.Conv2d):
    """A convolution before a 2x2 max-pool with stride 2, which drops a last row and column of an odd number.

    `use_faster_convolutions` therefore need not compute them.
    """


class FasterPooledConv2d(FasterConv2d):
    """`FasterConv2d` for `PooledConv2d`."""

    pool = 2


_FASTER: dict[type[nn.Conv2d], type[FasterConv2d]] = {nn.Conv2d: FasterConv2d, PooledConv2d: FasterPooledConv2d}
_PLAIN: dict[type[nn.Conv2d], type[nn.Conv2d]] = {faster: plain for plain, faster in _FASTER.items()}


def use_faster_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Let convolutions of a model on the CPU be computed in faster ways where they gain; return those changed.

    Their class changes, and not the modules, so that hooks and shared layers stay.
    """
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    changed = [conv for conv in convs if type(conv) in _FASTER and _is_3x3(conv)]
    for conv in changed:
        conv.__class__ = _FASTER[type(conv)]
    return changed


def restore_convolutions(changed: Iterable[nn.Conv2d]) -> None:
    """Undo `use_faster_convolutions`."""
    for conv in changed:
        if type(conv) in _PLAIN:  # and not parametrized meanwhile, which makes a class of its own
            conv.__class__ = _PLAIN[type(conv)]


@contextmanager
def faster_convolutions(model: nn.Module) -> Iterator[None]:
    """Use faster ways while open. Other threads may call the model meanwhile: they get either way's output."""
    changed = use_faster_convolutions(model)
    try:
        yield
    finally:
        restore_convolutions(changed)


def _faster(
    conv: nn.Conv2d, images: Float[Tensor, "batch in_channels height width"], pool: int
) -> Float[Tensor, "batch out_channels kept_height kept_width"] | None:
    """Return the convolution without its bias, computed in a faster way; None where there is none."""
    dtypes = {images.dtype, conv.weight.dtype}
    num, channels, height, width = images.shape
    if torch.is_autocast_enabled("cpu") and dtypes <= {torch.float32, torch.bfloat16}:
        dtypes = {torch.get_autocast_dtype("cpu")}
    if dtypes == {torch.float32}:
        kept = torch.Size((num, channels, height - height % pool, width - width % pool))
        return winograd.convolve(images, conv.weight, kept) if winograd.is_worthwhile(kept, len(conv.weight)) else None
    is_trained = torch.is_grad_enabled() and conv.weight.requires_grad
    if dtypes == {torch.bfloat16} and is_trained and packed_rows.is_worthwhile(images.shape, len(conv.weight)):
        return packed_rows.convolve(images, conv.weight)
    return None


def _is_computable(conv: nn.Conv2d, input: Tensor) -> bool:
    """Whether the faster ways compute what `Conv2d` does of such an input at this moment."""
    # First, as a compiler would not get past the others; the last is of torch.func.vmap and its like.
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0:  # derivatives are computed with the output
        return False
    is_batch = input.dim() == 4 and input.shape[1] == conv.weight.shape[1] and _is_3x3(conv)
    return is_batch and input.device.type == "cpu"


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _is_3x3(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
