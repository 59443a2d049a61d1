"""ImageClassifier: a network with its loss, metrics, optimiser and schedule, for the Lightning Trainer."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from cifar_lightning.analysis import accuracy, macro_f1
from cifar_lightning.errors import UserError
from cifar_lightning.guard import LossGuard
from cifar_lightning.limits import check_limits
from cifar_lightning.models import build_model
from cifar_lightning.optim import Muon, OptimizerName, build_optimizer, one_cycle, settings_of
from cifar_lightning.weights import plain

Batch = tuple[Tensor, Tensor] | list[Tensor]
"""Images and targets; PyTorch's own DataLoader makes a list of them."""


class ImageClassifier(pl.LightningModule):
    """Trains a network with label-smoothed cross entropy and OneCycle, and measures it.

    Logged once an epoch: train/loss, train/acc, lr; val/loss, val/acc, val/f1, val/ece; the same four for test. Losses
    of validation and test are plain cross entropy, so that they compare between runs with other smoothing.

    Args:
        name: The network, a name that `build_model` knows.
        num_classes: Number of classes; on the command line the data's.
        image_size: Side of the square pictures in pixels; on the command line the data's.
        lr: Peak learning rate of OneCycle: 3e-3 is the original's with adamw; with muon take about 0.05.
        optimizer: adamw, or muon (orthogonalised momentum) for the filters with Nesterov SGD for all else.
        sgd_lr: Peak learning rate of what muon does not move.
        weight_decay: AdamW's decay of filters and matrices; norms and biases have none.
        label_smoothing: Share of the target spread evenly over all classes.
        pct_start: Share of the steps in which the learning rate rises.
        model_kwargs: More arguments of the network, such as {widths: [16, 32, 64], dropout: 0.2}.
        compile: Compile the network with torch.compile.
        model: A network of one's own that gives raw logits, instead of `name`; from Python only.

    Raises:
        UserError: An unknown network or a value outside its range.
    """

    def __init__(
        self,
        name: str | None = "smallnet",
        num_classes: int = 10,
        image_size: int = 32,
        *,
        lr: float = 3e-3,
        optimizer: OptimizerName = "adamw",
        sgd_lr: float = 0.1,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        pct_start: float = 0.3,
        model_kwargs: dict[str, Any] | None = None,
        compile: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_limits(
            "model",
            lr=lr,
            sgd_lr=sgd_lr,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            pct_start=pct_start,
        )
        # logger=False: the run's config.yaml holds these and more.
        self.save_hyperparameters(ignore=["model"], logger=False)
        if model is not None:
            self.hparams["name"] = None  # load_from_checkpoint needs model=... again
        # Plain, since the optimiser's state holds them: NumPy's numbers could be saved and never be read as data.
        self.num_classes, self.lr, self.pct_start = num_classes, plain(lr), plain(pct_start)
        self.optimizer_name, self.sgd_lr = optimizer, plain(sgd_lr)
        self.weight_decay, self.label_smoothing = plain(weight_decay), plain(label_smoothing)
        if model is None and name is None:
            raise UserError("this checkpoint is of a network of your own: give model=... again.")
        network = build_model(str(name), num_classes, image_size, **(model_kwargs or {})) if model is None else model
        # NHWC: the loaders' batches lie so, and convolutions are faster on both CPU and tensor cores.
        self.network = network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()
        self.val_metrics = _evaluation_metrics(num_classes)
        self.test_metrics = _evaluation_metrics(num_classes)
        self._train_totals = _no_totals(self.device)
        self._num_restored = 0  # of the pictures in the sums: trained on before this process
        self._guard: LossGuard | None = None
        self._resumed_at: tuple[int, int] | None = None  # epochs finished and steps taken in them, of a checkpoint
        self._planned: tuple[list[dict[str, Any]], Any] = ([], None)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of normalised pictures."""
        logits: Tensor = self.network(images)
        return logits

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning writes the running hook's name into the module some fifty times a step, each time through
        # nn.Module's checks for parameters and modules, which a string needs none of (benchmarks/LOG.md).
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Make the epoch's sums on the device: a run resumed inside an epoch has no start of it."""
        self._train_totals, self._num_restored = _no_totals(self.device), 0

    def on_train_start(self) -> None:
        """Put this run's settings in force, and a guard over its loss."""
        self._apply_settings()
        self._guard = self._make_guard()

    def _make_guard(self) -> LossGuard:
        optimizer = self.trainer.optimizers[0]
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # holds updates back itself
        holds_back = has_scaler or isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))
        guard = LossGuard(self.device, is_deferred=self.device.type == "cuda" and holds_back)
        if guard.is_deferred and not has_scaler:
            optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]  # GradScaler's way, too
        return guard

    def _apply_settings(self) -> None:
        """Put this run's settings in force where a checkpoint has restored others over them (Lightning #20310).

        Nothing is touched where they are the same, so that a resumed run stays equal bit for bit.
        """
        if self._resumed_at is None:
            return
        optimizer, config = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0]
        phases = config.scheduler.state_dict().get("_schedule_phases")
        if ([settings_of(group) for group in optimizer.param_groups], phases) == self._planned:
            return
        for group, settings in zip(optimizer.param_groups, self._planned[0], strict=True):
            group.update(settings)
        config.scheduler = one_cycle(
            optimizer,
            total_steps=self.total_steps(),
            pct_start=self.pct_start,
            steps_done=self.trainer.global_step,
        )

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums."""
        self._train_totals, self._num_restored = _no_totals(self.device), 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the label-smoothed loss of a batch; add it to the epoch's sums without waiting for the device."""
        images, targets = batch
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if self._guard is not None:
            self._guard.watch(loss, self.trainer.global_step, self.trainer.current_epoch)
        # Three sums instead of self.log, which reads back from the device and costs more host time than a small step.
        loss_sum, num_correct, num_pictures = self._train_totals
        with torch.no_grad():
            loss_sum += loss.detach() * len(targets)
            num_correct += (logits.argmax(1) == targets).sum()
        self._train_totals = (loss_sum, num_correct, num_pictures + len(targets))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log train/loss, train/acc and lr."""
        self.log_dict(self.epoch_metrics())

    def train_metrics(self) -> dict[str, float]:
        """Return train/loss and train/acc of this rank's pictures so far in this epoch; waits for the device.

        Raises:
            RunError: The loss was not finite in some step.
        """
        self._check_guard()
        loss_sum, num_correct, num_pictures = self._train_totals
        return {
            "train/loss": loss_sum.item() / max(1, num_pictures),
            "train/acc": num_correct.item() / max(1, num_pictures),
        }

    def num_trained_pictures(self) -> int:
        """Return how many pictures this rank has trained on so far in this epoch, since this process began it."""
        return self._train_totals[2] - self._num_restored

    def epoch_sums(self) -> tuple[Tensor, Tensor, int]:
        """Return this rank's loss sum, correct answers (both on the CPU) and pictures so far in this epoch."""
        loss_sum, num_correct, num_pictures = self._train_totals
        return loss_sum.cpu(), num_correct.cpu(), num_pictures

    def restore_epoch_sums(self, sums: tuple[Tensor, Tensor, int]) -> None:
        """Take up the sums of an epoch that is gone on with in its middle."""
        loss_sum, num_correct, self._num_restored = sums
        self._train_totals = (loss_sum.to(self.device), num_correct.to(self.device), self._num_restored)

    def _check_guard(self) -> None:
        if self._guard is not None:
            self._guard.check(self.trainer.current_epoch)

    def epoch_metrics(self) -> dict[str, float]:
        """Return train/loss, train/acc of all ranks' pictures and the learning rate now; every rank must call it.

        Both are NaN in an epoch of which nothing was left to train, as after a resume at its end.

        Raises:
            RunError: The loss was not finite in some step.
        """
        self._check_guard()
        loss_sum, num_correct, num_pictures = self._train_totals
        totals = torch.stack([loss_sum, num_correct, torch.full_like(loss_sum, num_pictures)])
        loss_total, correct, count = self.trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        loss, acc = (loss_total / count, correct / count) if count else (math.nan, math.nan)
        return {"train/loss": loss, "train/acc": acc, "lr": float(lr)}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimiser and OneCycle over all steps of the run."""
        optimizer = build_optimizer(
            self.network,
            self.optimizer_name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            sgd_lr=self.sgd_lr,
            fused=not self.trainer.gradient_clip_val,
        )
        schedule = one_cycle(optimizer, total_steps=self.total_steps(), pct_start=self.pct_start)
        phases = schedule.state_dict()["_schedule_phases"]
        self._planned = ([settings_of(group) for group in optimizer.param_groups], phases)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Return the optimiser steps of the whole run, computed from lengths alone.

        Not `trainer.estimated_stepping_batches`: it sets up the loaders too early and so loses a loader's position on
        resume (Lightning #20550). With loaders other than ours, which have no position, there is nothing to lose.
        """
        trainer = self.trainer
        count_batches = getattr(getattr(trainer, "datamodule", None), "num_train_batches", None)
        if count_batches is None:
            total = trainer.estimated_stepping_batches
        else:
            batches = count_batches(trainer.world_size)
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            per_epoch = -(-batches // trainer.accumulate_grad_batches)
            epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
            epochs_done, steps_done = self._resumed_at or (0, 0)
            total = steps_done + per_epoch * max(0, epochs - epochs_done)
            if trainer.max_steps != -1:
                total = min(total, trainer.max_steps)
        if total == float("inf"):
            raise UserError("OneCycle needs an end: give --epochs N or --trainer.max_steps N.")
        if total < 1:
            raise UserError("there is no step to train: --epochs, --trainer.limit_train_batches or --data.drop_last.")
        return int(total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save nothing after a bad step, and hyperparameters as what loads as data, whatever a subclass has added.

        Raises:
            RunError: The loss was not finite in some step.
        """
        self._check_guard()
        if self.CHECKPOINT_HYPER_PARAMS_KEY in checkpoint:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = plain(checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in a line where a checkpoint is of another network.

        Raises:
            UserError: Its weights do not have the names and shapes of this network's.
        """
        self._resumed_at = progress_of(checkpoint)
        theirs = {name: tuple(weight.shape) for name, weight in checkpoint["state_dict"].items()}
        ours = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"the checkpoint is of another network: {name} is {theirs.get(name, 'missing')} in it and "
                    f"{ours.get(name, 'missing')} here.\nGive the --model and --data flags of its run."
                )

    # -- evaluation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch; return its logits for callbacks."""
        return self._evaluate(self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch; return its logits for callbacks."""
        return self._evaluate(self.test_metrics, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self(batch[0])
        return logits

    def _evaluate(self, metrics: MetricCollection, batch: Batch) -> Float[Tensor, "batch classes"]:
        images, targets = batch
        logits: Tensor = self(images)
        if len(targets) > 0:  # a rank whose share has run out gets an empty batch
            update_evaluation(metrics, logits.float(), targets)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/acc, val/f1 and val/ece."""
        self._log_evaluation("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/acc, test/f1 and test/ece."""
        self._log_evaluation("test", self.test_metrics)

    def _log_evaluation(self, stage: str, metrics: MetricCollection) -> None:
        values = metrics.compute()
        confusion = values["confusion"].cpu()
        matrix = confusion.numpy()
        figures = {"loss": values["loss"], "acc": accuracy(matrix), "f1": macro_f1(matrix), "ece": values["ece"]}
        # The sums over ranks are done by torchmetrics, picture by picture: sync_dist would average ranks instead.
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, sync_dist=False)
        setattr(self, f"{stage}_confusion", confusion)
        metrics.reset()

    val_confusion: Tensor | None = None
    """int64 (classes, classes) of the last validation; rows: true class."""
    test_confusion: Tensor | None = None
    """int64 (classes, classes) of the last test; rows: true class."""


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Return the epochs that a checkpoint's run has finished, and the optimiser steps up to the end of the last one."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return 0, 0
    epochs, steps = loop["epoch_progress"]["current"], int(checkpoint["global_step"])
    if epochs["ready"] > epochs["processed"]:  # saved inside an epoch, or before its end was counted
        steps -= loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
    return int(epochs["processed"]), steps


def _evaluation_metrics(num_classes: int) -> MetricCollection:
    """Return loss, calibration error (15 bins) and the confusion matrix, from which all else is read."""
    return MetricCollection(
        {
            "loss": MeanMetric(),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            "confusion": MulticlassConfusionMatrix(num_classes, validate_args=False),
        },
        compute_groups=False,
    )


def update_evaluation(
    metrics: MetricCollection, logits: Float[Tensor, "batch classes"], targets: Int64[Tensor, " batch"]
) -> None:
    """Add one batch's answers to the metrics of a stage."""
    metrics["loss"].update(F.cross_entropy(logits, targets), weight=len(targets))
    metrics["ece"].update(logits.softmax(1), targets)
    metrics["confusion"].update(logits.argmax(1), targets)


def _no_totals(device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return zero loss sum, zero correct answers (both on the device) and zero pictures."""
    return torch.zeros((), device=device), torch.zeros((), device=device), 0
