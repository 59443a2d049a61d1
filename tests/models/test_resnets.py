"""Pre-activation ResNets and WideResNets."""

import pytest
import torch
from torch.nn import functional as F

from cifar_lightning.models.registry import build_model
from cifar_lightning.models.resnets import PreActResNet, WideResNet


def norm_relu(norm, x):
    return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))


def test_a_block_is_the_papers():
    torch.manual_seed(0)
    model = PreActResNet(num_classes=5, widths=(4, 8), depths=(1, 1), dropout=0.5).eval()
    for norm in [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
        norm.running_mean.normal_()
        norm.weight.data.normal_()
    images = torch.randn(2, 3, 8, 8)
    x = F.conv2d(images, model.conv1.weight, padding=1)
    first, second = model.blocks
    # Figure 4 (e) of arXiv:1603.05027: the identity goes around everything.
    out = F.conv2d(norm_relu(first.norm1, x), first.conv1.weight, padding=1)
    x = x + F.conv2d(norm_relu(first.norm2, out), first.conv2.weight, padding=1)
    # Where shapes change, its 1x1 filters take what was activated.
    activated = norm_relu(second.norm1, x)
    out = F.conv2d(activated, second.conv1.weight, stride=2, padding=1)
    out = F.conv2d(norm_relu(second.norm2, out), second.conv2.weight, padding=1)
    x = out + F.conv2d(activated, second.shortcut.weight, stride=2)
    expected = F.linear(norm_relu(model.norm, x).mean((2, 3)), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(images), expected)


def test_dropout_is_between_the_convolutions():
    model = WideResNet(depth=10, width=1, dropout=0.3)
    assert [block.dropout.p for block in model.blocks] == [0.3] * 3
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))


def test_wideresnet_counts_depth_and_width_as_its_paper_does():
    model = WideResNet(depth=16, width=4)
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convs) == 16  # two in each of six blocks, the stem and the three shortcuts
    assert [block.conv2.out_channels for block in model.blocks] == [64, 64, 128, 128, 256, 256]
    assert model.conv1.out_channels == 16


@pytest.mark.parametrize(("image_size", "resolution"), [(32, 4), (96, 3), (224, 7)])
def test_small_images_keep_their_size_in_the_stem(image_size, resolution):
    with torch.device("meta"):
        model = build_model("preact_resnet18", image_size=image_size)
    features = model.blocks(model.pool(model.conv1(torch.empty(2, 3, image_size, image_size, device="meta"))))
    assert features.shape == (2, 512, resolution, resolution)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [4, 4], "depths": [1]}, "widths .* as many of both"),
        ({"widths": [4, 0], "depths": [1, 1]}, "positive integers"),
        ({"widths": [], "depths": []}, "positive integers"),
        ({"stem_stride": 2}, "stem_stride 2: 1 or 4"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreActResNet(**arguments)


@pytest.mark.parametrize("depth", [4, 12, 29])
def test_a_depth_that_three_equal_stages_cannot_have_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth {depth}: 6 n"):
        WideResNet(depth=depth)
