"""ImageDataModule: a data set, its splits, their statistics and their loaders, with or without a Trainer."""

import inspect
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.trainer.states import TrainerStatus
from pydantic import Field
from torch import Tensor, nn

from cifar_lightning.data.datasets import class_names_of, load_splits, open_source
from cifar_lightning.data.duplicates import find_duplicates
from cifar_lightning.data.image_decoding import Resize
from cifar_lightning.data.image_folder import ClassFolders, Skipped
from cifar_lightning.data.image_set import SPLITS, Cache, ImageSet, Split, is_constant
from cifar_lightning.data.loaders import BatchTransform, ImageLoader, LoaderFactory
from cifar_lightning.data.object_source import in_nfc
from cifar_lightning.data.sampler import EpochSampler, Rank, ShardOrder, evaluation_order
from cifar_lightning.data.shards import WINDOW, ShardedImages, Shards
from cifar_lightning.data.splits import SplitIndices, SplitSettings, make_splits
from cifar_lightning.data.statistics import (
    balanced_weights,
    channel_statistics,
    describe_imbalance,
    evenly_spaced,
    statistics_of_moments,
)
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import counted, index_name, plural, printable, reason_of
from cifar_lightning.settings.limits import Count, ImageSize, Pixels, Strength, check_settings
from cifar_lightning.transforms import photographs  # noqa: F401 - the command line finds them by name
from cifar_lightning.transforms.augmentation import Augmentation, CropMode, FlipMode, normalize
from cifar_lightning.transforms.pipeline import CHECKED_IMAGES, DEFAULT, Pipeline
from cifar_lightning.transforms.policies import Policy
from cifar_lightning.transforms.transform import Transform

Balance = Literal["none", "balanced"]
# Bytes of decoded images, which take minutes to read, above which mean and std are those of a sample. A sample changes
# the results of a seed, so smaller sets are measured whole.
_MEASURED_BYTES, _MAX_MEASURED = 8 << 30, 10_000
_MAX_NAMES = 12  # class names that are printed


class ImageDataModule(pl.LightningDataModule):
    """A data set by name: stratified splits, statistics of the training split, and loaders of finished batches.

    `class_names`, `num_classes` and `image_size` are known at once, `mean` and `std` (per channel, of images scaled
    to 0-1) after `setup()`. Without a Trainer: `prepare_data()`, `setup()`, then iterate `train_dataloader()`.

    Args:
        dataset: Name of the data set: cifar10, cifar100, folder (class folders below root), shards (written by the
            command shard) or synthetic (generated); or package.module:name of your own. From Python also the object: a
            Dataset, a Hugging Face data set, (images, labels) arrays, or (train, test) or (train, val, test) of them.
        root: Folder of the images, or to download them to; of shards also s3://bucket/folder.
        batch_size: Training images per step and process; the default is reduced to the size of a smaller training
            split.
        image_size: Height and width of the images in pixels; by default the data set's own; for a folder a size that
            suits its images.
        val_fraction: Fraction of the training images held out for validation, stratified by class; 0 trains on all.
            Not used for a folder with a val/ of its own. Of classes too small for the default, one image is held out.
        test_fraction: Fraction of the images that is the test split of data without one of its own, stratified by
            class; by default 0.2.
        limit: Number of training images to use, including those held out for validation, stratified by class; by
            default all.
        class_weights: balanced weights the classes in the loss of ImageClassifier so that each counts the same; another
            LightningModule reads the weights from the member `class_weights`.
        sampler: balanced shows every class equally often in training; images of small classes are repeated.
        num_workers: 0 keeps the images on the training device, 1 or more streams them with this many worker
            processes; by default 0 if the set fits in half of the free memory, else 2.
        seed: Seed of the split and, without order_seed, of order and augmentation.
        order_seed: Seed of order and augmentation; by default `seed`. It leaves the split as it is.
        eval_batch_size: Images per step in validation, test and prediction.
        train_sizes: Image size of each training epoch in pixels, such as [24, 24, 28, 32]; the last one stays and must
            be image_size. Small images save time in early epochs. By default all epochs use image_size.
        crop_padding_px: Largest shift of a training image in each direction, in pixels; 0 disables it.
        crop_mode: Padding of shifted images: reflect or zeros.
        flip: Horizontal flip: random, alternating (each image in every second epoch) or none.
        cutout_px: Side of a square set to the mean colour, in pixels; 0 disables it.
        brightness: Largest relative change of brightness; 0 disables it.
        contrast: Largest relative change of contrast; 0 disables it.
        policy: Augmentation policy of random geometric and colour operations: trivial (TrivialAugmentWide), rand
            (RandAugment) or none.
        erasing: Fraction of the training images with a random rectangle set to the mean colour; 0 disables it.
        transforms: Transforms of training images: default (the flags above, from crop_padding_px on), and your own
            or torchvision's by class. --data.transforms+=CLASS adds one; a list without default replaces them.
        drop_last: Drop a last, smaller training batch.
        labels: CSV or JSON lines of path, label and optionally split of the images of a folder, instead of class
            folders.
        resize: How an image of yours becomes a square: crop (the shorter side is resized, the centre is kept), pad
            (the longer side is resized, the border is black) or squash (both sides are resized).
        in_channels: 3 for RGB images, 1 for gray ones; colours become their luma.
        skip_unreadable: Leave out images of a folder that cannot be read; otherwise they are an error. The run lists
            them in skipped_files.jsonl.
        device: Device that batches are made on; by default the Trainer's, without a Trainer the CPU.
        class_names: Names of the classes of a data set of your own, in the order of its labels; by default those that
            it knows, else the numbers.
        cache: How decoded images are kept: disk (in one file; the default of a folder), memory (decoded at each start)
            or none (decoded by workers whenever they are shown; shards alone, and their default).

    Raises:
        UserError: An invalid value, or data that is missing, damaged or too small.
    """

    def __init__(
        self,
        dataset: str | Any = "cifar10",
        root: str = "data",
        batch_size: Count = 128,
        *,
        image_size: ImageSize | None = None,
        val_fraction: Annotated[
            float, Field(ge=0, lt=1, allow_inf_nan=False, description="0 (train on all) to below 1, such as 0.1")
        ] = 0.1,
        test_fraction: Annotated[
            float, Field(gt=0, lt=1, allow_inf_nan=False, description="above 0 to below 1, such as 0.2")
        ]
        | None = None,
        limit: Count | None = None,
        class_weights: Balance = "none",
        sampler: Balance = "none",
        num_workers: Annotated[int, Field(ge=0, le=1024, description="0 (resident), or 1 to 1024 (streaming)")]
        | None = None,
        seed: Annotated[int, Field(ge=0)] = 0,
        eval_batch_size: Count = 256,
        train_sizes: list[ImageSize] | None = None,
        crop_padding_px: Pixels = 4,
        crop_mode: CropMode = "reflect",
        flip: FlipMode = "random",
        cutout_px: Pixels = 0,
        brightness: Strength = 0.0,
        contrast: Strength = 0.0,
        policy: Policy = "none",
        erasing: Annotated[
            float, Field(ge=0, le=1, allow_inf_nan=False, description="0 (off) to 1 (every image)")
        ] = 0.0,
        transforms: list[Literal["default"] | Transform | nn.Module] = DEFAULT,
        drop_last: bool = False,
        labels: str | None = None,
        resize: Resize = "crop",
        in_channels: Literal[1, 3] = 3,
        skip_unreadable: bool = False,
        device: str | None = None,
        class_names: list[str] | None = None,
        order_seed: Annotated[int, Field(ge=0)] | None = None,
        cache: Cache | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_settings("data", ImageDataModule.__init__, {**arguments, "transforms": None})  # Pipeline checks them
        super().__init__()
        self.arguments = arguments  # for config.yaml
        of_folder: dict[str, Any] = {"labels": labels, "skip_unreadable": skip_unreadable}
        if isinstance(dataset, str) and dataset in ("folder", "shards"):  # decode to gray; others are converted
            of_folder["in_channels"] = in_channels
        self.source = open_source(dataset, root, image_size, class_names, resize, cache, **of_folder)
        if isinstance(self.source, Shards) and self.source.cache == "none":
            self._check_shards(num_workers, sampler)
            num_workers = num_workers or 2  # also on one core: the order depends on it
        self.resize, self.in_channels = resize, in_channels
        self.class_names = class_names_of(self.source)
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            name = printable(self.class_names[0])
            raise UserError(f"{self.source.describe()}: only one class ({name}); at least 2 are needed.")
        try:
            self.device = None if device is None else torch.device(device)
            if self.device is not None:
                torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:  # no such device, none in this machine or in this torch
            raise UserError(f"--data.device {device}: cannot be used ({reason_of(error)}); give cpu.") from error
        self.image_size: int = self.source.image_size
        self.augmentation = Augmentation(
            crop_padding_px, crop_mode, flip, cutout_px, brightness, contrast, policy=policy, erasing=erasing
        )
        self.pipeline = Pipeline(self.augmentation, DEFAULT if transforms is None else transforms)
        self.train_sizes = tuple(train_sizes or [self.image_size])
        self._check_train_sizes()
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.split_settings = SplitSettings(val_fraction, limit, seed, test_fraction)
        self.num_workers, self.order_seed = num_workers, seed if order_seed is None else order_seed
        self.has_class_weights, self.has_balanced_sampler = class_weights == "balanced", sampler == "balanced"
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None
        self.duplicates: list[dict[str, Any]] = []  # as `find_duplicates` returns them, after `setup`
        self._images: dict[Split, ImageSet] = {}  # filled by `setup`
        self._splits: SplitIndices
        self._loaders: LoaderFactory

    def _check_shards(self, num_workers: int | None, sampler: Balance) -> None:
        if num_workers == 0:
            raise UserError("--data.num_workers 0: shards are read by 1 worker or more, or --data.cache memory.")
        if sampler == "balanced":
            raise UserError(
                "--data.sampler balanced: would read all shards at once; give --data.class_weights balanced, or "
                "--data.cache memory or disk."
            )

    def _check_train_sizes(self) -> None:
        sizes = list(self.train_sizes)
        if sizes[-1] != self.image_size:
            raise UserError(
                f"--data.train_sizes {sizes}: the last size is used until the end of training and must be the size "
                f"of the test images, --data.image_size {self.image_size}."
            )
        for size in sizes:
            self.augmentation.check(size)

    # -- source, splits, statistics ------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download or decode what is missing, once per machine."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the images, split them and measure the training split; calling it again does nothing.

        Args:
            stage: Not used: every stage needs the split and the statistics of the training images.
        """
        if self._images:
            return
        images = load_splits(self.source, self.in_channels)
        targets = {split: image_set.targets for split, image_set in images.items()}
        self._splits = make_splits(targets, self.split_settings, self.class_names)
        train = self._splits.train
        self._fit_batch_size(len(train))
        self._remark_on_splits(sum(map(len, targets.values())))
        if (self.mean is None or self.std is None) and self.in_channels == 3:
            of_source = (getattr(self.source, name, None) for name in ("mean", "std"))
            self.mean, self.std = (None if each is None else tuple(map(float, each)) for each in of_source)
        if self.mean is None or self.std is None:
            self.mean, self.std = self._measure(images["train"].images, train.numpy())
        some = torch.from_numpy(images["train"].images[train[:CHECKED_IMAGES].numpy()])
        self.pipeline.check(some, self.train_sizes)
        self.duplicates = self._find_duplicates(images)
        self._remark_on_constant_images(images)
        self._images = images
        self._loaders = LoaderFactory(images, self.num_workers)

    def _measure(self, images: Any, train: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std of the training images: of a large set by the moments of its shards, or of a sample."""
        is_large = images.nbytes > _MEASURED_BYTES
        if isinstance(self.source, Shards) and (is_large or self.source.cache == "none"):
            moments = self.source.moments["train"][train]
            if moments.shape[-1] == self.in_channels:  # else the images became gray
                return statistics_of_moments(moments)
        if is_large:
            train = train[evenly_spaced(len(train), _MAX_MEASURED)]
        return channel_statistics(images, train)

    def _fit_batch_size(self, num_images: int) -> None:
        """Refuse a batch larger than the training split, or reduce the default, also where one image would remain."""
        size = self.batch_size
        is_default = size == inspect.signature(ImageDataModule).parameters["batch_size"].default
        if size > num_images and not is_default:
            raise UserError(
                f"--data.batch_size {size}: larger than the training split of "
                f"{plural(num_images, 'image')}; give --batch_size of that many or fewer."
            )
        if size > num_images:
            self.batch_size = num_images
        elif is_default and num_images % size == 1 and not self.drop_last:  # BatchNorm cannot train on one image
            self.batch_size = size - 1
        if size != self.batch_size:
            remark(f"Batches of {plural(self.batch_size, 'image')}: the training split has {num_images:,}.")

    def _remark_on_splits(self, num_images: int) -> None:
        if self._splits.test_source == "train":
            split_off = f"{self.num_images('test'):,} as the test split"
            if self._splits.val_source == "train":
                split_off += f", {self.num_images('val'):,} for validation"
            remark(
                f"No test split is given: of {num_images:,} images, {split_off}, stratified by class, seed "
                f"{self.split_settings.seed} (--data.test_fraction, --data.val_fraction)."
            )

    def _find_duplicates(self, images: dict[Split, ImageSet]) -> list[dict[str, Any]]:
        hashes = self.source.pixel_hashes if isinstance(self.source, ClassFolders | Shards) else {}
        name_of = getattr(self.source, "image_name", index_name)
        found = find_duplicates(images, self._splits, hashes, name_of)
        for kind in found:
            first = " = ".join(kind["first"][0])
            remark(printable(f"{'remark' if kind['kind'] == 'within splits' else 'warning'}: {kind['text']}: {first}"))
        return found

    def _remark_on_constant_images(self, images: dict[Split, ImageSet]) -> None:
        if isinstance(self.source, ClassFolders | Shards):  # remarked on when they are decoded
            return
        for split, image_set in images.items():
            if len(constant := np.flatnonzero(is_constant(image_set.images))):
                num, first = counted(len(constant), "image has", "images have"), index_name(split, int(constant[0]))
                remark(f"remark: {num} one colour, such as {first}")

    @property
    def skipped_files(self) -> list[Skipped]:
        """Path and reason of each file of the data set's folder that is left out, after `prepare_data()`."""
        return self.source.skipped_files if isinstance(self.source, ClassFolders) else []

    def use_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalize images with this mean and std of each channel instead of the training images' own."""
        self.mean, self.std = mean, std

    # -- loaders -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ImageLoader:
        """Return the loader of augmented training batches, in a new order each epoch (`overfit_batches`: the same)."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> ImageLoader | list[Any]:
        """Return the loader of validation batches; an empty list (Lightning's "none") if nothing is held out."""
        self.setup()
        return self._loader("val") if self.num_images("val") else []

    def test_dataloader(self) -> ImageLoader:
        """Return the loader of test batches."""
        return self._loader("test")

    predict_dataloader = test_dataloader  # `predict` predicts the test split

    def _loader(self, split: Split, *, training: bool = False) -> ImageLoader:
        self.setup()
        rank = Rank(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Rank.of_process()
        assert self.mean is not None
        assert self.std is not None
        transform = BatchTransform(self.mean, self.std, (self.image_size,))
        if training:
            transform = BatchTransform(self.mean, self.std, self.train_sizes, self.pipeline)
        sampler = self._sampler(split, training=training, rank=rank)
        device = self.device or (self.trainer.strategy.root_device if self.trainer else torch.device("cpu"))
        return self._loaders.make(self._splits.source_of(split), sampler, transform, device)

    def _sampler(self, split: Split, *, training: bool, rank: Rank) -> EpochSampler:
        indices = self._splits.of(split)
        images: Any = self._images[self._splits.source_of(split)].images
        shards = None
        if training and isinstance(images, ShardedImages):
            assert self.num_workers  # set by __init__
            shards = ShardOrder(images.starts, WINDOW, self.num_workers)
        return EpochSampler(
            indices if training else indices[self._evaluation_order(split)],
            self.batch_size if training else self.eval_batch_size,
            seed=self.order_seed,
            training=training,
            drop_last=training and self.drop_last,
            rank=rank,
            balanced_by=self._train_targets() if training and self.has_balanced_sampler else None,
            # Lightning replaces the sampler of a DataLoader for it, which these loaders are not.
            repeats=training and getattr(self._running, "overfit_batches", 0) > 0,
            shards=shards,
        )

    @property
    def _running(self) -> pl.Trainer | None:
        """The Trainer while it runs: Lightning leaves it here afterwards, and its limits with it."""
        is_running = self.trainer and self.trainer.state.status == TrainerStatus.RUNNING
        return self.trainer if is_running else None

    def _evaluation_order(self, split: Split) -> Tensor:
        """Return the positions of a split in the order of evaluation: shuffled if the Trainer stops before the end."""
        stages = ("test", "predict") if split == "test" else (split,)
        limits = [getattr(self._running, f"limit_{stage}_batches", 1.0) for stage in stages]
        is_whole = all(isinstance(limit, float) and limit == 1 for limit in limits)  # the integer 1 is one batch
        return evaluation_order(self.num_images(split), seed=self.split_settings.seed, shuffled=not is_whole)

    # -- what training, reports and checkpoints read, after setup() ----------------------------------------------

    def num_images(self, split: Split) -> int:
        """Return the number of images of a split."""
        return len(self._splits.of(split))

    def is_held_out(self, split: Split) -> bool:
        """Whether a split is held out of the training images, by `val_fraction` or `test_fraction`."""
        return self._splits.source_of(split) == "train"

    def num_train_batches(self, num_ranks: int = 1) -> int:
        """Return the number of training steps of an epoch; it does not depend on a loader's position."""
        return len(self._sampler("train", training=True, rank=Rank(0, num_ranks)))

    def num_eval_batches(self, split: Split, num_ranks: int = 1) -> int:
        """Return the number of steps of an evaluation of a split."""
        return len(self._sampler(split, training=False, rank=Rank(0, num_ranks)))

    def rank_positions(self, split: Split, rank: Rank) -> np.ndarray:
        """Return the positions in a split that a rank evaluates, in the order of its loader."""
        return self._evaluation_order(split)[rank.index :: rank.count].numpy()

    def images(self, split: Split, positions: np.ndarray) -> np.ndarray:
        """Return raw uint8 images (n, height, width, channels) at positions of a split."""
        images = self._images[self._splits.source_of(split)].images
        return np.asarray(images[self._splits.of(split).numpy()[positions]])

    def image_names(self, split: Split, positions: np.ndarray | None = None) -> np.ndarray:
        """Return the name of each image of a split, str (n,): its path below the root, as `test/cat/12.png`.

        With `positions` in the split, only their names.

        Images of data without files are named by the data set's own split and index, as `train[17]`. A source of your
        own may have `image_name(split, index)`.
        """
        source_split = self._splits.source_of(split)
        name = getattr(self.source, "image_name", index_name)
        indices = self._splits.of(split).numpy()
        indices = indices if positions is None else indices[positions]
        return np.array([name(source_split, index) for index in indices.tolist()], np.str_)

    def targets(self, split: Split, positions: np.ndarray) -> np.ndarray:
        """Return the classes, int64, of the images at positions of a split."""
        targets = self._images[self._splits.source_of(split)].targets
        return np.asarray(targets[self._splits.of(split).numpy()[positions]])

    def sample_of_training(self, num_images: int) -> Float[Tensor, "images channels height width"]:
        """Return `num_images` training images (all, if there are fewer), evenly spaced, normalized, on the CPU."""
        images = self.images("train", evenly_spaced(self.num_images("train"), num_images))
        return normalize(torch.from_numpy(images), mean=torch.tensor(self.mean), std=torch.tensor(self.std))

    @property
    def class_weights(self) -> list[float] | None:
        """Weight of each class in the loss; None without `--data.class_weights balanced`."""
        return balanced_weights(self._class_counts()) if self.has_class_weights else None

    def describe_classes(self) -> list[str]:
        """Return a line with the number and first names of the classes and, if they are uneven, one that says so."""
        names = ", ".join(self.class_names[:_MAX_NAMES]) + (", ..." if self.num_classes > _MAX_NAMES else "")
        imbalance = describe_imbalance(self._class_counts(), self.class_names)
        if imbalance and not (self.has_class_weights or self.has_balanced_sampler):
            imbalance += "; --data.class_weights balanced or --data.sampler balanced compensates"
        return [f"{self.num_classes}: {names}", *([imbalance] if imbalance else [])]

    def _class_counts(self) -> Tensor:
        return torch.bincount(self._train_targets(), minlength=self.num_classes)

    def _train_targets(self) -> Tensor:
        return torch.tensor(self._images["train"].targets)[self._splits.train]

    def split_summary(self) -> dict[str, Any]:
        """Return the split as plain types: indices into the source's images, and hashes of these images.

        "sha256" is that of each image set of the source.
        """
        settings, has_own_val = self.split_settings, self._splits.val_source == "val"
        return {
            "dataset": self.source.describe(),
            "seed": settings.seed,
            "val_fraction": None if has_own_val else settings.val_fraction,
            "val_from": self._splits.val_source,
            **({} if settings.limit is None else {"limit": settings.limit}),
            "sizes": {split: self.num_images(split) for split in SPLITS},
            "sha256": {split: images.sha256 for split, images in self._images.items()},
            **({"duplicates": self.duplicates} if self.duplicates else {}),
            "train": self._splits.train.tolist(),
            "val": self._splits.val.tolist(),
            **({"test": self._splits.test.tolist()} if self._splits.test_source == "train" else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to preprocess new images as the run did."""
        return {
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "mean": list(self.mean or ()),
            "std": list(self.std or ()),
            "resize": self.resize,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use the mean and std of a checkpoint; refuse one of other data.

        Raises:
            UserError: The class names, their order, the channels, how images are resized or the size that the data
                chose differ. Another size may be given.
        """
        if [*map(in_nfc, state_dict["class_names"])] != [*map(in_nfc, self.class_names)]:
            raise UserError(
                f"the checkpoint has the classes {printable(', '.join(state_dict['class_names'][:5]))}..., "
                f"the data has {printable(', '.join(self.class_names[:5]))}...; "
                "give --data.dataset and --data.root of its run."
            )
        if (channels := len(state_dict["mean"])) != self.in_channels:
            raise UserError(f"--data.in_channels {self.in_channels}: the checkpoint is of images with {channels}.")
        if (theirs := state_dict.get("resize", "crop")) != self.resize:
            raise UserError(f"--data.resize {self.resize}: the checkpoint is of images with {theirs}.")
        if self.arguments["image_size"] is None and (size := state_dict["image_size"]) != self.image_size:
            raise UserError(
                f"{self.source.describe()}: the checkpoint is of images of {size} pixels; give --data.image_size "
                f"{size}, or {self.image_size} to evaluate at that size."
            )
        self.use_normalization(tuple(state_dict["mean"]), tuple(state_dict["std"]))
