import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from cifar_lightning.report.inspection import inspection_lines, render_inspection


def found_of(num_classes, samples=1, size=64, name="class {}"):
    rng = np.random.default_rng(0)

    def noise():
        return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)

    names = tuple(name.format(at) for at in range(num_classes))
    row = {"name": f"train/{names[0]}/1.png", "split": "train", "label": names[0]}
    return {
        "dataset": "folder: in photos",
        "class_names": names,
        "counts": {split: np.arange(1, num_classes + 1) for split in ("train", "val", "test")},
        "problem": "--data.val_fraction: too small",
        "headers": {(width, 40, "RGB"): 3 for width in range(30, 60)},
        "left_out": [(f"train/{names[0]}/{at}.png", "cannot be read (it is cut short)") for at in range(700)]
        + [("x.txt", "hidden")],
        "duplicates": [{"kind": kind, "text": "3 images", "first": [["a", "b"]] * 9} for kind in "abcde"],
        "constant": ["x.png"],
        "imbalance": f"Uneven classes: {names[0]}",
        "num_near": {"pairs": 60, "across splits": 2, "other label": 1},
        "near": [[row | {"pixels": noise()}, row | {"split": "test", "pixels": noise()}] for _ in range(60)],
        "samples": [[noise() for _ in range(samples)] for _ in range(num_classes)],
    }


@pytest.mark.parametrize("num_classes", [2, 10, 11, 1000])
def test_the_terminal_fits_a_screen(num_classes):
    lines = inspection_lines(found_of(num_classes, name="class \x1b[31m {} of " + "long " * 30))
    assert len(lines) <= 29  # and the line of the page
    assert max(map(len, lines)) <= 120
    assert all(line.isprintable() for line in lines)
    assert any("700 files" in line for line in lines)


def test_of_many_classes_the_largest_and_the_smallest_are_shown():
    lines = inspection_lines(found_of(100))
    shown = [line.split()[1] for line in lines if line.startswith("class ") and line.split()[1].isdigit()]
    assert shown == [*map(str, range(99, 94, -1)), *map(str, range(4, -1, -1))]


@pytest.mark.parametrize(("num_classes", "samples"), [(1000, 1), (100, 5), (3, 10)])
def test_the_page_is_below_3_mb_of_noise_and_fetches_nothing(num_classes, samples):
    page = render_inspection(found_of(num_classes, samples))
    assert len(page.encode()) < 3e6
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count("<tr><th scope") >= num_classes


def test_names_are_escaped():
    page = render_inspection(found_of(2, name="<script>alert({})</script>"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_samples_are_shown_side_by_side():
    found = found_of(2, samples=3)
    found["samples"][0] = [np.full((16, 16, 1), value, np.uint8) for value in (0, 120, 240)]
    uri = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="samples of class 0"', render_inspection(found))[0]
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("L"))
    assert strip.shape == (64, 192)
    assert strip[:, [32, 96, 160]].mean(0) == pytest.approx([0, 120, 240], abs=3)


def test_names_that_are_cut_are_marked_and_told_apart():
    lines = inspection_lines(found_of(3, name="long " * 10 + "{}"))
    shown = [line[:30].rstrip() for line in lines if "long long" in line[:30]]
    assert len(set(shown)) == 3
    assert all(name.endswith("..") for name in shown)
