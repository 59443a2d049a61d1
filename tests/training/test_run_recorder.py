"""What a run leaves behind, and early stopping that lets OneCycle finish."""

import contextlib
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from fitting import Signal, fit_run, quiet_trainer
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from cifar_lightning import ImageClassifier, ImageDataModule, UserError
from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.checkpoints.resume import has_stopped, stop_point
from cifar_lightning.cli.fit import Resume
from cifar_lightning.runs.contents import read_json
from cifar_lightning.runs.environment import portable
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.training.best_checkpoint import BestCheckpoint
from cifar_lightning.training.early_stopping import AnnealingEarlyStopping
from cifar_lightning.training.last_checkpoint import CheckpointSchedule, LastCheckpoint
from cifar_lightning.training.model_checks import check_monitors
from cifar_lightning.training.run_recorder import RunRecorder, peak_memory_mb
from cifar_lightning.training.signals import Stopped, StopSignals

NARROW = {"widths": [2, 2, 2]}


def fit(tmp_path, callbacks, epochs=2, module=None, **data):
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        limit_val_batches=0 if data.get("val_fraction") == 0 else None,
        callbacks=callbacks,
        plugins=[DurableCheckpointIO()],
    )
    module = module or ImageClassifier(image_size=16, model_kwargs=NARROW)
    run.fit(module, ImageDataModule("synthetic", image_size=16, **{"batch_size": 90, "limit": 500, **data}))
    return run


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


class Scripted(ImageClassifier):
    """Reports a chosen validation accuracy an epoch."""

    script: tuple[float, ...] = ()
    losses: tuple[float, ...] = (1.0,) * 12

    def on_validation_epoch_end(self):
        self.val_metrics.reset()
        self.log("val/acc", self.script[self.current_epoch])
        self.log("val/loss", self.losses[self.current_epoch])


def last(folder):
    return LastCheckpoint(folder, CheckpointSchedule(), StopSignals())


def scripted(*accuracies):
    module = Scripted(image_size=16, model_kwargs=NARROW, pct_start=0.3)
    module.script = accuracies
    return module


def test_early_stopping_waits_for_the_peak_and_then_a_third_of_the_epochs(tmp_path):
    # Peak after 3.6 of 12 epochs: the falls before it do not count, then 4 epochs without improvement stop the run.
    module = scripted(0.9, 0.8, 0.7, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4)
    run = fit(tmp_path, [AnnealingEarlyStopping(patience=1)], epochs=12, module=module)
    assert run.current_epoch == 8  # first counted after epoch 4 (index 3), patience 4


class ScriptedByStep(Scripted):
    """Reports a chosen validation accuracy a step."""

    def on_validation_epoch_end(self):
        self.val_metrics.reset()
        self.log_dict({"val/acc": self.script[self.global_step - 1], "val/loss": 1.0})


def test_a_validation_after_each_batch_is_counted_and_the_best_of_all_is_kept(tmp_path):
    module, stopper = ScriptedByStep(image_size=16, model_kwargs=NARROW), AnnealingEarlyStopping(patience=1)
    module.script = (0.5, 0.6, 0.9, *[0.4] * 15)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)
    with warnings.catch_warnings(action="ignore"):  # Lightning's, that the method is replaced
        run, trainer = fit_run(tmp_path, stopper, epochs=2, module=module, trainer={"val_check_interval": 1})
    assert (stopper.patience, stopper.wait_count, trainer.global_step) == (6, 6, 9)
    assert read_checkpoint(run.best_checkpoint)["global_step"] == 3


def test_early_stopping_lets_a_run_that_improves_in_the_annealing_finish(tmp_path):
    module = scripted(0.9, 0.8, 0.7, 0.5, 0.5, 0.5, 0.5, 0.6, 0.5, 0.5, 0.5, 0.95)
    run = fit(tmp_path, [AnnealingEarlyStopping(patience=1)], epochs=12, module=module)
    assert run.current_epoch == 12


@pytest.mark.parametrize(
    ("settings", "patience"),
    [
        ({"val_check_interval": 0.5}, 6),
        ({"val_check_interval": 3}, 9),  # of 9 batches an epoch
        ({"val_check_interval": 3, "accumulate_grad_batches": 3}, 9),
        ({"val_check_interval": 18, "check_val_every_n_epoch": None}, 2),
        ({"check_val_every_n_epoch": 2}, 2),
        ({"max_epochs": -1, "max_steps": 81}, 3),
    ],
)
def test_the_patience_is_a_third_of_the_epochs_however_often_they_are_validated(tmp_path, settings, patience):
    module, stopper = ImageClassifier(image_size=16, model_kwargs=NARROW), AnnealingEarlyStopping(patience=0)
    limits = {"accelerator": "cpu", "max_epochs": 9, "logger": False, "enable_checkpointing": False, **settings}
    trainer = pl.Trainer(**limits, enable_progress_bar=False, enable_model_summary=False, callbacks=[stopper, StopAt()])
    trainer.fit(module, ImageDataModule("synthetic", image_size=16, batch_size=20, limit=200))
    assert stopper.patience == patience


class Unsized:
    """A loader that has no length."""

    def __iter__(self):
        while True:
            yield torch.zeros(20, 3, 16, 16), torch.zeros(20, dtype=torch.int64)


@pytest.mark.parametrize(("settings", "patience"), [({"val_check_interval": 3}, 9), ({}, 1)])
def test_the_patience_of_a_loader_without_a_length_is_a_third_of_the_validations(tmp_path, settings, patience):
    module, stopper = ImageClassifier(image_size=16, model_kwargs=NARROW), AnnealingEarlyStopping(patience=0)
    trainer = quiet_trainer(tmp_path, max_steps=81, limit_val_batches=1, callbacks=[stopper, StopAt()], **settings)
    trainer.fit(module, Unsized(), Unsized())
    assert stopper.patience == patience


class StopAt(pl.Callback):
    """Ends training after the first step."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # that of the run that goes on
def test_a_resumed_run_that_min_epochs_keeps_from_its_early_stop_ends_there(tmp_path):
    falling = [0.9 - 0.05 * epoch for epoch in range(12)]
    settings = {"epochs": 9, "trainer": {"min_epochs": 8}}
    ends = []
    for name in ("whole", "stopped"):
        signals = [Signal("on_train_batch_start", 57)] if name == "stopped" else []  # in the epoch after the stop
        stopper = AnnealingEarlyStopping(patience=1)  # the peak is in epoch 2, a third of 9 epochs later it stops
        with pytest.raises(Stopped) if signals else contextlib.nullcontext():
            fit_run(tmp_path / name, stopper, *signals, module=scripted(*falling), **settings)
        run = RunFolder(tmp_path / name)
        if signals:
            point = stop_point(run)
            assert (point.epochs_done, point.stopped_early) == (6, True)
            limits = {"max_epochs": 9, "max_steps": -1, "min_epochs": 8, "min_steps": None}
            assert not Resume(run, point, {}).is_fully_trained(Namespace(**limits))
            assert Resume(run, point, {}).is_fully_trained(Namespace(**limits | {"min_epochs": 6}))
            MetricsTable(run.metrics_csv).cut_after(5)
            again = AnnealingEarlyStopping(patience=1)
            fit_run(run.path, again, module=scripted(*falling), ckpt_path=run.last_checkpoint, **settings)
        ends.append((len(MetricsTable(run.metrics_csv).read()), read_json(run.environment)["ended"]["by"]))
    assert ends == [(8, "early_stopping"), (8, "early_stopping")]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # that of the run that goes on
def test_a_run_that_is_resumed_while_it_waits_stops_where_it_would_have(tmp_path):
    falling = [0.9 - 0.05 * epoch for epoch in range(12)]
    ends = []
    for name in ("whole", "stopped"):
        signals = [Signal("on_train_batch_start", 47)] if name == "stopped" else []  # 5 epochs, 2 of them waited for
        with pytest.raises(Stopped) if signals else contextlib.nullcontext():
            fit_run(tmp_path / name, AnnealingEarlyStopping(patience=1), *signals, module=scripted(*falling), epochs=9)
        run = RunFolder(tmp_path / name)
        if signals:
            again = AnnealingEarlyStopping(patience=1)
            fit_run(run.path, again, module=scripted(*falling), ckpt_path=run.last_checkpoint, epochs=9)
        ends.append({row["epoch"] for row in MetricsTable(run.metrics_csv).read()})
    assert ends[0] == ends[1] == set(range(6))


def test_early_stopping_follows_another_metric_in_its_own_direction(tmp_path):
    module = scripted(*[0.1 * epoch for epoch in range(9)])  # accuracy rises, loss too
    module.losses = (1.0, 0.5, 0.4, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0)
    run = fit(tmp_path, [AnnealingEarlyStopping(patience=1, monitor="val/loss")], epochs=9, module=module)
    assert run.current_epoch == 7  # the lowest loss is epoch 3's, patience 3


def test_early_stopping_waits_for_no_peak_of_an_optimizer_of_ones_own(tmp_path):
    module = scripted(0.9, 0.8, 0.7, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)
    with warnings.catch_warnings(action="ignore"):  # Lightning's, that the method is replaced
        run = fit(tmp_path, [AnnealingEarlyStopping(patience=1)], epochs=12, module=module)
    assert run.current_epoch == 5  # epoch 0 is the best, patience 4


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [("val/acc", None, "max"), ("val/ece", None, "min"), ("val/kappa", None, "max"), ("val/kappa", "min", "min")],
)
def test_the_direction_of_a_metric_is_known_or_given(monitor, mode, expected):
    assert AnnealingEarlyStopping(monitor=monitor, mode=mode).mode == expected


def test_a_direction_that_contradicts_the_metric_is_refused():
    with pytest.raises(UserError, match=r"--early_stopping\.mode max: val/loss"):
        AnnealingEarlyStopping(monitor="val/loss", mode="max")


def test_early_stopping_by_a_metric_that_is_not_logged_is_refused(tmp_path):
    check_monitors([], validates=True, early_stopping="val/f1")
    for monitor in ("train/loss", "val_acc", "val/accuracy"):
        with pytest.raises(UserError, match=rf"--early_stopping.*{monitor}.*val/loss"):
            check_monitors([], validates=True, early_stopping=monitor)
    stopper = AnnealingEarlyStopping(monitor="val/mine")  # a module of one's own might have logged it
    with pytest.raises(UserError, match=r"--early_stopping\.monitor val/mine.*val/acc"):
        fit(tmp_path, [stopper], epochs=1, module=scripted(0.5))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # that of the run that goes on
def test_a_run_that_was_stopped_early_and_goes_on_is_given_all_of_its_patience_again(tmp_path):
    run, stopped = fit_run(tmp_path, AnnealingEarlyStopping(patience=1), epochs=4, module=scripted(0.5, 0.5, 0.4, 0.4))
    assert stopped.current_epoch == 4
    state = stopped.early_stopping_callback.state_dict()
    assert state["stopped_epoch"] == 3
    module = scripted(0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4)
    again = AnnealingEarlyStopping(patience=1)
    _, trainer = fit_run(tmp_path, again, epochs=8, module=module, ckpt_path=run.last_checkpoint)
    # A third of 8 epochs is 3: neither stopped in the first new epoch, nor let through to the end.
    assert (trainer.current_epoch, again.wait_count) == (7, 3)


@pytest.mark.parametrize(
    ("wait_count", "patience", "stopped"), [(0, 0, False), (1, 0, True), (2, 3, False), (3, 3, True), (4, 3, True)]
)
def test_whether_a_run_was_stopped_early_does_not_depend_on_the_epoch(wait_count, patience, stopped):
    assert has_stopped({"wait_count": wait_count, "patience": patience, "stopped_epoch": 0}) is stopped


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # that of the run that goes on
def test_of_equal_accuracies_the_lowest_loss_is_the_best_also_over_a_resume(tmp_path):
    def best_epoch(module, **more):
        run, _ = fit_run(tmp_path, module=module, **more)
        return torch.load(run.best_checkpoint, weights_only=True)["epoch"], run

    module = scripted(0.5, 0.5, 0.5)
    module.losses = (1.0, 0.8, 0.9)
    epoch, run = best_epoch(module, epochs=3)
    assert epoch == 1
    longer = scripted(0.5, 0.5, 0.5, 0.5, 0.4, 0.5)
    longer.losses = (1.0, 0.8, 0.9, 0.85, 0.1, 0.8)  # none below epoch 1's that is as accurate
    assert best_epoch(longer, epochs=6, ckpt_path=run.last_checkpoint)[0] == 1


def test_the_best_epoch_is_that_of_the_accuracy_where_no_loss_is_logged(tmp_path):
    module = scripted(0.2, 0.6, 0.6)
    module.on_validation_epoch_end = lambda: module.log("val/acc", module.script[module.current_epoch])
    run, _ = fit_run(tmp_path, module=module, epochs=3)
    assert torch.load(run.best_checkpoint, weights_only=True)["epoch"] == 1


def test_the_checkpoint_that_a_run_begins_from_is_recorded_without_its_folder(tmp_path):
    begun, _ = fit_run(tmp_path / "begun", epochs=1)
    run, _ = fit_run(tmp_path / "run", epochs=2, ckpt_path=begun.last_checkpoint)
    recorded = [read_json(each.environment).get("ckpt_path") for each in (begun, run)]
    assert recorded == [None, portable(str(begun.last_checkpoint))]


def test_a_run_whose_steps_end_before_the_first_validation_is_not_stopped_by_an_error(tmp_path):
    module = ImageClassifier(image_size=16, model_kwargs=NARROW)
    _, run_trainer = fit_run(
        tmp_path, AnnealingEarlyStopping(), module=module, without=[BestCheckpoint], trainer={"max_steps": 3}
    )
    assert run_trainer.global_step == 3


def test_the_best_epoch_and_the_last_one_are_kept(tmp_path, folder):
    fit(tmp_path, [BestCheckpoint(folder), last(folder)], epochs=4, module=scripted(0.2, 0.6, 0.5, 0.4))
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert torch.load(folder.previous_checkpoint, weights_only=True)["epoch"] == 2
    assert torch.load(folder.best_checkpoint, weights_only=True)["epoch"] == 1
    assert torch.load(folder.last_checkpoint, weights_only=True)["epoch"] == 3


def test_the_last_checkpoint_carries_the_best_score_of_its_own_epoch(tmp_path, folder):
    fit(tmp_path, [BestCheckpoint(folder), last(folder)], module=scripted(0.2, 0.6))
    states = torch.load(folder.last_checkpoint, weights_only=True)["callbacks"]
    best = next(state for key, state in states.items() if "val/acc" in key)
    assert float(best["best_model_score"]) == pytest.approx(0.6)


class OwnStart(ImageClassifier):
    """Has a start of the epoch of its own."""

    def on_train_epoch_start(self):
        pass


def test_epochs_are_counted_and_layers_unfrozen_where_a_subclass_has_a_start_of_its_own(tmp_path):
    settings = {"image_size": 16, "model_kwargs": NARROW, "freeze": "backbone", "unfreeze_epoch": 1}
    tables = []
    for kind in (ImageClassifier, OwnStart):
        torch.manual_seed(0)
        run, trainer = fit_run(tmp_path / kind.__name__, module=kind(**settings), val_fraction=0.0)
        assert trainer.lightning_module.totals.num_images == 200
        tables.append(run.metrics_csv.read_text())
    assert tables[0] == tables[1]


def test_without_validation_only_the_last_checkpoint_is_kept(tmp_path, folder):
    fit(tmp_path, [last(folder)], val_fraction=0.0)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_the_recorder_writes_what_was_logged(tmp_path, folder):
    run = fit(tmp_path, [RunRecorder(folder)], epochs=3)
    rows = MetricsTable(folder.metrics_csv).read()
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["step"] for row in rows] == [5, 10, 15]
    for name in ("train/loss", "train/acc", "val/loss", "val/acc", "val/f1", "val/ece", "lr"):
        assert rows[-1][name] == pytest.approx(float(run.callback_metrics[name]), rel=1e-6), name
    assert all(
        row["train_images_per_s"] > 0 and row["peak_memory_mb"] > 10 for row in MetricsTable(folder.timing_csv).read()
    )
    environment = json.loads(folder.environment.read_text())
    assert (environment["device"], environment["precision"], environment["num_devices"]) == ("cpu", "32-true", 1)
    assert json.loads(folder.split.read_text())["sizes"] == {"train": 450, "val": 50, "test": 1000}


def test_a_training_step_that_counts_nothing_has_rows_with_the_validation_and_is_remarked(tmp_path, folder, capsys):
    class Own(ImageClassifier):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    run = fit(tmp_path, [RunRecorder(folder)], module=Own(image_size=16, model_kwargs=NARROW))
    rows = MetricsTable(folder.metrics_csv).read()
    assert [row["step"] for row in rows] == [5, 10]
    assert rows[-1]["val/loss"] == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-6)
    assert math.isnan(rows[-1].get("train/loss", math.nan))
    assert len(MetricsTable(folder.timing_csv).read()) == 2
    assert capsys.readouterr().out.count("self.totals.add") == 1


def test_a_changed_config_is_written_once_all_processes_have_begun(tmp_path, folder):
    class Begin(pl.Callback):
        def setup(self, trainer, module, stage):
            self.config = folder.config.read_text()

    folder.config.write_text("before")
    begin = Begin()
    fit(tmp_path, [RunRecorder(folder, config="after"), begin], epochs=1, val_fraction=0.0)
    assert (begin.config, folder.config.read_text()) == ("before", "after")


def test_the_recorder_leaves_validation_out_where_nothing_is_held_out(tmp_path, folder):
    fit(tmp_path, [RunRecorder(folder)], val_fraction=0.0)
    assert "val/acc" not in MetricsTable(folder.metrics_csv).read()[0]


def test_peak_memory_is_this_process_in_megabytes():
    assert 50 < peak_memory_mb(torch.device("cpu")) < 50_000


def test_who_waits_for_a_validation_that_never_comes_is_refused():
    watching = [AnnealingEarlyStopping()]
    check_monitors(watching, validates=True)
    check_monitors([RunRecorder(RunFolder(Path("run")))], validates=False)
    with pytest.raises(UserError, match=r"AnnealingEarlyStopping: monitors val/acc.*\n.*--data.val_fraction"):
        check_monitors(watching, validates=False)


@pytest.mark.parametrize(
    ("callback", "validates", "words"),
    [
        (EarlyStopping("val_acc"), True, ["EarlyStopping", "val_acc", "Did you mean val/acc?"]),
        (EarlyStopping("nope"), True, ["nope", "train/loss", "val/ece"]),
        (ModelCheckpoint(monitor="test/acc"), True, ["ModelCheckpoint", "test/acc"]),
        (ModelCheckpoint(monitor="loss"), False, ["loss", "train/loss"]),
    ],
)
def test_a_monitor_that_is_never_logged_is_refused_unless_a_callback_of_the_user_may_log_it(callback, validates, words):
    with pytest.raises(UserError) as refused:
        check_monitors([ModelCheckpoint(), EarlyStopping("train/loss"), callback], validates=validates)
    assert [word for word in words if word not in str(refused.value)] == []
    check_monitors([callback, type("Logs", (pl.Callback,), {"__module__": "mine"})()], validates=validates)


def test_a_resumed_run_whose_callbacks_are_not_given_again_says_so(tmp_path, folder, capsys):
    class Own(pl.Callback):
        pass

    fit(tmp_path, [RunRecorder(folder), Own()], epochs=1)
    for callbacks in ([Own()], []):
        capsys.readouterr()
        fit(tmp_path, [RunRecorder(folder, resumed={"epoch": 1}), *callbacks], epochs=1)
        assert ("Own" in capsys.readouterr().out) == (callbacks == [])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_of_training_stops_once_the_device_has_finished_its_steps(device, folder, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), callback_metrics={})
    recorder = RunRecorder(folder)
    for hook in (recorder.on_validation_start, recorder.on_validation_end):
        hook(trainer, ImageClassifier(image_size=16, model_kwargs=NARROW))
    assert waits == ([torch.device("cuda")] * 2 if device == "cuda" else [])
