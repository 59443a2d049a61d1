"""The optimizer and schedule settings of a resumed run, which a checkpoint overwrites with those of the run before."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def planned_settings(optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> tuple[list[dict[str, Any]], Any]:
    """Return the settings of the parameter groups, but for what changes by step, and the phases of OneCycle or None.

    Runs of older versions have False for a `fused` of None.
    """
    by_step = ("params", "lr", "betas")
    groups = [
        {name: bool(value) if name == "fused" else value for name, value in group.items() if name not in by_step}
        for group in optimizer.param_groups
    ]
    return groups, schedule.state_dict().get("_schedule_phases")


def use_fused(optimizer: torch.optim.Optimizer) -> None:
    """Step with the kernels that this run has chosen, and have the loaded counts of steps where these read them.

    Those of a fused optimizer are on the device of their parameter, others on the CPU.
    """
    fused = optimizer.defaults.get("fused")
    for group in optimizer.param_groups:
        if "fused" not in group:
            continue
        group["fused"] = fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(step := state.get("step"), Tensor):
                state["step"] = step.to(parameter.device if fused else "cpu")


def has_planned_lrs(schedule: LRScheduler) -> bool:
    """Whether a loaded LambdaLR's learning rates are those of its own factors; OneCycle is compared by its phases."""
    if not isinstance(schedule, LambdaLR):
        return True
    factors = [shape(schedule.last_epoch) for shape in schedule.lr_lambdas]
    planned = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    return planned == schedule.get_last_lr()
