"""Transforms of single images, such as torchvision's, as transforms of batches that resume to the bit."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar_lightning.errors import UserError
from cifar_lightning.transforms.transform import EpochGenerator, Tables, Transform, described, name_of

_MIXES = {"MixUp": "--model.mixup 0.2", "CutMix": "--model.cutmix 1"}
_SCALES = ("Normalize", "ToTensor", "ToDtype", "ConvertImageDtype", "ConvertDtype")


class PerImage(Transform):
    """Applies a callable image by image, as a function of seed, epoch and image, whichever process does it.

    It gets a uint8 tensor (channels, height, width) and returns one of the same shape. Whatever it draws from the
    global generators of torch, NumPy and Python is seeded for each image, and their states are left as they were.

    Args:
        wrapped: A transform of torchvision, v2 or v1, another nn.Module, or a function.

    Raises:
        UserError: It needs a batch, or normalizes.
    """

    on_cpu = True

    def __init__(self, wrapped: Callable[[Tensor], Any]) -> None:
        self.wrapped = wrapped
        for each in _inside(wrapped):
            kind = type(each).__name__
            if kind in _MIXES:
                raise UserError(f"--data.transforms {kind}: mixes the images of a batch; give {_MIXES[kind]} instead.")
            if kind in _SCALES and getattr(each, "dtype", None) is not torch.uint8:
                raise UserError(
                    f"--data.transforms {kind}: images are scaled and normalized by the data module, after the "
                    f"transforms; leave it out."
                )

    def draw(self, generator: EpochGenerator, num_images: int, image_size: int) -> Tables:
        return {"seed": torch.randint(2**63 - 1, (num_images,), generator=generator)}

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        planes = images.permute(0, 3, 1, 2).contiguous()
        changed = torch.empty_like(planes)
        with states_kept():
            for k, seed in enumerate(rows["seed"].tolist()):
                torch.default_generator.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                made = self.wrapped(planes[k])
                if not isinstance(made, Tensor) or made.shape != planes.shape[1:] or made.dtype != torch.uint8:
                    raise UserError(self._misfit(made, planes[k]))
                changed[k] = made
        return changed.permute(0, 2, 3, 1)

    def _misfit(self, made: object, image: Tensor) -> str:
        returned = f"--data.transforms {name_of(self)}: returned {described(made)} for an image"
        if not isinstance(made, Tensor):
            return f"{returned}; a tensor is needed, {described(image)}, such as v2.PILToTensor's."
        sizes = "; the image size is set by --data.image_size" if made.shape[1:] != image.shape[1:] else ""
        return f"{returned}; it must be {described(image)}{sizes}."


def as_transform(given: object) -> Transform:
    """Return a transform, or one that applies a callable image by image.

    Raises:
        UserError: It is neither.
    """
    if isinstance(given, Transform):
        return given
    if isinstance(given, type):
        raise UserError(f"--data.transforms {given.__name__}: a class; give an object, {given.__name__}(...).")
    if hasattr(given, "draw") and hasattr(given, "apply"):
        raise UserError(f"--data.transforms {name_of(given)}: must be of a subclass of cifar_lightning.Transform.")
    if not callable(given):
        raise UserError(f"--data.transforms {given}: neither default nor a transform: a Transform, or a callable.")
    return PerImage(given)


def _inside(transform: Any) -> Iterator[Any]:
    """Yield a transform and those that it applies, such as v2.Compose's."""
    yield transform
    inner = getattr(transform, "transforms", None)
    children = transform.children() if isinstance(transform, nn.Module) else ()
    for each in inner if isinstance(inner, Iterable) else children:
        yield from _inside(each)


@contextlib.contextmanager
def states_kept() -> Iterator[None]:
    """Restore the states of the global generators of torch (on the CPU), NumPy and Python."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread of torch, as a worker does: sums over a large image depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
