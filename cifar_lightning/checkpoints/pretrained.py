"""Pretrained weights for a model, published or from a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torch import nn

from cifar_lightning.checkpoints.loading import read_checkpoint, read_safetensors, statistics_of, weights_of
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.models.pretrained import (
    Normalization,
    PretrainedWeights,
    load_all_but_head,
    published_weights,
    torchvision_normalization,
)
from cifar_lightning.runs.folder import weights_file


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
    weights = published_weights(architecture) if source is True else _of_file(Path(source), name)
    load_all_but_head(model, architecture, weights)
    expected = weights.normalization
    if expected is not None and architecture.get("in_channels") == 1:
        return Normalization((fmean(expected.mean),), (fmean(expected.std),))
    return expected


def _of_file(path: Path, name: str) -> PretrainedWeights:
    """Return the weights of a file with the normalization of its run, or else of torchvision's model of that name."""
    try:
        path = weights_file(path)
    except UserError as error:
        raise UserError(f"--model.pretrained {path}: {error}") from error
    if not path.is_file():
        raise UserError(f"--model.pretrained {path}: no such file; give true, a run or a file of weights.")
    origin = f"--model.pretrained {clipped(str(path), 200)}: its weights"
    if path.suffix == ".safetensors":
        weights, about = read_safetensors(path)
        normalization = _exported_normalization(path, about) or torchvision_normalization(name)
        return PretrainedWeights(weights, normalization, origin)
    checkpoint = read_checkpoint(path)
    statistics = statistics_of(checkpoint)
    normalization = Normalization(*statistics) if statistics else torchvision_normalization(name)
    return PretrainedWeights(weights_of(checkpoint, path), normalization, origin)


def _exported_normalization(path: Path, about: Mapping[str, str]) -> Normalization | None:
    """Return the normalization in the metadata that `export` writes; None without it."""
    if not {"mean", "std"} <= about.keys():
        return None
    try:
        mean, std = (tuple(map(float, json.loads(about[key]))) for key in ("mean", "std"))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: mean and std in its metadata are no lists of numbers.") from error
    return Normalization(mean, std)
