"""The practical degradation model of BSRGAN (arXiv:2103.14006), and a milder one.

Blur, downsampling, noise and JPEG compression, each of random strength, in random order; JPEG compression last.

Shapes: images (H, W, 3) uint8 outside, float32 in [0, 1] inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ldm.modules.image_degradation.kernels import anisotropic, blur, gaussian_kernel, isotropic
from ldm.modules.image_degradation.ops import from_pixels, gaussian_noise, jpeg, resize, to_pixels

# Section 3 of the paper: sizes of blur kernels, kinds of noise and how often each is chosen.
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
NOISE_SHARES = {"correlated": 0.2, "colour": 0.4, "gray": 0.4}
DOWNSAMPLINGS = ("nearest", "bilinear", "bicubic", "area", "down-up")
SHIFTED_KERNEL_SIZE = 21


@dataclass(frozen=True)
class Recipe:
    """How strong each degradation may be, and how often it comes.

    `blur` multiplies the widths of the paper's blur; `noise` are the least and the largest deviation in levels of
    255; `jpeg` the least and the highest quality; `first_halved` how often a fourfold reduction begins by halving.
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
    """A badly taken, small picture of `image`, as in the paper.

    Args:
        image: (H, W, 3) uint8.
        sf: how many times smaller.
        rng: where the randomness comes from; by default seeded from torch's global generator.

    Returns:
        `{"image": (H // sf, W // sf, 3) uint8}`.

    Raises:
        ValueError: the image is of another form, or smaller than one pixel of the result.
    """
    return {"image": degrade(image, FULL, sf, rng)}


def degradation_fn_bsr_light(
    image: np.ndarray, sf: int = 4, rng: np.random.Generator | None = None
) -> dict[str, np.ndarray]:
    """`degradation_fn_bsr` with a quarter of the blur, a third of the noise and high JPEG quality."""
    return {"image": degrade(image, LIGHT, sf, rng)}


def degrade(image: np.ndarray, recipe: Recipe, sf: int = 4, rng: np.random.Generator | None = None) -> np.ndarray:
    """`image` (H, W, 3) degraded after `recipe` and `sf` times smaller, uint8; see `degradation_fn_bsr`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"degradation needs an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    height, width = (side // sf for side in image.shape[:2])
    if min(height, width) < 1:
        raise ValueError(f"an image of {image.shape[1]} × {image.shape[0]} cannot be made {sf} times smaller")
    rng = np.random.default_rng(torch.randint(2**62, ()).item()) if rng is None else rng
    x = from_pixels(image[: height * sf, : width * sf])
    if sf == 4 and rng.random() < recipe.first_halved:
        x = resize(x, (2 * height, 2 * width), rng.choice(["bilinear", "bicubic", "area"]))
        sf = 2
    steps: list[Callable[[np.ndarray], np.ndarray]] = [
        partial(_round_blur, recipe=recipe, sf=sf, rng=rng),
        partial(_stretched_blur, recipe=recipe, sf=sf, rng=rng),
        partial(_downsample, size=(height, width), rng=rng),
        partial(_noise, recipe=recipe, rng=rng),
        partial(_maybe_jpeg, recipe=recipe, rng=rng),
    ]
    for index in rng.permutation(len(steps)):
        x = steps[index](x)
    return to_pixels(_jpeg(x, recipe, rng))


def _round_blur(x: np.ndarray, recipe: Recipe, sf: int, rng: np.random.Generator) -> np.ndarray:
    deviation = recipe.blur * rng.uniform(0.1, 2.0 + 0.2 * sf)  # 2.4 for 2, 2.8 for 4
    return _maybe_blur(x, isotropic(deviation), recipe, rng)


def _stretched_blur(x: np.ndarray, recipe: Recipe, sf: int, rng: np.random.Generator) -> np.ndarray:
    across, along = recipe.blur * rng.uniform(0.5, 4.0 + sf, size=2)  # 6 for 2, 8 for 4
    return _maybe_blur(x, anisotropic(rng.uniform(0, np.pi), (along, across)), recipe, rng)


def _maybe_blur(x: np.ndarray, covariance: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    size = int(rng.choice(KERNEL_SIZES))
    return blur(x, gaussian_kernel(size, covariance)) if rng.random() < recipe.blur_share else x


def _downsample(x: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """To `size`, directly or by way of another size."""
    method = rng.choice(DOWNSAMPLINGS)
    factor = x.shape[0] / size[0]
    if method == "nearest":
        # The first pixel of each square is taken; a shifted blur brings the square's middle there.
        covariance = isotropic(rng.uniform(0.1, 0.6 * factor))
        x = blur(x, gaussian_kernel(SHIFTED_KERNEL_SIZE, covariance, shift=0.5 * (factor - 1)))
    elif method == "down-up":
        between = rng.uniform(0.5, factor)
        x = resize(x, tuple(max(1, round(side * between)) for side in size), rng.choice(["bilinear", "bicubic"]))
        method = rng.choice(["bilinear", "bicubic"])
    return resize(x, size, method)


def _noise(x: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    kind = rng.choice(list(NOISE_SHARES), p=list(NOISE_SHARES.values()))
    low, high = recipe.noise
    return gaussian_noise(x, rng.integers(low, high + 1) / 255.0, kind, rng)


def _maybe_jpeg(x: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    return _jpeg(x, recipe, rng) if rng.random() < recipe.jpeg_share else x


def _jpeg(x: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    low, high = recipe.jpeg
    return jpeg(x, int(rng.integers(low, high + 1)))
