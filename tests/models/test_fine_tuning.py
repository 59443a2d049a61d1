"""Frozen layers and layer-wise learning rates, for our models, torchvision's, timm's and one's own."""

import pytest
import torch
from fitting import optimizer_settings
from torch import nn

from cifar_lightning import UserError, build_model
from cifar_lightning.models.fine_tuning import FrozenLayers, lr_scales
from cifar_lightning.optim.optimizers import build_optimizer

HEADS = {
    "smallnet": "head",
    "speednet": "head",
    "preact_resnet18": "head",
    "resnet18": "fc",
    "vit_tiny": "heads.head",
    "torchvision/squeezenet1_1": "classifier.1",
    "timm/resnet10t": "fc",
    "timm/deit_tiny_distilled_patch16_224": ("head.", "head_dist."),
}


def built(name, num_classes=10):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        return build_model(name, num_classes, 224 if "224" in name else 32)


@pytest.mark.parametrize(("name", "head"), HEADS.items())
def test_backbone_freezes_everything_but_the_head(name, head):
    model = built(name)
    frozen = FrozenLayers(model, "backbone", 10)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(head) for name in trained)
    assert len(trained) == sum(name.startswith(head) for name, _ in model.named_parameters())
    model.train()
    frozen.set_mode(training=True)
    assert not any(norm.training for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


def test_globs_freeze_parameters_and_the_statistics_of_their_norms():
    model = built("resnet18")
    frozen = FrozenLayers(model, ["conv1", "bn1", "layer[12].*", "layer3.0.bn1.weight"], 10)
    kept = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.partition(".")[0] for name in kept} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert [name for name in kept if name.startswith("layer3")] == ["layer3.0.bn1.weight"]
    frozen.set_mode(training=True)
    in_eval = {name for name, module in model.named_modules() if not module.training}
    assert in_eval == {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith(("bn1", "layer1", "layer2"))
    }
    assert "layer3.0.bn1" not in in_eval, "its bias is trained"


def test_norms_without_parameters_are_frozen_with_their_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(4, 10))
    FrozenLayers(model, "backbone", 10).set_mode(training=True)
    assert [layer.training for layer in model] == [True, False, True, True]


@pytest.mark.parametrize(
    ("globs", "words"),
    [
        ("layer9", "--model.freeze layer9: .*Did you mean layer[1-4]"),
        ("layr1.0.conv1.weight", "Did you mean layer1.0.conv1.weight"),
        ("backbon", "Did you mean backbone"),
        (["layer1", "nothing.*"], "--model.freeze nothing"),
        ("*", "leaves no parameter"),
        (["backbone", "fc"], "leaves no parameter"),
    ],
)
def test_globs_that_freeze_nothing_or_everything_are_refused(globs, words):
    with pytest.raises(UserError, match=words):
        FrozenLayers(built("resnet18"), globs, 10)


def test_a_model_without_a_head_has_no_backbone():
    with pytest.raises(UserError, match=r"--model\.freeze: .* 7 outputs"):
        FrozenLayers(built("resnet18"), "backbone", 7)


@pytest.mark.parametrize(
    ("name", "num_layers", "first", "last"),
    [
        ("smallnet", 7, "features.1.bias", "head.bias"),
        ("resnet18", 10, "bn1.weight", "fc.weight"),
        ("vit_tiny", 14, "encoder.pos_embedding", "heads.head.weight"),
        ("convnext_tiny", 23, "features.0.1.weight", "classifier.2.weight"),
    ],
)
def test_learning_rates_decay_from_the_head_to_the_first_layer(name, num_layers, first, last):
    model = built(name)
    of = lr_scales(model, 0.5)
    scales = {name: of[parameter] for name, parameter in model.named_parameters()}
    assert len({*scales.values()}) == num_layers
    assert scales[first] == 0.5 ** (num_layers - 1)
    assert scales[last] == 1
    order = list(scales.values())
    assert order == sorted(order)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/resnet10t"])
def test_a_model_of_timm_has_the_groups_that_timm_gives_it(name):
    optim = pytest.importorskip("timm.optim")
    model = built(name)
    groups = optim.param_groups_layer_decay(model, layer_decay=0.75)
    expected = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert lr_scales(model, 0.75) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_group_has_the_scaled_rate_and_norms_no_weight_decay(name):
    model = build_model("smallnet", 10, 16, widths=[2, 2])
    scales = lr_scales(model, 0.5)
    optimizer = build_optimizer(model, optimizer_settings(name, lr=0.1, weight_decay=0.3), lr_scales=scales)
    assert optimizer.param_groups[0]["lr"] == 0.1, "the first group's is logged"
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == 0.1 * scales[parameter]
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0)
            seen.add(parameter)
    assert seen == set(model.parameters())


def test_muon_refuses_layer_decay():
    model = build_model("smallnet", 10, 16, widths=[2, 2])
    with pytest.raises(UserError, match=r"--model\.layer_decay"):
        build_optimizer(model, optimizer_settings("muon"), lr_scales=lr_scales(model, 0.5))
