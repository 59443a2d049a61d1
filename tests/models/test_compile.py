"""torch.compile where there is no compiler."""

import torch

from cifar_lightning.models.compile import compile_model
from cifar_lightning.models.smallnet import SmallNet


def test_without_a_compiler_the_model_runs_uncompiled_and_says_so(monkeypatch, capsys):
    def find_none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", find_none)
    model = SmallNet(widths=[2, 2])
    compile_model(model, torch.device("cpu"))
    assert capsys.readouterr().err == ("--model.compile: the model runs uncompiled (No working C++ compiler found).\n")
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 10)
