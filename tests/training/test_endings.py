"""A run that a limit ended, inside an epoch or at its end, trains exactly what is left once it is resumed."""

import datetime
import math

import lightning.pytorch as pl
import pytest
import torch
from fitting import NARROW, Signal, fit_run, last_checkpoint_of
from lightning.pytorch.callbacks import EarlyStopping

from benchmarks.faults.judge import differences
from cifar_lightning import ImageClassifier
from cifar_lightning.checkpoints.durable import newest_checkpoint
from cifar_lightning.checkpoints.loading import is_inside_epoch, progress_of, read_checkpoint
from cifar_lightning.checkpoints.resume import has_stopped, stop_point
from cifar_lightning.errors import UserError
from cifar_lightning.runs.contents import read_json
from cifar_lightning.runs.ending import ending_text, is_short
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.training.last_checkpoint import CheckpointSchedule
from cifar_lightning.training.signals import Stopped, StopSignals

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
PER_EPOCH = 9


def start(path, **kwargs):
    torch.manual_seed(0)
    return fit_run(path, **{"epochs": 4, "eval_batch_size": 100, **kwargs})[0]


def resume(run, *more, **kwargs):
    torch.manual_seed(1)
    settings = {"epochs": 4, "eval_batch_size": 100, **kwargs}
    return fit_run(run.path, *more, ckpt_path=run.last_checkpoint, **settings)


def result_of(run):
    checkpoint = last_checkpoint_of(run)
    for state in checkpoint["callbacks"].values():
        state.pop("dirpath", None)
    return {"last.ckpt": checkpoint, "metrics.csv": run.metrics_csv.read_bytes()}


class StopAt(pl.Callback):
    """Sets `should_stop` after a batch, as a callback of the user may."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.should_stop = True


class Fail(pl.Callback):
    """Ends the process, as SIGKILL would, in a hook of the epoch's end."""

    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *args):
        raise OSError("killed")


class Spy(pl.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *args):
        self.steps.append(trainer.global_step)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return result_of(start(tmp_path_factory.mktemp("unbroken") / "run"))


@pytest.mark.parametrize("first", [15, 18, 3, 9])
def test_a_run_ended_by_its_steps_trains_exactly_those_that_are_left(tmp_path, first):
    run = start(tmp_path / "run", trainer={"max_steps": first})
    checkpoint = read_checkpoint(run.last_checkpoint)
    done = first // PER_EPOCH
    assert is_inside_epoch(checkpoint) is bool(first % PER_EPOCH)
    assert progress_of(checkpoint) == (done, PER_EPOCH * done)
    MetricsTable(run.metrics_csv).cut_after(done - 1)
    spy = Spy()
    _, trainer = resume(run, spy, trainer={"max_steps": 36})
    assert spy.steps == list(range(first, 36))
    rows = MetricsTable(run.metrics_csv).read()
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 9), (1, 18), (2, 27), (3, 36)]
    assert not any(math.isnan(value) for row in rows for value in row.values())
    assert trainer.lightning_module.total_steps() == 36
    assert progress_of(read_checkpoint(run.last_checkpoint)) == (4, 36)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_train_epoch_end"])
def test_a_signal_at_the_last_step_of_a_cut_epoch_waits_for_its_row(tmp_path, hook):
    limit = {"max_steps": 5, "val_check_interval": 5}
    whole = result_of(start(tmp_path / "whole", trainer=limit))
    torch.manual_seed(0)
    signals = StopSignals()
    with pytest.raises(Stopped):
        fit_run(tmp_path / "run", Signal(hook, 5), epochs=4, eval_batch_size=100, trainer=limit, signals=signals)
    run = RunFolder(tmp_path / "run")
    assert [name for name in differences(result_of(run), whole) if ".clock." not in name] == []
    assert read_json(run.environment)["ended"] | {"by": ""} == {"by": "", "epochs": 0, "step": 5, "planned_steps": 5}


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_no_checkpoint_has_all_steps_before_the_row_is_written(tmp_path, hook):
    limit, schedule = {"max_steps": 5, "val_check_interval": 5}, CheckpointSchedule(every_n_train_steps=1)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(OSError, match="killed"):
        fit_run(run.path, Fail(hook), epochs=4, trainer=limit, schedule=schedule)
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 4
    if run.metrics_csv.exists():
        MetricsTable(run.metrics_csv).cut_after(-1)
    resume(run, trainer=limit)
    assert [(row["epoch"], row["step"]) for row in MetricsTable(run.metrics_csv).read()] == [(0, 5)]


@pytest.mark.parametrize("batch", [5, 9, 14, 27])
def test_a_run_that_a_callback_stopped_ends_as_an_unbroken_one(tmp_path, unbroken, batch):
    torch.manual_seed(0)
    run, _ = fit_run(tmp_path / "run", StopAt(batch), epochs=4, eval_batch_size=100)
    assert read_checkpoint(run.last_checkpoint)["global_step"] == batch
    assert read_json(run.environment)["ended"] == {
        "by": "should_stop",
        "epochs": batch // PER_EPOCH,
        "step": batch,
        "planned_steps": 36,
    }
    MetricsTable(run.metrics_csv).cut_after(batch // PER_EPOCH - 1)
    resume(run)
    assert differences(result_of(run), unbroken) == []
    assert read_json(run.environment)["ended"]["by"] == "epochs"


def test_a_stop_inside_an_accumulation_window_waits_for_its_end(tmp_path):
    window = {"trainer": {"accumulate_grad_batches": 2}}
    whole = result_of(start(tmp_path / "whole", **window))
    torch.manual_seed(0)
    run, _ = fit_run(tmp_path / "run", StopAt(3), epochs=4, eval_batch_size=100, **window)
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 2
    MetricsTable(run.metrics_csv).cut_after(-1)
    resume(run, **window)
    assert differences(result_of(run), whole) == []


def test_a_time_limit_is_noted_and_is_fresh_when_resumed(tmp_path, unbroken, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: clock[0])

    class Tick(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            clock[0] += 1

    torch.manual_seed(0)
    limit = {"max_time": datetime.timedelta(seconds=14)}
    run, _ = fit_run(tmp_path / "run", Tick(), epochs=4, eval_batch_size=100, trainer=limit)
    assert read_json(run.environment)["ended"] == {"by": "max_time", "epochs": 1, "step": 14, "planned_steps": 36}
    assert is_inside_epoch(read_checkpoint(run.last_checkpoint))
    MetricsTable(run.metrics_csv).cut_after(0)
    resume(run, Tick(), trainer=limit)
    assert read_json(run.environment)["ended"]["step"] == 28
    MetricsTable(run.metrics_csv).cut_after(2)
    resume(run)
    assert differences(result_of(run), unbroken) == []


def test_the_score_of_the_best_epoch_is_restored(tmp_path):
    run = start(tmp_path / "run", epochs=2)
    state = next(s for key, s in read_checkpoint(run.last_checkpoint)["callbacks"].items() if "Best" in key)
    assert state["current_score"] is not None
    _, trainer = resume(run, epochs=2)
    assert trainer.checkpoint_callbacks[0].state_dict()["current_score"] == state["current_score"]


def test_a_best_checkpoint_from_inside_an_accumulation_window_is_not_resumed_from(tmp_path):
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 3}

    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                raise OSError("the power is cut")

    with pytest.raises(OSError, match="power"):
        fit_run(tmp_path / "run", Cut(), epochs=1, eval_batch_size=100, trainer=settings)
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints.iterdir()] == ["best.ckpt"]
    with pytest.raises(UserError, match=r"best\.ckpt: saved inside an accumulation window"):
        newest_checkpoint(run)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_a_signal_is_noted(tmp_path, hook):
    with pytest.raises(Stopped):
        fit_run(tmp_path / "run", Signal(hook, 9), epochs=2, eval_batch_size=100)
    ended = read_json(RunFolder(tmp_path / "run").environment)["ended"]
    assert (ended["by"], ended["planned_steps"], is_short(ended)) == ("signal", 18, True)
    assert "signal" in ending_text(ended)


@pytest.mark.parametrize("ended", [None, "x", {}, {"step": "9", "epochs": 1}, {"step": 1.5, "epochs": 1}])
def test_an_ending_that_is_not_known_has_no_text(ended):
    assert (ending_text(ended), is_short(ended)) == ("", False)


class StopsItself(ImageClassifier):
    """Sets `should_stop` in its own hook, which comes after those of the callbacks."""

    def on_train_batch_end(self, *args):
        if self.trainer.fit_loop.total_batch_idx + 1 == 5:
            self.trainer.should_stop = True


def test_a_run_that_its_module_stopped_ends_as_an_unbroken_one(tmp_path, unbroken):
    torch.manual_seed(0)
    module = StopsItself(image_size=16, model_kwargs=NARROW, lr=0.01)
    run, _ = fit_run(tmp_path / "run", module=module, epochs=4, eval_batch_size=100)
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 5
    MetricsTable(run.metrics_csv).cut_after(-1)
    resume(run)
    assert differences(result_of(run), unbroken) == []


def test_a_stop_adds_no_validation(tmp_path):
    settings = {"trainer": {"val_check_interval": 4, "accumulate_grad_batches": 3}}

    class StopInValidation(Spy):
        def on_validation_end(self, trainer, module):
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 7
            self.steps.append(trainer.fit_loop.total_batch_idx)

    whole = result_of(start(tmp_path / "whole", **settings))
    torch.manual_seed(0)
    spy = StopInValidation()
    run, _ = fit_run(tmp_path / "run", spy, epochs=4, eval_batch_size=100, **settings)
    assert 8 not in spy.steps
    assert len(MetricsTable(run.metrics_csv).read()) == 1
    resume(run, **settings)
    assert differences(result_of(run), whole) == []


def test_a_stop_that_min_epochs_holds_back_ends_the_resumed_run_where_it_would_have(tmp_path):
    limit = {"min_epochs": 3}
    torch.manual_seed(0)
    whole, _ = fit_run(tmp_path / "whole", StopAt(12), epochs=4, eval_batch_size=100, trainer=limit)
    torch.manual_seed(0)
    stops = StopAt(12), Signal("on_train_batch_start", 20)
    with pytest.raises(Stopped):
        fit_run(tmp_path / "run", *stops, epochs=4, eval_batch_size=100, trainer=limit)
    run = RunFolder(tmp_path / "run")
    resume(run, trainer=limit)
    assert len(MetricsTable(run.metrics_csv).read()) == 3
    assert differences(result_of(run), result_of(whole)) == []


@pytest.mark.parametrize("monitor", ["val/acc", "train/loss"])
@pytest.mark.parametrize("max_steps", [5, 14])
def test_early_stopping_of_the_user_counts_no_epoch_that_is_cut(tmp_path, monitor, max_steps):
    limits = {"max_steps": max_steps}
    run, _ = fit_run(tmp_path / "run", stopping := EarlyStopping(monitor, patience=9), trainer=limits)
    assert read_json(run.environment)["ended"]["step"] == max_steps
    assert run.last_checkpoint.exists()
    assert math.isfinite(stopping.best_score) == (max_steps > 9)
    assert stopping.wait_count == 0  # of two epochs the second would be worse, or the first one again


def test_early_stopping_of_the_user_counts_validations_inside_an_epoch(tmp_path):
    stopping = EarlyStopping("val/acc", min_delta=1, patience=9)
    fit_run(tmp_path / "run", stopping, trainer={"val_check_interval": 3, "max_steps": 14})
    assert stopping.wait_count == 3


def test_a_threshold_of_the_users_early_stopping_is_the_end_of_the_run_until_a_setting_changes(tmp_path):
    run, _ = fit_run(tmp_path / "run", EarlyStopping("val/acc", mode="max", stopping_threshold=-1.0), epochs=4)
    assert read_json(run.environment)["ended"] == {"by": "early_stopping", "epochs": 1, "step": 9, "planned_steps": 36}
    point = stop_point(run)
    assert point.is_end(4, -1, {})
    assert not point.is_end(4, -1, {"trainer.callbacks": (None, None)})
    without = EarlyStopping("val/acc", mode="max")
    fit_run(run.path, without, epochs=3, ckpt_path=run.last_checkpoint, trainer={"max_steps": 20})
    assert read_json(run.environment)["ended"]["by"] == "max_steps"
    assert not has_stopped(without.state_dict())


def test_the_users_early_stopping_counts_again_in_a_run_that_is_resumed_after_its_stop(tmp_path):
    run, _ = fit_run(tmp_path / "run", EarlyStopping("val/acc", min_delta=1, patience=2), epochs=9)
    again = EarlyStopping("val/acc", min_delta=1, patience=2)
    fit_run(run.path, again, epochs=12, ckpt_path=run.last_checkpoint)
    assert read_json(run.environment)["ended"]["epochs"] == 5, "2 more without improvement"


def test_a_changed_patience_of_the_users_early_stopping_is_in_force_when_resumed(tmp_path):
    run, _ = fit_run(tmp_path / "run", EarlyStopping("val/acc", min_delta=1, patience=2), epochs=9)
    assert read_json(run.environment)["ended"]["epochs"] == 3
    longer = EarlyStopping("val/acc", min_delta=1, patience=4)
    fit_run(tmp_path / "run", longer, epochs=9, ckpt_path=run.last_checkpoint)
    assert longer.wait_count == 4
    assert read_json(run.environment)["ended"]["epochs"] == 5
