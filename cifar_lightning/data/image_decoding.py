"""Decode image files to uint8 squares, RGB or gray: one file, or many in parallel into an array or a file.

The rules (raise `RULES` when they change: caches depend on it):

- the first frame of a file is used, rotated as its EXIF or XMP orientation says; no other metadata matters, and broken
  metadata is ignored;
- the shorter side is resized to `image_size` (bicubic, antialiased) and the centre square cropped, on the grid of the
  image's original size also where a large JPEG is decoded at 1/2, 1/4 or 1/8. Only the part that the square needs is
  converted and resized, so that memory is bounded by the file's pixels and `image_size`. A square image of that size
  keeps every bit. Images of up to 4:1 are resized and then cropped, longer ones cropped first. Cropping all of them
  first would change the results of earlier runs: Pillow rounds between its two passes, whose order depends on the size;
  the difference is at most 22 of 255 in noise, 0.4 on average;
- that is `resize="crop"`. "pad" resizes the longer side and centres the image on black, as torchvision's `Pad` fills;
  "squash" resizes both sides to `image_size`;
- with `in_channels=1` the finished square is converted to gray: the luma of ITU-R 601, Pillow's mode "L";
- transparency is composited on white, unless alpha is 0 everywhere: it is then unused and the colours count; CMYK,
  palette, gray and 1-bit images are converted to RGB by Pillow;
- 16-bit and 12-bit gray keep their high byte; images of signed samples, of 32 bits and of floating point are refused,
  since their white is not defined.

Image files are untrusted. Pillow decodes them and not torchvision: `torchvision.io.decode_image` 0.29 can crash the
process on damaged files. Pillow's decoders are C code, too, so they only run in worker processes, also for one image
(0.2 s until the first worker is ready, in commands that take seconds to import torch): a crash ends a worker, not the
program, and the error names the image. The main process only reads headers, and only of formats whose header Pillow
reads in Python. Images of more than `MAX_PIXELS` are refused before a pixel is decoded.
"""

import functools
import hashlib
import logging
import math
import multiprocessing
import os
import signal
import stat
import statistics
import sys
import tempfile
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from cifar_lightning.data.image_set import is_constant, pixel_hashes
from cifar_lightning.data.memory import usable_cpus
from cifar_lightning.data.progress import progress
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import plural, printable

RULES = 2  # version of what decode_image does
MAX_PIXELS = 89_478_485  # of one image: Pillow's own limit against decompression bombs, 256 MiB as RGB
MAX_BYTES = 1 << 30  # of one file: MAX_PIXELS of 16-bit RGBA, uncompressed, are 0.7 GB
# Pillow passes EPS to Ghostscript and WMF to the drawing calls of Windows. The others hold a file of any format, also
# EPS, which Pillow opens by itself.
REFUSED_FORMATS = {
    "EPS": "a program that draws",
    "WMF": "a program that draws",
    "IPTC": "another file inside",
    "FPX": "other files inside",
    "MIC": "other files inside",
}
# Formats whose header Pillow reads in Python. For WebP and AVIF it calls C code, and an ICO it decodes at once.
_HEADER_IN_PYTHON = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM")
_IMAGES_PER_WORKER = 100  # at least: decoding them takes as long as starting a worker
_CHUNK_BYTES = 1 << 26  # of decoded images, the most that a worker sends back at once
_LOGGED_FROM = 2_000  # images: fewer are not worth a line in a log
_SAMPLE = 256  # images whose headers decide the image size, or that are checked for being nearly black
_NEARLY_BLACK = 20  # of 255: 12-bit values of 65,535 reach 15, and resizing may add a little
_MAX_ASPECT = 4  # of an image that is resized whole
_STRIP_PIXELS = 1 << 22  # converted to RGB at once: 16 MiB
# Formats whose 16-bit gray is unsigned and has white at 65,535 in Pillow; that of FITS is signed, for example.
_GRAY_16 = frozenset({"PNG", "TIFF", "PPM", "JPEG2000"})
_FLIPS_X, _FLIPS_Y = frozenset({2, 3, 7, 8}), frozenset({3, 4, 6, 7})  # EXIF orientations, by axis of the file
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TEXT_BYTES = 1 << 20  # of a text in a PNG: Pillow's limit
_MESSAGE_BYTES = 500  # of the messages of C libraries about an image
_UNUSED_ALPHA = "have alpha 0 everywhere; their colours are used"
CONSTANT = "have one colour in all of the decoded square"

_HEIC = (b"ftypheic", b"ftypheix")  # brands of its files
Resize = Literal["crop", "pad", "squash"]
Read = Callable[[str], bytes]
Decode = Callable[[str, int, list[str], Read], np.ndarray]
Unreadable = tuple[int, str]  # index of an image, and why it cannot be read
Remarks = dict[str, tuple[int, int]]  # what is unusual: number of images, and the index of the first

logging.getLogger("PIL").addHandler(logging.NullHandler())  # Python prints errors without a handler to stderr


def read_file(path: str) -> bytes:
    """Return the content of a regular file; a `ValueError` says that it is none, or too large."""
    _check_file(path)
    with open(path, "rb") as file:
        return file.read()


def decode_image(
    path: str,
    image_size: int,
    remarks: list[str] | None = None,
    read: Read = read_file,
    *,
    resize: Resize = "crop",
    in_channels: int = 3,
) -> np.ndarray:
    """Decode one image by the rules at the top of this file, to uint8 (image_size, image_size, in_channels).

    `remarks` receives what is unusual about the image; `read` reads the file.

    Raises:
        UserError: The file is damaged, not an image, unsupported or too large; the message starts with `path`.
    """
    try:
        with open_image(read(path)) as image:
            return square_of(image, image_size, resize, in_channels, remarks, may_reduce=True)
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        reason = (isinstance(error, OSError) and error.strerror) or str(error)  # without the path a second time
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image format that Pillow knows"
        raise UserError(f"{path} cannot be read ({' '.join(reason.split()) or type(error).__name__})") from error


def square_of(
    image: Image.Image,
    image_size: int,
    resize: Resize,
    in_channels: int = 3,
    remarks: list[str] | None = None,
    *,
    may_reduce: bool = False,
) -> np.ndarray:
    """Return a Pillow image by the rules at the top of this file, as uint8 (image_size, image_size, in_channels).

    `remarks` receives what is unusual about the image; with `may_reduce` a large JPEG is decoded at 1/2, 1/4 or 1/8,
    and `image` stays at that size.

    Raises:
        ValueError: Samples whose white is not defined.
    """
    to_rgb = _conversion(image)
    original = image.size
    draft = image.draft(None, (2 * image_size, 2 * image_size)) if may_reduce else None
    reduction = original[0] / draft[1][2] if draft else 1.0
    image.load()
    if _has_unused_alpha(image):
        to_rgb = _colours
        if remarks is not None:
            remarks.append(_UNUSED_ALPHA)
    size = original if draft else image.size  # TIFF: load turns the image
    square = _square(image, size, reduction, image_size, to_rgb, resize)
    return np.asarray(square) if in_channels == 3 else np.asarray(square.convert("L"))[:, :, None]


def open_image(file: bytes | str | os.PathLike[str]) -> Image.Image:
    """Return an image file, by its content or path, as a Pillow image that is not decoded yet; may raise anything."""
    _refuse_formats()
    data = file if isinstance(file, bytes) else read_file(os.fspath(file))
    if not data:
        raise ValueError("an empty file")
    if data[4:12] in _HEIC and ".heic" not in Image.registered_extensions():  # as pillow-heif registers it
        raise ValueError("HEIC, which Pillow does not know: convert it to JPEG")
    image = Image.open(BytesIO(_checked_png(data) if data.startswith(b"\x89PNG") else data))
    _check_header(image)
    return image


@functools.cache
def _refuse_formats() -> None:
    """Replace Pillow's readers of `REFUSED_FORMATS` in this process, so that nested files cannot reach them either."""
    Image.init()
    for name, reason in REFUSED_FORMATS.items():
        if name in Image.OPEN:
            Image.OPEN[name] = functools.partial(_refuse, name, reason, Image.OPEN[name][0]), Image.OPEN[name][1]


def _refuse(name: str, reason: str, read_header: Callable[..., Any], *arguments: Any) -> ImageFile:
    read_header(*arguments)  # raises SyntaxError for a file of another format
    raise ValueError(f"{name} is {reason}, not an image: save it as PNG")


def _check_file(path: str) -> None:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe or a device may never end
        raise ValueError("not a regular file")
    if about.st_size > MAX_BYTES:
        raise ValueError(f"{about.st_size:,} bytes, the limit is {MAX_BYTES:,}")


def _check_header(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}")


def _checked_png(data: bytes) -> bytes:
    """Check the CRC of each chunk; leave out the chunks that do not matter.

    Pillow does not check those of the pixels and misses 1 % of flipped bytes; its `verify` takes ten times as long for
    small images. It refuses images for large texts and colour profiles, which are not read here.
    """
    at, kind = 8, b""
    kept = [data[:8]]
    while kind != b"IEND" and at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError("damaged: a checksum is wrong")
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") or _is_orientation_text(data[at + 4 : end]):
            kept.append(data[at : end + 4])
        at = end + 4
    return data if sum(map(len, kept)) == len(data) else b"".join(kept)


def _is_orientation_text(chunk: bytes) -> bool:
    """Return whether a chunk is XMP, or the text in which ImageMagick saves EXIF data, of a size that Pillow reads."""
    if chunk.startswith((b"iTXtXML:com.adobe.xmp\0\0", b"tEXtRaw profile type exif\0")):
        return len(chunk) <= _TEXT_BYTES
    if chunk.startswith(b"zTXtRaw profile type exif\0"):
        with suppress(zlib.error):
            inflate = zlib.decompressobj()
            inflate.decompress(chunk[chunk.index(b"\0") + 2 :], _TEXT_BYTES)
            return not inflate.unconsumed_tail
    return False


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return the conversion to RGB of an image, or of a piece of it; a Dataset may have loaded it already.

    A `ValueError` says that Pillow does not read the samples correctly, or that their white is not defined.
    """
    tiles: Any = getattr(image, "tile", None)
    raw_mode = str(tiles[0][3]) if tiles else ""  # lost by loading
    tags: Any = getattr(image, "tag_v2", {})
    is_signed = image.format == "TIFF" and 2 in tags.get(SAMPLEFORMAT, ())
    is_gray_16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if is_signed or (image.mode in ("I", "F") and not is_gray_16):
        raise ValueError("signed samples and 32 bits per pixel have no defined white: save it with 8 or 16 bits")
    if is_gray_16:
        if image.format not in _GRAY_16:
            raise ValueError(f"16-bit gray of {image.format} has no defined white: save it as PNG")
        return functools.partial(
            _high_byte,
            shift=4 if "I;12" in raw_mode or (image.format == "TIFF" and tags.get(BITSPERSAMPLE) == (12,)) else 8,
            inverted=image.format == "TIFF" and tags.get(PHOTOMETRIC_INTERPRETATION) == 0,
            transparent=image.info.get("transparency"),
        )
    if image.format == "PNG" and "transparency" in image.info:
        transparent = image.info["transparency"]
        # Loading loses the depth of RGB: a colour of 16 bits is only known as such above 255.
        if "16" in raw_mode or (image.mode == "RGB" and not tiles and max(transparent) > 255):
            raise ValueError("a transparent colour of 16 bits is not supported: save it with an alpha channel")
        if image.mode in ("1", "L"):
            # Pillow keeps the value as it is in the file but scales those of the pixels to 0-255.
            levels = {"1": 1, "L;2": 3, "L;4": 15}.get(raw_mode) or _levels(image, transparent)
            return functools.partial(_gray_on_white, transparent=transparent * 255 // levels)
    return _on_white


def _levels(image: Image.Image, transparent: int) -> int:
    """Return the largest value in the file of a gray image, by its pixels if it is loaded."""
    if image.mode == "1":
        return 1
    if getattr(image, "tile", None):  # not loaded: its raw mode has said it
        return 255
    values = [value for value, num in enumerate(image.histogram()) if num]
    for most in (3, 15):
        if transparent <= most and all(value % (255 // most) == 0 for value in values):
            return most
    return 255


def _high_byte(image: Image.Image, shift: int, inverted: bool, transparent: int | None) -> Image.Image:
    """Convert 16-bit gray; Pillow's own conversion saturates: all but the darkest 1/256 becomes white."""
    values = np.clip(np.asarray(image), 0, 65_535).astype(np.uint16)
    high = (values >> shift).astype(np.uint8)
    if inverted:
        high = ~high
    if transparent is not None:
        high[values == transparent] = 255
    return Image.fromarray(high).convert("RGB")


def _gray_on_white(image: Image.Image, transparent: int) -> Image.Image:
    return image.convert("L").point([255 if value == transparent else value for value in range(256)]).convert("RGB")


def _colours(image: Image.Image) -> Image.Image:
    return _rgba(image).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    rgba = _rgba(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied gray, which Pillow only converts to LA
        image = image.convert("LA")
    return image.convert("RGBA")


def _has_unused_alpha(image: Image.Image) -> bool:
    if not image.mode.endswith(("A", "a")) or image.mode == "PA":
        return False
    return image.getbbox(alpha_only=True) is None


def _square(
    image: Image.Image,
    original: tuple[int, int],
    reduction: float,
    image_size: int,
    to_rgb: Callable[[Image.Image], Image.Image],
    resize: Resize,
) -> Image.Image:
    """Resize a loaded image, or its centre square, and turn it upright.

    `original` is width and height in the file; `image` may be smaller, by `reduction`. `to_rgb` converts a piece to
    RGB.
    """
    orientation = exif_orientation(image)
    if image.size == (image_size, image_size):  # 15 of 200 us faster
        square = to_rgb(image)
        return square.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else square
    if resize != "crop":
        scale = image_size / max(original)
        wanted = [max(1, round(side * scale)) if resize == "pad" else image_size for side in original]
        box = [min(side / reduction, available) for side, available in zip(original, image.size, strict=True)]
        whole = _resized(_in_strips(image, to_rgb), (wanted[0], wanted[1]), (0, 0, box[0], box[1]))
        whole = whole.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else whole
        square = Image.new("RGB", (image_size, image_size))
        square.paste(whole, ((image_size - whole.width) // 2, (image_size - whole.height) // 2))
        return square
    scale = image_size / min(original)
    axes = []
    for side, available, flipping in zip(original, image.size, (_FLIPS_X, _FLIPS_Y), strict=True):
        resized = max(image_size, round(side * scale))
        offset = (resized - image_size) // 2
        if orientation in flipping:
            offset = resized - image_size - offset
        # Cut before resizing where the resized image would be long, otherwise after it: the order of Pillow's two
        # passes, and with it the last bit, depends on the size of the result.
        before, length = (offset, image_size) if resized > _MAX_ASPECT * image_size else (0, resized)
        start = before * side / resized / reduction
        stop = min((before + length) * side / resized / reduction, available)
        margin = 2 * max(1.0, (stop - start) / length) + 1  # what a bicubic filter reaches
        first, last = max(0, math.floor(start - margin)), min(available, math.ceil(stop + margin))
        axes.append((first, last, start - first, stop - first, length, offset - before))
    (left, right, x, x_end, width, x_cut), (top, bottom, y, y_end, height, y_cut) = axes
    if (left, top, right, bottom) != (0, 0, *image.size):
        image = image.crop((left, top, right, bottom))
    resized_image = _in_strips(image, to_rgb).resize((width, height), Image.Resampling.BICUBIC, (x, y, x_end, y_end))
    square = resized_image.crop((x_cut, y_cut, x_cut + image_size, y_cut + image_size))
    return square.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else square


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """Resize `box` of an image to a size, in memory of at most the larger of both."""
    if size[0] > image.width and size[1] < image.height:
        # Pillow resizes rows first: an image of 1 x 60,000 pixels would become larger before it becomes smaller.
        image = image.resize((image.width, size[1]), Image.Resampling.BICUBIC, (0, 0, image.width, box[3]))
        box = (0, 0, box[2], size[1])
    return image.resize(size, Image.Resampling.BICUBIC, box)


def exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF or XMP orientation of an image, from 1 to 8 if it is valid; None without one."""
    with suppress(Exception):  # EXIF data may be anything
        return image.getexif().get(ExifTags.Base.Orientation)
    return None


def _in_strips(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image in pieces, as compositing holds several copies."""
    if image.width * image.height <= _STRIP_PIXELS:
        return to_rgb(image)
    rgb, rows = Image.new("RGB", image.size), max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        rgb.paste(to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return rgb


def find_image_size(paths: Sequence[str]) -> int:
    """Return an `image_size` that suits the images, from the headers of a sample; `ClassFolders` states the rule."""
    return choose_image_size([header[:2] for header in read_headers(paths[:: -(-len(paths) // _SAMPLE)])])


def read_headers(paths: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return width, height and Pillow's mode of the images whose header can be read; decoding reports the others."""
    with warnings.catch_warnings():
        _set_pillow_warnings()
        headers = {path: _header(path, _HEADER_IN_PYTHON) for path in paths}
    unknown = [path for path in paths if headers[path] is None]
    if unknown:
        # Where one crashes it, decoding all images will name it.
        with suppress(BrokenProcessPool), worker_pool(1) as pool:
            headers |= zip(unknown, pool.map(_header, unknown, chunksize=_SAMPLE), strict=True)
    return [header[:3] for header in headers.values() if header is not None]


def choose_image_size(sizes: Sequence[tuple[int, int]], *, is_square_kept: bool = False) -> int:
    """Return an `image_size` that suits images of these sizes; `is_square_kept`: also one above 224."""
    if not sizes:
        return 32
    if len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1] and (is_square_kept or sizes[0][0] <= 224):
        return sizes[0][0]
    side = statistics.median_low([min(size) for size in sizes])
    return min(max(round(side / 32) * 32, 32), 224)


def _header(path: str, formats: tuple[str, ...] | None = None) -> tuple[int, int, str, bool] | None:
    """Return width, height, Pillow's mode, and whether there are 16 bits per channel; None if they cannot be read."""
    with suppress(Exception):
        _check_file(path)
        opened: Any = open_image(path) if formats is None else Image.open(path, formats=formats)
        with opened as image:
            _check_header(image)
            # Pillow keeps the high bytes of 16-bit colours; only its raw mode ("RGB;16B") shows them.
            return *image.size, image.mode, image.mode[0] == "I" or any(";16" in str(tile[3]) for tile in image.tile)
    return None


def dark_16_bit_remark(paths: Sequence[str], images: np.ndarray) -> str | None:
    """Return a remark if the 16-bit images among a sample of decoded images use the low part of their range only."""
    sample = range(0, len(paths), -(-len(paths) // _SAMPLE))
    brightest = {index: int(images[index].max()) for index in sample}
    if min(brightest.values()) >= _NEARLY_BLACK:
        return None
    with warnings.catch_warnings():
        _set_pillow_warnings()
        headers = {index: _header(paths[index], _HEADER_IN_PYTHON) for index in sample}
    deep = [brightest[index] for index, header in headers.items() if header and header[3]]
    if not deep or max(deep) >= _NEARLY_BLACK:
        return None
    return (
        f"the {len(deep):,} 16-bit images in a sample of {len(sample):,} are nearly black: no value is above about "
        "4,095, and white is 65,535; if their values have 10 or 12 bits, multiply them (by 64 or 16) and save again"
    )


def _set_pillow_warnings() -> None:
    """Ignore Pillow's warnings, of odd EXIF data for example, but turn those of decompression bombs into errors."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


# -- many images ------------------------------------------------------------------------------------------------


def decode_all(
    paths: Sequence[str],
    image_size: int,
    out: Path | np.ndarray,
    decode: Decode = decode_image,
    hashes: np.ndarray | None = None,
    log: TextIO | None = None,
) -> tuple[list[Unreadable], Remarks]:
    """Decode images in worker processes into `out`, with a progress bar on a terminal's stderr or a line in `log`.

    Args:
        paths: Files to decode.
        image_size: Height and width in pixels.
        out: uint8 (len(paths), image_size, image_size, channels): an array, or an existing `.npy` file.
        decode: Decodes one image, or raises `UserError` if it cannot. Workers import it by name.
        hashes: Receives the SHA-256 of each file, 0 for one that cannot be opened, as its field `content`, and the
            images' `pixel_hashes` as `pixels`.
        log: Where the line is printed; by default on stdout.

    Returns:
        Index and reason for each image that cannot be read, sorted by index; what is unusual about others.

    Raises:
        UserError: A worker process died. The message names the images that it was decoding.
    """
    num_workers = max(1, min(usable_cpus(), 32, len(paths) // _IMAGES_PER_WORKER))
    began = time.monotonic()
    states = multiprocessing.RawArray("b", max(1, len(paths)))
    file = str(out) if isinstance(out, Path) else None
    channels = (np.load(out, mmap_mode="r") if isinstance(out, Path) else out).shape[-1]
    shape = (image_size, image_size, channels)
    with worker_pool(num_workers, _set_work, file, decode, states) as pool:
        chunks = {
            pool.submit(_decode_chunk, paths[start:stop], start, shape, hashes is not None): (start, stop)
            for start, stop in _chunks(len(paths), num_workers, math.prod(shape))
        }
        bad, remarks, done = list[Unreadable](), list[Remark](), 0
        try:
            with progress(len(paths), "Decoding images") as show:
                for chunk in as_completed(chunks):
                    (start, stop), (unreadable, unusual, images, hashed) = chunks[chunk], chunk.result()
                    bad += unreadable
                    remarks += unusual
                    if not isinstance(out, Path):
                        out[start:stop] = images
                    if hashes is not None and hashed is not None:
                        hashes["content"][start:stop], hashes["pixels"][start:stop] = hashed
                    done += stop - start
                    show(done)
        except BrokenProcessPool as error:
            suspects = [path for path, state in zip(paths, states, strict=False) if state == 1]
            raise UserError(
                f"A process died while decoding {' or '.join(suspects[:3]) or 'images'}\n"
                "The image crashes Pillow, or memory ran out: remove it, or make it smaller."
            ) from error
    if len(paths) >= _LOGGED_FROM and not sys.stderr.isatty():
        print(f"Decoded {len(paths):,} images in {time.monotonic() - began:.1f} s", file=log, flush=True)
    return sorted(bad), counted_remarks(remarks)


def counted_remarks(remarks: Iterable[tuple[int, str]]) -> Remarks:
    """Return the number of images of each remark, and the index of the first, of (index, text) of each image."""
    of_text: dict[str, list[int]] = {}
    for index, text in remarks:
        of_text.setdefault(text, []).append(index)
    return {text: (len(indices), min(indices)) for text, indices in sorted(of_text.items())}


def _of_one(text: str) -> str:
    return text.replace("have", "has").replace("their", "its")


def remark_lines(remarks: Remarks, paths: Sequence[str]) -> list[str]:
    """Return a line for the terminal for each of `remarks` on images of `paths`."""
    return [
        printable(
            f"remark: {num:,} of {plural(len(paths), 'image')} {text if num > 1 else _of_one(text)} (the first is "
            f"{paths[first]})"
        )
        for text, (num, first) in remarks.items()
    ]


def _chunks(num: int, num_workers: int, image_bytes: int) -> list[tuple[int, int]]:
    """Return ranges of at most 256 images, and at least 8 ranges per worker so that none waits long for the last."""
    size = max(1, min(256, num // (8 * num_workers), _CHUNK_BYTES // image_bytes))
    return [(start, min(start + size, num)) for start in range(0, num, size)]


Remark = tuple[int, str]  # index of an image, and what is unusual about it
# The images are None if they are written to a file; contents and pixel hashes if they are not asked for.
Chunk = tuple[list[Unreadable], list[Remark], np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]


# -- worker processes ---------------------------------------------------------------------------------------------


@contextmanager
def worker_pool(num: int, prepare: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of processes that end with this one and ignore Ctrl-C; an error cancels what they have not begun."""
    context = multiprocessing.get_context("spawn")  # forking a process that has torch's threads can hang
    if multiprocessing.current_process().daemon:
        raise UserError(
            "image files are decoded in processes, which a daemonic process cannot start; use "
            "concurrent.futures.ProcessPoolExecutor in place of multiprocessing.Pool, or give Pillow images."
        )
    with _without_main(), ProcessPoolExecutor(num, context, _start_worker, (prepare, arguments)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)  # do not work on after Ctrl-C
            raise


_main_lock = threading.Lock()
_hidden_mains: list[types.ModuleType] = []  # the script first, then what replaced it


@contextmanager
def _without_main() -> Iterator[None]:
    """Start workers without importing the main script again, as joblib does.

    A script without `if __name__ == "__main__":` would start training in each worker. The last of several threads gives
    the module back.
    """
    with _main_lock:
        _hidden_mains.append(sys.modules["__main__"])
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        with _main_lock:
            main = _hidden_mains[0]
            _hidden_mains.pop()
            if not _hidden_mains:
                sys.modules["__main__"] = main


def _start_worker(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C as well and shuts the workers down
    _set_pillow_warnings()
    _catch_c_messages()
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


_c_messages: BinaryIO | None = None  # of a worker: what C libraries printed to stderr


def _catch_c_messages() -> None:
    """Send what C libraries print to a file; Python's own stderr stays."""
    global _c_messages
    sys.stderr = open(os.dup(2), "w", 1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    _c_messages = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    os.dup2(_c_messages.fileno(), 2)


def take_c_messages() -> str:
    """Return what C libraries printed since the last call, in one line."""
    if _c_messages is None or not os.fstat(_c_messages.fileno()).st_size:
        return ""
    _c_messages.seek(0)
    text = _c_messages.read(_MESSAGE_BYTES).decode("utf-8", "backslashreplace")
    _c_messages.seek(0)
    _c_messages.truncate()
    return " ".join(text.split()) or "a C library printed an empty message"


def _decode_chunk(paths: Sequence[str], start: int, shape: tuple[int, ...], is_hashed: bool) -> Chunk:
    """Decode images into the file or return them; set the state of each: 1 is in progress, 2 is done."""
    images, decode, states = _work
    own = np.zeros((len(paths), *shape), np.uint8) if images is None else None
    into: Any = own if images is None else images[start : start + len(paths)]
    bad: list[Unreadable] = []
    remarks: list[Remark] = []
    contents = [bytes(32)] * len(paths)

    def read_and_hash(path: str) -> bytes:
        data = read_file(path)
        contents[at] = hashlib.sha256(data).digest()
        return data

    for at, path in enumerate(paths):
        states[start + at] = 1
        unusual: list[str] = []
        reason = ""
        try:
            into[at] = decode(path, shape[0], unusual, read_and_hash if is_hashed else read_file)
        except UserError as error:
            reason = str(error)
        if message := take_c_messages():  # names the cause that Pillow lacks, or an error that it ignores
            reason = f"{path} cannot be read ({message})"
        if reason:
            bad.append((start + at, reason))
        else:
            remarks += [(start + at, remark) for remark in unusual]
        states[start + at] = 2
    unreadable = {index for index, _ in bad}
    constant = np.flatnonzero(is_constant(into)).tolist()
    remarks += [(start + at, CONSTANT) for at in constant if start + at not in unreadable]
    content = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 32)
    return bad, remarks, own, (content, pixel_hashes(into)) if is_hashed else None
