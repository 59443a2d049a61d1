"""Checkpoints and weights read from files, or refused with the reason."""

import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from benchmarks.faults.judge import Payload
from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.loading import load_weights, plain, read_checkpoint, read_weights
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.smallnet import SmallNet


def save(path):
    """Write a checkpoint as Lightning does; return the model in it."""
    module = ImageClassifier("smallnet", 3, 16, model_kwargs={"widths": [2, 4, 4]})
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return module.model


def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    payload = Payload(tmp_path / "ran")
    torch.save({"state_dict": payload}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "bad.ckpt")
    torch.save(SmallNet(widths=(2, 2)), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # what tells TorchScript's files
        archive.writestr("script/constants.pkl", b"")
    for name, kind in (("whole", r" \(cifar_lightning\.models\.smallnet\.SmallNet\)"), ("script", "")):
        advice = r"Save only the tensors .*: torch\.save\(model\.state_dict\(\), FILE"
        with pytest.raises(UserError, match=rf"more than tensors{kind} and .*\n.*{advice}"):
            read_checkpoint(tmp_path / f"{name}.pt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="damaged checkpoint, or not a"):
        read_checkpoint(tmp_path / "plain.ckpt")
    assert not (tmp_path / "ran").exists()


def test_weights_come_from_checkpoints_state_dicts_and_safetensors(tmp_path):
    from safetensors.torch import save_file

    expected = save(tmp_path / "best.ckpt").state_dict()
    torch.save(expected, tmp_path / "plain.pt")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "w.safetensors")
    for path in (tmp_path / "best.ckpt", tmp_path / "plain.pt", tmp_path / "w.safetensors"):
        model = SmallNet(3, widths=(2, 4, 4))
        load_weights(model, path)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("image_size", [32, 80])
def test_weights_for_other_classes_suggest_pretrained(tmp_path, image_size):
    torch.save(torchvision.models.squeezenet1_0().state_dict(), tmp_path / "imagenet.pth")
    model = build_model("torchvision/squeezenet1_0", 10, image_size)
    with pytest.raises(UserError, match=rf"other classes .*\nTo load .*: --model\.pretrained {tmp_path}/imagenet\.pth"):
        load_weights(model, tmp_path / "imagenet.pth")


def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(tmp_path):
    save(tmp_path / "best.ckpt")
    model = build_model("smallnet", 4, 16, widths=(2, 4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"other classes .*: head\.weight is 3x4 in it and 4x4 here and 1 more"):
        load_weights(model, tmp_path / "best.ckpt")
    other = build_model("smallnet", 3, 16, widths=(2, 4, 5))
    with pytest.raises(UserError, match=r"another model: .*\nGive the --model and --data flags"):
        load_weights(other, tmp_path / "best.ckpt")
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
