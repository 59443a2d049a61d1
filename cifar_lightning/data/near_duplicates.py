"""Near duplicates: images that differ by compression, brightness, contrast or a shift of a pixel.

Candidates have perceptual hashes within a small Hamming distance (DCT hash: Zauner 2010, "Implementation and
Benchmarking of Perceptual Image Hash Functions"). Natural images of 32 pixels collide in 64 bits, so that each is
confirmed: by the correlation of brightness gradients at the best shift, which does not depend on brightness and
contrast.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Int64, UInt8, UInt64
from scipy.fft import dct

from cifar_lightning.data.image_set import luma
from cifar_lightning.data.memory import give_back_pages, usable_cpus

_SIDE = 32  # pixels of the gray images that are hashed and compared, as in imagehash.phash
_LOW = 8  # frequencies of each axis: 64 bits
_CHUNK = 1024  # images, or pairs, at a time
# Of CIFAR-10's images shifted by one pixel on both axes, 90 % are within 16 bits (74 % within 14, 97 % within 18, of
# four times as many candidates), of JPEGs of quality 50 all within 10.
_MAX_DISTANCE = 16
_MIN_LOW_CORRELATION = 0.8  # of the hashed frequencies: leaves 6 % of the candidates, and all that are confirmed
_MIN_CORRELATION, MIN_GRADIENT_CORRELATION = 0.9, 0.6  # chosen on CIFAR-10: benchmarks/accuracy/near_duplicates.py
_MIN_STD = 4.0  # of 255: images with less contrast, such as a sky, are all alike
_ALL_PAIRS = 100_000  # images: a minute on one core; of more, images are compared that agree in 16 of the 64 bits
_ROWS = 128  # images that are compared with all at once: 8 MB for 60,000
_MAX_CANDIDATES = 50  # of an image; CIFAR-10's largest group of near duplicates has fewer
_DCT = dct(np.eye(_SIDE), axis=0)[:_LOW].astype(np.float32)


def find_near_duplicates(sets: Sequence[UInt8[np.ndarray, "_ height width channels"]]) -> Int64[np.ndarray, "pairs 2"]:
    """Return the pairs of near duplicates, identical images included, sorted; constant images are in none, and nor are
    identical images after the first `_MAX_CANDIDATES`.

    60,000 images of 32 pixels take 19 s of CPU time. The memory is bounded: of each image at most `_MAX_CANDIDATES`
    later ones are looked at, the most similar.

    Args:
        sets: Images, which may be mapped from files; they are counted through, in the order of the sets.
    """
    thumbnails = map(_thumbnails, _chunks(sets))
    of_chunks = [(_low_frequencies(each), each[:, 1:-1, 1:-1].std((1, 2))) for each in thumbnails]
    low, contrast = (np.concatenate(arrays) for arrays in zip(*of_chunks, strict=True))
    hashes = _bits(low)
    # Without the others a set of black images, or of one image 60,000 times, takes hours: all pairs are candidates.
    is_compared = (contrast > _MIN_STD) & (_num_equal_before(low) < _MAX_CANDIDATES)
    low[:, 0] = 0  # brightness
    low /= np.maximum(np.linalg.norm(low, axis=1, keepdims=True), 1e-6)

    def candidates(rows: tuple[np.ndarray, np.ndarray]) -> Int64[np.ndarray, "pairs 2"]:
        one, other = (row[is_compared[row]] for row in rows)
        at, other_at = np.nonzero(np.bitwise_count(hashes[one, None] ^ hashes[None, other]) <= _MAX_DISTANCE)
        pairs: np.ndarray = np.stack([one[at], other[other_at]], axis=1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        alike = np.einsum("ij,ij->i", low[pairs[:, 0]], low[pairs[:, 1]])
        order = np.lexsort((-alike, pairs[:, 0]))
        order = order[alike[order] > _MIN_LOW_CORRELATION]
        _, firsts, counts = np.unique(pairs[order, 0], return_index=True, return_counts=True)
        kept: np.ndarray = pairs[order[np.arange(len(order)) - firsts.repeat(counts) < _MAX_CANDIDATES]]
        return kept

    def confirmed(pairs: np.ndarray) -> np.ndarray:
        kept: np.ndarray = pairs[_are_near(_taken(sets, pairs[:, 0]), _taken(sets, pairs[:, 1]))]
        return kept

    with ThreadPoolExecutor(usable_cpus()) as pool:  # NumPy computes without Python's lock
        found = pool.map(candidates, _compared(hashes))
        pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
        kept = pool.map(confirmed, [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)])
        return np.concatenate([np.empty((0, 2), np.int64), *kept])


def _chunks(sets: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for images in sets:
        for start in range(0, len(images), _CHUNK):
            yield images[start : start + _CHUNK]
            give_back_pages(images)


def _thumbnails(images: UInt8[np.ndarray, "n height width channels"]) -> Float[np.ndarray, "n 32 32"]:
    gray = luma(images)[..., 0].astype(np.float32)
    return gray if gray.shape[1:] == (_SIDE, _SIDE) else _areas(gray.shape[1]) @ gray @ _areas(gray.shape[2]).T


def _areas(side: int) -> Float[np.ndarray, "32 side"]:
    """Return the matrix that resizes an axis by area: how much of each old pixel is in a new one."""
    edges, old = np.arange(_SIDE + 1) * side / _SIDE, np.arange(side)
    overlap: np.ndarray = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return (overlap.clip(0) * _SIDE / side).astype(np.float32)


def _low_frequencies(thumbnails: Float[np.ndarray, "n 32 32"]) -> Float[np.ndarray, "n 64"]:
    low: np.ndarray = _DCT @ thumbnails @ _DCT.T
    return low.reshape(len(thumbnails), -1)


def _bits(low: Float[np.ndarray, "n 64"]) -> UInt64[np.ndarray, " n"]:
    """Return the DCT hash of each image, `imagehash.phash`: whether a low frequency is above their median."""
    bits: np.ndarray = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _num_equal_before(rows: Float[np.ndarray, "n 64"]) -> Int64[np.ndarray, " n"]:
    """Return of each row how many earlier ones are equal to it."""
    _, group = np.unique(rows.view(f"V{rows[0].nbytes}")[:, 0], return_inverse=True)
    order = group.argsort(kind="stable")
    num: Int64[np.ndarray, " n"] = np.empty(len(rows), np.int64)
    num[order] = np.arange(len(rows)) - np.searchsorted(group[order], group[order])
    return num


def _compared(hashes: UInt64[np.ndarray, " n"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows of images, and the rows of those to compare them with; many pairs come in both orders."""
    if len(hashes) <= _ALL_PAIRS:
        groups: Iterator[np.ndarray] = iter([np.arange(len(hashes))])
    else:
        words = hashes.view(np.uint16).reshape(-1, 4).T
        orders = [word.argsort(kind="stable") for word in words]
        groups = (
            group
            for word, order in zip(words, orders, strict=True)
            for group in np.split(order, np.flatnonzero(np.diff(word[order])) + 1)
        )
    for group in groups:
        group.sort()
        for start in range(0, len(group), _ROWS):
            yield group[start : start + _ROWS], group[start:]


def _taken(sets: Sequence[np.ndarray], at: np.ndarray) -> Float[np.ndarray, "n 32 32"]:
    thumbnails, first = np.empty((len(at), _SIDE, _SIDE), np.float32), 0
    for images in sets:
        is_own = (first <= at) & (at < first + len(images))
        thumbnails[is_own] = _thumbnails(images[at[is_own] - first])
        first += len(images)
    return thumbnails


def _are_near(one: Float[np.ndarray, "n 32 32"], other: Float[np.ndarray, "n 32 32"]) -> np.ndarray:
    """Whether the images of a pair are near duplicates at a shift of up to one pixel."""
    inner = one[:, 1:-1, 1:-1]
    is_alike = np.zeros(len(one), bool)
    for y in range(3):
        for x in range(3):
            shifted = other[:, y : y + _SIDE - 2, x : x + _SIDE - 2]
            rows = np.flatnonzero(_correlation(inner, shifted) > _MIN_CORRELATION)
            gradients = _gradients(inner[rows]), _gradients(shifted[rows])
            is_alike[rows] |= _correlation(*gradients) > MIN_GRADIENT_CORRELATION
    return is_alike


def _gradients(images: Float[np.ndarray, "n height width"]) -> Float[np.ndarray, "n 2 height1 width1"]:
    return np.stack([np.diff(images, axis=axis)[:, : images.shape[1] - 1, : images.shape[2] - 1] for axis in (1, 2)], 1)


def _correlation(
    one: Float[np.ndarray, "n *axes height width"], other: Float[np.ndarray, "n *axes height width"]
) -> Float[np.ndarray, " n"]:
    """Return the correlation of the values of each image, around the mean of each of its planes."""
    a, b = (values - values.mean((-2, -1), keepdims=True) for values in (one, other))
    axes = tuple(range(1, a.ndim))
    correlation: np.ndarray = (a * b).sum(axes) / np.sqrt(np.maximum((a * a).sum(axes) * (b * b).sum(axes), 1e-12))
    return correlation
