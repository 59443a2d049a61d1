"""Models of one's own, by import path, in every command."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.program import start

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
