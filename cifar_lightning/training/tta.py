"""Test-time augmentation: a network's answers, averaged over views of an image."""

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cifar_lightning.settings.limits import check_choice

TTA = Literal["none", "mirror", "six"]
_NAMES = get_args(TTA)  # here, since exports trace the function below


def tta_logits(
    model: Callable[[Tensor], Tensor], images: Float[Tensor, "batch channels height width"], views: TTA
) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
    """Return a network's logits averaged over views of each image, and those of the image as it is.

    Args:
        model: Takes images, gives logits.
        images: Normalised.
        views: "none"; "mirror", the mean of an image and its mirror image; "six", airbench's: these two at a quarter
            each, and both moved by a pixel up-left and down-right at an eighth each, reflected at the border.

    Raises:
        UserError: Another word.
    """
    check_choice("model.tta", views, _NAMES)
    plain = model(images)
    if views == "none":
        return plain, plain
    averaged = 0.5 * plain + 0.5 * model(images.flip(-1))
    if views == "mirror":
        return averaged, plain
    averaged = 0.5 * averaged
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    for offset in (0, 2):
        moved = padded[:, :, offset : offset + height, offset : offset + width]
        averaged = averaged + 0.125 * model(moved) + 0.125 * model(moved.flip(-1))
    return averaged, plain
