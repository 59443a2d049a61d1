"""Shards: the images of a set beyond one disk in large files, on a disk or in a bucket, read as they are needed.

The command `shard` writes them (shard_writer.py) with litdata, so that litdata reads them, too:

    shards.json          `ShardsIndex`: class names, image size and hashes; written last, so that it marks a whole set
    train/index.json     litdata's index of the split's shards
    train/images.npz     of each image: class, name, checksum of its bytes, hash and moments of its pixels
    train/chunk-0-K.bin  shard K: images as {"image": bytes, "label": class}

The bytes of an image are a JPEG file where its shorter side is larger than `image_size`, else the decoded uint8 square.
A worker reads single images at the offsets that a shard begins with: litdata's own reader holds one shard at a time,
and a mapped file that is cut would kill the process. Shards of a bucket are downloaded with litdata's client into the
user's cache, ahead of their use, and stay there while the disk has room.
"""

import copy
import hashlib
import itertools
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, Field

from cifar_lightning.data.download import in_daemon_thread
from cifar_lightning.data.image_decoding import RULES, Resize, decode_image
from cifar_lightning.data.image_folder import CACHE_VARIABLE, STALE_S, allocated, in_user_cache, user_cache
from cifar_lightning.data.image_set import READ_BEFORE_BYTES, Cache, ImageSet, Split, pixel_hashes
from cifar_lightning.data.memory import check_fits, usable_cpus
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import file_sha256, read_bytes
from cifar_lightning.formatting import printable, reason_of
from cifar_lightning.settings.limits import ImageSize

INDEX = "shards.json"
WINDOW = 4  # shards among which a worker shuffles images, and that it downloads ahead
_MAX_OPEN = 4 * WINDOW  # shards that a process keeps open
_BEFORE, _AFTER = 8, 8  # bytes of an item around its image: the sizes of image and label, and the label
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_MAX_INDEX_BYTES = 1 << 28
_FREE = 0.1  # of the disk, below which files of the cache are removed
_ATTEMPTS, _TIMEOUT_S = 4, 20  # of a request to a bucket; litdata's default of 1,000 attempts hides that it is away
# A download that gets fewer bytes a second for this long has failed. The time-out above is of a single read, and all
# attempts of a request together take less.
_MIN_BYTES_PER_S, _SLOW_S = 10_000, 120
_DECODED_AT_ONCE = 256

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SplitIndex(BaseModel):
    """A split in `shards.json`."""

    num_images: Annotated[int, Field(ge=1)]
    sha256: Sha256  # of names, files and decoded images
    files: dict[Literal["index.json", "images.npz"], Sha256]


class ShardsIndex(BaseModel):
    """What is in `shards.json`."""

    version: Literal[1]
    rules: int  # `image_decoding.RULES` when they were written
    class_names: Annotated[list[str], Field(min_length=1)]
    image_size: ImageSize
    in_channels: Literal[1, 3]
    resize: Resize
    splits: dict[Split, SplitIndex]
    sha256: str = ""  # of all other fields

    def content_sha256(self) -> str:
        """Return the SHA-256 of all other fields: names of classes are in no image, so nothing else shows a change."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


class _Shard(BaseModel):
    """A shard in litdata's `index.json`."""

    filename: Annotated[str, Field(pattern=r"^[\w.-]+\.bin$")]
    chunk_bytes: Annotated[int, Field(ge=1)]
    chunk_size: Annotated[int, Field(ge=1)]  # images


class _LitdataIndex(BaseModel):
    chunks: Annotated[list[_Shard], Field(min_length=1)]


class Shards:
    """The data set "shards": images that the command `shard` has written.

    Args:
        root: Their folder, or its address `s3://bucket/folder`.
        image_size: Must be that of the shards.
        resize: Likewise.
        in_channels: Likewise.
        cache: How decoded images are kept; see `ImageDataModule`.

    Raises:
        UserError: They are missing, incomplete, of other settings or decoding rules; or the bucket cannot be reached.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        *,
        resize: Resize = "crop",
        in_channels: int = 3,
        cache: Cache = "none",
    ) -> None:
        self.root, self.cache = str(root), cache
        self._place = _Bucket(self.root) if "://" in self.root else _Folder(Path(root))
        text = self._place.read_index()
        try:
            self.index = ShardsIndex.model_validate_json(text)
            if "train" not in self.index.splits:
                raise ValueError("it has no training images")
            if self.index.sha256 != self.index.content_sha256():
                raise ValueError("it is not as `shard` wrote it")
        except ValueError as error:
            raise UserError(
                f"--data.root {root}: {INDEX} is damaged ({reason_of(error)}); {self._place.repair}."
            ) from error
        if self.index.rules != RULES:  # the images would not be those whose hashes it has
            raise UserError(
                f"--data.root {root}: written with version {self.index.rules} of the rules for decoding images; this "
                f"program has {RULES}. Write the shards again with the command shard."
            )
        self._place.version = hashlib.sha256(text).hexdigest()
        self.class_names, self.image_size = tuple(self.index.class_names), self.index.image_size
        given = {"image_size": image_size or self.image_size, "resize": resize, "in_channels": in_channels}
        for name, value in given.items():
            if value != (theirs := getattr(self.index, name)):
                raise UserError(
                    f"--data.{name} {value}: these shards have {theirs}; write others with the command shard and "
                    f"--data.{name} {value}, or leave it out."
                )
        self.pixel_hashes: dict[Split, np.ndarray] = {}  # of the images of each split that was loaded
        self.moments: dict[Split, np.ndarray] = {}
        """float32 (n, 2, channels) of each split that was loaded: mean of each image's values, scaled to 0-1, and of
        their squares."""
        self._is_checked = False
        self._names: dict[Split, tuple[np.ndarray, np.ndarray]] = {}  # names that end with 0, and where they end

    def prepare(self) -> None:
        """Check the shards in a folder: that all are there with their sizes, and the bytes of those that are tested.

        Images of training are checked when they are read, and so are those of a bucket and of large sets.

        Raises:
            UserError: A shard is missing, cut or damaged.
            RunError: One cannot be read.
        """
        later = {}
        for split in self.index.splits:
            shards = self._shards(split)
            self._place.check(split, shards)
            if split != "train":
                later[split] = shards
        is_small = sum(shard.chunk_bytes for shards in later.values() for shard in shards) <= READ_BEFORE_BYTES
        if isinstance(self._place, _Folder) and is_small and not self._is_checked:
            for split, shards in later.items():
                ShardedImages(self._place, split, shards, self.index, self._table(split)).check()
            self._is_checked = True

    def load(self, split: Split) -> ImageSet | None:
        """Return a split; its images are read when they are indexed, or now with a cache."""
        if split not in self.index.splits:
            return None
        about = self.index.splits[split]
        shards, table = self._shards(split), self._table(split)
        self.pixel_hashes[split], self.moments[split] = table["pixels"], table["moments"]
        self._names[split] = table["names"], np.flatnonzero(table["names"] == 0)
        images = ShardedImages(self._place, split, shards, self.index, table)
        # It has what loaders and statistics use of an array: shape, dtype, nbytes, length and indices.
        held = cast(np.ndarray, images) if self.cache == "none" else self._decoded(split, images)
        return ImageSet(held, table["targets"], about.sha256)

    def image_name(self, split: Split, index: int) -> str:
        """Return the path of an image below the root that was sharded."""
        names, ends = self._names[split]
        begin = ends[index - 1] + 1 if index else 0
        return names[begin : ends[index]].tobytes().decode("utf-8", "backslashreplace")

    def describe(self) -> str:
        """Return one line for the terminal."""
        counts = " + ".join(f"{about.num_images:,} {split}" for split, about in self.index.splits.items())
        size = f"{self.image_size}x{self.image_size}{' gray' if self.index.in_channels == 1 else ''}"
        return f"shards: {counts} images, {len(self.class_names)} classes, {size}, in {self.root}"

    def _file(self, split: Split, name: Literal["index.json", "images.npz"]) -> Path:
        path = self._place.fetch(split, name)
        if file_sha256(path) != self.index.splits[split].files[name]:
            self._place.forget(path)
            raise UserError(
                f"{self._place.name(split, name)}: is damaged, or of other shards than {INDEX}; {self._place.repair}."
            )
        return path

    def _shards(self, split: Split) -> list[_Shard]:
        path, name = self._file(split, "index.json"), self._place.name(split, "index.json")
        try:
            return _LitdataIndex.model_validate_json(read_bytes(path, _MAX_INDEX_BYTES, follow_links=True)).chunks
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: is no index of litdata ({reason_of(error)}); {self._place.repair}.") from error

    def _table(self, split: Split) -> dict[str, np.ndarray]:
        path, name = self._file(split, "images.npz"), self._place.name(split, "images.npz")
        try:
            with np.load(path, allow_pickle=False) as file:
                table = {name: file[name] for name in ("targets", "names", "is_jpeg", "checksums", "pixels", "moments")}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{name}: is damaged ({reason_of(error)}); {self._place.repair}.") from error
        targets, num = table["targets"], self.index.splits[split].num_images
        if len(targets) != num or not 0 <= targets.min() <= targets.max() < len(self.class_names):
            raise UserError(f"{name}: is of other classes or images than {INDEX}; {self._place.repair}.")
        return table

    def _decoded(self, split: Split, images: "ShardedImages") -> np.ndarray:
        """Decode all images of a split, into memory or once into a file of the user's cache."""
        if self.cache == "memory":
            check_fits(images.shape, "--data.cache memory", "Give --data.cache none, or disk.")
            return _fill(np.empty(images.shape, np.uint8), images)
        folder, name = self._place.cache, f"{split}-{self.index.splits[split].sha256[:16]}"
        if (cached := _cached(folder, name, images.shape)) is None:
            _make_room(folder, images.nbytes)
            with allocated(folder, name, images.shape) as temporary:
                if temporary is None:
                    raise UserError(
                        f"--data.cache disk: {folder} is not writable, or has no room for {images.nbytes:,} bytes; set "
                        f"{CACHE_VARIABLE}, or give --data.cache none."
                    )
                filled = cast(np.memmap, _fill(np.load(temporary, mmap_mode="r+"), images))
                filled.flush()
                path = folder / f"{name}-{_hash_of(filled)}.npy"
                del filled  # Windows renames no mapped file
                os.replace(temporary, path)
            cached = cast(np.ndarray, np.load(path, mmap_mode="r"))
        return cached


class ShardedImages:
    """The images of a split, uint8 (n, height, width, channels), read from shards when they are indexed.

    Args:
        place: Where the shards are.
        split: The split.
        shards: Its shards.
        index: Size and channels of the images.
        table: The columns of `images.npz`.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        place: "_Folder | _Bucket",
        split: Split,
        shards: Sequence[_Shard],
        index: ShardsIndex,
        table: dict[str, np.ndarray],
    ) -> None:
        self._place, self._split, self._shards, self._index = place, split, shards, index
        self._is_jpeg, self._checksums, self._pixels = table["is_jpeg"], table["checksums"], table["pixels"]
        self.starts = np.cumsum([0, *(shard.chunk_size for shard in shards)])
        """int64 (shards + 1,): index of the first image of each shard, and the number of images."""
        self.num_shards, self.has_jpegs = len(shards), bool(self._is_jpeg.any())
        self.shape = (len(table["targets"]), index.image_size, index.image_size, index.in_channels)
        self.nbytes = int(np.prod(self.shape))
        self._open: dict[int, tuple[int, np.ndarray]] = {}  # file descriptor and offsets of each open shard

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        """Return the images of indices or a slice; of an integer, one image."""
        indices = np.arange(len(self))[key] if isinstance(key, slice) else np.atleast_1d(np.asarray(key))
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"image {indices.max()} of {len(self)}")  # ends an iteration, too
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        shards = self._shard_of(indices)
        self.fetch_ahead(indices)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            with self._named(shard):
                self._read(shard, indices[rows], rows, images)
        return images if isinstance(key, slice) or np.ndim(key) else images[0]

    def check(self) -> None:
        """Read the bytes of all images and compare them with their checksums; nothing is decoded."""
        for shard, first in enumerate(self.starts[:-1].tolist()):
            with self._named(shard):
                fd, offsets = self._open.get(shard) or self._opened(shard)
                for at, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
                    image = _pread(fd, end - begin - _BEFORE - _AFTER, begin + _BEFORE)
                    if zlib.crc32(image) != self._checksums[first + at]:
                        self._refuse(shard, np.array([at]))

    @contextmanager
    def _named(self, shard: int) -> Iterator[None]:
        """Name the shard that cannot be read."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._name(shard)}: cannot be read ({reason_of(error)}). fit --resume continues when it can be."
            ) from error

    def fetch_ahead(self, indices: np.ndarray) -> None:
        """Begin to download the shards of images, where they are in a bucket."""
        if isinstance(self._place, _Bucket):
            for shard in np.unique(self._shard_of(indices)).tolist():
                if shard not in self._open:
                    self._place.begin(self._split, self._shards[shard])

    def _shard_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, indices, side="right") - 1

    def _read(self, shard: int, indices: np.ndarray, rows: np.ndarray, into: np.ndarray) -> None:
        """Read images of a shard into rows of an array."""
        fd, offsets = self._open.get(shard) or self._opened(shard)
        places, is_jpeg = indices - self.starts[shard], self._is_jpeg[indices]
        begins, ends = offsets[places] + _BEFORE, offsets[places + 1] - _AFTER
        squares = np.flatnonzero(~is_jpeg)
        if len(squares):
            read = np.empty((len(squares), *self.shape[1:]), np.uint8)
            size, buffer = read[0].nbytes, read.data.cast("B")
            for at, begin in enumerate(begins[squares].tolist()):
                buffer[at * size : (at + 1) * size] = _pread(fd, size, begin)
            wrong = pixel_hashes(read) != self._pixels[indices[squares]]
            self._refuse(shard, places[squares[wrong]])
            into[rows[squares]] = read
        for at in np.flatnonzero(is_jpeg).tolist():
            file = _pread(fd, int(ends[at] - begins[at]), int(begins[at]))
            if zlib.crc32(file) != self._checksums[indices[at]]:
                self._refuse(shard, places[at : at + 1])
            name = f"{self._name(shard)}, image {places[at]},"
            into[rows[at]] = decode_image(
                name,
                self._index.image_size,
                read={name: file}.__getitem__,
                resize=self._index.resize,
                in_channels=self._index.in_channels,
            )

    def _refuse(self, shard: int, places: np.ndarray) -> None:
        if len(places):
            self._place.forget(self._place.path(self._split, self._shards[shard].filename))
            raise UserError(
                f"{self._name(shard)}: is damaged: image {places[0]} is not the one that was written; "
                f"{self._place.repair}."
            )

    def _opened(self, shard: int) -> tuple[int, np.ndarray]:
        about = self._shards[shard]
        fd = self._place.open(self._split, about)
        header = np.frombuffer(_pread(fd, 4 * (about.chunk_size + 2), 0), "<u4").astype(np.int64)
        is_short = (np.diff(header[1:]) < _BEFORE + _AFTER).any()
        if header[0] != about.chunk_size or header[-1] != about.chunk_bytes or is_short:
            os.close(fd)
            self._place.forget(self._place.path(self._split, about.filename))
            raise UserError(f"{self._name(shard)}: is damaged, or another shard; {self._place.repair}.")
        while len(self._open) >= _MAX_OPEN:
            os.close(self._open.pop(next(iter(self._open)))[0])
        self._open[shard] = fd, header[1:]
        return self._open[shard]

    def _name(self, shard: int) -> str:
        return self._place.name(self._split, self._shards[shard].filename)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for fd, _ in getattr(self, "_open", {}).values():
            os.close(fd)


# -- where shards are ---------------------------------------------------------------------------------------------


class _Folder:
    """Shards on a disk."""

    version = ""  # SHA-256 of shards.json
    repair = "copy it again, or write the shards again"

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def cache(self) -> Path:
        return user_cache(os.path.realpath(self.root), self.version)

    def name(self, split: Split, file: str) -> str:
        return printable(str(self.root / split / file))

    def read_index(self) -> bytes:
        path = self.root / INDEX
        if self.root.is_dir() and not path.exists():
            why = "its `shard` was stopped, or is not done" if is_unfinished(self.root) else "no shards"
            raise UserError(f"--data.root {self.root}: has no {INDEX}: {why}; write them with the command shard.")
        try:
            return read_bytes(path, _MAX_INDEX_BYTES, follow_links=True)
        except OSError as error:
            raise UserError(f"--data.root {self.root}: {INDEX} cannot be read ({error.strerror}).") from error

    def path(self, split: Split, file: str) -> Path:
        return self.root / split / file

    def forget(self, path: Path) -> None:
        """Keep a damaged file: it is the user's."""

    def fetch(self, split: Split, file: str) -> Path:
        path = self.path(split, file)
        if not path.is_file():
            raise UserError(f"{self.name(split, file)}: is missing; {self.repair}.")
        return path

    def check(self, split: Split, shards: Sequence[_Shard]) -> None:
        bad = [reason for shard in shards if (reason := self._fault(split, shard))]
        if bad:
            raise UserError(
                f"{bad[0]}; {len(bad):,} of {len(shards):,} {split} shards are missing or cut.\n"
                "Copy them again, or write the shards again."
            )

    def _fault(self, split: Split, shard: _Shard) -> str:
        try:
            size = self.path(split, shard.filename).stat().st_size
        except OSError as error:
            return f"{self.name(split, shard.filename)}: cannot be read ({error.strerror})"
        return "" if size == shard.chunk_bytes else cut(self.name(split, shard.filename), size, shard.chunk_bytes)

    def open(self, split: Split, shard: _Shard) -> int:
        if fault := self._fault(split, shard):
            raise UserError(f"{fault}; {self.repair}.")
        return os.open(self.path(split, shard.filename), _FLAGS)


class _Bucket:
    """Shards in a bucket, downloaded into the user's cache."""

    version = ""
    repair = "start again, which downloads it again, or upload it again"

    def __init__(self, root: str) -> None:
        if not re.match("s3://[^/]", root):
            raise UserError(f"--data.root {root}: a folder, or s3://bucket/folder.")
        self.root = root.rstrip("/")
        self._process = 0  # that the clients and the threads belong to: neither outlives a fork

    @property
    def cache(self) -> Path:
        return user_cache(self.root, self.version)

    def name(self, split: Split, file: str) -> str:
        return printable(f"{self.root}/{split}/{file}")

    def read_index(self) -> bytes:
        folder = user_cache(self.root, "index")
        path = folder / f"{os.getpid()}-{time.time_ns()}.json"
        self._download(f"{self.root}/{INDEX}", path, UserError)
        try:
            return read_bytes(path, _MAX_INDEX_BYTES)
        finally:
            path.unlink(missing_ok=True)

    def path(self, split: Split, file: str) -> Path:
        return self.cache / split / file

    def forget(self, path: Path) -> None:
        """Remove a damaged file, so that it is downloaded again."""
        with suppress(OSError):  # it may be another user's
            path.unlink()

    def fetch(self, split: Split, file: str) -> Path:
        path = self.path(split, file)
        if not path.exists():
            self._download(self.name(split, file), path, UserError)
        self._note_use(path)
        return path

    def _note_use(self, path: Path) -> None:
        """Set its times: the least recently used files are removed first."""
        with suppress(OSError):  # those of another user's file cannot be set
            os.utime(path)

    def check(self, split: Split, shards: Sequence[_Shard]) -> None:
        pass

    def begin(self, split: Split, shard: _Shard) -> None:
        """Download a shard in a thread, unless it is here or on its way."""
        self._of_this_process()
        path = self.path(split, shard.filename)
        if path not in self._pending and not path.exists():
            self._pending[path] = self._threads.submit(self._fetch_shard, split, shard)

    def open(self, split: Split, shard: _Shard) -> int:
        self._of_this_process()
        path = self.path(split, shard.filename)
        while True:
            if (pending := self._pending.pop(path, None)) is not None:
                wait([pending])  # where it failed, perhaps long ago, it is tried again
            if not path.exists():
                self._fetch_shard(split, shard)
            try:
                fd = os.open(path, _FLAGS)
            except FileNotFoundError:  # another process has just made room
                continue
            self._note_use(path)
            if (size := os.fstat(fd).st_size) != shard.chunk_bytes:
                os.close(fd)
                self.forget(path)
                raise UserError(f"{cut(self.name(split, shard.filename), size, shard.chunk_bytes)}; {self.repair}.")
            return fd

    def _fetch_shard(self, split: Split, shard: _Shard) -> None:
        _make_room(self.cache, shard.chunk_bytes)
        self._download(self.name(split, shard.filename), self.path(split, shard.filename), RunError)

    def _of_this_process(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._pending: dict[Path, Future[None]] = {}
            self._threads = ThreadPoolExecutor(WINDOW)
            self._local = threading.local()  # a client of boto3 for each thread

    def _download(self, address: str, path: Path, kind: type[UserError | RunError]) -> None:
        """Download a file, in whose place there is never a part of it.

        Raises:
            UserError, RunError: As `kind` says, where it cannot be read.
        """
        self._of_this_process()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be made ({error.strerror}); set {CACHE_VARIABLE}.") from error
        part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        bucket, _, key = address.removeprefix("s3://").partition("/")
        try:
            if not hasattr(self._local, "s3"):
                self._local.s3 = _s3_client(self.root)
            _download_file(self._local.s3.client, bucket, key, part)
            os.replace(part, path)
        except UserError:
            raise
        except Exception as error:  # boto3 raises its own, urllib3's and OSError
            again = " fit --resume continues when it can be." if kind is RunError else ""
            raise kind(f"{address}: cannot be read ({reason_of(error)}).{again}") from error
        finally:
            part.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "version": self.version, "_process": 0}


def _download_file(client: Any, bucket: str, key: str, path: Path) -> None:
    """Download a file in a thread that is left behind where it is too slow: its reads wait for all their bytes.

    By one connection: threads of boto3 would keep the process from ending.
    """
    from boto3.s3.transfer import TransferConfig

    received = [0]

    def note(num_bytes: int) -> None:
        received[0] += num_bytes

    config, before = TransferConfig(use_threads=False), 0
    done = in_daemon_thread(lambda: client.download_file(bucket, key, str(path), Callback=note, Config=config))
    while wait([done], _SLOW_S).not_done:
        speed = (received[0] - before) / _SLOW_S
        if speed < _MIN_BYTES_PER_S:
            raise TimeoutError(f"too slow: {speed:,.0f} bytes/s, less than {_MIN_BYTES_PER_S:,}")
        before = received[0]
    done.result()


def _s3_client(root: str) -> Any:
    """Return litdata's client, which refreshes credentials; its downloader would retry for hours, and not by HTTP."""
    try:
        from botocore.config import Config
        from litdata.streaming.client import S3Client
    except ImportError as error:
        raise UserError(
            f"--data.root {root}: needs litdata ({reason_of(error)}); pip install 'cifar-lightning[shards]'"
        ) from error
    retries: Any = {"total_max_attempts": _ATTEMPTS, "mode": "standard"}
    config = Config(retries=retries, connect_timeout=_TIMEOUT_S, read_timeout=_TIMEOUT_S)
    return S3Client(storage_options={"config": config})


def _cached(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Map the file of decoded images, whose name ends with their hash; return None where it is missing or damaged.

    Of more than `READ_BEFORE_BYTES` only the size is checked.
    """
    for path in folder.glob(f"{name}-*.npy"):
        with suppress(OSError, ValueError, EOFError):
            images = np.load(path, mmap_mode="r")
            is_whole = (images.shape, images.dtype) == (shape, np.uint8)
            if is_whole and (images.nbytes > READ_BEFORE_BYTES or path.stem == f"{name}-{_hash_of(images)}"):
                return cast(np.ndarray, images)
    return None


def _hash_of(images: np.ndarray) -> str:
    return hashlib.sha256(pixel_hashes(images).tobytes()).hexdigest()[:16]


def _make_room(cache: Path, num_bytes: int) -> None:
    """Remove files of the user's cache, the least recently used first, until the disk has room for another one.

    Of this set those are its shards; of other sets and versions, and of downloads that were stopped, every file.
    """
    usage = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists()))
    missing = num_bytes + int(_FREE * usage.total) - usage.free
    if missing <= 0:
        return
    found = []
    for path in in_user_cache(cache.parent):
        if cache in path.parents and path.suffix not in (".bin", ".part"):
            continue
        with suppress(FileNotFoundError):  # another process makes room, too
            about = path.lstat()
            used = max(about.st_atime, about.st_mtime)
            if path.suffix not in (".part", ".tmp") or time.time() - used > STALE_S:
                found.append((used, about.st_size, path))
    for _, size, path in sorted(found):  # on Linux a process that has one open reads it to the end
        if missing > 0:
            with suppress(OSError):  # Windows keeps what is open
                path.unlink()
                missing -= size


def is_unfinished(root: Path) -> bool:
    """Whether a folder is what a `shard` has written that was killed or still runs."""
    return not (root / INDEX).exists() and any(root.glob("*/chunk-*.bin"))


def cut(name: str, size: int, wanted: int) -> str:
    """Return what is wrong with a shard of another size."""
    return f"{name}: is cut or another shard: {size:,} of {wanted:,} bytes"


def _fill(out: np.ndarray, images: ShardedImages) -> np.ndarray:
    """Decode all images into an array, with a thread for each core: Pillow decodes without Python's lock."""

    def fill(start: int) -> None:
        # A copy has files of its own: one thread must not close those of another.
        out[start : start + _DECODED_AT_ONCE] = copy.copy(images)[start : start + _DECODED_AT_ONCE]

    with ThreadPoolExecutor(usable_cpus()) as threads:
        list(threads.map(fill, range(0, len(images), _DECODED_AT_ONCE)))
    return out


def _pread(fd: int, num_bytes: int, at: int) -> bytes:
    """Read from a file, of whose length `open` has made sure; one that is cut since gives fewer bytes."""
    if hasattr(os, "pread"):
        data = os.pread(fd, num_bytes, at)
    else:  # Windows
        os.lseek(fd, at, os.SEEK_SET)
        data = os.read(fd, num_bytes)
    return data if len(data) == num_bytes else data.ljust(num_bytes, b"\0")
