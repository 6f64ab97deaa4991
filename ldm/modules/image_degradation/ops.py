"""Resampling, noise and compression of images.

Shapes: images (H, W, 3), float32 in [0, 1] unless said otherwise.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

# What OpenCV's resizing methods of these names compute. Only "area" averages; the others skip pixels.
RESIZE_METHODS = ("nearest", "bilinear", "bicubic", "area", "lanczos")
NOISE_KINDS = ("colour", "gray", "correlated")


def resize(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """`image` at `size` (height, width), by one of `RESIZE_METHODS`, within [0, 1]."""
    if method == "lanczos":
        down, across = (lanczos_weights(old, new) for old, new in zip(image.shape[:2], size, strict=True))
        resized = np.einsum("ih,hwc,jw->ijc", down, image, across, optimize=True)
    else:
        options = {"align_corners": False} if method in ("bilinear", "bicubic") else {}
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        resized = interpolate(x, size=size, mode=method, **options)[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(resized.clip(0, 1), dtype=np.float32)


def lanczos_weights(old: int, new: int) -> np.ndarray:
    """(new, old) weights of the eight nearest pixels by Lanczos' window of 4 to either side; rows have sum 1."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-3, 5)
    distance = centres[:, None] - taps
    values = np.sinc(distance) * np.sinc(distance / 4)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], taps.clip(0, old - 1)), values)
    return weights / weights.sum(axis=1, keepdims=True)


def gaussian_noise(image: np.ndarray, level: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """`image` with Gaussian noise of deviation up to `level`.

    Args:
        kind: "colour" (independent in every channel), "gray" (the same in all), or "correlated": with covariance
            level² Uᵀ diag(d) U for a random rotation U and random d in [0, 1].
        rng: where the noise comes from.
    """
    noise = rng.standard_normal((*image.shape[:2], 1 if kind == "gray" else 3))
    if kind == "correlated":
        rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        noise = noise @ (np.sqrt(rng.uniform(size=3))[:, None] * rotation)
    return (image + level * noise).clip(0, 1).astype(np.float32)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """`image` after JPEG compression at `quality` (1 to 95)."""
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as compressed:
        return from_pixels(np.asarray(compressed))


def to_pixels(image: np.ndarray) -> np.ndarray:
    """[0, 1] as uint8, to the nearest level."""
    return (image * 255.0).round().clip(0, 255).astype(np.uint8)


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255.0)
