"""The schema of a checkpoint, its version, and the upgrade of older ones."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cifar_lightning.data.image_decoding import Resize
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.models.memory_format import MemoryFormat
from cifar_lightning.runs.contents import FromZero, check_schema
from cifar_lightning.runs.schema import SCHEMA_VERSION, upgrade_model_settings
from cifar_lightning.settings.limits import ImageSize

SCHEMA_KEY = "cifar_lightning_schema"
VERSION_KEY = "cifar_lightning_version"
"""The key of the version of this project, for people who have nothing but the file."""
DATA_STATE = "ImageDataModule"
"""The key of the data module's state; Lightning names it by the class, see `with_data_state`."""
IMPORTED_MODEL = "imported"
"""The key of the import path and arguments of a model of one's own; older checkpoints have it in hyper_parameters."""
STEPS_BEFORE = "steps_before"
"""The key of the steps of an earlier fit of the Trainer, whose schedule has ended."""
IMPORTED_CLASS = "imported_class"
"""The key of the import path and arguments of a subclass of ImageClassifier that alone gives its logits."""
OWN_METRICS = "own_metrics"
"""The key of the names of metrics of one's own."""
TEMPERATURE = "fitted_temperature"
"""The key of the temperature in an export of weights, whose logits are not divided by it."""
RESUME_STATE = "cifar_lightning"
"""The key of the states of each rank for an exact resume: see `training.resume_state`."""
LOGGED_METRICS = "metrics"
"""The key below it of what was logged; versions before 0.3 have none."""


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Imported(_Schema):
    path: str
    kwargs: dict[str, Any]


class _Hyperparameters(_Schema):
    name: str | None = None
    model_kwargs: dict[str, Any] | None = None
    imported: _Imported | None = None
    tta: str = "none"
    memory_format: MemoryFormat = "channels_last"


class _DataState(_Schema):
    class_names: Annotated[list[str], Field(min_length=1)]
    image_size: ImageSize
    mean: Annotated[list[float], Field(min_length=1)]
    std: list[Annotated[float, Field(gt=0)]]
    resize: Resize = "crop"

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError("mean and std of different lengths")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("equal class names")
        return self


_COUNTS = TypeAdapter(dict[str, FromZero], config=ConfigDict(strict=True))


def _check_progress(loops: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check the counts of batches, steps and epochs, which Lightning adds to only once training runs."""
    for key, value in loops.items():
        name = f"{prefix}{key}"
        if key in ("total", "current"):
            try:
                _COUNTS.validate_python(value)
            except ValidationError as error:
                raise ValueError(f"{name} has no counts") from error
        elif isinstance(value, dict):
            _check_progress(value, f"{name}.")
    return loops


class _EpochSoFar(_Schema):
    lrs: dict[FromZero, float] = {}


class _Lightning(_Schema):
    epoch: FromZero = 0
    global_step: FromZero = 0
    state_dict: dict[str, Any]
    hyper_parameters: dict[str, Any] = {}
    loops: Annotated[dict[str, Any], AfterValidator(_check_progress)] = {}
    callbacks: dict[str, Any] = {}
    optimizer_states: list[dict[str, Any]] = []
    lr_schedulers: list[dict[str, Any]] = []
    resume_state: dict[str, Any] = Field({}, alias="cifar_lightning")  # RESUME_STATE; mypy needs a literal


class _OfRun(_Lightning):
    hyper_parameters: _Hyperparameters = _Hyperparameters()  # type: ignore[assignment]  # narrower than Lightning's
    data: _DataState = Field(alias="ImageDataModule")  # DATA_STATE
    epoch_so_far: _EpochSoFar = Field(_EpochSoFar(), alias="cifar_lightning_epoch")  # its EPOCH_SO_FAR
    fitted_temperature: Annotated[float, Field(gt=0)] | None = None  # of an export, TEMPERATURE
    imported: _Imported | None = None
    imported_class: _Imported | None = None
    steps_before: FromZero = 0
    own_metrics: list[str] = []


def check_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Check the types of what a checkpoint of a run, or another one of Lightning, holds; nothing in other files.

    Raises:
        UserError: Names the file and the field; or it is of a newer version.
    """
    schema = checkpoint.get(SCHEMA_KEY, SCHEMA_VERSION)
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        version = clipped(str(checkpoint.get(VERSION_KEY, "a newer version")))
        raise UserError(
            f"{path}: written by cifar_lightning {version}, in schema {clipped(str(schema))}; this version reads "
            f"schemas up to {SCHEMA_VERSION}. Install that version."
        )
    if DATA_STATE in checkpoint:
        check_schema(path, checkpoint, _OfRun)
    elif "pytorch-lightning_version" in checkpoint:
        check_schema(path, checkpoint, _Lightning)


def with_data_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the state of a data module of any class under `DATA_STATE`."""
    needed = {name for name, field in _DataState.model_fields.items() if field.is_required()}
    states = [value for value in checkpoint.values() if isinstance(value, dict) and needed <= value.keys()]
    return checkpoint if DATA_STATE in checkpoint or not states else {**checkpoint, DATA_STATE: states[0]}


def upgrade_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a Lightning checkpoint in the current schema; other files are returned as they are. Changes nothing."""
    if SCHEMA_KEY in checkpoint or "pytorch-lightning_version" not in checkpoint:
        return checkpoint
    upgraded = {**checkpoint, SCHEMA_KEY: SCHEMA_VERSION}
    for key in ("state_dict", "current_model_state"):  # the latter: raw weights of a run with EMA
        if isinstance(checkpoint.get(key), dict):
            upgraded[key] = {_renamed(name): value for name, value in checkpoint[key].items()}
    if isinstance(hparams := checkpoint.get("hyper_parameters"), dict):
        upgraded["hyper_parameters"] = upgrade_model_settings(hparams)
    return upgraded


def _renamed(name: str) -> str:
    return f"model.{name.removeprefix('network.')}" if name.startswith("network.") else name
