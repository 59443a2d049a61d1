"""Pretrained weights for a model: published ones, or those of a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cifar_lightning.checkpoints.loading import read_checkpoint, read_weights, statistics_of, weights_of
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped
from cifar_lightning.models.pretrained import (
    Normalization,
    PretrainedWeights,
    load_all_but_head,
    published_weights,
    torchvision_normalization,
)


def load_pretrained(
    model: nn.Module, architecture: Mapping[str, Any], source: Literal[True] | str | Path
) -> Normalization | None:
    """Put trained weights into a network, all but its head's.

    Args:
        model: As `build_model(**architecture)` made it; gets the weights.
        architecture: name, num_classes, image_size and the network's own arguments.
        source: True for the library's best published weights (of timm, those that its name's tag says), which are
            downloaded once; or a file: a checkpoint of a run, a state_dict or .safetensors.

    Returns:
        How the images must be normalised; None where that is not known: a plain file of a network of ours.

    Raises:
        UserError: There are none, they cannot be had or read, or they do not fit; the network is then untouched.
    """
    is_published = source is True
    weights = published_weights(architecture) if is_published else _of_file(Path(source), str(architecture["name"]))
    load_all_but_head(model, architecture, weights)
    return weights.normalization


def _of_file(path: Path, name: str) -> PretrainedWeights:
    """Return a file's weights and the normalisation of its run, or else of its name in torchvision."""
    if not path.is_file():
        raise UserError(f"--model.pretrained {path}: no such file; give true, or a file of weights.")
    origin = f"--model.pretrained {clipped(str(path), 200)}: its weights"
    if path.suffix == ".safetensors":
        normalization = _exported_normalization(path) or torchvision_normalization(name)
        return PretrainedWeights(read_weights(path), normalization, origin)
    checkpoint = read_checkpoint(path)
    statistics = statistics_of(checkpoint)
    normalization = Normalization(*statistics) if statistics else torchvision_normalization(name)
    return PretrainedWeights(weights_of(checkpoint, path), normalization, origin)


def _exported_normalization(path: Path) -> Normalization | None:
    """Return what `export` has written into a file; others have none."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    if not {"mean", "std"} <= about.keys():
        return None
    return Normalization(tuple(json.loads(about["mean"])), tuple(json.loads(about["std"])))
