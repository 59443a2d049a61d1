"""Labels in a CSV or JSON lines: which images, classes and splits they give, and what is refused by file and line."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from cifar_lightning.data import image_folder
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.image_folder import CACHE_FOLDER, ClassFolders
from cifar_lightning.data.labels_file import read_labels
from cifar_lightning.errors import UserError
from cifar_lightning.files import stat_numbers

pytestmark = pytest.mark.usefixtures("decoding_here")


@pytest.fixture
def root(tmp_path):
    """Six images of one gray value each, 10 to 60: `1.png` to `5.png`, and one in a subfolder with a comma."""
    root = tmp_path / "photos"
    for number in range(1, 7):
        put(root / (f"{number}.png" if number < 6 else "old, new/6.png"), 10 * number)
    return root


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def written(tmp_path, content, name="labels.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def labelled(data):
    """Return {gray value of an image: (split, class name)}."""
    data.prepare()
    found = {}
    for split in data.listings:
        images, targets, _ = data.load(split)
        for value, target in zip(images[:, 0, 0, 0].tolist(), targets.tolist(), strict=True):
            found[value] = (split, data.class_names[target])
    return found


PLAIN = 'path,label\n1.png,cat\n2.png,dog\n3.png,cat\n"old, new/6.png",dog\n'
EXPECTED = {10: ("train", "cat"), 20: ("train", "dog"), 30: ("train", "cat"), 60: ("train", "dog")}
EXCEL = PLAIN.replace('"old, new/6.png"', "old, new/6.png").replace(",", ";").replace("old;", "old,")
OTHER_HEADER = (
    PLAIN.replace("path,label", " File_Name , CLASS,note").replace("cat\n", "cat,\n").replace("dog\n", "dog,x\n")
)
TABS = "\n" + "\n".join("\t".join(reversed(row.rsplit(",", 1))) for row in PLAIN.splitlines()) + "\n\t\n"
JSON_LINES = "".join(
    json.dumps({"label": label, "path": path, "size": 3}) + "\n\n"
    for path, label in (("1.png", "cat"), ("2.png", "dog"), ("3.png", "cat"), ("old, new/6.png", "dog"))
)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (PLAIN, "labels.csv"),
        (PLAIN.replace("\n", "\r\n").encode("utf-8-sig"), "labels.csv"),
        (EXCEL.encode("utf-16"), "labels.txt"),
        (OTHER_HEADER, "a.csv"),
        (TABS, "labels.tsv"),
        (PLAIN.replace("old, new/", "old, new\\").replace("1.png", "./x/../1.png"), "labels.csv"),
        (JSON_LINES, "labels.jsonl"),
        (JSON_LINES.replace('"path"', '"image"').replace("\n\n", "\r\n").encode("utf-8-sig"), "labels.csv"),
    ],
)  # fmt: skip
def test_every_way_to_write_the_same_labels_gives_the_same_images(content, name, root, tmp_path):
    data = ClassFolders(root, labels=written(tmp_path, content, name))
    assert data.class_names == ("cat", "dog")
    assert labelled(data) == EXPECTED
    assert labelled(ClassFolders(root, labels=written(tmp_path, content, name))) == EXPECTED  # from the cache


def test_images_are_named_below_the_root_however_the_labels_file_spells_them(root, tmp_path):
    path = written(
        root,
        f"path,label\n./1.png,cat\n{root}/2.png,dog\n3.png,cat\nold, new\\6.png,dog\n".replace(
            "old, new\\6.png", '"old, new\\6.png"'
        ),
    )
    source = ClassFolders(root, labels=path)
    assert [source.image_name("train", index) for index in range(4)] == ["1.png", "3.png", "2.png", "old, new/6.png"]


def test_splits_have_the_names_of_split_folders_in_any_case(root, tmp_path):
    words = ["train", "Training", "valid", "validation", "TEST", "testing"]
    files = ["1.png", "2.png", "3.png", "4.png", "5.png", "old, new/6.png"]
    rows = "".join(f'"{file}",{"ab"[k % 2]},{word}\n' for k, (file, word) in enumerate(zip(files, words, strict=True)))
    found = labelled(ClassFolders(root, labels=written(tmp_path, "image,target,subset\n" + rows)))
    splits = ["train", "train", "val", "val", "test", "test"]
    assert found == {10 * (k + 1): (split, "ab"[k % 2]) for k, split in enumerate(splits)}


def test_paths_may_begin_at_the_labels_file_or_be_absolute_below_the_root(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    for text in ("photos/1.png", str(root / "1.png"), str(link / "1.png"), str(root / ".." / "photos" / "1.png")):
        for given in (root, link):
            if given == root and "link" in text:
                continue
            data = ClassFolders(given, labels=written(tmp_path, f"path,label\n{text},cat\n2.png,dog\n"))
            assert labelled(data) == {10: ("train", "cat"), 20: ("train", "dog")}


def test_names_in_either_unicode_form_find_their_files(root, tmp_path):
    put(root / "cafe\u0301.png", 70)
    data = ClassFolders(root, labels=written(tmp_path, "path,label\ncaf\u00e9.png,e\u0301\n1.png,\u00e9\n2.png,b\n"))
    assert labelled(data) == {10: ("train", "\u00e9"), 20: ("train", "b"), 70: ("train", "\u00e9")}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "0", "2"], ("0", "2", "10")),
        (["10", "-1", "2"], ("-1", "2", "10")),
        (["10", "2", "x"], ("10", "2", "x")),
        (["b", "B", "a"], ("B", "a", "b")),
        (["2", "9" * 5000, "10"], ("10", "2", "9" * 5000)),
    ],
)
@pytest.mark.parametrize("is_json", [False, True])
def test_classes_are_sorted_by_name_and_whole_numbers_by_value(labels, expected, is_json, root, tmp_path):
    rows = [(f"{at + 1}.png", label) for at, label in enumerate(labels)]
    content = "path,label\n" + "".join(f"{path},{label}\n" for path, label in rows)
    if is_json:
        values = [
            (path, int(label) if label.lstrip("-").isdigit() and len(label) < 9 else label) for path, label in rows
        ]
        content = "".join(json.dumps({"path": path, "label": label}) + "\n" for path, label in values)
    data = ClassFolders(root, labels=written(tmp_path, content))
    assert data.class_names == expected
    assert {class_name for _, class_name in labelled(data).values()} == set(expected)


def test_a_label_that_is_no_unicode_text_is_shown_escaped(root, tmp_path):
    content = "".join(f'{{"path": "{at}.png", "label": "{name}"}}\n' for at, name in ((1, "cat"), (2, "\\ud83d dog")))
    assert ClassFolders(root, labels=written(tmp_path, content)).class_names == ("\\ud83d dog", "cat")


@pytest.mark.parametrize(
    ("content", "line", "named"),
    [
        ("1.png,cat\n2.png,dog\n", 1, ["no path and no label", "1.png", "path,label"]),
        ("", 1, ["no path and no label"]),
        ("path,kind\n1.png,cat\n", 1, ["no label", "kind"]),
        (PLAIN + "gone.png,dog\n7.png,cat\n", 6, ["gone.png", "1 more of 6"]),
        (PLAIN + "4.png,x,y\n", 6, ["3 cells", "has 2"]),
        (PLAIN + "4.png\n", 6, ["1 cells", "has 2"]),
        (PLAIN + '"old, new",cat\n', 6, ["old, new", "no file"]),
        (PLAIN + "1.png,cat\n", 6, ["1.png", "line 2"]),
        (PLAIN + "./1.png,dog\n", 6, ["1.png", "line 2", "as cat, here as dog"]),
        (PLAIN + "4.png, \n", 6, ["label", "empty"]),
        (PLAIN + ",cat\n", 6, ["path", "empty"]),
        (PLAIN + '"4.png,cat\n', 6, ["not a CSV"]),
        (PLAIN + "../labels.csv,cat\n", 6, ["../labels.csv", "outside"]),
        (PLAIN + f"{os.path.abspath(__file__)},cat\n", 6, ["test_labels_file.py", "outside"]),
        (PLAIN + "4\0.png,cat\n", 6, ["4"]),
        (PLAIN.encode() + b"4.png,caf\xe9\n", 6, ["UTF-8"]),
        ("path,label,split\n1.png,cat,train\n2.png,dog,dev\n", 3, ["dev", "train", "validation"]),
        ("path,label,split\n1.png,cat,train\n2.png,dog,\n", 3, ["split", "empty"]),
        (JSON_LINES + '{"path": "4.png", "label": true}\n', 9, ["true"]),
        (JSON_LINES + '{"path": "4.png", "label": 0.5}\n', 9, ["0.5"]),
        (JSON_LINES + '{"path": "4.png", "label": ["cat"]}\n', 9, ["cat"]),
        (JSON_LINES + '{"path": "4.png"}\n', 9, ["no label"]),
        (JSON_LINES + '{"path": 4, "label": "cat"}\n', 9, ["path", "4"]),
        (JSON_LINES + '{"path": "4.png", "label": "cat", "split": "train"}\n', 9, ["split"]),
        (JSON_LINES + '{"path": "4.png",\n', 9, ["JSON"]),
        (JSON_LINES + "[1]\n", 9, ["JSON"]),
        (JSON_LINES + '{"path": "\\ud800.png", "label": "cat"}\n', 9, ["ud800"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_line(content, line, named, root, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as caught:
        ClassFolders(root, labels=path)
    message = str(caught.value)
    assert f"--data.labels {path}, line {line}:" in message
    assert all(word in message for word in named)
    assert message.count("\n") <= 1
    assert message.isprintable()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("path,label\n", ["no rows"]),
        ("path,label,split\n1.png,cat,train\n2.png,dog,train\n3.png,cat,test\n", ["test", "dog"]),
        ("path,label,split\n1.png,cat,test\n2.png,dog,test\n", ["train"]),
        (None, ["cannot be read"]),
    ],
)
def test_labels_without_what_training_needs_are_refused(content, named, root, tmp_path):
    path = tmp_path if content is None else written(tmp_path, content)
    with pytest.raises(UserError) as caught:
        ClassFolders(root, labels=path)
    assert all(word in str(caught.value) for word in (*named, f"--data.labels {path}"))


def test_labels_need_the_data_set_folder(tmp_path):
    with pytest.raises(UserError, match=r"--data\.labels x\.csv.*--data\.dataset folder"):
        ImageDataModule("cifar10", str(tmp_path), labels="x.csv")


def test_the_data_module_splits_labels_without_splits_as_flat_folders_and_saves_the_split(root, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"n{number}.png")
    put(root / "n40.png", 0)
    (root / "n40.png").write_bytes((root / "n0.png").read_bytes())  # the same image under another label
    (root / "bad.png").write_text("text")
    rows = "".join(f"n{number}.png,{'even' if number % 2 else 'odd'}\n" for number in range(40))
    path = written(tmp_path, f"path,label\n{rows}n40.png,even\nbad.png,odd\n")
    with pytest.raises(UserError, match=r"bad\.png cannot be read"):
        ImageDataModule("folder", str(root), labels=str(path)).prepare_data()
    data = ImageDataModule("folder", str(root), labels=str(path), skip_unreadable=True)
    data.prepare_data()
    data.setup()
    assert [data.num_images(split) for split in ("train", "val", "test")] == [30, 3, 8]
    assert "--data.test_fraction" in capsys.readouterr().out
    assert [file for file, _ in data.skipped_files] == ["bad.png"]
    assert [kind["kind"] for kind in data.duplicates if kind["kind"] == "other label"] == ["other label"]
    assert {"n0.png", "n40.png"} == {
        *next(kind for kind in data.duplicates if kind["kind"] == "other label")["first"][0]
    }
    assert str(path) in data.split_summary()["dataset"]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_images_that_another_process_has_put_in_the_place_of_these_are_noticed(limit, root, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "READ_BEFORE_BYTES", limit)
    rows = "path,label,split\n1.png,cat,train\n2.png,dog,train\n3.png,cat,test\n4.png,dog,test\n"
    ours = written(tmp_path, rows)
    (tmp_path / "fold2").mkdir()
    theirs = written(tmp_path / "fold2", rows.replace("1.png", "5.png"))  # the name is that of our labels
    expected = {10: ("train", "cat"), 20: ("train", "dog"), 30: ("test", "cat"), 40: ("test", "dog")}
    assert labelled(ClassFolders(root, labels=ours)) == expected
    notes = {path: path.read_bytes() for path in (root / CACHE_FOLDER).glob("train*") if path.suffix != ".npy"}
    assert 50 in labelled(ClassFolders(root, labels=theirs))
    for path, content in notes.items():
        path.write_bytes(content)  # as where both publish at once
    assert labelled(ClassFolders(root, labels=ours)) == expected


def test_changed_labels_are_noticed_though_no_image_changed(root, tmp_path):
    rows = "path,label,split\n1.png,cat,train\n2.png,dog,train\n3.png,cat,test\n4.png,dog,test\n"
    path = written(tmp_path, rows)
    first = {split: ClassFolders(root, labels=path).load(split).sha256 for split in ("train", "test")}
    for changed in (
        rows.replace("1.png,cat", "1.png,dog").replace("2.png,dog", "2.png,cat"),
        rows.replace("1.png,cat,train", "1.png,cat,test").replace("3.png,cat,test", "3.png,cat,train"),
    ):
        data = ClassFolders(root, labels=written(tmp_path, changed))
        assert data.load("train").sha256 != first["train"]
        assert labelled(data)[10] != ("train", "cat")
    other = ClassFolders(root, labels=written(tmp_path, changed, "fold2.csv"))
    other.prepare()
    caches = {file.name for file in (root / CACHE_FOLDER).glob("*.npy")}
    assert len(caches) == 4  # of two splits: neither labels file replaces the images of the other


def test_the_root_is_resolved_once_for_all_rows(root, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(root, target_is_directory=True)
    resolved, realpath = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **kwargs: resolved.append(path) or realpath(path, **kwargs))
    rows = read_labels(written(tmp_path, PLAIN.replace("3.png", str(root / "3.png"))), link)
    assert len([path for path in resolved if str(path) == str(link)]) == 1
    assert [row.name for row in rows] == ["1.png", "2.png", "3.png", os.path.join("old, new", "6.png")]
    assert [row.about for row in rows] == [stat_numbers(os.stat(root / row.name)) for row in rows]
