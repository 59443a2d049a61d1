"""Weight gradients of packed rows equal those of torch, and are used in bfloat16 where they were measured to gain."""

import copy

import pytest
import torch
from fitting import quiet_trainer, small_data
from torch import nn

from cifar_lightning import ImageClassifier
from cifar_lightning.models import packed_rows
from cifar_lightning.models.cpu_convolutions import faster_convolutions
from cifar_lightning.models.speednet import SpeedNet


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(packed_rows, "is_worthwhile", lambda *_: True)


@pytest.fixture
def packed_shapes(monkeypatch):
    """Notes the shapes that are packed."""
    shapes, pack = [], packed_rows._packed
    monkeypatch.setattr(packed_rows, "_packed", lambda images, num: shapes.append(images.shape) or pack(images, num))
    return shapes


def gradients(conv, images, grad):
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(images)
    return output, torch.autograd.grad(output, (images, *conv.parameters()), grad.to(output.dtype))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (5, 3), (3, 7), (8, 8), (4, 40)])
@pytest.mark.parametrize("num", [1, 7, 67])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_equal_those_in_float64(height, width, num, bias, packed_shapes):
    torch.manual_seed(num)
    conv = nn.Conv2d(6, 5, 3, padding=1, bias=bias)
    with torch.no_grad():  # so that nothing but sums is rounded
        for parameter in conv.parameters():
            parameter.copy_(parameter.bfloat16())
    images = torch.randn(num, 6, height, width).bfloat16().float().requires_grad_()
    exact, grad = copy.deepcopy(conv).double(), torch.randn(num, 5, height, width).bfloat16()
    expected = exact(images.double())
    of_expected = torch.autograd.grad(expected, (images, *exact.parameters()), grad.double())
    with faster_convolutions(conv):
        for given in (images, images.contiguous(memory_format=torch.channels_last)):
            output, found = gradients(conv, images if given is images else given.detach().requires_grad_(), grad)
            assert output.dtype == torch.bfloat16
            for one, other in zip((output.detach(), *found), (expected.detach(), *of_expected), strict=True):
                torch.testing.assert_close(one.double(), other.double(), atol=2e-2 * float(other.abs().max()), rtol=0)
    assert packed_shapes == [grad.shape, images.shape] * 2


@pytest.mark.parametrize(
    ("shape", "filters", "expected"),
    [
        ((1000, 256, 5, 5), 256, True),
        ((128, 256, 8, 8), 256, True),
        ((128, 512, 2, 2), 512, True),
        ((128, 512, 1, 1), 512, False),  # not measured, as are fewer than 64 images
        ((1000, 64, 11, 11), 256, False),  # a row fills a third of a tile: packing costs what it gains
        ((128, 32, 8, 8), 64, False),
        ((32, 256, 6, 6), 256, False),
    ],
)
def test_they_are_used_where_they_were_measured_to_gain(shape, filters, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert packed_rows.is_worthwhile(torch.Size(shape), filters) is expected
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not packed_rows.is_worthwhile(torch.Size(shape), filters)


@pytest.mark.usefixtures("always")
def test_in_float32_without_gradients_and_of_a_frozen_weight_nothing_is_packed(packed_shapes):
    conv, images = nn.Conv2d(4, 4, 3, padding=1), torch.randn(3, 4, 5, 5, requires_grad=True)
    with faster_convolutions(conv):
        conv(images).sum().backward()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            conv(images)
        conv.weight.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            conv(images).sum().backward()
    assert not packed_shapes
    assert images.grad is not None


@pytest.mark.usefixtures("always")
def test_a_model_in_bfloat16_without_autocast_is_packed_too(packed_shapes):
    conv, images = nn.Conv2d(4, 6, 3, padding=1).bfloat16(), torch.randn(3, 4, 5, 5).bfloat16()
    with faster_convolutions(conv):
        conv(images).sum().backward()
    assert len(packed_shapes) == 2
    assert conv.weight.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("always")
def test_a_gradient_of_the_gradient_is_that_of_torch():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.randn(3, 4, 5, 5)
    penalties = []
    for enabled in (True, False):
        with faster_convolutions(conv if enabled else nn.Identity()), torch.autocast("cpu", torch.bfloat16):
            (grad,) = torch.autograd.grad(conv(images).square().sum(), conv.weight, create_graph=True)
            penalties.append(torch.autograd.grad(grad.square().sum(), conv.weight)[0])
    torch.testing.assert_close(*penalties)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("size", [24, 32])
def test_training_speednet_in_bf16_mixed_packs_its_rows_and_changes_only_rounding(size, packed_shapes, tmp_path):
    def weights(enabled, monkeypatch):
        torch.manual_seed(0)
        model = SpeedNet(10, widths=(8, 8, 8))
        classifier = ImageClassifier(model=model, num_classes=10, optimizer="sgd", lr=1e-3)
        with monkeypatch.context() as patch:
            patch.setattr(packed_rows, "is_worthwhile", lambda *_: enabled)
            trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, precision="bf16-mixed")
            trainer.fit(classifier, small_data(image_size=size))
        return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    with pytest.MonkeyPatch.context() as monkeypatch:
        found = weights(True, monkeypatch)
        assert packed_shapes
        expected = weights(False, monkeypatch)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
