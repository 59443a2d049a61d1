"""Any image file becomes a uint8 RGB square by the documented rules, or is refused by name."""

import importlib
import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features
from program import decode_here

from benchmarks.faults.images import damaged_fax, nested_eps, recorded_ghostscript
from cifar_lightning.data import image_decoding
from cifar_lightning.data.image_decoding import decode_all, decode_image, find_image_size, remark_lines
from cifar_lightning.errors import UserError


def noise(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> str:
    image.save(path, **({"compress_level": 1} | options if path.suffix == ".png" else options))
    return str(path)


def test_an_image_of_the_right_size_keeps_every_bit(tmp_path):
    assert np.array_equal(decode_image(saved(Image.fromarray(noise()), tmp_path / "a.png"), 8), noise())


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (9, 100), (4, 6)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(height, width, tmp_path):
    source = Image.fromarray(noise(height, width))
    scale = 8 / min(height, width)
    resized = source.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 8) // 2, (resized.height - 8) // 2
    expected = np.asarray(resized)[top : top + 8, left : left + 8]
    assert np.array_equal(decode_image(saved(source, tmp_path / "a.png"), 8), expected)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_gray_is_its_high_byte_and_does_not_saturate(suffix, tmp_path):
    values = (np.arange(64, dtype=np.uint16) * 1023).reshape(8, 8)
    decoded = decode_image(saved(Image.fromarray(values), tmp_path / f"a.{suffix}"), 8)
    assert np.array_equal(decoded, gray((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize("values", [np.ones((8, 8), np.float32), np.ones((8, 8), np.int32)])
def test_32_bit_images_are_refused(values, tmp_path):
    with pytest.raises(UserError, match="32 bits per pixel"):
        decode_image(saved(Image.fromarray(values), tmp_path / "a.tif"), 8)


def test_gray_and_1_bit_become_three_equal_channels(tmp_path):
    values = noise()[..., 0]
    assert np.array_equal(decode_image(saved(Image.fromarray(values), tmp_path / "l.png"), 8), gray(values))
    bits = Image.fromarray((values > 127).astype(np.uint8) * 255).convert("1")
    assert np.array_equal(
        decode_image(saved(bits, tmp_path / "1.png"), 8), gray(np.where(values > 127, 255, 0).astype(np.uint8))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    rgba = noise(channels=4)
    rgba[0, 0, 3], rgba[1, 1, 3] = 0, 255
    image = Image.fromarray(rgba).convert(mode)
    decoded = decode_image(saved(image, tmp_path / "a.png"), 8)
    colour, alpha = np.asarray(image.convert("RGBA"), np.float64)[..., :3], rgba[..., 3:] / 255
    assert np.abs(decoded - (colour * alpha + 255 * (1 - alpha))).max() <= 1
    assert decoded[0, 0].tolist() == [255, 255, 255]


def test_a_transparent_palette_colour_is_white_and_others_keep_theirs(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.paste(1, (0, 4, 8, 8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    plain = decode_image(saved(image, tmp_path / "plain.png"), 8)
    assert plain[0, 0].tolist() == [10, 20, 30]
    clear = decode_image(saved(image, tmp_path / "clear.png", transparency=0), 8)
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert clear[7, 7].tolist() == [40, 50, 60]


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    decoded = decode_image(saved(image, tmp_path / "a.tif"), 8)
    assert np.array_equal(decoded, np.full((8, 8, 3), (0, 255, 255), np.uint8))


def test_exif_orientation_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    decoded = decode_image(saved(Image.fromarray(noise()), tmp_path / "a.png", exif=exif), 8)
    assert np.array_equal(decoded, np.rot90(noise(), -1))


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", png_bytes()[:900], jpeg_bytes()[:900], png_bytes()[:30]],
    ids=["empty", "text", "cut png", "cut jpeg", "head of a png"],
)
def test_a_file_that_is_no_whole_image_is_refused_by_path(data, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        decode_image(str(path), 8)
    assert str(caught.value).startswith(f"{path} cannot be read (")
    assert "\n" not in str(caught.value)


def test_each_flipped_bit_of_a_png_is_noticed(tmp_path):
    whole, rng = png_bytes(), random.Random(0)
    path = tmp_path / "flipped.png"
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError):
            decode_image(str(path), 32)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = saved(Image.new("1", (2000, 1000)), tmp_path / "bomb.png")
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 1_999_999)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read \(2000 x 1000 pixels"):
        decode_image(path, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # from twice that Pillow raises
    with pytest.raises(UserError, match=r"bomb\.png"):
        decode_image(path, 8)


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000)], ids=["Pillow warns", "Pillow raises"])
def test_the_size_in_the_header_is_enough_to_refuse_a_bomb(size, tmp_path):
    bomb = bytearray(png_bytes())
    bomb[16:24] = size[0].to_bytes(4) + size[1].to_bytes(4)
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    paths = [str(tmp_path / "bomb.png"), saved(Image.new("L", (48, 48)), tmp_path / "good.png")]
    Path(paths[0]).write_bytes(bomb)
    assert find_image_size(paths) == 48
    bad, _ = decode_all(paths, 8, np.empty((2, 8, 8, 3), np.uint8))
    assert [index for index, _ in bad] == [0]
    assert bad[0][1].startswith(f"{paths[0]} cannot be read (")
    assert "pixels" in bad[0][1]


def test_a_bomb_within_an_image_of_many_sizes_is_refused(tmp_path):
    icon = io.BytesIO()
    Image.new("L", (32, 32)).save(icon, "ICO", sizes=[(32, 32)], bitmap_format="png")
    inner = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(inner, "PNG")
    head = bytearray(icon.getvalue()[:22])
    head[14:18] = len(inner.getvalue()).to_bytes(4, "little")
    (tmp_path / "bomb.ico").write_bytes(bytes(head) + inner.getvalue())
    bad, _ = decode_all([str(tmp_path / "bomb.ico")], 8, np.empty((1, 8, 8, 3), np.uint8))
    assert "exceeds limit" in bad[0][1]


@pytest.mark.parametrize("suffix", ["eps", "wmf"])
def test_what_another_program_would_have_to_draw_is_refused(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix == "eps":
        Image.fromarray(noise()).save(path)
    else:  # a placeable header and the record that ends the file
        path.write_bytes(
            struct.pack("<IHhhhhHIHHHHIHIH", 0x9AC6CDD7, 0, 0, 0, 99, 99, 96, 0, 0, 1, 9, 768, 12, 0, 3, 0)
        )
    with pytest.raises(UserError, match="is a program that draws"):
        decode_image(str(path), 8)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_what_may_never_end_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="not a regular file"):
        decode_image(str(tmp_path / "pipe.png"), 8)
    assert find_image_size([str(tmp_path / "pipe.png")]) == 32
    monkeypatch.setattr(image_decoding, "MAX_BYTES", 9)
    path = saved(Image.fromarray(noise()), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"the limit is 9\)"):
        decode_image(path, 8)
    decode_here(monkeypatch)  # where the limit is the same
    own_size = saved(Image.new("L", (48, 48)), tmp_path / "b.png")
    assert find_image_size([own_size]) == 32
    monkeypatch.setattr(image_decoding, "MAX_BYTES", 1 << 30)
    assert find_image_size([own_size]) == 48


IN_LITTLE_MEMORY = """
import resource, sys
from PIL import Image, ImageOps, PngImagePlugin, features
from cifar_lightning.data.image_decoding import decode_image
Image.init()
decode_image(sys.argv[1], 224)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    for resize in ("crop", "pad", "squash"):
        decode_image(path, 224, resize=resize)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory_of_decoding(tmp_path: Path, *paths: str) -> float:
    """Return the MB by which decoding images at 224 pixels raises a new process's peak."""
    small = saved(Image.fromarray(noise()), tmp_path / "small.png")
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, small, *paths]
    environment = os.environ | {"PYTHONPATH": str(Path(image_decoding.__file__).parents[2])}
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_long_and_thin_images_take_the_memory_of_their_pixels(tmp_path):
    sizes = [(1_000_000, 1), (1, 1_000_000), (300_000, 3)]
    paths = [
        saved(Image.new(mode, size), tmp_path / f"{mode}-{size[0]}.png") for size in sizes for mode in ("L", "RGBA")
    ]
    assert memory_of_decoding(tmp_path, *paths) < 200


def test_a_large_transparent_image_takes_the_memory_of_its_pixels(tmp_path):
    path = saved(Image.new("RGBA", (5000, 5000), (1, 2, 3, 200)), tmp_path / "a.png", compress_level=1)
    assert memory_of_decoding(tmp_path, path) < 2.6 * 5000 * 5000 * 4 / 2**20


@pytest.mark.parametrize("image_size", [8, 9])
@pytest.mark.parametrize("size", [(900, 30), (30, 900), (131, 20), (801, 1)])
def test_a_long_image_is_cut_where_the_whole_one_would_be(size, image_size, tmp_path):
    source = Image.fromarray(noise(6, 6)).resize(size, Image.Resampling.BICUBIC)
    scale = image_size / min(size)
    width, height = (round(side * scale) for side in size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    whole = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC))
    expected = whole[top : top + image_size, left : left + image_size].astype(int)
    assert np.abs(decode_image(saved(source, tmp_path / "a.png"), image_size) - expected).max() <= 1


@pytest.mark.parametrize("image_size", [8, 9])
@pytest.mark.parametrize("size", [(90, 31), (31, 90), (900, 1), (1, 900), (5, 3), (3, 400), (8, 8), (9, 9), (40, 40)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_pad_keeps_the_whole_image_on_black_and_squash_fills_the_square(orientation, size, image_size, tmp_path):
    source = Image.fromarray(noise(6, 6)).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(source, tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(tagged(source, exif))
    squashed = decode_image(path, image_size, resize="squash").astype(int)
    expected = np.asarray(upright.resize((image_size, image_size), Image.Resampling.BICUBIC))
    most = 0 if orientation == 1 and 1 not in size else 20  # Pillow rounds and clips between rows and columns
    assert np.abs(squashed - expected).max() <= most
    assert np.abs(squashed - expected).mean() < 0.6
    scale = image_size / max(size)
    width, height = (max(1, round(side * scale)) for side in upright.size)
    left, top = (image_size - width) // 2, (image_size - height) // 2
    whole = np.zeros((image_size, image_size, 3), int)
    whole[top : top + height, left : left + width] = upright.resize((width, height), Image.Resampling.BICUBIC)
    padded = decode_image(path, image_size, resize="pad").astype(int)
    assert np.abs(padded - whole).max() <= most
    assert np.abs(padded - whole).mean() < 0.6
    assert (padded[whole.sum(-1) == 0] == 0).all()


@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_a_large_jpeg_is_padded_and_squashed_as_the_png_of_it(resize, tmp_path):
    image = Image.fromarray(noise(9, 7)).resize((701, 333), Image.Resampling.BICUBIC)
    jpeg, png = saved(image, tmp_path / "a.jpg", quality=100), saved(image, tmp_path / "a.png")
    difference = decode_image(jpeg, 32, resize=resize).astype(int) - decode_image(png, 32, resize=resize)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_and_png_are_cut_alike_at_every_orientation(orientation, tmp_path):
    rng = np.random.default_rng(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for _ in range(8):
        width, height = (int(side) for side in rng.integers(40, 700, 2))
        source = noise(max(2, height // 25), max(2, width // 25))
        image = Image.fromarray(source).resize((width, height), Image.Resampling.BICUBIC)
        upright = saved(ImageOps.exif_transpose(tagged(image, exif)), tmp_path / "upright.png")
        jpeg = saved(image, tmp_path / "a.jpg", quality=100, exif=exif)
        png = saved(image, tmp_path / "a.png", exif=exif)
        for image_size in (32, 64):
            expected = decode_image(upright, image_size).astype(int)
            assert np.abs(decode_image(png, image_size) - expected).mean() < 0.3
            assert np.abs(decode_image(jpeg, image_size) - expected).mean() < 2


def tagged(image: Image.Image, exif: Image.Exif) -> Image.Image:
    """Return an image whose EXIF data Pillow reads, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif, compress_level=1)
    return Image.open(buffer)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as in the workers
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_broken_exif_spoils_nothing(suffix, tmp_path):
    plain = saved(Image.fromarray(noise()), tmp_path / f"plain.{suffix}")
    for number, exif in enumerate((b"garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff")):
        broken = saved(Image.fromarray(noise()), tmp_path / f"{number}.{suffix}", exif=exif)
        assert np.array_equal(decode_image(broken, 8), decode_image(plain, 8))


def test_large_texts_and_profiles_of_a_png_spoil_nothing(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("note", "a" * (2 << 20), zip=True)
    texts.add_text("more", "b" * (2 << 20), zip=True)
    texts.add_text("Raw profile type exif", "c" * (2 << 20), zip=True)
    path = saved(Image.fromarray(noise()), tmp_path / "a.png", pnginfo=texts, icc_profile=b"d" * (2 << 20))
    assert np.array_equal(decode_image(path, 8), noise())


def test_the_orientation_in_imagemagicks_text_counts(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data, texts = exif.tobytes(), PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    path = saved(Image.fromarray(noise()), tmp_path / "a.png", pnginfo=texts)
    assert np.array_equal(decode_image(path, 8), np.rot90(noise(), -1))


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation>{}</x:xmpmeta>'


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_the_orientation_in_xmp_counts_and_broken_xmp_spoils_nothing(suffix, tmp_path):
    rows = np.broadcast_to(np.linspace(0, 250, 8).astype(np.uint8)[:, None, None], (8, 8, 3))
    texts = (XMP.format(""), "<broken", XMP.format("a" * (2 << 20)) if suffix == "png" else "")
    for text, is_rotated in zip(texts, (True, False, False), strict=True):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", text)
        options = {"pnginfo": info} if suffix == "png" else {"xmp": text.encode()}
        path = saved(Image.fromarray(rows), tmp_path / f"a.{suffix}", **options)
        expected = np.rot90(rows, -1) if is_rotated else rows
        assert np.abs(decode_image(path, 8) - expected.astype(int)).mean() < 6


def remarks_of(*paths: str) -> str:
    bad, remarks = decode_all(paths, 8, np.empty((len(paths), 8, 8, 3), np.uint8))
    assert bad == []
    return "".join(f"{line}\n" for line in remark_lines(remarks, paths))


@pytest.mark.parametrize("suffix", ["png", "tga", "tif", "webp"])
def test_alpha_of_0_everywhere_is_unused_and_remarked(suffix, tmp_path):
    unused = Image.fromarray(np.dstack([noise(), np.zeros((8, 8), np.uint8)]))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = saved(unused, tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(decode_image(path, 8), noise())
    out = remarks_of(saved(Image.fromarray(noise()), tmp_path / "b.png"), path)
    assert out.count("\n") == 1
    assert "1 of 2" in out
    assert f"a.{suffix}" in out


def test_constant_images_are_remarked_once(tmp_path):
    paths = [saved(Image.new("RGB", (9, 9), (7, 8, 9)), tmp_path / f"{number}.png") for number in range(3)]
    out = remarks_of(saved(Image.fromarray(noise()), tmp_path / "b.png"), *paths)
    assert out.count("\n") == 1
    assert "3 of 4" in out
    assert "/0.png" in out


def test_an_eps_within_another_file_starts_no_program(tmp_path, monkeypatch):
    variables, calls = recorded_ghostscript(tmp_path)
    monkeypatch.setenv("PATH", variables["PATH"])
    nested, plain = tmp_path / "a.jpg", tmp_path / "b.jpg"
    nested.write_bytes(nested_eps())
    Image.fromarray(noise()).save(plain, "EPS")
    bad, _ = decode_all([str(nested), str(plain)], 8, np.empty((2, 8, 8, 3), np.uint8))
    assert [index for index, _ in bad] == [0, 1]
    assert "IPTC is another file inside" in bad[0][1]
    assert "EPS is a program" in bad[1][1]
    assert find_image_size([str(nested), str(plain)]) == 32
    assert not calls.exists()


def with_too_many_channels(path: Path) -> str:
    """Write a TIFF whose tags Pillow reports by `logging`, which prints to stderr by default."""
    Image.fromarray(noise()).save(path, "TIFF")
    entry = struct.pack("<HHI", 277, 3, 1)  # SamplesPerPixel
    path.write_bytes(path.read_bytes().replace(entry + b"\3\0", entry + b"\x63\0"))
    return str(path)


@pytest.mark.skipif(not features.check("libtiff"), reason="needs libtiff")
def test_what_libraries_print_is_the_error_of_the_image(tmp_path, capfd):
    good = saved(Image.fromarray(noise()[..., 0] > 127), tmp_path / "good.tif", compression="group4")
    path = tmp_path / "bad.tif"
    path.write_bytes(damaged_fax())
    many = with_too_many_channels(tmp_path / "many.tif")
    bad, _ = decode_all([good, str(path), good, many], 8, np.empty((4, 8, 8, 3), np.uint8))
    assert [index for index, _ in bad] == [1, 3]
    assert bad[0][1].startswith(f"{path} cannot be read (")
    assert "Fax" in bad[0][1]
    assert find_image_size([str(path), many]) == 64
    assert capfd.readouterr().err == ""


def test_reading_headers_shows_no_warning_of_pillow(tmp_path, recwarn):
    path = Path(saved(Image.new("L", (8, 8), 3), tmp_path / "a.png"))
    control = b"acTL" + struct.pack(">II", 0, 0)  # an animation of no frames
    chunk = struct.pack(">I", 8) + control + struct.pack(">I", zlib.crc32(control))
    path.write_bytes(path.read_bytes()[:33] + chunk + path.read_bytes()[33:])
    assert find_image_size([str(path)]) == 8
    assert image_decoding.dark_16_bit_remark([str(path)], np.zeros((1, 8, 8, 3), np.uint8)) is None
    assert not recwarn.list


def test_a_large_jpeg_is_shrunk_close_to_full_decoding(tmp_path):
    smooth = Image.fromarray(noise(6, 6)).resize((640, 480), Image.Resampling.BICUBIC)
    path = saved(smooth, tmp_path / "a.jpg", quality=95)
    with Image.open(path) as whole:
        expected = np.asarray(whole.resize((43, 32), Image.Resampling.BICUBIC))[:, 5:37]
    difference = decode_image(path, 32).astype(int) - expected
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(28, 28)] * 3, 28),
        ([(96, 96)] * 3, 96),
        ([(500, 375), (640, 480), (300, 300)], 224),
        ([(100, 80), (90, 70), (70, 100)], 64),
        ([(20, 10)] * 3, 32),
        ([(512, 512)] * 3, 224),
    ],
)
def test_the_image_size_is_the_images_own_or_a_sensible_one(sizes, expected, tmp_path):
    paths = [saved(Image.new("L", size), tmp_path / f"{number}.png") for number, size in enumerate(sizes)]
    assert find_image_size(paths) == expected


def test_the_image_size_passes_over_unreadable_images(tmp_path):
    (tmp_path / "a.png").write_text("text")
    paths = [str(tmp_path / "a.png"), saved(Image.new("L", (48, 48)), tmp_path / "b.png")]
    assert find_image_size(paths) == 48


def test_the_image_size_is_also_that_of_formats_whose_header_is_read_in_c(tmp_path):
    paths = [saved(Image.new("L", (48, 48)), tmp_path / f"a.{suffix}") for suffix in ("webp", "avif", "ico")]
    assert [find_image_size([path]) for path in paths] == [48, 48, 48]


def test_the_image_size_is_also_that_of_a_png_with_large_metadata(tmp_path):
    path = saved(Image.new("L", (48, 48)), tmp_path / "a.png", icc_profile=bytes(2 << 20))
    assert find_image_size([path]) == 48


@pytest.fixture
def twenty(tmp_path):
    """Twenty images, each of one shade of gray: its number."""
    return [saved(Image.new("L", (4, 4), number), tmp_path / f"{number}.png") for number in range(20)]


def empty_npy(path: Path, num: int) -> Path:
    np.lib.format.open_memmap(str(path), "w+", np.uint8, (num, 4, 4, 3)).flush()
    return path


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("into", ["an array", "a file"])
def test_images_are_decoded_in_their_order_and_bad_ones_reported(into, num_workers, twenty, tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "usable_cpus", lambda: num_workers)
    monkeypatch.setattr(image_decoding, "_IMAGES_PER_WORKER", 1)
    for number in (3, 17):
        Path(twenty[number]).write_text("text")
    out = empty_npy(tmp_path / "out.npy", 20) if into == "a file" else np.empty((20, 4, 4, 3), np.uint8)
    bad, _ = decode_all(twenty, 4, out)
    assert [index for index, _ in bad] == [3, 17]
    assert all(reason.startswith(f"{twenty[index]} ") for index, reason in bad)
    images = np.load(out) if isinstance(out, Path) else out
    assert all((images[number] == number).all() for number in range(20) if number not in (3, 17))


@pytest.mark.parametrize("num", [1, 20])
def test_a_crash_in_an_image_names_it_and_leaves_the_program_alive(num, twenty, tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "usable_cpus", lambda: 2)
    monkeypatch.setattr(image_decoding, "_IMAGES_PER_WORKER", 1)
    (tmp_path / "crashing.py").write_text(
        "import ctypes, numpy\n"
        "def decode(path, image_size, remarks, read):\n"
        "    if path.endswith('/13.png'):\n"
        "        ctypes.string_at(0)\n"  # a real segmentation fault
        "    return numpy.zeros((4, 4, 3), numpy.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decode = importlib.import_module("crashing").decode
    paths = twenty if num == 20 else twenty[13:14]
    with pytest.raises(UserError, match=r"died while decoding .*13\.png") as caught:
        decode_all(paths, 4, empty_npy(tmp_path / "out.npy", num), decode)
    assert len(str(caught.value).splitlines()) == 2


def test_no_more_workers_start_than_pay_off(monkeypatch):
    started = []

    class Stop(Exception):
        pass

    def start(num, *arguments):
        started.append(num)
        raise Stop

    monkeypatch.setattr(image_decoding, "worker_pool", start)
    monkeypatch.setattr(image_decoding, "usable_cpus", lambda: 8)
    for num in (1, 199, 200, 10_000):
        with pytest.raises(Stop):
            decode_all(["a"] * num, 4, np.empty((num, 4, 4, 3), np.uint8))
    assert started == [1, 1, 2, 8]


def test_large_images_are_sent_back_a_few_at_a_time():
    assert max(stop - start for start, stop in image_decoding._chunks(100_000, 2, 3 * 32**2)) == 256
    assert max(stop - start for start, stop in image_decoding._chunks(100_000, 2, 3 * 4096**2)) == 1


def test_decoding_turns_no_warning_filter_loose(twenty):
    before = list(warnings.filters)
    decode_all(twenty, 4, np.empty((20, 4, 4, 3), np.uint8))
    find_image_size(twenty)
    assert warnings.filters == before


def test_pools_of_several_threads_give_the_script_back_in_any_order():
    script = sys.modules["__main__"]
    first, second = image_decoding._without_main(), image_decoding._without_main()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert sys.modules["__main__"] is script


def test_a_process_that_may_start_none_is_told_what_may(monkeypatch):
    monkeypatch.setattr(image_decoding.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(UserError, match="ProcessPoolExecutor"), image_decoding.worker_pool(1):
        pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "an empty file"), (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"), (b"text", "not an image format")],
)
def test_the_reason_that_a_file_is_no_image_is_named_whatever_its_suffix(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jpg cannot be read \({reason}"):
        decode_image(str(path), 8)
