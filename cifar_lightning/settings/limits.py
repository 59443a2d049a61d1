"""Limits of settings: the ranges that annotate constructor arguments, and the check of a constructor's arguments.

A setting's range stands in its annotation, `Annotated[float, Field(gt=0, allow_inf_nan=False)]`; ranges of several
settings have a name below. Ranges of the Trainer's arguments stand in `cli.trainer_arguments`. LightningCLI enforces
them, `flags.json` and the help are generated from them, and `check_settings` enforces them for calls from Python.
`description` is what an error message says is allowed, where the bounds alone would not do.
"""

import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

from cifar_lightning.errors import UserError
from cifar_lightning.settings.comparison import Bounds, within

_UNIONS = (typing.Union, types.UnionType)
_NAMES = ("gt", "ge", "lt", "le")

# Torch raises where a factor of a step is above 3.4e38, the largest of float32; 1e30 leaves room for products.
LearningRate = Annotated[
    float, Field(gt=0, le=1e30, allow_inf_nan=False, description="a positive number up to 1e30, such as 3e-3")
]
WeightDecay = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False, description="0 (off) to 1e30, such as 0.05")]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="0 (off) to 1")]
MixStrength = Annotated[
    float, Field(ge=0, le=1000, allow_inf_nan=False, description="0 (off), or 0.02 to 1000, such as 0.2")
]
Pixels = Annotated[int, Field(ge=0, le=4096, description="0 (off) to 4096")]
Count = Annotated[int, Field(ge=1, lt=2**31, description="1 or more, below 2^31")]
# 50 MB per image; far beyond what these models are for, and a typo must not fill the disk.
ImageSize = Annotated[int, Field(ge=1, le=4096, description="1 to 4096 pixels")]


def check_settings(prefix: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse arguments outside the limits in a function's annotations; None stands for a default and passes.

    Args:
        prefix: What the error names before a point and the argument, such as the group of the flags: model, data.
        function: A constructor, or a dataclass.
        values: Argument values by name; other names are ignored.
    """
    for name, annotation in typing.get_type_hints(function, include_extras=True).items():
        check_setting(f"{prefix}.{name}", annotation, values.get(name))


def check_setting(flag: str, annotation: Any, value: object) -> None:
    """Refuse a value outside the limits, or not among the choices, of one annotation."""
    if value is None:
        return
    for kind in members(annotation):
        if typing.get_origin(kind) is list:
            for item in value if isinstance(value, list) else ():
                check_setting(flag, typing.get_args(kind)[0], item)
        elif typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            raise UserError(f"--{flag} {value}: one of {', '.join(map(str, typing.get_args(kind)))}.")
        elif typing.get_origin(kind) is Annotated:
            bounds, allowed = limits_of(kind)
            number = Integral if typing.get_args(kind)[0] is int else Real
            if bounds and not (isinstance(value, number) and within(typing.cast("float", value), bounds)):
                raise UserError(f"--{flag} {value}: {allowed}.")


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)


def limits_of(annotation: Any) -> tuple[Bounds, str]:
    """Return the bounds in an `Annotated` type, and what a message says is allowed; both empty without a `Field`."""
    for field in typing.get_args(annotation)[1:]:
        if isinstance(field, FieldInfo):
            bounds = {name: getattr(limit, name) for limit in field.metadata for name in _NAMES if hasattr(limit, name)}
            return bounds, field.description or _in_words(bounds)
    return {}, ""


def _in_words(bounds: Bounds) -> str:
    """Return the bounds as a message says them: "1 or more", "0 to below 1"."""
    low = str(bounds["ge"]) if "ge" in bounds else f"above {bounds['gt']}"
    if "le" in bounds:
        return f"{low} to {bounds['le']}"
    if "lt" in bounds:
        return f"{low} to below {bounds['lt']}"
    return f"{low} or more" if "ge" in bounds else low
