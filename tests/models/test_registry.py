"""Models by name: what is built, what is refused, what is suggested."""

import re

import pytest
import torch
import torchvision
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.models import registry
from cifar_lightning.models.registry import (
    MODELS,
    build_model,
    check_name,
    import_path_of,
    is_built_by_name,
    torchvision_name,
)


def test_your_own_model_is_one_function(monkeypatch):
    def linear(num_classes, image_size):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    monkeypatch.setitem(MODELS, "linear", linear)
    assert build_model("linear", num_classes=4, image_size=8)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


# From the papers and from other implementations for CIFAR; with 10 classes.
PARAMETERS = {
    "smallnet": 1_148_874,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wideresnet28_10": 36_479_194,
    "preact_resnet18": 11_172_170,
    # ImageNet's counts with their 1,000 classes less 990 of the last layer's, and less the stem's larger filters.
    "convnext_tiny": 28_589_128 - 990 * 769 - 96 * 3 * (16 - 9),
    "efficientnet_b0": 5_288_548 - 990 * 1281,
    "mobilenet_v3_small": 2_542_856 - 990 * 1025,
    # DeiT-Ti's 5.7 million, with 4-pixel patches: less filters, 64 positions for 196.
    "vit_tiny": 5_717_416 - 990 * 193 - 192 * 3 * (256 - 16) - 192 * (196 - 64),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_model_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=10, image_size=32)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small"]
)
def test_large_images_get_torchvisions_own_model(name):
    with torch.device("meta"):
        ours = build_model(name, num_classes=1000, image_size=65)
    theirs = torchvision.models.get_model_weights(name).DEFAULT
    assert sum(parameter.numel() for parameter in ours.parameters()) == theirs.meta["num_params"]


@pytest.mark.parametrize(("image_size", "patch_px"), [(32, 4), (64, 4), (80, 16)])
def test_vit_tinys_patches_suit_the_images(image_size, patch_px):
    with torch.device("meta"):
        model = build_model("vit_tiny", image_size=image_size)
    assert model.conv_proj.stride == (patch_px, patch_px)
    assert model.encoder.pos_embedding.shape == (1, (image_size // patch_px) ** 2 + 1, 192)


@pytest.mark.parametrize("name", ["smallnet", "mobilenet_v3_small", "vit_tiny"])
def test_a_model_learns_from_small_images_and_gives_logits(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=3, image_size=16)
    logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    head = [parameter for parameter in model.parameters() if parameter.shape == (3,)][-1]
    assert head.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet19", "resnet18"),
        ("ResNet-18", "resnet18"),
        ("efficientnet_b1", "torchvision/efficientnet_b1"),
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("torchvision/faster_rcnn", ""),  # detects; only classifiers are known
        ("keras/mobilenet_v2", "torchvision/mobilenet_v2"),
        ("qqqq", ""),
    ],
)
def test_an_unknown_name_suggests_the_nearest(monkeypatch, name, nearest):
    monkeypatch.setattr(registry, "is_timm_installed", lambda: False)
    with pytest.raises(UserError) as error:
        check_name(name)
    message = str(error.value)
    assert message.startswith(f"--model.name {name}: not a model; one of smallnet, speednet, resnet18")
    assert "vit_tiny, torchvision/NAME, timm/NAME, package.module:NAME." in message
    suggested = re.search(r"Did you mean ([^\s,?]+)", message)
    assert (suggested[1] if suggested else "") == nearest


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("timm/resnet18x", "timm/resnet18"), ("resnet26d", "timm/resnet26d"), ("timm/hf-hub:a/b", "")],
)
def test_timms_names_are_suggested_too(name, nearest):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=f"Did you mean .*{nearest}" if nearest else "not a model"):
        check_name(name)


def test_names_of_the_table_and_the_libraries_are_known():
    for name in (*MODELS, "torchvision/resnet101"):
        check_name(name)
    assert [torchvision_name(name) for name in ("resnet34", "torchvision/vgg11", "timm/resnet18", "smallnet")] == [
        "resnet34",
        "vgg11",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "smalnet"}, "--model.name smalnet: not a model.*Did you mean smallnet"),
        ({"name": "smallnet", "depth": 3}, "model_kwargs.*depth"),
        ({"name": "resnet18", "depth": 3}, "model_kwargs.*depth"),
        ({"name": "resnet18", "weights": "DEFAULT"}, "weights cannot be set.*--model.pretrained"),
        ({"name": "wideresnet28_10", "depth": 27}, "depth 27: 6 n"),
        ({"name": "smallnet", "dropout": float("nan")}, r"smallnet .*\(dropout nan: 0 to below 1"),
        ({"name": "smallnet", "dropout": "0.1"}, "dropout 0.1: 0 to below 1"),
        ({"name": "preact_resnet18", "dropout": 2}, "dropout 2: 0 to below 1"),
        ({"name": "wideresnet28_10", "dropout": float("nan")}, "dropout nan: 0 to below 1"),
        ({"name": "vit_tiny", "dropout": float("nan")}, "dropout probability has to be between 0 and 1"),
        ({"name": "preact_resnet18", "stem_width": 0}, "stem_width 0: a positive integer"),
        ({"name": "vit_tiny", "image_size": 30}, "--data.image_size 30: vit_tiny .*patch size"),
        ({"name": "smallnet", "widths": []}, "widths .*positive integers"),
        ({"name": "smallnet", "widths": [4, 0]}, "widths .*positive integers"),
        ({"name": "smallnet", "widths": 64}, "widths .*positive integers"),
        ({"name": "smallnet", "widths": [1 << 40]}, "model_kwargs"),
        ({"name": "smallnet", "image_size": 2}, "--data.image_size 2: smallnet .*at least 4 pixels"),
    ],
)
def test_what_cannot_be_built_says_why(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(**arguments)


class Tiny(nn.Sequential):
    def __init__(self, num_classes=10, width=4, activation="relu"):
        acts = {"relu": nn.ReLU(), "tanh": nn.Tanh()}
        layers = nn.Conv2d(3, width, 3), acts[activation], nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(*layers, nn.Linear(width, num_classes))


def tiny_of_size(image_size, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))


def one_logit_too_many(num_classes):
    return Tiny(num_classes + 1)


def not_a_model(num_classes):
    return {}


def raising():
    raise OSError("no such disk")


HERE = __name__


def test_a_model_is_made_by_import_path_with_the_classes_and_sizes_it_takes():
    assert build_model(f"{HERE}:Tiny", 7, 8, width=6)[4].weight.shape == (7, 6)
    assert build_model(f"{HERE}.Tiny", 7, 8)[4].weight.shape == (7, 4)
    assert build_model(f"{HERE}:tiny_of_size", 3, 8)[1].weight.shape == (3, 192)
    assert build_model("torchvision.models:squeezenet1_1", 3, 64)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("one_logit_too_many", {}, "11 logits an image for 10 classes"),
        ("not_a_model", {}, "returns a dict"),
        ("raising", {}, "OSError: no such disk"),
        ("Tiny", {"depth": 3}, "depth"),
        ("Tiny", {"activation": "gelu"}, "KeyError"),
        ("HERE", {}, "not a function or class"),
        ("Tinny", {}, "Did you mean Tiny"),
    ],
)
def test_a_model_by_import_path_that_does_not_fit_is_refused_with_the_reason(name, kwargs, reason):
    with pytest.raises(UserError) as raised:
        build_model(f"{HERE}:{name}", 10, 8, **kwargs)
    assert reason in str(raised.value)
    assert f"--model.name {HERE}:{name}" in str(raised.value)


def test_a_live_model_is_remembered_only_where_its_class_makes_the_same_logits():
    assert import_path_of(Tiny(), 10, 8, {}) == {"path": f"{HERE}:Tiny", "kwargs": {}}
    assert import_path_of(Tiny(7), 7, 8, {}) == {"path": f"{HERE}:Tiny", "kwargs": {}}
    wide = Tiny(width=6)
    kwargs = {"width": 6, "num_classes": 10}
    assert import_path_of(wide, 10, 8, kwargs) == {"path": f"{HERE}:Tiny", "kwargs": {"width": 6}}
    assert import_path_of(wide, 10, 8, {}) is None
    assert import_path_of(Tiny(activation="tanh"), 10, 8, {}) is None  # equal shapes, other logits
    assert import_path_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 10, 8, {}) is None


def test_remembering_a_model_draws_no_random_number():
    model, state = Tiny(), torch.get_rng_state()
    import_path_of(model, 10, 8, {})
    assert torch.equal(state, torch.get_rng_state())


class ZeroHead(Tiny):
    """As ViTs are initialized: the head hides the layers before it."""

    def __init__(self, num_classes=10, activation="relu"):
        super().__init__(num_classes, activation=activation)
        nn.init.zeros_(self[4].weight)


class Nested(nn.Sequential):
    def __init__(self, num_classes=10, activation=None):
        super().__init__(nn.Flatten(), activation or nn.ReLU(), nn.Linear(192, num_classes))


def test_a_head_of_zeros_does_not_hide_another_model():
    assert import_path_of(ZeroHead(), 10, 8, {}) is not None
    assert import_path_of(ZeroHead(activation="tanh"), 10, 8, {}) is None


def test_arguments_may_be_objects_as_lightning_cli_writes_them():
    kwargs = {"init_args": {"activation": {"class_path": "torch.nn.LeakyReLU", "init_args": {"negative_slope": 0.5}}}}
    model = build_model(f"{HERE}:Nested", 10, 8, **kwargs)
    assert model[1].negative_slope == 0.5
    assert import_path_of(model, 10, 8, kwargs) == {"path": f"{HERE}:Nested", "kwargs": kwargs}


@pytest.mark.parametrize("name", [*MODELS, "torchvision/squeezenet1_1"])
def test_a_changed_model_is_not_that_of_its_name(name):
    architecture = {"name": name, "num_classes": 7, "image_size": 64}
    model = build_model(**architecture)
    assert is_built_by_name(model, architecture)
    kind, child = next((kind, child) for kind, child in model.named_children())
    setattr(model, kind, nn.Sequential(child))
    assert not is_built_by_name(model, architecture)


def test_a_model_whose_batchnorm_lightning_has_synchronized_is_that_of_its_name():
    architecture = {"name": "smallnet", "num_classes": 10, "image_size": 16, "widths": [4, 4]}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build_model(**architecture))
    assert is_built_by_name(model, architecture)
    assert is_built_by_name(TorchSyncBatchNorm().revert(model), architecture)


class Computing(Tiny):
    """Keeps a tensor that torch does not copy."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.kept = self[0].weight * 2


def test_a_model_that_keeps_a_computed_tensor_is_remembered():
    assert import_path_of(Computing(), 10, 8, {}) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_are_compared_whatever_the_precision(dtype):
    assert import_path_of(Tiny().to(dtype), 10, 8, {}) is not None
    model = Tiny().to(dtype)
    before = [weight.clone() for weight in model.parameters()]
    import_path_of(model, 10, 8, {})
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
