"""Grad-CAM and neighbours of a test's mistakes, as arrays."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.models.grad_cam import grad_cam
from cifar_lightning.report.gallery import NUM_EXPLAINED
from cifar_lightning.report.results import Predictions
from cifar_lightning.training.explanations import _neighbours, _train_names, explain_mistakes


@pytest.fixture(scope="module")
def data():
    data = ImageDataModule("synthetic", batch_size=100, image_size=16, limit=700)
    data.setup()
    return data


def evaluated(data, module, num=40, **kwargs):
    """Return a Trainer as at the end of a test of the first images, and their predictions."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **kwargs)
    trainer.datamodule = data
    images, targets = next(iter(data.test_dataloader()))
    with torch.no_grad():
        logits = module.eval()(images[:num]).float().numpy()
    return trainer, Predictions(logits, targets[:num].numpy(), np.arange(num), data.class_names), images


def made(**kwargs):
    return ImageClassifier(image_size=16, model_kwargs={"widths": [4, 4, 8]}, **kwargs)


def test_the_most_confident_mistakes_have_their_grad_cam_and_nearest_training_images(data):
    module = made()
    trainer, test, images = evaluated(data, module)
    random, requires = torch.get_rng_state(), [parameter.requires_grad for parameter in module.parameters()]
    with torch.inference_mode():  # as Lightning tests
        found = explain_mistakes(trainer, module, test)
    assert torch.equal(random, torch.get_rng_state())
    assert requires == [parameter.requires_grad for parameter in module.parameters()]
    assert all(parameter.grad is None for parameter in module.parameters())
    wrong = np.flatnonzero(test.preds != test.targets)
    worst = wrong[np.argsort(-test.probs.max(1)[wrong], kind="stable")][:NUM_EXPLAINED]
    assert found["reasons"].tolist() == ["", ""]
    assert found["indices"].tolist() == worst.tolist()
    cam = grad_cam(module, images[worst], torch.from_numpy(test.preds[worst]))
    assert np.abs(found["cam"] / 255 - cam.numpy()).max() <= 0.5 / 255 + 1e-4
    searched = np.sort(np.random.default_rng(0).choice(630, 126, replace=False))  # a fifth
    features = np.concatenate([_features(module, data, "train", searched), _features(module, data, "test", worst)])
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features[126:] @ features[:126].T
    nearest = searched[np.argsort(-similarity, axis=1)[:, :3]]
    assert np.array_equal(found["neighbour_names"], data.image_names("train")[nearest])
    assert np.array_equal(found["neighbours"][5, 2], data.images("train", nearest[5, 2:])[0])
    assert np.array_equal(found["neighbour_labels"], data.targets("train", nearest))


def _features(module, data, split, positions):
    pixels = torch.from_numpy(data.images(split, positions)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    with torch.no_grad():
        return module.model.features((pixels - mean) / std).mean((2, 3)).numpy()


def test_training_images_and_their_labels_are_those_that_the_loader_gives(data):
    positions = np.arange(data.num_images("train"))
    of_loader = np.concatenate([targets for _, targets in data.train_dataloader()])
    assert np.array_equal(np.bincount(of_loader), np.bincount(data.targets("train", positions)))


def test_a_model_in_bfloat16_is_explained(data):
    module = made()
    trainer, test, _ = evaluated(data, module, precision="bf16-mixed")
    found = explain_mistakes(trainer, module, test)
    assert found["reasons"].tolist() == ["", ""]
    assert found["cam"].max() == 255


class Broken(nn.Module):
    """Fails where gradients are enabled."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 10))

    def forward(self, images):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return self.layers(images)


def test_a_model_that_fails_has_a_reason_and_its_neighbours(data):
    module = ImageClassifier(image_size=16, model=Broken())
    trainer, test, _ = evaluated(data, module)
    found = explain_mistakes(trainer, module, test)
    assert "no gradients here" in found["reasons"][0]
    assert found["reasons"][1] == ""
    assert "cam" not in found
    assert found["neighbours"].shape == (NUM_EXPLAINED, 3, 16, 16, 3)


def test_neither_foreign_modules_nor_tests_without_mistakes_are_explained(data):
    trainer, test, _ = evaluated(data, made())
    for module, logits in ((pl.LightningModule(), test.logits), (made(), np.eye(10, dtype=np.float32)[test.targets])):
        found = explain_mistakes(trainer, module, Predictions(logits, *list(vars(test).values())[1:]))
        assert list(found) == ["reasons"]
        assert all(found["reasons"])


@pytest.mark.parametrize(("num_train", "num_searched"), [(2, 2), (99, 99), (300, 100), (630, 126), (40_000, 5000)])
def test_a_fifth_of_the_training_images_is_searched_at_least_100_and_at_most_5000(num_train, num_searched):
    names = np.arange(num_train)
    data = SimpleNamespace(
        num_images=lambda split: num_train,
        images=lambda split, positions: np.zeros((len(positions), 2, 2, 3), np.uint8),
        image_names=lambda split: names,
        targets=lambda split, positions: names[positions],
    )
    searched = []

    def features_of(images):
        searched.append(len(images))
        return torch.ones(len(images), 4)

    found = _neighbours(data, np.zeros((1, 2, 2, 3), np.uint8), features_of)
    assert sum(searched) - 1 == num_searched  # and the image itself
    assert found["neighbours"].shape == (1, min(3, num_train), 2, 2, 3)


def test_only_the_nearest_training_images_are_named_also_by_an_image_names_of_ones_own():
    class Own(ImageDataModule):
        def image_names(self, split):
            return np.array([f"own {name}" for name in super().image_names(split)])

    positions, named = np.array([[3, 0], [629, 3]]), []

    def image_name(split, index):
        named.append(index)
        return f"{split}/{index}.png"

    for kind, start in ((ImageDataModule, ""), (Own, "own ")):
        data = kind("synthetic", limit=700, image_size=16)
        data.setup()
        object.__setattr__(data.source, "image_name", image_name)
        indices = data._splits.train.numpy()[positions]
        names = _train_names(data, positions)
        assert names.tolist() == [[f"{start}train/{index}.png" for index in row] for row in indices]
        assert named == indices.ravel().tolist() if kind is ImageDataModule else len(named) == 4 + 630
