"""Models of torchvision and timm, adapted to classes and image size."""

import sys
import warnings

import pytest
import torch
import torchvision
from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.models import torchvision_timm
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.torchvision_timm import torchvision_names, vision_transformer


def make(name, image_size=32, **kwargs):
    with torch.device("meta"):
        return build_model(name, 7, image_size, **kwargs)


def logits_of(model, image_size):
    return model(torch.empty(2, 3, image_size, image_size, device="meta"))


def test_torchvisions_names_are_its_classifiers():
    names = torchvision_names()
    assert {"resnet101", "vit_b_16", "googlenet"} <= set(names)
    assert not [name for name in names if "rcnn" in name or "fcn" in name or "quantized" in name or "r3d" in name]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out_while_training_too(name):
    model = make(f"torchvision/{name}").train()
    assert logits_of(model, 32).shape == (2, 7)
    with pytest.raises(UserError, match="aux_logits cannot be set"):
        make(f"torchvision/{name}", aux_logits=True)


@pytest.mark.parametrize("name", ["vit_b_16", "squeezenet1_1", "swin_t"])
def test_other_kinds_take_small_images(name):
    assert logits_of(make(f"torchvision/{name}"), 32).shape == (2, 7)


def test_maxvit_is_made_for_the_size_that_it_is_given():
    assert logits_of(make("torchvision/maxvit_t", 224), 224).shape == (2, 7)
    with pytest.raises(UserError, match=r"image_size 100: torchvision/maxvit_t"):
        build_model("torchvision/maxvit_t", 7, 100)


@pytest.mark.parametrize(("name", "smallest"), [("alexnet", 15), ("vgg11", 8)])
def test_images_that_are_too_small_are_refused(name, smallest):
    assert logits_of(make(f"torchvision/{name}", smallest), smallest).shape == (2, 7)
    with pytest.raises(UserError, match=rf"--data\.image_size {smallest - 1}: torchvision/{name} "):
        make(f"torchvision/{name}", smallest - 1)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="must be divisible"):
        vision_transformer(7, 32, patch_size=4, num_layers=1, num_heads=3, hidden_dim=32, mlp_dim=8)
    with pytest.raises(UserError, match=r"model_kwargs .*groups"):
        make("resnet18", groups=3)


def test_logits_equal_those_of_torchvisions_own_model():
    torch.manual_seed(0)
    ours = build_model("torchvision/squeezenet1_1", 7, 96).eval()
    theirs = torchvision.models.squeezenet1_1(num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours(images), theirs(images))


# -- timm --------------------------------------------------------------------------------------------------------


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"--model\.name timm/resnet18: timm is not installed; pip .*'\.\[timm\]'"):
        build_model("timm/resnet18")
    with pytest.raises(UserError, match=r"--model\.name resnt18: not a model; .*Did you mean resnet18"):
        build_model("resnt18")


def test_why_timm_cannot_be_imported_is_reported_only_for_models_of_timm(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(
        UserError, match=r"--model\.name timm/resnet18: timm .*cannot be imported \(operator torchvision"
    ):
        build_model("timm/resnet18")
    with pytest.raises(UserError, match=r"--model\.name resnt18: not a model; .*Did you mean resnet18"):
        build_model("resnt18")


@pytest.mark.parametrize("name", ["resnet26d", "mobilenetv3_small_050", "tf_mobilenetv3_small_minimal_100.in1k"])
def test_timms_convolutional_models_get_the_stem_for_small_images(name):
    timm = pytest.importorskip("timm")
    model = make(f"timm/{name}")
    resolutions = {}
    for origin, each in {"ours": model, "theirs": timm.create_model(name.partition(".")[0]).to("meta")}.items():
        with torch.no_grad():
            resolutions[origin] = each.eval().forward_features(torch.empty(2, 3, 64, 64, device="meta")).shape[-1]
    assert resolutions == {"ours": 8, "theirs": 2}
    assert logits_of(model, 32).shape == (2, 7)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timms_models_of_one_size_are_built_for_the_image_size(name):
    pytest.importorskip("timm")
    assert logits_of(make(f"timm/{name}"), 32).shape == (2, 7)


def test_the_image_size_is_that_of_the_data():
    with pytest.raises(UserError, match=r"img_size 64: --data\.image_size 32"):
        build_model("timm/vit_tiny_patch16_224", image_size=32, img_size=64)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_images_are_rgb(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"in_chans cannot be set here; --data\.in_channels 1"):
        build_model(name, in_chans=1)


def test_nothing_of_timm_fetches_weights(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="pretrained cannot be set"):
        build_model("timm/resnet18", pretrained=True)
    with pytest.raises(UserError, match="checkpoint_path cannot be set"):
        build_model("timm/resnet18", checkpoint_path="x.pth")


def test_building_a_model_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(torchvision_timm.torchvision_model("shufflenet_v2_x0_5", 7, 32), nn.Module)


def test_imagenets_stem_can_be_kept_for_small_images():
    with torch.device("meta"):
        kept = build_model("resnet18", 10, 32, keep_stem=True)
        adapted = build_model("resnet18", 10, 32)
    assert (kept.conv1.kernel_size, kept.conv1.stride) == ((7, 7), (2, 2))
    assert (adapted.conv1.kernel_size, adapted.conv1.stride) == ((3, 3), (1, 1))
