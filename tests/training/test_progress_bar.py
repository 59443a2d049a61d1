"""What a terminal shows of a run."""

import io
import math
import sys
from datetime import timedelta
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training import progress_bar as progress
from cifar_lightning.training.early_stopping import AnnealingEarlyStopping
from cifar_lightning.training.progress_bar import RunProgress
from cifar_lightning.training.signals import Stopped


def fit_with(tmp_path, bar, *more, max_epochs=2, max_steps=-1, accumulate=1, kind=ImageClassifier, **kwargs):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[bar, *more],
        limit_val_batches=0 if kwargs.get("val_fraction") == 0 else None,
    )
    module = kind(image_size=16, model_kwargs={"widths": [2, 2, 2]})
    data = ImageDataModule("synthetic", batch_size=900, image_size=16, **kwargs)
    trainer.fit(module, data)
    if more:
        trainer.test(module, data, verbose=False)
    return trainer


def bar_on(file, **kwargs):
    bar = RunProgress()
    bar.console = Console(file=file, highlight=False, width=100, **kwargs)
    return bar


@pytest.mark.parametrize(
    ("hook", "step", "where"),
    [
        ("on_train_batch_start", 3, "in epoch 1 at step 3"),
        ("on_train_epoch_end", 5, "after epoch 1 at step 5"),
        ("on_test_batch_start", 10, "after epoch 2 at step 10"),
    ],
)
def test_where_a_signal_stopped_it_counts_epochs_as_a_person_does(tmp_path, hook, step, where):
    class Stops(pl.Callback):
        """Comes after the bar, as last.ckpt does."""

    def stop(trainer, *args):
        if trainer.global_step == step:
            raise Stopped(2)

    out, stops = io.StringIO(), Stops()
    setattr(stops, hook, stop)
    bar = bar_on(out)
    bar.run = RunFolder(tmp_path / "run")
    with pytest.raises(Stopped):
        fit_with(tmp_path, bar, stops)
    assert out.getvalue().splitlines()[-1] == f"stopped {where}: no checkpoint was saved yet"


def test_before_the_first_epoch_no_epoch_is_named(tmp_path):
    out = io.StringIO()
    bar = bar_on(out)
    bar.run = RunFolder(tmp_path / "run")
    bar.run.checkpoints.mkdir(parents=True)
    bar.run.last_checkpoint.touch()
    bar.on_exception(SimpleNamespace(global_step=0, current_epoch=0), None, Stopped(2))
    message = f"cifar-lightning fit --resume {bar.run.path} resumes from the last checkpoint"
    assert out.getvalue() == f"stopped: {message}\n"


def test_batches_of_several_loaders_are_added():
    bar, opened = bar_on(io.StringIO()), []
    bar._open_bar = lambda label, total: opened.append((label, total))
    bar.on_validation_start(SimpleNamespace(num_val_batches=[3, 4]), None)
    bar.on_test_start(SimpleNamespace(num_test_batches=[5]), None)
    assert opened == [("validation", 7), ("test", 5)]


def test_without_a_terminal_there_is_what_it_trains_on_and_a_line_an_epoch(tmp_path):
    out = io.StringIO()
    fit_with(tmp_path, bar_on(out))
    lines = out.getvalue().splitlines()
    assert "not a real data set" in lines[0]
    assert "4,500 training, 500 validation, 1,000 test" in lines[1]
    assert [line.split("  ")[0] for line in lines[-2:]] == ["epoch 1/2", "epoch 2/2"]
    assert all("val loss" in line and "train loss" in line for line in lines[-2:])
    assert "\x1b" not in out.getvalue()


class LogsOnlyAccuracy(ImageClassifier):
    def on_validation_epoch_end(self):
        self.log("val/acc", 0.25)


def test_a_validation_that_logs_its_accuracy_alone_has_no_loss_in_its_line(tmp_path):
    out = io.StringIO()
    fit_with(tmp_path, bar_on(out), max_epochs=1, kind=LogsOnlyAccuracy)
    assert "  val acc 25.00 %  " in out.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_with_loss_accuracy_speed_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_REFRESH_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    fit_with(tmp_path, bar_on(out, force_terminal=True))
    for part in ("images/s", "left", "loss", "acc", "100%", "validation"):
        assert part in out.getvalue()


def test_a_run_without_validation_says_so(tmp_path):
    out = io.StringIO()
    fit_with(tmp_path, bar_on(out), val_fraction=0.0)
    assert "no validation: " in out.getvalue()
    assert "val loss" not in out.getvalue()


def test_other_ranks_are_silent(tmp_path):
    out = io.StringIO()
    bar = bar_on(out)
    bar.disable()
    fit_with(tmp_path, bar)
    assert out.getvalue() == ""


def test_the_time_left_counts_this_process_batches_and_the_epochs_to_come(monkeypatch):
    bar = RunProgress()
    bar._trainer = SimpleNamespace(num_training_batches=100, max_epochs=3, current_epoch=1, max_steps=-1, callbacks=[])
    bar._batches_done = 10  # resumed at 40 of 100, now at 50: 10 batches in 20 seconds
    assert bar._seconds_left(bar._trainer, 50, 20.0) == pytest.approx(2 * 50 + 2 * 100)
    bar._epochs_timed = [90.0]
    assert bar._seconds_left(bar._trainer, 50, 20.0) == pytest.approx(2 * 50 + 90)


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "seconds"),
    [(50, 45, 2 * 30), (50, 140, 2 * 100 + 160 * 0.8), (-1, 140, 2 * 100 + 160 * 0.8), (3, 1000, 2 * 100 + 160)],
    ids=["in this epoch", "in the next", "without epochs", "after the epochs"],
)
def test_the_time_left_ends_with_max_steps(max_epochs, max_steps, seconds):
    bar = RunProgress()
    counts = {"num_training_batches": 150, "current_epoch": 1, "global_step": 30, "accumulate_grad_batches": 2}
    bar._trainer = SimpleNamespace(**counts, max_epochs=max_epochs, max_steps=max_steps, callbacks=[])
    bar._batches_done, bar._epochs_timed = 50, [160.0]
    assert bar._seconds_left(bar._trainer, 50, 100.0) == pytest.approx(seconds)


def test_the_time_left_of_a_loader_without_a_length_ends_with_max_steps():
    bar, counts = RunProgress(), {"num_training_batches": math.inf, "current_epoch": 0, "global_step": 30}
    bar._trainer = SimpleNamespace(**counts, accumulate_grad_batches=1, max_epochs=-1, max_steps=45, callbacks=[])
    bar._batches_done = 30
    assert bar._seconds_left(bar._trainer, 30, 60.0) == pytest.approx(2 * 15)


@pytest.mark.parametrize(
    ("max_epochs", "limit_s", "seconds"), [(3, 100, 100), (3, 900, 260), (-1, 900, 900), (3, 0, 0)]
)
def test_the_time_left_ends_with_max_time(max_epochs, limit_s, seconds, monkeypatch):
    bar, timer = RunProgress(), Timer(timedelta(seconds=limit_s))
    counts = {"num_training_batches": 150, "current_epoch": 1, "global_step": 30, "accumulate_grad_batches": 1}
    callbacks = [Timer(None), timer, bar]
    bar._trainer = SimpleNamespace(**counts, max_epochs=max_epochs, max_steps=-1, callbacks=callbacks)
    bar._batches_done, bar._epochs_timed = 50, [60.0]
    assert bar._seconds_left(bar._trainer, 50, 100.0) == pytest.approx(seconds)


@pytest.mark.parametrize(("batches_before", "num_timed"), [(0, 2), (1, 1)])
def test_the_rest_of_a_resumed_epoch_does_not_count_as_an_epochs_time(batches_before, num_timed, tmp_path):
    class Resumed(RunProgress):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.first = True

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if self.first:
                self.first, self._batches_done = False, -batches_before

    bar = Resumed()
    bar.console = Console(file=io.StringIO())
    fit_with(tmp_path, bar)
    assert len(bar._epochs_timed) == num_timed


def test_a_run_that_steps_alone_end_has_no_number_of_epochs(tmp_path):
    file = io.StringIO()
    fit_with(tmp_path, bar_on(file), max_epochs=-1, max_steps=7)
    printed = file.getvalue()
    assert "training  7 steps of 900 images" in printed
    assert "epoch 1  train loss" in printed
    assert "epoch 2  train loss" in printed
    assert "-1" not in printed


def test_a_run_that_is_stopped_early_says_so(tmp_path):
    out = io.StringIO()
    # No gain is enough: of 6 epochs, the peak in the second, the patience of 2 is used up by the fourth.
    fit_with(tmp_path, bar_on(out), AnnealingEarlyStopping(patience=0, min_delta=0.9), max_epochs=6)
    lines = out.getvalue().splitlines()
    for words in ("stopped early", "val/acc", "2 validations", "--early_stopping.patience"):
        assert words in lines[-1]
    assert lines[-2].startswith("epoch 4/6")
    at_its_end = AnnealingEarlyStopping(patience=0, min_delta=0.9)
    fit_with(tmp_path, bar_on(out := io.StringIO()), at_its_end, max_epochs=4)
    assert at_its_end.wait_count == at_its_end.patience
    assert "stopped early" not in out.getvalue()


def test_a_step_is_described_with_the_images_of_all_its_batches(tmp_path):
    out = io.StringIO()
    fit_with(tmp_path, bar_on(out), max_epochs=1, accumulate=2)
    assert "1 epoch, 3 steps of 1,800 images" in out.getvalue()


def test_too_few_epochs_for_the_image_sizes_are_reported(tmp_path):
    for sizes, is_reported in (([8, 12, 12, 16], True), ([12, 16], False)):
        file = io.StringIO()
        fit_with(tmp_path, bar_on(file), train_sizes=sizes)  # two epochs
        assert ("trains at 12 pixels, tests run at 16" in " ".join(file.getvalue().split())) is is_reported


def test_a_notebook_shows_all_bars_in_one_place_without_widgets(monkeypatch):
    shown, places = [], []

    def display(data, *, raw, display_id):
        places.append(data)
        return SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    bar = RunProgress()
    bar._is_notebook = True
    for epoch in (1, 2):
        bar._open_bar(f"epoch {epoch}/2", 4)
        bar._bar.update(bar._bar.task_ids[0], completed=2, text="loss 0.5", refresh=True)
        assert shown[-1].startswith(f"epoch {epoch}/2")
        assert shown[-1].endswith("50%  loss 0.5")
        bar._close_bar()
        assert shown[-1] == ""
    assert len(places) == 1
