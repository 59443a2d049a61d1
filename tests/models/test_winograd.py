"""Winograd's convolutions equal the direct ones, and a model gets its own back."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cifar_lightning.models import winograd
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.winograd import WinogradConv2d, fewer_multiplications


@pytest.fixture(autouse=True)
def few_channels(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 9), (7, 7), (8, 6), (17, 12)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile_bytes", [1, 1 << 20])
def test_a_convolution_equals_the_one_in_float64(height, width, bias, tile_bytes, monkeypatch):
    monkeypatch.setattr(winograd, "_TILE_BYTES", tile_bytes)
    torch.manual_seed(height)
    conv, images = nn.Conv2d(8, 12, 3, padding=1, bias=bias), torch.randn(3, 8, height, width)
    expected, direct = copy.deepcopy(conv).double()(images.double()), copy.deepcopy(conv)
    with torch.inference_mode(), fewer_multiplications(conv):
        assert type(conv) is WinogradConv2d
        for given in (images, images.contiguous(memory_format=torch.channels_last)):
            found = conv(given)
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
            assert found.stride() == direct(given).stride(), "models that call view on contiguous outputs"


def test_probabilities_of_a_model_differ_by_less_than_1e_4():
    torch.manual_seed(0)
    model, images = build_model("smallnet", 10, 16).train(), torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        model(images)  # statistics of BatchNorm
        logits = model.eval()(images)
        scale = 10 / logits.std()  # so that some predictions are sure and some are not
        with fewer_multiplications(model):
            assert any(type(module) is WinogradConv2d for module in model.modules())
            again = model(images)
    assert not torch.equal(again, logits), "another order of sums"
    assert (scale * again).softmax(1).sub((scale * logits).softmax(1)).abs().max() < 1e-4


class ChangesWeights(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.conv, self.change = nn.Conv2d(8, 8, 3, padding=1), change

    def forward(self, images):
        self.change(self.conv)
        return self.conv(images)


class InAutocast(nn.Sequential):
    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images)


MODELS = {
    "changed": lambda: ChangesWeights(lambda conv: conv.weight.mul_(0.9)),
    "changed_data": lambda: ChangesWeights(lambda conv: conv.weight.data.mul_(0.9)),
    "assigned": lambda: ChangesWeights(lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight + 0.1))),
    "changed_bias": lambda: ChangesWeights(lambda conv: conv.bias.add_(1)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "autocast": lambda: InAutocast(nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_changes_weights_or_precision_itself_predicts_as_without(name):
    def make():
        torch.manual_seed(0)
        return MODELS[name]().eval()

    model, plain, images = make(), make(), torch.randn(2, 8, 7, 10)
    with torch.no_grad(), fewer_multiplications(model):
        found = [model(images) for _ in range(3)]
    with torch.no_grad():
        torch.testing.assert_close(found, [plain(images) for _ in range(3)], atol=5e-5, rtol=0)


def test_other_layers_stay_and_the_model_is_as_before_after_an_error():
    layers = {
        "few": nn.Conv2d(4, 8, 3, padding=1),
        "strided": nn.Conv2d(8, 8, 3, 2, 1),
        "unpadded": nn.Conv2d(8, 8, 3),
        "wide": nn.Conv2d(8, 8, 5, padding=2),
        "dilated": nn.Conv2d(8, 8, 3, padding=1, dilation=2),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "reflected": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "float64": nn.Conv2d(8, 8, 3, padding=1).double(),
        "pruned": prune.identity(nn.Conv2d(8, 8, 3, padding=1), "weight"),  # computes its weight in every forward
        "own": type("Own", (nn.Conv2d,), {})(8, 8, 3, padding=1),
    }
    model = nn.ModuleDict({**layers, "plain": nn.Conv2d(8, 8, 3, padding=1)})
    kept, images, seen = set(model["plain"].__dict__), torch.randn(1, 8, 8, 8), []
    model["plain"].register_forward_hook(lambda *_: seen.append(1))
    before = model["plain"](images)

    def stop():
        with fewer_multiplications(model):
            assert [name for name, layer in model.items() if isinstance(layer, WinogradConv2d)] == ["plain"]
            assert torch.equal(model["plain"](images), before), "with gradients"
            with torch.inference_mode():
                assert torch.equal(model["plain"](images[0]), before[0]), "one image, not a batch"
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert type(model["plain"]) is nn.Conv2d
    assert set(model["plain"].__dict__) == kept
    assert torch.equal(model["plain"](images), before)
    assert len(seen) == 4


def test_a_model_in_use_by_another_thread_predicts_on():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    images = torch.randn(1, 8, 8, 8)
    expected = conv(images).detach()

    def check():
        with torch.no_grad():
            torch.testing.assert_close(conv(images), expected, atol=2e-5, rtol=0)

    # As another thread may see it: while weights are transformed, and between two lines of a forward pass.
    transformed, kept = winograd._transformed, torch.equal

    def transform_and_predict(weight):
        check()
        return transformed(weight)

    def equal_and_end(*tensors):
        conv.__class__ = nn.Conv2d
        del conv.transformed
        return kept(*tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_transformed", transform_and_predict)
        with fewer_multiplications(conv):
            patch.setattr(torch, "equal", equal_and_end)
            check()
            check()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: _predict_faster(conv, images, expected), range(20)))
    assert type(conv) is nn.Conv2d
    assert "transformed" not in conv.__dict__


def _predict_faster(conv, images, expected):
    with torch.no_grad(), fewer_multiplications(conv):
        torch.testing.assert_close(conv(images), expected, atol=2e-5, rtol=0)
