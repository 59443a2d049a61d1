"""Gray images of one channel: decoded, transformed, trained on, drawn, predicted and exported."""

import csv

import numpy as np
import pytest
import torch
from fitting import fit_run
from PIL import Image
from program import fail
from torch import nn
from torchvision.transforms import v2

from cifar_lightning.checkpoints.pretrained import load_pretrained
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.image_decoding import decode_image
from cifar_lightning.errors import UserError
from cifar_lightning.inference.export import export_run
from cifar_lightning.inference.predict_images import predict_images
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.models.pretrained import Normalization
from cifar_lightning.models.registry import build_model, import_path_of
from cifar_lightning.python_api import load
from cifar_lightning.report.figures import figure_to_array, images_figure
from cifar_lightning.report.report import make_report
from cifar_lightning.settings.import_path import is_timm_installed
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.predictions import PredictionWriter
from cifar_lightning.transforms.augmentation import Augmentation, jitter
from cifar_lightning.transforms.operations import OPERATIONS, apply_operations
from cifar_lightning.transforms.pipeline import Pipeline, augment

pytestmark = pytest.mark.usefixtures("decoding_here")


def photos(root, num=30, size=(12, 9)):
    for number in range(num):
        pixels = np.random.default_rng(number).integers(0, 160, (*size, 3), dtype=np.uint8)
        folder = root / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + np.uint8(0 if number % 2 else 95)).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA"])
def test_a_decoded_gray_image_is_the_luma_of_the_rgb_one(mode, resize, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 4), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).convert(mode).save(path)
    rgb = decode_image(str(path), 8, resize=resize)
    gray = decode_image(str(path), 8, resize=resize, in_channels=1)
    assert np.array_equal(gray, np.asarray(Image.fromarray(rgb).convert("L"))[:, :, None])
    if mode == "L":
        assert np.array_equal(gray, rgb[:, :, :1])


@pytest.mark.parametrize("dataset", ["synthetic", "object", "folder"])
def test_every_data_set_gives_gray_images_with_statistics_of_one_channel(dataset, tmp_path):
    settings = {"batch_size": 8, "val_fraction": 0.2, "policy": "trivial", "contrast": 0.3}
    if dataset == "object":
        settings["dataset"] = tuple(
            (np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8), np.arange(30) % 2) for _ in "ab"
        )
    elif dataset == "folder":
        settings |= {"dataset": "folder", "root": str(photos(tmp_path / "p")), "image_size": 8}
    else:
        settings |= {"dataset": "synthetic", "image_size": 16, "limit": 100}
    gray, rgb = ImageDataModule(**settings, in_channels=1), ImageDataModule(**settings)
    for data in (gray, rgb):
        data.prepare_data()
        data.setup()
    positions = np.arange(5)
    for split in ("train", "test"):
        luma = [np.asarray(Image.fromarray(image).convert("L")) for image in rgb.images(split, positions)]
        assert np.array_equal(gray.images(split, positions)[..., 0], luma)
    assert len(gray.mean) == len(gray.std) == 1
    size = gray.image_size
    assert gray.sample_of_training(4).shape == (4, 1, size, size)
    for loader in (gray.train_dataloader(), gray.val_dataloader(), gray.test_dataloader()):
        assert next(iter(loader))[0].shape[1:] == (1, size, size)
    evaluated = torch.cat([images for images, _ in gray.test_dataloader()])
    expected = (gray.images("test", np.arange(len(evaluated))) / 255 - gray.mean[0]) / gray.std[0]
    np.testing.assert_allclose(evaluated.permute(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_of_policies_change_gray_images_as_torchvision_does(operation):
    images = torch.randint(0, 256, (9, 7, 6, 1), dtype=torch.uint8)
    strengths = {
        "Posterize": torch.arange(9.0),
        "Solarize": torch.linspace(1, 0, 9),
        "Rotate": torch.linspace(-90, 90, 9),
    }
    magnitudes = strengths.get(operation, torch.linspace(-0.9, 0.9, 9))
    chosen = torch.full((9, 1), OPERATIONS.index(operation)), magnitudes[:, None]
    changed = apply_operations(images.clone(), *chosen)
    functional = v2.functional
    of_torchvision = {
        "Brightness": lambda image, by: functional.adjust_brightness(image, 1 + by),
        "Color": lambda image, by: functional.adjust_saturation(image, 1 + by),
        "Contrast": lambda image, by: functional.adjust_contrast(image, 1 + by),
        "Sharpness": lambda image, by: functional.adjust_sharpness(image, 1 + by),
        "Posterize": lambda image, by: functional.posterize(image, int(by)),
        "Solarize": lambda image, by: functional.solarize(image, 255 * by),
        "AutoContrast": lambda image, _: functional.autocontrast(image),
        "Equalize": lambda image, _: functional.equalize(image),
        "Rotate": lambda image, by: functional.rotate(image, by),
    }
    if operation in of_torchvision:
        for image, by, got in zip(images, magnitudes.tolist(), changed, strict=True):
            assert torch.equal(got.permute(2, 0, 1), of_torchvision[operation](image.permute(2, 0, 1), by))
    else:  # moves, which do not know channels
        rgb = apply_operations(images.expand(-1, -1, -1, 3).contiguous(), *chosen)
        assert torch.equal(changed, rgb[..., :1])


def test_augmentation_of_gray_images_is_that_of_rgb_images_of_equal_channels():
    images = torch.randint(0, 256, (16, 8, 8, 1), dtype=torch.uint8)
    chosen = Augmentation(2, "reflect", "random", 3, erasing=0.5)
    _, drawn = Pipeline(chosen).draw(num_images=16, image_size=8, seed=0, epoch=0, device=torch.device("cpu"))
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])
    gray = augment(images, drawn, mean=mean, std=std)
    rgb = augment(images.expand(-1, -1, -1, 3).contiguous(), drawn, mean=mean.expand(3), std=std.expand(3))
    assert torch.equal(gray.expand(-1, 3, -1, -1), rgb)
    unit, factors = images.float() / 255, torch.full((16,), 1.3)
    expected = v2.functional.adjust_contrast(unit.permute(0, 3, 1, 2), 1.3)
    torch.testing.assert_close(jitter(unit, None, factors).permute(0, 3, 1, 2), expected)


NAMES = ["smallnet", "speednet", "preact_resnet18", "vit_tiny", "torchvision/squeezenet1_1"]
NAMES += [*(["timm/resnet10t", "timm/vit_tiny_patch16_224"] if is_timm_installed() else [])]


@pytest.mark.parametrize("name", NAMES)
def test_models_take_gray_images_and_those_of_libraries_see_what_they_saw_in_rgb(name):
    torch.manual_seed(0)
    gray = build_model(name, 3, 32, in_channels=1).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        logits = gray(images)
        assert logits.shape == (2, 3)
        if name not in ("smallnet", "speednet", "preact_resnet18"):  # which have filters of their own
            torch.manual_seed(0)
            rgb = build_model(name, 3, 32).eval()
            torch.testing.assert_close(logits, rgb(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


class GrayNet(nn.Sequential):
    def __init__(self, num_classes, in_channels=3):
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * in_channels, num_classes))


def test_models_of_ones_own_get_the_channels_they_ask_for_or_are_refused():
    path = f"{GrayNet.__module__}:GrayNet"
    assert build_model(path, 4, 8, in_channels=1)(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert import_path_of(GrayNet(4, 1), 4, 8, {}, 1) == {"path": path, "kwargs": {}}
    with pytest.raises(UserError, match="1-channel"):
        build_model("torchvision.models:squeezenet1_1", 4, 64, in_channels=1)


@pytest.mark.parametrize("image_size", [32, 96])
def test_pretrained_filters_of_rgb_are_summed_for_gray_images(image_size, tmp_path, capsys):
    squeeze = {"name": "torchvision/squeezenet1_0", "num_classes": 5, "image_size": image_size}
    theirs = build_model(**(squeeze | {"num_classes": 9, "image_size": 96}))
    torch.save(theirs.state_dict(), tmp_path / "rgb.pth")
    architecture = squeeze | {"in_channels": 1}
    gray, rgb = build_model(**architecture), build_model(**squeeze)
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    expected = load_pretrained(gray, architecture, tmp_path / "rgb.pth")
    assert isinstance(expected, Normalization)
    assert (*expected.mean, *expected.std) == pytest.approx((mean, std))
    load_pretrained(rgb, squeeze, tmp_path / "rgb.pth")
    assert "summed over RGB" in capsys.readouterr().out
    images = torch.rand(2, 1, image_size, image_size)
    torch.testing.assert_close(
        gray.features.eval()(images), rgb.features.eval()(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4
    )


def test_figures_draw_gray_images_gray():
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    drawn = [figure_to_array(images_figure(values.repeat(num, -1), ["a", "b", "c"])) for num in (1, 3)]
    assert np.array_equal(*drawn)


def test_a_gray_run_is_tested_reported_predicted_with_and_exported(tmp_path):
    root = photos(tmp_path / "photos")
    data = {"dataset": "folder", "root": str(root), "image_size": 16, "limit": None, "batch_size": 8}
    data |= {"in_channels": 1, "resize": "pad", "test_fraction": 0.3}
    module = ImageClassifier("smallnet", 2, 16, in_channels=1, model_kwargs={"widths": [4, 4, 8]})
    run, trainer = fit_run(tmp_path / "run", module=module, epochs=1, **data)
    trainer.callbacks.append(PredictionWriter(run))
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    make_report(run)
    assert np.load(run.gallery)["images"].shape[1:] == (16, 16, 1)
    assert "data:image/png" in (run.path / "report.html").read_text()
    trained = load_trained_model(run)
    assert (trained.in_channels, trained.resize, len(trained.mean)) == (1, "pad", 1)
    path = root / "light" / "0.png"
    predict_images(run, [path], output=tmp_path / "out.csv")
    square = decode_image(str(path), 16, resize="pad", in_channels=1)
    expected = trained.logits(torch.from_numpy(square.copy())[None]).softmax(1)[0]
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=1e-6)
    with Image.open(path) as image:
        for given in (path, image, np.asarray(image)):
            assert load(run.path).predict(given).top[0][1] == float(row["probability"])
    assert export_run(run, "torch").is_file()
    card = (run.path / "MODEL_CARD.md").read_text()
    assert all(words in card for words in ("gray, uint8", "(batch, 1, 16, 16)", "longer side"))
    other = ImageDataModule(**(data | {"in_channels": 3, "limit": None}))
    with pytest.raises(UserError, match=r"--data\.in_channels 3"):
        other.load_state_dict(trainer.datamodule.state_dict())
    other = ImageDataModule(**(data | {"resize": "crop", "limit": None}))
    with pytest.raises(UserError, match=r"--data\.resize crop"):
        other.load_state_dict(trainer.datamodule.state_dict())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data.in_channels", "2"], ["--data.in_channels 2", "1", "3"]),
        (["--model.model_kwargs", "{in_channels: 1}"], ["in_channels", "--data.in_channels 1"]),
        (
            ["--model.name", "timm/resnet10t", "--model.model_kwargs", "{in_chans: 1}"],
            ["in_chans", "--data.in_channels"],
        ),
        (["--data.resize", "stretch"], ["--data.resize stretch", "squash"]),
    ],
)
def test_channels_and_ways_to_resize_that_are_not_there_are_refused(flags, named, monkeypatch, capsys, tmp_path):
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--data.dataset", "synthetic", *flags)
    assert all(word in message for word in named)
