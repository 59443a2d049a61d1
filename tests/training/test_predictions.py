"""The files that a run's predictions are written to."""

import csv
import errno
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fitting import fit_run

from cifar_lightning import ImageClassifier, ImageDataModule, UserError
from cifar_lightning.runs.contents import read_test_metrics
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.predictions import PredictionWriter, _write_npz


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


def make_trainer(tmp_path, keeper, **kwargs):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[keeper],
        **kwargs,
    )


def make_parts():
    module = ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2]})
    return module, ImageDataModule("synthetic", batch_size=900, image_size=16)


def test_predictions_are_kept_in_the_order_of_the_split(tmp_path, folder):
    keeper = PredictionWriter(folder)
    run = make_trainer(tmp_path, keeper)
    run.fit(*make_parts())
    assert not folder.predictions_val.exists()  # validations within fit are not predictions
    run.test(run.lightning_module, run.datamodule, verbose=False)
    predictions = np.load(folder.predictions)
    targets = run.datamodule._images["test"].targets
    assert np.array_equal(predictions["targets"], targets)
    run.lightning_module.eval()
    with torch.no_grad():
        logits = torch.cat([run.lightning_module(images) for images, _ in run.datamodule.test_dataloader()])
    assert np.array_equal(predictions["logits"], logits.numpy())
    shown = np.load(folder.gallery)
    assert np.array_equal(shown["images"], run.datamodule._images["test"].images[shown["indices"]])
    assert predictions["names"].tolist() == [f"test[{index}]" for index in range(1000)]
    keeper.output = tmp_path / "predictions.CSV"
    run.predict(run.lightning_module, run.datamodule, return_predictions=False)
    named = list(csv.DictReader(keeper.output.read_text().splitlines()))
    assert [row["path"] for row in named] == predictions["names"].tolist()
    assert {row["split"] for row in named} == {"test"}
    assert keeper.is_test_written
    assert keeper.test.confusion.sum() == 1000


def test_predictions_of_some_images_only_are_not_written(tmp_path, folder, capsys):
    keeper = PredictionWriter(folder)
    make_trainer(tmp_path, keeper, limit_test_batches=2).test(*make_parts(), verbose=False)
    assert len(keeper.test.targets) == 512
    assert not keeper.is_test_written
    assert list(folder.path.iterdir()) == []
    assert "512 of 1,000" in capsys.readouterr().out


def test_predictions_of_some_images_are_written_to_the_output_alone(tmp_path, folder, capsys):
    keeper = PredictionWriter(folder)
    module, data = make_parts()
    folder.predictions.write_bytes(b"of all images")
    make_trainer(tmp_path, keeper, limit_predict_batches=1).predict(module, data, return_predictions=False)
    assert folder.predictions.read_bytes() == b"of all images"
    assert "256 of 1,000" in capsys.readouterr().out
    assert keeper.num_written == 0
    keeper.output = tmp_path / "some.npz"
    make_trainer(tmp_path, keeper, limit_predict_batches=1).predict(module, data, return_predictions=False)
    assert keeper.num_written == len(np.load(keeper.output)["targets"]) == 256


def test_images_in_another_order_than_the_split_are_not_written_under_its_names(tmp_path, folder):
    class Backwards(ImageDataModule):
        def test_dataloader(self):
            images, labels = (torch.cat(each) for each in zip(*super().test_dataloader(), strict=True))
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images.flip(0), labels.flip(0)), 500)

    module, _ = make_parts()
    run = make_trainer(tmp_path, PredictionWriter(folder))
    with pytest.raises(UserError, match=r"Backwards: test_dataloader .*rank_positions"):
        run.test(module, Backwards("synthetic", batch_size=900, image_size=16), verbose=False)
    assert not folder.predictions.exists()


def test_the_epoch_of_a_tested_checkpoint_is_kept_and_none_of_weights_that_are_in_no_checkpoint(tmp_path):
    folder = RunFolder(tmp_path / "run")
    run, trainer = fit_run(folder.path, PredictionWriter(folder), eval_batch_size=200)
    for checkpoint, epoch in ((run.last_checkpoint, 2), (run.previous_checkpoint, 1), (None, None)):
        trainer.test(trainer.lightning_module, trainer.datamodule, checkpoint, verbose=False, weights_only=True)
        assert read_test_metrics(run.test_metrics).get("epoch") == epoch


def test_arrays_are_written_straight_into_a_file_that_replaces_the_old_one(folder, monkeypatch):
    _write_npz(folder.predictions, targets=np.arange(3))
    before = folder.predictions.read_bytes()

    def fill_the_disk(file, **arrays):
        assert Path(file.name).parent == folder.path
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fill_the_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            _write_npz(folder.predictions, targets=np.arange(4))
    assert caught.value.filename == str(folder.predictions)
    assert folder.predictions.read_bytes() == before
    assert list(folder.path.iterdir()) == [folder.predictions]
    _write_npz(folder.predictions, targets=np.arange(4))
    assert np.load(folder.predictions)["targets"].tolist() == [0, 1, 2, 3]
