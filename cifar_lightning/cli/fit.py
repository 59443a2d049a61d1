"""fit: train a model into a run folder, test the best checkpoint, write the report."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from cifar_lightning.checkpoints.loading import progress_of, read_checkpoint, require_resumable
from cifar_lightning.checkpoints.resume import (
    Changes,
    StopPoint,
    clean_up,
    find_changes,
    locked,
    restore_files,
    split_difference,
    stop_point,
)
from cifar_lightning.cli.initial_weights import load_initial_weights
from cifar_lightning.cli.lightning_cli import PythonObjects, TrainingCLI, build_trainer, prepare_data
from cifar_lightning.cli.parser import as_list, refuse_early_stopping
from cifar_lightning.cli.trainer_objects import check_kinds
from cifar_lightning.cli.tune import apply_lr_finder
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.image_folder import write_skipped_files
from cifar_lightning.data.image_set import SPLITS
from cifar_lightning.data.memory import exceeds_free
from cifar_lightning.errors import UserError, is_first_process, remark
from cifar_lightning.files import remove_empty, write_text_durably
from cifar_lightning.formatting import command_line, percent, plural
from cifar_lightning.report.report import make_report
from cifar_lightning.runs.contents import read_environment
from cifar_lightning.runs.ending import ending_text, is_short, write_ending
from cifar_lightning.runs.environment import portable
from cifar_lightning.runs.folder import (
    RUNS,
    RunFolder,
    config_name,
    create_run,
    discard_run,
)
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.runs.processes import announce_run, announced_run
from cifar_lightning.training.best_checkpoint import BestCheckpoint
from cifar_lightning.training.error_messages import explained, of_users_objects, restoring
from cifar_lightning.training.last_checkpoint import LastCheckpoint
from cifar_lightning.training.lr_finder import write_lr_range
from cifar_lightning.training.model_checks import TRAIN_METRICS, check_monitors
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.predictions import PredictionWriter
from cifar_lightning.training.resume_state import ResumeState
from cifar_lightning.training.run_recorder import EPOCH_SO_FAR, RunRecorder, write_learning_rates
from cifar_lightning.training.signals import StopSignals
from cifar_lightning.training.step_count import check_evaluation
from cifar_lightning.training.tensorboard import Dashboard, board_for
from cifar_lightning.training.trainer_callbacks import callbacks_of

# Of an image and class: logits in float32, probabilities in float64, and in float64 the arrays of `fit_temperature` (5)
# or of the calibration (3), and of test the writer's own logits.
_PREDICTION_BYTES = {"val": 4 + 8 + 5 * 8, "test": 4 + 8 + 3 * 8 + 4}
_FEW_IMAGES = 50  # of a validation split: the standard error of its accuracy is up to 7 %


@dataclass(frozen=True)
class Resume:
    """A run to resume, locked in the first process, its stop point, and the settings that differ from its config."""

    run: RunFolder
    point: StopPoint
    changes: Changes

    def is_fully_trained(self, trainer: Namespace) -> bool:
        """Whether nothing is left to train."""
        point = self.point
        if point.epochs_done < (trainer.min_epochs or 0) or point.steps_done < (trainer.min_steps or 0):
            point = replace(point, stopped_early=False)  # the limits keep it from its early stop
        return point.is_end(trainer.max_epochs, trainer.max_steps, self.changes)


def fit(
    arguments: Sequence[str],
    signals: StopSignals,
    resumed: RunFolder | None = None,
    objects: PythonObjects | None = None,
) -> RunFolder | None:
    """Train a model, test its best checkpoint and write the report.

    Args:
        arguments: Flags by their long names.
        signals: What stops the run.
        resumed: The run to resume; its config and checkpoint are among the arguments.
        objects: Model, data and callbacks from Python.

    Returns:
        The run; None with --trainer.fast_dev_run.
    """
    with contextlib.ExitStack() as locks:
        locked_run = locks.enter_context(locked(resumed))
        cli = TrainingCLI("fit", arguments, objects)
        resume = find_resume(cli, locked_run) if locked_run is not None else None
        model, data, settings = cli.instantiate()
        prepare_data(data, model)
        validates = bool(data.num_images("val")) and settings.trainer.limit_val_batches != 0
        if validates:
            remark_on_few(data.num_images("val"))
        plateau = cli.settings.get("lr_scheduler.init_args.monitor")
        stops_by = settings.early_stopping.monitor if validates else None
        if resume is None:
            refuse_used(as_list(settings.trainer.callbacks))
        check_monitors(as_list(settings.trainer.callbacks), validates, model, plateau, stops_by)
        if not validates:
            refuse_early_stopping(cli.settings)
        if settings.trainer.fast_dev_run:
            fast_dev_run(cli, model, data, settings.trainer)
            return None
        run = create_or_resume_run(cli, model, data, settings, resume)
        if run.lock is not None:
            locks.enter_context(run.lock)
        predictions = PredictionWriter(run)
        with discarded_if_never_begun(run, resume):
            trainer = build_fit_trainer(cli, data, settings, run, resume, predictions, signals, validates=validates)
            check_evaluation(trainer, {split: data.num_eval_batches(split, trainer.world_size) for split in SPLITS[1:]})
            remark_on_memory(trainer, data)
        recorder = callbacks_of(trainer, RunRecorder)[0]
        with (
            explained("fit", run),
            discarded_if_never_begun(run, resume, recorder, trainer.loggers),
            of_users_objects(recorder),
        ):
            if resume is None or not resume.is_fully_trained(settings.trainer):
                train(trainer, model, data, cli.settings.ckpt_path, resume)
                report_short_ending(trainer, run)
            else:
                report_ending(resume, settings.trainer)
                if run.has_all_results(validates=validates):
                    make_report(run, is_short=True)
                    return run
            evaluate_best_checkpoint(trainer, model, data, run, settings.trainer, validates=validates)
            predictions.report()
        return run


def remark_on_few(num_val: int) -> None:
    """Say how uncertain the accuracy of a small validation split is."""
    if num_val < _FEW_IMAGES:
        remark(
            f"remark: only {plural(num_val, 'validation image')} to choose the best epoch by: a standard error of up "
            f"to {percent(0.5 / num_val**0.5, 0)} of val/acc."
        )


def remark_on_memory(trainer: pl.Trainer, data: ImageDataModule) -> None:
    """Say before training that the predictions may need more memory than is free: an upper bound of what they need."""
    limits = {split: getattr(trainer, f"limit_{split}_batches") for split in SPLITS[1:]}
    whole = [split for split, limit in limits.items() if isinstance(limit, float) and limit == 1]
    needed = data.num_classes * sum(_PREDICTION_BYTES[split] * data.num_images(split) for split in whole)
    if exceeds_free(needed):
        of_splits = " and ".join(f"{data.num_images(split):,} {split}" for split in whole)
        flags = " or ".join(f"--data.{split}_fraction" for split in whole if data.is_held_out(split))
        remark(
            f"remark: the predictions of {of_splits} images for {data.num_classes:,} classes need up to "
            f"{needed / 1e9:,.1f} GB of memory at the end, more than is free now"
            f"{f'; a run with a smaller {flags} needs less' if flags else ''}."
        )


def fast_dev_run(cli: TrainingCLI, model: ImageClassifier, data: ImageDataModule, settings: Namespace) -> None:
    """Train, validate and test a few batches, and write nothing."""
    model.prepare(data)
    load_initial_weights(cli, model)
    trainer = build_trainer(settings, [], logger=False)
    with explained("fit"):
        trainer.fit(model, datamodule=data)
        trainer.test(model, datamodule=data, verbose=False)
    remark(f"--trainer.fast_dev_run {settings.fast_dev_run}: trained, validated and tested; nothing was written.")


def find_resume(cli: TrainingCLI, run: RunFolder) -> Resume:
    """Find the checkpoint that a run resumes from, and refuse changes of settings that it depends on."""
    trainer = cli.settings.trainer
    if trainer.enable_checkpointing is False:
        raise UserError(
            "--trainer.enable_checkpointing false: what a resumed run trains would not be kept; leave it out, or give "
            "true."
        )
    changes = find_changes(run, cli.config_text)
    resume = Resume(run, stop_point(run), changes)
    is_validated = trainer.limit_val_batches != 0
    if not is_validated and run.best_checkpoint.exists() and not resume.is_fully_trained(trainer):
        raise UserError(
            f"--trainer.limit_val_batches {trainer.limit_val_batches}: without validation {run.best_checkpoint} stays "
            "that of an earlier epoch, and would be tested as the result; give 1.0."
        )
    resume.point.check_length(trainer.max_epochs, trainer.max_steps)
    resume.point.check_changes(resume.changes)
    others = {key: change for key, change in changes.items() if key != "model.tta"}  # which trains nothing
    if "model.tta" in changes and replace(resume, changes=others).is_fully_trained(trainer):
        before, now = changes["model.tta"]
        raise UserError(
            f"--model.tta {now}: nothing is left to train, and the results of {run.path} are with {before}.\n"
            f"To test with it: {command_line('test', run.path, '--model.tta', now)}"
        )
    cli.settings.ckpt_path = str(resume.point.checkpoint)
    return resume


def create_or_resume_run(
    cli: TrainingCLI, model: ImageClassifier, data: ImageDataModule, settings: Namespace, resume: Resume | None
) -> RunFolder:
    """Create the run folder with its config, or return the one to resume.

    Whatever can fail because of the user comes before the folder is created, so that a mistake leaves no empty run.
    """
    if not is_first_process():
        return RunFolder(announced_run(resume.run.path if resume is not None else cli.settings.run_dir))
    if resume is not None:
        run = resume.run
        clean_up(run, resume.point)
        restore_files(run, resume.point, data)
        if reason := split_difference(run, data):
            raise UserError(f"{run.path}: {reason}; a resumed run would train on its validation images.")
    else:
        model.prepare(data)  # loads pretrained weights, which may be missing
        load_initial_weights(cli, model)
        found = apply_lr_finder(cli, model, data, settings.trainer) if cli.settings.tune_lr else None
        if cli.settings.ckpt_path:
            ckpt_path = Path(cli.settings.ckpt_path)
            checkpoint = read_checkpoint(ckpt_path)
            require_resumable(checkpoint, ckpt_path)
            point = StopPoint(ckpt_path, progress_of(checkpoint)[0], checkpoint.get("global_step", 0))
            point.check_rest(settings.trainer.max_epochs, settings.trainer.max_steps)
            if "current_model_state" in checkpoint and not model.ema_decay:
                remark(
                    "remark: --ckpt_path is of a run with EMA: without --model.ema_decay training continues from the "
                    "average, with the optimizer's state of the raw weights."
                )
            if settings.optimizer:
                remark_on_restored(checkpoint, model.configure_optimizers(), settings.optimizer)
        name = config_name(cli.settings.config, cli.model_name)
        run = create_run(RUNS, name, cli.settings.run_dir)
        with discarded_if_never_begun(run, resume):
            write_text_durably(run.config, cli.config_text)
            if found is not None:
                write_lr_range(run, found)
    if data.skipped_files:
        write_skipped_files(run.skipped_files, data.skipped_files)
    announce_run(run.path)
    return run


def remark_on_restored(checkpoint: Mapping[str, Any], made: Any, given: Namespace) -> None:
    """Say which arguments of --optimizer a checkpoint replaces: Lightning restores its groups of parameters.

    Args:
        checkpoint: That of --ckpt_path.
        made: What `configure_optimizers` returns.
        given: The settings of --optimizer.
    """
    optimizer = made["optimizer"] if isinstance(made, dict) else made[0][0] if isinstance(made, tuple) else made
    (now, *_), states = optimizer.param_groups, checkpoint.get("optimizer_states") or [{}]
    (then, *_) = states[0].get("param_groups") or [{}]
    cycled = {"momentum", "betas"} if "base_momentum" in now else set()
    for name in sorted({*(given.as_dict().get("init_args") or {})} - cycled):
        key = "initial_lr" if name == "lr" and "initial_lr" in now else name  # a schedule changes lr
        if key in now and key in then and now[key] != then[key]:
            remark(
                f"remark: --optimizer.{name} {now[key]} is not used: --ckpt_path restores {then[key]}; "
                "--init_weights takes the weights alone."
            )


@contextlib.contextmanager
def discarded_if_never_begun(
    run: RunFolder, resume: Resume | None, recorder: RunRecorder | None = None, loggers: Sequence[Logger] = ()
) -> Iterator[None]:
    """Remove a new run that ends before its first epoch, or by a `UserError` before its first metrics and checkpoint.

    Folders that `loggers` have made go with it.
    """
    is_new = resume is None and is_first_process()
    folders = [Path(logger.log_dir) for logger in loggers if logger.log_dir] if is_new else []
    new = [folder for folder in folders if not folder.exists()]
    missing = {folder: [each for each in folder.parents if not each.exists()] for folder in new}
    try:
        yield
    except BaseException as error:
        began = recorder is not None and recorder.has_begun and not isinstance(error, UserError)
        if is_new and not (began or run.metrics_csv.exists() or run.resumed_checkpoint.exists()):
            discard_run(run)
            for folder, parents in missing.items():
                shutil.rmtree(folder, ignore_errors=True)
                remove_empty(parents)
        raise


def build_fit_trainer(
    cli: TrainingCLI,
    data: ImageDataModule,
    settings: Namespace,
    run: RunFolder,
    resume: Resume | None,
    predictions: PredictionWriter,
    signals: StopSignals,
    *,
    validates: bool,
) -> pl.Trainer:
    """Return the Trainer with the callbacks that write the run's files.

    `ImageClassifier.configure_callbacks` adds those of the model: convolutions, NaN guard, EMA, whitening stem
    and resumed settings.
    """
    keep_in_run(as_list(settings.trainer.callbacks), run)
    record = resume.point.record(resume.changes) if resume is not None else None
    changed = cli.config_text if resume is not None and resume.changes else None
    callbacks: list[pl.Callback] = [
        predictions,
        ResumeState(),
        RunRecorder(run, record, changed),
        Dashboard(data.class_names, portable(cli.settings.as_dict())),
    ]
    if validates:
        callbacks.append(settings.early_stopping)
    else:
        settings.trainer.limit_val_batches = 0  # Lightning warns of loaders of length zero
    if settings.trainer.enable_checkpointing is not False:
        # Best before last, so that the last checkpoint knows the best of its own epoch.
        callbacks += [BestCheckpoint(run)] if validates else []
        callbacks.append(LastCheckpoint(run, settings.checkpoint, signals))
    board = None
    if settings.trainer.logger in (None, True):
        board = board_for(run, resume.point.steps_done if resume is not None else None)
    trainer = build_trainer(settings.trainer, [*callbacks, added := AddedCallbacks(run)], logger=board, run=run)
    added.known = tuple(callbacks_of(trainer, pl.Callback))
    return trainer


class AddedCallbacks(pl.Callback):
    """Checks the callbacks that a subclass adds in `configure_callbacks`, as those of --trainer.callbacks are."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.known = run, tuple[pl.Callback, ...]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check them before they are set up."""
        added = [each for each in callbacks_of(trainer, pl.Callback) if each not in self.known]
        if stage == "fit":
            has_own_schedule = not getattr(pl_module, "plans_schedule", False)
            added = [each for each in added if not type(each).__module__.startswith("cifar_lightning.")]
            check_kinds(map(type, added), "configure_callbacks:", has_own_schedule=has_own_schedule)
            keep_in_run(added, self.run, "configure_callbacks:")


def refuse_used(callbacks: Sequence[pl.Callback]) -> None:
    """Raise for a callback of an earlier run: it has the count of that run, or would delete its checkpoints."""
    for callback in callbacks:
        has_saved = isinstance(callback, ModelCheckpoint) and callback.best_model_path
        has_counted = isinstance(callback, EarlyStopping) and callback.wait_count
        if has_saved or has_counted:
            raise UserError(f"callbacks: {type(callback).__name__} was used in another run; make one for each fit.")


def keep_in_run(callbacks: Sequence[pl.Callback], run: RunFolder, given_by: str = "--trainer.callbacks") -> None:
    """Have the user's checkpoint callbacks save into the run, unless they have a folder: Lightning's is outside.

    EarlyStopping by a training metric checks it where it is logged, at the end of the epoch, also where an epoch is
    validated several times.

    Raises:
        UserError: One would overwrite a checkpoint of the run, such as best.ckpt, which is tested.
    """
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.monitor in TRAIN_METRICS:
            callback._check_on_train_epoch_end = callback._check_on_train_epoch_end is not False
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is None:
            callback.dirpath = str(run.checkpoints)
        if os.path.realpath(callback.dirpath) != os.path.realpath(run.checkpoints):
            continue
        if callback.filename in [path.stem for path in run.resumed_checkpoints]:
            raise UserError(
                f"{given_by} ModelCheckpoint: filename {callback.filename}: the run writes a checkpoint of "
                "this name; give another one, or a dirpath."
            )
        if callback.save_last:  # by stricter rules
            remark(f"remark: {given_by} ModelCheckpoint: save_last is not used; the run has a last.ckpt.")
            callback.save_last = False


def train(
    trainer: pl.Trainer, model: ImageClassifier, data: ImageDataModule, ckpt_path: str | None, resume: Resume | None
) -> None:
    """Train; a resumed run's tables are first cut back to its checkpoint."""
    if resume is not None and is_first_process():
        for path in (resume.run.metrics_csv, resume.run.timing_csv):
            MetricsTable(path).cut_after(resume.point.epochs_done - 1)  # they count from 0
        resume.run.discard_results()  # of the weights before
        schedule = model.schedule_settings.name if model.plans_schedule else None
        print("\n".join(resume.point.describe(resume.run, resume.changes, schedule)))
    if trainer.precision == "16-mixed" and model.automatic_optimization:
        # The scaler skips steps until its scale fits, often the first, which torch takes for a wrong order of calls.
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
    # weights_only: a checkpoint is data and must not be able to run code.
    with restoring(ckpt_path):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)


def report_short_ending(trainer: pl.Trainer, run: RunFolder) -> None:
    """Print what ended training before its planned steps."""
    if trainer.is_global_zero and is_short(ended := read_environment(run.environment).get("ended")):
        print(f"Training ended {ending_text(ended)}; it continues with: {run.resume_command}")


def report_ending(resume: Resume, trainer: Namespace) -> None:
    """Print what ended a run with nothing left to train, and write it where the process was killed before it could."""
    if not is_first_process():
        return
    ended = read_environment(resume.run.environment).get("ended")
    if not ending_text(ended):
        lrs = read_checkpoint(resume.point.checkpoint).get(EPOCH_SO_FAR, {}).get("lrs", {})
        write_learning_rates(resume.run, lrs)
        write_ending(resume.run, ended := resume.point.ending(trainer.max_epochs, trainer.max_steps))
    print(
        f"{resume.run.path}: training ended {ending_text(ended)}; nothing is left to train. More: "
        f"{resume.run.resume_command} with --epochs or --trainer.max_steps"
    )


def evaluate_best_checkpoint(
    trainer: pl.Trainer,
    model: ImageClassifier,
    data: ImageDataModule,
    run: RunFolder,
    settings: Namespace,
    *,
    validates: bool,
) -> None:
    """Test the best checkpoint once; its predictions for validation and test images are written into the run."""
    best = run.tested_checkpoint
    if not best.exists() and settings.enable_checkpointing is not False:
        raise UserError(f"{run.checkpoints}: no checkpoint could be written; is the folder writable?")
    chosen: dict[str, Any] = {"ckpt_path": best, "weights_only": True} if best.exists() else {}
    with restoring(best):
        if validates:
            # For the predictions alone: another point on the curve of val/acc would be that of another epoch.
            loggers, trainer.loggers = trainer.loggers, []
            trainer.validate(model, datamodule=data, verbose=False, **chosen)
            trainer.loggers = loggers
        trainer.test(model, datamodule=data, verbose=False, **chosen)
