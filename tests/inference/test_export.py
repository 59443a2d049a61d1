"""Exported models predict as PyTorch does at every batch size, and carry their metadata."""

import importlib.metadata
import importlib.util
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_run import made_predictions
from torch import nn

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.loading import load_weights
from cifar_lightning.data.datasets import open_source
from cifar_lightning.errors import RunError
from cifar_lightning.inference import export
from cifar_lightning.inference.export import export_run
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.metrics.calibration import fit_temperature
from cifar_lightning.models.registry import build_model
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.tta import tta_logits
from cifar_lightning.transforms.augmentation import normalize

CLASSES = [f"class {k}" for k in range(10)]


def make_run(path, name="smallnet", tta="none", **model_kwargs):
    """Write a run whose model has random weights and statistics, so that predictions are spread over the classes."""
    run = RunFolder(path)
    run.checkpoints.mkdir(parents=True)
    torch.manual_seed(1)
    module = ImageClassifier(name, 10, 32, tta=tta, model_kwargs=model_kwargs)
    for layer in module.model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.weight, 0.8, 1.6)
            nn.init.normal_(layer.bias, std=0.3)
        elif isinstance(layer, nn.Linear):
            head = layer
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    images = normalize(torch.from_numpy(test_images(256).copy()), mean=torch.tensor(mean), std=torch.tensor(std))
    with torch.no_grad():  # logits as a trained model's: no class is predicted for all images, none saturates
        logits = module.model.eval()(images)
        head.bias.sub_(logits.mean(0))
        scale = 2 / (logits - logits.mean(0)).std()
        head.bias.mul_(scale)
        head.weight.mul_(scale)
    data = {"class_names": CLASSES, "image_size": 32, "mean": mean, "std": std}
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 2}
    torch.save(checkpoint | {"ImageDataModule": data}, run.best_checkpoint)
    np.savez(run.gallery, images=test_images(300), indices=np.arange(300))
    return run


def test_images(num):
    """Images of the synthetic test set, NHWC."""
    return open_source("synthetic", "data", None).load("test").images[:num]


test_images.__test__ = False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("export") / "run", widths=[4, 8])
    logits, targets = made_predictions(10, 500, sharpness=2)
    np.savez(run.predictions_val, logits=logits, targets=targets, indices=np.arange(500), class_names=np.array(CLASSES))
    return run


def ask_onnx(path, images, output="logits"):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda size: np.concatenate(
        [session.run([output], {"images": images[at : at + size]})[0] for at in range(0, len(images), size)]
    )


def assert_onnx_predicts_as_pytorch(run, path, images, sizes):
    """Compare one pass over the images, in batches whose sizes are `sizes` in turn."""
    trained = load_trained_model(run)
    parts = torch.from_numpy(images.copy()).split(256)
    expected = torch.cat([trained.logits(part) for part in parts]).softmax(1).numpy()
    assert len(set(expected.argmax(1).tolist())) >= 3
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = np.split(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), np.cumsum(sizes)[:-1])
    assert [len(batch) for batch in batches] == list(sizes)
    probs = np.concatenate([session.run(["probs"], {"images": batch})[0] for batch in batches])
    assert np.abs(probs - expected).max() < 1e-4
    assert (probs.argmax(1) == expected.argmax(1)).all()


def test_onnx_takes_raw_images_in_batches_of_any_size(run, tmp_path, capsys):
    path = export_run(run, "onnx", output=tmp_path / "net.onnx", probs=True)
    assert_onnx_predicts_as_pytorch(run, path, test_images(72), (1, 7, 64))
    out = capsys.readouterr()
    assert "256 test images: largest difference of a probability" in out.out
    assert f"{tmp_path / 'MODEL_CARD.md'}: " in out.out
    assert out.err == ""
    text = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "\n# run\n" in text
    assert "weights of epoch 3" in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["MODEL_CARD.md", "net.onnx"]  # one file, and its card


def test_the_graph_has_the_promised_names_and_metadata(run, tmp_path):
    path = export_run(run, "onnx", output=tmp_path / "net.onnx")
    model = onnx.load(path)
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [dim.dim_value for dim in images.type.tensor_type.shape.dim][1:] == [3, 32, 32]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == CLASSES
    assert metadata["checkpoint_sha256"] == load_trained_model(run).sha256
    assert (metadata["image_size"], metadata["epoch"]) == ("32", "3")
    assert metadata["cifar_lightning"] == importlib.metadata.version("cifar-lightning")


def test_calibrated_logits_are_refused_for_weights_alone_and_for_a_run_without_a_temperature(run, tmp_path):
    with pytest.raises(UserError, match="safetensors"):
        export_run(run, "safetensors", output=tmp_path / "net.safetensors", calibrated=True)
    other = RunFolder(shutil.copytree(run.path, tmp_path / "other"))
    other.predictions_val.unlink()
    with pytest.raises(UserError, match="--calibrated"):
        export_run(other, "torch", calibrated=True)
    assert not (other.path / "model.pt2").exists()


def test_float_input_and_uint8_input_give_the_same_predictions(run, tmp_path):
    images = np.ascontiguousarray(test_images(20).transpose(0, 3, 1, 2))
    raw = ask_onnx(export_run(run, "onnx", output=tmp_path / "raw.onnx"), images)(20)
    path = export_run(run, "onnx", output=tmp_path / "float.onnx", input="float")
    np.testing.assert_allclose(ask_onnx(path, images.astype(np.float32) / 255)(20), raw, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its loader
def test_the_torch_archive_runs_at_any_batch_size_calibrated_and_holds_its_metadata(run, tmp_path):
    path = export_run(run, "torch", output=tmp_path / "net.pt2", probs=True, calibrated=True)
    extra = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == CLASSES
    images = torch.from_numpy(test_images(9).copy())
    with np.load(run.predictions_val) as val:
        temperature = fit_temperature(val["logits"], val["targets"])
    assert abs(temperature - 1) > 0.1
    assert float(json.loads(extra["metadata.json"])["temperature"]) == temperature
    assert f"temperature {temperature:.4g}" in (tmp_path / "MODEL_CARD.md").read_text()
    expected = load_trained_model(run).logits(images) / temperature
    for size in (1, 2, 9):
        logits, probs = module(images[:size].permute(0, 3, 1, 2))
        torch.testing.assert_close(logits, expected[:size], atol=1e-4, rtol=0)
        torch.testing.assert_close(probs, expected[:size].softmax(1), atol=1e-4, rtol=0)


def test_safetensors_hold_the_weights_and_how_to_build_the_model(run, tmp_path):
    from safetensors import safe_open

    path = export_run(run, "safetensors", output=tmp_path / "net.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = build_model(**json.loads(metadata["architecture"]))
    load_weights(model, path)
    expected = load_trained_model(run).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert json.loads(metadata["mean"]) == pytest.approx([0.4, 0.5, 0.6])


def test_the_graph_averages_the_views_of_tta(tmp_path):
    run = make_run(tmp_path / "run", tta="six", widths=[4, 8])
    path = export_run(run, "onnx", output=None)
    raw_images = torch.from_numpy(test_images(20).copy())
    trained = load_trained_model(run)
    images = normalize(raw_images, mean=torch.tensor(trained.mean), std=torch.tensor(trained.std))
    with torch.no_grad():
        expected, plain = tta_logits(trained.model, images, "six")
    logits = ask_onnx(path, raw_images.permute(0, 3, 1, 2).numpy())(7)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    assert not np.allclose(logits, plain.numpy(), atol=1e-2)
    assert "--model.tta six" in (run.path / "MODEL_CARD.md").read_text()


def test_without_test_images_random_ones_are_checked_and_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", widths=[4])
    run.gallery.unlink()
    export_run(run, "safetensors")
    assert "Parity on 256 random images" in capsys.readouterr().out
    assert (run.path / "model.safetensors").exists()


def test_a_file_that_predicts_differently_is_not_kept(run, tmp_path, monkeypatch):
    class Wrong(export.ExportedModel):
        def forward(self, images):
            return (super().forward(images)[0] + torch.arange(10.0) / 100,)

    monkeypatch.setattr(export, "ExportedModel", Wrong)
    with pytest.raises(RuntimeError, match="differ from PyTorch"):
        export_run(run, "torch", output=tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


class Own(nn.Module):
    """A linear model with a layer that has the weight of another, or a forward that no graph holds."""

    most = None  # images that fit into memory

    def __init__(self, kind, num_classes=10):
        super().__init__()
        self.kind = kind
        self.tied, self.head = nn.Linear(3, num_classes, bias=False), nn.Linear(3, num_classes)
        self.tied.weight = self.head.weight

    def forward(self, images):
        if self.most is not None and len(images) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        features = images.mean((2, 3))
        if self.kind == "random":
            features = nn.functional.dropout(features, 0.9)
        if self.kind == "branch" and features.sum() > 0:
            features = -features
        return self.head(features) + self.tied(features)


@pytest.mark.parametrize("kind", ["onnx", "torch", "safetensors"])
def test_a_model_with_a_weight_in_two_layers_is_exported(kind, tmp_path):
    run = make_run(tmp_path / "run", f"{__name__}:Own", kind="plain")
    assert export_run(run, kind, trust_code=True).stat().st_size > 0


def test_large_images_are_compared_in_small_batches_and_memory_that_is_short_is_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", f"{__name__}:Own", kind="plain")
    monkeypatch.setattr(Own, "most", 31)
    path = export_run(run, "safetensors", trust_code=True)
    assert path.stat().st_size > 0
    monkeypatch.setattr(Own, "most", 7)
    with pytest.raises(RunError, match="out of memory"):
        export_run(run, "safetensors", output=tmp_path / "net.safetensors", trust_code=True)
    assert not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_model_that_no_graph_holds_is_refused_with_the_reason(kind, tmp_path):
    run = make_run(tmp_path / "run", f"{__name__}:Own", kind="branch")
    with pytest.raises(UserError, match=rf"--format {kind}: .*data-dependent"):
        export_run(run, kind, output=tmp_path / "net.file", trust_code=True)
    assert not (tmp_path / "net.file").exists()


def test_a_model_that_is_random_or_inexact_in_float16_ends_without_a_traceback(run, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="random"):
        export_run(make_run(tmp_path / "run", f"{__name__}:Own", kind="random"), "safetensors", trust_code=True)
    monkeypatch.setattr(export, "HALF_TOLERANCE", 1e-9)
    with pytest.raises(RunError, match="--half"):
        export_run(run, "safetensors", output=tmp_path / "net.safetensors", half=True)


def test_what_is_in_the_way_is_named_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_trained_model", None)
    there = tmp_path / "net.onnx"
    there.touch()
    for output, message in (
        (there, "exists; .*--force"),
        (tmp_path / "no" / "net.onnx", "there is no folder"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(run, "onnx", output=output)
    with pytest.raises(UserError, match="has weights only"):
        export_run(run, "safetensors", output=tmp_path / "x.safetensors", probs=True)


def test_a_missing_package_names_the_command_that_installs_it(run, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'cifar-lightning\[export\]'"):
        export_run(run, "onnx", output=tmp_path / "net.onnx")


def test_force_overwrites(run, tmp_path):
    there = tmp_path / "net.safetensors"
    there.write_bytes(b"old")
    export_run(run, "safetensors", output=there, force=True)
    assert there.stat().st_size > 1000


@pytest.mark.slow(first=True)
@pytest.mark.parametrize(("name", "sizes"), [("smallnet", (1, 7, 224, 512, 256)), ("resnet18", (1, 7, 64))])
def test_onnx_agrees_on_test_images_in_batches_of_many_sizes(tmp_path, name, sizes):
    run = make_run(tmp_path / "run", name)
    path = export_run(run, "onnx", probs=True)
    assert_onnx_predicts_as_pytorch(run, path, test_images(sum(sizes)), sizes)
