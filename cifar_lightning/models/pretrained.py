"""Weights that were trained elsewhere: torchvision's and timm's published ones, or a file; all but the head is taken.

The head is always new: its classes are others. Two things are fitted to another size of images, and a line says so:

- Filters of the stem, where ours are 3x3 and theirs larger. They are resampled: each of theirs is shared out to the
  pixels of ours that it covers, so that the sums over a filter, its answers to even areas, stay what the norm after it
  expects. A crop would keep no such sum (an edge's two sides would weigh unequally), and new filters would feed noise
  to all the trained layers behind them. How much each of these costs was not measured.
- Position embeddings of torchvision's vision transformers, by torchvision's own interpolation.
"""

import contextlib
import importlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import clipped
from cifar_lightning.models.registry import torchvision_name
from cifar_lightning.models.state_dicts import describe_misfits, without_wrappers
from cifar_lightning.models.torchvision_timm import create_timm

# Of a former torch.nn, in which a module's name could hold a point; densenet's published weights still have them.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3, which our networks do not have
_POSITIONS = "encoder.pos_embedding"
_TORCHVISION_INCEPTIONS = ("googlenet", "inception_v3")
_NUM_NAMED = 3  # layers that do not fit


@dataclass(frozen=True)
class Normalization:
    """What weights expect of their images.

    Attributes:
        mean: Per channel, of images scaled to 0-1.
        std: Per channel, of images scaled to 0-1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights that were trained elsewhere.

    Attributes:
        tensors: By the names of their own model.
        normalization: Of the images that they were trained on; None where that is not known.
        origin: The flag and the source, for messages.
    """

    tensors: dict[str, Tensor]
    normalization: Normalization | None
    origin: str


def load_all_but_head(model: nn.Module, architecture: Mapping[str, Any], weights: PretrainedWeights) -> None:
    """Put trained weights into a network, all but its head's.

    Args:
        model: As `build_model(**architecture)` made it; gets the weights.
        architecture: name, num_classes, image_size and the network's own arguments.
        weights: See `published_weights`.

    Raises:
        UserError: They do not fit; the network is then untouched.
    """
    name, origin = str(architecture["name"]), weights.origin
    ours = model.state_dict()
    theirs, normalization = without_wrappers(weights.tensors, ours), weights.normalization
    head = head_of(model, int(architecture["num_classes"]))
    kept = {key for key in ours if key.startswith(head)}
    theirs = {_OLD_DENSENET.sub(r"\1\2.", key): tensor for key, tensor in theirs.items()}
    theirs = {
        key: tensor
        for key, tensor in theirs.items()
        if not key.startswith(head) and (key in ours or not key.startswith(_AUXILIARY))
    }
    # Counters of batches, which no norm with a fixed momentum reads, are missing in weights from before torch 0.4.1.
    kept |= {key for key in ours if key.endswith("num_batches_tracked") and key not in theirs}
    theirs |= {key: ours[key] for key in kept}
    changes = _fit_to_size(theirs, ours)
    misfits = describe_misfits(theirs, ours, num_named=_NUM_NAMED)
    if misfits:
        raise UserError(f"{origin} do not fit: {misfits}.\nGive those of {name} with the same --model.model_kwargs.")
    model.load_state_dict(theirs)
    told = "" if normalization is None else "; images are normalised as they were for them"
    remark(f"{origin} are taken, all but the last layer's{told}{''.join(f'; {change}' for change in changes)}.")


def head_of(model: nn.Module, num_classes: int) -> str:
    """Return the prefix of the parameters of a network's head, the last layer that gives one number a class.

    Raises:
        UserError: There is none.
    """
    heads = [
        name
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == num_classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == num_classes)
    ]
    if not heads:
        raise UserError(f"--model.pretrained: the network has no layer of {num_classes} classes to begin anew.")
    return f"{heads[-1]}."


def resample_filters(
    filters: Float[Tensor, "out in rows columns"], size: tuple[int, int]
) -> Float[Tensor, "out in less_rows less_columns"]:
    """Return filters of another size: each weight is shared out to the pixels it covers, so that sums are the same.

    Args:
        filters: Of a convolution.
        size: Rows and columns of the new ones.
    """
    rows, columns = (_shares(old, new).to(filters) for old, new in zip(filters.shape[2:], size, strict=True))
    return rows @ filters @ columns.T


def _shares(old: int, new: int) -> Float[Tensor, "new old"]:
    """Return which share of each of `old` cells lies in each of `new` ones on the same length."""
    bounds = torch.arange(new + 1, dtype=torch.float64) * old / new
    cells = torch.arange(old, dtype=torch.float64)
    overlaps = torch.minimum(bounds[1:, None], cells + 1) - torch.maximum(bounds[:-1, None], cells)
    return overlaps.clamp(min=0)


def _fit_to_size(theirs: dict[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    """Resample in place what belongs to another size of images; return a description of each."""
    changes = []
    for key, tensor in ours.items():
        other = theirs.get(key)
        if other is None or other.shape == tensor.shape:
            continue
        is_of_images = tensor.ndim == other.ndim == 4 and tensor.shape[:2] == other.shape[:2] and tensor.shape[1] == 3
        if is_of_images:
            theirs[key] = resample_filters(other, (tensor.shape[2], tensor.shape[3]))
            changes.append(f"the filters of {key} resampled from {_side(other)} to {_side(tensor)}")
        elif key == _POSITIONS and tensor.shape[2] == other.shape[2]:
            from torchvision.models.vision_transformer import interpolate_embeddings

            patches = round((tensor.shape[1] - 1) ** 0.5)
            theirs[key] = interpolate_embeddings(patches, 1, {key: other})[key]  # as many patches of one pixel
            changes.append(f"{key} interpolated from {other.shape[1] - 1} to {patches**2} patches")
    return changes


def _side(filters: Tensor) -> str:
    return f"{filters.shape[2]}x{filters.shape[3]}"


def published_weights(architecture: Mapping[str, Any]) -> PretrainedWeights:
    """Return the published weights of a model by name, downloaded unless they have been before.

    Args:
        architecture: name, num_classes, image_size and the model's own arguments.

    Raises:
        UserError: There are none, or they cannot be had.
    """
    name = str(architecture["name"])
    origin = f"--model.pretrained true: the weights of {name}"
    if name.startswith("timm/"):
        return PretrainedWeights(*_published_by_timm(name.partition("/")[2], architecture), origin)
    own_name = torchvision_name(name)
    if own_name is None:
        raise UserError(f"--model.pretrained true: there are no published weights of {name}; give a file of them.")
    from torchvision.models import get_model_weights

    weights = get_model_weights(own_name).DEFAULT
    try:
        # weights_only: read as data. check_hash: the file's name holds the beginning of its SHA-256.
        state = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # networks and damaged files make it raise nearly anything
        raise _cannot_be_had(name, error, weights.url) from error
    return PretrainedWeights(state, torchvision_normalization(name), origin)


def torchvision_normalization(name: str) -> Normalization | None:
    """Return what torchvision's published weights of a model expect; None where they are not torchvision's."""
    own_name = torchvision_name(name)
    if own_name is None:
        return None
    if own_name in _TORCHVISION_INCEPTIONS:
        # Their published weights are used with transform_input, which makes this of ImageNet's mean and std.
        return Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    from torchvision.models import get_model_weights

    transforms = get_model_weights(own_name).DEFAULT.transforms()
    return Normalization(tuple(transforms.mean), tuple(transforms.std))


def _published_by_timm(own_name: str, architecture: Mapping[str, Any]) -> tuple[dict[str, Tensor], Normalization]:
    config = importlib.import_module("timm.models").get_pretrained_cfg(own_name)
    if config is None or not config.has_weights:
        raise UserError(f"--model.pretrained true: timm has no weights of {own_name}; give a file of them.")
    arguments = {key: value for key, value in architecture.items() if key not in ("name", "keep_stem")}
    address = config.hf_hub_id or config.url
    remark(f"--model.pretrained true: timm fetches {address}, unless it has done so before.")
    try:
        # timm reads them as data, and fits position embeddings to the size by itself.
        with _retrying_in_silence():
            model = create_timm(own_name, **arguments, pretrained=True)
    except Exception as error:  # as above
        raise _cannot_be_had(f"timm/{own_name}", error, address) from error
    return model.state_dict(), Normalization(tuple(config.mean), tuple(config.std))


@contextlib.contextmanager
def _retrying_in_silence() -> Iterator[None]:
    """Keep huggingface_hub from saying two lines for each of a dozen trials; what ends them is raised all the same."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cannot_be_had(name: str, error: Exception, address: str | None) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"--model.pretrained true: the weights of {name} cannot be had ({clipped(reason, 200)}).\n"
        f"Fetch {address} by other means, and give --model.pretrained FILE."
    )
