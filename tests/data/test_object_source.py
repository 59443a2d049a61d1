"""Data sets given as objects become the images and labels that they hold, or an error says what is missing."""

import io
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    random_split,
)
from torchvision.transforms import v2

from cifar_lightning import ImageDataModule, UserError
from cifar_lightning.data import memory, object_source
from cifar_lightning.data.image_decoding import square_of
from cifar_lightning.data.image_set import ImageSet, digest
from cifar_lightning.data.object_source import ObjectSource

N, SIZE = 24, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = np.arange(N) % 3
TENSORS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


class Own(Dataset):
    """Samples made of (image, label) by a function."""

    def __init__(self, make=lambda image, label: (Image.fromarray(image), label), images=IMAGES, labels=LABELS):
        self.make, self.images, self.own_labels = make, images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.make(self.images[index], self.own_labels[index])


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_images_of_an_object_become_squares_as_those_of_files_do(resize):
    wide = np.random.default_rng(1).integers(0, 256, (N, 6, 12, 3), dtype=np.uint8)
    expected = [square_of(Image.fromarray(image), SIZE, resize) for image in wide]
    for given in (Own(images=wide), (wide, LABELS)):
        images, _, _ = loaded(given, image_size=SIZE, resize=resize)
        assert np.array_equal(images, expected)


def test_data_sets_of_square_images_refuse_another_way_to_resize():
    for given in ("synthetic", "cifar10"):
        with pytest.raises(UserError, match=rf"--data\.resize pad: .*not {given}"):
            ImageDataModule(given, resize="pad")


class Named(Own):
    classes = ("ant", "bee", "cat")


def data(given, **settings):
    return ImageDataModule(given, batch_size=4, **settings)


def loaded(given, split="train", **settings):
    """Return images and targets of a split, and the class names."""
    source = data(given, **settings).source
    image_set = source.load(split)
    assert image_set.sha256 == digest(image_set.images, image_set.targets)
    return image_set.images, image_set.targets.tolist(), source.class_names


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def as_float(image):
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def hugging_face():
    """Return rows as `datasets.Dataset` gives them, without that package."""
    rows = [{"photo": Image.fromarray(image), "kind": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
    features = {"photo": type("Image", (), {})(), "kind": type("ClassLabel", (), {"names": ["ant", "bee", "cat"]})()}
    members = {"features": features, "column_names": [*features], "__len__": lambda self: len(rows)}
    return type("HFDataset", (), members | {"__getitem__": lambda self, index: rows[index]})()


SAMPLES = {
    "PIL": lambda image, label: (Image.fromarray(image), int(label)),
    "list": lambda image, label: [image, label],
    "HWC": lambda image, label: (image, np.int32(label)),
    "CHW": lambda image, label: (image.transpose(2, 0, 1), np.array([label])),
    "uint8 tensor": lambda image, label: (torch.from_numpy(image).permute(2, 0, 1), torch.tensor(label)),
    "float tensor": lambda image, label: (as_float(image), torch.tensor(label, dtype=torch.int32)),
    "half tensor": lambda image, label: (as_float(image).half(), label),
    "float64 HWC": lambda image, label: (image / 255, label),
    "int64": lambda image, label: (image.astype(np.int64), label),
    "v2": lambda image, label: (v2.ToImage()(Image.fromarray(image)), label),
    "dict": lambda image, label: {"image": image, "label": label, "id": 7},
    "img and target": lambda image, label: {"img": Image.fromarray(image), "target": label},
    "pixel_values and labels": lambda image, label: {"pixel_values": as_float(image), "labels": torch.tensor(label)},
    "fine_label": lambda image, label: {"img": png(image), "fine_label": label, "coarse_label": 0},
    "bytes": lambda image, label: {"image": {"bytes": png(image), "path": None}, "label": label},
    "RGBA": lambda image, label: (Image.fromarray(image).convert("RGBA"), label),
    "RGBA array": lambda image, label: (np.dstack([image, np.full((SIZE, SIZE), 255, np.uint8)]), label),
}


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_samples_of_every_form_become_the_same_images(make):
    images, targets, names = loaded(Own(make))
    np.testing.assert_array_equal(images, IMAGES)
    assert targets == LABELS.tolist()
    assert names == ("0", "1", "2")


GRAY = IMAGES[..., 0]
ARRAYS = {
    "NHWC": (IMAGES, IMAGES),
    "NCHW": (TENSORS.numpy(), IMAGES),
    "tensors": (TENSORS, IMAGES),
    "floats": (TENSORS / 255, IMAGES),
    "gray": (GRAY, GRAY[..., None].repeat(3, -1)),
    "gray tensors": (torch.from_numpy(GRAY)[:, None], GRAY[..., None].repeat(3, -1)),
    "bfloat16": (torch.from_numpy(GRAY > 127).bfloat16(), np.where(GRAY > 127, 255, 0)[..., None].repeat(3, -1)),
    "booleans": (GRAY > 127, np.where(GRAY > 127, 255, 0)[..., None].repeat(3, -1)),
}


@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), torch.tensor(LABELS), LABELS[:, None].astype(np.uint8)])
@pytest.mark.parametrize(("given", "expected"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_become_images_at_once(given, expected, labels):
    images, targets, _ = loaded((given, labels))
    np.testing.assert_array_equal(images, expected)
    assert targets == LABELS.tolist()


class ByName:
    """Labels as a Series of pandas has them: iterated by place, indexed by names of rows, which sorting has changed."""

    def __init__(self, labels):
        self.labels = list(labels)

    def __len__(self):
        return len(self.labels)

    def __iter__(self):
        return iter(self.labels)

    def __getitem__(self, name):
        return self.labels[len(self) - 1 - name]


ROWS = [23, 1, 5, 2, 3, 9, 12, 22, 20, 4, 6, 7]
PAIRS = TensorDataset(TENSORS, torch.tensor(LABELS))
STACKED = {
    "labels by name": ((IMAGES, ByName(LABELS)), range(N)),
    "dicts of arrays": (StackDataset(image=IMAGES, label=LABELS.tolist()), range(N)),
    "images with a gradient": ((torch.zeros(N, SIZE, SIZE, 3, requires_grad=True), LABELS), None),
    "a list": (Subset(PAIRS, ROWS), ROWS),
    "a tuple": (Subset(PAIRS, tuple(ROWS)), ROWS),
    "a tuple of three": (Subset(Subset(PAIRS, (0, 1, 2)), [2, 1, 0] * 3), [2, 1, 0] * 3),
    "small integers": (Subset(PAIRS, np.array(ROWS, np.uint8)), ROWS),
    "tensors": (Subset(PAIRS, list(torch.tensor(ROWS))), ROWS),
    "from the end": (Subset(PAIRS, [-row - 1 for row in ROWS]), [N - 1 - row for row in ROWS]),
    "of a list of labels": (Subset(StackDataset(IMAGES, LABELS.tolist()), tuple(ROWS)), ROWS),
}


@pytest.mark.parametrize(("given", "rows"), STACKED.values(), ids=STACKED)
def test_rows_of_arrays_keep_their_labels_however_they_are_chosen(given, rows):
    images, targets, _ = loaded(given)
    rows, expected = (range(N), IMAGES * 0) if rows is None else (rows, IMAGES)
    np.testing.assert_array_equal(images, expected[np.array(rows)])
    assert targets == LABELS[np.array(rows)].tolist()


@pytest.mark.parametrize(("kind", "white"), [(np.int32, 1), (np.uint16, 1), (np.float32, 255)])
def test_a_pillow_image_of_more_than_8_bits_is_read_as_an_array_is(kind, white):
    given = Own(lambda image, label: (Image.fromarray((image[..., 0] / white).astype(kind)), label))
    np.testing.assert_array_equal(loaded(given)[0], GRAY[..., None].repeat(3, -1))


WRAPPED = {
    "Subset": Subset(Named(), range(N)),
    "random_split": Subset(Subset(Named(), range(N)), torch.arange(N).tolist()),
    "ConcatDataset": ConcatDataset([Subset(Named(), range(10)), Subset(Named(), range(10, N))]),
    "Hugging Face": hugging_face(),
    "its dict": {"train": hugging_face(), "validation": hugging_face(), "unsupervised": None},
}


@pytest.mark.parametrize("given", WRAPPED.values(), ids=WRAPPED)
def test_class_names_come_from_classes_features_and_what_is_wrapped(given):
    images, targets, names = loaded(given)
    assert names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(images, IMAGES)
    assert targets == LABELS.tolist()


def test_class_names_of_labels_that_are_transformed_are_not_those_of_the_data_set():
    given = Named(lambda image, label: (Image.fromarray(image), int(label) % 2))
    given.target_transform = lambda label: label % 2
    assert loaded(given)[2] == ("0", "1")
    around = Own(lambda image, label: (Image.fromarray(image), int(label) % 2))
    around.dataset, around.target_transform = Named(), given.target_transform
    assert loaded(around)[2] == ("0", "1")
    same = Named()
    same.target_transform = torch.tensor
    assert loaded(same)[2] == Named.classes


def test_class_names_of_cats_and_dogs_are_not_those_of_their_breeds():
    pets = Named(lambda image, label: (image, int(label) % 2))
    vars(pets).update(_target_types=["binary-category"], bin_classes=["Cat", "Dog"])
    for given in (pets, Subset(pets, range(N))):
        assert loaded(given)[2] == ("Cat", "Dog")
    vars(pets).update(make=SAMPLES["PIL"], _target_types=["category"])
    assert loaded(pets)[2] == Named.classes


def around(inner, rows, number, **attributes):
    """Return a data set of rows of another, its labels numbered by a function."""
    given = Own(lambda image, label: (image, number(int(label))), IMAGES[rows], LABELS[rows])
    vars(given).update(attributes, dataset=inner)
    return given


SHUFFLED = np.random.default_rng(0).permutation(N)
TRIPLES = Named(lambda image, label: (image, label, "note"))
IN_ORDER, NO_ANTS = np.arange(N), np.flatnonzero(LABELS)
RENUMBERED = {
    "merged": (around(Named(), IN_ORDER, lambda label: label % 2), ("0", "1")),
    "chosen and moved": (around(Named(), NO_ANTS, lambda label: label - 1, indices=NO_ANTS.tolist()), ("0", "1")),
    "around another": (around(around(Named(), IN_ORDER, int), IN_ORDER, lambda label: label % 2), ("0", "1")),
    "the same": (around(Named(), IN_ORDER, int), Named.classes),
    "chosen": (around(Named(), SHUFFLED[:20], int, indices=SHUFFLED[:20]), Named.classes),
    "chosen by its own rule": (around(Named(), IN_ORDER[:20], int), Named.classes),
    "shuffled by its own rule": (around(Named(), SHUFFLED, int), Named.classes),
    "of other samples": (around(TRIPLES, IN_ORDER, int), Named.classes),
    "as text": (around(Named(), IN_ORDER, lambda label: Named.classes[label]), Named.classes),
}


@pytest.mark.parametrize(("given", "names"), RENUMBERED.values(), ids=RENUMBERED)
def test_class_names_of_what_is_wrapped_are_used_unless_its_classes_get_other_numbers(given, names):
    assert loaded(given)[2] == names


@pytest.mark.parametrize("make", [SAMPLES["PIL"], SAMPLES["dict"]])
@pytest.mark.parametrize(
    "attributes",
    [
        {"classes": [0, 1, 2]},
        {"dataset": IMAGES},
        {"datasets": IMAGES},
        {"datasets": [IMAGES, LABELS]},
        {"features": IMAGES},
    ],
)
def test_attributes_may_be_called_as_those_with_class_names_are(attributes, make):
    given = Own(make)
    vars(given).update(attributes)
    assert loaded(given)[2] == ("0", "1", "2")


def with_classes(*names, labels=LABELS):
    given = Own(labels=labels)
    given.classes = names
    return given


OTHER_NAMES = {
    "another order": (with_classes("ant", "bee", "cat"), with_classes("ant", "cat", "bee")),
    "a class is missing": (with_classes("ant", "bee", "cat"), with_classes("ant", "cat", labels=LABELS % 2)),
    "of a part": ConcatDataset([Named(), with_classes("ape", "cat", "bee")]),
    "of a part of the test split": (Named(), ConcatDataset([Subset(Named(), range(9)), with_classes("bee", "ant")])),
    "of features": {"train": hugging_face(), "test": with_classes("cat", "bee", "ant")},
}


@pytest.mark.parametrize("given", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_the_same_number_for_another_class_is_refused(given):
    with pytest.raises(UserError, match=r"label \d is \w+, in the training images \w+.\n.*--data\.class_names"):
        data(given).setup()
    data(given, class_names=["a", "b", "c"]).setup()  # whoever names them says what the numbers mean


def test_fewer_classes_and_labels_that_are_text_do_not_count_as_other_classes():
    assert loaded((Named(), with_classes("ant", "bee", labels=LABELS % 2)), "test")[1] == (LABELS % 2).tolist()
    assert loaded(((IMAGES, LABELS), Named()), "test")[2] == ("0", "1", "2")
    words = np.array(["ant", "bee", "cat"])[LABELS]
    given = with_classes("ant", "bee", "cat", labels=words), with_classes("cat", "bee", "ant", labels=words)
    assert loaded(given, "test")[1] == LABELS.tolist()


def test_names_that_a_data_set_repeats_get_their_labels():
    twice = with_classes(("crane",), ("crane",), "cat")
    assert loaded(twice)[2] == ("crane (0)", "crane (1)", "cat")
    for test in (twice, with_classes("crane", labels=LABELS * 0)):
        assert loaded((twice, test), "test")[2] == ("crane (0)", "crane (1)", "cat")
    with pytest.raises(UserError, match="label 1 is cat, in the training images crane"):
        data((twice, with_classes("crane", "cat", labels=LABELS % 2))).setup()
    words = np.array(["crane", "cat", "cat"])[LABELS]
    with pytest.raises(UserError, match=r"label crane .*--data\.class_names"):  # which of them?
        data(with_classes("crane", "crane", "cat", labels=words)).setup()


def test_class_names_can_be_given_and_outnumber_the_labels():
    module = data(Named(), class_names=["a", "b", "c", "d"], class_weights="balanced", val_fraction=0.2)
    module.setup()
    assert module.class_names == ("a", "b", "c", "d")
    assert module.class_weights[3] == 0
    assert module.num_images("test") == 5
    with pytest.raises(UserError, match=r"--data\.class_names: a is given twice"):
        data(with_classes("a", "a", "b"), class_names=["a", "a", "b"])
    with pytest.raises(UserError, match=r"--data\.class_names"):
        data("synthetic", class_names=["a", "b"])


def test_labels_that_are_text_are_sorted_names():
    words = np.array(["owl", "ape", "elk"])[LABELS]
    for given in (Own(labels=words), (IMAGES, words), (IMAGES, words.tolist())):
        _, targets, names = loaded(given)
        assert names == ("ape", "elk", "owl")
        assert targets[:4] == [2, 0, 1, 2]
    assert loaded(Own(labels=words), class_names=["owl", "elk", "ape", "yak"])[1][:3] == [0, 2, 1]
    with pytest.raises(UserError, match="label owl is none of the 2 classes"):
        loaded(Own(labels=words), class_names=["elk", "ape"])


def test_names_of_classes_are_compared_in_unicodes_form_nfc():
    words = ["é", "e\u0301", "b"] * 8
    for given in (Own(labels=words), (IMAGES, words)):
        _, targets, names = loaded(given)
        assert names == ("b", "é")
        assert targets[:3] == [1, 1, 0]
    assert loaded(Own(labels=words), class_names=["e\u0301", "b"])[1][:3] == [0, 0, 1]
    named = with_classes("a", "b", "e\u0301")
    assert loaded((named, with_classes("a", "b", "é")), "test")[2] == ("a", "b", "é")
    module = data(named)
    module.setup()
    module.load_state_dict({**module.state_dict(), "class_names": ["a", "b", "e\u0301"]})  # of an earlier version


def test_pairs_and_triples_are_splits():
    module = data(((IMAGES, LABELS), (TENSORS[:6], LABELS[:6])), val_fraction=0.25)
    module.setup()
    assert [module.num_images(split) for split in ("train", "val", "test")] == [18, 6, 6]
    module = data((Named(), Subset(Named(), range(9)), hugging_face()))
    module.setup()
    assert [module.num_images(split) for split in ("train", "val", "test")] == [24, 9, 24]
    module = data(random_split(Named(), [18, 6]), val_fraction=0.0)
    module.setup()
    assert [module.num_images(split) for split in ("train", "val", "test")] == [18, 0, 6]
    assert data((Named(), Named(), None)).source.load("test") is None
    module = data([(Image.fromarray(image), label) for image, label in zip(IMAGES, LABELS.tolist(), strict=True)])
    module.setup()
    assert module.num_images("test") == 5  # split off


def test_images_of_several_sizes_become_squares_as_those_of_folders():
    sizes = [(40, 30), (33, 64), (50, 50)]
    images = [Image.new("RGB", sizes[index % 3], (index, 2, 3)) for index in range(9)]
    given = [(image, index % 3) for index, image in enumerate(images)]
    assert loaded(given)[0].shape == (9, 32, 32, 3)
    assert loaded(given, image_size=20)[0].shape == (9, 20, 20, 3)
    assert data((np.zeros((9, 300, 300), np.uint8), LABELS[:9])).image_size == 300  # one size for all is kept
    assert loaded((IMAGES, LABELS), image_size=5)[0].shape == (N, 5, 5, 3)


def torchvisions():
    """Return torchvision's CIFAR10 of these images, without a transform."""
    from torchvision.datasets import CIFAR10

    cifar = CIFAR10.__new__(CIFAR10)
    vars(cifar).update(data=IMAGES, targets=LABELS.tolist(), transform=None, target_transform=None, transforms=None)
    cifar.classes = ["ant", "bee", "cat"]
    return cifar


def test_a_transform_that_torchvisions_set_is_given_later_is_applied():
    cifar = torchvisions()
    cifar.transform, cifar.target_transform = v2.RandomInvert(1.0), lambda label: (label + 1) % 3
    images, targets, _ = loaded(cifar)
    np.testing.assert_array_equal(images, 255 - IMAGES)
    assert targets == ((LABELS + 1) % 3).tolist()


def test_torchvision_and_tensor_datasets_are_not_read_one_by_one(monkeypatch, tmp_path):
    cifar = torchvisions()
    monkeypatch.setattr(object_source._Samples, "_read_all", None)
    for given in (cifar, Subset(cifar, range(N)), TensorDataset(TENSORS, torch.tensor(LABELS))):
        images, targets, _ = loaded(given)
        np.testing.assert_array_equal(images, IMAGES)
        assert targets == LABELS.tolist()
    assert loaded((IMAGES, LABELS))[0] is IMAGES  # no copy
    cifar.transform = cifar.transforms = v2.RandomInvert(0.0)
    with pytest.raises(TypeError):
        loaded(cifar)  # its samples are not the rows of its array


def test_only_images_that_are_copied_have_to_fit_in_memory(monkeypatch, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 0.0)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    for given in ((IMAGES, LABELS), (mapped, LABELS), (torch.from_numpy(IMAGES), LABELS)):
        np.testing.assert_array_equal(loaded(given)[0], IMAGES)
    for given in (Own(), Subset(StackDataset(IMAGES, LABELS), range(N)), (TENSORS, LABELS), (IMAGES[:, ::-1], LABELS)):
        with pytest.raises(UserError, match=r"need 0\.0 GB of memory"):
            loaded(given)


def test_worker_processes_read_the_same_images(monkeypatch):
    monkeypatch.setattr(object_source, "_SERIAL_S", 0.0)
    monkeypatch.setattr(object_source, "usable_cpus", lambda: 2)
    monkeypatch.setattr(object_source, "_NUM_PROBES", 4)
    assert copy_for_workers(Own()) is None  # a lambda cannot be pickled
    picklable = Own(_pair)
    copied = copy_for_workers(picklable)
    assert copied is not picklable
    assert copied.images is IMAGES  # and not in memory twice
    torch.manual_seed(3)
    images, targets, _ = loaded(picklable)
    np.testing.assert_array_equal(images, IMAGES)
    assert targets == LABELS.tolist()
    with pytest.raises(UserError, match=r"sample 17 cannot be read .ZeroDivisionError"):
        loaded(Own(_pair, labels=[*range(3)] * 5 + [0, 1, None] + [0] * 6))


def copy_for_workers(given):
    copied = object_source._copy_for_workers(object_source._Samples(given, "own: train", "crop"))
    return copied and copied.dataset


class Table(Own):
    """Holds its images in a buffer that pickle may leave where it is, as a table of Arrow does."""

    def __getstate__(self):
        return self.__dict__ | {"images": pickle.PickleBuffer(self.images.reshape(-1))}


def test_buffers_of_a_data_set_are_not_copied_for_worker_processes():
    given = Table(_pair)
    assert np.shares_memory(np.frombuffer(copy_for_workers(given).images, np.uint8), given.images)


class OneFile(Own):
    """Images of one file, which a process opens when it reads the first and which is left out where it is pickled."""

    def __init__(self, path):
        super().__init__(_pair)
        self.path, self.file, self.opened_by = path, None, None

    def __getitem__(self, index):
        if self.file is None:
            self.file, self.opened_by = self.path.open("rb"), os.getpid()
        assert self.opened_by == os.getpid(), "another process moves the position in this file, too"
        self.file.seek(index * IMAGES[0].nbytes)
        image = np.frombuffer(self.file.read(IMAGES[0].nbytes), np.uint8).reshape(IMAGES[0].shape)
        return image, self.own_labels[index]

    def __getstate__(self):
        return self.__dict__ | {"file": None}


def test_worker_processes_open_files_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(object_source, "_SERIAL_S", 0.0)
    monkeypatch.setattr(object_source, "usable_cpus", lambda: 2)
    monkeypatch.setattr(object_source, "_NUM_PROBES", 4)
    path = tmp_path / "images.bin"
    path.write_bytes(IMAGES.tobytes())
    given = OneFile(path)
    np.testing.assert_array_equal(loaded(given)[0], IMAGES)
    given.file.close()


def _pair(image, label):
    if label is None:
        raise ZeroDivisionError
    return image, label


def test_reading_leaves_random_states_alone():
    def noisy(image, label):
        random.random(), np.random.rand(), torch.rand(1)
        return image, label

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    ObjectSource(Own(noisy), None, None, "noisy").load("train")  # beartype draws for lists in the data module
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_images_are_read_once():
    reads = []
    given = Own(lambda image, label: (reads.append(1), (image, label))[1])
    module = data(given)
    module.prepare_data()
    module.setup()
    module.prepare_data()
    assert len(reads) == 3 * N  # its form, all, and again to compare: all are among the compared ones


class Endless(IterableDataset):
    def __iter__(self):
        yield IMAGES[0], 0


class NoLength(Own):
    __len__ = None


class BadLength(Own):
    def __len__(self):
        raise NotImplementedError


def none_at_17(image, label):
    return None if np.array_equal(image, IMAGES[17]) else (image, label)


def failing(image, label):
    if label == 2:
        raise KeyError("path")
    return image, label


BAD = {
    "object": (object(), ["object", "no __len__ and no __getitem__", "Dataset"]),
    "number": (5, ["int", "__len__"]),
    "dict": ({"a": 1}, ["no train", "a"]),
    "no train": ({"test": Own()}, ["no train", "test"]),
    "two validation splits": ({"train": Own(), "val": Own(), "validation": Own()}, ["val and validation", "keep one"]),
    "IterableDataset": (Endless(), ["Endless", "no length"]),
    "no length": (NoLength(), ["NoLength", "__len__"]),
    "length that fails": (BadLength(), ["BadLength", "__len__"]),
    "DataLoader": (DataLoader(Own()), ["DataLoader", "dataset"]),
    "image array alone": (IMAGES, ["ndarray", "labels"]),
    "empty": (Own(images=[]), ["empty"]),
    "empty arrays": ((IMAGES[:0], LABELS[:0]), ["empty"]),
    "lengths": ((IMAGES, LABELS[:5]), ["24 images and 5 labels"]),
    "empty test": ((Own(), Own(images=[])), ["test", "empty"]),
    "keys": (Own(lambda image, label: {"x": image, "y": label}), ["x, y", "image", "label", "sample is {x: ndarray"]),
    "no label": (Own(lambda image, label: image), ["without a label", "predict-images", "ndarray uint8 (8, 8, 3)"]),
    "three values": (Own(lambda image, label: (image, label, 1)), ["(image, label)", "int64"]),
    "label None": (Own(lambda image, label: (image, None)), ["no label"]),
    "all labels -1": (Own(labels=[-1] * N), ["no labels"]),
    "test without labels": ((Named(), Named(labels=[-1] * N)), ["test", "no labels", "split off"]),
    "float label": (Own(labels=LABELS / 1), ["float", "int(label)"]),
    "float labels": ((IMAGES, torch.tensor(LABELS) / 1), ["float", "int(label)"]),
    "one-hot": (Own(labels=np.eye(3)[LABELS]), ["one-hot", "argmax"]),
    "one-hot array": ((IMAGES, np.eye(3)[LABELS]), ["one-hot", "argmax"]),
    "several labels": (Own(lambda image, label: (image, [0, 1])), ["one class an image"]),
    "label object": (Own(lambda image, label: (image, object())), ["label of type object"]),
    "gap": (Own(labels=LABELS * 2), ["0 to n-1", "has 1", "--data.class_names"]),
    "from 1": (Own(labels=LABELS + 1), ["0 to n-1", "has 0"]),
    "huge label": (Own(labels=[0, 1, 10**12] * 8), ["0 to n-1", "is 1000000000000", "has 2"]),
    "beyond int64": (Own(labels=[0, 1, 10**30] * 8), ["0 to n-1", "has 2"]),
    "four arrays": ((IMAGES, LABELS, IMAGES, LABELS), ["4 arrays", "((images, labels), (images, labels))"]),
    "no pixels": (Own(lambda image, label: (image[:0], label)), ["(0, 8, 3)", "without pixels"]),
    "exits": (Own(lambda image, label: sys.exit("no data")), ["sample 0 ", "no data", "test_object_source.py:"]),
    "made of nothing": (lambda: Own(None).missing, ["AttributeError", "missing", "test_object_source.py:"]),
    "made of no file": (lambda: np.load("missing.npy"), ["FileNotFoundError", "missing.npy"]),
    "one None": (Own(none_at_17), ["sample 17", "sample is NoneType"]),
    "negative": (Own(labels=LABELS - 1), ["label -1"]),
    "above classes": (Named(labels=LABELS + 1), ["label 3", "0 to 2"]),
    "mixed labels": (Own(labels=[0, "1"] * 12), ["text", "numbers"]),
    "mixed labels of arrays": ((IMAGES, [0, "1"] * 12), ["text", "numbers"]),
    "no labels": ((IMAGES, None), ["ndarray and NoneType", "(images, labels)"]),
    "a label": ((IMAGES, np.array(3)), ["ndarray and ndarray", "(images, labels)"]),
    "test only": ((Own(), Own(labels=LABELS + 1)), ["test", "label 3"]),
    "one class": (Own(labels=LABELS * 0), ["only one class"]),
    "two channels": (Own(lambda image, label: (image[..., :2], label)), ["(8, 8, 2)", "channels"]),
    "flat": ((IMAGES.reshape(N, -1), LABELS), ["(192,)", "(H, W, C)"]),
    "path": (Own(lambda image, label: ("cat.jpg", label)), ["sample 0 ", "FileNotFoundError", "cat.jpg"]),
    "lists": (Own(lambda image, label: (image.tolist(), label)), ["image of type list", "sample is (list, int"]),
    "normalized": (Own(lambda image, label: (as_float(image) * 4 - 2, label)), ["Normalize", "from -", "float32"]),
    "normalized array": ((TENSORS / 127.5 - 1, LABELS), ["Normalize"]),
    "0 to 255 float": ((TENSORS.float(), LABELS), ["float32 from 0 to ", "uint8"]),
    "NaN": ((TENSORS / 0.0, LABELS), ["nan", "uint8"]),
    "raises": (Own(failing), ["sample 2 ", "KeyError", "path", "test_object_source.py:"]),
    "damaged": (Own(lambda image, label: (b"\x89PNG no", label)), ["sample 0 ", "cannot be read"]),
    "32-bit": (Own(lambda image, label: (Image.new("F", (8, 8), 300), label)), ["white"]),
    "random": (
        Own(lambda image, label: (np.roll(image, random.randrange(9)), label)),
        ["two reads", "--data.transforms"],
    ),
    "random label": (Own(lambda image, label: (image, random.randrange(3))), ["two reads"]),
}


@pytest.mark.parametrize(("given", "reasons"), BAD.values(), ids=BAD)
def test_what_is_no_data_set_is_refused_with_the_reason(given, reasons):
    with pytest.raises(UserError) as caught:
        data(given).setup()
    message = str(caught.value)
    for reason in reasons:
        assert reason in message
    assert len(message.splitlines()) <= 3


class Ready:
    """A source of one's own."""

    class_names, image_size = ("a", "b"), SIZE

    def prepare(self):
        self.is_prepared = True

    def load(self, split):
        return None if split == "val" else ImageSet(IMAGES, LABELS % 2, digest(IMAGES, LABELS % 2))

    def describe(self):
        return "ready"


def test_a_source_of_ones_own_is_used_as_it_is():
    for given in (Ready, Ready(), type("Measured", (Ready,), {"mean": None, "std": None})):
        module = data(given)
        module.prepare_data()
        module.setup()
        assert module.source.is_prepared
        assert len(module.mean) == len(module.std) == 3
        assert module.num_images("test") == N
    with pytest.raises(UserError, match=r"--data\.image_size"):
        data(Ready(), image_size=9)


def test_names_and_statistics_of_a_source_may_be_lists_numbers_and_arrays():
    class Numbered(Ready):
        class_names, mean, std = [3, 5], np.full(3, 0.5), torch.full((3,), 0.25)

    module = data(Numbered())
    module.setup()
    module.load_state_dict(module.state_dict())
    assert module.class_names == ("3", "5")
    assert (module.mean, module.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UserError, match="two classes are named a"):
        data(type("Equal", (Ready,), {"class_names": ["a", "a"]})())


NO_IMAGE_SETS = {
    "a pair": ((IMAGES, LABELS % 2), ["tuple", "ImageSet"]),
    "floats": (ImageSet(IMAGES / 255, LABELS % 2, ""), ["float64 (24, 8, 8, 3)", "uint8 (n, 8, 8, 3)"]),
    "channels first": (ImageSet(TENSORS.numpy(), LABELS % 2, ""), ["(24, 3, 8, 8)"]),
    "tensors": (ImageSet(torch.from_numpy(IMAGES), LABELS % 2, ""), ["Tensor torch.uint8"]),
    "lists": (ImageSet(IMAGES.tolist(), LABELS % 2, ""), ["images list"]),
    "another size": (ImageSet(IMAGES[:, :6, :6], LABELS % 2, ""), ["(24, 6, 6, 3)"]),
    "gray": (ImageSet(IMAGES[..., :1], LABELS % 2, ""), ["(24, 8, 8, 1)"]),
    "empty": (ImageSet(IMAGES[:0], LABELS[:0], ""), ["(0, 8, 8, 3)"]),
    "32 bits": (ImageSet(IMAGES, (LABELS % 2).astype(np.int32), ""), ["targets", "int32", "int64"]),
    "a list of labels": (ImageSet(IMAGES, (LABELS % 2).tolist(), ""), ["targets list"]),
    "too few labels": (ImageSet(IMAGES, LABELS[:5] % 2, ""), ["(5,) of 24 images"]),
    "from 1": (ImageSet(IMAGES, LABELS % 2 + 1, ""), ["targets from 1 to 2", "0 to 1"]),
    "negative": (ImageSet(IMAGES, LABELS % 2 - 1, ""), ["targets from -1 to 0"]),
}


@pytest.mark.parametrize(("given", "reasons"), NO_IMAGE_SETS.values(), ids=NO_IMAGE_SETS)
def test_what_a_source_of_ones_own_loads_is_checked(given, reasons):
    source = Ready()
    source.load = lambda split: given if split == "test" else Ready.load(source, split)
    with pytest.raises(UserError) as caught:
        data(source).setup()
    for reason in ["--data.dataset Ready", "load('test')", *reasons]:
        assert reason in str(caught.value)


MODULE = """
import numpy as np
from torch.utils.data import Dataset

class Squares(Dataset):
    classes = ["dark", "light"]
    def __init__(self, num=60):
        self.num = num
    def __len__(self):
        return self.num
    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 128, (8, 8, 3), dtype=np.uint8)
        return image + np.uint8(120 * (index % 2)), index % 2

def both():
    return Squares(60), Squares(20)

made = Squares(40)

def needs(root):
    return made
"""


def test_an_import_path_names_a_class_function_or_object(monkeypatch, tmp_path):
    (tmp_path / "own_squares.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    nums = {"own_squares:Squares": 48, "own_squares.Squares": 48, "own_squares:both": 60, "own_squares:made": 32}
    for path, num in nums.items():
        module = data(path, val_fraction=0.0)
        module.setup()
        assert (module.class_names, module.num_images("train")) == (("dark", "light"), num)
        assert module.split_summary()["dataset"].startswith(f"{path}: ")
    bad = {"own_squares:need": "Did you mean needs", "own_squares:needs": "root", "os:getcwd": "str"}
    for path, reason in bad.items():
        with pytest.raises(UserError, match=reason):
            data(path)
