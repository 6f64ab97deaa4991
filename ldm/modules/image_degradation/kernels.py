"""Isotropic and anisotropic Gaussian blur kernels and blur.

Shapes: kernels (K, K) float64; images (H, W, C) float32. Axes are in the order (row, column).
"""

from __future__ import annotations

import numpy as np


def gaussian_kernel(size: int, covariance: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Return a Gaussian kernel with sum 1.

    Args:
        size: height and width of the kernel, odd.
        covariance: (2, 2), in square pixels.
        shift: offset of the Gaussian from the centre of the kernel, along both axes.
    """
    offsets = np.arange(size) - size // 2 - shift
    rows, columns = np.meshgrid(offsets, offsets, indexing="ij")
    points = np.stack([rows, columns], axis=-1)
    exponent = np.einsum("...i,ij,...j->...", points, np.linalg.inv(covariance), points)
    kernel = np.exp(-0.5 * (exponent - exponent.min()))
    return kernel / kernel.sum()


def isotropic(deviation: float) -> np.ndarray:
    """Return the covariance (2, 2) of an isotropic Gaussian."""
    return deviation**2 * np.eye(2)


def anisotropic(angle: float, variances: tuple[float, float]) -> np.ndarray:
    """Return the covariance (2, 2) with the given variances along and across `angle`.

    The angle is in radians, from the row axis to the column axis.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, -sin], [sin, cos]])
    return axes @ np.diag(variances) @ axes.T


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate each channel of `image` with `kernel`, with reflection at the border.

    The result equals that of `kornia.filters.filter2d`, which rejects images smaller than half the kernel.
    """
    import cv2

    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
