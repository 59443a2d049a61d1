"""TrainingCLI: LightningCLI that parses a command line and instantiates the model and the data, and runs nothing."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.cli.parser import (
    TABLE,
    RunParser,
    add_own_flags,
    as_list,
    check_arguments,
    config_text,
    table_text,
)
from cifar_lightning.cli.trainer_objects import drop_unserializable_defaults
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.memory import keep_freed_memory
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import program
from cifar_lightning.models.registry import DEFAULT_MODEL
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.import_path import add_working_directory
from cifar_lightning.training.error_messages import explained, of_settings, of_users_objects
from cifar_lightning.training.lightning_patches import NoProfiler, check_cuda_once
from cifar_lightning.training.model_checks import check_sizes
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.precision import settle_precision
from cifar_lightning.training.progress_bar import RunProgress
from cifar_lightning.training.quiet_lightning import silence
from cifar_lightning.training.signals import StopSignals


class TrainingCLI(LightningCLI):
    """Parses one command line, or raises `UserError`; `instantiate` then returns the model and the data.

    Args:
        command: fit, validate, test or predict.
        arguments: Its flags by their long names.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self._arguments = [command, *arguments]
        add_working_directory()
        super().__init__(
            ImageClassifier,
            ImageDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_class=RunParser,
            parser_kwargs={"prog": program()},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands and which of their arguments are not flags."""
        commands = LightningCLI.subcommands()
        not_flags = {"weights_only", "verbose", "return_predictions"}
        return {name: commands[name] | not_flags for name in ("fit", "validate", "test", "predict")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's own flags."""
        add_own_flags(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; sys.argv stays as it is for launchers, which start further processes with it."""
        self.config = parser.parse_args(self._arguments)

    def _parse_ckpt_path(self) -> None:
        """Keep the flags: LightningCLI would silently replace them by the hyperparameters in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Check the settings and choose the precision by device."""
        self.settings: Namespace = self.config[self.subcommand]
        if self.settings.model.model and self.settings.model.name == DEFAULT_MODEL:
            self.settings.model.name = None
        check_arguments(str(self.subcommand), self.settings)
        settle_precision(self.settings.trainer)
        drop_unserializable_defaults(self.settings)

    def instantiate_classes(self) -> None:
        """Wait for `instantiate`."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing: `fit`, `evaluate` and `tune` are functions."""

    def instantiate(self) -> tuple[ImageClassifier, ImageDataModule, Namespace]:
        """Return the model, the data, and the settings with their objects instantiated."""
        with of_users_objects():
            made = self.parser.instantiate_classes(self.config)[self.subcommand]
        if given := self.settings.model.model:
            made.model.remember_model(dict(given.get("init_args") or {}))
        return made.model, made.data, made

    @property
    def model_name(self) -> str:
        """The model's name, or the class of one's own."""
        return str(self.settings.model.name or self.settings.model.model.class_path)

    @property
    def config_text(self) -> str:
        """All settings as the content of config.yaml, which `fit --config` repeats."""
        return config_text(self._parser("fit"), self.settings)


def fit_parser() -> LightningArgumentParser:
    """Return the parser of `fit`, from which `flags.json` is made."""
    parser: LightningArgumentParser = TrainingCLI("fit", ["--seed_everything=false"])._parser("fit")
    return parser


@contextlib.contextmanager
def training_process(command: str) -> Iterator[StopSignals]:
    """Prepare this process for a command that uses Lightning, and raise known errors as one of ours."""
    silence()
    keep_freed_memory()
    check_cuda_once()
    signals = StopSignals()
    signals.install()
    try:
        with explained(command):
            yield signals
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def prepare_data(data: ImageDataModule, model: ImageClassifier) -> None:
    """Download or decode the images, split them, and check that they fit the model."""
    data.prepare_data()
    data.setup()
    check_sizes(model.model, data.train_sizes)


def build_trainer(
    settings: Namespace, callbacks: list[pl.Callback], *, logger: Any, run: RunFolder | None = None
) -> pl.Trainer:
    """Return a Trainer with the user's callbacks, a progress bar, `callbacks`, and checkpoints written durably.

    Args:
        settings: The Trainer's, instantiated.
        callbacks: Added after the user's.
        logger: Used where the user chose none.
        run: Named by the progress bar.

    Raises:
        UserError: A setting that the Trainer refuses.
    """
    users: list[pl.Callback] = as_list(settings.callbacks)
    has_bar = any(isinstance(callback, ProgressBar) for callback in users)
    bar = [RunProgress(run)] if settings.enable_progress_bar is not False and not has_bar else []
    with of_settings():
        return pl.Trainer(
            **{
                **settings,
                "callbacks": [*users, *bar, *callbacks],
                "logger": logger if settings.logger in (None, True) else settings.logger,
                "profiler": settings.profiler or NoProfiler(),
                "plugins": [*as_list(settings.plugins), DurableCheckpointIO()],
            }
        )


if __name__ == "__main__":
    TABLE.write_text(table_text(fit_parser()), encoding="utf-8")
