"""Pretrained weights for a model, published or from a file."""

from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter
from torch import nn

from cifar_lightning.checkpoints.loading import read_checkpoint, read_safetensors, statistics_of, weights_of
from cifar_lightning.checkpoints.schema import DATA_STATE
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, plural
from cifar_lightning.models.pretrained import (
    Normalization,
    PretrainedWeights,
    load_all_but_head,
    published_weights,
    torchvision_normalization,
)
from cifar_lightning.runs.folder import shipped_models, suggest_shipped, weights_file

_CHANNELS = TypeAdapter(Annotated[tuple[FiniteFloat, ...], Field(min_length=1)])  # mean or std


def load_pretrained(
    model: nn.Module, architecture: Mapping[str, Any], source: Literal[True] | str | Path
) -> Normalization | None:
    """Load pretrained weights into all layers of a model but its head.

    Args:
        model: Built by `build_model(**architecture)`; changed in place.
        architecture: name, num_classes, image_size and further arguments of the model.
        source: True for the library's best published weights (of timm, those of the tag in the name), downloaded once;
            or a file: a checkpoint of a run, a state_dict or .safetensors; or the name of a model that comes with the
            package.

    Returns:
        Normalization that the weights expect; None if unknown, as for a state_dict of our own models.

    Raises:
        UserError: There are none, they cannot be downloaded or read, or they do not fit; the model is unchanged.
    """
    name = str(architecture["name"])
    if source is True and name in shipped_models():
        raise UserError(
            f"--model.pretrained true: {name} has no published weights; give a file, or {name}, which comes with the "
            "package."
        )
    weights = published_weights(architecture) if source is True else _of_file(Path(source), name, model.state_dict())
    expected, num_channels = weights.normalization, architecture.get("in_channels", 3)
    if expected is not None and len(expected.mean) not in (3, num_channels):
        known = plural(len(expected.mean), "channel")
        raise UserError(f"{weights.origin} have mean and std of {known}, here images have {num_channels}.")
    load_all_but_head(model, architecture, weights)
    if expected is not None and num_channels == 1:
        return Normalization((fmean(expected.mean),), (fmean(expected.std),))
    return expected


def _of_file(path: Path, name: str, ours: Collection[str]) -> PretrainedWeights:
    """Return the weights of a file with the normalization of its run, or else of torchvision's model of that name."""
    try:
        path = weights_file(path)
    except UserError as error:
        raise UserError(f"--model.pretrained {path}: {error}") from error
    if not path.is_file():
        way_out = f"give true, a run or a file of weights.{suggest_shipped(path)}"
        raise UserError(f"--model.pretrained {path}: no such file; {way_out}")
    origin = f"--model.pretrained {clipped(str(path), 200)}: its weights"
    if path.suffix == ".safetensors":
        weights, about = read_safetensors(path)
        normalization, image_size = _of_export(path, about)
        return PretrainedWeights(weights, normalization or torchvision_normalization(name), origin, image_size)
    checkpoint = read_checkpoint(path)
    statistics = statistics_of(checkpoint)
    normalization = Normalization(*statistics) if statistics else torchvision_normalization(name)
    image_size = checkpoint.get(DATA_STATE, {}).get("image_size")
    return PretrainedWeights(weights_of(checkpoint, path, ours), normalization, origin, image_size)


def _of_export(path: Path, about: Mapping[str, str]) -> tuple[Normalization | None, int | None]:
    """Return the normalization and the image size in the metadata that `export` writes; None without them."""
    try:
        image_size = int(about["image_size"]) if "image_size" in about else None
        if not {"mean", "std"} <= about.keys():
            return None, image_size
        mean, std = _CHANNELS.validate_json(about["mean"]), _CHANNELS.validate_json(about["std"])
    except ValueError as error:  # pydantic's is one, too
        raise UserError(
            f"{path}: damaged: its metadata mean, std and image_size are not those of an export."
        ) from error
    if len(mean) != len(std) or min(std) <= 0:
        raise UserError(f"{path}: damaged: mean {mean} and std {std} in its metadata; each channel has a std above 0.")
    return Normalization(mean, std), image_size
