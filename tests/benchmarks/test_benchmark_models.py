"""What `benchmarks/speed/models.py` counts."""

import json
import sys

import pytest
import torch

from benchmarks.speed import models
from cifar_lightning.models.registry import build_model
from cifar_lightning.models.smallnet import SmallNet


def test_costs_are_counted_from_the_shapes():
    found = models.costs(SmallNet(num_classes=10, widths=(4, 8)), 16)
    # Filters times pixels; 16 x 16, after the pool 8 x 8; then the linear layer.
    multiply_adds = 9 * (3 * 4 + 4 * 4) * 256 + 9 * (4 * 8 + 8 * 8) * 64 + 8 * 10
    parameters = 9 * (3 * 4 + 4 * 4 + 4 * 8 + 8 * 8) + 2 * 2 * (4 + 8) + 8 * 10 + 10
    assert found == {"parameters": parameters, "multiply_adds": multiply_adds, "map": [8, 8]}


def test_resnet18_has_the_published_multiply_adds_and_pooled_layers_are_no_map():
    with torch.device("meta"):
        assert models.costs(build_model("resnet18"), 32)["multiply_adds"] / 1e9 == pytest.approx(0.56, abs=0.005)
        assert models.costs(build_model("mobilenet_v3_small"), 32)["map"] == [4, 4]


def test_the_table_ends_with_the_ratio_of_what_was_measured(monkeypatch, capsys, tmp_path):
    widths = {"small": 4, "large": 8}
    for name, width in widths.items():
        monkeypatch.setitem(
            models.MODELS, name, lambda num_classes, image_size, width=width: SmallNet(num_classes, widths=(width,))
        )
    path = tmp_path / "models.json"
    options = ["--image_size", "8", "--batch", "2", "--steps", "3", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["models.py", *widths, *options])
    trained = []
    took_s = [9] * 2 * models.NUM_WARM_UP + [1, 3, 2, 1, 3, 2]  # of small and large in turn

    def trainer_of(model, *_):
        width = next(model.parameters()).shape[0]
        return lambda: trained.append(width) or took_s[len(trained) - 1]

    monkeypatch.setattr(models, "trainer_of", trainer_of)
    models.main()
    assert trained == [4, 8] * (models.NUM_WARM_UP + 3), "in turn"
    figures = json.loads(path.read_text())
    small, large = figures["models"]
    assert small["images_per_s"] == large["images_per_s"]
    assert figures["ratio"] == 1.5  # the median of 1 / 3, 2 / 1 and 3 / 2
    assert large["slowest"] <= large["images_per_s"] <= large["fastest"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"ratio={figures['ratio']:.3f}"


def test_a_step_moves_the_weights():
    torch.manual_seed(0)
    model = SmallNet(widths=(2,))
    before = [parameter.clone() for parameter in model.parameters()]
    assert models.trainer_of(model, 8, 4, torch.device("cpu"))() > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
