"""The LR finder suggests a learning rate that trains, and leaves no trace on the run that follows."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import quiet_trainer, small_data
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner

from cifar_lightning import ImageClassifier, ImageDataModule, UserError
from cifar_lightning.models.speednet import WhiteningConv
from cifar_lightning.optim.muon import Muon
from cifar_lightning.training.lr_finder import MAX_LR, MIN_LR, find_lr

CPU = {"accelerator": "cpu"}


def module(**kwargs):
    return ImageClassifier(image_size=16, model_kwargs={"widths": [4, 8]}, **kwargs)


@pytest.fixture(scope="module")
def data():
    return ImageDataModule("synthetic", image_size=16, batch_size=100)


def test_the_rate_lies_where_the_loss_falls_and_nothing_else_is_touched(data):
    tuned = module()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    random_state = torch.get_rng_state()
    found = find_lr(tuned, data, **CPU)
    assert MIN_LR < found.suggestion < MAX_LR
    assert found.lrs == sorted(found.lrs)
    assert len(found.lrs) == len(found.losses) > 20
    at = found.lrs.index(found.suggestion)
    assert found.losses[at] > min(found.losses)
    assert np.gradient(found.losses)[at] < 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert data.trainer is None


def test_muon_keeps_the_ratios_of_its_rates(data, monkeypatch):
    tuned = module(optimizer="muon", lr=0.05, sgd_lr=0.1, head_lr=0.01)
    steps, step = [], Muon.step

    def watch(self, closure=None):
        steps.append({group["role"]: group["lr"] for group in self.param_groups})
        return step(self, closure)

    monkeypatch.setattr(Muon, "step", watch)
    find_lr(tuned, data, **CPU)
    assert len(steps) > 20
    for rates in steps:
        assert rates["vectors"] == pytest.approx(2 * rates["filters"])
        assert rates["matrices"] == pytest.approx(0.2 * rates["filters"])


def test_layer_decay_keeps_its_ratios(data, monkeypatch):
    tuned, rates, step = module(layer_decay=0.5), [], torch.optim.AdamW.step

    def watch(self, closure=None):
        done = step(self, closure)
        rates.append([group["lr"] / self.param_groups[0]["lr"] for group in self.param_groups])
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    find_lr(tuned, data, **CPU)
    assert len(rates) > 20
    expected = sorted({0.5**depth for depth in range(5)})
    for ratios in rates:
        assert sorted(set(ratios)) == pytest.approx(expected)


@pytest.mark.parametrize("limit", ["min_epochs", "min_steps"])
def test_it_takes_its_own_steps_whatever_the_least_of_the_run(data, limit, monkeypatch):
    monkeypatch.setattr("cifar_lightning.training.lr_finder.MAX_LR", 1e4)  # diverges, which ends it
    torch.manual_seed(0)
    tuned = module(optimizer="sgd")
    alone = find_lr(tuned, data, **CPU).lrs
    assert len(alone) < 100
    assert len(find_lr(tuned, data, **{limit: 100}, **CPU).lrs) == len(alone)


def test_a_strategy_that_is_an_object_serves_the_run_afterwards(data):
    strategy = SingleDeviceStrategy("cpu")
    find_lr(module(), data, strategy=strategy)
    assert strategy._lightning_module is None
    assert strategy.model is None


def test_it_trains_as_the_run_will_with_class_weights_and_whitened_filters(monkeypatch):
    whitened, weights, cross_entropy = [], [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(WhiteningConv, "whiten", lambda self, images: whitened.append(len(images)))

    def watch(*args, **kwargs):
        if "label_smoothing" in kwargs:  # the training loss, not a figure
            weights.append(kwargs["weight"])
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", watch)
    settings = {"name": "speednet", "model_kwargs": {"widths": [4, 4]}, "optimizer": "muon", "lr": 0.1}
    data = ImageDataModule("synthetic", image_size=16, batch_size=100, class_weights="balanced")
    find_lr(ImageClassifier(image_size=16, **settings), data, **CPU)
    assert whitened == [4500]
    assert all(weight is not None for weight in weights)


def test_a_loss_that_is_not_a_number_ends_in_words(data, monkeypatch):
    tuned = module()
    monkeypatch.setattr(type(tuned), "training_step", lambda self, batch, index: self(batch[0]).sum() * float("nan"))
    with pytest.raises(UserError, match="fell at no learning rate"):
        find_lr(tuned, data, **CPU)


def test_several_processes_are_refused(data):
    with pytest.raises(UserError, match="one process"):
        find_lr(module(), data, accelerator="cpu", devices=2, strategy="ddp")


def test_a_last_batch_of_one_image_ends_in_a_sentence():
    images = ImageDataModule("synthetic", image_size=16, limit=112, batch_size=25)  # 101 to train on
    deep = ImageClassifier(image_size=16, model_kwargs={"widths": [2] * 5})
    with pytest.raises(UserError, match=r"--batch_size 25: of 101 .* the last batch has 1"):
        find_lr(deep, images, **CPU)


class Started(pl.Callback):
    """Keeps the peak learning rate and the first filters when training starts."""

    def on_train_start(self, trainer, pl_module):
        self.max_lr = trainer.optimizers[0].param_groups[0]["max_lr"]
        self.filters = pl_module.model.features[0].weight.detach().clone()


def test_a_rate_that_lightnings_tuner_finds_is_trained_with(tmp_path):
    tuned, images, started = module(), small_data(), Started()
    found = Tuner(quiet_trainer(tmp_path, max_epochs=5)).lr_find(tuned, datamodule=images, num_training=30)
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[started]).fit(tuned, images)
    assert started.max_lr == found.suggestion() == tuned.hparams["lr"] != 3e-3


def test_lightnings_tuner_keeps_the_ratios_of_muon_too(tmp_path, monkeypatch):
    tuned, images, steps, step = module(optimizer="muon", lr=0.05, head_lr=0.01), small_data(), [], Muon.step

    def watch(self, closure=None):
        steps.append({group["role"]: group["lr"] for group in self.param_groups})
        return step(self, closure)

    monkeypatch.setattr(Muon, "step", watch)
    trainer = quiet_trainer(tmp_path, max_epochs=5)
    found = Tuner(trainer).lr_find(tuned, datamodule=images, num_training=30)
    assert len(steps) > 10
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(tuned, images)
    for rates in steps:
        assert rates["vectors"] == pytest.approx(2 * rates["filters"])
        assert rates["matrices"] == pytest.approx(0.2 * rates["filters"])
    peaks = tuned.optimizer_settings
    assert (peaks.lr, peaks.sgd_lr, peaks.head_lr) == pytest.approx([found.suggestion() * each for each in (1, 2, 0.2)])
    assert (tuned.hparams["sgd_lr"], tuned.hparams["head_lr"]) == (peaks.sgd_lr, peaks.head_lr)


def test_lightnings_tuner_searches_with_a_whitened_stem(tmp_path, monkeypatch):
    settings = {"name": "speednet", "model_kwargs": {"widths": [4, 4]}, "optimizer": "muon", "lr": 0.1}
    tuned, searched, forward = ImageClassifier(image_size=16, **settings), [], WhiteningConv.forward

    def watch(self, images):
        searched.append(self.is_whitened)
        return forward(self, images)

    monkeypatch.setattr(WhiteningConv, "forward", watch)
    Tuner(quiet_trainer(tmp_path, max_epochs=1)).lr_find(tuned, datamodule=small_data(), num_training=3)
    assert searched
    assert all(searched)


class OwnOptimizer(ImageClassifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=1e-9)


def test_weights_of_a_module_with_its_own_optimizer_are_loaded_after_lightnings_tuner(tmp_path):
    torch.save(module().model.state_dict(), tmp_path / "trained.pt")
    expected = torch.load(tmp_path / "trained.pt")["features.0.weight"]
    settings = {"image_size": 16, "model_kwargs": {"widths": [4, 8]}, "pretrained": str(tmp_path / "trained.pt")}
    tuned, images = OwnOptimizer(**settings), small_data()
    Tuner(quiet_trainer(tmp_path, max_epochs=1)).scale_batch_size(tuned, images, steps_per_trial=1, max_trials=1)
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(tuned, images)
    torch.testing.assert_close(tuned.model.features[0].weight, expected)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_lightnings_tuner_searches_with_pretrained_weights_and_they_are_trained_afterwards(tmp_path, search):
    torch.save(module().model.state_dict(), tmp_path / "trained.pt")
    expected = torch.load(tmp_path / "trained.pt")["features.0.weight"]
    tuned, images, started = module(pretrained=str(tmp_path / "trained.pt")), small_data(), Started()
    trials = {"lr_find": {"num_training": 3}, "scale_batch_size": {"steps_per_trial": 1, "max_trials": 1}}[search]
    getattr(Tuner(quiet_trainer(tmp_path, max_epochs=1)), search)(tuned, datamodule=images, **trials)
    assert torch.equal(tuned.model.features[0].weight, expected)
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[started]).fit(tuned, images)
    assert torch.equal(started.filters, expected)
