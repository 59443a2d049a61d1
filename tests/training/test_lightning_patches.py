"""The patches of Lightning do what they say, and Lightning still needs them."""

import subprocess
import sys

import lightning.pytorch as pl
import pytest
from fitting import NARROW, fit_run, quiet_trainer, small_data
from lightning.pytorch.callbacks import LambdaCallback
from program import REPO

from cifar_lightning import ImageClassifier
from cifar_lightning.training.lightning_patches import NoProfiler, skip_idle_hooks


@pytest.fixture
def module():
    return ImageClassifier(image_size=16, model_kwargs=NARROW)


def test_the_profiler_does_nothing_in_one_shared_context():
    profiler = NoProfiler()
    with profiler.profile("outer"), profiler.profile("inner"):
        pass
    assert profiler.profile("a") is profiler.profile("b")


def test_lightning_writes_the_hooks_name_many_times_a_step_and_reads_it_back(tmp_path, module):
    written, running = [], []

    class Counted(type(module)):
        def __setattr__(self, name, value):
            written.append(name)
            super().__setattr__(name, value)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            running.append((pl_module._current_fx_name, vars(pl_module)["_current_fx_name"]))

    module.__class__ = Counted
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[Look()])
    trainer.fit(module, small_data())
    assert written.count("_current_fx_name") > 40
    assert running == [("on_train_batch_end", "on_train_batch_end")]


CHECK = """
import os
import lightning.pytorch, torch
from cifar_lightning.training.lightning_patches import check_cuda_once
print(os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"])
torch.cuda.is_available = lambda: False
check_cuda_once()
print(os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"])
"""


def test_importing_lightning_has_torch_look_for_cuda_each_time_until_it_is_switched_off():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_hooks_that_do_nothing_are_skipped_and_all_others_are_called(tmp_path):
    called = []

    class Filled(pl.Callback):
        def on_train_batch_start(self, *args):
            called.append("class")

    made = LambdaCallback(on_train_batch_end=lambda *args: called.append("instance"))
    empty = pl.Callback()
    skip_idle_hooks([made, empty])
    assert empty.on_before_backward is None
    assert callable(empty.on_train_epoch_start)  # not in every step
    fit_run(tmp_path, Filled(), made, epochs=1)
    assert called == ["class", "instance"] * 9
