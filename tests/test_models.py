"""SmallNet and the table of networks."""

import pytest
import torch
from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.models import MODELS, SmallNet, build_model


def test_smallnet_has_the_published_number_of_parameters():
    # Filters 9 * (3*64 + 64*64 + 64*128 + 128*128 + 128*256 + 256*256), two per BatchNorm channel, 256*10 + 10.
    filters = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
    assert sum(p.numel() for p in SmallNet().parameters()) == filters + 2 * 2 * (64 + 128 + 256) + 2570 == 1_148_874


def test_smallnet_gives_raw_logits_of_any_square_size():
    network = SmallNet(num_classes=7, widths=(4, 8, 16)).eval()
    for size in (8, 32, 48):
        logits = network(torch.randn(2, 3, size, size))
        assert logits.shape == (2, 7)
        assert not torch.allclose(logits.sum(1), torch.ones(2))


def test_smallnet_halves_the_picture_between_stages_and_averages_by_mean():
    network = SmallNet(widths=(4, 8, 16), dropout=0.0).eval()
    images = torch.randn(2, 3, 32, 32)
    features = network.features(images)
    assert features.shape == (2, 16, 8, 8)
    expected = nn.functional.linear(features.mean((2, 3)), network.head.weight, network.head.bias)
    torch.testing.assert_close(network(images), expected)


def test_dropout_works_in_training_alone():
    network = SmallNet(widths=(4, 8, 16), dropout=0.5)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network.eval()(images), network(images))
    network.features.eval()
    network.dropout.train()
    assert not torch.equal(network(images), network(images))


def test_a_network_of_ones_own_is_one_function(monkeypatch):
    def linear(num_classes, image_size):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    monkeypatch.setitem(MODELS, "linear", linear)
    assert build_model("linear", num_classes=4, image_size=8)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_resnet18_has_the_published_size_and_keeps_small_pictures_large():
    network = build_model("resnet18", num_classes=10, image_size=32)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    sizes = []
    network.layer1.register_forward_hook(lambda layer, taken, given: sizes.append(tuple(given.shape[2:])))
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    build_model("resnet18", image_size=128)  # the ImageNet stem
    assert sizes == [(32, 32)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "smalnet"}, "--model.name smalnet: not a model.*Did you mean smallnet"),
        ({"name": "smallnet", "depth": 3}, "model_kwargs.*depth"),
        ({"name": "smallnet", "widths": []}, "widths .*filters of each stage"),
        ({"name": "smallnet", "widths": [4, 0]}, "widths .*filters of each stage"),
        ({"name": "smallnet", "widths": 64}, "widths .*filters of each stage"),
        ({"name": "smallnet", "widths": [1 << 40]}, "model_kwargs"),
        ({"name": "smallnet", "image_size": 2}, "image_size 2: smallnet with 3 stages needs 4 pixels"),
    ],
)
def test_what_cannot_be_built_says_why(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(**arguments)
