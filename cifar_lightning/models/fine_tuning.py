"""Layers of a model for fine-tuning: those that are frozen, and the learning rate of each by its depth."""

import importlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, suggest
from cifar_lightning.models.pretrained import heads_of

BACKBONE = "backbone"
"""All layers but the head, in place of globs."""


class FrozenLayers:
    """Parameters that are not trained, and the norms among them, which keep their statistics.

    Args:
        model: Its frozen parameters no longer require gradients.
        globs: Of names of parameters, or of modules with all that they hold; or `BACKBONE`.
        num_classes: Tells the head.
        unfreeze_epoch: Number of epochs after which the parameters are trained; None is never.

    Raises:
        UserError: A glob matches no parameter, or nothing is left to train.
    """

    def __init__(
        self, model: nn.Module, globs: str | Sequence[str], num_classes: int, unfreeze_epoch: int | None = None
    ) -> None:
        self.unfreeze_epoch, self._is_frozen_now = unfreeze_epoch, True
        self._globs, self._num_classes = [globs] if isinstance(globs, str) else list(globs), num_classes
        self._heads = heads_of(model, num_classes, "--model.freeze") if BACKBONE in self._globs else ()
        names = [name for name, _ in model.named_parameters()]
        for glob in self._globs:
            if glob != BACKBONE and not any(_matches(name, glob) for name in names):
                known = [*names, *(name for name, _ in model.named_modules()), BACKBONE]
                raise UserError(f"--model.freeze {clipped(glob)}: no parameter of the model.{suggest(glob, known)}")
        self.parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and self._is_frozen(name)
        ]
        self._norms = [
            module
            for prefix, module in model.named_modules()
            if getattr(module, "track_running_stats", False)
            and all(self._is_frozen(f"{prefix}.{name}") for name in dict(module.named_parameters()) or ("weight",))
        ]
        self.set_epoch(0)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"--model.freeze {clipped(str(globs))}: leaves no parameter to train.")

    def _is_frozen(self, name: str) -> bool:
        return any(
            not name.startswith(self._heads) if glob == BACKBONE else _matches(name, glob) for glob in self._globs
        )

    def of(self, model: nn.Module) -> "FrozenLayers":
        """Return the frozen layers of a model that has replaced the one at hand, or these of the same."""
        if set(model.parameters()).intersection(self.parameters):
            return self
        return FrozenLayers(model, self._globs, self._num_classes, self.unfreeze_epoch)

    def set_epoch(self, epoch: int, num_processes: int = 1) -> None:
        """Freeze the parameters, or have them trained from `unfreeze_epoch` on.

        DDP fixes before the first step which gradients it exchanges. With several processes those of parameters that
        are trained later are therefore computed from the start, and dropped.
        """
        self._is_frozen_now = self.unfreeze_epoch is None or epoch < self.unfreeze_epoch
        needs_gradients = not self._is_frozen_now or (self.unfreeze_epoch is not None and num_processes > 1)
        for parameter in self.parameters:
            parameter.requires_grad_(needs_gradients)

    def set_mode(self, training: bool) -> None:
        """Set the mode of the norms, which is eval while they are frozen."""
        for norm in self._norms:
            norm.train(training and not self._is_frozen_now)

    def drop_gradients(self) -> None:
        """Have the optimizer skip the parameters while they are frozen."""
        for parameter in self.parameters if self._is_frozen_now else ():
            parameter.grad = None


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")


def lr_scales(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """Return the factor of each parameter's learning rate: `layer_decay` to the number of layers above its own.

    As timm does (arXiv:2106.08254, appendix), with timm's grouping where the model has one. Otherwise a layer is a
    child of the model, or an element of a Sequential or ModuleList that holds most of it. Parameters of the model
    itself, such as position embeddings, are in the first layer, and a norm between two layers is in the one before it.
    """
    if hasattr(model, "group_matcher"):
        group = importlib.import_module("timm.models").group_parameters
        matcher: Any = model.group_matcher
        layers: dict[str, int] = group(model, matcher(coarse=False), reverse=True)
    else:
        layers = _layers_by_block(model)
    last = max(layers.values(), default=0)
    return {parameter: layer_decay ** (last - layers[name]) for name, parameter in model.named_parameters()}


def _layers_by_block(model: nn.Module) -> dict[str, int]:
    half = _num_parameters(model) / 2
    layers, num_layers = dict[str, int](), 0

    def visit(prefix: str, module: nn.Module) -> None:
        nonlocal num_layers
        containers = [child for child in module.children() if type(child) in (nn.Sequential, nn.ModuleList)]
        is_list = type(module) in (nn.Sequential, nn.ModuleList)
        if module is model or is_list or sum(map(_num_parameters, containers)) > half:
            layers.update({f"{prefix}{name}": 0 for name, _ in module.named_parameters(recurse=False)})
            for name, child in module.named_children():
                visit(f"{prefix}{name}.", child)
            return
        named = dict(module.named_parameters())
        num_layers += any(parameter.ndim > 1 for parameter in named.values())
        layers.update({f"{prefix}{name}": max(0, num_layers - 1) for name in named})

    visit("", model)
    return layers


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
