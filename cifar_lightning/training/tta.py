"""Test-time augmentation: logits averaged over flipped and shifted copies of an image."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cifar_lightning.settings.limits import check_setting

TTA = Literal["none", "mirror", "six"]


def tta_logits(
    model: Callable[[Tensor], Tensor], images: Float[Tensor, "batch channels height width"], tta: TTA
) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
    """Return a model's logits averaged over copies of each normalized image, and its logits without TTA.

    "mirror" is the mean of an image and its mirror image; "six", as in airbench, these two with weight 1/4 each, and
    both shifted by a pixel up-left and down-right with weight 1/8 each, reflected at the border.
    """
    check_setting("model.tta", TTA, tta)
    plain = model(images)
    if tta == "none":
        return plain, plain
    averaged = 0.5 * plain + 0.5 * model(images.flip(-1))
    if tta == "mirror":
        return averaged, plain
    averaged = 0.5 * averaged
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    for offset in (0, 2):
        shifted = padded[:, :, offset : offset + height, offset : offset + width]
        averaged = averaged + 0.125 * model(shifted) + 0.125 * model(shifted.flip(-1))
    return averaged, plain
