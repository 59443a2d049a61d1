"""Folders as people have them: what is a split, what is a class, what small sets are split into."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from program import fail

from cifar_lightning.checkpoints.resume import split_difference
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.image_folder import ClassFolders, holds_class_folders
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json
from cifar_lightning.runs.contents import read_split
from cifar_lightning.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("decoding_here")


def put(folder, num, seed=0, size=8):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *folder.as_posix().encode()])
    for number in range(num):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def flat(root, classes=("ant", "bee", "cow"), num=20):
    for name in classes:
        put(root / name, num)
    return root


def sizes(data):
    return [data.num_images(split) for split in ("train", "val", "test")]


def ready(root, **settings):
    data = ImageDataModule("folder", str(root), **settings)
    data.prepare_data()
    data.setup()
    return data


def test_class_folders_alone_are_split_and_the_split_is_said_and_saved(tmp_path, capsys):
    data = ready(flat(tmp_path / "photos"))
    assert data.class_names == ("ant", "bee", "cow")
    assert sizes(data) == [43, 5, 12]
    assert data.batch_size == 43
    said = capsys.readouterr().out
    assert all(word in said for word in ("60 images", "12 as the test split", "--data.test_fraction"))
    images = sum(len(images) for images, _ in data.test_dataloader())
    assert images == 12
    saved = data.split_summary()
    everything = [*saved["train"], *saved["val"], *saved["test"]]
    assert sorted(everything) == list(range(60))
    again = ready(tmp_path / "photos")  # from the cache, which is no class
    assert again.split_summary() == saved
    assert again.skipped_files == []
    assert "duplicates" not in saved


def test_a_run_of_another_test_split_is_noticed(tmp_path):
    root, run = flat(tmp_path / "photos"), RunFolder(tmp_path / "run")
    run.path.mkdir()
    write_json(run.split, ready(root).split_summary())
    assert len(read_split(run.split)["test"]) == 12
    assert split_difference(run, ready(root)) == ""
    assert split_difference(run, ready(root, test_fraction=0.3))
    assert split_difference(run, ready(root, seed=1))


@pytest.mark.parametrize(
    ("folders", "expected", "sources"),
    [
        (("train",), [43, 5, 12], ["train", "train", "train"]),
        (("Training", "Testing"), [54, 6, 60], ["train", "train", "test"]),
        (("train", "valid"), [48, 60, 12], ["train", "val", "train"]),
        (("train", "validation", "test"), [60, 60, 60], ["train", "val", "test"]),
    ],
)
def test_folders_of_splits_by_the_names_that_people_give_them(folders, expected, sources, tmp_path):
    for seed, name in enumerate(folders):
        flat(tmp_path / name, num=20)
        put(tmp_path / name / "ant", 20, seed=seed)
    data = ready(tmp_path)
    assert sizes(data) == expected
    assert [data._splits.source_of(split) for split in ("train", "val", "test")] == sources


def test_nested_folders_belong_to_their_class_and_links_among_them_are_said(tmp_path, capsys):
    flat(tmp_path, ("ant", "bee"), 2)
    put(tmp_path / "ant" / "2024" / "may", 3)
    (tmp_path / "bee" / "loop").symlink_to(tmp_path)
    source = ClassFolders(tmp_path)
    source.prepare()
    assert source.listings["train"].counts == (5, 2)
    assert source.listings["train"].names[2:5] == tuple(f"ant/2024/may/{k}.png" for k in range(3))
    assert ("bee/loop", "a link to a folder inside a class") in source.skipped_files
    assert "bee/loop" in capsys.readouterr().out


def test_split_folders_of_other_names_are_remarked_on(tmp_path, capsys):
    for split in ("training_set", "test_set"):
        flat(tmp_path / "splits" / split, ("ant", "bee"), 2)
        put(tmp_path / "years" / split / "2024", 2)
    for root, is_warned in (("splits", True), ("years", False)):
        ClassFolders(tmp_path / root).prepare()
        lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        assert len(lines) == is_warned
        assert all("ant, bee" in line and "--data.root" in line for line in lines)


def test_classes_may_have_the_names_of_splits_where_nothing_is_called_train(tmp_path, capsys):
    root = flat(tmp_path / "photos", ("invalid", "test", "valid"), 4)
    assert holds_class_folders(root)
    assert ready(root).class_names == ("invalid", "test", "valid")
    assert [line for line in capsys.readouterr().out.splitlines() if "test, valid" in line and "train/" in line]
    flat(root / "valid", ("ant", "bee"), 2)
    with pytest.raises(UserError, match="no folder train/"):
        ClassFolders(root)


def test_duplicates_and_left_out_images_of_a_flat_folder_are_named_below_the_root(tmp_path):
    flat(tmp_path, num=12)
    shutil.copy(tmp_path / "ant" / "0.png", tmp_path / "bee" / "copy.png")
    (tmp_path / "cow" / "0.png").write_text("text")
    data = ready(tmp_path, skip_unreadable=True)
    found = {kind["kind"]: kind for kind in data.duplicates}
    assert sorted(found["other label"]["first"][0]) == ["ant/0.png", "bee/copy.png"]
    assert [path for path, _ in data.skipped_files] == ["cow/0.png"]
    assert sum(sizes(data)) == 36


@pytest.mark.parametrize("layout", ["flat", "split folders"])
def test_every_image_is_named_by_the_file_that_it_was_read_from(layout, tmp_path):
    root = tmp_path / "photos"
    for top in ("",) if layout == "flat" else ("train", "val", "Test"):
        flat(root / top)
        put(root / top / "cow" / "brown, young", 5)
        (root / top / "bee" / "00.png").write_bytes(b"no image")
    data = ready(root, skip_unreadable=True, num_workers=2)
    for split in ("train", "val", "test"):
        names = data.image_names(split)
        assert names.dtype.kind == "U"
        opened = [np.asarray(Image.open(root / name)) for name in names]
        assert np.array_equal(opened, data.images(split, np.arange(data.num_images(split))))
    all_names = np.concatenate([data.image_names(split) for split in ("train", "val", "test")])
    assert len({*all_names}) == len(all_names) == (65 if layout == "flat" else 3 * 65)
    assert any("cow/brown, young/" in name for name in all_names)


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode there")
def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    flat(tmp_path, num=2)
    (tmp_path / "ant" / "0.png").rename(tmp_path / "ant" / os.fsdecode(b"caf\xe9.png"))
    source = ClassFolders(tmp_path)
    assert "ant/caf\\xe9.png" in [source.image_name("train", index) for index in range(6)]


def test_images_without_files_are_named_by_the_index_in_their_data_set():
    data = ImageDataModule("synthetic", image_size=16)
    data.setup()
    assert data.image_names("test").tolist() == [f"test[{index}]" for index in range(1000)]
    indices = data.split_summary()["val"]
    assert data.image_names("val").tolist() == [f"train[{index}]" for index in indices]


@pytest.mark.parametrize("num", [2, 3, 4, 7, 43])
def test_defaults_fit_any_number_of_images(num, tmp_path):
    data = ready(flat(tmp_path, ("ant", "bee"), num))
    assert sum(sizes(data)) == 2 * num
    assert all(
        data.num_images(split) >= (0 if num == 2 and split == "val" else 2) for split in ("train", "val", "test")
    )
    assert data.batch_size == data.num_images("train")
    assert len(list(data.train_dataloader())) == 1


def test_the_default_batch_leaves_no_batch_of_one_image():
    data = ImageDataModule("synthetic", limit=257, val_fraction=0.0)
    data.setup()
    assert [len(images) for images, _ in data.train_dataloader()] == [127, 127, 3]
    given = ImageDataModule("synthetic", limit=257, val_fraction=0.0, batch_size=64)
    given.setup()
    assert given.batch_size == 64


def test_a_batch_size_that_is_given_and_does_not_fit_is_refused(tmp_path):
    data = ImageDataModule("folder", str(flat(tmp_path)), batch_size=64)
    with pytest.raises(UserError, match=r"--data.batch_size 64.*43"):
        data.setup()


@pytest.mark.parametrize("inner", [".", "train"])
@pytest.mark.parametrize("dataset", [(), ("--data.dataset", "cifar100")])
def test_nothing_is_downloaded_into_class_folders(inner, dataset, tmp_path, monkeypatch, capsys):
    flat(tmp_path / "photos" / inner, num=2)
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--data.root", "photos", *dataset)
    assert "--data.root photos" in message
    assert "--data.dataset folder" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
    assert len(list((tmp_path / "photos").iterdir())) == (3 if inner == "." else 1)


@pytest.mark.parametrize(("name", "expected"), [("0.avif", True), ("0.JFIF", True), ("0.webp", True), ("0.csv", False)])
def test_class_folders_are_known_by_images_of_any_common_format(name, expected, tmp_path):
    for folder in (tmp_path / "ant", tmp_path / "bee"):
        folder.mkdir()
        (folder / name).touch()
    assert holds_class_folders(tmp_path) == expected
