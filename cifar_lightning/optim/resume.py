"""The optimizer and schedule settings of a resumed run, which a checkpoint overwrites with those of the run before."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class PlannedSettings:
    """Settings of an optimizer and its schedule before a checkpoint is loaded into them (Lightning #20310)."""

    groups: list[dict[str, Any]]  # of parameters
    phases: Any  # of OneCycle; None of other schedules

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> "PlannedSettings":
        """Read the settings of an optimizer and its schedule."""
        groups = [_settings_of(group) for group in optimizer.param_groups]
        return cls(groups, schedule.state_dict().get("_schedule_phases"))

    def are_in_force(self, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> bool:
        """Whether a checkpoint has brought the same settings; then nothing may change, for a bit-identical resume."""
        return PlannedSettings.of(optimizer, schedule) == self and has_planned_lrs(schedule)

    def apply_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the settings into the parameter groups; the schedule must be made again."""
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)


def has_planned_lrs(schedule: LRScheduler) -> bool:
    """Whether a loaded LambdaLR's learning rates are those of its own factors; OneCycle is compared by its phases."""
    if not isinstance(schedule, LambdaLR):
        return True
    factors = [shape(schedule.last_epoch) for shape in schedule.lr_lambdas]
    planned = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    return planned == schedule.get_last_lr()


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "lr", "betas")}
