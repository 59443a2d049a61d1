"""The split, the statistics and the loaders of ImageDataModule, with no Trainer."""

import inspect
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from PIL import Image

from cifar_lightning.data import datamodule, loaders
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.data.loaders import ResidentLoader, StreamingLoader
from cifar_lightning.data.sampler import Rank
from cifar_lightning.data.splits import SplitSettings
from cifar_lightning.data.statistics import channel_statistics, evenly_spaced
from cifar_lightning.errors import UserError
from cifar_lightning.transforms.augmentation import Augmentation


def synthetic(**kwargs):
    return ImageDataModule("synthetic", **kwargs)


def write_folder(root, counts, size=8):
    rng = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{k}.png")
    return root


def test_the_defaults_are_those_of_the_settings_that_are_made_of_them():
    parameters = inspect.signature(ImageDataModule).parameters
    for field in (*fields(SplitSettings), *fields(Augmentation)):
        assert parameters[field.name].default == field.default, field.name


def test_names_are_known_before_setup_and_statistics_after_it():
    module = synthetic()
    assert (module.num_classes, len(module.class_names), module.image_size) == (10, 10, 32)
    assert module.mean is None
    module.setup()
    mean, std = channel_statistics(module._images["train"].images, module._splits.train.numpy())
    assert (module.mean, module.std) == (mean, std)


@pytest.mark.parametrize("is_large", [False, True])
def test_of_a_large_set_the_statistics_are_those_of_some_images(is_large, monkeypatch):
    module = synthetic(image_size=16)
    monkeypatch.setattr(datamodule, "_MEASURED_BYTES", 5000 * 16 * 16 * 3 - is_large)
    monkeypatch.setattr(datamodule, "_MAX_MEASURED", 10)
    module.setup()
    train = module._splits.train.numpy()
    measured = train[evenly_spaced(len(train), 10)] if is_large else train
    assert (module.mean, module.std) == channel_statistics(module._images["train"].images, measured)


def test_setup_again_changes_nothing():
    module = synthetic()
    module.setup("fit")
    summary, mean = module.split_summary(), module.mean
    module.setup("test")
    assert module.split_summary() == summary
    assert module.mean == mean


def test_an_epoch_without_a_trainer_has_every_training_image_and_moves_on_by_itself():
    module = synthetic(batch_size=512, crop_padding_px=0, flip="none")
    loader = module.train_dataloader()
    first, second = (torch.cat([images for images, _ in loader]) for _ in range(2))
    assert len(first) == 4500 == module.num_images("train")
    assert not torch.equal(first, second)
    # The same images in another order.
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)


def test_order_seed_changes_order_and_augmentation_and_leaves_the_split():
    plain, same, other = synthetic(seed=3), synthetic(seed=3, order_seed=3), synthetic(seed=3, order_seed=4)
    first, again, changed = (next(iter(module.train_dataloader())) for module in (plain, same, other))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], changed[0])
    assert plain.split_summary() == same.split_summary() == other.split_summary()
    # Also which images an evaluation that stops early takes.
    assert torch.equal(plain._evaluation_order("val"), other._evaluation_order("val"))


def test_validation_and_test_count_every_image_once_unaugmented():
    module = synthetic(eval_batch_size=300)
    for part, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        images = torch.cat([images for images, _ in loader])
        raw = torch.from_numpy(module.images(part, np.arange(len(images)))).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor(module.mean), torch.tensor(module.std)
        expected = (raw - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        assert len(images) == module.num_images(part)


def test_resident_and_streaming_give_the_same_batches():
    kept, streamed = synthetic(num_workers=0).train_dataloader(), synthetic(num_workers=2).train_dataloader()
    assert isinstance(kept, ResidentLoader)
    assert isinstance(streamed, StreamingLoader)
    for k, (left, right) in enumerate(zip(kept, streamed, strict=True)):
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])
        if k == 5:
            break


def test_a_set_larger_than_half_the_free_memory_is_streamed(monkeypatch):
    monkeypatch.setattr(loaders, "free_device_bytes", lambda device: 1e7)
    assert isinstance(synthetic().val_dataloader(), StreamingLoader)
    monkeypatch.setattr(loaders, "free_device_bytes", lambda device: 1e9)
    assert isinstance(synthetic().val_dataloader(), ResidentLoader)


def test_whether_a_set_fits_is_decided_before_its_first_loader_takes_memory(monkeypatch):
    monkeypatch.setattr(loaders, "free_device_bytes", lambda device: 1e9)
    module = synthetic()
    assert isinstance(module.train_dataloader(), ResidentLoader)
    monkeypatch.setattr(loaders, "free_device_bytes", lambda device: 1e7)
    assert isinstance(module.val_dataloader(), ResidentLoader)


def test_loaders_of_one_source_share_its_images_in_memory():
    module = synthetic()
    train, val = module.train_dataloader(), module.val_dataloader()
    assert train.images.data_ptr() == val.images.data_ptr()


def test_a_val_folder_is_used_and_nothing_is_split_off(tmp_path):
    counts = {"train": {"a": 5, "b": 4}, "val": {"a": 2, "b": 1}, "test": {"a": 1, "b": 1}}
    module = ImageDataModule("folder", str(write_folder(tmp_path, counts)), batch_size=4)
    module.prepare_data()
    module.setup()
    assert [module.num_images(part) for part in ("train", "val", "test")] == [9, 3, 2]
    assert module.split_summary()["val_from"] == "val"
    raw = module.images("val", np.arange(3))
    assert np.array_equal(raw[0], np.asarray(Image.open(tmp_path / "val" / "a" / "0.png")))


def test_training_on_everything_leaves_no_validation():
    module = synthetic(val_fraction=0.0)
    assert module.val_dataloader() == []
    assert module.num_images("train") == 5000


def test_the_number_of_steps_is_known_without_a_loader():
    module = synthetic(batch_size=64)
    module.setup()
    assert module.num_train_batches() == len(module.train_dataloader()) == 71
    assert module.num_train_batches(3) == 24


def test_ranks_evaluate_the_positions_they_say():
    module = synthetic()
    module.setup()
    together = np.sort(np.concatenate([module.rank_positions("test", Rank(r, 3)) for r in range(3)]))
    assert np.array_equal(together, np.arange(1000))


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize(("limit", "is_shuffled"), [(1, True), (0.5, True), (1.0, False)])
def test_a_part_of_a_split_is_of_all_classes_and_its_images_keep_their_positions(limit, is_shuffled, part, tmp_path):
    root = write_folder(tmp_path, {"train": {"a": 90, "b": 90}, "test": {"a": 40, "b": 40}})
    module = ImageDataModule("folder", str(root), batch_size=10, eval_batch_size=16, val_fraction=0.4)
    module.trainer = SimpleNamespace(
        global_rank=0,
        world_size=2,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        state=SimpleNamespace(status=TrainerStatus.RUNNING),
    )
    setattr(module.trainer, f"limit_{part}_batches", limit)
    images, targets = next(iter(module.val_dataloader() if part == "val" else module.test_dataloader()))
    assert (len(targets.unique()) == 2) == is_shuffled
    positions = module.rank_positions(part, Rank(0, 2))[:16]
    raw = torch.from_numpy(module.images(part, positions)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (module.mean, module.std))
    torch.testing.assert_close(images, (raw - mean) / std, rtol=1e-4, atol=1e-4)
    module.trainer.state.status = TrainerStatus.FINISHED  # its limit no longer counts
    num = module.num_images(part)
    assert module.rank_positions(part, Rank()).tolist() == list(range(num))
    module.trainer.state.status = TrainerStatus.RUNNING
    both = np.concatenate([module.rank_positions(part, Rank(rank, 2)) for rank in range(2)])
    assert sorted(both) == list(range(module.num_images(part)))


def test_a_checkpoint_of_other_classes_is_refused():
    module = synthetic()
    module.setup()
    state = module.state_dict()
    module.load_state_dict({**state, "mean": [0.1, 0.2, 0.3]})
    assert module.mean == (0.1, 0.2, 0.3)  # the run's, so that its network sees what it was trained on
    with pytest.raises(UserError, match="classes x"):
        module.load_state_dict({**state, "class_names": ["x", "y"]})


def test_a_checkpoint_of_another_image_size_than_the_data_chose_is_refused_unless_it_is_given():
    def arrays(size):
        return np.zeros((20, size, size, 3), np.uint8), np.arange(20) % 2

    state = {"class_names": ["0", "1"], "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    ImageDataModule(arrays(16)).load_state_dict(state)
    ImageDataModule(arrays(32), image_size=16).load_state_dict(state)
    ImageDataModule(arrays(32), image_size=32).load_state_dict(state)
    with pytest.raises(UserError, match=r"of 16 pixels; give --data\.image_size 16, or 32 "):
        ImageDataModule(arrays(32)).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 4501}, "--data.batch_size 4501: larger than the training split of 4,500"),
        ({"batch_size": 0}, "--data.batch_size 0"),
        ({"eval_batch_size": 0}, "--data.eval_batch_size 0"),
        ({"val_fraction": 1.0}, "--data.val_fraction 1.0"),
        ({"val_fraction": 0.0001}, "--data.val_fraction 0.0001: class .* has 500"),
        ({"seed": -1}, "--data.seed -1"),
        ({"limit": 0}, "--data.limit 0: 1 or more"),
        ({"sampler": "even"}, "--data.sampler even: one of none, balanced"),
        ({"class_weights": "yes"}, "--data.class_weights yes: one of none, balanced"),
        ({"limit": 5}, "--data.limit 5: too few. Class .*, 500 of 5,000 images, would get 0"),
        ({"limit": 10}, "--data.limit 10: too few. Class .*, 500 of 5,000 images, would get 1"),
        ({"limit": 500, "batch_size": 451}, "--data.batch_size 451: larger than the training split of 450"),
        ({"erasing": 1.5}, "--data.erasing 1.5: 0"),
        ({"device": "gpu"}, "--data.device gpu"),
        ({"num_workers": -1}, "--data.num_workers -1"),
        ({"crop_padding_px": 40}, "--data.crop_padding_px 40"),
        ({"train_sizes": [0, 32]}, r"--data.train_sizes 0: 1 to 4096"),
        ({"train_sizes": [24, 28]}, r"--data.train_sizes \[24, 28\]: the last size .* --data.image_size 32"),
        ({"train_sizes": [4, 32]}, "--data.crop_padding_px 4: 0 to 3 for 4-pixel images"),
    ],
)
def test_a_value_that_does_not_fit_names_its_flag(arguments, message):
    with pytest.raises(UserError, match=message):
        synthetic(**arguments).setup()


def test_a_limit_is_of_training_and_validation_together_and_leaves_test_alone():
    module = synthetic(limit=1000, batch_size=64)
    module.setup()
    assert [module.num_images(part) for part in ("train", "val", "test")] == [900, 100, 1000]
    summary = module.split_summary()
    assert summary["limit"] == 1000
    assert len(set(summary["train"]) | set(summary["val"])) == 1000
    everything = synthetic(batch_size=64)
    everything.setup()
    assert "limit" not in everything.split_summary()
    assert module.mean != everything.mean  # measured on the images that are trained on


@pytest.fixture
def uneven(tmp_path):
    return write_folder(tmp_path, {"train": {"few": 6, "many": 60}, "test": {"few": 2, "many": 2}})


def test_a_balanced_sampler_shows_every_class_equally_often_and_validation_as_it_is(uneven):
    module = ImageDataModule("folder", str(uneven), batch_size=10, sampler="balanced", val_fraction=0.3)
    targets = torch.cat([targets for _, targets in module.train_dataloader()])
    assert torch.bincount(targets).tolist() == [23, 23]
    assert torch.bincount(torch.cat([targets for _, targets in module.val_dataloader()])).tolist() == [2, 18]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_repeated_image_is_augmented_differently_and_a_resumed_epoch_continues_with_the_same(uneven, num_workers):
    module = ImageDataModule(
        "folder", str(uneven), batch_size=10, sampler="balanced", val_fraction=0.3, num_workers=num_workers
    )
    whole = list(module.train_dataloader())
    images, targets = (torch.cat(parts) for parts in zip(*whole, strict=True))
    assert len(images[targets == 0].flatten(1).unique(dim=0)) > 15  # of 23 showings of 4 images
    resumed = module.train_dataloader()
    resumed.load_state_dict({"epoch": 0, "position": 2})
    for (left, _), (right, _) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(left, right)


def test_a_balanced_sampler_leaves_the_alternating_flip_to_the_image(uneven):
    settings = {"sampler": "balanced", "val_fraction": 0.3, "crop_padding_px": 0, "flip": "alternating"}
    loader = ImageDataModule("folder", str(uneven), batch_size=10, **settings).train_dataloader()
    few = []
    for _ in range(2):
        shown = [images[targets == 0] for images, targets in loader]  # 4 images in 23 places
        few.append({image.numpy().tobytes() for image in torch.cat(shown)})
        few.append({image.flip(-1).contiguous().numpy().tobytes() for image in torch.cat(shown)})
    first, mirrored, second, _ = few
    assert len(first) == 4, "one side of each in an epoch"
    assert second == mirrored


def test_two_ranks_share_a_balanced_epoch(uneven):
    module = ImageDataModule("folder", str(uneven), batch_size=10, sampler="balanced", val_fraction=0.0)
    module.setup()
    shares = [module._sampler("train", training=True, rank=Rank(index, 2)).begin() for index in range(2)]
    shown = torch.tensor(module._images["train"].targets)[torch.cat([*shares[0], *shares[1]])]
    assert torch.bincount(shown).tolist() == [33, 33]


def test_class_weights_are_those_of_the_training_split(uneven):
    module = ImageDataModule("folder", str(uneven), batch_size=10, class_weights="balanced", val_fraction=0.3)
    module.setup()
    assert module.class_weights == pytest.approx([46 / (2 * 4), 46 / (2 * 42)])
    assert synthetic().class_weights is None


def test_it_says_which_classes_there_are_and_how_uneven(uneven):
    module = ImageDataModule("folder", str(uneven), batch_size=10)
    module.setup()
    names, imbalance = module.describe_classes()
    assert names == "2: few, many"
    assert "many has 54 training images, few 5; --data.class_weights balanced" in imbalance
    weighted = ImageDataModule("folder", str(uneven), batch_size=10, class_weights="balanced")
    weighted.setup()
    assert weighted.describe_classes()[1].endswith("few 5")
    even = synthetic()
    even.setup()
    assert len(even.describe_classes()) == 1


def test_a_sample_of_training_is_spread_over_it_and_normalised():
    module = synthetic(image_size=16)
    module.setup()
    sample = module.sample_of_training(3)
    raw = module.images("train", np.array([0, 2249, 4499]))
    expected = (torch.from_numpy(raw) / 255 - torch.tensor(module.mean)) / torch.tensor(module.std)
    torch.testing.assert_close(sample, expected.permute(0, 3, 1, 2))
    assert len(module.sample_of_training(5000)) == 4500


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(UserError, match=r"cifar11.*cifar10"):
        ImageDataModule("cifar11")


def test_leaving_out_unreadable_images_is_only_for_class_folders():
    with pytest.raises(UserError, match=r"--data.skip_unreadable true: .*folder, not synthetic"):
        synthetic(skip_unreadable=True)


def test_splits_and_loaders_have_none_of_the_images_that_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    root = write_folder(tmp_path / "data", {split: {"a": 10, "b": 10} for split in ("train", "test")})
    (root / "train" / "a" / "3.png").write_text("no image")
    (root / "test" / "b" / "9.png").write_text("no image")
    module = ImageDataModule("folder", str(root), batch_size=4, skip_unreadable=True)
    module.prepare_data()
    module.setup()
    assert [module.num_images(split) for split in ("train", "val", "test")] == [17, 2, 19]
    assert sum(len(targets) for _, targets in module.test_dataloader()) == 19
    assert [path for path, _ in module.skipped_files] == ["train/a/3.png", "test/b/9.png"]


@pytest.mark.parametrize("device", ["meta", "cuda:99", "xpu", "nonsense"])
def test_a_device_that_cannot_hold_images_is_refused(device):
    with pytest.raises(UserError, match=rf"--data\.device {device}: cannot be used"):
        ImageDataModule("synthetic", image_size=16, device=device)
