"""torch.compile of a run, and where there is no compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_lightning.models.compile import compile_model
from cifar_lightning.models.smallnet import SmallNet


def test_without_a_compiler_the_model_runs_uncompiled_and_says_so(monkeypatch, capsys):
    def find_none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", find_none)
    model = SmallNet(widths=[2, 2])
    compile_model(model, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--model.compile: ")
    assert "(No working C++ compiler found)" in line
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 10)


COMPARED = """
import functools
import lightning.pytorch as pl
import torch
from torch._inductor import cpp_builder
from cifar_lightning import ImageClassifier, ImageDataModule

torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # of no C++ compiler
cpp_builder.get_cpp_compiler = lambda: "c++"
found = []
for is_compiled in (False, True):
    pl.seed_everything(0)
    classifier = ImageClassifier(image_size=16, model_kwargs={"widths": [2, 2, 2], "dropout": 0.3}, compile=is_compiled)
    data = ImageDataModule("synthetic", batch_size=20, limit=200, image_size=16)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, enable_checkpointing=False, **quiet)
    trainer.fit(classifier, data)
    assert (classifier.model._compiled_call_impl is not None) == is_compiled
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert "val/acc" in metrics
    found.append((list(classifier.state_dict()), metrics))
assert found[0] == found[1], found
"""


@pytest.mark.slow  # torch's compiler takes seconds to import
def test_a_compiled_model_trains_to_the_same_metrics_under_the_same_names_of_weights():
    # A process of its own: the tests' check of types cannot be compiled.
    repo = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPARED], capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stderr
