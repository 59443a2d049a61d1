"""validate, test and predict: a checkpoint's metrics and predictions."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cifar_lightning.checkpoints.resume import split_difference
from cifar_lightning.cli.flags import config_tree
from cifar_lightning.cli.lightning_cli import PythonObjects, TrainingCLI, build_trainer, prepare_data
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.files import check_output
from cifar_lightning.formatting import plural
from cifar_lightning.report.terminal import print_validation
from cifar_lightning.runs.contents import read_config, read_split
from cifar_lightning.runs.folder import RunFolder, open_run, refuse_file_of_run, run_of
from cifar_lightning.settings.roles import is_object_name
from cifar_lightning.settings.safe_yaml import read_yaml
from cifar_lightning.training.error_messages import restoring
from cifar_lightning.training.predictions import PredictionWriter
from cifar_lightning.training.step_count import check_evaluation


def evaluate(command: str, arguments: Sequence[str], objects: PythonObjects | None = None) -> PredictionWriter:
    """Evaluate a checkpoint; its run's files are updated where they are of this checkpoint and these images."""
    cli = TrainingCLI(command, arguments, objects)
    output = Path(cli.settings.output) if cli.settings.output else None
    if output is not None:
        if output.suffix.lower() not in (".csv", ".npz"):
            raise UserError(f"--output {output}: give a .csv or an .npz.")
        check_output(output, force=True)
        refuse_file_of_run(output, "predictions.npz", "predictions.csv")
    _leave_out_what_writes(cli, arguments)
    model, data, settings = cli.instantiate()
    prepare_data(data, model)
    _refuse_trained_images(command, Path(settings.ckpt_path), data, cli.settings.data)
    run = find_run(command, Path(settings.ckpt_path), data, output, cli.settings.model.get("tta"))
    predictions = PredictionWriter(run, output)
    trainer = build_trainer(settings.trainer, [predictions], logger=False)
    # weights_only: a checkpoint is data and must not be able to run code.
    common: dict[str, Any] = {"datamodule": data, "ckpt_path": settings.ckpt_path, "weights_only": True}
    quiet = {"return_predictions": False} if command == "predict" else {"verbose": False}
    lock = run.lock if run is not None else None
    with lock or contextlib.nullcontext(), restoring(settings.ckpt_path):
        if command == "validate":
            check_validation(trainer, data)
        getattr(trainer, command)(model, **quiet, **common)
        if command == "test":
            predictions.report()
    if trainer.is_global_zero and command == "predict" and predictions.num_written:
        print(f"Logits and probabilities of {plural(predictions.num_written, 'test image')}: {predictions.written_to}")
    elif trainer.is_global_zero and command == "predict":
        print("Give --output FILE for the predictions of some images.")
    elif trainer.is_global_zero and command == "validate":
        print_validation({name: float(value) for name, value in trainer.callback_metrics.items()})
    return predictions


def _leave_out_what_writes(cli: TrainingCLI, arguments: Sequence[str]) -> None:
    """Leave out logger and profiler of a run's config, but for typed ones.

    They are of the run's training: made again, a CSVLogger deletes the metrics of the same version, and W&B begins
    another run. A run of others would choose where they write.
    """
    run = run_of(Path(cli.settings.ckpt_path))
    configs = [os.path.realpath(flag.partition("=")[2]) for flag in arguments if flag.startswith("--config=")]
    groups = [flag.partition("=")[2] for flag in arguments if flag.startswith("--trainer=")]
    of_groups = [config_tree(Path(text)) if os.path.isfile(text) else read_yaml(text) for text in groups]
    for name in ("logger", "profiler"):
        is_typed = any(flag.startswith(f"--trainer.{name}") for flag in arguments) or any(
            isinstance(tree, dict) and name in tree for tree in of_groups
        )
        if run is not None and configs == [os.path.realpath(run.config)] and not is_typed:
            cli.settings.trainer[name] = None


def _refuse_trained_images(command: str, checkpoint: Path, data: ImageDataModule, settings: Any) -> None:
    """Refuse a split that is drawn again from the images of the run, which was trained on most of them.

    Equal indices count as equal images: another version of Pillow may decode the same files to other pixels.

    Raises:
        UserError: The data set, its root and its labels are those of the run, and the indices of the split are not.
    """
    run = run_of(checkpoint)
    if run is None or is_object_name(settings.get("dataset")):
        return
    now = data.split_summary()
    split, is_drawn = ("val", now.get("val_from") == "train") if command == "validate" else ("test", "test" in now)
    if not is_drawn or not now[split]:
        return
    before, theirs = dict[str, Any](), dict[str, Any]()
    with contextlib.suppress(UserError):  # damaged
        before = read_split(run.split)
        theirs = read_config(run.config).get("data") or {}
    given = [
        [os.path.realpath(str(each.get(name))) for name in ("dataset", "root", "labels")] for each in (theirs, settings)
    ]
    if theirs and given[0] == given[1] and before.get(split) != now[split]:
        raise UserError(
            f"{command}: the images in {settings.get('root')}, or their split, are not those of {run.path}, which was "
            "trained on some that would be drawn.\nGive the images and --data flags of the run, or another --data.root."
        )


def check_validation(trainer: pl.Trainer, data: ImageDataModule) -> None:
    """Refuse to validate on no batch: on 0, as a run without validations has it in its config, or on a fraction."""
    if trainer.limit_val_batches == 0:
        raise UserError(
            "--trainer.limit_val_batches 0: leaves nothing to validate on; give --trainer.limit_val_batches 1.0."
        )
    check_evaluation(trainer, {"val": data.num_eval_batches("val", trainer.world_size)})


def find_run(
    command: str, checkpoint: Path, data: ImageDataModule, output: Path | None, tta: str | None = None
) -> RunFolder | None:
    """Return the run that a checkpoint lies in, to write its predictions into; None if its files are of other images.

    Nor is it returned where its config has another `tta`, which its report would name; None is not compared.

    Raises:
        UserError: There is nothing to validate on, or `predict` has no file to write.
    """
    run = run_of(checkpoint)
    if command == "validate" and not data.num_images("val"):
        raise UserError("validate: --data.val_fraction 0 held out no images; there is nothing to validate on.")
    if output:
        return None
    reason = "not in a run folder"
    if run is not None and run.split.exists():
        reason = split_difference(run, data)
        if not reason and checkpoint.name != run.tested_checkpoint.name:
            reason = f"its files are not of {checkpoint.name}"
        if not reason and tta is not None and tta != (theirs := _tta_of(run, tta)):
            reason = f"its results are with --model.tta {theirs}, not {tta}"
        if not reason and not run.is_writable:
            reason = "the folder cannot be written"
        if not reason:
            return open_run(run.path, lock=is_first_process())
    if command == "predict":
        raise UserError(f"predict: {checkpoint}: {reason}; give --output FILE for the predictions.")
    if run is not None and run.split.exists():
        print(f"{run.path}: {reason}, so its files stay as they are.")
    return None


def _tta_of(run: RunFolder, default: str) -> Any:
    """Return the tta of a run's config; a class of one's own may set it itself, and a config may be damaged."""
    with contextlib.suppress(UserError):
        return (read_config(run.config).get("model") or {}).get("tta", default)
    return default
