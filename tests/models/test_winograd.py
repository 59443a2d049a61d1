"""Winograd's convolutions and their gradients equal the direct ones, and a model gets its own back."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fitting import quiet_trainer, small_data
from program import REPO
from torch import nn

from cifar_lightning import ImageClassifier, SmallNet
from cifar_lightning.models import winograd
from cifar_lightning.models.cpu_convolutions import (
    FasterConv2d,
    PooledConv2d,
    faster_convolutions,
    use_faster_convolutions,
)
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.speednet import SpeedNet
from cifar_lightning.training.faster_convolutions import FasterConvolutions

SIZES = [(2, 3), (4, 4), (5, 9), (7, 7), (8, 6), (17, 12)]


@pytest.fixture(autouse=True)
def with_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(winograd, "_WORTHWHILE", 0)


def refuse(*tensors):
    raise AssertionError("not by Winograd's algorithm")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile_bytes", [1, 1 << 20])
def test_a_convolution_and_its_gradients_equal_those_in_float64(height, width, bias, tile_bytes, monkeypatch):
    monkeypatch.setattr(winograd, "_TILE_BYTES", tile_bytes)
    torch.manual_seed(height)
    conv, images = nn.Conv2d(8, 12, 3, padding=1, bias=bias), torch.randn(3, 8, height, width, requires_grad=True)
    exact, direct = copy.deepcopy(conv).double(), copy.deepcopy(conv)
    use_faster_convolutions(conv)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        found, expected = conv(given), exact(images.double())
        torch.testing.assert_close(found.double(), expected, atol=5e-5, rtol=0)
        assert found.stride() == direct(given).stride(), "models that call view on contiguous outputs"
        grad = torch.randn_like(found)
        of_found = torch.autograd.grad(found, (images, *conv.parameters()), grad)
        of_expected = torch.autograd.grad(expected, (images, *exact.parameters()), grad.double())
        for one, other in zip(of_found, of_expected, strict=True):
            torch.testing.assert_close(one.double(), other.double(), atol=5e-4, rtol=0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("size", range(2, 7))
def test_each_size_of_tile_and_a_last_chunk_that_is_smaller_give_the_same(size, monkeypatch):
    monkeypatch.setattr(winograd, "_tiling", lambda *_: winograd._Tiling(size, -(-11 // size), -(-12 // size)))
    monkeypatch.setattr(winograd._Tiling, "chunk_size", lambda *_: 2)
    torch.manual_seed(size)
    images, weight = torch.randn(3, 8, 11, 12), torch.randn(6, 8, 3, 3)
    exact = [tensor.double().requires_grad_() for tensor in (images, weight)]
    expected = nn.functional.conv2d(*exact, padding=1)
    grad = torch.randn_like(expected)
    found = [
        winograd._convolve(images, weight, images.shape),
        *winograd._gradients(images, weight, grad.float(), True, True),
    ]
    for one, other in zip(found, (expected.detach(), *torch.autograd.grad(expected, exact, grad)), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 8), (15, 11), (13, 3), (2, 2)])
def test_before_a_pooling_what_it_drops_need_not_be_computed(height, width):
    torch.manual_seed(height)
    conv, images = PooledConv2d(8, 12, 3, padding=1, bias=False), torch.randn(3, 8, height, width, requires_grad=True)
    direct, pool = copy.deepcopy(conv).double(), nn.MaxPool2d(2)
    grad = torch.randn(3, 12, height // 2, width // 2)
    expected = pool(direct(images.double()))
    gradients = torch.autograd.grad(expected, (images, direct.weight), grad.double())
    with faster_convolutions(conv):
        output = conv(images)
        assert output.shape[2:] == (height // 2 * 2, width // 2 * 2)
        found = torch.autograd.grad(pool(output), (images, conv.weight), grad)
        (of_grad,) = torch.autograd.grad(pool(conv(images)).square().sum(), images, create_graph=True)
    assert type(conv) is PooledConv2d
    torch.testing.assert_close(pool(output).double(), expected, atol=1e-4, rtol=0)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=5e-4, rtol=0)
    (of_direct,) = torch.autograd.grad(pool(direct(images.double())).square().sum(), images)
    torch.testing.assert_close(of_grad, of_direct, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("wanted", ["images", "weight"])
def test_one_gradient_alone_and_a_gradient_of_a_gradient(wanted):
    torch.manual_seed(0)
    conv, images = nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.randn(2, 4, 7, 10)
    direct = copy.deepcopy(conv)
    use_faster_convolutions(conv)
    penalties = []
    for layer in (conv, direct):
        leaf = images.clone().requires_grad_(wanted == "images")
        layer.weight.requires_grad_(wanted == "weight")
        variable = leaf if wanted == "images" else layer.weight
        (grad,) = torch.autograd.grad(layer(leaf).square().sum(), variable, create_graph=True)
        (penalty,) = torch.autograd.grad(grad.square().sum(), variable)
        (plain,) = torch.autograd.grad(layer(leaf).square().sum(), variable)
        penalties.append((grad.detach(), penalty, plain))
    for one, other in zip(*penalties, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("shape", "filters", "expected"),
    [
        ((1000, 64, 15, 15), 256, True),
        ((128, 128, 16, 16), 128, True),
        ((500, 256, 3, 3), 256, True),
        ((500, 24, 31, 31), 64, False),  # few channels: the transforms cost more
        ((128, 64, 32, 32), 64, False),
        ((1, 256, 8, 8), 256, False),  # the weights' transform costs more for one image
        ((128, 16, 16, 16), 32, False),
        ((0, 256, 8, 8), 256, False),
    ],
)
def test_it_is_used_where_it_was_measured_to_gain(shape, filters, expected):
    assert (winograd._saving(torch.Size(shape), filters) > winograd._WORTHWHILE) is expected


@pytest.mark.usefixtures("always")
def test_gradients_computed_under_autocast_are_those_in_float32():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(8, 12, 3, padding=1), torch.randn(2, 8, 7, 10)
    use_faster_convolutions(conv)
    loss = conv(images).square().sum()
    (expected,) = torch.autograd.grad(loss, conv.weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):  # as where `backward` is called by hand
        (found,) = torch.autograd.grad(loss, conv.weight)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("size", [24, 28, 32])
@pytest.mark.parametrize("depth", [2, 3])
def test_speednet_whose_poolings_drop_rows_and_columns_is_the_same(size, depth):
    torch.manual_seed(0)
    model, images = SpeedNet(widths=(4, 8, 8), depth=depth).double(), torch.randn(8, 3, size, size)
    found = copy.deepcopy(model).float()
    nn.functional.cross_entropy(model(images.double()), torch.arange(8)).backward()
    with faster_convolutions(found):
        nn.functional.cross_entropy(found(images), torch.arange(8)).backward()
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, atol=2e-3, rtol=1e-2)


def test_probabilities_of_a_model_differ_by_less_than_1e_4():
    torch.manual_seed(0)
    model, images = build_model("smallnet", 10, 16).train(), torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        model(images)  # statistics of BatchNorm
        logits = model.eval()(images)
        scale = 10 / logits.std()  # so that some predictions are sure and some are not
        with faster_convolutions(model):
            assert any(type(module) is FasterConv2d for module in model.modules())
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
    "spectral_norm_of_old": lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "pruned": lambda: nn.utils.prune.l1_unstructured(nn.Conv2d(8, 8, 3, padding=1), "weight", 0.5),
    "float64": lambda: nn.Conv2d(8, 8, 3, padding=1).double(),
    "autocast": lambda: InAutocast(nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_changes_weights_or_precision_itself_predicts_as_without(name):
    def make():
        torch.manual_seed(0)
        return MODELS[name]().eval()

    model, plain, images = make(), make(), torch.randn(2, 8, 7, 10)
    images = images.to(next(plain.parameters()).dtype)
    with torch.no_grad(), faster_convolutions(model):
        found = [model(images) for _ in range(3)]
    with torch.no_grad():
        torch.testing.assert_close(found, [plain(images) for _ in range(3)], atol=5e-5, rtol=1e-5)


@pytest.mark.usefixtures("always")
def test_other_layers_stay_and_the_model_is_as_before_after_an_error(monkeypatch):
    layers = {
        "strided": nn.Conv2d(8, 8, 3, 2, 1),
        "unpadded": nn.Conv2d(8, 8, 3),
        "wide": nn.Conv2d(8, 8, 5, padding=2),
        "dilated": nn.Conv2d(8, 8, 3, padding=1, dilation=2),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "reflected": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "own": type("Own", (nn.Conv2d,), {})(8, 8, 3, padding=1),
    }
    model = nn.ModuleDict({**layers, "plain": nn.Conv2d(8, 8, 3, padding=1)})
    kept, images, seen = set(model["plain"].__dict__), torch.randn(1, 8, 8, 8), []
    model["plain"].register_forward_hook(lambda *_: seen.append(1))
    before = model["plain"](images)

    def stop():
        with faster_convolutions(model):
            assert [name for name, layer in model.items() if isinstance(layer, FasterConv2d)] == ["plain"]
            model["plain"](images)
            monkeypatch.setattr(winograd, "_convolve", refuse)
            assert torch.equal(model["plain"](images[0]), before[0]), "one image, not a batch"
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert type(model["plain"]) is nn.Conv2d
    assert set(model["plain"].__dict__) == kept
    assert torch.equal(model["plain"](images), before)
    assert len(seen) == 4


@pytest.mark.usefixtures("always")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")  # deprecated, and what TensorBoard traces with
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the tests' check of types
def test_a_trace_and_an_export_have_the_direct_convolution(monkeypatch):
    conv, images = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)
    use_faster_convolutions(conv)
    monkeypatch.setattr(winograd, "_convolve", refuse)
    assert "_convolution" in str(torch.jit.trace(conv, images, check_trace=False).graph)
    exported = torch.export.export(conv, (images,)).graph
    assert any(node.target is torch.ops.aten.conv2d.default for node in exported.nodes)


@pytest.mark.usefixtures("always")
def test_a_model_in_use_by_another_thread_predicts_on(monkeypatch):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    images = torch.randn(1, 8, 8, 8)
    expected = conv(images).detach()
    convolve, calls = winograd._convolve, []

    def end_and_convolve(*tensors):
        calls.append(1)
        conv.__class__ = nn.Conv2d  # as another thread may, in the midst of a forward pass
        return convolve(*tensors)

    monkeypatch.setattr(winograd, "_convolve", end_and_convolve)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: _predict_faster(conv, images, expected), range(40)))
    assert type(conv) is nn.Conv2d
    assert calls


def _predict_faster(conv, images, expected):
    with torch.no_grad(), faster_convolutions(conv):
        torch.testing.assert_close(conv(images), expected, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_an_output_can_be_changed_in_place(memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False).to(memory_format=memory_format)
    direct, images = copy.deepcopy(conv), torch.randn(2, 8, 8, 8)
    use_faster_convolutions(conv)
    outputs = []
    for layer in (conv, direct):
        output = layer(images)
        output += images
        output.relu_().sum().backward()
        outputs.append((output.detach(), layer.weight.grad))
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-4)


@pytest.mark.usefixtures("always")
def test_it_is_not_used_where_products_are_less_precise_or_transformed(monkeypatch):
    conv, images = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)
    expected = conv(images)
    use_faster_convolutions(conv)
    assert not torch.equal(conv(images), expected)
    monkeypatch.setattr(winograd, "_convolve", refuse)
    for precision in ("bf16", "tf32"):
        torch.backends.mkldnn.matmul.fp32_precision = precision
        try:
            torch.testing.assert_close(conv(images), expected)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = "none"
    each = torch.func.vmap(lambda image: conv(image[None])[0])(images)
    torch.testing.assert_close(each, expected)
    conv.stride = (2, 2)  # by code of one's own, in the midst of a run
    assert conv(images).shape == (2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="channels"):
        conv(images[:, :4])


@pytest.mark.usefixtures("always")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch's forward mode uses it
def test_derivatives_of_other_modes_are_those_of_the_direct_convolution():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    direct = copy.deepcopy(conv)
    use_faster_convolutions(conv)
    for strategy in ("reverse-mode", "forward-mode"):
        found, expected = (
            torch.autograd.functional.jacobian(layer, images, vectorize=True, strategy=strategy)
            for layer in (conv, direct)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("always")
def test_without_mkl_the_direct_one_is_used(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(winograd, "_convolve", refuse)
    conv, images = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)
    with faster_convolutions(conv):
        assert conv(images).shape == images.shape


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_plain_convolution(copied):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    with faster_convolutions(model):
        assert type(copied(model)[0]) is nn.Conv2d
        assert type(model[0]) is FasterConv2d
    assert torch.equal(copied(model)[0].weight, model[0].weight)


@pytest.mark.usefixtures("always")
def test_a_layer_that_is_parametrized_meanwhile_stays_so():
    model, images = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), torch.randn(2, 8, 8, 8)
    with faster_convolutions(model):
        nn.utils.parametrizations.weight_norm(model[0])
        inside = model(images)
    torch.testing.assert_close(model(images), inside, atol=2e-5, rtol=0)
    torch.testing.assert_close(nn.functional.conv2d(images, model[0].weight, model[0].bias, padding=1), inside)


COMPILED = """
import torch
from torch import nn
from cifar_lightning.models import cpu_convolutions, winograd

winograd._WORTHWHILE = 0
conv, images = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 8, 8)
expected = conv(images)
cpu_convolutions.use_faster_convolutions(conv)
winograd._convolve = None
torch.testing.assert_close(torch.compile(conv, backend="eager", fullgraph=True)(images), expected)
"""


@pytest.mark.slow  # torch's compiler takes seconds to import
def test_a_compiled_graph_is_whole_and_has_the_direct_convolution():
    # A process of its own: the tests' check of types cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr


def test_one_within_another_ends_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    with faster_convolutions(model):
        with faster_convolutions(model):
            pass
        assert type(model[0]) is FasterConv2d
    assert type(model[0]) is nn.Conv2d


def is_changed(model):
    return any(type(module) is FasterConv2d for module in model.modules())


class Note(pl.Callback):
    """Notes whether the model has other convolutions in each stage, and may end training by an error."""

    def __init__(self, error=None):
        self.seen, self.error = {}, error

    def note(self, trainer, pl_module, *_):
        self.seen[trainer.state.stage.value] = is_changed(pl_module)
        if self.error and trainer.training:
            raise self.error

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = note


def small_classifier():
    pl.seed_everything(0)
    model = SmallNet(10, widths=(4, 8, 16))
    return model, ImageClassifier(model=model, num_classes=10, lr=1e-3)


@pytest.mark.usefixtures("always")
def test_training_on_a_cpu_uses_it_forward_and_backward(monkeypatch, tmp_path):
    counts = {"_convolve": 0, "_gradients": 0}

    def train(patched):
        model, classifier = small_classifier()
        with monkeypatch.context() as patch:
            if patched:
                for name in counts:
                    patch.setattr(winograd, name, partial(counted, name, getattr(winograd, name)))
            else:
                patch.setattr(winograd, "_WORTHWHILE", 1e9)
            quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(classifier, small_data())
        return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    def counted(name, function, *arguments):
        counts[name] += 1
        return function(*arguments)

    found, expected = train(True), train(False)
    assert counts == dict.fromkeys(counts, 9 * 6), "6 convolutions in 9 steps"
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("always")
def test_every_stage_uses_it_and_the_model_is_left_as_it_was(tmp_path):
    winograd._matrices.cache_clear()  # so that they are made in inference mode, and then used to train
    model, classifier = small_classifier()
    note = Note()
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=1, callbacks=[note])
    for stage in (trainer.validate, trainer.fit, trainer.test, trainer.predict):
        stage(classifier, datamodule=small_data())
        assert not is_changed(model)
    assert note.seen == dict.fromkeys(("sanity_check", "train", "validate", "test", "predict"), True)
    assert sum(isinstance(callback, FasterConvolutions) for callback in trainer.callbacks) == 1


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_a_model_whose_training_ends_by_an_error_is_left_as_it_was(error, tmp_path):
    model, classifier = small_classifier()
    note = Note(error)
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[note]).fit(classifier, small_data())
    assert note.seen["train"]
    assert not is_changed(model)
