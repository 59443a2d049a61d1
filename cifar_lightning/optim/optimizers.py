"""What moves the weights: AdamW, Nesterov SGD, or Muon with Nesterov SGD beside it."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cifar_lightning.optim.muon import Muon
from cifar_lightning.settings.limits import check_choice

OptimizerName = Literal["adamw", "sgd", "muon"]


def build_optimizer(
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float,
    sgd_lr: float,
    head_lr: float | None = None,
    momentum: float = 0.9,
    sgd_momentum: float = 0.9,
    sgd_weight_decay: float = 0.0,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Make the optimiser of a network.

    Args:
        model: Its parameters that require gradients are optimised; what lies in its `stem`, if it has one, may be
            scheduled apart.
        name: "adamw", "sgd" (Nesterov), or "muon" for the filters with Nesterov SGD for norms, biases and the linear
            layers.
        lr: Of AdamW, of SGD, or of Muon.
        weight_decay: Of AdamW and SGD, for parameters with two or more dimensions; Muon renormalises filters instead.
        sgd_lr: Of the norms and biases, which Muon does not move.
        head_lr: Of the linear layers, which Muon does not move either; None is `sgd_lr`.
        momentum: Muon's, of the filters.
        sgd_momentum: Of SGD, alone or beside Muon.
        sgd_weight_decay: Share of what Muon does not move that a step at the peak rate takes away, before momentum
            multiplies it.
        fused: Whether AdamW and SGD may run as one kernel; Lightning cannot clip gradients beside it in 16-mixed.

    Raises:
        UserError: An unknown name.
    """
    check_choice("model.optimizer", name, get_args(OptimizerName))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "muon":
        in_stem = {id(parameter) for parameter in getattr(model, "stem", nn.Module()).parameters()}
        filters = [parameter for parameter in trainable if parameter.ndim == 4]
        others = [parameter for parameter in trainable if parameter.ndim != 4]
        head_lr = sgd_lr if head_lr is None else head_lr
        rates = {"stem": sgd_lr, "vectors": sgd_lr, "matrices": head_lr}
        by_role: dict[str, list[Tensor]] = {role: [] for role in rates}
        for parameter in others:
            role = "matrices" if parameter.ndim > 1 else "vectors"
            by_role["stem" if id(parameter) in in_stem else role].append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": by_role[role], "lr": rate, "role": role, "weight_decay": sgd_weight_decay / rate}
            for role, rate in rates.items()
        ]
        return Muon(filters, groups, lr=lr, momentum=momentum, sgd_momentum=sgd_momentum)
    # Norm scales and biases have one dimension and get no weight decay: pulling them to zero shrinks the signal instead
    # of simplifying the function (arXiv:1812.01187, section 3.1).
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=sgd_momentum, nesterov=sgd_momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return what was chosen for a parameter group: all but its parameters and what the schedule moves."""
    return {name: value for name, value in group.items() if name not in ("params", "lr", "betas")}
