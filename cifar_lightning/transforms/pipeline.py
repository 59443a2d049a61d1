"""Pipeline: the transforms of a run's training images in order, from uint8 to finished batches."""

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import reason_of
from cifar_lightning.transforms.augmentation import Augmentation, normalize, resize, standardize_
from cifar_lightning.transforms.per_image import as_transform, states_kept
from cifar_lightning.transforms.transform import EpochGenerator, Stage, Tables, Transform, described, name_of

DEFAULT: list[Any] = ["default"]
"""The list of `--data.transforms` that holds what the short flags choose, and nothing else."""
CHECKED_IMAGES = 4  # before training: enough to tell the batch from the channels
_OWN = 1_000_121  # purpose of the generators of transforms that are not the default ones; see splits.py for neighbours
Drawn = list[tuple[Transform, Tables]]
"""Transforms with their tables of an epoch, or with the rows of a batch."""


@dataclass(frozen=True)
class _Step:
    transform: Transform
    own_key: tuple[int, ...]  # () for the default transforms, which number their streams

    def draw(self, num_images: int, image_size: int, seed: int, epoch: int) -> Tables:
        tables = self.transform.draw(EpochGenerator(seed, epoch, *self.own_key), num_images, image_size)
        if not isinstance(tables, dict):
            raise _refused(self.transform, f"draw returned {described(tables)}; it must return tensors by name")
        for name, table in tables.items():
            if not isinstance(table, Tensor) or table.shape[:1] != (num_images,):
                wanted = f"it must be a tensor with {num_images} rows, one per image"
                raise _refused(self.transform, f"draw returned {name} as {described(table)}; {wanted}")
        return tables


class Pipeline:
    """The transforms of training images.

    Args:
        augmentation: The default transforms.
        transforms: "default", which stands for those, and transforms or callables of one's own, in order; or one.

    Raises:
        UserError: An entry that is no transform or of an unknown stage, or settings of the default transforms in a list
            without them.
    """

    def __init__(self, augmentation: Augmentation, transforms: object = tuple(DEFAULT)) -> None:
        transforms = transforms if isinstance(transforms, list | tuple) else [transforms]
        if "default" not in transforms:
            _refuse_settings(augmentation)
        elif transforms.count("default") > 1:
            raise UserError("--data.transforms: default stands in the list twice; leave one of them out.")
        steps, num_of = [], Counter[str]()
        for each in transforms:
            if isinstance(each, str) and each == "default":
                steps += [_Step(transform, ()) for transform in augmentation.transforms()]
                continue
            transform = as_transform(each)
            name = name_of(transform)
            if transform.stage not in get_args(Stage):
                raise _refused(transform, f"stage {transform.stage}; {', '.join(get_args(Stage))} are the stages")
            steps.append(_Step(transform, (_OWN, zlib.crc32(name.encode()), num_of[name])))
            num_of[name] += 1
        self._has_own = bool(num_of)
        in_bytes = [step for step in steps if step.transform.stage == "uint8"]
        num_on_cpu = max((k for k, step in enumerate(in_bytes, 1) if step.transform.on_cpu), default=0)
        self._on_cpu = in_bytes[:num_on_cpu]
        self._on_device = [step for step in steps if step not in self._on_cpu]

    @property
    def on_cpu(self) -> list[Transform]:
        """The first transforms, up to the last that is slow: they run on the CPU, in workers where there are some."""
        return [step.transform for step in self._on_cpu]

    def draw(
        self, *, num_images: int, image_size: int, seed: int, epoch: int, device: torch.device
    ) -> tuple[Drawn, Drawn]:
        """Draw the tables of one epoch, a pure function of the arguments: of `on_cpu`, and of the further transforms.

        The draws are made on the CPU and moved, since generators of other devices give other numbers.
        """

        def drawn(steps: list[_Step], device: torch.device) -> Drawn:
            tables = [step.draw(num_images, image_size, seed, epoch) for step in steps]
            moved = [{name: table.to(device) for name, table in each.items()} for each in tables]
            return [(step.transform, each) for step, each in zip(steps, moved, strict=True)]

        return drawn(self._on_cpu, torch.device("cpu")), drawn(self._on_device, device)

    def check(self, images: UInt8[Tensor, "batch height width channels"], sizes: Sequence[int]) -> None:
        """Apply the transforms to a few images in each size, if any is not ours.

        Raises:
            UserError: One changes the shape or dtype, gives NaN, or fails; names it.
        """
        half = torch.full(images.shape[-1:], 0.5)
        for size in dict.fromkeys(sizes) if self._has_own else ():
            drawn: Drawn = []
            for step in (*self._on_cpu, *self._on_device):
                with _blamed(step.transform):
                    drawn.append((_Checked(step.transform), step.draw(len(images), size, 0, 0)))
            augment(resize(images, size), drawn, mean=half, std=half)


def rows_of(drawn: Drawn, images: Int64[Tensor, " batch"], places: Int64[Tensor, " batch"] | None = None) -> Drawn:
    """Return the rows of a batch.

    Args:
        drawn: Tables of an epoch.
        images: Indices of the images in their source.
        places: Their places in the epoch, where an image may have several; it then has draws of its own each time.
    """
    places = images if places is None else places
    rows: Drawn = []
    for transform, tables in drawn:
        chosen = {name: images if name in transform.of_image else places for name in tables}
        rows.append((transform, {name: table.index_select(0, chosen[name]) for name, table in tables.items()}))
    return rows


def augment(
    images: UInt8[Tensor, "batch height width channels"],
    drawn: Drawn,
    *,
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Apply transforms with their rows of a batch, and normalize.

    Args:
        images: uint8, 0-255.
        drawn: Transforms with one row per image.
        mean: Per channel, of images scaled to 0-1, on their device.
        std: Per channel, of images scaled to 0-1, on their device.
    """
    images = apply_stage("uint8", images, drawn)
    if any(transform.stage == "float" for transform, _ in drawn):
        unit = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
        unit = apply_stage("float", unit.permute(0, 3, 1, 2), drawn)
        finished = standardize_(unit.permute(0, 2, 3, 1).contiguous(), mean, std)
    else:
        finished = normalize(images, mean=mean, std=std)
    return apply_stage("normalized", finished, drawn)


def apply_stage(stage: Stage, images: Tensor, drawn: Drawn) -> Tensor:
    """Apply the transforms of a stage."""
    for transform, rows in drawn:
        if transform.stage == stage:
            images = transform.apply(images, rows)
            if stage == "normalized":
                images = images.contiguous(memory_format=torch.channels_last)  # as ours need it
    return images


def _refuse_settings(augmentation: Augmentation) -> None:
    for field in fields(augmentation):
        value = getattr(augmentation, field.name)
        if value != field.default:
            raise UserError(
                f"--data.transforms without default, with --data.{field.name} {value}: this list replaces the default "
                f"transforms.\nTo have both: --data.transforms+=CLASS, or a list such as [default, CLASS]."
            )


class _Checked(Transform):
    """Applies another transform and looks at what it returns."""

    def __init__(self, transform: Transform) -> None:
        self.wrapped, self.stage = transform, transform.stage

    def apply(self, images: Tensor, rows: Tables) -> Tensor:
        wanted = described(images)
        with _blamed(self.wrapped):
            with states_kept():  # so that the global generators give the same
                again = self.wrapped.apply(images.clone(), rows)
            made = self.wrapped.apply(images, rows)
        if described(made) != wanted:
            raise _refused(self.wrapped, f"returned {described(made)} for {wanted}; dtype and shape must stay")
        if made.is_floating_point() and not made.isfinite().all():
            raise _refused(self.wrapped, "returned NaN or infinite values")
        if not torch.equal(made, again):
            raise _refused(
                self.wrapped,
                "gives other images for the same draws; draw in `draw`, or in a function from the global generators "
                "of torch, NumPy and Python, not from one of its own",
            )
        return made


@contextlib.contextmanager
def _blamed(transform: Transform) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise _refused(transform, f"{type(error).__name__}: {reason_of(error)}") from error


def _refused(transform: Transform, reason: str) -> UserError:
    return UserError(f"--data.transforms {name_of(transform)}: {reason}.")
