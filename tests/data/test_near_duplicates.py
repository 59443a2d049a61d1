import io

import numpy as np
import pytest
from photos import photos
from PIL import Image
from scipy.fft import dct

from cifar_lightning.data import near_duplicates
from cifar_lightning.data.image_set import is_constant
from cifar_lightning.data.near_duplicates import find_near_duplicates


def perceptual_hashes(images):
    return near_duplicates._bits(near_duplicates._low_frequencies(near_duplicates._thumbnails(images)))


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def test_hash_is_the_sign_of_low_frequencies_around_their_median():
    gray = photos(20)[..., :1]
    for hashed, image in zip(perceptual_hashes(gray), gray[..., 0].astype(float), strict=True):
        low = dct(dct(image, axis=0), axis=1)[:8, :8]
        bits = "".join(str(int(bit)) for bit in (low > np.median(low)).ravel())
        assert int(bits, 2) == int(hashed)


def test_hash_is_that_of_imagehash():
    imagehash = pytest.importorskip("imagehash")
    images = photos(20, seed=1)
    expected = [int(str(imagehash.phash(Image.fromarray(image).convert("L"))), 16) for image in images]
    assert perceptual_hashes(images).tolist() == expected


@pytest.mark.parametrize("size", [20, 48])
def test_images_of_another_size_are_resized_by_area(size):
    image = photos(1, size)
    fine = near_duplicates.luma(image).repeat(32, 1).repeat(32, 2)[0, ..., 0]  # of 32 times the size
    expected = fine.reshape(32, size, 32, size).mean((1, 3))
    assert near_duplicates._thumbnails(image)[0] == pytest.approx(expected, abs=1e-3)


CHANGES = {
    "jpeg 75": lambda image: jpeg(image, 75),
    "jpeg 50": lambda image: jpeg(image, 50),
    "shift right": lambda image: np.pad(image, ((0, 0), (1, 0), (0, 0)), "edge")[:, :-1],
    "shift up": lambda image: np.pad(image, ((0, 1), (0, 0), (0, 0)), "edge")[1:],
    "brighter": lambda image: np.clip(image * 1.1, 0, 255).astype(np.uint8),
    "darker": lambda image: (image * 0.9).astype(np.uint8),
    "identical": lambda image: image,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_in_another_set_is_found_and_nothing_else(change):
    images = photos(60)
    copies = np.stack([CHANGES[change](image) for image in images[:20]])
    pairs = find_near_duplicates([images, copies])
    assert pairs.tolist() == [[at, 60 + at] for at in range(20)]


def test_many_images_are_compared_where_a_word_of_the_hash_agrees(monkeypatch):
    images = photos(60)
    sets = [images, np.stack([jpeg(image, 75) for image in images])]
    whole = find_near_duplicates(sets)
    monkeypatch.setattr(near_duplicates, "_ALL_PAIRS", 10)
    assert find_near_duplicates(sets).tolist() == whole.tolist()


def test_images_of_one_colour_and_skies_are_not_near_duplicates():
    constant = np.full((4, 32, 32, 3), 90, np.uint8)
    sky = np.broadcast_to(np.linspace(200, 208, 32)[None, :, None, None], (4, 32, 32, 3)).astype(np.uint8)
    assert not len(find_near_duplicates([constant, sky]))
    assert is_constant(np.concatenate([constant, sky])).tolist() == [True] * 4 + [False] * 4


def test_many_identical_or_constant_images_are_compared_a_few_times(monkeypatch):
    compared, are_near = [], near_duplicates._are_near
    monkeypatch.setattr(near_duplicates, "_are_near", lambda *pairs: compared.append(len(pairs[0])) or are_near(*pairs))
    constant = np.full((400, 32, 32, 3), 90, np.uint8)
    images = photos(2)
    pairs = find_near_duplicates([constant, images[:1].repeat(400, 0), images])
    assert sum(compared) < 1500  # and not 320,000
    assert [400, 401] in pairs.tolist()
    assert [400, 800] not in pairs.tolist()
    assert set(pairs.ravel().tolist()) == set(range(400, 450))
