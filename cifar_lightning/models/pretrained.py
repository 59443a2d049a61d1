"""Pretrained weights of torchvision, timm or a file, loaded into all layers but the head.

Weights are fitted to gray images and to another image size, with a printed line:

- Filters of RGB images are summed over its channels for gray ones; mean and std are averaged. Both as timm does.
- Filters of the stem that are larger than ours of 3x3 are resampled by area, so that the sum over a filter, its
  response to a constant area, stays what the norm after it expects. A crop would not keep the sum, and new filters
  would feed noise to the trained layers behind them. How much each of these costs was not measured.
- Position embeddings of torchvision's vision transformers are interpolated by torchvision's own function.
"""

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cifar_lightning.errors import UserError, remark, silenced
from cifar_lightning.formatting import reason_of
from cifar_lightning.models.registry import torchvision_name
from cifar_lightning.models.state_dicts import describe_misfits, without_wrappers
from cifar_lightning.models.torchvision_timm import INCEPTIONS, create_timm

# densenet's published weights are from an old torch.nn, in which names of modules could contain a point.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of `INCEPTIONS` that our models lack
_POSITIONS = "encoder.pos_embedding"
_NUM_NAMED = 3  # tensors that do not fit, in a message


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel that pretrained weights expect images to be normalised with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class PretrainedWeights:
    """Pretrained weights and where they are from."""

    tensors: dict[str, Tensor]  # by name
    normalization: Normalization | None  # of the images they were trained on; None if unknown
    origin: str  # flag and source, for messages
    image_size: int | None = None  # of the images they were trained on; None if unknown


def load_all_but_head(model: nn.Module, architecture: Mapping[str, Any], weights: PretrainedWeights) -> None:
    """Load pretrained weights into all layers of a model but its head; it is unchanged where they do not fit.

    `architecture` are the arguments that `build_model` made the model from.

    Raises:
        UserError: They do not fit.
    """
    name, origin = str(architecture["name"]), weights.origin
    ours = model.state_dict()
    theirs = without_wrappers(weights.tensors, ours)
    heads = heads_of(model, int(architecture["num_classes"]), "--model.pretrained")
    kept = {key for key in ours if key.startswith(heads)}
    theirs = {_OLD_DENSENET.sub(r"\1\2.", key): tensor for key, tensor in theirs.items()}
    theirs = {
        key: tensor
        for key, tensor in theirs.items()
        if not key.startswith(heads) and (key in ours or not key.startswith(_AUXILIARY))
    }
    # Weights from before torch 0.4.1 lack num_batches_tracked, which no norm with a fixed momentum reads.
    kept |= {key for key in ours if key.endswith("num_batches_tracked") and key not in theirs}
    theirs |= {key: ours[key] for key in kept}
    changes = _fit_to_images(theirs, ours)
    misfits = describe_misfits(theirs, ours, num_named=_NUM_NAMED)
    if misfits:
        raise UserError(f"{origin} do not fit: {misfits}.\nGive weights of {name} with the same --model.model_kwargs.")
    model.load_state_dict(theirs)
    notes = changes if weights.normalization is None else ["images are normalised as in their training", *changes]
    if weights.image_size not in (None, image_size := architecture.get("image_size")):
        notes.append(
            f"they were trained on images of {weights.image_size} pixels, here of {image_size} (--data.image_size)"
        )
    remark("; ".join([f"{origin} are loaded, except the head", *notes]) + ".")


def heads_of(model: nn.Module, num_classes: int, flag: str) -> tuple[str, ...]:
    """Return the parameter prefixes of a model's head: timm's classifiers, or the last layer with an output per class.

    Raises:
        UserError: It has none; names the flag.
    """
    given: Any = getattr(model, "get_classifier", tuple)()
    classifiers = given if isinstance(given, tuple | list) else (given,)
    names = [name for name, layer in model.named_modules() if any(layer is each for each in classifiers)]
    heads = (
        names
        or [
            name
            for name, layer in model.named_modules()
            if (isinstance(layer, nn.Linear) and layer.out_features == num_classes)
            or (isinstance(layer, nn.Conv2d) and layer.out_channels == num_classes)
        ][-1:]
    )
    if not heads:
        raise UserError(f"{flag}: the model has no layer with {num_classes} outputs to use as head.")
    return tuple(f"{name}." for name in heads)


def resample_filters(
    filters: Float[Tensor, "out in rows columns"], size: tuple[int, int]
) -> Float[Tensor, "out in less_rows less_columns"]:
    """Resample convolution filters by area to a size in rows and columns; the sum over each filter stays the same."""
    rows, columns = (_overlaps(old, new).to(filters) for old, new in zip(filters.shape[2:], size, strict=True))
    return rows @ filters @ columns.T


def _overlaps(old: int, new: int) -> Float[Tensor, "new old"]:
    """Return the fraction of each of `old` cells that lies in each of `new` cells over the same length."""
    bounds = torch.arange(new + 1, dtype=torch.float64) * old / new
    cells = torch.arange(old, dtype=torch.float64)
    overlaps = torch.minimum(bounds[1:, None], cells + 1) - torch.maximum(bounds[:-1, None], cells)
    return overlaps.clamp(min=0)


def _fit_to_images(theirs: dict[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    changes = []
    for key, tensor in ours.items():
        other = theirs.get(key)
        if other is None or other.shape == tensor.shape:
            continue
        if tensor.ndim == other.ndim == 4 and (tensor.shape[1], other.shape[1]) == (1, 3):
            theirs[key] = other = other.sum(1, keepdim=True)
            changes.append(f"{key} summed over RGB, for gray images")
            if other.shape == tensor.shape:
                continue
        is_stem = tensor.ndim == other.ndim == 4 and tensor.shape[:2] == other.shape[:2] and tensor.shape[1] in (1, 3)
        if is_stem:
            theirs[key] = resample_filters(other, (tensor.shape[2], tensor.shape[3]))
            changes.append(f"{key} resampled from {_rows_by_columns(other)} to {_rows_by_columns(tensor)}")
        elif key == _POSITIONS and tensor.shape[2] == other.shape[2]:
            from torchvision.models.vision_transformer import interpolate_embeddings

            patches = round((tensor.shape[1] - 1) ** 0.5)
            theirs[key] = interpolate_embeddings(patches, 1, {key: other})[key]  # as many patches of one pixel
            changes.append(f"{key} interpolated from {other.shape[1] - 1} to {patches**2} patches")
    return changes


def _rows_by_columns(filters: Tensor) -> str:
    return f"{filters.shape[2]}x{filters.shape[3]}"


def published_weights(architecture: Mapping[str, Any]) -> PretrainedWeights:
    """Return the published weights of a model, downloaded if not in the cache.

    Raises:
        UserError: There are none, or the download fails.
    """
    name = str(architecture["name"])
    origin = f"--model.pretrained true: the weights of {name}"
    if name.startswith("timm/"):
        return PretrainedWeights(*_published_by_timm(name.partition("/")[2], architecture), origin)
    own_name = torchvision_name(name)
    if own_name is None:
        raise UserError(f"--model.pretrained true: {name} has no published weights; give a file.")
    from torchvision.models import get_model_weights

    weights = get_model_weights(own_name).DEFAULT
    try:
        # check_hash: the file name contains the beginning of its SHA-256.
        state = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # connections and damaged files raise nearly anything
        raise _download_error(name, error, weights.url) from error
    return PretrainedWeights(state, torchvision_normalization(name), origin)


def torchvision_normalization(name: str) -> Normalization | None:
    """Return the normalization of torchvision's published weights of a model; None if it is not torchvision's."""
    own_name = torchvision_name(name)
    if own_name is None:
        return None
    if own_name in INCEPTIONS:
        # Their published weights are used with transform_input, which turns ImageNet's mean and std into these.
        return Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    from torchvision.models import get_model_weights

    transforms = get_model_weights(own_name).DEFAULT.transforms()
    return Normalization(tuple(transforms.mean), tuple(transforms.std))


def _published_by_timm(own_name: str, architecture: Mapping[str, Any]) -> tuple[dict[str, Tensor], Normalization]:
    config = importlib.import_module("timm.models").get_pretrained_cfg(own_name)
    if config is None or not config.has_weights:
        raise UserError(f"--model.pretrained true: timm has no weights of {own_name}; give a file.")
    arguments = {key: value for key, value in architecture.items() if key not in ("name", "keep_stem", "in_channels")}
    address = config.hf_hub_id or config.url
    remark(f"--model.pretrained true: timm downloads {address} unless it is cached.")
    try:
        # timm itself interpolates position embeddings. huggingface_hub logs two lines per retry.
        with silenced("huggingface_hub"):
            model = create_timm(own_name, **arguments, pretrained=True)
    except Exception as error:  # as in published_weights
        raise _download_error(f"timm/{own_name}", error, address) from error
    return model.state_dict(), Normalization(tuple(config.mean), tuple(config.std))


def _download_error(name: str, error: Exception, address: str | None) -> UserError:
    return UserError(
        f"--model.pretrained true: the weights of {name} cannot be downloaded ({reason_of(error)}).\n"
        f"Download {address} another way and give --model.pretrained FILE."
    )
