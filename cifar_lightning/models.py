"""Networks: SmallNet, and `build_model` that makes a network by name. Every network returns raw logits."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cifar_lightning.errors import UserError

_SMALL_PX = 64  # pictures up to this size keep their resolution in the first layer


class SmallNet(nn.Module):
    """Three stages of two 3x3 Conv-BatchNorm-ReLU, max-pool between, global average pool, dropout, linear.

    1.15 million parameters with the default widths.

    Args:
        num_classes: Length of the logits.
        in_channels: 3 for RGB.
        widths: Filters of each stage.
        dropout: Probability of dropping a feature before the linear layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            layers += [*_conv_bn_relu(in_channels, width), *_conv_bn_relu(width, width)]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of normalised pictures."""
        features = self.features(images)
        # mean() and not AdaptiveAvgPool2d, whose backward pass is not deterministic on CUDA.
        logits: Tensor = self.head(self.dropout(features.mean((2, 3))))
        return logits


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    # The BatchNorm after it has a bias, so the convolution needs none.
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _smallnet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    widths = kwargs.get("widths", (64, 128, 256))
    if not (isinstance(widths, list | tuple) and widths and all(type(width) is int and width > 0 for width in widths)):
        raise TypeError(f"widths {widths}: filters of each stage, 1 or more, such as [64, 128, 256]")
    stages = len(widths)
    if image_size < 2 ** (stages - 1):
        raise UserError(
            f"image_size {image_size}: smallnet with {stages} stages needs {2 ** (stages - 1)} pixels or more."
        )
    return SmallNet(num_classes, **kwargs)


def _resnet18(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    """ResNet-18 (arXiv:1512.03385, torchvision's): 11.17 million parameters with 10 classes and small pictures."""
    from torchvision.models import resnet18  # takes seconds to import

    network: nn.Module = resnet18(num_classes=num_classes, **kwargs)
    if image_size <= _SMALL_PX:
        # ImageNet's stem shrinks 32 pixels to 8 before the first block; section 4.2 of the paper starts with 3x3.
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


MODELS: dict[str, Callable[..., nn.Module]] = {"smallnet": _smallnet, "resnet18": _resnet18}
"""Name -> function of (num_classes, image_size, **kwargs). A network of one's own is one more function here."""


def build_model(name: str, num_classes: int = 10, image_size: int = 32, **kwargs: Any) -> nn.Module:
    """Make a network by name.

    Args:
        name: A key of `MODELS`.
        num_classes: Length of the logits.
        image_size: Side of the square pictures in pixels.
        **kwargs: Passed on to the network: `widths` and `dropout` of SmallNet.

    Raises:
        UserError: Unknown name, a keyword that the network does not take, or pictures that it cannot take.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"--model.name {name}: not a model; one of {', '.join(MODELS)}.{hint}")
    try:
        return MODELS[name](num_classes, image_size, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0]  # torch writes its C++ stack behind it
        raise UserError(f"--model.model_kwargs {kwargs}: {name} does not take them ({reason}).") from error
