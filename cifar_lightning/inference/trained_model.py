"""The trained model of a run with its preprocessing. Imports no Lightning."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cifar_lightning.checkpoints.loading import load_weights, read_checkpoint, read_export
from cifar_lightning.checkpoints.schema import DATA_STATE, IMPORTED_CLASS, IMPORTED_MODEL, TEMPERATURE
from cifar_lightning.data.image_decoding import Resize
from cifar_lightning.errors import UserError
from cifar_lightning.files import file_sha256
from cifar_lightning.formatting import clipped, command_line
from cifar_lightning.models.memory_format import MemoryFormat, use_memory_format
from cifar_lightning.models.registry import build_model, check_model_kwargs
from cifar_lightning.report.results import read_predictions
from cifar_lightning.report.temperature import temperature_of
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings.import_path import import_paths, import_trusted, is_import_path
from cifar_lightning.training.tta import TTA, tta_logits
from cifar_lightning.transforms.augmentation import normalize


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, on the CPU in eval mode, with its preprocessing."""

    model: nn.Module  # normalised float images (batch, channels, image_size, image_size) -> raw logits (batch, classes)
    tta: TTA
    class_names: tuple[str, ...]  # in the order of the logits
    image_size: int
    resize: Resize  # how an image becomes a square
    mean: tuple[float, ...]  # per channel, of images scaled to 0-1
    std: tuple[float, ...]  # the same
    architecture: dict[str, Any]  # arguments of `build_model`
    checkpoint: Path  # file that the weights are from
    sha256: str  # of that file
    epoch: int  # of the weights, counted from 1
    memory_format: MemoryFormat = "channels_last"
    fitted_temperature: float | None = None  # that a file of weights tells
    temperature: float = 1.0  # logits are divided by it; calibrated, by `fitted_temperature`

    @property
    def in_channels(self) -> int:
        """3 for RGB, 1 for gray images."""
        return len(self.mean)

    def logits(self, images: UInt8[Tensor, "batch height width channels"]) -> Float[Tensor, "batch classes"]:
        """Return the float32 logits of images at `image_size`, averaged over TTA and divided by the temperature.

        Images are RGB or gray, 0-255, on the model's device.
        """
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        with torch.inference_mode():
            return tta_logits(self.model, normalize(images, mean=mean, std=std), self.tta)[0].float() / self.temperature


@torch.inference_mode(False)  # or it could not be trained where the caller is in that mode
def load_trained_model(
    run: RunFolder, *, trust_code: bool = False, model: nn.Module | None = None, calibrated: bool = False
) -> TrainedModel:
    """Load the model of a run from its best checkpoint, or else the last, or else its exported weights.

    Args:
        run: A run with a checkpoint or exported weights.
        trust_code: Import a model of one's own, which the checkpoint names, from any package.
        model: A model of one's own, in place of one that the checkpoint names; a copy of it is used.
        calibrated: Use the run's temperature.

    Raises:
        UserError: The file is missing or damaged, its model cannot be built by name or is not trusted, or the
            run has no temperature.
    """
    path = run.weights
    run.require(path)
    temperature = fitted_temperature(run) if calibrated else 1.0
    checkpoint = read_export(path) if path == run.exported_weights else read_checkpoint(path)
    hparams, data = checkpoint.get("hyper_parameters", {}), checkpoint.get(DATA_STATE)
    if data is None:
        raise UserError(f"{path}: has no class names, mean and std; fit did not write it.")
    imported = checkpoint.get(IMPORTED_CLASS) or checkpoint.get(IMPORTED_MODEL) or hparams.get("imported")
    name = imported["path"] if imported else hparams.get("name")
    kwargs = (imported or {}).get("kwargs") or hparams.get("model_kwargs")
    if model is None and not name:
        raise UserError(
            f"{path}: its model has no import path that makes it again; in Python give it to "
            "cifar_lightning.load(RUN, model=...).\nTrain with --model.name package.module:name "
            "and --model.model_kwargs to have every command make it."
        )
    if model is None and is_import_path(name):
        import_trusted(name, "--model.name", path, trust_code=trust_code)
        for key, of_argument in import_paths(kwargs):
            if key.rpartition(".")[2] == "class_path":
                import_trusted(of_argument, f"--model.{key}", path, trust_code=trust_code)
    check_model_kwargs(kwargs or {})
    architecture = {
        "name": name or type(model).__name__,
        "num_classes": len(data["class_names"]),
        "image_size": data["image_size"],
        **({} if len(data["mean"]) == 3 else {"in_channels": len(data["mean"])}),
        **(kwargs or {}),
    }
    if len(data["mean"]) not in (1, 3):
        raise UserError(f"{path}: mean and std of {len(data['mean'])} channels; images have 1 or 3.")
    if (tta := hparams.get("tta", "none")) not in get_args(TTA):
        raise UserError(f"{path}: tta {clipped(tta)}: one of {', '.join(get_args(TTA))}.")
    # A LightningModule is copied without its Trainer.
    made = (
        build_model(**architecture)
        if model is None
        else copy.deepcopy(model, {id(getattr(model, "_trainer", None)): None})
    )
    memory_format = hparams.get("memory_format", "channels_last")
    made = use_memory_format(made, memory_format).eval()
    load_weights(made, path, checkpoint)
    return TrainedModel(
        model=made,
        tta=tta,
        class_names=tuple(data["class_names"]),
        image_size=data["image_size"],
        resize=data.get("resize", "crop"),
        mean=tuple(map(float, data["mean"])),
        std=tuple(map(float, data["std"])),
        architecture=architecture,
        checkpoint=path,
        sha256=file_sha256(path),
        epoch=int(checkpoint["epoch"]) + 1,
        memory_format=memory_format,
        fitted_temperature=checkpoint.get(TEMPERATURE),
        temperature=temperature,
    )


def fitted_temperature(run: RunFolder) -> float:
    """Return the temperature of a run, or of its exported weights where nothing else of it is there.

    Raises:
        UserError: It has none, or its validation predictions are damaged.
    """
    temperature: float | None
    if run.weights == run.exported_weights:
        temperature = read_export(run.weights)[TEMPERATURE]
        if temperature is None:
            raise UserError(f"--calibrated: {run.weights} was exported without a temperature. Leave --calibrated out.")
        return temperature
    is_there = run.predictions_val.is_file()
    temperature, why_none = temperature_of(read_predictions(run.predictions_val) if is_there else None)
    if temperature is None:
        again = "" if is_there else f"; a run with a validation split gets them by {command_line('validate', run.path)}"
        raise UserError(f"--calibrated: {run.path} has no temperature. {why_none}\nLeave --calibrated out{again}.")
    return temperature
