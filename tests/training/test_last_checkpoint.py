"""When last.ckpt is written, and how a signal ends a run."""

import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from fitting import NARROW, Signal, checkpoint_of, fit_run
from lightning.pytorch.trainer.states import TrainerFn

from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.errors import RunError
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.last_checkpoint import CheckpointSchedule, LastCheckpoint
from cifar_lightning.training.signals import Stopped, StopSignals


@pytest.mark.parametrize("place", ["weights", "disk"])
def test_a_save_that_fails_leaves_both_generations(tmp_path, monkeypatch, place):
    run = RunFolder(tmp_path / "run")
    for weight in (torch.ones(3), torch.zeros(3)):
        DurableCheckpointIO().save_checkpoint(checkpoint_of(weight), run.last_checkpoint)
    before = [file.read_bytes() for file in (run.last_checkpoint, run.previous_checkpoint)]
    assert before[0] != before[1]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[DurableCheckpointIO()])
    bad = torch.tensor([float("nan")]) if place == "weights" else torch.ones(3)
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda path: DurableCheckpointIO().save_checkpoint(checkpoint_of(bad), path)
    )
    if place == "disk":
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError):
        LastCheckpoint(run, CheckpointSchedule(), StopSignals())._save(trainer)
    assert [file.read_bytes() for file in (run.last_checkpoint, run.previous_checkpoint)] == before
    assert not list(run.leftovers())


class Saves(pl.Callback):
    """Notes the step of each checkpoint that is written."""

    def __init__(self):
        self.steps = []

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.steps.append(trainer.global_step)


def test_it_is_written_every_n_steps_but_at_the_end_of_an_epoch_only_once(tmp_path):
    saves = Saves()
    fit_run(tmp_path / "run", saves, schedule=CheckpointSchedule(every_n_train_steps=3), val_fraction=0.0, epochs=2)
    assert saves.steps == [3, 6, 9, 10, 12, 15, 18, 20]


def test_it_is_written_when_the_minutes_are_up(tmp_path):
    saves = Saves()
    fit_run(tmp_path / "run", saves, schedule=CheckpointSchedule(every_n_minutes=1e-9), val_fraction=0.0, epochs=1)
    assert saves.steps == list(range(1, 11))


@pytest.mark.parametrize(
    "flags", [{"every_n_train_steps": 0}, {"every_n_minutes": 0}, {"every_n_minutes": float("nan")}]
)
def test_a_schedule_of_nothing_is_refused(flags):
    with pytest.raises(UserError, match=r"--checkpoint\.every_n"):
        CheckpointSchedule(**flags)


def test_the_one_before_is_kept(tmp_path):
    run, _ = fit_run(tmp_path / "run", epochs=2)
    assert read_checkpoint(run.previous_checkpoint)["global_step"] == 9
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 18


def test_where_files_cannot_have_two_names_the_one_before_is_a_copy(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run, _ = fit_run(tmp_path / "run", epochs=2)
    assert read_checkpoint(run.previous_checkpoint)["global_step"] == 9


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_train_batch_start", 3, 4),
        ("on_train_batch_start", 8, 9),
        ("on_validation_batch_start", 9, 9),
        ("on_train_end", 18, 18),
    ],
    ids=["in a batch", "in the last batch of an epoch", "in a validation", "after the last epoch"],
)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_the_next_boundary_with_a_checkpoint(tmp_path, hook, step, saved, signum, status):
    with pytest.raises(Stopped) as ended:
        fit_run(tmp_path / "run", Signal(hook, step, signum), signals=StopSignals(), eval_batch_size=100)
    assert ended.value.code == status
    assert read_checkpoint(RunFolder(tmp_path / "run").last_checkpoint)["global_step"] == saved


def test_a_stop_does_not_cut_a_step_of_several_batches(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    run = RunFolder(tmp_path / "run")
    last = LastCheckpoint(run, CheckpointSchedule(), StopSignals())
    last.signals.signum = signal.SIGTERM
    seen = []

    class Loop:
        _should_accumulate = staticmethod(lambda: len(seen) < 2)
        _num_ready_batches_reached = staticmethod(lambda: False)
        _should_check_val_fx = staticmethod(lambda fetcher: False)

    class Trainer:
        world_size, global_step, is_global_zero, should_stop, max_steps = 1, 5, True, False, -1
        fit_loop = type("FitLoop", (), {"epoch_loop": Loop, "_data_fetcher": object()})

        @staticmethod
        def save_checkpoint(path):
            seen.append(path)

    last.on_train_batch_end(Trainer, module)
    assert seen == []
    seen += ["one", "two"]
    with pytest.raises(Stopped):
        last.on_train_batch_end(Trainer, module)
    assert seen[2] == run.last_checkpoint
    seen.clear()
    Trainer.state = type("State", (), {"fn": TrainerFn.FITTING})
    last.on_validation_batch_end(Trainer, module)
    assert seen == []
