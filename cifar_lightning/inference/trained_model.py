"""A trained model from a run folder, with what it needs to treat new images; imports no Lightning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cifar_lightning.checkpoints.loading import DATA_STATE, load_weights, read_checkpoint
from cifar_lightning.errors import UserError
from cifar_lightning.files import file_sha256
from cifar_lightning.models.registry import build_model
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.tta import TTA, tta_logits
from cifar_lightning.transforms.augmentation import normalize


@dataclass(frozen=True)
class TrainedModel:
    """A network that was trained, on the CPU in evaluation mode, and how images must be treated for it.

    Attributes:
        model: Takes normalised float images (batch, 3, image_size, image_size), gives raw logits (batch, classes).
        views: Of each image, whose answers the run's test averages.
        class_names: In the order of the logits.
        image_size: Side of the square images in pixels.
        mean: Per channel, of images scaled to 0-1.
        std: Per channel, of images scaled to 0-1.
        architecture: Arguments of `build_model`: name, num_classes, image_size and the network's own.
        checkpoint: The file that it was read from.
        sha256: Hash of that file.
        epoch: The finished epoch that the weights are of, counted from 1.
    """

    model: nn.Module
    views: TTA
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    architecture: dict[str, Any]
    checkpoint: Path
    sha256: str
    epoch: int

    def logits(self, images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch classes"]:
        """Return raw logits of raw images, 0-255, square at `image_size`: the mean over the run's views of them."""
        with torch.inference_mode():
            normalized = normalize(images, mean=torch.tensor(self.mean), std=torch.tensor(self.std))
            answer, _ = tta_logits(self.model, normalized, self.views)
        return answer


def load_trained_model(run: RunFolder) -> TrainedModel:
    """Read the network of a run, best checkpoint first, from nothing but the run's folder.

    Raises:
        UserError: No checkpoint, a damaged one, or one of a network that this version cannot make by name.
    """
    path = run.tested_checkpoint
    run.require(path)
    checkpoint = read_checkpoint(path)
    hparams, data = checkpoint.get("hyper_parameters", {}), checkpoint.get(DATA_STATE)
    if data is None:
        raise UserError(f"{path}: holds no class names and no statistics; it is not from `python train.py fit`.")
    if not hparams.get("name"):
        raise UserError(f"{path}: of a network made in Python, which cannot be made again by name; load it there.")
    architecture = {
        "name": hparams["name"],
        "num_classes": len(data["class_names"]),
        "image_size": data["image_size"],
        **(hparams.get("model_kwargs") or {}),
    }
    model = build_model(**architecture).to(memory_format=torch.channels_last).eval()
    load_weights(model, path, checkpoint)
    return TrainedModel(
        model=model,
        views=hparams.get("tta", "none"),
        class_names=tuple(data["class_names"]),
        image_size=data["image_size"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        architecture=architecture,
        checkpoint=path,
        sha256=file_sha256(path),
        epoch=int(checkpoint["epoch"]) + 1,
    )
