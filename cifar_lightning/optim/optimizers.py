"""What moves the weights: AdamW, Nesterov SGD, or Muon with Nesterov SGD beside it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cifar_lightning.settings.limits import check_choice

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
        is_held = None if found_inf is None else found_inf > 0
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            directions = self._nesterov(moved, group["momentum"], group["weight_decay"], is_held)
            if group["role"] == "filters":
                directions = _orthogonalized(directions, group["num_iterations"])
                _renormalize(moved, is_held)
            if is_held is not None:
                torch._foreach_mul_(directions, 1 - is_held.to(directions[0].dtype))
            torch._foreach_add_(moved, directions, alpha=-group["lr"])
        return loss

    def _nesterov(
        self, parameters: list[Tensor], momentum: float, weight_decay: float, is_held: Tensor | None
    ) -> list[Tensor]:
        """Update the momentum of each parameter; return gradient + momentum * buffer, as torch.optim.SGD does.

        Where `is_held`, a bool scalar, is true, gradients count as 0 and the momentum stays: chosen on the device, so
        that the host need not wait, and with one short operation a tensor, since launching them is what takes time.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept: float | Tensor = momentum
        if weight_decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
        if is_held is not None:
            gradients = [torch.where(is_held, 0.0, gradient) for gradient in gradients]
            kept = torch.where(is_held, 1.0, momentum).to(gradients[0].dtype)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, kept)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))


def _orthogonalized(directions: list[Tensor], num_iterations: int) -> list[Tensor]:
    """Return the filters' directions made orthogonal, all of a shape by one batched product: ResNets have many."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, direction in enumerate(directions):
        by_shape[direction.shape].append(index)
    updates = list(directions)
    for shape, indices in by_shape.items():
        matrices = torch.stack([directions[index].reshape(shape[0], -1) for index in indices])
        for index, update in zip(indices, orthogonalize(matrices, num_iterations), strict=True):
            updates[index] = update.view(shape)
    return updates


def _renormalize(filters: list[Tensor], is_held: Tensor | None) -> None:
    """Bring each filter bank to the norm sqrt(out_channels), unless `is_held`."""
    roots = [math.sqrt(len(weight)) for weight in filters]
    scales = list(torch._foreach_norm(filters))
    torch._foreach_clamp_min_(scales, 1e-12)  # filters that begin at 0 stay there until their first update
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, roots)
    if is_held is not None:
        scales = list(torch.where(is_held, 1.0, torch.stack(scales)).unbind())
    torch._foreach_mul_(filters, scales)


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
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
