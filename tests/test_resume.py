"""What a stopped run is gone on with, read from its files."""

import pytest
import torch
import yaml

from cifar_lightning.errors import UserError
from cifar_lightning.resume import StopPoint, describe_changes, find_changes, stop_point
from cifar_lightning.runs import RunFolder

CONFIG = {
    "seed_everything": 0,
    "model": {"name": "smallnet", "lr": 0.1, "model_kwargs": {"widths": [4]}},
    "trainer": {"max_epochs": 2},
}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(CONFIG))
    return run


def save(run, processed, stopped_epoch=0):
    progress = {"current": {"ready": processed, "processed": processed}}
    torch.save(
        {
            "global_step": 10 * processed,
            "callbacks": {"AnnealingEarlyStopping{...}": {"stopped_epoch": stopped_epoch}, "RunCheckpoint{}": {}},
            "loops": {"fit_loop": {"epoch_progress": progress}},
        },
        run.last_checkpoint,
    )


def changed(**group):
    return yaml.safe_dump({**CONFIG, **group})


def test_the_stop_point_is_that_of_the_last_checkpoint(run):
    save(run, 3)
    assert stop_point(run) == StopPoint(epochs_done=3, steps_done=30, stopped_early=False)
    save(run, 3, stopped_epoch=2)
    assert stop_point(run).stopped_early
    run.last_checkpoint.unlink()
    with pytest.raises(UserError, match=r"last\.ckpt is missing"):
        stop_point(run)


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "is_end"), [(4, -1, False), (3, -1, True), (None, 30, True), (-1, 31, False)]
)
def test_a_run_ends_with_its_epochs_or_steps(max_epochs, max_steps, is_end):
    assert StopPoint(3, 30, False).is_end(max_epochs, max_steps, {}) is is_end


def test_early_stopping_is_an_end_until_something_changes():
    assert StopPoint(3, 30, True).is_end(4, -1, {})
    assert not StopPoint(3, 30, True).is_end(9, -1, {"trainer.max_epochs": (4, 9)})


def test_a_run_is_not_made_shorter_than_it_is():
    StopPoint(3, 30, False).check_length(3)
    StopPoint(3, 30, False).check_length(None)
    with pytest.raises(UserError, match="--epochs 2: the run has finished 3"):
        StopPoint(3, 30, False).check_length(2)


def test_changes_are_found_and_told(run):
    assert find_changes(run, changed()) == {}
    changes = find_changes(run, changed(trainer={"max_epochs": 4}, seed_everything=1))
    assert changes == {"seed_everything": (0, 1), "trainer.max_epochs": (2, 4)}
    assert describe_changes(changes)[1] == "--trainer.max_epochs 4 instead of 2"


def test_the_architecture_does_not_change(run):
    other = {"name": "smallnet", "lr": 0.1, "model_kwargs": {"widths": [8]}}
    with pytest.raises(UserError, match=r"(?s)--model\.model_kwargs .*8.*--init_weights"):
        find_changes(run, changed(model=other))


def test_a_damaged_config_is_named(run):
    run.config.write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml: damaged"):
        find_changes(run, changed())
