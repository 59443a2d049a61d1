"""The command line: LightningCLI over ImageClassifier and ImageDataModule, with runs as folders and short errors."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cifar_lightning.answers import AnswerKeeper
from cifar_lightning.callbacks import (
    AnnealingEarlyStopping,
    Dashboard,
    NoProfiler,
    RunBoard,
    RunCheckpoint,
    RunRecorder,
)
from cifar_lightning.classifier import ImageClassifier
from cifar_lightning.data import ImageDataModule
from cifar_lightning.errors import UserError
from cifar_lightning.files import read_json, write_text_durably
from cifar_lightning.progress import RunProgress
from cifar_lightning.report import print_test_report
from cifar_lightning.runs import RunFolder, create_run, discard_run, open_run

RUNS = Path("runs")
ALIASES = {"--epochs": "--trainer.max_epochs", "--batch_size": "--data.batch_size", "--lr": "--model.lr"}
_EVALUATING = ("validate", "test")
# Lightning's launcher runs the command again for each further process, which must join the first one's run.
_RUN_OF_RANK_0 = "CIFAR_LIGHTNING_RUN_DIR"
_SILENCED = (
    # The advice would be wrong: torchmetrics has summed over the ranks, and the mean of uneven ranks is not the mean.
    ".*It is recommended to use .*sync_dist=True.*",
    # Our logger steps once an epoch whatever log_every_n_steps is.
    ".*is smaller than the logging interval.*",
    # Lightning 2.6 asks torch's pytree in a way that torch has deprecated.
    ".*LeafSpec.*is deprecated.*",
    # `test` needs no callback of `fit`; a run that goes on elsewhere begins with a best of its own.
    "Be aware that when using `ckpt_path`.*",
    "The dirpath has changed from .*",
    # A chosen --run_dir that a run without any checkpoint left behind.
    "Checkpoint directory .* exists and is not empty.*",
)


def main() -> None:
    """Run the command of `sys.argv` and exit: 0, 1 for a run that failed, 2 for what the user can mend."""
    try:
        run_command(sys.argv[1:])
    except (UserError, MisconfigurationException) as error:
        # Three lines at most: what is wrong and what to do, not how the program found out.
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        print("error: " + "\n".join(lines[:3]), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is None:  # not about a file of the user's: a mistake of the program
            raise
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)


def run_command(argv: Sequence[str]) -> "RunCLI":
    """Run one command line without its program's name."""
    for library in ("lightning.pytorch", "lightning.fabric"):  # no adverts, no list of absent accelerators, no seed
        logging.getLogger(library).setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Lightning switches on a check for CUDA that looks for the driver's library anew each time, and torch's
        # optimisers ask in every step: 0.1 ms of each step on a machine without a GPU.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    for message in _SILENCED:
        warnings.filterwarnings("ignore", message)
    return RunCLI(rewrite_arguments(argv))


def rewrite_arguments(argv: Sequence[str]) -> list[str]:
    """Spell aliases out, and a run folder after `test` or `validate` as its config and best checkpoint.

    Rewriting, because LightningCLI's own means either make the long form an error or change the saved key.

    Raises:
        UserError: An alias and its long form are given with different values, or the folder is not a run.
    """
    rewritten = list(argv)
    if len(rewritten) > 1 and rewritten[0] in _EVALUATING and not rewritten[1].startswith("-"):
        run = open_run(Path(rewritten[1]))
        if not run.tested_checkpoint.exists():
            raise UserError(f"{run.path}: no checkpoint in it; fit has to finish an epoch first.")
        rewritten[1:2] = ["--config", str(run.config), "--ckpt_path", str(run.tested_checkpoint)]
    for alias, long_form in ALIASES.items():
        short, long = _last_value(rewritten, alias), _last_value(rewritten, long_form)
        if short is not None and long is not None and short != long:
            raise UserError(
                f"{alias} {short} and {long_form} {long} are one setting with two values; give one of them."
            )
    return [_spell_out(argument) for argument in rewritten]


def _spell_out(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return ALIASES.get(name, name) + equals + value


def _last_value(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag, `--flag value` or `--flag=value`; the last one counts."""
    value = None
    for position, argument in enumerate(arguments):
        name, equals, inline = argument.partition("=")
        if name == flag:
            value = inline if equals else "".join(arguments[position + 1 : position + 2])
    return value


def is_first_process() -> bool:
    """Return whether this process is the first of all, whoever started them: Lightning, torchrun or SLURM."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def recipe_name(config: Namespace) -> str:
    """Return what a run is filed under: its recipe, that of the run whose config.yaml it repeats, or its network."""
    if not config.config:
        return str(config.model.name)
    recipe = Path(str(config.config[-1])).resolve()
    is_of_a_run = recipe.name == "config.yaml" and recipe.parent.name.isdecimal()
    return recipe.parent.parent.name if is_of_a_run else recipe.stem


class RunParser(LightningArgumentParser):
    """LightningCLI's parser that raises a short `UserError` instead of printing usage, and takes no abbreviation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message's first lines."""
        lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
        raise UserError("\n".join(lines[:2])) from ex


class RunCLI(LightningCLI):
    """Makes the run folder, the callbacks that fill it, and what follows `fit`.

    Args:
        args: The command line, aliases spelled out.
    """

    def __init__(self, args: list[str]) -> None:
        self.run: RunFolder | None = None
        self.answers = AnswerKeeper(None)
        # LightningCLI takes sys.argv, and warns where it is given arguments beside it.
        sys.argv[1:] = args
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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands and which of their arguments are not flags."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only", "verbose"} for name in ("fit", *_EVALUATING)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder's flag and early stopping's; take from the data what the data knows."""
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of the run; default: runs/RECIPE/N."
        )
        parser.add_lightning_class_args(AnnealingEarlyStopping, "early_stopping")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line as it is: LightningCLI would silently replace it by the checkpoint's values."""

    def before_instantiate_classes(self) -> None:
        """Choose by device what was left open: precision, and cuDNN's autotune where runs need not be deterministic."""
        self._check_arguments(self.config[self.subcommand])
        trainer = self.config[self.subcommand].trainer
        on_cuda = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
        if on_cuda:
            torch.set_float32_matmul_precision("high")  # TF32 where a product is in 32 bits
        if trainer.precision is None:
            trainer.precision = "16-mixed" if on_cuda else "32-true"
        elif not on_cuda and str(trainer.precision) in ("16", "16-mixed", "16-true"):
            # Half precision on a CPU is emulated and 90 times slower where the processor has no instructions for it.
            print(f"--trainer.precision {trainer.precision} needs a GPU: using 32-true.", file=sys.stderr)
            trainer.precision = "32-true"
        if trainer.benchmark is None:
            trainer.benchmark = not trainer.deterministic

    def _check_arguments(self, config: Namespace) -> None:
        """Refuse what would fail after the run folder is made, or silently do something else."""
        if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
            raise UserError(
                f"--ckpt_path {config.ckpt_path}: no such file; give a checkpoint, RUN/checkpoints/last.ckpt."
            )
        if self.subcommand != "fit" and config.ckpt_path is None:
            raise UserError(f"{self.subcommand} needs a trained network: give a run folder, or --ckpt_path FILE.")
        epochs = config.trainer.max_epochs
        if self.subcommand == "fit" and (epochs == 0 or (epochs in (None, -1) and config.trainer.max_steps == -1)):
            raise UserError(f"--epochs {epochs}: 1 or more; OneCycle needs an end.")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer with the callbacks and the logger of the run."""
        config = self.config[self.subcommand]
        monitored = False
        if self.subcommand == "fit":
            monitored = self._make_run(config)
        elif config.ckpt_path is not None:
            self.run = self._run_of_checkpoint(Path(config.ckpt_path))
        settings = self.config_init[self.subcommand].trainer
        callbacks: list[pl.Callback] = list(settings.callbacks or [])
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if settings.enable_progress_bar is not False and not has_bar:
            callbacks.append(RunProgress(self.run if self.subcommand == "fit" else None))
        self.answers = AnswerKeeper(self.run)
        callbacks.append(self.answers)
        if self.subcommand == "fit":
            assert self.run is not None
            callbacks.append(RunRecorder(self.run))
            callbacks.append(Dashboard(self.datamodule.class_names))
            if monitored:
                callbacks.append(self.config_init[self.subcommand].early_stopping)
            if settings.enable_checkpointing is not False:
                # Best before last, so that the last checkpoint knows the best of its own epoch.
                callbacks += [
                    RunCheckpoint(self.run, which) for which in (("best", "last") if monitored else ("last",))
                ]
            if not monitored:
                settings.limit_val_batches = 0  # Lightning warns of loaders of length zero
        logger = settings.logger
        if logger in (None, True):
            logger = RunBoard(self.run) if self.subcommand == "fit" and self.run else False
        made = {"callbacks": callbacks, "logger": logger, "profiler": settings.profiler or NoProfiler()}
        try:
            return pl.Trainer(**{**settings, **made})
        except BaseException as error:
            if self.subcommand == "fit" and self.run is not None and is_first_process():
                discard_run(self.run)
            if isinstance(error, ValueError):  # an unknown accelerator or strategy, for example
                raise UserError(str(error).strip().splitlines()[0]) from error
            raise

    def _make_run(self, config: Namespace) -> bool:
        """Make the run folder of `fit` once its data is known to be good; return whether anything is held out."""
        # Before the folder is made: a mistake should not leave an empty run behind.
        self.datamodule.prepare_data()
        self.datamodule.setup()
        if not is_first_process():
            chosen = os.environ.get(_RUN_OF_RANK_0) or config.run_dir
            if chosen is None:
                raise UserError("several processes started from outside (torchrun, SLURM) need one --run_dir for all.")
            self.run = RunFolder(Path(chosen))
        else:
            self.run = create_run(RUNS, recipe_name(config), Path(config.run_dir) if config.run_dir else None)
            os.environ[_RUN_OF_RANK_0] = str(self.run.path)
            write_text_durably(self.run.config, self._config_text(config))
        return bool(self.datamodule.num_pictures("val")) and config.trainer.limit_val_batches != 0

    def _run_of_checkpoint(self, checkpoint: Path) -> RunFolder | None:
        """Return the run that a checkpoint lies in, to write its test into, unless other pictures are tested."""
        run = RunFolder(checkpoint.parent.parent)
        self.datamodule.prepare_data()
        self.datamodule.setup()
        if self.subcommand == "validate" and not self.datamodule.num_pictures("val"):
            raise UserError(
                "validate: nothing was held out (--data.val_fraction 0), so there is nothing to validate on."
            )
        if checkpoint.parent != run.checkpoints or not run.split.exists():
            return None
        theirs, ours = read_json(run.split), self.datamodule.split_summary()
        reason = ""
        if any(theirs[key] != ours[key] for key in ("sha256", "train", "val")):
            reason = "these are not its pictures or not its split"
        elif checkpoint != run.tested_checkpoint:
            reason = f"{checkpoint.name} is not the checkpoint that its files are of"
        if reason:
            print(f"{run.path}: {reason}, so its files stay as they are.")
            return None
        return open_run(run.path, lock=is_first_process())

    def _config_text(self, config: Namespace) -> str:
        """Return every value of the run as YAML, without the run's own path, so that it starts the same run anew."""
        own = config.clone()
        for key in ("run_dir", "config", "ckpt_path"):
            own.pop(key, None)
        text: str = self._parser("fit").dump(own, skip_none=False)
        return text

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True  # a checkpoint is data: it must not be able to run code
        if subcommand != "fit":
            kwargs["verbose"] = False  # our report follows
        return kwargs

    def after_fit(self) -> None:
        """Test the best checkpoint once, write the answers and show the report."""
        assert self.run is not None
        settings = self.config_init["fit"].trainer
        best = self.run.tested_checkpoint
        if not best.exists() and settings.enable_checkpointing is not False and not settings.fast_dev_run:
            raise UserError(f"{self.run.checkpoints}: no checkpoint could be written; is the folder writable?")
        chosen: dict[str, Any] = {"ckpt_path": best, "weights_only": True} if best.exists() else {}
        if self.datamodule.num_pictures("val") and settings.limit_val_batches != 0:
            # For the answers alone: a second point on the curve of val/acc would be that of another epoch.
            loggers, self.trainer.loggers = self.trainer.loggers, []
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False, **chosen)
            self.trainer.loggers = loggers
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False, **chosen)
        self.after_test()

    def after_test(self) -> None:
        """Show the report of the test."""
        if self.trainer.is_global_zero and self.answers.metrics is not None and self.answers.confusion is not None:
            run_path = self.run.path if self.run is not None else None
            print_test_report(self.answers.metrics, self.answers.confusion, self.datamodule.class_names, run_path)

    def after_validate(self) -> None:
        """Show the validation's figures."""
        if self.trainer.is_global_zero:
            for name, value in self.trainer.callback_metrics.items():
                print(f"{name:<9} {float(value):.4f}")
