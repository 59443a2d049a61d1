"""Loggers: the first batch, per-class accuracy, confusion matrix, mistakes, PR curves and hyperparameters.

All is for TensorBoard; other loggers get hyperparameters, loss and lr by step, and images where they take them.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from google.protobuf.message import DecodeError
from jaxtyping import Float64
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.sampler import Rank
from cifar_lightning.errors import UserError, is_first_process, remark
from cifar_lightning.formatting import object_text, percent
from cifar_lightning.metrics.calibration import softmax
from cifar_lightning.metrics.classification import confusion_matrix, per_class
from cifar_lightning.report.figures import confusion_figure, figure_to_array, images_figure, reliability_figure
from cifar_lightning.report.gallery import confident_mistakes
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.roles import OWN_OPTIMIZER, augmentations
from cifar_lightning.training.module import Batch
from cifar_lightning.training.predictions import logits_of
from cifar_lightning.training.step_count import current_lr
from cifar_lightning.training.trainer_data import training_data

MAX_DRAWINGS = 20  # per run; one takes about a second on a CPU core
_NUM_KEPT = 10_000  # predictions of a validation that is drawn
_BATCH_SHOWN = 32  # images of the first batch
_MISTAKES_SHOWN = 16
_CURVES_SHOWN = 20  # PR curves, of the first classes
_MAX_CLASS_SCALARS = 100  # classes with a scalar each; the accuracies of more are a histogram


# Tags are regular expressions, and TensorBoard keeps this order; that of its TIME SERIES tab is alphabetical, with the
# first two groups open. The groups are therefore train, val, and what sorts after them.
_CHARTS = {"Accuracy": ["val/acc", "train/acc"], "Loss": ["val/loss", "train/loss$"], "Learning rate": ["train/lr"]}
_CHART_OF_CLASSES = {"Accuracy of each class": ["val_acc_of_class/"]}
_WRITTEN_AGAIN = ("_hparams_/", "custom_scalars__config__")  # by a resumed run


class Dashboard(pl.Callback):
    """Adds images, per-class scalars and hyperparameters to the scalars that Lightning logs.

    Scalars of each class, or a histogram of more than 100 classes, are written in each validation; images and PR curves
    at most `MAX_DRAWINGS` times a run, evenly spread and at its end. Of several processes the first one draws: the
    confusion matrix of all, mistakes and PR curves of its own images.

    It works in any `Trainer`. Of a LightningModule other than `ImageClassifier` the predictions of a validation that is
    drawn are taken as `RunReport` takes them; images are drawn where the data is an `ImageDataModule`.

    Args:
        class_names: Names of the classes; by default those of the data module, or numbers.
        config: The config of the run; the important values become columns of the HPARAMS tab. Without it Lightning logs
            the hyperparameters of module and data.
    """

    def __init__(self, class_names: Sequence[str] | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.class_names, self.config = tuple(class_names or ()), config
        self._last_step = 0
        self._drawn_at_step = 0.0  # infinite where nothing can be drawn
        self._is_drawing = False
        self._predictions: list[tuple[Tensor, Tensor]] = []
        self._best: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Draw the run's first batch; log loss and learning rate every `log_every_n_steps`."""
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside the class
        if step == self._last_step or (step != 1 and (not every or step % every)):  # the same step: accumulating
            return
        self._last_step = step
        if not (trainer.loggers and trainer.is_global_zero):
            return
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and getattr(batch[1], "ndim", None) == 1
        if step == 1 and is_pair and image_loggers(trainer) and (data := training_data(trainer)) is not None:
            log_image(trainer, "visuals/batch_as_trained_on", self._draw_batch(data, batch), 0)
        is_known = isinstance(outputs, Mapping) and "loss" in outputs  # not of a step that optimizes by hand
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches if is_known else math.nan
        for logger in trainer.loggers:
            logger.log_metrics({"train/loss_step": loss, "train/lr": current_lr(trainer)}, step)

    def _draw_batch(self, data: ImageDataModule, batch: Batch) -> np.ndarray:
        images, targets = (tensor[:_BATCH_SHOWN].cpu() for tensor in batch)
        assert data.mean is not None
        assert data.std is not None
        pixels = images.float().permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean)
        shown = (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        names = self.class_names if len(self.class_names) == len(data.class_names) else data.class_names
        return figure_to_array(images_figure(shown, [names[target] for target in targets.tolist()]))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have Lightning log no hyperparameters where the config has them, and those of data and Trainer, too."""
        data = training_data(trainer)
        self.class_names = self.class_names or (data.class_names if data is not None else ())
        if self.config is not None:
            pl_module._log_hyperparams = False
        for logger in trainer.loggers:
            if isinstance(logger, RunBoard):
                logger.trainer = trainer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the config; TensorBoard's row of the HPARAMS tab is written after the test, with its metrics.

        Its CUSTOM SCALARS tab has a large chart each for accuracy, loss, learning rate and the classes (up to 100).
        """
        board = summary_writer_of(trainer) if trainer.is_global_zero else None
        if board is not None:
            charts = _CHARTS | (_CHART_OF_CLASSES if len(self.class_names) <= _MAX_CLASS_SCALARS else {})
            board.add_custom_scalars({"Training": {title: ["Multiline", tags] for title, tags in charts.items()}})
        if self.config is None or not (trainer.enable_autolog_hparams and trainer.is_global_zero):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.hparams.update(self.config)  # for its hparams.yaml
            else:
                logger.log_hyperparams(dict(self.config))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count drawings from here, also in a resumed run."""
        self._drawn_at_step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw one validation in each of `MAX_DRAWINGS` equal intervals of the run."""
        self._predictions, self._is_drawing = [], False
        if trainer.state.fn != TrainerFn.FITTING:  # has no training loader to count the steps of, and is not drawn
            return
        total, step = trainer.estimated_stepping_batches, trainer.global_step
        interval, last_drawn = (MAX_DRAWINGS * number // total for number in (step, self._drawn_at_step))
        self._is_drawing = bool(image_loggers(trainer)) and trainer.is_global_zero and interval > last_drawn
        if self._is_drawing:
            self._drawn_at_step = step

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of a validation that is drawn, of the first loader, on the device."""
        if (
            self._is_drawing
            and not dataloader_idx
            and sum(len(targets) for _, targets in self._predictions) < _NUM_KEPT
        ):
            try:
                self._predictions.append((logits_of(pl_module, outputs, batch), batch[1]))
            except UserError as error:  # training continues
                self._is_drawing, self._drawn_at_step = False, math.inf
                remark(f"Dashboard draws no predictions: {error}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log each class's accuracy and draw; of the validation after training keep the best checkpoint's metrics."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._best = {name: float(value) for name, value in trainer.callback_metrics.items()}
            return
        confusion = getattr(pl_module, "val_confusion", None)
        confusion = confusion.cpu() if isinstance(confusion, Tensor) else None  # a metric may have that name
        if not trainer.is_global_zero or (confusion is None and not self._is_drawing):
            return
        matrix, board = self._confusion() if confusion is None else confusion.numpy(), summary_writer_of(trainer)
        self.class_names = self.class_names or tuple(map(str, range(len(matrix))))
        if len(self.class_names) != len(matrix):
            if math.isfinite(self._drawn_at_step):
                remark(f"Dashboard draws no predictions: {len(self.class_names)} class names for {len(matrix)} logits.")
            self._is_drawing, self._drawn_at_step = False, math.inf
            return
        if board is not None:
            self._log_classes(board, per_class(matrix).recall, trainer.global_step)
        if self._is_drawing:
            image = figure_to_array(confusion_figure(matrix, self.class_names))
            log_image(trainer, "visuals/confusion_matrix", image, trainer.global_step)
            self._draw_predictions(trainer, board)

    def _log_classes(self, board: Any, recall: Float64[np.ndarray, " classes"], step: int) -> None:
        if len(recall) <= _MAX_CLASS_SCALARS:
            for tag, value in zip(tags_of(self.class_names), recall, strict=True):
                board.add_scalar(f"val_acc_of_class/{tag}", value, step)
        elif len(known := recall[~np.isnan(recall)]):  # NaN of a class without images
            board.add_histogram("val_acc_of_classes", known, step, bins=np.linspace(0, 1, 31))

    def _confusion(self) -> np.ndarray:
        logits, targets = (torch.cat(tensors).cpu() for tensors in zip(*self._predictions, strict=True))
        return confusion_matrix(targets.numpy(), logits.argmax(1).numpy(), logits.shape[1])

    def _draw_predictions(self, trainer: pl.Trainer, board: Any) -> None:
        logits, targets = (torch.cat(tensors).cpu().numpy() for tensors in zip(*self._predictions, strict=True))
        self._predictions = []
        logits, step = logits.astype(np.float32), trainer.global_step
        if not np.isfinite(logits).all():  # diverged
            return
        probs = softmax(logits)
        log_image(trainer, "visuals/reliability", figure_to_array(reliability_figure(probs, targets)), step)
        for index, tag in enumerate(tags_of(self.class_names)[:_CURVES_SHOWN]) if board else ():
            board.add_pr_curve(f"pr_of_class/{tag}", targets == index, probs[:, index], step)
        worst = confident_mistakes(logits, targets)[:_MISTAKES_SHOWN]
        data = training_data(trainer)
        if not len(worst) or data is None:
            return
        images = data.images("val", data.rank_positions("val", Rank(0, trainer.world_size))[worst])
        names = [(self.class_names[targets[p]], self.class_names[probs[p].argmax()]) for p in worst]
        titles = [
            f"{true}\nas {pred} {percent(probs[p].max(), 0)}" for p, (true, pred) in zip(worst, names, strict=True)
        ]
        log_image(trainer, "visuals/most_confident_mistakes", figure_to_array(images_figure(images, titles)), step)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the run's row of the HPARAMS tab: metrics of the checkpoint with the best val/acc."""
        board = summary_writer_of(trainer)
        if board is None or not trainer.is_global_zero:
            return
        metrics: dict[str, float] = {}
        if "val/acc" in self._best:  # the first column
            metrics["val_best/acc"] = self._best["val/acc"]
        logged = trainer.callback_metrics
        of_test = {"val_best/test_acc": "test/acc", "val_best/test_loss": "test/loss"}
        metrics |= {tag: float(logged[name]) for tag, name in of_test.items() if name in logged}
        for tag, value in metrics.items():
            board.add_scalar(tag, value, trainer.global_step)
        if self.config is None or not trainer.enable_autolog_hparams:
            return
        # `SummaryWriter.add_hparams` writes the same into a folder below the run.
        for summary in hparams(hyperparameters_of(self.config), metrics):
            board.file_writer.add_summary(summary)
        board.flush()


def board_for(run: RunFolder, steps_done: int | None) -> "RunBoard | Literal[False]":
    """Return the logger of a run, with the events up to `steps_done` of a resumed one.

    False where TensorBoard cannot write, since it takes only UTF-8 names.
    """
    try:
        str(run.path).encode()
    except UnicodeEncodeError:
        print("TensorBoard cannot write into a folder whose name is not UTF-8; it is off in this run.")
        return False
    # A TensorBoard that is open forgets what it has read, from step 0 on.
    board = RunBoard(run, **({} if steps_done is None else {"purge_step": 0}))
    if steps_done is not None and is_first_process():
        board.take_over(tuple(run.path.glob(run.tensorboard)), steps_done)
    return board


class RunBoard(TensorBoardLogger):
    """Writes TensorBoard events into one file of the run, without hparams.yaml, which would repeat config.yaml."""

    trainer: pl.Trainer | None = None
    """Its steps, which are those of metrics.csv, replace Lightning's, which count the last one from 0."""

    def __init__(self, run: RunFolder, **kwargs: Any) -> None:
        super().__init__(save_dir=run.path, name="", version="", default_hp_metric=False, **kwargs)

    def take_over(self, files: Sequence[Path], steps_done: int) -> None:
        """Copy the events up to a step into the file of this logger, and remove the files."""
        for file in files:
            with contextlib.suppress(DecodeError):  # damaged from here on
                for record in RawEventFileLoader(str(file)).Load():
                    event = Event.FromString(record)
                    tags = (value.tag for value in event.summary.value)
                    if event.step <= steps_done and not all(tag.startswith(_WRITTEN_AGAIN) for tag in tags):
                        self.experiment.file_writer.event_writer.add_event(event)
        self.experiment.flush()
        for file in files:
            file.unlink()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all but Lightning's epoch, the lr, which the Dashboard logs by step, and test metrics, likewise."""
        if self.trainer is not None and step == self.trainer.fit_loop.epoch_loop._batches_that_stepped:
            step = self.trainer.global_step
        is_left_out = re.compile("epoch|lr|test/.*").fullmatch
        super().log_metrics({name: value for name, value in metrics.items() if not is_left_out(name)}, step)

    def save(self) -> None:
        """Flush the events; write no hparams.yaml."""
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        """Flush the events; a closed writer would open a second file for the test."""
        if self._experiment is not None:
            self.save()


def summary_writer_of(trainer: pl.Trainer) -> Any:
    """Return the SummaryWriter of the first TensorBoard logger, None without one."""
    boards = (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    return next(boards, None)


def image_loggers(trainer: pl.Trainer) -> list[Logger]:
    """Return the loggers that take images: TensorBoard's, MLflow's, and those with `log_image`, as WandbLogger."""
    kinds = (TensorBoardLogger, MLFlowLogger)
    return [logger for logger in trainer.loggers if isinstance(logger, kinds) or hasattr(logger, "log_image")]


def log_image(trainer: pl.Trainer, tag: str, image: np.ndarray, step: int) -> None:
    """Log an image (height, width, 3), uint8, to the loggers that take images."""
    for logger in image_loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, image, step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, image, key=tag, step=step)
        else:
            logger.log_image(key=tag, images=[image], step=step)  # type: ignore[attr-defined]  # not of every logger


def tags_of(class_names: Sequence[str]) -> list[str]:
    """Return a unique tag for each class, of the characters that TensorBoard takes: letters, digits, dots, dashes."""
    tags = [re.sub(r"[^-\w.]", "_", name) for name in class_names]
    while max((times := Counter(tags)).values(), default=0) > 1:  # again where a class has the name that this makes
        tags = [f"{index}_{tag}" if times[tag] > 1 else tag for index, tag in enumerate(tags)]
    return tags


def hyperparameters_of(config: Mapping[str, Any]) -> dict[str, bool | str | float | int]:
    """Return the values that runs are compared by; unset ones are left out.

    TensorBoard sorts them by name and shows the first five.
    """
    model, data, trainer = (config.get(group) or {} for group in ("model", "data", "trainer"))
    of_model = ("label_smoothing", "lr", "optimizer", "pct_start", "schedule", "sgd_lr", "weight_decay")
    own = {name: object_text(config[name]) for name in OWN_OPTIMIZER if config.get(name)}
    if own:
        given = config["optimizer"].get("init_args") or {}
        model = {**model, "schedule": None, "lr": given.get("lr"), "weight_decay": given.get("weight_decay")}
    values = {
        "batch_size": data.get("batch_size"),
        "epochs": trainer.get("max_epochs"),
        "model": model.get("name") or config.get("model_class"),
        "dataset": data.get("dataset"),
        "precision": trainer.get("precision"),
        "random_augmentation": ", ".join(augmentations(data)) or None,
        "seed": config.get("seed_everything"),
        **{name: model.get(name) for name in of_model},
        **own,
        **{name: model.get(name) or None for name in ("cutmix", "ema_decay", "mixup")},  # 0 is off
    }
    return {
        name: value if isinstance(value, bool | str | float | int) else str(value)
        for name, value in values.items()
        if value is not None
    }
