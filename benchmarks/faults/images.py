"""Images of the fault rows: generated class folders, and damaged, unusual and malicious files."""

import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_lightning.data.synthetic import CLASS_NAMES, draw


def draw_class_folders(root: Path, *, num_train: int, num_test: int, num_classes: int = 10, size: int = 16) -> Path:
    """Write `root/train/<class>/*.png` and `root/test/<class>/*.png` with images of shapes; return `root`."""
    for split, count in (("train", num_train), ("test", num_test)):
        images, targets = draw(split, count, size)
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            folder = root / split / CLASS_NAMES[target % num_classes]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:05}.png")
    return root


def small_set(root: Path, names: Iterable[str | bytes] = ("ant", "bee", "cat")) -> Path:
    """Write a small set: 20 training and 5 test images of each class."""
    for split, count in (("train", 20), ("test", 5)):
        for number, name in enumerate(names):
            folder = os.path.join(os.fsencode(root), split.encode(), os.fsencode(name))
            os.makedirs(folder, exist_ok=True)
            for index in range(count):
                pixels = np.random.default_rng([number, index, count]).integers(0, 80, (16, 16, 3), dtype=np.uint8)
                with open(os.path.join(folder, b"%02d.png" % index), "wb") as file:
                    Image.fromarray(pixels + np.uint8(80 * number)).save(file, "PNG")
    return root


def encoded(image: Image.Image, kind: str = "PNG", **kwargs: object) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def damaged_images() -> dict[str, bytes]:
    """Return damaged image files by name."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    png, jpeg = (encoded(Image.fromarray(noise), kind) for kind in ("PNG", "JPEG"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0x10
    return {
        "bad_empty.png": b"",
        "bad_text.png": b"this is no image\n",
        "bad_cut.png": png[: len(png) // 2],
        "bad_cut.jpg": jpeg[: len(jpeg) // 2],
        "bad_flipped.png": bytes(flipped),
    }


def odd_images() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Return one-color images of unusual modes and sizes by name, with the expected RGB values."""
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    deep = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    return {
        "odd_gray.png": (encoded(Image.new("L", (16, 16), 77)), (77, 77, 77)),
        # Alpha of 0 everywhere is unused: the colours are kept.
        "odd_transparent.png": (encoded(Image.new("RGBA", (16, 16), (200, 0, 0, 0))), (200, 0, 0)),
        "odd_palette.png": (encoded(palette), (10, 200, 30)),
        "odd_cmyk.jpg": (encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG", quality=100), (0, 0, 0)),
        "odd_16bit.png": (encoded(deep), (128, 128, 128)),
        "odd_bit.png": (encoded(Image.new("1", (16, 16), 1)), (255, 255, 255)),
        "odd_large.png": (encoded(Image.new("RGB", (120, 61), (9, 8, 7))), (9, 8, 7)),
        "odd_small.png": (encoded(Image.new("RGB", (3, 5), (90, 80, 70))), (90, 80, 70)),
    }


def nested_eps() -> bytes:
    """Return an IPTC file with an EPS inside, which Pillow would pass to Ghostscript."""
    fields = {(3, 60): b"\1\0", (3, 20): b"\0\x08", (3, 30): b"\0\x08", (3, 120): b"\0\1"}
    fields[8, 10] = encoded(Image.new("RGB", (8, 8), "red"), "EPS")
    return b"".join(bytes((0x1C, *tag)) + struct.pack(">H", len(data)) + data for tag, data in fields.items())


def recorded_ghostscript(folder: Path) -> tuple[dict[str, str], Path]:
    """Write a program `gs` that records its calls; return the environment that finds it first, and the record."""
    program, calls = folder / "bin" / "gs", folder / "calls"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho called >> '{calls}'\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}, calls


def damaged_fax() -> bytes:
    """Return a group-4 TIFF with overwritten pixels: libtiff prints an error, and Pillow returns an image."""
    pixels = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(bool)
    data = bytearray(encoded(Image.fromarray(pixels), "TIFF", compression="group4"))
    with Image.open(io.BytesIO(data)) as image:
        offset, length = image.tag_v2[273][0], image.tag_v2[279][0]
    data[offset + 20 : offset + length] = np.random.default_rng(0).bytes(length - 20)
    return bytes(data)


def bomb(side: int = 20_000) -> bytes:
    """Return a small PNG file of `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
