"""ImageClassifier: a model with its loss, metrics, optimizer and schedule, for the Lightning Trainer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from cifar_lightning.checkpoints.loading import plain, progress_of, statistics_of
from cifar_lightning.checkpoints.pretrained import load_pretrained
from cifar_lightning.checkpoints.schema import (
    DATA_STATE,
    IMPORTED_CLASS,
    IMPORTED_MODEL,
    OWN_METRICS,
    SCHEMA_KEY,
    STEPS_BEFORE,
    VERSION_KEY,
    upgrade_checkpoint,
    with_data_state,
)
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import printable
from cifar_lightning.metrics.classification import accuracy, macro_f1
from cifar_lightning.models.compile import compile_model
from cifar_lightning.models.fine_tuning import FrozenLayers, lr_scales
from cifar_lightning.models.memory_format import MemoryFormat, use_memory_format
from cifar_lightning.models.registry import (
    DEFAULT_MODEL,
    choose_model,
    import_path_of,
    is_built_by_name,
    makes_same_logits,
)
from cifar_lightning.models.state_dicts import describe_misfits
from cifar_lightning.optim.optimizers import OptimizerSettings, build_optimizer, keep_ratios
from cifar_lightning.optim.schedules import ScheduleName, ScheduleSettings, make_schedule
from cifar_lightning.runs.environment import package_version, portable
from cifar_lightning.runs.schema import SCHEMA_VERSION
from cifar_lightning.settings.import_path import is_import_path
from cifar_lightning.settings.limits import Count, Fraction, LearningRate, MixStrength, WeightDecay, check_settings
from cifar_lightning.settings.roles import ONLY_CROSS_ENTROPY
from cifar_lightning.training.ema import EmaWeights
from cifar_lightning.training.eval_metrics import check_metrics, evaluation_metrics, own_metrics, update_evaluation
from cifar_lightning.training.faster_convolutions import FasterConvolutions
from cifar_lightning.training.left_out_hooks import LeftOutHooks
from cifar_lightning.training.lightning_patches import PlainHookNames, step_plateaus_after_validations, use_double
from cifar_lightning.training.losses import DEFAULT_LOSS, check_loss, logits_dtype, make_loss, name_of, takes_log_probs
from cifar_lightning.training.model_checks import (
    are_log_probs,
    are_probabilities,
    check_batches,
    check_classes,
    check_evaluated_classes,
    check_groups,
    check_image_size,
    check_loaders,
    check_logits,
    check_optimizers,
    check_schedules,
    check_step_counts,
    misfit_of,
    unpack_batch,
)
from cifar_lightning.training.nan_guard import NanGuard, check_losses
from cifar_lightning.training.resumed_settings import ResumedSettings
from cifar_lightning.training.step_count import check_train_batches, count_steps, current_lr
from cifar_lightning.training.train_metrics import TrainMetrics, means_of
from cifar_lightning.training.trainer_callbacks import callbacks_of
from cifar_lightning.training.trainer_data import repeat_if_overfitting, training_data
from cifar_lightning.training.tta import TTA, tta_logits
from cifar_lightning.training.whitening_stem import WhiteningStem, whiten, whitening_stem_of
from cifar_lightning.transforms.mixup import Mixing

Batch = tuple[Tensor, Tensor] | list[Tensor]
"""Images and targets; a list from PyTorch's DataLoader."""
_DEFAULT_SMOOTHING = 0.1


class ImageClassifier(PlainHookNames, pl.LightningModule):
    """Trains a model with label-smoothed cross entropy, by default AdamW with OneCycle, and evaluates it.

    Logged once an epoch: train/loss, train/acc, lr; val/loss, val/acc, val/f1, val/ece; the same four for test. The
    loss of validation and test is cross entropy without smoothing, comparable between runs, or the loss of one's own.

    Args:
        name: Name of the model, as `build_model` knows it, or package.module:function_or_class.
        num_classes: Number of classes; on the command line taken from the data.
        image_size: Height and width of the images in pixels; on the command line taken from the data.
        in_channels: Channels of the images, 3 for RGB; on the command line taken from the data.
        lr: Peak learning rate; 3e-3 suits adamw, about 0.05 muon.
        optimizer: adamw, sgd (Nesterov), muon (orthogonalized momentum) for convolutions with sgd for the rest, or
            one of timm such as timm/lamb.
        sgd_lr: With muon, peak learning rate of the parameters that sgd trains.
        head_lr: With muon, peak learning rate of linear layers; default sgd_lr.
        momentum: Momentum of muon.
        sgd_momentum: Momentum of sgd, alone or with muon.
        weight_decay: Weight decay of adamw, sgd and timm's; none for norms and biases.
        sgd_weight_decay: With muon, fraction of sgd's parameters that a step at the peak learning rate subtracts.
        loss: cross_entropy, or package.module:name of a class or function: (logits, labels) -> scalar.
        loss_kwargs: Further arguments of such a loss, such as {gamma: 2}.
        label_smoothing: Fraction of the target spread evenly over all classes, in cross_entropy.
        mixup: Alpha of MixUp; 0 disables it, 0.2 is usual.
        cutmix: Alpha of CutMix; 0 disables it, 1 is usual.
        schedule: Learning rate schedule: one_cycle, linear (a line to 0) or cosine (half a cosine to 0).
        pct_start: Fraction of the steps in which the learning rate rises; default 0.3 with one_cycle, else 0.
        ema_decay: EMA decay per step; EMA weights are evaluated and saved. 0 disables EMA.
        stem_train_fraction: Fraction of the steps in which speednet's stem is trained.
        metrics: Your own torchmetrics, a list or a dict by name, of probabilities and labels; logged as val/NAME and
            test/NAME.
        tta: Test-time augmentation in test, validate and predict: none, mirror (average with the mirror image) or six
            (mirrored and shifted by a pixel).
        model_kwargs: Further arguments of the model, such as {widths: [16, 32, 64], dropout: 0.2}.
        pretrained: Load pretrained weights into all layers but the last: true for published ones, a run or file, or
            smallnet.
        freeze: Layers that are not trained: backbone (all but the head), or globs of parameter names such as layer1.
        unfreeze_epoch: Train the frozen layers, too, after so many epochs.
        layer_decay: Factor of the learning rate from each layer to the one below it; 1 disables it, 0.75 is usual.
        compile: Compile the model for training with torch.compile, if a compiler is installed.
        memory_format: channels_last (faster convolutions) or contiguous, for a model that calls view on its images.
        model: Your own nn.Module that returns raw logits, instead of `name`.

    Raises:
        UserError: An unknown model or a value outside its range.
    """

    def __init__(
        self,
        name: str | None = DEFAULT_MODEL,
        num_classes: int = 10,
        image_size: int = 32,
        *,
        in_channels: int = 3,
        lr: LearningRate = 3e-3,
        optimizer: str = "adamw",
        sgd_lr: LearningRate = 0.1,
        head_lr: LearningRate | None = None,
        momentum: Fraction = 0.9,
        sgd_momentum: Fraction = 0.9,
        weight_decay: WeightDecay = 0.05,
        sgd_weight_decay: Fraction = 0.0,
        loss: str | Callable[..., Any] | None = DEFAULT_LOSS,
        loss_kwargs: dict[str, Any] | None = None,
        label_smoothing: Fraction = _DEFAULT_SMOOTHING,
        mixup: MixStrength = 0.0,
        cutmix: MixStrength = 0.0,
        schedule: ScheduleName = "one_cycle",
        pct_start: Fraction | None = None,
        ema_decay: Annotated[
            float, Field(ge=0, lt=1, allow_inf_nan=False, description="0 (off) to below 1, such as 0.999")
        ] = 0.0,
        stem_train_fraction: Annotated[
            float, Field(ge=0, le=1, allow_inf_nan=False, description="0 (never) to 1 (always)")
        ] = 1.0,
        metrics: Metric | list[Metric] | dict[str, Metric] | MetricCollection | None = None,
        tta: TTA = "none",
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        freeze: list[str] | str | None = None,
        unfreeze_epoch: Count | None = None,
        layer_decay: Annotated[
            float, Field(gt=0, le=1, allow_inf_nan=False, description="above 0 to 1 (off), such as 0.75")
        ] = 1.0,
        compile: bool = False,
        memory_format: MemoryFormat = "channels_last",
        model: nn.Module | None = None,
    ) -> None:
        check_settings("model", ImageClassifier.__init__, locals())
        super().__init__()
        self.save_hyperparameters(ignore=["model", "loss", "metrics"])
        self.hparams["loss"] = name_of(loss)
        if model is not None:
            self.hparams["name"] = None
        # Plain types, since the optimizer's state holds them: a checkpoint with NumPy's does not load as data.
        values = (lr, sgd_lr, head_lr, momentum, sgd_momentum, weight_decay, sgd_weight_decay)
        self.optimizer_settings = OptimizerSettings(optimizer, *map(plain, values))
        self.schedule_settings = ScheduleSettings(schedule, plain(pct_start), plain(stem_train_fraction))
        self.label_smoothing, self.ema_decay, self.tta = plain(label_smoothing), plain(ema_decay), tta
        self.num_classes = num_classes
        self.loss_function = make_loss(loss, loss_kwargs)
        """The loss of one's own; None is cross entropy."""
        if self.loss_function is not None and label_smoothing not in (0, _DEFAULT_SMOOTHING):
            raise UserError(f"--model.label_smoothing {label_smoothing}: {ONLY_CROSS_ENTROPY.format(name_of(loss))}")
        self._mixing = Mixing(num_classes, mixup=mixup, cutmix=cutmix) if mixup or cutmix else None
        of_images = (num_classes, image_size, in_channels)
        built, self._architecture = choose_model(model, name, *of_images, model_kwargs, pretrained)
        self._pretrained = pretrained
        self.imported: dict[str, Any] | None = None
        """{"path", "kwargs"} that make a model of one's own again; None where it has a name or they are not known."""
        self.imported_class: dict[str, Any] | None = None
        """The same of a subclass that alone gives its logits."""
        self.init_args: dict[str, Any] | None = None
        """Arguments of a subclass, if they are known better than from `hparams`."""
        self.model = use_memory_format(built, memory_format)
        if model is not None:
            self.remember_model({})
        elif is_import_path(name):
            self.imported = {"path": name, "kwargs": model_kwargs or {}}
        if unfreeze_epoch and not freeze:
            raise UserError(f"--model.unfreeze_epoch {unfreeze_epoch}: nothing is frozen; give --model.freeze.")
        self._frozen = FrozenLayers(self.model, freeze, num_classes, unfreeze_epoch) if freeze else None
        self._layer_decay = layer_decay
        self._is_to_compile = compile
        self.val_metrics, self.test_metrics = evaluation_metrics(num_classes), evaluation_metrics(num_classes)
        self.own_metrics = own_metrics(metrics)
        """Metrics of one's own, of the validation or test that is running."""
        if self.own_metrics is not None:
            self.own_metrics.persistent(mode=False)
        self._missing_metrics: set[str] = set()  # those of a checkpoint that were not given again
        self.totals = TrainMetrics(self.device)
        """Sums over this process's images of the epoch so far."""
        self._resumed_from = 0, 0  # finished epochs and their steps, of a checkpoint or an earlier fit of the Trainer
        self._steps_before = 0  # of an earlier fit of the Trainer, whose schedule has ended
        self._class_weights: Tensor | None = None  # of the loss, from the data
        self._normalization: Any = None  # mean and std of the images that it was trained on
        self._is_first_batch = True
        self.has_begun = False
        """Whether `on_fit_start` has prepared this fit."""

    def remember_model(self, model_kwargs: Mapping[str, Any]) -> None:
        """Have checkpoints name the class of a given model, if it makes the same model from these arguments."""
        num_classes, size, channels = self._of_images
        self.imported = import_path_of(self.model, num_classes, size, model_kwargs, channels)

    @property
    def _of_images(self) -> tuple[int, int, int]:
        """Number of classes, image size and channels."""
        return self.num_classes, self._architecture["image_size"], self._architecture.get("in_channels", 3)

    def forget_changed_model(self) -> None:
        """Leave name or import path out of checkpoints where the model has been changed since it was made by them."""
        name = self.hparams["name"]
        if (
            self.imported is not None
            and name is None
            and not makes_same_logits(self.model, self.imported["path"], *self._of_images, self.imported["kwargs"])
        ):
            self.imported = None
        if name and not is_import_path(name) and not is_built_by_name(self.model, self._architecture):
            self.hparams.update(name=None, model_kwargs=None, pretrained=False)

    def _remember_class(self) -> None:
        """Have checkpoints name a subclass with its arguments, where its model alone does not give its logits."""
        kind = type(self)
        if kind is ImageClassifier:
            self.forget_changed_model()
            return
        self.imported_class = None
        known = self.imported or {"path": self.hparams.get("name"), "kwargs": self.hparams.get("model_kwargs")}
        num_classes, size, channels = self._of_images
        is_of_model = known["path"] and kind.forward is ImageClassifier.forward
        if is_of_model and makes_same_logits(self.model, known["path"], *self._of_images, known["kwargs"] or {}):
            return
        taken = inspect.signature(kind).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        given = dict(self.hparams if self.init_args is None else self.init_args)
        for of_data in ({"num_classes": num_classes, "image_size": size}, {}):  # which it may set itself
            init_args = {name: each for name, each in (given | of_data).items() if takes_any or name in taken}
            found = import_path_of(self, num_classes, size, {"init_args": plain(init_args)}, channels)
            if found is not None:
                self.imported_class = found
                return
        if known["path"] or kind.forward is not ImageClassifier.forward:  # else the model that is given has its logits
            self.imported_class = {"path": "", "kwargs": {}}  # nothing imports it; its own class loads it

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of normalized images."""
        logits: Tensor = self.model(images)
        if not torch.compiler.is_compiling():  # an exported graph would be of one batch size
            check_logits(logits, len(images), self.num_classes)
        return logits

    # -- training ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Note where an earlier fit of the Trainer ended, and check the classes to evaluate.

        A checkpoint to resume from is loaded after this.
        """
        if self._trainer is not None:
            use_double(self._trainer, self)
        if stage in ("validate", "test"):
            check_evaluated_classes(self.trainer, self.num_classes)
        data = None if stage == "fit" or self._trainer is None else training_data(self._trainer)
        if data is not None and self._normalization is not None:  # another model may have changed the data's
            data.use_normalization(*self._normalization)
        if stage == "fit":
            self._resumed_from, self._steps_before = (0, 0), 0
            if self._trainer is not None:
                epochs: Any = self.trainer.fit_loop.epoch_progress.current
                self._steps_before = self.trainer.global_step
                self._resumed_from = epochs.processed, self._steps_before
            if self._frozen is not None:
                self._frozen = self._frozen.of(self.model)  # which a subclass may have replaced
                self._frozen.set_epoch(self.current_epoch, self.trainer.world_size)

    def train(self, mode: bool = True) -> "ImageClassifier":
        """Set the mode of all modules but frozen norms, which keep their statistics."""
        super().train(mode)
        if self._frozen is not None:
            self._frozen.set_mode(mode)
        return self

    def on_fit_start(self) -> None:
        """Check the data, compile, and take from the data what training needs."""
        if not callbacks_of(self.trainer, NanGuard):
            raise UserError(
                "configure_callbacks: leaves out those of ImageClassifier, such as EMA's; "
                "return [*super().configure_callbacks(), ...]."
            )
        self.totals = TrainMetrics(self.device)  # a run resumed inside an epoch has no start of it
        check_classes(self.trainer, self.num_classes, self._architecture.get("in_channels", 3))
        check_image_size(self.trainer, self.model, self._architecture)
        self._remember_class()
        if self._is_to_compile:
            compile_model(self.model, self.device)
            self._is_to_compile = False
        if self.trainer.ckpt_path:  # also where a subclass leaves out on_load_checkpoint
            self._pretrained = False
        data = training_data(self.trainer)
        self.prepare(data)
        self._normalization = None if data is None else (data.mean, data.std)
        self.has_begun = True

    def prepare(self, data: ImageDataModule | None) -> None:
        """Take class weights from the data; load pretrained weights, once, and have images normalized for them.

        Raises:
            UserError: The pretrained weights cannot be loaded, or do not fit; or a loss or metric of one's own fails.
        """
        weights = None if data is None else data.class_weights
        if self.loss_function is not None:
            if weights is not None:
                raise UserError(
                    f"--data.class_weights: only cross_entropy uses them, not {self.hparams['loss']}; "
                    "give --data.sampler balanced."
                )
            check_loss(
                self.loss_function,
                self.hparams["loss"],
                self.num_classes,
                self.device,
                takes_probs=self._mixing is not None,
                dtype=self.dtype,  # type: ignore[arg-type]  # Lightning types it as str, too
            )
        if self.own_metrics is not None:
            check_metrics(self.own_metrics, self.num_classes, self.device)
        self._class_weights = None if weights is None else torch.tensor(weights, device=self.device)
        self._load_pretrained(data)

    def _load_pretrained(self, data: ImageDataModule | None) -> None:
        if self._pretrained is False:
            return
        expected = load_pretrained(self.model, self._architecture, self._pretrained)
        self._pretrained = False
        if expected is None:
            return
        if data is not None:
            data.use_normalization(expected.mean, expected.std)
        else:
            remark(f"--model.pretrained: normalize the images with mean {expected.mean} and std {expected.std}.")

    def on_train_start(self) -> None:
        """Check the batch size against BatchNorm; the LR finder gets here, too, but not to on_fit_start."""
        repeat_if_overfitting(self.trainer)
        if self._class_weights is not None:
            # By now those of the Trainer: the LR finder prepares on the CPU.
            self._class_weights = self._class_weights.to(self.device).to(self.dtype)
        check_batches(self.trainer, self.model)
        check_optimizers(self.trainer, self.model)
        if self.plans_schedule:
            check_train_batches(self.trainer)
        else:
            check_schedules(self.trainer, self._planned_steps)
            step_plateaus_after_validations(self.trainer)
        self._freeze_for_epoch()  # Lightning starts no epoch that is resumed in its middle

    def on_train_epoch_start(self) -> None:
        self.totals = TrainMetrics(self.device)
        self._freeze_for_epoch()
        if self._trainer is not None and self.plans_schedule:
            check_groups(self._trainer)

    def _freeze_for_epoch(self) -> None:
        if self._frozen is not None:
            self._frozen.set_epoch(self.current_epoch, self.trainer.world_size)
            self._frozen.set_mode(self.training)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of frozen layers, which with DDP have some."""
        if self._frozen is not None:
            self._frozen.drop_gradients()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; add it to the epoch's sums, without a sync."""
        images, targets = unpack_batch(batch)
        if self._mixing is not None:
            images, targets = self._mixing(images, targets)
        try:
            logits = self(images)
        except RuntimeError as error:
            model = self.model if type(self) is ImageClassifier else self
            misfit = misfit_of(error, model, images) if self._is_first_batch else None
            if misfit is None:
                raise
            raise misfit from error
        self._check_first_batch(logits)
        if self.loss_function is None:
            loss = F.cross_entropy(logits, targets, weight=self._class_weights, label_smoothing=self.label_smoothing)
        else:
            loss = self.loss_function(logits, targets)
        self.totals.add(loss, logits, targets)
        return loss

    def _check_first_batch(self, logits: Float[Tensor, "batch classes"]) -> None:
        if not self._is_first_batch:
            return
        self._is_first_batch = False
        if not len(logits):
            return
        if takes_log_probs(self.loss_function):
            if not are_log_probs(logits):
                remark(
                    "warning: NLLLoss takes log-probabilities, which the model does not return, and trains badly; give "
                    "--model.loss cross_entropy with raw logits, or end the model in a LogSoftmax."
                )
        elif are_probabilities(logits):
            again = "cross entropy applies softmax again, which trains badly; remove its last Softmax."
            if self.loss_function is not None:
                again = "predictions apply softmax again; remove its last Softmax, or move it into the loss."
            remark(f"warning: the model returns probabilities, not raw logits: {again}")

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.epoch_metrics())

    def train_metrics(self) -> dict[str, float]:
        """Return train/loss and train/acc of this rank's images so far in this epoch; waits for the device."""
        return means_of(self.totals.stacked())

    def epoch_metrics(self) -> dict[str, float]:
        """Return train/loss and train/acc of all ranks' images, and the lr now; every rank must call it.

        Loss and accuracy are NaN in an epoch with nothing left to train, as after a resume at its end.

        Raises:
            RunError: The loss of a step was NaN or infinite.
        """
        check_losses(self.trainer)
        sums = self.trainer.strategy.reduce(self.totals.stacked(), reduce_op="sum")
        return means_of(sums) | {"lr": current_lr(self.trainer)}

    @property
    def plans_schedule(self) -> bool:
        """Whether optimizer and schedule are ours, which apply changed flags to a resumed run."""
        # Of the instance: --optimizer replaces it there.
        return getattr(self.configure_optimizers, "__func__", None) is ImageClassifier.configure_optimizers

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return those of convolutions and EMA, and for `fit` the callbacks that every training needs."""
        callbacks: list[pl.Callback] = []
        of_earlier = (EmaWeights, ResumedSettings, WhiteningStem)  # they hold the module that this Trainer had before
        self.trainer.callbacks = [each for each in self.trainer.callbacks if type(each) not in of_earlier]  # type: ignore[attr-defined]  # set by a connector
        if not callbacks_of(self.trainer, FasterConvolutions):  # else it is of an earlier call of this Trainer
            callbacks.append(FasterConvolutions())
        if self.ema_decay:
            callbacks.append(EmaWeights(self.ema_decay))
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.has_begun = False
            if type(self) is not ImageClassifier:  # before faster convolutions: a left out on_fit_start compiles
                callbacks.insert(0, LeftOutHooks(ImageClassifier))
            callbacks.append(NanGuard())
            if self.plans_schedule:
                callbacks.append(ResumedSettings(self.make_schedule))
            stem = whitening_stem_of(self.model)
            if stem is not None:
                callbacks.append(WhiteningStem(stem, self._stem_end))
        return callbacks

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule over all steps of the run."""
        check_step_counts(self.trainer)
        # Here, too: Lightning's Tuner ends `fit` before on_fit_start, and restores the weights of that moment.
        if not self.trainer.ckpt_path:
            self._load_pretrained(training_data(self.trainer))
        self._use_found_lr()
        fused = None if self.trainer.gradient_clip_val else True
        later = () if self._frozen is None or self._frozen.unfreeze_epoch is None else self._frozen.parameters
        scales = None if self._layer_decay == 1 else lr_scales(self.model, self._layer_decay)
        of_model = set(self.model.parameters())
        of_loss = set(self.loss_function.parameters() if isinstance(self.loss_function, nn.Module) else ())
        others = [
            parameter
            for parameter in self.parameters()
            if parameter not in of_model and (parameter.requires_grad or parameter in of_loss)
        ]
        optimizer = build_optimizer(
            self.model, self.optimizer_settings, fused=fused, later=later, others=others, lr_scales=scales
        )
        if callbacks_of(self.trainer, LearningRateFinder):
            keep_ratios(optimizer)
            stem = whitening_stem_of(self.model)
            if stem is not None:  # whose callback Lightning leaves out
                whiten(stem, training_data(self.trainer))
        schedule = self.make_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _use_found_lr(self) -> None:
        """Use the learning rate that Lightning's Tuner has found; it sets that of `hparams`."""
        lr = self.hparams.get("lr")
        if lr is not None and lr not in (self.hparams_initial.get("lr"), self.optimizer_settings.lr):
            self.use_lr(plain(lr))

    def use_lr(self, lr: float) -> None:
        """Use another peak learning rate, as if it had been given; with muon the others keep their ratios to it."""
        self.optimizer_settings = self.optimizer_settings.with_lr(lr)
        for name in ("lr", "sgd_lr", "head_lr"):
            if name in self.hparams:
                self.hparams[name] = getattr(self.optimizer_settings, name)

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps_done: int | None = None) -> LRScheduler:
        """Return the schedule of an optimizer, of a resumed one after `steps_done` steps."""
        total_steps = self._planned_steps()
        if steps_done is not None:
            steps_done -= self._steps_before
        return make_schedule(optimizer, self.schedule_settings, total_steps=total_steps, steps_done=steps_done)

    def peak_step(self) -> float:
        """Return the step at which the learning rate of our schedule is highest; 0 with an optimizer of one's own."""
        if not self.plans_schedule:
            return 0.0
        return self._steps_before + self.schedule_settings.warmup_fraction * self._planned_steps()

    def _stem_end(self) -> int:
        """Return the step after which the stem is no longer trained."""
        return self._steps_before + self.schedule_settings.stem_steps(self._planned_steps())

    def _planned_steps(self) -> int:
        """Return the steps of the schedule: those of the run, without those of an earlier fit of the Trainer."""
        return max(1, self.total_steps() - self._steps_before)

    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run, also of a resumed one or of a later fit of the Trainer."""
        return count_steps(self.trainer, *self._resumed_from)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the versions, and hyperparameters as types that load as data, also those of a subclass."""
        checkpoint |= {SCHEMA_KEY: SCHEMA_VERSION, VERSION_KEY: package_version()}
        if "callbacks" not in checkpoint:  # of weights alone: Lightning leaves out the callbacks' hook
            for ema in callbacks_of(self.trainer, EmaWeights):
                ema.put_average(checkpoint)
        if self.CHECKPOINT_HYPER_PARAMS_KEY in checkpoint:
            hparams = portable(plain(checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]))
            # Without paths, which load_from_checkpoint would import, whoever wrote the checkpoint.
            if self.imported is not None:
                hparams["name"] = None
            if self.loss_function is not None:
                hparams |= {"loss": None, "loss_kwargs": None}
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = hparams
        if self._steps_before:
            checkpoint[STEPS_BEFORE] = self._steps_before
        if self.imported is not None:
            checkpoint[IMPORTED_MODEL] = portable(plain(self.imported))
        if self.imported_class is not None:
            checkpoint[IMPORTED_CLASS] = portable(plain(self.imported_class))
        if names := [*(self.own_metrics or ()), *sorted(self._missing_metrics)]:
            checkpoint[OWN_METRICS] = names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the checkpoint's run stood."""
        checkpoint.update(with_data_state(upgrade_checkpoint(checkpoint)))  # Lightning's own loading does not upgrade
        data = training_data(self._trainer) if self._trainer is not None else None
        if data is not None and DATA_STATE in checkpoint:  # where Lightning, which restores it next, looks for it
            checkpoint.setdefault(type(data).__qualname__, checkpoint[DATA_STATE])
        self._resumed_from, self._steps_before = progress_of(checkpoint), checkpoint.get(STEPS_BEFORE, 0)
        if (found := statistics_of(checkpoint)) is not None:
            self._normalization = found
        if type(self) is ImageClassifier and checkpoint.get(IMPORTED_CLASS):
            path = checkpoint[IMPORTED_CLASS]["path"] or "a subclass"
            raise UserError(
                f"the checkpoint is of {path}, which gives other logits than ImageClassifier; load it with that class."
            )
        self.imported_class = checkpoint.get(IMPORTED_CLASS)
        missing = {*checkpoint.get(OWN_METRICS, ())} - {*(self.own_metrics or ())} - self._missing_metrics
        if missing and self._trainer is not None:
            self._missing_metrics |= missing
            names = printable(", ".join(sorted(missing)))
            remark(f"warning: without the run's metrics {names}; give them again, in ImageClassifier(metrics=...).")
        if self._trainer is None or checkpoint["global_step"]:  # else of Lightning's Tuner, before any step
            self._pretrained = False

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; see `nn.Module`.

        Raises:
            UserError: They do not have the names and shapes of this model's, and `strict` is true.
        """
        misfits = describe_misfits(state_dict, self.state_dict()) if strict else ""
        if misfits:
            raise UserError(
                f"the checkpoint is of another model: {misfits}.\nGive the --model and --data flags of its run."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Update the metrics; return the logits for callbacks, as `test_step` does."""
        return self._evaluate(self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(self.test_metrics, batch)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Return the logits of a batch, which may be images alone."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return tta_logits(self, images, self.tta)[0].float()

    def _evaluate(self, metrics: MetricCollection, batch: Batch) -> Float[Tensor, "batch classes"]:
        images, targets = unpack_batch(batch)
        tta = "none" if self.trainer.state.fn == TrainerFn.FITTING else self.tta
        # float32, since NumPy has no bfloat16.
        logits, plain_logits = (tensor.float() for tensor in tta_logits(self, images, tta))
        if len(targets) > 0:  # a rank without further images gets an empty batch
            update_evaluation(metrics, logits, plain_logits, targets, self._evaluation_loss)
            if self.own_metrics is not None:
                self.own_metrics.update(logits.softmax(1), targets)
        return logits

    def _evaluation_loss(self, logits: Float[Tensor, "batch classes"], targets: Tensor) -> Tensor:
        if self.loss_function is None:
            return F.cross_entropy(logits, targets)
        dtype = logits_dtype(self.loss_function, self.dtype)  # type: ignore[arg-type]  # as above
        return self.loss_function(logits.to(dtype), targets)

    def on_validation_epoch_start(self) -> None:
        self._reset(self.val_metrics)

    def on_test_epoch_start(self) -> None:
        self._reset(self.test_metrics)

    def _reset(self, metrics: MetricCollection) -> None:
        """Reset metrics, also before they are used: the evaluation before may have been cut, or in inference mode.

        What is reset in inference mode, as by `Trainer.validate`, cannot be updated outside of it.
        """
        metrics.reset()
        if self.own_metrics is not None:
            self.own_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_metrics)

    def _log_evaluation(self, stage: str, metrics: MetricCollection) -> None:
        if not metrics["confusion"].update_called and self.trainer.world_size == 1:  # else a rank may have no image
            step = "test_step" if stage == "test" else "validation_step"
            raise UserError(
                f"{step} leaves the metrics out; return super().{step}(batch, batch_idx), or override "
                f"on_{step.removesuffix('step')}epoch_end, too."
            )
        check_loaders(self.trainer, stage, metrics["loss"].update_count)
        values = metrics.compute()
        confusion = values["confusion"].cpu()
        matrix = confusion.numpy()
        logged = {"loss": values["loss"], "acc": accuracy(matrix), "f1": macro_f1(matrix), "ece": values["ece"]}
        if self.tta != "none" and self.trainer.state.fn != TrainerFn.FITTING:
            logged["acc_no_tta"] = values["acc_no_tta"]
        if "acc_top5" in values:
            logged["acc_top5"] = values["acc_top5"]
        if self.own_metrics is not None:
            logged |= {name: float(each.compute()) for name, each in self.own_metrics.items(copy_state=False)}
        # torchmetrics has summed over ranks, image by image; sync_dist would average ranks.
        self.log_dict({f"{stage}/{name}": value for name, value in logged.items()}, sync_dist=False)
        setattr(self, f"{stage}_confusion", confusion)
        self._reset(metrics)  # here, too: a subclass may have a start of its own

    @property
    def further_metrics(self) -> tuple[str, ...]:
        """Names of what a validation logs next to loss, acc, f1 and ece, in the order of metrics.csv."""
        return (*(["acc_top5"] if "acc_top5" in self.val_metrics else []), *(self.own_metrics or {}))

    val_confusion: Tensor | None = None
    """int64 (classes, classes) of the last validation; rows: true class."""
    test_confusion: Tensor | None = None
    """int64 (classes, classes) of the last test; rows: true class."""
