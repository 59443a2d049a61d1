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

from cifar_lightning.data import image_decoding, image_folder
from cifar_lightning.data.image_folder import CACHE_FOLDER, ClassFolders
from cifar_lightning.data.image_set import pixel_hashes
from cifar_lightning.errors import UserError

pytestmark = pytest.mark.usefixtures("decoding_here")


def put(path: Path | bytes, value: int, size: int = 8) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (size, size), (value, 0, 255 - value)).save(file, "PNG")


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

    def spy(paths, *arguments, **options):
        seen.append(len(paths))
        return image_decoding.decode_all(paths, *arguments, **options)

    monkeypatch.setattr(image_folder, "decode_all", spy)
    return seen


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def keep_times(root: Path) -> None:
    """Give all files the same size and times, long ago, as copies from an archive may have."""
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(200, b"\0"))
        os.utime(path, (1, 1))


@pytest.fixture
def settled(monkeypatch):
    """Trust times and inodes at once: otherwise a file must be 2 s old."""
    monkeypatch.setattr(image_folder, "_RACY_NS", 0)


@pytest.fixture
def hashed(monkeypatch):
    """Lists the files that are read to be hashed."""
    seen = []

    def spy(path):
        seen.append(os.path.basename(path))
        return image_decoding.read_file(path)

    monkeypatch.setattr(image_folder, "read_file", spy)
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
        "test-8.files",
        "test-8.json",
        "test-8.npy",
        "train-8.files",
        "train-8.json",
        "train-8.npy",
    ]


def test_each_image_size_has_its_own_cache(root, decoded):
    ClassFolders(root, 8).prepare()
    assert ClassFolders(root, 16).load("train")[0].shape == (6, 16, 16, 3)
    ClassFolders(root, 8).prepare()
    assert decoded == [6, 4, 6]


def test_each_way_to_resize_has_its_own_cache(root, decoded):
    Image.linear_gradient("L").rotate(90).resize((16, 8)).save(root / "train" / "ant" / "0.png")
    images = {}
    for _ in range(2):
        for resize in ("crop", "pad", "squash"):
            images[resize] = ClassFolders(root, 8, resize=resize).load("train").images
    assert decoded == [6, 6, 6]
    assert len({image_set[0].tobytes() for image_set in images.values()}) == 3
    assert {image_set[1].tobytes() for image_set in images.values()} == {images["crop"][1].tobytes()}
    assert (root / CACHE_FOLDER / "train-8.npy").exists()  # as before there was a choice


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


def exchange_classes(root: Path) -> None:
    for split in ("train", "test"):
        exchange(root / split / "ant", root / split / "bee")


def exchange_classes_of_one_split(root: Path) -> None:
    exchange(root / "train" / "ant", root / "train" / "bee")


def exchange_files(root: Path) -> None:
    exchange(root / "train" / "ant" / "0.png", root / "train" / "bee" / "0.png")


def exchange_contents(root: Path) -> None:
    one, other = (root / "train" / name / "0.png" for name in ("ant", "bee"))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    for path in (one, other):
        os.utime(path, (1, 1))


def point_links_elsewhere(root: Path) -> None:
    one, other = (root / "train" / name / "0.png" for name in ("ant", "bee"))
    targets = [path.rename(root / f"{path.parent.name}.png") for path in (one, other)]
    one.symlink_to(targets[1])
    other.symlink_to(targets[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (exchange_classes, [100, 101, 102, 0, 1, 2]),
        (exchange_classes_of_one_split, [100, 101, 102, 0, 1, 2]),
        (exchange_files, [100, 1, 2, 0, 101, 102]),
        (exchange_contents, [100, 1, 2, 0, 101, 102]),
        (point_links_elsewhere, [100, 1, 2, 0, 101, 102]),
    ],
)
def test_labels_exchanged_under_the_same_names_sizes_and_times_are_noticed(change, expected, root, settled):
    keep_times(root)
    before = ClassFolders(root).load("train")
    change(root)
    after = ClassFolders(root).load("train")
    assert reds(after) == expected
    assert after[2] != before[2]


def test_only_files_whose_times_or_inode_changed_are_read_and_nothing_is_decoded(root, settled, decoded, hashed):
    ClassFolders(root).prepare()
    for _ in range(2):
        ClassFolders(root).prepare()
        assert hashed == []
    os.utime(root / "train" / "ant" / "1.png")
    (root / "copy.png").write_bytes((root / "test" / "bee" / "0.png").read_bytes())
    (root / "copy.png").replace(root / "test" / "bee" / "0.png")
    data = ClassFolders(root)
    data.prepare()
    assert hashed == ["1.png", "0.png"]
    assert data.pixel_hashes["train"].tolist() == image_folder.ClassFolders(root)._build("train").pixels.tolist()
    ClassFolders(root).prepare()
    assert hashed == ["1.png", "0.png"], "the new times were not kept"
    assert decoded == [6, 4, 6]  # the last by this test


def test_a_file_that_has_just_changed_is_read_again_though_its_times_agree(root, hashed):
    ClassFolders(root).prepare()
    assert hashed == []
    ClassFolders(root).prepare()
    assert set(hashed) == {"0.png", "1.png", "2.png"}


def test_a_copied_folder_keeps_its_cache(root, tmp_path, settled, decoded):
    ClassFolders(root).prepare()
    shutil.copytree(root, tmp_path / "copy")
    ClassFolders(tmp_path / "copy").prepare()
    assert decoded == [6, 4]


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


def flip(path: Path) -> None:
    """Change one bit, as a failing disk does."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["train-8.npy", "train-8.json", "train-8.files"])
@pytest.mark.parametrize("damage", [cut, lengthen, empty, garble, flip, Path.unlink])
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


@pytest.mark.real_workers
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
    assert {path.name for path in (root / CACHE_FOLDER).iterdir()} == {"train-8.files", "train-8.json", "train-8.npy"}


def test_images_have_the_path_of_the_cache_when_they_were_just_decoded_too(root):
    for _ in range(2):
        images = ClassFolders(root).load("train").images
        assert os.path.samefile(images.filename, root / CACHE_FOLDER / "train-8.npy")
        again = np.memmap(images.filename, np.uint8, "r", images.offset, images.shape)  # as a spawned worker opens it
        assert np.array_equal(again, images)


def test_what_a_killed_process_left_is_cleared_away(root):
    stale = root / CACHE_FOLDER / ".train-8.npy.1-abc.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    ClassFolders(root).load("train")
    assert not stale.exists()


@pytest.mark.real_workers
def test_several_workers_give_the_same_images_as_one(root, monkeypatch):
    monkeypatch.setattr(image_decoding, "usable_cpus", lambda: 2)
    by_one = ClassFolders(root).load("train")
    shutil.rmtree(root / CACHE_FOLDER)
    monkeypatch.setattr(image_decoding, "_IMAGES_PER_WORKER", 1)
    by_two = ClassFolders(root).load("train")
    assert np.array_equal(by_one[0], by_two[0])
    assert by_one[2] == by_two[2]


@pytest.mark.real_workers
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


SYSTEM_FOLDERS = ["@eaDir", "lost+found", "__MACOSX", "$RECYCLE.BIN", "#recycle", "System Volume Information"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names, or keeps them for itself")
def test_files_and_folders_of_systems_are_no_classes_and_no_images(root):
    expected = reds(ClassFolders(root).load("train"))
    for name in SYSTEM_FOLDERS:
        for folder in (root, root / "train", root / "train/ant"):
            put(folder / name / "ant.png" / "0.png", 50)
    (root / "lost+found").chmod(0)
    for folder in (root, root / "train/ant"):
        (folder / "Icon\r").write_bytes(b"")
    data = ClassFolders(root)
    assert data.class_names == ("ant", "bee")
    assert reds(data.load("train")) == expected
    in_train = {f"train/{inner}{name}" for inner in ("", "ant/") for name in SYSTEM_FOLDERS}
    assert {path for path, _ in data.skipped_files} == in_train | {"train/ant/Icon\r"}
    (root / "lost+found").chmod(0o700)


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
        (no_classes, ["no class folders"]),
        (rm("test", "bee"), ["bee", os.sep + "test", "not in both"]),
        (lambda root: put(root / "test" / "cow" / "0.png", 0), ["cow", os.sep + "test", "not in both"]),
        (lambda root: put(root / "val" / "ant" / "0.png", 0), ["bee", os.sep + "val", "not in both"]),
        (empty_class, [os.path.join("test", "bee"), "has no images"]),
        (only_a_note, [os.path.join("test", "bee"), "has no images"]),
        (
            lambda root: put(root / "Valid" / "ant" / "0.png", 0) or put(root / "val" / "bee" / "0.png", 0),
            ["Valid/", "val/"],
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_with_the_difference(spoil, named, root):
    spoil(root)
    with pytest.raises(UserError) as caught:
        ClassFolders(root)
    assert all(part in str(caught.value) for part in (*named, str(root)))
    assert str(caught.value).count("\n") <= 1


def test_a_link_to_nothing_is_refused_as_an_image_that_cannot_be_read(root):
    (root / "train" / "ant" / "x.png").symlink_to("gone")
    with pytest.raises(UserError, match=r"ant/x\.png") as caught:
        ClassFolders(root, 8).prepare()
    assert "Errno" not in str(caught.value)


def spoil(root: Path) -> dict[str, Path]:
    """Make images of both splits unreadable, in several ways."""
    bad = {
        "train/ant/1.png": root / "train" / "ant" / "1.png",
        "train/bee/2.png": root / "train" / "bee" / "2.png",
        "test/bee/0.png": root / "test" / "bee" / "0.png",
        "test/bee/x.heic": root / "test" / "bee" / "x.heic",
    }
    for path in bad.values():
        path.write_text("text")
    return bad


def listed(path: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in map(json.loads, path.read_text("ascii").splitlines())}


def test_unreadable_images_of_all_splits_are_named_counted_and_listed_at_once(root, user_cache):
    bad = spoil(root)
    with pytest.raises(UserError) as caught:
        ClassFolders(root).prepare()
    message = str(caught.value)
    assert message.startswith(str(bad["train/ant/1.png"]))
    assert f"2 of 6 images in {root / 'train'}" in message
    assert f"2 of 5 images in {root / 'test'}" in message
    assert "--data.skip_unreadable" in message
    assert message.count("\n") == 1
    reasons = listed(root / CACHE_FOLDER / "unreadable.jsonl")
    assert reasons.keys() == bad.keys()
    assert all(reason.startswith("cannot be read (") for reason in reasons.values())
    assert list(user_cache.rglob("unreadable.jsonl")) == []
    shutil.rmtree(root / CACHE_FOLDER)
    (root / CACHE_FOLDER).write_text("no folder can be made here")
    with pytest.raises(UserError, match="2 of 5 images") as caught:  # without prepare(), also for one split
        ClassFolders(root).load("train")
    (elsewhere,) = user_cache.rglob("unreadable.jsonl")
    assert listed(elsewhere) == reasons
    assert f"listed in {elsewhere}\n" in str(caught.value)


@pytest.mark.parametrize("cached", [True, False])
def test_unreadable_images_can_be_left_out_always_the_same(cached, root, decoded, monkeypatch, tmp_path, capsys):
    expected = ClassFolders(root, 8)
    bad = spoil(root)
    if not cached:
        (root / CACHE_FOLDER).write_text("")
        monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(root / "train" / "ant" / "0.png"))
    seen = []
    for _ in range(2):
        data = ClassFolders(root)
        data.skip_unreadable = True
        data.prepare()
        assert "4 of 11 images are left out" in capsys.readouterr().out
        images, targets, sha256 = data.load("train")
        assert images[:, 0, 0, 0].tolist() == [0, 2, 100, 101]
        assert targets.tolist() == [0, 0, 1, 1]
        assert sha256 == hashlib.sha256(images.tobytes() + targets.tobytes()).hexdigest()
        assert data.listings["train"].names == ("ant/0.png", "ant/2.png", "bee/0.png", "bee/1.png")
        assert data.pixel_hashes["train"].tolist() == pixel_hashes(np.asarray(images)).tolist()
        assert {path for path, _ in data.skipped_files} == bad.keys()
        assert "4 train + 3 test images" in data.describe()
        seen.append(sha256)
    assert seen[0] == seen[1]
    assert decoded == ([6, 5] if cached else [6, 5, 6, 5])
    for path in bad.values():  # repaired: used again
        put(path, 9)
    assert len(ClassFolders(root).load("train").images) == 6
    assert expected.image_size == 8


def test_a_class_of_which_no_image_can_be_read_is_an_error(root):
    for path in (root / "test" / "bee").iterdir():
        path.write_text("text")
    data = ClassFolders(root)
    data.skip_unreadable = True
    with pytest.raises(UserError, match=r"test: no image of the class bee"):
        data.prepare()


def test_a_file_that_could_not_be_opened_is_tried_at_each_start(root, settled, monkeypatch):
    path = root / "train" / "ant" / "1.png"
    with monkeypatch.context() as patch:

        def refuse(name):
            if name == str(path):
                raise OSError(5, "Input/output error")

        patch.setattr(image_decoding, "_check_file", refuse)
        data = ClassFolders(root)
        data.skip_unreadable = True
        data.prepare()
        assert [name for name, _ in data.skipped_files] == ["train/ant/1.png"]
    assert reds(ClassFolders(root).load("train")) == [0, 1, 2, 100, 101, 102]


def test_all_that_is_not_used_is_listed_with_its_reason_and_what_may_be_a_mistake_is_said(root, capsys):
    put(root / "train" / "loose.png", 1)
    put(root / "train" / ".hidden" / "0.png", 1)
    put(root / "others" / "ant" / "0.png", 1)
    (root / "train" / "bee" / "notes.txt").write_text("")
    (root / "test" / "bee" / ".DS_Store").write_text("")
    data = ClassFolders(root)
    data.prepare()
    assert sorted(path for path, _ in data.skipped_files) == [
        "test/bee/.DS_Store",
        "train/.hidden",
        "train/bee/notes.txt",
        "train/loose.png",
    ]
    out = capsys.readouterr().out
    assert "loose.png" in out
    assert "others" in out
    assert "DS_Store" not in out


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_class_names_are_compared_in_one_unicode_form(root):
    (root / "train" / "ant").rename(root / "train" / NFC)
    (root / "test" / "ant").rename(root / "test" / NFD)
    data = ClassFolders(root)
    assert data.class_names == ("bee", NFC)
    assert reds(data.load("train")) == [100, 101, 102, 0, 1, 2]
    assert reds(data.load("test")) == [100, 101, 0, 1]
    assert data.load("test").targets.tolist() == [0, 0, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names in any form, and names that are not UTF-8")
@pytest.mark.parametrize("names", [(NFC, NFD), (os.fsdecode(b"lat\xff"), "lat\\xff")])
def test_two_folders_that_would_be_one_class_are_refused(names, root):
    for split in ("train", "test"):
        for name in names:
            put(root / split / name / "0.png", 1)
    with pytest.raises(UserError) as caught:
        ClassFolders(root)
    assert all(ascii(name) in str(caught.value) for name in names)
    assert str(caught.value).count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not UTF-8")
def test_names_that_are_not_utf8_are_shown_escaped_everywhere(root, capsys):
    odd = os.fsdecode(b"lat\xff\x1b[31m")
    for split in ("train", "test"):
        put(root / split / odd / "0.png", 1)
    (root / "train" / odd / os.fsdecode(b"\xfe.png")).write_text("no image")
    (root / "train" / os.fsdecode(b"\xfd.txt")).write_text("loose")
    with pytest.raises(UserError):
        ClassFolders(root).prepare()
    assert len(listed(root / CACHE_FOLDER / "unreadable.jsonl")) == 1
    data = ClassFolders(root)
    data.skip_unreadable = True
    data.prepare()
    out = capsys.readouterr().out
    out.encode("utf-8")
    assert "\x1b" not in out
    assert "\\udcfe.png" in out


def dangling_class(root: Path) -> None:
    (root / "train" / "cow").symlink_to("gone")


def looping_class(root: Path) -> None:
    (root / "train" / "cow").symlink_to("cow")


def dangling_split(root: Path) -> None:
    (root / "val").symlink_to("gone")


@pytest.mark.parametrize("spoil_by", [dangling_class, looping_class, dangling_split])
def test_a_class_or_split_that_is_a_link_to_nothing_is_refused(spoil_by, root):
    spoil_by(root)
    with pytest.raises(UserError, match=r"cow|val"):
        ClassFolders(root)


@pytest.mark.parametrize(("num", "bad"), [(1, [0]), (5, [0]), (5, [4]), (5, [1, 3]), (5, [0, 1, 2, 3, 4]), (5, [])])
def test_rows_are_dropped_in_place(num, bad, tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (num, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", rows)
    image_folder.drop_rows(tmp_path / "a.npy", bad)
    np.save(tmp_path / "b.npy", np.delete(rows, bad, axis=0))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
