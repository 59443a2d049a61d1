"""Stems for small images, and checks of the image size that a model takes.

ImageNet models halve the resolution five times before they pool: 32 pixels become one. For images of at most 64 pixels
the first two halvings are removed, as in section 4.2 of arXiv:1512.03385, so that a total stride of 32 becomes 8. The
layers are not listed by name but found in a trial forward pass: every layer that strides at full or half resolution. A
shortcut strides at the same resolution as the layers that it bypasses, so both change and their shapes still match.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SMALL_PX = 64
"""Largest image size that gets a stem for small images."""

_REMOVED_STRIDE = 4  # the first two halvings
_TRIAL_PX = 256  # large enough to tell the strides of unpadded layers, which also crop


def adapt_stem(model: nn.Module) -> bool:
    """Remove an untrained model's first two halvings of the resolution; return whether anything was changed.

    Convolutions keep their filters and get a smaller stride, except that an input convolution with filters larger than
    3x3 gets new ones of 3x3, initialised again. Pools that would no longer shrink the image are removed. Models that
    cut the image into patches wider than 4 pixels or take a single size are left alone.
    """
    strides = _strides(model)
    if any(after > before * _REMOVED_STRIDE for before, after in strides.values()):
        return False
    changed = False
    for name, (before, after) in strides.items():
        stride = max(1, after // _REMOVED_STRIDE) // max(1, before // _REMOVED_STRIDE)
        if stride == after // before:
            continue
        changed = True
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            layer.stride = (stride, stride)
            if layer.in_channels == 3 and max(layer.kernel_size) > 3:
                _shrink_filters(layer)
        else:
            model.set_submodule(name, nn.Identity())
    return changed


def take_gray(model: nn.Module) -> None:
    """Have a model of RGB images take gray ones, which it sees as it saw RGB images of three equal channels.

    The filters of convolutions on RGB are summed over its channels, as timm does.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            layer.in_channels, layer.weight = 1, nn.Parameter(layer.weight.detach().sum(1, keepdim=True))


def input_error(model: nn.Module, image_size: int, num_classes: int | None = None, in_channels: int = 3) -> str:
    """Return why a model does not give logits, of `num_classes` where given, for images of a size; empty if it does.

    The forward pass runs on the meta device, in about the time that making the model takes. Only if that fails (a layer
    may lack a meta kernel) does it run on real tensors. Of the model only lazy layers change, which take their shapes.
    """
    try:
        logits = _forward_on_meta(model, image_size, in_channels=in_channels)
    except Exception:  # layers of other libraries raise nearly anything
        try:
            with in_eval_mode(model):
                device = next(model.parameters()).device
                logits = model(torch.zeros(2, in_channels, image_size, image_size, device=device))
        except Exception as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
    if not isinstance(logits, Tensor):
        return f"it returns a {type(logits).__name__} and not logits"
    if logits.ndim != 2 or len(logits) != 2:
        return f"it returns {tuple(logits.shape)} and not logits"
    width = logits.shape[1]
    return "" if num_classes in (None, width) else f"it returns {width} logits an image for {num_classes} classes"


def fails_on_single_image(model: nn.Module, image_size: int, in_channels: int = 3) -> bool:
    """Whether training on a batch of one image fails: some BatchNorm gets a single value per channel."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            # A copy, as a forward pass of another library may store tensors.
            _forward_on_meta(copy.deepcopy(model), image_size, num_images=1, training=True, in_channels=in_channels)
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    except Exception:  # a layer without a meta kernel; training will show
        return False
    return False


def _strides(model: nn.Module) -> dict[str, tuple[int, int]]:
    seen: dict[str, tuple[int, int]] = {}
    ambiguous = set[str]()

    def note(name: str, before: Tensor, after: Tensor) -> None:
        strides = (_total_stride(before), _total_stride(after))
        if seen.setdefault(name, strides) != strides:
            ambiguous.add(name)  # one layer used at two resolutions

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and layer.stride not in (1, (1, 1)):
            hook = layer.register_forward_hook(lambda _, args, out, name=name: note(name, args[0], out))
            hooks.append(hook)
    try:
        _forward_on_meta(model, _TRIAL_PX)
    except Exception:  # it takes a single size
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return {} if ambiguous else seen


def _total_stride(features: Float[Tensor, "batch channels height width"]) -> int:
    return int(2 ** round(math.log2(_TRIAL_PX / features.shape[-1])))


def _shrink_filters(conv: nn.Conv2d) -> None:
    conv.kernel_size, conv.padding = (3, 3), (1, 1)
    conv.weight = nn.Parameter(conv.weight.new_empty(*conv.weight.shape[:2], 3, 3))
    # ResNet's initialisation (arXiv:1502.01852); the scale does not matter where a norm follows, as nearly everywhere.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _forward_on_meta(
    model: nn.Module, image_size: int, num_images: int = 2, training: bool = False, in_channels: int = 3
) -> Any:
    state = [*model.named_parameters(), *model.named_buffers()]
    images = torch.empty(num_images, in_channels, image_size, image_size, device="meta")
    shapes = {name: tensor.to("meta") for name, tensor in state}
    with in_eval_mode(model, training):
        return torch.func.functional_call(model, shapes, (images,))


@contextlib.contextmanager
def in_eval_mode(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Disable gradients and set the mode of all modules; in eval mode no RNG is drawn and no statistics change."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
