"""Training and trained runs from Python."""

import logging
import os
import signal
import warnings

import lightning.pytorch as pl
import pytest
import yaml
from torch import nn

import cifar_lightning
from cifar_lightning import ImageDataModule, UserError
from cifar_lightning.cli import fit as fit_module
from cifar_lightning.cli.main import run_command

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
    return yaml.safe_load(run.config.read_text())


def state_of_process():
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric", "pytorch.utilities.rank_zero")]
    logged = [(logger.level, list(logger.filters)) for logger in loggers]
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    return list(warnings.filters), handlers, logged, os.environ.get("CIFAR_LIGHTNING_RUN_DIR")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_module, "make_report", lambda *args: None)
    monkeypatch.setattr("cifar_lightning.training.predictions.make_report", lambda *args: None)


def test_an_own_model_trains_and_resumes_and_the_process_stays_as_it_was(here):
    before, counter = state_of_process(), Counter()
    run = cifar_lightning.fit(Net(), "synthetic", epochs=1, run_dir="run", callbacks=[counter], **SMALL)
    assert config_of(run)["model"]["name"] == "test_python_api:Net"
    assert counter.num_batches == 4
    assert cifar_lightning.fit(Net(), resume=run.path, epochs=2) == run
    assert len(run.metrics_csv.read_text().splitlines()) == 3
    assert state_of_process() == before


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
