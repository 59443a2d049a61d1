"""Identical images: every kind is counted as by brute force, and named."""

import itertools

import numpy as np
import pytest
from PIL import Image
from program import decode_here

from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.image_set import ImageSet, pixel_hashes


def images(rng, num, size=4):
    return rng.integers(0, 256, (num, size, size, 3), dtype=np.uint8)


class Arrays:
    """A source of given images."""

    class_names, image_size, mean, std = ("a", "b"), 4, (0.5,) * 3, (0.2,) * 3

    def __init__(self, **sets):
        self.sets = sets

    def prepare(self):
        pass

    def load(self, split):
        return self.sets.get(split)

    def describe(self):
        return "arrays"


def module_of(*, val_fraction=0.0, **sets):
    module = ImageDataModule("synthetic", batch_size=2, val_fraction=val_fraction, image_size=16)
    module.source = Arrays(**{split: ImageSet(x, np.array(y), split) for split, (x, y) in sets.items()})
    module.class_names, module.num_classes = ("a", "b"), 2
    module.setup()
    return module


@pytest.mark.parametrize("shape", [(4, 4, 3), (5, 5, 3), (1, 1, 3), (16, 16, 3)])
def test_hashes_agree_for_identical_images_alone(shape):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (100, *shape), dtype=np.uint8)
    assert np.array_equal(pixel_hashes(first), pixel_hashes(first.copy()))
    assert np.array_equal(pixel_hashes(first)[30:], pixel_hashes(first[30:]))
    assert len(np.unique(pixel_hashes(first))) == len(np.unique(first.reshape(100, -1), axis=0))
    for at in np.ndindex(shape):
        changed = first[:1].copy()
        changed[0][at] ^= 1
        assert pixel_hashes(changed) != pixel_hashes(first[:1])


def test_a_set_without_duplicates_is_passed_without_a_word(capsys):
    module = ImageDataModule("synthetic")
    module.setup()
    assert module.duplicates == []
    assert "duplicates" not in module.split_summary()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_comparing_every_pair(seed):
    rng = np.random.default_rng(seed)
    pool = images(rng, 12)
    sets = {}
    for split, num in (("train", 20), ("val", 8), ("test", 8)):
        labels = np.concatenate([[0, 1], rng.integers(0, 2, num - 2)])
        sets[split] = pool[rng.integers(0, 12, num)], labels
    module = module_of(**sets)
    rows = [(split, x.tobytes(), y) for split, (xs, ys) in sets.items() for x, y in zip(xs, ys, strict=True)]
    expected = {}
    for one, other in (("test", "train"), ("test", "val"), ("val", "train")):
        theirs = {x for split, x, _ in rows if split == other}
        expected[f"are also in {other}", one] = sum(split == one and x in theirs for split, x, _ in rows)
    across = [kind for kind in module.duplicates if kind["kind"] == "across splits"]
    texts = {kind["text"].replace(" is also", " are also"): kind["num_images"] for kind in across}
    assert all((" is also" in kind["text"]) == (kind["num_images"] == 1) for kind in across)
    found = {(text.partition(" images ")[2], text.split()[3]): num for text, num in texts.items()}
    assert found == {key: num for key, num in expected.items() if num}
    labels_of = {x: {y for _, other, y in rows if other == x} for _, x, _ in rows}
    kinds = {kind["kind"]: kind["num_images"] for kind in module.duplicates}
    assert kinds["other label"] == sum(len(labels_of[x]) > 1 for _, x, _ in rows)
    assert kinds["within splits"] == len(rows) - len({(split, x) for split, x, _ in rows})


def test_validation_images_held_out_of_the_training_images_are_compared_too(capsys):
    rng = np.random.default_rng(0)
    pool = images(rng, 20)
    module = module_of(
        val_fraction=0.5, train=(np.concatenate([pool, pool]), [0, 1] * 20), test=(images(rng, 4), [0, 1, 0, 1])
    )
    val, train = (module._splits.of(split).numpy() % 20 for split in ("val", "train"))
    (kind, *_) = module.duplicates
    assert kind["num_images"] == np.isin(val, train).sum()
    assert all(name.startswith("train[") for group in kind["first"] for name in group)
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1
    assert module.split_summary()["duplicates"] == module.duplicates
    module.setup()
    assert capsys.readouterr().out == ""


def test_images_of_one_colour_are_remarked_on_by_name(capsys):
    rng = np.random.default_rng(0)
    train, test = images(rng, 10), images(rng, 4)
    train[[3, 6]], test[0, :, :, 0] = np.array([[[7]], [[9]]])[..., None], 7  # one channel alone is no colour
    module_of(train=(train, [0, 1] * 5), test=(test, [0, 1, 0, 1]))
    printed = capsys.readouterr().out
    assert "2 images have one colour" in printed
    assert "train[3]" in printed
    assert "test[" not in printed


def test_images_that_only_share_a_hash_are_not_duplicates(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr("cifar_lightning.data.duplicates.pixel_hashes", lambda images: np.zeros(len(images), "<u8"))
    train = images(rng, 10)
    module = module_of(train=(train, [0, 1] * 5), test=(np.concatenate([images(rng, 3), train[:1]]), [0, 1, 0, 0]))
    assert [(kind["kind"], kind["num_images"]) for kind in module.duplicates] == [("across splits", 1)]


def test_a_folder_names_its_files_and_compares_decoded_images(tmp_path, monkeypatch, capsys):
    decode_here(monkeypatch)
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "test"), ("ant", "bee"), range(4)):
        (tmp_path / "data" / split / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(rng, 1, 8)[0]).save(tmp_path / "data" / split / label / f"{number}.png")
    copied = Image.open(tmp_path / "data" / "train" / "ant" / "2.png")
    copied.save(tmp_path / "data" / "test" / "bee" / "again.bmp")  # another file of the same pixels
    for start in range(2):  # decoded, and from the cache
        module = ImageDataModule("folder", str(tmp_path / "data"), 2, val_fraction=0.0)
        module.prepare_data()
        module.setup()
        across, labels = module.duplicates
        assert (across["num_images"], labels["num_images"]) == (1, 2), start
        assert sorted(across["first"][0]) == ["test/bee/again.bmp", "train/ant/2.png"]
        assert "test/bee/again.bmp" in capsys.readouterr().out
