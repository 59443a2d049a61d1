"""Optimizers: AdamW, Nesterov SGD, Muon with Nesterov SGD, and timm's by name."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, raised_by, suggest
from cifar_lightning.optim.muon import Muon
from cifar_lightning.settings.import_path import import_timm, is_import_path

OPTIMIZERS = ("adamw", "sgd", "muon")
# Kron's own generator is in its state_dict (timm 1.0.20 to 1.0.31), and it draws from torch's, which a run restores; a
# resume of its compiled step is not tested. Adahessian differentiates gradients, which have no graph here.
_UNUSABLE = dict.fromkeys(("timm/kron", "timm/kronc", "timm/kronw"), "a resumed run would not be the same")
_UNUSABLE |= {"timm/adahessian": "needs second derivatives, which are not computed"}


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of an optimizer; the fields are documented as flags in `ImageClassifier`."""

    name: str  # of OPTIMIZERS, or timm/NAME
    lr: float
    sgd_lr: float
    head_lr: float | None
    momentum: float
    sgd_momentum: float
    weight_decay: float
    sgd_weight_decay: float

    def __post_init__(self) -> None:
        check_optimizer(self.name)

    def with_lr(self, lr: float) -> "OptimizerSettings":
        """Return the settings with another peak learning rate; with muon the others keep their ratios to it."""
        if self.name != "muon":
            return replace(self, lr=lr)
        ratio = lr / self.lr
        head_lr = None if self.head_lr is None else self.head_lr * ratio
        return replace(self, lr=lr, sgd_lr=self.sgd_lr * ratio, head_lr=head_lr)


def check_optimizer(name: str) -> None:
    """Check that there is an optimizer of a name.

    Raises:
        UserError: There is none, timm is not installed, or a run with this one could not be trained or resumed.
    """
    if name in OPTIMIZERS:
        return
    typed, known = f"--model.optimizer {clipped(str(name))}", [*OPTIMIZERS]
    if str(name).startswith("timm/"):
        try:
            known = [f"timm/{each}" for each in import_timm().optim.list_optimizers()]
        except UserError as error:
            raise UserError(f"{typed}: {error}") from error
    if name not in known:
        hint = f" Your own by its class: --optimizer {name}." if is_import_path(name) else suggest(str(name), known)
        raise UserError(f"{typed}: one of {', '.join(OPTIMIZERS)}, or timm/NAME.{hint}")
    if reason := _UNUSABLE.get(name):
        raise UserError(f"{typed}: {reason}; give another one.")


def build_optimizer(
    model: nn.Module,
    settings: OptimizerSettings,
    *,
    fused: bool | None = True,
    later: Collection[nn.Parameter] = (),
    others: Iterable[nn.Parameter] = (),
    lr_scales: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of a model.

    Args:
        model: Its parameters that require gradients are optimized. With muon, those in its `stem`, if it has one, are
            a group of their own, which a schedule may end early.
        settings: Which optimizer, and its values.
        fused: Whether AdamW and SGD run as one kernel; Lightning cannot clip their gradients in mixed precision. None:
            torch chooses, a few kernels for all parameters on a GPU.
        later: Parameters that will require gradients later in the run.
        others: Parameters outside the model, of a loss or a subclass, trained as norms are: without weight decay.
        lr_scales: Factors of the learning rates, not with muon; each has groups of its own, the largest first.

    Raises:
        UserError: Factors with muon, or an optimizer of timm that cannot be made here.
    """
    is_later = set(later)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad or parameter in is_later]
    if settings.name == "muon":
        if lr_scales is not None:
            raise UserError("--model.layer_decay: not with muon, which keeps the norm of filters; give adamw or sgd.")
        return _build_muon(trainable, [*others], getattr(model, "stem", nn.Module()), settings)
    # Norm scales and biases have one dimension and get no weight decay: pulling them to zero shrinks the signal instead
    # of simplifying the function (arXiv:1812.01187, section 3.1).
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [*(parameter for parameter in trainable if parameter.ndim <= 1), *others]
    decays: list[tuple[list[nn.Parameter], float]] = [(matrices, settings.weight_decay), (vectors, 0.0)]
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    if lr_scales is not None:
        groups = _scaled(groups, settings.lr, lr_scales)
    if settings.name == "sgd":
        momentum = settings.sgd_momentum
        return torch.optim.SGD(groups, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
    make, name = import_timm().optim.create_optimizer_v2, settings.name.removeprefix("timm/")
    try:
        optimizer: torch.optim.Optimizer = make(groups, opt=name, lr=settings.lr, weight_decay=settings.weight_decay)
    except Exception as error:  # some assert that there is a GPU, or another library
        raise UserError(f"--model.optimizer {settings.name}: cannot be made here ({raised_by(error)}).") from error
    return optimizer


def keep_ratios(optimizer: torch.optim.Optimizer) -> None:
    """Keep the ratios of the groups' learning rates to the first one's, where an LR finder sets one for all groups."""
    ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]

    def follow(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = ratio * optimizer.param_groups[0]["lr"]

    optimizer.register_step_pre_hook(follow)


def _scaled(groups: list[dict[str, Any]], lr: float, lr_scales: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    return [
        {**group, "lr": lr * scale, "params": parameters}
        for scale in sorted({1.0, *lr_scales.values()}, reverse=True)
        for group in groups
        if (parameters := [parameter for parameter in group["params"] if lr_scales.get(parameter, 1) == scale])
    ]


def _build_muon(
    trainable: list[nn.Parameter], others: list[nn.Parameter], stem: nn.Module, settings: OptimizerSettings
) -> Muon:
    in_stem = {id(parameter) for parameter in stem.parameters()}
    head_lr = settings.sgd_lr if settings.head_lr is None else settings.head_lr
    lrs = {"stem": settings.sgd_lr, "vectors": settings.sgd_lr, "matrices": head_lr}
    by_role: dict[str, list[Tensor]] = {role: [] for role in lrs}
    for parameter in trainable:
        if parameter.ndim != 4:
            role = "matrices" if parameter.ndim > 1 else "vectors"
            by_role["stem" if id(parameter) in in_stem else role].append(parameter)
    by_role["vectors"] += others
    groups: list[dict[str, Any]] = [
        {"params": by_role[role], "lr": lr, "role": role, "weight_decay": settings.sgd_weight_decay / lr}
        for role, lr in lrs.items()
    ]
    filters = [parameter for parameter in trainable if parameter.ndim == 4]
    return Muon(filters, groups, lr=settings.lr, momentum=settings.momentum, sgd_momentum=settings.sgd_momentum)
