"""Every callback and logger of Lightning works, as run here, or is refused with the reason; the docs have the table."""

import csv
import importlib.util
import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fitting import NARROW, quiet_trainer, small_data
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from program import REPO, TINY
from torchvision.transforms import v2

import cifar_lightning.training.predictions as predictions_module
from cifar_lightning import ImageClassifier
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.cli.main import run_command
from cifar_lightning.cli.parser import check_arguments
from cifar_lightning.cli.trainer_objects import CALLBACKS, LOGGERS, PAGE, page_text
from cifar_lightning.errors import UserError
from cifar_lightning.training.quiet_lightning import quiet
from cifar_lightning.training.tensorboard import Dashboard

ARGUMENTS = {
    "BatchSizeFinder": {},
    "EarlyStopping": {"monitor": "val/acc", "verbose": True},
    "GradientAccumulationScheduler": {"scheduling": {1: 2}},
    "LambdaCallback": {"on_fit_start": "test_trainer_objects.note"},
    "ModelCheckpoint": {"monitor": "val/acc", "dirpath": "kept", "verbose": True},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "OnExceptionCheckpoint": {"dirpath": "kept"},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "ThroughputMonitor": {"batch_size_fn": "test_trainer_objects.num_images"},
    "Timer": {"duration": "00:01:00:00"},
}
BARS = ("ProgressBar", "RichProgressBar", "TQDMProgressBar")
SHOWN = {"EarlyStopping": "val/acc improved", "ModelCheckpoint": "reached", "ModelSummary": "Trainable params"}
SHOWN |= {"RichModelSummary": "Trainable params"}


def note(trainer, module):
    print("on_fit_start was called")


def num_images(batch):
    return len(batch[1])


class OwnAverage(callbacks.WeightAveraging):
    """Of a user."""


class Unserializable(callbacks.Callback):
    """A callback of a user, whose defaults YAML cannot hold."""

    def __init__(self, device=torch.device("cpu"), limits=(1, 2), marker=object(), name="a"):  # noqa: B008 - what is tested
        self.given = (device, limits, marker, name)


class Outer:
    """Holds classes of a user."""

    class Stop(callbacks.Callback):
        """Of a user."""

    class Net(torch.nn.Linear):
        """Of a user."""

    class Shift(v2.Identity):
        """Of a user."""


def make_stop() -> callbacks.Callback:
    return Outer.Stop()


def make_average() -> callbacks.Callback:
    return callbacks.StochasticWeightAveraging(0.01)


average = make_average()


class OwnLogger(Logger):
    """A logger of a user that takes images as WandbLogger does."""

    name, version = "own", 0

    def __init__(self):
        super().__init__()
        self.hyperparameters, self.metrics, self.images = [], [], []

    def log_hyperparams(self, params):
        self.hyperparameters.append(params)

    def log_metrics(self, metrics, step=None):
        self.metrics += metrics

    def log_image(self, key, images, step=None):
        self.images.append((key, images[0].shape, images[0].dtype))


def flag(name, library="lightning.pytorch.callbacks", **arguments):
    return "--trainer.callbacks=" + json.dumps([{"class_path": f"{library}.{name}", "init_args": arguments}])


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_trainer_objects", sys.modules[__name__])


def test_every_class_of_lightning_has_a_verdict():
    assert set(CALLBACKS) == set(callbacks.__all__)
    assert set(LOGGERS) == set(loggers.__all__)


def test_the_docs_have_the_table():
    assert (REPO / PAGE).read_text(encoding="utf-8") == page_text()


@pytest.mark.parametrize("name", [name for name, verdict in CALLBACKS.items() if verdict.refused])
def test_a_callback_is_refused_with_its_name_and_the_reason(parser, name):
    with pytest.raises(UserError) as error:
        check_arguments("fit", parser.parse_args([flag(name, **ARGUMENTS.get(name, {}))]))
    assert str(error.value) == f"--trainer.callbacks {name}: {CALLBACKS[name].refused}."


def test_a_subclass_of_a_refused_callback_is_refused_with_it_but_a_run_that_has_one_is_still_tested(parser):
    config = parser.parse_args([flag("OwnAverage", library="test_trainer_objects")])
    with pytest.raises(UserError, match=r"OwnAverage: .*--model\.ema_decay"):
        check_arguments("fit", config)
    config.ckpt_path = __file__
    check_arguments("test", config)


@pytest.mark.parametrize("name", ["Outer.Stop", "make_stop"])
def test_a_callback_may_be_a_class_in_another_or_made_by_a_function(name):
    given = ["--data.dataset=synthetic", f"--trainer.callbacks+=test_trainer_objects.{name}"]
    _, _, made = TrainingCLI("fit", given).instantiate()
    assert [type(callback) for callback in made.trainer.callbacks] == [Outer.Stop]


@pytest.mark.parametrize(
    "given",
    [
        "--model.model={class_path: test_trainer_objects.Outer.Net, init_args: {in_features: 4, out_features: 2}}",
        "--data.transforms=[{class_path: test_trainer_objects.Outer.Shift}]",
    ],
)
def test_so_may_a_model_and_a_transform(given):
    assert "test_trainer_objects.Outer." in TrainingCLI("fit", ["--data.dataset=synthetic", given]).config_text


@pytest.mark.parametrize("name", ["make_average", "average"])
def test_a_refused_callback_is_also_refused_as_an_object_or_made_by_a_function(name):
    cli = TrainingCLI("fit", ["--data.dataset=synthetic", f"--trainer.callbacks+=test_trainer_objects.{name}"])
    with pytest.raises(UserError, match="StochasticWeightAveraging: tested and saved"):
        cli.instantiate()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (flag("Timer", duration="00:00:10:00"), {"duration": "00:00:10:00", "verbose": True}),
        (flag("Timer", interval="epoch"), {"duration": None, "interval": "epoch", "verbose": True}),
        (flag("Unserializable", library="test_trainer_objects", limits=[3]), {"limits": [3], "name": "a"}),
    ],
)
def test_the_config_of_a_run_leaves_defaults_out_that_yaml_cannot_hold(given, kept):
    cli = TrainingCLI("fit", [given])
    text = cli.config_text
    assert "Unable to serialize" not in text
    (callback,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert {name: value for name, value in callback["init_args"].items() if value != (1, 2)} == kept
    made = cli.parser.instantiate_classes(cli.config)["fit"].trainer.callbacks[0]
    assert getattr(made, "given", [torch.device("cpu")])[0] == torch.device("cpu")


def test_loggers_get_the_config_metrics_by_step_and_the_figures_that_they_take(tmp_path, monkeypatch):
    given = {"model": {"lr": 0.5}, "data": {"batch_size": 500}}
    own, to_mlflow = OwnLogger(), []
    mlflow = object.__new__(MLFlowLogger)  # without the package
    client = SimpleNamespace(log_image=lambda run_id, image, key, step: to_mlflow.append((run_id, key, image.shape)))
    for name, value in {"experiment": client, "run_id": "id", "save_dir": None, "name": "m", "version": "1"}.items():
        monkeypatch.setattr(MLFlowLogger, name, value)
    for name in ("log_hyperparams", "log_metrics", "finalize", "after_save_checkpoint"):
        monkeypatch.setattr(MLFlowLogger, name, lambda *args, **kwargs: None)
    kept = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board"), own, mlflow]
    data = small_data(limit=1000)
    trainer = quiet_trainer(
        tmp_path, logger=kept, max_epochs=1, log_every_n_steps=1, callbacks=[Dashboard(data.class_names, given)]
    )
    trainer.fit(ImageClassifier(image_size=16, model_kwargs=NARROW), datamodule=data)
    assert own.hyperparameters == [given]
    names = ("batch_as_trained_on", "confusion_matrix", "reliability", "most_confident_mistakes")
    drawn = [f"visuals/{name}" for name in names]
    assert [key for key, _, _ in own.images] == [key for _, key, _ in to_mlflow] == drawn
    assert {(len(shape), dtype) for _, shape, dtype in own.images} == {(3, np.dtype("uint8"))}
    assert {"train/loss_step", "train/lr", "train/loss", "val/acc"} <= set(own.metrics)
    for folder in ("csv", "board"):
        path = tmp_path / folder / "version_0" / "hparams.yaml"
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == given
    with open(tmp_path / "csv" / "version_0" / "metrics.csv", encoding="utf-8", newline="") as file:
        assert {"train/loss_step", "val/acc"} <= set(next(csv.reader(file)))


def test_from_python_loggers_get_the_hyperparameters_of_the_module(tmp_path):
    own = OwnLogger()
    trainer = quiet_trainer(tmp_path, logger=own, max_steps=1, log_every_n_steps=1, limit_val_batches=0)
    trainer.fit(ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.25), datamodule=small_data(limit=1000))
    assert own.hyperparameters[0]["lr"] == 0.25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")  # it knows no FLOPs of this model
def test_every_callback_that_works_is_run_by_fit(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predictions_module, "make_report", lambda *args, **kwargs: None)
    small = [*TINY, "--data.limit", "300", "--batch_size", "100", "--data.eval_batch_size", "500", "--epochs", "2"]
    for name, verdict in CALLBACKS.items():
        if verdict.refused:
            continue
        logger = "--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}"
        bar = f"--trainer.enable_progress_bar={str(name in BARS).lower()}"
        command = ["fit", *small, logger, bar, f"--run_dir={name}", flag(name, **ARGUMENTS.get(name, {}))]
        with quiet(), caplog.at_level(logging.INFO, "lightning.pytorch.callbacks"):
            if name == "DeviceStatsMonitor" and importlib.util.find_spec("psutil") is None:
                with pytest.raises(UserError, match=r"DeviceStatsMonitor: .*psutil"):
                    run_command(command)
                continue
            run_command(command)
        shown = "".join([*capfd.readouterr(), caplog.text])
        assert SHOWN.get(name, "") in shown, name
        assert (name == "LambdaCallback") == ("on_fit_start was called" in shown)
        assert len((tmp_path / name / "metrics.csv").read_text().splitlines()) == 3, name
        assert (tmp_path / name / "test_metrics.json").is_file(), name
        assert "Unable to serialize" not in (tmp_path / name / "config.yaml").read_text()
        caplog.clear()
