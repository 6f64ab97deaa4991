"""Measures of the difference between images."""

from __future__ import annotations

import numpy as np


def psnr(
    reference: np.ndarray,
    image: np.ndarray,
    data_range: float = 255.0,
    where: np.ndarray | None = None,
    limit: float = float("inf"),
) -> float:
    """Return the peak signal-to-noise ratio of an image, in dB.

    Args:
        reference: the original, an array of any shape, such as (H, W, 3).
        image: the other image, of the same shape.
        data_range: largest minus smallest possible value: 255 for uint8, 2 for values in [-1, 1].
        where: bool array of the first dimensions, such as (H, W); only its True positions count. Default: all count.
        limit: largest result; equal images have no finite ratio.

    Raises:
        ValueError: The shapes differ, or a value that counts is not finite.
    """
    if reference.shape != image.shape:
        raise ValueError(f"the images have different shapes, {reference.shape} and {image.shape}")
    difference = reference.astype(np.float64) - image
    difference = difference if where is None else difference[where]
    if not np.isfinite(difference).all():
        raise ValueError("the images have values that are not finite")
    error = np.square(difference).mean()
    with np.errstate(divide="ignore"):
        return float(min(10.0 * np.log10(data_range**2 / error), limit))
