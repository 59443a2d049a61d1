"""What `benchmarks/speed/winograd.py` compares."""

import json
import sys

import pytest

from benchmarks.speed import winograd
from cifar_lightning.models.cpu_convolutions import FasterConv2d


def test_steps_with_either_are_taken_in_turn_and_the_last_line_is_smallnets(monkeypatch, capsys, tmp_path):
    models, taken = [], []

    def trainer_of(model, *_):
        models.append(model)

        def step():
            has = any(type(module) is FasterConv2d for module in model.modules())
            taken.append(has)
            return 2.0 if has else 5.0

        return step

    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    monkeypatch.setattr(winograd, "trainer_of", trainer_of)
    monkeypatch.setattr(winograd, "keep_freed_memory", lambda: None)  # of this process, for the tests that follow
    monkeypatch.setattr(winograd, "CASES", [("speednet", 24, 8), ("smallnet", 32, 4)])
    path = tmp_path / "winograd.json"
    monkeypatch.setattr(sys, "argv", ["winograd.py", "--steps", "3", "--json", str(path)])
    winograd.main()
    assert taken == [True, False] * 2 * (winograd.NUM_WARM_UP + 3)
    rows = json.loads(path.read_text())["rows"]
    assert rows[1]["ratios"] == [2.5] * 3
    assert rows[1]["images_per_s"] == pytest.approx({"winograd": 2, "direct": 0.8})
    assert capsys.readouterr().out.splitlines()[-1] == "ratio=2.500"
