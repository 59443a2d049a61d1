"""Models by name: the table `MODELS`, and `build_model`. Every model returns raw logits."""

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, reason_of, suggest
from cifar_lightning.models.resnets import PreActResNet, WideResNet
from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.models.speednet import SpeedNet
from cifar_lightning.models.stems import SMALL_PX, input_error
from cifar_lightning.models.torchvision_timm import (
    timm_model,
    timm_names,
    torchvision_model,
    torchvision_names,
    vision_transformer,
)
from cifar_lightning.settings.import_path import import_object, is_import_path, is_timm_installed


def _smallnet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    _check_dropout(kwargs)
    stages = _num_stages(kwargs.get("widths", (64, 128, 256)))
    _check_size(image_size, 2 ** (stages - 1), f"{stages} stages")
    return SmallNet(num_classes, **kwargs)


def _speednet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    groups = _num_stages(kwargs.get("widths", (64, 256, 256)))
    depth = kwargs.get("depth", 2)
    if depth not in (2, 3):
        raise TypeError(f"depth {depth}: 2 or 3")
    _check_size(image_size, 2**groups + 1, f"{groups} groups")  # the stem removes one pixel, each group halves
    return SpeedNet(num_classes, **kwargs)


def _check_size(image_size: int, smallest: int, what: str) -> None:
    if image_size < smallest:
        raise ValueError(f"{what} need images of at least {smallest} pixels")


def _num_stages(widths: Any) -> int:
    if not (isinstance(widths, list | tuple) and widths and all(type(width) is int and width > 0 for width in widths)):
        raise TypeError(f"widths {widths}: a list of positive integers, such as [64, 128, 256]")
    return len(widths)


def _check_dropout(kwargs: Mapping[str, Any]) -> None:
    # NaN, too, which torch refuses only in the first step.
    dropout = kwargs.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: 0 to below 1")


def _preact(make: type[PreActResNet], num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    _check_dropout(kwargs)
    return make(num_classes, **({"stem_stride": 1 if image_size <= SMALL_PX else 4} | kwargs))


def _vit_tiny(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    # Patches a quarter as wide for small images, as the total strides of all other models: 8 x 8 patches of 32 pixels.
    patch_px = 4 if image_size <= SMALL_PX else 16
    tiny = {"patch_size": patch_px, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return vision_transformer(num_classes, image_size, **(tiny | kwargs))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "smallnet": _smallnet,
    "speednet": _speednet,
    **{name: partial(torchvision_model, name) for name in ("resnet18", "resnet34", "resnet50")},
    "wideresnet28_10": partial(_preact, WideResNet),
    "preact_resnet18": partial(_preact, PreActResNet),
    **{name: partial(torchvision_model, name) for name in ("convnext_tiny", "efficientnet_b0", "mobilenet_v3_small")},
    "vit_tiny": _vit_tiny,
}
"""Name -> function of (num_classes, image_size, **kwargs). Add your own model as one more function."""


DEFAULT_MODEL = "smallnet"


class _Library(NamedTuple):
    make: Callable[..., nn.Module]  # of (name, num_classes, image_size, **kwargs)
    names: Callable[[], list[str]]  # `UserError` if it is not installed


LIBRARIES = {
    "torchvision": _Library(torchvision_model, torchvision_names),
    "timm": _Library(timm_model, timm_names),
}
"""Libraries of models, for names such as torchvision/resnet101."""


def build_model(
    name: str, num_classes: int = 10, image_size: int = 32, *, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """Build an untrained model by name.

    Args:
        name: A key of `MODELS`, torchvision/NAME or timm/NAME, or an import path, package.module:function_or_class.
        num_classes: Number of logits.
        image_size: Height and width in pixels. Up to 64 the stem keeps the resolution: see `stems`.
        in_channels: 3 for RGB, 1 for gray images.
        **kwargs: Arguments of the model, such as `widths` and `dropout` of SmallNet.

    Raises:
        UserError: Unknown name, or an argument or image size that the model does not take.
    """
    check_name(name)
    if is_import_path(name):
        return _imported_model(name, num_classes, image_size, in_channels, kwargs)
    library, _, own_name = name.partition("/")
    make = MODELS[name] if name in MODELS else partial(LIBRARIES[library].make, own_name)
    try:
        of_channels = {} if in_channels == 3 else {"in_channels": in_channels}
        return make(num_classes, image_size, **of_channels, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = clipped(str(error).partition("\n")[0], 200)  # torch appends its C++ stack
        if not kwargs:
            channels = "" if in_channels == 3 else f" with --data.in_channels {in_channels}"
            raise UserError(f"--data.image_size {image_size}{channels}: {name} does not take it ({reason}).") from error
        size = "" if isinstance(error, TypeError) else f" at --data.image_size {image_size}"
        raise UserError(f"--model.model_kwargs {kwargs}: {name} does not take them{size} ({reason}).") from error


def _imported_model(
    path: str, num_classes: int, image_size: int, in_channels: int, kwargs: dict[str, Any]
) -> nn.Module:
    """Call what is imported, with what it takes of the data; check what it returns."""
    make = import_object(path, "--model.name")
    given = f"--model.name {path}" + (f" with --model.model_kwargs {kwargs}" if kwargs else "")
    try:
        taken = inspect.signature(make).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        known = {"num_classes": num_classes} if takes_any or "num_classes" in taken else {}
        of_images = {"image_size": image_size, "in_channels": in_channels}
        known |= {key: value for key, value in of_images.items() if key in taken}
        if "init_args" in kwargs:  # of a class by LightningCLI's name for them, with objects as it writes them
            kwargs = {key: _with_objects(each) for key, each in kwargs["init_args"].items()}
        model = make(**{**known, **kwargs})
    except Exception as error:  # code of one's own raises anything
        raise UserError(f"{given}: cannot be made ({type(error).__name__}: {reason_of(error)}).") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{given}: returns a {type(model).__name__}, not an nn.Module that returns raw logits.")
    if reason := input_error(model, image_size, num_classes, in_channels):
        images = f"{in_channels}-channel images of {image_size} pixels"
        raise UserError(f"{given}: does not fit {images} in {num_classes} classes ({clipped(reason, 200)}).")
    return model


def _with_objects(value: Any) -> Any:
    """Return arguments with an object in the place of each {"class_path", "init_args"}."""
    if isinstance(value, list):
        return [_with_objects(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    made = {key: _with_objects(each) for key, each in value.items()}
    if not is_import_path(made.get("class_path")):
        return made
    return import_object(made["class_path"], "class_path")(**(made.get("init_args") or {}))


def import_path_of(
    model: nn.Module, num_classes: int, image_size: int, model_kwargs: Mapping[str, Any], in_channels: int = 3
) -> dict[str, Any] | None:
    """Return {"path", "kwargs"} from which `build_model` makes a model with the same logits again.

    None where that is not possible: a class without an import path, or arguments that are not known.
    """
    path = f"{type(model).__module__}:{type(model).__qualname__}"
    if path.startswith("__main__:") or not is_import_path(path):
        return None
    kwargs = {key: value for key, value in model_kwargs.items() if key not in ("num_classes", "image_size")}
    is_same = makes_same_logits(model, path, num_classes, image_size, in_channels, kwargs)
    return {"path": path, "kwargs": kwargs} if is_same else None


def makes_same_logits(
    model: nn.Module, name: str, num_classes: int, image_size: int, in_channels: int, model_kwargs: Mapping[str, Any]
) -> bool:
    """Whether `build_model` makes a model that has a model's logits with the same weights."""
    try:
        # A copy without a Trainer, in float32 on the CPU, whatever the Trainer's precision and device.
        memo: dict[int, Any] = {id(getattr(model, "_trainer", None)): None}
        kept = (each for module in model.modules() for each in vars(module).values() if isinstance(each, torch.Tensor))
        memo |= {id(each): each.detach() for each in kept if not each.is_leaf}  # which torch does not copy
        model = copy.deepcopy(model, memo).cpu().float()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            twin = build_model(name, num_classes, image_size, **{"in_channels": in_channels, **model_kwargs}).float()
            for weight in model.parameters():  # a head or a LayerScale of zeros hides what is before it
                weight.add_(0.02 * torch.randn_like(weight))
            twin.load_state_dict(model.state_dict())
            images = torch.rand(2, in_channels, image_size, image_size)
            return torch.allclose(model.eval()(images), twin.eval()(images), rtol=1e-4, atol=1e-5)
    except Exception:  # code of one's own raises anything
        return False


def is_built_by_name(model: nn.Module, architecture: Mapping[str, Any]) -> bool:
    """Whether a model consists of the modules that `build_model` makes, as far as their `repr` shows.

    Also true where they cannot be made without weights, on the meta device.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _modules_of(build_model(**architecture)) == _modules_of(model)
    except Exception:  # code of one's own raises anything
        return True


def _modules_of(model: nn.Module) -> str:
    # --trainer.sync_batchnorm replaces BatchNorm, and leaves a class of Lightning's behind.
    return re.sub(r"\b_?(Sync)?BatchNorm(\dd|Xd)?\(", "BatchNorm(", str(model))


def check_name(name: str) -> None:
    """Check that there is a model of a name.

    Raises:
        UserError: There is none.
    """
    if is_import_path(name):
        if not callable(import_object(name, "--model.name")):
            raise UserError(f"--model.name {name}: not a function or class that makes a model.")
        return
    library, slash, own_name = name.partition("/")
    if name in MODELS or (slash and library in LIBRARIES and _is_of_library(library, own_name)):
        return
    known = [*MODELS, *(f"{library}/NAME" for library in LIBRARIES), "package.module:NAME"]
    raise UserError(f"--model.name {clipped(name)}: not a model; one of {', '.join(known)}.{_suggestion(name)}")


def check_model_kwargs(model_kwargs: Any) -> None:
    """Raise unless `model_kwargs` are arguments by name, without those that the model gets from elsewhere."""
    if not isinstance(model_kwargs, Mapping):
        raise UserError(
            f"--model.model_kwargs {clipped(str(model_kwargs))}: names and values, such as '{{widths: [32, 64, 128]}}'."
        )
    for name in model_kwargs:
        if not isinstance(name, str) or name in ("name", "num_classes", "image_size"):
            raise UserError(
                f"--model.model_kwargs: {clipped(str(name))} cannot be set here; "
                "set the model with --model.name, and classes and image size with the data."
            )


def choose_model(
    model: Any,
    name: str | None,
    num_classes: int,
    image_size: int,
    in_channels: int,
    model_kwargs: Any,
    pretrained: bool | str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the given model or else the one built by name, and the arguments of `build_model`.

    Raises:
        UserError: Neither a model nor a name is given, or both are; or `build_model` raises.
    """
    check_model_kwargs(model_kwargs or {})
    if "init_args" in (model_kwargs or {}):  # may name code, and is of `load_trained_model`, which checks it
        raise UserError("--model.model_kwargs: init_args cannot be set here; give the arguments by their own names.")
    architecture: dict[str, Any] = {"name": name, "num_classes": num_classes, "image_size": image_size}
    architecture |= ({} if in_channels == 3 else {"in_channels": in_channels}) | dict(model_kwargs or {})
    if model is None:
        if name is None:
            raise UserError(
                "this checkpoint is of a model of one's own: give model=... or name='package.module:name' again."
            )
        return build_model(**architecture), architecture
    if isinstance(model, type):
        raise UserError(f"model={model.__name__}: a class; give an instance, model={model.__name__}(...).")
    if not isinstance(model, nn.Module):
        raise UserError(f"model: a {type(model).__name__}; give an nn.Module that returns raw logits.")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise UserError(
            f"model: {type(model).__name__} has lazy layers, whose weights have no shape yet; call it once on images "
            f"of the data's size, such as model(torch.zeros(2, {in_channels}, {image_size}, {image_size})), or give "
            "--model.name, which does."
        )
    for argument, value in (("name", name), ("model_kwargs", model_kwargs), ("pretrained", pretrained)):
        if value and value != DEFAULT_MODEL:
            raise UserError(f"{argument}={clipped(repr(value))}: cannot be combined with model=...; leave one out.")
    return model, architecture


def torchvision_name(name: str) -> str | None:
    """Return a model's name in torchvision; None if it is not torchvision's."""
    library, slash, own_name = name.partition("/")
    if slash:
        return own_name if library == "torchvision" else None
    make = MODELS.get(name)
    return str(make.args[0]) if isinstance(make, partial) and make.func is torchvision_model else None


def _is_of_library(library: str, own_name: str) -> bool:
    # timm appends a tag of pretrained weights after a point.
    architecture = own_name.partition(".")[0] if library == "timm" else own_name
    try:
        return architecture in LIBRARIES[library].names()
    except UserError as error:  # not installed
        raise UserError(f"--model.name {library}/{clipped(own_name)}: {error}") from error


def _suggestion(name: str) -> str:
    library, slash, own_name = name.lower().replace("-", "_").partition("/")
    is_of_library = slash and library in LIBRARIES
    known: dict[str, str] = {}  # of equal names ours wins, then torchvision's
    for each in [library] if is_of_library else ["timm", "torchvision"]:
        if each != "timm" or is_timm_installed():
            with contextlib.suppress(UserError):  # timm cannot be imported
                known |= {other: f"{each}/{other}" for other in LIBRARIES[each].names()}
    if not is_of_library:
        known |= {other: other for other in MODELS}
    sought = own_name if slash else library
    return suggest(sought, known)
