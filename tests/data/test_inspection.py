from types import SimpleNamespace

import numpy as np
import pytest
from photos import photos
from PIL import Image
from program import decode_here

from cifar_lightning.data.datasets import Synthetic, open_source
from cifar_lightning.data.inspection import _Rows, inspect_source
from cifar_lightning.data.splits import SplitSettings
from cifar_lightning.data.statistics import evenly_spaced


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Class folders with a copy, a darker copy, one of another class, one colour, a damaged file, a link to nothing."""
    decode_here(monkeypatch)
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    images, root = photos(40), tmp_path / "data"
    for at, image in enumerate(images):
        path = root / ("train", "test")[at % 4 == 3] / ("ant", "bee")[at // 20] / f"{at:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Image.fromarray(images[0]).save(root / "test" / "ant" / "copy.png")
    Image.fromarray((images[1] * 0.9).astype(np.uint8)).save(root / "test" / "ant" / "darker.png")
    Image.fromarray(images[2]).save(root / "train" / "bee" / "mislabelled.png")
    Image.new("L", (50, 40), 90).save(root / "train" / "ant" / "blank.png")
    (root / "train" / "bee" / "broken.jpg").write_bytes(b"no image")
    (root / "train" / "bee" / "moved.png").symlink_to("gone")
    return root


def inspect(root, **settings):
    return inspect_source(open_source("folder", str(root), 32), SplitSettings(**settings))


def test_what_was_planted_in_a_folder_is_named(root):
    found = inspect(root, val_fraction=0.0)
    assert {split: of.tolist() for split, of in found["counts"].items()} == {"train": [16, 16], "test": [7, 5]}
    assert found["headers"] == {(32, 32, "RGB"): 43, (50, 40, "L"): 1}
    assert [path for path, _ in found["left_out"]] == ["train/bee/broken.jpg", "train/bee/moved.png"]
    assert found["constant"] == ["train/ant/blank.png"]
    groups = {kind["kind"]: [set(group) for group in kind["first"]] for kind in found["duplicates"]}
    copies = {"train/ant/02.png", "train/bee/mislabelled.png"}
    assert groups["across splits"] == [{"train/ant/00.png", "test/ant/copy.png"}]
    assert groups["other label"] == [copies]
    assert found["num_near"] == {"pairs": 1, "across splits": 1, "other label": 0}
    (pair,) = found["near"]
    assert [(each["name"], each["split"], each["label"]) for each in pair] == [
        ("train/ant/01.png", "train", "ant"),
        ("test/ant/darker.png", "test", "ant"),
    ]
    assert [len(samples) for samples in found["samples"]] == [10, 10]
    assert found["problem"] == ""


def test_data_that_fit_cannot_split_is_looked_at(root):
    found = inspect(root, val_fraction=0.99)
    assert "--data.val_fraction" in found["problem"]
    assert found["counts"]["train"].tolist() == [16, 16]


def test_images_outside_the_limit_are_in_no_pair(root):
    assert inspect(root, limit=2, val_fraction=0.0)["num_near"]["pairs"] == 0


def test_generated_images_are_named_by_index():
    found = inspect_source(Synthetic(num_train=200, num_test=100), SplitSettings())
    assert {split: int(of.sum()) for split, of in found["counts"].items()} == {"train": 180, "val": 20, "test": 100}
    assert not found["headers"]
    assert found["near"]
    assert all(each["name"].startswith(("train[", "test[")) for pair in found["near"] for each in pair)


@pytest.mark.parametrize("seed", range(3))
def test_the_samples_of_a_class_are_spread_over_its_training_images(seed):
    rng = np.random.default_rng(seed)
    targets, split_of = rng.choice([0, 0, 0, 2, 3], 60), rng.integers(-1, 3, 60)
    targets[split_of == 0] %= 3  # class 3 has no training image, and class 1 none at all
    rows = SimpleNamespace(targets=targets, split_of=split_of, class_names="abcde", pixels=lambda at: at)
    expected = []
    for label in range(5):
        own = np.flatnonzero((targets == label) & (split_of == 0))
        expected.append(own[evenly_spaced(len(own), 4)].tolist() if len(own) else [])
    assert _Rows.samples(rows, 4) == expected
