"""Models by name: the table `MODELS`, and `build_model` that makes one. Each returns raw logits."""

import contextlib
import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.models.resnets import PreActResNet, WideResNet
from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.models.speednet import SpeedNet
from cifar_lightning.models.stems import SMALL_PX
from cifar_lightning.models.torchvision_timm import (
    is_timm_there,
    timm_model,
    timm_names,
    torchvision_model,
    torchvision_names,
    vision_transformer,
)


def _smallnet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    _check_dropout(kwargs)
    stages = _num_stages(kwargs.get("widths", (64, 128, 256)))
    if image_size < 2 ** (stages - 1):
        raise UserError(
            f"--data.image_size {image_size}: smallnet with {stages} stages needs {2 ** (stages - 1)} pixels or more."
        )
    return SmallNet(num_classes, **kwargs)


def _speednet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    groups = _num_stages(kwargs.get("widths", (64, 256, 256)))
    depth = kwargs.get("depth", 2)
    if depth not in (2, 3):
        raise TypeError(f"depth {depth}: 2, or 3 with a shortcut")
    smallest = 2**groups + 1  # the stem takes a pixel away, each group halves
    if image_size < smallest:
        raise UserError(
            f"--data.image_size {image_size}: speednet with {groups} groups needs {smallest} pixels or more."
        )
    return SpeedNet(num_classes, **kwargs)


def _num_stages(widths: Any) -> int:
    if not (isinstance(widths, list | tuple) and widths and all(type(width) is int and width > 0 for width in widths)):
        raise TypeError(f"widths {widths}: filters of each stage, 1 or more, such as [64, 128, 256]")
    return len(widths)


def _check_dropout(kwargs: Mapping[str, Any]) -> None:
    """Refuse NaN, too, which torch refuses in the first step and not before."""
    dropout = kwargs.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: 0 to below 1")


def _preact_resnet18(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    _check_dropout(kwargs)
    return PreActResNet(num_classes, **({"stem_stride": _stem_stride(image_size)} | kwargs))


def _wideresnet28_10(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    _check_dropout(kwargs)
    return WideResNet(num_classes, **({"stem_stride": _stem_stride(image_size)} | kwargs))


def _stem_stride(image_size: int) -> int:
    return 1 if image_size <= SMALL_PX else 4


def _vit_tiny(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    # A quarter as wide for small images, as the total strides of all others: 8 x 8 patches of 32 pixels.
    patch_px = 4 if image_size <= SMALL_PX else 16
    tiny = {"patch_size": patch_px, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return vision_transformer("vit_tiny", num_classes, image_size, **(tiny | kwargs))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "smallnet": _smallnet,
    "speednet": _speednet,
    **{name: partial(torchvision_model, name) for name in ("resnet18", "resnet34", "resnet50")},
    "wideresnet28_10": _wideresnet28_10,
    "preact_resnet18": _preact_resnet18,
    **{name: partial(torchvision_model, name) for name in ("convnext_tiny", "efficientnet_b0", "mobilenet_v3_small")},
    "vit_tiny": _vit_tiny,
}
"""Name -> function of (num_classes, image_size, **kwargs). A network of one's own is one more function here."""


DEFAULT_MODEL = "smallnet"


LIBRARIES: dict[str, Callable[..., nn.Module]] = {"torchvision": torchvision_model, "timm": timm_model}
"""Library -> function of (name, num_classes, image_size, **kwargs), for names such as torchvision/resnet101."""


_NAMES_OF: dict[str, Callable[[], list[str]]] = {"torchvision": torchvision_names, "timm": timm_names}


_NOT_TO_GIVE = ("name", "num_classes", "image_size")  # what a network gets from elsewhere


def build_model(name: str, num_classes: int = 10, image_size: int = 32, **kwargs: Any) -> nn.Module:
    """Make a network by name, with weights that are not trained.

    Args:
        name: A key of `MODELS`, torchvision/NAME or timm/NAME.
        num_classes: Length of the logits.
        image_size: Side of the square images in pixels. Up to 64 the stem keeps them large: see `stems`.
        **kwargs: Passed on to the network: `widths` and `dropout` of SmallNet.

    Raises:
        UserError: Unknown name, a keyword that the network does not take, or images that it cannot take.
    """
    check_name(name)
    library, _, own_name = name.partition("/")
    make = MODELS[name] if name in MODELS else partial(LIBRARIES[library], own_name)
    try:
        return make(num_classes, image_size, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = clipped(str(error).partition("\n")[0], 200)  # torch writes its C++ stack behind it
        if not kwargs:
            raise UserError(f"--model.name {name}: cannot be made for image_size {image_size} ({reason}).") from error
        raise UserError(f"--model.model_kwargs {kwargs}: {name} does not take them ({reason}).") from error


def check_name(name: str) -> None:
    """Refuse the name of a network that there is not.

    Raises:
        UserError: With the nearest names, also of torchvision and timm; or timm is asked for and is not installed.
    """
    library, slash, own_name = name.partition("/")
    if name in MODELS or (slash and library in LIBRARIES and _is_of_library(library, own_name)):
        return
    known = [*MODELS, *(f"{library}/NAME" for library in LIBRARIES)]
    raise UserError(f"--model.name {clipped(name)}: not a model; one of {', '.join(known)}.{_nearest(name)}")


def check_model_kwargs(model_kwargs: Any) -> None:
    """Refuse what is not arguments by name, and those that would silently win over what the network gets elsewhere.

    Raises:
        UserError: Shows the form, or names the argument.
    """
    if not isinstance(model_kwargs, Mapping):
        raise UserError(
            f"--model.model_kwargs {clipped(str(model_kwargs))}: names and values, such as '{{widths: [32, 64, 128]}}'."
        )
    for name in model_kwargs:
        if not isinstance(name, str) or name in _NOT_TO_GIVE:
            raise UserError(
                f"--model.model_kwargs: {clipped(str(name))} is no argument to give; "
                "images and classes are the data's, the network is --model.name."
            )


def choose_model(
    model: Any, name: str | None, num_classes: int, image_size: int, model_kwargs: Any, pretrained: bool | str
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network of one's own, or else the one that a name and its arguments say; and how it is made by name.

    Args:
        model: The network, or None.
        name: What `build_model` knows; None where a checkpoint is of a network of one's own.
        num_classes: Length of the logits.
        image_size: Side of the square images in pixels.
        model_kwargs: The network's own arguments by name, or None.
        pretrained: Whether it gets trained weights, or from where.

    Raises:
        UserError: None of both is given, or both; no network; or what `build_model` refuses.
    """
    check_model_kwargs(model_kwargs or {})
    architecture = {"name": name, "num_classes": num_classes, "image_size": image_size, **(model_kwargs or {})}
    if model is None:
        if name is None:
            raise UserError("this checkpoint is of a network of your own: give model=... again.")
        return build_model(**architecture), architecture
    if isinstance(model, type):
        raise UserError(f"model={model.__name__}: a class; give a network made of it, model={model.__name__}(...).")
    if not isinstance(model, nn.Module):
        raise UserError(f"model: a {type(model).__name__} is no network; give an nn.Module that returns raw logits.")
    for argument, value in (("name", name), ("model_kwargs", model_kwargs), ("pretrained", pretrained)):
        if value and value != DEFAULT_MODEL:
            raise UserError(
                f"{argument}={clipped(repr(value))} beside model=...: a network of your own is taken as it is; "
                "leave one of them out."
            )
    return model, architecture


def torchvision_name(name: str) -> str | None:
    """Return what torchvision calls a network, if it is one of its own."""
    library, slash, own_name = name.partition("/")
    if slash:
        return own_name if library == "torchvision" else None
    make = MODELS.get(name)
    return str(make.args[0]) if isinstance(make, partial) and make.func is torchvision_model else None


def _is_of_library(library: str, own_name: str) -> bool:
    # timm writes which of a network's weights are meant behind a point; the network is the same.
    architecture = own_name.partition(".")[0] if library == "timm" else own_name
    try:
        return architecture in _NAMES_OF[library]()
    except UserError as error:  # the library is not there
        raise UserError(f"--model.name {library}/{clipped(own_name)}: {error}") from error


def _nearest(name: str) -> str:
    """Return " Did you mean X, Y or Z?" for the nearest names, of the named library alone, or nothing."""
    library, slash, own_name = name.lower().replace("-", "_").partition("/")
    sought = own_name if slash else library
    if slash and library in LIBRARIES:
        known = {other: f"{library}/{other}" for other in _NAMES_OF[library]()}
    else:  # a network that two have is ours first, then torchvision's
        known = {}
        if is_timm_there():
            with contextlib.suppress(UserError):  # it is there and cannot be imported: nobody asked for it
                known = {other: f"timm/{other}" for other in timm_names()}
        known |= {other: f"torchvision/{other}" for other in torchvision_names()}
        known |= {other: other for other in MODELS}
    near = difflib.get_close_matches(sought, known, n=3, cutoff=0.75) or difflib.get_close_matches(sought, known, n=1)
    names = [known[other] for other in near]
    return f" Did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}?" if names else ""
