"""How the learning rate goes over a run: OneCycle, a straight line to 0, or half a cosine; stepped after every step."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from cifar_lightning.settings.limits import check_choice

ScheduleName = Literal["one_cycle", "linear", "cosine"]
_ONE_CYCLE_RISE = 0.3  # PyTorch's default


def warmup_fraction(name: ScheduleName, pct_start: float | None) -> float:
    """Return the share of the steps in which the rates rise: what was asked for, or what the schedule is known by."""
    if pct_start is not None:
        return pct_start
    return _ONE_CYCLE_RISE if name == "one_cycle" else 0.0


def make_schedule(
    optimizer: torch.optim.Optimizer,
    name: ScheduleName,
    *,
    total_steps: int,
    pct_start: float | None = None,
    stem_steps: int | None = None,
    steps_done: int | None = None,
) -> LRScheduler:
    """Return the schedule of every group.

    - "one_cycle": lr/25 up to lr along half a cosine, then along another down to almost 0 (arXiv:1708.07120, with
      PyTorch's defaults, which cycle AdamW's first beta; momentum stays what the flag says);
    - "linear": from lr in a straight line to 0, as in the speed records;
    - "cosine": from lr along half a cosine to 0 (arXiv:1608.03983, without restarts).

    The last two begin with a line from 0 up to lr where `pct_start` asks for one.

    Args:
        optimizer: Its groups' `lr` are the peaks, or with `steps_done` what the schedule before has noted as such.
        name: Which.
        total_steps: Of the whole run.
        pct_start: Share of the steps in which the rates rise; None is `warmup_fraction`'s.
        stem_steps: When the group whose `role` is "stem" has arrived at 0 with "linear" or "cosine"; None is
            `total_steps`.
        steps_done: Take up the schedule after this many steps, in an optimiser that has had one before.

    Raises:
        UserError: An unknown name.
    """
    check_choice("model.schedule", name, get_args(ScheduleName))
    share = warmup_fraction(name, pct_start)
    last_epoch = -1 if steps_done is None else steps_done - 1  # the constructor takes the step itself
    if name == "one_cycle":
        return _one_cycle(optimizer, total_steps, share, last_epoch)
    shape = _fall_in_a_line if name == "linear" else _fall_along_a_cosine
    ends = [
        stem_steps if stem_steps is not None and group.get("role") == "stem" else total_steps
        for group in optimizer.param_groups
    ]
    factors = [_rise_and_fall(end, round(share * end), shape) for end in ends]
    return LambdaLR(optimizer, factors, last_epoch=last_epoch)


def follows_plan(schedule: LRScheduler) -> bool:
    """Whether the rates that a checkpoint brought are those of this plan; of OneCycle its phases are to be compared."""
    if not isinstance(schedule, LambdaLR):
        return True
    factors = [shape(schedule.last_epoch) for shape in schedule.lr_lambdas]
    planned = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    return planned == schedule.get_last_lr()


def _one_cycle(optimizer: torch.optim.Optimizer, total_steps: int, share: float, last_epoch: int) -> OneCycleLR:
    peaks = [group["lr"] if last_epoch == -1 else group["max_lr"] for group in optimizer.param_groups]
    if share * total_steps == 1:
        share *= 1 + 1e-6  # a rise that ends exactly at step 0 is a division by zero in OneCycleLR
    options: dict[str, Any] = {"cycle_momentum": isinstance(optimizer, torch.optim.AdamW), "last_epoch": last_epoch}
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=total_steps, pct_start=share, **options)


def _rise_and_fall(end: int, rise: int, fall: Callable[[float], float]) -> Callable[[int], float]:
    """Return a step's factor of the peak: a line up that has arrived after `rise` steps, then `fall` of 0 to 1."""

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)  # the first step moves, too
        return fall((step - rise) / (end - rise)) if step < end else 0.0

    return factor


def _fall_in_a_line(done: float) -> float:
    return 1 - done


def _fall_along_a_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
