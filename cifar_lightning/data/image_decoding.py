"""Decode image files to uint8 RGB squares: one file, or many in parallel into an array or a file.

The rules (raise `RULES` when they change: caches depend on it):

- the first frame of a file is used, rotated as its EXIF orientation says;
- transparency is composited on white; CMYK, palette, gray and 1-bit images are converted to RGB by Pillow;
- 16-bit gray keeps its high byte; 32-bit and floating-point images are refused, since their white is not defined;
- the shorter side is resized to `image_size` (bicubic, antialiased) and the centre square cropped. A square image of
  that size keeps every bit.

Image files are untrusted. Pillow decodes them and not torchvision: `torchvision.io.decode_image` 0.29 can crash the
process on damaged files. Pillow's decoders are C code, too, so they only run in worker processes, also for one image
(0.2 s until the first worker is ready, in commands that take seconds to import torch): a crash ends a worker, not the
program, and the error names the image. The main process only reads headers, and only of formats whose header Pillow
reads in Python. Images of more than `MAX_PIXELS` are refused before a pixel is decoded.
"""

import multiprocessing
import os
import signal
import stat
import statistics
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_lightning.data.memory import usable_cpus
from cifar_lightning.data.progress import progress
from cifar_lightning.errors import UserError

RULES = 1  # version of what decode_image does
MAX_PIXELS = 89_478_485  # of one image: Pillow's own limit against decompression bombs, 256 MiB as RGB
MAX_BYTES = 1 << 30  # of one file: MAX_PIXELS of 16-bit RGBA, uncompressed, are 0.7 GB
# Pillow passes these files to other programs: EPS to Ghostscript, WMF to the drawing calls of Windows.
REFUSED_FORMATS = frozenset({"EPS", "WMF"})
# Formats whose header Pillow reads in Python. For WebP and AVIF it calls C code, and an ICO it decodes at once.
_HEADER_IN_PYTHON = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM")
_IMAGES_PER_WORKER = 100  # at least: decoding them takes as long as starting a worker
_CHUNK_BYTES = 1 << 26  # of decoded images, the most that a worker sends back at once
_LOGGED_FROM = 2_000  # images: fewer are not worth a line in a log
_SAMPLE = 256  # images whose headers decide the image size

Decode = Callable[[str, int], np.ndarray]
Unreadable = tuple[int, str]  # index of an image, and why it cannot be read


def decode_image(path: str, image_size: int) -> np.ndarray:
    """Decode one image by the rules at the top of this file.

    Returns:
        uint8 RGB (image_size, image_size, 3), 0-255.

    Raises:
        UserError: The file is damaged, not an image, unsupported or too large; the message starts with `path`.
    """
    try:
        data = _read(path)
        with Image.open(BytesIO(data)) as image:
            _check_header(image)
            if image.format == "PNG":
                _check_png(data)
            image.draft(None, (2 * image_size, 2 * image_size))  # large JPEGs: decode at 1/2, 1/4 or 1/8
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_square(_to_rgb(image), image_size))
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        reason = "not an image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{path} cannot be read ({' '.join(reason.split()) or type(error).__name__})") from error


def _check_file(path: str) -> None:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe or a device may never end
        raise ValueError("not a regular file")
    if about.st_size > MAX_BYTES:
        raise ValueError(f"{about.st_size:,} bytes, the limit is {MAX_BYTES:,}")


def _read(path: str) -> bytes:
    _check_file(path)
    with open(path, "rb") as file:
        return file.read()


def _check_header(image: Image.Image) -> None:
    if image.format in REFUSED_FORMATS:
        raise ValueError(f"{image.format} is a program that draws, not an image: save it as PNG")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}")


def _check_png(data: bytes) -> None:
    """Check the CRC of each chunk.

    Pillow does not check those of the pixels and misses 1 % of flipped bytes; its `verify` takes ten times as long for
    small images.
    """
    at, kind = 8, b""
    while kind != b"IEND" and at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError("damaged: a checksum is wrong")
        at = end + 4


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion saturates: all but the darkest 1/256 becomes white.
        gray = np.asarray(image)
        return Image.fromarray((np.clip(gray, 0, 65_535).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel have no defined white: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, image_size: int) -> Image.Image:
    scale = image_size / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def find_image_size(paths: Sequence[str]) -> int:
    """Return an `image_size` that suits the images, from the headers of a sample; `ClassFolders` states the rule."""
    sample = list(paths[:: -(-len(paths) // _SAMPLE)])
    with warnings.catch_warnings():
        _set_pillow_warnings()
        sizes = {path: _header_size(path, _HEADER_IN_PYTHON) for path in sample}
    unknown = [path for path in sample if sizes[path] is None]
    if unknown:
        with suppress(BrokenProcessPool), _workers(1) as pool:  # decoding all images will name the one that crashes it
            sizes |= zip(unknown, pool.map(_header_size, unknown, chunksize=_SAMPLE), strict=True)
    known = [size for size in sizes.values() if size is not None]
    if not known:
        return 32
    if len(set(known)) == 1 and known[0][0] == known[0][1] <= 224:
        return known[0][0]
    side = statistics.median_low([min(size) for size in known])
    return min(max(round(side / 32) * 32, 32), 224)


def _header_size(path: str, formats: tuple[str, ...] | None = None) -> tuple[int, int] | None:
    """Return width and height; None for a file that cannot be read, which `decode_all` reports."""
    with suppress(Exception):
        _check_file(path)
        with Image.open(path, formats=formats) as image:
            _check_header(image)
            return image.size
    return None


def is_16_bit(path: str) -> bool:
    """Return whether an image has 16 bits per channel; False also where Pillow does not read its header in Python."""
    try:
        _check_file(path)
        with warnings.catch_warnings(), Image.open(path, formats=_HEADER_IN_PYTHON) as image:
            _set_pillow_warnings()
            # Pillow keeps the high bytes of 16-bit colours; only its raw mode ("RGB;16B") shows them.
            return image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in image.tile)
    except Exception:  # damaged headers make Pillow raise nearly anything; decoding reports them
        return False


def _set_pillow_warnings() -> None:
    """Ignore Pillow's warnings, of odd EXIF data for example, but turn those of decompression bombs into errors."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


# -- many images ------------------------------------------------------------------------------------------------


def decode_all(
    paths: Sequence[str], image_size: int, out: Path | np.ndarray, decode: Decode = decode_image
) -> list[Unreadable]:
    """Decode images in worker processes into `out`, with a progress bar on a terminal's stderr or a line on stdout.

    Args:
        paths: Files to decode.
        image_size: Height and width in pixels.
        out: uint8 (len(paths), image_size, image_size, 3): an array, or an existing `.npy` file.
        decode: Decodes one image, or raises `UserError` if it cannot. Workers import it by name.

    Returns:
        Index and reason for each image that cannot be read, sorted by index.

    Raises:
        UserError: A worker process died. The message names the images that it was decoding.
    """
    num_workers = max(1, min(usable_cpus(), 32, len(paths) // _IMAGES_PER_WORKER))
    began = time.monotonic()
    states = multiprocessing.RawArray("b", max(1, len(paths)))
    file = str(out) if isinstance(out, Path) else None
    with _workers(num_workers, _set_work, file, decode, states) as pool:
        chunks = {
            pool.submit(_decode_chunk, paths[start:stop], start, image_size): (start, stop)
            for start, stop in _chunks(len(paths), num_workers, 3 * image_size**2)
        }
        try:
            bad = _collect(chunks, pool, None if isinstance(out, Path) else out)
        except BrokenProcessPool as error:
            suspects = [path for path, state in zip(paths, states, strict=False) if state == 1]
            raise UserError(
                f"A process died while decoding {' or '.join(suspects[:3]) or 'images'}\n"
                "The image crashes Pillow, or memory ran out: remove it, or make it smaller."
            ) from error
    if len(paths) >= _LOGGED_FROM and not sys.stderr.isatty():
        print(f"Decoded {len(paths):,} images in {time.monotonic() - began:.1f} s", flush=True)
    return sorted(bad)


def _chunks(num: int, num_workers: int, image_bytes: int) -> list[tuple[int, int]]:
    """Return ranges of at most 256 images, and at least 8 ranges per worker so that none waits long for the last."""
    size = max(1, min(256, num // (8 * num_workers), _CHUNK_BYTES // image_bytes))
    return [(start, min(start + size, num)) for start in range(0, num, size)]


Chunk = tuple[list[Unreadable], np.ndarray | None]  # the unreadable images; the decoded ones unless in a file


def _collect(chunks: dict[Future[Chunk], tuple[int, int]], pool: Executor, out: np.ndarray | None) -> list[Unreadable]:
    bad: list[Unreadable] = []
    done = 0
    try:
        with progress(sum(stop - start for start, stop in chunks.values()), "Decoding images") as show:
            for chunk in as_completed(chunks):
                (start, stop), (unreadable, images) = chunks[chunk], chunk.result()
                bad += unreadable
                if out is not None:
                    out[start:stop] = images
                done += stop - start
                show(done)
    except BaseException:
        pool.shutdown(cancel_futures=True)  # do not decode on after Ctrl-C
        raise
    return bad


# -- worker processes ---------------------------------------------------------------------------------------------


@contextmanager
def _workers(num: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of processes that end with this one and ignore Ctrl-C."""
    context = multiprocessing.get_context("spawn")  # forking a process that has torch's threads can hang
    with _without_main(), ProcessPoolExecutor(num, context, _start_worker, (prepare, arguments)) as pool:
        yield pool


@contextmanager
def _without_main() -> Iterator[None]:
    """Start workers without importing the main script again, as joblib does.

    A script without `if __name__ == "__main__":` would start training in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C as well and shuts the workers down
    _set_pillow_warnings()
    parent = multiprocessing.parent_process()
    if parent is not None:  # a worker must not outlive a parent that was killed

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


_work: tuple[np.ndarray | None, Decode, Any]  # of a worker: the array to write to, the decoder, the shared states


def _set_work(file: str | None, decode: Decode, states: Any) -> None:
    global _work
    _work = None if file is None else np.load(file, mmap_mode="r+"), decode, states


def _decode_chunk(paths: Sequence[str], start: int, image_size: int) -> Chunk:
    """Decode images into the file or return them; set the state of each: 1 is in progress, 2 is done."""
    images, decode, states = _work
    own = np.zeros((len(paths), image_size, image_size, 3), np.uint8) if images is None else None
    into: Any = own if images is None else images[start : start + len(paths)]
    bad = []
    for at, path in enumerate(paths):
        states[start + at] = 1
        try:
            into[at] = decode(path, image_size)
        except UserError as error:
            bad.append((start + at, str(error)))
        states[start + at] = 2
    return bad, own
