"""Order of images: a function of (seed, epoch), dealt to the ranks, with a position that a checkpoint can hold."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, distributed
from torch.utils.data import SequentialSampler

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import plural
from cifar_lightning.transforms.transform import seeded_generator

_ORDER = 0  # purpose of the order's generator; the draws of transforms/augmentation.py use 1 and up
_EVALUATION = 1_000_037  # purpose of the generator of a shuffled evaluation; see splits.py for its neighbours


@dataclass(frozen=True)
class Rank:
    """Index of this process and the number of processes."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_process(cls) -> "Rank":
        """Return the rank in torch's process group, which accelerate, Fabric and torchrun's programs make."""
        is_single = not (distributed.is_available() and distributed.is_initialized())
        return cls() if is_single else cls(distributed.get_rank(), distributed.get_world_size())


@dataclass(frozen=True)
class ShardOrder:
    """An order in which each worker reads shards of its own, one window after the other.

    It is a function of seed and epoch, of the images, and of the numbers of ranks and workers:

    1. the shards are put in a random order, each with its images;
    2. of this row of images each rank has a piece of equal length, and in it each worker has one: worker `w` makes the
       batches `w`, `w + num_workers`, ... of the rank;
    3. a worker's piece is shuffled within windows of `window` shards.

    Few shards are read by two workers: those where a piece ends. Images must be in the shards in a random order.
    """

    starts: np.ndarray  # int64 (shards + 1,): index of the first image of each shard, and the number of images
    window: int
    num_workers: int

    def batches(
        self, indices: Tensor, sizes: list[int], *, rank: "Rank", generator: torch.Generator
    ) -> list[Int64[Tensor, " batch"]]:
        """Return the batches of a rank.

        Args:
            indices: int64 (n,), the images of the epoch.
            sizes: Images of each batch of the rank. If all ranks need more than there are, the last is repeated.
            rank: This process.
            generator: The same for all ranks.
        """
        shard = torch.from_numpy(np.searchsorted(self.starts, indices.numpy(), side="right") - 1)
        turn = torch.randperm(len(self.starts) - 1, generator=generator)[shard]
        in_row = torch.argsort(turn, stable=True)
        draws = torch.randperm(len(indices), generator=generator)
        total = sum(sizes)
        piece = in_row[torch.arange(rank.index * total, (rank.index + 1) * total).clamp(max=len(indices) - 1)]
        batches, at = [piece[:0]] * len(sizes), 0
        for worker in range(min(self.num_workers, len(sizes))):
            own = sizes[worker :: self.num_workers]
            part = piece[at : at + sum(own)]
            at += len(part)
            window = torch.unique_consecutive(turn[part], return_inverse=True)[1] // self.window
            mixed = torch.argsort(draws[part])
            mixed = mixed[torch.argsort(window[mixed], stable=True)]
            batches[worker :: self.num_workers] = torch.split(indices[part[mixed]], own)
        return batches


class EpochSampler(SequentialSampler):
    """Batches of image indices of this rank, and the position within the epoch.

    Each iteration is an epoch: the one named by `set_epoch` (Lightning calls it), otherwise the one after the last.

    Training deals each global batch (batch_size x ranks) evenly, so that all ranks make the same number of steps. If
    the last batch has fewer images than there are ranks, a rank without one repeats one. Evaluation deals every image
    exactly once, unpadded; the last batch of a rank may be empty, so that all ranks make the same number of steps.

    It is a SequentialSampler for Lightning, which for `overfit_batches` would replace any other in a new DataLoader.

    Args:
        indices: int64 (n,), indices of the split's images in their source.
        batch_size: Images per batch and rank.
        seed: Seed of the order.
        training: Whether to shuffle and deal evenly.
        drop_last: Whether to leave out a last, smaller training batch.
        rank: This process.
        balanced_by: int64 (n,), the class of each image, to show every class equally often in training.
        repeats: Whether every epoch has the order of the first.
        shards: The order of training images that are read from shards.
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
        repeats: bool = False,
        shards: ShardOrder | None = None,
    ) -> None:
        super().__init__(indices)
        self.indices, self.batch_size, self.rank, self.repeats = indices, batch_size, rank, repeats
        self.seed, self.training, self.drop_last, self.balanced_by = seed, training, drop_last, balanced_by
        self.shards = shards
        self.epoch = 0
        self.position = 0  # batches of `epoch` already given
        self.places: list[Tensor] | None = None
        """Where an image may be shown several times: the places in the epoch of each image of each batch."""
        self._resume_at = 0
        self._is_epoch_named = True  # whether the next iteration is `epoch` itself or the one after

    def __len__(self) -> int:
        per_step = self.batch_size * self.rank.count
        return len(self.indices) // per_step if self.drop_last else -(-len(self.indices) // per_step)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        if epoch != self.epoch:
            self._resume_at = 0
        self.epoch, self._is_epoch_named = epoch, True

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches already given; of shards also how many workers read them."""
        workers = {} if self.shards is None else {"num_workers": self.shards.num_workers}
        return {"epoch": self.epoch, "position": self.position, **workers}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: It is within an epoch whose order is that of another number of workers, or of another cache.
        """
        ours = None if self.shards is None else self.shards.num_workers
        theirs = state.get("num_workers")
        if 0 < state["position"] < len(self) and ours != theirs:
            if ours is None or theirs is None:
                raise UserError("--data.cache: the checkpoint is within an epoch of another; give the run's own.")
            raise UserError(
                f"--data.num_workers {ours}: the checkpoint is within an epoch whose shards are read by "
                f"{plural(theirs, 'worker')}; give --data.num_workers {theirs}."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._resume_at, self._is_epoch_named = self.position, True

    def begin(self) -> list[Tensor]:
        """Start an iteration; return its remaining batches of image indices."""
        if not self._is_epoch_named or self._resume_at >= len(self) > 0:
            self.epoch += 1
            self._resume_at = 0
        self.position, self._resume_at, self._is_epoch_named = self._resume_at, 0, False
        return self._batches()[self.position :]

    def _batches(self) -> list[Tensor]:
        if not self.training:
            own = self.indices[self.rank.index :: self.rank.count]
            if len(self) <= len(own) <= (len(self) - 1) * self.batch_size:
                # As many steps as the other ranks, and no empty batch, whose loss would be NaN.
                return list(torch.tensor_split(own, len(self)))
            return [own[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]
        generator = seeded_generator(self.seed, 0 if self.repeats else self.epoch, _ORDER)
        if self.shards is not None:
            count = -(-len(self.indices) // self.rank.count)
            sizes = [min(self.batch_size, count - k * self.batch_size) for k in range(len(self))]
            return self.shards.batches(self.indices, sizes, rank=self.rank, generator=generator)
        if self.balanced_by is None:
            order = torch.randperm(len(self.indices), generator=generator)
        else:
            order = balanced_order(self.balanced_by, generator)
        batches = self._deal(self.indices[order])
        if self.balanced_by is not None:
            self.places = self._deal(torch.arange(len(order)))[self.position :]
        return batches

    def _deal(self, of_epoch: Tensor) -> list[Tensor]:
        batches = []
        for batch in torch.split(of_epoch, self.batch_size * self.rank.count)[: len(self)]:
            own = batch[self.rank.index :: self.rank.count]
            batches.append(own if len(own) > 0 else batch[:1])
        return batches


def balanced_order(targets: Int64[Tensor, " images"], generator: torch.Generator) -> Int64[Tensor, " images"]:
    """Return the order of an epoch in which every class has the same number of places, to within one.

    Images of a class with fewer images than places are repeated equally often, to within one. Of a class with more,
    some are left out, others in each epoch.
    """
    classes, counts = torch.unique(targets, return_counts=True)
    first, more = divmod(len(targets), len(classes))
    lucky = torch.randperm(len(classes), generator=generator)[:more]
    places = torch.full((len(classes),), first)
    places[lucky] += 1
    by_class = targets.argsort(stable=True).split(counts.tolist())
    chosen = []
    for own, num in zip(by_class, places.tolist(), strict=True):
        rounds = [own[torch.randperm(len(own), generator=generator)] for _ in range(-(-num // len(own)))]
        chosen.append(torch.cat(rounds)[:num] if rounds else own[:0])
    together = torch.cat(chosen)
    return together[torch.randperm(len(together), generator=generator)]


def evaluation_order(num_images: int, *, seed: int, shuffled: bool) -> Int64[Tensor, " images"]:
    """Return the positions of a split in the order of evaluation.

    `shuffled` is for an evaluation that stops early: images are stored class by class, and the first batches alone
    would show one or two classes.
    """
    if not shuffled:
        return torch.arange(num_images)
    return torch.randperm(num_images, generator=seeded_generator(seed, 0, _EVALUATION))
