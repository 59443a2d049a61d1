"""Networks: SmallNet, SpeedNet, and `build_model` that makes one by name. Every network returns raw logits."""

import difflib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
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


class SpeedNet(nn.Module):
    """The network of the CIFAR-10 speed records: a whitening stem, groups of 3x3 convolutions, one linear layer.

    After airbench (arXiv:2404.00498, KellerJordan/cifar10-airbench): 1.97 million parameters with the default widths.
    Each group halves the picture after its first convolution. Other than there, the last pooling is over whatever is
    left of the picture (the same at 32 pixels), so that smaller pictures train the same weights; and the head begins
    with the standard deviation 1/width, which stands for airbench_muon's logits divided by the width.

    Args:
        num_classes: Length of the logits.
        in_channels: 3 for RGB.
        widths: Filters of each group: [64, 256, 256] for 94 %, [128, 384, 384] for 95 %, [128, 384, 512] for 96 %.
        depth: Convolutions of a group; 3 adds a shortcut over the last two, as for 96 %.
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
        """Return raw logits of normalised pictures."""
        features = self.groups(nn.functional.gelu(self.stem(images)))
        logits: Tensor = self.head(features.flatten(2).amax(2))
        return logits


class WhiteningConv(nn.Conv2d):
    """A 2x2 convolution, unpadded, whose frozen filters whiten patches of the training pictures; its bias is trained.

    Until `whiten` was called its filters are random, as of any convolution; a checkpoint remembers that it was.

    Args:
        in_channels: 3 for RGB; there are 8 filters for each, the whitening directions and their negations.
    """

    is_whitened: Tensor
    """bool (), whether the filters are of pictures; a buffer, so that loaded weights are not whitened again."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 8 * in_channels, kernel_size=2)
        self.weight.requires_grad_(False)
        self.register_buffer("is_whitened", torch.tensor(False))

    @torch.no_grad()
    def whiten(self, images: Float[Tensor, "batch channels height width"], eps: float = 5e-4) -> None:
        """Set the filters from normalised training pictures: eigenvectors of their patches' covariance.

        Args:
            images: Some thousands; airbench takes the first 5,000.
            eps: Added to each eigenvalue before its root divides the eigenvector; airbench's.
        """
        size = self.in_channels * 4
        patches = nn.functional.unfold(images.float(), kernel_size=2).transpose(1, 2).reshape(-1, size)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + eps).sqrt()).T.reshape(size, self.in_channels, 2, 2)
        self.weight.copy_(torch.cat([filters, -filters]))
        self.is_whitened.fill_(True)


class _SpeedGroup(nn.Module):
    """Conv, max-pool, BatchNorm, GELU, then one or two Conv-BatchNorm-GELU; two have a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        convs = [_identity_conv(in_channels if k == 0 else out_channels, out_channels) for k in range(depth)]
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
    """BatchNorm with its scale fixed at 1 and fast statistics, both airbench's, for runs of a few epochs."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


def _identity_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first filters pass their input through, as far as there are inputs."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    passed = torch.arange(min(in_channels, out_channels))
    with torch.no_grad():  # all at once: nn.init.dirac_ writes filter by filter
        conv.weight[: len(passed)] = 0
        conv.weight[passed, passed, 1, 1] = 1
    return conv


def _smallnet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    stages = _num_stages(kwargs.get("widths", (64, 128, 256)))
    if image_size < 2 ** (stages - 1):
        raise UserError(
            f"image_size {image_size}: smallnet with {stages} stages needs {2 ** (stages - 1)} pixels or more."
        )
    return SmallNet(num_classes, **kwargs)


def _speednet(num_classes: int, image_size: int, **kwargs: Any) -> nn.Module:
    groups = _num_stages(kwargs.get("widths", (64, 256, 256)))
    depth = kwargs.get("depth", 2)
    if depth not in (2, 3):
        raise TypeError(f"depth {depth}: 2, or 3 with a shortcut")
    smallest = 2**groups + 1  # the stem takes a pixel away, each group halves
    if image_size < smallest:
        raise UserError(f"image_size {image_size}: speednet with {groups} groups needs {smallest} pixels or more.")
    return SpeedNet(num_classes, **kwargs)


def _num_stages(widths: Any) -> int:
    if not (isinstance(widths, list | tuple) and widths and all(type(width) is int and width > 0 for width in widths)):
        raise TypeError(f"widths {widths}: filters of each stage, 1 or more, such as [64, 128, 256]")
    return len(widths)


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


MODELS: dict[str, Callable[..., nn.Module]] = {"smallnet": _smallnet, "speednet": _speednet, "resnet18": _resnet18}
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


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile a network in place, or say on stderr that it runs uncompiled, and why."""
    from torch._inductor import cpp_builder  # takes seconds to import
    from torch.utils._triton import has_triton

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()  # without this, the first step would fail
        elif not has_triton():
            raise RuntimeError("Triton is not there for this GPU")
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"--model.compile: the network runs uncompiled ({reason}).", file=sys.stderr)
        return
    network.compile()
