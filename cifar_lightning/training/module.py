"""ImageClassifier: a network with its loss, metrics, optimiser and schedule, for the Lightning Trainer."""

from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection

from cifar_lightning.checkpoints.loading import plain, progress_of
from cifar_lightning.checkpoints.pretrained import load_pretrained
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.metrics.classification import accuracy, macro_f1
from cifar_lightning.models.compile import compile_model
from cifar_lightning.models.registry import DEFAULT_MODEL, choose_model
from cifar_lightning.models.speednet import SpeedNet, StemHold
from cifar_lightning.models.state_dicts import describe_misfits
from cifar_lightning.optim.optimizers import OptimizerName, build_optimizer, settings_of
from cifar_lightning.optim.schedules import ScheduleName, follows_plan, make_schedule, warmup_fraction
from cifar_lightning.settings.limits import check_limits
from cifar_lightning.training.data_protocol import training_data
from cifar_lightning.training.ema import EmaWeights
from cifar_lightning.training.eval_metrics import evaluation_metrics, update_evaluation
from cifar_lightning.training.model_checks import check_batches, check_classes, check_logits
from cifar_lightning.training.nan_guard import NanGuard, make_nan_guard
from cifar_lightning.training.step_count import count_steps
from cifar_lightning.training.train_metrics import TrainMetrics, means_of
from cifar_lightning.training.tta import TTA, tta_logits
from cifar_lightning.transforms.mixup import Mixing

Batch = tuple[Tensor, Tensor] | list[Tensor]
"""Images and targets; PyTorch's own DataLoader makes a list of them."""


class ImageClassifier(pl.LightningModule):
    """Trains a network with label-smoothed cross entropy and OneCycle, and measures it.

    Logged once an epoch: train/loss, train/acc, lr; val/loss, val/acc, val/f1, val/ece; the same four for test. Losses
    of validation and test are plain cross entropy, so that they compare between runs with other smoothing.

    Args:
        name: The network, a name that `build_model` knows.
        num_classes: Number of classes; on the command line the data's.
        image_size: Side of the square images in pixels; on the command line the data's.
        lr: Peak learning rate: 3e-3 is the original's with adamw; with muon take about 0.05.
        optimizer: adamw, sgd (Nesterov), or muon (orthogonalised momentum) for the filters with sgd for all else.
        sgd_lr: Peak learning rate of what muon does not move.
        head_lr: Peak learning rate of the linear layers beside muon; by default sgd_lr.
        momentum: Muon's, of the filters.
        sgd_momentum: Of sgd, alone or beside muon.
        weight_decay: Decay of filters and matrices by adamw or sgd; norms and biases have none.
        sgd_weight_decay: Share of what muon does not move that a step at the peak rate takes away.
        label_smoothing: Share of the target spread evenly over all classes.
        mixup: Strength of blending pairs of training images, and their targets; 0 is off, 0.2 usual.
        cutmix: Strength of pasting a part of one training image into another; 0 is off, 1 usual.
        schedule: one_cycle, linear (from the peak in a line to 0) or cosine (to 0 along half a cosine).
        pct_start: Share of the steps in which the rate rises; by default 0.3 with one_cycle, 0 with the others.
        ema_decay: Share that a step leaves of a moving average of the weights, which is then tested; 0 is off.
        stem_train_fraction: Share of the steps in which speednet's stem is trained.
        tta: Average the answers to views of an image in test, validate and predict (not while training): none, mirror
            or six (mirrored and moved by a pixel).
        model_kwargs: More arguments of the network, such as {widths: [16, 32, 64], dropout: 0.2}.
        pretrained: Begin with trained weights in all layers but the last: true for published ones, or a file.
        compile: Compile the network for training with torch.compile, where a compiler is there.
        model: A network of one's own that gives raw logits, instead of `name`; from Python only.

    Raises:
        UserError: An unknown network or a value outside its range.
    """

    def __init__(
        self,
        name: str | None = DEFAULT_MODEL,
        num_classes: int = 10,
        image_size: int = 32,
        *,
        lr: float = 3e-3,
        optimizer: OptimizerName = "adamw",
        sgd_lr: float = 0.1,
        head_lr: float | None = None,
        momentum: float = 0.9,
        sgd_momentum: float = 0.9,
        weight_decay: float = 0.05,
        sgd_weight_decay: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        schedule: ScheduleName = "one_cycle",
        pct_start: float | None = None,
        ema_decay: float = 0.0,
        stem_train_fraction: float = 1.0,
        tta: TTA = "none",
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        compile: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_limits(
            "model",
            lr=lr,
            sgd_lr=sgd_lr,
            head_lr=head_lr,
            momentum=momentum,
            sgd_momentum=sgd_momentum,
            weight_decay=weight_decay,
            sgd_weight_decay=sgd_weight_decay,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            pct_start=pct_start,
            ema_decay=ema_decay,
            stem_train_fraction=stem_train_fraction,
        )
        # logger=False: the run's config.yaml holds these and more.
        self.save_hyperparameters(ignore=["model"], logger=False)
        if model is not None:
            self.hparams["name"] = None  # load_from_checkpoint needs model=... again
        # Plain, since the optimiser's state holds them: NumPy's numbers could be saved and never be read as data.
        self.lr, self.sgd_lr, self.head_lr = plain(lr), plain(sgd_lr), plain(head_lr)
        self.momentum, self.sgd_momentum = plain(momentum), plain(sgd_momentum)
        self.weight_decay, self.sgd_weight_decay = plain(weight_decay), plain(sgd_weight_decay)
        self.label_smoothing, self.pct_start = plain(label_smoothing), plain(pct_start)
        self.stem_train_fraction, self.num_classes, self.tta = plain(stem_train_fraction), num_classes, tta
        self.optimizer_name, self.schedule, self.ema_decay = optimizer, schedule, plain(ema_decay)
        self._mixing = Mixing(num_classes, mixup=mixup, cutmix=cutmix) if mixup or cutmix else None
        built, self._architecture = choose_model(model, name, num_classes, image_size, model_kwargs, pretrained)
        self._pretrained = pretrained
        # NHWC: the loaders' batches lie so, and convolutions are faster on both CPU and tensor cores.
        self.model = built.to(memory_format=torch.channels_last)
        self._is_to_compile = compile
        self.val_metrics, self.test_metrics = evaluation_metrics(num_classes), evaluation_metrics(num_classes)
        self.totals = TrainMetrics(self.device)
        """Of this process's images so far in this epoch."""
        self._guard: NanGuard | None = None
        self._resumed_at: tuple[int, int] | None = None  # epochs finished and steps taken in them, of a checkpoint
        self._planned: tuple[list[dict[str, Any]], Any] = ([], None)
        self._class_weights: Tensor | None = None  # of the loss, from the data
        self._stem_steps: int | None = None  # after which the stem is no longer trained
        self._stem = StemHold(self.model)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of normalised images."""
        logits: Tensor = self.model(images)
        check_logits(logits, len(images), self.num_classes)
        return logits

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning writes the running hook's name into the module some fifty times a step, each time through
        # nn.Module's checks for parameters and modules, which a string needs none of (benchmarks/LOG.md).
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- training ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Forget where an earlier fit stood; a checkpoint that this one goes on with is loaded after this."""
        if stage == "fit":
            self._resumed_at = None
            self._stem.release()

    def on_fit_start(self) -> None:
        """Make the epoch's sums (a run resumed inside an epoch has no start of it) and what it needs; compile."""
        self.totals = TrainMetrics(self.device)
        check_classes(self.trainer, self.num_classes)
        if self._is_to_compile:
            compile_model(self.model, self.device)
            self._is_to_compile = False
        self.prepare(training_data(self.trainer))

    def prepare(self, data: Any) -> None:
        """Take from the data what training needs: class weights and, unless a checkpoint has them, SpeedNet's filters.

        Raises:
            UserError: SpeedNet was not whitened, and its images are not an `ImageDataModule`'s.
        """
        weights = getattr(data, "class_weights", None)
        self._class_weights = None if weights is None else torch.tensor(weights, device=self.device)
        self.take_pretrained(data)
        if isinstance(self.model, SpeedNet):
            self.model.stem.whiten_from(data)

    def take_pretrained(self, data: Any) -> None:
        """Begin with trained weights, once, where they were asked for; have our data normalised as they expect.

        Raises:
            UserError: They cannot be had, or do not fit.
        """
        if self._pretrained is False:
            return
        expected = load_pretrained(self.model, self._architecture, self._pretrained)
        self._pretrained = False
        if expected is None:
            return
        if data is not None:
            data.use_normalization(expected.mean, expected.std)
        elif is_first_process():
            print(f"--model.pretrained: normalise the images with mean {expected.mean} and std {expected.std}.")

    def on_train_start(self) -> None:
        """Put this run's settings in force, and a guard over its loss; a range test begins here, too."""
        check_batches(self.trainer, self.model)
        self._apply_settings()
        self._guard = make_nan_guard(self.trainer)

    def _apply_settings(self) -> None:
        """Put this run's settings in force where a checkpoint has restored others over them (Lightning #20310).

        Nothing is touched where they are the same, so that a resumed run stays equal bit for bit.
        """
        if self._resumed_at is None:
            return
        optimizer, config = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0]
        phases = config.scheduler.state_dict().get("_schedule_phases")
        found = [settings_of(group) for group in optimizer.param_groups]
        if (found, phases) == self._planned and follows_plan(config.scheduler):
            return
        for group, settings in zip(optimizer.param_groups, self._planned[0], strict=True):
            group.update(settings)
        config.scheduler = self._make_schedule(optimizer, steps_done=self.trainer.global_step)

    def peak_step(self) -> float:
        """Return the step from which the learning rate only falls."""
        return warmup_fraction(self.schedule, self.pct_start) * self.total_steps()

    def _make_schedule(self, optimizer: torch.optim.Optimizer, steps_done: int | None = None) -> LRScheduler:
        return make_schedule(
            optimizer,
            self.schedule,
            total_steps=self.total_steps(),
            pct_start=self.pct_start,
            stem_steps=self._stem_steps,
            steps_done=steps_done,
        )

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums."""
        self.totals = TrainMetrics(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the label-smoothed loss of a batch; add it to the epoch's sums without waiting for the device."""
        images, targets = batch
        if self._stem_steps is not None and self.trainer.global_step >= self._stem_steps:
            self._stem.hold(stop_gradient=self.trainer.model is self)  # DDP waits for every gradient
            self._stem_steps = None
        if self._mixing is not None:
            images, targets = self._mixing(images, targets)
        logits = self(images)
        loss = F.cross_entropy(logits, targets, weight=self._class_weights, label_smoothing=self.label_smoothing)
        if self._guard is not None:
            self._guard.watch(loss, self.trainer.global_step, self.trainer.current_epoch)
        self.totals.add(loss, logits, targets)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave out a stem that is no longer trained."""
        self._stem.drop_gradients()

    def on_train_epoch_end(self) -> None:
        """Log train/loss, train/acc and lr."""
        self.log_dict(self.epoch_metrics())

    def train_metrics(self) -> dict[str, float]:
        """Return train/loss and train/acc of this rank's images so far in this epoch; waits for the device.

        Raises:
            RunError: The loss was not finite in some step; several processes are told at the epoch's end, together.
        """
        if self._guard is not None and self.trainer.world_size == 1:
            self._guard.check(self.trainer.current_epoch)
        return means_of(self.totals.stacked())

    def _check_guard(self) -> None:
        if self._guard is not None:
            self._guard.check(self.trainer.current_epoch)

    def epoch_metrics(self) -> dict[str, float]:
        """Return train/loss, train/acc of all ranks' images and the learning rate now; every rank must call it.

        Both are NaN in an epoch of which nothing was left to train, as after a resume at its end.

        Raises:
            RunError: The loss was not finite in some step.
        """
        self._check_guard()
        sums = self.trainer.strategy.reduce(self.totals.stacked(), reduce_op="sum")
        return means_of(sums) | {"lr": float(self.trainer.optimizers[0].param_groups[0]["lr"])}

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the average of the weights, where one is asked for."""
        return [EmaWeights(self.ema_decay)] if self.ema_decay else []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimiser and its schedule over all steps of the run."""
        optimizer = build_optimizer(
            self.model,
            self.optimizer_name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            sgd_lr=self.sgd_lr,
            head_lr=self.head_lr,
            momentum=self.momentum,
            sgd_momentum=self.sgd_momentum,
            sgd_weight_decay=self.sgd_weight_decay,
            fused=not self.trainer.gradient_clip_val,
        )
        self._stem_steps = round(self.stem_train_fraction * self.total_steps())
        schedule = self._make_schedule(optimizer)
        phases = schedule.state_dict().get("_schedule_phases")
        self._planned = ([settings_of(group) for group in optimizer.param_groups], phases)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Return the optimiser steps of the whole run, also of one that is gone on with.

        Raises:
            UserError: It has no end, or no step.
        """
        return count_steps(self.trainer, *(self._resumed_at or (0, 0)))

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
        self._resumed_at, self._pretrained = progress_of(checkpoint), False
        misfits = describe_misfits(checkpoint["state_dict"], self.state_dict())
        if misfits:
            raise UserError(
                f"the checkpoint is of another network: {misfits}.\nGive the --model and --data flags of its run."
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
        return tta_logits(self, batch[0], self.tta)[0].float()

    def _evaluate(self, metrics: MetricCollection, batch: Batch) -> Float[Tensor, "batch classes"]:
        images, targets = batch
        views = "none" if self.trainer.state.fn == TrainerFn.FITTING else self.tta
        # In 32 bits: NumPy has no bfloat16.
        logits, plain_logits = (answers.float() for answers in tta_logits(self, images, views))
        if len(targets) > 0:  # a rank whose share has run out gets an empty batch
            update_evaluation(metrics, logits, plain_logits, targets)
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
        if self.tta != "none" and self.trainer.state.fn != TrainerFn.FITTING:
            figures["acc_no_tta"] = values["acc_no_tta"]
        # The sums over ranks are done by torchmetrics, image by image: sync_dist would average ranks instead.
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, sync_dist=False)
        setattr(self, f"{stage}_confusion", confusion)
        metrics.reset()

    val_confusion: Tensor | None = None
    """int64 (classes, classes) of the last validation; rows: true class."""
    test_confusion: Tensor | None = None
    """int64 (classes, classes) of the last test; rows: true class."""
