"""Models of torchvision and timm, adapted to the number of classes and the image size.

Up to 64 pixels the stem keeps the resolution (see `stems`) in the convolutional models of both libraries and in
torchvision's Swin. Models made for one image size are not changed: vision transformers, whose patches stay as wide as
their names say, maxvit_t (multiples of 224 only), and timm's models with attention over fixed windows.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.models.stems import SMALL_PX, adapt_stem, input_error, take_gray
from cifar_lightning.settings.import_path import import_timm

INCEPTIONS = ("googlenet", "inception_v3")  # of torchvision, with auxiliary heads and a normalization of their own
# Arguments that download or read weights, while a model is built from the same arguments wherever its run is used; and
# arguments that make it return something else than logits.
_REFUSED = {"weights", "weights_backbone", "progress", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_REFUSED |= {"checkpoint_path", "cache_dir", "features_only", "aux_logits", "transform_input"}


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    from torchvision import models  # takes seconds to import

    names: list[str] = models.list_models(module=models)
    return names


def torchvision_model(
    name: str, num_classes: int, image_size: int, *, keep_stem: bool = False, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """Build a torchvision classifier, without auxiliary heads; `keep_stem` keeps ImageNet's stem for small images.

    Raises:
        UserError: An argument is refused.
        ValueError: The model does not take images of this size, or an argument is wrong.
    """
    from torchvision import models

    _check_kwargs(kwargs)
    if name in INCEPTIONS:
        # Auxiliary heads would make the output a tuple; without init_weights both warn that its default will change.
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs
    size: dict[str, Any] = {}
    if name.startswith("vit_"):
        size = {"image_size": image_size}
    elif name.startswith("maxvit"):
        size = {"input_size": (image_size, image_size)}
    make = partial(models.get_model, name, num_classes=num_classes, **size, **kwargs)
    return _adapted(make, image_size, in_channels, keep_stem)


def vision_transformer(num_classes: int, image_size: int, in_channels: int = 3, **kwargs: Any) -> nn.Module:
    """Build torchvision's vision transformer (arXiv:2010.11929) in a size that torchvision has no name for.

    Raises:
        ValueError: The patches do not divide the image, or an argument is wrong.
    """
    from torchvision.models import VisionTransformer

    return _adapted(partial(VisionTransformer, image_size, num_classes=num_classes, **kwargs), image_size, in_channels)


def timm_names() -> list[str]:
    """Return the names of timm's models.

    Raises:
        UserError: timm is not installed or cannot be imported.
    """
    names: list[str] = import_timm().list_models()
    return names


def timm_model(
    name: str, num_classes: int, image_size: int, *, keep_stem: bool = False, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """Build a model of timm.

    Raises:
        UserError: timm is not installed, or an argument is refused.
        ValueError: The model does not take images of this size, or an argument is wrong.
    """
    _check_kwargs(kwargs)
    if (given := kwargs.pop("img_size", image_size)) != image_size:
        raise UserError(
            f"--model.model_kwargs: img_size {given}: --data.image_size {image_size} sets it; leave it out."
        )
    return _adapted(partial(create_timm, name, num_classes, image_size, **kwargs), image_size, in_channels, keep_stem)


def create_timm(name: str, num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    """Build a model of timm with its own stem; models that take any image size ignore `image_size`.

    Raises:
        UserError: timm is not installed or cannot be imported.
    """
    create = partial(import_timm().create_model, name, num_classes=num_classes, in_chans=3, **kwargs)
    model: nn.Module
    try:
        model = create(img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = create()
    return model


def _check_kwargs(kwargs: Iterable[str]) -> None:
    for name in kwargs:
        if name == "in_chans":
            raise UserError(
                f"--model.model_kwargs: {name} cannot be set here; --data.in_channels 1 is for gray images."
            )
        if name in _REFUSED:
            raise UserError(
                f"--model.model_kwargs: {name} cannot be set; models return logits only, and pretrained weights are "
                "set with --model.pretrained."
            )


def _adapted(make: Callable[[], nn.Module], image_size: int, in_channels: int, keep_stem: bool = False) -> nn.Module:
    try:
        model = make()
        is_adapted = image_size <= SMALL_PX and not keep_stem and adapt_stem(model)
        if is_adapted and input_error(model, image_size):
            model, is_adapted = make(), False  # the adapted stem does not fit; use the original one
        if in_channels == 1:
            take_gray(model)
        is_checked = is_adapted and in_channels == 3
        reason = "" if is_checked else input_error(model, image_size, in_channels=in_channels)
    except (TypeError, UserError):  # an unknown argument, or a missing library
        raise
    except Exception as error:  # the libraries raise nearly anything: asserts, indices, divisions by zero
        raise ValueError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
    if reason:
        raise ValueError(reason)
    return model
