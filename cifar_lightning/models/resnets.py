"""Pre-activation ResNet (arXiv:1603.05027) and Wide ResNet (arXiv:1605.07146), which torchvision lacks."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PreActResNet(nn.Module):
    """A 3x3 stem, stages of pre-activation blocks, norm, ReLU, global average pool, linear.

    Each stage after the first halves the resolution. The defaults give PreActResNet-18, 11.17 million parameters.

    Args:
        num_classes: Number of logits.
        in_channels: 3 for RGB.
        widths: Filters of each stage.
        depths: Blocks of each stage.
        stem_width: Filters of the stem. Default: those of the first stage.
        stem_stride: 1, or 4 for images larger than 64 pixels: ImageNet's 7x7 filters and max-pool.
        dropout: Dropout probability between the two convolutions of a block.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        stem_width: int | None = None,
        stem_stride: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(depths) or not all(type(n) is int and n > 0 for n in (*widths, *depths)):
            raise ValueError(f"widths {widths} and depths {depths}: positive integers, as many of both")
        if stem_width is not None and not (type(stem_width) is int and stem_width > 0):
            raise ValueError(f"stem_width {stem_width}: a positive integer")
        if stem_stride not in (1, 4):
            raise ValueError(f"stem_stride {stem_stride}: 1 or 4")
        channels = widths[0] if stem_width is None else stem_width
        if stem_stride == 1:
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.pool = nn.Identity() if stem_stride == 1 else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        blocks = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(_PreActBlock(channels, width, stride, dropout))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of normalised images."""
        features = F.relu(self.norm(self.blocks(self.pool(self.conv1(images)))))
        # mean() instead of AdaptiveAvgPool2d: see SmallNet.
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class WideResNet(PreActResNet):
    """Three stages of wide pre-activation blocks; WRN-28-10 by default, 36.5 million parameters.

    Args:
        num_classes: Number of logits.
        in_channels: 3 for RGB.
        depth: Number of convolutions as the paper counts them: 6 n + 4 for n blocks per stage.
        width: Multiplier of the widths 16, 32 and 64.
        stem_stride: 1, or 4 for images larger than 64 pixels.
        dropout: Dropout probability between the two convolutions of a block; 0 or 0.3 in the paper.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        depth: int = 28,
        width: int = 10,
        stem_stride: int = 1,
        dropout: float = 0.0,
    ) -> None:
        num_blocks, remainder = divmod(depth - 4, 6)
        if remainder or num_blocks < 1:
            raise ValueError(f"depth {depth}: 6 n + 4, such as 10, 16, 28 or 40")
        super().__init__(
            num_classes,
            in_channels,
            widths=[16 * width, 32 * width, 64 * width],
            depths=[num_blocks] * 3,
            stem_width=16,
            stem_stride=stem_stride,
            dropout=dropout,
        )


class _PreActBlock(nn.Module):
    """Norm, ReLU, conv, norm, ReLU, dropout, conv, and a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch filters rows columns"]:
        activated = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(self.dropout(F.relu(self.norm2(out))))
        total: Tensor = out + shortcut
        return total
