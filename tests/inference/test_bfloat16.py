"""Logits in bfloat16: the classes of float32, close ones in float32, and nothing of it where it gains nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cifar_lightning import ImageClassifier
from cifar_lightning.cli.main import run_command
from cifar_lightning.inference import bfloat16
from cifar_lightning.inference import predict_images as predict
from cifar_lightning.inference.bfloat16 import faster_logits
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.runs.folder import RunFolder

SIZE, NUM_CLASSES = 16, 3


@pytest.fixture(autouse=True)
def _cpu_that_is_faster_in_bfloat16(monkeypatch):
    monkeypatch.setattr(bfloat16, "default_precision", lambda on_cuda: ("bf16-mixed", ""))


def images_of(num, seed=0):
    """Return noise on different backgrounds, so that the classes differ."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(192, (num, 1, 1, 3), generator=generator)
    return (colours + torch.randint(64, (num, SIZE, SIZE, 3), generator=generator)).to(torch.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a model that was trained to tell the strongest colour of images."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}\n")
    torch.manual_seed(0)
    module = ImageClassifier("smallnet", NUM_CLASSES, SIZE, model_kwargs={"widths": [8, 8, 16]}).train()
    pixels = images_of(256, seed=1).permute(0, 3, 1, 2) / 255 - 0.5
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(module(pixels), pixels.mean((2, 3)).argmax(1)).backward()
        optimizer.step()
    data = {"class_names": ["red", "green", "blue"], "image_size": SIZE, "mean": [0.5] * 3, "std": [1.0] * 3}
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 0}
    torch.save(checkpoint | {"ImageDataModule": data}, run.best_checkpoint)
    return run


def gap(logits):
    first, second = logits.topk(2).values.unbind(1)
    return first - second


@pytest.mark.parametrize("tta", ["none", "six"])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_classes_are_those_of_float32_and_close_ones_are_computed_in_it(run, tta, temperature):
    trained = replace(load_trained_model(run), tta=tta, temperature=temperature)
    images = images_of(1000)
    sample = images[::16][:64]
    logits = faster_logits(trained, sample, batch_size=24)(images)
    exact = trained.logits(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    equal = (logits - exact).abs().amax(1) < 1e-4 / temperature
    assert 0 < int(equal.sum()) < 500, "some, and not most, are computed again"
    assert equal[gap(exact).argsort()[: int(equal.sum()) // 2]].all(), "the closest are"
    # The margin is in the unit of the logits, so that it covers the errors of all images and not of the sample alone.
    errors = (logits - exact)[~equal]
    assert float((errors.amax(1) - errors.amin(1)).max()) < float(gap(exact)[~equal].min())


def test_nothing_is_gained_where_most_images_are_close(run):
    trained = load_trained_model(run)
    flat = torch.full((64, SIZE, SIZE, 3), 96, dtype=torch.uint8)
    with torch.no_grad():  # two classes of equal logits
        trained.model.head.weight[1] = trained.model.head.weight[0]
        trained.model.head.bias[:2] = 1000
    assert faster_logits(trained, flat, batch_size=64) is None


def test_a_model_of_ones_own_and_a_slow_cpu_stay_in_float32(run, monkeypatch):
    trained = load_trained_model(run)
    sample = images_of(64)
    assert faster_logits(trained, sample, batch_size=64) is not None
    own = replace(trained, architecture={**trained.architecture, "name": "package.module:net"})
    assert faster_logits(own, sample, batch_size=64) is None
    monkeypatch.setattr(bfloat16, "default_precision", lambda on_cuda: ("32-true", ""))
    assert faster_logits(trained, sample, batch_size=64) is None


def test_logits_that_are_not_finite_are_computed_in_float32(run, monkeypatch):
    trained = load_trained_model(run)
    logits = faster_logits(trained, images_of(64), batch_size=64)
    rough = torch.tensor([[float("nan"), 1.0, 0.0], [float("inf"), float("inf"), 0.0], [1000.0, 0.0, 0.0]])
    monkeypatch.setattr(bfloat16, "_in_bfloat16", lambda *_: rough.clone())
    images = images_of(3)
    torch.testing.assert_close(logits(images), torch.cat([trained.logits(images)[:2], rough[2:]]))


def predicted(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("decoding_here")
def test_predict_images_computes_many_in_bfloat16_and_all_in_float32_when_asked(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "_BFLOAT16_FROM", 150)
    monkeypatch.setattr(predict, "keep_freed_memory", lambda: None)  # of this process, for the tests that follow
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for k, pixels in enumerate(images_of(200).numpy()):
        Image.fromarray(pixels).save(f"images/{k:03}.png")
    Path("images/100.png").write_bytes(b"cut")
    messages = {}
    for output, flags in {"auto": [], "exact": ["--precision", "32-true"], "few": ["--batch_size", "7"]}.items():
        assert run_command(["predict-images", str(run.path), "images", "--output", f"{output}.jsonl", *flags]) == 1
        messages[output] = capsys.readouterr().err
    rows = {name: predicted(f"{name}.jsonl") for name in messages}
    assert ["--precision 32-true" in messages[name] for name in rows] == [True, False, True]
    for name in ("auto", "few"):
        assert [row["class"] for row in rows[name]] == [row["class"] for row in rows["exact"]]
    assert len({row["class"] for row in rows["exact"]}) > 1, "a test that any prediction passes"
    probs = {name: np.array([row["probability"] for row in own]) for name, own in rows.items()}
    assert 0 < np.abs(probs["auto"] - probs["exact"]).max() < 0.1
    few_images = ["images/000.png", "images/001.png"]
    assert run_command(["predict-images", str(run.path), *few_images, "--output", "two.jsonl"]) == 0
    two = [row["probability"] for row in predicted("two.jsonl")]
    assert two == pytest.approx(probs["exact"][:2], abs=1e-6), "few images stay in float32"
