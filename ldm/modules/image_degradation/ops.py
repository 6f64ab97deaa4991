"""Resizing, noise and JPEG compression of images.

Shapes: images (H, W, 3), float32 in [0, 1] unless stated otherwise.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

# Flags of OpenCV by the name of the method. Only "area" averages all pixels; the others have no antialiasing.
RESIZE_FLAGS = {
    "nearest": "INTER_NEAREST",
    "bilinear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "area": "INTER_AREA",
    "lanczos": "INTER_LANCZOS4",
}
RESIZE_METHODS = tuple(RESIZE_FLAGS)
NOISE_KINDS = ("colour", "gray", "correlated")


def resize(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resize `image` to `size` (height, width) with OpenCV, and clip it to its range.

    Args:
        image: float32 in [0, 1], or uint8.
        size: (height, width).
        method: one of `RESIZE_METHODS`.
    """
    import cv2

    height, width = size
    resized = cv2.resize(image, (width, height), interpolation=getattr(cv2, RESIZE_FLAGS[method]))
    return resized if resized.dtype == np.uint8 else resized.clip(0, 1)


def gaussian_noise(image: np.ndarray, level: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to `image` and clip it to [0, 1].

    Args:
        level: standard deviation, the upper bound for "correlated" noise.
        kind: "colour" (independent channels), "gray" (the same noise in all channels), or "correlated" (covariance
            level² Uᵀ diag(d) U for a random rotation U and random d in [0, 1]).
        rng: random number generator.
    """
    noise = rng.standard_normal((*image.shape[:2], 1 if kind == "gray" else 3))
    if kind == "correlated":
        rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        noise = noise @ (np.sqrt(rng.uniform(size=3))[:, None] * rotation)
    return (image + level * noise).clip(0, 1).astype(np.float32)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress `image` as JPEG with `quality` (1 to 95) and decompress it."""
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as compressed:
        return from_pixels(np.asarray(compressed))


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to uint8 by rounding."""
    return (image * 255.0).round().clip(0, 255).astype(np.uint8)


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 to float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255.0)
