"""Grad-CAM against plain implementations; which layer's output it is of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer, resnet18
from torchvision.models.convnext import CNBlockConfig

from cifar_lightning import UserError
from cifar_lightning.models.grad_cam import _calls, _last_feature_map, grad_cam, penultimate_features
from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.models.speednet import SpeedNet


def plain_grad_cam(features, head, images, classes):
    """Return Grad-CAM of `head(features(images))`, an image at a time, as the paper writes it."""
    maps = []
    for image, c in zip(images, classes, strict=True):
        activation = features(image[None]).detach().requires_grad_()
        head(activation)[0, c].backward()
        total = sum(alpha.mean() * channel for alpha, channel in zip(activation.grad[0], activation[0], strict=True))
        scaled = F.interpolate(total.clamp(min=0)[None, None], image.shape[1:], mode="bilinear")[0, 0]
        maps.append(scaled / scaled.max() if scaled.max() > 0 else scaled)
    return torch.stack(maps).detach()


class Tiny(nn.Module):
    """One ReLU used twice, in place; the second use is the last feature map."""

    def __init__(self, in_channels=3):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, 4, 3), nn.Conv2d(4, 5, 3, stride=2)
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(5, 6)

    def features(self, images):
        return self.relu(self.conv2(self.relu(self.conv1(images))))

    def head(self, maps):
        return self.linear(F.max_pool2d(maps, 2).mean((2, 3)) ** 2)

    def forward(self, images):
        return self.head(self.features(images))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_grad_cam_of_a_small_model_is_that_of_the_paper(in_channels, frozen):
    model = Tiny(in_channels).requires_grad_(not frozen)
    images = torch.randn(7, in_channels, 13, 11).to(memory_format=torch.channels_last)
    classes = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    found = grad_cam(model, images, classes)
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = plain_grad_cam(model.features, model.head, images, classes)
    assert expected.amax((1, 2)).max() == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grad_cam_of_resnet18_is_that_of_layer4():
    model = resnet18(num_classes=5).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    children = list(model.children())
    images, classes = torch.randn(2, 3, 64, 64), torch.tensor([4, 0])
    found = grad_cam(model, images, classes)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    head = nn.Sequential(children[-2], nn.Flatten(), children[-1])
    torch.testing.assert_close(
        found, plain_grad_cam(nn.Sequential(*children[:-2]), head, images, classes), rtol=1e-3, atol=1e-4
    )


def convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=4)


def test_the_map_has_the_resolution_of_the_last_convolution():
    for model, size in ((SmallNet(4, widths=(4, 8, 8)), 8), (SpeedNet(4), 3), (convnext(), 4)):
        images = torch.randn(2, 3, 32, 32)
        assert _last_feature_map(_calls(model.eval(), images)).shape[2:] == (size, size)
        assert grad_cam(model, images, torch.tensor([0, 1])).shape == (2, 32, 32)


def test_a_model_without_feature_maps_is_refused():
    transformer = VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=4)
    swin = SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=4)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    for model in (transformer, swin, linear):
        with pytest.raises(UserError, match="the model"):
            grad_cam(model.eval(), torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
        assert not any(module._forward_hooks for module in model.modules())


def test_penultimate_features_are_the_input_of_the_last_linear_layer():
    model, images = SmallNet(4, widths=(4, 8, 8)).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(penultimate_features(model, images), model.features(images).mean((2, 3)))
    with pytest.raises(UserError, match="linear"):
        penultimate_features(nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten()), images)
