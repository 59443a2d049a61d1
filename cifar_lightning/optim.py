"""What moves the weights: parameter groups, the optimiser and its schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from cifar_lightning.errors import UserError


def check_lr(lr: float) -> None:
    """Raise `UserError` where a learning rate is not a positive finite number: such a run "finishes" with nothing."""
    if not (math.isfinite(lr) and lr > 0):
        raise UserError(f"--model.lr {lr}: a positive finite number, such as 3e-3.")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay (matrices and filters) and those that do not.

    Norm scales and biases have one dimension and get no weight decay: pulling them to zero shrinks the signal instead
    of simplifying the function (arXiv:1812.01187, section 3.1).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`, in one kernel where all parameters allow it."""
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.is_floating_point() and parameter.device.type in {"cpu", "cuda"} for parameter in parameters)
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def one_cycle(optimizer: torch.optim.Optimizer, *, lr: float, total_steps: int, pct_start: float) -> OneCycleLR:
    """Return the schedule: lr/25 up to `lr` for `pct_start` of the steps, then a cosine down to almost 0.

    It is stepped after every optimiser step (arXiv:1708.07120, with PyTorch's defaults).
    """
    return OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps, pct_start=pct_start)
