"""What moves the weights: AdamW, Nesterov SGD, or Muon with Nesterov SGD beside it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

OptimizerName = Literal["adamw", "sgd", "muon"]

# Quintic whose iteration moves singular values into about 0.7-1.2 in few steps rather than to exactly 1 in many
# (Jordan, "Muon", https://kellerjordan.github.io/posts/muon/).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


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
    """
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


class Muon(torch.optim.Optimizer):
    """Moves filters along the nearest orthogonal matrix of their momentum, all else by Nesterov SGD, as one optimiser.

    Filters are taken as matrices (out_channels, in_channels * height * width) and kept at the norm sqrt(out_channels),
    which makes `lr` the relative size of a step; a BatchNorm must follow them, since it makes their scale free.
    After airbench94_muon (KellerJordan/cifar10-airbench), which orthogonalises in half precision; here in the filters'.
    Where `found_inf`, a float tensor that a guard sets as an attribute, is 1, a step changes nothing. GradScaler sets
    none here, as it does for torch's fused optimisers: it reads its own flag on the host and leaves the step out.

    Args:
        filters: Convolution weights.
        others: Groups of the parameters that SGD moves, as torch's optimisers take them: `params`, and where they
            differ `lr`, `momentum` and `weight_decay`.
        lr: Peak learning rate of the filters.
        sgd_lr: Peak learning rate of the others.
        momentum: Of the filters, Nesterov.
        sgd_momentum: Of the others, Nesterov.
        num_iterations: Newton-Schulz steps.
    """

    def __init__(
        self,
        filters: Iterable[Tensor],
        others: Iterable[dict[str, Any]],
        *,
        lr: float = 0.05,
        sgd_lr: float = 0.1,
        momentum: float = 0.9,
        sgd_momentum: float = 0.9,
        num_iterations: int = 3,
    ) -> None:
        sgd = {"lr": sgd_lr, "momentum": sgd_momentum}
        groups = [
            {"params": list(filters), "lr": lr, "momentum": momentum, "role": "filters"},
            *({**sgd, **group} for group in others),
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"num_iterations": num_iterations, "weight_decay": 0.0, "role": "others"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` recomputes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            before = [] if found_inf is None else self._state_of(moved)
            directions = self._nesterov(moved, group["momentum"], group["weight_decay"])
            if group["role"] == "filters":
                self._step_filters(moved, directions, group)
            elif moved:
                torch._foreach_add_(moved, directions, alpha=-group["lr"])
            if found_inf is not None:
                for tensor, old in before:  # chosen on the device: the host does not wait
                    tensor.copy_(torch.where(found_inf > 0, old, tensor))
        return loss

    def _state_of(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors that a step changes, each with a copy."""
        tensors = [*parameters, *self._buffers(parameters)]
        return [(tensor, tensor.clone()) for tensor in tensors]

    def _buffers(self, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]

    def _nesterov(self, parameters: list[Tensor], momentum: float, weight_decay: float) -> list[Tensor]:
        """Update the momentum of each parameter; return gradient + momentum * buffer, as torch.optim.SGD does."""
        if not parameters:
            return []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
        buffers = self._buffers(parameters)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))

    def _step_filters(self, filters: list[Tensor], directions: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, direction in zip(filters, directions, strict=True):
            by_shape[weight.shape].append((weight, direction))
        for shape, pairs in by_shape.items():
            # One batched product for all filters of a shape: ResNets have many alike.
            matrices = torch.stack([direction.reshape(shape[0], -1) for _, direction in pairs])
            updates = orthogonalize(matrices, group["num_iterations"])
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(math.sqrt(shape[0]) / weight.norm())
                weight.add_(update.view(shape), alpha=-group["lr"])


def orthogonalize(
    matrices: Float[Tensor, "batch rows columns"], num_iterations: int = 3
) -> Float[Tensor, "batch rows columns"]:
    """Return matrices with the same singular vectors and singular values near 1, by Newton-Schulz iteration.

    Args:
        matrices: Of full rank; a zero matrix stays zero.
        num_iterations: 3 are enough for an optimiser; 5 bring well-conditioned input to about 0.7 to 1.2.
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices  # the smaller Gram matrix is cheaper
    # The Frobenius norm bounds the largest singular value, beyond which the iteration diverges.
    x: Tensor = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x
