"""The command `shard`: class folders as shards, written in parallel; shards.py says what is in them."""

import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cifar_lightning.data import image_decoding
from cifar_lightning.data.image_decoding import (
    CONSTANT,
    RULES,
    Resize,
    counted_remarks,
    decode_image,
    read_file,
    remark_lines,
    take_c_messages,
)
from cifar_lightning.data.image_folder import ClassFolders, Listing, write_skipped_files
from cifar_lightning.data.image_set import is_constant, pixel_hashes
from cifar_lightning.data.memory import usable_cpus
from cifar_lightning.data.progress import progress
from cifar_lightning.data.shards import INDEX, ShardsIndex, SplitIndex, is_unfinished
from cifar_lightning.data.statistics import moments
from cifar_lightning.errors import UserError
from cifar_lightning.files import file_sha256, make_folder, remove_empty, sync_folder, write_json
from cifar_lightning.formatting import plural, reason_of

SKIPPED = "skipped_files.jsonl"
SHARD_BYTES = 64 << 20  # about: litdata's own default
_SAMPLE = 256  # files by which the number of images of a shard is chosen
_ORDER_SEED = 0


@dataclass
class Written:
    """A shard that was written, and what `images.npz` has of its images: arrays of one row each."""

    chunk: dict[str, Any]  # its line in litdata's index; empty where no image can be read
    config: dict[str, Any]
    kept: list[int]  # places, among those given, of the images that can be read
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # place among those given, and reason
    remarks: list[tuple[int, str]] = field(default_factory=list)
    is_jpeg: list[bool] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    brightest: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0, "<u8"))
    moments: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    contents: bytes = b""  # SHA-256 of each file


def write_shards(folders: ClassFolders, output: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write the images of class folders as shards; return lines for the terminal.

    Training images are shuffled once, so that each shard is a sample of all classes; the others keep their order.

    Args:
        folders: The images; `skip_unreadable` leaves out those that cannot be read, which `SKIPPED` then lists.
        output: A folder that is missing or empty.
        shard_bytes: Size of a shard, about.

    Raises:
        UserError: litdata is missing, the output exists or cannot be written, or images cannot be read. What was
            written is removed.
    """
    try:
        import litdata  # noqa: F401 - takes seconds, and the workers need it
    except ImportError as error:
        raise UserError(f"shard needs litdata ({reason_of(error)}); pip install 'cifar-lightning[shards]'") from error
    if re.match("[a-z][a-z0-9]+:/", os.fspath(output)):  # a Path has made one slash of two
        raise UserError(f"--output {output}: a folder; copy it into a bucket afterwards, as with `aws s3 sync`.")
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        what = f"a set without {INDEX}, whose `shard` was killed or still runs" if is_unfinished(output) else "exists"
        raise UserError(f"--output {output}: {what}; name a new folder, or delete this one.")
    made: list[Path] = []
    try:
        made = make_folder(output)
        listings = folders.all_listings  # those that `leave_out` indexes
        shards = {
            split: _write_split(folders, listing, output / split, shard_bytes) for split, listing in listings.items()
        }
        for split, (parts, written) in shards.items():
            folders.leave_out(split, _unreadable(parts, written))
        folders.refuse_unreadable()
        splits = {split: _finish_split(listing, output / split, *shards[split]) for split, listing in listings.items()}
        if folders.skipped_files:
            write_skipped_files(output / SKIPPED, folders.skipped_files)
        index = ShardsIndex(
            version=1,
            rules=RULES,
            class_names=list(folders.class_names),
            image_size=folders.image_size,
            in_channels=3 if folders.in_channels == 3 else 1,
            resize=folders.resize,
            splits={split: about for split, (about, _) in splits.items()},
        )
        index.sha256 = index.content_sha256()
        write_json(output / INDEX, index.model_dump())  # last: without it nothing reads the shards
    except BaseException as error:
        for path in output.iterdir() if output.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        remove_empty(made)
        if isinstance(error, OSError):
            raise UserError(f"--output {output}: cannot be written ({error.strerror}).") from error
        raise
    return [*folders.folder_remarks(), *(line for _, lines in splits.values() for line in lines)]


def _write_split(
    folders: ClassFolders, listing: Listing, folder: Path, shard_bytes: int
) -> tuple[list[np.ndarray], list[Written]]:
    """Write the shards of a split; return the indices of the images of each, and what was written."""
    make_folder(folder)
    num = len(listing.names)
    order = np.random.default_rng(_ORDER_SEED).permutation(num) if folder.name == "train" else np.arange(num)
    per_shard = _images_per_shard(listing.paths, folders.image_size, folders.in_channels, shard_bytes)
    parts = [order[start : start + per_shard] for start in range(0, num, per_shard)]
    return parts, _write_parts(folders, listing, parts, folder)


def _unreadable(parts: Sequence[np.ndarray], written: Sequence[Written]) -> dict[int, str]:
    """Return the reasons of the images that cannot be read, by their indices in the listing."""
    pairs = zip(parts, written, strict=True)
    return dict(sorted((int(part[at]), reason) for part, each in pairs for at, reason in each.unreadable))


def _finish_split(
    listing: Listing, folder: Path, parts: Sequence[np.ndarray], written: list[Written]
) -> tuple[SplitIndex, list[str]]:
    """Write what is known of a split's images next to its shards; return its line of the index, and lines to print."""
    split = folder.name
    kept = np.concatenate([part[each.kept] for part, each in zip(parts, written, strict=True)])
    unusual = [(int(part[at]), text) for part, each in zip(parts, written, strict=True) for at, text in each.remarks]
    remarks = remark_lines(counted_remarks(unusual), listing.paths)
    written = [each for each in written if each.kept]
    if split == "train":  # as `ClassFolders` remarks
        paths, brightest = listing.paths, np.concatenate([each.brightest for each in written])
        if dark := image_decoding.dark_16_bit_remark([paths[at] for at in kept.tolist()], brightest):
            remarks.append(f"warning: {listing.folder}: {dark}")
    chunks, table = [each.chunk for each in written], _table(listing, kept, written)
    write_json(folder / "index.json", {"chunks": chunks, "config": written[0].config, "updated_at": "0"})
    with (folder / "images.npz").open("wb") as file:
        np.savez(file, **table)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    sha256 = hashlib.sha256(table["names"].tobytes() + table["pixels"].tobytes())
    sha256.update(b"".join(each.contents for each in written))
    sha256.update(table["targets"].astype("<i8").tobytes())
    about = SplitIndex(
        num_images=len(kept),
        sha256=sha256.hexdigest(),
        files={"index.json": file_sha256(folder / "index.json"), "images.npz": file_sha256(folder / "images.npz")},
    )
    size_mb, jpegs = sum(chunk["chunk_bytes"] for chunk in chunks) / 1e6, int(table["is_jpeg"].sum())
    lines = [f"{split}: {len(kept):,} images ({jpegs:,} as JPEG) in {plural(len(chunks), 'shard')}, {size_mb:,.1f} MB"]
    return about, lines + remarks


def _table(listing: Listing, kept: np.ndarray, written: Sequence[Written]) -> dict[str, Any]:
    """Return the columns of `images.npz`."""
    names = [os.fsencode(f"{listing.within}{listing.names[at]}".replace(os.sep, "/")) for at in kept.tolist()]
    return {
        "targets": listing.targets[kept],
        "names": np.frombuffer(b"".join(name + b"\0" for name in names), np.uint8),
        "is_jpeg": np.concatenate([each.is_jpeg for each in written]).astype(bool),
        "checksums": np.concatenate([each.checksums for each in written]).astype(np.uint32),
        "pixels": np.concatenate([each.pixels for each in written]),
        "moments": np.concatenate([each.moments for each in written]),
    }


def _images_per_shard(paths: Sequence[str], image_size: int, in_channels: int, shard_bytes: int) -> int:
    square = image_size * image_size * in_channels
    sizes = []
    for path in paths[:: -(-len(paths) // _SAMPLE)]:
        is_jpeg = path.lower().endswith((".jpg", ".jpeg")) and os.path.exists(path)
        sizes.append(max(square, os.path.getsize(path)) if is_jpeg else square)
    return max(1, int(shard_bytes / np.mean(sizes)))


def _write_parts(folders: ClassFolders, listing: Listing, parts: Sequence[np.ndarray], folder: Path) -> list[Written]:
    """Write each part of the images as a shard, with a process for each core."""
    paths, targets, done = listing.paths, listing.targets, 0
    with image_decoding.worker_pool(min(usable_cpus(), 32, len(parts))) as pool:
        tasks = {
            pool.submit(
                write_shard,
                [paths[at] for at in part],
                targets[part].tolist(),
                (str(folder), number),
                (folders.image_size, folders.resize, folders.in_channels),
            ): part
            for number, part in enumerate(parts)
        }
        try:
            with progress(len(paths), "Writing shards") as show:
                for task in as_completed(tasks):
                    task.result()
                    done += len(tasks[task])
                    show(done)
        except BrokenProcessPool as error:
            raise UserError(
                f"A process died while it wrote shards of {listing.folder}.\nAn image crashes Pillow, which `inspect` "
                "names, or memory ran out."
            ) from error
        return [task.result() for task in tasks]


def write_shard(
    paths: Sequence[str], targets: Sequence[int], place: tuple[str, int], decoding: tuple[int, Resize, int]
) -> Written:
    """Write images as one shard, in a worker process.

    Args:
        paths: Their files.
        targets: Their classes.
        place: Folder and number of the shard.
        decoding: Image size, resize and channels.
    """
    from litdata.streaming.writer import BinaryWriter

    (folder, number), (image_size, resize, in_channels) = place, decoding
    writer = BinaryWriter(folder, chunk_size=len(paths), chunk_index=number)
    shard, squares, contents = Written({}, {}, []), [], []
    for at, (path, target) in enumerate(zip(paths, targets, strict=True)):
        unusual: list[str] = []
        read = cache(read_file)
        try:
            square = decode_image(path, image_size, unusual, read, resize=resize, in_channels=in_channels)
        except UserError as error:
            shard.unreadable.append((at, str(error).removeprefix(f"{path} ")))
            continue
        if message := take_c_messages():
            shard.unreadable.append((at, f"cannot be read ({message})"))
            continue
        data = read(path)
        is_jpeg = _is_large_jpeg(data, image_size)
        stored = data if is_jpeg else square.tobytes()
        writer.add_item(len(shard.kept), {"image": stored, "label": target})
        shard.kept.append(at)
        shard.remarks += [(at, text) for text in unusual]
        shard.is_jpeg.append(is_jpeg)
        shard.checksums.append(zlib.crc32(stored))
        squares.append(square)
        contents.append(hashlib.sha256(data).digest())
    if not shard.kept:
        return shard
    images = np.stack(squares)
    shard.pixels, shard.moments, shard.contents = pixel_hashes(images), moments(images), b"".join(contents)
    shard.brightest = images.max(axis=(1, 2, 3))
    constant = np.flatnonzero(is_constant(images)).tolist()
    shard.remarks += [(shard.kept[at], CONSTANT) for at in constant]
    path = writer.write_chunk(on_done=True)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    shard.chunk, shard.config = writer._chunks_info[-1], writer.get_config()  # litdata 0.2.76 has no public name for it
    return shard


def _is_large_jpeg(data: bytes, image_size: int) -> bool:
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    with Image.open(BytesIO(data)) as image:  # only its header is read
        return min(image.size) > image_size
