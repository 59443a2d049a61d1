"""Logits in bfloat16 on a CPU, and again in float32 where two classes are close. Imports no Lightning."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cifar_lightning.inference.trained_model import TrainedModel
from cifar_lightning.models.registry import MODELS
from cifar_lightning.training.precision import default_precision

NUM_SAMPLED = 64  # images whose logits are computed in both precisions
# The margin in units of the largest error among the sample: with it SmallNet gave each of 5,000 test images of CIFAR-10
# its class of float32 (benchmarks/LOG.md).
_CAUTION = 3
_MOST_CLOSE = 0.25  # of the sample; where more are computed twice, nothing is gained

Logits = Callable[[UInt8[Tensor, "batch height width channels"]], Float[Tensor, "batch classes"]]


def faster_logits(
    trained: TrainedModel, sample: UInt8[Tensor, "n height width channels"], batch_size: int
) -> Logits | None:
    """Return a function that computes most logits in bfloat16; None where nothing is gained.

    Images whose two largest logits are closer than a margin are computed again in float32, so that their class is that
    of float32. The margin is 3 times the largest error that bfloat16 makes among the differences of the sample's
    logits. The model must be a network of this
    package's, the CPU faster in bfloat16, and at most a quarter of the sample closer than the margin.

    Args:
        trained: A model on the CPU in eval mode.
        sample: Images at its size, 0-255, drawn evenly from those to predict.
        batch_size: Number of images that are computed at a time.
    """
    if trained.architecture["name"] not in MODELS or default_precision(on_cuda=False)[0] != "bf16-mixed":
        return None
    batches = sample.split(batch_size)
    exact = torch.cat([trained.logits(batch) for batch in batches])
    rough = torch.cat([_in_bfloat16(trained, batch) for batch in batches])
    errors = rough - exact
    margin = _CAUTION * float((errors.amax(1) - errors.amin(1)).max())
    if not float(_is_close(rough, margin).float().mean()) <= _MOST_CLOSE:
        return None

    def logits(images: UInt8[Tensor, "batch height width channels"]) -> Float[Tensor, "batch classes"]:
        with torch.inference_mode():  # in which logits are made, and may be changed
            rough = _in_bfloat16(trained, images)
            if (close := _is_close(rough, margin)).any():
                rough[close] = trained.logits(images[close])
        return rough

    return logits


def _in_bfloat16(
    trained: TrainedModel, images: UInt8[Tensor, "batch height width channels"]
) -> Float[Tensor, "batch classes"]:
    with torch.autocast("cpu", torch.bfloat16):
        return trained.logits(images)


def _is_close(logits: Float[Tensor, "batch classes"], margin: float) -> Tensor:
    """Return a mask of the images whose two largest logits differ by less than the margin, or are not finite."""
    first, second = logits.topk(2).values.unbind(1)
    return ~(first - second >= margin)
