"""Class folders: what is a class, what is refused, and a cache that is never wrong."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import decode_here

from cifar_lightning.data import image_decoding, image_folder
from cifar_lightning.data.image_folder import CACHE_FOLDER, ClassFolders
from cifar_lightning.errors import UserError


def put(path: Path | bytes, value: int, size: int = 8) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (size, size), (value, 0, 255 - value)).save(file, "PNG")


@pytest.fixture(autouse=True)
def _decoding_here(request, monkeypatch):
    if not any(word in request.node.name for word in ("workers", "several_at_once")):
        decode_here(monkeypatch)


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(folder))
    return folder


@pytest.fixture
def root(tmp_path):
    """Two classes, three images of each in train and two in test; each of one colour."""
    root = tmp_path / "data"
    for split, count in (("train", 3), ("test", 2)):
        for offset, name in ((0, "ant"), (100, "bee")):
            for number in range(count):
                put(root / split / name / f"{number}.png", offset + number)
    return root


@pytest.fixture
def decoded(monkeypatch):
    """Lists the sets of images that are decoded."""
    seen = []

    def spy(paths, image_size, out):
        seen.append(len(paths))
        return image_decoding.decode_all(paths, image_size, out)

    monkeypatch.setattr(image_folder, "decode_all", spy)
    return seen


def reds(found: tuple[np.ndarray, np.ndarray, str]) -> list[int]:
    return found[0][:, 0, 0, 0].tolist()


def test_images_come_in_class_order_with_their_targets(root):
    data = ClassFolders(root)
    assert data.class_names == ("ant", "bee")
    assert data.image_size == 8
    images, targets, sha256 = data.load("train")
    assert images.shape == (6, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert targets.dtype == np.int64
    assert sha256 == hashlib.sha256(images.tobytes() + targets.tobytes()).hexdigest()
    assert data.load("val") is None


def test_a_second_start_decodes_nothing(root, decoded):
    ClassFolders(root).prepare()
    assert decoded == [6, 4]
    data = ClassFolders(root)
    data.prepare()
    images, _, _ = data.load("train")
    assert decoded == [6, 4]
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable
    assert sorted(path.name for path in (root / CACHE_FOLDER).iterdir()) == [
        "test-8.json",
        "test-8.npy",
        "train-8.json",
        "train-8.npy",
    ]


def test_each_image_size_has_its_own_cache(root, decoded):
    ClassFolders(root, 8).prepare()
    assert ClassFolders(root, 16).load("train")[0].shape == (6, 16, 16, 3)
    ClassFolders(root, 8).prepare()
    assert decoded == [6, 4, 6]


def add(root: Path) -> None:
    put(root / "train" / "ant" / "9.png", 9)


def remove(root: Path) -> None:
    (root / "train" / "ant" / "0.png").unlink()


def rename(root: Path) -> None:
    (root / "train" / "ant" / "0.png").rename(root / "train" / "bee" / "0b.png")


def repaint(root: Path) -> None:
    path = root / "train" / "ant" / "0.png"
    stat = path.stat()
    put(path, 5)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add, [0, 1, 2, 9, 100, 101, 102]),
        (remove, [1, 2, 100, 101, 102]),
        (rename, [1, 2, 100, 0, 101, 102]),
        (repaint, [5, 1, 2, 100, 101, 102]),
    ],
)
def test_a_changed_folder_is_noticed_and_decoded_again(change, expected, root, decoded, capsys):
    ClassFolders(root).prepare()
    change(root)
    assert reds(ClassFolders(root).load("train")) == expected
    assert "decoding them again" in capsys.readouterr().out
    assert len(decoded) == 3


def test_a_renamed_class_is_noticed(root):
    ClassFolders(root).prepare()
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "cow")
    data = ClassFolders(root)
    assert data.class_names == ("bee", "cow")
    assert reds(data.load("train")) == [100, 101, 102, 0, 1, 2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("name", ["train-8.npy", "train-8.json"])
@pytest.mark.parametrize("damage", [cut, lengthen, empty, garble, Path.unlink])
def test_a_damaged_cache_is_noticed_and_made_again(damage, name, root, decoded):
    ClassFolders(root).prepare()
    damage(root / CACHE_FOLDER / name)
    assert reds(ClassFolders(root).load("train")) == [0, 1, 2, 100, 101, 102]
    ClassFolders(root).prepare()
    assert decoded == [6, 4, 6]


def test_a_cache_of_other_rules_is_made_again(root, decoded, monkeypatch):
    ClassFolders(root).prepare()
    monkeypatch.setattr(image_folder, "RULES", image_folder.RULES + 1)
    ClassFolders(root).load("train")
    assert decoded == [6, 4, 6]


def test_a_crash_between_images_and_note_leaves_nothing_that_is_trusted(root, decoded, monkeypatch):
    ClassFolders(root).prepare()
    before = {path: path.stat().st_mtime_ns for path in sorted((root / "train").rglob("*.png"))}
    repaint(root)

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            ClassFolders(root).load("train")
    put(root / "train" / "ant" / "0.png", 0)  # the folder goes back to what it was, to the nanosecond
    for path, mtime_ns in before.items():
        os.utime(path, ns=(mtime_ns, mtime_ns))
    assert reds(ClassFolders(root).load("train")) == [0, 1, 2, 100, 101, 102]


def test_a_folder_that_cannot_be_written_is_cached_for_the_user_and_says_so(root, user_cache, decoded, capsys):
    (root / CACHE_FOLDER).write_text("a file where the folder would be")
    ClassFolders(root).prepare()
    assert f"{root} is read-only or full" in capsys.readouterr().out
    assert len(list(user_cache.rglob("*.npy"))) == 2
    assert reds(ClassFolders(root).load("train")) == [0, 1, 2, 100, 101, 102]
    assert decoded == [6, 4]


def test_two_roots_share_no_user_cache(root, tmp_path):
    twin = tmp_path / "other" / "data"
    shutil.copytree(root, twin)
    for place in (root, twin):
        (place / CACHE_FOLDER).write_text("")
    put(twin / "train" / "ant" / "0.png", 77)
    ClassFolders(root).prepare()
    assert reds(ClassFolders(twin).load("train"))[0] == 77
    assert reds(ClassFolders(root).load("train"))[0] == 0


def test_without_any_place_to_write_it_works_in_memory_and_says_so(root, tmp_path, monkeypatch, decoded, capsys):
    (root / CACHE_FOLDER).write_text("")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "file"))
    data = ClassFolders(root)
    data.prepare()
    found = data.load("train")
    assert reds(found) == [0, 1, 2, 100, 101, 102]
    assert found[2] == hashlib.sha256(found[0].tobytes() + found[1].tobytes()).hexdigest()
    assert decoded == [6, 4]
    assert "CIFAR_LIGHTNING_CACHE" in capsys.readouterr().out


def test_a_full_disk_is_found_out_before_decoding(root, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert reds(ClassFolders(root).load("train")) == [0, 1, 2, 100, 101, 102]
    assert not list((root / CACHE_FOLDER).iterdir())


def test_several_at_once_all_read_the_same_and_leave_no_litter(root):
    results: list[tuple[list[int], str]] = []

    def start() -> None:
        found = ClassFolders(root).load("train")
        results.append((reds(found), found[2]))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(result == results[0] for result in results)
    assert results[0][0] == [0, 1, 2, 100, 101, 102]
    assert {path.name for path in (root / CACHE_FOLDER).iterdir()} == {"train-8.json", "train-8.npy"}


def test_what_a_killed_process_left_is_cleared_away(root):
    stale = root / CACHE_FOLDER / ".train-8.npy.1-abc.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    ClassFolders(root).load("train")
    assert not stale.exists()


def test_several_workers_give_the_same_images_as_one(root, monkeypatch):
    monkeypatch.setattr(image_decoding, "usable_cpus", lambda: 2)
    by_one = ClassFolders(root).load("train")
    shutil.rmtree(root / CACHE_FOLDER)
    monkeypatch.setattr(image_decoding, "_IMAGES_PER_WORKER", 1)
    by_two = ClassFolders(root).load("train")
    assert np.array_equal(by_one[0], by_two[0])
    assert by_one[2] == by_two[2]


def test_a_script_without_main_guard_is_not_run_again_by_workers(root, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(image_folder.__file__).parents[2])!r})\n"
        "print('started')\n"
        "from cifar_lightning.data import image_decoding, image_folder\n"
        "image_decoding._IMAGES_PER_WORKER, image_decoding.usable_cpus = 1, lambda: 2\n"
        f"print(len(image_folder.ClassFolders({str(root)!r}).load('train')[1]))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.count("started") == 1
    assert done.stdout.splitlines()[-1] == "6"
    assert done.stderr == ""


def test_hidden_files_and_folders_are_no_classes_and_no_images(root):
    put(root / "train" / ".ipynb_checkpoints" / "a.png", 50)
    put(root / "train" / "ant" / ".hidden.png", 50)
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"windows")
    (root / "train" / "labels.csv").write_text("next to the classes")
    data = ClassFolders(root)
    assert data.class_names == ("ant", "bee")
    assert reds(data.load("train")) == [0, 1, 2, 100, 101, 102]


def test_notes_next_to_images_are_ignored_and_counted_and_nothing_changes(root, capsys):
    before = ClassFolders(root).load("train")
    for name in ("readme.txt", "labels.CSV", "about.json", "photo.xml"):
        (root / "train" / "bee" / name).write_text("next to the images")
    data = ClassFolders(root)
    data.prepare()
    data.prepare()  # as Lightning does before each of fit, validate and test
    assert (
        capsys.readouterr().out.count(f"{root / 'train'}: 4 files ignored, not images (.CSV, .json, .txt, .xml)\n") == 1
    )
    assert data.load("train")[2] == before[2]


@pytest.mark.parametrize("name", ["a.jpg", "a.heic", "a", "a.unknown"])
def test_what_may_be_an_image_and_cannot_be_read_is_an_error(name, root):
    (root / "train" / "bee" / name).write_text("no image")
    with pytest.raises(UserError, match="cannot be read"):
        ClassFolders(root, 8).prepare()


def put_deep(path: Path, most: int, mode: str = "gray") -> None:
    values = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
    if mode == "gray":
        Image.fromarray(values).save(path)
        return
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)


@pytest.mark.parametrize("mode", ["gray", "colour"])
@pytest.mark.parametrize(("others", "is_warned"), [(4095, True), (1023, True), (40_000, False)])
def test_16_bit_files_with_values_of_12_bits_are_warned_of_at_each_start(others, is_warned, mode, root, capsys):
    put_deep(root / "train" / "ant" / "0.png", 4095, mode)  # dark among bright ones is as it should be
    for path in (root / "train" / "bee").iterdir():
        put_deep(path, others, mode)
    for _ in range(2):
        ClassFolders(root).prepare()
        out = capsys.readouterr().out
        assert ("the 4 16-bit images in a sample of 6 are nearly black" in out) == is_warned
        assert ("warning" in out) == is_warned


def test_unusual_images_are_remarked_at_each_start_also_from_the_cache(root, decoded, capsys):
    unused = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    unused[..., 3] = 0
    Image.fromarray(unused).save(root / "train" / "bee" / "1.png")
    outs = []
    for _ in range(2):
        ClassFolders(root).prepare()
        outs.append(capsys.readouterr().out.splitlines())
    assert outs[0] == outs[1]
    assert len(decoded) == 2
    for words in (("1 of 6", "alpha 0", "bee/1.png"), ("5 of 6", "one colour", "ant/0.png"), ("4 of 4", "one colour")):
        assert sum(all(word in line for word in words) for line in outs[1]) == 1, outs[1]


def test_dark_images_of_8_bits_are_not_warned_of(root, capsys):
    Image.new("RGB", (8, 8), (3, 3, 3)).save(root / "train" / "ant" / "0.png")
    ClassFolders(root).prepare()
    assert "warning" not in capsys.readouterr().out


def rm(*parts: str):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty_class(root: Path) -> None:
    for image in (root / "test" / "bee").iterdir():
        image.unlink()


def only_a_note(root: Path) -> None:
    empty_class(root)
    (root / "test" / "bee" / "readme.txt").write_text("none yet")


def no_classes(root: Path) -> None:
    for name in ("ant", "bee"):
        shutil.rmtree(root / "train" / name)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (rm(), ["--data.root", "no such folder", "train/<class>"]),
        (rm("train"), ["no folder train/"]),
        (rm("test"), ["no folder test/"]),
        (no_classes, ["no class folders"]),
        (rm("test", "bee"), ["bee", os.sep + "test", "not in both"]),
        (lambda root: put(root / "test" / "cow" / "0.png", 0), ["cow", os.sep + "test", "not in both"]),
        (lambda root: put(root / "val" / "ant" / "0.png", 0), ["bee", os.sep + "val", "not in both"]),
        (empty_class, [os.path.join("test", "bee"), "has no images"]),
        (only_a_note, [os.path.join("test", "bee"), "has no images"]),
        (
            lambda root: put(root / "train" / "ant" / "more" / "0.png", 0),
            [os.path.join("ant", "more"), "folder inside"],
        ),
        (lambda root: (root / "train" / "ant" / "x.png").symlink_to("gone"), ["x.png", "cannot be read"]),
    ],
)
def test_folders_that_do_not_fit_are_refused_with_the_difference(spoil, named, root):
    spoil(root)
    with pytest.raises(UserError) as caught:
        ClassFolders(root)
    assert all(part in str(caught.value) for part in (*named, str(root)))
    assert str(caught.value).count("\n") <= 1


def test_unreadable_images_are_named_counted_and_listed(root):
    bad = [root / "train" / "ant" / "1.png", root / "train" / "bee" / "2.png"]
    for path in bad:
        path.write_text("text")
    with pytest.raises(UserError) as caught:
        ClassFolders(root).prepare()
    message = str(caught.value)
    assert message.startswith(str(bad[0]))
    assert f"2 of 6 images in {root / 'train'}" in message
    assert message.count("\n") == 1
    listed = (root / CACHE_FOLDER / "unreadable-train.txt").read_text()
    assert all(str(path) in listed for path in bad)
    assert {path.suffix for path in (root / CACHE_FOLDER).iterdir()} == {".txt"}


def test_spaces_umlauts_and_names_that_are_not_utf_8_work(tmp_path):
    root = tmp_path / "Bilder für uns"
    for split in (b"train", b"test"):
        for value, name in enumerate((b"a b", "Vögel".encode(), b"caf\xe9")):
            try:
                put(os.path.join(os.fsencode(root), split, name, b"\xff 1.png"), value)
            except OSError:
                pytest.skip("this file system takes UTF-8 names only")
    data = ClassFolders(root)
    assert data.class_names == ("Vögel", "a b", "caf\\xe9")
    data.prepare()
    assert reds(ClassFolders(root).load("train")) == [1, 0, 2]
    note = json.loads((root / CACHE_FOLDER / "train-8.json").read_text("utf-8"))
    assert note["class_names"] == list(data.class_names)
