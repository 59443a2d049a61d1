"""Any picture file becomes a uint8 RGB square by the documented rules, or is refused by name."""

import importlib
import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_lightning import pictures
from cifar_lightning.errors import UserError
from cifar_lightning.pictures import decode_all, decode_picture, find_image_size


def noise(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(picture: Image.Image, path: Path, **options: object) -> str:
    picture.save(path, **options)
    return str(path)


def test_a_picture_of_the_right_size_keeps_every_bit(tmp_path):
    assert np.array_equal(decode_picture(saved(Image.fromarray(noise()), tmp_path / "a.png"), 8), noise())


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (9, 100), (4, 6)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(height, width, tmp_path):
    source = Image.fromarray(noise(height, width))
    scale = 8 / min(height, width)
    resized = source.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 8) // 2, (resized.height - 8) // 2
    expected = np.asarray(resized)[top : top + 8, left : left + 8]
    assert np.array_equal(decode_picture(saved(source, tmp_path / "a.png"), 8), expected)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_gray_is_its_high_byte_and_does_not_saturate(suffix, tmp_path):
    values = (np.arange(64, dtype=np.uint16) * 1023).reshape(8, 8)
    decoded = decode_picture(saved(Image.fromarray(values), tmp_path / f"a.{suffix}"), 8)
    assert np.array_equal(decoded, gray((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize("values", [np.ones((8, 8), np.float32), np.ones((8, 8), np.int32)])
def test_32_bit_pictures_are_refused(values, tmp_path):
    with pytest.raises(UserError, match="32 bits a pixel"):
        decode_picture(saved(Image.fromarray(values), tmp_path / "a.tif"), 8)


def test_gray_and_1_bit_become_three_equal_channels(tmp_path):
    values = noise()[..., 0]
    assert np.array_equal(decode_picture(saved(Image.fromarray(values), tmp_path / "l.png"), 8), gray(values))
    bits = Image.fromarray((values > 127).astype(np.uint8) * 255).convert("1")
    assert np.array_equal(
        decode_picture(saved(bits, tmp_path / "1.png"), 8), gray(np.where(values > 127, 255, 0).astype(np.uint8))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    rgba = noise(channels=4)
    rgba[0, 0, 3], rgba[1, 1, 3] = 0, 255
    picture = Image.fromarray(rgba).convert(mode)
    decoded = decode_picture(saved(picture, tmp_path / "a.png"), 8)
    colour, alpha = np.asarray(picture.convert("RGBA"), np.float64)[..., :3], rgba[..., 3:] / 255
    assert np.abs(decoded - (colour * alpha + 255 * (1 - alpha))).max() <= 1
    assert decoded[0, 0].tolist() == [255, 255, 255]


def test_a_transparent_palette_colour_is_white_and_others_keep_theirs(tmp_path):
    picture = Image.new("P", (8, 8), 0)
    picture.paste(1, (0, 4, 8, 8))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    plain = decode_picture(saved(picture, tmp_path / "plain.png"), 8)
    assert plain[0, 0].tolist() == [10, 20, 30]
    clear = decode_picture(saved(picture, tmp_path / "clear.png", transparency=0), 8)
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert clear[7, 7].tolist() == [40, 50, 60]


def test_cmyk_becomes_rgb(tmp_path):
    picture = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    decoded = decode_picture(saved(picture, tmp_path / "a.tif"), 8)
    assert np.array_equal(decoded, np.full((8, 8, 3), (0, 255, 255), np.uint8))


def test_exif_orientation_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    decoded = decode_picture(saved(Image.fromarray(noise()), tmp_path / "a.png", exif=exif), 8)
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
    [b"", b"not a picture", png_bytes()[:900], jpeg_bytes()[:900], png_bytes()[:30]],
    ids=["empty", "text", "cut png", "cut jpeg", "head of a png"],
)
def test_a_file_that_is_no_whole_picture_is_refused_by_path(data, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        decode_picture(str(path), 8)
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
            decode_picture(str(path), 32)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = saved(Image.new("1", (2000, 1000)), tmp_path / "bomb.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1_999_999)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read \(2000 x 1000 pixels"):
        decode_picture(path, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500_000)  # from here Pillow warns
    assert decode_all([path], 8, np.empty((1, 8, 8, 3), np.uint8))[0][0] == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # from twice that it raises
    with pytest.raises(UserError, match=r"bomb\.png"):
        decode_picture(path, 8)


def test_a_large_jpeg_is_shrunk_close_to_full_decoding(tmp_path):
    smooth = Image.fromarray(noise(6, 6)).resize((640, 480), Image.Resampling.BICUBIC)
    path = saved(smooth, tmp_path / "a.jpg", quality=95)
    with Image.open(path) as whole:
        expected = np.asarray(whole.resize((43, 32), Image.Resampling.BICUBIC))[:, 5:37]
    difference = decode_picture(path, 32).astype(int) - expected
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
def test_the_image_size_is_the_pictures_own_or_a_sensible_one(sizes, expected, tmp_path):
    paths = [saved(Image.new("L", size), tmp_path / f"{number}.png") for number, size in enumerate(sizes)]
    assert find_image_size(paths) == expected


def test_the_image_size_passes_over_unreadable_pictures(tmp_path):
    (tmp_path / "a.png").write_text("text")
    paths = [str(tmp_path / "a.png"), saved(Image.new("L", (48, 48)), tmp_path / "b.png")]
    assert find_image_size(paths) == 48


@pytest.fixture
def twenty(tmp_path):
    """Twenty pictures, each of one shade of gray: its number."""
    return [saved(Image.new("L", (4, 4), number), tmp_path / f"{number}.png") for number in range(20)]


def empty_npy(path: Path, num: int) -> Path:
    np.lib.format.open_memmap(str(path), "w+", np.uint8, (num, 4, 4, 3)).flush()
    return path


@pytest.mark.parametrize("processes_from", [1, 1000], ids=["processes", "threads"])
def test_pictures_are_decoded_in_their_order_and_bad_ones_reported(processes_from, twenty, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PROCESSES_FROM", processes_from)
    monkeypatch.setattr(pictures, "_num_cores", lambda: 2)
    for number in (3, 17):
        Path(twenty[number]).write_text("text")
    out = empty_npy(tmp_path / "out.npy", 20)
    bad = decode_all(twenty, 4, out)
    assert [index for index, _ in bad] == [3, 17]
    assert all(reason.startswith(f"{twenty[index]} ") for index, reason in bad)
    images = np.load(out)
    assert all((images[number] == number).all() for number in range(20) if number not in (3, 17))


def test_a_dead_worker_process_names_the_picture(twenty, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PROCESSES_FROM", 1)
    monkeypatch.setattr(pictures, "_num_cores", lambda: 2)
    (tmp_path / "crashing.py").write_text(
        "import os, numpy\n"
        "def decode(path, image_size):\n"
        "    if path.endswith('/13.png'):\n"
        "        os._exit(139)\n"
        "    return numpy.zeros((4, 4, 3), numpy.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decode = importlib.import_module("crashing").decode
    with pytest.raises(UserError, match=r"died while decoding .*13\.png"):
        decode_all(twenty, 4, empty_npy(tmp_path / "out.npy", 20), decode)


def test_threads_turn_no_warning_filter_loose(twenty):
    before = list(warnings.filters)
    decode_all(twenty, 4, np.empty((20, 4, 4, 3), np.uint8))
    assert warnings.filters == before
