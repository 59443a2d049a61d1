"""Checks that model and data agree: number of classes, shape of the logits, batch and image sizes."""

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jaxtyping import Float
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn, optim

from cifar_lightning.data.memory import is_out_of_memory
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import clipped, suggest
from cifar_lightning.models.registry import is_built_by_name
from cifar_lightning.models.stems import fails_on_single_image, input_error
from cifar_lightning.settings.import_path import is_import_path
from cifar_lightning.training.step_count import takes_last_batch
from cifar_lightning.training.trainer_callbacks import callbacks_of
from cifar_lightning.training.trainer_data import training_data

TRAIN_METRICS = ("train/loss", "train/acc", "lr")
VAL_METRICS = ("val/loss", "val/acc", "val/f1", "val/ece")
# Words of errors about shapes; error_messages explains that of a view.
_OF_SHAPES = re.compile(r"(?!.*view size).*(shape|size|channels|height|width)", re.IGNORECASE)
_IN_LIBRARY = re.compile(rf"<|.*[/\\](site|dist)-packages[/\\]|{re.escape(str(Path(__file__).parents[1]))}")


def validated_by(module: Any) -> tuple[str, ...]:
    """Return the metrics that a validation of a module logs."""
    return (*VAL_METRICS, *(f"val/{name}" for name in getattr(module, "further_metrics", ())))


def check_logits(logits: Any, num_images: int, num_classes: int) -> None:
    """Raise unless a model's output is a tensor of logits (images, classes); reads shapes alone, without a sync."""
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the model returns a {type(logits).__name__}, not a tensor of raw logits; "
            "wrap it in an nn.Module whose forward returns the logits alone."
        )
    if logits.shape != (num_images, num_classes):
        raise UserError(
            f"the model returns {tuple(logits.shape)} for {num_images} images of {num_classes} classes, not "
            f"raw logits ({num_images}, {num_classes}); its last layer must return one logit per class and image."
        )


def misfit_of(error: RuntimeError, model: nn.Module, images: Any) -> UserError | None:
    """Return an error about shapes that a model raised as one that names the images; None of any other."""
    reason = str(error).strip().partition("\n")[0]  # torch appends its C++ stack
    if not isinstance(images, Tensor) or images.ndim != 4 or is_out_of_memory(error) or not _OF_SHAPES.match(reason):
        return None
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not _IN_LIBRARY.match(line.filename)]
    where = f" in {Path(lines[-1].filename).name}, line {lines[-1].lineno}" if lines else ""
    return UserError(
        f"the model, {type(model).__name__}, does not fit {images.shape[1]}-channel images of {images.shape[-1]} "
        f"pixels ({clipped(reason, 200)}{where}); change it, or --data.image_size."
    )


def are_probabilities(outputs: Float[Tensor, "batch classes"]) -> bool:
    """Return whether a model's outputs are those of a Softmax, and not raw logits; waits for the device."""
    outputs = outputs.detach().float()
    return bool(((outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() < 0.01)).all())


def are_log_probs(outputs: Float[Tensor, "batch classes"]) -> bool:
    """Return whether a model's outputs are those of a LogSoftmax, also in half precision; waits for the device."""
    return not bool((outputs.detach().float().logsumexp(1).abs() > 0.1).any())


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a pair of images and labels."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)


def unpack_batch(batch: Any) -> tuple[Any, Tensor]:
    """Return the images and labels of a batch; labels of other integers, which no loss takes, become int64.

    Raises:
        UserError: It is no pair of them, as where a loader gives dicts, or several loaders are given.
    """
    if not is_labelled(batch):
        kind = f"a {type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list | dict) else ''}"
        raise UserError(
            f"a batch is {kind}, not (images, labels); give a loader of such pairs, or override training_step, "
            "validation_step and test_step."
        )
    images, labels = batch
    return images, labels if labels.is_floating_point() else labels.long()


def check_classes(trainer: pl.Trainer, num_classes: int, in_channels: int) -> None:
    """Raise if the data has another number of classes or channels than the model."""
    data = training_data(trainer)
    if data is not None and data.num_classes != num_classes:
        raise UserError(
            f"num_classes {num_classes}: the data has {data.num_classes} classes; "
            f"give ImageClassifier(num_classes={data.num_classes})."
        )
    if data is not None and data.in_channels != in_channels:
        raise UserError(
            f"in_channels {in_channels}: the data has {data.in_channels}; "
            f"give ImageClassifier(in_channels={data.in_channels})."
        )


def check_image_size(trainer: pl.Trainer, model: nn.Module, architecture: Mapping[str, Any]) -> None:
    """Print a remark if a model made by name has other layers for images of the data's size, or cannot take them.

    Args:
        trainer: Attached to its data.
        model: It may have been changed after it was made; it is then not compared.
        architecture: The arguments of `build_model`; the name is None for a model of one's own.
    """
    data, name, made_for = training_data(trainer), architecture["name"], architecture["image_size"]
    if data is None or name is None or is_import_path(name) or data.image_size == made_for:
        return
    of_data = {**architecture, "image_size": data.image_size}
    fits = is_built_by_name(model, of_data) and not input_error(model, data.image_size, in_channels=data.in_channels)
    if not fits and is_built_by_name(model, architecture):
        remark(
            f"warning: image_size {made_for}: the data has images of {data.image_size} pixels, for which {name} has "
            f"other layers; give ImageClassifier(image_size={data.image_size})."
        )


def check_evaluated_classes(trainer: pl.Trainer, num_classes: int) -> None:
    """Raise if the data that is evaluated has classes that the model does not know."""
    data = training_data(trainer)
    if data is not None and data.num_classes > num_classes:
        raise UserError(
            f"num_classes {num_classes}: the data has {data.num_classes} classes; "
            "evaluate a model on data of its own classes."
        )


def check_loaders(trainer: pl.Trainer, stage: str, num_evaluated: int) -> None:
    """Raise if the metrics of an evaluation are of several loaders; Lightning would log them as those of each.

    Args:
        trainer: At the end of the evaluation.
        stage: val or test.
        num_evaluated: Batches in the metrics. A subclass may evaluate the others on its own.
    """
    in_loaders = trainer.num_test_batches if stage == "test" else trainer.num_val_batches
    if trainer.sanity_checking:
        in_loaders = trainer.num_sanity_val_batches
    if len(in_loaders) > 1 and num_evaluated > max(in_loaders):
        call, step = ("test", "test_step") if stage == "test" else ("validate", "validation_step")
        raise UserError(
            f"{len(in_loaders)} {stage} loaders: their images would be counted together; call trainer.{call} for each, "
            f"or super().{step} for one of them alone."
        )


def check_batches(trainer: pl.Trainer, model: nn.Module) -> None:
    """Raise before the first step if the model's BatchNorm would get a training batch of one image.

    The Trainer is attached to its data. Data that is no `ImageDataModule` is not checked.
    """
    data = training_data(trainer)
    if data is None:
        return
    size, num_ranks = data.batch_size, trainer.world_size
    batches, num_images = data.num_train_batches(num_ranks), data.num_images("train")
    in_last = num_images - (batches - 1) * size * num_ranks
    is_single = size == 1 or (in_last < 2 * num_ranks and takes_last_batch(trainer, batches))
    if not is_single or not fails_on_single_image(model, min(data.train_sizes), data.in_channels):
        return
    if size == 1:
        raise UserError("--batch_size 1: this model's BatchNorm cannot be trained with one image; give 2 or more.")
    spread = f" over {num_ranks} processes" if num_ranks > 1 else ""
    raise UserError(
        f"--batch_size {size}: of {num_images:,} training images the last batch has {in_last}{spread}, and this "
        "model's BatchNorm cannot be trained with one image; give --data.drop_last true, or another --batch_size."
    )


def check_optimizers(trainer: pl.Trainer, model: nn.Module) -> None:
    """Raise if there is no optimizer, or one that fails, or computes wrong gradients, with the Trainer's settings.

    LBFGS flattens weights, and computes the gradients of a step several times: accumulated ones would pile up.
    """
    optimizers = trainer.optimizers
    if not any(optimizer.param_groups for optimizer in optimizers):  # Lightning's stand-in has none
        raise UserError("configure_optimizers returns no optimizer; return one, for all parameters.")
    has_lbfgs = any(isinstance(optimizer, optim.LBFGS) for optimizer in optimizers)
    if has_lbfgs and not all(parameter.is_contiguous() for parameter in model.parameters()):
        raise UserError(
            "--model.memory_format channels_last: LBFGS cannot flatten these weights; "
            "give --model.memory_format contiguous."
        )
    if has_lbfgs and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: LBFGS computes the gradients of a "
            "step several times, and they would pile up; give a larger --batch_size."
        )
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision):
        return
    if has_lbfgs and plugin.scaler is not None:
        raise UserError("--trainer.precision 16-mixed: LBFGS cannot scale gradients; give bf16-mixed or 32-true.")
    # What Lightning asks when it clips the first gradients, also without a scaler, unless the module clips them itself.
    is_clipped = plugin.scaler is not None or not is_overridden("configure_gradient_clipping", trainer.lightning_module)
    is_fused = any(getattr(each, "_step_supports_amp_scaling", False) for each in optimizers)
    if trainer.gradient_clip_val and is_clipped and is_fused:
        raise UserError(
            f"--trainer.gradient_clip_val {trainer.gradient_clip_val}: with --trainer.precision {plugin.precision} the "
            "gradients of a fused optimizer cannot be clipped; leave fused out, or give 32-true."
        )


def check_step_counts(trainer: pl.Trainer) -> None:
    """Raise if a callback changes the steps, or the learning rate, that our schedule has been made for."""
    reasons: dict[type, str] = {
        BatchSizeFinder: "the schedule is of the batches before; call Tuner(trainer).scale_batch_size before fit",
        LearningRateFinder: "the schedule would replace what it finds; call Tuner(trainer).lr_find before fit",
        GradientAccumulationScheduler: "the schedule would not reach its end; give Trainer(accumulate_grad_batches=N)",
    }
    for callback in callbacks_of(trainer, pl.Callback):
        if getattr(callback, "_early_exit", False):  # of the Tuner, which does not train
            continue
        if isinstance(callback, GradientAccumulationScheduler) and not callback.going_to_accumulate_grad_batches():
            continue
        for kind, reason in reasons.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__}: {reason}, or override configure_optimizers.")


def check_groups(trainer: pl.Trainer) -> None:
    """Raise if a callback has added parameters to the optimizer that our schedule cannot step, as BaseFinetuning does.

    OneCycleLR reads the learning rates from the groups, the others keep a list of them.
    """
    for config in trainer.lr_scheduler_configs:
        scheduler, groups = config.scheduler, config.scheduler.optimizer.param_groups
        if isinstance(scheduler, optim.lr_scheduler.OneCycleLR):
            is_unknown = not all(groups[0].keys() <= group.keys() for group in groups)
        else:
            is_unknown = len(groups) != len(getattr(scheduler, "base_lrs", groups))
        if is_unknown:
            raise UserError(
                "configure_optimizers: the schedule does not know the parameters that a callback has added to the "
                "optimizer; freeze them by ImageClassifier(freeze=..., unfreeze_epoch=...), or override "
                "configure_optimizers."
            )


def check_schedules(trainer: pl.Trainer, num_steps: Callable[[], int]) -> None:
    """Raise if a schedule of one's own ends before the run, or needs a metric before it is logged.

    Args:
        trainer: At its start.
        num_steps: Returns the steps of the schedule, also those before a resume.
    """
    for config in trainer.lr_scheduler_configs:
        scheduler, is_per_step = config.scheduler, config.interval == "step"
        if config.reduce_on_plateau and is_per_step and config.monitor in (*TRAIN_METRICS, *VAL_METRICS):
            raise UserError(
                f"ReduceLROnPlateau with interval step: {config.monitor} is logged once an epoch; give interval epoch."
            )
        if config.reduce_on_plateau and not is_per_step and config.strict and _steps_before_validation(trainer, config):
            raise UserError(
                f"--trainer.val_check_interval {trainer.val_check_interval}: ReduceLROnPlateau monitors "
                f"{config.monitor} after {trainer.num_training_batches * config.frequency} batches, before the first "
                "validation; give at most as many."
            )
        max_epochs = trainer.max_epochs or -1
        is_known = max_epochs + trainer.max_steps > -2 if is_per_step else trainer.max_steps == -1 < max_epochs
        if isinstance(scheduler, optim.lr_scheduler.OneCycleLR) and is_known:
            num_calls = (num_steps() if is_per_step else max_epochs) // config.frequency
            if num_calls > scheduler.total_steps:
                way_out = "give fewer --epochs" if scheduler.last_epoch > 0 else f"give total_steps={num_calls}"
                raise UserError(
                    f"OneCycleLR: ends after total_steps={scheduler.total_steps}, and the run has {num_calls} "
                    f"{'steps' if is_per_step else 'epochs'}; {way_out}."
                )


def _steps_before_validation(trainer: pl.Trainer, config: Any) -> bool:
    """Whether a schedule steps at the end of an epoch that has no validation yet, as they are counted over epochs."""
    # Lightning sets no interval for a duration.
    interval = getattr(trainer, "val_check_interval", None) if trainer.check_val_every_n_epoch is None else None
    counts_over_epochs = isinstance(interval, int) and str(config.monitor).startswith("val/")
    return counts_over_epochs and interval > trainer.num_training_batches * config.frequency


def check_sizes(model: nn.Module, train_sizes: Sequence[int], in_channels: int) -> None:
    """Raise if the model cannot take the images of an epoch."""
    for size in sorted({*train_sizes} - {train_sizes[-1]}):
        reason = input_error(model, size, in_channels=in_channels)
        if reason:
            raise UserError(
                f"--data.train_sizes {list(train_sizes)}: the model cannot take images of {size} pixels ({reason})."
            )


def check_monitors(
    callbacks: Sequence[pl.Callback],
    validates: bool,
    module: Any = None,
    plateau: str | None = None,
    early_stopping: str | None = None,
) -> None:
    """Raise if a callback monitors a metric that is not logged; callbacks and modules of one's own may log others.

    Args:
        callbacks: The user's.
        validates: Whether the metrics of a validation are logged.
        module: The LightningModule.
        plateau: What --lr_scheduler monitors.
        early_stopping: What --early_stopping monitors.
    """
    logged = (*TRAIN_METRICS, *validated_by(module)) if all(map(is_of_a_library, (*callbacks, module))) else None
    monitors = [(f"--trainer.callbacks {type(each).__name__}", getattr(each, "monitor", None)) for each in callbacks]
    for flag, given in [*monitors, ("--lr_scheduler", plateau), ("--early_stopping", early_stopping)]:
        if given is None:  # ModelCheckpoint's default
            continue
        monitor = str(given)
        if flag == "--early_stopping" and not monitor.startswith("val/"):
            of_validation = validated_by(module)
            raise UserError(
                f"{flag}.monitor {clipped(monitor)}: not a metric of the validation; "
                f"one of {', '.join(of_validation)}.{suggest(monitor, of_validation)}"
            )
        if monitor.startswith("val/") and not validates:
            raise UserError(
                f"{flag}: monitors {monitor}, but this run does not validate.\n"
                "Hold images out (--data.val_fraction 0.1, --trainer.limit_val_batches above 0), or remove it."
            )
        if logged is not None and monitor not in logged:
            raise UserError(
                f"{flag}: monitors {clipped(monitor)}, which is not logged; "
                f"one of {', '.join(logged)}.{suggest(monitor, logged)}"
            )


def is_of_a_library(each: Any) -> bool:
    """Whether an object is of a class of Lightning or of this package, or None."""
    return each is None or type(each).__module__.startswith(("lightning.", "pytorch_lightning.", "cifar_lightning."))
