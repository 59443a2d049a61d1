"""Class folders: `ROOT/<class>/*`, or `ROOT/train/<class>/*` and optionally the same below `ROOT/test` and `ROOT/val`.

Or images anywhere below ROOT, with their classes and splits in a labels file (labels_file.py).

Images of any format and size are decoded once to uint8 squares (rules: image_decoding.py) in a `.npy` file that
later starts map into memory: a set larger than memory is never held there, and a second start decodes nothing. The
file is valid for the contents of the folder: names, and the SHA-256 of every file. Files with unchanged size, times and
inode are not hashed again. The decoded images of a split are hashed at each start, to find a byte that the disk has
changed; above `READ_BEFORE_BYTES` some of them, which tells them from those that another process has put there.
"""

import errno
import hashlib
import json
import os
import stat
import sys
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifar_lightning.data import image_decoding
from cifar_lightning.data.image_decoding import (
    RULES,
    Remarks,
    Resize,
    decode_all,
    decode_image,
    find_image_size,
    read_file,
    remark_lines,
)
from cifar_lightning.data.image_set import (
    READ_BEFORE_BYTES,
    SPLIT_OF_WORD,
    SPLITS,
    Cache,
    ImageSet,
    Split,
    digest,
    pixel_hashes,
)
from cifar_lightning.data.labels_file import read_labels
from cifar_lightning.data.memory import check_fits
from cifar_lightning.errors import UserError, is_first_process
from cifar_lightning.files import Stat, stat_numbers, write_bytes_durably, write_json, write_text_durably
from cifar_lightning.formatting import counted, first_of, plural, printable

CACHE_FOLDER = ".cifar_lightning_cache"
CACHE_VARIABLE = "CIFAR_LIGHTNING_CACHE"
# Files and folders that systems put among the user's, in lower case; their other ones begin with a dot.
_LITTER = frozenset(
    {
        *("desktop.ini", "thumbs.db", "$recycle.bin", "system volume information"),  # of Windows
        *("icon\r", "__macosx"),  # of macOS, the latter in its ZIP files
        *("@eadir", "#recycle"),  # of Synology: thumbnails of each photograph, and what was deleted
        "lost+found",  # of Linux, at the top of a disk
    }
)
# Notes and tables next to images are ignored. A file with any other suffix, or none, must be an image: one that Pillow
# cannot read, such as .heic, must not be left out silently.
_NOTES = {".cfg", ".csv", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".tsv", ".txt", ".xml"}
NOT_IMAGES = _NOTES | {".aae", ".db", ".lnk", ".pdf", ".py", ".url", ".xls", ".xlsx", ".xmp", ".yaml", ".yml"}
# Of images, as people have them: `mimetypes` knows others on each platform.
_IMAGES = {".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_CACHED = {".bin", ".npz", ".npy", ".json", ".files", ".part", ".tmp"}  # of files in the user's cache
STALE_S = 86_400  # a temporary file this old belongs to a process that was killed
_RACY_NS = 2_000_000_000  # a file changed this shortly before may change again within the resolution of its times
# Of each image: `Listing.stats`, the SHA-256 of the file (0 where it cannot be opened), `pixel_hashes` once decoded.
_FILE = np.dtype([("stat", "<i8", 4), ("content", "u1", 32), ("pixels", "<u8")])
_COMPARED = 256  # images above `READ_BEFORE_BYTES` that are compared with their hashes
Skipped = tuple[str, str]  # path of a file or folder, and why it is left out
_MOST_DIGITS = 1000  # of a label that is a number; Python converts 4,300
_BY_SUFFIX, _LOOSE, _LINK = "not an image, by its suffix", "in no class folder", "a link to a folder inside a class"


@dataclass(frozen=True)
class Listing:
    """The image files of one split, sorted by class and name."""

    folder: str  # `ROOT/train`, for example
    within: str  # `train/`, what precedes names below the root; empty where the classes lie in the root
    names: tuple[str, ...]  # `<class>/<file>` below the folder
    counts: tuple[int, ...]  # images of each class
    stats: np.ndarray  # int64 (N, 4): size, modification and change time, inode; 0 of a file that has just changed
    skipped: tuple[Skipped, ...] = ()  # what else is in the folder

    @property
    def targets(self) -> np.ndarray:
        """Class indices int64 (N,)."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)

    @property
    def paths(self) -> list[str]:
        """Paths of the images."""
        return [os.path.join(self.folder, name) for name in self.names]

    def without(self, indices: Iterable[int]) -> "Listing":
        """Return the listing without some images."""
        kept = np.delete(np.arange(len(self.names)), list(indices))
        counts = np.bincount(self.targets[kept], minlength=len(self.counts)).tolist()
        return replace(self, names=tuple(self.names[index] for index in kept), counts=tuple(counts))


class Decoded(NamedTuple):
    """The images of a split that can be read, their `digest` and `pixel_hashes`, why others cannot, and remarks.

    `unreadable` and `remarks` have indices into the listing.
    """

    images: np.ndarray
    sha256: str
    pixels: np.ndarray
    unreadable: dict[int, str]
    remarks: Remarks


class ClassFolders:
    """The data set "folder": your own images in class folders, decoded once.

    Args:
        root: Folder that holds the classes, or `train/` and optionally `test/` and `val/` with the classes.
        image_size: Height and width in pixels. By default that of the images if all of a sample are squares of one size
            up to 224, otherwise the median of their shorter sides, rounded to a multiple of 32 from 32 to 224.
        labels: Labels file, which then decides classes and splits.
        resize: How images become squares; see `ImageDataModule`.
        in_channels: 3 for RGB, 1 for gray.
        skip_unreadable: Leave out images that cannot be read; otherwise they are an error.
        cache: Where decoded images are kept: disk, or memory alone.

    Raises:
        UserError: A folder is missing, or a class is empty or not in every split, or the labels file does not fit.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        *,
        labels: str | Path | None = None,
        resize: Resize = "crop",
        in_channels: int = 3,
        skip_unreadable: bool = False,
        cache: Cache = "disk",
    ) -> None:
        if cache == "none":
            raise UserError(
                f"--data.cache none: {root} is decoded once, to memory or disk; to decode images whenever they are "
                "shown, write shards of them with the command shard."
            )
        self.root, self.labels, self.skip_unreadable = Path(root), labels, skip_unreadable
        self._caches = _cache_folders(self.root) if cache == "disk" else ()
        self.resize: Resize = resize
        self.in_channels = in_channels
        self.class_names, self.all_listings = scan(self.root, None if labels is None else Path(labels))
        self.listings = dict(self.all_listings)  # once decoded, without the images that cannot be read
        if image_size is not None and image_size < 1:
            raise UserError(f"--data.image_size {image_size}: 1 pixel or more")
        self.image_size = image_size or find_image_size(self.listings["train"].paths)
        self.pixel_hashes: dict[Split, np.ndarray] = {}  # of the images of each split that was loaded
        self._uncached: dict[Split, Decoded] = {}
        self._unreadable: dict[Split, list[Skipped]] = {}
        self._has_remarked = False

    def prepare(self) -> None:
        """Decode what is not in the cache yet; safe to call again and from several processes.

        Raises:
            UserError: Images that cannot be read.
        """
        decoded = {split: self._decoded(split) for split in self.all_listings}
        self.refuse_unreadable()
        if not self._has_remarked and is_first_process():
            for remark in self._remarks(decoded):
                print(printable(remark), flush=True)
        self._has_remarked = True  # Lightning calls this for each of fit, validate and test

    def load(self, split: Split) -> ImageSet | None:
        """Read a split, its images mapped into memory if there is a cache; decode them first if needed."""
        if split not in self.listings:
            return None
        decoded = self._decoded(split)
        if decoded.unreadable and not self.skip_unreadable:
            self.prepare()  # names the images of all splits
        return ImageSet(decoded.images, self.listings[split].targets, decoded.sha256)

    def image_name(self, split: Split, index: int) -> str:
        """Return the path of an image below the root, with slashes; bytes that are not UTF-8 as \\xff."""
        listing = self.listings[split]
        name = f"{listing.within}{listing.names[index]}".replace(os.sep, "/")
        return os.fsencode(name).decode("utf-8", "backslashreplace")

    @property
    def skipped_files(self) -> list[Skipped]:
        """Path below the root and reason of every file that is left out, after `prepare`."""
        skipped = [row for rows in self._unreadable.values() for row in rows]
        for listing in self.all_listings.values():
            skipped += [(f"{listing.within}{name}", reason) for name, reason in listing.skipped]
        return skipped

    def leave_out(self, split: Split, unreadable: dict[int, str]) -> None:
        """Leave the images of a split out that cannot be read, of which the indices and reasons are given."""
        listing = self.all_listings[split]
        self.listings[split] = listing.without(unreadable)
        self._unreadable[split] = [
            (f"{listing.within}{listing.names[index]}", reason) for index, reason in unreadable.items()
        ]

    def refuse_unreadable(self) -> None:
        """Raise `UserError` if images are left out and may not, or are all of a class."""
        bad = {split: rows for split, rows in self._unreadable.items() if rows}
        if bad and not self.skip_unreadable:
            rows = [row for rows in bad.values() for row in rows]
            counts = " and ".join(
                f"{len(rows):,} of {len(self.all_listings[split].names):,} images in {self.all_listings[split].folder}"
                for split, rows in bad.items()
            )
            listed = ""
            for folder in _cache_folders(self.root):
                with suppress(OSError):  # a list that cannot be written must not hide the error
                    folder.mkdir(parents=True, exist_ok=True)
                    write_skipped_files(path := folder / "unreadable.jsonl", rows)
                    listed = f", all listed in {path}"
                    break
            raise UserError(
                f"{self.root / rows[0][0]} {rows[0][1]}; {counts} cannot be read{listed}\n"
                "Repair or remove them, or leave them out: --data.skip_unreadable true"
            )
        for split in bad:
            listing = self.listings[split]
            if 0 in listing.counts:
                name = self.class_names[listing.counts.index(0)]
                raise UserError(f"{listing.folder}: no image of the class {name} can be read")

    def _remarks(self, decoded: dict[Split, Decoded]) -> Iterator[str]:
        yield from self.folder_remarks()
        for split, listing in self.all_listings.items():
            yield from remark_lines(decoded[split].remarks, listing.paths)
        listing = self.listings["train"]
        if remark := image_decoding.dark_16_bit_remark(listing.paths, decoded["train"].images):
            yield f"warning: {listing.folder}: {remark}"

    def folder_remarks(self) -> Iterator[str]:
        """Yield lines on what is not used of the folder, and on what may be no class."""
        if bad := [row for rows in self._unreadable.values() for row in rows]:
            total = sum(len(listing.names) for listing in self.all_listings.values())
            left_out = f"{plural(total, 'image')} {'is' if len(bad) == 1 else 'are'} left out"
            yield f"warning: {len(bad):,} of {left_out} ({self.root / bad[0][0]} {bad[0][1]})"
        for listing in self.listings.values():
            if names := [name for name, reason in listing.skipped if reason == _BY_SUFFIX]:
                kinds = _some(sorted({Path(name).suffix for name in names}))
                yield f"{listing.folder}: {counted(len(names), 'file', 'files')} ignored, not images ({kinds})"
            for ignored in (_LOOSE, _LINK):
                if names := [name for name, reason in listing.skipped if reason == ignored]:
                    num = counted(len(names), "file is", "files are")
                    yield f"warning: {listing.folder}: {num} {ignored} and ignored ({_some(names)})"
        used = {listing.within.rstrip("/") for listing in self.listings.values()}
        others = [entry.name for entry in _entries(self.root)[0] if entry.is_dir() and entry.name not in used]
        called = [name for name in self.class_names if name.casefold() in SPLIT_OF_WORD]
        if called and "" in used and self.labels is None:
            are = "are classes" if len(called) > 1 else "is a class"
            yield f"warning: {self.root}: {_some(called)} {are}, as there is no train/"
        if others and "" not in used:
            yield f"warning: {self.root}: only train/, val/ and test/ are used, not {_some(others)}"
        listing = self.listings["train"]
        if self.labels is None and "" in used and len(shared := _shared_folders(listing.names)) > 1:
            yield (
                f"warning: {listing.folder}: several classes hold folders called {_some(shared)}. If these are the "
                "classes, give the folder that holds them as --data.root, or call the splits train/ and test/."
            )

    def describe(self) -> str:
        """Return one line for the terminal."""
        is_one = len(self.listings) == 1  # the other splits are split off
        counts = " + ".join(
            f"{len(listing.names):,}{'' if is_one else f' {split}'}" for split, listing in self.listings.items()
        )
        size = f"{self.image_size}x{self.image_size}{' gray' if self.in_channels == 1 else ''}"
        labels = "" if self.labels is None else f", labels of {self.labels}"
        return f"folder: {counts} images, {len(self.class_names)} classes, {size}, in {self.root}{labels}"

    def _cache_name(self, split: Split) -> str:
        words = [split, str(self.image_size), *map(str, self._variant.values())]
        if self.labels is not None:  # by name, so that the labels of several folds do not compete
            words.append(hashlib.sha256(os.fsencode(Path(self.labels).name)).hexdigest()[:8])
        return f"{'-'.join(words)}.npy"

    @property
    def _variant(self) -> dict[str, Any]:
        """How images are decoded, where it is not the default: caches of the default have no word of it."""
        channels = {} if self.in_channels == 3 else {"in_channels": self.in_channels}
        return channels if self.resize == "crop" else {"resize": self.resize, **channels}

    def _decoded(self, split: Split) -> Decoded:
        decoded = self._uncached.get(split) or self._read(split) or self._build(split)
        self.leave_out(split, decoded.unreadable)
        self.pixel_hashes[split] = decoded.pixels
        return decoded

    def _about(self, split: Split) -> dict[str, Any]:
        return {
            "rules": RULES,
            "image_size": self.image_size,
            "class_names": list(self.class_names),
            "counts": list(self.all_listings[split].counts),
            **self._variant,
        }

    def _read(self, split: Split) -> Decoded | None:
        for folder in self._caches:
            path = folder / self._cache_name(split)
            if found := read_cache(path, self._about(split), self.all_listings[split]):
                if self.skip_unreadable or not found.unreadable:
                    return found
            elif path.exists():
                print(f"{path} is damaged, or the images have changed: decoding them again", flush=True)
        return None

    def _build(self, split: Split) -> Decoded:
        listing = self.all_listings[split]
        shape = (len(listing.names), self.image_size, self.image_size, self.in_channels)
        for folder in self._caches:
            with allocated(folder, self._cache_name(split), shape) as temporary:
                if temporary is None:
                    continue
                if folder.parent != self.root:
                    print(f"{self.root} is read-only or full: decoded images are cached in {folder}", flush=True)
                decoded, files = self._decode(listing, temporary)
                about = self._about(split) | {"contents": _contents(files, listing)}
                try:
                    return publish(temporary, folder / self._cache_name(split), about, decoded, files)
                except OSError as error:  # on Windows: while another process has the old images mapped
                    print(f"{folder}: decoded images cannot be cached ({error})", flush=True)
        what, room = "--data.cache memory", "Give --data.cache disk"
        if self._caches:
            print(
                f"No folder for decoded images is writable (set {CACHE_VARIABLE}): decoding at each start", flush=True
            )
            what, room = f"--data.root {self.root}", f"Make room for them on a disk, which {CACHE_VARIABLE} may name"
        check_fits(shape, what, f"{room}, or give a smaller --data.image_size.")
        self._uncached[split], _ = self._decode(listing, np.empty(shape, np.uint8))
        return self._uncached[split]

    def _decode(self, listing: Listing, out: Path | np.ndarray) -> tuple[Decoded, np.ndarray]:
        files, paths = np.zeros(len(listing.names), _FILE), listing.paths
        decode = partial(decode_image, resize=self.resize, in_channels=self.in_channels)
        bad, remarks = decode_all(paths, self.image_size, out, decode, hashes=files)
        files["stat"] = listing.stats * files["content"].any(axis=1, keepdims=True)
        unreadable = {index: reason.removeprefix(f"{paths[index]} ") for index, reason in bad}
        if isinstance(out, Path):
            drop_rows(out, list(unreadable))
            images = np.load(out, mmap_mode="r")
        else:
            images = np.delete(out, list(unreadable), axis=0) if bad else out
        sha256 = digest(images, listing.without(unreadable).targets)
        if sys.platform == "win32" and isinstance(out, Path):
            images = np.empty(0, np.uint8)  # a mapped file cannot be renamed
        return Decoded(images, sha256, np.delete(files["pixels"], list(unreadable)), unreadable, remarks), files


# -- the folder -------------------------------------------------------------------------------------------------


def scan(root: Path, labels: Path | None = None) -> tuple[tuple[str, ...], dict[Split, Listing]]:
    """List class names and the files of all splits: all are in "train" where none is given."""
    if not root.is_dir():
        raise UserError(f"--data.root {root}: no such folder; it must hold <class>/*, or train/<class>/*")
    if labels is not None:
        return _scan_labels(root, labels)
    within = _split_folders(root) or {"train": ""}
    if "train" not in within:
        raise UserError(f"--data.root {root} has no folder train/: put images into train/<class>/")
    folders = {split: _class_folders(root / name) for split, name in within.items()}
    names = tuple(sorted(folders["train"]))
    if not names:
        inside = f"{within['train']}/<class>/".lstrip("/")
        raise UserError(f"{root / within['train']} has no class folders: put the images of each class into {inside}")
    for split, name in within.items():
        if differing := sorted({*names} ^ {*folders[split]}):
            raise UserError(
                f"{_some(differing)}: in {root / name} or in {root / within['train']}, but not in both\n"
                "Every split needs the same class folders: add, rename or remove."
            )
    return names, {
        split: _list_split(root, name, [folders[split][each] for each in names]) for split, name in within.items()
    }


def _scan_labels(root: Path, labels: Path) -> tuple[tuple[str, ...], dict[Split, Listing]]:
    began_ns, listings = time.time_ns(), dict[Split, Listing]()
    rows = read_labels(labels, root)
    found = {row.label for row in rows}
    are_numbers = all(label.removeprefix("-").isdecimal() and len(label) <= _MOST_DIGITS for label in found)
    names = tuple(sorted(found, key=lambda label: (int(label) if are_numbers else 0, label)))
    places = {name: place for place, name in enumerate(names)}
    for split in SPLITS:
        own = sorted((places[row.label], row.name, row.about) for row in rows if (row.split or "train") == split)
        counts = np.bincount([place for place, _, _ in own], minlength=len(names)).tolist()
        if not own and split != "train":
            continue
        if 0 in counts:
            raise UserError(
                f"--data.labels {labels}: no {split} image of {printable(names[counts.index(0)])}\n"
                "Every split needs every class, and train is one of them: add rows, or leave the split column out."
            )
        stats = _settled([about for _, _, about in own], began_ns)
        listings[split] = Listing(str(root), "", tuple(name for _, name, _ in own), tuple(counts), stats)
    return names, listings


def _split_folders(root: Path) -> dict[Split, str]:
    """Return the name of each split's folder; empty where the classes lie in the root.

    Without train/, folders called test or valid are classes if others lie next to them and none of them holds folders.
    """
    found: dict[Split, str] = {}
    others: list[str] = []
    for entry in _entries(root)[0]:
        split = SPLIT_OF_WORD.get(entry.name.casefold())
        if split is None or not _is_folder(entry):
            others += [entry.name] if entry.is_dir() else []
            continue
        if split in found:
            raise UserError(f"{root} has {found[split]}/ and {entry.name}/: keep one of them for {split}")
        found[split] = entry.name
    if found and "train" not in found and others:
        inside = (entry for name in (*found.values(), *others) for entry in _entries(root / name)[0])
        if not any(entry.is_dir() for entry in inside):
            return {}
    return {split: found[split] for split in SPLITS if split in found}


def holds_class_folders(root: Path) -> bool:
    """Whether a folder seems to hold a data set: two classes or more, an image directly in the first of them."""
    try:
        folder = root / _split_folders(root).get("train", "")
        classes = [entry for entry in _entries(folder)[0] if entry.is_dir()]
        first = _entries(classes[0].path)[0] if len(classes) > 1 else []
    except (UserError, OSError):
        return False
    return any(os.path.splitext(entry.name)[1].lower() in _IMAGES for entry in first)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or written by a system."""
    return name.startswith(".") or name.lower() in _LITTER


def class_name_of(folder_name: str) -> str:
    """Return the class name that a folder's name gives.

    Class names are in Unicode's form NFC, as macOS writes folder names in form NFD; bytes that are not UTF-8, which can
    be opened but not printed, are shown as \\xff.
    """
    return unicodedata.normalize("NFC", os.fsencode(folder_name).decode("utf-8", "backslashreplace"))


def _class_folders(folder: Path) -> dict[str, str]:
    """Return the name of each class folder by its class name."""
    found: dict[str, str] = {}
    for entry in _entries(folder)[0]:
        if not _is_folder(entry):
            continue
        name = class_name_of(entry.name)
        if name in found:
            raise UserError(
                f"{folder}: the folders {found[name]!a} and {entry.name!a} would be one class, {printable(name)}\n"
                "Rename one, or move its images into the other."
            )
        found[name] = entry.name
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError as error:  # a link to nothing: a class may be missing
        raise UserError(f"{entry.path} cannot be read ({error.strerror}): repair or remove it") from error


def _entries(folder: str | Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """Return the entries of a folder by name, and apart the names of those that `is_hidden`."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be searched ({error.strerror}): repair or remove it") from error
    visible, hidden = [], []
    for entry in found:
        if is_hidden(entry.name):
            hidden.append(entry.name)
        else:
            visible.append(entry)
    return visible, hidden


def _some(names: Sequence[str]) -> str:
    return printable(first_of(names, 5))


def _shared_folders(names: Iterable[str]) -> list[str]:
    """Return the names of folders inside classes, of those that hold images, that several classes have."""
    folders = {name.rpartition("/")[0] for name in names}
    inside = {(each.partition("/")[0], each.rpartition("/")[2]) for each in folders if "/" in each}
    return sorted(name for name, num in Counter(name for _, name in inside).items() if num > 1)


def _list_split(root: Path, within: str, class_folders: Sequence[str]) -> Listing:
    folder, began_ns = root / within, time.time_ns()
    found: list[tuple[str, Stat]] = []
    counts = []
    others, hidden = _entries(folder)
    skipped = [(name, "hidden") for name in hidden if name != CACHE_FOLDER]
    skipped += [(entry.name, _LOOSE) for entry in others if not _is_folder(entry)]
    for class_folder in class_folders:
        before = len(found)
        found += _files_below(folder, class_folder, skipped)
        counts.append(len(found) - before)
        if not counts[-1]:
            raise UserError(f"{folder / class_folder} has no images: add some, or remove the class from every split")
    names = tuple(name for name, _ in found)
    within = f"{within}/" if within else ""
    return Listing(
        str(folder), within, names, tuple(counts), _settled([stat for _, stat in found], began_ns), (*skipped,)
    )


def _files_below(folder: Path, name: str, skipped: list[Skipped]) -> Iterator[tuple[str, Stat]]:
    """Yield name and `Listing.stats` of the images in a folder of a class and its subfolders."""
    visible, hidden = _entries(folder / name)
    skipped += [(f"{name}/{each}", "hidden") for each in hidden]
    for entry in visible:
        below = f"{name}/{entry.name}"
        is_dangling = entry.is_symlink() and not os.path.exists(entry.path)  # an image that cannot be read
        if not is_dangling and _is_folder(entry):
            if entry.is_symlink():  # perhaps to a folder that it lies in
                skipped.append((below, _LINK))
            else:
                yield from _files_below(folder, below, skipped)
        elif os.path.splitext(entry.name)[1].lower() in NOT_IMAGES:
            skipped.append((below, _BY_SUFFIX))
        else:
            # On Windows only os.stat has the inode.
            stat_of = partial(os.stat, entry.path) if os.name == "nt" else entry.stat
            yield below, stat_numbers(stat_of(follow_symlinks=not is_dangling))


def _settled(stats: Sequence[Stat], began_ns: int) -> np.ndarray:
    """Return `Listing.stats` of files that were listed from `began_ns` on."""
    table = np.array(stats, np.int64)
    table[table[:, 1:3].max(1) > began_ns - _RACY_NS] = 0
    return table


# -- the cache --------------------------------------------------------------------------------------------------


def _cache_folders(root: Path) -> tuple[Path, Path]:
    """Return the folders for decoded images: next to the data, and in the user's cache by a name of its own."""
    return root / CACHE_FOLDER, user_cache(os.path.realpath(root))


def user_cache(place: str, version: str = "") -> Path:
    """Return the folder in the user's cache for what comes from a folder or address, and for a version of it."""
    name = f"{Path(place).name}-{hashlib.sha256(os.fsencode(place + version)).hexdigest()[:16]}"
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen) / name
    variable, default = ("LOCALAPPDATA", "~/AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get(variable) or default).expanduser() / "cifar_lightning" / name


def in_user_cache(root: Path) -> Iterator[Path]:
    """Yield the files that `user_cache` is for, in all of its folders: the user may keep others next to them."""
    for folder in root.glob(f"*-{'[0-9a-f]' * 16}"):
        files = () if folder.is_symlink() else folder.rglob("*")
        yield from (path for path in files if path.suffix in _CACHED and path.is_file() and not path.is_symlink())


def write_skipped_files(path: Path, skipped: Iterable[Skipped]) -> None:
    """Write path and reason of each file, as a line of JSON in ASCII: no name can reach a terminal unescaped."""
    rows = (json.dumps({"path": file, "reason": reason}) for file, reason in skipped)
    write_text_durably(path, "".join(f"{row}\n" for row in rows))


def read_cache(path: Path, about: dict[str, Any], listing: Listing) -> Decoded | None:
    """Map cached images into memory, read-only; None if no complete cache is of these files and this `about`."""
    try:
        found = json.loads(path.with_suffix(".json").read_text("utf-8"))
        sha256, size_bytes, contents = (found.pop(key) for key in ("sha256", "size_bytes", "contents"))
        unreadable = {int(index): str(reason) for index, reason in found.pop("unreadable")}
        remarks = {text: (int(num), int(first)) for text, (num, first) in found.pop("remarks").items()}
        if found != about or path.stat().st_size != size_bytes:
            return None
        files = np.frombuffer(path.with_suffix(".files").read_bytes(), _FILE).copy()
        if len(files) != len(listing.names):
            return None
        before = files["stat"].copy()
        _hash_changed(files, listing)
        if _contents(files, listing) != contents:
            return None
        pixels = np.delete(files["pixels"], list(unreadable))
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, OverflowError):
        return None  # missing, cut short, overwritten
    size = about["image_size"]
    fits = images.shape == (len(pixels), size, size, about.get("in_channels", 3)) and images.dtype == np.uint8
    if fits:
        # Another process may have replaced the images since the note was read, or its note.
        step = 1 if images.nbytes <= READ_BEFORE_BYTES else -(-len(images) // _COMPARED)
        fits = np.array_equal(pixel_hashes(images[::step]), pixels[::step])
    if not fits or not all(0 <= first < len(files) for _, first in remarks.values()):
        return None
    if (files["stat"] != before).any():
        with suppress(OSError):  # the next start reads the files again
            write_bytes_durably(path.with_suffix(".files"), files.tobytes())
    return Decoded(images, sha256, pixels, unreadable, remarks)


def _hash_changed(files: np.ndarray, listing: Listing) -> None:
    """Read the files again whose size, times or inode have changed."""
    changed = np.flatnonzero((files["stat"] != listing.stats).any(1) | ~listing.stats.any(1))
    if len(changed):
        paths = listing.paths
        with ThreadPoolExecutor() as pool:
            files["content"][changed] = list(pool.map(_content, [paths[index] for index in changed]))
    files["stat"] = listing.stats * files["content"].any(axis=1, keepdims=True)


def _content(path: str) -> np.ndarray:
    try:
        return np.frombuffer(hashlib.sha256(read_file(path)).digest(), np.uint8)
    except (OSError, ValueError):
        return np.zeros(32, np.uint8)


def _contents(files: np.ndarray, listing: Listing) -> str:
    """Return the SHA-256 of the names, contents and decoded images of a split."""
    sha256 = hashlib.sha256(os.fsencode("\0".join(listing.names)))
    sha256.update(files["content"].tobytes())
    sha256.update(files["pixels"].tobytes())
    return sha256.hexdigest()


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
                if time.time() - stale.stat().st_mtime > STALE_S:
                    stale.unlink()
        np.lib.format.open_memmap(str(temporary), "w+", np.uint8, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        return error.errno in (errno.EOPNOTSUPP, errno.EINVAL)  # a file system that cannot allocate may have room
    return True


def drop_rows(path: Path, rows: Sequence[int]) -> None:
    """Remove rows of a `.npy` file in place, since the disk may have no room for a copy."""
    if not rows:
        return
    images = np.load(path, mmap_mode="r+")
    kept = np.delete(np.arange(len(images)), rows)
    for at in range(min(rows), len(kept)):
        images[at] = images[kept[at]]
    offset, shape, row_bytes = images.offset, (len(kept), *images.shape[1:]), images[0].nbytes
    del images
    with path.open("r+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # NumPy leaves room for any number of rows
        assert file.tell() == offset
        file.truncate(offset + len(kept) * row_bytes)


def publish(temporary: Path, path: Path, about: dict[str, Any], decoded: Decoded, files: np.ndarray) -> Decoded:
    """Rename finished images to their final name, so that no reader sees a partial file.

    Returns:
        The same as `read_cache`, of exactly these images, whatever another process has put there since.

    Raises:
        OSError: The folder is no longer writable.
    """
    about = about | {
        "unreadable": list(decoded.unreadable.items()),
        "remarks": decoded.remarks,
        "sha256": decoded.sha256,
        "size_bytes": temporary.stat().st_size,
    }
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    note = path.with_suffix(".json")
    # Without its note an image file is not trusted: a crash before the new note leaves no wrong cache.
    note.unlink(missing_ok=True)
    os.replace(temporary, path)
    write_bytes_durably(path.with_suffix(".files"), files.tobytes())
    write_json(note, about)
    if sys.platform == "win32":
        decoded = decoded._replace(images=np.load(path, mmap_mode="r"))
    elif isinstance(decoded.images, np.memmap):
        decoded.images.filename = os.path.abspath(path)  # where workers that are not forked open it, as on macOS
    return decoded
