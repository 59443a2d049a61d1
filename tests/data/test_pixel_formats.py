"""Every depth and colour model of Pillow's image files is decoded correctly or refused, compared with NumPy.

The files are written here sample by sample, by the specifications, mostly without Pillow. The same files make the table
of docs/your-own-images.md:

python tests/data/test_pixel_formats.py    write the table
"""

import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from cifar_lightning.data.image_decoding import decode_image, open_image, square_of
from cifar_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:IM image format is deprecated")
SIZE = 8
PAGE = Path(__file__).parents[2] / "docs" / "your-own-images.md"
NO_WHITE = "no defined white"
PALETTE = np.random.default_rng(5).integers(0, 256, (256, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Case:
    """One kind of file.

    Attributes:
        file: Its format.
        colours: Its colour model.
        bits: Bits per channel, with the kind of number where that is not unsigned.
        write: Writes it to a path; returns the RGB values that are expected, float (SIZE, SIZE, 3).
        refused: What the reason says if it is refused; "|" before it if it may be read, too.
        tolerance: Largest difference of a value.
        detail: What else distinguishes it.
    """

    file: str
    colours: str
    bits: str
    write: Callable[[Path], np.ndarray]
    refused: str = ""
    tolerance: float = 1
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.file, self.colours, self.bits, self.detail)))


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
    if bits > 8:
        return (values >> np.uint64(bits - 8)).astype(float)
    return np.round(values * 255.0 / ((1 << bits) - 1))


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * alpha / 255 + 255 - alpha


def from_cmyk(values: np.ndarray) -> np.ndarray:
    return (255.0 - values[..., :3]) * (255.0 - values[..., 3:]) / 255


def from_ycbcr(values: np.ndarray) -> np.ndarray:
    y, blue, red = np.moveaxis(values - (0.0, 128, 128), 2, 0)
    return np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], 2).clip(0, 255)


def to_rgb(colours: np.ndarray) -> np.ndarray:
    return np.broadcast_to(colours, (SIZE, SIZE, 3))


# -- PNG --------------------------------------------------------------------------------------------------------

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
PNG_COLOURS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGB with alpha"}
PNG_KINDS = [
    *((bits, 0) for bits in (1, 2, 4, 8, 16)),
    *((bits, 3) for bits in (1, 2, 4, 8)),
    *((bits, kind) for kind in (2, 4, 6) for bits in (8, 16)),
]


def png(bits: int, kind: int, has_transparent_colour: bool, path: Path) -> np.ndarray:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    values = samples(bits, CHANNELS[kind])
    palette = PALETTE[: 1 << bits] if kind == 3 else PALETTE
    chunks = {b"PLTE": palette.tobytes()} if kind == 3 else {}
    if has_transparent_colour:
        chunks[b"tRNS"] = bytes(range(len(palette))) if kind == 3 else values[3, 4].astype(">u2").tobytes()
    rows = packed(values, bits, ">")
    stride = len(rows) // SIZE
    filtered = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(SIZE))
    head = struct.pack(">IIBBBBB", SIZE, SIZE, bits, kind, 0, 0, 0)
    body = b"".join(chunk(name, data) for name, data in chunks.items())
    parts = chunk(b"IHDR", head), body, chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    scaled = to_8_bits(values, bits)
    if kind == 3:
        colours = palette[values[..., 0]].astype(float)
        return on_white(colours, values.astype(float)) if has_transparent_colour else colours
    if kind in (4, 6):
        return on_white(to_rgb(scaled[..., :-1]), scaled[..., -1:])
    expected = to_rgb(scaled).copy()
    if has_transparent_colour:
        expected[(values == values[3, 4]).all(2)] = 255
    return expected


def png_cases() -> Iterator[Case]:
    for has_transparent_colour in (False, True):
        for bits, kind in PNG_KINDS:
            if not has_transparent_colour or kind not in (4, 6):
                colours = PNG_COLOURS[kind] + (" with transparent colours" if has_transparent_colour else "")
                refused = "transparent colour of 16 bits" if has_transparent_colour and (bits, kind) == (16, 2) else ""
                yield Case("PNG", colours, str(bits), partial(png, bits, kind, has_transparent_colour), refused)


# -- TIFF -------------------------------------------------------------------------------------------------------

TIFF_COLOURS = {
    0: "gray, 0 is white",
    1: "gray",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELAB",
}
NUM_COLOURS = {2: 3, 5: 4}  # of each photometric interpretation; others have 1


def tiff(key: tuple, path: Path) -> np.ndarray:
    prefix, photometric, sample_format, fill_order, bits, extra = key
    order = "<" if prefix == b"II" else ">"
    values = samples(bits[0], len(bits))
    if photometric == 8:
        values[..., 1:] = 0  # gray: a* and b* are 0
    if extra[:1] == (1,):  # colours are multiplied by alpha
        colours = NUM_COLOURS.get(photometric, 1)
        values[..., :colours] = np.minimum(values[..., :colours], values[..., colours : colours + 1])
    palette = PALETTE[: 1 << min(bits[0], 8)]
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
    return expected_of_tiff(key, values, palette)


def expected_of_tiff(key: tuple, values: np.ndarray, palette: np.ndarray) -> np.ndarray:
    _, photometric, _, _, bits, extra = key
    scaled = to_8_bits(values, bits[0])
    num = 3 if photometric == 6 and len(bits) == 3 else NUM_COLOURS.get(photometric, 1)
    colours, alpha = scaled[..., :num], scaled[..., num : num + 1]
    if photometric == 0:
        colours = 255 - colours
    if photometric == 3:
        colours = palette[values[..., 0] % len(palette)].astype(float)
    if photometric == 5:
        colours = from_cmyk(colours)
    if photometric == 6 and num == 3:
        colours = from_ycbcr(colours)
    if photometric == 8:  # L* of CIELAB to sRGB
        lightness = colours[..., :1] / 2.55
        linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
        colours = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
        alpha = alpha[..., :0]
    if alpha.size and photometric != 5 and extra[:1] != (0,):
        colours = colours + 255 - alpha if extra[:1] == (1,) else on_white(colours, alpha)
    return to_rgb(colours)


def tiff_cases() -> Iterator[Case]:
    for key in TiffImagePlugin.OPEN_INFO:
        prefix, photometric, sample_format, fill_order, bits, extra = key
        kind = {2: " signed", 3: " float"}.get(sample_format[0], "")
        num_colours = 3 if photometric == 6 else NUM_COLOURS.get(photometric, 1)
        has_alpha = extra[:1] in ((1,), (2,), (999,)) or (photometric == 2 and len(bits) == 4 and not extra)
        colours = TIFF_COLOURS[photometric] + (" with alpha" if has_alpha else "")
        colours += " and more channels" if len(bits) > num_colours + has_alpha and photometric != 8 else ""
        refused = NO_WHITE if kind or bits[0] == 32 else ""
        # Pillow 13 lists bits in reverse order for palettes and inverted gray, but has no reader for them.
        if fill_order == 2 and (photometric == 3 or (photometric, bits) == (0, (8,))):
            refused = "|unknown raw mode"
        detail = f"{prefix.decode()} {extra}" + (" reversed bits" if fill_order == 2 else "")
        yield Case("TIFF", colours, f"{bits[0]}{kind}", partial(tiff, key), refused, 2, detail)


# -- other formats ----------------------------------------------------------------------------------------------


def ppm(bits: int, num: int, path: Path) -> np.ndarray:
    values = samples(bits, num)
    head = f"P{5 if num == 1 else 6} {SIZE} {SIZE} {(1 << bits) - 1}\n".encode()
    path.write_bytes(head + values.astype(">u2" if bits > 8 else "u1").tobytes())
    return to_rgb(to_8_bits(values, bits))


def pbm(path: Path) -> np.ndarray:
    values = samples(1, 1)
    path.write_bytes(f"P4 {SIZE} {SIZE}\n".encode() + packed(values, 1, ">"))
    return to_rgb(255.0 - 255 * values)


def pfm(path: Path) -> np.ndarray:
    path.write_bytes(f"Pf {SIZE} {SIZE} -1.0\n".encode() + np.ones((SIZE, SIZE), "<f4").tobytes())
    return to_rgb(np.zeros((SIZE, SIZE, 1)))


def sgi(bits: int, num: int, path: Path) -> np.ndarray:
    values = samples(bits, num)
    head = struct.pack(">HBBHHHHII", 474, 0, bits // 8, 2 if num == 1 else 3, SIZE, SIZE, num, 0, (1 << bits) - 1)
    planes = np.moveaxis(values[::-1], 2, 0).astype(f">u{bits // 8}")  # the lowest row first
    path.write_bytes(head.ljust(512, b"\0") + planes.tobytes())
    scaled = to_8_bits(values, bits)
    return to_rgb(on_white(scaled[..., :3], scaled[..., 3:]) if num == 4 else scaled)


def bmp(bits: int, path: Path) -> np.ndarray:
    """Palettes of 1, 4 and 8 bits, RGB of 16 (5 per channel), 24 and 32 bits per pixel, the lowest row first."""
    palette, values = b"", samples(5 if bits == 16 else 8, 3)
    expected = to_8_bits(values, 5) if bits == 16 else values.astype(float)
    if bits <= 8:
        values = samples(bits, 1)
        colours = PALETTE[: 1 << bits]
        palette = np.insert(colours[:, ::-1], 3, 0, axis=1).tobytes()
        expected = colours[values[..., 0]].astype(float)
        rows = np.frombuffer(packed(values, bits, ">"), np.uint8).reshape(SIZE, -1)
    elif bits == 16:
        red, green, blue = np.moveaxis(values, 2, 0)
        joined = (red << np.uint64(10) | green << np.uint64(5) | blue).astype("<u2")
        rows = joined.view(np.uint8).reshape(SIZE, -1)
    else:
        pixels = np.insert(values[..., ::-1].astype(np.uint8), 3, 0, axis=2)[..., : bits // 8]
        rows = pixels.reshape(SIZE, -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))[::-1]
    start = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, SIZE, SIZE, 1, bits, 0, rows.size, 2835, 2835, len(palette) // 4, 0)
    path.write_bytes(struct.pack("<2sIHHI", b"BM", start + rows.size, 0, 0, start) + info + palette + rows.tobytes())
    return expected


def tga(bits: int, num: int, path: Path) -> np.ndarray:
    """Gray (1 channel), gray with alpha (2), RGB (3), RGB with alpha (4), each of `bits`; the highest row first."""
    values = samples(bits, num)
    depth = 16 if bits == 5 else 8 * num
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 2 if num > 2 else 3, 0, 0, 0, 0, 0, SIZE, SIZE, depth, 0x20)
    if bits == 5:
        red, green, blue = np.moveaxis(values, 2, 0)
        data = (red << np.uint64(10) | green << np.uint64(5) | blue).astype("<u2").tobytes()
    else:
        data = values[..., [2, 1, 0, 3][:num] if num > 2 else slice(None)].astype(np.uint8).tobytes()
    path.write_bytes(head + data)
    scaled = to_8_bits(values, bits)
    return to_rgb(scaled if num in (1, 3) else on_white(scaled[..., :-1], scaled[..., -1:]))


def fits(bits: int, path: Path) -> np.ndarray:
    values = samples(abs(bits), 1)[..., 0]
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": SIZE, "NAXIS2": SIZE}
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END".ljust(80)
    kind = f">f{-bits // 8}" if bits < 0 else f">{'u' if bits == 8 else 'i'}{bits // 8}"
    path.write_bytes(head.ljust(2880).encode() + values.astype(kind).tobytes().ljust(2880, b"\0"))
    return to_rgb(values[::-1, :, None].astype(float))


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")


def im(mode: str, path: Path) -> np.ndarray:
    """Pillow's own name for a mode, in a format that has all of them."""
    num = len(Image.new(mode, (1, 1)).getbands())
    values = samples(1 if mode == "1" else 8, num)
    if mode in ("I;16", "I", "F"):
        data = values.astype({"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode]).tobytes()
    else:
        data = packed(values, 1, ">") if mode == "1" else values.astype(np.uint8).tobytes()
    image = Image.frombytes(mode, (SIZE, SIZE), data)
    if mode == "P":
        image.putpalette(PALETTE.tobytes())
    image.save(path, "IM")
    colours = values.astype(float)
    if mode in ("LA", "RGBA"):
        return to_rgb(on_white(colours[..., :-1], colours[..., -1:]))
    if mode == "P":
        return PALETTE[values[..., 0]].astype(float)
    return to_rgb({"CMYK": from_cmyk, "YCbCr": from_ycbcr, "1": lambda bit: 255 * bit}.get(mode, np.array)(colours))


def by_pillow(kind: str, mode: str, options: dict[str, object], path: Path) -> np.ndarray:
    """Smooth images, as most of these formats lose details."""
    num = len(Image.new(mode, (1, 1)).getbands())
    rows, columns = np.indices((SIZE, SIZE))
    values = np.stack([20 * rows + 8 * columns, 10 * rows + 20 * columns, 30 * rows, 200 - 20 * columns][:num], 2)
    data = (257 * values).astype("<u2") if mode == "I;16" else values.astype(np.uint8)
    Image.frombytes(mode, (SIZE, SIZE), data.tobytes()).save(path, kind, **options)
    colours = values.astype(float)
    if mode in ("LA", "RGBA"):
        return to_rgb(on_white(colours[..., :-1], colours[..., -1:]))
    return to_rgb(from_cmyk(colours) if mode == "CMYK" else colours)


COLOURS_OF = {"L": "gray", "LA": "gray with alpha", "RGB": "RGB", "RGBA": "RGB with alpha", "CMYK": "CMYK"}
COLOURS_OF |= {"1": "gray", "P": "palette", "YCbCr": "YCbCr", "I;16": "gray", "I": "gray", "F": "gray"}
BITS_OF = {"1": "1", "I;16": "16", "I": "32 signed", "F": "32 float"}
BY_PILLOW = {
    "JPEG": (("L", "RGB", "CMYK"), {"quality": 100, "subsampling": 0}, "jpg", 6),
    "JPEG2000": (("L", "LA", "RGB", "RGBA", "I;16"), {}, "jpg_2000", 1),
    "WEBP": (("RGB", "RGBA"), {"lossless": True, "exact": True}, "webp", 1),
    "AVIF": (("RGB", "RGBA"), {"quality": 100, "subsampling": "4:4:4"}, "avif", 4),
}


def other_cases() -> Iterator[Case]:
    for kind, (modes, options, feature, tolerance) in BY_PILLOW.items():
        for mode in modes if features.check(feature) else ():
            bits = BITS_OF.get(mode, "8")
            yield Case(kind, COLOURS_OF[mode], bits, partial(by_pillow, kind, mode, options), "", tolerance)
    for bits in (1, 4, 8):
        yield Case("BMP", "palette", str(bits), partial(bmp, bits))
    for bits in (16, 24, 32):
        yield Case("BMP", "RGB", str(5 if bits == 16 else 8), partial(bmp, bits), detail=f"{bits} a pixel")
    for bits, num, colours in ((8, 1, "gray"), (8, 2, "gray with alpha"), (5, 3, "RGB"), (8, 3, "RGB")):
        yield Case("TGA", colours, str(bits), partial(tga, bits, num))
    yield Case("TGA", "RGB with alpha", "8", partial(tga, 8, 4))
    yield Case("PPM", "gray", "1", pbm)
    for num, colours in ((1, "gray"), (3, "RGB")):
        for bits in (2, 5, 8, 10, 12, 16):
            yield Case("PPM", colours, str(bits), partial(ppm, bits, num))
    yield Case("PPM", "gray", "32 float", pfm, NO_WHITE)
    for num, colours in ((1, "gray"), (3, "RGB"), (4, "RGB with alpha")):
        for bits in (8, 16):
            yield Case("SGI", colours, str(bits), partial(sgi, bits, num))
    for bits in (8, 16, 32, -32, -64):
        name = f"{bits} signed" if bits > 8 else f"{-bits} float" if bits < 0 else "8"
        yield Case("FITS", "gray", name, partial(fits, bits), NO_WHITE if bits != 8 else "")
    for mode in MODES:
        refused = NO_WHITE if mode in ("I;16", "I", "F") else ""
        yield Case("IM", COLOURS_OF[mode], BITS_OF.get(mode, "8"), partial(im, mode), refused)


CASES = [*png_cases(), *tiff_cases(), *other_cases()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_depth_and_colour_model_is_right_or_refused(case, tmp_path):
    expected = case.write(tmp_path / "a")
    try:
        decoded = decode_image(str(tmp_path / "a"), SIZE)
    except UserError as error:
        reason = str(error)
        accepted = [text for text in case.refused.split("|") if text]
    else:
        reason, accepted = "", [""] if "" in case.refused.split("|") else []
        assert np.abs(decoded - expected).max() <= case.tolerance
    assert any(text in reason for text in accepted), reason


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_image_that_is_loaded_already_is_read_as_its_file_is(case, tmp_path):
    case.write(tmp_path / "a")

    def square(*, is_loaded):
        try:
            image = open_image(tmp_path / "a")
            if is_loaded:
                image.load()
            return square_of(image, SIZE, "crop")
        except Exception:  # Pillow raises nearly anything
            return None

    np.testing.assert_equal(square(is_loaded=True), square(is_loaded=False))


def test_an_rgb_png_of_8_bits_is_read_also_with_a_transparent_colour_of_more_bits(tmp_path):
    pixels = np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(300, 300, 300))
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["transparency"] == (300, 300, 300)
    np.testing.assert_equal(decode_image(str(tmp_path / "a.png"), SIZE), pixels)


# -- the table of the docs --------------------------------------------------------------------------------------


def table() -> str:
    """Return which depths of each format are read and which are refused, as they are now, as Markdown."""
    outcomes: dict[tuple[str, str], dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if "reversed bits" in case.detail:
                continue
            path, reason = Path(folder, "a"), ""
            case.write(path)
            try:
                decode_image(str(path), SIZE)
            except UserError as error:
                reason = str(error).removeprefix(f"{path} cannot be read (").partition(":")[0]
            bits = outcomes.setdefault((case.file, case.colours), {}).setdefault(reason, [])
            if case.bits not in bits:
                bits.append(case.bits)
    merged: dict[tuple[str, str, str], list[str]] = {}
    for (file, colours), of_reasons in outcomes.items():
        refused = "; ".join(f"{', '.join(bits)}: {reason}" for reason, bits in of_reasons.items() if reason)
        merged.setdefault((file, ", ".join(of_reasons.get("", ["-"])), refused), []).append(colours)
    rows = ["| file | colours | bits per channel, read | refused |", "| --- | --- | --- | --- |"]
    rows += [f"| {file} | {'; '.join(colours)} | {bits} | {why} |" for (file, bits, why), colours in merged.items()]
    return "\n".join(rows)


def split_page() -> tuple[str, str, str]:
    before, rest = PAGE.read_text("utf-8").split("<!-- pixel_formats -->\n")
    inside, after = rest.split("<!-- /pixel_formats -->")
    return before, inside.rstrip("\n"), after


@pytest.mark.skipif(not features.check("avif") or not features.check("jpg_2000"), reason="the table has all formats")
def test_the_table_of_the_docs_is_what_the_decoder_does():
    assert split_page()[1] == table()


if __name__ == "__main__":
    before, _, after = split_page()
    PAGE.write_text(f"{before}<!-- pixel_formats -->\n{table()}\n<!-- /pixel_formats -->{after}", "utf-8")
