"""Every depth and colour model of PNG and TIFF that Pillow reads is decoded correctly or refused, compared with NumPy.

The files are written here sample by sample, by the specifications, without Pillow.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cifar_lightning.data.image_decoding import decode_image
from cifar_lightning.errors import UserError

SIZE = 8


def samples(bits: int, num: int) -> np.ndarray:
    """Random samples (SIZE, SIZE, num)."""
    return np.random.default_rng(bits + num).integers(0, 1 << bits, (SIZE, SIZE, num), dtype=np.uint64)


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """Return rows of samples as bytes, each row padded to a whole byte."""
    if bits >= 16:
        return values.astype(f"{order}u{bits // 8}").tobytes()
    flat = values.reshape(SIZE, -1)
    each = (flat[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(each.reshape(SIZE, -1).astype(np.uint8), axis=1).tobytes()


def to_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return (values >> np.uint64(bits - 8) if bits > 8 else values * np.uint64(255 // ((1 << bits) - 1))).astype(float)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * alpha / 255 + 255 - alpha


def to_rgb(colours: np.ndarray) -> np.ndarray:
    return np.broadcast_to(colours, (SIZE, SIZE, 3))


# -- PNG --------------------------------------------------------------------------------------------------------


def png(path: Path, values: np.ndarray, bits: int, kind: int, chunks: dict[bytes, bytes]) -> str:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = packed(values, bits, ">")
    stride = len(rows) // SIZE
    filtered = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(SIZE))
    head = struct.pack(">IIBBBBB", SIZE, SIZE, bits, kind, 0, 0, 0)
    body = b"".join(chunk(name, data) for name, data in chunks.items())
    parts = chunk(b"IHDR", head), body, chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return str(path)


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
PNG_KINDS = [
    *((bits, 0) for bits in (1, 2, 4, 8, 16)),
    *((bits, 3) for bits in (1, 2, 4, 8)),
    *((bits, kind) for bits in (8, 16) for kind in (2, 4, 6)),
]


@pytest.mark.parametrize("has_transparent_colour", [False, True])
@pytest.mark.parametrize(("bits", "kind"), PNG_KINDS)
def test_each_png(bits, kind, has_transparent_colour, tmp_path):
    values = samples(bits, CHANNELS[kind])
    palette = np.random.default_rng(5).integers(0, 256, (1 << min(bits, 8), 3), dtype=np.uint8)
    chunks = {b"PLTE": palette.tobytes()} if kind == 3 else {}
    if has_transparent_colour and kind in (0, 2):
        chunks[b"tRNS"] = values[3, 4].astype(">u2").tobytes()
    if has_transparent_colour and kind == 3:
        chunks[b"tRNS"] = bytes(range(len(palette)))
    path = png(tmp_path / "a.png", values, bits, kind, chunks)
    if has_transparent_colour and (bits, kind) == (16, 2):
        with pytest.raises(UserError, match="transparent colour of 16 bits"):
            decode_image(path, SIZE)
        return
    scaled = to_8_bits(values, bits)
    if kind == 3:
        expected = palette[values[..., 0]].astype(float)
    elif kind in (4, 6):
        expected = on_white(to_rgb(scaled[..., :-1]), scaled[..., -1:])
    else:
        expected = to_rgb(scaled).copy()
    if b"tRNS" in chunks:
        if kind == 3:
            expected = on_white(expected, values.astype(float))
        else:
            expected[(values == values[3, 4]).all(2)] = 255
    assert np.abs(decode_image(path, SIZE) - expected).max() <= 1


# -- TIFF -------------------------------------------------------------------------------------------------------


def tiff(path: Path, key: tuple, values: np.ndarray, palette: np.ndarray) -> str:
    prefix, photometric, sample_format, fill_order, bits, extra = key
    order = "<" if prefix == b"II" else ">"
    data = packed(values, bits[0], order)
    if fill_order == 2:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, 8)[:, ::-1]).tobytes()
    tags = {
        256: (SIZE,),
        257: (SIZE,),
        258: bits,
        259: (1,),
        262: (photometric,),
        266: (fill_order,),
        273: (8,),
        277: (len(bits),),
        278: (SIZE,),
        279: (len(data),),
        339: sample_format * len(bits),
    }
    if photometric == 3:
        tags[320] = tuple(int(value) * 257 for value in palette.T.ravel())
    if extra:
        tags[338] = extra
    start = 8 + len(data) + len(data) % 2
    entries, after = b"", b""
    for tag, numbers in sorted(tags.items()):
        field = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(field) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(after)
            after += field
            field = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + field.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHI", prefix, 42, start)
    directory = struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4 + after
    path.write_bytes(head + data + b"\0" * (len(data) % 2) + directory)
    return str(path)


def expected_of_tiff(key: tuple, values: np.ndarray, palette: np.ndarray) -> np.ndarray:
    _, photometric, _, _, bits, extra = key
    scaled = to_8_bits(values, bits[0])
    num = {2: 3, 5: 4}.get(photometric, 3 if photometric == 6 and len(bits) == 3 else 1)
    colours, alpha = scaled[..., :num], scaled[..., num : num + 1]
    if photometric == 0:
        colours = 255 - colours
    if photometric == 3:
        colours = palette[values[..., 0]].astype(float)
    if photometric == 5:
        colours = (255 - colours[..., :3]) * (255 - colours[..., 3:]) / 255
    if photometric == 6 and num == 3:
        y, blue, red = np.moveaxis(colours - (0, 128, 128), 2, 0)
        colours = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], 2).clip(0, 255)
    if photometric == 8:  # L* of CIELAB to sRGB
        lightness = colours[..., :1] / 2.55
        linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
        colours = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
        alpha = alpha[..., :0]
    if alpha.size and photometric != 5 and extra[:1] != (0,):
        colours = colours + 255 - alpha if extra[:1] == (1,) else on_white(colours, alpha)
    return to_rgb(colours)


def has_reader(path: str) -> bool:
    with Image.open(path) as image:
        try:
            image.load()
        except ValueError:
            return False
    return True


@pytest.mark.parametrize("key", TiffImagePlugin.OPEN_INFO, ids=str)
def test_each_tiff(key, tmp_path):
    _, photometric, sample_format, fill_order, bits, extra = key
    values = samples(bits[0], len(bits))
    if photometric == 8:
        values[..., 1:] = 0  # gray: a* and b* are 0
    if extra[:1] == (1,):  # colours are multiplied by alpha
        colours = {2: 3}.get(photometric, 1)
        values[..., :colours] = np.minimum(values[..., :colours], values[..., colours : colours + 1])
    palette = np.random.default_rng(5).integers(0, 256, (1 << min(bits[0], 8), 3), dtype=np.uint8)
    path = tiff(tmp_path / "a.tif", key, values, palette)
    # Pillow 13 lists bits in reverse order for palettes and inverted gray, but has no reader for them.
    is_reversed = fill_order == 2 and (photometric == 3 or (photometric, bits) == (0, (8,)))
    if sample_format != (1,) or bits[0] == 32 or (is_reversed and not has_reader(path)):
        with pytest.raises(UserError, match=r"no defined white|unknown raw mode"):
            decode_image(path, SIZE)
        return
    assert np.abs(decode_image(path, SIZE) - expected_of_tiff(key, values, palette)).max() <= 2
