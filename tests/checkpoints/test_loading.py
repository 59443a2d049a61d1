"""What a checkpoint gives back: the same answers, or a message that says what is wrong with it."""

import pickle
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fault_judge import Payload
from torch import nn

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.loading import load_weights, plain, read_checkpoint, read_weights
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.smallnet import SmallNet
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


def test_a_run_gives_back_the_network_and_how_it_sees_images(run):
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
        ({"hyper_parameters": {"name": None}}, "made in Python"),
        ({"hyper_parameters": {"name": "smallnet"}}, "of another network: features.0.weight is 2x3x3x3 in it and 64x"),
    ],
)
def test_what_is_no_run_of_ours_is_named(run, changes, message):
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


def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    payload = Payload(tmp_path / "ran")
    torch.save({"state_dict": payload}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "bad.ckpt")
    torch.save(SmallNet(widths=(2, 2)), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # what tells TorchScript's files
        archive.writestr("script/constants.pkl", b"")
    for name, kind in (("whole", r" \(cifar_lightning\.models\.smallnet\.SmallNet\)"), ("script", "")):
        advice = r"save the numbers alone .*: torch\.save\(model\.state_dict\(\), FILE"
        with pytest.raises(UserError, match=rf"more than numbers{kind} and .*\n.*{advice}"):
            read_checkpoint(tmp_path / f"{name}.pt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="damaged checkpoint, or none"):
        read_checkpoint(tmp_path / "plain.ckpt")
    assert not (tmp_path / "ran").exists()


def test_weights_come_from_checkpoints_state_dicts_and_safetensors(run, tmp_path):
    from safetensors.torch import save_file

    module = save(run)
    expected = module.model.state_dict()
    torch.save(expected, tmp_path / "plain.pt")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "w.safetensors")
    for path in (run.best_checkpoint, tmp_path / "plain.pt", tmp_path / "w.safetensors"):
        model = SmallNet(3, widths=(2, 4, 4))
        load_weights(model, path)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "network.", "_orig_mod.", "_orig_mod.module."])
def test_names_that_were_all_given_a_prefix_lose_it(tmp_path, prefix):
    expected = SmallNet(3, widths=(2, 4, 4)).state_dict()
    for name, content in (("plain", lambda state: state), ("lightning", lambda state: {"state_dict": state})):
        torch.save(content({f"{prefix}{key}": tensor for key, tensor in expected.items()}), tmp_path / name)
        model = SmallNet(3, widths=(2, 4, 4))
        load_weights(model, tmp_path / name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_a_prefix_is_taken_off_also_where_a_part_of_the_network_is_called_like_it(tmp_path):
    model, other = (nn.Sequential(OrderedDict(model=nn.Linear(2, 2), head=nn.Linear(2, 2))) for _ in range(2))
    torch.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "own.pt")
    load_weights(other, tmp_path / "own.pt")
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_networks_own_name_is_no_prefix(tmp_path):
    model, other = (nn.Sequential(OrderedDict(model=nn.Linear(2, 2))) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "own.pt")
    load_weights(other, tmp_path / "own.pt")
    assert torch.equal(other.model.weight, model.model.weight)


@pytest.mark.parametrize("image_size", [32, 80])
def test_weights_of_other_classes_are_better_given_to_begin_with(tmp_path, image_size):
    torch.save(torchvision.models.squeezenet1_0().state_dict(), tmp_path / "imagenet.pth")
    model = build_model("torchvision/squeezenet1_0", 10, image_size)
    with pytest.raises(
        UserError, match=rf"other classes .*\nTo begin .*: --model\.pretrained {tmp_path}/imagenet\.pth"
    ):
        load_weights(model, tmp_path / "imagenet.pth")


def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(run, tmp_path):
    save(run)
    model = build_model("smallnet", 4, 16, widths=(2, 4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"other classes .*: head\.weight is 3x4 in it and 4x4 here and 1 more"):
        load_weights(model, run.best_checkpoint)
    other = build_model("smallnet", 3, 16, widths=(2, 4, 5))
    with pytest.raises(UserError, match=r"another network: .*\nGive the --model and --data flags"):
        load_weights(other, run.best_checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.save({"a": 1}, tmp_path / "none.pt")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "x.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_weights(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "absent.ckpt")


def test_odd_values_become_types_that_load_as_data():
    odd = {
        "path": Path("a"),
        "float": np.float64(0.5),
        "array": np.arange(2),
        "function": partial(int, base=2),
        "nested": ({"a": np.float32(1)}, {1}, None),
        "dtype": torch.float16,
    }
    became = plain(odd)
    assert became.pop("function").startswith("functools.partial")
    assert became == {
        "path": "a",
        "float": 0.5,
        "array": [0, 1],
        "nested": ({"a": 1.0}, [1], None),
        "dtype": torch.float16,
    }
    assert type(became["float"]) is float
