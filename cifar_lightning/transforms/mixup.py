"""MixUp (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of batches, by torchvision."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cifar_lightning.errors import UserError

# Below it, both draws of a Beta can underflow to 0, and their proportion to 0/0.
_LEAST_ALPHA = 0.02

Mixed = tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]


class Mixing:
    """Mixes each image of a batch with its neighbour, and their targets in the same proportion.

    The proportion is drawn once per batch from Beta(alpha, alpha) by torch's global generator, whose state checkpoints
    hold. With both alphas above 0 one of the two is chosen at random for each batch; 0 disables one.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        from torchvision.transforms import v2  # takes seconds to import

        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if 0 < alpha < _LEAST_ALPHA:
                raise UserError(f"--model.{name} {alpha}: 0 (off), or {_LEAST_ALPHA} or more, such as 0.2.")
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._transforms = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]

    def __call__(self, images: Float[Tensor, "batch channels height width"], targets: Int64[Tensor, " batch"]) -> Mixed:
        """Return mixed images and their targets as class probabilities."""
        transform = self._transforms[0]
        if len(self._transforms) > 1 and torch.rand(()).item() < 0.5:  # on the CPU: no device is waited for
            transform = self._transforms[1]
        mixed: Mixed = transform(images, targets)
        return mixed
