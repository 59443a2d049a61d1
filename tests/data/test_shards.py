"""Shards: what `shard` writes is what the folder holds, read in an order of their own, and damage is noticed."""

import errno
import json
import os
import pickle
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from program import decode_here

from cifar_lightning import ImageDataModule
from cifar_lightning.data import datamodule, image_folder, memory
from cifar_lightning.data import shards as shards_module
from cifar_lightning.data.image_decoding import RULES
from cifar_lightning.data.image_folder import ClassFolders, user_cache
from cifar_lightning.data.sampler import EpochSampler, Rank, ShardOrder
from cifar_lightning.data.shard_writer import write_shards
from cifar_lightning.data.shards import Shards, ShardsIndex
from cifar_lightning.data.statistics import channel_statistics, moments, statistics_of_moments
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import file_sha256


@contextmanager
def refused(*words):
    with pytest.raises(UserError) as caught:
        yield
    assert all(word in str(caught.value) for word in words), caught.value
    assert "http" not in str(caught.value)


SIZE, NUM = 16, 24  # pixels of the finished images, training images of each class


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders of small PNG files and of JPEG files twice as large as the finished images."""
    root = tmp_path_factory.mktemp("folders") / "data"
    random = np.random.default_rng(0)
    for split, count in (("train", NUM), ("test", 4)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for at in range(count):
                is_jpeg = at % 2
                size = 2 * SIZE if is_jpeg else SIZE
                image = Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8))
                image.save(root / split / name / f"{at}.{'jpg' if is_jpeg else 'png'}")
    return root


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """The same as shards of about six images."""
    output = tmp_path_factory.mktemp("written") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        decode_here(patch)
        write_shards(ClassFolders(folders, SIZE), output, shard_bytes=6_000)
    return output


@pytest.fixture
def shards(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "shards")


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    decode_here(monkeypatch)
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "cache"))


def data_of(root, **settings):
    settings = {"batch_size": 8, "val_fraction": 0.25, "num_workers": 1, **settings}
    data = ImageDataModule("shards", str(root), **settings)
    data.prepare_data()
    data.setup()
    return data


def test_shards_hold_the_images_of_the_folder_and_large_jpegs_stay_files(folders, written):
    source, folder = Shards(str(written)), ClassFolders(folders, SIZE)
    assert source.class_names == folder.class_names
    for split in ("train", "test"):
        ours, theirs = source.load(split), folder.load(split)
        place = {folder.image_name(split, index): index for index in range(len(theirs.targets))}
        order = [place[source.image_name(split, index)] for index in range(len(ours.targets))]
        assert sorted(order) == list(range(len(order)))
        assert np.array_equal(ours.images[:], theirs.images[order])
        assert np.array_equal(ours.targets, theirs.targets[order])
        assert np.array_equal(source.pixel_hashes[split], folder.pixel_hashes[split][order])
    held = b"".join(path.read_bytes() for path in (written / "train").glob("*.bin"))
    assert (folders / "train/ant/1.jpg").read_bytes() in held
    assert (folders / "train/ant/0.png").read_bytes() not in held


def test_litdata_reads_them_too(written):
    from litdata import StreamingDataset

    read = list(StreamingDataset(str(written / "test"), shuffle=False))
    ours = Shards(str(written)).load("test")
    assert [row["label"] for row in read] == ours.targets.tolist()
    assert np.array_equal(np.frombuffer(read[0]["image"], np.uint8).reshape(SIZE, SIZE, 3), ours.images[0])


def test_moments_give_the_statistics_of_the_images():
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    some = np.array([1, 4, 17])
    ours, theirs = statistics_of_moments(moments(images)[some]), channel_statistics(images, some)
    assert np.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize(("num_ranks", "left_out"), [(1, 0), (2, 0), (3, 5)])
def test_an_epoch_shows_each_image_once_and_a_shard_to_few_workers(num_ranks, num_workers, left_out):
    num = 240
    indices = torch.from_numpy(np.delete(np.arange(num), np.arange(left_out) * 7))
    order = ShardOrder(np.arange(0, num + 1, 10), 4, num_workers)

    def of_rank(rank, epoch=0):
        settings = {"seed": 3, "training": True, "rank": Rank(rank, num_ranks), "shards": order}
        sampler = EpochSampler(indices, 7, **settings)
        sampler.set_epoch(epoch)
        return sampler.begin()

    dealt = [of_rank(rank) for rank in range(num_ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    assert {len(batch) for batches in dealt for batch in batches[:-1]} == {7}
    shown = torch.cat([torch.cat(batches) for batches in dealt])
    assert set(shown.tolist()) == set(indices.tolist())
    assert len(shown) - len(indices) < num_ranks  # repeated where the ranks do not divide them
    readers = [{(rank, k % num_workers) for rank in range(num_ranks) for k, batch in enumerate(dealt[rank])
                if (batch // 10 == shard).any()} for shard in range(24)]  # fmt: skip
    assert sum(len(each) - 1 for each in readers) < num_ranks * num_workers
    first = torch.cat([of_rank(0)[k] for k in range(0, len(dealt[0]), num_workers)][:5])
    assert len(set((first // 10).tolist())) <= 4 + 1 + 1  # the first window, and a piece of a shard at its start
    assert torch.cat(of_rank(0, 1)).tolist() != torch.cat(dealt[0]).tolist()
    assert torch.cat(of_rank(0)).tolist() == torch.cat(dealt[0]).tolist()


def test_a_loader_resumes_within_an_epoch_to_the_bit_at_the_same_workers_alone(written):
    whole = [
        (images.clone(), targets.clone()) for images, targets in data_of(written, num_workers=2).train_dataloader()
    ]
    loader = data_of(written, num_workers=2).train_dataloader()
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    again = data_of(written, num_workers=2).train_dataloader()
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(whole) - 2 > 1
    for (images, targets), (other_images, other_targets) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)
    with refused("--data.num_workers 1", "--data.num_workers 2"):
        data_of(written, num_workers=1).train_dataloader().load_state_dict(state)
    with refused("--data.cache"):
        data_of(written, cache="memory", num_workers=0).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_cache_holds_the_same_images_and_split(written, cache):
    lazy, held = data_of(written), data_of(written, cache=cache, num_workers=0)
    assert held.split_summary() == lazy.split_summary()
    for split in ("train", "val", "test"):
        every = np.arange(lazy.num_images(split))
        assert np.array_equal(held.images(split, every), lazy.images(split, every))
    assert np.allclose(held.mean, lazy.mean, rtol=1e-6)
    statistics = channel_statistics(held._images["train"].images, held._splits.train.numpy())
    assert (held.mean, held.std) == statistics


def test_the_statistics_of_a_large_cached_set_are_those_of_all_its_images(written, monkeypatch):
    monkeypatch.setattr(datamodule, "_MEASURED_BYTES", 100)
    monkeypatch.setattr(datamodule, "_MAX_MEASURED", 2)
    lazy, held = data_of(written), data_of(written, cache="disk", num_workers=0)
    assert (held.mean, held.std) == (lazy.mean, lazy.std)


def test_shards_that_become_gray_are_measured_as_gray_images(written):
    data = ImageDataModule(Shards(written), batch_size=8, in_channels=1, num_workers=1)
    data.setup()
    assert (data.mean, data.std) == channel_statistics(data._images["train"].images, data._splits.train.numpy())


def cut(content):
    return content[:1000]


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_cached_file_that_is_damaged_is_made_again(damage, shards, tmp_path):
    images = Shards(str(shards), cache="disk").load("train").images.copy()
    (cached,) = (tmp_path / "cache").rglob("train-*.npy")
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))
    assert np.array_equal(Shards(str(shards), cache="disk").load("train").images, images)
    assert cached.read_bytes() == whole


def test_a_disk_that_cannot_be_read_is_named_with_the_shard(shards, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    images = Shards(str(shards)).load("train").images
    monkeypatch.setattr(shards_module, "_pread", fail)
    with pytest.raises(RunError, match=r"chunk-.*Input/output error"):
        images[np.arange(3)]


def test_images_that_do_not_fit_in_memory_are_refused_before_they_are_decoded(folders, written, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100.0)
    with refused("--data.cache memory", f"images of {SIZE} pixels", "none"):
        Shards(written, cache="memory").load("train")
    with refused("--data.cache memory", "--data.cache disk"):
        ClassFolders(folders, SIZE, cache="memory").prepare()
    root = shutil.copytree(folders, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(image_folder, "_allocate", lambda *_: False)  # as on a full disk
    with refused(f"--data.root {root}", "CIFAR_LIGHTNING_CACHE"):
        ClassFolders(root, SIZE).prepare()


def test_a_folder_cached_in_memory_writes_nothing_and_is_the_same(folders, tmp_path):
    root = shutil.copytree(folders, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    held = ClassFolders(root, SIZE, cache="memory").load("train")
    assert not list(root.glob(".*"))
    assert held.sha256 == ClassFolders(root, SIZE).load("train").sha256


# -- bad input ----------------------------------------------------------------------------------------------------


def shard_of(root):
    return sorted((root / "train").glob("*.bin"))[1]


def cut_half(root):
    shard_of(root).write_bytes(shard_of(root).read_bytes()[:-100])


def remove(root):
    shard_of(root).unlink()


@pytest.mark.parametrize("damage", [cut_half, remove])
def test_a_missing_or_cut_shard_is_named_before_training(shards, damage):
    damage(shards)
    with refused(str(shard_of(shards)) if damage is cut_half else "chunk-0-1.bin", "1 of "):
        data_of(shards)


@pytest.mark.parametrize("kind", ["jpeg", "square"])
def test_a_flipped_byte_of_a_test_shard_is_named_before_training(shards, kind, monkeypatch):
    images = Shards(str(shards)).load("test").images
    path = shards / "test" / "chunk-0-0.bin"
    at = int(np.flatnonzero(images._is_jpeg == (kind == "jpeg"))[0])
    data = bytearray(path.read_bytes())
    data[int(np.frombuffer(bytes(data), "<u4", at + 2)[1 + at]) + 100] ^= 1
    path.write_bytes(data)
    with refused(str(path), f"image {at}", "copy it again"):
        ImageDataModule("shards", str(shards)).prepare_data()
    monkeypatch.setattr(shards_module, "READ_BEFORE_BYTES", 100)
    ImageDataModule("shards", str(shards)).prepare_data()


def test_a_test_shard_that_the_disk_cannot_read_is_named_before_training(shards, monkeypatch):
    def fail(fd, num_bytes, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards_module, "_pread", fail)
    with pytest.raises(RunError, match=r"test/chunk-0-0.*Input/output error"):
        Shards(str(shards)).prepare()


def test_a_shard_that_goes_away_or_is_another_is_named_by_the_worker_that_reads_it(shards):
    data = data_of(shards)
    one, other = sorted((shards / "train").glob("*.bin"))[:2]
    flipped = bytearray(one.read_bytes())
    flipped[-50] ^= 1
    one.write_bytes(flipped)
    with refused(one.name, "image 4"):
        list(data.train_dataloader())
    other.unlink()
    one.write_bytes(bytes(flipped[:-50]) + bytes([flipped[-50] ^ 1]) + bytes(flipped[-49:]))
    with refused(other.name):
        list(data.train_dataloader())


def test_shards_that_are_not_whole_or_of_another_set_are_refused(shards, folders, tmp_path):
    index = shards / "shards.json"
    text = index.read_text()
    index.write_text(text[:50])
    with refused("shards.json"):
        Shards(str(shards))
    content = json.loads(text)
    for edited in (
        {"class_names": content["class_names"][::-1]},
        {"image_size": 2 * SIZE},
        {"sha256": ""},
        {"image_size": "big"},
    ):
        index.write_text(json.dumps(content | edited))
        with refused("shards.json"):
            Shards(str(shards))
    listing = shards / "train" / "index.json"
    whole = listing.read_bytes()
    listing.write_text('{"chunks": [{"filename": "../a.bin", "chunk_bytes": 1, "chunk_size": 1}]}')
    index.write_text(text)
    source = Shards(str(shards))
    source.index.splits["train"].files["index.json"] = file_sha256(listing)
    with refused(str(listing), "chunks.0.filename", "copy it again"):
        source.load("train")
    listing.write_bytes(whole)
    other = tmp_path / "other"
    write_shards(ClassFolders(folders, SIZE), other)
    index.write_text((other / "shards.json").read_text())
    with refused("index.json"):
        data_of(shards)
    index.unlink()
    with refused(str(shards), "shards.json"):
        Shards(str(shards))


@pytest.mark.parametrize("rules", [RULES - 1, RULES + 1])
def test_shards_written_by_other_decoding_rules_are_refused(shards, rules):
    index = ShardsIndex.model_validate_json((shards / "shards.json").read_text())
    other = index.model_copy(update={"rules": rules})
    other.sha256 = other.content_sha256()
    (shards / "shards.json").write_text(other.model_dump_json())
    with refused(f"--data.root {shards}", f"version {rules}", f"{RULES}"):
        Shards(str(shards))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": 8}, ["--data.image_size 8", "16"]),
        ({"in_channels": 1}, ["--data.in_channels 1", "3"]),
        ({"resize": "pad"}, ["--data.resize pad", "crop"]),
        ({"num_workers": 0}, ["--data.num_workers 0", "--data.cache memory"]),
        ({"sampler": "balanced"}, ["--data.sampler balanced"]),
        ({"labels": "x.csv"}, ["--data.labels x.csv"]),
    ],
)
def test_settings_that_shards_do_not_have_are_refused(written, settings, words):
    with refused(*words):
        data_of(written, **settings)


def test_a_cache_that_a_data_set_does_not_have_is_refused(folders):
    with refused("--data.cache none", "shard"):
        ImageDataModule("folder", str(folders), cache="none")
    with refused("--data.cache disk", "synthetic"):
        ImageDataModule("synthetic", cache="disk")
    for address in ("gs://x", "s3://"):
        with refused(f"--data.root {address}"):
            ImageDataModule("shards", address)


def test_a_failed_or_second_writing_leaves_what_was_there(folders, written, tmp_path):
    with refused(f"--output {written}"):
        write_shards(ClassFolders(folders, SIZE), written)
    assert Shards(str(written)).class_names == ("ant", "bee")
    with refused("--output s3:/bucket/set"):
        write_shards(ClassFolders(folders, SIZE), Path("s3://bucket/set"))
    root = shutil.copytree(folders, tmp_path / "data")
    bad = ["test/bee/1.jpg", "train/ant/0.png"]
    for name in bad:
        (root / name).write_bytes(b"no image")
    with refused("ant/0.png", "--data.skip_unreadable", "1 of 48", "1 of 8"):
        write_shards(ClassFolders(root, SIZE), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (root / "train/loose.png").write_bytes(b"in no class")
    lines = write_shards(ClassFolders(root, SIZE, skip_unreadable=True), tmp_path / "new")
    assert any("2 of 56" in line for line in lines)
    assert any("loose.png" in line for line in lines)
    rows = (tmp_path / "new/skipped_files.jsonl").read_text("ascii").splitlines()
    assert sorted(json.loads(row)["path"] for row in rows) == [*bad, "train/loose.png"]
    assert len(Shards(str(tmp_path / "new")).load("train").targets) == 2 * NUM - 1


def test_folders_that_were_loaded_before_are_written_with_all_that_is_left_out(folders, tmp_path):
    root = shutil.copytree(folders, tmp_path / "data")
    (root / "train/ant/0.png").write_bytes(b"no image")
    data = ClassFolders(root, SIZE, skip_unreadable=True, cache="memory")
    data.prepare()
    (root / "train/ant/2.png").write_bytes(b"no image any more")
    write_shards(data, tmp_path / "new")
    rows = (tmp_path / "new/skipped_files.jsonl").read_text("ascii").splitlines()
    assert sorted(json.loads(row)["path"] for row in rows) == ["train/ant/0.png", "train/ant/2.png"]
    fresh = ClassFolders(root, SIZE, skip_unreadable=True, cache="memory")
    write_shards(fresh, tmp_path / "fresh")
    for name in ("shards.json", "train/images.npz"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_set_of_a_killed_shard_is_called_that_and_kept(folders, shards):
    (shards / "shards.json").unlink()
    before = sorted(shards.rglob("*"))
    with refused(f"--output {shards}", "shards.json", "killed", "delete"):
        write_shards(ClassFolders(folders, SIZE), shards)
    with refused(f"--data.root {shards}", "stopped"):
        Shards(str(shards))
    assert sorted(shards.rglob("*")) == before


def test_images_are_pickled_without_their_open_files(written):
    images = Shards(str(written)).load("train").images
    first = images[0]
    assert np.array_equal(pickle.loads(pickle.dumps(images))[0], first)
    with pytest.raises(IndexError):
        images[len(images)]


def test_a_remark_names_its_image_also_after_a_shard_of_which_nothing_can_be_read(folders, tmp_path):
    root = shutil.copytree(folders, tmp_path / "data")
    first, second = sorted((root / "test/ant").iterdir())[:2]
    first.write_bytes(b"no image")
    Image.new("RGB", (SIZE, SIZE)).save(second)
    lines = write_shards(ClassFolders(root, SIZE, skip_unreadable=True), tmp_path / "new", shard_bytes=1)
    assert any(str(second) in line for line in lines), lines


@pytest.mark.parametrize(("most", "is_warned"), [(4095, True), (40_000, False)])
def test_shards_of_16_bit_files_with_values_of_12_bits_are_warned_of(most, is_warned, tmp_path):
    for name in ("ant", "bee"):
        (root := tmp_path / "data" / name).mkdir(parents=True)
        for at in range(4):
            values = np.linspace(at, most, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
            Image.fromarray(values).save(root / f"{at}.png")
    lines = write_shards(ClassFolders(tmp_path / "data", SIZE), tmp_path / "new", shard_bytes=1_000)
    assert sum("8 16-bit images" in line and "nearly black" in line for line in lines) == is_warned, lines


def test_a_shard_whose_header_is_damaged_is_named(shards):
    data = shard_of(shards).read_bytes()
    images = Shards(str(shards)).load("train").images
    jpeg = int(np.flatnonzero(images._is_jpeg[images.starts[1] :])[0])
    header = np.frombuffer(data, "<u4", jpeg + 3).copy()
    header[jpeg + 2] = header[jpeg + 1] + 4  # no room for the sizes of an image
    shard_of(shards).write_bytes(header.tobytes() + data[header.nbytes :])
    with refused(shard_of(shards).name):
        images[:]


def test_room_is_made_next_to_another_process_that_makes_it(tmp_path, monkeypatch):
    cache = user_cache("s3://photos/set")
    held, gone = (cache / "train" / name for name in ("held.bin", "gone.bin"))
    held.parent.mkdir(parents=True)
    held.write_bytes(b"12")
    monkeypatch.setattr(shards_module, "in_user_cache", lambda _: [gone, held])
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    shards_module._make_room(cache, 1)
    assert not held.exists()


def test_room_is_made_of_all_that_is_cached_the_oldest_first_but_not_of_what_is_in_use(tmp_path, monkeypatch):
    ours, earlier, folder = (user_cache("s3://photos/set", "1"), user_cache("s3://photos/set"), user_cache("/photos"))
    root, now, days = ours.parent, time.time(), 86_400
    # In the order of their use, each of 10 bytes.
    may_go = [earlier / "train/chunk-0-0.bin", earlier / "train/images.npz", folder / "train.npy"]
    may_go += [ours / "train/.chunk-0-1.bin.1-1.part", ours / "train/chunk-0-0.bin", folder / "train.json"]
    kept = [ours / "train/index.json", ours / "train/images.npz", ours / "train-0.npy", root / "users.bin"]
    kept += [folder / "notes.txt", root / "photos-0123" / "a.npy"]
    written = [folder / ".train.npy.1-1.tmp", ours / "train/.chunk-0-2.bin.1-1.part"]
    for at, path in enumerate([*kept, *may_go, *written]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
        used = now - (0.5 if path in written else 20 - at) * days
        os.utime(path, (used, used))
    (root / "photos-0123456789abcdef").symlink_to(tmp_path)

    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))

    def room_for(num_bytes):
        shards_module._make_room(ours, num_bytes)
        return [path for path in may_go if not path.exists()]

    assert room_for(0) == []
    assert room_for(21) == may_go[:3]
    assert room_for(10**6) == may_go
    assert all(path.exists() for path in [*kept, *written])


def test_a_cache_of_another_user_is_read(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    place, shard = (
        shards_module._Bucket("s3://photos/set"),
        shards_module._Shard(filename="chunk-0-0.bin", chunk_bytes=3, chunk_size=1),
    )
    paths = [place.path("train", name) for name in ("index.json", shard.filename)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"123")
    monkeypatch.setattr(os, "utime", refuse)
    assert place.fetch("train", "index.json") == paths[0]
    fd = place.open("train", shard)
    assert os.read(fd, 9) == b"123"
    os.close(fd)
    monkeypatch.setattr(Path, "unlink", refuse)
    with refused("chunk-0-0.bin", "3 of 5 bytes"):  # and not why it cannot be removed
        place.open("train", shard.model_copy(update={"chunk_bytes": 5}))


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "file"))
    with refused(str(tmp_path / "file"), "CIFAR_LIGHTNING_CACHE"):
        Shards("s3://photos/set")


@contextmanager
def bucket(handler, monkeypatch):
    """A server in place of S3."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "test")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def test_a_bucket_that_sends_a_byte_at_a_time_is_given_up(monkeypatch):
    ended = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.send_header("ETag", '"x"')
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            with suppress(OSError):  # where the client is gone
                while not ended.wait(0.05):
                    self.wfile.write(b"x")

        def log_message(self, *arguments):
            """Print nothing."""

    monkeypatch.setattr(shards_module, "_SLOW_S", 1)
    with bucket(Slow, monkeypatch):
        try:
            with refused("s3://photos/set/shards.json", "too slow"):
                Shards("s3://photos/set")
        finally:
            ended.set()


def test_a_request_to_a_bucket_that_is_away_is_tried_four_times(monkeypatch):
    asked = []

    class Away(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            """Print nothing."""

    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))  # between the attempts
    with bucket(Away, monkeypatch), refused("s3://photos/set/shards.json"):
        Shards("s3://photos/set")
    assert asked == ["/photos/set/shards.json"] * 4
