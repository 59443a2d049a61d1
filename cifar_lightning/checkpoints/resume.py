"""Resuming a run: where it stopped, which settings changed, and which may change."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lightning.checkpoints.durable import newest_checkpoint
from cifar_lightning.checkpoints.loading import is_inside_epoch, progress_of
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.files import write_json
from cifar_lightning.formatting import command_line, object_text, plural, printable, shell_line
from cifar_lightning.runs.contents import read_config, read_environment, read_split
from cifar_lightning.runs.environment import describe_environment, portable
from cifar_lightning.runs.folder import RunFolder, open_run
from cifar_lightning.settings.roles import FIXED, MAKES_BATCHES, OWN_OPTIMIZER, PLANS_SCHEDULE, flat_settings
from cifar_lightning.settings.safe_yaml import read_yaml

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class StopPoint:
    """Where a run's last checkpoint was saved."""

    checkpoint: Path
    epochs_done: int
    steps_done: int
    stopped_early: bool = False
    has_best: bool = False  # whether an epoch was saved as best.ckpt before
    is_inside_epoch: bool = False
    damages: tuple[tuple[Path, str], ...] = ()  # newer checkpoints that are damaged or missing, each with the error

    def is_end(self, max_epochs: int | None, max_steps: int, changes: Changes) -> bool:
        """Whether nothing is left to train; a run that stopped early continues once a setting changes."""
        return bool(self.limit(max_epochs, max_steps)) or (self.stopped_early and not changes)

    def limit(self, max_epochs: int | None, max_steps: int) -> str:
        """Return the limit that the run has reached, "epochs" or "max_steps"; empty if none."""
        if max_epochs not in (None, -1) and self.epochs_done >= int(max_epochs or 0):
            return "epochs"
        return "max_steps" if max_steps != -1 and self.steps_done >= max_steps else ""

    def ending(self, max_epochs: int | None, max_steps: int) -> dict[str, Any]:
        """Return what ended a run with nothing left to train, if its process was killed before it wrote that down."""
        ended: dict[str, Any] = {"by": "early_stopping", "epochs": self.epochs_done, "step": self.steps_done}
        limit = self.limit(max_epochs, max_steps)
        return ended | {"by": limit, "planned_steps": self.steps_done} if limit else ended

    def describe(self, run: RunFolder, changes: Changes, schedule: str | None = "one_cycle") -> list[str]:
        """Return the lines to print: where the run resumes, with epochs counted from 1, and what changed.

        `schedule` is None for one of the user's own, which continues as it was saved.
        """
        inside = f"in epoch {self.epochs_done + 1} after step {self.steps_done:,}"
        lines = [f"Resuming {run.path} {inside if self.is_inside_epoch else f'after epoch {self.epochs_done}'}."]
        lines += [f"  --{key} {now} instead of {before}" for key, (before, now) in changes.items()]
        if schedule and PLANS_SCHEDULE & changes.keys():
            what = "OneCycle" if schedule == "one_cycle" else f"The {schedule} schedule"
            lines.append(f"  {what} is computed again for the whole run, and continues at this step.")
        return lines

    def record(self, changes: Changes) -> dict[str, Any]:
        """Return the entry for environment.json."""
        changed = {key: now for key, (_, now) in changes.items()}
        return {"epoch": self.epochs_done, "step": self.steps_done, "changed": changed}

    def check_changes(self, changes: Changes) -> None:
        """Raise if a setting of the batches changed inside an epoch."""
        changed = sorted(MAKES_BATCHES & changes.keys())
        if self.is_inside_epoch and changed:
            before, now = changes[changed[0]]
            what = "its default" if before is None else before
            raise UserError(
                f"--{changed[0]} {now}: the run stopped inside an epoch with {what}.\n"
                "It can change only after the end of an epoch; leave it out."
            )

    def check_length(self, max_epochs: int | None, max_steps: int) -> None:
        """Raise if the run has begun more epochs, or trained more steps, than it would have."""
        begun = self.epochs_done + self.is_inside_epoch
        if max_epochs not in (None, -1) and int(max_epochs or 0) < begun:
            raise UserError(f"--epochs {max_epochs}: the run has begun epoch {begun}; give {begun} or more.")
        if max_steps != -1 and max_steps < self.steps_done:
            raise UserError(
                f"--trainer.max_steps {max_steps}: the run has trained {self.steps_done:,} steps; give as many or more."
            )

    def check_rest(self, max_epochs: int | None, max_steps: int) -> None:
        """Raise if a new run that continues from this checkpoint would train nothing."""
        limit = self.limit(max_epochs, max_steps)
        if limit:
            flag = f"--epochs {max_epochs}" if limit == "epochs" else f"--trainer.max_steps {max_steps}"
            raise UserError(
                f"--ckpt_path {self.checkpoint}: has trained {plural(self.epochs_done, 'epoch')}, "
                f"{plural(self.steps_done, 'step')}; with {flag} nothing is left to train.\n"
                f"Give more, or test it: {command_line('test', '--ckpt_path', self.checkpoint)}"
            )


@contextlib.contextmanager
def locked(run: RunFolder | None) -> Iterator[RunFolder | None]:
    """Hold the lock of a resumed run in the first process, from before its files are read.

    Config, checkpoint and tables then agree, as no other process is writing them.

    Raises:
        UserError: Another process holds the lock, or the folder is not writable.
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
    """Read where a run stopped from its newest intact checkpoint, or raise if it has none."""
    path, checkpoint, damages = newest_checkpoint(run)
    try:
        # By what they hold: a class of one's own has another name.
        states = [state for state in checkpoint["callbacks"].values() if isinstance(state, dict)]
        return StopPoint(
            checkpoint=path,
            epochs_done=progress_of(checkpoint)[0],
            steps_done=checkpoint["global_step"],
            stopped_early=any(has_stopped(state) for state in states if "wait_count" in state),
            has_best=any(Path(state.get("best_model_path") or "").name == run.best_checkpoint.name for state in states),
            is_inside_epoch=is_inside_epoch(checkpoint),
            damages=tuple(damages),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged: its progress cannot be read ({type(error).__name__}: {error}).") from error


def clean_up(run: RunFolder, point: StopPoint) -> None:
    """Warn of damaged checkpoints and rename them to *.damaged; delete temporary files of killed writes.

    Otherwise the next save would move a damaged last.ckpt over a good previous.ckpt.
    """
    for path, reason in point.damages:
        print(printable(f"warning: {reason}"), file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # it may be missing
            os.replace(path, path.with_name(f"{path.name}.damaged"))
    if point.damages:
        print(printable(f"warning: resuming from {point.checkpoint} instead."), file=sys.stderr)
    for file in tuple(run.leftovers()):
        file.unlink()


def restore_files(run: RunFolder, point: StopPoint, data: ImageDataModule) -> None:
    """Write split.json and environment.json again where they cannot be read; warn of what cannot be made again."""
    for path, read, make, lost in (
        (run.split, read_split, data.split_summary, "whether the images are those of before is not known"),
        (run.environment, read_environment, describe_environment, "it has this machine and these versions"),
    ):
        try:
            read(path)
        except UserError as error:
            print(printable(f"warning: {error} Written again; {lost}."), file=sys.stderr)
            write_json(path, portable(make()))
    for path in (run.metrics_csv, run.timing_csv):
        if point.epochs_done and not path.exists():
            lost = f"the rows of {point.epochs_done} epochs are lost"
            print(printable(f"warning: {path} is missing; {lost}."), file=sys.stderr)
    if point.has_best and not run.best_checkpoint.exists():
        warning = f"warning: {run.best_checkpoint} is missing; the best of what follows is tested."
        print(printable(warning), file=sys.stderr)


def split_difference(run: RunFolder, data: ImageDataModule) -> str:
    """Return how the data differs from that of a run; empty if it does not."""
    theirs, ours = read_split(run.split), data.split_summary()
    if any(theirs.get(key) != ours.get(key) for key in ("sha256", "train", "val", "test")):
        return "these are not the images or not the split of the run"
    return ""


def find_changes(run: RunFolder, config_text: str) -> Changes:
    """Compare the config of a run with that of its resume.

    Returns:
        Key -> (old value, new value) of the keys that differ.

    Raises:
        UserError: A setting that cannot change differs, or the run's config is damaged.
    """
    new = dict.fromkeys((*OWN_OPTIMIZER, "model_class", "data_class"))  # configs of older runs lack them
    before, now = (flat_settings(new | config) for config in (read_config(run.config), read_yaml(config_text)))
    changes = {key: (before[key], now[key]) for key in sorted(before.keys() & now.keys()) if before[key] != now[key]}
    for key in changes:
        if key in FIXED:
            raise UserError(
                f"--{key} {object_text(changes[key][1])}: the checkpoint of {run.path} depends on "
                f"{object_text(changes[key][0])}.\n"
                f"Leave it out, or start a new run: fit --init_weights {shell_line(run.tested_checkpoint)}"
            )
    return changes


def has_stopped(state: Mapping[str, Any]) -> bool:
    """Whether early stopping with this state has ended its run.

    Lightning's `stopped_epoch` is 0 both for the first epoch and for none.
    """
    reason = state.get("stopping_reason")  # such as a threshold; 0 if it has not stopped
    return bool(reason or state["wait_count"] >= max(1, state["patience"]))
