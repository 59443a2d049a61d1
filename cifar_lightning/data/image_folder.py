"""Class folders: `ROOT/train/<class>/*`, `ROOT/test/<class>/*` and optionally `ROOT/val/<class>/*`.

Images of any format and size are decoded once to uint8 RGB squares (rules: image_decoding.py) in a `.npy` file that
later starts map into memory: a set larger than memory is never held there, and a second start decodes nothing. The
file is valid for a fingerprint of the folder (names, sizes, modification times) and rebuilt when that changes.
"""

import errno
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lightning.data import image_decoding
from cifar_lightning.data.image_decoding import RULES, Remarks, Unreadable, decode_all, find_image_size, remark_lines
from cifar_lightning.data.image_set import SPLITS, ImageSet, Split, digest
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.files import write_json
from cifar_lightning.formatting import counted

CACHE_FOLDER = ".cifar_lightning_cache"
CACHE_VARIABLE = "CIFAR_LIGHTNING_CACHE"
_LITTER = frozenset({"thumbs.db", "desktop.ini"})  # written by Windows; such files of other systems are hidden
# Notes and tables next to images are ignored. A file with any other suffix, or none, must be an image: one that Pillow
# cannot read, such as .heic, must not be left out silently.
_NOTES = {".cfg", ".csv", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".tsv", ".txt", ".xml"}
_IGNORED = _NOTES | {".aae", ".db", ".lnk", ".pdf", ".py", ".url", ".xls", ".xlsx", ".xmp", ".yaml", ".yml"}
# Images uint8 (N, S, S, 3), the SHA-256 of images and targets, and what is unusual about the files.
Decoded = tuple[np.ndarray, str, Remarks]
_STALE_S = 86_400  # a temporary file this old belongs to a process that was killed


@dataclass(frozen=True)
class Listing:
    """The image files of one split, sorted by class and name.

    Args:
        folder: `ROOT/train`, for example.
        names: `<class>/<file>` below it.
        counts: Number of images of each class.
        fingerprint: SHA-256 of names, sizes in bytes and modification times.
        ignored: `<class>/<file>` of the files whose suffix is not that of an image.
    """

    folder: str
    names: tuple[str, ...]
    counts: tuple[int, ...]
    fingerprint: str
    ignored: tuple[str, ...] = ()

    @property
    def targets(self) -> np.ndarray:
        """Class indices int64 (N,)."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)

    @property
    def paths(self) -> list[str]:
        """Paths of the images."""
        return [os.path.join(self.folder, name) for name in self.names]


class ClassFolders:
    """The data set "folder": your own images in class folders, decoded once.

    Args:
        root: Folder that holds `train/` and `test/`, and optionally `val/`.
        image_size: Height and width in pixels. By default that of the images if all of a sample are squares of one size
            up to 224, otherwise the median of their shorter sides, rounded to a multiple of 32 from 32 to 224.

    Raises:
        UserError: A folder is missing, or a class is empty or not in every split.
    """

    mean: None = None
    std: None = None

    def __init__(self, root: str | Path, image_size: int | None = None) -> None:
        self.root = Path(root)
        self._folder_names, self.listings = scan(self.root)
        # Names that are not UTF-8 can be opened but not printed: show their bytes as \xff.
        self.class_names = tuple(os.fsencode(name).decode("utf-8", "backslashreplace") for name in self._folder_names)
        if image_size is not None and image_size < 1:
            raise UserError(f"--data.image_size {image_size}: 1 pixel or more")
        self.image_size = image_size or find_image_size(self.listings["train"].paths)
        self._uncached: dict[Split, Decoded] = {}
        self._has_remarked = False

    def prepare(self) -> None:
        """Decode what is not in the cache yet; safe to call again and from several processes.

        Raises:
            UserError: Images that cannot be read.
        """
        for split in self.listings:
            self.load(split)
        if not self._has_remarked and is_first_process():
            for remark in self._remarks():
                print(remark, flush=True)
        self._has_remarked = True  # Lightning calls this for each of fit, validate and test

    def _remarks(self) -> Iterator[str]:
        for listing in self.listings.values():
            if listing.ignored:
                kinds = _some(sorted({Path(name).suffix for name in listing.ignored}))
                num = counted(len(listing.ignored), "file", "files")
                yield f"{listing.folder}: {num} ignored, not images ({kinds})"
        for split, listing in self.listings.items():
            yield from remark_lines(self._decoded(split)[2], listing.paths)
        listing, images = self.listings["train"], self._decoded("train")[0]
        if remark := image_decoding.dark_16_bit_remark(listing.paths, images):
            yield f"warning: {listing.folder}: {remark}"

    def load(self, split: Split) -> ImageSet | None:
        """Read a split, its images mapped into memory if there is a cache; decode them first if needed."""
        if split not in self.listings:
            return None
        images, sha256, _ = self._decoded(split)
        return ImageSet(images, self.listings[split].targets, sha256)

    def describe(self) -> str:
        """Return one line for the terminal."""
        counts = " + ".join(f"{len(listing.names):,} {split}" for split, listing in self.listings.items())
        size = f"{self.image_size}x{self.image_size}"
        return f"folder: {counts} images, {len(self.class_names)} classes, {size}, in {self.root}"

    def _decoded(self, split: Split) -> Decoded:
        return self._uncached.get(split) or self._read(split) or self._build(split)

    def _about(self, split: Split) -> dict[str, Any]:
        listing = self.listings[split]
        return {
            "rules": RULES,
            "image_size": self.image_size,
            "class_names": list(self.class_names),
            "counts": list(listing.counts),
            "fingerprint": listing.fingerprint,
        }

    def _read(self, split: Split) -> Decoded | None:
        for folder in cache_folders(self.root):
            path = folder / f"{split}-{self.image_size}.npy"
            if found := read_cache(path, self._about(split)):
                return found
            if path.exists():
                print(f"{path} is damaged or older than the images: decoding them again", flush=True)
        return None

    def _build(self, split: Split) -> Decoded:
        listing = self.listings[split]
        shape = (len(listing.names), self.image_size, self.image_size, 3)
        for folder in cache_folders(self.root):
            with allocated(folder, f"{split}-{self.image_size}.npy", shape) as temporary:
                if temporary is None:
                    continue
                if folder.parent != self.root:
                    print(f"{self.root} is read-only or full: decoded images are cached in {folder}", flush=True)
                bad, remarks = decode_all(listing.paths, self.image_size, temporary)
                raise_unreadable(bad, listing, folder)
                try:
                    path = folder / f"{split}-{self.image_size}.npy"
                    return publish(temporary, path, self._about(split), listing.targets, remarks)
                except OSError as error:  # on Windows: while another process has the old images mapped
                    print(f"{folder}: decoded images cannot be cached ({error})", flush=True)
        print(f"No folder for decoded images is writable (set {CACHE_VARIABLE}): decoding at each start", flush=True)
        images = np.empty(shape, np.uint8)
        bad, remarks = decode_all(listing.paths, self.image_size, images)
        raise_unreadable(bad, listing, None)
        self._uncached[split] = images, digest(images, listing.targets), remarks
        return self._uncached[split]


# -- the folder -------------------------------------------------------------------------------------------------


def scan(root: Path) -> tuple[tuple[str, ...], dict[Split, Listing]]:
    """List the files of all splits."""
    if not root.is_dir():
        raise UserError(f"--data.root {root}: no such folder; it must hold train/<class>/* and test/<class>/*")
    splits = [split for split in SPLITS if (root / split).is_dir()]
    for split in ("train", "test"):
        if split not in splits:
            raise UserError(f"--data.root {root} has no folder {split}/: put images into {split}/<class>/")
    classes = {split: sorted(entry.name for entry in _entries(root / split) if entry.is_dir()) for split in splits}
    if not classes["train"]:
        raise UserError(f"{root / 'train'} has no class folders: put the images of each class into train/<class>/")
    for split in splits:
        if differing := sorted({*classes["train"]} ^ {*classes[split]}):
            raise UserError(
                f"{_some(differing)}: in {root / split} or in {root / 'train'}, but not in both\n"
                "Every split needs the same class folders: add, rename or remove."
            )
    names = tuple(classes["train"])
    return names, {split: _list_split(root / split, names) for split in splits}


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name, without hidden ones such as .ipynb_checkpoints or .DS_Store."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in _LITTER]
    return sorted(visible, key=lambda entry: entry.name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _list_split(folder: Path, class_folders: Sequence[str]) -> Listing:
    names: list[str] = []
    ignored: list[str] = []
    counts = []
    seen = hashlib.sha256()
    for class_folder in class_folders:
        before = len(names)
        for entry in _entries(folder / class_folder):
            name = f"{class_folder}/{entry.name}"
            try:
                stat = entry.stat()
            except OSError as error:
                raise UserError(f"{folder / name} cannot be read ({error.strerror}): repair or remove it") from error
            if entry.is_dir():
                raise UserError(f"{folder / name} is a folder inside a class: put images directly into {class_folder}/")
            if os.path.splitext(entry.name)[1].lower() in _IGNORED:
                ignored.append(name)
                continue
            names.append(name)
            seen.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        counts.append(len(names) - before)
        if not counts[-1]:
            raise UserError(f"{folder / class_folder} has no images: add some, or remove the class from every split")
    return Listing(str(folder), tuple(names), tuple(counts), seen.hexdigest(), tuple(ignored))


def raise_unreadable(bad: Sequence[Unreadable], listing: Listing, folder: Path | None) -> None:
    """Raise `UserError` if there are unreadable images: with the first one, their number and a file that lists all."""
    if not bad:
        return
    listed = ""
    if folder is not None:
        with suppress(OSError):  # a list that cannot be written must not hide the error
            list_path = folder / f"unreadable-{Path(listing.folder).name}.txt"
            list_path.write_text("".join(f"{reason}\n" for _, reason in bad), "utf-8", "surrogateescape")
            listed = f", all listed in {list_path}"
    raise UserError(
        f"{bad[0][1]}; {len(bad):,} of {len(listing.names):,} images in {listing.folder} cannot be read{listed}\n"
        "Repair or remove them."
    )


# -- the cache --------------------------------------------------------------------------------------------------


def cache_folders(root: Path) -> tuple[Path, Path]:
    """Return the folders for decoded images: next to the data, and in the user's cache by a name of its own."""
    place = os.path.realpath(root)
    name = f"{Path(place).name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"
    if chosen := os.environ.get(CACHE_VARIABLE):
        return root / CACHE_FOLDER, Path(chosen) / name
    variable, default = ("LOCALAPPDATA", "~/AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", "~/.cache")
    return root / CACHE_FOLDER, Path(os.environ.get(variable) or default).expanduser() / "cifar_lightning" / name


def read_cache(path: Path, about: dict[str, Any]) -> Decoded | None:
    """Map cached images into memory, read-only; return None if no complete file agrees with `about`."""
    try:
        found = json.loads(path.with_suffix(".json").read_text("utf-8"))
        digest, size_bytes = found.pop("sha256"), found.pop("size_bytes")
        remarks = {text: (int(num), int(first)) for text, (num, first) in found.pop("remarks").items()}
        if found != about or path.stat().st_size != size_bytes:
            return None
        images = np.load(path, mmap_mode="r")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
    ):  # missing, cut short, overwritten
        return None
    size = about["image_size"]
    fits = images.shape == (sum(about["counts"]), size, size, 3) and images.dtype == np.uint8
    fits = fits and all(0 <= first < len(images) for _, first in remarks.values())
    return (images, digest, remarks) if fits else None


@contextmanager
def allocated(folder: Path, name: str, shape: tuple[int, ...]) -> Iterator[Path | None]:
    """Yield a temporary `.npy` file of uint8 zeros with its disk space allocated; remove it afterwards.

    Yields None if the folder is not writable or the disk is full: a disk that fills up under a mapped file would kill
    the process.
    """
    temporary = folder / f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary if _allocate(temporary, name, shape) else None
    finally:
        with suppress(OSError):  # Windows cannot remove what is still mapped: _allocate does so a day later
            temporary.unlink()


def _allocate(temporary: Path, name: str, shape: tuple[int, ...]) -> bool:
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        for stale in temporary.parent.glob(f".{name}.*.tmp"):
            with suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - stale.stat().st_mtime > _STALE_S:
                    stale.unlink()
        np.lib.format.open_memmap(str(temporary), "w+", np.uint8, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        return error.errno in (errno.EOPNOTSUPP, errno.EINVAL)  # a file system that cannot allocate may have room
    return True


def publish(temporary: Path, path: Path, about: dict[str, Any], targets: np.ndarray, remarks: Remarks) -> Decoded:
    """Rename finished images to their final name, so that no reader sees a partial file.

    Returns:
        The same as `read_cache`, of exactly these images, whatever another process has put there since.

    Raises:
        OSError: The folder is no longer writable.
    """
    images = np.load(temporary, mmap_mode="r")
    about = about | {"sha256": digest(images, targets), "size_bytes": temporary.stat().st_size, "remarks": remarks}
    if sys.platform == "win32":  # a mapped file cannot be renamed
        del images
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    note = path.with_suffix(".json")
    # Without its note an image file is not trusted: a crash before the new note leaves no wrong cache.
    note.unlink(missing_ok=True)
    os.replace(temporary, path)
    write_json(note, about)
    if sys.platform == "win32":
        images = np.load(path, mmap_mode="r")
    return images, about["sha256"], remarks
