"""Small image files for the tests of data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(height: int = 24, width: int = 36, seed: int = 0) -> np.ndarray:
    """Return an image of smooth colours, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path: Path, **shape: int) -> np.ndarray:
    """Write an image and return its pixels; PNG and NPY files are lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(**shape)
    if path.suffix == ".npy":
        np.save(path, array.transpose(2, 0, 1)[None])
    else:
        Image.fromarray(array).save(path)
    return array


def values(array: np.ndarray) -> np.ndarray:
    """Convert pixels to float32 in [-1, 1]."""
    return (array / 127.5 - 1).astype(np.float32)
