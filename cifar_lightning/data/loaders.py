"""Finished batches: gathered in a seeded order, augmented and normalised on the device, ready for the network.

Two loaders with one interface give the same batches for the same seed. `ResidentLoader` keeps the uint8 images on the
training device and gathers there; `StreamingLoader` has worker processes gather rows of a set that may be larger than
memory. Neither is a `DataLoader`, so that order, shares and position are ours and survive a stop:

- order = f(seed, epoch), augmentation = g(seed, epoch, image), nothing depends on an earlier batch;
- `sampler.set_epoch` (Lightning calls it) names the next epoch; where nobody calls it, each iteration is the next one;
- `state_dict` and `load_state_dict` (Lightning looks for them) hold the epoch and the batches already given.
"""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar_lightning.data.memory import give_back_pages
from cifar_lightning.data.splits import balanced_order
from cifar_lightning.transforms.augmentation import (
    Augmentation,
    augment,
    draw_epoch,
    normalize,
    resize,
    seeded_generator,
)

_ORDER = 0  # purpose of the order's generator; augment.py's draws use 1 and up


@dataclass(frozen=True)
class Rank:
    """Which of how many processes deals with this share."""

    index: int = 0
    count: int = 1


class EpochSampler:
    """Which images each batch of this rank has, and how far the epoch has come.

    Training deals each global batch (batch_size x ranks) evenly, so that all ranks make the same number of steps; where
    the last one has fewer images than there are ranks, a rank without one repeats one. Evaluation deals every image
    exactly once, unpadded; so that all ranks make the same number of steps there too, a last batch may be empty.

    Args:
        indices: int64 (n,), the images of this split in its source.
        batch_size: Images a batch and rank.
        seed: Seed of the order.
        training: Whether to shuffle and deal evenly.
        drop_last: Whether to leave out a last, smaller batch of training.
        rank: This process's share.
        balanced_by: int64 (n,), the classes of the images, where training is to show every class equally often.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        seed: int,
        training: bool,
        drop_last: bool = False,
        rank: Rank,
        balanced_by: Tensor | None = None,
    ) -> None:
        self.indices, self.batch_size, self.rank = indices, batch_size, rank
        self.seed, self.training, self.drop_last, self.balanced_by = seed, training, drop_last, balanced_by
        self.epoch = 0
        self.position = 0  # batches of `epoch` already given
        self.places: list[Tensor] | None = None
        """Of each batch that `begin` returned, its images' places in the epoch, where an image may have several."""
        self._resume_at = 0
        self._announced = True  # whether the next iteration is `epoch` itself or the one after

    def __len__(self) -> int:
        per_step = self.batch_size * self.rank.count
        return len(self.indices) // per_step if self.drop_last else -(-len(self.indices) // per_step)

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch of the next iteration."""
        if epoch != self.epoch:
            self._resume_at = 0
        self.epoch, self._announced = epoch, True

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches already given."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where `state` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._resume_at, self._announced = self.position, True

    def begin(self) -> list[Tensor]:
        """Start an iteration; return the batches of image indices that it still has to give."""
        if not self._announced or self._resume_at >= len(self) > 0:
            self.epoch += 1
            self._resume_at = 0
        self.position, self._resume_at, self._announced = self._resume_at, 0, False
        return self._batches()[self.position :]

    def _batches(self) -> list[Tensor]:
        if not self.training:
            share = self.indices[self.rank.index :: self.rank.count]
            # A rank with one image less may need an empty batch to make as many steps as the others.
            return [share[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]
        generator = seeded_generator(self.seed, self.epoch, _ORDER)
        if self.balanced_by is None:
            order = torch.randperm(len(self.indices), generator=generator)
        else:
            order = balanced_order(self.balanced_by, generator)
        batches = self._dealt(self.indices[order])
        if self.balanced_by is not None:
            self.places = self._dealt(torch.arange(len(order)))[self.position :]
        return batches

    def _dealt(self, of_epoch: Tensor) -> list[Tensor]:
        global_batches = torch.split(of_epoch, self.batch_size * self.rank.count)[: len(self)]
        return [self._share(batch) for batch in global_batches]

    def _share(self, batch: Tensor) -> Tensor:
        share = batch[self.rank.index :: self.rank.count]
        return share if len(share) > 0 else batch[:1]


class ImageLoader(ABC):
    """What both loaders share; `for images, targets in loader` gives one epoch.

    `images` is float32 (batch, channels, height, width), normalised, channels_last in memory; `targets` int64 (batch,).

    Args:
        sampler: Which images, in which order.
        augmentation: None for evaluation: normalise alone.
        mean: Per channel, of images scaled to 0-1.
        std: Per channel, of images scaled to 0-1.
        sizes: Sides in pixels of each epoch's images; the last one stays.
        source_size: Images and side in pixels of the source that the sampler's indices point into.
        device: Where batches are finished.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        *,
        augmentation: Augmentation | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        sizes: tuple[int, ...],
        source_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.sampler, self.augmentation = sampler, augmentation
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.num_images, self.image_size = source_size
        self.sizes = sizes
        self.device = device

    batch_sampler = None
    """Lightning asks anything that has a `sampler` for it."""

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: Lightning calls iter() before it names the epoch, and nothing may happen before the first next().
        batches = self.sampler.begin()
        size = self.sizes[min(self.sampler.epoch, len(self.sizes) - 1)]
        draws = None
        if self.augmentation is not None:
            draws = draw_epoch(
                self.augmentation,
                num_images=self.num_images,
                image_size=size,
                seed=self.sampler.seed,
                epoch=self.sampler.epoch,
                device=self.device,
            )
        # An image that is shown again in an epoch gets draws of its own: those of its place, not of its number.
        places = None if self.sampler.places is None else iter(_on_device(self.sampler.places, self.device))
        for image_indices, images, targets in self._gather(batches):
            if size != self.image_size:
                images = resize(images, size)
            if self.augmentation is not None and draws is not None:
                rows = image_indices if places is None else next(places)
                drawn = draws.of(rows)
                if places is not None and self.augmentation.flip == "alternating" and draws.mirrored is not None:
                    # The one draw that is of the image: the next epoch shows the other side, wherever it stands.
                    drawn = replace(drawn, mirrored=draws.mirrored.index_select(0, image_indices))
                finished = augment(images, drawn, self.augmentation, mean=self.mean, std=self.std)
            else:
                finished = normalize(images, mean=self.mean, std=self.std)
            # Before the yield: code after the last one does not run, since Lightning stops at the length.
            self.sampler.position += 1
            yield finished, targets

    @abstractmethod
    def _gather(self, batches: list[Tensor]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Give (indices, uint8 images (batch, height, width, channels), targets) of each batch on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, for a checkpoint."""
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint."""
        self.sampler.load_state_dict(state_dict)


class ResidentLoader(ImageLoader):
    """Keeps the whole source on the device and gathers there: no workers, no copies between host and device.

    Args:
        images: uint8 (n, height, width, channels) on the device, shared by the loaders of a source.
        targets: int64 (n,) on the device.
        sampler: Which images, in which order.
        **kwargs: See `ImageLoader`.
    """

    def __init__(self, images: Tensor, targets: Tensor, sampler: EpochSampler, **kwargs: Any) -> None:
        super().__init__(sampler, source_size=(images.shape[0], images.shape[1]), device=images.device, **kwargs)
        self.images, self.targets = images, targets

    def _gather(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images in _on_device(batches, self.device):
            yield images, self.images.index_select(0, images), self.targets.index_select(0, images)


class StreamingLoader(ImageLoader):
    """Has persistent worker processes read the images, for sets larger than memory.

    Args:
        images: uint8 (n, height, width, channels), usually a memory-mapped file.
        targets: int64 (n,).
        sampler: Which images, in which order.
        num_workers: Worker processes, 1 or more.
        device: Where batches are finished.
        **kwargs: See `ImageLoader`.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: np.ndarray,
        sampler: EpochSampler,
        *,
        num_workers: int,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(sampler, source_size=(images.shape[0], images.shape[1]), device=device, **kwargs)
        self._index_batches = _IndexBatches()
        self._workers: DataLoader[tuple[Tensor, Tensor, Tensor]] = DataLoader(
            _Rows(images, targets),
            batch_sampler=self._index_batches,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each epoch would take a number from the global one, and dropout differ
            persistent_workers=True,
            worker_init_fn=leave_to_parent,
        )

    def _gather(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # No lists: a set's numbers as Python objects would take five times the memory.
        self._index_batches.batches = [batch.numpy() for batch in batches]
        for image_indices, images, targets in self._workers:
            yield (
                image_indices.to(self.device, non_blocking=True),
                images.to(self.device, non_blocking=True),
                targets.to(self.device, non_blocking=True),
            )


class _IndexBatches:
    """The batch sampler of the workers' DataLoader; an epoch's batches are put in before each iteration."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def __iter__(self) -> Iterator[Any]:  # arrays, where DataLoader asks for lists and takes any
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Rows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Reads whole batches of rows; a memory-mapped array travels to a spawned worker as its path, not its content."""

    def __init__(self, images: np.ndarray, targets: np.ndarray) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: np.ndarray | list[int]) -> tuple[Tensor, Tensor, Tensor]:
        image_indices = np.asarray(indices, dtype=np.int64)
        # Sorted reads of a memory-mapped file touch each page once and in order.
        by_place = np.argsort(image_indices)
        images = np.empty((len(image_indices), *self.images.shape[1:]), np.uint8)
        images[by_place] = self.images[image_indices[by_place]]
        give_back_pages(self.images)  # or a worker would grow by all that it ever read
        return torch.from_numpy(image_indices), torch.from_numpy(images), torch.from_numpy(self.targets[image_indices])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if isinstance(self.images, np.memmap):
            array = self.images
            state["images"] = (array.filename, array.offset, array.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], tuple):
            path, offset, shape = state["images"]
            state["images"] = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=shape)
        self.__dict__.update(state)


def _on_device(batches: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Move an epoch's batches of indices at once: a transfer a batch would make the host wait in every step."""
    return torch.split(torch.cat(batches).to(device), [len(batch) for batch in batches]) if batches else ()


def _as_it_is(batch: Any) -> Any:
    return batch


def leave_to_parent(worker_id: int) -> None:
    """Let a loader's worker process leave the signals of its process group to its parent, which ends it by SIGTERM.

    Ctrl-C, `timeout` and `kill -- -GROUP` reach the whole group, and the parent still needs a batch to stop at its end.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has its parent's handler
