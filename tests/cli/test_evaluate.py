"""Where validate, test and predict write, and where they do not."""

import os
from types import SimpleNamespace

import pytest
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
