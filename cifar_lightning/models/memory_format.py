"""Memory format of a model and its images: NHWC (channels_last) or NCHW (contiguous)."""

from typing import Any, Literal

import torch
from torch import nn

MemoryFormat = Literal["channels_last", "contiguous"]


def use_memory_format(model: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """Return the model with its weights in a memory format.

    Batches of the loaders are channels_last, with which convolutions are faster on CPU and tensor cores. A contiguous
    model gets each batch as a contiguous copy, for models and optimizers that call `view` on activations or weights.
    """
    if memory_format == "channels_last":
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 4:  # `model.to` fails for those of five dimensions, as of Conv3d
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
        return model
    model.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
