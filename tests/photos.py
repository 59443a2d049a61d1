"""Images of random shapes with some detail, of which no two are alike, and of random pixels."""

import numpy as np
import torch
from PIL import Image


def photos(n, size=32, seed=0):
    """Return RGB images of smooth random shapes with some detail, uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, size // 4, size // 4, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC)) for each in coarse]
    return np.clip(np.stack(smooth) + rng.normal(0, 4, (n, size, size, 1)), 20, 235).astype(np.uint8)


def random_images(count=16, height=32, width=32):
    """Return images of random pixels."""
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
