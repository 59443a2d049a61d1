"""TrainingCLI: LightningCLI that parses a command line and instantiates the model and the data, and runs nothing."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cifar_lightning.checkpoints.durable import DurableCheckpointIO
from cifar_lightning.checkpoints.loading import plain
from cifar_lightning.cli.flags import MAY_BE_OBJECTS, config_tree, own_classes
from cifar_lightning.cli.parser import (
    TABLE,
    RunParser,
    add_own_flags,
    as_list,
    check_arguments,
    config_text,
    describe_as_here,
    describe_flags,
    table_text,
)
from cifar_lightning.cli.trainer_arguments import settle_devices
from cifar_lightning.cli.trainer_objects import check_kinds, drop_unserializable_defaults
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.memory import keep_freed_memory
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.formatting import clipped, program, raised_by
from cifar_lightning.models.registry import DEFAULT_MODEL
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.schema import CLASS_GROUPS
from cifar_lightning.settings.import_path import add_working_directory, import_modules, import_object
from cifar_lightning.settings.roles import ONLY_CROSS_ENTROPY, OWN_OPTIMIZER, object_name
from cifar_lightning.training.error_messages import cause_of, explained, of_settings, of_users_objects
from cifar_lightning.training.lightning_patches import NoProfiler, check_cuda_once
from cifar_lightning.training.losses import DEFAULT_LOSS
from cifar_lightning.training.model_checks import check_sizes, is_of_a_library
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.precision import is_on_cuda, settle_precision
from cifar_lightning.training.progress_bar import RunProgress
from cifar_lightning.training.quiet_lightning import quiet
from cifar_lightning.training.signals import StopSignals
from cifar_lightning.transforms.pipeline import DEFAULT


@dataclass(frozen=True)
class PythonObjects:
    """What a caller from Python gives as objects, in place of settings or next to them.

    Attributes:
        model: An ImageClassifier, or any other nn.Module that returns raw logits.
        data: An ImageDataModule, or what `ImageDataModule(dataset=...)` takes.
        callbacks: Further callbacks of the Trainer.
    """

    model: nn.Module | None = None
    data: Any = None
    callbacks: Sequence[pl.Callback] = ()

    def replaced_settings(self) -> list[str]:
        """Return the settings in whose place an object is given; a plain module leaves the loss to the config."""
        names = [name for name in MAY_BE_OBJECTS if getattr(self, name.partition(".")[0]) is not None]
        return [name for name in names if name != "model.loss" or isinstance(self.model, ImageClassifier)]


class TrainingCLI(LightningCLI):
    """Parses one command line, or raises `UserError`; `instantiate` then returns the model and the data.

    Args:
        command: fit, validate, test or predict.
        arguments: Its flags by their long names.
        objects: Used instead of those that the flags name; the settings become those of the objects.
    """

    def __init__(self, command: str, arguments: Sequence[str], objects: PythonObjects | None = None) -> None:
        self._arguments, self._objects = [command, *arguments], objects or PythonObjects()
        add_working_directory()
        for flag in arguments:
            if flag.startswith("--config="):
                tree = config_tree(Path(flag.removeprefix("--config=")))
                for group, _, name in (each.partition(".") for each in self._objects.replaced_settings()):
                    if isinstance(tree.get(group), dict):  # neither imported nor checked for trust
                        tree[group] = {key: value for key, value in tree[group].items() if key != name}
                import_modules(tree)
        own = own_classes(arguments)
        super().__init__(
            _class_of("model", own.get("model")),
            _class_of("data", own.get("data")),
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_class=RunParser,
            parser_kwargs={"prog": program()},
            load_from_checkpoint_support=False,
        )

    # Lightning's is static and has all commands: making the parsers of the other three takes 0.25 s.
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on an instance
        """Return the command of this command line, and which of its arguments are not flags."""
        command = self._arguments[0]
        return {command: LightningCLI.subcommands()[command] | {"weights_only", "verbose", "return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's own flags."""
        add_own_flags(parser)

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(*args, **kwargs)
        describe_as_here(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; sys.argv stays as it is for launchers, which start further processes with it."""
        self.config = parser.parse_args(self._arguments)

    def _parse_ckpt_path(self) -> None:
        """Keep the flags: LightningCLI would silently replace them by the hyperparameters in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Check the settings and choose the precision by device."""
        self.settings: Namespace = self.config[self.subcommand]
        for group in CLASS_GROUPS:
            if group not in self.settings:  # of a class without arguments
                self.settings[group] = Namespace()  # type: ignore[no-untyped-call]  # jsonargparse has no types for it
        self._take_settings_of_objects()
        model = self.settings.model
        if model.get("model") and model.get("name") == DEFAULT_MODEL:
            model.name = None
        name = model.get("name")
        if self._objects.model is not None:
            model.name = None  # nothing is made by it
        self._refuse_typed_smoothing()
        command = str(self.subcommand)
        check_arguments(command, self.settings, self._parser(command).get_defaults())
        if self._objects.model is not None:
            model.name = name
        settle_precision(self.settings.trainer)
        settle_devices(command, self.settings.trainer)
        drop_unserializable_defaults(self.settings)

    def _refuse_typed_smoothing(self) -> None:
        """Refuse the default of --model.label_smoothing where it is typed with another loss; a config may have it."""
        loss, smoothing = self.settings.model.get("loss"), self.settings.model.get("label_smoothing")
        is_typed = any(argument.startswith("--model.label_smoothing=") for argument in self._arguments)
        if is_typed and smoothing and loss not in (None, DEFAULT_LOSS) and not self.settings.model_class:
            raise UserError(f"--model.label_smoothing {smoothing}: {ONLY_CROSS_ENTROPY.format(clipped(str(loss)))}")

    def _take_settings_of_objects(self) -> None:
        """Have the settings, and so config.yaml, be those of a given ImageClassifier and ImageDataModule."""
        model, data = self._objects.model, self._objects.data
        if isinstance(model, ImageClassifier):
            made = made_from(model)
            _update(self.settings.model, {**model.hparams, **made})
        if isinstance(data, ImageDataModule):
            dataset, has_objects = data.arguments["dataset"], data.arguments["transforms"] != DEFAULT
            is_named = type(data) is ImageDataModule and isinstance(dataset, str) and not has_objects
            named = {"dataset": dataset if is_named else object_name(data), "transforms": DEFAULT}
            _update(self.settings.data, {**data.arguments, **named})

    def _make_model(self, kind: type[ImageClassifier], **settings: Any) -> ImageClassifier:
        given = self._objects.model
        if isinstance(given, ImageClassifier):
            return given
        return kind(**settings) if given is None else kind(**{**settings, "name": None, "model": given})

    def _make_data(self, kind: type[ImageDataModule], **settings: Any) -> ImageDataModule:
        given = self._objects.data
        if isinstance(given, ImageDataModule):
            return given
        return kind(**settings) if given is None else kind(**{**settings, "dataset": given})

    def instantiate_classes(self) -> None:
        """Wait for `instantiate`."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing: `fit`, `evaluate` and `tune` are functions."""

    def instantiate(self) -> tuple[ImageClassifier, ImageDataModule, Namespace]:
        """Return the model, the data, and the settings with their objects instantiated."""
        if self._objects != PythonObjects():
            self._parser(self.subcommand).add_instantiator(self._make_model, ImageClassifier)
            self._parser(self.subcommand).add_instantiator(self._make_data, ImageDataModule)
        own = [f"--{group} {path}" for group in CLASS_GROUPS if (path := self.settings.get(f"{group}_class"))]
        try:
            with of_users_objects():
                made = self.parser.instantiate_classes(self.config)[self.subcommand]
        except (OSError, RunError, UserError):
            raise
        except Exception as error:  # a class of the user's raises anything
            if not own:
                raise
            raise UserError(f"{' with '.join(own)}: cannot be made ({raised_by(error)}).") from error
        if given := self.settings.model.get("model"):
            made.model.remember_model(dict(given.get("init_args") or {}))
        if self._objects.model is not None:
            _update(self.settings.model, made_from(made.model))
        made.trainer.callbacks = [*as_list(made.trainer.callbacks), *self._objects.callbacks] or None
        if self.subcommand == "fit":  # also those that a function makes or a module holds
            check_kinds(map(type, made.trainer.callbacks or ()))
        if self.settings.model_class:
            given = self.settings.model.as_dict()
            made.model.init_args = {key: each for key, each in given.items() if key != "model" or each is not None}
        self._use_optimizer(made)
        return made.model, made.data, made

    def _use_optimizer(self, made: Namespace) -> None:
        """Have the model use --optimizer and --lr_scheduler, as LightningCLI does; refuse what they refuse."""
        self.config_init, self.model = {self.subcommand: made}, made.model
        with warnings.catch_warnings():
            if made.model.plans_schedule:  # it warns of every `configure_optimizers`, also of that which is meant
                warnings.filterwarnings("ignore", ".*will be overridden.*")
            try:
                if self.subcommand == "fit":  # validate, test and predict make no step
                    _try_optimizer(made)
                self._add_configure_optimizers_method_to_model(self.subcommand)
            except Exception as error:  # a class of the user's raises anything
                flags = [f"--{name} {made[name].class_path}" for name in OWN_OPTIMIZER if made[name]]
                raise UserError(f"{' with '.join(flags)}: {cause_of(error)}") from error

    @staticmethod
    def configure_optimizers(lightning_module: pl.LightningModule, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """Return what LightningCLI does, with the optimizer's states of the same type as the weights.

        It is made before the Trainer converts the weights, as in 64-true. Adagrad makes its states then, and a resumed
        run would have others, since loading converts them.
        """
        if optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)

    @property
    def model_name(self) -> str:
        """The model's name, or the class of one's own."""
        model = self.settings.model
        own = model.model.class_path if model.get("model") else self.settings.model_class
        return str(model.get("name") or own).strip("<>")

    @property
    def config_text(self) -> str:
        """All settings as the content of config.yaml, which `fit --config` repeats."""
        return config_text(self._parser("fit"), self.settings)


def _update(settings: Namespace, values: dict[str, Any]) -> None:
    for name in settings.keys() & values.keys():
        settings[name] = plain(values[name])


def made_from(model: ImageClassifier) -> dict[str, Any]:
    """Return the settings that make a model again, or the name of its class where none do."""
    if type(model) is not ImageClassifier:
        return {"name": object_name(model)}
    model.forget_changed_model()
    if imported := model.imported:
        return {"name": imported["path"], "model_kwargs": imported["kwargs"] or None}
    return {} if model.hparams["name"] else {"name": object_name(model.model)}


def _try_optimizer(made: Namespace) -> None:
    """Make a step of --optimizer and of --lr_scheduler on the CPU; of a run on a GPU only `UserError`s count."""
    if not made.optimizer:
        return
    try:
        _step_once(made)
    except UserError:
        raise
    except Exception:  # a class of the user's raises anything
        if not is_on_cuda(made.trainer):  # where some step that do not on a CPU, as those with `capturable`
            raise


def _step_once(made: Namespace) -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer = instantiate_class([weight], made.optimizer.as_dict())
    scheduler = instantiate_class(optimizer, made.lr_scheduler.as_dict()) if made.lr_scheduler else None
    # schedulefree's step only in the mode that hooks or callbacks must set.
    has_modes = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    has_hooks = not (type(made.model) is ImageClassifier and all(map(is_of_a_library, made.trainer.callbacks or ())))
    if has_modes and has_hooks:
        optimizer.train()
    closure()
    try:
        optimizer.step(closure)
    except Exception as error:  # a class of the user's raises anything
        if not has_modes or has_hooks:
            raise
        optimizer.train()
        optimizer.step(closure)  # raises what is not of the modes
        raise UserError(
            f"{cause_of(error)} Give --model a subclass of ImageClassifier whose on_train_epoch_start calls "
            "self.trainer.optimizers[0].train(), and, only where self.trainer.state.fn == 'fit', "
            "on_validation_epoch_start .eval() and on_validation_end .train()."
        ) from error
    if scheduler is not None:
        scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))


_BASES = {"model": (ImageClassifier, pl.LightningModule), "data": (ImageDataModule, pl.LightningDataModule)}


def class_rows(group: str, path: str) -> dict[str, dict[str, Any]]:
    """Return the rows of `flags.table` for a class of one's own."""
    parser = RunParser()
    parser.add_lightning_class_args(_class_of(group, path), group)
    return describe_flags(parser)


def _class_of(group: str, path: str | None) -> Any:
    """Import the class that makes the model or the data; None is ours.

    Raises:
        UserError: It cannot be imported, or is no subclass of ours.
    """
    base, lightning_base = _BASES[group]
    if path is None:
        return base
    made = import_object(path, f"--{group}")
    if isinstance(made, type) and issubclass(made, base):
        return made
    way_out = f"subclass cifar_lightning.{base.__name__}, whose arguments are the flags of --{group}"
    if isinstance(made, type) and issubclass(made, lightning_base):
        way_out = (
            f"a {lightning_base.__name__} of another kind works with this package's classes and callbacks in a "
            f"lightning.Trainer: docs/python-api.md.\nOr {way_out}"
        )
    raise UserError(f"--{group} {clipped(path)}: not a subclass of {base.__name__}; {way_out}.")


def fit_parser() -> LightningArgumentParser:
    """Return the parser of `fit`, from which `flags.json` is made."""
    parser: LightningArgumentParser = TrainingCLI("fit", ["--seed_everything=false"])._parser("fit")
    return parser


@contextlib.contextmanager
def training_process(command: str) -> Iterator[StopSignals]:
    """Prepare this process for a command that uses Lightning, and raise known errors as one of ours."""
    keep_freed_memory()
    check_cuda_once()
    signals = StopSignals()
    signals.install()
    try:
        with quiet(), explained(command):
            yield signals
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def prepare_data(data: ImageDataModule, model: ImageClassifier) -> None:
    """Download or decode the images, split them, and check that they fit the model."""
    data.prepare_data()
    data.setup()
    check_sizes(model.model, data.train_sizes, data.in_channels)


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
