"""Stems for small images, and whether a network takes images of a size at all.

Networks for ImageNet halve the image five times before they pool: 32 pixels become one. For images of at most 64
pixels the first two halvings are taken away, as section 4.2 of arXiv:1512.03385 does, so that a total stride of 32
becomes 8. Which layers these are is not a table but is seen in a trial: whatever strides over the image at its full
or half size. A shortcut strides over the same size as the layers that it goes around, so both change, and still match.
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
"""Images up to this size get the stem for small ones."""

_SHRINK = 4  # by which total strides become smaller: the first two halvings
_TRIAL_PX = 256  # large enough that what unpadded layers cut off does not hide how often the image was halved


def adapt_stem(model: nn.Module) -> bool:
    """Take away a network's first two halvings of the image; return whether anything was changed.

    A convolution keeps its filters and strides less. The one that takes the images gets new ones of 3x3 where they
    were larger, for the pixels that large ones were made for are not there. Pools that would not shrink are left out.
    Networks that cut the image into patches wider than 4 pixels, or take one size alone, stay as they are.

    Args:
        model: Untrained: filters that change their size begin anew.
    """
    strides = _strides(model)
    if any(given > taken * _SHRINK for taken, given in strides.values()):
        return False
    changed = False
    for name, (taken, given) in strides.items():
        stride = max(1, given // _SHRINK) // max(1, taken // _SHRINK)
        if stride == given // taken:
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


def why_not(model: nn.Module, image_size: int) -> str:
    """Return why a network does not take images of a size, or nothing where it does.

    Tried with shapes alone, which takes about as long as making the network; and only where they do not fit (or their
    rules are not known for a layer) with numbers. The network is the same afterwards.

    Args:
        model: Gives logits.
        image_size: Side of the square images in pixels.
    """
    try:
        logits = _answer_in_shapes(model, image_size)
    except Exception:  # layers of other libraries raise nearly anything
        try:
            logits = _answer(model, image_size)
        except Exception as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
    if not isinstance(logits, Tensor):
        return f"it gives a {type(logits).__name__} and not logits"
    return "" if logits.ndim == 2 and len(logits) == 2 else f"it gives {tuple(logits.shape)} and not logits"


def needs_several(model: nn.Module, image_size: int) -> bool:
    """Whether a network in training takes no single image: what BatchNorm sees of it may be one value a channel.

    Args:
        model: Gives logits; a copy is tried, since a forward of one's own may keep what it has made.
        image_size: Side of the square images in pixels.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            _answer_in_shapes(copy.deepcopy(model), image_size, num_images=1, training=True)
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    except Exception:  # a layer whose shapes are not known without numbers; training will show
        return False
    return False


def _strides(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the strided layers by name, each with the total stride of what it takes and of what it gives."""
    seen: dict[str, tuple[int, int]] = {}
    ambiguous = set[str]()

    def note(name: str, taken: Tensor, given: Tensor) -> None:
        strides = (_total_stride(taken), _total_stride(given))
        if seen.setdefault(name, strides) != strides:
            ambiguous.add(name)  # one layer at two places

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and layer.stride not in (1, (1, 1)):
            hook = layer.register_forward_hook(lambda _, args, given, name=name: note(name, args[0], given))
            hooks.append(hook)
    try:
        _answer_in_shapes(model, _TRIAL_PX)
    except Exception:  # it takes another size alone
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
    # ResNet's own (arXiv:1502.01852); where a norm follows, as nearly everywhere, the scale makes no difference.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _answer_in_shapes(model: nn.Module, image_size: int, num_images: int = 2, training: bool = False) -> Any:
    """Return what a network gives, computed without numbers: tensors on the meta device have a shape alone."""
    state = [*model.named_parameters(), *model.named_buffers()]
    images = torch.empty(num_images, 3, image_size, image_size, device="meta")
    shapes = {name: tensor.to("meta") for name, tensor in state}
    with _trying(model, training):
        return torch.func.functional_call(model, shapes, (images,))


def _answer(model: nn.Module, image_size: int) -> Any:
    device = next(model.parameters()).device
    with _trying(model):
        return model(torch.zeros(2, 3, image_size, image_size, device=device))


@contextlib.contextmanager
def _trying(model: nn.Module, training: bool = False) -> Iterator[None]:
    """No gradients, and the network in evaluation mode: no random numbers are drawn, no statistics are changed."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
