"""fit, validate, test, predict and tune: LightningCLI over ImageClassifier and ImageDataModule; runs are folders."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import load_weights, read_checkpoint
from cifar_lightning.checkpoints.resume import (
    Changes,
    StopPoint,
    clear_up,
    find_changes,
    locked,
    other_images,
    stop_point,
)
from cifar_lightning.cli.parser import (
    TABLE,
    RunParser,
    add_own_flags,
    as_list,
    check_arguments,
    config_text,
    table_text,
)
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.memory import keep_freed_memory
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.files import MetricsTable, write_text_durably
from cifar_lightning.report.findings import find
from cifar_lightning.report.report import make_report
from cifar_lightning.report.results import Results
from cifar_lightning.report.terminal import print_findings, print_validation
from cifar_lightning.runs.folder import RunFolder, create_run, discard_run, open_run, recipe_name
from cifar_lightning.runs.processes import announce_run, announced_run
from cifar_lightning.training.best_checkpoint import BestCheckpoint
from cifar_lightning.training.error_messages import explained, of_settings
from cifar_lightning.training.last_checkpoint import LastCheckpoint
from cifar_lightning.training.lightning_patches import NoProfiler, check_cuda_once
from cifar_lightning.training.lr_finder import LrRange, find_lr, write_lr_range
from cifar_lightning.training.model_checks import check_monitors, check_sizes
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.precision import settle_precision
from cifar_lightning.training.predictions import PredictionWriter
from cifar_lightning.training.progress_bar import RunProgress
from cifar_lightning.training.quiet_lightning import silence
from cifar_lightning.training.resume_state import ResumeState
from cifar_lightning.training.run_recorder import RunRecorder
from cifar_lightning.training.signals import StopSignals
from cifar_lightning.training.tensorboard import Dashboard, board_for

RUNS = Path("runs")
_EVALUATING = ("validate", "test", "predict")


def run_training(command: str, arguments: Sequence[str], *, resumed: RunFolder | None = None) -> None:
    """Run one of LightningCLI's commands, or `tune`.

    Args:
        command: fit, validate, test, predict or tune.
        arguments: Its flags by their long names.
        resumed: The run that `fit` goes on with; its config and checkpoint are among the arguments.

    Raises:
        UserError: What the user can mend.
    """
    silence()
    keep_freed_memory()
    check_cuda_once()
    try:
        with explained(command):
            if command == "tune":
                TuneCLI(["fit", *arguments])
            else:
                with locked(resumed) as run:
                    RunCLI([command, *arguments], run)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


class RunCLI(LightningCLI):
    """Makes the run folder, the callbacks that fill it, and what follows `fit`.

    Args:
        args: The command line, aliases spelled out.
        resumed: The run to go on with, locked in the first process.
    """

    def __init__(self, args: list[str], resumed: RunFolder | None = None) -> None:
        self.run: RunFolder | None = None
        self.resumed = resumed
        self.stopped_at: StopPoint | None = None
        self.changes: Changes = {}
        self._signals = StopSignals()
        self._signals.install()
        self.answers = PredictionWriter(None)
        self._arguments = args
        super().__init__(
            ImageClassifier,
            ImageDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_class=RunParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # -- the command line --------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands and which of their arguments are not flags."""
        commands = LightningCLI.subcommands()
        not_flags = {"weights_only", "verbose", "return_predictions"}
        return {name: commands[name] | not_flags for name in ("fit", *_EVALUATING)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's own flags."""
        add_own_flags(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was spelled out; sys.argv stays for the launcher, which starts further processes with it."""
        self.config = parser.parse_args(self._arguments)

    def _parse_ckpt_path(self) -> None:
        """Leave the command line as it is: LightningCLI would silently replace it by the checkpoint's values."""

    def before_instantiate_classes(self) -> None:
        """Choose by device what was left open, and find where a run goes on."""
        config = self.config[self.subcommand]
        check_arguments(str(self.subcommand), config)
        trainer = config.trainer
        settle_precision(trainer)
        if self.resumed is not None:
            self.changes = find_changes(self.resumed, config_text(self._parser("fit"), config))
            self.stopped_at = stop_point(self.resumed)
            self.stopped_at.check_length(trainer.max_epochs)
            self.stopped_at.check_changes(self.changes)
            config.ckpt_path = str(self.stopped_at.checkpoint)

    # -- making the Trainer ------------------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer with the callbacks and the logger of the run."""
        config = self.config[self.subcommand]
        # Before a folder is made: a mistake should not leave an empty run behind.
        self.datamodule.prepare_data()
        self.datamodule.setup()
        check_sizes(self.model.model, self.datamodule.train_sizes)
        monitored = False
        if self.subcommand == "fit":
            monitored = bool(self.datamodule.num_images("val")) and config.trainer.limit_val_batches != 0
            check_monitors(as_list(self.config_init["fit"].trainer.callbacks), monitored)
            self._make_run(config)
        elif config.ckpt_path is not None:
            self.run = self._run_of_checkpoint(Path(config.ckpt_path), config.output)
        settings = self.config_init[self.subcommand].trainer
        made = {
            "callbacks": self._callbacks(settings, monitored),
            "logger": settings.logger,
            "profiler": settings.profiler or NoProfiler(),
            "plugins": [*as_list(settings.plugins), DurableCheckpointIO()],
        }
        if settings.logger in (None, True):
            steps_done = self.stopped_at.steps_done if self.stopped_at else None
            made["logger"] = board_for(self.run, steps_done) if self.subcommand == "fit" and self.run else False
        if not monitored and self.subcommand == "fit":
            settings.limit_val_batches = 0  # Lightning warns of loaders of length zero
        try:
            with of_settings():
                return pl.Trainer(**{**settings, **made})
        except BaseException:
            self._discard_unbegun()
            raise

    def _discard_unbegun(self) -> None:
        """Remove the run that `fit` has made, if it holds nothing of a training yet."""
        run = self.run if self.subcommand == "fit" and self.resumed is None and is_first_process() else None
        if run is not None and not (run.metrics_csv.exists() or run.resumed_checkpoint.exists()):
            discard_run(run)

    def _callbacks(self, settings: Namespace, monitored: bool) -> list[pl.Callback]:
        """Return the callbacks that were asked for and those that every run has."""
        callbacks: list[pl.Callback] = as_list(settings.callbacks)
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if settings.enable_progress_bar is not False and not has_bar:
            callbacks.append(RunProgress(self.run if self.subcommand == "fit" else None))
        output = self.config[self.subcommand].output
        self.answers = PredictionWriter(self.run, Path(output) if output else None)
        callbacks.append(self.answers)
        if self.subcommand != "fit":
            return callbacks
        assert self.run is not None
        callbacks.append(ResumeState())
        record = self.stopped_at.record(self.changes) if self.stopped_at else None
        changed = config_text(self._parser("fit"), self.config["fit"]) if self.changes else None
        callbacks.append(RunRecorder(self.run, record, changed))
        callbacks.append(Dashboard(self.datamodule.class_names, self.config["fit"].as_dict()))
        if monitored:
            callbacks.append(self.config_init["fit"].early_stopping)
        if settings.enable_checkpointing is not False:
            # Best before last, so that the last checkpoint knows the best of its own epoch.
            callbacks += [BestCheckpoint(self.run)] if monitored else []
            callbacks.append(LastCheckpoint(self.run, self.config_init["fit"].checkpoint, self._signals))
        return callbacks

    def _make_run(self, config: Namespace) -> None:
        """Make the run folder of `fit`, or open the one that it goes on with."""
        if not is_first_process():
            self.run = RunFolder(announced_run(self.resumed.path if self.resumed is not None else config.run_dir))
            return
        if self.resumed is not None:
            self.run = self.resumed
            assert self.stopped_at is not None
            clear_up(self.run, self.stopped_at)
            reason = other_images(self.run, self.datamodule)
            if reason:
                raise UserError(f"{self.run.path}: {reason}; going on would train on its validation images.")
        else:
            self.model.prepare(self.datamodule)  # before a folder is made: pretrained weights may be missing
            found = self._tune(config) if config.tune_lr else None
            if config.ckpt_path:
                read_checkpoint(Path(config.ckpt_path))  # a damaged one should not leave an empty run behind
            if config.init_weights:
                load_weights(self.model.model, Path(config.init_weights))
                print(f"Begins with the weights of {config.init_weights}.")
            self.run = self._new_folder(config)
            write_text_durably(self.run.config, config_text(self._parser("fit"), config))
            if found is not None:
                write_lr_range(self.run, found)
        announce_run(self.run.path)

    @staticmethod
    def _new_folder(config: Namespace, suffix: str = "") -> RunFolder:
        recipe = recipe_name(config.config, config.model.name) + suffix
        return create_run(RUNS, recipe, Path(config.run_dir) if config.run_dir else None)

    def _tune(self, config: Namespace) -> LrRange:
        """Find the peak learning rate and set it, as if it had been given by a flag."""
        print("Range test: raising the learning rate for a few steps.")
        found = find_lr(self.model, self.datamodule, **self.config_init["fit"].trainer)
        config.tune_lr = False  # config.yaml repeats the run, not the test
        self.model.optimizer_settings = found.with_peaks(self.model.optimizer_settings)
        for name in ("lr", "sgd_lr", "head_lr"):
            self.model.hparams[name] = config.model[name] = getattr(self.model.optimizer_settings, name)
        return found

    def _run_of_checkpoint(self, checkpoint: Path, output: str | None) -> RunFolder | None:
        """Return the run that a checkpoint lies in, to write its answers into, unless other images are asked for."""
        run = RunFolder(checkpoint.parent.parent)
        if self.subcommand == "validate" and not self.datamodule.num_images("val"):
            raise UserError("validate: nothing was held out (--data.val_fraction 0): there is nothing to validate on.")
        if output:
            return None
        reason = "not in a run folder"
        if checkpoint.parent == run.checkpoints and run.split.exists():
            reason = other_images(run, self.datamodule)
            if not reason and checkpoint != run.tested_checkpoint:
                reason = f"{checkpoint.name} is not the checkpoint that its files are of"
            if not reason:
                return open_run(run.path, lock=is_first_process())
        if self.subcommand == "predict":
            raise UserError(f"predict: {checkpoint}: {reason}; give --output FILE for the answers.")
        if run.split.exists():
            print(f"{run.path}: {reason}, so its files stay as they are.")
        return None

    # -- running -----------------------------------------------------------------------------------------------------

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True  # a checkpoint is data: it must not be able to run code
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # PredictionWriter has them
        elif subcommand != "fit":
            kwargs["verbose"] = False  # our report follows
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; of a run that was trained to its end, only what comes after."""
        trainer = self.config[subcommand].trainer
        point = self.stopped_at
        if point is not None and point.is_end(trainer.max_epochs, trainer.max_steps, self.changes):
            goes_on = partial(self._finish, point.ending(trainer.max_epochs))
        else:
            goes_on = partial(super()._run_subcommand, subcommand)
        with explained(subcommand, self.run if subcommand == "fit" else None):
            try:
                goes_on()
            except UserError:
                self._discard_unbegun()
                raise

    def _finish(self, ending: str) -> None:
        """Make what a trained run lacks."""
        assert self.run is not None
        print(f"{self.run.path}: {ending}; more --epochs beside --resume train on.")
        if not (self.run.test_metrics.exists() and self.run.predictions.exists()):
            self.after_fit()
        else:
            make_report(self.run)

    def before_fit(self) -> None:
        """Bring the run's files to where its checkpoint is."""
        if self.stopped_at is None or self.run is None or not is_first_process():
            return
        for path in (self.run.metrics_csv, self.run.timing_csv):
            MetricsTable(path).cut_after(self.stopped_at.epochs_done - 1)  # they count from 0
        self.run.discard_results()  # of the weights before
        print("\n".join(self.stopped_at.tell(self.run, self.changes, self.model.schedule_settings.name)))

    def after_fit(self) -> None:
        """Test the best checkpoint once, write the answers and make the report."""
        assert self.run is not None
        settings = self.config_init["fit"].trainer
        best = self.run.tested_checkpoint
        if not best.exists() and settings.enable_checkpointing is not False and not settings.fast_dev_run:
            raise UserError(f"{self.run.checkpoints}: no checkpoint could be written; is the folder writable?")
        chosen: dict[str, Any] = {"ckpt_path": best, "weights_only": True} if best.exists() else {}
        if self.datamodule.num_images("val") and settings.limit_val_batches != 0:
            # For the answers alone: a second point on the curve of val/acc would be that of another epoch.
            loggers, self.trainer.loggers = self.trainer.loggers, []
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False, **chosen)
            self.trainer.loggers = loggers
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False, **chosen)
        self.after_test()

    def after_test(self) -> None:
        """Make the run's report, or print what it would say where no run holds the answers."""
        test = self.answers.test
        if not self.trainer.is_global_zero or test is None:
            return
        if self.answers.is_test_written and self.run is not None:
            make_report(self.run)
        else:
            print_findings(find(Results(test.class_names, test.confusion, test=test)))

    def after_validate(self) -> None:
        """Show the validation's figures."""
        if self.trainer.is_global_zero:
            print_validation({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def after_predict(self) -> None:
        """Say where the answers are."""
        if self.trainer.is_global_zero:
            print(f"Logits and probabilities of {self.answers.num_written:,} test images: {self.answers.written_to}")


class TuneCLI(RunCLI):
    """`tune`: the range test alone, with the flags of `fit`; its folder holds the figure and a config with the peak."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make none: the test has its own."""
        return pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=True)

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config["fit"]
        self.datamodule.prepare_data()
        self.datamodule.setup()
        self.model.prepare(self.datamodule)
        found = self._tune(config)
        run = self._new_folder(config, "_tune")
        write_text_durably(run.config, config_text(self._parser("fit"), config))
        write_lr_range(run, found)
        print(f"Suggested peak: {found.suggestion:.2g}, where the loss fell fastest in {len(found.lrs)} steps.")
        print(f"{run.path}: lr_range.png shows it. To train with it:")
        print(f"  python train.py fit --config {run.config.as_posix()}")


class _TableOnly(RunCLI):
    """The parser of `fit` alone."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Nothing is made."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def fit_parser() -> LightningArgumentParser:
    """Return the parser of `fit`, from which `flags.json` is made."""
    parser: LightningArgumentParser = _TableOnly(["fit"])._parser("fit")
    return parser


if __name__ == "__main__":
    TABLE.write_text(table_text(fit_parser()), encoding="utf-8")
