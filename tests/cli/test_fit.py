"""The real program, in new processes, as a user types it."""

import contextlib
import csv
import json
import shutil
import signal
import sys
import tracemalloc
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from fitting import quiet_trainer, small_data
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from PIL import Image
from program import REPO, TINY, fail, start

from cifar_lightning import ImageClassifier, UserError, load
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.cli.fit import (
    _PREDICTION_BYTES,
    AddedCallbacks,
    Resume,
    create_or_resume_run,
    keep_in_run,
    load_initial_weights,
    refuse_used,
    remark_on_few,
    remark_on_memory,
    remark_on_restored,
)
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.cli.main import run_command, training_arguments
from cifar_lightning.data import memory
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.report.findings import find
from cifar_lightning.report.results import Predictions, Results
from cifar_lightning.runs.contents import read_test_metrics
from cifar_lightning.runs.folder import RunFolder, open_run

FILES_OF_A_RUN = [
    "config.yaml",
    "split.json",
    "environment.json",
    "metrics.csv",
    "timing.csv",
    "learning_rates.json",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "checkpoints/previous.ckpt",
    "test_metrics.json",
    "confusion_matrix.pt",
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "label_issues.csv",
    "predictions.csv",
    "mistakes.csv",
    "predictions.npz",
    "predictions_val.npz",
    "gallery.npz",
    "explanations.npz",
    "report.html",
    "findings.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of two epochs, made by the program: (folder, what `fit` printed)."""
    cwd = tmp_path_factory.mktemp("work")
    done = start("fit", *TINY, "--epochs", 2, "--lr", 0.01, cwd=cwd)
    return cwd / "runs" / "smallnet" / "1", done


def test_fit_leaves_every_file_of_a_run(finished):
    run, _ = finished
    assert [name for name in FILES_OF_A_RUN if not (run / name).is_file()] == []
    assert list(run.glob("events.out.tfevents.*"))
    known = {*FILES_OF_A_RUN, ".lock"}
    others = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} - known
    assert all(name.startswith("events.out") for name in others)


def test_fit_says_what_it_trains_on_and_shows_the_report_without_noise(finished):
    run, done = finished
    assert "not a real data set" in done.stdout
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert f"precision {config['trainer']['precision']}" in done.stdout
    assert "epoch 2/2" in done.stdout
    last = done.stdout[done.stdout.index("Test accuracy") :]
    for part in (
        "lowest recall",
        "predicted as",
        "always disk",
        (run / "report.html").as_uri(),
        "analyze runs/smallnet/1",
    ):
        assert part in last
    assert len(last.splitlines()) <= 30
    assert done.stderr == ""
    assert run.is_dir()


def test_the_files_of_a_run_agree_with_each_other(finished):
    run, _ = finished
    metrics = json.loads((run / "test_metrics.json").read_text())
    predictions = np.load(run / "predictions.npz")
    matrix = torch.load(run / "confusion_matrix.pt", weights_only=True)
    preds = predictions["logits"].argmax(1)
    assert len(predictions["targets"]) == metrics["num_images"] == matrix.sum() == 1000
    assert metrics["accuracy"] == (preds == predictions["targets"]).mean() == matrix.trace().item() / 1000
    assert matrix.dtype == torch.int64
    for target in range(10):
        assert matrix[target].tolist() == np.bincount(preds[predictions["targets"] == target], minlength=10).tolist()
    rows = list(csv.reader((run / "confusion_matrix.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in rows[1:]] == rows[0][1:] == predictions["class_names"].tolist()
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == matrix.tolist()
    named = list(csv.DictReader((run / "predictions.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["split"] for row in named] == ["test"] * 1000 + ["val"] * 100
    assert [row["path"] for row in named[:1000]] == predictions["names"].tolist()
    assert [row["prediction"] for row in named[:1000]] == predictions["class_names"][preds].tolist()
    validation = json.loads((run / "split.json").read_text())["val"]
    assert [row["path"] for row in named[1000:]] == [f"train[{index}]" for index in validation]
    num_mistakes = sum(row["prediction"] != row["label"] for row in named)
    assert len((run / "mistakes.csv").read_text(encoding="utf-8").splitlines()) == 1 + num_mistakes
    gallery = np.load(run / "gallery.npz")
    assert gallery["images"].dtype == np.uint8
    assert 0 < len(gallery["images"]) == len(set(gallery["indices"].tolist())) <= 500


def test_metrics_have_a_row_an_epoch_and_the_best_epoch_was_kept(finished):
    run, _ = finished
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr"} <= set(rows[0])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == max((float(row["val/acc"]), -float(row["val/loss"]), int(row["epoch"])) for row in rows)[2]
    predictions = np.load(run / "predictions_val.npz")
    accuracy = (predictions["logits"].argmax(1) == predictions["targets"]).mean()
    assert accuracy == pytest.approx(max(float(row["val/acc"]) for row in rows), abs=1e-6)


def test_the_split_of_a_run_is_saved_with_hashes(finished):
    run, _ = finished
    split = json.loads((run / "split.json").read_text())
    assert len(split["train"]) == 900
    assert len(split["val"]) == 100
    assert not set(split["train"]) & set(split["val"])
    assert set(split["sha256"]) == {"train", "test"}


def test_aliases_are_saved_under_their_long_names(finished):
    run, _ = finished
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["batch_size"] == 100
    assert config["model"]["lr"] == 0.01
    assert config["trainer"]["precision"] in ("32-true", "bf16-mixed")  # chosen by a measurement
    assert "run_dir" not in config
    assert str(run) not in (run / "config.yaml").read_text()


def test_tensorboard_has_scalars_classes_and_images(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = finished
    board = EventAccumulator(str(run)).Reload()
    scalars, images = board.Tags()["scalars"], board.Tags()["images"]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "train/lr"} <= set(scalars)
    assert not {"lr", "epoch"} & set(scalars)  # train/lr is the finer curve; the epoch says nothing
    predictions = np.load(run / "predictions_val.npz")
    of_disks = predictions["targets"] == 0
    best = int(np.argmax([event.value for event in board.Scalars("val/acc")]))
    shown = board.Scalars("val_acc_of_class/disk")[best].value
    assert shown == pytest.approx((predictions["logits"].argmax(1)[of_disks] == 0).mean())
    assert sum(tag.startswith("val_acc_of_class/") for tag in scalars) == 10
    assert {"visuals/batch_as_trained_on", "visuals/confusion_matrix"} <= set(images)


def test_test_of_a_run_repeats_its_figures_and_validate_its_validation(finished):
    run, done = finished
    before = (run / "test_metrics.json").read_bytes()
    (run / "test_metrics.json").unlink()
    tested = start("test", run, cwd=run.parent)
    report = done.stdout[done.stdout.index("Test accuracy") : done.stdout.index("Report  ")]
    assert report in tested.stdout
    assert (run / "test_metrics.json").read_bytes() == before
    (run / "predictions_val.npz").unlink()
    validated = start("validate", run, cwd=run.parent)
    predictions = np.load(run / "predictions_val.npz")
    accuracy = (predictions["logits"].argmax(1) == predictions["targets"]).mean()
    assert f"Validation accuracy {100 * accuracy:.2f} %" in validated.stdout


@pytest.mark.parametrize("limit", [0, 0.001])
def test_validate_without_a_batch_names_the_flag(finished, limit, monkeypatch, capsys, tmp_path):
    words = ["validate", finished[0], "--trainer.limit_val_batches", limit]
    message = fail(monkeypatch, capsys, tmp_path, *words)
    assert f"--trainer.limit_val_batches {limit}: leaves no" in message


def test_the_long_spelling_writes_the_same_config(finished):
    run, _ = finished
    spelled = ["--data.batch_size" if flag == "--batch_size" else flag for flag in TINY]
    text = (run / "config.yaml").read_text(encoding="utf-8")
    precision = yaml.safe_load(text)["trainer"]["precision"]  # another measurement may choose another
    spelled += ["--trainer.max_epochs", "2", "--model.lr=0.01", "--trainer.precision", precision]
    spelled_text = TrainingCLI("fit", training_arguments("fit", spelled)[0]).config_text
    assert spelled_text == text


def test_the_saved_config_repeats_the_run_digit_for_digit(finished):
    run, _ = finished
    again = ["--run_dir", "again", "--trainer.logger", "false"]
    start("fit", "--config", run / "config.yaml", *again, cwd=run.parent)
    assert (run.parent / "again" / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


def test_predict_writes_logits_and_probabilities_of_the_test_images(finished, tmp_path):
    run, _ = finished
    before = dict(np.load(run / "predictions.npz"))
    done = start("predict", run, "--output", tmp_path / "predictions.npz", cwd=run.parent)
    assert "1,000 test images" in done.stdout
    predictions = np.load(tmp_path / "predictions.npz")
    assert all(np.array_equal(predictions[name], before[name]) for name in before)
    np.testing.assert_allclose(predictions["probs"].sum(1), 1, atol=1e-5)
    assert predictions["probs"].argmax(1).tolist() == predictions["logits"].argmax(1).tolist()


def test_weights_of_another_run_start_a_new_one(finished, tmp_path):
    run, _ = finished
    still = ["--epochs", 1, "--lr", 1e-9, "--data.flip", "none", "--data.crop_padding_px", 0]
    still += ["--trainer.logger", "false"]
    done = start("fit", *TINY, *still, "--init_weights", run, cwd=tmp_path)
    folders = RunFolder(run), RunFolder(tmp_path / "runs" / "smallnet" / "1")
    before, after = (read_checkpoint(folder.best_checkpoint)["state_dict"] for folder in folders)
    weights = [name for name in before if name.endswith((".weight", ".bias"))]  # and not what BatchNorm counts
    assert [name for name in weights if not torch.allclose(before[name], after[name], atol=1e-6)] == []
    assert done.stderr == ""
    assert done.stdout.count("Initialized with the weights of") == 1


class Falling(ImageClassifier):
    """Is best in its first epoch."""

    def __init__(self):
        super().__init__(image_size=16, model_kwargs={"widths": [2, 2]}, lr=0.01)

    def on_validation_epoch_end(self):
        self.val_metrics.reset()
        self.log_dict({"val/acc": 0.9 - 0.1 * self.current_epoch, "val/loss": 1.0})


def test_a_run_is_tested_once_and_on_its_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_LIGHTNING_RUN_DIR", "")  # restored after the test, in which a run announces itself
    monkeypatch.chdir(tmp_path)
    tests, test = [], pl.Trainer.test
    monkeypatch.setattr(pl.Trainer, "test", lambda *args, **kwargs: tests.append(1) or test(*args, **kwargs))
    data = ["--data.dataset", "synthetic", "--data.image_size", "16", "--data.limit", "200", "--batch_size", "20"]
    flags = [*data, "--epochs", "3", "--run_dir", "run", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    flags += ["--trainer.precision", "32-true"]  # as it predicts below, also on a CPU that chooses bf16-mixed
    assert run_command(["fit", "--model", f"{__name__}.Falling", *flags]) == 0
    run = RunFolder(tmp_path / "run")
    last = read_checkpoint(run.last_checkpoint)
    assert len(tests) == 1
    assert (read_test_metrics(run.test_metrics)["epoch"], read_checkpoint(run.best_checkpoint)["epoch"]) == (1, 0)
    assert last["epoch"] == 2
    tested = np.load(run.predictions)
    images = small_data().source.load("test").images[tested["indices"]]
    best = load_trained_model(run)
    np.testing.assert_allclose(best.logits(torch.from_numpy(images)).numpy(), tested["logits"], atol=1e-4)
    best.model.load_state_dict({name.removeprefix("model."): weight for name, weight in last["state_dict"].items()})
    assert np.abs(best.logits(torch.from_numpy(images)).numpy() - tested["logits"]).max() > 0.1


# -- resume -----------------------------------------------------------------------------------------------------------


def rows_of(run):
    return (run / "metrics.csv").read_text().splitlines()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of four epochs, and the same killed in its third: (whole, killed)."""
    if sys.platform == "win32":
        pytest.skip("no SIGKILL")
    cwd = tmp_path_factory.mktemp("resume")
    settings = [*TINY, "--model.model_kwargs", "{widths: [4, 8, 8], dropout: 0.2}", "--lr", 0.01, "--epochs", 4]
    settings += ["--checkpoint.every_n_train_steps", 2, "--trainer.logger", "false"]
    start("fit", *settings, "--run_dir", "whole", cwd=cwd)
    sabotage = {"program": REPO / "benchmarks" / "faults" / "sabotage.py", "PYTHONPATH": str(REPO)}
    broken = ["SIGKILL@train:22", REPO / "train.py", "fit", *settings, "--run_dir", "killed"]
    assert start(*broken, cwd=cwd, check=False, **sabotage).returncode == -signal.SIGKILL
    return cwd / "whole", cwd / "killed"


def test_a_killed_run_resumes_to_the_same_end(killed):
    whole, run = killed
    done = start("fit", "--resume", run, cwd=run.parent)
    assert f"Resuming {run} " in done.stdout
    assert "instead of" not in done.stdout
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, run))
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer_states"], other["optimizer_states"], rtol=0, atol=0)
    assert [name for name in FILES_OF_A_RUN if not (run / name).is_file()] == []
    assert len(json.loads((run / "environment.json").read_text())["resumed"]) == 1


def test_a_resumed_finished_run_reports_what_differs_and_plans_the_schedule_again(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "moved")  # a folder copied elsewhere
    done = start("fit", "--resume", run, "--epochs", 4, "--lr", 0.02, cwd=tmp_path)
    for part in ("after epoch 2", "--trainer.max_epochs 4 instead of 2", "--model.lr 0.02 instead of 0.01", "OneCycle"):
        assert part in done.stdout
    assert rows_of(run)[:3] == rows_of(finished[0])
    rates = [float(row["lr"]) for row in csv.DictReader(rows_of(run))]
    total, at = 36, 27  # after the third epoch, the schedule of all four has come this far
    expected = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.zeros(1)], lr=0.02), max_lr=0.02, total_steps=total, cycle_momentum=False
    )
    rate_at = []
    for _ in range(total):
        rate_at.append(expected.get_last_lr()[0])
        expected.optimizer.step()
        expected.step()
    assert rates[2] == pytest.approx(rate_at[at])
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 4
    assert json.loads((run / "environment.json").read_text())["resumed"][0]["changed"]["model.lr"] == 0.02
    assert json.loads((run / "test_metrics.json").read_text()) != json.loads(
        (finished[0] / "test_metrics.json").read_text()
    )


def test_every_missing_or_damaged_result_of_a_finished_run_is_made(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("predictions_val.npz", "confusion_matrix.pt", "confusion_matrix.png", "mistakes.csv"):
        (run / name).unlink()
    (run / "gallery.npz").write_bytes((run / "gallery.npz").read_bytes()[:-100])
    start("fit", "--resume", run, cwd=tmp_path)
    assert [name for name in FILES_OF_A_RUN if not (run / name).is_file()] == []
    np.testing.assert_equal(dict(np.load(run / "gallery.npz")), dict(np.load(finished[0] / "gallery.npz")))


def test_of_a_finished_run_only_what_is_missing_is_made(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "test_metrics.json").unlink()
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    done = start("fit", "--resume", run, cwd=tmp_path)
    assert "nothing is left to train" in done.stdout
    assert "epoch 2/2" not in done.stdout
    assert (run / "test_metrics.json").read_bytes() == (finished[0] / "test_metrics.json").read_bytes()
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_run_is_not_resumed_on_other_images(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / "own" / part / name for part in ("train", "test") for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (16, 16), (40 * k, 0, 90 * ("b" in folder.name))).save(folder / f"{k}.png")
    flags = ["--data.dataset", "folder", "--data.root", "own", "--batch_size", 2, "--data.val_fraction", 0.25]
    start("fit", *flags, "--model.model_kwargs", "{widths: [2]}", "--epochs", 1, "--run_dir", "run", cwd=tmp_path)
    Image.new("RGB", (16, 16)).save(folders[0] / "new.png")
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--resume", "run", "--epochs", 2)
    assert "these are not the images or not the split" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.name", "resnet18"], ["--model.name resnet18", "smallnet", "--init_weights"]),
        (["--model.optimizer", "muon"], ["--model.optimizer muon", "adamw"]),
        (["--data.val_fraction", "0.2"], ["--data.val_fraction 0.2", "0.1"]),
        (["--epochs", "1"], ["--epochs 1", "2 or more"]),
        (["--epochs", "3", "--trainer.enable_checkpointing", "false"], ["--trainer.enable_checkpointing false"]),
        (["--epochs", "3", "--trainer.limit_val_batches", "0"], ["--trainer.limit_val_batches 0", "best.ckpt", "1.0"]),
        (["--model.tta", "mirror"], ["--model.tta mirror", "none", "test"]),
        (["--seed_everything", "true"], ["--seed_everything true"]),
    ],
)
def test_what_a_checkpoint_depends_on_does_not_change(finished, monkeypatch, capsys, tmp_path, flags, expected):
    run = shutil.copytree(finished[0], tmp_path / "run")
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--resume", run, *flags)
    for part in expected:
        assert part in message
    assert rows_of(run) == rows_of(finished[0])


def test_a_run_is_locked_before_anything_of_it_is_read(monkeypatch, capsys, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}")
    run.last_checkpoint.touch()

    def parse(self, parser, arguments):
        with pytest.raises(UserError, match="is writing into it"):
            open_run(run.path, lock=True)
        raise UserError("read under the lock")

    monkeypatch.setattr(TrainingCLI, "parse_arguments", parse)
    assert "read under the lock" in fail(monkeypatch, capsys, tmp_path, "fit", "--resume", "run")
    open_run(run.path, lock=True).lock.release()


def test_a_further_process_started_from_outside_joins_the_resumed_run(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("CIFAR_LIGHTNING_RUN_DIR", raising=False)
    resume = Resume(RunFolder(tmp_path), None, {})
    assert create_or_resume_run(None, None, None, None, resume) == RunFolder(tmp_path)


def test_checkpoints_of_the_user_go_into_the_run_unless_they_have_a_folder(tmp_path):
    plain, own = ModelCheckpoint(), ModelCheckpoint(dirpath=tmp_path / "own")
    keep_in_run([plain, own, EarlyStopping("val/acc")], RunFolder(tmp_path / "run"))
    assert (plain.dirpath, own.dirpath) == (str(tmp_path / "run" / "checkpoints"), str(tmp_path / "own"))


def test_early_stopping_by_a_training_metric_is_checked_where_it_is_logged(tmp_path):
    callbacks = [EarlyStopping("train/loss"), EarlyStopping("val/acc")]
    keep_in_run(callbacks, RunFolder(tmp_path / "run"))
    for each in callbacks:
        each.setup(SimpleNamespace(val_check_interval=0.5, check_val_every_n_epoch=1), None, "fit")
    assert [each._check_on_train_epoch_end for each in callbacks] == [True, False]


@pytest.mark.parametrize("name", ["best", "last", "previous"])
def test_a_checkpoint_of_the_user_does_not_take_the_place_of_one_of_the_run(tmp_path, name):
    run = RunFolder(tmp_path / "run")
    for folder in (None, run.checkpoints):
        with pytest.raises(UserError, match=f"ModelCheckpoint: filename {name}"):
            keep_in_run([ModelCheckpoint(dirpath=folder, filename=name)], run)
    elsewhere = ModelCheckpoint(dirpath=tmp_path / "own", filename=name, save_last=True)
    inside = [ModelCheckpoint(filename=f"{name}-{{epoch}}", save_last=save_last) for save_last in (True, "link")]
    keep_in_run([elsewhere, *inside], run)
    assert [callback.save_last for callback in (elsewhere, *inside)] == [True, False, False]


@pytest.mark.parametrize(
    ("lr", "schedule", "momentum", "is_named"),
    [
        (0.01, None, 0.0, True),
        (0.1, None, 0.0, False),
        (0.1, None, 0.9, True),
        (0.01, "StepLR", 0.0, True),
        (0.1, "StepLR", 0.0, False),
        (0.01, "OneCycleLR", 0.0, False),  # which sets lr and momentum itself
    ],
)
def test_arguments_of_an_optimizer_that_a_checkpoint_replaces_are_named(lr, schedule, momentum, is_named, capsys):
    schedules = {"StepLR": {"step_size": 1, "gamma": 0.5}, "OneCycleLR": {"max_lr": 0.5, "total_steps": 9}}

    def made(**arguments):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], **arguments)
        if schedule is None:
            return optimizer
        scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **schedules[schedule])
        return [optimizer], [scheduler]

    before = made(lr=0.1, momentum=0.0 if schedule is None else momentum)
    if schedule is not None:
        before, (scheduler,) = before[0][0], before[1]
        before.step()
        scheduler.step()
    given = {"lr": lr, "momentum": momentum}
    remark_on_restored({"optimizer_states": [before.state_dict()]}, made(**given), Namespace(init_args=given))
    assert ("--init_weights" in capsys.readouterr().out) is is_named


# -- LR finder --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tune_saves_a_rate_and_fit_takes_it_as_if_it_had_been_given(tmp_path):
    flags = ["--batch_size", 100, "--epochs", 1]
    done = start("tune", *TINY, *flags, cwd=tmp_path)
    tuned = tmp_path / "runs" / "smallnet_tune" / "1"
    suggestion = json.loads((tuned / "lr_range.json").read_text())["suggestion"]
    assert 1e-4 < suggestion < 0.5
    assert yaml.safe_load((tuned / "config.yaml").read_text())["model"]["lr"] == suggestion
    assert f"Suggested peak: {suggestion:.2g}" in done.stdout
    flags += ["--trainer.logger", "false"]
    start("fit", *TINY, *flags, "--tune_lr", "--run_dir", "tuned", cwd=tmp_path)
    start("fit", *TINY, *flags, "--lr", repr(suggestion), "--run_dir", "given", cwd=tmp_path)
    assert rows_of(tmp_path / "tuned") == rows_of(tmp_path / "given")
    one, other = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("tuned", "given"))
    assert one == other
    assert (tmp_path / "tuned" / "lr_range.png").is_file()
    assert (tuned / "lr_range.png").is_file()


@pytest.mark.parametrize("command", [["fit", "--tune_lr"], ["tune"]])
def test_the_lr_finder_measures_the_initial_weights(command, tmp_path, monkeypatch, capsys):
    def find(model, data, **settings):
        raise UserError(f"starts from {model.model.state_dict()['features.0.weight'].mean().item()}")

    monkeypatch.setattr("cifar_lightning.cli.tune.find_lr", find)
    weights = ImageClassifier(image_size=16, model_kwargs={"widths": [4, 8, 8]}).model.state_dict()
    weights["features.0.weight"].fill_(7.0)
    torch.save(weights, tmp_path / "weights.pt")
    (tmp_path / "own.yaml").write_text("init_weights: weights.pt\n")
    assert "starts from 7.0" in fail(monkeypatch, capsys, tmp_path, *command, "--config", "own.yaml", *TINY)


@pytest.mark.parametrize("command", [["fit", "--tune_lr"], ["tune"]])
def test_a_folder_that_is_taken_is_refused_before_the_lr_finder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cifar_lightning.cli.tune.find_lr", lambda *args, **kwargs: pytest.fail("found"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("of the user")
    said = fail(monkeypatch, capsys, tmp_path, *command, *TINY, "--run_dir", "mine")
    assert "--run_dir mine: a run would overwrite config.yaml" in said


@pytest.mark.parametrize("command", [["fit", "--tune_lr"], ["tune"]])
def test_the_lr_finder_is_not_for_a_run_that_continues_another(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "last.ckpt").touch()
    message = fail(monkeypatch, capsys, tmp_path, *command, *TINY, "--ckpt_path", "last.ckpt")
    assert "--ckpt_path" in message
    assert "--init_weights" in message


@pytest.mark.slow
def test_three_processes_evaluate_every_image_once_and_count_as_one_does(finished):
    run, _ = finished
    one = torch.load(run / "confusion_matrix.pt", weights_only=True)
    (run / "confusion_matrix.pt").unlink()
    done = start("test", run, "--trainer.strategy", "ddp", "--trainer.devices", 3, cwd=run.parent)
    assert done.stdout.count("Test accuracy") == 1
    assert torch.equal(torch.load(run / "confusion_matrix.pt", weights_only=True), one)
    assert np.load(run / "predictions.npz")["indices"].tolist() == list(range(1000))


@pytest.mark.slow
def test_two_processes_train_into_one_run_folder(tmp_path):
    two = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--epochs", 2]
    start("fit", *TINY, *two, "--data.val_fraction", "0.101", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "runs" / "smallnet").iterdir()] == ["1"]
    run = tmp_path / "runs" / "smallnet" / "1"
    assert [name for name in FILES_OF_A_RUN if not (run / name).is_file()] == []
    # 101 images do not divide by 2; every one is there once.
    assert np.load(run / "predictions_val.npz")["indices"].tolist() == list(range(101))
    assert json.loads((run / "test_metrics.json").read_text())["num_images"] == 1000


@pytest.mark.parametrize(
    ("changed", "is_warned"),
    [
        ({}, True),
        ({"name": "speednet"}, True),
        ({"pretrained": True}, False),
        ({"freeze": None}, False),
        ({"name": "torch.nn:Flatten"}, False),
    ],
)
def test_frozen_layers_with_random_weights_are_warned_of(changed, is_warned, capsys):
    settings = {"freeze": ["stage1"], "pretrained": False, "name": "smallnet", **changed}
    cli = SimpleNamespace(settings=SimpleNamespace(model=Namespace(**settings), init_weights=None, ckpt_path=None))
    imported = {"path": settings["name"]} if ":" in settings["name"] else None
    load_initial_weights(cli, SimpleNamespace(hparams=settings, imported=imported))
    remark = capsys.readouterr().out
    assert ("--model.freeze" in remark) is is_warned
    assert ("--model.pretrained smallnet" in remark) is (is_warned and settings["name"] == "smallnet")
    assert "--model.pretrained true" not in remark, "no weights of ours are published"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("SmallNet", r"no such file[\s\S]*Did you mean smallnet\?"),
        ("nowhere.ckpt", "no such file"),
        ("smallnet", r"other classes[\s\S]*--model.pretrained"),
    ],
)
def test_initial_weights_that_do_not_load_are_named_by_their_flag(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = SimpleNamespace(settings=SimpleNamespace(init_weights=given))
    with pytest.raises(UserError, match=f"--init_weights {given}: .*{message}") as error:
        load_initial_weights(cli, ImageClassifier("smallnet", 3))
    assert ("Did you mean" in str(error.value)) is (given == "SmallNet")


def test_initial_weights_of_the_same_classes_are_also_those_of_the_last_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ImageClassifier("smallnet", 10)
    load_initial_weights(SimpleNamespace(settings=SimpleNamespace(init_weights="smallnet")), module)
    assert torch.equal(module.model.head.weight, load("smallnet").model.head.weight)


class Weighted(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, logits, targets):
        return self.weight * torch.nn.functional.cross_entropy(logits, targets)


class Scaled(ImageClassifier):
    """Has a parameter, a layer and a loss with a setting next to its model."""

    def __init__(self, num_outputs=10, weight=1.0):
        super().__init__(image_size=16, model_kwargs={"widths": [2, 2]}, loss=Weighted, loss_kwargs={"weight": weight})
        self.scale, self.mixed = torch.nn.Parameter(torch.ones(())), torch.nn.Linear(10, num_outputs)


def test_initial_weights_are_also_those_next_to_the_model(tmp_path, capsys):
    trained = Scaled()
    trained.scale.data.fill_(3.0)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.ckpt")
    cli = SimpleNamespace(settings=SimpleNamespace(init_weights=tmp_path / "trained.ckpt"))
    for module, is_named in ((Scaled(weight=2.0), False), (Scaled(num_outputs=4, weight=2.0), True)):
        load_initial_weights(cli, module)
        assert (module.scale.item(), torch.equal(module.model.head.weight, trained.model.head.weight)) == (3.0, True)
        assert module.loss_function.weight == 2.0
        assert ("mixed.weight, mixed.bias" in capsys.readouterr().out) is is_named


class Averaging(ImageClassifier):
    def configure_callbacks(self):
        return [*super().configure_callbacks(), EMAWeightAveraging()]


class Overwriting(ImageClassifier):
    def configure_callbacks(self):
        return [*super().configure_callbacks(), ModelCheckpoint(filename="best")]


class Saving(ImageClassifier):
    def configure_callbacks(self):
        self.saving = ModelCheckpoint(filename="mine-{epoch}")
        return [*super().configure_callbacks(), self.saving]


def test_callbacks_that_a_subclass_adds_are_checked_and_kept_in_the_run_as_those_of_flags(tmp_path):
    run, tiny = RunFolder(tmp_path / "run"), {"image_size": 16, "model_kwargs": {"widths": [2, 2]}}
    for kind, message in ((Averaging, "configure_callbacks: EMAWeight"), (Overwriting, "filename best"), (Saving, "")):
        added, module = AddedCallbacks(run), kind(**tiny)
        trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[added, Checkpoint()])
        added.known = tuple(trainer.callbacks)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            trainer.fit(module, small_data(limit=100))
    assert module.saving.dirpath == str(run.checkpoints)


class OwnOptimizer(ImageClassifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_subclass_with_its_own_optimizer_may_add_callbacks_that_change_a_schedule(tmp_path):
    tiny = {"image_size": 16, "model_kwargs": {"widths": [2, 2]}}
    ours, own, added = ImageClassifier(**tiny), OwnOptimizer(**tiny), AddedCallbacks(RunFolder(tmp_path / "run"))
    of_schedule = (
        BackboneFinetuning(),
        BatchSizeFinder(),
        GradientAccumulationScheduler({0: 2}),
        LearningRateFinder(),
    )
    for callback in of_schedule:
        trainer = SimpleNamespace(callbacks=[callback])
        added.setup(trainer, own, "fit")
        with pytest.raises(UserError, match=f"configure_callbacks: {type(callback).__name__}: "):
            added.setup(trainer, ours, "fit")
    with pytest.raises(UserError, match="configure_callbacks: EMAWeightAveraging: "):
        added.setup(SimpleNamespace(callbacks=[EMAWeightAveraging()]), own, "fit")


def test_callbacks_of_an_earlier_run_are_refused():
    saving, stopping = ModelCheckpoint(), EarlyStopping("val/acc")
    stopping.best_score = torch.tensor(0.9)  # a baseline to improve on
    refuse_used([saving, stopping])
    saving.best_model_path, stopping.wait_count = "runs/1/checkpoints/mine.ckpt", 2
    for used in (saving, stopping):
        with pytest.raises(UserError, match=f"callbacks: {type(used).__name__} was used in another run"):
            refuse_used([used])


def test_a_small_validation_split_is_remarked_on(capsys):
    remark_on_few(50)
    assert capsys.readouterr().out == ""
    remark_on_few(5)
    assert "5 validation images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "held_out", "limits", "expected"),
    [
        ({"val": 10, "test": 20}, {"test"}, {}, "10 val and 20 test images for 1,000,000 classes need up to 1.3 GB"),
        ({"val": 20, "test": 10}, {"val"}, {}, "20 val and 10 test images"),
        ({"val": 20, "test": 10}, {"val", "test"}, {}, "20 val and 10 test images"),
        ({"val": 10, "test": 20}, set(), {}, "10 val and 20 test images"),
        ({"val": 17, "test": 24}, {"val", "test"}, {"val": 0}, "of 24 test images"),
        ({"val": 17, "test": 20}, {"val", "test"}, {"test": 1}, ""),
        ({"val": 10, "test": 10}, {"val", "test"}, {}, ""),
        ({"val": 0, "test": 20}, set(), {"val": 0, "test": 0.5}, ""),
    ],
)
def test_predictions_that_need_more_memory_than_is_free_are_remarked_on(
    sizes, held_out, limits, expected, capsys, monkeypatch
):
    num_classes = 1_000_000
    monkeypatch.setattr(memory, "free_host_bytes", lambda: (52 + 40) * 10 * num_classes)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    data = SimpleNamespace(num_images=sizes.__getitem__, is_held_out=held_out.__contains__, num_classes=num_classes)
    trainer = SimpleNamespace(limit_val_batches=limits.get("val", 1.0), limit_test_batches=limits.get("test", 1.0))
    remark_on_memory(trainer, data)
    said = capsys.readouterr().out
    assert expected in said
    assert bool(said) == bool(expected)
    assert [f"--data.{split}_fraction" in said for split in sizes] == [
        bool(said) and split in held_out and limits.get(split, 1.0) == 1 for split in sizes
    ]


def test_the_memory_remarked_on_is_what_the_findings_take_at_most():
    random = np.random.default_rng(0)

    def predictions(num):
        targets = random.integers(0, 200, num)
        logits = random.standard_normal((num, 200), np.float32)
        logits[np.arange(num), targets] += 3
        return Predictions(logits, targets, np.arange(num), tuple(map(str, range(200))))

    def peak_of(num_val, num_test):
        val, test = predictions(num_val), predictions(num_test)
        results = Results(test.class_names, test.confusion, test=test, val=val)
        tracemalloc.reset_peak()
        find(results)
        return tracemalloc.get_traced_memory()[1]

    of_val, of_test = _PREDICTION_BYTES["val"], _PREDICTION_BYTES["test"]
    tracemalloc.start()
    try:
        peak_of(100, 100)  # imports
        before = tracemalloc.get_traced_memory()[0]
        for num_val, num_test in ((1500, 100), (100, 1500)):
            needed = 200 * (of_val * num_val + of_test * num_test)
            assert 0.8 * needed < peak_of(num_val, num_test) - before < 1.1 * needed
    finally:
        tracemalloc.stop()
