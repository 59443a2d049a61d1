"""MixUp (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of whole batches: torchvision's, chosen by two strengths."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Mixed = tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]


class Mixing:
    """Mixes each image of a batch with its neighbour, and their targets in the same shares.

    The share is drawn once a batch, from Beta(strength, strength), by torch's global generator, whose state checkpoints
    keep. With both strengths above 0 a coin decides for each batch.

    Args:
        num_classes: Length of the mixed targets.
        mixup: Strength of blending; 0 is off, 0.2 usual.
        cutmix: Strength of pasting a rectangle; 0 is off, 1 usual.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        from torchvision.transforms import v2  # takes seconds to import

        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._ways = [kind(alpha=strength, num_classes=num_classes) for kind, strength in kinds if strength > 0]

    def __call__(self, images: Float[Tensor, "batch channels height width"], targets: Int64[Tensor, " batch"]) -> Mixed:
        """Return mixed images and their targets as shares of the classes, which add up to 1."""
        way = self._ways[0]
        if len(self._ways) > 1 and torch.rand(()).item() < 0.5:  # on the CPU: nothing waits for a device
            way = self._ways[1]
        mixed: Mixed = way(images, targets)
        return mixed
