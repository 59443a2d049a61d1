"""Loaders of finished batches: gathered in a seeded order, augmented and normalized on the device.

`ResidentLoader` keeps the uint8 images on the device and gathers there. `StreamingLoader` has worker processes read
the images, for sets that do not fit in memory. Both give the same batches for the same seed. `LoaderFactory` chooses.

Loaders are not `DataLoader` instances. A stopped run resumes bit for bit because nothing depends on an earlier batch:

- the order is a function of (seed, epoch), the draws of transforms are one of (seed, epoch, image);
- `sampler.set_epoch` (called by Lightning) sets the epoch; without it each iteration is the next epoch;
- `state_dict` and `load_state_dict` (called by Lightning) hold the epoch and the number of batches already given.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from cifar_lightning.data.image_set import ImageSet, Split, pixel_hashes
from cifar_lightning.data.memory import choose_num_workers, free_device_bytes, give_back_pages
from cifar_lightning.data.sampler import EpochSampler, Rank
from cifar_lightning.data.shards import WINDOW, ShardedImages
from cifar_lightning.data.statistics import evenly_spaced
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.formatting import reason_of
from cifar_lightning.transforms.augmentation import Augmentation, resize
from cifar_lightning.transforms.per_image import one_thread
from cifar_lightning.transforms.pipeline import Drawn, Pipeline, apply_stage, augment, rows_of
from cifar_lightning.transforms.transform import Tables, Transform, name_of

_BLOCK = 1024  # images of a mapped file that are read at a time
_COMPARED = 64  # images of a mapped file that tell whether a worker has opened the same one
_NO_TRANSFORMS = Pipeline(Augmentation(), ())


@dataclass(frozen=True)
class BatchTransform:
    """What a loader does to a batch of uint8 images."""

    mean: tuple[float, ...]  # per channel, of images scaled to 0-1
    std: tuple[float, ...]  # the same
    sizes: tuple[int, ...]  # image size of each epoch in pixels; the last one stays
    pipeline: Pipeline = _NO_TRANSFORMS  # of evaluation, which only normalizes


class ImageLoader(ABC):
    """Base of both loaders; `for images, targets in loader` gives one epoch.

    `images` is float32 (batch, channels, height, width), normalized, channels_last in memory; `targets` int64 (batch,).

    Args:
        sampler: Batches of image indices.
        transform: What is done to a batch.
        num_images: Number of images of the source that the indices refer to.
        device: Where batches are transformed.
    """

    def __init__(
        self, sampler: EpochSampler, transform: BatchTransform, *, num_images: int, device: torch.device
    ) -> None:
        self.sampler, self.pipeline, self.sizes = sampler, transform.pipeline, transform.sizes
        self.mean, self.std = torch.tensor(transform.mean, device=device), torch.tensor(transform.std, device=device)
        self.num_images, self.device = num_images, device

    dataset: Dataset[tuple[Tensor, ...]]
    """The split's images on all ranks, as (uint8 (height, width, channels), target) each."""
    workers_decode = False
    """Whether the workers decode images, and need the cores for it."""
    batch_sampler = None
    """Lightning reads it of anything that has a `sampler`."""

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: Lightning calls iter() before set_epoch, so nothing may happen before the first next().
        if self.sampler.rank.count == 1 < (num_processes := Rank.of_process().count):
            raise UserError(
                f"this loader was made before the {num_processes} processes, and each would get every image; make it "
                "after Accelerator(), fabric.launch() or init_process_group()."
            )
        batches = self.sampler.begin()
        size = self.sizes[min(self.sampler.epoch, len(self.sizes) - 1)]
        on_cpu, on_device = self.pipeline.draw(
            num_images=self.num_images,
            image_size=size,
            seed=self.sampler.seed,
            epoch=self.sampler.epoch,
            device=self.device,
        )
        # An image that is repeated in an epoch has draws of its own each time: those of its place, not of its index.
        of_epoch = self.sampler.places
        places = None if of_epoch is None else iter(_on_device(of_epoch, self.device))
        on_cpu_rows = (
            rows_of(on_cpu, batch, None if of_epoch is None else of_epoch[k]) for k, batch in enumerate(batches)
        )
        for image_indices, images, targets in self._gather(batches, size, on_cpu_rows if on_cpu else None):
            if images.shape[1] != size:
                images = resize(images, size)
            drawn = rows_of(on_device, image_indices, None if places is None else next(places))
            # The workers of slow transforms need the cores, and torch's threads spin while they wait for more work:
            # on 2 cores this process took 20 to 26 ms of CPU a batch, and takes 5 to 13 (other programs ran).
            with one_thread() if on_cpu or self.workers_decode else contextlib.nullcontext():
                finished = augment(images, drawn, mean=self.mean, std=self.std)
            # Before the yield: code after the last one does not run, since Lightning stops at the length.
            self.sampler.position += 1
            yield finished, targets

    @abstractmethod
    def _gather(
        self, batches: list[Tensor], size: int, drawn: Iterator[Drawn] | None
    ) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield (indices, uint8 images (batch, height, width, channels), targets) of each batch on the device.

        Where some transforms run on the CPU, `drawn` yields their rows of each batch, for images of `size` pixels.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and position."""
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint."""
        self.sampler.load_state_dict(state_dict)


class ResidentLoader(ImageLoader):
    """Keeps all images of a source on the device: no workers, no copies between host and device.

    Images are uint8 (n, height, width, channels), shared by the loaders of a source; targets int64 (n,).
    """

    def __init__(self, images: Tensor, targets: Tensor, sampler: EpochSampler, transform: BatchTransform) -> None:
        super().__init__(sampler, transform, num_images=len(images), device=images.device)
        self.images, self.targets = images, targets
        self.dataset = Subset(TensorDataset(images, targets), cast(Any, sampler.indices))

    def _gather(
        self, batches: list[Tensor], size: int, drawn: Iterator[Drawn] | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for indices in _on_device(batches, self.device):
            images = self.images.index_select(0, indices)
            if drawn is not None:
                with one_thread():
                    images = _transform_on_cpu(images.cpu(), size, next(drawn)).to(self.device)
            yield indices, images, self.targets.index_select(0, indices)


class StreamingLoader(ImageLoader):
    """Reads the images in persistent worker processes, for sets larger than memory.

    Images are uint8 (n, height, width, channels), usually a memory-mapped file, or in shards; targets int64 (n,).
    """

    def __init__(
        self,
        images: np.ndarray | ShardedImages,
        targets: np.ndarray,
        sampler: EpochSampler,
        transform: BatchTransform,
        *,
        num_workers: int,
        device: torch.device,
    ) -> None:
        super().__init__(sampler, transform, num_images=len(images), device=device)
        if (start_method := _start_method()) != "fork":
            is_sharded = isinstance(images, ShardedImages)
            _check_sendable(transform.pipeline.on_cpu, f"--data.{'cache memory' if is_sharded else 'num_workers 0'}")
        # A worker that begins a window of shards begins to download the next one.
        steps = 0
        if isinstance(images, ShardedImages):
            steps = len(images) * WINDOW // (images.num_shards * sampler.batch_size) + 1
            self.workers_decode = images.has_jpegs
        self._index_batches = _IndexBatches(steps * num_workers)
        self._num_begun = 0  # iterations
        rows = _Rows(images, targets, transform.pipeline.on_cpu)
        self.dataset = Subset(rows, cast(Any, sampler.indices))
        self._workers: DataLoader[tuple[Tensor, ...]] = DataLoader(
            rows,
            batch_sampler=self._index_batches,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=device.type == "cuda",
            # Otherwise each epoch would draw from the global generator, and dropout would differ from resident loading.
            generator=torch.Generator(),
            persistent_workers=True,
            worker_init_fn=leave_signals_to_parent,
            multiprocessing_context=start_method,
        )
        # Trainer and data refer to each other. Python's collector closes the queues of such a cycle before it ends the
        # workers, which then do not hear of it, and torch waits 5 s for each. Nothing else refers to the iterator.
        weakref.finalize(self, setattr, self._workers, "_iterator", None).atexit = False

    def _gather(
        self, batches: list[Tensor], size: int, drawn: Iterator[Drawn] | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # Arrays, not lists: a set's indices as Python objects would take five times the memory.
        self._index_batches.begin([batch.numpy() for batch in batches], size, drawn)
        self._num_begun += 1
        turn, read = self._num_begun, iter(self._workers)
        for _ in batches:
            if turn != self._num_begun:
                raise UserError(
                    "this loader is iterated again before the end of an epoch, and its workers read for one iteration "
                    "at a time; iterate another one, as train_dataloader() makes."
                )
            batch = next(read)
            if isinstance(batch, Exception):
                raise batch
            image_indices, images, targets = batch
            # Only what is pinned, for CUDA: MPS may copy memory that is freed meanwhile (PyTorch's issue 83015).
            is_pinned = self.device.type == "cuda"
            yield (
                image_indices.to(self.device, non_blocking=is_pinned),
                images.to(self.device, non_blocking=is_pinned),
                targets.to(self.device, non_blocking=is_pinned),
            )


class LoaderFactory:
    """Makes resident or streaming loaders; resident loaders of a source share one copy of its images.

    `num_workers` 0 is resident, 1 or more is streaming; None chooses by the memory that is free. Slow transforms get
    workers by default where these are forked: others would load the transforms and import the script again.
    """

    def __init__(self, images: dict[Split, ImageSet], num_workers: int | None) -> None:
        self.images, self.num_workers = images, num_workers
        self._resident: dict[tuple[Split, torch.device], tuple[Tensor, Tensor]] = {}
        self._free_bytes: dict[torch.device, float] = {}  # before the first loader took memory: it counts for all

    def make(
        self, source: Split, sampler: EpochSampler, transform: BatchTransform, device: torch.device
    ) -> ImageLoader:
        """Return a loader of an image set."""
        num_workers = self.num_workers
        if num_workers is None:
            if device not in self._free_bytes:
                self._free_bytes[device] = free_device_bytes(device)
            num_bytes = sum(images.images.nbytes for images in self.images.values())
            needs_workers = transform.pipeline.on_cpu and _start_method() == "fork"
            num_workers = choose_num_workers(num_bytes, 0 if needs_workers else self._free_bytes[device])
        if num_workers == 0:
            images, targets = self._resident_tensors(source, device)
            return ResidentLoader(images, targets, sampler, transform)
        raw = self.images[source]
        return StreamingLoader(raw.images, raw.targets, sampler, transform, num_workers=num_workers, device=device)

    def _resident_tensors(self, source: Split, device: torch.device) -> tuple[Tensor, Tensor]:
        if (source, device) not in self._resident:
            raw = self.images[source]
            if raw.images.flags.writeable:
                images = torch.from_numpy(raw.images).to(device)
            elif device.type != "cpu":
                images = _read_onto(device, raw.images)
                raw = raw._replace(targets=raw.targets.copy())
            else:
                # Read a memory-mapped file into memory: page faults during training would be slow. A copy by its own
                # method would be a memmap, too, of no file.
                raw = raw._replace(images=np.array(raw.images), targets=raw.targets.copy())
                self.images[source] = raw  # drops the mapping, whose pages would count twice
                images = torch.from_numpy(raw.images)
            self._resident[source, device] = (images, torch.from_numpy(raw.targets).to(device))
        return self._resident[source, device]


def _read_onto(device: torch.device, mapped: np.ndarray) -> Tensor:
    """Read a memory-mapped file into a device's memory, of which the host's has a block at a time."""
    images = torch.empty(mapped.shape, dtype=torch.uint8, device=device)
    for block in (slice(start, start + _BLOCK) for start in range(0, len(mapped), _BLOCK)):
        images[block] = torch.from_numpy(np.array(mapped[block]))
        give_back_pages(mapped)
    return images


class _Batch(NamedTuple):
    """What a worker is asked for."""

    indices: np.ndarray
    later: np.ndarray | None = None  # of a batch that this worker reads later, whose shards it begins to download
    size: int = 0  # in pixels, for the rows of transforms that run in the worker
    rows: Sequence[Tables] = ()


class _IndexBatches:
    """Batch sampler of the workers' DataLoader; `begin` sets its batches before each epoch."""

    def __init__(self, num_ahead: int) -> None:
        self.num_ahead = num_ahead  # batches from one to its `later`; 0 is none
        self.begin([], 0, None)

    def begin(self, batches: list[np.ndarray], size: int, drawn: Iterator[Drawn] | None) -> None:
        """Set the indices of each batch; with rows of transforms that run in the workers, also these and the size."""
        self.batches, self._size, self._drawn = batches, size, drawn

    def __iter__(self) -> Iterator[Any]:  # DataLoader is typed for lists and accepts any
        ahead: Iterator[np.ndarray | None] = iter(self.batches[self.num_ahead :] if self.num_ahead else ())
        for batch in self.batches:
            rows = () if self._drawn is None else [rows for _, rows in next(self._drawn)]
            yield _Batch(batch, next(ahead, None), self._size, rows)

    def __len__(self) -> int:
        return len(self.batches)


class _Rows(Dataset[tuple[Tensor, ...]]):
    """Reads batches of images, and transforms them where rows of `transforms` come with the indices.

    A memory-mapped array is sent to a spawned worker as its path, not its content. Where another run has put other
    images at this path since, or it is gone, reading is a `RunError`.
    """

    def __init__(
        self, images: np.ndarray | ShardedImages, targets: np.ndarray, transforms: Sequence[Transform] = ()
    ) -> None:
        self.images: np.ndarray | ShardedImages | _MappedFile = images
        self.targets, self.transforms = targets, transforms

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        _, images, targets = self._read(_Batch(np.array([int(index)])))
        return images[0], targets[0]

    def __getitems__(
        self, batch: _Batch | np.ndarray | list[int]
    ) -> tuple[Tensor, Tensor, Tensor] | UserError | RunError:
        try:
            return self._read(batch if isinstance(batch, _Batch) else _Batch(np.asarray(batch)))
        except (UserError, RunError) as error:  # DataLoader would raise it with a traceback for its message
            return error

    def _read(self, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        image_indices = np.asarray(batch.indices, dtype=np.int64)
        if isinstance(self.images, _MappedFile):
            raise RunError(f"{self.images.path}: the decoded images were removed or replaced meanwhile; start again.")
        if isinstance(self.images, ShardedImages):
            if batch.later is not None:
                self.images.fetch_ahead(batch.later)
            images = self.images[image_indices]
        else:
            # Sorted reads of a memory-mapped file touch each page once and in order.
            by_index = np.argsort(image_indices)
            images = np.empty((len(image_indices), *self.images.shape[1:]), np.uint8)
            images[by_index] = self.images[image_indices[by_index]]
            give_back_pages(self.images)  # otherwise a worker would grow by everything it reads
        batch_images = torch.from_numpy(images)
        if batch.rows:
            drawn = list(zip(self.transforms, batch.rows, strict=True))
            batch_images = _transform_on_cpu(batch_images, batch.size, drawn)
        return torch.from_numpy(image_indices), batch_images, torch.from_numpy(self.targets[image_indices])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if isinstance(self.images, np.memmap):
            array = self.images
            state["images"] = _MappedFile(str(array.filename), array.offset, array.shape, _some_hashes(array))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(file := self.images, _MappedFile):
            with contextlib.suppress(OSError, ValueError):  # missing, too short
                mapped = np.memmap(file.path, dtype=np.uint8, mode="r", offset=file.offset, shape=file.shape)
                if np.array_equal(_some_hashes(mapped), file.hashes):
                    self.images = mapped


class _MappedFile(NamedTuple):
    """A memory-mapped array on its way to a worker."""

    path: str
    offset: int
    shape: tuple[int, ...]
    hashes: np.ndarray


def _some_hashes(images: np.ndarray) -> np.ndarray:
    return pixel_hashes(images[evenly_spaced(len(images), _COMPARED)])


def _transform_on_cpu(images: Tensor, size: int, drawn: Drawn) -> Tensor:
    return apply_stage("uint8", images if images.shape[1] == size else resize(images, size), drawn)


def _on_device(batches: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Move the indices of an epoch at once: one transfer per batch would make the host wait in every step."""
    return torch.split(torch.cat(batches).to(device), [len(batch) for batch in batches]) if batches else ()


def _start_method() -> str:
    """Return how workers begin: as the program has chosen, or else forked on Linux, in Python 3.14 as before it.

    Any process or lock of the program sets the default of Python as if it was chosen.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)  # a call without it would choose
    default = multiprocessing.get_all_start_methods()[0]
    return "fork" if sys.platform == "linux" and chosen in (None, default) else chosen or default


def _check_sendable(transforms: Sequence[Transform], way_out: str) -> None:
    """Refuse transforms that a worker which is not forked cannot load: lambdas, and what a notebook defines."""
    main = sys.modules["__main__"]
    is_notebook = getattr(main, "__spec__", None) is None and not hasattr(main, "__file__")
    for transform in transforms:
        try:
            pickled = pickle.dumps(transform)
            if not is_notebook or b"__main__" not in pickled:
                continue
            reason = "it is defined in a notebook or at a prompt"
        except RuntimeError:  # of multiprocessing's locks and values, which are sent only while a process starts
            continue
        except Exception as error:  # a class of the user's raises anything
            reason = reason_of(error)
        raise UserError(
            f"--data.transforms {name_of(transform)}: cannot be sent to worker processes ({reason}).\n"
            f"Define it in a module that can be imported, or give {way_out}."
        )


def _identity(batch: Any) -> Any:
    return batch


def leave_signals_to_parent(worker_id: int) -> None:
    """Move a worker process to a process group of its own, and let its parent end it by SIGTERM.

    Ctrl-C, `timeout` and `kill -- -GROUP` reach the whole group, but the parent stops at the end of a batch and still
    needs its workers.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has its parent's handler
