"""A run's model, read back from its folder."""

import pytest
import torch

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    return run


def save(run, **changes):
    """Write a checkpoint as Lightning does; return the module it is of."""
    module = ImageClassifier("smallnet", 3, 16, model_kwargs={"widths": [2, 4, 4]}).eval()
    data = {"class_names": ["a", "b", "c"], "image_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    checkpoint = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "ImageDataModule": data,
        "epoch": 4,
    }
    torch.save({key: value for key, value in (checkpoint | changes).items() if value is not None}, run.best_checkpoint)
    return module


def test_a_run_gives_its_model_and_preprocessing(run):
    module = save(run)
    trained = load_trained_model(run)
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.2, 0.3])
    expected = module(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(trained.logits(images), expected.detach())
    assert (trained.class_names, trained.image_size, trained.epoch) == (("a", "b", "c"), 16, 5)
    assert trained.architecture == {"name": "smallnet", "num_classes": 3, "image_size": 16, "widths": [2, 4, 4]}
    assert not trained.model.training


def test_without_a_best_checkpoint_the_last_is_taken(run):
    save(run)
    run.best_checkpoint.rename(run.last_checkpoint)
    assert load_trained_model(run).checkpoint == run.last_checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ImageDataModule": None}, "no class names"),
        ({"hyper_parameters": {"name": None}}, "no import path"),
        ({"hyper_parameters": {"name": "smallnet"}}, "of another model: features.0.weight is 2x3x3x3 in it and 64x"),
    ],
)
def test_other_checkpoints_are_refused(run, changes, message):
    save(run, **changes)
    with pytest.raises(UserError, match=message):
        load_trained_model(run)


def test_a_flipped_byte_in_the_weights_and_a_cut_file_are_noticed(run):
    module = save(run)
    whole = run.best_checkpoint.read_bytes()
    stored = [bytes(tensor.untyped_storage()) for tensor in module.model.state_dict().values()]
    stored = [content for content in stored if whole.count(content) == 1]  # counters and biases are all zeros
    assert len(stored) >= 7
    for content in stored:
        at = whole.index(content)
        run.best_checkpoint.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(UserError, match="damaged checkpoint"):
            load_trained_model(run)
    for length in range(0, len(whole), len(whole) // 20):
        run.best_checkpoint.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged checkpoint"):
            load_trained_model(run)
