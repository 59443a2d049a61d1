"""The command line's work from Python: `fit` trains into a run folder."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import yaml
from torch import nn

from cifar_lightning.cli.fit import fit as fit_run
from cifar_lightning.cli.flags import ALIASES, GROUPS, object_name
from cifar_lightning.cli.lightning_cli import PythonObjects, training_process
from cifar_lightning.cli.main import training_arguments
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.datasets import DATASETS
from cifar_lightning.errors import UserError
from cifar_lightning.files import expand_home
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.processes import forget_run
from cifar_lightning.settings.import_path import is_import_path
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.signals import Stopped


def fit(
    model: str | nn.Module | None = None, data: Any = None, *, callbacks: Sequence[pl.Callback] = (), **settings: Any
) -> RunFolder:
    """Train a model, test its best checkpoint and write its run folder, as the command `fit` does.

    Nothing of the process stays changed but the global seed. Ctrl-C ends the epoch's batch, saves a checkpoint and
    raises `KeyboardInterrupt`; `fit(resume=RUN)` continues.

    Args:
        model: A name or package.module:name, as --model.name; an nn.Module that returns raw logits; or an
            ImageClassifier.
        data: A name or package.module:name, as --data.dataset; the path of a folder of images; an ImageDataModule; or
            what `ImageDataModule(dataset=...)` takes.
        callbacks: Further callbacks of the Trainer.
        settings: By the names of the flags: `epochs=3`, `lr=1e-3`, `run_dir="runs/mine"`, `config="quickstart"`,
            `resume="runs/smallnet/1"`; those with a point as `**{"data.flip": "none"}` or `trainer={"max_steps": 100}`.

    Returns:
        The run.

    Raises:
        UserError: A wrong setting, object or data.
        RunError: Training failed after it began.
    """
    chosen = _flat(settings)
    if chosen.get("trainer.fast_dev_run"):
        raise UserError("trainer.fast_dev_run: leaves no run to return; give trainer.limit_train_batches.")
    objects = PythonObjects(_model_object(model), _data_object(data), callbacks)
    given = _refuse_settings_of_objects(objects, chosen)
    if isinstance(model, str):
        chosen["model.name"] = model
    if isinstance(data, str | os.PathLike):
        chosen |= _data_settings(os.fspath(data))
    with _unchanged_process(), training_process("fit") as signals:
        flags, resumed = training_arguments("fit", [f"--{name}={_text(name, chosen[name])}" for name in chosen], given)
        run = fit_run(flags, signals, resumed, objects)
    assert run is not None
    return run


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in GROUPS and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name == "print_config":
            raise UserError("print_config: only on the command line.")
        else:
            flat[name] = value
    return flat


def _text(name: str, value: Any) -> str:
    """Return a setting as it is typed."""
    if isinstance(value, str | os.PathLike):
        return expand_home(os.fspath(value))
    value = value.tolist() if isinstance(value, np.generic) else value
    try:
        text: str = yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=True)
    except yaml.YAMLError as error:
        raise UserError(
            f"{name}: a {type(value).__name__}; give plain values, or an object by class_path and init_args."
        ) from error
    return text.removesuffix("...\n").strip()


def _model_object(model: Any) -> nn.Module | None:
    if model is None or isinstance(model, str):
        return None
    if isinstance(model, type):
        raise UserError(f"model={model.__name__}: a class; give an instance, model={model.__name__}(...).")
    if not isinstance(model, nn.Module) or (
        isinstance(model, pl.LightningModule) and not isinstance(model, ImageClassifier)
    ):
        raise UserError(
            f"model: a {type(model).__name__}; give a name, an nn.Module that returns logits, or an ImageClassifier."
        )
    return model


def _data_object(data: Any) -> Any:
    if isinstance(data, pl.LightningDataModule) and not isinstance(data, ImageDataModule):
        raise UserError(f"data: a {type(data).__name__}; give an ImageDataModule, a data set, or its name.")
    return None if isinstance(data, str | os.PathLike) else data


def _refuse_settings_of_objects(objects: PythonObjects, chosen: dict[str, Any]) -> list[str]:
    """Return the settings that objects stand for; refuse those that a given object has itself."""
    for group, given, kind in (("model", objects.model, ImageClassifier), ("data", objects.data, ImageDataModule)):
        for name in chosen:
            if isinstance(given, kind) and ALIASES.get(name, name).startswith(f"{group}."):
                raise UserError(f"{name}: the {type(given).__name__} that is given has its own; set it there.")
    given = []
    if objects.model is not None:
        given.append("model.name")
    if objects.data is not None:
        given.append("data.dataset")
        chosen["data.dataset"] = object_name(objects.data)
    return given


def _data_settings(data: str) -> dict[str, str]:
    if data not in DATASETS and not is_import_path(data) and (os.sep in data or Path(data).expanduser().is_dir()):
        return {"data.dataset": "folder", "data.root": data}
    return {"data.dataset": data}


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore signal handlers and the environment; raise `KeyboardInterrupt` where Ctrl-C stopped training."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        yield
    except Stopped as stopped:
        if stopped.signum == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        raise
    finally:
        forget_run()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
