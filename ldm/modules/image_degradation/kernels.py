"""Gaussian blur kernels, round and stretched, and blurring with them.

Shapes: kernels (K, K) float64; images (H, W, C) float32. Axes are in the order (row, column).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import conv2d


def gaussian_kernel(size: int, covariance: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """A Gaussian on a grid of `size` × `size` pixels (odd), with sum 1.

    Args:
        covariance: (2, 2), in square pixels.
        shift: how far its centre lies from the grid's, along both axes.
    """
    offsets = np.arange(size) - size // 2 - shift
    rows, columns = np.meshgrid(offsets, offsets, indexing="ij")
    points = np.stack([rows, columns], axis=-1)
    exponent = np.einsum("...i,ij,...j->...", points, np.linalg.inv(covariance), points)
    kernel = np.exp(-0.5 * (exponent - exponent.min()))
    return kernel / kernel.sum()


def isotropic(deviation: float) -> np.ndarray:
    """The covariance (2, 2) of a round Gaussian."""
    return deviation**2 * np.eye(2)


def anisotropic(angle: float, variances: tuple[float, float]) -> np.ndarray:
    """The covariance (2, 2) with these variances along `angle` (in radians, from rows to columns) and across it."""
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, -sin], [sin, cos]])
    return axes @ np.diag(variances) @ axes.T


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate each channel of `image` with `kernel`; beyond its border the image is mirrored."""
    half = len(kernel) // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="reflect")
    channels = torch.from_numpy(padded).permute(2, 0, 1)[:, None]
    blurred = conv2d(channels, torch.from_numpy(kernel).to(channels)[None, None])
    return np.ascontiguousarray(blurred[:, 0].permute(1, 2, 0).numpy())
