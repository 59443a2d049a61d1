"""Models of one's own, by import path, in every command."""

import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from program import REPO, start

from benchmarks.faults.judge import differences

NETS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width: int = 4, num_classes: int = 10):
        super().__init__(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def make(num_classes, width=4):
    return Net(width, num_classes)

def wide(num_classes):
    return Net(4, num_classes + 1)
"""
DATA = ["--data.dataset", "synthetic", "--data.image_size", "16", "--batch_size", "1000", "--epochs", "1"]
DATA += ["--trainer.accelerator", "cpu", "--data.limit", "2000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ["--model.name", "my_nets:make", "--model.model_kwargs", "{width: 6}"],
        ["--model.model", "my_nets.Net", "--model.model.width", "6"],
    ],
    ids=["name", "class_path"],
)
def test_every_command_works_for_a_model_of_ones_own_where_it_is_trusted(tmp_path, model):
    (tmp_path / "my_nets.py").write_text(NETS)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cat.png")
    start("fit", *DATA, *model, "--run_dir", "run", cwd=tmp_path)
    trusting = ["--trust_code", "true"]
    commands = [["fit", "--resume", "run", "--epochs", "2"], ["predict-images", "run", "cat.png"]]
    if "--model.name" in model:
        commands += [["test", "run"], ["export", "run", "--format", "torch"]]
    for command in commands:
        refused = start(*command, cwd=tmp_path, check=False)
        assert refused.returncode == 2
        assert "my_nets" in refused.stderr
        assert f"{' '.join(command)} --trust_code true" in refused.stderr
        start(*command, *trusting, cwd=tmp_path)
    assert "trust" not in (tmp_path / "run" / "config.yaml").read_text()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["name"] is None
    assert checkpoint["state_dict"]["model.3.weight"].shape == (10, 6)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


CLASSES = """
import torch
from torch import nn
from cifar_lightning import ImageClassifier, ImageDataModule

class Scaled(ImageClassifier):
    def __init__(self, width: int = 4, num_classes: int = 10):
        pooled = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.Sequential(pooled, nn.Dropout(0.2), nn.Linear(width, num_classes))
        super().__init__(model=model, num_classes=num_classes, image_size=16)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * super().forward(images)

class Data(ImageDataModule):
    pass
"""


@pytest.mark.slow
def test_a_killed_run_of_subclasses_with_an_optimizer_resumes_to_the_bit_and_works_in_every_command(tmp_path):
    (tmp_path / "mine.py").write_text(CLASSES)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cat.png")
    flags = ["--model", "mine.Scaled", "--model.width", "6", "--data", "mine.Data", *DATA, "--batch_size", "300"]
    flags += ["--optimizer", "RAdam", "--optimizer.lr", "0.02", "--epochs", "3", "--trainer.logger", "false"]
    flags += ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1", "--checkpoint.every_n_train_steps", "2"]
    start("fit", *flags, "--run_dir", "whole", cwd=tmp_path)
    sabotage = {"program": REPO / "benchmarks" / "faults" / "sabotage.py", "PYTHONPATH": str(REPO)}
    broken = ["SIGKILL@train:8", REPO / "train.py", "fit", *flags, "--run_dir", "killed"]
    assert start(*broken, cwd=tmp_path, check=False, **sabotage).returncode == -signal.SIGKILL
    resumed = start("fit", "--resume", "killed", "--trust_code", "true", cwd=tmp_path)
    assert "in epoch 2 after step 8" in resumed.stdout
    ends = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "killed")]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "Data"):
        assert differences(ends[0][key], ends[1][key]) == [], key
    metrics = [(tmp_path / run / "metrics.csv").read_bytes() for run in ("whole", "killed")]
    assert metrics[0] == metrics[1]
    assert "--trust_code true" in start("test", "killed", cwd=tmp_path, check=False).stderr
    images, export = ["predict-images", "killed", "cat.png"], ["export", "killed", "--format", "onnx"]
    for command in (["test", "killed"], images, export):
        done = start(*command, "--trust_code", "true", cwd=tmp_path)
    assert "all top-1 predictions equal" in done.stdout
    assert "RAdam" in (tmp_path / "killed" / "report.html").read_text()
