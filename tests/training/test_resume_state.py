"""A run that was stopped anywhere ends with the bits of one that was not; without its random states it does not."""

import itertools
import math
import signal

import lightning.pytorch as pl
import pytest
import torch
from fitting import NARROW, Signal, fit_run, last_checkpoint_of, seed
from lightning.pytorch.trainer.states import TrainerFn
from program import REPO, TINY
from program import start as run_program

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier, UserError
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import RESUME_STATE, is_inside_epoch, read_checkpoint
from cifar_lightning.checkpoints.schema import LOGGED_METRICS
from cifar_lightning.runs.contents import read_learning_rates
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.training import run_recorder
from cifar_lightning.training.last_checkpoint import CheckpointSchedule
from cifar_lightning.training.resume_state import ResumeState
from cifar_lightning.training.run_recorder import EPOCH_SO_FAR, RunRecorder
from cifar_lightning.training.signals import Stopped

# Lightning warns where it goes on in the folder of a run.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def result_of(run):
    files = {
        "metrics.csv": run.metrics_csv.read_bytes(),
        "learning_rates.json": read_learning_rates(run.learning_rates),
    }
    return {"last.ckpt": last_checkpoint_of(run), **files}


def start(path, *more, **kwargs):
    seed(0)
    return fit_run(path, *more, epochs=3, eval_batch_size=100, **kwargs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return result_of(start(tmp_path_factory.mktemp("unbroken") / "run")[0])


def stop_and_go_on(path, hook, step, without=(), **kwargs):
    with pytest.raises(Stopped):
        start(path, Signal(hook, step, signal.SIGTERM), **kwargs)
    seed(1)  # a new process has other random states
    run = RunFolder(path)
    return start_again(run, without, **kwargs)


def start_again(run, without, **kwargs):
    return fit_run(run.path, epochs=3, eval_batch_size=100, ckpt_path=run.last_checkpoint, without=without, **kwargs)[0]


class ByHand(ImageClassifier):
    """Takes its optimizer's and schedule's steps itself."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return loss


def by_hand():
    seed(0)
    return ByHand(image_size=16, model_kwargs=NARROW, lr=0.01)


@pytest.mark.parametrize("step", [4, 13])
def test_a_run_whose_module_optimizes_by_hand_resumes_with_its_schedule(tmp_path, step):
    whole, _ = start(tmp_path / "whole", module=by_hand())
    with pytest.raises(Stopped):
        start(tmp_path / "run", Signal("on_train_batch_start", step), module=by_hand())
    seed(1)
    run = start_again(RunFolder(tmp_path / "run"), (), module=by_hand())
    assert differences(result_of(run), result_of(whole)) == []


class Noting(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.callback_metrics["own"] = 0.5


def test_a_plain_number_among_the_logged_metrics_prevents_no_checkpoint(tmp_path):
    run, _ = fit_run(tmp_path / "run", Noting(), epochs=1)
    assert "own" not in read_checkpoint(run.last_checkpoint)[RESUME_STATE][LOGGED_METRICS]


class StepPlateau(ImageClassifier):
    """Logs a metric of its own in each step, by which its learning rate falls."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("own_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "own_loss", "interval": "step"},
        }


def test_metrics_of_a_subclass_are_there_for_its_schedule_when_a_validation_is_resumed(tmp_path):
    def made():
        seed(0)
        return StepPlateau(image_size=16, model_kwargs=NARROW)

    whole, _ = start(tmp_path / "whole", module=made())
    with pytest.raises(Stopped):
        start(tmp_path / "run", Signal("on_validation_batch_start", 9), module=made())
    seed(1)
    run = start_again(RunFolder(tmp_path / "run"), (), module=made())
    assert differences(result_of(run), result_of(whole)) == []


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 0),
        ("on_train_batch_start", 4),
        ("on_train_batch_start", 8),
        ("on_validation_batch_start", 9),
        ("on_validation_epoch_end", 9),
        ("on_train_batch_start", 9),
        ("on_train_batch_start", 16),
        ("on_validation_batch_start", 27),
    ],
)
def test_a_run_stopped_anywhere_ends_as_an_unbroken_one(tmp_path, unbroken, hook, step):
    assert differences(result_of(stop_and_go_on(tmp_path / "run", hook, step)), unbroken) == []


def test_each_step_has_the_learning_rate_of_its_schedule(unbroken):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=27, cycle_momentum=False)
    steps, lrs = zip(*unbroken["learning_rates.json"], strict=True)
    assert steps == tuple(range(27))
    for lr in lrs:
        assert lr == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        if lr is not lrs[-1]:
            schedule.step()


def test_of_a_long_run_at_most_2000_learning_rates_are_kept_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(run_recorder, "_MAX_LRS", 5)
    run, _ = start(tmp_path / "run")
    assert [step for step, _ in read_learning_rates(run.learning_rates)] == [0, 6, 12, 18, 24]


def test_it_does_so_with_worker_processes(tmp_path, unbroken):
    broken = stop_and_go_on(tmp_path / "run", "on_train_batch_start", 12, num_workers=1)
    assert differences(result_of(broken), unbroken) == []


class PowerCut(pl.Callback):
    """Ends a fit without a checkpoint, before the batch after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise OSError("the power is cut")


# After batches 4 and 8 of 9, of which each epoch's row shows the second.
TWICE = {"val_check_interval": 0.5}


@pytest.fixture(scope="module")
def unbroken_validated_twice(tmp_path_factory):
    return result_of(start(tmp_path_factory.mktemp("twice") / "run", trainer=TWICE)[0])


@pytest.fixture
def validated(monkeypatch):
    """The steps after which a validation ended."""
    steps, ends = [], RunRecorder.on_validation_end

    def note(recorder, trainer, module):
        steps.append(trainer.global_step)
        ends(recorder, trainer, module)

    monkeypatch.setattr(RunRecorder, "on_validation_end", note)
    return steps


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 3),
        ("on_validation_batch_start", 4),
        ("on_validation_epoch_end", 4),
        ("on_train_batch_start", 25),
    ],
    ids=["in the batch before it", "in it", "at its end", "in the batch before the last epoch's second"],
)
def test_a_validation_inside_an_epoch_is_not_skipped(tmp_path, unbroken_validated_twice, validated, hook, step):
    broken = stop_and_go_on(tmp_path / "run", hook, step, trainer=TWICE)
    assert validated == [4, 8, 13, 17, 22, 26]
    assert differences(result_of(broken), unbroken_validated_twice) == []


@pytest.mark.parametrize("step", [4, 8])
def test_nor_where_a_scheduled_checkpoint_falls_on_it(tmp_path, unbroken_validated_twice, validated, step):
    every = {"schedule": CheckpointSchedule(every_n_train_steps=4), "trainer": TWICE}
    with pytest.raises(OSError, match="power"):
        start(tmp_path / "run", PowerCut(step), **every)
    seed(1)
    run = RunFolder(tmp_path / "run")
    assert read_checkpoint(run.last_checkpoint)["global_step"] == step
    assert differences(result_of(start_again(run, (), **every)), unbroken_validated_twice) == []
    assert validated == [4, 8, 13, 17, 22, 26]


def timing_of(run):
    return MetricsTable(run.timing_csv).read()


def test_an_epoch_resumed_in_its_middle_counts_the_seconds_before_it(tmp_path, monkeypatch):
    clock = itertools.count()  # a second each time that anybody looks
    monkeypatch.setattr(run_recorder.time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(Stopped):
        start(tmp_path / "run", Signal("on_train_batch_start", 4, signal.SIGTERM))
    run = RunFolder(tmp_path / "run")
    before = read_checkpoint(run.last_checkpoint)[EPOCH_SO_FAR]["clock"]["elapsed_s"]
    assert before > 0
    looked = next(clock)
    start_again(run, ())
    row = timing_of(run)[0]
    assert before < row["elapsed_s"] < before + next(clock) - looked
    assert 0 < row["train_s"] < row["elapsed_s"]
    assert "clock" not in read_checkpoint(run.last_checkpoint)[EPOCH_SO_FAR]
    assert "clock" not in read_checkpoint(run.best_checkpoint)[EPOCH_SO_FAR]


def test_where_they_are_not_known_it_says_nothing(tmp_path):
    with pytest.raises(Stopped):
        start(tmp_path / "run", Signal("on_train_batch_start", 4, signal.SIGTERM))
    run = RunFolder(tmp_path / "run")
    checkpoint = read_checkpoint(run.last_checkpoint)
    del checkpoint[EPOCH_SO_FAR]  # as of an earlier version
    DurableCheckpointIO().save_checkpoint(checkpoint, run.last_checkpoint)
    start_again(run, ())
    first, *others = timing_of(run)
    assert math.isnan(first["elapsed_s"])
    assert math.isnan(first["train_s"])
    assert first["train_images_per_s"] > 0
    assert all(row["elapsed_s"] > row["train_s"] > 0 for row in others)


def test_without_the_random_states_it_does_not(tmp_path, unbroken):
    broken = stop_and_go_on(tmp_path / "run", "on_train_batch_start", 4, without=[ResumeState])
    assert any(name.startswith(".last.ckpt.state_dict.") for name in differences(result_of(broken), unbroken))


def test_a_schedule_of_checkpoints_changes_nothing(tmp_path, unbroken):
    run, _ = start(tmp_path / "run", schedule=CheckpointSchedule(every_n_train_steps=2))
    assert differences(result_of(run), unbroken) == []


def test_inside_an_epoch_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(Stopped):
        start(tmp_path / "run", Signal("on_train_batch_start", 4, signal.SIGTERM))
    checkpoint = read_checkpoint(RunFolder(tmp_path / "run").last_checkpoint)
    assert is_inside_epoch(checkpoint)
    fitting = {"world_size": 2, "callbacks": (), "early_stopping_callbacks": ()}
    two = type("Trainer", (), {**fitting, "state": type("State", (), {"fn": TrainerFn.FITTING})})
    with pytest.raises(UserError, match=r"inside an epoch on 1 process\(es\), not on 2"):
        ResumeState().on_load_checkpoint(two, ImageClassifier(), checkpoint)
    testing = type("Trainer", (), {"world_size": 2, "state": type("State", (), {"fn": TrainerFn.TESTING})})
    ResumeState().on_load_checkpoint(testing, ImageClassifier(), checkpoint)  # the test after a fit: any number
    checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 1
    state = ResumeState()
    state.on_load_checkpoint(two, ImageClassifier(), checkpoint)
    assert checkpoint[RESUME_STATE]["ranks"][0]["epoch_sums"] is None


@pytest.mark.slow
def test_two_processes_that_were_killed_inside_an_epoch_end_as_two_that_were_not(tmp_path):
    settings = [*TINY, "--model.model_kwargs", "{widths: [4, 8, 8], dropout: 0.2}", "--lr", 0.01, "--batch_size", 50]
    settings += ["--model.ema_decay", 0.9, "--model.mixup", 0.2]  # more states of each process, and an average of all
    settings += ["--epochs", 3, "--checkpoint.every_n_train_steps", 2, "--trainer.logger", "false"]
    settings += ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--trainer.precision", "32-true"]  # else by time
    run_program("fit", *settings, "--run_dir", "whole", cwd=tmp_path)
    sabotage = REPO / "benchmarks" / "faults" / "sabotage.py"
    killed = ["SIGKILL@train:14", REPO / "train.py", "fit", *settings, "--run_dir", "broken"]
    done = run_program(*killed, cwd=tmp_path, program=sabotage, check=False, PYTHONPATH=str(REPO))
    assert done.returncode == -signal.SIGKILL
    whole, broken = (RunFolder(tmp_path / name) for name in ("whole", "broken"))
    before = read_checkpoint(broken.last_checkpoint)
    assert (before["global_step"], is_inside_epoch(before)) == (14, True)
    done = run_program("fit", "--resume", broken.path, cwd=tmp_path)
    assert "in epoch 2 after step 14" in done.stdout
    ends = [read_checkpoint(run.last_checkpoint) for run in (whole, broken)]
    assert len(ends[0][RESUME_STATE]["ranks"]) == 2
    assert differences(*ends) == []
    assert whole.metrics_csv.read_bytes() == broken.metrics_csv.read_bytes()


def test_a_run_in_double_precision_ends_as_an_unbroken_one(tmp_path):
    settings = {"trainer": {"precision": "64-true"}, "class_weights": "balanced"}
    unbroken = result_of(start(tmp_path / "unbroken", **settings)[0])
    stop_and_go_on(tmp_path / "run", "on_train_batch_start", 12, **settings)
    assert differences(result_of(RunFolder(tmp_path / "run")), unbroken) == []
