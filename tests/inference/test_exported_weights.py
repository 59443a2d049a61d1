"""A file of `export --format safetensors` is a model again, with its preprocessing, without the run."""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import made_predictions
from PIL import Image
from program import decode_here
from safetensors import safe_open
from safetensors.torch import save_file
from test_export import CLASSES, make_run, test_images

from cifar_lightning import UserError, load
from cifar_lightning.checkpoints.pretrained import load_pretrained
from cifar_lightning.cli.main import run_command
from cifar_lightning.inference.export import export_run
from cifar_lightning.inference.trained_model import fitted_temperature, load_trained_model
from cifar_lightning.metrics.calibration import fit_temperature
from cifar_lightning.models.registry import build_model
from cifar_lightning.runs.folder import RunFolder, create_run, weights_file
from cifar_lightning.runs.lock import RunLock

TEST_BATCH = Path(__file__).parents[2] / "data" / "cifar-10-batches-py" / "test_batch"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("exported") / "run", tta="mirror", widths=[4, 8])
    run.config.touch()
    logits, targets = made_predictions(10, 500, sharpness=2)
    np.savez(run.predictions_val, logits=logits, targets=targets, indices=np.arange(500), class_names=np.array(CLASSES))
    return run


def exported(run, folder, **how):
    """Export into a folder that holds nothing else of the run but its config."""
    folder.mkdir()
    (folder / "config.yaml").touch()
    export_run(run, "safetensors", output=folder / "model.safetensors", **how)
    return RunFolder(folder)


def tensors_of(file):
    names = file.keys()
    return {name: file.get_tensor(name) for name in names}


def test_it_predicts_as_the_run_does_and_has_its_temperature(run, tmp_path):
    alone = exported(run, tmp_path / "alone")
    ours, theirs = load_trained_model(alone), load_trained_model(run)
    images = torch.from_numpy(test_images(50).copy())
    assert torch.equal(ours.logits(images), theirs.logits(images))
    for name in ("tta", "class_names", "image_size", "resize", "mean", "std", "architecture", "memory_format", "epoch"):
        assert getattr(ours, name) == getattr(theirs, name)
    with np.load(run.predictions_val) as val:
        expected = fit_temperature(val["logits"], val["targets"])
    assert fitted_temperature(alone) == fitted_temperature(run) == expected != 1
    assert load_trained_model(alone, calibrated=True).temperature == expected
    both = [load(each).predict(images.numpy(), calibrated=True) for each in (alone.path, run.path)]
    assert both[0] == both[1]
    assert load(alone.path).class_names == tuple(CLASSES)
    assert weights_file(alone.path) == alone.exported_weights


def test_a_checkpoint_next_to_it_is_preferred(run, tmp_path):
    export_run(run, "safetensors", force=True)
    assert load_trained_model(run).checkpoint == run.best_checkpoint
    run.exported_weights.unlink()


def test_half_precision_halves_the_file_and_hardly_changes_the_predictions(run, tmp_path):
    whole, half = exported(run, tmp_path / "whole"), exported(run, tmp_path / "half", half=True)
    with safe_open(half.exported_weights, "pt") as file:
        tensors = tensors_of(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int64}  # counters of batches
    num_bytes = [each.exported_weights.stat().st_size for each in (half, whole)]
    num_values = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert num_bytes[1] - num_bytes[0] == pytest.approx(2 * num_values, abs=200)
    images = torch.from_numpy(test_images(200).copy())
    probs = [load_trained_model(each).logits(images).softmax(1) for each in (half, run)]
    assert 0 < (probs[0] - probs[1]).abs().max() < 1e-2
    assert next(load_trained_model(half).model.parameters()).dtype == torch.float32
    with pytest.raises(UserError, match="--half"):
        export_run(run, "torch", output=tmp_path / "m.pt2", half=True)


def test_weights_that_float16_cannot_hold_are_no_file(tmp_path):
    run = make_run(tmp_path / "run", widths=[4])
    checkpoint = torch.load(run.best_checkpoint, weights_only=True)
    checkpoint["state_dict"]["model.head.bias"] += 1e5
    torch.save(checkpoint, run.best_checkpoint)
    with pytest.raises(RuntimeError, match="differ"):
        export_run(run, "safetensors", half=True)
    assert not run.exported_weights.exists()


def test_without_validation_predictions_there_is_no_temperature(tmp_path):
    run = make_run(tmp_path / "run", widths=[4])
    alone = exported(run, tmp_path / "alone")
    with pytest.raises(UserError, match="without a temperature"):
        load_trained_model(alone, calibrated=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": None}, "no architecture"),
        ({"tta": None}, "no tta"),
        ({"class_names": "[1"}, "not those of an export"),
        ({"architecture": "[]"}, "not those of an export"),
        ({"class_names": "[" * 5000 + "]" * 5000}, "not those of an export"),
        ({"epoch": "many"}, "not those of an export"),
        ({"class_names": '["a", "a"]'}, "equal class names"),
        ({"class_names": '["a", "b"]'}, "of other classes|for other classes"),
        ({"mean": "[0.5]"}, "different lengths"),
        ({"std": "[0, 0, 0]"}, "std"),
        ({"image_size": "-3"}, "image_size"),
        ({"image_size": "24"}, "image_size 24"),
        ({"resize": "stretch"}, "resize"),
        ({"tta": "many"}, "tta"),
        ({"memory_format": "diagonal"}, "memory_format"),
        ({"fitted_temperature": "NaN"}, "fitted_temperature"),
        ({"fitted_temperature": "-1"}, "fitted_temperature"),
        ({"architecture": '{"name": "os:system", "num_classes": 10, "image_size": 32}'}, "trust_code"),
        ({"architecture": '{"name": "smallnet", "num_classes": 10, "image_size": 32, "widths": [8]}'}, "another model"),
    ],
)
def test_metadata_of_strangers_end_in_a_sentence(run, tmp_path, changes, message):
    alone = exported(run, tmp_path / "alone")
    with safe_open(alone.exported_weights, "pt") as file:
        tensors = tensors_of(file)
        about = {key: value for key, value in (file.metadata() | changes).items() if value is not None}
    save_file(tensors, alone.exported_weights, about)
    with pytest.raises(UserError, match=message) as error:
        load_trained_model(alone)
    assert str(alone.exported_weights) in str(error.value)


def test_a_damaged_file_ends_in_a_sentence(run, tmp_path):
    alone = exported(run, tmp_path / "alone")
    whole = alone.exported_weights.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        alone.exported_weights.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            load_trained_model(alone)


def test_a_folder_of_exported_weights_alone_says_what_it_is_for(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = exported(run, Path("alone"))
    card = (alone.path / "MODEL_CARD.md").read_bytes()
    for command in (["test", "alone"], ["fit", "--resume", "alone"]):
        with pytest.raises(
            UserError, match=r"exported weights and no checkpoint[\s\S]*predict-images[\s\S]*pretrained"
        ):
            run_command(command)
    for read in (lambda run: run.epochs, lambda run: run.predictions, lambda run: run.report(), lambda run: run.test()):
        with pytest.raises(UserError, match="exported weights and no checkpoint"):
            read(load("alone"))
    assert run_command(["export", "alone", "--format", "torch"]) == 0
    assert alone.exported_program.is_file()
    assert (alone.path / "MODEL_CARD.md").read_bytes() == card, "a new one would have no test results"
    with pytest.raises(UserError, match=r"--run_dir alone: .*exported weights"):
        create_run(tmp_path, "x", Path("alone"))
    RunLock(alone.lock_file).release()  # as of a copied run
    with pytest.raises(UserError, match=r"--run_dir alone: .*exported weights"):
        create_run(tmp_path, "x", Path("alone"))
    assert alone.config.exists()


def test_weights_without_the_config_of_their_run_are_named_with_what_is_missing(run, tmp_path):
    alone = exported(run, tmp_path / "alone")
    with pytest.raises(UserError, match=f"Did you mean the run {alone.path}"):
        load(alone.exported_weights)
    alone.config.unlink()
    for given in (alone.path, alone.exported_weights):
        with pytest.raises(UserError, match=r"config\.yaml of its run"):
            load(given)


# -- the model that comes with the package ---------------------------------------------------------------------------


def test_smallnet_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load("smallnet")
    assert sum(parameter.numel() for parameter in model.model.parameters()) == 1_148_874
    assert model.class_names[:3] == ("airplane", "automobile", "bird")
    assert model.path.joinpath("model.safetensors").stat().st_size < 2.5e6
    assert model.metrics["accuracy"] > 0.94
    assert f"{100 * model.metrics['accuracy']:.2f} %" in model.path.joinpath("MODEL_CARD.md").read_text("utf-8")
    image = np.full((48, 64, 3), 120, np.uint8)
    one = model.predict(image, calibrated=True)
    assert one.class_name in model.class_names
    assert math.isfinite(one.probability)
    with pytest.raises(UserError, match="comes with the package"):
        model.test()
    assert load(os.path.relpath(model.path)).path == model.path
    with monkeypatch.context() as there:
        there.chdir(model.path.parent)
        assert load("smallnet").path == model.path
    # A folder of that name is the user's own.
    (tmp_path / "smallnet").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        load("smallnet")


@pytest.mark.parametrize(
    ("ground", "shape", "rows", "columns", "expected"),
    [
        ((130, 180, 230), (200, 30, 30), (4, 28), (4, 28), {"airplane": 0.8081, "truck": 0.0500, "bird": 0.0471}),
        ((240, 240, 240), (200, 180, 140), (6, 28), (10, 22), {"airplane": 0.3806, "bird": 0.1412, "ship": 0.1092}),
        ((60, 130, 50), (120, 80, 50), (10, 24), (4, 28), {"frog": 0.3466, "airplane": 0.3408, "cat": 0.1005}),
        ((15, 15, 15), (120, 120, 120), (6, 28), (10, 22), {"cat": 0.2039, "airplane": 0.1851, "deer": 0.1689}),
    ],
)
def test_smallnet_gives_the_probabilities_it_had_when_it_was_added(ground, shape, rows, columns, expected):
    """Of a rectangle on a plain ground: they change with its weights, its preprocessing and its class names."""
    image = np.full((32, 32, 3), ground, np.uint8)
    image[slice(*rows), slice(*columns)] = shape
    assert dict(load("smallnet").predict(image).top) == pytest.approx(expected, abs=0.01)


@pytest.mark.skipif(not TEST_BATCH.is_file(), reason="needs CIFAR-10 in data/")
def test_smallnet_is_as_accurate_as_its_card_says_on_500_test_images():
    model, batch = load("smallnet"), pickle.loads(TEST_BATCH.read_bytes(), encoding="latin1")
    images = batch["data"][:500].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    correct = [
        one.class_name == model.class_names[k] for one, k in zip(model.predict(images), batch["labels"], strict=False)
    ]
    expected = model.metrics["accuracy"]
    assert abs(np.mean(correct) - expected) < 4 * math.sqrt(expected * (1 - expected) / 500)


@pytest.mark.parametrize(("kind", "name"), [("torch", "smallnet.pt2"), ("safetensors", "smallnet.safetensors")])
def test_it_is_exported_into_the_working_directory(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in load("smallnet").path.iterdir()}
    assert run_command(["export", "smallnet", "--format", kind]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    expected = [one.class_name for one in load("smallnet").predict(images)]
    if kind == "torch":
        graph = torch.export.load(tmp_path / name).module()
        numbers = graph(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())[0].argmax(1)
        assert [load("smallnet").class_names[number] for number in numbers] == expected
    else:
        copy = RunFolder(tmp_path / "copy")
        copy.path.mkdir()
        copy.config.touch()
        (tmp_path / name).rename(copy.exported_weights)
        assert [one.class_name for one in load(copy.path).predict(images)] == expected
        assert fitted_temperature(copy) == fitted_temperature(RunFolder(load("smallnet").path))
    assert {path: path.read_bytes() for path in load("smallnet").path.iterdir()} == before


def test_predict_images_takes_it_by_name_and_other_commands_say_what_it_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    decode_here(monkeypatch)
    Image.new("RGB", (50, 40), (90, 160, 240)).save("cat.jpg")
    assert run_command(["predict-images", "smallnet", "cat.jpg", "--output", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "cat.jpg"
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]
    assert run_command(["predict-images", "smallnet", "cat.jpg", "--calibrated"]) == 0
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1].startswith("cat.jpg,")
    for command in (["test", "smallnet"], ["analyze", "smallnet"]):
        with pytest.raises(UserError, match="smallnet comes with the package: for predict-images"):
            run_command(command)


def test_what_only_a_run_has_is_not_said_to_be_made_by_test_or_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load("smallnet")
    for read in (lambda run: run.epochs, lambda run: run.predictions, lambda run: run.report()):
        with pytest.raises(UserError, match="smallnet comes with the package") as error:
            read(model)
        assert "--model.pretrained" in str(error.value)
        assert "fit makes" not in str(error.value)
    assert load(model.path).class_names == model.class_names
    assert weights_file(model.path) == model.path / "model.safetensors"


@pytest.mark.parametrize("given", ["SmallNet", "small_net", "smalnet"])
def test_a_name_that_is_nearly_that_of_the_model_is_put_right(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Did you mean smallnet\?"):
        load(given)
    with pytest.raises(UserError, match=rf"--model.pretrained {given}: .*Did you mean smallnet\?"):
        load_pretrained(build_model("smallnet", 3), {"name": "smallnet", "num_classes": 3}, given)


def test_a_file_or_folder_of_the_models_name_is_named_as_what_hides_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "smallnet"
    for make, remove in ((own.mkdir, own.rmdir), (own.touch, own.unlink)):
        make()
        with pytest.raises(UserError, match="hides the model smallnet that comes with the package"):
            load("smallnet")
        remove()


def test_the_model_predicts_in_eval_mode_whatever_mode_it_was_left_in(tmp_path):
    run, images = load("smallnet"), test_images(8)
    expected = run.predict(images)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.model.train()
    assert run.predict(images) == expected
    assert run.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_a_model_loaded_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        run = load("smallnet")
        run.predict(test_images(1))
    run.model(torch.zeros(1, 3, 32, 32, device=next(run.model.parameters()).device)).sum().backward()
    assert all(parameter.grad is not None for parameter in run.model.parameters())
