"""Resizing, noise and JPEG compression of images.

Shapes: images (H, W, 3), float32 in [0, 1] unless stated otherwise.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn.functional import interpolate

# Names and definitions of OpenCV's resizing methods. Only "area" averages all pixels; the others have no antialiasing.
RESIZE_METHODS = ("nearest", "bilinear", "bicubic", "area", "lanczos")
NOISE_KINDS = ("colour", "gray", "correlated")


def resize(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resize `image` to `size` (height, width) with one of `RESIZE_METHODS` and clip it to [0, 1]."""
    if method == "lanczos":
        vertical, horizontal = (lanczos_weights(old, new) for old, new in zip(image.shape[:2], size, strict=True))
        resized = np.einsum("ih,hwc,jw->ijc", vertical, image, horizontal, optimize=True)
    else:
        options = {"align_corners": False} if method in ("bilinear", "bicubic") else {}
        x = rearrange(torch.from_numpy(np.ascontiguousarray(image)), "h w c -> 1 c h w")
        resized = rearrange(interpolate(x, size=size, mode=method, **options), "1 c h w -> h w c").numpy()
    return np.ascontiguousarray(resized.clip(0, 1), dtype=np.float32)


def lanczos_weights(old: int, new: int) -> np.ndarray:
    """Return the Lanczos-4 interpolation weights (new, old) on the eight nearest pixels; every row has sum 1."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-3, 5)
    distance = centres[:, None] - taps
    values = np.sinc(distance) * np.sinc(distance / 4)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], taps.clip(0, old - 1)), values)
    return weights / weights.sum(axis=1, keepdims=True)


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
