"""Pretrained weights: loaded into all layers but the head, fitted to the image size, or refused."""

import json
import logging
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from cifar_lightning.checkpoints.loading import load_weights
from cifar_lightning.checkpoints.pretrained import load_pretrained
from cifar_lightning.errors import UserError
from cifar_lightning.models.pretrained import Normalization, heads_of, resample_filters
from cifar_lightning.models.registry import build_model

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SQUEEZE = {"name": "torchvision/squeezenet1_0", "num_classes": 5, "image_size": 32}
NARROW = {"name": "smallnet", "num_classes": 5, "image_size": 16, "widths": [2, 4]}
FEW = {"num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}


@pytest.fixture
def published(monkeypatch):
    """Stand in for the server: whatever is asked for is what the test puts here."""
    responses = []

    def fetch(url, **kwargs):
        assert kwargs["weights_only"] is True
        assert kwargs["check_hash"] is True
        if isinstance(responses[-1], Exception):
            raise responses[-1]
        return dict(responses[-1])

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    return responses


def test_published_weights_are_taken_but_for_the_head(published, capsys):
    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5().state_dict()
    published.append({name: tensor for name, tensor in theirs.items() if "num_batches_tracked" not in name})
    architecture = {"name": "torchvision/shufflenet_v2_x0_5", "num_classes": 5, "image_size": 32}
    model = build_model(**architecture)
    head = model.fc.weight.detach().clone()
    assert load_pretrained(model, architecture, True) == IMAGENET
    assert torch.equal(model.fc.weight, head)
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in body.items())
    message = capsys.readouterr().out
    assert message.startswith("--model.pretrained true: the weights of torchvision/shufflenet_v2_x0_5 are loaded")
    assert message.count("\n") == 1


def test_a_head_of_as_many_classes_is_new_too(published):
    theirs = torchvision.models.squeezenet1_0(num_classes=5).state_dict()
    published.append(theirs)
    model = build_model(**(SQUEEZE | {"image_size": 96}))
    load_pretrained(model, SQUEEZE, True)
    assert not torch.equal(model.classifier[1].weight, theirs["classifier.1.weight"])
    assert torch.equal(model.features[0].weight, theirs["features.0.weight"])


def test_larger_filters_of_the_stem_are_resampled_and_a_line_says_so(published, capsys):
    theirs = torchvision.models.squeezenet1_0().state_dict()
    published.append(theirs)
    model = build_model(**SQUEEZE)
    load_pretrained(model, SQUEEZE, True)
    expected = resample_filters(theirs["features.0.weight"], (3, 3))
    torch.testing.assert_close(model.features[0].weight.detach(), expected)
    assert capsys.readouterr().out.endswith("; features.0.weight resampled from 7x7 to 3x3.\n")


def test_resampled_filters_respond_as_the_larger_ones_to_a_larger_image():
    torch.manual_seed(0)
    filters = torch.randn(4, 3, 6, 6)
    small = torch.randn(2, 3, 9, 9)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.nn.functional.conv2d(large, filters, stride=2)
    torch.testing.assert_close(torch.nn.functional.conv2d(small, resample_filters(filters, (3, 3))), expected)
    # Cells across a border are split: 7 into 3 are 2 1/3 each.
    line = resample_filters(torch.arange(7.0).reshape(1, 1, 1, 7).expand(1, 1, 3, 7), (3, 3))[0, 0, 0]
    torch.testing.assert_close(line, torch.tensor([0 + 1 + 2 / 3, 2 * 2 / 3 + 3 + 4 * 2 / 3, 4 / 3 + 5 + 6]))


def test_weights_of_former_names_and_of_auxiliary_heads_are_taken(published):
    with torch.device("meta"):
        theirs = torchvision.models.densenet121().state_dict()
        model = build_model("torchvision/densenet121", 5, 96)
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    published.append({old.sub(r"\1.\2", name): tensor for name, tensor in theirs.items()})
    assert "features.denseblock1.denselayer1.norm.1.weight" in published[-1]
    load_pretrained(model, {"name": "torchvision/densenet121", "num_classes": 5, "image_size": 96}, True)
    with torch.device("meta"):
        published.append(torchvision.models.googlenet(init_weights=False).state_dict())
        model = build_model("torchvision/googlenet", 5, 96)
    architecture = {"name": "torchvision/googlenet", "num_classes": 5, "image_size": 96}
    # torchvision's transform_input, (x * std + mean - 0.5) / 0.5, of an image normalised as ImageNet's.
    assert load_pretrained(model, architecture, True) == Normalization((0.5,) * 3, (0.5,) * 3)


def test_positions_are_interpolated(tmp_path, capsys):
    architecture = {"name": "vit_tiny", "num_classes": 5, "image_size": 16, **FEW}
    theirs = build_model(**(architecture | {"image_size": 24, "num_classes": 9}))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = build_model(**architecture)
    assert load_pretrained(model, architecture, tmp_path / "weights.pth") is None
    theirs_at, ours_at = (each.encoder.pos_embedding.detach() for each in (theirs, model))
    assert torch.equal(ours_at[:, 0], theirs_at[:, 0])  # of the class token
    corners = ours_at[0, 1:].reshape(4, 4, 8)[::3, ::3], theirs_at[0, 1:].reshape(6, 6, 8)[::5, ::5]
    torch.testing.assert_close(*corners)
    assert "encoder.pos_embedding interpolated from 36 to 16 patches." in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_files_of_each_kind_are_read(tmp_path, suffix):
    from safetensors.torch import save_file

    theirs = build_model(**(NARROW | {"num_classes": 9})).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(theirs, path)
    else:  # .pth as published files are: torch's format from before 1.6
        torch.save(theirs, path, _use_new_zipfile_serialization=suffix == ".pt")
    model = build_model(**NARROW)
    assert load_pretrained(model, NARROW, str(path)) is None
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in body.items())


def test_a_prefix_of_all_names_is_taken_off(tmp_path):
    theirs = build_model(**NARROW).state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in theirs.items()}, tmp_path / "weights.pt")
    model = build_model(**NARROW)
    load_pretrained(model, NARROW, tmp_path / "weights.pt")
    assert torch.equal(model.features[0].weight, theirs["features.0.weight"])


class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4, 5)


@pytest.mark.parametrize(("prefix", "suffix"), [("", ".pt"), ("", ".safetensors"), ("model.", ".pt")])
def test_a_model_with_a_model_inside_takes_its_own_weights(tmp_path, prefix, suffix):
    theirs, model = Wrapper(), Wrapper()
    path = tmp_path / f"net{suffix}"
    tensors = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    load_pretrained(model, {"name": "my:Wrapper", "num_classes": 5, "image_size": 8}, path)
    assert torch.equal(model.model.weight, theirs.model.weight)
    assert not torch.equal(model.head.weight, theirs.head.weight)
    load_weights(model, path)
    assert torch.equal(model.head.weight, theirs.head.weight)


def test_weights_of_a_module_with_a_head_of_the_models_name_next_to_it_are_taken(tmp_path):
    theirs, model = build_model(**NARROW), build_model(**NARROW)
    tensors = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save(tensors | {"head.weight": torch.ones(5, 4)}, tmp_path / "module.pt")
    load_pretrained(model, NARROW, tmp_path / "module.pt")
    assert torch.equal(model.features[0].weight, theirs.features[0].weight)


def test_a_head_of_another_form_is_left_out(tmp_path):
    theirs = build_model(**NARROW).state_dict()
    torch.save(theirs | {"head.second.weight": torch.ones(3)}, tmp_path / "weights.pt")
    model = build_model(**NARROW)
    load_pretrained(model, NARROW, tmp_path / "weights.pt")
    assert torch.equal(model.features[0].weight, theirs["features.0.weight"])


@pytest.mark.parametrize("name", ["missing.pt", "folder"])
def test_what_is_no_file_is_refused_with_the_flag(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"--model\.pretrained .*{name}: "):
        load_pretrained(build_model(**NARROW), NARROW, tmp_path / name)


def test_a_runs_checkpoint_brings_its_statistics(tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in build_model(**NARROW).state_dict().items()}
    data = {"class_names": ["a"], "image_size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save({"state_dict": weights, "ImageDataModule": data}, tmp_path / "best.ckpt")
    expected = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert load_pretrained(build_model(**NARROW), NARROW, tmp_path / "best.ckpt") == expected


def test_a_file_for_a_model_of_torchvision_is_normalised_as_the_published_ones(tmp_path):
    theirs = torchvision.models.squeezenet1_0(num_classes=3).state_dict()
    torch.save(theirs, tmp_path / "weights.pth")
    assert load_pretrained(build_model(**SQUEEZE), SQUEEZE, tmp_path / "weights.pth") == IMAGENET


def test_tensors_that_do_not_fit_are_named_with_both_shapes_and_nothing_is_changed(tmp_path):
    theirs = build_model(**(NARROW | {"widths": [3, 4]})).state_dict()
    torch.save(theirs, tmp_path / "other.pth")
    model = build_model(**NARROW)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_pretrained(model, NARROW, tmp_path / "other.pth")
    message = str(error.value)
    assert message.startswith(
        f"--model.pretrained {tmp_path / 'other.pth'}: its weights do not fit: features.0.weight is 3x3x3x3 in it"
    )
    assert "and 2x3x3x3 here, features.1.weight is 3 in it and 2 here, features.1.bias" in message
    assert re.search(r"and \d+ more\.\nGive weights of smallnet", message)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["smallnet", "wideresnet28_10", "vit_tiny"])
def test_models_without_published_weights_say_so(name):
    with torch.device("meta"):
        model = build_model(name)
    with pytest.raises(UserError, match=f"{name} has no published weights; give a file"):
        load_pretrained(model, {"name": name, "num_classes": 10, "image_size": 32}, True)


def test_without_a_connection_the_address_is_named(published):
    published.append(OSError("no route to host"))
    with pytest.raises(
        UserError, match=r"cannot be downloaded \(no route to host\)\.\nDownload https://download.pytorch.org/.*pth"
    ):
        load_pretrained(build_model(**SQUEEZE), SQUEEZE, True)


def test_the_head_is_the_last_layer_of_as_many_classes():
    with torch.device("meta"):
        heads = {name: heads_of(build_model(name, 64), 64, "--x") for name in ("smallnet", "resnet18", "vit_tiny")}
        heads["squeezenet"] = heads_of(build_model("torchvision/squeezenet1_0", 64), 64, "--x")
    assert heads == {
        "smallnet": ("head.",),
        "resnet18": ("fc.",),
        "vit_tiny": ("heads.head.",),
        "squeezenet": ("classifier.1.",),
    }
    with pytest.raises(UserError, match="no layer with 9 outputs"):
        heads_of(build_model("smallnet", 10), 9, "--x")


# -- timm --------------------------------------------------------------------------------------------------------


def test_timm_loads_its_own_weights_with_their_normalisation(monkeypatch):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(theirs))
    architecture = {"name": "timm/resnet10t", "num_classes": 5, "image_size": 32}
    model = build_model(**architecture)
    normalization = load_pretrained(model, architecture, True)
    assert normalization == Normalization(*(tuple(model.pretrained_cfg[key]) for key in ("mean", "std")))
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in body.items())
    assert model.fc.weight.shape == (5, 512)


def test_timms_models_without_weights_and_without_a_connection_say_so(monkeypatch, caplog):
    pytest.importorskip("timm")

    def fail(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    for name, message in (
        ("resnet10t", "cannot be downloaded .*no route to host"),
        ("mobilenetv2_035", "timm has no weights of mobilenetv2_035"),
    ):
        architecture = {"name": f"timm/{name}", "num_classes": 5, "image_size": 32}
        with pytest.raises(UserError, match=message):
            load_pretrained(build_model(**architecture), architecture, True)
    assert "Retrying" not in caplog.text


def test_an_export_of_a_run_brings_the_normalisation_of_its_images(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = build_model(**NARROW)
    about = {"mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 0.6]"}
    for name, metadata, expected in (
        ("of_a_run", about, Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ("plain", None, None),
    ):
        path = tmp_path / f"{name}.safetensors"
        safetensors.save_file(model.state_dict(), path, metadata=metadata)
        assert load_pretrained(build_model(**NARROW), NARROW, path) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"std": "[0.4, 0, 0.6]"},
        {"mean": "[NaN, 0.2, 0.3]"},
        {"mean": "[0.1]", "std": "[0.4]"},
        {"mean": "[0.1, 0.2]"},
        {"mean": '"123"'},
        {"mean": "0.1"},
        {"image_size": "many"},
    ],
)
def test_wrong_metadata_of_an_export_are_named(tmp_path, wrong):
    safetensors = pytest.importorskip("safetensors.torch")
    about = {"mean": "[0.1, 0.2, 0.3]", "std": "[0.4, 0.5, 0.6]", **wrong}
    safetensors.save_file(build_model(**NARROW).state_dict(), tmp_path / "model.safetensors", metadata=about)
    with pytest.raises(UserError, match=f"model.safetensors: .*{next(iter(wrong))}"):
        load_pretrained(build_model(**NARROW), NARROW, tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
@pytest.mark.parametrize("image_size", [16, 24])
def test_weights_of_images_of_another_size_are_remarked_on(tmp_path, capsys, image_size, kind):
    safetensors = pytest.importorskip("safetensors.torch")
    state, about = build_model(**NARROW).state_dict(), {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    about |= {"image_size": image_size, "class_names": ["a"]}
    path = tmp_path / ("model.safetensors" if kind == "export" else "best.ckpt")
    if kind == "export":
        safetensors.save_file(state, path, metadata={key: json.dumps(value) for key, value in about.items()})
    else:
        torch.save({"state_dict": state, "ImageDataModule": about}, path)
    load_pretrained(build_model(**NARROW), NARROW, path)
    assert ("24 pixels, here of 16 (--data.image_size)" in capsys.readouterr().out) is (image_size == 24)


def test_smallnets_weights_that_come_with_the_package_are_named_where_none_are_published():
    with pytest.raises(UserError, match="or smallnet, which comes with the package"):
        load_pretrained(build_model(**NARROW), NARROW, True)
