"""The command line's work from Python: `fit` trains into a run folder, `load` opens one."""

import contextlib
import functools
import html
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import numpy as np
import yaml
from rich.console import Console
from torch import Tensor, nn

from cifar_lightning.cli.evaluate import evaluate
from cifar_lightning.cli.fit import fit as fit_run
from cifar_lightning.cli.flags import ALIASES, FRONT_ONLY, GROUPS
from cifar_lightning.cli.lightning_cli import PythonObjects, training_process
from cifar_lightning.cli.main import training_arguments
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.datasets import DATASETS
from cifar_lightning.data.image_decoding import Resize
from cifar_lightning.data.image_folder import Skipped
from cifar_lightning.data.object_source import to_square
from cifar_lightning.errors import UserError
from cifar_lightning.files import expand_home
from cifar_lightning.formatting import clipped, percent, plural, reason_of, suggest
from cifar_lightning.inference.predict_images import (
    Prediction,
    choose_top_k,
    default_batch_size,
    find_images,
    predict_files,
    rank_classes,
)
from cifar_lightning.inference.trained_model import TrainedModel, fitted_temperature, load_trained_model
from cifar_lightning.metrics.classification import test_metrics
from cifar_lightning.report.report import make_report
from cifar_lightning.report.results import Predictions, read_predictions
from cifar_lightning.runs.contents import read_table, read_test_metrics
from cifar_lightning.runs.folder import RunFolder, open_model
from cifar_lightning.runs.processes import RUN_OF_FIRST
from cifar_lightning.settings.import_path import is_import_path
from cifar_lightning.settings.roles import object_name
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.signals import Stopped, stop_signals


def fit(
    model: str | nn.Module | None = None,
    data: Any = None,
    settings: Mapping[str, Any] | None = None,
    *,
    callbacks: Sequence[pl.Callback] = (),
    **flags: Any,
) -> "Run":
    """Train a model, test its best checkpoint and write its run folder, as the command `fit` does.

    Nothing of the process stays changed but the global seed, and that glibc keeps freed memory for reuse. Ctrl-C ends
    the step, saves a checkpoint and raises `KeyboardInterrupt`; `fit(resume=RUN)` continues.

    Args:
        model: A name or package.module:name, as --model.name; an nn.Module that returns raw logits; or an
            ImageClassifier.
        data: A name or package.module:name, as --data.dataset; the path of a folder of images; an ImageDataModule; or
            what `ImageDataModule(dataset=...)` takes.
        settings: Settings by the names of the flags, such as `{"data.flip": "none", "trainer.max_steps": 100}`.
        callbacks: Further callbacks of the Trainer.
        flags: Settings whose names have no point: `epochs=3`, `lr=1e-3`, `run_dir="runs/mine"`, `config="quickstart"`,
            `resume="runs/smallnet/1"`; or groups of them: `trainer={"max_steps": 100}`.

    Returns:
        The run.

    Raises:
        UserError: A wrong setting, object or data.
        RunError: Training failed after it began.
    """
    chosen = _flat({**(settings or {}), **flags})
    if chosen.get("trainer.fast_dev_run"):
        raise UserError("trainer.fast_dev_run: leaves no run to return; give trainer.limit_train_batches.")
    objects = PythonObjects(_model_object(model), _data_object(data), callbacks)
    if isinstance(model, str):
        chosen["model.name"] = model
    if isinstance(data, str | os.PathLike):
        chosen |= _data_settings(os.fspath(data))
    with _unchanged_process(), training_process("fit") as signals:
        arguments, resumed = training_arguments("fit", *_typed(chosen, objects))
        run = fit_run(arguments, signals, resumed, objects)
    assert run is not None
    return Run(run, objects, trust_code=True)  # its code has just been run


def load(
    run: str | os.PathLike[str], *, model: nn.Module | None = None, data: Any = None, trust_code: bool = False
) -> "Run":
    """Open a run folder, or a trained model that comes with the package.

    Args:
        run: The folder; or "smallnet", SmallNet trained on CIFAR-10.
        model: For a run whose model was given as an object that nothing makes again: a model of the same class.
        data: Likewise for its data.
        trust_code: Import code of one's own that the run names.

    Raises:
        UserError: It is not a run folder, or holds links or special files.
    """
    folder = open_model(Path(expand_home(os.fspath(run))), results=True)
    return Run(folder, PythonObjects(_model_object(model), data), trust_code=trust_code)


class Run:
    """A trained run: `cifar_lightning.load` and `fit` return it. Files are read when they are asked for.

    Attributes:
        path: The folder.
    """

    def __init__(self, folder: RunFolder, objects: PythonObjects, *, trust_code: bool) -> None:
        self.path = folder.path
        self._folder, self._objects, self._trust_code = RunFolder(folder.path), objects, trust_code

    def __repr__(self) -> str:
        try:
            accuracy = f"test accuracy {percent(self.metrics['accuracy'], 2)}"
        except (UserError, KeyError):
            accuracy = "not tested"
        return f"Run({str(self.path)!r}: {accuracy})"

    @functools.cached_property
    def _temperature(self) -> float:
        return fitted_temperature(self._folder)

    @functools.cached_property
    def _trained(self) -> TrainedModel:
        given = self._objects.model
        if isinstance(given, ImageClassifier) and type(given).forward is ImageClassifier.forward:
            given = given.model
        return load_trained_model(self._folder, trust_code=self._trust_code, model=given)

    @property
    def model(self) -> nn.Module:
        """The model of the best checkpoint, in eval mode: normalized images to raw logits.

        On the CPU; on a GPU after `predict` where there is one.
        """
        return self._trained.model

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self._trained.class_names if self._folder.weights.exists() else self.predictions.class_names

    @property
    def metrics(self) -> dict[str, Any]:
        """Test metrics, as in test_metrics.json."""
        self._folder.require(self._folder.test_metrics)
        return read_test_metrics(self._folder.test_metrics)

    @property
    def epochs(self) -> list[dict[str, float]]:
        """Loss, accuracy and learning rate of each epoch, as in metrics.csv."""
        self._folder.require(self._folder.metrics_csv)
        return read_table(self._folder.metrics_csv)

    @property
    def predictions(self) -> Predictions:
        """Predictions for the test images, as arrays; `to_dataframe()` makes a DataFrame of them."""
        self._folder.require(self._folder.predictions)
        return read_predictions(self._folder.predictions)

    def predict(
        self, images: Any, *, top_k: int | None = None, batch_size: int | None = None, calibrated: bool = False
    ) -> Any:
        """Predict the classes of images of any size, which become squares as for training.

        Args:
            images: Path of an image or of a folder; Pillow image; array or tensor (H, W), (H, W, C) or (C, H, W), uint8
                from 0 to 255 or float from 0 to 1; a batch of them with one more dimension; or a list of any of these.
            top_k: Number of classes for an image; by default 3, or all of fewer.
            batch_size: Images at a time; by default 256 on a GPU, else 64.
            calibrated: Divide the logits by the temperature that was fitted on the validation images.

        Returns:
            A `Prediction` for one image; a list of them for a folder, a batch or a list. Files of a folder that cannot
            be read are left out, with a warning.

        Raises:
            UserError: An image cannot be read or has another form, or the run has no temperature.
            RunError: Memory is short.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size {batch_size}: 1 or more.")
        is_list, size = isinstance(images, list | tuple), batch_size or default_batch_size()
        trained = replace(self._trained, temperature=self._temperature) if calibrated else self._trained
        top_k = choose_top_k(trained, top_k)
        predictions: list[Prediction] = []
        for is_path, group in itertools.groupby(images if is_list else [images], key=_is_path):
            if is_path:
                paths = [Path(expand_home(os.fspath(path) or _no_path())) for path in group]
                predictions += _predict_files(trained, paths, top_k, size)
            else:
                each = (image for given in group for image in (given if _is_batch(given) else [given]))
                wanted = (trained.image_size, trained.resize, trained.in_channels)
                while batch := list(itertools.islice(each, size)):
                    squares = np.stack([_square(image, *wanted) for image in batch])
                    predictions += [Prediction("", top) for top in rank_classes(trained, squares, top_k)]
        is_folder = _is_path(images) and Path(expand_home(os.fspath(images))).is_dir()
        return predictions if is_list or is_folder or _is_batch(images) else predictions[0]

    def test(self, data: Any = None) -> dict[str, Any]:
        """Evaluate the best checkpoint on the test images, as the command `test` does; return the metrics.

        Args:
            data: Other data with the same classes, as `fit` takes it; the files of the run then stay as they are.

        Raises:
            UserError: The run has no checkpoint, or the data has other classes.
        """
        objects = PythonObjects(self._objects.model, self._objects.data if data is None else _data_object(data))
        chosen = _data_settings(os.fspath(data)) if isinstance(data, str | os.PathLike) else {}
        arguments, given = _typed({**chosen, "trust_code": self._trust_code}, objects)
        with _unchanged_process(), training_process("test"):
            flags, _ = training_arguments("test", [str(self.path), *arguments], given)
            tested = evaluate("test", flags, objects).test
        return {} if tested is None else test_metrics(tested.logits, tested.targets, tested.class_names)

    def report(self) -> "ReportPage":
        """Write the report again; in a notebook it is shown.

        Raises:
            UserError: The folder cannot be written.
        """
        if not self._folder.is_writable:
            raise UserError(f"{self.path}: the report cannot be written there; copy the run.")
        make_report(self._folder, console=Console(quiet=True))
        return ReportPage(self._folder.report)


@dataclass(frozen=True)
class ReportPage(os.PathLike[str]):
    """The page of a report, at `path`; a notebook shows it."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 80vh; border: 0"></iframe>'


def _predict_files(trained: TrainedModel, paths: Sequence[Path], top_k: int, batch_size: int) -> Iterable[Prediction]:
    found, _ = find_images(paths)
    unreadable: list[Skipped] = []
    predictions = list(
        predict_files(trained, found, unreadable, {}, top_k=top_k, batch_size=batch_size, in_float32=True)
    )
    for path, reason in unreadable:
        if Path(path) in paths:
            raise UserError(f"{path} {reason}")
    if unreadable:
        (path, reason), num = unreadable[0], plural(len(unreadable), "file")
        warnings.warn(f"{num} cannot be read and left out, the first: {path} {reason}", stacklevel=3)
    return predictions


def _square(image: Any, image_size: int, resize: Resize, in_channels: int) -> np.ndarray:
    try:
        return to_square(image, image_size, resize, in_channels)
    except UserError:
        raise
    except Exception as error:  # Pillow, NumPy and torch raise anything
        raise UserError(f"an image cannot be read ({type(image).__name__}: {reason_of(error)}).") from error


def _no_path() -> NoReturn:
    raise UserError("predict: an empty path; '.' is the working directory.")


def _is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def _is_batch(images: Any) -> bool:
    return isinstance(images, np.ndarray | Tensor) and images.ndim == 4


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in GROUPS and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name == "print_config":
            raise UserError("print_config: only on the command line.")
        elif value is not None or name not in FRONT_ONLY:  # which have no null: None is the default
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
            f"{name}: a {type(value).__name__}; a setting is a plain value. Give objects by callbacks=[...], or to an "
            "ImageClassifier or ImageDataModule that fit gets as model= or data=."
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


def _typed(settings: dict[str, Any], objects: PythonObjects) -> tuple[list[str], list[str]]:
    """Return settings as typed, and the names of those that objects stand for.

    Raises:
        UserError: A setting that a given object has itself, or one that cannot be typed.
    """
    chosen = dict(settings)
    for group, given, kind in (("model", objects.model, ImageClassifier), ("data", objects.data, ImageDataModule)):
        for name in chosen:
            if isinstance(given, kind) and ALIASES.get(name, name).startswith(f"{group}."):
                raise UserError(f"{name}: the {type(given).__name__} that is given has its own; set it there.")
    if objects.data is not None:
        chosen["data.dataset"] = object_name(objects.data)
    return [f"--{name}={_text(name, value)}" for name, value in chosen.items()], objects.replaced_settings()


def _data_settings(data: str) -> dict[str, str]:
    if data in DATASETS or is_import_path(data):
        return {"data.dataset": data}
    if os.sep in data or Path(expand_home(data)).is_dir():
        return {"data.dataset": "folder", "data.root": data}
    names = ", ".join(DATASETS)
    hint = suggest(data, [*DATASETS])
    raise UserError(f"data {clipped(data)}: no such folder, nor one of {names}, nor package.module:name.{hint}")


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore signal handlers and the environment; raise `KeyboardInterrupt` where Ctrl-C stopped training."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {signum: signal.getsignal(signum) for signum in stop_signals()} if in_main else {}
    announced = {name: value for name, value in os.environ.items() if name == RUN_OF_FIRST}
    try:
        yield
    except Stopped as stopped:
        if stopped.signum == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        raise
    finally:
        os.environ.pop(RUN_OF_FIRST, None)
        os.environ.update(announced)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
