"""Networks of torchvision and timm, fitted to the classes and the size of the images.

Up to 64 pixels the stem keeps the images large (see `stems`). That is: the convolutional networks of both libraries,
and torchvision's Swin. Not changed are networks that are made for one size of images: vision transformers, whose
patches stay as wide as their names say, maxvit_t (multiples of 224 alone), and timm's attention over fixed windows.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.models.stems import SMALL_PX, adapt_stem, why_not

# What would fetch or read weights, which has no place where a network is made (it is made anew from the same arguments
# wherever its run is used), or would give something else than logits.
_NOT_TO_GIVE = {"weights", "weights_backbone", "progress", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_NOT_TO_GIVE |= {"checkpoint_path", "cache_dir", "features_only", "aux_logits", "transform_input"}
# Tried where a size is refused: the next multiples, and the sizes that networks are made for.
_MULTIPLES = (2, 4, 8, 14, 16, 32, 64)
_USUAL_SIZES = (96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)


def torchvision_names() -> list[str]:
    """Return torchvision's classification networks."""
    from torchvision import models  # takes seconds to import

    names: list[str] = models.list_models(module=models)
    return names


def torchvision_model(
    name: str, num_classes: int, image_size: int, *, keep_stem: bool = False, **kwargs: Any
) -> nn.Module:
    """Make one of torchvision's classification networks; those with auxiliary heads without them.

    Args:
        name: As torchvision writes it, such as resnet101.
        num_classes: Length of the logits.
        image_size: Side of the square images in pixels.
        keep_stem: Whether small images get ImageNet's stem all the same.
        **kwargs: Of torchvision's function.

    Raises:
        UserError: Images of that size are too small for it.
    """
    from torchvision import models

    _refuse(kwargs)
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the answer a tuple; without init_weights both warn that its default will change.
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs

    def make(size: int) -> nn.Module:
        model: nn.Module = models.get_model(name, num_classes=num_classes, **_size_arguments(name, size), **kwargs)
        return model

    return _fitted(name, make, image_size, keep_stem)


def _size_arguments(name: str, image_size: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": image_size}
    return {"input_size": (image_size, image_size)} if name.startswith("maxvit") else {}


def vision_transformer(name: str, num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    """Make a vision transformer (arXiv:2010.11929, torchvision's) of a size that torchvision has no name for.

    Args:
        name: What errors call it.
        num_classes: Length of the logits.
        image_size: Side of the square images in pixels; whole patches must fit in it.
        **kwargs: Of torchvision's class: patch_size, num_layers, num_heads, hidden_dim, mlp_dim and others.

    Raises:
        UserError: Its patches do not fit in the images.
    """
    from torchvision.models import VisionTransformer

    return _fitted(name, lambda size: VisionTransformer(size, num_classes=num_classes, **kwargs), image_size)


def is_timm_there() -> bool:
    """Whether timm is installed; it is not imported."""
    return importlib.util.find_spec("timm") is not None


def timm_names() -> list[str]:
    """Return timm's networks.

    Raises:
        UserError: timm is not installed, or cannot be imported.
    """
    names: list[str] = _timm().list_models()
    return names


def timm_model(name: str, num_classes: int, image_size: int, *, keep_stem: bool = False, **kwargs: Any) -> nn.Module:
    """Make one of timm's networks.

    Args:
        name: As timm writes it, such as resnet26d, or with a tag that says which weights are meant.
        num_classes: Length of the logits.
        image_size: Side of the square images in pixels.
        keep_stem: Whether small images get ImageNet's stem all the same.
        **kwargs: Of timm's function.

    Raises:
        UserError: timm is not there, or the network takes no images of that size.
    """
    _refuse(kwargs)
    return _fitted(f"timm/{name}", lambda size: create_timm(name, num_classes, size, **kwargs), image_size, keep_stem)


def create_timm(name: str, num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    """Return what timm makes, its stem as it is.

    Args:
        name: As timm writes it.
        num_classes: Length of the logits.
        image_size: Side of the square images in pixels, for the networks that are made for one size.
        **kwargs: Of `timm.create_model`.

    Raises:
        UserError: timm is not installed, or cannot be imported.
    """
    create = partial(_timm().create_model, name, num_classes=num_classes, in_chans=3, **kwargs)
    model: nn.Module
    try:
        model = create(img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = create()  # made for no size
    return model


def _timm() -> Any:
    if not is_timm_there():
        raise UserError("timm is not installed; pip install -e '.[timm]'")
    try:
        return importlib.import_module("timm")
    except Exception as error:  # of whatever it needs: another library's version, a file of the system
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"timm is installed and cannot be imported ({clipped(reason, 200)}).") from error


def _refuse(kwargs: Iterable[str]) -> None:
    for name in kwargs:
        if name == "in_chans":
            raise UserError(f"--model.model_kwargs: {name} is no argument to give; images are RGB, of 3 channels.")
        if name in _NOT_TO_GIVE:
            raise UserError(
                f"--model.model_kwargs: {name} is no argument to give: a network here gives logits alone, and trained "
                "weights come by --model.pretrained."
            )


def _fitted(name: str, make: Callable[[int], nn.Module], image_size: int, keep_stem: bool = False) -> nn.Module:
    """Return a network whose stem suits the size of the images, tried with that size.

    Args:
        name: What errors call it.
        make: Makes it for a size.
        image_size: Side of the square images in pixels.
        keep_stem: Whether small images get no other stem.

    Raises:
        UserError: It does not take them; names the next size that it takes.
        ValueError: It cannot be made for any size: other arguments are wrong.
    """
    model, reason = _try(make, image_size, keep_stem)
    if model is not None:
        return model
    larger = _next_size(make, image_size, keep_stem)
    if larger is None:
        raise ValueError(reason)
    reason = clipped(reason, 120)
    raise UserError(
        f"--data.image_size {image_size}: {name} cannot take it ({reason}); the next size that works is {larger}."
    )


def _try(make: Callable[[int], nn.Module], image_size: int, keep_stem: bool) -> tuple[nn.Module | None, str]:
    """Return a network that takes a size, or None and why there is none."""
    try:
        model = make(image_size)
        if image_size <= SMALL_PX and not keep_stem and adapt_stem(model) and why_not(model, image_size):
            model = make(image_size)  # as its makers have it
        reason = why_not(model, image_size)
    except (TypeError, UserError):  # other arguments are wrong, or a library is missing
        raise
    except Exception as error:  # the libraries raise nearly anything: asserts, indices, divisions by zero
        return None, str(error).strip().partition("\n")[0] or type(error).__name__
    return (None, reason) if reason else (model, "")


def _next_size(make: Callable[[int], nn.Module], image_size: int, keep_stem: bool) -> int | None:
    """Return the smallest size above one at which a network can be made and answers; shapes alone are computed."""

    def works(size: int) -> bool:
        with torch.device("meta"):
            model, reason = _try(make, size, keep_stem)
        if "meta tensor" in reason:  # regnets compute their widths with tensors, which so have no values
            model, _ = _try(make, size, keep_stem)
        return model is not None

    multiples = {(image_size // step + 1) * step for step in _MULTIPLES}
    below = image_size
    for size in sorted(multiples | {usual for usual in _USUAL_SIZES if usual > image_size}):
        if works(size):
            break
        below = size
    else:
        return None
    while size - below > 1:  # where all sizes from one on work, it is this one
        middle = (size + below) // 2
        below, size = (below, middle) if works(middle) else (middle, size)
    return size
