"""SpeedNet, the model of the CIFAR-10 speed records, and its whitening convolution."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cifar_lightning.models.cpu_convolutions import PooledConv2d

_NUM_WHITENING = 5000  # at up to 32 pixels, as airbench


class SpeedNet(nn.Module):
    """A whitening stem, groups of 3x3 convolutions with GELU, global max-pool, linear.

    After airbench (arXiv:2404.00498, KellerJordan/cifar10-airbench): 1.97 million parameters with the default widths.
    Each group halves the resolution after its first convolution. Two deviations from airbench: the last pooling is
    global (the same at 32 pixels), so that smaller images train the same weights; and the head is initialised with
    standard deviation 1/width, where airbench_muon divides the logits by the width.

    Args:
        num_classes: Number of logits.
        in_channels: 3 for RGB.
        widths: Filters of each group: [64, 256, 256] for 94 %, [128, 384, 384] for 95 %, [128, 384, 512] for 96 %.
        depth: Convolutions per group, 2 or 3; 3 adds a shortcut around the last two, as for 96 %.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 256, 256),
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.stem = WhiteningConv(in_channels)
        groups = []
        channels = self.stem.out_channels
        for width in widths:
            groups.append(_SpeedGroup(channels, width, depth))
            channels = width
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(channels, num_classes, bias=False)
        bound = math.sqrt(3) / channels  # uniform, of standard deviation 1/width
        nn.init.uniform_(self.head.weight, -bound, bound)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of normalised images."""
        features = self.groups(nn.functional.gelu(self.stem(images)))
        # max().values instead of amax(): the gradient of amax compares with recomputed features, of which none is equal
        # when compiled in half precision.
        logits: Tensor = self.head(features.flatten(2).max(2).values)
        return logits


class WhiteningConv(nn.Conv2d):
    """An unpadded 2x2 convolution whose frozen filters whiten patches of the training images; its bias is trained.

    The filters are random until `whiten` sets them. Under autocast it computes in float32 and casts its output: it
    amplifies the smallest directions, and with them what half precision rounds off images and filters, in bfloat16
    up to 6 % of a channel's standard deviation on CIFAR-10.

    Args:
        in_channels: 3 for RGB. There are 8 filters per channel: the whitening directions and their negations.
    """

    is_whitened: Tensor
    """bool (), whether `whiten` was called; a buffer, so that loaded weights are not whitened again."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 8 * in_channels, kernel_size=2)
        self.weight.requires_grad_(False)
        self.register_buffer("is_whitened", torch.tensor(False))

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Return the whitened patches of normalised images."""
        device = input.device.type
        # It is not available for meta tensors, on which shapes are tried.
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return super().forward(input)
        with torch.autocast(device, enabled=False):
            whitened = super().forward(input.to(self.weight.dtype))
        return whitened.to(torch.get_autocast_dtype(device))

    @torch.no_grad()
    def whiten(self, images: Float[Tensor, "batch channels height width"], eps: float = 5e-4) -> None:
        """Set the filters to the scaled eigenvectors of the second moment of patches of normalised training images.

        `eps` is added to each eigenvalue before its root divides the eigenvector; airbench's value.
        """
        size = self.in_channels * 4
        patches = nn.functional.unfold(images.float(), kernel_size=2).transpose(1, 2).reshape(-1, size)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + eps).sqrt()).T.reshape(size, self.in_channels, 2, 2)
        self.weight.copy_(torch.cat([filters, -filters]))
        self.is_whitened.fill_(True)


def num_whitening_images(image_size: int) -> int:
    """Return how many images `whiten` needs: the same number of pixels at each size (5,000 of 128 would take 9 GB)."""
    return max(1, _NUM_WHITENING * 32**2 // max(32, image_size) ** 2)


class _SpeedGroup(nn.Module):
    """Conv, max-pool, BatchNorm, GELU, then one or two Conv-BatchNorm-GELU, with a shortcut around two."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        convs = [_identity_conv(in_channels, out_channels, PooledConv2d)]
        convs += [_identity_conv(out_channels, out_channels) for _ in range(depth - 1)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(_BiasedNorm(out_channels) for _ in range(depth))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch filters rows columns"]:
        x = shortcut = nn.functional.gelu(self.norms[0](self.pool(self.convs[0](x))))
        for conv, norm in zip(self.convs[1:-1], self.norms[1:-1], strict=True):
            x = nn.functional.gelu(norm(conv(x)))
        x = self.norms[-1](self.convs[-1](x))
        return nn.functional.gelu(x + shortcut if len(self.convs) > 2 else x)


class _BiasedNorm(nn.BatchNorm2d):
    """BatchNorm with a fixed scale of 1 and fast running statistics, as airbench, for runs of a few epochs."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


def _identity_conv(in_channels: int, out_channels: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Return a 3x3 convolution whose first filters are the identity, one per input channel."""
    conv = kind(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    channels = torch.arange(min(in_channels, out_channels))
    with torch.no_grad():  # faster than nn.init.dirac_, which loops over filters
        conv.weight[: len(channels)] = 0
        conv.weight[channels, channels, 1, 1] = 1
    return conv
