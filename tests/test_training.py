"""The real program, in new processes, as a user types it; and its errors, in process."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cifar_lightning import cli, download
from cifar_lightning.cli import rewrite_arguments
from cifar_lightning.errors import UserError
from cifar_lightning.runs import RunFolder

REPO = Path(__file__).parent.parent
TINY = ["--data.dataset", "synthetic", "--data.image_size", "16", "--batch_size", "500"]
TINY += ["--model.model_kwargs", "{widths: [4, 8, 8]}", "--trainer.accelerator", "cpu"]
FILES_OF_A_RUN = [
    "config.yaml",
    "split.json",
    "environment.json",
    "metrics.csv",
    "timing.csv",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "test_metrics.json",
    "confusion_matrix.pt",
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "predictions.npz",
    "predictions_val.npz",
    "gallery.npz",
]


def start(*arguments, cwd, check=True):
    """Run `train.py` in a new process with one thread, so that tests do not fight for the cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("CIFAR_LIGHTNING_RUN_DIR", None)
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


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
    assert "precision 32-true" in done.stdout
    assert "epoch 2/2" in done.stdout
    for part in ("Test accuracy", "Confusion matrix", "Most confused", "striped_disk", "runs/smallnet/1"):
        assert part in done.stdout
    assert done.stderr == ""
    assert run.is_dir()


def test_the_files_of_a_run_agree_with_each_other(finished):
    run, _ = finished
    metrics = json.loads((run / "test_metrics.json").read_text())
    answers = np.load(run / "predictions.npz")
    matrix = torch.load(run / "confusion_matrix.pt", weights_only=True)
    preds = answers["logits"].argmax(1)
    assert len(answers["targets"]) == metrics["num_pictures"] == matrix.sum() == 1000
    assert metrics["accuracy"] == (preds == answers["targets"]).mean() == matrix.trace().item() / 1000
    assert matrix.dtype == torch.int64
    for target in range(10):
        assert matrix[target].tolist() == np.bincount(preds[answers["targets"] == target], minlength=10).tolist()
    rows = list(csv.reader((run / "confusion_matrix.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in rows[1:]] == rows[0][1:] == answers["class_names"].tolist()
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == matrix.tolist()
    gallery = np.load(run / "gallery.npz")
    assert gallery["images"].dtype == np.uint8
    assert 0 < len(gallery["images"]) == len(set(gallery["indices"].tolist())) <= 500


def test_metrics_have_a_row_an_epoch_and_the_best_epoch_was_kept(finished):
    run, _ = finished
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr"} <= set(rows[0])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == int(np.argmax([float(row["val/acc"]) for row in rows]))
    answers = np.load(run / "predictions_val.npz")
    accuracy = (answers["logits"].argmax(1) == answers["targets"]).mean()
    assert accuracy == pytest.approx(max(float(row["val/acc"]) for row in rows), abs=1e-6)


def test_the_split_of_a_run_is_saved_with_hashes(finished):
    run, _ = finished
    split = json.loads((run / "split.json").read_text())
    assert len(split["train"]) == 4500
    assert len(split["val"]) == 500
    assert not set(split["train"]) & set(split["val"])
    assert set(split["sha256"]) == {"train", "test"}


def test_aliases_are_saved_under_their_long_names(finished):
    run, _ = finished
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["batch_size"] == 500
    assert config["model"]["lr"] == 0.01
    assert config["trainer"]["precision"] == "32-true"
    assert "run_dir" not in config
    assert str(run) not in (run / "config.yaml").read_text()


def test_tensorboard_has_scalars_classes_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = finished
    board = EventAccumulator(str(run)).Reload()
    scalars, images = board.Tags()["scalars"], board.Tags()["images"]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr", "step/lr"} <= set(scalars)
    answers = np.load(run / "predictions_val.npz")
    of_disks = answers["targets"] == 0
    best = int(np.argmax([event.value for event in board.Scalars("val/acc")]))
    shown = board.Scalars("val_acc_of_class/disk")[best].value
    assert shown == pytest.approx((answers["logits"].argmax(1)[of_disks] == 0).mean())
    assert sum(tag.startswith("val_acc_of_class/") for tag in scalars) == 10
    assert {"train/batch_as_trained_on", "val/confusion_matrix"} <= set(images)


def test_test_of_a_run_repeats_its_figures_and_validate_its_validation(finished):
    run, done = finished
    before = (run / "test_metrics.json").read_bytes()
    (run / "test_metrics.json").unlink()
    (run / "predictions_val.npz").unlink()
    tested = start("test", run, cwd=run.parent)
    report = done.stdout[done.stdout.index("Test accuracy") : done.stdout.index("Run folder")]
    assert report in tested.stdout
    assert (run / "test_metrics.json").read_bytes() == before
    validated = start("validate", run, cwd=run.parent)
    answers = np.load(run / "predictions_val.npz")
    accuracy = (answers["logits"].argmax(1) == answers["targets"]).mean()
    assert f"val/acc   {accuracy:.4f}" in validated.stdout


def test_the_saved_config_repeats_the_run_digit_for_digit(finished):
    run, _ = finished
    start("fit", "--config", run / "config.yaml", "--run_dir", "again", cwd=run.parent)
    assert (run.parent / "again" / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_three_processes_evaluate_every_picture_once_and_count_as_one_does(finished):
    run, _ = finished
    one = torch.load(run / "confusion_matrix.pt", weights_only=True)
    (run / "confusion_matrix.pt").unlink()
    done = start("test", run, "--trainer.strategy", "ddp", "--trainer.devices", 3, cwd=run.parent)
    assert done.stdout.count("Test accuracy") == 1
    assert torch.equal(torch.load(run / "confusion_matrix.pt", weights_only=True), one)
    assert np.load(run / "predictions.npz")["indices"].tolist() == list(range(1000))


@pytest.mark.slow
def test_two_processes_train_into_one_run_folder(tmp_path):
    two = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--epochs", 1]
    start("fit", *TINY, *two, "--data.val_fraction", "0.1002", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "runs" / "smallnet").iterdir()] == ["1"]
    run = tmp_path / "runs" / "smallnet" / "1"
    assert [name for name in FILES_OF_A_RUN if not (run / name).is_file()] == []
    # 501 pictures do not divide by 2; every one is there once.
    assert np.load(run / "predictions_val.npz")["indices"].tolist() == list(range(501))
    assert json.loads((run / "test_metrics.json").read_text())["num_pictures"] == 1000


@pytest.mark.slow
def test_the_quick_start_learns_what_a_linear_classifier_cannot(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from cifar_lightning.sources import open_source

    start("fit", "--config", REPO / "configs" / "quickstart.yaml", "--trainer.accelerator", "cpu", cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / "quickstart" / "1" / "test_metrics.json").read_text())
    assert metrics["accuracy"] >= 0.95
    source = open_source("synthetic", "data", None)
    train, test = source.load("train"), source.load("test")
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100, tol=1e-2))
    linear.fit(train.images.reshape(len(train.images), -1), train.targets)
    assert linear.score(test.images.reshape(len(test.images), -1), test.targets) < 0.70


# -- errors -----------------------------------------------------------------------------------------------------------


def fail(monkeypatch, capsys, tmp_path, *arguments):
    """Run a command line that must fail, in process; return its lines on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR_LIGHTNING_RUN_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3, lines
    assert list(tmp_path.glob("runs/*/*")) == []
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.dataset", "cifar11"], ["--data.dataset cifar11", "cifar10"]),
        (["--batch_size", "4501"], ["--data.batch_size 4501", "4500"]),
        (["--batch_size", "0"], ["--data.batch_size 0"]),
        (["--data.val_fraction", "0.0001"], ["--data.val_fraction 0.0001", "one of each"]),
        (["--lr", "-1"], ["--model.lr -1"]),
        (["--lr", "nan"], ["model.lr", "nan"]),
        (["--model.name", "resnet19"], ["--model.name resnet19", "smallnet"]),
        (["--epochs", "x"], ["max_epochs"]),
        (["--trainer.max_epoch", "3"], ["max_epoch"]),
        (["--modle.lr", "1"], ["--modle.lr"]),
        (["--epochs", "1", "--trainer.max_epochs", "2"], ["--epochs 1", "--trainer.max_epochs 2"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
        (["--ckpt_path", "last"], ["--ckpt_path last"]),
        (["--epochs", "-1"], ["--epochs"]),
        (["--trainer.accelerator", "foo"], ["foo"]),
        (["--model.model_kwargs", "{depth: 3}"], ["depth"]),
    ],
)
def test_a_mistake_gets_a_short_answer_and_leaves_no_run(monkeypatch, capsys, tmp_path, arguments, expected):
    base = [] if "--data.dataset" in arguments else ["--data.dataset", "synthetic"]
    message = fail(monkeypatch, capsys, tmp_path, "fit", *base, *arguments)
    for part in expected:
        assert part in message


@pytest.mark.parametrize("command", ["test", "validate"])
def test_an_untrained_network_is_not_tested(monkeypatch, capsys, tmp_path, command):
    message = fail(monkeypatch, capsys, tmp_path, command, "--data.dataset", "synthetic")
    assert "give a run folder" in message


def test_without_network_and_data_the_message_names_every_way_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(download, "_urls", lambda archive: ("http://127.0.0.1:9/cifar-10-python.tar.gz",))
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--data.root", "pictures")
    for part in ("cifar-10-python.tar.gz", "pictures", "CIFAR_LIGHTNING_CIFAR10_URL", "--data.dataset synthetic"):
        assert part in message


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"test/a": 1}, "train"),
        ({"train/a": 2, "train/b": 0, "test/a": 1, "test/b": 1}, "b"),
        ({"train/a": 2, "train/b": 2, "test/a": 1}, "b"),
    ],
)
def test_class_folders_that_do_not_fit_are_named(monkeypatch, capsys, tmp_path, folders, expected):
    for name, count in folders.items():
        folder = tmp_path / "own" / name
        folder.mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--data.dataset", "folder", "--data.root", "own")
    assert expected in message


def test_an_unreadable_picture_is_named(monkeypatch, capsys, tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        folder = tmp_path / "own" / name
        folder.mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
    (tmp_path / "own" / "train" / "b" / "2.png").write_bytes(b"not a picture")
    arguments = [
        "fit",
        "--data.dataset",
        "folder",
        "--data.root",
        "own",
        "--batch_size",
        2,
        "--data.val_fraction",
        0.25,
    ]
    assert "2.png" in fail(monkeypatch, capsys, tmp_path, *arguments)


def test_a_mistake_in_a_real_process_exits_with_2_and_no_traceback(tmp_path):
    done = start("fit", "--data.dataset", "cifar11", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_a_run_folder_becomes_its_config_and_best_checkpoint(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}")
    with pytest.raises(UserError, match="no checkpoint in it"):
        rewrite_arguments(["test", str(run.path)])
    run.best_checkpoint.touch()
    got = rewrite_arguments(["test", str(run.path), "--batch_size=9"])
    expected = ["--config", str(run.config), "--ckpt_path", str(run.best_checkpoint)]
    assert got == ["test", *expected, "--data.batch_size=9"]
    with pytest.raises(UserError, match="not a run folder"):
        rewrite_arguments(["test", str(tmp_path)])
