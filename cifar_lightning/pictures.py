"""Picture files as uint8 RGB squares: one, or many in parallel straight into an array or a file.

What becomes of a picture (raise `RULES` when this changes: caches depend on it): the first frame; turned as its EXIF
orientation says; transparency laid on white; CMYK, palette, gray and 1 bit as Pillow converts them to RGB; 16-bit gray
by its high byte; 32-bit and floating point refused, since what is white there is not defined. Then the shorter side is
resized to `image_size` (bicubic, antialiased) and the middle square cut out; a square of that size keeps every bit.

Pillow reads, not torchvision: on damaged files `torchvision.io.decode_image` 0.29 can crash the process.
"""

import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cifar_lightning.errors import UserError

RULES = 1  # version of what decode_picture does
MAX_PIXELS = 89_478_485  # of one picture: Pillow's own limit against decompression bombs, 256 MiB as RGB
PROCESSES_FROM = 2_000  # pictures: below, threads are done before worker processes have started
_SAMPLE = 256  # pictures whose headers tell the image size

Decode = Callable[[str, int], np.ndarray]
Unreadable = tuple[int, str]  # index of a picture, and why it cannot be read


def decode_picture(path: str, image_size: int) -> np.ndarray:
    """Reads one picture by the rules at the top of this file.

    Returns:
        uint8 RGB (image_size, image_size, 3), 0-255.

    Raises:
        UserError: The file is damaged, no picture, of an unsupported kind or too large; the message begins with `path`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        with Image.open(BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, the limit is {MAX_PIXELS:,}")
            if picture.format == "PNG":
                _check_png(data)
            picture.draft(None, (2 * image_size, 2 * image_size))  # large JPEGs: decode at 1/2, 1/4 or 1/8
            ImageOps.exif_transpose(picture, in_place=True)
            return np.asarray(_square(_to_rgb(picture), image_size))
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        reason = "no picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{path} cannot be read ({' '.join(reason.split()) or type(error).__name__})") from error


def _check_png(data: bytes) -> None:
    """Checks each chunk's CRC. Pillow skips those of the pixels and would miss 1 % of flipped bytes; its `verify` takes
    ten times as long for small pictures.
    """
    at, kind = 8, b""
    while kind != b"IEND" and at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError("damaged: a checksum is wrong")
        at = end + 4


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        # Pillow's own conversion saturates: all but the darkest 1/256 becomes white.
        gray = np.asarray(picture)
        return Image.fromarray((np.clip(gray, 0, 65_535).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no defined white: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, image_size: int) -> Image.Image:
    scale = image_size / min(picture.size)
    width, height = (max(image_size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return picture.crop((left, top, left + image_size, top + image_size))


@contextmanager
def _without_pillow_warnings() -> Iterator[None]:
    # Of odd EXIF, or of many pixels, which MAX_PIXELS refuses. Around all threads and not in each: filters are global.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def find_image_size(paths: Sequence[str]) -> int:
    """A size for pictures of unknown sizes, from the headers of a sample; see `ClassFolders`."""
    sizes = []
    with _without_pillow_warnings():
        for path in paths[:: -(-len(paths) // _SAMPLE)]:
            try:
                with Image.open(path) as picture:
                    sizes.append(picture.size)
            except Exception:  # reading all pictures reports this one, with all others that cannot be read
                continue
    if not sizes:
        return 32
    if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1] <= 224:
        return sizes[0][0]
    side = statistics.median_low([min(size) for size in sizes])
    return min(max(round(side / 32) * 32, 32), 224)


def decode_all(
    paths: Sequence[str], image_size: int, out: Path | np.ndarray, decode: Decode = decode_picture
) -> list[Unreadable]:
    """Decodes pictures in parallel into `out`, with a progress bar on a terminal's stderr or lines on stdout.

    Args:
        paths: The pictures.
        image_size: Side of the squares in pixels.
        out: uint8 (len(paths), image_size, image_size, 3): an array, or a `.npy` file that is there already. Many
            pictures go to a file by worker processes, everything else by threads.
        decode: What reads one picture; must raise `UserError` for one that cannot be read.

    Returns:
        Index and reason for each picture that cannot be read, by index.

    Raises:
        UserError: A worker process died; names the pictures it may have died of.
    """
    num_workers = min(_num_cores(), 32)
    began = time.monotonic()
    if isinstance(out, Path) and len(paths) >= PROCESSES_FROM and num_workers > 1:
        bad = _decode_in_processes(paths, image_size, out, decode, num_workers)
    else:
        images = np.load(out, mmap_mode="r+") if isinstance(out, Path) else out
        with _without_pillow_warnings(), ThreadPoolExecutor(num_workers) as pool:
            bad = _collect(
                {
                    pool.submit(_decode_chunk, paths[start:stop], start, image_size, images, decode): stop - start
                    for start, stop in _chunks(len(paths), num_workers)
                },
                pool,
            )
    if not Console(stderr=True).is_terminal and len(paths) >= PROCESSES_FROM:
        print(f"Decoded {len(paths):,} pictures in {time.monotonic() - began:.1f} s", flush=True)
    return sorted(bad)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(num: int, num_workers: int) -> list[tuple[int, int]]:
    """Ranges of at most 256 pictures, and at least 8 for each worker so that none waits long for the last."""
    size = max(1, min(256, num // (8 * num_workers)))
    return [(start, min(start + size, num)) for start in range(0, num, size)]


def _decode_chunk(
    paths: Sequence[str],
    start: int,
    image_size: int,
    images: np.ndarray,
    decode: Decode,
    current: Any = None,
) -> list[Unreadable]:
    """Decodes pictures into `images[start:]`; `current` shows other processes which one is in work (1), or done (2)."""
    bad = []
    for index, path in enumerate(paths, start):
        if current is not None:
            current[index] = 1
        try:
            images[index] = decode(path, image_size)
        except UserError as error:
            bad.append((index, str(error)))
        if current is not None:
            current[index] = 2
    return bad


def _collect(chunks: dict[Future[list[Unreadable]], int], pool: Executor) -> list[Unreadable]:
    """Waits for all chunks, moving the progress bar on by their number of pictures."""
    bad: list[Unreadable] = []
    console = Console(stderr=True)
    columns = (TextColumn("Decoding pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=sum(chunks.values()))
            for chunk in as_completed(chunks):
                bad += chunk.result()
                bar.advance(task, chunks[chunk])
    except BaseException:
        pool.shutdown(cancel_futures=True)  # do not decode on after Ctrl-C
        raise
    return bad


def _decode_in_processes(
    paths: Sequence[str], image_size: int, out: Path, decode: Decode, num_workers: int
) -> list[Unreadable]:
    context = multiprocessing.get_context("spawn")  # forking a process that has torch's threads can hang
    current = context.RawArray("b", len(paths))
    with ProcessPoolExecutor(num_workers, context, _start_worker, (str(out), decode, current)) as pool:
        with _without_main():
            chunks = {
                pool.submit(_decode_in_worker, paths[start:stop], start, image_size): stop - start
                for start, stop in _chunks(len(paths), num_workers)
            }
        try:
            return _collect(chunks, pool)
        except BrokenProcessPool as error:
            suspects = [path for path, state in zip(paths, current, strict=True) if state == 1]
            raise UserError(
                f"A process died while decoding {' or '.join(suspects[:3]) or 'pictures'}\n"
                "The picture crashes Pillow, or memory ran out: remove it, or make it smaller."
            ) from error


@contextmanager
def _without_main() -> Iterator[None]:
    """Starts workers without importing the main script again, as joblib does, too.

    A script that has no `if __name__ == "__main__":` would begin to train in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_worker: tuple[np.ndarray, Decode, Any]  # what a worker process writes to and reads with


def _start_worker(out: str, decode: Decode, current: Any) -> None:
    global _worker
    _worker = np.load(out, mmap_mode="r+"), decode, current
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C, too, and ends the workers in order
    warnings.simplefilter("ignore")
    parent = multiprocessing.parent_process()
    if parent is not None:  # a worker must not outlive a parent that was killed

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _decode_in_worker(paths: Sequence[str], start: int, image_size: int) -> list[Unreadable]:
    images, decode, current = _worker
    return _decode_chunk(paths, start, image_size, images, decode, current)
