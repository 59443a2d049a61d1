"""What `fit --resume RUN` goes on with: the run's own config, what was changed beside it, where training stopped."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_lightning.checkpoints.durable import newest_checkpoint
from cifar_lightning.checkpoints.loading import is_inside_epoch, progress_of
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.files import read_json
from cifar_lightning.runs.folder import RunFolder, open_run
from cifar_lightning.settings.safe_yaml import read_yaml

# What the weights, the states of optimiser and schedule or the split belong to; all else is training, which may change.
_FIXED = {"model.name", "model.model_kwargs", "model.optimizer", "model.schedule"}
_FIXED |= {
    "model.ema_decay",
    "model.pretrained",
    "data.image_size",
    "data.dataset",
    "data.seed",
    "data.val_fraction",
    "data.limit",
}
# What an epoch's batches and steps are made of. trainer.devices is not here: an epoch's start may be moved to other
# devices, and inside one `exact` looks at the number of processes itself.
_MAKES_BATCHES = {"data.batch_size", "data.drop_last", "data.train_sizes", "data.sampler"}
_MAKES_BATCHES |= {"trainer.limit_train_batches", "trainer.overfit_batches", "trainer.accumulate_grad_batches"}
# What the learning rates of the steps to come depend on. Momentum and decay are not scheduled: they hold from here on.
_PLANS_SCHEDULE = {"trainer.max_epochs", "trainer.max_steps", "trainer.devices", "trainer.num_nodes"}
_PLANS_SCHEDULE |= _MAKES_BATCHES - {"data.train_sizes", "data.sampler"}
_PLANS_SCHEDULE |= {f"model.{name}" for name in ("lr", "sgd_lr", "head_lr", "pct_start", "stem_train_fraction")}
Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class StopPoint:
    """Where a run's last checkpoint was saved.

    Attributes:
        checkpoint: The file.
        epochs_done: Finished epochs.
        steps_done: Optimiser steps.
        stopped_early: Whether early stopping had ended the run.
        is_inside_epoch: Whether an epoch had begun and not ended.
        damages: Newer checkpoints that are damaged, each with the reason.
    """

    checkpoint: Path
    epochs_done: int
    steps_done: int
    stopped_early: bool = False
    is_inside_epoch: bool = False
    damages: tuple[tuple[Path, str], ...] = ()

    def is_end(self, max_epochs: int | None, max_steps: int, changes: Changes) -> bool:
        """Whether a run of that length has nothing left to train; early stopping is an end until something changes."""
        epochs_are_up = max_epochs not in (None, -1) and self.epochs_done >= int(max_epochs or 0)
        steps_are_up = max_steps != -1 and self.steps_done >= max_steps
        return epochs_are_up or steps_are_up or (self.stopped_early and not changes)

    def ending(self, max_epochs: int | None) -> str:
        """Return how a run of that length that has nothing left to train came to its end."""
        is_short = max_epochs in (None, -1) or self.epochs_done < int(max_epochs or 0)
        return "stopped early, its patience used up" if self.stopped_early and is_short else "trained to its end"

    def tell(self, run: RunFolder, changes: Changes, schedule: str = "one_cycle") -> list[str]:
        """Return lines that say where the run goes on, counted as a person does, and what is different from before."""
        inside = f"in epoch {self.epochs_done + 1} after step {self.steps_done:,}"
        lines = [f"Going on with {run.path} {inside if self.is_inside_epoch else f'after epoch {self.epochs_done}'}."]
        lines += [f"  {line}" for line in describe_changes(changes)]
        if _PLANS_SCHEDULE & changes.keys():
            what = "OneCycle" if schedule == "one_cycle" else f"The {schedule} schedule"
            lines.append(f"  {what} is planned anew over the whole run and taken up at this step.")
        return lines

    def record(self, changes: Changes) -> dict[str, Any]:
        """Return what environment.json says of going on from here."""
        changed = {key: now for key, (_, now) in changes.items()}
        return {"epoch": self.epochs_done, "step": self.steps_done, "changed": changed}

    def check_changes(self, changes: Changes) -> None:
        """Refuse to change inside an epoch what its batches are made of."""
        moved = sorted(_MAKES_BATCHES & changes.keys())
        if self.is_inside_epoch and moved:
            before, now = changes[moved[0]]
            raise UserError(
                f"--{moved[0]} {now}: the run stopped inside an epoch, whose batches were made with {before}."
                "\nLeave it out, at least to the epoch's end."
            )

    def check_length(self, max_epochs: int | None) -> None:
        """Refuse to make a run shorter than it is."""
        begun = self.epochs_done + self.is_inside_epoch
        if max_epochs not in (None, -1) and int(max_epochs or 0) < begun:
            raise UserError(f"--epochs {max_epochs}: the run has begun {begun}; give as many or more, or leave it out.")


@contextlib.contextmanager
def locked(run: RunFolder | None) -> Iterator[RunFolder | None]:
    """Hold the lock of a run that is gone on with, in the first process, from before anything of it is read.

    Config, checkpoint and tables are then of one state of it: whoever else wrote into it has ended.

    Raises:
        UserError: Another process is writing into it, or it cannot be written.
    """
    if run is None or not is_first_process():
        yield run
        return
    run.check_writable()
    run = open_run(run.path, lock=True)
    assert run.lock is not None
    with run.lock:
        yield run


def stop_point(run: RunFolder) -> StopPoint:
    """Read where a run stopped, from its newest undamaged checkpoint.

    Raises:
        UserError: It has no checkpoint that can be read.
    """
    path, checkpoint, damages = newest_checkpoint(run)
    stopping = [state for key, state in checkpoint["callbacks"].items() if "EarlyStopping" in key]
    return StopPoint(
        checkpoint=path,
        epochs_done=progress_of(checkpoint)[0],
        steps_done=checkpoint["global_step"],
        stopped_early=any(has_stopped(state) for state in stopping),
        is_inside_epoch=is_inside_epoch(checkpoint),
        damages=tuple(damages),
    )


def clear_up(run: RunFolder, point: StopPoint) -> None:
    """Say which checkpoints are damaged and set them aside; remove what a killed write left behind.

    A damaged last checkpoint must not become the previous one, in the place of a good one.
    """
    for path, reason in point.damages:
        print(f"warning: {reason}", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # it may be what is wrong that it is missing
            os.replace(path, path.with_name(f"{path.name}.damaged"))
    if point.damages:
        print(f"warning: going on from {point.checkpoint} instead.", file=sys.stderr)
    for file in tuple(run.leftovers()):
        file.unlink()


def other_images(run: RunFolder, data: ImageDataModule) -> str:
    """Return why some data is not what a run was trained on; empty if it is."""
    theirs, ours = read_json(run.split), data.split_summary()
    if any(theirs[key] != ours[key] for key in ("sha256", "train", "val")):
        return "these are not its images or not its split"
    return ""


def find_changes(run: RunFolder, config_text: str) -> Changes:
    """Compare a run's config.yaml with the one that it would go on with.

    Returns:
        Key -> (value of the run, value now), of the keys that differ.

    Raises:
        UserError: A key that the checkpoint depends on differs, or the run's config is damaged.
    """
    before, now = (_flat(_read_yaml(text, run.config)) for text in (run.config.read_text("utf-8"), config_text))
    changes = {key: (before[key], now[key]) for key in sorted(before.keys() & now.keys()) if before[key] != now[key]}
    for key in changes:
        if key in _FIXED:
            raise UserError(
                f"--{key} {changes[key][1]}: the run {run.path} has {changes[key][0]}, which its checkpoint depends on."
                f"\nLeave it out, or start a new run: fit --init_weights {run.tested_checkpoint}"
            )
    return changes


def describe_changes(changes: Changes) -> list[str]:
    """Return a line for each change."""
    return [f"--{key} {now} instead of {before}" for key, (before, now) in changes.items()]


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}).") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged, it holds no keys.")
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            flat |= _flat(value, f"{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def has_stopped(state: Mapping[str, Any]) -> bool:
    """Whether early stopping, with that state in a checkpoint, had ended its run.

    Lightning's `stopped_epoch` does not tell: it counts from 0, which also stands for none.
    """
    return bool(state["wait_count"] >= max(1, state["patience"]))
