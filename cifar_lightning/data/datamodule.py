"""ImageDataModule: from a source's images to honest splits, statistics and loaders, with or without a Trainer."""

import os
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cifar_lightning.data.datasets import ImageSet, open_source
from cifar_lightning.data.loaders import EpochSampler, ImageLoader, Rank, ResidentLoader, StreamingLoader
from cifar_lightning.data.memory import free_host_bytes, give_back_pages
from cifar_lightning.data.splits import balanced_weights, describe_imbalance, stratified_split, stratified_subset
from cifar_lightning.errors import UserError
from cifar_lightning.settings.limits import LIMITS, check_choice, check_limits
from cifar_lightning.transforms.augmentation import Augmentation, CropMode, FlipMode, normalize, seeded_generator
from cifar_lightning.transforms.policies import Policy

Split = Literal["train", "val", "test"]
Balance = Literal["none", "balanced"]
_EVALUATION = 1_000_037  # purpose of a generator, as in splits.py
_NAMED = 12  # class names that are printed
_CHUNK = 1024  # images of 32x32 summed at a time, 25 MB of float64, and fewer of larger ones


class ImageDataModule(pl.LightningDataModule):
    """Images by name, split without a peek at test, as finished batches.

    `class_names`, `num_classes` and `image_size` are known at once, `mean` and `std` (per channel, of images scaled
    to 0-1) after `setup()`. Without a Trainer: `prepare_data()`, `setup()`, then iterate `train_dataloader()`.

    Args:
        dataset: Which images: cifar10, cifar100, folder (class folders below root) or synthetic (generated).
        root: Where the images lie, or are downloaded to.
        batch_size: Training images a step and process.
        image_size: Side of the square images in pixels; by default the data set's own, of a folder one that suits
            its images.
        val_fraction: Share of the training images held out for validation, stratified by class; 0 trains on all. A
            folder with a val/ has its own validation images, and the share is not used.
        limit: Take this many training images, those for validation included where they are split off, and of every
            class its share; by default all.
        class_weights: balanced lets every class count the same in the loss of ImageClassifier, however few images it
            has.
        sampler: balanced shows every class equally often in training, and so repeats images of small classes.
        num_workers: 0 keeps the images on the training device, 1 or more streams them with that many worker
            processes; by default 0 where the set fits in memory, else 2.
        seed: Seed of split, order and augmentation.
        eval_batch_size: Images a step in validation, test and prediction.
        train_sizes: Sides in pixels of each epoch's training images, such as [24, 24, 28, 32]; the last one stays,
            and is image_size. Small images early cost less time; by default all have image_size.
        crop_padding_px: Pixels a training image may move each way; 0 is off.
        crop_mode: What fills a moved image's border: reflect or zeros.
        flip: Mirror training images: random, alternating (each image every second epoch) or none.
        cutout_px: Side of a square set to the mean colour; 0 is off.
        brightness: Brightness is scaled by up to this much either way; 0 is off.
        contrast: Contrast is scaled by up to this much either way; 0 is off.
        policy: Change each training image by operations drawn anew, from turning it to its colours: trivial
            (TrivialAugmentWide), rand (RandAugment) or none.
        erasing: Share of the training images that lose a rectangle to the mean colour; 0 is off.
        drop_last: Leave out a last, smaller training batch.
        device: Where batches are finished; by default the Trainer's device, or the CPU without one.

    Raises:
        UserError: A value that does not fit, or data that is missing, damaged or too small.
    """

    def __init__(
        self,
        dataset: str = "cifar10",
        root: str = "data",
        batch_size: int = 128,
        *,
        image_size: int | None = None,
        val_fraction: float = 0.1,
        limit: int | None = None,
        class_weights: Balance = "none",
        sampler: Balance = "none",
        num_workers: int | None = None,
        seed: int = 0,
        eval_batch_size: int = 256,
        train_sizes: list[int] | None = None,
        crop_padding_px: int = 4,
        crop_mode: CropMode = "reflect",
        flip: FlipMode = "random",
        cutout_px: int = 0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        policy: Policy = "none",
        erasing: float = 0.0,
        drop_last: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_limits(
            "data",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
            image_size=image_size,
            brightness=brightness,
            contrast=contrast,
            erasing=erasing,
        )
        self.source = open_source(dataset, root, image_size)
        self.class_names: tuple[str, ...] = self.source.class_names
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise UserError(f"--data.root {root}: one class only ({self.class_names[0]}); there is nothing to learn.")
        try:
            self.device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise UserError(f"--data.device {device}: not a device; cpu, cuda or cuda:1, for example.") from error
        self.image_size: int = self.source.image_size
        self.augmentation = Augmentation(
            crop_padding_px, crop_mode, flip, cutout_px, brightness, contrast, policy=policy, erasing=erasing
        )
        self.train_sizes = tuple(train_sizes or [self.image_size])
        if self.train_sizes[-1] != self.image_size:
            raise UserError(
                f"--data.train_sizes {list(self.train_sizes)}: the last size stays to the end of training and must be "
                f"that of the test, --data.image_size {self.image_size}."
            )
        for size in self.train_sizes:
            if not LIMITS["data.image_size"].holds(size):
                advice = LIMITS["data.image_size"].advice
                raise UserError(f"--data.train_sizes {list(self.train_sizes)}: each {advice}.")
            self.augmentation.check(size)
        for flag, value in (("class_weights", class_weights), ("sampler", sampler)):
            check_choice(f"data.{flag}", value, get_args(Balance))
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.val_fraction, self.seed, self.num_workers = val_fraction, seed, num_workers
        self.limit, self.has_class_weights, self.is_balanced = limit, class_weights == "balanced", sampler == "balanced"
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None
        self._images: dict[Split, ImageSet] = {}
        self._indices: dict[Split, Tensor] = {}
        self._resident: dict[tuple[Split, torch.device], tuple[Tensor, Tensor]] = {}

    # -- what Lightning calls, and people without it ------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download or decode what is missing, once a machine."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the images, split them, measure them. Calling it again changes nothing.

        Args:
            stage: Lightning's; every stage needs the same, since the split and the statistics come from training.
        """
        if self._indices:
            return
        parts: tuple[Split, ...] = ("train", "val", "test")
        loaded = {name: self.source.load(name) for name in parts}
        self._images = {name: images for name, images in loaded.items() if images is not None}
        indices = {name: torch.arange(len(images.targets)) for name, images in self._images.items()}
        targets = torch.tensor(self._images["train"].targets)
        naming: dict[str, Any] = {"seed": self.seed, "class_names": self.class_names}
        if "val" in indices:
            indices["train"] = stratified_subset(targets, self.limit, **naming)
        else:
            indices["train"], indices["val"] = stratified_split(targets, self.val_fraction, limit=self.limit, **naming)
        if self.batch_size > len(indices["train"]):
            raise UserError(
                f"--data.batch_size {self.batch_size}: larger than the training split of "
                f"{len(indices['train'])} images; give --batch_size of that many or fewer."
            )
        if self.mean is None or self.std is None:
            self.mean, self.std = self.source.mean, self.source.std
        if self.mean is None or self.std is None:
            self.mean, self.std = channel_statistics(self._images["train"].images, indices["train"].numpy())
        self._indices = indices

    def train_dataloader(self) -> ImageLoader:
        """Return the loader of augmented training batches in a new order each epoch."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> ImageLoader | list[Any]:
        """Return the loader of validation batches; an empty list (Lightning's "none") where nothing is held out."""
        self.setup()
        return self._loader("val") if len(self._indices["val"]) else []

    def test_dataloader(self) -> ImageLoader:
        """Return the loader of test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """Return the loader of test batches: the split that `predict` answers for."""
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to treat new images as the run did."""
        return {
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "mean": list(self.mean or ()),
            "std": list(self.std or ()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the run's mean and std; check its classes, whose order gives the logits their meaning."""
        if tuple(state_dict["class_names"]) != self.class_names:
            raise UserError(
                f"the checkpoint knows the classes {', '.join(state_dict['class_names'][:5])}..., "
                f"the data has {', '.join(self.class_names[:5])}...; give --data.dataset and --data.root of its run."
            )
        self.mean, self.std = tuple(state_dict["mean"]), tuple(state_dict["std"])

    # -- what others ask ------------------------------------------------------------------------------------------

    def num_images(self, part: Split) -> int:
        """Return how many images a split has, after `setup()`."""
        return len(self._indices[part])

    def num_train_batches(self, num_ranks: int = 1) -> int:
        """Return the training steps of an epoch, after `setup()`; they do not depend on a loader's position."""
        return len(self._sampler("train", training=True, rank=Rank(0, num_ranks)))

    @property
    def class_weights(self) -> list[float] | None:
        """Each class's weight in the loss, after `setup()`; None where they count as they come."""
        return balanced_weights(self._class_counts()) if self.has_class_weights else None

    def use_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalize images with this mean and std of each channel instead of the training images' own."""
        self.mean, self.std = mean, std

    def describe_classes(self) -> list[str]:
        """Return the classes in words, after `setup()`: how many and the first names; where it is so, how uneven."""
        names = ", ".join(self.class_names[:_NAMED]) + (", ..." if self.num_classes > _NAMED else "")
        imbalance = describe_imbalance(self._class_counts(), self.class_names)
        if imbalance and not (self.has_class_weights or self.is_balanced):
            imbalance += "; --data.class_weights balanced or --data.sampler balanced lets them count alike"
        return [f"{self.num_classes}: {names}", *([imbalance] if imbalance else [])]

    def _class_counts(self) -> Tensor:
        return torch.bincount(self._train_targets(), minlength=self.num_classes)

    def _train_targets(self) -> Tensor:
        return torch.tensor(self._images["train"].targets)[self._indices["train"]]

    def split_summary(self) -> dict[str, Any]:
        """Return the split as plain types: indices into the source's order, and hashes of the source's images.

        "sha256" hashes the uint8 images and int64 targets as the source has them; with the indices it pins a split.
        """
        has_own_val = "val" in self._images
        return {
            "dataset": self.source.describe(),
            "seed": self.seed,
            "val_fraction": None if has_own_val else self.val_fraction,
            "val_from": "val" if has_own_val else "train",
            **({} if self.limit is None else {"limit": self.limit}),
            "sizes": {part: self.num_images(part) for part in ("train", "val", "test")},
            "sha256": {name: images.sha256 for name, images in self._images.items()},
            "train": self._indices["train"].tolist(),
            "val": self._indices["val"].tolist(),
        }

    def images(self, part: Split, positions: np.ndarray) -> np.ndarray:
        """Return raw uint8 images (n, height, width, channels) at some positions of a split."""
        return np.asarray(self._images[self._source_of(part)].images[self._indices[part].numpy()[positions]])

    def sample_of_training(self, num_images: int) -> Float[Tensor, "images channels height width"]:
        """Return that many training images (fewer where there are fewer), evenly spaced, normalised, on the CPU."""
        total = self.num_images("train")
        positions = np.linspace(0, total - 1, min(num_images, total)).astype(np.int64)
        images = torch.from_numpy(self.images("train", positions))
        assert self.mean is not None
        assert self.std is not None
        return normalize(images, mean=torch.tensor(self.mean), std=torch.tensor(self.std))

    def rank_positions(self, part: Split, rank: Rank) -> np.ndarray:
        """Return the positions in a split that this rank evaluates, in the order in which its loader gives them."""
        return self._evaluation_order(part)[rank.index :: rank.count].numpy()

    # -- making loaders ---------------------------------------------------------------------------------------------

    def _source_of(self, part: Split) -> Split:
        return part if part in self._images else "train"

    def _evaluation_order(self, part: Split) -> Tensor:
        """Return the positions of a split as they are evaluated: shuffled where the Trainer stops before the end.

        Folders and validation come class after class, and the first batches alone would be of one or two classes.
        """
        stages = ("test", "predict") if part == "test" else (part,)
        limits = [getattr(self.trainer, f"limit_{stage}_batches", 1.0) for stage in stages]
        if all(isinstance(limit, float) and limit == 1 for limit in limits):  # the whole number 1 is one batch
            return torch.arange(self.num_images(part))
        return torch.randperm(self.num_images(part), generator=seeded_generator(self.seed, 0, _EVALUATION))

    def _sampler(self, part: Split, *, training: bool, rank: Rank) -> EpochSampler:
        indices = self._indices[part]
        return EpochSampler(
            indices if training else indices[self._evaluation_order(part)],
            self.batch_size if training else self.eval_batch_size,
            seed=self.seed,
            training=training,
            drop_last=training and self.drop_last,
            rank=rank,
            balanced_by=self._train_targets() if training and self.is_balanced else None,
        )

    def _loader(self, part: Split, *, training: bool = False) -> ImageLoader:
        self.setup()
        rank = Rank(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Rank()
        device = self._device()
        sampler = self._sampler(part, training=training, rank=rank)
        finishing = {
            "augmentation": self.augmentation if training else None,
            "sizes": self.train_sizes if training else (self.image_size,),
            "mean": self.mean,
            "std": self.std,
        }
        num_workers = self._num_workers(device)
        if num_workers == 0:
            images, targets = self._on_device(self._source_of(part), device)
            return ResidentLoader(images, targets, sampler, **finishing)
        raw_images = self._images[self._source_of(part)]
        return StreamingLoader(
            raw_images.images, raw_images.targets, sampler, num_workers=num_workers, device=device, **finishing
        )

    def _device(self) -> torch.device:
        if self.device is not None:
            return self.device
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _num_workers(self, device: torch.device) -> int:
        if self.num_workers is not None:
            return self.num_workers
        needed = sum(images.images.nbytes for images in self._images.values())
        # Half of what is free: network, activations and the rest of the machine need the other half.
        return 0 if needed < _free_bytes(device) / 2 else min(2, os.cpu_count() or 1)

    def _on_device(self, name: Split, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a source's images on a device, one copy for all its loaders."""
        if (name, device) not in self._resident:
            raw_images = self._images[name]
            if not raw_images.images.flags.writeable:
                # A file's mapping is read into memory: page faults in the middle of training would be slow.
                raw_images = replace(raw_images, images=raw_images.images.copy(), targets=raw_images.targets.copy())
            if device.type == "cpu":
                self._images[name] = raw_images  # drops the mapping, whose pages would count twice
            images, targets = torch.from_numpy(raw_images.images), torch.from_numpy(raw_images.targets)
            self._resident[name, device] = (images.to(device), targets.to(device))
        return self._resident[name, device]


def channel_statistics(images: np.ndarray, indices: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel over some images, scaled to 0-1.

    Args:
        images: uint8 (n, height, width, channels), 0-255; may be memory-mapped.
        indices: int64, the images that count.
    """
    total = np.zeros(images.shape[-1])
    squares = np.zeros(images.shape[-1])
    chunk = max(1, min(_CHUNK, _CHUNK * 32 * 32 // (images.shape[1] * images.shape[2])))
    for start in range(0, len(indices), chunk):
        pixels = images[indices[start : start + chunk]].reshape(-1, images.shape[-1]) / 255.0
        total += pixels.sum(0)
        squares += (pixels**2).sum(0)
        give_back_pages(images)
    count = len(indices) * images.shape[1] * images.shape[2]
    mean = total / count
    # A channel without contrast would divide by 0.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return tuple(mean.tolist()), tuple(std.tolist())


def _free_bytes(device: torch.device) -> float:
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()
