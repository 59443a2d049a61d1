"""Stems for small images, and checks of the image size that a model takes."""

import contextlib

import pytest
import torch
import torchvision
from torch import nn

from cifar_lightning.models.registry import build_model
from cifar_lightning.models.stems import adapt_stem, fails_on_single_image, input_error


def make(name, **kwargs):
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # regnets compute their widths with tensors
        return torchvision.models.get_model(name, num_classes=10, **kwargs).to("meta")


def strided(model):
    """Return the kernels and strides of what strides, by name."""
    return {
        name: (layer.kernel_size, layer.stride)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and layer.stride not in (1, (1, 1))
    }


def resolutions_of_convolutions(model, image_size):
    resolutions = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, out: resolutions.append(out.shape[-1]))
    model.eval()(torch.empty(2, 3, image_size, image_size, device="meta"))
    return [size for size in resolutions if size > 1]  # squeeze and excitation convolve a pooled pixel


def test_a_resnet_gets_3x3_filters_without_stride_and_loses_its_pool():
    model, original = make("resnet50"), make("resnet50")
    assert adapt_stem(model)
    conv = model.conv1
    assert (conv.weight.shape, conv.stride, conv.padding) == ((64, 3, 3, 3), (1, 1), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    # All else is as it was: the shortcuts of the later stages, too.
    left = {name: layer for name, layer in strided(original).items() if name not in ("conv1", "maxpool")}
    assert strided(model) == left


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "shufflenet_v2_x0_5",
        "vgg11",
    ],
)
def test_a_total_stride_of_32_becomes_8(name):
    before, model = make(name), make(name)
    assert adapt_stem(model)
    pools = 2 if name == "vgg11" else 1  # its last pool comes after the last convolution
    assert resolutions_of_convolutions(before, 64)[-1] == 2 * pools
    assert resolutions_of_convolutions(model, 64)[-1] == 8 * pools


def test_what_pads_nothing_is_adapted_too():
    model = make("inception_v3", aux_logits=False, init_weights=False)
    assert input_error(model, 32)
    assert adapt_stem(model)
    assert input_error(model, 32) == ""


def test_patches_and_models_of_one_size_are_left_alone():
    transformer = make("vit_b_16", image_size=32)
    patches = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    for model in (transformer, patches):
        before = strided(model)
        assert not adapt_stem(model)
        assert strided(model) == before


def test_a_layer_at_two_places_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(self.pool(self.pool(self.conv(x)))).mean((2, 3))

    model = Twice()
    assert not adapt_stem(model)
    assert isinstance(model.pool, nn.MaxPool2d)


def test_filters_that_stay_as_large_keep_their_values():
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt_stem(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_trial_leaves_the_model_and_the_random_numbers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert input_error(model, 8) == ""
    assert input_error(model, 9)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_model_that_reads_values_is_tried_on_real_tensors():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 10)

        def forward(self, x):
            if x.sum().item() < 0:  # the meta device has no values
                raise RuntimeError("never")
            return self.head(x.mean((2, 3)))

    assert input_error(Peeking(), 8) == ""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(4)), "size"),
        (nn.Conv2d(3, 4, 3, padding=1), r"returns \(2, 4, 4, 4\) and not logits"),
        (nn.MultiheadAttention(4, 1), "missing"),
    ],
)
def test_input_error_says_why_a_model_does_not_take_images(model, reason):
    import re

    assert re.search(reason, input_error(model, 4))


def test_models_that_fail_on_a_single_image_are_known_from_shapes():
    taken = {}
    state = torch.get_rng_state()
    for size, widths in ((8, (2, 2)), (8, (2, 2, 2, 2))):
        torch.manual_seed(0)
        model = build_model("smallnet", 10, size, widths=widths, dropout=0.5).eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = torch.get_rng_state()
        taken[widths] = not fails_on_single_image(model, size)
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with contextlib.nullcontext() if taken[widths] else pytest.raises(ValueError, match="more than 1 value"):
            model.train()(torch.zeros(1, 3, size, size))
    assert taken == {(2, 2): True, (2, 2, 2, 2): False}


def test_the_trial_forward_pass_leaves_no_tensors_in_the_model():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale = nn.BatchNorm2d(3), None

        def forward(self, images):
            self.scale = torch.ones(3, device=images.device) if self.scale is None else self.scale
            return self.norm(images).mean((2, 3)) * self.scale

    model = Keeps()
    assert not fails_on_single_image(model, 8)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
