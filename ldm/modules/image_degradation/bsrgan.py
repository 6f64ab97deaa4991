"""Practical degradation model of BSRGAN (arXiv:2103.14006) and a milder variant.

The model applies blur, downsampling, noise and JPEG compression with random strength in random order. A JPEG
compression is always last.

Shapes: public functions take and return images (H, W, 3) uint8; the steps work on float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ldm.modules.image_degradation.kernels import anisotropic, blur, gaussian_kernel, isotropic
from ldm.modules.image_degradation.ops import from_pixels, gaussian_noise, jpeg, resize, to_pixels

# Section 3 of the paper: sizes of the blur kernels and probabilities of the noise types.
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
NOISE_SHARES = {"correlated": 0.2, "colour": 0.4, "gray": 0.4}
DOWNSAMPLINGS = ("nearest", "bilinear", "bicubic", "area", "down-up")
SHIFTED_KERNEL_SIZE = 21


@dataclass(frozen=True)
class Recipe:
    """Ranges and probabilities of the degradations.

    Args:
        blur: factor of the blur widths in the paper.
        blur_share: probability of each blur step.
        noise: smallest and largest standard deviation of the noise, in units of 1/255.
        jpeg: lowest and highest JPEG quality.
        jpeg_share: probability of the JPEG compression inside the random sequence.
        first_halved: probability of halving the image first, for a scale factor of 4.
    """

    blur: float
    blur_share: float
    noise: tuple[int, int]
    jpeg: tuple[int, int]
    jpeg_share: float = 0.75
    first_halved: float = 0.25


FULL = Recipe(blur=1.0, blur_share=1.0, noise=(1, 25), jpeg=(30, 95))
LIGHT = Recipe(blur=0.25, blur_share=0.5, noise=(1, 8), jpeg=(80, 95))


def degradation_fn_bsr(image: np.ndarray, sf: int = 4, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """Return a degraded, smaller version of `image`, as in the paper.

    Args:
        image: (H, W, 3) uint8.
        sf: scale factor of the reduction.
        rng: random number generator; by default seeded from torch's global generator.

    Returns:
        `{"image": (H // sf, W // sf, 3) uint8}`.

    Raises:
        ValueError: the image has another shape or dtype, or is smaller than `sf` pixels.
    """
    return {"image": degrade(image, FULL, sf, rng)}


def degradation_fn_bsr_light(
    image: np.ndarray, sf: int = 4, rng: np.random.Generator | None = None
) -> dict[str, np.ndarray]:
    """Degrade like `degradation_fn_bsr`, with a quarter of the blur, a third of the noise and high JPEG quality."""
    return {"image": degrade(image, LIGHT, sf, rng)}


def degrade(image: np.ndarray, recipe: Recipe, sf: int = 4, rng: np.random.Generator | None = None) -> np.ndarray:
    """Return `image` (H, W, 3) uint8, degraded by `recipe` and reduced by `sf`; see `degradation_fn_bsr`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"degradation needs an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    height, width = (side // sf for side in image.shape[:2])
    if min(height, width) < 1:
        raise ValueError(
            f"an image of {image.shape[1]} × {image.shape[0]} pixels cannot be reduced by a factor of {sf}"
        )
    rng = np.random.default_rng(int(torch.randint(2**62, ()))) if rng is None else rng
    x = from_pixels(image[: height * sf, : width * sf])
    if sf == 4 and rng.random() < recipe.first_halved:
        x = resize(x, (2 * height, 2 * width), rng.choice(["bilinear", "bicubic", "area"]))
        sf = 2
    steps: list[Callable[[np.ndarray], np.ndarray]] = [
        partial(_isotropic_blur, recipe=recipe, sf=sf, rng=rng),
        partial(_anisotropic_blur, recipe=recipe, sf=sf, rng=rng),
        partial(_downsample, size=(height, width), rng=rng),
        partial(_noise, recipe=recipe, rng=rng),
        partial(_random_jpeg, recipe=recipe, rng=rng),
    ]
    for index in rng.permutation(len(steps)):
        x = steps[index](x)
    return to_pixels(_jpeg(x, recipe, rng))


def _isotropic_blur(x: np.ndarray, recipe: Recipe, sf: int, rng: np.random.Generator) -> np.ndarray:
    deviation = recipe.blur * rng.uniform(0.1, 2.0 + 0.2 * sf)  # upper bound 2.4 for sf = 2, 2.8 for sf = 4
    return _random_blur(x, isotropic(deviation), recipe, rng)


def _anisotropic_blur(x: np.ndarray, recipe: Recipe, sf: int, rng: np.random.Generator) -> np.ndarray:
    across, along = recipe.blur * rng.uniform(0.5, 4.0 + sf, size=2)  # upper bound 6 for sf = 2, 8 for sf = 4
    return _random_blur(x, anisotropic(rng.uniform(0, np.pi), (along, across)), recipe, rng)


def _random_blur(x: np.ndarray, covariance: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    size = int(rng.choice(KERNEL_SIZES))
    return blur(x, gaussian_kernel(size, covariance)) if rng.random() < recipe.blur_share else x


def _downsample(x: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Resize `x` to `size`, directly or through another size."""
    method = rng.choice(DOWNSAMPLINGS)
    factor = x.shape[0] / size[0]
    if method == "nearest":
        # Nearest-neighbour resizing takes the first pixel of each block. A shifted blur moves the block's centre there.
        covariance = isotropic(rng.uniform(0.1, 0.6 * factor))
        x = blur(x, gaussian_kernel(SHIFTED_KERNEL_SIZE, covariance, shift=0.5 * (factor - 1)))
    elif method == "down-up":
        scale = rng.uniform(0.5, factor)
        x = resize(x, tuple(max(1, round(side * scale)) for side in size), rng.choice(["bilinear", "bicubic"]))
        method = rng.choice(["bilinear", "bicubic"])
    return resize(x, size, method)


def _noise(x: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    kind = rng.choice(list(NOISE_SHARES), p=list(NOISE_SHARES.values()))
    low, high = recipe.noise
    return gaussian_noise(x, rng.integers(low, high + 1) / 255.0, kind, rng)


def _random_jpeg(x: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    return _jpeg(x, recipe, rng) if rng.random() < recipe.jpeg_share else x


def _jpeg(x: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    low, high = recipe.jpeg
    return jpeg(x, int(rng.integers(low, high + 1)))
