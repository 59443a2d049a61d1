"""Callbacks and loggers of Lightning: what each does in a run, or why it is refused.

`python -m cifar_lightning.cli.trainer_objects` generates docs/callbacks-and-loggers.md; tests hold it equal, run each
that works, and fail for a class of Lightning's that has no entry.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cifar_lightning.errors import UserError
from cifar_lightning.runs.schema import CLASS_GROUPS
from cifar_lightning.settings.import_path import import_object

PAGE = Path("docs/callbacks-and-loggers.md")
_HEAD = """# Callbacks and loggers

Every callback and logger of Lightning, given by name or `class_path` to `--trainer.callbacks` and `--trainer.logger`. A
test runs each that works, in the command `fit`. One that is refused ends the command with exit code 2 and the reason,
before anything is written; a subclass is refused with it.

A logger of your own gets the same as those below: metrics and hyperparameters by `log_metrics` and `log_hyperparams`,
and the figures where it has `log_image(key, images, step)`, as Lightning's WandbLogger does.
The run's own TensorBoard is replaced by the loggers that are given. `validate`, `test` and `predict` of a run make them
only where they are typed again.

This page is generated: `python -m cifar_lightning.cli.trainer_objects`.
"""
_AVERAGES = "tested and saved weights would not be the same; --model.ema_decay 0.999 averages the weights"
_GROUPS = "the schedule does not know the parameter groups that it adds; give --model.freeze backbone"


@dataclass(frozen=True)
class Verdict:
    """What a class does in a run, or the reason that it is refused for, with the way out."""

    does: str = ""
    refused: str = ""
    is_of_schedule: bool = False
    """Whether it is refused for what it does to our optimizer and schedule, not to those of a subclass."""


CALLBACKS = {
    "BackboneFinetuning": Verdict(refused=_GROUPS, is_of_schedule=True),
    "BaseFinetuning": Verdict(refused=_GROUPS, is_of_schedule=True),
    "BasePredictionWriter": Verdict("a subclass writes what `predict` predicts"),
    "BatchSizeFinder": Verdict(refused="the schedule counts its trial steps; give --batch_size", is_of_schedule=True),
    "Callback": Verdict("base of callbacks of your own; every hook is called"),
    "Checkpoint": Verdict("base of ModelCheckpoint, for subclasses"),
    "DeviceStatsMonitor": Verdict("logs the device's memory and load; on the CPU with psutil"),
    "EMAWeightAveraging": Verdict(refused=_AVERAGES),
    "EarlyStopping": Verdict("stops next to the run's own early stopping (`--early_stopping.patience`)"),
    "GradientAccumulationScheduler": Verdict(
        refused="the schedule would not reach its end; give --trainer.accumulate_grad_batches", is_of_schedule=True
    ),
    "LambdaCallback": Verdict("calls functions, given by import path"),
    "LearningRateFinder": Verdict(
        refused="the schedule would replace what it finds; give --tune_lr", is_of_schedule=True
    ),
    "LearningRateMonitor": Verdict("logs the learning rate of each parameter group"),
    "ModelCheckpoint": Verdict(
        "further checkpoints; next to those of the run by other names than best, last and previous, without `save_last`"
    ),
    "ModelPruning": Verdict(
        refused="checkpoints would hold its masks, and no run would resume from them; prune a trained run's model"
    ),
    "ModelSummary": Verdict("prints the layers"),
    "OnExceptionCheckpoint": Verdict(
        refused="a new run would start from a checkpoint that another left; give --checkpoint.every_n_minutes"
    ),
    "ProgressBar": Verdict("base of progress bars, instead of the run's own"),
    "RichModelSummary": Verdict("prints the layers as a table"),
    "RichProgressBar": Verdict("instead of the run's own progress bar"),
    "SpikeDetection": Verdict(
        refused="its state cannot be restored for the test; a loss that is NaN or infinite stops training anyway"
    ),
    "StochasticWeightAveraging": Verdict(refused=_AVERAGES),
    "TQDMProgressBar": Verdict("instead of the run's own progress bar"),
    "ThroughputMonitor": Verdict("logs batches and images per second; `batch_size_fn` is an import path"),
    "Timer": Verdict("ends training after a time, as `--trainer.max_time` does"),
    "WeightAveraging": Verdict(refused=_AVERAGES),
}
_ELSEWHERE = "as CSVLogger; needs its package and an account, and was not run here"
LOGGERS = {
    "CSVLogger": Verdict("metrics and hyperparameters, into a folder of its own"),
    "CometLogger": Verdict(_ELSEWHERE),
    "LitLogger": Verdict(_ELSEWHERE),
    "Logger": Verdict("base of loggers of your own"),
    "MLFlowLogger": Verdict("as CSVLogger, and the figures; needs `mlflow`"),
    "TensorBoardLogger": Verdict("metrics, hyperparameters, figures and PR curves, as the run's own"),
    "WandbLogger": Verdict("as CSVLogger, and the figures; needs `wandb`, also with `offline: true`"),
}


def check_kinds(kinds: Iterable[Any], source: str = "--trainer.callbacks", *, has_own_schedule: bool = False) -> None:
    """Raise a `UserError` for a class of callbacks that would fail or mislead; what is no class is skipped.

    Args:
        kinds: The classes.
        source: Where they are given.
        has_own_schedule: Whether optimizer and schedule are of a subclass, not ours.
    """
    library = importlib.import_module("lightning.pytorch.callbacks")
    exempt = {name for name, verdict in CALLBACKS.items() if has_own_schedule and verdict.is_of_schedule}
    for kind in kinds:
        for name, verdict in CALLBACKS.items():
            is_refused = verdict.refused and name not in exempt
            if is_refused and isinstance(kind, type) and issubclass(kind, getattr(library, name)):
                raise UserError(f"{source} {kind.__name__}: {verdict.refused}.")


def drop_unserializable_defaults(settings: Namespace) -> None:
    """Leave arguments of classes out that have the class's default where YAML cannot hold it, such as a torch.device.

    jsonargparse writes such a default as text, which the next command would read as the argument, or fails.
    """
    made: list[tuple[Any, Any]] = [(class_of(node), node.get("init_args")) for node in objects_in(settings)]
    own = {group: settings.get(f"{group}_class") for group in CLASS_GROUPS}
    made += [(import_object(path, f"--{group}"), settings.get(group)) for group, path in own.items() if path]
    for kind, given in made:
        arguments = vars(given) if given else {}
        makers = [vars(base).get("__init__") for base in kind.__mro__] if isinstance(kind, type) else [kind]
        signatures = [inspect.signature(maker) for maker in reversed(makers) if inspect.isfunction(maker)]
        defaults = {name: each.default for signature in signatures for name, each in signature.parameters.items()}
        for name, value in list(arguments.items()):
            is_plain = isinstance(value, str | int | float | list | dict | Namespace | None)
            if name in defaults and value is defaults[name] and (isinstance(value, Enum) or not is_plain):
                del arguments[name]


def objects_in(settings: Any) -> Iterator[Namespace]:
    """Yield what is given by `class_path` among settings, also as an argument of another."""
    is_node = isinstance(settings, Namespace)
    children = settings if isinstance(settings, list) else vars(settings).values() if is_node else ()
    if is_node and isinstance(settings.get("class_path"), str):
        yield settings
    for child in children:
        yield from objects_in(child)


def class_of(node: Namespace) -> Any:
    """Import what is given by `class_path`: a class, also one inside another, or a function or object."""
    parent, _, name = node["class_path"].rpartition(".")
    return getattr(pkgutil.resolve_name(parent), name)


def page_text() -> str:
    """Return the content of the docs page."""
    lines = [_HEAD]
    for title, verdicts in (("Callbacks", CALLBACKS), ("Loggers", LOGGERS)):
        lines += [f"## {title}\n", "| Class | Verdict | In a run, or the reason |", "| --- | --- | --- |"]
        for name, verdict in verdicts.items():
            lines.append(f"| `{name}` | {'works' if verdict.does else 'refused'} | {verdict.does or verdict.refused} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page_text(), encoding="utf-8")
