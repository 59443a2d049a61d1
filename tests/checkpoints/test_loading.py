"""Checkpoints and weights read from files, or refused with the reason."""

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.loading import load_weights, plain, progress_of, read_checkpoint, read_weights
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.runs.folder import RunFolder


def save(path):
    """Write a checkpoint as Lightning does; return the model in it."""
    module = ImageClassifier("smallnet", 3, 16, model_kwargs={"widths": [2, 4, 4]})
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return module.model


@pytest.mark.parametrize(("current", "total", "steps"), [(3, 12, 18), (0, 9, 24), (0, 0, 24)])
def test_steps_by_hand_are_those_of_finished_epochs_in_proportion_to_the_batches(current, total, steps):
    by_hand = {"total": {"completed": 24}}  # two a batch, as of two optimizers
    epoch = {"current": {"ready": 2, "processed": 1}}
    counts = {"current": {"processed": current}, "total": {"processed": total}}
    loop = {"epoch_progress": epoch, "epoch_loop.batch_progress": counts}
    automatic = {"optimizer": {"step": {"current": {"completed": 0}}}}
    loop |= {"epoch_loop.automatic_optimization.optim_progress": automatic}
    loop |= {"epoch_loop.manual_optimization.optim_step_progress": by_hand}
    assert progress_of({"loops": {"fit_loop": loop}, "global_step": 24}) == (1, steps)


def test_a_file_of_a_whole_model_is_refused_with_advice(tmp_path):
    torch.save(SmallNet(widths=(2, 2)), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # what tells TorchScript's files
        archive.writestr("script/constants.pkl", b"")
    for name, kind in (("whole", r" \(cifar_lightning\.models\.smallnet\.SmallNet\)"), ("script", "")):
        advice = r"Save only the tensors .*: torch\.save\(model\.state_dict\(\), FILE"
        with pytest.raises(UserError, match=rf"more than tensors{kind} and .*\n.*{advice}"):
            read_checkpoint(tmp_path / f"{name}.pt")


def test_weights_come_from_checkpoints_state_dicts_and_safetensors(tmp_path):
    from safetensors.torch import save_file

    expected = save(tmp_path / "best.ckpt").state_dict()
    torch.save(expected, tmp_path / "plain.pt")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "w.safetensors")
    for path in (tmp_path / "best.ckpt", tmp_path / "plain.pt", tmp_path / "w.safetensors"):
        model = SmallNet(3, widths=(2, 4, 4))
        load_weights(model, path)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


PREFIXES = ["", "module.", "_orig_mod.", "net.", "module._orig_mod.", "model._orig_mod.", "module.model."]
PLACES = [(), ("net",), ("model",), ("model_state_dict",), ("state_dict",), ("network", "weights")]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("keys", PLACES)
def test_weights_of_other_programs_are_found_under_their_keys_and_prefixes(tmp_path, prefix, keys):
    expected = save(tmp_path / "best.ckpt").state_dict()
    content = prefixed(prefix)(expected)
    for key in reversed(keys):
        optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}}
        content = {"epoch": 3, "optimizer": optimizer, "args": {"model": "x"}, key: content}
    torch.save(content, tmp_path / "theirs.pt")
    model = SmallNet(3, widths=(2, 4, 4))
    load_weights(model, tmp_path / "theirs.pt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_an_averaged_models_weights_are_loaded_without_its_counter(tmp_path):
    expected = save(tmp_path / "best.ckpt")
    torch.save(torch.optim.swa_utils.AveragedModel(expected).state_dict(), tmp_path / "ema.pt")
    model = SmallNet(3, widths=(2, 4, 4))
    load_weights(model, tmp_path / "ema.pt")
    assert torch.equal(model.state_dict()["head.weight"], expected.state_dict()["head.weight"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 1, "generator": {"conv.weight": torch.zeros(1)}}, ["epoch", "generator", "model_state_dict"]),
        ({"net": {"module.conv": torch.zeros(1)}}, ["conv", "features.0.weight"]),
        ({"conv\x1b[2J": torch.zeros(1)}, [r"conv\x1b[2J"]),
        ({"model": {"lr": 1}, "opt": 2}, ["model", "opt"]),
        ({}, ["nothing"]),
    ],
)
def test_a_file_without_fitting_weights_is_refused_by_the_keys_found_and_expected(tmp_path, content, found):
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(UserError) as refused:
        load_weights(SmallNet(3, widths=(2, 4, 4)), tmp_path / "theirs.pt")
    assert [word for word in found if word not in str(refused.value)] == []
    assert len(str(refused.value).splitlines()) <= 3


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


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch, of loading one as data
@pytest.mark.parametrize("kind", ["sparse", "meta", "complex"])
def test_weights_of_another_kind_are_refused_with_what_to_save_and_change_nothing(tmp_path, kind):
    model = SmallNet(3, widths=(2, 4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(iter(before))
    make = {"sparse": torch.Tensor.to_sparse, "meta": lambda x: x.to("meta"), "complex": lambda x: x.to(torch.cfloat)}
    torch.save({**before, name: make[kind](before[name])}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=rf"theirs\.pt: {name} is .* \({kind}\) .*\n.*dense tensors of real numbers"):
        load_weights(model, tmp_path / "theirs.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_best_checkpoint_is_named_with_the_one_that_takes_its_place(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.best_checkpoint.write_bytes(b"damaged")
    with pytest.raises(UserError) as alone:
        read_checkpoint(run.best_checkpoint)
    assert "last.ckpt" not in str(alone.value)
    run.last_checkpoint.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"best\.ckpt: a damaged(?s:.*)last\.ckpt"):
        read_checkpoint(run.best_checkpoint)
    with pytest.raises(UserError) as last:
        read_checkpoint(run.last_checkpoint)
    assert "best.ckpt" not in str(last.value)
