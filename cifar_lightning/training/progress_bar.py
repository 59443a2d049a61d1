"""RunProgress: a summary of the run, one progress bar and one line per epoch, on the terminal or in a notebook."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from cifar_lightning.checkpoints.resume import has_stopped
from cifar_lightning.formatting import clock, percent, plural, printable
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.early_stopping import AnnealingEarlyStopping
from cifar_lightning.training.ending import time_left
from cifar_lightning.training.module import Batch, ImageClassifier
from cifar_lightning.training.nan_guard import check_losses
from cifar_lightning.training.signals import Stopped
from cifar_lightning.training.step_count import current_lr
from cifar_lightning.training.trainer_data import training_data

_REFRESH_S = 0.5  # on a GPU each refresh waits for the device once
_PLAIN_LINE_S = 60.0  # without a terminal, in long epochs


class RunProgress(ProgressBar):
    """A bar per epoch with loss, accuracy, images/s and time left; plain lines with neither terminal nor notebook.

    Args:
        run: The run's folder; None in test and validate.
    """

    def __init__(self, run: RunFolder | None = None) -> None:
        super().__init__()
        self.run = run
        self.console = Console(file=sys.stdout, highlight=False, force_jupyter=False)
        self._is_notebook = Console().is_jupyter
        self._shown: Any = None  # a notebook's display, of which there is one for all bars
        self._bar: Progress | None = None
        self._enabled = True
        self._next_s = 0.0
        self._epoch_start_s = 0.0
        self._epochs_timed: list[float] = []
        self._validated = False
        self._batches_done = 0
        self._where = ""  # such as "in epoch 3"; empty before the first epoch

    def disable(self) -> None:
        """Print nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled:
            return
        assert isinstance(pl_module, ImageClassifier)
        for label, text in describe_run(trainer, pl_module, self.run):
            self._print(f"{label:<9} {text}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of an epoch that is resumed in its middle."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._where = f"in epoch {trainer.current_epoch + 1}"
        self._validated = False
        self._epoch_start_s = time.monotonic()
        self._next_s = self._epoch_start_s + (_REFRESH_S if self._has_bar() else _PLAIN_LINE_S)
        self._batches_done = 0  # since this process started or resumed the epoch
        self._open_bar(_epoch_of(trainer), self.total_train_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Update the bar, at most twice a second."""
        self._batches_done += 1
        now_s = time.monotonic()
        if not self._enabled or now_s < self._next_s:
            return
        assert isinstance(pl_module, ImageClassifier)
        text = self._training_text(trainer, pl_module, batch_idx + 1, now_s)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=batch_idx + 1, text=text, refresh=True)
        else:
            fraction = (batch_idx + 1) / self.total_train_batches
            self._print(f"{_epoch_of(trainer)} {fraction:4.0%}  {text}")
        self._next_s = time.monotonic() + (_REFRESH_S if self._bar is not None else _PLAIN_LINE_S)

    def _training_text(self, trainer: pl.Trainer, module: ImageClassifier, num_done: int, now_s: float) -> str:
        if trainer.world_size == 1:  # several processes check together at the epoch's end
            check_losses(trainer)
        metrics = module.train_metrics()
        elapsed_s = now_s - self._epoch_start_s
        images_per_s = module.totals.num_trained * trainer.world_size / elapsed_s
        return (
            f"loss {metrics['train/loss']:.3f}  acc {percent(metrics['train/acc'], 2)}  {images_per_s:,.0f} images/s  "
            f"{clock(self._seconds_left(trainer, num_done, elapsed_s))} left"
        )

    def _seconds_left(self, trainer: pl.Trainer, num_done: int, elapsed_s: float) -> float:
        """Estimate the time left: this epoch at its own speed, the others at the last epoch's, with validation.

        --trainer.max_time may end it before.
        """
        per_batch_s, num_batches = elapsed_s / self._batches_done, float(trainer.num_training_batches)
        in_epoch, epochs = num_batches - num_done, float(max(0, (trainer.max_epochs or 0) - trainer.current_epoch - 1))
        if trainer.max_steps != -1:
            batches = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
            in_epoch, others = min(in_epoch, batches), max(0.0, (batches - in_epoch) / num_batches)
            epochs = others if trainer.max_epochs in (None, -1) else min(epochs, others)
        epoch_s = self._epochs_timed[-1] if self._epochs_timed else per_batch_s * num_batches
        left_s = per_batch_s * in_epoch + (epoch_s * epochs if epochs else 0.0)
        limit_s = max(0.0, time_left(trainer))
        if math.isfinite(limit_s) and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            return limit_s  # nothing else ends it
        return min(left_s, limit_s)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report early stopping in this process."""
        if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= int(trainer.max_epochs or 0):
            return  # at its end anyway
        for stopper in trainer.early_stopping_callbacks:
            if self._enabled and isinstance(stopper, AnnealingEarlyStopping) and has_stopped(stopper.state_dict()):
                count = max(stopper.wait_count, stopper.patience)  # it may have improved since, up to min_epochs
                reason = f"no better {stopper.monitor} in the last {plural(count, 'validation')}"
                if stopper.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
                    reason = f"{stopper.monitor} was NaN or infinite"
                self._print(f"stopped early: {reason} (--early_stopping.patience)")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the bar by a line."""
        assert isinstance(pl_module, ImageClassifier)
        train = pl_module.epoch_metrics()  # collective: all ranks
        self._close_bar()
        elapsed_s = time.monotonic() - self._epoch_start_s
        if self._batches_done == self.total_train_batches:  # and not the rest of one that was resumed
            self._epochs_timed.append(elapsed_s)
        self._where = f"after epoch {trainer.current_epoch + 1}"
        if not self._enabled:
            return
        line = f"{_epoch_of(trainer)}  train loss {train['train/loss']:.3f} acc {percent(train['train/acc'], 2)}"
        logged = trainer.callback_metrics
        if self._validated and "val/acc" in logged:
            loss = f" loss {float(logged['val/loss']):.3f}" if "val/loss" in logged else ""  # a subclass may log none
            line += f"  val{loss} acc {percent(float(logged['val/acc']), 2)}"
        self._print(f"{line}  {clock(elapsed_s)}")

    # -- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open_bar("validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar; reopen the bar of the epoch."""
        self._close_bar()
        self._validated = True
        if trainer.state.fn == TrainerFn.FITTING:
            self._open_bar(_epoch_of(trainer), self.total_train_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open_bar("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar before an error is shown; after a signal print how to resume."""
        self._close_bar()
        if isinstance(exception, Stopped) and self._enabled and self.run is not None:
            has_checkpoint = self.run.last_checkpoint.exists()
            way_on = f"{self.run.resume_command} resumes from the last checkpoint"
            kept = way_on if has_checkpoint else "no checkpoint was saved yet"
            # The Trainer's epoch is already the next one at the end of training.
            where = f" {self._where} at step {trainer.global_step:,}" if self._where else ""
            self._print(f"stopped{where}: {kept}")

    # -- the terminal ----------------------------------------------------------------------------------------------

    def _has_bar(self) -> bool:
        return self._enabled and (self._is_notebook or (self.console.is_terminal and not self.console.no_color))

    def _open_bar(self, label: str, total: float) -> None:
        self._close_bar()
        if self._has_bar():
            self._bar = (self._notebook_bar if self._is_notebook else Progress)(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:3.0f}%  {task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self._bar.add_task(label, total=total, text="")
            self._bar.start()

    def _notebook_bar(self, *columns: ProgressColumn, **settings: Any) -> Progress:
        from IPython.display import display

        nothing = {"text/plain": ""}
        self._shown = self._shown or display(nothing, raw=True, display_id=True)  # type: ignore[no-untyped-call]  # untyped
        return _NotebookBar(self._shown, *columns, **settings)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        self.console.print(printable(text, self.console.encoding), markup=False, soft_wrap=True)


class _NotebookBar(Progress):
    """A bar that is replaced in place in a notebook's display; rich's own needs ipywidgets and warns without them."""

    def __init__(self, shown: Any, *columns: ProgressColumn, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self._shown = shown

    def start(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        with self.console.capture() as captured:
            self.console.print(self.get_renderable())
        self._shown.update({"text/plain": captured.get().rstrip()}, raw=True)

    def stop(self) -> None:
        self._shown.update({"text/plain": ""}, raw=True)


def describe_run(trainer: pl.Trainer, module: ImageClassifier, run: RunFolder | None) -> list[tuple[str, str]]:
    """Return the summary of a run as (label, text): images, split, classes, model, training, hardware, folder."""
    data = training_data(trainer)
    assert data is not None
    held_out = data.num_images("val")
    num_parameters = sum(each.numel() for each in module.model.parameters())
    num_trained = sum(each.numel() for each in module.model.parameters() if each.requires_grad)
    trained = "" if num_trained == num_parameters else f", {num_trained:,} of them trained"
    ranks = f" on each of {trainer.world_size} processes" if trainer.world_size > 1 else ""
    device = trainer.strategy.root_device
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    a_step = plural(data.batch_size * trainer.accumulate_grad_batches, "image")
    length = f"{plural(module.total_steps(), 'step')} of {a_step}{ranks}"
    length = length if epochs is None else f"{plural(epochs, 'epoch')}, {length}"
    rate = f"peak lr {module.optimizer_settings.lr:g}"
    if not module.plans_schedule:
        lr = current_lr(trainer)
        rate = type(trainer.optimizers[0]).__name__ + ("" if math.isnan(lr) else f", lr {lr:g}")
    rows = [
        ("images", data.source.describe()),
        (
            "split",
            f"{data.num_images('train'):,} training, {held_out:,} validation, {data.num_images('test'):,} test",
        ),
        *zip(("classes", ""), data.describe_classes(), strict=False),
        ("model", f"{module.hparams['name'] or type(module.model).__name__}, {num_parameters:,} parameters{trained}"),
        ("training", f"{length}, {rate}"),
        ("hardware", f"{name}, precision {trainer.precision}"),
    ]
    last_size = data.train_sizes[min(epochs or len(data.train_sizes), len(data.train_sizes)) - 1]
    if last_size != data.image_size:
        sizes = f"the last epoch trains at {last_size} pixels, tests run at {data.image_size}"
        rows.insert(3, ("", f"too few epochs for --data.train_sizes: {sizes}"))
    if held_out == 0:
        rows.insert(2, ("", "no validation: no best checkpoint, no early stopping; the final weights are tested"))
    if run is not None:
        rows.append(("run", str(run.path)))
    return rows


def _epoch_of(trainer: pl.Trainer) -> str:
    total = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
    return f"epoch {trainer.current_epoch + 1}{total}"
