"""Training and trained runs from Python."""

import io
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from fitting import NARROW, Signal
from made_run import make_run
from PIL import Image
from program import decode_here
from torch import nn

import cifar_lightning
from cifar_lightning import ImageClassifier, ImageDataModule, UserError, python_api
from cifar_lightning.cli import fit as fit_module
from cifar_lightning.cli.lightning_cli import PythonObjects, TrainingCLI
from cifar_lightning.cli.main import run_command
from cifar_lightning.files import write_json
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.signals import stop_signals
from cifar_lightning.transforms.augmentation import normalize

SMALL = {"data.limit": 200, "batch_size": 50, "data.image_size": 16, "trainer": {"accelerator": "cpu"}}
SMALL |= {"data.eval_batch_size": 500}


class Net(nn.Module):
    """An own model, importable as test_python_api:Net where tests/ is."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        )

    def forward(self, images):
        return self.layers(images)


class Counter(pl.Callback):
    num_batches = 0

    def on_train_batch_end(self, *args):
        self.num_batches += 1


def config_of(run):
    return yaml.safe_load((run.path / "config.yaml").read_text())


def state_of_process():
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric", "pytorch.utilities.rank_zero")]
    logged = [(logger.level, list(logger.filters)) for logger in loggers]
    handlers = [signal.getsignal(signum) for signum in stop_signals()]
    return list(warnings.filters), handlers, logged, os.environ.get("CIFAR_LIGHTNING_RUN_DIR")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_module, "make_report", lambda *args, **kwargs: None)
    monkeypatch.setattr("cifar_lightning.training.predictions.make_report", lambda *args, **kwargs: None)


def test_an_own_model_trains_and_resumes_and_the_process_stays_as_it_was(here):
    before, counter = state_of_process(), Counter()
    run = cifar_lightning.fit(Net(), "synthetic", epochs=1, run_dir="run", callbacks=[counter], **SMALL)
    assert config_of(run)["model"]["name"] == "test_python_api:Net"
    assert counter.num_batches == 4
    assert cifar_lightning.fit(Net(), resume=run.path, epochs=2).path == run.path
    assert len((run.path / "metrics.csv").read_text().splitlines()) == 3
    assert state_of_process() == before


def test_an_own_model_of_another_image_size_is_refused_and_leaves_no_folder(here):
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28 * 3, 10))
    with pytest.raises(UserError, match=r"Sequential.* images of 32 pixels"):
        cifar_lightning.fit(model, "synthetic", epochs=1, run_dir="run")
    assert not Path("run").exists()


@pytest.mark.slow
def test_objects_that_no_command_makes_again_are_named_and_can_be_given_again(here):
    model, data = (
        nn.Sequential(nn.Flatten(), nn.Linear(768, 10)),
        ImageDataModule("synthetic", image_size=16, limit=200),
    )
    run = cifar_lightning.fit(model, data, epochs=1, run_dir="run", **{"model.memory_format": "contiguous"})
    assert config_of(run)["model"]["name"] == "<Sequential>"
    assert config_of(run)["data"]["limit"] == 200
    with pytest.raises(UserError, match=r"run: its model <Sequential> is an object of Python"):
        run_command(["test", "run"])
    cifar_lightning.fit(model, resume="run", epochs=2)
    again = cifar_lightning.fit(model, data, config="run/config.yaml", run_dir="again", trust_code=None)
    assert config_of(again)["model"]["name"] == "<Sequential>"


class Negative(ImageClassifier):
    """A forward of its own around a model that a command could make."""

    def __init__(self, **kwargs):
        super().__init__(model=Net(), image_size=16, memory_format="contiguous", **kwargs)

    def forward(self, images):
        return super().forward(-images)


def test_a_subclass_given_as_an_object_predicts_with_its_forward_and_is_not_taken_for_its_model(here):
    module = Negative()
    run = cifar_lightning.fit(module, "synthetic", epochs=1, run_dir="run", **SMALL)
    assert config_of(run)["model"]["name"] == "<Negative>"
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    statistics = {"mean": torch.tensor(run._trained.mean), "std": torch.tensor(run._trained.std)}
    with torch.no_grad():
        logits = run.model.model(-normalize(torch.from_numpy(image)[None], **statistics))
    expected = logits.softmax(1).max().item()
    assert run.predict(image).probability == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="<Negative>"):
        run_command(["test", "run", "--trust_code", "true"])


def test_a_model_that_was_changed_is_not_made_by_its_name(here):
    module = ImageClassifier("resnet18", image_size=16)
    module.model.maxpool = nn.MaxPool2d(2)
    run = cifar_lightning.fit(module, "synthetic", run_dir="run", **SMALL | {"trainer": {"max_steps": 1}})
    assert config_of(run)["model"]["name"] == "<ResNet>"
    with pytest.raises(UserError, match="<ResNet>"):
        run_command(["test", "run"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eight images a class, dark and light, made without training."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "made")
    make_run(folder.path, names=("dark", "light"), n=40, image_size=8)
    module = ImageClassifier("smallnet", 2, 8, model_kwargs=NARROW)
    data = {"class_names": ["dark", "light"], "image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    hparams = dict(module.hparams)
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": hparams, "ImageDataModule": data, "epoch": 4}
    torch.save(checkpoint, folder.best_checkpoint)
    write_json(folder.test_metrics, {"accuracy": 0.75})
    return folder.path


@pytest.fixture
def run(trained, monkeypatch):
    decode_here(monkeypatch)
    return cifar_lightning.load(trained)


def photo(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_run_gives_what_its_files_hold(run):
    assert repr(run) == f"Run({str(run.path)!r}: test accuracy 75.00 %)"
    assert run.class_names == ("dark", "light")
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2, 3, 4]
    predictions = run.predictions
    np.testing.assert_allclose(predictions.probs.sum(1), 1)
    assert (predictions.preds == predictions.logits.argmax(1)).all()
    assert not run.model.training


def test_predictions_become_a_table_where_pandas_is(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        run.predictions.to_dataframe()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    table = run.predictions.to_dataframe()
    assert list(table) == ["index", "name", "label", "prediction", "dark", "light"]
    assert {len(column) for column in table.values()} == {40}
    assert table["label"][0] == "dark"


def test_paths_are_predicted_as_by_the_command(run, tmp_path):
    (tmp_path / "folder").mkdir()
    paths = [photo(tmp_path / "folder" / f"{k}.png", seed=k) for k in range(3)]
    run_command(["predict-images", str(run.path), str(tmp_path / "folder"), "--output", str(tmp_path / "out.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [(row["path"], [(top["class"], top["probability"]) for top in row["top"]]) for row in rows]
    assert run.predict(tmp_path / "folder") == expected
    assert run.predict([str(path) for path in paths]) == expected
    one = run.predict(paths[0], top_k=1)
    assert (one.class_name, one.probability) == expected[0][1][0]
    assert len(one.top) == 1


def test_what_cannot_be_read_is_named(run, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(UserError, match="empty path"):
        run.predict("")
    with pytest.raises(UserError, match=r"bad\.png cannot be read"):
        run.predict(tmp_path / "bad.png")
    photo(tmp_path / "good.png")
    with pytest.warns(UserWarning, match=r"1 file cannot be read .*bad\.png"):
        assert [Path(each.path).name for each in run.predict(tmp_path)] == ["good.png"]
    with pytest.raises(UserError, match=r"no such file or folder"):
        run.predict("nowhere.jpg")
    whole = (tmp_path / "good.png").read_bytes()
    cut = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    for bad in (cut, {"path": "nowhere.jpg"}, np.array([["cat"]]), torch.zeros(3, 8, 8).to_sparse()):
        with pytest.raises(UserError, match=rf"an image cannot be read \({type(bad).__name__}: "):
            run.predict(bad)
    with pytest.raises(UserError, match="--top_k 3: the run has 2 classes"):
        run.predict(tmp_path, top_k=3)


def test_an_image_is_the_same_as_file_pillow_image_array_or_tensor(run, tmp_path):
    image = Image.open(photo(tmp_path / "a.png"))
    pixels = np.asarray(image)
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    kinds = [image, pixels, np.moveaxis(pixels, 2, 0), chw, chw / 255, pixels.astype(np.int64), pixels / 255]
    (expected,) = {tuple(run.predict(kind).top) for kind in [*kinds, str(tmp_path / "a.png")]}
    assert all(isinstance(run.predict(kind), cifar_lightning.Prediction) for kind in kinds)
    batches = [np.stack([pixels] * 3), torch.stack([chw / 255] * 3), [image, str(tmp_path / "a.png"), chw]]
    for batch in batches:
        assert [tuple(each.top) for each in run.predict(batch, batch_size=2)] == [expected] * 3
    gray = np.asarray(image.convert("L"))
    assert run.predict(gray).top == run.predict(Image.fromarray(gray)).top
    assert run.predict([]) == []
    for bad, message in (
        (chw / 255 * 4 - 2, "pixels of type float32 from -2 to 2"),
        (np.zeros((8, 8, 2), np.uint8), "shape (8, 8, 2)"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "shape (2, 2, 8, 8, 3)"),
        (5, "an image of type int"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run.predict(bad)


def test_what_is_no_run_or_has_no_checkpoint_says_so(run, tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        cifar_lightning.load(tmp_path / "nowhere")
    made = make_run(tmp_path / "made", n=40)
    opened = cifar_lightning.load(made.path)
    assert "not tested" in repr(opened)
    assert len(opened.predictions.targets) == 40
    with pytest.raises(UserError, match=r"(best|last)\.ckpt is missing"):
        opened.predict(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="no checkpoint found"):
        opened.test()
    made.predictions.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"predictions\.npz: damaged"):
        opened.predictions  # noqa: B018 - a property that reads the file


def test_the_code_of_a_run_is_not_trusted_where_a_module_is_given(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("open('imported', 'w')\nmake = print\n")
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    run.best_checkpoint.touch()
    run.config.write_text(yaml.safe_dump({"model": {"loss": "evil:make"}, "data": {"dataset": "synthetic"}}))
    with pytest.raises(UserError, match="evil:make"):
        cifar_lightning.load(run.path, model=Net()).test()
    with pytest.raises(UserError, match="evil:make"):
        cifar_lightning.fit(Net(), config=run.config, run_dir="again")
    run.config.write_text(yaml.safe_dump({"model": {"name": "evil:make"}, "data": {"dataset": "synthetic"}}))
    TrainingCLI("fit", [f"--config={run.config}"], PythonObjects(Net()))
    assert not Path("imported").exists()


def test_none_leaves_out_what_is_not_given():
    given = dict.fromkeys(("resume", "config", "seeds", "trust_code", "run_dir")) | {"data.limit": None}
    assert python_api._flat(given) == {"run_dir": None, "data.limit": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 1}, "--learning_rate: no such flag. Did you mean --lr?"),
        ({"flip": "none"}, "--flip: no such flag. Did you mean --data.flip?"),
        ({"model": "smalnet"}, "smalnet"),
        ({"data": "cifar11"}, "Did you mean cifar10?"),
        ({"data": "./nowhere"}, "nowhere"),
        ({"model": Net}, "model=Net: a class"),
        ({"model": 5}, "model: a int"),
        ({"model": pl.LightningModule()}, "model: a LightningModule"),
        ({"data": pl.LightningDataModule()}, "data: a LightningDataModule"),
        ({"model": ImageClassifier(model_kwargs=NARROW), "lr": 1e-3}, "lr: the ImageClassifier that is given has"),
        (
            {"trainer": {"callbacks": [Counter()]}},
            "trainer.callbacks: a list; a setting is a plain value. Give objects by callbacks=",
        ),
        ({"callbacks": [pl.callbacks.BatchSizeFinder()]}, "BatchSizeFinder: the schedule counts"),
        ({"resume": "nowhere"}, "nowhere: there is no such folder"),
        ({"trainer.fast_dev_run": True}, "trainer.fast_dev_run"),
        ({"epochs": 0}, "--epochs 0"),
    ],
)
def test_a_wrong_setting_or_object_is_an_exception(arguments, message, here, tmp_path):
    before = state_of_process()
    with pytest.raises(UserError) as raised:
        cifar_lightning.fit(**{"data": "synthetic", **arguments})
    assert message in str(raised.value)
    assert state_of_process() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_fit_in_a_thread_or_resumed_after_ctrl_c_ends_as_the_command_does(here, tmp_path):
    flags = [f"--{name}={value}" for name, value in SMALL.items() if name != "trainer"]
    run_command(
        [
            "fit",
            *flags,
            "--data.dataset=synthetic",
            "--trainer.accelerator=cpu",
            "--epochs=2",
            "--lr=0.01",
            "--run_dir=command",
        ]
    )
    settings = {**SMALL, "epochs": 2, "lr": 0.01}
    before = state_of_process()
    with pytest.raises(KeyboardInterrupt):
        cifar_lightning.fit(
            data="synthetic", run_dir="stopped", callbacks=[Signal("on_train_batch_end", 3, signal.SIGINT)], **settings
        )
    assert state_of_process() == before
    cifar_lightning.fit(resume="stopped")
    thread = threading.Thread(target=lambda: cifar_lightning.fit("smallnet", "synthetic", run_dir="thread", **settings))
    thread.start()
    thread.join()
    for name in ("stopped", "thread"):
        for file in ("metrics.csv", "test_metrics.json", "predictions.npz"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "command" / file).read_bytes(), (name, file)


@pytest.mark.slow
def test_a_run_of_objects_is_tested_with_them_and_by_commands_where_its_code_is_trusted(here, tmp_path):
    dataset = [(Image.fromarray(np.full((12, 12), 20 * (k % 3) + k, np.uint8)), k % 3) for k in range(60)]
    run = cifar_lightning.fit(Net(3), dataset, epochs=1, run_dir="run", batch_size=10, trainer={"accelerator": "cpu"})
    metrics = {name: value for name, value in run.metrics.items() if name not in ("schema_version", "epoch")}
    assert cifar_lightning.load("run", data=dataset, trust_code=True).test() == run.test() == metrics
    assert run.test((dataset, dataset[:30]))["num_images"] == 30
    assert run.metrics["num_images"] == metrics["num_images"], "the files are of the run's own images"
    with pytest.raises(UserError, match=r"its data <list> is an object of Python"):
        cifar_lightning.load("run", trust_code=True).test()
    with pytest.raises(UserError, match=r"test_python_api:Net: .*\n.*from Python trust_code=True"):
        cifar_lightning.load("run").predict(dataset[0][0])
    top = cifar_lightning.load("run", trust_code=True).predict(dataset[0][0]).top
    assert top == run.predict(dataset[0][0]).top
    named = cifar_lightning.fit("test_python_api:Net", "synthetic", epochs=1, run_dir="named", **SMALL)
    run_command(["test", "named", "--trust_code", "true"])
    assert named.test()["accuracy"] == named.metrics["accuracy"]
