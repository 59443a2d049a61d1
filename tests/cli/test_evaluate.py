"""Where validate, test and predict write, and where they do not."""

import contextlib
import json
import os
from types import SimpleNamespace

import pytest
import yaml
from made_run import make_run

from cifar_lightning.cli import evaluate
from cifar_lightning.cli.evaluate import find_run
from cifar_lightning.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a best checkpoint, of the images at hand."""
    run = make_run(tmp_path / "run", n=20)
    run.best_checkpoint.touch()
    monkeypatch.setattr(evaluate, "split_difference", lambda run, data: "")
    return run


def test_files_of_a_run_are_written_under_its_lock(run):
    for command in ("validate", "test", "predict"):
        found = find_run(command, run.best_checkpoint, SimpleNamespace(num_images=lambda split: 20), None)
        assert found == run
        assert found.lock is not None
        found.lock.release()


def test_a_run_that_cannot_be_written_is_evaluated_and_stays_as_it_is(run, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    data = SimpleNamespace(num_images=lambda split: 20)
    for command in ("validate", "test"):
        assert find_run(command, run.best_checkpoint, data, None) is None
        assert f"{run.path}: the folder cannot be written" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be written; give --output"):
        find_run("predict", run.best_checkpoint, data, None)
    assert not run.lock_file.exists()


@pytest.mark.parametrize(
    ("command", "changed", "settings", "is_refused"),
    [
        ("test", {}, {}, False),
        ("test", {"test": [7, 8]}, {}, True),
        ("test", {"test": [7, 8]}, {"seed": 1, "root": "./photos/"}, True),
        ("test", {"val": [7]}, {"val_fraction": 0.2}, False),
        ("validate", {"val": [7]}, {"val_fraction": 0.2}, True),
        ("validate", {"val": []}, {"val_fraction": 0}, False),
        ("predict", {"sha256": {"train": "decoded otherwise"}}, {"image_size": 64}, False),
        ("predict", {"test": [1]}, {"image_size": 64}, True),
        ("test", {"test": [1]}, {"root": "other"}, False),
        ("test", {"test": [1]}, {"dataset": "<Rows>"}, False),
    ],
)
def test_images_that_a_run_was_trained_on_are_not_drawn_for_its_test(run, command, changed, settings, is_refused):
    split = {"sha256": {"train": "hash"}, "val_from": "train", "train": [0, 3], "val": [1], "test": [2]}
    run.split.write_text(json.dumps(split))
    known = {"dataset": "folder", "root": "photos", "image_size": None}
    run.config.write_text(yaml.safe_dump({"data": known}))
    data = SimpleNamespace(split_summary=lambda: split | changed)
    with pytest.raises(UserError, match=r"photos.*trained on") if is_refused else contextlib.nullcontext():
        evaluate._refuse_trained_images(command, run.best_checkpoint, data, known | settings)
    own = SimpleNamespace(split_summary=lambda: {"val": [7], "val_from": "val"})
    evaluate._refuse_trained_images(command, run.best_checkpoint, own, known)
    run.split.write_text("damaged")
    evaluate._refuse_trained_images(command, run.best_checkpoint, data, known | settings)


def test_results_with_another_tta_than_the_config_names_are_not_written(run, capsys):
    data = SimpleNamespace(num_images=lambda split: 20)
    run.config.write_text("model: {tta: mirror}")
    assert find_run("test", run.best_checkpoint, data, None, "mirror").lock.release() is None
    assert find_run("test", run.best_checkpoint, data, None, "six") is None
    assert "--model.tta mirror, not six" in capsys.readouterr().out
    with pytest.raises(UserError, match="tta mirror, not six; give --output"):
        find_run("predict", run.best_checkpoint, data, None, "six")
    run.config.write_text("model: {name: null}")  # a class of one's own may set it itself
    assert find_run("test", run.best_checkpoint, data, None, "six").lock.release() is None


@pytest.mark.parametrize(
    ("typed", "loggers", "profilers"),
    [
        ([], None, None),
        (["--trainer={accelerator: cpu}"], None, None),
        (["--trainer.logger=false"], False, None),
        (["--trainer.logger.name=again"], "CSVLogger", None),
        (["--trainer.profiler=simple"], None, "str"),
    ],
)
def test_what_a_run_was_logged_and_profiled_with_is_not_made_again_unless_it_is_typed(
    typed, loggers, profilers, run, tmp_path, monkeypatch
):
    (metrics := tmp_path / "logs" / "net" / "version_0" / "metrics.csv").parent.mkdir(parents=True)
    metrics.write_text("of the training")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    logger["init_args"] = {"save_dir": str(tmp_path / "logs"), "name": "net", "version": 0}
    profiler = {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}
    of_data = {"dataset": "synthetic", "image_size": 16}
    config = {"trainer": {"accelerator": "cpu", "logger": logger, "profiler": profiler}, "data": of_data}
    run.config.write_text(yaml.safe_dump(config))
    made = {}

    class Reached(Exception):
        pass

    def build(settings, *args, **kwargs):
        made.update(logger=settings.logger, profiler=settings.profiler)
        raise Reached

    for name in ("prepare_data", "_refuse_trained_images", "find_run"):
        monkeypatch.setattr(evaluate, name, lambda *args: None)
    monkeypatch.setattr(evaluate, "build_trainer", build)
    checkpoint = f"--ckpt_path={run.best_checkpoint}"
    with pytest.raises(Reached):
        evaluate.evaluate("test", [f"--config={run.config}", *typed, checkpoint])
    named = [each if each in (None, False) else type(each).__name__ for each in made.values()]
    assert named == [loggers, profilers]
    assert metrics.read_text() == "of the training"
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(config))
    with pytest.raises(Reached):
        evaluate.evaluate("test", [f"--config={own}", checkpoint])
    assert type(made["logger"]).__name__ == "CSVLogger"
