"""Short fits in this process, with the callbacks and the checkpoints of a run."""

import random
import signal

import lightning.pytorch as pl
import numpy as np
import torch

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import RESUME_STATE, read_checkpoint
from cifar_lightning.optim.optimizers import OptimizerSettings
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.best_checkpoint import BestCheckpoint
from cifar_lightning.training.last_checkpoint import CheckpointSchedule, LastCheckpoint
from cifar_lightning.training.resume_state import ResumeState
from cifar_lightning.training.run_recorder import RunRecorder
from cifar_lightning.training.signals import StopSignals

NARROW = {"widths": [2, 2, 2], "dropout": 0.3}
SPEED = {
    "name": "speednet",
    "model_kwargs": {"widths": [4, 8, 8]},
    "optimizer": "muon",
    "schedule": "linear",
    "sgd_lr": 5.0,
    "head_lr": 0.05,
    "lr": 0.1,
}


def seed(number):
    """Seed the generators of Python, NumPy and torch."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def last_checkpoint_of(run):
    """Read the last checkpoint, without the state of Python's own generator.

    The tests' type checks draw from that: beartype looks at items at random.
    """
    checkpoint = read_checkpoint(run.last_checkpoint)
    for rank in checkpoint.get(RESUME_STATE, {"ranks": []})["ranks"]:
        del rank["rng"]["python"]
    return checkpoint


def checkpoint_of(weight, **more):
    """Return what is saved of a model of one weight."""
    return {"state_dict": {"weight": weight}, "global_step": 7, RESUME_STATE: {}, **more}


def quiet_trainer(tmp_path, **kwargs):
    """Return a Trainer on the CPU that writes nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        **{**quiet, "accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": tmp_path, **kwargs}
    )


def small_data(**kwargs):
    """Return generated images of 16 pixels, 9 steps an epoch."""
    return ImageDataModule("synthetic", **{"batch_size": 20, "limit": 200, "image_size": 16, **kwargs})


def optimizer_settings(name="adamw", **changed):
    """Return settings of an optimizer."""
    usual = {"lr": 0.01, "sgd_lr": 0.1, "head_lr": None, "momentum": 0.9, "sgd_momentum": 0.9, "sgd_weight_decay": 0.0}
    return OptimizerSettings(**{"name": name, **usual, "weight_decay": 0.05, **changed})


def fake_data(**members):
    """Return an ImageDataModule that was not set up, with these members."""
    kind = type("Fake", (ImageDataModule,), {"class_weights": None, "in_channels": 3, "train_dataloader": None})
    data = kind.__new__(kind)
    vars(data).update(members)
    return data


def fit_run(
    path, *more, schedule=None, signals=None, ckpt_path=None, module=None, epochs=2, without=(), trainer=None, **data
):
    """Train into a run folder, 9 steps of 100 images an epoch; return (run, Trainer).

    `trainer` has further arguments of the Trainer, `data` of the data module.
    """
    run = RunFolder(path)
    run.path.mkdir(exist_ok=True)
    last = LastCheckpoint(run, schedule or CheckpointSchedule(), signals or StopSignals())
    validates = data.get("val_fraction") != 0
    callbacks = [ResumeState(), RunRecorder(run), *more, *([BestCheckpoint(run)] if validates else []), last]
    settings = {"accelerator": "cpu", **(trainer or {})}
    trainer = pl.Trainer(
        **settings,
        max_epochs=epochs,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=None if validates else 0,
        default_root_dir=path,
        callbacks=[callback for callback in callbacks if not isinstance(callback, tuple(without))],
        plugins=[DurableCheckpointIO()],
    )
    module = module or ImageClassifier(image_size=16, model_kwargs=NARROW, lr=0.01)
    images = ImageDataModule(**{"dataset": "synthetic", "image_size": 16, "batch_size": 20, "limit": 200, **data})
    trainer.fit(module, images, ckpt_path=ckpt_path, weights_only=True)
    return run, trainer


class Signal(pl.Callback):
    """Sends a signal to this process in a hook, at a step."""

    def __init__(self, hook, step, signum=signal.SIGTERM):
        self.step, self.signum = step, signum
        setattr(self, hook, self.send)

    def send(self, trainer, *args):
        if trainer.global_step == self.step:
            signal.raise_signal(self.signum)  # os.kill would end the process on Windows
