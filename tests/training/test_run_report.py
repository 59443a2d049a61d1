"""RunReport and Dashboard with modules, data and Trainers of somebody else."""

import csv
import enum
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from fitting import NARROW, fit_run, quiet_trainer, small_data
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cifar_lightning import Dashboard, ImageClassifier, RunReport, UserError, load
from cifar_lightning.training import run_report
from cifar_lightning.training.predictions import logits_of


class Other(pl.LightningModule):
    """A module that returns nothing from its steps and names its metrics as it likes."""

    def __init__(self, width=2):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        correct = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log_dict({"valid_accuracy": correct, "val_acc_percent": 100 * correct})

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return optim.Adam(self.parameters())


# Lightning advises workers, of which 30 images need none.
FEW_WORKERS = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


@pytest.fixture
def loader():
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(30) % 3), batch_size=8)


@FEW_WORKERS
def test_any_module_gets_a_run_folder_and_figures(loader, tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(run_report, "make_report", lambda run, **kwargs: reported.append(run))
    module, board = Other(), TensorBoardLogger(tmp_path, "board", "1")
    callbacks = [RunReport(tmp_path / "run", class_names=["a", "b", "c"]), Dashboard()]
    trainer = quiet_trainer(tmp_path, max_epochs=2, logger=board, callbacks=callbacks, check_val_every_n_epoch=2)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "4"), ("1", "8")]
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert [bool(row["val/acc"]) for row in rows] == [False, True]  # validated in the second epoch alone
    run = load(tmp_path / "run")
    images, targets = loader.dataset.tensors
    np.testing.assert_allclose(run.predictions.logits, module(images).detach().numpy(), atol=1e-5)
    assert run.predictions.class_names == run.class_names == ("a", "b", "c")
    correct = (run.predictions.preds == targets.numpy()).mean()
    assert run.metrics["accuracy"] == correct
    assert [folder.path for folder in reported] == [tmp_path / "run"]
    assert "width: 2" in (tmp_path / "run" / "config.yaml").read_text()
    tags = [EventAccumulator(str(file)).Reload().Tags() for file in (tmp_path / "board" / "1").glob("events*")]
    assert any(
        "val_acc_of_class/2" in each["scalars"] and "visuals/confusion_matrix" in each["images"] for each in tags
    )
    with pytest.raises(UserError, match="holds a run with results"):
        quiet_trainer(tmp_path, callbacks=[RunReport(tmp_path / "run")]).test(module, loader)


@FEW_WORKERS
@pytest.mark.parametrize("fits", [True, False])
def test_a_report_misses_no_file_that_a_trainer_does_not_write(fits, loader, tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[RunReport(tmp_path / "run")])
    if fits:
        trainer.fit(Other(), loader, loader)
    trainer.test(Other(), loader, verbose=False)
    assert json.loads((tmp_path / "run" / "findings.json").read_text())["problems"] == []
    own = quiet_trainer(tmp_path, max_epochs=1, callbacks=[RunReport(tmp_path / "own")])
    module, data = ImageClassifier(image_size=16, model_kwargs=NARROW), small_data()
    if fits:
        own.fit(module, data)
    own.test(module, data, verbose=False)
    assert json.loads((tmp_path / "own" / "findings.json").read_text())["problems"] == []


@FEW_WORKERS
def test_a_loader_alone_is_validated_with_a_dashboard(loader, tmp_path):
    board = TensorBoardLogger(tmp_path, "board", "1")
    trainer = quiet_trainer(tmp_path, max_epochs=2, logger=board, callbacks=[Dashboard()])
    (logged,) = trainer.validate(Other(), loader, verbose=False)
    assert 0 <= logged["valid_accuracy"] <= 1


def test_validation_metrics_are_of_the_epoch_and_percentages_keep_their_name(loader, tmp_path):
    callback = RunReport(tmp_path / "run")
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(Other(), loader, loader)
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    assert 0 <= float(row["val/acc"]) <= 1
    assert float(row["val_acc_percent"]) == pytest.approx(100 * float(row["val/acc"]))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["device"] == "cpu"


def test_logits_are_what_the_step_returns_or_else_what_forward_returns():
    module, images, targets = Other().eval(), torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    logits = torch.rand(2, 3)
    for outputs in (logits, {"logits": logits}):
        assert logits_of(module, outputs, (images, targets)) is logits
    for outputs in (None, torch.tensor(0.5), {"loss": torch.tensor(0.5)}, torch.rand(2)):
        torch.testing.assert_close(logits_of(module, outputs, [images, targets]), module(images))
    with pytest.raises(UserError, match=r"a batch of \(images, labels\)"):
        logits_of(module, None, {"image": images})
    module.forward = lambda images: images
    with pytest.raises(UserError, match="Other: its test_step returns no logits"):
        logits_of(module, None, (images, targets))


class WithoutForward(pl.LightningModule):
    pass


def test_a_module_without_forward_is_not_drawn_and_not_stopped(capsys):
    board = Dashboard()
    board._is_drawing = True
    board.on_validation_batch_end(None, WithoutForward(), None, (torch.rand(2, 3, 8, 8), torch.zeros(2)), 0)
    assert not board._is_drawing
    assert "WithoutForward" in capsys.readouterr().out


def test_names_of_another_number_of_classes_are_refused(loader, tmp_path):
    with pytest.raises(UserError, match="class_names: 2 names; the model has 3 classes"):
        quiet_trainer(tmp_path, callbacks=[RunReport(tmp_path / "run", ["a", "b"])]).test(Other(), loader)


class Nameless(Other):
    """Cuts a test, and predicts what is no logits."""

    is_cut = False

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        if self.is_cut and batch_idx == 1:
            raise RuntimeError("cut")

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(1)


@FEW_WORKERS
def test_the_files_are_of_the_last_whole_test_alone(loader, tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "make_report", lambda *args, **kwargs: None)
    report, module = RunReport(tmp_path / "run"), Nameless()
    trainer = quiet_trainer(tmp_path, callbacks=[report])
    module.is_cut = True
    with pytest.raises(RuntimeError, match="cut"):
        trainer.test(module, loader, verbose=False)
    module.is_cut = False
    trainer.test(module, loader, verbose=False)
    predictions = (tmp_path / "run" / "predictions.npz").read_bytes()
    assert len(load(tmp_path / "run").predictions.targets) == 30
    images = DataLoader(TensorDataset(torch.rand(4, 3, 8, 8)), batch_size=2)  # without labels
    trainer.predict(module, images, return_predictions=False)
    with pytest.raises(UserError, match=r"trainer\.test for each"):
        trainer.test(module, [loader, loader], verbose=False)
    with pytest.raises(UserError, match=r"trainer\.validate for each"):
        trainer.validate(module, [loader, loader], verbose=False)
    quiet_trainer(tmp_path, callbacks=[report], limit_test_batches=2).test(module, loader, verbose=False)
    assert (tmp_path / "run" / "predictions.npz").read_bytes() == predictions
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == {"sizes": {"test": 30}}


@FEW_WORKERS
def test_a_test_of_some_batches_writes_no_results(loader, tmp_path, capsys):
    quiet_trainer(tmp_path, callbacks=[RunReport(tmp_path / "run")], limit_test_batches=2).test(
        Other(), loader, verbose=False
    )
    assert "limit_test_batches 2" in capsys.readouterr().out
    assert not (tmp_path / "run" / "test_metrics.json").exists()
    report = RunReport(tmp_path / "whole")
    quiet_trainer(tmp_path, callbacks=[report], limit_test_batches=100).test(Other(), loader, verbose=False)
    assert load(tmp_path / "whole").metrics["num_images"] == 30


@FEW_WORKERS
def test_each_trainer_that_fits_has_a_folder_of_its_own(loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report, folders = RunReport(), []
    for _ in range(2):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[report]).fit(Other(), loader)
        folders.append(report.run.path)
    assert folders[0] != folders[1]
    assert all(len((folder / "metrics.csv").read_text().splitlines()) == 2 for folder in folders)
    chosen = RunReport(tmp_path / "chosen")
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[chosen]).fit(Other(), loader)
    with pytest.raises(UserError, match="another Trainer"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[chosen]).fit(Other(), loader)
    assert (tmp_path / "chosen" / "metrics.csv").is_file()


class Color(enum.StrEnum):
    RED = "red"


@FEW_WORKERS
def test_hyperparameters_that_yaml_does_not_have_are_written_as_what_they_hold(loader, tmp_path):
    class Odd(Other):
        def __init__(self, weights, color):
            super().__init__()
            self.save_hyperparameters()

    odd = Odd(torch.tensor([1.0, 2.0, 0.5]), Color.RED)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[RunReport(tmp_path / "run")]).fit(odd, loader)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["weights"] == [1.0, 2.0, 0.5]
    assert config["model"]["color"] == "red"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["optimizers"] == []


class OwnSgd(ImageClassifier):
    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.01)


def test_the_optimizer_that_trains_is_in_the_environment(tmp_path):
    module = OwnSgd(image_size=16, model_kwargs=NARROW)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[RunReport(tmp_path / "own")]).fit(module, small_data())
    run, _ = fit_run(tmp_path / "ours", module=OwnSgd(image_size=16, model_kwargs=NARROW), epochs=1)
    for file in (tmp_path / "own" / "environment.json", run.environment):
        assert json.loads(file.read_text())["optimizers"] == ["SGD"]


@FEW_WORKERS
def test_a_fit_that_never_began_is_tried_again_in_its_folder(loader, tmp_path):
    class Failing(Other):
        def configure_optimizers(self):
            raise RuntimeError("no optimizer")

    report = RunReport(tmp_path / "run")
    with pytest.raises(RuntimeError, match="no optimizer"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[report]).fit(Failing(), loader)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[report]).fit(Other(), loader)
    assert (tmp_path / "run" / "metrics.csv").is_file()


@FEW_WORKERS
def test_a_dashboard_that_cannot_draw_does_not_end_training(loader, tmp_path, capsys):
    class Wide(Other):
        """More logits than there are names, and a metric of the name of our matrix."""

        def __init__(self):
            super().__init__()
            self.val_confusion = nn.Identity()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    board = TensorBoardLogger(tmp_path, "board", "1")
    dashboard = Dashboard(class_names=["a", "b"])
    quiet_trainer(tmp_path, max_epochs=1, logger=board, callbacks=[dashboard]).fit(Wide(), loader, [loader, loader])
    assert "2 class names for 3 logits" in capsys.readouterr().out
