"""Which numbers the flags take, and which ones an optimiser reads: for the classes and for what runs without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_lightning.errors import UserError


@dataclass(frozen=True)
class Limit:
    """The numbers that a flag takes.

    Args:
        low: The smallest, or with `above` the bound that must be exceeded.
        high: The bound that must not be reached, or with `through` the largest.
        advice: What the message says, in words.
        above: Whether `low` itself is refused.
        through: Whether `high` itself is taken.
    """

    low: float
    high: float
    advice: str
    above: bool = False
    through: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is taken; NaN never is."""
        over = value > self.low if self.above else value >= self.low
        return over and (value <= self.high if self.through else value < self.high)


_RATE = Limit(0, math.inf, "a positive finite number, such as 3e-3", above=True)
_COUNT = Limit(1, math.inf, "1 or more")
_PIXELS = Limit(0, math.inf, "0 (off) or more")
_SHARE = Limit(0, 1, "0 to below 1")
_STRENGTH = Limit(0, 1, "0 (off) to 1", through=True)
_MIX = Limit(0, math.inf, "0 (off) or more, such as 0.2")

LIMITS = {
    "seed_everything": Limit(0, 2**32, "0 to 4294967295, what NumPy takes"),
    "model.lr": _RATE,
    "model.sgd_lr": _RATE,
    "model.head_lr": _RATE,
    "model.momentum": _SHARE,
    "model.sgd_momentum": _SHARE,
    "model.weight_decay": Limit(0, math.inf, "0 or more"),
    "model.sgd_weight_decay": _SHARE,
    "model.label_smoothing": _SHARE,
    "model.mixup": _MIX,
    "model.cutmix": _MIX,
    "model.pct_start": _SHARE,
    "model.ema_decay": Limit(0, 1, "0 (off) to below 1, such as 0.999"),
    "model.stem_train_fraction": Limit(0, 1, "0 (never) to 1 (always)", through=True),
    "data.batch_size": _COUNT,
    "data.eval_batch_size": _COUNT,
    # 50 MB an image; far beyond what these networks are for, and a typo must not fill the disk.
    "data.image_size": Limit(1, 4096, "1 to 4096 pixels", through=True),
    "data.val_fraction": Limit(0, 1, "0 (train on all) to below 1, such as 0.1"),
    "data.limit": _COUNT,
    "data.seed": Limit(0, math.inf, "0 or more"),
    "data.num_workers": Limit(0, 1024, "0 (resident), or 1 to 1024 (streaming)", through=True),
    "data.crop_padding_px": _PIXELS,
    "data.cutout_px": _PIXELS,
    "data.brightness": _STRENGTH,
    "data.contrast": _STRENGTH,
    "data.erasing": Limit(0, 1, "0 (off) to 1 (every image)", through=True),
    "trainer.accumulate_grad_batches": Limit(1, 2**31, "1 or more, below 2^31"),  # a loss is divided by it
    "trainer.gradient_clip_val": Limit(0, math.inf, "0 (off) or more, such as 1"),
    "trainer.check_val_every_n_epoch": _COUNT,
    "trainer.val_check_interval": Limit(
        0, math.inf, "a share of an epoch, 0.5 for twice in one, or a number of batches", above=True
    ),
    "early_stopping.patience": Limit(0, math.inf, "0 or more validations, such as 10"),
    "early_stopping.min_delta": Limit(0, 1, "0 (any gain counts) to below 1, such as 0.001"),
    "checkpoint.every_n_train_steps": _COUNT,
    "checkpoint.every_n_minutes": Limit(0, math.inf, "a positive number of minutes, such as 10", above=True),
}


READ_BY = {
    "adamw": ("weight_decay",),
    "sgd": ("sgd_momentum", "weight_decay"),
    "muon": ("sgd_lr", "head_lr", "momentum", "sgd_momentum", "sgd_weight_decay"),
}
"""Which of the model's numbers each optimiser looks at, beside lr."""


def check_choice(flag: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a word that a flag does not know; the command line does so itself, this is for Python.

    Raises:
        UserError: Names the flag, the value and the choices.
    """
    if value not in choices:
        raise UserError(f"--{flag} {value}: one of {', '.join(choices)}.")


def check_limits(group: str, **values: float | None) -> None:
    """Refuse numbers that a flag does not take; None, a default that is found out later, is always taken.

    Args:
        group: What the flags begin with: model, data, early_stopping or checkpoint.
        **values: By the flags' last names.

    Raises:
        UserError: Names the flag, the value and what is taken.
    """
    for name, value in values.items():
        limit = LIMITS[f"{group}.{name}"]
        if value is not None and not limit.holds(value):
            raise UserError(f"--{group}.{name} {value}: {limit.advice}.")
