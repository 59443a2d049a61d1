"""`overfit_batches` repeats its training batches, which Lightning does for a `DataLoader` alone; loaders resume."""

import lightning.pytorch as pl
import pytest
import torch
from fitting import quiet_trainer, small_data

from cifar_lightning import ImageClassifier

PLAIN = {"crop_padding_px": 0, "flip": "none"}


class Watch(pl.Callback):
    """Keeps the batches of each epoch, of training and of validation."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_start(self, *args):
        self.train.append([])  # an epoch that is resumed has no start

    def on_train_epoch_start(self, *args):
        self.train += [[]] if self.train[-1] else []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.train[-1].append(batch)

    def on_validation_batch_end(self, trainer, module, outputs, batch, *args):
        self.val.append(batch)


def watch(tmp_path, ckpt_path=None, callbacks=(), data=(), **trainer):
    seen = Watch()
    run = quiet_trainer(tmp_path, num_sanity_val_steps=0, callbacks=[seen, *callbacks], **trainer)
    images = small_data(**{**PLAIN, "eval_batch_size": 4, **dict(data)})
    run.fit(ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2]}), images, ckpt_path=ckpt_path)
    return seen, run


def chain(epochs):
    return [batch for epoch in epochs for batch in epoch]


def equal(epochs, others):
    return all(
        torch.equal(mine, its)
        for epoch, other in zip(epochs, others, strict=True)
        for batch, another in zip(epoch, other, strict=True)
        for mine, its in zip(batch, another, strict=True)
    )


@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:The .* does not have many workers")
@pytest.mark.parametrize(("num_workers", "overfit", "batches"), [(0, 1, 1), (2, 2, 2), (0, 0.34, 3)])
def test_the_same_batches_each_epoch(tmp_path, num_workers, overfit, batches):
    seen, run = watch(tmp_path, data={"num_workers": num_workers}, overfit_batches=overfit, max_epochs=3)
    assert [len(epoch) for epoch in seen.train] == [batches] * 3
    assert equal(seen.train, [seen.train[0]] * 3)
    assert len(seen.train[0][0][1].unique()) > 5  # of all classes, however the images are stored
    assert run.global_step == run.estimated_stepping_batches == 3 * batches
    assert len(seen.val) == 3 * max(1, int(5 * overfit) if isinstance(overfit, float) else overfit)
    others, _ = watch(tmp_path, data={"num_workers": 0}, limit_train_batches=batches, max_epochs=2)
    assert equal(others.train[:1], seen.train[:1])
    assert not equal(others.train[1:], seen.train[1:2])


@pytest.mark.filterwarnings("ignore:You requested to overfit")  # which this test does on purpose
def test_a_loader_that_is_given_without_its_data_module_repeats_them_too(tmp_path):
    seen, data = Watch(), small_data(**PLAIN)
    run = quiet_trainer(tmp_path, max_epochs=3, overfit_batches=2, callbacks=[seen])
    module = ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2]})
    loader = data.train_dataloader()
    run.fit(module, loader, data.val_dataloader())
    assert [len(epoch) for epoch in seen.train] == [2] * 3
    assert equal(seen.train, [seen.train[0]] * 3)
    again = Watch()
    quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=2, callbacks=[again]).fit(module, loader, loader)
    assert not equal(again.train[:1], again.train[1:]), "the loader of an earlier overfit_batches repeats no more"


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_inside_an_epoch_repeats_them_too(tmp_path, num_workers):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    settings = {"overfit_batches": 3, "max_epochs": 3, "data": {"num_workers": num_workers}}
    unbroken, _ = watch(tmp_path, callbacks=[Save()], **settings)
    resumed, run = watch(tmp_path, ckpt_path=tmp_path / "inside.ckpt", **settings)
    assert run.global_step == 9
    assert equal([chain(resumed.train)], [chain(unbroken.train)[5:]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_that_are_given_without_their_data_module_resume_inside_an_epoch(tmp_path, num_workers):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    def fit(*callbacks, ckpt_path=None):
        seen, data = Watch(), small_data(**PLAIN, num_workers=num_workers)
        module = ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2]})
        run = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[seen, *callbacks])
        run.fit(module, data.train_dataloader(), data.val_dataloader(), ckpt_path=ckpt_path)
        assert run.global_step == module.total_steps() == 18
        return chain(seen.train)

    unbroken = fit(Save())
    assert equal([fit(ckpt_path=tmp_path / "inside.ckpt")], [unbroken[12:]])
