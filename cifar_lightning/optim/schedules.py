"""Learning rate schedules: OneCycle, linear and cosine; stepped after every optimizer step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

ScheduleName = Literal["one_cycle", "linear", "cosine"]
_ONE_CYCLE_WARMUP = 0.3  # PyTorch's default


@dataclass(frozen=True)
class ScheduleSettings:
    """Settings of a schedule; the fields are documented as flags in `ImageClassifier`."""

    name: ScheduleName
    pct_start: float | None  # None is 0.3 of "one_cycle", 0 of others
    stem_train_fraction: float  # of the group whose `role` is "stem", with "linear" or "cosine"

    @property
    def warmup_fraction(self) -> float:
        """Fraction of the steps in which the learning rate rises."""
        if self.pct_start is not None:
            return self.pct_start
        return _ONE_CYCLE_WARMUP if self.name == "one_cycle" else 0.0

    def stem_steps(self, total_steps: int) -> int:
        """Return the number of steps in which the stem is trained."""
        return round(self.stem_train_fraction * total_steps)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: ScheduleSettings, *, total_steps: int, steps_done: int | None = None
) -> LRScheduler:
    """Return the schedule of every parameter group.

    - "one_cycle": from lr/25 to lr along half a cosine, then to almost 0 along another (arXiv:1708.07120, with
      PyTorch's defaults, which also cycle AdamW's first beta; momentum stays constant);
    - "linear": from lr to 0 in a line, as in the CIFAR-10 speed records;
    - "cosine": from lr to 0 along half a cosine (arXiv:1608.03983, without restarts).

    The last two begin with a linear warmup where `pct_start` asks for one.

    Args:
        optimizer: Its groups' `lr` are the peaks; with `steps_done`, the peaks are those that an earlier schedule has
            stored in the groups.
        settings: Which schedule, and its values.
        total_steps: Number of steps of the whole run.
        steps_done: Resume after this many steps, with an optimizer that had a schedule before.
    """
    last_epoch = -1 if steps_done is None else steps_done - 1  # the constructor takes one step itself
    if settings.name == "one_cycle":
        return _one_cycle(optimizer, total_steps, settings.warmup_fraction, last_epoch)
    shape: Callable[[float], float] = (lambda done: 1 - done) if settings.name == "linear" else _half_cosine
    stem_steps = settings.stem_steps(total_steps)
    ends = [stem_steps if group.get("role") == "stem" else total_steps for group in optimizer.param_groups]
    factors = [_warmup_and_decay(end, round(settings.warmup_fraction * end), shape) for end in ends]
    return LambdaLR(optimizer, factors, last_epoch=last_epoch)


def _one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, warmup: float, last_epoch: int) -> OneCycleLR:
    peaks = [group["lr"] if last_epoch == -1 else group["max_lr"] for group in optimizer.param_groups]
    if warmup * total_steps == 1:
        warmup *= 1 + 1e-6  # a warmup that ends exactly at step 0 is a division by zero in OneCycleLR
    options: dict[str, Any] = {"cycle_momentum": isinstance(optimizer, torch.optim.AdamW), "last_epoch": last_epoch}
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=total_steps, pct_start=warmup, **options)


def _warmup_and_decay(end: int, warmup: int, decay: Callable[[float], float]) -> Callable[[int], float]:
    """Return the factor of the peak at a step: a linear warmup of `warmup` steps, then `decay` of 0 to 1."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)  # the first step is above 0
        return decay((step - warmup) / (end - warmup)) if step < end else 0.0

    return factor


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
