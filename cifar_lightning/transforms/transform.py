"""Transform: what a transform of training images is, of ours or of one's own, and the generator of its draws."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Stage = Literal["uint8", "float", "normalized"]
Tables = dict[str, Tensor]
"""Random draws by name, each with a row per image."""


class Transform:
    """A random transform of training images: it draws once an epoch and is applied to whole batches.

    Subclass it and override `apply`, and `draw` where it is random. No state may pass from batch to batch: then a run
    resumes to the bit.
    """

    stage: Stage = "uint8"
    """What `apply` gets and returns.

    uint8: (batch, height, width, channels), 0-255; float: float32 (batch, channels, height, width), 0-1; normalized:
    the same after normalization, in which 0 is the mean colour. Transforms are applied in this order of stages, and
    within a stage in that of their list.
    """
    on_cpu: bool = False
    """Whether a transform of uint8 images is slow and runs on the CPU, in the workers of `--data.num_workers`.

    Those before it in the list then run there, too.
    """
    of_image: tuple[str, ...] = ()
    """Tables that belong to an image and not to its place in the epoch, where balanced sampling shows it repeatedly."""

    def draw(self, generator: "EpochGenerator", num_images: int, image_size: int) -> Tables:
        """Return the tables of an epoch, on the CPU, each with a row per image.

        Args:
            generator: Seeded for this transform and epoch; whatever is random must be drawn from it.
            num_images: Rows of each table.
            image_size: Height and width of the images in pixels.
        """
        return {}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        """Return the transformed images, with the shape and dtype of `images`.

        Args:
            images: A batch, on the device of the training, or on the CPU with `on_cpu`; may be changed in place.
            rows: The rows of the tables that are of this batch, on the same device.
        """
        raise NotImplementedError(f"{name_of(self)} has no apply(images, rows)")


class EpochGenerator(torch.Generator):
    """CPU generator of one transform in one epoch, a function of the seed, the epoch and the transform's name.

    Args:
        seed: Of the data.
        epoch: Counted from 0; a transform may read it.
        own: Further numbers that make it differ from the other transforms' generators.
    """

    def __new__(cls, *_: Any) -> "EpochGenerator":
        return super().__new__(cls)

    def __init__(self, seed: int, epoch: int, *own: int) -> None:
        self.seed_of_data, self.epoch, self.own = seed, epoch, own
        self.manual_seed(_seed(seed, epoch, *own))

    def stream(self, purpose: int, epoch: int | None = None) -> torch.Generator:
        """Return a generator that is independent of this one, also that of another epoch."""
        return seeded_generator(self.seed_of_data, self.epoch if epoch is None else epoch, *self.own, purpose)


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator seeded by the non-negative integers `key`: (seed, epoch, purpose)."""
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return state >> 1  # manual_seed takes 63 bits


def name_of(transform: object) -> str:
    """Return the name of a transform's class, or of the function or class that it wraps."""
    wrapped = getattr(transform, "wrapped", transform)
    return getattr(wrapped, "__name__", None) or type(wrapped).__name__


def described(value: object) -> str:
    """Return type and shape of a tensor, as "uint8 (3, 32, 32)", or the type of another object."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
