"""SmallNet, the default model: a small VGG-like convolutional network with batch normalization."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three stages of two 3x3 Conv-BatchNorm-ReLU, max-pool between, global average pool, dropout, linear.

    1.15 million parameters with the default widths.

    Args:
        num_classes: Number of logits.
        in_channels: 3 for RGB.
        widths: Filters of each stage.
        dropout: Dropout probability before the linear layer.
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
        """Return raw logits of normalised images."""
        features = self.features(images)
        # mean() instead of AdaptiveAvgPool2d, whose backward pass is not deterministic on CUDA.
        logits: Tensor = self.head(self.dropout(features.mean((2, 3))))
        return logits


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    # No bias: the BatchNorm that follows has one.
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
