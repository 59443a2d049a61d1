"""Contents of a run's files, each read through a schema. A run folder may be from a stranger.

A file is opened only if it is a regular one, its size is checked before memory is taken, and a `UserError` names the
file and the field that is wrong. Fields that no schema knows are kept. Not here: checkpoints, which need torch.
"""

import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cifar_lightning.errors import UserError
from cifar_lightning.files import open_regular, read_bytes
from cifar_lightning.formatting import clipped, csv_text, reason_of
from cifar_lightning.runs.file_names import MAX_JSON_BYTES
from cifar_lightning.runs.metrics_table import MetricsTable
from cifar_lightning.runs.schema import upgrade_config, upgrade_test_metrics
from cifar_lightning.settings.safe_yaml import MAX_BYTES, check_nesting, read_yaml

_MAX_MATRIX_BYTES = 256 << 20  # of 10,000 classes
MAX_SEEDS = 1_000  # that `fit --seeds` takes
_MAX_IMAGES = 10_000_000  # of a confusion matrix: the insights take some bytes for each
# Of all arrays of an archive together: this many bytes, or this many times its own size. 500,000 names, which have the
# width of the longest, of 255 characters take 0.5 GB.
_MAX_ARRAY_BYTES, _MAX_RATIO = 1 << 30, 20


FromZero = Annotated[int, Field(ge=0, lt=2**53)]  # JSON's numbers are exact below
Epoch = Annotated[float, Field(ge=0, lt=2**31, multiple_of=1)]
Number = Annotated[float, Field(ge=-3.5e38, le=3.5e38)]  # of 32 bits
ZeroToOne = Annotated[float, Field(ge=0, le=1)]


class _Config(BaseModel):
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    trainer: dict[str, Any] | None = None


class _Duplicates(BaseModel):
    kind: str
    text: str
    num_images: FromZero
    first: list[list[str]]


class _Split(BaseModel):
    dataset: str | None = None
    seed: int | None = None
    val_fraction: ZeroToOne | None = None
    val_from: str | None = None
    limit: FromZero | None = None
    sizes: dict[str, FromZero] = {}
    sha256: dict[str, str] = {}
    duplicates: list[_Duplicates] = []
    train: list[FromZero] = []
    val: list[FromZero] = []
    test: list[FromZero] | None = None  # where the data has no test split of its own


class _Resumed(BaseModel):
    versions: dict[str, str | None] = {}
    changed: dict[str, Any] = {}


class _Environment(BaseModel):
    versions: dict[str, str | None] = {}
    platform: str | None = None
    cpu: str | None = None
    cpu_instructions: str | None = None
    device: str | None = None
    precision: str | None = None
    num_devices: FromZero | None = None
    num_threads: FromZero | None = None
    num_parameters: FromZero | None = None
    commit: str | None = None
    dirty: bool | None = None
    command: list[str] = []
    ckpt_path: str | None = None  # of fit --ckpt_path
    optimizers: list[str] = []
    callbacks: list[str] = []
    resumed: list[_Resumed] = []
    ended: dict[str, Any] | None = None


class _TestMetrics(BaseModel):
    accuracy: ZeroToOne | None = None
    accuracy_interval_95: Annotated[list[ZeroToOne], Field(min_length=2, max_length=2)] | None = None
    accuracy_no_tta: ZeroToOne | None = None
    epoch: FromZero | None = None


class _Spread(BaseModel):
    n: FromZero
    mean: ZeroToOne
    std: ZeroToOne | None  # of one run none
    min: ZeroToOne
    max: ZeroToOne


class _Seeds(BaseModel):
    seeds: Annotated[list[FromZero], Field(min_length=1, max_length=MAX_SEEDS)]
    accuracy: _Spread | None = None


class _LearningRates(BaseModel):
    step: list[FromZero]
    lr: list[Number]


class _TableRow(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    epoch: Epoch
    train_acc: ZeroToOne = Field(math.nan, alias="train/acc")
    val_acc: ZeroToOne = Field(math.nan, alias="val/acc")


def read_config(path: Path) -> dict[str, Any]:
    """Read config.yaml, upgraded to the current schema."""
    text = _text(path, MAX_BYTES)
    try:
        config = upgrade_config(read_yaml(text))
    except yaml.YAMLError as error:
        raise _damaged(path, error) from error
    return _object(path, config, _Config)


def read_split(path: Path) -> dict[str, Any]:
    """Read split.json."""
    return _object(path, read_json(path), _Split)


def read_environment(path: Path) -> dict[str, Any]:
    """Read environment.json."""
    return _object(path, read_json(path), _Environment)


def read_test_metrics(path: Path) -> dict[str, Any]:
    """Read test_metrics.json, upgraded to the current schema."""
    metrics = read_json(path)
    return _object(path, upgrade_test_metrics(metrics) if isinstance(metrics, dict) else metrics, _TestMetrics)


def read_seeds(path: Path) -> dict[str, Any]:
    """Read seeds.json."""
    return _object(path, read_json(path), _Seeds)


def read_table(path: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.csv or timing.csv."""
    rows = MetricsTable(path).read()
    # Any number may be nan, where an epoch had no validation, or infinite.
    known = [{name: cell for name, cell in row.items() if math.isfinite(cell)} for row in rows]
    check_schema(path, known, list[_TableRow])
    return rows


def read_learning_rates(path: Path) -> list[tuple[int, float]]:
    """Read learning_rates.json: optimizer steps, counted from 0, and their learning rates."""
    columns = _object(path, read_json(path), _LearningRates)
    if len(columns["step"]) != len(columns["lr"]):
        raise UserError(f"{path}: damaged: {len(columns['step'])} steps but {len(columns['lr'])} learning rates.")
    return list(zip(columns["step"], columns["lr"], strict=True))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run."""
    text = _text(path, MAX_JSON_BYTES)
    try:
        value = json.loads(text)
        check_nesting(value, math.inf)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, error) from error
    return value


def read_matrix(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Read confusion_matrix.csv: class names and counts, rows: true class."""
    text = _text(path, _MAX_MATRIX_BYTES)
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))  # names of classes may hold line breaks
        if len(rows) < 2 or any(len(row) != len(rows) for row in rows):
            raise ValueError("not a square table")
        for row, name in zip(rows[1:], rows[0][1:], strict=True):
            if row[0] != name:
                raise ValueError(f"row {clipped(row[0])} in place of {clipped(name)}, in the order of the columns")
        counts = [[int(cell) for cell in row[1:]] for row in rows[1:]]
        if min(map(min, counts)) < 0 or not 0 < sum(map(sum, counts)) <= _MAX_IMAGES:
            raise ValueError(f"counts of 0 or more, of at most {_MAX_IMAGES:,} images, are expected")
    except (ValueError, csv.Error) as error:
        raise _damaged(path, error) from error
    return tuple(map(csv_text, rows[0][1:])), np.array(counts, dtype=np.int64)


def read_arrays(
    path: Path, kinds: Mapping[str, tuple[str, int]], *, optional: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file; others in it are not read.

    Args:
        path: The file.
        kinds: Name of each array -> allowed kinds of its dtype (of `numpy.dtype.kind`), number of its dimensions.
        optional: Those that may be missing.

    Raises:
        UserError: An array is missing or has another type or shape, or all together are much larger than the file.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            left = max(_MAX_ARRAY_BYTES, _MAX_RATIO * os.fstat(file.fileno()).st_size)
            arrays = dict[str, np.ndarray]()
            for name in kinds:
                if name not in optional or f"{name}.npy" in archive.namelist():
                    arrays[name] = _read_array(archive, name, *kinds[name], left)
                    left -= arrays[name].nbytes
            return arrays
    # On damaged archives zipfile and NumPy raise nearly anything.
    except Exception as error:
        raise _damaged(path, error) from error


def _read_array(archive: zipfile.ZipFile, name: str, kinds: str, ndim: int, max_bytes: int) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name}: another version of the format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        num_bytes = math.prod(shape) * dtype.itemsize
    if dtype.kind not in kinds or len(shape) != ndim or min(shape) < 1:
        raise ValueError(f"{name}: {dtype} of shape {shape}")
    if num_bytes > max_bytes:
        raise ValueError(f"{name}: {num_bytes:,} bytes, which is too large")
    with archive.open(f"{name}.npy") as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return array


def read_gallery(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read gallery.npz: uint8 images (n, height, width, channels), RGB or gray, 0-255, and their indices."""
    arrays = read_arrays(path, {"images": ("u", 4), "indices": ("iu", 1)})
    images, indices = arrays["images"], arrays["indices"]
    if images.dtype != np.uint8 or images.shape[-1] not in (1, 3) or len(images) != len(indices):
        raise UserError(f"{path}: damaged: not RGB or gray images.")
    return images, indices


def read_explanations(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read explanations.npz: its arrays, and the reasons why Grad-CAM or the nearest images are missing.

    The arrays are "indices" (n,); "cam", uint8 (n, height, width), 0-255; "neighbours", uint8 RGB (n, k, height, width,
    3), with "neighbour_names" and "neighbour_labels" (n, k). Those with a reason are missing.
    """
    reasons = read_arrays(path, {"reasons": ("U", 1)})["reasons"].tolist()
    if len(reasons) != 2:
        raise UserError(f"{path}: damaged: reasons: 2 are expected, got {len(reasons)}.")
    kinds: dict[str, tuple[str, int]] = {} if all(reasons) else {"indices": ("iu", 1)}
    if not reasons[0]:
        kinds["cam"] = ("u", 3)
    if not reasons[1]:
        kinds |= {"neighbours": ("u", 5), "neighbour_names": ("U", 2), "neighbour_labels": ("iu", 2)}
    arrays = read_arrays(path, kinds) if kinds else {}
    nearest = [array for name, array in arrays.items() if name.startswith("neighbour")]
    if len({len(array) for array in arrays.values()}) > 1 or len({array.shape[:2] for array in nearest}) > 1:
        raise UserError(f"{path}: damaged: arrays have different lengths.")
    images = [array for name, array in arrays.items() if name in ("cam", "neighbours")]
    if any(array.dtype != np.uint8 for array in images) or (nearest and nearest[0].shape[-1] != 3):
        raise UserError(f"{path}: damaged: not RGB images or not of 8 bits.")
    return arrays, reasons


def _text(path: Path, max_bytes: int) -> str:
    try:
        return read_bytes(path, max_bytes).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _object(path: Path, value: Any, schema: type[BaseModel]) -> dict[str, Any]:
    check_schema(path, value, schema)
    fields: dict[str, Any] = value
    return fields


def check_schema(path: Path, value: Any, schema: Any) -> None:
    """Check the content of a file; the error names the first field that does not fit."""
    try:
        TypeAdapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{path}: cannot be read ({error.strerror}).")
    return UserError(f"{path}: damaged: {reason_of(error)}.")
