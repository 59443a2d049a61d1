"""Transforms of one's own and torchvision's in the list of the data module."""

import random

import numpy as np
import pytest
import torch
from fitting import small_data
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from cifar_lightning import Transform
from cifar_lightning.errors import UserError
from cifar_lightning.transforms.augmentation import Augmentation, CropAndFlip, Cutout
from cifar_lightning.transforms.per_image import PerImage
from cifar_lightning.transforms.photographs import GaussianBlur, RandomAffine
from cifar_lightning.transforms.pipeline import Pipeline, augment

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
HALF = torch.full((3,), 0.5)
DEFAULT = Augmentation()


class Add(Transform):
    """Adds a number to each image, of its own."""

    def __init__(self, stage="uint8", **tables):
        self.stage, self.tables = stage, tables

    def draw(self, generator, num_images, image_size):
        return {"by": torch.randint(1, 5, (num_images,), generator=generator), **self.tables}

    def apply(self, images, rows):
        return images + rows["by"].to(images.dtype)[:, None, None, None]


class Returns(Add):
    def __init__(self, changed, stage="uint8"):
        self.stage, self.tables, self.changed = stage, {}, changed

    def apply(self, images, rows):
        return self.changed(images)


def drawn(*transforms, epoch=0, seed=0, augmentation=DEFAULT):
    on_cpu, on_device = Pipeline(augmentation, transforms).draw(
        num_images=12, image_size=8, seed=seed, epoch=epoch, device=torch.device("cpu")
    )
    return [*on_cpu, *on_device]


def finished(*transforms, **kwargs):
    return augment(IMAGES.clone(), drawn(*transforms, **kwargs), mean=HALF, std=HALF)


def test_one_more_transform_leaves_the_draws_of_the_others_and_two_of_a_kind_differ():
    (_, alone), *_ = drawn(Add())
    flipped, (_, first), (_, noise), (_, second) = drawn(
        "default", Add(), v2.RandomErasing(), Add(), augmentation=Augmentation(crop_padding_px=0)
    )
    assert torch.equal(alone["by"], first["by"])
    assert not torch.equal(first["by"], second["by"])
    assert torch.equal(flipped[1]["mirrored"], drawn("default")[0][1]["mirrored"])
    assert not torch.equal(first["by"], drawn(Add(), epoch=1)[0][1]["by"])
    assert not torch.equal(first["by"], drawn(Add(), seed=1)[0][1]["by"])
    assert len(set(noise["seed"].tolist())) == 12


@pytest.mark.parametrize(("stage", "scale"), [("uint8", 2 / 255), ("float", 2.0), ("normalized", 1.0)])
def test_a_transform_gets_the_images_of_its_stage(stage, scale):
    change = finished(Add(stage)) - finished()
    by = drawn(Add(stage))[0][1]["by"]
    wrapped = (IMAGES.int() + by[:, None, None, None] > 255).permute(0, 3, 1, 2) & (stage == "uint8")
    torch.testing.assert_close(change[~wrapped], (by[:, None, None, None] * scale).expand(change.shape)[~wrapped])


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (Returns(lambda images: images[:-1]), r"Returns: returned uint8 \(3, 8, 8, 3\) for uint8 \(4, 8, 8, 3\)"),
        (Returns(lambda images: images[:, 1:]), r"Returns: returned uint8 \(4, 7, 8, 3\)"),
        (Returns(lambda images: images.float()), "Returns: returned float32"),
        (Returns(lambda images: images / 0 * 0, "normalized"), "Returns: returned NaN"),
        (Returns(lambda images: None), "Returns: returned NoneType"),
        (Returns(lambda images: images @ 3), "Returns: TypeError"),
        (Add(by=torch.zeros(3)), r"Add: draw returned by as float32 \(3,\).* 4 rows"),
        (Add(by=[1, 2, 3, 4]), "Add: draw returned by as list"),
        (CropAndFlip(8), "CropAndFlip: padding_px 8: 0 to 7 for 8-pixel images"),
        (CropAndFlip(9, "zeros"), "CropAndFlip: padding_px 9: 0 to 7"),
        (CropAndFlip(-1), "CropAndFlip: padding_px -1: 0 to 7"),
        (Cutout(9), "Cutout: size_px 9: 0 to 8 for 8-pixel images"),
        (GaussianBlur(17, p=0.01), "GaussianBlur: kernel_size 17: up to 15 for 8-pixel images"),
        (v2.RandomCrop(6), r"RandomCrop: returned uint8 \(3, 6, 6\) for an image.*--data.image_size"),
        (v2.ToPILImage(), "ToPILImage: returned Image for an image"),
        (v2.Lambda(lambda image: image / 2), r"Lambda: returned float32 \(3, 8, 8\)"),
    ],
)
def test_a_transform_that_changes_what_must_stay_is_named_before_training(transform, reason):
    with pytest.raises(UserError, match=f"--data.transforms {reason}"):
        Pipeline(DEFAULT, [transform]).check(IMAGES[:4], [8])


def test_the_largest_arguments_that_fit_are_taken():
    Pipeline(DEFAULT, [CropAndFlip(7), GaussianBlur(15), RandomAffine(0.0, (1.0, 0.0))]).check(IMAGES[:4], [8])


@pytest.mark.parametrize(
    ("transforms", "reason"),
    [
        ([v2.MixUp(num_classes=2)], "MixUp.*--model.mixup"),
        ([v2.Compose([v2.RandomApply([v2.CutMix(num_classes=2)])])], "CutMix.*--model.cutmix"),
        ([v1.Compose([v1.RandomGrayscale(), v1.ToTensor()])], "ToTensor"),
        ([nn.Sequential(v2.Normalize([0.5] * 3, [0.5] * 3))], "Normalize"),
        ([v2.ToDtype(torch.float32, scale=True)], "ToDtype"),
        ([v2.RandomErasing], r"RandomErasing.*RandomErasing\(\.\.\.\)"),
        (["RandomErasing"], "RandomErasing"),
        ([3], "3: neither"),
        ([Add("normalised")], "Add: stage normalised; uint8, float, normalized"),
        (["default", Add("Float")], "Add: stage Float"),
        ([Add(None)], "Add: stage None"),
        (["default", "default"], "default"),
    ],
)
def test_what_is_no_transform_of_an_image_is_refused(transforms, reason):
    with pytest.raises(UserError, match=f"--data.transforms.*{reason}"):
        Pipeline(DEFAULT, transforms)


def test_a_list_without_the_default_replaces_it_and_is_refused_next_to_its_flags():
    data = small_data(transforms=[Add()])
    assert [type(step.transform) for step in data.pipeline._on_device] == [Add]
    for flag, value in {"crop_padding_px": 2, "flip": "none", "erasing": 0.5, "policy": "rand"}.items():
        with pytest.raises(UserError, match=f"--data.transforms.*--data.{flag} {value}"):
            small_data(transforms=[Add()], **{flag: value})
        small_data(transforms=["default", Add()], **{flag: value})


def draws_of_three_generators(image):
    """Set an image to what torch, NumPy and Python draw."""
    size = image.shape[1:]
    of_numpy = torch.from_numpy(np.random.randint(256, size=size))
    planes = [torch.randint(256, size), of_numpy, torch.full(size, random.randrange(256))]
    return torch.stack(planes).to(torch.uint8)


def test_an_image_is_transformed_alike_in_any_batch_and_the_global_generators_stay_as_they_were():
    (transform, rows), *_ = drawn(draws_of_three_generators)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    following = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    together = transform.apply(IMAGES, rows)
    assert (torch.rand(1), np.random.rand(), random.random()) == following
    assert len(together.unique(dim=0)) == 12
    for indices in torch.randperm(12).split(5):
        assert torch.equal(transform.apply(IMAGES[indices], {"seed": rows["seed"][indices]}), together[indices])


def test_a_wrapped_transform_gives_what_torchvision_gives_with_the_images_seed():
    perspective = v2.RandomPerspective(p=1.0)
    _, rows = drawn(perspective)[0]
    got = PerImage(perspective).apply(IMAGES, rows)
    for image, seed, expected in zip(IMAGES.permute(0, 3, 1, 2), rows["seed"].tolist(), got, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(perspective(image).permute(1, 2, 0), expected)


def batches(num_workers, transforms, **more):
    data = small_data(limit=60, val_fraction=0.0, batch_size=20, num_workers=num_workers, transforms=transforms, **more)
    loader = data.train_dataloader()
    return [images.clone() for _ in range(2) for images, _ in loader]


def test_only_batches_without_a_slow_transform_are_finished_in_all_threads():
    def threads(transforms):
        seen = set()
        batches(0, [*transforms, Returns(lambda images: seen.add(torch.get_num_threads()) or images, "float")])
        return seen

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert threads([]) == {3}
        assert 1 in threads([v2.RandomHorizontalFlip()])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("more", [{}, {"sampler": "balanced", "train_sizes": [12, 16], "flip": "alternating"}])
def test_workers_and_this_process_transform_alike_whatever_stands_before_and_after(more):
    transforms = [Add(), "default", draws_of_three_generators, v1.RandomErasing(p=1.0), Add()]
    here, there = batches(0, transforms, **more), batches(2, transforms, **more)
    assert len(here) == len(there) == 2 * 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(here, there, strict=True))
    assert len(torch.cat([images.flatten(1).sum(1) for images in here[-3:]]).unique()) > 50


class Jitters(Add):
    """Draws from a generator, its own or a global one, where it should use its rows."""

    def __init__(self, generator):
        self.stage, self.tables, self.generator = "uint8", {}, generator

    def apply(self, images, rows):
        return images + int(self.generator.integers(1, 200)) if self.generator else images + random.randrange(1, 200)


def test_a_transform_with_a_generator_of_its_own_is_refused_and_a_global_one_is_not():
    Pipeline(DEFAULT, [Jitters(None)]).check(IMAGES[:4], [8])
    own = np.random.default_rng(0)
    for transform in (Jitters(own), lambda image: image + int(own.integers(1, 200))):
        with pytest.raises(UserError, match=r"--data\.transforms .*generator"):
            Pipeline(DEFAULT, [transform]).check(IMAGES[:4], [8])


def test_one_transform_needs_no_list():
    one, several = Pipeline(DEFAULT, PerImage(abs)), Pipeline(DEFAULT, [PerImage(abs)])
    assert len(one.on_cpu) == len(several.on_cpu) == 1
