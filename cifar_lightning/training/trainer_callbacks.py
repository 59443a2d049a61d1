"""The callbacks of a Trainer."""

from typing import TypeVar

import lightning.pytorch as pl

_Kind = TypeVar("_Kind", bound=pl.Callback)


def callbacks_of(trainer: pl.Trainer, kind: type[_Kind]) -> list[_Kind]:
    """Return the Trainer's callbacks of a class and its subclasses, in their order."""
    return [each for each in trainer.callbacks if isinstance(each, kind)]  # type: ignore[attr-defined]  # set by a connector
