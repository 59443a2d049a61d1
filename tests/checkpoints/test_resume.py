"""Resuming a run: where it stopped, and which settings may change."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from cifar_lightning.checkpoints.resume import (
    StopPoint,
    clean_up,
    find_changes,
    locked,
    restore_files,
    stop_point,
)
from cifar_lightning.cli.flags import table
from cifar_lightning.errors import UserError
from cifar_lightning.runs.contents import read_json
from cifar_lightning.runs.environment import inexact_resumes, processor_change
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings import roles

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


def save(path, processed, wait_count=0, steps_inside=0):
    progress = {"current": {"ready": processed + (steps_inside > 0), "processed": processed}}
    steps = {"optimizer": {"step": {"current": {"completed": steps_inside}}}}
    loop = {"epoch_progress": progress, "epoch_loop.automatic_optimization.optim_progress": steps}
    torch.save(
        {
            "global_step": 10 * processed + steps_inside,
            "callbacks": {
                "AnnealingEarlyStopping{...}": {"wait_count": wait_count, "patience": 2},
                "BestCheckpoint{}": {},
            },
            "loops": {"fit_loop": loop},
        },
        path,
    )


def point(**kwargs):
    return StopPoint(**{"checkpoint": Path("last.ckpt"), "epochs_done": 3, "steps_done": 30, **kwargs})


def changed(**group):
    return yaml.safe_dump({**CONFIG, **group})


def test_the_stop_point_is_that_of_the_last_checkpoint(run):
    save(run.last_checkpoint, 3)
    assert stop_point(run) == point(checkpoint=run.last_checkpoint)
    save(run.last_checkpoint, 3, wait_count=2)
    assert stop_point(run).stopped_early
    save(run.last_checkpoint, 3, steps_inside=4)
    inside = point(checkpoint=run.last_checkpoint, steps_done=34, is_inside_epoch=True)
    assert stop_point(run) == inside
    assert inside.describe(run, {}) == [f"Resuming {run.path} in epoch 4 after step 34."]
    run.last_checkpoint.unlink()
    with pytest.raises(UserError, match=r"last\.ckpt is missing"):
        stop_point(run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, capsys):
    save(run.previous_checkpoint, 2)
    save(run.best_checkpoint, 1)
    run.last_checkpoint.write_bytes(run.previous_checkpoint.read_bytes()[:-1000])
    found = stop_point(run)
    assert (found.checkpoint, found.epochs_done, found.steps_done) == (run.previous_checkpoint, 2, 20)
    clean_up(run, found)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2
    assert str(run.last_checkpoint) in warned[0]
    assert str(run.previous_checkpoint) in warned[1]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "best.ckpt",
        "last.ckpt.damaged",
        "previous.ckpt",
    ]
    run.previous_checkpoint.write_bytes(b"")
    assert stop_point(run).checkpoint == run.best_checkpoint
    run.best_checkpoint.write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)previous\.ckpt.*No other checkpoint"):
        stop_point(run)


def test_only_what_is_damaged_is_set_aside(run):
    save(run.best_checkpoint, 1)
    run.previous_checkpoint.write_bytes(b"")  # and no last.ckpt
    clean_up(run, stop_point(run))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best.ckpt", "previous.ckpt.damaged"]


def test_only_the_first_process_locks_a_resumed_run(run, monkeypatch):
    with locked(run) as held:
        assert held.lock is not None
        with pytest.raises(UserError, match="is writing into it"), locked(run):
            pass
        monkeypatch.setenv("RANK", "1")
        with locked(run) as further:
            assert further is run
        monkeypatch.delenv("RANK")
    with locked(run):
        pass


def test_temporary_files_of_killed_writes_are_deleted(run):
    save(run.last_checkpoint, 1)
    left = [run.checkpoints / ".last.ckpt.0a1b2c3d.tmp", run.path / ".metrics.csv.0a1b2c3d.tmp"]
    for file in left:
        file.touch()
    clean_up(run, stop_point(run))
    assert not any(file.exists() for file in left)
    assert run.last_checkpoint.exists()


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("data.batch_size", 128, 64),
        ("data.drop_last", False, True),
        ("data.train_sizes", None, [24, 32]),
        ("trainer.limit_train_batches", 1.0, 0.5),
        ("trainer.accumulate_grad_batches", 1, 2),
    ],
)
def test_inside_an_epoch_its_batches_stay_as_they_are(key, before, now):
    changes = {key: (before, now)}
    point().check_changes(changes)
    was = "default" if before is None else before
    with pytest.raises(UserError, match=rf"--{re.escape(key)} {re.escape(str(now))}: .*inside an epoch.*{was}"):
        point(is_inside_epoch=True).check_changes(changes)


PLANNED = [("model.lr", True), ("model.sgd_lr", True), ("model.head_lr", True), ("model.stem_train_fraction", True)]
PLANNED += [("trainer.devices", True), ("data.drop_last", True), ("trainer.limit_train_batches", True)]
PLANNED += [("trainer.accumulate_grad_batches", True), ("data.train_sizes", False), ("model.momentum", False)]
PLANNED += [("model.sgd_momentum", False), ("model.weight_decay", False), ("model.sgd_weight_decay", False)]


@pytest.mark.parametrize(("key", "is_planned"), PLANNED)
def test_changes_that_move_the_schedule_are_reported(run, key, is_planned):
    text = "\n".join(point().describe(run, {key: (1, 2)}))
    assert ("OneCycle is computed again" in text) is is_planned


def test_the_schedule_of_the_run_is_named(run):
    text = "\n".join(point().describe(run, {"model.lr": (0.1, 0.2)}, "linear"))
    assert "OneCycle" not in text
    assert "The linear schedule is computed again" in text


def test_all_listed_settings_are_flags():
    known = roles.FIXED | roles.MAKES_BATCHES | roles.PLANS_SCHEDULE
    assert not known - table().keys()


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "is_end"), [(4, -1, False), (3, -1, True), (None, 30, True), (-1, 31, False)]
)
def test_a_run_ends_with_its_epochs_or_steps(max_epochs, max_steps, is_end):
    assert point().is_end(max_epochs, max_steps, {}) is is_end


def test_early_stopping_is_an_end_until_something_changes():
    assert point(stopped_early=True).is_end(4, -1, {})
    assert not point(stopped_early=True).is_end(9, -1, {"trainer.max_epochs": (4, 9)})


def test_what_ended_a_run_is_known_from_its_checkpoint():
    counts = {"epochs": 3, "step": 30}
    assert point(stopped_early=True).ending(9, -1) == {"by": "early_stopping", **counts}
    assert point(stopped_early=True).ending(3, -1) == {"by": "epochs", **counts, "planned_steps": 30}
    assert point().ending(9, 30) == {"by": "max_steps", **counts, "planned_steps": 30}


def test_a_run_is_not_made_shorter_than_it_is():
    point().check_length(3, 30)
    point().check_length(None, -1)
    with pytest.raises(UserError, match="--epochs 2: the run has begun epoch 3"):
        point().check_length(2, -1)
    with pytest.raises(UserError, match="--epochs 3: the run has begun epoch 4"):
        point(is_inside_epoch=True).check_length(3, -1)
    with pytest.raises(UserError, match=r"--trainer\.max_steps 29: the run has trained 30 steps"):
        point().check_length(None, 29)


class Images:
    def split_summary(self):
        return {"sha256": {"test": "x"}, "train": [0], "val": [1]}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_files_that_cannot_be_read_are_written_again_or_named_as_lost(run, capsys, damage):
    for path in (run.split, run.environment, run.metrics_csv, run.timing_csv, run.best_checkpoint):
        path.write_text("{}")
    found = point(has_best=True)
    restore_files(run, found, Images())
    assert capsys.readouterr().err == ""
    for path in (run.split, run.environment):
        damage(path)
    for path in (run.metrics_csv, run.timing_csv, run.best_checkpoint):
        path.unlink()
    restore_files(run, found, Images())
    assert read_json(run.split) == Images().split_summary()
    assert read_json(run.environment)["versions"]["torch"]
    warned = capsys.readouterr().err
    for path in (run.split, run.environment, run.metrics_csv, run.timing_csv, run.best_checkpoint):
        assert str(path) in warned


def test_a_resume_on_another_processor_is_reported():
    here = {"device": "cpu", "cpu": "A", "num_threads": 1, "versions": {"torch": "2"}}
    assert processor_change(here, here) == ""
    assert processor_change(here | {"device": "GPU"}, here | {"device": "GPU", "cpu": "B", "num_threads": 2}) == ""
    for other in ({"cpu": "B"}, {"num_threads": 2}, {"device": "GPU"}, {"versions": {"torch": "3"}}):
        assert processor_change(here, here | other)
        assert processor_change(here | {"resumed": [other]}, here)
        assert processor_change(here | {"resumed": [other]}, here | other) == ""
    instructions = here | {"cpu_instructions": "AVX2"}
    assert processor_change(here, instructions) == "", "a run of an earlier version"
    assert "AVX2" in processor_change(instructions, here | {"cpu_instructions": "AVX-512"})
    change = processor_change(here, here | {"cpu": "B"})
    assert inexact_resumes({"resumed": [{}, {"processor_change": change}]}) == [f"not bitwise: {change}"]


def test_changes_are_found_and_described(run):
    assert find_changes(run, changed()) == {}
    changes = find_changes(run, changed(trainer={"max_epochs": 4}, model={**CONFIG["model"], "lr": 0.2}))
    assert changes == {"model.lr": (0.1, 0.2), "trainer.max_epochs": (2, 4)}
    lines = StopPoint(run.last_checkpoint, 1, 9).describe(run, changes)
    assert lines[2] == "  --trainer.max_epochs 4 instead of 2"


def test_the_architecture_does_not_change(run):
    other = {"name": "smallnet", "lr": 0.1, "model_kwargs": {"widths": [8]}}
    with pytest.raises(UserError, match=r"(?s)--model\.model_kwargs .*8.*--init_weights"):
        find_changes(run, changed(model=other))


def test_the_seed_does_not_change_since_the_random_states_are_the_checkpoints(run):
    assert find_changes(run, changed(seed_everything=0)) == {}
    with pytest.raises(UserError, match=r"--seed_everything 5: .*depends on 0"):
        find_changes(run, changed(seed_everything=5))


def test_the_schedule_does_not_change(run):
    run.config.write_text(changed(model={"name": "smallnet", "schedule": "one_cycle"}))
    with pytest.raises(UserError, match=r"--model\.schedule linear: .*depends on one_cycle"):
        find_changes(run, changed(model={"name": "smallnet", "schedule": "linear"}))


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("model.ema_decay", 0.0, 0.999),
        ("model.pretrained", False, True),
        ("data.limit", None, 5000),
        ("data.val_fraction", 0.1, 0.2),
    ],
)
def test_what_the_checkpoint_or_the_split_depends_on_does_not_change(run, key, before, now):
    group, name = key.split(".")
    run.config.write_text(changed(**{group: {name: before}}))
    with pytest.raises(UserError, match=rf"--{re.escape(key)} {now}: the checkpoint .*depends on {before}"):
        find_changes(run, changed(**{group: {name: now}}))


def test_a_damaged_config_is_named(run):
    run.config.write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml: damaged"):
        find_changes(run, changed())


@pytest.mark.parametrize(
    ("limits", "flag"),
    [((3, -1), "--epochs 3"), ((2, -1), "--epochs 2"), ((None, 30), "--trainer.max_steps 30"), ((4, 31), None)],
)
def test_a_checkpoint_with_nothing_left_to_train_is_refused_with_the_limit_that_it_has_reached(limits, flag):
    given = point(checkpoint=Path("run/checkpoints/last.ckpt"))
    if flag is None:
        given.check_rest(*limits)
        return
    with pytest.raises(UserError, match=f"(?s)--ckpt_path run/checkpoints/last.ckpt.*3 epochs.*30 steps.*{flag}"):
        given.check_rest(*limits)
