"""Whether a number is within bounds, and the bounds in words. Imports no pydantic, for quick commands.

The bounds of a setting stand in its annotation, in the signature of `ImageClassifier` or `ImageDataModule`.
"""

import math
import operator
from collections.abc import Mapping

Bounds = Mapping[str, float]
"""Some of gt, ge, lt, le, as pydantic's `Field` names them."""


def within(number: float, bounds: Bounds) -> bool:
    """Whether a number is finite and within the bounds."""
    return math.isfinite(number) and all(getattr(operator, name)(number, bound) for name, bound in bounds.items())


def in_words(bounds: Bounds) -> str:
    """Return the bounds as a message says them: "1 or more", "0 to below 1"."""
    low = str(bounds["ge"]) if "ge" in bounds else f"above {bounds['gt']}"
    if "le" in bounds:
        return f"{low} to {bounds['le']}"
    if "lt" in bounds:
        return f"{low} to below {bounds['lt']}"
    return f"{low} or more" if "ge" in bounds else low
