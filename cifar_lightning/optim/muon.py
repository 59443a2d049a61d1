"""Muon for convolution weights, Nesterov SGD for all other parameters."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Quintic whose iteration moves singular values into about 0.7-1.2 in few steps rather than to exactly 1 in many
# (Jordan, "Muon", https://kellerjordan.github.io/posts/muon/).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps filters along the orthogonalized Nesterov momentum, all other parameters by Nesterov SGD.

    Filters are matrices (out_channels, in_channels * height * width), kept at the norm sqrt(out_channels), which makes
    `lr` the relative size of a step. They need a BatchNorm after them, which makes their scale free. After
    airbench94_muon (KellerJordan/cifar10-airbench), which orthogonalizes in half precision; here in the filters' dtype.

    Where the attribute `found_inf`, a float tensor that NanGuard sets, is 1, a step changes nothing. GradScaler does
    not set it, as it does for torch's fused optimizers: it reads its own flag on the host and skips the step.

    Args:
        filters: Convolution weights.
        others: Parameter groups for SGD: `params`, and where they differ `lr`, `momentum` and `weight_decay`.
        lr: Peak learning rate of the filters.
        sgd_lr: Peak learning rate of the other parameters.
        momentum: Nesterov momentum of the filters.
        sgd_momentum: Nesterov momentum of the other parameters.
        num_iterations: Number of Newton-Schulz iterations.
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
        """Take a step; `closure` recomputes the gradients and returns the loss."""
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

        Where `is_held`, a bool scalar, is true, gradients count as 0 and the momentum stays. This is chosen on the
        device, without a sync, and with one operation a tensor, since launches are what takes time.
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
    """Orthogonalize the directions of filters, all of one shape in one batch: ResNets have many."""
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
    """Scale each filter bank to the norm sqrt(out_channels), unless `is_held`."""
    roots = [math.sqrt(len(weight)) for weight in filters]
    scales = list(torch._foreach_norm(filters))
    torch._foreach_clamp_min_(scales, 1e-12)  # filters of zeros stay zero until their first update
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, roots)
    if is_held is not None:
        scales = list(torch.where(is_held, 1.0, torch.stack(scales)).unbind())
    torch._foreach_mul_(filters, scales)


def orthogonalize(
    matrices: Float[Tensor, "batch rows columns"], num_iterations: int = 3
) -> Float[Tensor, "batch rows columns"]:
    """Return matrices with the same singular vectors and singular values near 1, by Newton-Schulz iteration.

    A zero matrix stays zero. 3 iterations are enough for an optimizer; 5 bring well-conditioned input to about 0.7 to
    1.2.
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
