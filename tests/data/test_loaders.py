"""Batches and position of the loaders; resident and streaming give the same batches."""

import gc
import multiprocessing
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fitting import small_data
from lightning.fabric import Fabric
from program import resident_bytes

from cifar_lightning.data import loaders
from cifar_lightning.data.image_set import ImageSet
from cifar_lightning.data.loaders import BatchTransform, LoaderFactory, ResidentLoader, StreamingLoader, _Rows
from cifar_lightning.data.sampler import EpochSampler, Rank
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.transforms.augmentation import Augmentation
from cifar_lightning.transforms.pipeline import Pipeline

COUNT = 50
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
TARGETS = np.arange(COUNT) % 7
TRANSFORM = BatchTransform((0.5,) * 3, (0.2,) * 3, (6, 8), Pipeline(Augmentation(crop_padding_px=2, cutout_px=3)))


def sampler(**kwargs):
    return EpochSampler(torch.arange(COUNT), 8, seed=3, training=True, rank=Rank(), **kwargs)


def resident(**kwargs):
    return ResidentLoader(torch.from_numpy(IMAGES), torch.from_numpy(TARGETS), sampler(**kwargs), TRANSFORM)


def streaming(images=IMAGES, num_workers=2, **kwargs):
    cpu = torch.device("cpu")
    return StreamingLoader(images, TARGETS, sampler(**kwargs), TRANSFORM, num_workers=num_workers, device=cpu)


def test_each_epoch_has_its_size_and_the_last_one_stays():
    loader = resident()
    sides = [{images.shape[2:] for images, _ in loader} for _ in range(3)]
    assert sides == [{(6, 6)}, {(8, 8)}, {(8, 8)}]


def drawn(loader):
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_same(left, right):
    assert len(left) == len(right)
    for (images, targets), (other_images, other_targets) in zip(left, right, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_set_epoch_repeats_that_epochs_batches():
    loader = resident()
    first, second = drawn(loader), drawn(loader)
    loader.sampler.set_epoch(0)
    assert_same(drawn(loader), first)
    loader.sampler.set_epoch(1)
    assert_same(drawn(loader), second)


def test_iter_before_set_epoch_still_gives_the_named_epoch():
    loader = resident()
    loader.sampler.set_epoch(4)
    expected = drawn(loader)
    other = resident()
    early = iter(other)  # Lightning does so
    other.sampler.set_epoch(4)
    assert_same(list(early), expected)


@pytest.mark.parametrize("make", [resident, streaming])
def test_a_loader_continues_where_its_state_was_taken(make):
    loader = make()
    unbroken = [drawn(loader) for _ in range(3)]
    stopped = make()
    drawn(stopped)
    batches = iter(stopped)
    for _ in range(3):
        next(batches)
    state = stopped.state_dict()
    assert state == {"epoch": 1, "position": 3}
    resumed = make()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(1)  # as Lightning does
    assert_same(drawn(resumed), unbroken[1][3:])
    assert_same(drawn(resumed), unbroken[2])


def test_state_at_the_end_of_an_epoch_continues_with_the_next():
    loader = resident()
    drawn(loader)
    expected = drawn(loader)
    other = resident()
    drawn(other)
    resumed = resident()
    resumed.load_state_dict(other.state_dict())
    assert_same(drawn(resumed), expected)


def test_another_epoch_than_the_states_starts_at_its_beginning():
    loader = resident()
    loader.load_state_dict({"epoch": 1, "position": 3})
    loader.sampler.set_epoch(2)
    assert len(drawn(loader)) == len(loader)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_streaming_equals_resident_batch_for_batch(num_workers):
    streamed, kept = streaming(num_workers=num_workers), resident()
    for _ in range(2):
        assert_same(drawn(streamed), drawn(kept))


def test_streaming_starts_the_next_epoch_cleanly_after_a_break():
    streamed, kept = streaming(), resident()
    for loader in (streamed, kept):
        next(iter(loader))
    assert_same(drawn(streamed), drawn(kept))


def test_a_loader_that_is_iterated_within_its_own_epoch_gives_no_batch_of_another():
    streamed, kept = streaming(), resident()
    outer = iter(streamed)
    next(outer)
    next(iter(streamed))  # a look at some images
    with pytest.raises(UserError, match="train_dataloader"):
        next(outer)
    for loader in (streamed, kept):
        loader.sampler.set_epoch(5)
    assert_same(drawn(streamed), drawn(kept))
    outer = iter(streamed)
    for _ in range(len(streamed)):
        next(outer)
    drawn(streamed)
    assert next(outer, None) is None  # it has had all of its own


@pytest.mark.parametrize(("kind", "waits"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_only_cuda_is_sent_to_without_waiting(kind, waits):
    class Sent:
        def to(self, device, non_blocking=False):
            sent.append((device.type, not non_blocking))

    sent, loader = [], streaming()
    loader.device, loader._workers = torch.device(kind), [(Sent(), Sent(), Sent())]
    list(loader._gather([torch.arange(8)], 8, None))
    assert sent == [(kind, waits)] * 3


def factory_of(own, num_workers=None):
    images = {"train": ImageSet(IMAGES, TARGETS, "")}
    transform = BatchTransform((0.5,) * 3, (0.2,) * 3, (8,), Pipeline(Augmentation(), own))
    return LoaderFactory(images, num_workers).make("train", sampler(), transform, torch.device("cpu"))


def mirrored(image):
    return image.flip(-1)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_without_fork_slow_transforms_run_here_by_default(monkeypatch):
    chosen = {"method": "fork"}
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen["method"])
    assert isinstance(factory_of([mirrored]), StreamingLoader)
    chosen["method"] = "spawn"
    assert isinstance(factory_of([mirrored]), ResidentLoader)
    assert factory_of([mirrored], 2)._workers.multiprocessing_context.get_start_method() == "spawn"
    factory_of([mirrored, lambda image: image], 0)
    with pytest.raises(UserError, match=r"<lambda>.*\n.*--data.num_workers 0"):
        factory_of([lambda image: image], 2)


def test_a_function_of_a_notebook_is_not_sent_to_workers_that_are_not_forked(monkeypatch):
    notebook = types.ModuleType("__main__")
    exec("def bright(image):\n    return image", notebook.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    with pytest.raises(UserError, match=r"bright.*notebook"):
        factory_of([bright := notebook.bright], 2)
    notebook.__file__ = "train.py"
    assert isinstance(factory_of([bright], 2), StreamingLoader)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("chosen", [None, "forkserver"])  # Python's own default, which any process sets
def test_a_program_that_has_not_chosen_forks_on_linux_only(chosen, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["forkserver", "spawn", "fork"])
    for platform, kind in (("linux", StreamingLoader), ("darwin", ResidentLoader)):
        monkeypatch.setattr(sys, "platform", platform)
        assert isinstance(factory_of([mirrored]), kind)


def test_workers_end_by_themselves_where_the_collector_finds_their_loader():
    loader = streaming()
    loader.trainer_that_refers_to_it = [loader]  # a cycle
    batches = iter(loader)
    next(batches)
    workers = loader._workers._iterator._workers
    assert [worker.is_alive() for worker in workers] == [True, True]
    del loader, batches
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]  # not ended by SIGTERM, for which torch waits 5 s each


def test_a_memory_mapped_set_travels_to_workers_as_its_path(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, IMAGES)
    mapped = np.load(path, mmap_mode="r")
    sent = pickle.dumps(_Rows(mapped, TARGETS))
    assert len(sent) < IMAGES.nbytes / 4
    _, images, _ = pickle.loads(sent).__getitems__([7, 3])
    assert np.array_equal(images.numpy(), IMAGES[[7, 3]])


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be replaced")
@pytest.mark.parametrize("others", [IMAGES[::-1], IMAGES[1:], np.concatenate([IMAGES[:1], IMAGES]), None])
def test_a_mapped_file_that_was_replaced_is_noticed_by_workers(others, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, IMAGES)
    rows = _Rows(np.load(path, mmap_mode="r"), TARGETS)
    path.unlink()
    if others is not None:
        np.save(path, others)
    error = pickle.loads(pickle.dumps(rows)).__getitems__([7, 3])
    assert isinstance(error, RunError)
    assert str(path) in str(error)
    _, images, _ = rows.__getitems__([7, 3])  # a forked worker has the file itself
    assert np.array_equal(images.numpy(), IMAGES[[7, 3]])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_reading_a_mapped_set_through_leaves_a_worker_as_small_as_before(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((10_000, 32, 32, 3), np.uint8))
    rows = _Rows(np.load(path, mmap_mode="r"), np.zeros(10_000, np.int64))
    rows.__getitems__([0])
    before = resident_bytes()
    for start in range(0, 10_000, 100):
        rows.__getitems__(np.arange(start, start + 100))
    assert resident_bytes() < before + 5e6, "of 31 MB"


def test_batches_are_normalised_channels_last_floats():
    loader = resident()
    loader.sampler.set_epoch(1)
    images, targets = next(iter(loader))
    assert images.shape == (8, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.int64


# -- in other people's loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [resident, streaming])
def test_the_dataset_of_a_loader_is_the_images_of_its_split(make):
    loader = make()
    loader.sampler.indices = torch.arange(COUNT)
    assert len(loader.dataset) == COUNT
    image, target = loader.dataset[9]
    assert (target, image.dtype, np.array_equal(image, IMAGES[9])) == (TARGETS[9], torch.uint8, True)


def test_its_length_is_that_of_the_split_whatever_the_batches():
    data = small_data(limit=1000, batch_size=100, drop_last=True)
    data.setup()
    for loader, split in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        assert len(loader.dataset) == data.num_images(split)


def in_process(monkeypatch, rank, count):
    """Have torch's process group be one of `count` processes."""
    for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": count}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)


def test_in_a_process_group_without_a_trainer_each_rank_has_its_own_images(monkeypatch):
    data = small_data(limit=1000, batch_size=100, eval_batch_size=300)
    data.setup()
    alone = [targets for _, targets in data.val_dataloader()]
    seen = []
    for rank in range(2):
        in_process(monkeypatch, rank, 2)
        loader = data.val_dataloader()
        assert len(loader.dataset) == 100
        seen.append(torch.cat([targets for _, targets in loader]))
    assert [len(targets) for targets in seen] == [50, 50]
    assert torch.equal(torch.stack(seen, 1).flatten(), torch.cat(alone))
    assert len(data.train_dataloader()) == 5  # 900 images: 100 a rank and step


def test_a_loader_made_before_the_processes_gives_no_image_twice(monkeypatch):
    loader = resident()
    in_process(monkeypatch, 1, 2)
    with pytest.raises(UserError, match="before the 2 processes"):
        next(iter(loader))


def test_fabric_refuses_to_set_up_a_loader_that_deals_to_the_ranks_itself():
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(TypeError, match="DataLoader"):
        fabric.setup_dataloaders(resident())


def test_accelerate_returns_a_loader_as_it_is():
    loader = resident()
    assert Accelerator(cpu=True).prepare(loader) is loader


def test_images_that_were_read_from_a_mapped_file_travel_to_workers_without_it(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    images = {"train": ImageSet(mapped, TARGETS, "")}
    factory = LoaderFactory(images, 0)
    factory.make("train", sampler(), TRANSFORM, torch.device("cpu"))
    read = factory.images["train"].images
    assert not isinstance(read, np.memmap)
    rows = pickle.loads(pickle.dumps(_Rows(read, TARGETS, ())))
    assert torch.equal(rows[3][0], torch.from_numpy(IMAGES[3]))


def test_images_of_a_mapped_file_are_read_onto_a_device_by_blocks(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    monkeypatch.setattr(loaders, "_BLOCK", 16)
    assert torch.equal(loaders._read_onto(torch.device("cpu"), mapped), torch.from_numpy(IMAGES))
    factory = LoaderFactory({"train": ImageSet(mapped, TARGETS, "")}, 0)
    loader = factory.make("train", sampler(), TRANSFORM, torch.device("meta"))  # it keeps no values
    assert (loader.images.device.type, loader.images.shape, loader.images.dtype) == ("meta", IMAGES.shape, torch.uint8)
    assert factory.images["train"].images is mapped
