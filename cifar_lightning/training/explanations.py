"""What a test adds to look at its first mistakes: Grad-CAM, and the nearest training images."""

import contextlib
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F

from cifar_lightning.checkpoints.rng_state import restore_rng, rng_state
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import reason_of
from cifar_lightning.models.grad_cam import grad_cam, penultimate_features
from cifar_lightning.report.gallery import NUM_EXPLAINED, confident_mistakes
from cifar_lightning.report.results import Predictions
from cifar_lightning.training.module import ImageClassifier
from cifar_lightning.training.trainer_data import training_data
from cifar_lightning.transforms.augmentation import normalize, resize

_NUM_NEIGHBOURS = 3
# Training images that are searched: a fifth of the split takes about 7 % of an epoch, as a forward pass is a third of a
# step. Of fewer than 100, classes have hardly any.
_MIN_SEARCHED, _MAX_SEARCHED, _FRACTION_SEARCHED = 100, 5000, 0.2
_BATCH_SIZE = 64
_MAX_THUMBNAIL = 96  # pixels

Arrays = dict[str, np.ndarray]


def explain_mistakes(trainer: pl.Trainer, pl_module: pl.LightningModule, test: Predictions) -> Arrays:
    """Return the arrays of explanations.npz; "reasons" are why Grad-CAM and why neighbours are missing, or empty.

    One process does it alone. Model, gradients and random states stay as they are. A model that cannot be explained is
    a reason and no error.
    """
    data, mistakes = training_data(trainer), confident_mistakes(test.logits, test.targets)[:NUM_EXPLAINED]
    if data is None or not isinstance(pl_module, ImageClassifier):
        return {"reasons": np.array(["only an ImageClassifier with an ImageDataModule is explained"] * 2)}
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        return {"reasons": np.array(["the model is spread over several processes"] * 2)}
    if not len(mistakes):
        return {"reasons": np.array(["the test has no mistakes"] * 2)}
    device, convert = trainer.strategy.root_device, trainer.precision_plugin.convert_input
    arrays, images = {"indices": test.indices[mistakes]}, data.images("test", test.indices[mistakes])

    def normalized(raw: UInt8[np.ndarray, "n height width channels"]) -> Tensor:
        mean, std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
        ready: Tensor = convert(normalize(torch.from_numpy(raw).to(device), mean=mean, std=std))
        return ready

    def cam() -> Arrays:
        preds = torch.from_numpy(test.preds[mistakes]).to(device)
        maps = grad_cam(pl_module, normalized(images), preds)
        return {"cam": (255 * maps).round().to(torch.uint8).cpu().numpy()}

    def neighbours() -> Arrays:
        return _neighbours(data, images, lambda raw: penultimate_features(pl_module, normalized(raw)))

    reasons = []
    for explain in (cam, neighbours):
        reason = ""
        try:
            with _eval_context(trainer):
                arrays |= explain()
        except UserError as error:
            reason = str(error)
        # Code of one's own may fail in any way with hooks and gradients; its test has passed, and the results stand.
        except Exception as error:
            reason = f"the model fails with hooks or gradients ({type(error).__name__}: {reason_of(error)})"
        reasons.append(reason)
    return {**arrays, "reasons": np.array(reasons)}


@contextlib.contextmanager
def _eval_context(trainer: pl.Trainer) -> Iterator[None]:
    """Compute with the test's precision, with gradients, and uncompiled, since compiled code runs no new hooks."""
    device = trainer.strategy.root_device
    state = rng_state(device)
    eager = torch.compiler.set_stance("force_eager")
    try:
        with torch.inference_mode(mode=False), torch.enable_grad(), eager, trainer.precision_plugin.forward_context():
            yield
    finally:
        restore_rng(state, device)


def _neighbours(
    data: ImageDataModule,
    images: UInt8[np.ndarray, "n height width channels"],
    features_of: Callable[[UInt8[np.ndarray, "m height width channels"]], Tensor],
) -> Arrays:
    """Return the training images whose features have the largest cosine similarity to an image's, nearest first."""
    num_images = data.num_images("train")
    num_searched = min(num_images, _MAX_SEARCHED, max(_MIN_SEARCHED, int(_FRACTION_SEARCHED * num_images)))
    # The same images for every run with this split; ascending, for images that are mapped from a file.
    searched = np.sort(np.random.default_rng(0).choice(num_images, num_searched, replace=False))
    batches = np.split(searched, range(_BATCH_SIZE, num_searched, _BATCH_SIZE))
    of_train = torch.cat([F.normalize(features_of(data.images("train", batch))) for batch in batches])
    similarity = F.normalize(features_of(images)) @ of_train.T
    nearest = searched[similarity.topk(min(_NUM_NEIGHBOURS, num_searched)).indices.cpu().numpy()]
    shown = torch.from_numpy(data.images("train", nearest.ravel()))
    if shown.shape[1] > _MAX_THUMBNAIL:
        shown = resize(shown, _MAX_THUMBNAIL)
    rgb = shown.expand(*shown.shape[:3], 3).numpy()
    return {
        "neighbours": rgb.reshape(*nearest.shape, *rgb.shape[1:]),
        "neighbour_names": _train_names(data, nearest),
        "neighbour_labels": data.targets("train", nearest),
    }


def _train_names(data: ImageDataModule, positions: Int64[np.ndarray, "n k"]) -> Shaped[np.ndarray, "n k"]:
    """Return the names of some training images: those of all may take gigabytes."""
    if getattr(data.image_names, "__func__", None) is ImageDataModule.image_names:
        return data.image_names("train", positions.ravel()).reshape(positions.shape)
    names: np.ndarray = data.image_names("train")[positions]  # overridden, perhaps without `positions`
    return names
