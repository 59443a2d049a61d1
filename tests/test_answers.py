"""The files that a run's answers are written to."""

import csv

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.analysis import gallery_positions, softmax
from cifar_lightning.answers import AnswerKeeper, write_confusion
from cifar_lightning.runs import RunFolder


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


def test_answers_are_kept_in_the_order_of_the_split(tmp_path, folder):
    keeper = AnswerKeeper(folder)
    run = make_trainer(tmp_path, keeper)
    run.fit(*make_parts())
    assert not folder.predictions_val.exists()  # validations within fit are not answers
    run.test(run.lightning_module, run.datamodule, verbose=False)
    answers = np.load(folder.predictions)
    targets = run.datamodule._pictures["test"].targets
    assert np.array_equal(answers["targets"], targets)
    run.lightning_module.eval()
    with torch.no_grad():
        logits = torch.cat([run.lightning_module(images) for images, _ in run.datamodule.test_dataloader()])
    assert np.array_equal(answers["logits"], logits.numpy())
    shown = np.load(folder.gallery)
    assert np.array_equal(shown["images"], run.datamodule._pictures["test"].images[shown["indices"]])
    assert keeper.metrics["accuracy"] == (answers["logits"].argmax(1) == targets).mean()
    assert keeper.confusion.sum() == 1000


def test_class_names_with_commas_and_quotes_survive_the_csv(folder):
    names = ('a, "b"', "ü", "plain")
    write_confusion(folder, np.arange(9).reshape(3, 3), names)
    rows = list(csv.reader(folder.confusion_matrix_csv.read_text(encoding="utf-8").splitlines()))
    assert tuple(rows[0][1:]) == names == tuple(row[0] for row in rows[1:])
    assert rows[2][1:] == ["3", "4", "5"]


def test_answers_of_some_pictures_alone_are_not_written(tmp_path, folder, capsys):
    keeper = AnswerKeeper(folder)
    make_trainer(tmp_path, keeper, limit_test_batches=2).test(*make_parts(), verbose=False)
    assert keeper.metrics["num_pictures"] == 512
    assert list(folder.path.iterdir()) == []
    assert "512 of 1,000" in capsys.readouterr().out


def test_the_gallery_has_the_worst_mistakes_and_the_least_certain():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 5, 2000)
    logits = rng.normal(size=(2000, 5)).astype(np.float32)
    logits[np.arange(2000), targets] += 2
    shown = gallery_positions(logits, targets, limit=200)
    assert len(shown) <= 200
    assert np.array_equal(shown, np.unique(shown))
    probs = softmax(logits)
    wrong = np.flatnonzero(probs.argmax(1) != targets)
    assert set(wrong[np.argsort(-probs[wrong].max(1))][:50]) <= set(shown)
    two = np.sort(probs, axis=1)[:, -2:]
    assert set(np.argsort(two[:, 1] - two[:, 0])[:50]) <= set(shown)
    assert set(np.argsort(probs[np.arange(2000), targets])[:50]) <= set(shown)


def test_a_gallery_without_any_mistake_still_has_pictures():
    logits = 10 * np.eye(4, dtype=np.float32)
    assert gallery_positions(logits, np.arange(4)).tolist() == [0, 1, 2, 3]
