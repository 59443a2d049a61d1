"""Grad-CAM and penultimate features of any model, by hooks on the layers that it runs."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_lightning.errors import UserError


class _Call(NamedTuple):
    module: nn.Module
    number: int  # of the calls of this module: one ReLU may run several times in a forward pass
    shape: torch.Size  # of what it returned


def grad_cam(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], classes: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch height width"]:
    """Return what in each image speaks for its class: Grad-CAM of the last feature map, from 0 to the maximum 1.

    Equations 1 and 2 of Selvaraju et al. 2017, arXiv:1610.02391: the mean gradient of the class's logit weighs each
    channel of the map, and the positive part of their sum is kept; an image without one has zeros. Scaled bilinearly to
    the size of the images. The graph begins at the map: parameters may be frozen and get no `.grad`. Gradients must be
    enabled.

    Raises:
        UserError: The model has no feature map of a convolution.
    """
    target = _last_feature_map(_calls(model, images[:1]))
    kept: list[Tensor] = []
    counts = Counter[nn.Module]()

    def begin_graph(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        counts[module] += 1
        if counts[module] != target.number:
            return None
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()  # the next layer may work in place

    with _hooked([target.module], begin_graph):
        scores = model(images).gather(1, classes[:, None])
    (gradients,) = torch.autograd.grad(scores.sum(), kept)
    weights = gradients.float().mean((2, 3), keepdim=True)
    maps = (weights * kept[0].detach().float()).sum(1, keepdim=True).relu()
    scaled = F.interpolate(maps, images.shape[2:], mode="bilinear")[:, 0]
    return scaled / scaled.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def penultimate_features(
    model: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch features"]:
    """Return the input of the last linear layer.

    Raises:
        UserError: That layer does not return logits.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept[:] = [args[0], output]

    with _hooked((module for module in model.modules() if isinstance(module, nn.Linear)), keep), torch.no_grad():
        logits = model(images)
    if not kept or kept[1].shape != logits.shape:
        raise UserError("the model does not end with a linear layer")
    return kept[0].float()


def _calls(model: nn.Module, images: Tensor) -> list[_Call]:
    """Return the calls of all modules that return a tensor, in the order in which they end."""
    calls: list[_Call] = []
    counts = Counter[nn.Module]()

    def count(module: nn.Module, args: Any, output: Any) -> None:
        counts[module] += 1
        if isinstance(output, Tensor):
            calls.append(_Call(module, counts[module], output.shape))

    with _hooked(model.modules(), count), torch.no_grad():
        model(images)
    return calls


@contextlib.contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_feature_map(calls: list[_Call]) -> _Call:
    """Return the last output (batch, channels, height, width) of the size of the last convolution with several pixels.

    It is that of the block that the convolution is in, such as layer4 of a ResNet. The convolution of a vision
    transformer, which cuts the image into patches, gives none: layers after it work on tokens or on channels last.
    """
    maps = [at for at, call in enumerate(calls) if len(call.shape) == 4 and math.prod(call.shape[2:]) > 1]
    convolutions = [at for at in maps if isinstance(calls[at].module, nn.Conv2d)]
    if not convolutions:
        raise UserError("the model has no convolution whose output has several pixels")
    last = max(at for at in maps if calls[at].shape[2:] == calls[convolutions[-1]].shape[2:])
    channels = calls[last].shape[1]
    for module, _, shape in calls[last + 1 :]:
        has_tokens = len(shape) == 3 and shape[1] > 1
        is_channels_last = (
            len(shape) == 4 and shape[1] != channels and min(math.prod(shape[1:3]), math.prod(shape[2:])) > 1
        )
        if (has_tokens or is_channels_last) and any(True for _ in module.parameters(recurse=False)):
            raise UserError("the model's last layers work on tokens, not on the output of convolutions")
    return calls[last]
