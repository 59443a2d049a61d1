"""Comparison of a number with bounds, without pydantic, for quick commands. The bounds themselves are in `limits`."""

import math
import operator
from collections.abc import Mapping

Bounds = Mapping[str, float]
"""Some of gt, ge, lt, le, as pydantic's `Field` names them."""


def within(number: float, bounds: Bounds) -> bool:
    """Whether a number is finite and within the bounds."""
    return abs(number) < math.inf and all(getattr(operator, name)(number, bound) for name, bound in bounds.items())
