"""The table of data sets: what is known at once, and what is read later."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_lightning.data import datasets as sources
from cifar_lightning.data.datasets import DATASETS, ImageSet, open_source
from cifar_lightning.errors import UserError


def sha256_of(images: ImageSet) -> str:
    return hashlib.sha256(images.images.tobytes() + images.targets.astype("<i8").tobytes()).hexdigest()


def write_folders(root: Path, splits: tuple[str, ...] = ("train", "test")) -> None:
    for split in splits:
        for value, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                image = np.full((32, 32, 3), 100 * value + number, np.uint8)
                Image.fromarray(image).save(root / split / name / f"{number}.png")


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A tiny CIFAR in the archive's own format, its MD5s put into torchvision's table; returns the truth."""
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    label_key, names_key = {"cifar10": ("labels", "label_names"), "cifar100": ("fine_labels", "fine_label_names")}[name]
    class_names = open_source(name, root).class_names
    folder = root / reader.base_folder
    folder.mkdir(parents=True)

    def put(filename: str, content: dict[str, object]) -> str:
        # As Python 2's NumPy pickled: 0 and 1 for booleans, which NumPy 2.4.0 to 2.4.4 warn of.
        data = pickle.dumps(content, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
        (folder / filename).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    truth = {}
    rng = np.random.default_rng(0)
    for split, table in (("train", "train_list"), ("test", "test_list")):
        files = [filename for filename, _ in getattr(reader, table)]
        images = rng.integers(0, 256, (3 * len(files), 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, len(class_names), len(images)).tolist()
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        entries = []
        for part, filename in enumerate(files):
            here = slice(3 * part, 3 * part + 3)
            entries.append([filename, put(filename, {"data": rows[here], label_key: labels[here]})])
        monkeypatch.setattr(reader, table, entries)
        truth[split] = images, labels
    meta = dict(reader.meta)
    meta["md5"] = put(meta["filename"], {names_key: list(class_names)})
    monkeypatch.setattr(reader, "meta", meta)
    return truth


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_images_with_channels_last(name, tmp_path, monkeypatch):
    truth = write_cifar(tmp_path, monkeypatch, name)
    source = open_source(name, tmp_path)
    source.prepare()
    for split, (images, labels) in truth.items():
        raw_images = source.load(split)
        assert np.array_equal(raw_images.images, images)
        assert raw_images.images.dtype == np.uint8
        assert raw_images.targets.tolist() == labels
        assert raw_images.targets.dtype == np.int64
        assert raw_images.sha256 == sha256_of(raw_images)
    assert source.load("val") is None


@pytest.mark.parametrize("fault", ["flipped", "missing"])
def test_a_damaged_cifar_folder_is_an_error_with_the_way_out(fault, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    if fault == "flipped":
        batch.write_bytes(batch.read_bytes()[:-1] + b"!")
    else:
        batch.unlink()
    with pytest.raises(UserError, match="Delete it") as caught:
        open_source("cifar10", tmp_path).load("train")
    assert str(batch.parent) in str(caught.value)
    assert str(caught.value).count("\n") == 1


def test_names_and_sizes_are_known_before_anything_is_downloaded(tmp_path):
    known = {name: open_source(name, tmp_path / "missing") for name in ("cifar10", "cifar100", "synthetic")}
    assert {name: len(source.class_names) for name, source in known.items()} == {
        "cifar10": 10,
        "cifar100": 100,
        "synthetic": 10,
    }
    assert {source.image_size for source in known.values()} == {32}
    assert known["cifar10"].mean == (0.4914, 0.4822, 0.4465)
    assert known["cifar100"].std == (0.2673, 0.2564, 0.2762)
    assert not hasattr(known["synthetic"], "mean")
    assert not (tmp_path / "missing").exists()
    names = known["cifar100"].class_names
    assert list(names) == sorted(set(names))


def test_every_source_loads_what_the_protocol_promises(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    write_cifar(tmp_path, monkeypatch, "cifar100")
    write_folders(tmp_path)
    for name in sorted(DATASETS.keys() - {"shards"}):  # test_shards.py compares those with a folder
        source = open_source(name, tmp_path)
        source.prepare()
        images = source.load("test")
        size = source.image_size
        assert images.images.shape == (len(images.targets), size, size, 3)
        assert images.images.dtype == np.uint8
        assert images.targets.dtype == np.int64
        assert images.sha256 == sha256_of(images)
        assert hasattr(source, "mean") == hasattr(source, "std")
        assert source.describe().startswith(f"{name}: ")
        assert "\n" not in source.describe()


def test_class_folders_may_bring_their_own_validation_split(tmp_path):
    write_folders(tmp_path / "two")
    write_folders(tmp_path / "three", ("train", "val", "test"))
    assert open_source("folder", tmp_path / "two").load("val") is None
    assert len(open_source("folder", tmp_path / "three").load("val").targets) == 4


def test_the_synthetic_set_says_that_it_is_not_real():
    source = open_source("synthetic", "anywhere")
    assert source.describe() == ("synthetic: 5,000 + 1,000 generated images, 10 classes, 32x32 (not a real data set)")
    small = sources.Synthetic(num_train=20, num_test=10, image_size=16)
    assert small.load("train").images.shape == (20, 16, 16, 3)
    assert small.load("test").images.shape == (10, 16, 16, 3)
    assert small.load("val") is None


def test_an_unknown_name_lists_the_allowed_and_suggests_the_nearest():
    with pytest.raises(UserError) as caught:
        open_source("cifra10", "data")
    assert all(name in str(caught.value) for name in ("--data.dataset", "cifra10", *DATASETS))
    assert "Did you mean cifar10?" in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("cifar10", 64), ("cifar100", 0), ("synthetic", 8), ("folder", 0)])
def test_a_size_that_a_data_set_does_not_have_is_refused(name, size, tmp_path):
    write_folders(tmp_path)
    with pytest.raises(UserError, match=f"--data.image_size {size}"):
        open_source(name, tmp_path, size)


@pytest.mark.parametrize("name", [*DATASETS, "package:own"])
def test_a_data_set_takes_the_settings_of_its_constructor_and_refuses_the_others(name, tmp_path, monkeypatch):
    made = []

    def make(root, image_size, *, resize="crop", labels=None):
        made.append((root, image_size, resize, labels))

    if name in DATASETS:
        monkeypatch.setitem(DATASETS, name, make)
        open_source(name, "s3://bucket/set", 8, resize="pad", labels="a.csv")
        assert made == [("s3://bucket/set", 8, "pad", "a.csv")]
    for setting, value in (("cache", "memory"), ("skip_unreadable", True)):
        with pytest.raises(UserError, match=f"--data.{setting} {str(value).lower()}"):
            open_source(name, "data", **{setting: value})


def test_opening_a_source_does_not_import_torch(tmp_path):
    code = "import sys; from cifar_lightning.data.datasets import open_source; open_source('cifar10', 'x'); "
    code += "sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    root = Path(sources.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
