"""A synthetic data set of ten classes: five shapes, plain or striped.

Position, size, rotation, colours, background and noise vary from image to image, so that no single pixel predicts the
class: a linear classifier fails, a small convolutional network makes few mistakes. Output that mentions the set says
that it is not a real one.

The images are drawn with signed distances (https://iquilezles.org/articles/distfunctions2d/) from NumPy's PCG64. Only
operations that IEEE 754 rounds exactly are used (+ - * / sqrt, min, max, floor), no sin or exp, whose last digit
differs between processors: the same arguments give the same bytes on every machine.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_lightning.data.memory import check_fits
from cifar_lightning.errors import UserError

MIN_IMAGE_SIZE = 16  # below, stripes are thinner than a pixel
_SPLITS = {"train": 0, "test": 1}
_ROOT_SEED = 20_170  # arbitrary; another number gives another data set
_CHUNK = 256  # images drawn at once: their temporaries fit in the CPU cache

# Difficulty, chosen by experiment: SmallNet with widths 16, 32, 64 reaches 98 to 99.5 % in six epochs.
_RADIUS = (0.58, 0.85)  # in half images
_STRIPE_PERIOD = (0.28, 0.44)  # in half images: 4.5 to 7 pixels of 32
_CONTRAST = (0.40, 0.85)  # least and largest difference of a colour channel between shape and background, of 0-1
_NOISE = (0.01, 0.07)  # half width of the uniform noise, of 0-1

_Array = NDArray[Any]
# Signed distance to the outline of each shape, negative inside, of x, y and the radius.
_OUTLINES: dict[str, Callable[[_Array, _Array, _Array], _Array]] = {
    "disk": lambda x, y, radius: np.sqrt(x * x + y * y) - 0.9 * radius,
    "square": lambda x, y, radius: np.maximum(abs(x), abs(y)) - 0.8 * radius,
    "triangle": lambda x, y, radius: np.maximum(0.75**0.5 * abs(x) + 0.5 * y, -y) - 0.6 * radius,
    "ring": lambda x, y, radius: abs(np.sqrt(x * x + y * y) - 0.72 * radius) - 0.26 * radius,
    "cross": lambda x, y, radius: np.minimum(
        np.maximum(abs(x) - 0.34 * radius, abs(y) - radius), np.maximum(abs(x) - radius, abs(y) - 0.34 * radius)
    ),
}
CLASS_NAMES = (*_OUTLINES, *(f"striped_{shape}" for shape in _OUTLINES))


def draw(split: str, count: int, image_size: int = 32) -> tuple[_Array, _Array]:
    """Draw one split, a pure function of the arguments; "train" and "test" share no image.

    Classes are equally frequent, to within one image, in random order.

    Returns:
        Images uint8 RGB (count, image_size, image_size, 3), 0-255, and targets int64 (count,), indices into
        `CLASS_NAMES`.

    Raises:
        UserError: Too small images, none, or too many for the memory.
    """
    check(count, image_size)
    seeds = np.random.SeedSequence([_ROOT_SEED, _SPLITS[split], count, image_size])
    rng = np.random.Generator(np.random.PCG64(seeds))
    targets = rng.permutation(np.arange(count, dtype=np.int64) % len(CLASS_NAMES))
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        images[start : start + _CHUNK] = _draw_chunk(rng, targets[start : start + _CHUNK], image_size)
    return images, targets


def check(count: int, image_size: int) -> None:
    """Raise `UserError` for arguments that `draw` refuses."""
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"--data.image_size {image_size}: the synthetic set needs {MIN_IMAGE_SIZE} pixels or more")
    if count < 1:
        raise UserError(f"the synthetic set needs 1 image or more of each split, got {count}")
    check_fits((count, image_size, image_size, 3), f"--data.image_size {image_size}", "Give a smaller size.")


def _draw_chunk(rng: np.random.Generator, targets: _Array, image_size: int) -> _Array:
    """Draw uint8 images (N, S, S, 3) of the given classes."""
    num = len(targets)
    radius = _uniform(rng, num, *_RADIUS)
    # The centre lies inside the image; large shapes are cut off a little at the border.
    free = 1.1 - radius
    x, y = _rotated_grid(_uniform(rng, num, -1, 1) * free, _uniform(rng, num, -1, 1) * free, rng, image_size)
    distance = _distances(x, y, radius, targets % len(_OUTLINES))
    inside = _coverage(distance, image_size)[..., None]

    front, back, band, far = _colours(rng, num)
    stripes = _stripes(x, y, rng, image_size) * (targets >= len(_OUTLINES))[:, None, None]
    ink = front + (band - front) * stripes[..., None]
    paper = back + (far - back) * _ramp(rng, num, image_size)[..., None]
    images = paper + (ink - paper) * inside

    noise = rng.integers(0, 256, images.shape, dtype=np.uint8).astype(np.float32) / 127.5 - 1
    images += noise * _uniform(rng, num, *_NOISE)[..., None]
    pixels: _Array = (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def _uniform(rng: np.random.Generator, num: int, low: float, high: float) -> _Array:
    """Return uniform numbers float32 (num, 1, 1), one per image."""
    unit = rng.random((num, 1, 1), dtype=np.float32)
    return low + (high - low) * unit


def _direction(rng: np.random.Generator, num: int) -> tuple[_Array, _Array]:
    """Return random unit vectors as (cosine, sine), each float32 (num, 1, 1), without calling cos or sin."""
    t = _uniform(rng, num, -1, 1)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # the right half of the circle
    quarter = rng.integers(0, 4, (num, 1, 1))
    return (
        np.choose(quarter, (cosine, -sine, -cosine, sine)),
        np.choose(quarter, (sine, cosine, -sine, -cosine)),
    )


def _grid(image_size: int) -> tuple[_Array, _Array]:
    """Return pixel centres from -1 to 1: x float32 (1, 1, S) and y float32 (1, S, 1)."""
    centres = (np.arange(image_size, dtype=np.float32) * 2 + 1) / image_size - 1
    return centres[None, None, :], centres[None, :, None]


def _rotated_grid(x0: _Array, y0: _Array, rng: np.random.Generator, image_size: int) -> tuple[_Array, _Array]:
    """Return pixel coordinates relative to (x0, y0), rotated by a random angle: two float32 (N, S, S)."""
    x, y = _grid(image_size)
    cosine, sine = _direction(rng, len(x0))
    x, y = x - x0, y - y0
    return x * cosine + y * sine, y * cosine - x * sine


def _distances(x: _Array, y: _Array, radius: _Array, shape: _Array) -> _Array:
    """Return signed distances float32 (N, S, S) to the outlines of shapes int64 (N,), negative inside."""
    distance = np.empty_like(x)
    for index, outline in enumerate(_OUTLINES.values()):
        of_shape = shape == index
        distance[of_shape] = outline(x[of_shape], y[of_shape], radius[of_shape])
    return distance


def _coverage(distance: _Array, image_size: int) -> _Array:
    """Return the fraction of each pixel that lies inside, 0 to 1: edges are one pixel wide and smooth."""
    return np.clip(0.5 - distance * (image_size / 2), 0, 1)


def _stripes(x: _Array, y: _Array, rng: np.random.Generator, image_size: int) -> _Array:
    """Return straight stripes in a random direction, 0 or 1 with smooth edges: float32 (N, S, S)."""
    num = len(x)
    cosine, sine = _direction(rng, num)
    period = _uniform(rng, num, *_STRIPE_PERIOD)
    phase = (x * cosine + y * sine) / period + _uniform(rng, num, 0, 1)
    triangle_wave = abs(phase - np.floor(phase) - 0.5) - 0.25
    return _coverage(triangle_wave * period, image_size)


def _ramp(rng: np.random.Generator, num: int, image_size: int) -> _Array:
    """Return a smooth gradient from 0 to 1 in a random direction: float32 (N, S, S)."""
    x, y = _grid(image_size)
    cosine, sine = _direction(rng, num)
    slope: _Array = np.clip(0.5 + 0.4 * (x * cosine + y * sine), 0, 1)
    return slope


def _colours(rng: np.random.Generator, num: int) -> tuple[_Array, _Array, _Array, _Array]:
    """Return colours float32 (num, 1, 1, 3) of 0-1: shape, background, stripes, far side of the background.

    Shape and stripes are both lighter or both darker than the background in each channel, and stripes lie between the
    two: outlines stay visible, and neither brightness nor hue predicts a class.
    """
    back = rng.random((num, 1, 1, 3), dtype=np.float32)
    contrast = _uniform(rng, num, *_CONTRAST)[..., None]
    tint = 0.55 + 0.45 * rng.random((num, 1, 1, 3), dtype=np.float32)
    lighter = rng.integers(0, 2, (num, 1, 1, 1)).astype(np.float32)
    step = contrast * tint
    # Scale the background so that the colour of the shape does not saturate.
    back = back * (1 - step) + step * (1 - lighter)
    front = back + step * (2 * lighter - 1)
    band = front + (back - front) * _uniform(rng, num, 0.45, 0.75)[..., None]
    far = back + (rng.random((num, 1, 1, 3), dtype=np.float32) - 0.5) * 0.3
    return front, back, band, far
